//! The legs of a request: how they are sent, how they end, and what their loss means.

use super::{Channel, TOKEN_KIND, TOKEN_NOTICE};
use crate::engine::MAX_PEERS;
use crate::engine::message::ToManager;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{Range, RangesBody};
use crate::engine::peer::command::{PeerCommand, Span, WriteOrder};
use crate::engine::request::{LOCAL, LOCAL_MASK, Origin, PeerLeg, Request, RequestKind};
use crate::host::{Completion, Data, DiskIo, DiskOp, Host, IoStatus, PeerRefusal, PeerSlot};

/// Ranges in one out-of-sync notice.
const NOTICE_RANGES: usize = 128;
/// Notices in flight to one peer.
const NOTICES_IN_FLIGHT: u32 = 8;
/// Bytes of a notice's buffer.
const NOTICE_BYTES: usize = 4096;

impl<H: Host> Channel<H> {
    /// Gives a leg to the host; false when the host, or the peer, has no resources for all of it now.
    pub(super) fn send_leg(&mut self, cx: &mut H, index: u16, leg: usize) -> bool {
        if leg == LOCAL {
            self.send_local(cx, index)
        } else {
            self.send_peer(cx, index, leg)
        }
    }

    fn send_local(&mut self, cx: &mut H, index: u16) -> bool {
        let token = self.requests.token(index, LOCAL, 0);
        let Some(request) = self.requests.get_mut(index) else {
            return true;
        };
        let data = request.payload.clone().map_or(Data::None, Data::Payload);
        let bytes = self.shared.geometry.bytes_of(request.lba, request.blocks);
        let io = DiskIo {
            op: disk_op(request.kind),
            offset: self.shared.geometry.data_offset + bytes.start,
            len: bytes.end - bytes.start,
        };
        if cx.disk(token, io, data).is_err() {
            return false;
        }
        self.disk_references += 1;
        request.unsent &= !LOCAL_MASK;
        request.pending |= LOCAL_MASK;
        true
    }

    fn send_peer(&mut self, cx: &mut H, index: u16, slot: PeerSlot) -> bool {
        let block = self.shared.geometry.block_size as usize;
        loop {
            let Some(request) = self.requests.get_mut(index) else {
                return true;
            };
            let PeerLeg {
                unsent,
                session,
                first,
                ..
            } = request.legs[slot];
            if unsent == 0 {
                request.unsent &= !(1 << slot);
                return true;
            }
            if self.short & 1 << slot != 0
                || self.commands[slot] >= self.view.peers[slot].limits.commands
            {
                self.short |= 1 << slot;
                return false;
            }
            let place = unsent.trailing_zeros();
            let piece = first + place as u16;
            let Some((command, lba, blocks)) = peer_command(request, session, piece) else {
                request.drop_peer(slot);
                return true;
            };
            let part = match request.kind {
                RequestKind::Read | RequestKind::Write { .. } => {
                    let start = (lba - request.lba) as usize * block;
                    start..start + blocks as usize * block
                }
                _ => 0..0,
            };
            let data = request.payload.clone().map_or(Data::None, Data::Payload);
            let token = self.requests.token(index, slot, place);
            match cx.peer(slot, token, &command, data, part) {
                Ok(()) => {
                    self.commands[slot] += 1;
                    if let Some(request) = self.requests.get_mut(index) {
                        let leg = &mut request.legs[slot];
                        leg.unsent &= !(1 << place);
                        leg.in_flight += 1;
                        request.pending |= 1 << slot;
                    }
                }
                Err(PeerRefusal::Later(_)) => {
                    self.short |= 1 << slot;
                    return false;
                }
                Err(PeerRefusal::Down(_)) => {
                    self.peer_leg_failed(cx, index, slot, session);
                    return true;
                }
            }
        }
    }

    /// What the peer has of the request counts for nothing: the bit is set, and the session is over.
    fn peer_leg_failed(&mut self, cx: &mut H, index: u16, slot: PeerSlot, session: u32) {
        if let Some(request) = self.requests.get_mut(index) {
            request.drop_peer(slot);
        }
        self.miss(index, slot);
        self.report_lost(cx, slot, session);
    }

    pub(super) fn leg_done(&mut self, cx: &mut H, completion: Completion<H>) {
        let Some((index, leg, place)) = self.requests.resolve(completion.token) else {
            debug_assert!(false, "a completion without its request");
            return;
        };
        if leg == LOCAL {
            self.disk_references -= 1;
            if let Some(request) = self.requests.get_mut(index) {
                request.pending &= !LOCAL_MASK;
                if completion.status == IoStatus::Ok {
                    request.done |= LOCAL_MASK;
                } else {
                    self.local_leg_failed(cx, index);
                }
            }
        } else {
            self.commands[leg] -= 1;
            let (status, answer) = (completion.status, completion.answer);
            if self.piece_done(cx, index, leg, place, status, answer) {
                return self.enqueue(index);
            }
        }
        self.advance(cx, index);
    }

    /// A piece has ended; whether it has to be sent again, later.
    fn piece_done(
        &mut self,
        cx: &mut H,
        index: u16,
        slot: PeerSlot,
        place: u32,
        status: IoStatus,
        answer: PeerAnswer,
    ) -> bool {
        let Some(request) = self.requests.get_mut(index) else {
            return false;
        };
        let mask = 1u8 << slot;
        // If not, another piece has failed or the session was given up: the bit stays, whatever the peer has of it.
        let counts = (request.tried | request.missed) & mask == 0;
        let leg = &mut request.legs[slot];
        leg.in_flight -= 1;
        if leg.in_flight == 0 {
            request.pending &= !mask;
        }
        let session = leg.session;
        match (status, answer) {
            (IoStatus::Ok, PeerAnswer::Ok) => {
                if counts && leg.in_flight == 0 && leg.unsent == 0 {
                    if leg.next_round(request.pieces) {
                        request.unsent |= mask;
                    } else {
                        request.done |= mask;
                    }
                }
                false
            }
            (IoStatus::Ok, PeerAnswer::Busy | PeerAnswer::NotYet)
                if session == self.view.peers[slot].send_session =>
            {
                if counts {
                    leg.unsent |= 1 << place;
                    request.unsent |= mask;
                }
                counts
            }
            _ => {
                self.peer_leg_failed(cx, index, slot, session);
                false
            }
        }
    }

    fn local_leg_failed(&mut self, cx: &mut H, index: u16) {
        self.report_disk_failed(cx);
        self.without_disk(index);
    }

    /// No core reads the disk from here on, and the manager lets it go.
    pub(super) fn report_disk_failed(&mut self, cx: &mut H) {
        self.shared.set_disk_failed(true);
        if !std::mem::replace(&mut self.requested.disk_failed, true) {
            cx.to_manager(ToManager::DiskFailed);
        }
    }

    /// What the local disk does not have, the peers must know of.
    fn without_disk(&mut self, index: u16) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        request.tried |= LOCAL_MASK;
        let lasts = request.kind.writes() || request.kind == RequestKind::Flush;
        if !lasts || request.local_failed || !matches!(request.origin, Origin::Application(_)) {
            return;
        }
        request.local_failed = true;
        if !request.kind.writes() {
            return;
        }
        let range = (request.lba, request.blocks);
        for (slot, peer) in self.view.peers.iter().enumerate() {
            if peer.send_session != 0 {
                self.notices[slot].queued.push_back(range);
            }
        }
    }

    /// The sessions of these slots are over: what has not been answered is missed, whatever the peer got of it.
    pub(super) fn lose_sessions(&mut self, index: u16, slots: u8) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        let affected = slots & (request.unsent | request.pending);
        if affected == 0 {
            return;
        }
        for slot in 0..MAX_PEERS {
            if affected & (1 << slot) != 0 {
                if let Some(request) = self.requests.get_mut(index) {
                    request.drop_peer(slot);
                }
                if !mutation::is(Mutation::UnansweredWithoutBit) {
                    self.miss(index, slot);
                }
            }
        }
        self.enqueue(index);
    }

    /// The local disk is no longer used: what it has not confirmed, it lacks.
    pub(super) fn lose_disk(&mut self, index: u16) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        if (request.unsent | request.pending) & LOCAL_MASK != 0 {
            request.unsent &= !LOCAL_MASK;
            self.without_disk(index);
            self.enqueue(index);
        }
    }

    pub(super) fn report_lost(&mut self, cx: &mut H, slot: PeerSlot, session: u32) {
        if session == self.view.peers[slot].send_session && self.requested.lost[slot] != session {
            self.requested.lost[slot] = session;
            cx.to_manager(ToManager::PeerLost(slot, session));
        }
    }

    pub(super) fn send_notices(&mut self, cx: &mut H) {
        for slot in 0..MAX_PEERS {
            let session = self.view.peers[slot].send_session;
            while self.may_send_notice(slot) {
                if !self.send_notice(cx, slot, session) {
                    break;
                }
            }
        }
    }

    pub(super) fn may_send_notice(&self, slot: PeerSlot) -> bool {
        !self.notices[slot].queued.is_empty()
            && self.notices[slot].in_flight < NOTICES_IN_FLIGHT
            && self.commands[slot] < self.view.peers[slot].limits.commands
            && self.view.peers[slot].send_session != 0
    }

    fn send_notice(&mut self, cx: &mut H, slot: PeerSlot, session: u32) -> bool {
        let Some(mut buffer) = cx.buffer(NOTICE_BYTES) else {
            return false;
        };
        let room = NOTICE_BYTES.min(self.view.peers[slot].limits.body_bytes as usize);
        let notices = &mut self.notices[slot];
        let count = notices.queued.len().min(NOTICE_RANGES);
        let Some((lba, blocks)) = notices.queued.front().copied() else {
            return false;
        };
        let Some(span) = Span::new(lba, blocks) else {
            return false;
        };
        let mut ranges = [Range { span, sequence: 0 }; NOTICE_RANGES];
        for (range, &(lba, blocks)) in ranges.iter_mut().zip(&notices.queued) {
            if let Some(span) = Span::new(lba, blocks) {
                range.span = span;
            }
        }
        let (count, len) = RangesBody::emit(&ranges[..count], &mut buffer.as_mut()[..room]);
        let command = PeerCommand::OutOfSync {
            session,
            sequence: self.shared.next_control_sequence(slot),
            len: len as u32,
        };
        let token = Self::token(TOKEN_NOTICE, slot);
        match cx.peer(slot, token, &command, Data::Buffer(buffer), 0..len) {
            Ok(()) => {
                self.commands[slot] += 1;
                notices.queued.drain(..count);
                notices.in_flight += 1;
                true
            }
            Err(PeerRefusal::Later(_)) => false,
            Err(PeerRefusal::Down(_)) => {
                self.report_lost(cx, slot, session);
                false
            }
        }
    }

    pub(super) fn notice_done(&mut self, cx: &mut H, completion: Completion<H>) {
        let slot = (completion.token.0 & !TOKEN_KIND) as usize;
        self.notices[slot].in_flight -= 1;
        self.commands[slot] -= 1;
        if completion.status != IoStatus::Ok || completion.answer != PeerAnswer::Ok {
            // Our own bit is set, so nothing is lost; but the peer's count differs from ours: start again.
            let session = self.view.peers[slot].send_session;
            self.report_lost(cx, slot, session);
        }
    }
}

fn disk_op(kind: RequestKind) -> DiskOp {
    match kind {
        RequestKind::Read | RequestKind::ResyncRead => DiskOp::Read,
        _ if mutation::is(Mutation::FuaDropped) && kind == (RequestKind::Write { fua: true }) => {
            DiskOp::Write { fua: false }
        }
        RequestKind::Write { fua } => DiskOp::Write { fua },
        RequestKind::WriteZeroes { fua } => DiskOp::WriteZeroes { fua },
        // Read back as zeroes: the replicas would differ after an unmap on devices that do not promise that.
        RequestKind::Unmap => DiskOp::WriteZeroes { fua: false },
        RequestKind::Flush => DiskOp::Flush,
    }
}

/// The command of a piece of a peer leg, and the blocks that it is about; `None` if the span is none, which `accepts` has
/// ruled out.
fn peer_command<H: Host>(
    request: &Request<H>,
    session: u32,
    piece: u16,
) -> Option<(PeerCommand, u64, u32)> {
    if request.kind == RequestKind::Flush {
        let sequence = 0;
        return Some((PeerCommand::Flush { session, sequence }, 0, 0));
    }
    let (lba, blocks) = request.piece(piece);
    let span = Span::new(lba, blocks)?;
    let order = WriteOrder::new(request.sequence + u64::from(piece));
    let command = match request.kind {
        RequestKind::Write { fua } => PeerCommand::Write {
            session,
            span,
            fua,
            order,
        },
        // An unmapped range reads zeroes on every replica only if each device says so: zeroes are written instead.
        RequestKind::WriteZeroes { .. } | RequestKind::Unmap => PeerCommand::WriteZeroes {
            session,
            span,
            fua: request.kind == RequestKind::WriteZeroes { fua: true },
            order,
        },
        _ => PeerCommand::Read {
            session,
            span,
            must_include: 0,
        },
    };
    Some((command, lba, blocks))
}
