//! What the nodes of a session tell each other about themselves, and what a command of a session leads to.

use super::Manager;
use super::known::Known;
use super::outbox::Call;
use super::steps::{SessionStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::StateBody;
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::state::{ConnState, DiskState, PeerState, Role};
use crate::host::{Host, PeerSlot};

impl<H: Host> Manager<H> {
    /// Tells a peer how things are here.
    pub(super) fn tell_state(&mut self, slot: PeerSlot) {
        self.tell_state_for(slot, Call::State);
    }

    /// The same; `call` is what the answer is for.
    pub(super) fn tell_state_for(&mut self, slot: PeerSlot, call: Call) {
        if !self.peers[slot].established {
            return;
        }
        self.revision += 1;
        let mut connected_nodes = 0u8;
        let mut up_to_date_nodes = 0u8;
        for (peer, view) in self.peers.iter().zip(&self.view.peers) {
            if let Some(node) = peer.node_id {
                connected_nodes |= u8::from(peer.established) << node;
                up_to_date_nodes |= u8::from(view.has_latest()) << node;
            }
        }
        if self.view.disk == DiskState::UpToDate {
            up_to_date_nodes |= 1 << self.superblock.node_id;
        }
        let mut bitmap_generations = [0; 8];
        for (slot, peer) in self.peers.iter().enumerate() {
            if let Some(node) = peer.node_id {
                bitmap_generations[usize::from(node)] = self.superblock.generations.bitmap[slot];
            }
        }
        let body = StateBody {
            role: self.told_role(),
            disk: self.view.disk,
            conn: self.view.peers[slot].conn,
            resync_paused: self.puller.paused,
            io_suspended: self.view.suspended,
            has_quorum: true,
            generation_running: self.generation.is_running(),
            connected_nodes,
            up_to_date_nodes,
            revision: self.revision,
            current_generation: self.superblock.generations.current,
            bitmap_generation: self.superblock.generations.bitmap[slot],
            promotion: self.promotion,
            bits_set: self.masters[slot].count(),
            bitmap_generations,
            history: self.superblock.generations.history,
        };
        let sequence = self.shared.next_control_sequence(slot);
        let command = PeerCommand::StatePut {
            session: self.peers[slot].session,
            sequence,
            len: StateBody::BYTES as u32,
        };
        self.call(slot, command, body.emit().to_vec(), call);
    }

    pub(super) fn tell_all(&mut self) {
        for slot in 0..MAX_PEERS {
            self.tell_state(slot);
        }
    }

    /// A command of a session; the channel that received it knows the session.
    pub(super) fn received_in_session(
        &mut self,
        cx: &mut H,
        command: PeerCommand,
        body: &[u8],
        reply: usize,
    ) {
        let session = command.session();
        let slot = (0..MAX_PEERS).find(|&slot| session != 0 && self.peers[slot].session == session);
        let Some(slot) = slot else {
            return self.answer(cx, reply, PeerAnswer::Fenced);
        };
        self.peers[slot].heard_ns = cx.now_ns();
        let sequence = command.control_sequence();
        if let Some(held) = self.replies.get_mut(&reply) {
            held.slot = Some(slot);
        }
        if let Some(sequence) = sequence {
            match self.peers[slot].known.begin(sequence, reply) {
                Known::New => {}
                Known::Answered(_) if mutation::is(Mutation::RepeatedControl) => {}
                Known::Joined => return,
                Known::Answered(answer) => return self.answer(cx, reply, answer),
                Known::TooOld => return self.answer(cx, reply, PeerAnswer::Fenced),
            }
            if let Some(held) = self.replies.get_mut(&reply) {
                held.sequence = Some(sequence);
            }
        }
        match command {
            PeerCommand::Ping { .. } => self.answer(cx, reply, PeerAnswer::Ok),
            PeerCommand::StatePut { .. } => self.received_state(cx, slot, body, reply),
            PeerCommand::OutOfSync { .. } => self.received_notice(cx, slot, body, reply),
            PeerCommand::BitmapOr { .. } => self.received_bitmap(cx, slot, body, reply),
            PeerCommand::BitmapEnd { .. } => self.received_bitmap_end(cx, slot, reply),
            PeerCommand::SyncStart { .. } => self.received_sync_start(cx, slot, body, reply),
            PeerCommand::ResyncDone { .. } => self.received_resync_done(cx, slot, body, reply),
            PeerCommand::SyncFinish { phase, .. } => {
                self.received_finish(cx, slot, phase, body, reply)
            }
            PeerCommand::NewGeneration { .. } => self.received_generation(cx, slot, body, reply),
            PeerCommand::Prepare { .. } => self.received_prepare(cx, slot, body, reply),
            PeerCommand::Commit { .. } => self.received_commit(cx, slot, body, reply),
            PeerCommand::Abort { .. } => self.received_abort(cx, slot, body, reply),
            PeerCommand::Goodbye { outdate, .. } => self.received_goodbye(cx, slot, outdate, reply),
            _ => self.answer(cx, reply, PeerAnswer::Malformed),
        }
    }

    pub(super) fn received_state(&mut self, cx: &mut H, slot: PeerSlot, body: &[u8], reply: usize) {
        let Ok(body) = StateBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        self.answer(cx, reply, PeerAnswer::Ok);
        if self.peers[slot].established {
            self.take_state(cx, slot, body);
        } else {
            // It is ahead of us in the handshake.
            let early = &mut self.peers[slot].early_state;
            if early.is_none_or(|earlier| earlier.revision < body.revision) {
                *early = Some(body);
            }
        }
    }

    pub(super) fn take_state(&mut self, cx: &mut H, slot: PeerSlot, body: StateBody) {
        let peer = &mut self.peers[slot];
        if body.revision <= peer.state_revision {
            return;
        }
        peer.state_revision = body.revision;
        let became_primary = body.role == Role::Primary && peer.role != Role::Primary;
        let changed_role = peer.role != body.role;
        if body.role == Role::Primary || peer.promoting == Some(body.promotion) {
            peer.promoting = None;
        }
        peer.role = body.role;
        peer.current_generation = body.current_generation;
        peer.starts_generation = body.generation_running;
        peer.bitmap_generations = body.bitmap_generations;
        peer.history = body.history;
        peer.paused_by_peer = body.resync_paused;
        if body.role == Role::Primary && self.view.role == Role::Primary {
            return self.stand_alone(cx, slot, "both nodes are Primary; demote one");
        }
        if became_primary {
            self.end_other_resyncs(cx, slot, "a peer has become Primary, and is the source");
        }
        let flags = &self.superblock.flags;
        if (flags.told || flags.starting)
            && body.role == Role::Primary
            && body.current_generation == self.superblock.generations.current
            && !body.generation_running
        {
            self.superblock.flags.told = false;
            self.keep_generation();
            self.commit_superblock(cx, Then::Nothing);
        }
        if changed_role {
            self.hello_changed(cx);
        }
        let view = &mut self.view.peers[slot];
        let old = *view;
        view.diskless |= body.disk < DiskState::Inconsistent;
        view.conn = match (view.conn, body.conn) {
            (ConnState::SyncSource, ConnState::PausedSyncT) => ConnState::PausedSyncS,
            (ConnState::PausedSyncS, ConnState::SyncTarget) => ConnState::SyncSource,
            (conn, _) => conn,
        };
        // In a resync the disk states follow from the resync; otherwise they are what the peer says.
        if view.conn == ConnState::Connected {
            match PeerState::new(view.conn, body.disk) {
                Ok(state) => view.pdsk = state.pdsk(),
                Err(_) => {
                    return self.lose_session(cx, slot, "the peer's disk is in a passing state");
                }
            }
        } else if body.disk < DiskState::Inconsistent {
            return self.lose_session(cx, slot, "the peer has lost its disk");
        }
        if *view != old {
            self.adopt(cx, Then::Nothing);
        }
    }

    pub(super) fn received_goodbye(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        outdate: bool,
        reply: usize,
    ) {
        if outdate && self.view.role != Role::Primary && self.view.disk == DiskState::UpToDate {
            self.view.disk = DiskState::Outdated;
            self.record_disk();
            let epoch = self.peers[slot].epoch;
            let step = SessionStep::Outdated(reply);
            return self.commit_superblock(cx, Then::Session(slot, epoch, step));
        }
        self.parted(cx, slot, reply);
    }

    pub(super) fn parted(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        self.answer(cx, reply, PeerAnswer::Ok);
        self.lose_session(cx, slot, "the peer has disconnected");
    }
}
