//! Commands that a peer sends to this node's endpoint. Writes and reads are done here; everything else goes to the
//! manager, with its data.

use super::Channel;
use crate::engine::MAX_PEERS;
use crate::engine::duplicates::{Begin, DuplicateWindow};
use crate::engine::message::ToManager;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::{PeerCommand, WriteOrder};
use crate::engine::peer::state::DiskState;
use crate::engine::request::{LOCAL_MASK, Origin, RequestKind, Stage};
use crate::engine::volume::{MAX_TRANSFER_BYTES, MAX_ZEROES_BYTES};
use crate::host::{Host, PeerSlot};

impl<H: Host> Channel<H> {
    /// Takes a command that has arrived at the endpoint on this core. `payload` is its data, or room for the answer's.
    pub fn received(
        &mut self,
        cx: &mut H,
        command: PeerCommand,
        payload: Option<H::Payload>,
        io: H::PeerIo,
    ) {
        match self.start(cx, command, payload, io) {
            Ok(()) => {}
            Err((io, answer)) => cx.answer(io, answer),
        }
        self.pump(cx);
    }

    fn start(
        &mut self,
        cx: &mut H,
        command: PeerCommand,
        payload: Option<H::Payload>,
        io: H::PeerIo,
    ) -> Result<(), (H::PeerIo, PeerAnswer)> {
        let (kind, session, span, order) = match command {
            PeerCommand::Write {
                session,
                span,
                fua,
                order,
            } => (RequestKind::Write { fua }, session, Some(span), Some(order)),
            PeerCommand::WriteZeroes {
                session,
                span,
                fua,
                order,
            } => (
                RequestKind::WriteZeroes { fua },
                session,
                Some(span),
                Some(order),
            ),
            PeerCommand::Unmap {
                session,
                span,
                order,
            } => (RequestKind::Unmap, session, Some(span), Some(order)),
            PeerCommand::Read { session, span, .. } => {
                (RequestKind::Read, session, Some(span), None)
            }
            PeerCommand::ResyncRead { session, span, .. } => {
                (RequestKind::ResyncRead, session, Some(span), None)
            }
            PeerCommand::Flush { session, .. } => (RequestKind::Flush, session, None, None),
            _ => return self.forward(cx, command, payload, io),
        };
        let (lba, blocks) = span.map_or((0, 0), |span| (span.lba(), span.blocks()));
        let sequence = match command {
            PeerCommand::ResyncRead { sequence, .. } => Some(sequence),
            _ => order.map(WriteOrder::sequence),
        };
        let Some(slot) = self.sender(session) else {
            return Err((io, PeerAnswer::Fenced));
        };
        if let Err(answer) = self.admits(slot, kind, lba, blocks, payload.is_some()) {
            return Err((io, answer));
        }
        if self.requests.len() == usize::from(self.requests.capacity()) {
            return Err((io, PeerAnswer::Busy));
        }
        if let Some(sequence) = sequence {
            let reads = kind == RequestKind::ResyncRead;
            match self.window(slot, kind).begin(sequence) {
                Begin::Fresh => {}
                Begin::Applied if !reads && mutation::is(Mutation::RepeatedWrite) => {}
                // Its data went with the first answer. Reading again would leave an entry in `served` that nothing
                // takes back if a write has come meanwhile, so it has to be asked for anew.
                Begin::Applied | Begin::TooOld if reads => {
                    return Err((io, PeerAnswer::Duplicate));
                }
                Begin::Applied => return Err((io, PeerAnswer::Ok)),
                Begin::Failed => return Err((io, PeerAnswer::DiskError)),
                Begin::InFlight | Begin::Busy => return Err((io, PeerAnswer::Busy)),
                Begin::TooOld => return Err((io, PeerAnswer::Fenced)),
            }
        }
        let origin = Origin::Peer {
            io,
            slot,
            session,
            sequence,
        };
        let mut request = self.request(cx, origin, kind, lba, blocks, payload);
        if kind.writes() || kind == RequestKind::ResyncRead {
            request.stage = Stage::Lock;
        } else {
            request.unsent = LOCAL_MASK;
            request.stage = Stage::Send;
        }
        if let Some(index) = self.requests.insert(request) {
            self.advance(cx, index);
        }
        Ok(())
    }

    /// Where this peer's commands of this kind are known by their numbers.
    pub(super) fn window(&self, slot: PeerSlot, kind: RequestKind) -> &DuplicateWindow {
        if kind == RequestKind::ResyncRead {
            &self.shared.resync_reads[slot]
        } else {
            &self.shared.duplicates[slot]
        }
    }

    /// The peer whose current session this is.
    fn sender(&self, session: u32) -> Option<PeerSlot> {
        let is_current = |slot: PeerSlot| self.view.peers[slot].recv_session == session;
        let is_any = |slot: PeerSlot| {
            mutation::is(Mutation::AnySession) && self.view.peers[slot].recv_session != 0
        };
        (0..MAX_PEERS).find(|&slot| session != 0 && (is_current(slot) || is_any(slot)))
    }

    fn admits(
        &self,
        slot: PeerSlot,
        kind: RequestKind,
        lba: u64,
        blocks: u32,
        has_payload: bool,
    ) -> Result<(), PeerAnswer> {
        let geometry = &self.shared.geometry;
        let bytes = u64::from(blocks) * u64::from(geometry.block_size);
        let carries_data = match kind {
            RequestKind::Flush => return self.disk_answer(),
            RequestKind::Read | RequestKind::ResyncRead | RequestKind::Write { .. } => true,
            RequestKind::WriteZeroes { .. } | RequestKind::Unmap => false,
        };
        let limit = if carries_data {
            MAX_TRANSFER_BYTES
        } else {
            MAX_ZEROES_BYTES
        };
        if bytes > limit || carries_data != has_payload || !geometry.contains(lba, blocks) {
            return Err(PeerAnswer::Malformed);
        }
        match kind {
            RequestKind::Read if self.view.disk != DiskState::UpToDate => {
                Err(PeerAnswer::DiskError)
            }
            RequestKind::ResyncRead if self.view.disk != DiskState::UpToDate => {
                Err(PeerAnswer::DiskError)
            }
            // Until every core mirrors writes to the target, a read here could miss one.
            RequestKind::ResyncRead if !self.view.peers[slot].serve => Err(PeerAnswer::NotYet),
            _ => Ok(()),
        }
    }

    fn disk_answer(&self) -> Result<(), PeerAnswer> {
        if self.view.disk_is_usable() {
            Ok(())
        } else {
            Err(PeerAnswer::DiskError)
        }
    }

    fn forward(
        &mut self,
        cx: &mut H,
        command: PeerCommand,
        payload: Option<H::Payload>,
        io: H::PeerIo,
    ) -> Result<(), (H::PeerIo, PeerAnswer)> {
        let opens_session = matches!(
            command,
            PeerCommand::HelloPut { .. } | PeerCommand::Confirm { .. }
        );
        if !opens_session && self.sender(command.session()).is_none() {
            return Err((io, PeerAnswer::Fenced));
        }
        let body = payload.map_or_else(Vec::new, |payload| cx.read_payload(&payload));
        cx.to_manager(ToManager::Command {
            channel: self.id,
            command,
            body,
            io,
        });
        Ok(())
    }
}
