//! The legs of a request: how they are sent, how they end, and what their loss means.

use super::{Channel, TOKEN_KIND, TOKEN_NOTICE};
use crate::engine::MAX_PEERS;
use crate::engine::message::ToManager;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{Range, RangesBody};
use crate::engine::peer::command::{PeerCommand, Span, WriteOrder};
use crate::engine::request::{LOCAL, LOCAL_MASK, Origin, Request, RequestKind};
use crate::host::{Completion, Data, DiskIo, DiskOp, Host, IoStatus, PeerRefusal, PeerSlot};

/// Ranges in one out-of-sync notice.
const NOTICE_RANGES: usize = 128;
/// Notices in flight to one peer.
const NOTICES_IN_FLIGHT: u32 = 8;
/// Bytes of a notice's buffer.
const NOTICE_BYTES: usize = 4096;

impl<H: Host> Channel<H> {
    /// Gives a leg to the host; false when the host has no resources now.
    pub(super) fn send_leg(&mut self, cx: &mut H, index: u16, leg: usize) -> bool {
        let token = self.requests.token(index, leg);
        let Some(request) = self.requests.get_mut(index) else {
            return true;
        };
        let data = request.payload.clone().map_or(Data::None, Data::Payload);
        if leg == LOCAL {
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
        } else {
            let len = match request.kind {
                RequestKind::Read | RequestKind::Write { .. } => {
                    request.blocks as usize * self.shared.geometry.block_size as usize
                }
                _ => 0,
            };
            let Some(command) = peer_command(request, request.sessions[leg]) else {
                request.unsent &= !(1 << leg);
                return true;
            };
            match cx.peer(leg, token, &command, data, len) {
                Ok(()) => {}
                Err(PeerRefusal::Later(_)) => return false,
                Err(PeerRefusal::Down(_)) => {
                    request.unsent &= !(1 << leg);
                    request.tried |= 1 << leg;
                    let session = request.sessions[leg];
                    self.miss(index, leg);
                    self.report_lost(cx, leg, session);
                    return true;
                }
            }
        }
        request.unsent &= !(1 << leg);
        request.pending |= 1 << leg;
        true
    }

    pub(super) fn leg_done(&mut self, cx: &mut H, completion: Completion<H>) {
        let Some((index, leg)) = self.requests.resolve(completion.token) else {
            debug_assert!(false, "a completion without its request");
            return;
        };
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        let mask = 1u8 << leg;
        request.pending &= !mask;
        if leg == LOCAL {
            self.disk_references -= 1;
            if completion.status == IoStatus::Ok {
                request.done |= mask;
            } else {
                self.local_leg_failed(cx, index);
            }
        } else {
            let session = request.sessions[leg];
            match (completion.status, completion.answer) {
                (IoStatus::Ok, PeerAnswer::Ok) if request.missed & mask == 0 => {
                    request.done |= mask
                }
                // The peer has it, but its session was given up before it said so: the bit stays.
                (IoStatus::Ok, PeerAnswer::Ok) => {}
                (IoStatus::Ok, PeerAnswer::Busy | PeerAnswer::NotYet)
                    if session == self.view.peers[leg].send_session =>
                {
                    request.unsent |= mask;
                    return self.enqueue(index);
                }
                _ => {
                    request.tried |= mask;
                    self.miss(index, leg);
                    self.report_lost(cx, leg, session);
                }
            }
        }
        self.advance(cx, index);
    }

    fn local_leg_failed(&mut self, cx: &mut H, index: u16) {
        if !std::mem::replace(&mut self.requested.disk_failed, true) {
            cx.to_manager(ToManager::DiskFailed);
        }
        self.without_disk(index);
    }

    /// What the local disk does not have, the peers must know of.
    fn without_disk(&mut self, index: u16) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        request.tried |= LOCAL_MASK;
        if !request.kind.writes()
            || request.local_failed
            || !matches!(request.origin, Origin::Application(_))
        {
            return;
        }
        request.local_failed = true;
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
        request.unsent &= !slots;
        request.tried |= affected;
        for slot in 0..MAX_PEERS {
            if affected & (1 << slot) != 0 {
                self.miss(index, slot);
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
            while !self.notices[slot].queued.is_empty()
                && self.notices[slot].in_flight < NOTICES_IN_FLIGHT
            {
                if session == 0 || !self.send_notice(cx, slot, session) {
                    break;
                }
            }
        }
    }

    fn send_notice(&mut self, cx: &mut H, slot: PeerSlot, session: u32) -> bool {
        let Some(mut buffer) = cx.buffer(NOTICE_BYTES) else {
            return false;
        };
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
        let (count, len) = RangesBody::emit(&ranges[..count], buffer.as_mut());
        let command = PeerCommand::OutOfSync {
            session,
            sequence: self.shared.next_control_sequence(slot),
            len: len as u32,
        };
        let token = Self::token(TOKEN_NOTICE, slot);
        match cx.peer(slot, token, &command, Data::Buffer(buffer), len) {
            Ok(()) => {
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
        RequestKind::Write { fua } => DiskOp::Write { fua },
        RequestKind::WriteZeroes { fua } => DiskOp::WriteZeroes { fua },
        // Read back as zeroes: the replicas would differ after an unmap on devices that do not promise that.
        RequestKind::Unmap => DiskOp::WriteZeroes { fua: false },
        RequestKind::Flush => DiskOp::Flush,
    }
}

/// The command of a peer leg; `None` if the span is none, which `accepts` has ruled out.
fn peer_command<H: Host>(request: &Request<H>, session: u32) -> Option<PeerCommand> {
    if request.kind == RequestKind::Flush {
        return Some(PeerCommand::Flush {
            session,
            sequence: 0,
        });
    }
    let span = Span::new(request.lba, request.blocks)?;
    let order = WriteOrder::new(request.sequence);
    Some(match request.kind {
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
    })
}
