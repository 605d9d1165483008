//! Shutting a volume down: its application's I/O ends, then the peers are told, then the disk is let go. Called by `orders`.

use super::Manager;
use super::orders::{After, Running, Work, busy};
use super::steps::{OrderStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::{OrderId, OrderOutcome};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::state::Role;
use crate::host::Host;

/// How long application I/O that is under way is given to end before the volume parts from its peers.
const LAST_IO_NS: u64 = 1_000_000_000;

impl<H: Host> Manager<H> {
    pub(super) fn close(&mut self, cx: &mut H, id: OrderId) -> Option<OrderOutcome> {
        self.closing = true;
        self.attach_ended(cx, busy("the volume is being deleted"));
        if mutation::is(Mutation::GoodbyeBeforeClosing) {
            return self.close_adopted(cx, id);
        }
        // A peer that has been told may be another node's application's next one: from then on nothing is to end well here
        // that it does not have.
        self.view.closing |= self.view.role == Role::Primary;
        for slot in 0..MAX_PEERS {
            if self.peers[slot].node_id.is_some() && !self.peers[slot].established {
                self.peers[slot].wanted = false;
                self.lose_session(cx, slot, "disconnected");
            }
        }
        self.orders.push(Running {
            id,
            deadline_ns: cx.now_ns() + LAST_IO_NS,
            work: Work::Closing,
        });
        self.adopt(cx, Then::OrderStep(id, OrderStep::CloseHeld));
        None
    }

    /// Application I/O has ended, or does not: then it fails.
    pub(super) fn close_quiet(&mut self, cx: &mut H, id: OrderId) {
        let order = self.orders.iter_mut().find(|order| order.id == id);
        let Some(order) = order.filter(|order| matches!(order.work, Work::Closing)) else {
            // It was late, and is no longer waited for.
            return;
        };
        order.work = Work::Running;
        self.end_application_io();
        self.adopt(cx, Then::OrderStep(id, OrderStep::CloseAdopted));
    }

    /// As closing node: what the application has under way fails.
    pub(super) fn end_application_io(&mut self) {
        // Whatever this disk lacks from here on is recorded elsewhere: it is not that of a Primary that crashed.
        self.superblock.flags.primary &= self.view.role != Role::Primary;
        self.view.closing = true;
        self.view.role = Role::Secondary;
    }

    pub(super) fn close_adopted(&mut self, cx: &mut H, id: OrderId) -> Option<OrderOutcome> {
        self.orders.retain(|order| order.id != id);
        let peers = (0..MAX_PEERS)
            .filter(|&slot| self.peers[slot].node_id.is_some())
            .fold(0u8, |mask, slot| mask | 1 << slot);
        self.part(cx, id, peers, After::Detach)
    }
}
