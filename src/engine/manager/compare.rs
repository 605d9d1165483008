//! Three nodes and more. A Secondary sets bits for all other nodes with each write that it gets, because it may be the
//! only one that gets it. Here they are cleared again: a node that is in sync with two others or more tells them that they
//! hold the same. Also here: what a node may not do beside a Primary, and when two nodes have to be compared again.
//!
//! A comparison is led by the Primary, or by anybody where there is none. The others set a mark (Prepare) and from there
//! on remember what is new. When everything that was under way before the last mark has ended, what is older than the
//! marks is the same on all whose bits the leader finds clear (Commit).

use super::Manager;
use super::outbox::Call;
use super::steps::{CompareStep, SessionStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::bitmap::master::Master;
use crate::engine::message::Drain;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{ChangeKind, PrepareBody};
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::host::{Host, PeerSlot};

/// A comparison that this node leads.
struct Leading {
    id: u64,
    /// Slots that take part, with the epochs of their sessions.
    members: [Option<u64>; MAX_PEERS],
    /// Slots that have not answered.
    waiting: u8,
    /// What was known when it began.
    key: Key,
}

/// A comparison of an earlier key has said all there is to say.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    writes: u64,
    generation: u64,
    role: Role,
    /// Epoch and last told state of each peer.
    peers: [(u64, u64); MAX_PEERS],
}

pub(super) struct Compare {
    leading: Option<Leading>,
    next_id: u64,
    next_ns: u64,
    said: Option<Key>,
    /// The comparison whose mark is set here.
    marked: Option<u64>,
    /// Slots whose bits have come in through `since` only, from the mark on.
    tracked: u8,
    /// Bits from the mark on.
    since: [Master; MAX_PEERS],
}

impl Compare {
    pub(super) fn new(bits: u64) -> Self {
        Self {
            leading: None,
            next_id: 0,
            next_ns: 0,
            said: None,
            marked: None,
            tracked: 0,
            since: std::array::from_fn(|_| Master::new(bits)),
        }
    }

    /// A page of new bits has come for a slot.
    pub(super) fn note(&mut self, slot: PeerSlot, index: u32, page: &crate::engine::bitmap::Page) {
        if self.tracked & (1 << slot) != 0 {
            self.since[slot].or_page(index, page);
        }
    }

    /// The slot's bits have changed otherwise.
    pub(super) fn void(&mut self, slot: PeerSlot) {
        self.tracked &= !(1 << slot);
    }
}

impl<H: Host> Manager<H> {
    /// The volume has more than two nodes.
    pub(super) fn has_third_nodes(&self) -> bool {
        self.peers
            .iter()
            .filter(|peer| peer.node_id.is_some())
            .count()
            > 1
    }

    /// A Primary other than the peer of `except` is connected, or somebody is about to be one.
    pub(super) fn sees_primary(&self, except: Option<PeerSlot>) -> bool {
        (0..MAX_PEERS)
            .filter(|&slot| Some(slot) != except)
            .any(|slot| {
                let peer = &self.peers[slot];
                peer.role == Role::Primary || peer.promoting.is_some()
            })
    }

    /// This node fetches from a peer other than that of `except`, or is about to.
    pub(super) fn is_target(&self, except: Option<PeerSlot>) -> bool {
        (0..MAX_PEERS)
            .filter(|&slot| Some(slot) != except)
            .any(|slot| self.fetches_from(slot))
    }

    /// This node fetches from this peer, or is about to.
    pub(super) fn fetches_from(&self, slot: PeerSlot) -> bool {
        let conn = self.view.peers[slot].conn;
        conn.is_sync_target() || conn == ConnState::WFBitMapT
    }

    /// The peer that this node fetches from, or is about to.
    pub(super) fn source(&self) -> Option<PeerSlot> {
        (0..MAX_PEERS).find(|&slot| self.fetches_from(slot))
    }

    fn is_resyncing(&self, slot: PeerSlot) -> bool {
        let conn = self.view.peers[slot].conn;
        self.fetches_from(slot) || conn.is_sync_source() || conn == ConnState::WFBitMapS
    }

    /// Ends resyncs with everybody but the peer of `slot`, before a write of a Primary arrives, or another resync
    /// begins, that would cross with them.
    pub(super) fn end_other_resyncs(&mut self, cx: &mut H, slot: PeerSlot, reason: &str) {
        if mutation::is(Mutation::ClearUnserved) {
            return;
        }
        for other in 0..MAX_PEERS {
            if other != slot && self.is_resyncing(other) {
                self.lose_session(cx, other, reason);
            }
        }
    }

    /// What is to be fetched from the peer of `slot` may differ from every other node afterwards. To be made durable
    /// before anything is fetched.
    pub(super) fn spread_bits(&mut self, slot: PeerSlot) {
        let fetched = self.masters[slot].clone();
        for other in 0..MAX_PEERS {
            if other == slot || self.peers[other].node_id.is_none() {
                continue;
            }
            self.compare.void(other);
            for index in 0..fetched.page_count() {
                if let Some(page) = fetched.page(index) {
                    self.masters[other].or_page(index, page);
                }
            }
        }
    }

    /// A Primary writes to those that hold what it holds; with others a session begins with a comparison. What a write that
    /// the last Primary did not complete has left on one of them only, the application would else read here and, after
    /// another failure, not there.
    pub(super) fn part_with_others(&mut self, cx: &mut H) {
        for slot in 0..MAX_PEERS {
            let peer = &self.peers[slot];
            let view = &self.view.peers[slot];
            // Of two nodes, one that is behind and could not be helped may be helped by the new generation.
            let is_behind = view.pdsk < DiskState::Consistent;
            let other_generation = (self.has_third_nodes() || is_behind)
                && peer.current_generation != self.superblock.generations.current;
            // Either may have removed the node that made them three.
            let differs = peer.may_differ || (view.has_latest() && !self.masters[slot].is_empty());
            if peer.established
                && view.conn == ConnState::Connected
                && view.pdsk >= DiskState::Inconsistent
                && self.view.disk_is_usable()
                && (other_generation || differs)
            {
                self.lose_session(cx, slot, "its data is to be compared with the Primary's");
                self.peers[slot].retry_at_ns = 0;
            }
        }
    }

    /// What the source in `slot` knows to be missing elsewhere is missing there beside this node too.
    pub(super) fn inherit_generations(&mut self, slot: PeerSlot) {
        if !self.has_third_nodes() {
            return;
        }
        let source = self.peers[slot].their_hello;
        self.superblock.flags.told = source.is_some_and(|hello| hello.told);
        for other in 0..MAX_PEERS {
            if let (Some(node), true) = (self.peers[other].node_id, other != slot) {
                self.superblock.generations.bitmap[other] =
                    self.peers[slot].bitmap_generations[usize::from(node)];
            }
        }
    }

    /// In a session without a resync: gives it up when a new decision is due.
    pub(super) fn poll_difference(&mut self, cx: &mut H, slot: PeerSlot) {
        let now = cx.now_ns();
        if self.difference(slot).is_none() {
            self.peers[slot].differs_since_ns = None;
        } else if self.peers[slot].differs_since_ns.is_none() {
            self.peers[slot].differs_since_ns = Some(now);
        } else if self.difference_due_ns(slot).is_some_and(|due| now >= due) {
            self.peers[slot].differs_since_ns = None;
            self.lose_session(cx, slot, "the nodes have to be compared again");
            // Both ends may have come to this: not in step for ever.
            self.peers[slot].retry_at_ns = now + cx.random() % 20_000_000;
        }
    }

    /// When [`poll_difference`](Self::poll_difference) has something to do; 0 is at once.
    pub(super) fn difference_due_ns(&self, slot: PeerSlot) -> Option<u64> {
        let since = self.peers[slot].differs_since_ns;
        match (self.difference(slot), since) {
            (None, None) => None,
            (Some(wait), Some(since)) => {
                Some(since + wait * self.options.ping_interval_ms * 1_000_000)
            }
            _ => Some(0),
        }
    }

    /// After how many ping intervals the data of this peer and of this node must not differ any more as they seem to.
    fn difference(&self, slot: PeerSlot) -> Option<u64> {
        let view = &self.view.peers[slot];
        let peer = &self.peers[slot];
        let beside_primary = self.view.role != Role::Primary
            && peer.role != Role::Primary
            && self.sees_primary(None);
        if !self.has_third_nodes()
            || view.conn != ConnState::Connected
            || view.pdsk != DiskState::UpToDate
            || beside_primary
            || self.is_target(None)
            || !self.view.disk_is_usable()
        {
            return None;
        }
        if self.view.disk < DiskState::UpToDate {
            return Some(1);
        }
        let differ = !self.masters[slot].is_empty()
            || peer.current_generation != self.superblock.generations.current;
        differ.then_some(6)
    }

    fn compare_key(&self) -> Key {
        Key {
            writes: self.shared.last_sequence(),
            generation: self.superblock.generations.current,
            role: self.view.role,
            peers: std::array::from_fn(|slot| {
                (self.peers[slot].epoch, self.peers[slot].state_revision)
            }),
        }
    }

    /// Holds what this node holds but for what bits say.
    fn is_alike(&self, slot: PeerSlot) -> bool {
        let view = &self.view.peers[slot];
        self.peers[slot].established
            && view.conn == ConnState::Connected
            && view.has_latest()
            && self.peers[slot].current_generation == self.superblock.generations.current
    }

    /// Holds what this node holds, as far as the masters say.
    fn is_equal(&self, slot: PeerSlot) -> bool {
        self.is_alike(slot) && self.masters[slot].is_empty()
    }

    fn may_lead(&self) -> bool {
        self.view.disk == DiskState::UpToDate
            && !self.closing
            && (self.view.role == Role::Primary || !self.sees_primary(None))
            && !(0..MAX_PEERS).any(|slot| self.is_resyncing(slot))
            && (0..MAX_PEERS).filter(|&slot| self.is_alike(slot)).count() > 1
    }

    pub(super) fn poll_compare(&mut self, cx: &mut H) {
        let now = cx.now_ns();
        if self.compare_due_ns().is_none_or(|due| now < due) {
            return;
        }
        self.compare.next_ns = now + self.options.ping_interval_ms * 1_000_000;
        let key = self.compare_key();
        self.compare.next_id += 1;
        let id = self.compare.next_id << 8 | u64::from(self.superblock.node_id);
        self.compare.leading = Some(Leading {
            id,
            members: [None; MAX_PEERS],
            waiting: 0,
            key,
        });
        self.harvest(cx, Then::Compare(id, CompareStep::Harvested));
    }

    /// When the next comparison may begin, if there is a reason for one.
    pub(super) fn compare_due_ns(&self) -> Option<u64> {
        let is_due = self.has_third_nodes()
            && self.compare.leading.is_none()
            && self.compare.said != Some(self.compare_key())
            && self.may_lead();
        is_due.then_some(self.compare.next_ns)
    }

    fn leads(&self, id: u64) -> bool {
        self.compare
            .leading
            .as_ref()
            .is_some_and(|leading| leading.id == id)
    }

    pub(super) fn compare_step(&mut self, cx: &mut H, id: u64, step: CompareStep) {
        if !self.leads(id) {
            return;
        }
        if !self.may_lead() {
            self.compare.leading = None;
            return;
        }
        match step {
            CompareStep::Harvested => self.ask_for_marks(id),
            CompareStep::Drained => self.harvest(cx, Then::Compare(id, CompareStep::Settled)),
            CompareStep::Settled => self.tell_equals(id),
        }
    }

    fn ask_for_marks(&mut self, id: u64) {
        let equal: Vec<PeerSlot> = (0..MAX_PEERS).filter(|&slot| self.is_equal(slot)).collect();
        let Some(leading) = &mut self.compare.leading else {
            return;
        };
        if equal.len() < 2 {
            self.compare.leading = None;
            return;
        }
        for &slot in &equal {
            leading.members[slot] = Some(self.peers[slot].epoch);
            leading.waiting |= 1 << slot;
        }
        for slot in equal {
            self.send_compare(slot, id, None);
        }
    }

    /// Prepare, or with the nodes that are equal, Commit.
    fn send_compare(&mut self, slot: PeerSlot, id: u64, equal: Option<u8>) {
        let body = PrepareBody {
            kind: ChangeKind::Compare,
            initiator: self.superblock.node_id,
            nodes: equal.unwrap_or_default(),
            transaction: id,
            generation: self.superblock.generations.current,
        };
        let session = self.peers[slot].session;
        let sequence = self.shared.next_control_sequence(slot);
        let len = PrepareBody::BYTES as u32;
        let command = match equal {
            None => PeerCommand::Prepare {
                session,
                sequence,
                len,
            },
            Some(_) => PeerCommand::Commit {
                session,
                sequence,
                len,
            },
        };
        let call = if equal.is_none() {
            Call::Mark(id)
        } else {
            Call::Equal
        };
        self.call(slot, command, body.emit().to_vec(), call);
    }

    /// A member has set its mark, or cannot.
    pub(super) fn compare_marked(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        id: u64,
        answer: PeerAnswer,
    ) {
        if !self.leads(id) {
            return;
        }
        let Some(leading) = &mut self.compare.leading else {
            return;
        };
        leading.waiting &= !(1 << slot);
        if !answer.is_applied() {
            leading.members[slot] = None;
        }
        self.check_marks(cx, id);
    }

    /// A member has cleared its bits, or some.
    pub(super) fn compare_told(&mut self, answer: PeerAnswer) {
        if !answer.is_applied() {
            self.compare.said = None;
        }
    }

    pub(super) fn compare_lost_peer(&mut self, cx: &mut H, slot: PeerSlot) {
        self.compare.void(slot);
        let Some(leading) = &mut self.compare.leading else {
            return;
        };
        leading.members[slot] = None;
        if leading.waiting & (1 << slot) != 0 {
            leading.waiting &= !(1 << slot);
            let id = leading.id;
            self.check_marks(cx, id);
        }
    }

    fn check_marks(&mut self, cx: &mut H, id: u64) {
        let Some(leading) = &self.compare.leading else {
            return;
        };
        if leading.waiting != 0 {
            return;
        }
        if leading.members.iter().flatten().count() < 2 {
            self.compare.leading = None;
            return;
        }
        let step = Then::Compare(id, CompareStep::Drained);
        let now = cx.now_ns();
        self.drain(cx, Drain::ApplicationUntil(now), step);
    }

    /// Everything from before the marks has ended, and what somebody has missed of it has its bit here.
    fn tell_equals(&mut self, id: u64) {
        let Some(leading) = self.compare.leading.take() else {
            return;
        };
        let equal: Vec<PeerSlot> = (0..MAX_PEERS)
            .filter(|&slot| {
                leading.members[slot] == Some(self.peers[slot].epoch) && self.is_equal(slot)
            })
            .collect();
        let mut nodes = 1u8 << self.superblock.node_id;
        for &slot in &equal {
            if let Some(node) = self.peers[slot].node_id {
                nodes |= 1 << node;
            }
        }
        if equal.len() < 2 {
            return;
        }
        for &slot in &equal {
            self.send_compare(slot, id, Some(nodes));
        }
        let known = (0..MAX_PEERS)
            .filter(|&slot| self.peers[slot].established)
            .count();
        if equal.len() == known {
            self.compare.said = Some(leading.key);
        }
    }

    /// Somebody else leads a comparison.
    pub(super) fn received_mark(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: PrepareBody,
        reply: usize,
    ) {
        let takes_part = self.view.disk == DiskState::UpToDate
            && self.view.role != Role::Primary
            && !self.sees_primary(Some(slot))
            && body.generation == self.superblock.generations.current
            && self.view.peers[slot].conn == ConnState::Connected
            && !(0..MAX_PEERS).any(|other| self.is_resyncing(other));
        if !takes_part {
            return self.answer(cx, reply, PeerAnswer::Refused(0));
        }
        let epoch = self.peers[slot].epoch;
        let step = SessionStep::MarkHarvested(reply, body.transaction);
        self.harvest(cx, Then::Session(slot, epoch, step));
    }

    /// What has come so far is in the masters; what comes from now on is new.
    pub(super) fn mark_harvested(&mut self, cx: &mut H, slot: PeerSlot, reply: usize, id: u64) {
        if !self.masters[slot].is_empty()
            || self.sees_primary(Some(slot))
            || (0..MAX_PEERS).any(|other| self.is_resyncing(other))
        {
            return self.answer(cx, reply, PeerAnswer::Refused(0));
        }
        let compare = &mut self.compare;
        compare.marked = Some(id);
        compare.tracked = 0;
        for other in 0..MAX_PEERS {
            if other != slot && self.peers[other].node_id.is_some() {
                compare.tracked |= 1 << other;
                compare.since[other].clear_all();
            }
        }
        self.answer(cx, reply, PeerAnswer::Ok);
    }

    /// These nodes and this one hold the same, but for what has come since the mark.
    pub(super) fn received_equal(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: PrepareBody,
        reply: usize,
    ) {
        if self.compare.marked.take() != Some(body.transaction) {
            return self.answer(cx, reply, PeerAnswer::Refused(0));
        }
        let same_generation = body.generation == self.superblock.generations.current;
        let tracked = std::mem::take(&mut self.compare.tracked);
        let mut forgets = false;
        let mut all = true;
        for other in 0..MAX_PEERS {
            let Some(node) = self.peers[other].node_id else {
                continue;
            };
            if other == slot || body.nodes & (1 << node) == 0 {
                continue;
            }
            if tracked & (1 << other) == 0 {
                all = false;
                continue;
            }
            self.masters[other].retain(&self.compare.since[other]);
            if same_generation && self.superblock.generations.bitmap[other] != 0 {
                self.superblock.generations.finish_sync_as_source(other);
                forgets = true;
            }
        }
        if forgets {
            self.hello_changed(cx);
            self.commit_pages(cx, Then::Nothing);
            self.commit_superblock(cx, Then::Nothing);
        }
        if !all {
            return self.answer(cx, reply, PeerAnswer::Refused(0));
        }
        let epoch = self.peers[slot].epoch;
        let step = SessionStep::EqualHarvested(reply);
        self.harvest(cx, Then::Session(slot, epoch, step));
    }

    /// New bits may be of writes that were on their way already when the leader began, and there may be no others that
    /// make it begin again.
    pub(super) fn equal_harvested(&mut self, cx: &mut H, reply: usize) {
        let answer = if self.masters.iter().all(Master::is_empty) {
            PeerAnswer::Ok
        } else {
            PeerAnswer::Refused(0)
        };
        self.answer(cx, reply, answer);
    }
}
