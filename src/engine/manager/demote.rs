//! Giving up being Primary: application I/O ends, that is made durable, and the peers take it in. Only then may one of
//! them be promoted, so only then has the order ended. Called by `orders`.

use super::Manager;
use super::orders::{Work, busy};
use super::outbox::Call;
use super::steps::{OrderStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::{Drain, OrderId, OrderOutcome};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::state::Role;
use crate::host::{Host, PeerSlot};

impl<H: Host> Manager<H> {
    pub(super) fn demote(&mut self, cx: &mut H, id: OrderId) -> Option<OrderOutcome> {
        if self.is_promoting() || self.is_leaving() {
            return Some(busy("the volume is being promoted or detached; try again"));
        }
        if self.view.role != Role::Primary {
            return Some(Ok(()));
        }
        self.view.role = Role::Secondary;
        self.start_order(cx, id, Work::Demoting);
        self.adopt(cx, Then::OrderStep(id, OrderStep::DemoteAdopted));
        None
    }

    /// The role that others are told. Until the application's I/O has ended it is as much a Primary's as before.
    pub(super) fn told_role(&self) -> Role {
        if self.is_under_way(|work| matches!(work, Work::Demoting)) {
            Role::Primary
        } else {
            self.view.role
        }
    }

    pub(super) fn demote_adopted(&mut self, cx: &mut H, id: OrderId) {
        self.hello_changed(cx);
        if mutation::is(Mutation::DemoteUndrained) {
            return self.demote_drained(cx, id);
        }
        self.drain(
            cx,
            Drain::Application,
            Then::OrderStep(id, OrderStep::DemoteDrained),
        );
    }

    pub(super) fn demote_drained(&mut self, cx: &mut H, id: OrderId) {
        self.superblock.flags.primary = false;
        self.commit_pages(cx, Then::Nothing);
        self.commit_superblock(cx, Then::OrderStep(id, OrderStep::DemoteDurable));
    }

    pub(super) fn demote_durable(&mut self, cx: &mut H, id: OrderId) {
        let waiting = (0..MAX_PEERS)
            .filter(|&slot| self.peers[slot].established)
            .fold(0u8, |mask, slot| mask | 1 << slot);
        if let Some(order) = self.orders.iter_mut().find(|order| order.id == id) {
            order.work = Work::Demoted { waiting };
        }
        for slot in 0..MAX_PEERS {
            // From here on it is told that this node is Secondary.
            self.tell_state_for(slot, Call::Demoted(id));
        }
        self.hello_changed(cx);
        self.check_demoted(cx);
    }

    /// This peer does not take this node for the Primary any more: it was told so, or the session is over.
    pub(super) fn peer_knows_demotion(&mut self, cx: &mut H, slot: PeerSlot, id: Option<OrderId>) {
        for order in &mut self.orders {
            if let Work::Demoted { waiting } = &mut order.work
                && id.is_none_or(|id| id == order.id)
            {
                *waiting &= !(1 << slot);
            }
        }
        self.check_demoted(cx);
    }

    fn check_demoted(&mut self, cx: &mut H) {
        let is_done = |work: &Work| matches!(work, Work::Demoted { waiting: 0 });
        while let Some(order) = self.orders.iter().find(|order| is_done(&order.work)) {
            self.order_ended(cx, order.id, Ok(()));
        }
    }
}
