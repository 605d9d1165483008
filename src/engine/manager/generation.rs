//! Starts a generation: before a Primary completes a write without a peer that had the latest data, a new current
//! generation is durable here and on every remaining UpToDate peer.

use super::Manager;
use super::outbox::Call;
use super::steps::{OrderStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::OrderId;
use crate::engine::meta::generation::{NONE, from_random};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::NewGenerationBody;
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::handshake::Outcome;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::engine::request::LOCAL_MASK;
use crate::host::{Host, PeerSlot};

#[derive(Default)]
pub(super) struct Bump {
    round: u64,
    running: bool,
    local_done: bool,
    /// The round says that this node goes on without its disk.
    without_own_disk: bool,
    /// Peers that have not said that they have it.
    waiting: u8,
    /// Peers that have said so, of the last round.
    taken: u8,
    /// Peers that the running round goes on without.
    missing: u8,
    /// Peers that every other peer with the latest data knows to be missing, since this node is Primary and since the
    /// last such peer has joined. Counts where there are three nodes or more.
    agreed: u8,
    /// What was asked for meanwhile: slots, and this node's disk.
    again: u8,
    /// The running round has a new generation, of which the disk says that nothing was written under it.
    starting: bool,
    /// A generation that peers may have been told and that never took effect, as the disk that was attached meanwhile
    /// does not have it. The next one says so.
    taken_back: Option<u64>,
    /// The promotions that wait for this.
    promotions: Vec<OrderId>,
}

impl Bump {
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    pub(super) fn waits_for_peers(&self) -> bool {
        self.waiting != 0
    }
}

impl<H: Host> Manager<H> {
    /// A write may complete without this peer.
    pub(super) fn may_miss(&self, slot: PeerSlot) -> bool {
        let agreed = if self.has_third_nodes() {
            self.generation.agreed & (1 << slot) != 0
        } else {
            !self.generation.starting
        };
        let durable = if mutation::is(Mutation::GenerationBeforeDurable) {
            &self.superblock.generations
        } else {
            &self.durable
        };
        agreed && !durable.needs_bump(slot)
    }

    /// Whoever has the latest data now must be told who lacks it, before a write completes without them.
    pub(super) fn agree_again(&mut self) {
        self.generation.agreed = 0;
    }

    /// A volume that is shut down: whoever is lost meanwhile may be where its application goes, and would have another past.
    fn needs_every_peer(&self) -> bool {
        self.closing
            && !mutation::is(Mutation::GoodbyeBeforeClosing)
            && !mutation::is(Mutation::GenerationWhileShutDown)
    }

    /// Writes wait to complete without the peers in `slots`, or, with [`LOCAL_MASK`], without a disk here.
    pub(super) fn need_generation(&mut self, cx: &mut H, slots: u8) {
        let slots = if self.needs_every_peer() {
            slots & LOCAL_MASK
        } else {
            slots
        };
        // Who is in sync again lacks nothing: the flush that has missed it goes to it under the view that says so.
        let slots = (0..MAX_PEERS)
            .filter(|&slot| self.is_in_sync(slot))
            .fold(slots, |slots, slot| slots & !(1 << slot));
        // A disk that is still failing asks for itself when the peers know what it lacks so far.
        // One that asks late, when there is such a generation, needs no other: a peer that did not get it before it was
        // lost would be refused for ever.
        let without_own_disk = slots & LOCAL_MASK != 0
            && self.view.disk == DiskState::Diskless
            && !self.view.own_disk_may_miss;
        if slots & !LOCAL_MASK != 0 || without_own_disk {
            self.start_generation(cx, slots & !LOCAL_MASK, without_own_disk);
        }
    }

    /// This peer has had everything since a decision or a resync said so; a session that only connects does not say that.
    fn is_in_sync(&self, slot: PeerSlot) -> bool {
        let outcome = self.peers[slot].decision.map(|decision| decision.outcome);
        self.view.peers[slot].conn == ConnState::Connected
            && self.view.peers[slot].has_latest()
            && self.masters[slot].is_empty()
            && matches!(
                outcome,
                Some(Outcome::InSync | Outcome::SyncSource { .. } | Outcome::SyncTarget { .. })
            )
    }

    /// Goes on without `slots`, and without whoever else lacks the latest data. `without_own_disk`: and without this
    /// node's disk, which only makes sense while a peer has the data.
    pub(super) fn start_generation(&mut self, cx: &mut H, slots: u8, without_own_disk: bool) {
        let without_own_disk =
            without_own_disk && self.view.peers.iter().any(|peer| peer.has_latest());
        if self.generation.running {
            self.generation.again |= slots;
            if without_own_disk {
                self.generation.again |= LOCAL_MASK;
            }
            return;
        }
        let is_comparing = self
            .view
            .peers
            .iter()
            .any(|peer| peer.conn == ConnState::WFBitMapT);
        if is_comparing && self.view.role == Role::Primary {
            // What the peers have is not of this node's generation yet. Who waits asks again under the next view.
            return;
        }
        let missing = (0..MAX_PEERS)
            .filter(|&slot| self.view.peers[slot].configured)
            .filter(|&slot| slots & (1 << slot) != 0 || !self.view.peers[slot].has_latest())
            .fold(0u8, |mask, slot| mask | 1 << slot);
        let has_data = self.metadata.enabled && self.view.disk == DiskState::UpToDate;
        // The last one reached nobody, as far as is known: whoever can take this one is of the generation before.
        let takes_back = !has_data && self.was_cut_short();
        let old = if takes_back {
            self.superblock.generations.history[0]
        } else {
            self.superblock.generations.current
        };
        // Whoever has other data refuses it.
        let has_same =
            |slot: PeerSlot| self.peers[slot].current_generation == old || self.exposed.is_some();
        let has_taker = (0..MAX_PEERS).any(|slot| {
            missing & (1 << slot) == 0 && self.view.peers[slot].has_latest() && has_same(slot)
        });
        if !has_data && !has_taker {
            // It would be nowhere, or on a disk that lacks the data, and the peers would be refused for not having it.
            return;
        }
        let needed = without_own_disk
            || (0..MAX_PEERS).any(|slot| {
                missing & (1 << slot) != 0 && self.superblock.generations.needs_bump(slot)
            })
            || (self.has_third_nodes() && missing & !self.generation.agreed != 0)
            || self.has_shared_generation()
            || self.generation.taken_back.is_some();
        if needed && takes_back {
            self.generation.taken_back = Some(self.superblock.generations.current);
            self.superblock.generations.take_back();
        }
        let mut taken_back = None;
        if needed {
            let new = loop {
                let new = from_random(cx.random());
                if new != old && !self.superblock.generations.history_contains(new) {
                    break new;
                }
            };
            taken_back = self.generation.taken_back.take();
            if let Some(generation) = taken_back {
                self.superblock.generations.remember_taken_back(generation);
            }
            self.superblock.generations.bump(new, missing);
            self.generation_changed();
            self.superblock.flags.told = self.has_third_nodes();
            // Of two nodes the other one is told of it only where the data is elsewhere, or the last one was taken back.
            let is_told = self.has_third_nodes() || taken_back.is_some();
            self.generation.starting = !has_data || (is_told && self.metadata.enabled);
            self.superblock.flags.starting = self.generation.starting;
            self.hello_changed(cx);
        }
        self.generation.round += 1;
        self.generation.running = true;
        self.generation.local_done = false;
        self.generation.without_own_disk = without_own_disk;
        self.generation.waiting = 0;
        self.generation.taken = 0;
        self.generation.missing = missing;
        let mut missing_nodes = if without_own_disk {
            1 << self.superblock.node_id
        } else {
            0
        };
        let mut told_nodes = 0u8;
        for slot in 0..MAX_PEERS {
            match self.peers[slot].node_id {
                Some(node) if missing & (1 << slot) != 0 => missing_nodes |= 1 << node,
                Some(node) => told_nodes |= 1 << node,
                None => {}
            }
        }
        let body = NewGenerationBody {
            new_current: self.superblock.generations.current,
            previous_current: old,
            missing_nodes,
            told_nodes,
            taken_back: taken_back.unwrap_or(NONE),
        };
        for slot in 0..MAX_PEERS {
            if needed && missing & (1 << slot) == 0 && self.view.peers[slot].has_latest() {
                self.generation.waiting |= 1 << slot;
                let sequence = self.shared.next_control_sequence(slot);
                let command = PeerCommand::NewGeneration {
                    session: self.peers[slot].session,
                    sequence,
                    len: NewGenerationBody::BYTES as u32,
                };
                self.call(
                    slot,
                    command,
                    body.emit().to_vec(),
                    Call::Generation(self.generation.round),
                );
            }
        }
        let round = self.generation.round;
        self.commit_superblock(cx, Then::Generation(round));
        if mutation::is(Mutation::GenerationBeforeDurable) {
            self.adopt(cx, Then::Nothing);
        }
    }

    pub(super) fn generation_durable(&mut self, cx: &mut H, round: u64) {
        if self.generation.round == round {
            self.generation.local_done = true;
            self.check_generation(cx);
        }
    }

    pub(super) fn generation_taken(&mut self, cx: &mut H, slot: PeerSlot, round: u64) {
        if self.generation.round == round {
            self.generation.waiting &= !(1 << slot);
            self.generation.taken |= 1 << slot;
            // Its state may be later than its answer.
            self.peers[slot].current_generation = self.superblock.generations.current;
            if !self.metadata.enabled {
                // Without a disk of our own the peers' word is what counts.
                self.durable = self.superblock.generations.clone();
                self.exposed = None;
                self.hello_changed(cx);
            }
            self.check_generation(cx);
        }
    }

    /// The peer cannot answer any more. It has missed the generation, so the writes that wait ask again for it.
    pub(super) fn generation_lost_peer(&mut self, cx: &mut H, slot: PeerSlot) {
        if self.generation.waiting & (1 << slot) != 0 {
            self.generation.waiting &= !(1 << slot);
            self.check_generation(cx);
        }
    }

    fn check_generation(&mut self, cx: &mut H) {
        let has_data = self.metadata.enabled && self.view.disk == DiskState::UpToDate;
        let bump = &mut self.generation;
        if !bump.running || !bump.local_done || bump.waiting != 0 {
            return;
        }
        let is_somewhere = bump.taken != 0 || has_data;
        if is_somewhere && bump.starting && std::mem::take(&mut self.superblock.flags.starting) {
            // From here on something may be written under it, and nobody must take it back after a crash.
            bump.local_done = false;
            let round = bump.round;
            return self.commit_superblock(cx, Then::Generation(round));
        }
        bump.starting = false;
        bump.running = false;
        if is_somewhere || !self.superblock.flags.starting {
            bump.agreed |= bump.missing;
        }
        let mut again = std::mem::take(&mut bump.again);
        if !matches!(self.view.disk, DiskState::Diskless | DiskState::Failed) {
            // The disk is back: a generation without it would be its own.
            again &= !LOCAL_MASK;
        }
        // Somebody has to remember it.
        if bump.without_own_disk && bump.taken != 0 && self.view.disk <= DiskState::Failed {
            self.view.own_disk_may_miss = true;
        }
        if self.needs_every_peer() {
            again &= LOCAL_MASK;
        }
        if self.view.own_disk_may_miss {
            again &= !LOCAL_MASK;
        }
        self.adopt(cx, Then::Nothing);
        if self.has_third_nodes() {
            self.tell_all();
            if std::mem::take(&mut self.superblock.flags.told) {
                self.commit_superblock(cx, Then::Nothing);
            }
        }
        if again != 0 || (self.has_shared_generation() && self.view.role == Role::Primary) {
            self.start_generation(cx, again & !LOCAL_MASK, again & LOCAL_MASK != 0);
        }
        self.check_promotion();
    }

    /// Nodes that are no peers may have the current generation, or nobody may write under it.
    fn has_shared_generation(&self) -> bool {
        let flags = &self.superblock.flags;
        flags.parted || flags.assume_clean || self.was_cut_short()
    }

    /// The current generation was started, here or where it was fetched from, and nothing was written under it: a crash or a
    /// failed promotion cut it short.
    pub(super) fn was_cut_short(&self) -> bool {
        self.superblock.flags.starting && !self.generation.running
    }

    /// Another node is to write under the current generation: it must not be taken back any more. True if that has to be
    /// made durable.
    pub(super) fn keep_generation(&mut self) -> bool {
        std::mem::take(&mut self.superblock.flags.starting)
    }

    /// A disk has been attached. What was told without it and has not taken effect never will.
    pub(super) fn void_generation(&mut self, taken_back: Option<u64>) {
        let bump = &mut self.generation;
        bump.round += 1;
        bump.running = false;
        bump.starting = false;
        bump.waiting = 0;
        bump.again = 0;
        bump.taken_back = taken_back;
    }

    /// This generation, which peers may have been told, never took effect.
    pub(super) fn generation_taken_back(&mut self, generation: u64) {
        self.generation.taken_back = Some(generation);
    }

    /// This Primary has the latest data under a generation that others may have taken back, or that others are behind
    /// without knowing it: another one says so.
    pub(super) fn owes_generation(&self) -> bool {
        let is_comparing = |conn| conn == ConnState::WFBitMapT;
        self.view.role == Role::Primary
            && self.view.disk == DiskState::UpToDate
            && self.metadata.enabled
            && !self.generation.running
            && !self.view.peers.iter().any(|peer| is_comparing(peer.conn))
            && (self.generation.taken_back.is_some() || self.was_cut_short())
    }

    pub(super) fn poll_generation(&mut self, cx: &mut H) {
        if self.owes_generation() {
            self.start_generation(cx, 0, false);
        }
    }

    /// A node has ceased to be a peer, or another has got its slot: the former may have the current generation.
    pub(super) fn generation_may_be_shared(&mut self) {
        self.superblock.flags.assume_clean = false;
        self.superblock.flags.parted = true;
    }

    /// The data is of another generation than it was: what was known of who else has it does not hold any more.
    pub(super) fn generation_changed(&mut self) {
        self.superblock.flags.assume_clean = false;
        self.superblock.flags.parted = false;
        self.superblock.flags.starting = false;
    }

    /// Before an application reads here, whoever is not there is known, by a generation, to lack what it reads: the last
    /// Primary may have writes on its disk that it died before completing, and they must not come back.
    pub(super) fn generation_for_promotion(&mut self, cx: &mut H, id: OrderId) {
        self.generation.promotions.push(id);
        let without_own_disk = self.view.disk == DiskState::Diskless;
        let is_known = (0..MAX_PEERS).all(|slot| {
            let peer = &self.view.peers[slot];
            !peer.configured || peer.has_latest() || self.may_miss(slot)
        });
        let is_needed = !is_known
            && !mutation::is(Mutation::PrimaryUnrecorded)
            && !mutation::is(Mutation::PromotedWithoutGeneration);
        if is_needed || without_own_disk || self.has_shared_generation() {
            self.start_generation(cx, 0, without_own_disk);
        }
        self.check_promotion();
    }

    fn check_promotion(&mut self) {
        if !self.generation.running {
            let agreed = |id| Then::OrderStep(id, OrderStep::PromoteAgreed);
            let promotions = self.generation.promotions.drain(..);
            self.ready.extend(promotions.map(agreed));
        }
    }

    /// Peers that do not answer are gone on without.
    pub(super) fn give_up_on_generation(&mut self, cx: &mut H) {
        for slot in 0..MAX_PEERS {
            if self.generation.waiting & (1 << slot) != 0 {
                self.lose_session(cx, slot, "the peer does not take the generation");
            }
        }
    }

    /// A Primary starts a generation.
    pub(super) fn received_generation(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        let Ok(body) = NewGenerationBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        let current = self.superblock.generations.current;
        if self.has_third_nodes() && body.new_current != current && body.previous_current != current
        {
            // It has other data than the Primary takes it to have.
            return self.answer(cx, reply, PeerAnswer::Refused(0));
        }
        let generations = &mut self.superblock.generations;
        // The Primary may not know all nodes that this one knows.
        let is_told =
            |other: PeerSlot, node: u8| other == slot || body.told_nodes & (1 << node) != 0;
        let missing = (0..MAX_PEERS)
            .filter(|&other| {
                self.peers[other].node_id.is_some_and(|node| {
                    body.missing_nodes & (1 << node) != 0 || !is_told(other, node)
                })
            })
            .fold(0u8, |mask, slot| mask | 1 << slot);
        if body.new_current != generations.current {
            if body.taken_back != NONE {
                generations.remember_taken_back(body.taken_back);
            }
            generations.bump(body.new_current, missing);
            self.generation_changed();
            self.superblock.flags.told = self.has_third_nodes();
            self.hello_changed(cx);
        }
        for other in 0..MAX_PEERS {
            if other != slot && missing & (1 << other) != 0 && self.peers[other].established {
                // Whoever lacks what the Primary writes now has to know that.
                self.lose_session(cx, other, "the Primary goes on without the peer");
            }
        }
        if missing & (1 << slot) != 0 {
            // It goes on without its disk, once every channel here sets its bits.
            self.view.peers[slot].diskless = true;
        }
        if self.has_third_nodes() {
            self.tell_all();
        }
        self.commit_superblock(cx, Then::Publish(reply));
    }
}
