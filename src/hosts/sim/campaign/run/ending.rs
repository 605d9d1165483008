//! The end of a run: faults end, a reckless operator's doings are put right, and everything has to be well again within
//! bounded virtual time.

use super::{LOOK_NS, Outcome, Run};
use crate::engine::manager::Order;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::hosts::sim::campaign::operator::Lead;
use crate::hosts::sim::campaign::schedule::Replacement;
use crate::hosts::sim::world::{MS, SECOND};

/// How long two nodes that cannot go together have to say so, once they can talk.
const REPORT_NS: u64 = 15 * SECOND;
/// A run lasts this long at least.
const RUN_NS: u64 = 60 * SECOND;

/// What two nodes report that do not go together, for which an operator has to do something.
const SPLIT_BRAIN: &str = "SplitBrain";
const UNRELATED: &str = "Unrelated";

impl Run {
    /// Faults end, everything is started, and all is well after a while.
    pub(super) fn end(mut self) -> Outcome {
        let nodes = self.world.nodes.len();
        self.advance((self.began_ns + RUN_NS).max(self.world.now_ns + SECOND));
        self.check_replicas();
        self.world.check_idle_replicas();
        self.waiting.clear();
        self.due.clear();
        self.world.await_nothing();
        self.heal_all();
        self.world.end_slowness();
        for node in 0..nodes {
            self.world.mend_disk(node);
            self.world.set_options(node, self.world.options());
        }
        self.wait(
            "the volumes that are shut down have ended",
            30 * SECOND,
            |run| run.stopping.is_empty(),
        );
        for node in self.foreign.clone() {
            self.put_in(node, Replacement::Nothing);
        }
        for node in 0..nodes {
            self.start(node);
        }
        self.wait("the nodes have started", 30 * SECOND, |run| {
            run.starting.is_empty()
        });
        self.wait("orders have ended", 30 * SECOND, |run| {
            run.world.orders_have_ended()
        });
        self.attach_all();
        // A Primary without its disk may have told a peer to stay away that it could go together with.
        self.wait("the disks are attached", 30 * SECOND, |run| {
            run.world.orders_have_ended()
        });
        self.replace_copies();
        for node in 0..nodes {
            self.introduce(node);
            self.order(node, Order::ResumeResync);
            self.connect(node, None, false);
        }
        if self.reckless {
            self.reconcile();
        } else {
            if let Lead::Nobody { .. } = self.lead {
                self.have_a_primary();
            }
            self.have_a_replica();
            self.connect_again();
        }
        self.world.settle();
        self.world.wait_for_io();
        self.world.check_orders();
        self.read_everything();
        Outcome {
            trace_hash: self.world.trace_hash(),
            steps: self.world.steps,
            virtual_ns: self.world.now_ns,
            coverage: std::mem::take(&mut self.world.coverage),
        }
    }

    /// Goes on until it is so.
    fn wait(&mut self, what: &str, limit_ns: u64, is: impl Fn(&Run) -> bool) {
        let end_ns = self.world.now_ns + limit_ns;
        while !is(self) {
            assert!(
                self.world.now_ns < end_ns,
                "[I10] after {limit_ns} ns still not: {what}\n{}",
                self.world.describe()
            );
            self.advance(self.world.now_ns + LOOK_NS);
        }
    }

    /// Gives every node its disk; one that has failed is let go of first.
    fn attach_all(&mut self) {
        for node in 0..self.world.nodes.len() {
            let end_ns = self.world.now_ns + 30 * SECOND;
            while self.world.state(node).disk < DiskState::Inconsistent {
                assert!(
                    self.world.now_ns < end_ns,
                    "[liveness] node {node} does not get its disk\n{}",
                    self.world.describe()
                );
                self.attach(node);
                self.advance(self.world.now_ns + LOOK_NS);
            }
        }
    }

    /// A replica that was invalidated may have fetched from a device of somebody else meanwhile: it too gets an empty one.
    fn replace_copies(&mut self) {
        let is_copy = |node: usize| {
            let generations = self.world.state(node).generations;
            self.foreign_generations.iter().any(|&foreign| {
                generations.current == foreign || generations.history_contains(foreign)
            })
        };
        let copies: Vec<usize> = (0..self.world.nodes.len())
            .filter(|&node| is_copy(node))
            .collect();
        let spared = self.lead.nodes();
        if self.reckless || copies.iter().any(|node| spared & (1 << node) != 0) {
            return;
        }
        for node in copies {
            self.give_empty_device(node);
        }
    }

    fn have_a_primary(&mut self) {
        let nodes = self.world.nodes.len();
        let (force_ns, end_ns) = (
            self.world.now_ns + 30 * SECOND,
            self.world.now_ns + 60 * SECOND,
        );
        while self.lead.active().is_none() {
            assert!(
                self.world.now_ns < end_ns,
                "[liveness] no node can be promoted: {:?}\n{}",
                self.lead,
                self.world.describe()
            );
            for node in 0..nodes {
                self.lead.promote(&mut self.world, node, false);
            }
            let has_newest = |node: usize| self.world.state(node).disk == DiskState::UpToDate;
            if self.world.now_ns >= force_ns {
                // One may be UpToDate that is not known to have all, while whoever had it was invalidated.
                let is_whole = |node: usize| self.world.state(node).disk > DiskState::Inconsistent;
                let is_given_up = (0..nodes).any(has_newest) || !(0..nodes).any(is_whole);
                self.world.checks_content &= !is_given_up;
                self.lead.promote_best(&mut self.world);
            }
            self.advance(self.world.now_ns + 50 * MS);
        }
    }

    /// A message of a device that was there before may have ended a connection: the operator tries it once more.
    fn connect_again(&mut self) {
        let end_ns = self.world.now_ns + REPORT_NS;
        while !self.world.is_settled() {
            if self.world.now_ns >= end_ns {
                for node in 0..self.world.nodes.len() {
                    self.connect(node, None, false);
                }
                return;
            }
            self.advance(self.world.now_ns + 50 * MS);
        }
    }

    /// If the last replica was invalidated, while the Primary let its disk go, the operator declares the best one the newest.
    fn have_a_replica(&mut self) {
        let is_whole = |run: &Run, node: usize| run.world.state(node).disk == DiskState::UpToDate;
        let end_ns = self.world.now_ns + 30 * SECOND;
        while !(0..self.world.nodes.len()).any(|node| is_whole(self, node)) {
            if self.world.now_ns < end_ns {
                self.advance(self.world.now_ns + 50 * MS);
                continue;
            }
            if let Some(node) = self.lead.active() {
                self.world.ordered(node, Order::Demote).ok();
            }
            self.declare_the_newest();
            self.lead = Lead::Nobody { holders: 0 };
            self.world.checks_content = false;
            return;
        }
    }

    /// Resolves what a reckless operator has made: nobody stays Primary, a split brain is reported on both sides, and the
    /// changes of one are given up, until all go together. Of two that never had the same data one gets an empty device.
    fn reconcile(&mut self) {
        let nodes = self.world.nodes.len();
        self.advance(self.world.now_ns + REPORT_NS);
        // One that would have to follow another cannot as Primary.
        for node in 0..nodes {
            if self.world.is_primary(node) {
                self.world.ordered(node, Order::Demote).ok();
            }
            self.connect(node, None, false);
        }
        for _ in 0..nodes {
            self.advance(self.world.now_ns + REPORT_NS);
            if let Some((keeps, gives_up)) = self.split_brain() {
                self.connect(gives_up, Some(keeps), true);
                self.connect(keeps, Some(gives_up), false);
            } else if let Some((keeps, gives_up)) = self.unrelated() {
                self.give_empty_device(gives_up);
                self.connect(keeps, Some(gives_up), false);
            } else {
                break;
            }
            self.gave_up_data = true;
        }
        self.declare_the_newest();
        // Nobody reads from two nodes any more.
        self.world.checks_content = !self.gave_up_data;
    }

    /// Of replicas none of which is whole, as when each was invalidated, the operator declares the best one the newest.
    fn declare_the_newest(&mut self) {
        let disk = |run: &Run, node: usize| run.world.state(node).disk;
        let mut nodes = 0..self.world.nodes.len();
        if nodes
            .clone()
            .any(|node| disk(self, node) == DiskState::UpToDate)
        {
            return;
        }
        let Some(first) = nodes.next() else {
            return;
        };
        let best = nodes.fold(first, |best, node| {
            if disk(self, node) > disk(self, best) {
                node
            } else {
                best
            }
        });
        self.gave_up_data = true;
        for order in [Order::Promote { force: true }, Order::Demote] {
            self.world.ordered(best, order).ok();
        }
    }

    pub(super) fn connect(&mut self, node: usize, peer: Option<usize>, discard_my_data: bool) {
        let connect = Order::Connect {
            node_id: peer.map(|peer| peer as u8),
            discard_my_data,
        };
        self.order(node, connect);
    }

    /// What it has is given up, and it fetches everything.
    fn give_empty_device(&mut self, node: usize) {
        self.put_in(node, Replacement::Nothing);
        self.wait("the node has its new device", 30 * SECOND, |run| {
            run.starting.is_empty()
        });
    }

    /// Two nodes that say that they have changes of their own: if they have, they do.
    fn split_brain(&self) -> Option<(usize, usize)> {
        for (one, other) in self.pairs() {
            assert!(
                self.says(one, other, SPLIT_BRAIN)
                    || self.says(one, other, UNRELATED)
                    || !self.world.have_diverged(one, other),
                "[I9] of {one} and {other} each has writes that the other lacks, and they report no split brain\n{}",
                self.world.describe()
            );
        }
        self.who_say(SPLIT_BRAIN)
    }

    /// Two nodes that say that they never had the same data, as when both were declared the newest from nothing; the
    /// second has the one that is worth less.
    fn unrelated(&self) -> Option<(usize, usize)> {
        let disk = |node: usize| self.world.state(node).disk;
        let (one, other) = self.who_say(UNRELATED)?;
        Some(if disk(one) < disk(other) {
            (other, one)
        } else {
            (one, other)
        })
    }

    /// The first two that say this of each other: both do if one does.
    fn who_say(&self, what: &str) -> Option<(usize, usize)> {
        for (one, other) in self.pairs() {
            assert_eq!(
                self.says(one, other, what),
                self.says(other, one, what),
                "[I9] only one of {one} and {other} reports: {what}\n{}",
                self.world.describe()
            );
        }
        self.pairs()
            .find(|&(one, other)| self.says(one, other, what))
    }

    fn says(&self, node: usize, peer: usize, what: &str) -> bool {
        let report = self.world.peer(node, peer);
        let error = report.last_error.unwrap_or_default();
        report.conn < ConnState::Connected && error.contains(what)
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let nodes = self.world.nodes.len();
        (0..nodes).flat_map(move |one| (one + 1..nodes).map(move |other| (one, other)))
    }

    fn read_everything(&mut self) {
        let Some(node) = self.primaries().first().copied() else {
            return;
        };
        let size_blocks = self.world.config.volume_bytes / u64::from(self.world.config.block_size);
        let mut lbas: Vec<u64> = self.world.ledger.written().flatten().collect();
        lbas.retain(|lba| lba % 8 == 0 && lba + 8 <= size_blocks);
        for lba in lbas.into_iter().take(64) {
            self.world.submit(node, 0, RequestKind::Read, lba, 8);
        }
        self.world.wait_for_io();
        assert_eq!(self.world.state(node).disk, DiskState::UpToDate);
    }
}
