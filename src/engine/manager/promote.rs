//! Becoming Primary: every connected peer agrees first, so that there is one Primary at most.

use super::Manager;
use super::orders::{Work, busy};
use super::outbox::Call;
use super::steps::{OrderStep, SessionStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::{OrderId, OrderOutcome};
use crate::engine::meta::generation::{Generations, JUST_CREATED, from_random};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{ChangeKind, PrepareBody};
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::state::{
    DiskState, PeerState, PromotePeer, PromoteRefusal, Role, can_promote,
};
use crate::host::{Host, PeerSlot};

impl<H: Host> Manager<H> {
    pub(super) fn try_promote(
        &mut self,
        cx: &mut H,
        id: OrderId,
        force: bool,
    ) -> Option<OrderOutcome> {
        if self.view.role == Role::Primary {
            return Some(Ok(()));
        }
        if self.closing {
            return Some(busy("the volume is being deleted"));
        }
        if self.is_leaving() || self.is_under_way(|work| matches!(work, Work::Demoting)) {
            return Some(busy("the volume is being demoted or detached; try again"));
        }
        let refusal = self.promote_refusal(force);
        let refusal = refusal.filter(|_| !mutation::is(Mutation::PromoteUnasked));
        let order = self.orders.iter_mut().find(|order| order.id == id)?;
        let promoting = self.peers.iter().any(|peer| peer.promoting.is_some());
        match refusal {
            Some(refusal) if passes(&refusal) && cx.now_ns() < order.deadline_ns => return None,
            Some(refusal) => return Some(busy(refusal.to_string())),
            None if promoting => return Some(busy("a peer is being promoted; demote it first")),
            None => {}
        }
        if force {
            self.exposed = None;
        }
        let waiting = (0..MAX_PEERS)
            .filter(|&slot| self.peers[slot].established && !mutation::is(Mutation::PromoteUnasked))
            .fold(0u8, |mask, slot| mask | 1 << slot);
        order.work = Work::Promoting { force, waiting };
        for slot in 0..MAX_PEERS {
            if waiting & (1 << slot) != 0 {
                let command = PeerCommand::Prepare {
                    session: self.peers[slot].session,
                    sequence: self.shared.next_control_sequence(slot),
                    len: PrepareBody::BYTES as u32,
                };
                let body = self.prepare_body(id).emit().to_vec();
                self.peers[slot].may_differ = false;
                self.call(slot, command, body, Call::Prepare(id));
            }
        }
        self.check_promoting(cx, id);
        None
    }

    fn promote_refusal(&self, force: bool) -> Option<PromoteRefusal> {
        let peers = (0..MAX_PEERS)
            .filter(|&slot| self.peers[slot].node_id.is_some())
            .map(|slot| PromotePeer {
                slot,
                role: self.peers[slot].role,
                state: PeerState::lowered(self.view.peers[slot].conn, self.view.peers[slot].pdsk)
                    .unwrap_or(PeerState::STAND_ALONE),
            });
        can_promote(self.view.disk, peers, force).err()
    }

    /// Another attempt at a promotion would find what the last one has found.
    pub(super) fn promotion_waits(&self, force: bool) -> bool {
        self.view.role != Role::Primary
            && !self.closing
            && !self.is_leaving()
            && !self.is_under_way(|work| matches!(work, Work::Demoting))
            && self
                .promote_refusal(force)
                .is_some_and(|refusal| passes(&refusal))
    }

    pub(super) fn prepare_body(&self, id: OrderId) -> PrepareBody {
        PrepareBody {
            kind: ChangeKind::Promote,
            initiator: self.superblock.node_id,
            nodes: 0,
            transaction: id,
            generation: self.superblock.generations.current,
        }
    }

    /// A node that is being promoted itself gives way to the lower node id; a Primary refuses.
    pub(super) fn received_prepare(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        let Ok(body) = PrepareBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        if body.kind == ChangeKind::Compare {
            return self.received_mark(cx, slot, body, reply);
        }
        let own = self.is_under_way(|work| matches!(work, Work::Promoting { .. }));
        let agreed = self.is_under_way(|work| matches!(work, Work::Committing));
        if body.kind == ChangeKind::Promote
            && (self.view.role == Role::Primary
                || self.is_under_way(|work| matches!(work, Work::Demoting))
                || self.closing
                || agreed
                || self.sees_primary(Some(slot))
                || self.is_ahead_of(body.generation)
                || (own && self.superblock.node_id < body.initiator))
        {
            return self.answer(cx, reply, PeerAnswer::Refused(1));
        }
        if body.kind == ChangeKind::Promote {
            self.peers[slot].promoting = Some(body.transaction);
            self.end_other_resyncs(cx, slot, "a peer is being promoted, and is the source");
            let is_kept =
                body.generation == self.superblock.generations.current && self.keep_generation();
            self.hello_changed(cx);
            if is_kept {
                let epoch = self.peers[slot].epoch;
                let step = SessionStep::GenerationKept(reply);
                return self.commit_superblock(cx, Then::Session(slot, epoch, step));
            }
        }
        self.agree(cx, slot, reply);
    }

    pub(super) fn agree(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        // Whatever the peer has told before is in every channel when it becomes Primary, and the last writes of a lost
        // Primary have their bits.
        self.adopt(cx, Then::Nothing);
        let epoch = self.peers[slot].epoch;
        self.harvest(cx, Then::Session(slot, epoch, SessionStep::Agreed(reply)));
    }

    /// All bits are in the master: agrees, and says whether there are any for the node that is being promoted.
    pub(super) fn agreed(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        let answer = if self.view.disk == DiskState::UpToDate && !self.masters[slot].is_empty() {
            PeerAnswer::Again
        } else {
            PeerAnswer::Ok
        };
        self.answer(cx, reply, answer);
    }

    /// This node has data that one of that generation lacks.
    fn is_ahead_of(&self, generation: u64) -> bool {
        self.view.disk == DiskState::UpToDate
            && self.superblock.generations.history_contains(generation)
    }

    /// The second phase of a change; a promotion has none.
    pub(super) fn received_commit(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        match PrepareBody::parse(body) {
            Ok(body) if body.kind == ChangeKind::Compare => {
                self.received_equal(cx, slot, body, reply);
            }
            Ok(_) => self.answer(cx, reply, PeerAnswer::Ok),
            Err(_) => self.answer(cx, reply, PeerAnswer::Malformed),
        }
    }

    /// The promotion was given up. Only this one: a later one may have been agreed on before this arrives.
    pub(super) fn received_abort(&mut self, cx: &mut H, slot: PeerSlot, body: &[u8], reply: usize) {
        let Ok(body) = PrepareBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        let promoting = &mut self.peers[slot].promoting;
        if *promoting == Some(body.transaction) {
            *promoting = None;
        }
        self.answer(cx, reply, PeerAnswer::Ok);
    }

    pub(super) fn prepared(&mut self, cx: &mut H, slot: PeerSlot, id: OrderId, answer: PeerAnswer) {
        let order = self.orders.iter_mut().find(|order| order.id == id);
        let Some(Work::Promoting { waiting, .. }) = order.map(|order| &mut order.work) else {
            // Given up meanwhile.
            if answer.is_applied() || answer == PeerAnswer::Again {
                self.send_abort(slot, id);
            }
            return;
        };
        *waiting &= !(1 << slot);
        match answer {
            PeerAnswer::Ok | PeerAnswer::Duplicate => self.check_promoting(cx, id),
            PeerAnswer::Again => {
                self.peers[slot].may_differ = true;
                self.check_promoting(cx, id);
            }
            _ => {
                self.abort_prepared(id);
                let text = format!(
                    "the peer in slot {slot} is Primary, or is being promoted; demote it first"
                );
                self.order_ended(cx, id, busy(text));
            }
        }
    }

    /// Takes back what peers have agreed to. Who has not answered yet is told then: an Abort must not arrive before
    /// its Prepare, which a transport may send again.
    pub(super) fn abort_prepared(&mut self, id: OrderId) {
        let order = self.orders.iter().find(|order| order.id == id);
        let waiting = match order.map(|order| &order.work) {
            Some(&Work::Promoting { waiting, .. }) => waiting,
            Some(Work::Committing) => 0,
            _ => return,
        };
        for slot in 0..MAX_PEERS {
            if self.peers[slot].established && waiting & (1 << slot) == 0 {
                self.send_abort(slot, id);
            }
        }
    }

    fn send_abort(&mut self, slot: PeerSlot, id: OrderId) {
        let command = PeerCommand::Abort {
            session: self.peers[slot].session,
            sequence: self.shared.next_control_sequence(slot),
            len: PrepareBody::BYTES as u32,
        };
        let body = self.prepare_body(id).emit().to_vec();
        self.call(slot, command, body, Call::Abort);
    }

    pub(super) fn order_lost_peer(&mut self, cx: &mut H, slot: PeerSlot) {
        let mut ids = Vec::new();
        for order in &mut self.orders {
            if let Work::Promoting { waiting, .. } = &mut order.work
                && *waiting & (1 << slot) != 0
                && !mutation::is(Mutation::PromotionWaitsForLost)
            {
                *waiting &= !(1 << slot);
                ids.push(order.id);
            }
        }
        for id in ids {
            self.check_promoting(cx, id);
        }
        self.peer_knows_demotion(cx, slot, None);
    }

    /// Peers have agreed, and it does not come to it.
    pub(super) fn take_back_promotion(&mut self, cx: &mut H, id: OrderId, why: &str) {
        self.superblock.flags.primary = false;
        self.commit_superblock(cx, Then::Nothing);
        self.abort_prepared(id);
        self.order_ended(cx, id, busy(why));
    }

    pub(super) fn check_promoting(&mut self, cx: &mut H, id: OrderId) {
        let Some(order) = self.orders.iter_mut().find(|order| order.id == id) else {
            return;
        };
        let Work::Promoting { force, waiting: 0 } = order.work else {
            return;
        };
        order.work = Work::Committing;
        // Where a peer has the latest data there is no need to give it up.
        if force && !self.view.has_data() && self.view.disk >= DiskState::Inconsistent {
            self.declare_up_to_date(cx);
        }
        self.superblock.flags.primary = !mutation::is(Mutation::PrimaryUnrecorded);
        self.commit_superblock(cx, Then::OrderStep(id, OrderStep::PromoteDurable));
    }

    /// By force: this replica is the newest, whatever is elsewhere.
    pub(super) fn declare_up_to_date(&mut self, cx: &mut H) {
        let was_partial = self.view.disk == DiskState::Inconsistent;
        self.view.disk = DiskState::UpToDate;
        for peer in self.superblock.peers.iter_mut().flatten() {
            peer.full_sync = false;
        }
        self.shared.stale.clear_all();
        self.record_disk();
        let new = from_random(cx.random());
        let generations = &mut self.superblock.generations;
        if generations.current == JUST_CREATED {
            *generations = Generations::new(new);
        } else if was_partial {
            generations.declare_partial(new);
        } else {
            generations.bump(new, (1 << MAX_PEERS) - 1);
        }
        self.generation_changed();
        // Peers that are connected have decided on other data.
        for slot in 0..MAX_PEERS {
            if self.peers[slot].established {
                self.lose_session(cx, slot, "this node was promoted by force");
                self.peers[slot].retry_at_ns = 0;
            }
        }
    }
}

/// It is refused for the moment only.
fn passes(refusal: &PromoteRefusal) -> bool {
    matches!(
        refusal,
        PromoteRefusal::HandshakeInProgress { .. } | PromoteRefusal::DiskInTransition { .. }
    )
}
