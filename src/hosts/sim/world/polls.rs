//! When the engine is polled: when it says so, and a little later. Now and then it is polled before, to see that it has
//! told all.

use super::{MANAGER, MS, SECOND, What, World};
use crate::hosts::sim::node::Core;

/// Between two polls of what has something to do all the time.
const PACE_NS: u64 = 100_000;
/// So many polls in a row may do nothing. What waits on gets fewer and fewer of them: most polls of a run would be those
/// of an I/O that a frozen disk or a dead link keeps for seconds, and each of them would find what the last one found.
const VAIN_POLLS: u32 = 16;
/// How often the time between two such polls is doubled.
const DOUBLINGS: u32 = 5;
/// How late a timer is looked at.
const LATE_NS: u64 = MS;
/// One call in so many is followed by a poll that must do nothing.
const CHECK_ONE_IN: u64 = 64;

impl World {
    /// Something has happened at this place: it may want to be polled at another time.
    pub(super) fn plan_poll(&mut self, node: usize, place: usize) {
        if !self.nodes[node].running {
            return;
        }
        let due_ns = self.due_ns(node, place);
        if self.random.below(CHECK_ONE_IN) == 0 {
            self.check_poll(node, place, due_ns);
        }
        let Some(due_ns) = due_ns else {
            return;
        };
        let (from_ns, late_ns) = if due_ns <= self.now_ns {
            let vain = self.nodes[node]
                .vain_polls(place)
                .saturating_sub(VAIN_POLLS);
            let pace_ns = PACE_NS << vain.min(DOUBLINGS);
            (self.now_ns + pace_ns, pace_ns)
        } else {
            (due_ns, LATE_NS)
        };
        let planned_ns = self.nodes[node].planned_poll_ns(place);
        if planned_ns.is_some_and(|planned_ns| planned_ns <= from_ns + late_ns) {
            return;
        }
        let at_ns = from_ns + self.random.below(late_ns) + self.node_lag_ns(node);
        *self.nodes[node].planned_poll_ns(place) = Some(at_ns);
        self.schedule_here(node, at_ns - self.now_ns, What::Poll { place, at_ns });
    }

    /// From when on this place wants to be polled, in the world's time.
    fn due_ns(&self, node: usize, place: usize) -> Option<u64> {
        let node = &self.nodes[node];
        let due_ns = node.poll_due_ns(place)?;
        Some(due_ns.saturating_sub(node.clock_ahead_ns))
    }

    pub(super) fn poll(&mut self, node: usize, place: usize, at_ns: u64) {
        let planned_ns = self.nodes[node].planned_poll_ns(place);
        if *planned_ns != Some(at_ns) {
            // It was wanted earlier, and that has been.
            return;
        }
        *planned_ns = None;
        let vain = *self.nodes[node].vain_polls(place);
        self.call(node, place, |node, cx| {
            node.poll(place, cx);
            if cx.actions.is_empty() && !cx.has_asked {
                *node.vain_polls(place) = vain + 1;
            }
        });
    }

    /// Up to the time that it has told, a poll does nothing.
    fn check_poll(&mut self, node: usize, place: usize, due_ns: Option<u64>) {
        let last_ns = due_ns.unwrap_or(self.now_ns + 3600 * SECOND);
        if last_ns <= self.now_ns {
            return;
        }
        let mut core = Core {
            now_ns: last_ns - 1 + self.nodes[node].clock_ahead_ns,
            ..self.core(node)
        };
        self.nodes[node].poll(place, &mut core);
        let did_nothing = core.actions.is_empty() && !core.has_asked;
        if !did_nothing || self.due_ns(node, place) != due_ns {
            let who = match place {
                MANAGER => "manager".to_owned(),
                channel => format!("channel {channel}"),
            };
            panic!(
                "[poll] the {who} of node {node} has something to do before {due_ns:?}\n{}",
                self.describe()
            );
        }
    }
}
