//! Moves a request from stage to stage, as far as it goes now.

use super::Channel;
use crate::engine::MAX_PEERS;
use crate::engine::message::{Drain, ToManager};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::state::{DiskState, Role};
use crate::engine::request::{LOCAL_MASK, Origin, Request, RequestKind, Stage, pieces_of};
use crate::host::{AppStatus, Host};

/// Failed attempts after which a waiter reserves its range.
const RESERVE_AFTER: u32 = 8;
/// How long a resync read waits for its range before it is answered "not yet": longer than the writes take that were
/// there before it, or it would never be served where writes never pause. It holds a buffer of the transport meanwhile.
const RESYNC_READ_WAIT_NS: u64 = 200_000_000;

/// What became of a step.
enum Step {
    /// On to the stage that the request is in now.
    Next,
    /// The poller tries again.
    Wait,
    /// Legs are on their way, or the request is gone.
    Leave,
}

impl<H: Host> Channel<H> {
    pub(super) fn advance(&mut self, cx: &mut H, index: u16) {
        loop {
            let Some(request) = self.requests.get(index) else {
                return;
            };
            let step = match request.stage {
                Stage::Held => self.leave_held(cx, index),
                Stage::Lock => self.take_lock(cx, index),
                Stage::Log => self.enter_log(cx, index),
                Stage::Send => self.send_legs(cx, index),
                Stage::Flight => self.land(cx, index),
                Stage::Settle => self.settle(cx, index),
            };
            match step {
                Step::Next => {}
                Step::Wait => return self.enqueue(index),
                Step::Leave => return,
            }
        }
    }

    pub(super) fn enqueue(&mut self, index: u16) {
        if let Some(request) = self.requests.get_mut(index)
            && !request.queued
        {
            request.queued = true;
            self.waiting.push_back(index);
        }
    }

    pub(super) fn retry_waiting(&mut self, cx: &mut H) {
        self.short = 0;
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else {
                return;
            };
            if let Some(request) = self.requests.get_mut(index) {
                request.queued = false;
                self.advance(cx, index);
            }
        }
    }

    fn leave_held(&mut self, cx: &mut H, index: u16) -> Step {
        if self.view.closing || self.view.role != Role::Primary {
            return self.end(cx, index, AppStatus::Inaccessible);
        }
        if !self.view.permits_io() {
            return Step::Wait;
        }
        if !self.view.has_data() {
            return self.end(cx, index, AppStatus::Failed);
        }
        let Some(request) = self.requests.get_mut(index) else {
            return Step::Leave;
        };
        if self.view.disk_is_usable() {
            // It may be another one than that which failed.
            request.tried &= !LOCAL_MASK;
        }
        let kind = request.kind;
        match kind {
            RequestKind::Read => self.choose_source(cx, index),
            // A flush too: what the disk had in its cache counts as written only where it is known to lack it.
            _ if self.waits_for_peers(cx) => Step::Wait,
            RequestKind::Flush => self.assign_flush(index),
            _ => self.enter(index, Stage::Lock),
        }
    }

    /// Without a disk of its own a Primary writes only when its peers mark by themselves what that disk lacks.
    fn waits_for_peers(&mut self, cx: &mut H) -> bool {
        let waits = !self.view.disk_is_usable() && !self.view.own_disk_may_miss;
        if waits {
            self.need_generation(cx, LOCAL_MASK);
        }
        waits
    }

    fn need_generation(&mut self, cx: &mut H, missing: u8) {
        if missing & !self.requested.generation_for != 0 {
            self.requested.generation_for |= missing;
            cx.to_manager(ToManager::NeedGeneration(missing));
        }
    }

    fn enter(&mut self, index: u16, stage: Stage) -> Step {
        if let Some(request) = self.requests.get_mut(index) {
            request.stage = stage;
        }
        Step::Next
    }

    /// Where a read goes: here, unless the blocks are stale or were tried; else to a peer with the latest data.
    fn choose_source(&mut self, cx: &mut H, index: u16) -> Step {
        let Some(request) = self.requests.get_mut(index) else {
            return Step::Leave;
        };
        let bits = self.shared.geometry.bits_of(request.lba, request.blocks);
        let attached = self.view.disk_is_usable();
        let current = self.view.disk == DiskState::UpToDate
            || (self.view.disk == DiskState::Inconsistent
                && matches!(request.origin, Origin::Application(_))
                && self.view.read_source(0).is_some());
        let stale = self.shared.stale.any(bits) && !mutation::is(Mutation::ReadStale);
        // What a write that failed has left there is not to be seen either: it may go with the disk.
        let failed_here = request.tried & LOCAL_MASK != 0 || self.shared.has_disk_failed();
        if attached && current && !failed_here && !stale {
            request.unsent = LOCAL_MASK;
        } else if let (Origin::Application(_), Some(slot)) =
            (&request.origin, self.view.read_source(request.tried))
        {
            request.unsent = 0;
            if (failed_here || !attached) && !self.view.own_disk_may_miss {
                // What a peer has, and this disk may not, must not go again when this node dies and comes back with it.
                request.stage = Stage::Held;
                self.need_generation(cx, LOCAL_MASK);
                return Step::Wait;
            }
            request.assign_peer(slot, self.view.peers[slot].send_session);
        } else {
            return self.end(cx, index, AppStatus::Failed);
        }
        self.enter(index, Stage::Send)
    }

    fn assign_flush(&mut self, index: u16) -> Step {
        let Some(request) = self.requests.get_mut(index) else {
            return Step::Leave;
        };
        let elsewhere =
            mutation::is(Mutation::FlushWithoutDisk) && self.view.read_source(0).is_some();
        if self.view.disk_is_usable() && !elsewhere {
            request.unsent |= LOCAL_MASK;
        }
        if self.view.disk == DiskState::UpToDate {
            request.latest |= LOCAL_MASK;
        }
        if mutation::is(Mutation::FlushWithoutPeers) {
            return self.enter(index, Stage::Send);
        }
        for slot in 0..MAX_PEERS {
            let peer = self.view.peers[slot];
            if !peer.is_remote() {
                // What this flush covers it may have had in its cache only.
                self.miss(index, slot);
            } else if let Some(request) = self.requests.get_mut(index) {
                request.assign_peer(slot, peer.send_session);
                if peer.has_latest() {
                    request.latest |= 1 << slot;
                }
            }
        }
        self.enter(index, Stage::Send)
    }

    fn take_lock(&mut self, cx: &mut H, index: u16) -> Step {
        let Some(request) = self.requests.get_mut(index) else {
            return Step::Leave;
        };
        let granules = self
            .shared
            .geometry
            .granules_of(request.lba, request.blocks);
        let lock = &self.shared.range_lock;
        let patient = request.lock_failures < RESERVE_AFTER;
        let unlocked = mutation::is(Mutation::RangeAlwaysFree)
            || (mutation::is(Mutation::ResyncReadUnlocked)
                && request.kind == RequestKind::ResyncRead);
        let taken = if unlocked {
            true
        } else if patient {
            lock.try_lock(granules)
        } else if request.kind == RequestKind::ResyncRead {
            request.pressing = true;
            lock.try_lock_pressing(granules)
        } else {
            request.reserved = request.reserved || lock.try_reserve(granules.clone());
            if request.reserved {
                lock.try_lock_reserved(granules)
            } else {
                lock.try_lock(granules)
            }
        };
        if !taken {
            request.lock_failures = request.lock_failures.saturating_add(1);
            let waited_ns = cx.now_ns().saturating_sub(request.started_ns);
            if request.kind == RequestKind::ResyncRead && waited_ns > RESYNC_READ_WAIT_NS {
                return self.end_received(cx, index, PeerAnswer::NotYet);
            }
            return Step::Wait;
        }
        request.locked = !unlocked;
        // With the lock the waiting has ended.
        request.reserved = false;
        request.pressing = false;
        if request.kind != RequestKind::ResyncRead {
            return self.enter(index, Stage::Log);
        }
        let Origin::Peer { slot, session, .. } = request.origin else {
            return Step::Leave;
        };
        // Its session, or the disk, may have gone while it waited.
        let peer = &self.view.peers[slot];
        if session != peer.recv_session || !peer.serve {
            return self.end_received(cx, index, PeerAnswer::Fenced);
        }
        if self.view.disk != DiskState::UpToDate {
            return self.end_received(cx, index, PeerAnswer::DiskError);
        }
        // Before the read: a bit that is set from here on takes its entry back.
        self.shared.served[slot].set_range(
            self.shared
                .geometry
                .granules_of(request.lba, request.blocks),
        );
        request.unsent = LOCAL_MASK;
        self.enter(index, Stage::Send)
    }

    fn enter_log(&mut self, cx: &mut H, index: u16) -> Step {
        let Some(request) = self.requests.get_mut(index) else {
            return Step::Leave;
        };
        if self.view.disk_is_usable() {
            let extents = self.shared.geometry.extents_of(request.lba, request.blocks);
            match self.log.enter(extents, request.logged) {
                Ok(transaction) => request.logged = Some(transaction),
                Err(joined) => {
                    request.logged = joined;
                    if !mutation::is(Mutation::WriteBeforeLog) || joined.is_none() {
                        return Step::Wait;
                    }
                }
            }
        }
        self.assign(cx, index)
    }

    /// In one step, under one view: the sequence, and for each peer whether it gets the write, a notice, or a bit.
    fn assign(&mut self, cx: &mut H, index: u16) -> Step {
        let Some(request) = self.requests.get(index) else {
            return Step::Leave;
        };
        let (lba, blocks) = (request.lba, request.blocks);
        match request.origin {
            Origin::Application(_) => {
                // The volume may have stopped taking I/O while the request waited for its range or the log.
                if self.view.closing || self.view.role != Role::Primary {
                    return self.end(cx, index, AppStatus::Inaccessible);
                }
                if !self.view.permits_io() || self.waits_for_peers(cx) {
                    self.release(index);
                    return self.enter(index, Stage::Held);
                }
                if !self.view.has_data() {
                    return self.end(cx, index, AppStatus::Failed);
                }
                self.assign_peers(index, lba, blocks);
            }
            Origin::Peer { slot, session, .. } => {
                let any = mutation::is(Mutation::AnySession)
                    || mutation::is(Mutation::SessionBeforeDrained);
                if session != self.view.peers[slot].recv_session && !any {
                    return self.end_received(cx, index, PeerAnswer::Fenced);
                }
                if !self.view.disk_is_usable() {
                    self.miss(index, slot);
                    return self.end_received(cx, index, PeerAnswer::DiskError);
                }
                if self.view.peers[slot].diskless && !mutation::is(Mutation::DisklessWithoutBit) {
                    // The sender has no disk: what it writes here, that disk lacks.
                    self.miss(index, slot);
                }
                for other in 0..MAX_PEERS {
                    if other != slot && self.view.peers[other].configured {
                        // Whether that node gets it too is known to the sender only, which may die.
                        self.miss(index, other);
                    }
                }
            }
        }
        if self.view.disk_is_usable()
            && let Some(request) = self.requests.get_mut(index)
        {
            request.unsent |= LOCAL_MASK;
            if self.view.disk == DiskState::UpToDate {
                request.latest |= LOCAL_MASK;
            }
            self.shared.mark_overtaken(lba, blocks);
        }
        self.enter(index, Stage::Send)
    }

    fn assign_peers(&mut self, index: u16, lba: u64, blocks: u32) {
        if let Some(request) = self.requests.get_mut(index) {
            if let RequestKind::Write { .. } = request.kind {
                request.unit_blocks = self.view.write_unit_blocks();
                request.pieces = pieces_of(lba, blocks, request.unit_blocks);
            }
            request.sequence = self.shared.next_sequences(request.pieces);
        }
        for slot in 0..MAX_PEERS {
            let peer = self.view.peers[slot];
            if !peer.configured {
                continue;
            }
            debug_assert!(!(peer.is_remote() && peer.is_noticed()));
            if peer.is_remote() {
                if let Some(request) = self.requests.get_mut(index) {
                    request.assign_peer(slot, peer.send_session);
                    if peer.has_latest() {
                        request.latest |= 1 << slot;
                    }
                }
            } else {
                if !mutation::is(Mutation::AbsentPeerWithoutBit) {
                    self.miss(index, slot);
                }
                if peer.is_noticed() {
                    self.notices[slot].queued.push_back((lba, blocks));
                }
            }
        }
    }

    /// A peer does not get this request: sets its bits, if there are any.
    pub(super) fn miss(&mut self, index: u16, slot: usize) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        let binds = match request.kind {
            RequestKind::Flush => !mutation::is(Mutation::FlushWithoutGeneration),
            kind => kind.writes(),
        };
        if !binds || request.missed & (1 << slot) != 0 {
            return;
        }
        request.missed |= 1 << slot;
        if !request.kind.writes() {
            return;
        }
        let geometry = &self.shared.geometry;
        self.shards[slot].set_range(geometry.bits_of(request.lba, request.blocks));
        // What the peer was given for its resync before is no longer the newest.
        self.shared.served[slot].clear_range(geometry.granules_of(request.lba, request.blocks));
    }

    fn send_legs(&mut self, cx: &mut H, index: u16) -> Step {
        let mut all = true;
        for leg in 0..=MAX_PEERS {
            let unsent = self.requests.get(index).map_or(0, |request| request.unsent);
            if unsent & (1 << leg) != 0 {
                // One that has to wait keeps none of the others back.
                all &= self.send_leg(cx, index, leg);
            }
        }
        if !all {
            return Step::Wait;
        }
        self.enter(index, Stage::Flight)
    }

    fn land(&mut self, cx: &mut H, index: u16) -> Step {
        let Some(request) = self.requests.get(index) else {
            return Step::Leave;
        };
        if request.unsent != 0 {
            return self.enter(index, Stage::Send);
        }
        let awaited = match mutation::is(Mutation::AnswerBeforeDisk) {
            true if request.done != 0 => request.pending & !LOCAL_MASK,
            _ => request.pending,
        };
        if awaited != 0 {
            return Step::Leave;
        }
        if request.kind == RequestKind::Read && request.done == 0 {
            return match request.origin {
                Origin::Application(_) => self.choose_source(cx, index),
                Origin::Peer { .. } => self.end_received(cx, index, PeerAnswer::DiskError),
            };
        }
        match request.origin {
            Origin::Application(_) => self.enter(index, Stage::Settle),
            Origin::Peer { slot, .. } if request.done & LOCAL_MASK == 0 => {
                self.miss(index, slot);
                self.end_received(cx, index, PeerAnswer::DiskError)
            }
            Origin::Peer { .. } => self.end_received(cx, index, PeerAnswer::Ok),
        }
    }

    /// A write or a flush that a peer missed completes only when a durable generation says so.
    fn settle(&mut self, cx: &mut H, index: u16) -> Step {
        let Some(request) = self.requests.get(index) else {
            return Step::Leave;
        };
        if request.kind == RequestKind::Read {
            return self.end(cx, index, AppStatus::Ok);
        }
        if request.done & request.latest == 0 || self.view.fails_io() {
            return self.end(cx, index, AppStatus::Failed);
        }
        if request.local_failed
            && !(self.view.own_disk_may_miss && self.is_drained(Drain::EveryNotice))
        {
            if !self.view.has_data() {
                return self.end(cx, index, AppStatus::Failed);
            }
            self.need_generation(cx, LOCAL_MASK);
            return Step::Wait;
        }
        // A peer that was removed meanwhile has no part in the volume any more.
        let unsettled = (0..MAX_PEERS)
            .filter(|&slot| request.missed & (1 << slot) != 0)
            .filter(|&slot| self.view.peers[slot].configured && !self.view.peers[slot].may_miss)
            .fold(0u8, |mask, slot| mask | 1 << slot);
        if request.kind == RequestKind::Flush && self.flush_who_is_back(index, unsettled) {
            return self.enter(index, Stage::Send);
        }
        let has_latest = |slot: usize| self.view.peers[slot].has_latest();
        let is_remembered = self.view.disk == DiskState::UpToDate
            || (0..MAX_PEERS).any(|slot| unsettled & (1 << slot) == 0 && has_latest(slot));
        let Some(request) = self.requests.get(index) else {
            return Step::Leave;
        };
        if request.missed != 0 && !is_remembered {
            // Nobody is left who could remember that some have it and some have not. Who has missed it may be all that is
            // left, and the source of this disk: it would wait for that in vain, and the resync for its range.
            return self.end(cx, index, AppStatus::Failed);
        }
        if unsettled != 0 && !mutation::is(Mutation::CompleteWithoutGeneration) {
            if self.view.closing && !mutation::is(Mutation::GenerationWhileShutDown) {
                // The node that the application uses next may be one of them, and would have another past.
                return self.end(cx, index, AppStatus::Failed);
            }
            self.need_generation(cx, unsettled);
            return Step::Wait;
        }
        self.end(cx, index, AppStatus::Ok)
    }

    /// A peer that a flush has missed, and that gets writes again, flushes now: it would else be gone on without though it is
    /// there, and of an older generation than the data that it has. False if there is none.
    fn flush_who_is_back(&mut self, index: u16, unsettled: u8) -> bool {
        let Some(request) = self.requests.get_mut(index) else {
            return false;
        };
        let mut is_any = false;
        for (slot, peer) in self.view.peers.iter().enumerate() {
            // In the session that it has failed in it would fail again.
            let is_new = request.legs[slot].session != peer.send_session;
            if unsettled & (1 << slot) != 0 && peer.is_remote() && is_new {
                request.missed &= !(1 << slot);
                request.tried &= !(1 << slot);
                request.assign_peer(slot, peer.send_session);
                is_any = true;
            }
        }
        is_any
    }

    /// Gives back what the request holds of the volume.
    fn release(&mut self, index: u16) {
        let Some(request) = self.requests.get_mut(index) else {
            return;
        };
        let granules = self
            .shared
            .geometry
            .granules_of(request.lba, request.blocks);
        if std::mem::take(&mut request.locked) {
            self.shared.range_lock.unlock(granules.clone());
        }
        if std::mem::take(&mut request.reserved) {
            self.shared.range_lock.cancel_reservation(granules.clone());
        }
        if std::mem::take(&mut request.pressing) {
            self.shared.range_lock.stop_pressing(granules);
        }
        if request.logged.take().is_some() {
            let extents = self.shared.geometry.extents_of(request.lba, request.blocks);
            self.log.leave(extents);
        }
    }

    fn take(&mut self, index: u16) -> Option<Request<H>> {
        let request = self.requests.get(index)?;
        let waits_for_range = request.reserved || request.pressing;
        if request.locked || waits_for_range || request.logged.is_some() {
            self.release(index);
        }
        self.requests.remove(index)
    }

    fn end(&mut self, cx: &mut H, index: u16, status: AppStatus) -> Step {
        match self.requests.get(index).map(|request| &request.origin) {
            Some(Origin::Peer { .. }) => {
                return self.end_received(cx, index, PeerAnswer::DiskError);
            }
            Some(Origin::Application(_)) => {}
            None => return Step::Leave,
        }
        if let Some(Request {
            origin: Origin::Application(io),
            ..
        }) = self.take(index)
        {
            cx.finish(io, status);
        }
        Step::Leave
    }

    fn end_received(&mut self, cx: &mut H, index: u16, answer: PeerAnswer) -> Step {
        if let Some(Request {
            origin: Origin::Peer {
                io, slot, sequence, ..
            },
            kind,
            ..
        }) = self.take(index)
        {
            if let Some(sequence) = sequence {
                let window = self.window(slot, kind);
                match answer {
                    PeerAnswer::Ok => window.applied(sequence),
                    PeerAnswer::DiskError => window.failed(sequence),
                    // Nothing was done: the same command may come again.
                    _ => window.abandon(sequence),
                }
            }
            cx.answer(io, answer);
        }
        Step::Leave
    }
}
