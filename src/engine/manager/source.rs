//! The source's side of a resync: it starts serving when every channel mirrors writes, clears what the target has,
//! and agrees to the finish.

use super::Manager;
use super::outbox::Call;
use super::steps::{SessionStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::Drain;
use crate::engine::meta::generation::NONE;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{RangesBody, SyncFinishBody};
use crate::engine::peer::command::FinishPhase;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::volume::GRANULE_BYTES;
use crate::host::{Host, PeerSlot};

/// Why a target that has everything is compared with anew.
const STARTED_AT_THE_END: &str = "a generation was started at the end of the resync";

impl<H: Host> Manager<H> {
    /// The target is Inconsistent, durably: from now on it has our generation, and its bits say what it lacks.
    pub(super) fn target_started(&mut self, cx: &mut H, slot: PeerSlot) {
        self.superblock.generations.start_sync_as_source(slot);
        if self.has_newest_but_for_its_state(slot) {
            self.view.disk = DiskState::UpToDate;
            self.exposed = None;
            self.record_disk();
            self.tell_all();
        }
        let epoch = self.peers[slot].epoch;
        self.commit_superblock(cx, Then::Session(slot, epoch, SessionStep::SourceDurable));
    }

    /// What a source of resync has is the newest, so it was decided; its disk may have been attached again under a Primary,
    /// or may have been told by one, which now is the target, that it goes on alone.
    fn has_newest_but_for_its_state(&self, target: PeerSlot) -> bool {
        let is_alone =
            (0..MAX_PEERS).all(|slot| slot == target || self.peers[slot].node_id.is_none());
        match self.view.disk {
            DiskState::Consistent => true,
            DiskState::Outdated => is_alone,
            _ => false,
        }
    }

    pub(super) fn source_durable(&mut self, cx: &mut H, slot: PeerSlot) {
        let paused = self.peers[slot].paused_by_peer;
        let view = &mut self.view.peers[slot];
        view.conn = if paused {
            ConnState::PausedSyncS
        } else {
            ConnState::SyncSource
        };
        view.pdsk = DiskState::Inconsistent;
        let epoch = self.peers[slot].epoch;
        self.adopt(cx, Then::Session(slot, epoch, SessionStep::SourceEntered));
    }

    /// Every channel mirrors. What was set before goes into the master, so that it can be cleared; what was announced
    /// before has to be known to the target before it reads.
    pub(super) fn source_entered(&mut self, cx: &mut H, slot: PeerSlot) {
        let epoch = self.peers[slot].epoch;
        self.harvest(cx, Then::Nothing);
        self.drain(
            cx,
            Drain::Notices(slot),
            Then::Session(slot, epoch, SessionStep::SourceNoticed),
        );
    }

    pub(super) fn source_noticed(&mut self, cx: &mut H, slot: PeerSlot) {
        self.view.peers[slot].serve = true;
        self.start_resync_report(cx, slot);
        self.adopt(cx, Then::Nothing);
        self.tell_state(slot);
    }

    /// The target has these ranges on its disk. A granule that was written since it was served keeps its bit.
    pub(super) fn received_resync_done(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        let Ok(ranges) = RangesBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        let geometry = self.shared.geometry;
        let served = &self.shared.served[slot];
        let per_bit = (1u64 << geometry.granularity_log2) / GRANULE_BYTES;
        for range in ranges.iter() {
            let (lba, blocks) = (range.span.lba(), range.span.blocks());
            if !geometry.contains(lba, blocks) {
                continue;
            }
            for bit in geometry.whole_bits_of(lba, blocks) {
                let granules = bit * per_bit..((bit + 1) * per_bit).min(geometry.granules());
                let is_served = served.count(granules.clone()) == granules.end - granules.start;
                if is_served || mutation::is(Mutation::ClearUnserved) {
                    served.clear_range(granules);
                    self.masters[slot].clear_range(bit..bit + 1);
                }
            }
        }
        self.answer(cx, reply, PeerAnswer::Ok);
    }

    pub(super) fn received_finish(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        phase: FinishPhase,
        body: &[u8],
        reply: usize,
    ) {
        let Ok(body) = SyncFinishBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        let view = &self.view.peers[slot];
        if !view.conn.is_sync_source() || !view.serve {
            return self.answer(cx, reply, PeerAnswer::NotYet);
        }
        let epoch = self.peers[slot].epoch;
        match phase {
            FinishPhase::Ask if body.generation != self.superblock.generations.current => {
                self.tell_state(slot);
                self.answer(cx, reply, PeerAnswer::NotYet);
            }
            FinishPhase::Ask if self.durable.bitmap[slot] != body.generation => {
                // It was started meanwhile, without the target, which will have it before we hear of that.
                self.superblock.generations.start_sync_as_source(slot);
                self.commit_superblock(
                    cx,
                    Then::Session(slot, epoch, SessionStep::FinishNoted(reply)),
                );
            }
            FinishPhase::Ask => self.finish_noted(cx, slot, reply),
            FinishPhase::Durable if body.generation != self.superblock.generations.current => {
                // It has everything, but is not of the generation that was started meanwhile.
                self.answer(cx, reply, PeerAnswer::Ok);
                self.lose_session(cx, slot, STARTED_AT_THE_END);
            }
            FinishPhase::Durable => {
                self.superblock.generations.finish_sync_as_source(slot);
                self.settle_crash(slot);
                self.commit_pages(cx, Then::Nothing);
                self.commit_superblock(
                    cx,
                    Then::Session(slot, epoch, SessionStep::FinishRecorded(reply)),
                );
            }
        }
    }

    /// No write completes without the target any more, unless there is a newer generation than the target will have.
    pub(super) fn finish_noted(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        let epoch = self.peers[slot].epoch;
        self.adopt(cx, Then::Nothing);
        self.harvest(
            cx,
            Then::Session(slot, epoch, SessionStep::FinishHarvested(reply)),
        );
    }

    /// All bits are in the master: any left means going on.
    pub(super) fn finish_harvested(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        let mut cursor = Some(0);
        let mut bodies = Vec::new();
        while let Some(from) = cursor
            && let Some((body, next)) = self.bitmap_body(slot, from)
        {
            bodies.push(body);
            cursor = next;
        }
        if mutation::is(Mutation::FinishUnchecked) {
            bodies.clear();
        }
        let Some(last) = bodies.pop() else {
            return self.answer(cx, reply, PeerAnswer::Ok);
        };
        for body in bodies {
            self.send_bitmap_body(slot, body, Call::MoreBits(None));
        }
        self.send_bitmap_body(slot, last, Call::MoreBits(Some(reply)));
    }

    pub(super) fn finish_recorded(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        if self.superblock.generations.bitmap[slot] != NONE {
            self.answer(cx, reply, PeerAnswer::Ok);
            return self.lose_session(cx, slot, STARTED_AT_THE_END);
        }
        let view = &mut self.view.peers[slot];
        view.conn = ConnState::Connected;
        view.pdsk = DiskState::UpToDate;
        view.serve = false;
        self.peers[slot].exchange = None;
        self.agree_again();
        self.answer(cx, reply, PeerAnswer::Ok);
        self.adopt(cx, Then::Nothing);
        self.tell_state(slot);
    }
}
