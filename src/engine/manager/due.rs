//! When the manager wants to be polled next: what `poll` would do, looked at without doing it. Everything here is derived
//! from the state that `poll` acts on, by the same conditions. Called by hosts that let a core sleep.

use super::Manager;
use super::orders::{After, Running, Work};
use super::outbox::IN_FLIGHT;
use crate::engine::MAX_PEERS;
use crate::host::Host;

impl<H: Host> Manager<H> {
    /// The time from which on [`poll`](Self::poll) has something to do, in nanoseconds: 0 is at once, `None` not before
    /// something else has happened here. A poll before that asks the host for nothing.
    pub fn next_poll_ns(&self) -> Option<u64> {
        if self.has_work() {
            return Some(0);
        }
        let peers = (0..MAX_PEERS)
            .filter(|&slot| self.peers[slot].node_id.is_some())
            .filter_map(|slot| self.session_due_ns(slot));
        let orders = self
            .orders
            .iter()
            .filter_map(|order| self.order_due_ns(order));
        let others = [
            self.pull_due_ns(),
            self.compare_due_ns(),
            self.has_become_newest().then_some(0),
            self.reattach_until_ns,
        ];
        peers
            .chain(orders)
            .chain(others.into_iter().flatten())
            .min()
    }

    /// Something was left to the poller, or the host has refused something.
    fn has_work(&self) -> bool {
        let is_quiet = !self.puller.uses_disk() && self.metadata.in_flight() == 0;
        !self.ready.is_empty()
            || (!self.quiet.is_empty() && is_quiet)
            || self.metadata_is_due()
            || self.owes_generation()
            || self
                .peers
                .iter()
                .any(|peer| !peer.outbox.is_empty() && peer.outbox.in_flight < IN_FLIGHT)
    }

    fn order_due_ns(&self, order: &Running) -> Option<u64> {
        match order.work {
            Work::Promote { force } if self.promotion_waits(force) => Some(order.deadline_ns),
            Work::Promote { .. } => Some(0),
            Work::Parting { after, .. } if matches!(after, After::Detach) && self.is_leaving() => {
                None
            }
            Work::Parting { peers, .. } => {
                let is_left =
                    |slot: usize| peers & (1 << slot) != 0 && self.peers[slot].established;
                if (0..MAX_PEERS).any(is_left) {
                    Some(order.deadline_ns)
                } else {
                    Some(0)
                }
            }
            Work::Promoting { .. } | Work::Demoted { .. } | Work::Closing => {
                Some(order.deadline_ns)
            }
            Work::Committing if self.generation.waits_for_peers() => Some(order.deadline_ns),
            Work::Attach | Work::Committing | Work::Demoting | Work::Leaving | Work::Running => {
                None
            }
        }
    }
}
