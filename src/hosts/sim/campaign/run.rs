//! One run: a world, its operator and its application go through a schedule; then faults end, and everything has to be well
//! again within bounded virtual time. Panics with what was violated.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::operator::{Lead, is_up};
use super::schedule::{Deed, Schedule};
use super::verdict::ends_in;
use super::workload::Load;
use crate::engine::manager::{Options, Order};
use crate::engine::open::Goal;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::hosts::sim::coverage::Coverage;
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::{Config, MS, SECOND, World, address};

/// How long the operator waits between two looks while something is under way.
const LOOK_NS: u64 = 2 * MS;
/// How long two nodes that cannot go together have to say so, once they can talk.
const REPORT_NS: u64 = 15 * SECOND;
/// Disks are looked at after one deed in so many.
const CHECK_ONE_IN: u64 = 4;
/// A run lasts this long at least.
const RUN_NS: u64 = 60 * SECOND;

/// What a run that violated nothing tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Over every event and everything that the engine asked for.
    pub trace_hash: u64,
    pub steps: u64,
    pub virtual_ns: u64,
    pub coverage: Coverage,
}

/// Goes through a schedule.
pub fn run(schedule: &Schedule, trace: bool) -> Outcome {
    let mut run = Run::begin(schedule, trace);
    for planned in &schedule.deeds {
        run.advance(run.began_ns + planned.at_us * 1000);
        run.world.check_idle_replicas();
        run.perform(&planned.deed);
        run.check_replicas();
    }
    run.end()
}

struct Run {
    world: World,
    began_ns: u64,
    reckless: bool,
    lead: Lead,
    loads: Vec<Load>,
    /// Nodes that are to be told of their peers when they have started.
    starting: Vec<usize>,
    /// Nodes that are shutting down: node, order.
    stopping: Vec<(usize, u64)>,
    /// Data was given up by the operator: what the application wrote need not be there.
    gave_up_data: bool,
}

/// Of a run that violates something, the last states are told.
impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The engine was left in the middle of something.
            let describe = AssertUnwindSafe(|| self.world.describe());
            if let Ok(states) = catch_unwind(describe) {
                ends_in(&states);
            }
        }
    }
}

impl Run {
    fn begin(schedule: &Schedule, trace: bool) -> Run {
        let config = Config {
            trace,
            ..schedule.shape.config()
        };
        let mut world = World::clean_cluster(schedule.seed, config);
        world.promote(0);
        let reckless = schedule.shape.reckless;
        // Of two nodes that both are Primary each reads its own.
        world.checks_content = !reckless;
        Run {
            began_ns: world.now_ns,
            world,
            reckless,
            lead: Lead::Active { node: 0 },
            loads: Vec::new(),
            starting: Vec::new(),
            stopping: Vec::new(),
            gave_up_data: false,
        }
    }

    /// Lets the world go on until `end_ns`, with what the operator and the application do meanwhile.
    fn advance(&mut self, end_ns: u64) {
        while self.world.now_ns < end_ns {
            let next_load_ns = self.loads.iter().map(|load| load.next_ns).min();
            let mut until_ns = end_ns.min(next_load_ns.unwrap_or(end_ns));
            if self.is_waiting() {
                until_ns = until_ns.min(self.world.now_ns + LOOK_NS);
            }
            let time_ns = until_ns.saturating_sub(self.world.now_ns);
            self.world.run_for(time_ns);
            self.submit_due();
            self.look();
        }
    }

    fn is_waiting(&self) -> bool {
        !self.starting.is_empty()
            || !self.stopping.is_empty()
            || matches!(self.lead, Lead::Promoting { .. } | Lead::Demoting { .. })
    }

    fn look(&mut self) {
        self.lead.look(&mut self.world);
        for node in std::mem::take(&mut self.starting) {
            if is_up(&self.world, node) {
                self.introduce(node);
            } else if self.world.nodes[node].running {
                self.starting.push(node);
            }
        }
        for (node, order) in std::mem::take(&mut self.stopping) {
            match self.world.outcome(node, order) {
                Some(outcome) => {
                    if outcome.is_ok() {
                        self.world.check_nothing_left(node);
                    }
                    self.stop(node, false);
                }
                None if is_up(&self.world, node) => self.stopping.push((node, order)),
                None => {}
            }
        }
    }

    fn submit_due(&mut self) {
        let primaries = self.primaries();
        for load in &mut self.loads {
            while load.left > 0 && load.next_ns <= self.world.now_ns {
                if primaries.is_empty() {
                    load.left = 0;
                }
                for &node in &primaries {
                    if load.left > 0 {
                        load.submit(&mut self.world, node);
                    }
                }
            }
        }
        self.loads.retain(|load| load.left > 0);
    }

    /// Where the application does I/O.
    fn primaries(&self) -> Vec<usize> {
        if self.reckless {
            let nodes = 0..self.world.nodes.len();
            return nodes.filter(|&node| self.world.is_primary(node)).collect();
        }
        self.lead.active().into_iter().collect()
    }

    fn introduce(&mut self, node: usize) {
        for peer in 0..self.world.nodes.len() {
            if peer != node {
                self.world.order(
                    node,
                    Order::AddPeer {
                        node_id: peer as u8,
                        address: address(peer),
                        connect: true,
                    },
                );
            }
        }
    }

    fn start(&mut self, node: usize) {
        if !self.world.nodes[node].running {
            self.world.open(node, Goal::Any);
            self.starting.push(node);
        }
    }

    fn stop(&mut self, node: usize, power: bool) {
        if !self.world.nodes[node].running {
            return;
        }
        self.stopping.retain(|&(other, _)| other != node);
        if is_up(&self.world, node) {
            self.lead.stops(&self.world, node);
        }
        if power {
            self.world.power_loss(node);
        } else {
            self.world.kill(node);
        }
    }

    fn order(&mut self, node: usize, order: Order) {
        if is_up(&self.world, node) {
            self.world.order(node, order);
        }
    }

    /// Now and then all disks are looked at.
    fn check_replicas(&self) {
        if self.reckless || self.world.steps % CHECK_ONE_IN != 0 {
            return;
        }
        self.world.check_findable();
    }

    fn perform(&mut self, deed: &Deed) {
        match *deed {
            Deed::Load {
                count,
                every_us,
                seed,
            } => self.load(count, every_us, seed),
            Deed::Cut { one, other } => self.world.cut(one, other),
            Deed::CutOneWay { from, to } => self.world.cut_one_way(from, to),
            Deed::Isolate { node } => {
                for other in (0..self.world.nodes.len()).filter(|&other| other != node) {
                    self.world.cut(node, other);
                }
            }
            Deed::Heal { one, other } => self.world.heal(one, other),
            Deed::HealAll => self.heal_all(),
            Deed::Reset { one, other } => self.world.reset(one, other),
            Deed::Kill { node } => self.stop(node, false),
            Deed::PowerLoss { node } => self.stop(node, true),
            Deed::PowerLossOfAll => {
                for node in 0..self.world.nodes.len() {
                    self.stop(node, true);
                }
            }
            Deed::Start { node } => self.start(node),
            Deed::FailOver { to } => {
                if let Some(node) = self.lead.active()
                    && node != to
                {
                    self.stop(node, false);
                }
                self.lead.promote(&mut self.world, to, false);
            }
            Deed::HandOver { to } => self.lead.demote(&mut self.world, to),
            Deed::Promote { node, force } => {
                self.gave_up_data |= force;
                self.order(node, Order::Promote { force });
            }
            Deed::Demote { node } => self.order(node, Order::Demote),
            // It would be promoted without its disk, for which nobody has looked at the others.
            Deed::Detach { node } if self.lead.is_promoting(node) => {}
            Deed::Detach { node } => self.order(node, Order::Detach),
            Deed::Attach { node } => self.attach(node),
            Deed::Disconnect { node, peer } => {
                let node_id = Some(peer as u8);
                self.order(node, Order::Disconnect { node_id });
            }
            Deed::Connect {
                node,
                peer,
                discard_my_data,
            } => {
                self.gave_up_data |= discard_my_data;
                self.connect(node, Some(peer), discard_my_data);
            }
            Deed::Invalidate { node } => self.order(node, Order::Invalidate),
            Deed::PauseResync { node } => self.order(node, Order::PauseResync),
            Deed::ResumeResync { node } => self.order(node, Order::ResumeResync),
            Deed::Stop { node } => self.close(node),
            Deed::SlowDisk {
                node,
                most_us,
                for_us,
            } => self.world.slow_disk(node, most_us * 1000, for_us * 1000),
            Deed::FailDisk {
                node,
                failing,
                percent,
                for_us,
            } => self.world.fail_disk(node, failing, percent, for_us * 1000),
            Deed::FreezeDisk { node, for_us } => self.world.freeze_disk(node, for_us * 1000),
            Deed::MendDisk { node } => self.world.mend_disk(node),
            Deed::SlowCore {
                node,
                core,
                most_us,
                for_us,
            } => self
                .world
                .slow_core(node, core, most_us * 1000, for_us * 1000),
            Deed::SlowNode {
                node,
                most_us,
                for_us,
            } => self.world.slow_node(node, most_us * 1000, for_us * 1000),
            Deed::SlowLink {
                from,
                to,
                most_us,
                for_us,
            } => self.world.slow_way(from, to, most_us * 1000, for_us * 1000),
            Deed::StallLink { from, to, for_us } => self.world.stall(from, to, for_us * 1000),
            Deed::JumpClock { node, by_us } => self.world.jump_clock(node, by_us * 1000),
            Deed::ForcePromote { node } => self.lead.promote(&mut self.world, node, true),
            Deed::SetOptions {
                node,
                ping_interval_ms,
                ping_timeout_ms,
                resync_rate_bytes,
            } => {
                let options = Options {
                    ping_interval_ms,
                    ping_timeout_ms,
                    resync_rate_bytes,
                    ..self.world.options()
                };
                self.world.set_options(node, options);
            }
            Deed::RemovePeer { node, peer } => {
                let node_id = peer as u8;
                self.order(node, Order::RemovePeer { node_id });
            }
            Deed::AddPeer { node, peer } => {
                let (node_id, connect) = (peer as u8, true);
                let address = address(peer);
                self.order(
                    node,
                    Order::AddPeer {
                        node_id,
                        address,
                        connect,
                    },
                );
            }
            Deed::Rot { node, block } => {
                if !self.world.nodes[node].running {
                    self.world.rot(node, block);
                }
            }
        }
        self.look();
    }

    /// An application that finds no Primary has one made.
    fn load(&mut self, count: u32, every_us: u64, seed: u64) {
        if let Lead::Nobody { .. } = self.lead {
            let nodes = self.world.nodes.len();
            for turn in 0..nodes {
                let node = ((seed % nodes as u64) as usize + turn) % nodes;
                self.lead.promote(&mut self.world, node, false);
            }
        }
        self.loads.push(Load {
            random: Random::new(seed),
            left: count,
            every_ns: every_us * 1000,
            next_ns: self.world.now_ns,
        });
        self.submit_due();
    }

    fn attach(&mut self, node: usize) {
        let is_free = {
            let node = &self.world.nodes[node];
            node.opener.is_none() && !node.disk_open
        };
        if is_up(&self.world, node) && is_free && !self.is_closing(node) {
            self.world.open(node, Goal::Any);
        }
    }

    fn is_closing(&self, node: usize) -> bool {
        self.stopping.iter().any(|&(other, _)| other == node)
    }

    fn close(&mut self, node: usize) {
        let is_opening = self.world.nodes[node].opener.is_some();
        if is_up(&self.world, node) && !is_opening && !self.is_closing(node) {
            self.lead.closes(&self.world, node);
            let order = self.world.order(node, Order::Close);
            self.stopping.push((node, order));
        }
    }

    fn heal_all(&mut self) {
        for one in 0..self.world.nodes.len() {
            for other in 0..one {
                self.world.heal(one, other);
            }
        }
    }

    /// Faults end, everything is started, and all is well after a while.
    fn end(mut self) -> Outcome {
        let nodes = self.world.nodes.len();
        self.advance((self.began_ns + RUN_NS).max(self.world.now_ns + SECOND));
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
        for node in 0..nodes {
            self.introduce(node);
            self.order(node, Order::ResumeResync);
            self.connect(node, None, false);
        }
        if self.reckless {
            self.reconcile();
        } else if let Lead::Nobody { .. } = self.lead {
            self.have_a_primary();
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
            if self.world.now_ns >= force_ns && !(0..nodes).any(has_newest) {
                self.lead.promote_best(&mut self.world);
            }
            self.advance(self.world.now_ns + 50 * MS);
        }
    }

    /// Resolves what a reckless operator has made: nobody stays Primary, a split brain is reported on both sides, and the
    /// changes of one are given up, until all go together.
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
            let Some((keeps, gives_up)) = self.split_brain() else {
                break;
            };
            self.gave_up_data = true;
            self.connect(gives_up, Some(keeps), true);
            self.connect(keeps, Some(gives_up), false);
        }
        // Nobody reads from two nodes any more.
        self.world.checks_content = !self.gave_up_data;
    }

    fn connect(&mut self, node: usize, peer: Option<usize>, discard_my_data: bool) {
        let connect = Order::Connect {
            node_id: peer.map(|peer| peer as u8),
            discard_my_data,
        };
        self.order(node, connect);
    }

    /// Two nodes that say that they have changes of their own: both do if one does, and if they have.
    fn split_brain(&self) -> Option<(usize, usize)> {
        let says = |node: usize, peer: usize| {
            let report = self.world.peer(node, peer);
            let error = report.last_error.unwrap_or_default();
            report.conn < ConnState::Connected && error.contains("SplitBrain")
        };
        let nodes = self.world.nodes.len();
        let mut found = None;
        for one in 0..nodes {
            for other in one + 1..nodes {
                assert_eq!(
                    says(one, other),
                    says(other, one),
                    "[I9] only one of {one} and {other} reports a split brain\n{}",
                    self.world.describe()
                );
                assert!(
                    says(one, other) || !self.world.have_diverged(one, other),
                    "[I9] of {one} and {other} each has writes that the other lacks, and they report no split brain\n{}",
                    self.world.describe()
                );
                if says(one, other) && found.is_none() {
                    found = Some((one, other));
                }
            }
        }
        found
    }

    fn read_everything(&mut self) {
        let Some(node) = self.primaries().first().copied() else {
            return;
        };
        let size_blocks = self.world.config.volume_bytes / u64::from(self.world.config.block_size);
        let mut lbas: Vec<u64> = self.world.ledger.blocks().collect();
        lbas.retain(|lba| lba % 8 == 0 && lba + 8 <= size_blocks);
        for lba in lbas.into_iter().take(64) {
            self.world.submit(node, 0, RequestKind::Read, lba, 8);
        }
        self.world.wait_for_io();
        assert_eq!(self.world.state(node).disk, DiskState::UpToDate);
    }
}
