//! One run: a world, its operator and its application go through a schedule; then it comes to its `ending`. Panics with
//! what was violated.

mod ending;

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::operator::{Lead, is_up};
use super::schedule::{Contents, Deed, Replacement, Schedule};
use super::verdict::ends_in;
use super::workload::Load;
use crate::engine::manager::{Options, Order};
use crate::engine::meta::format::Content;
use crate::engine::meta::generation::from_random;
use crate::engine::open::Goal;
use crate::engine::peer::state::DiskState;
use crate::hosts::sim::coverage::Coverage;
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::{Config, MS, World, address};

/// How long the operator waits between two looks while something is under way.
const LOOK_NS: u64 = 2 * MS;
/// Disks are looked at after one deed in so many.
const CHECK_ONE_IN: u64 = 4;

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

/// The nodes with what they have in the beginning; the first is Primary.
fn begin_with(schedule: &Schedule, config: Config) -> World {
    let contents = schedule.shape.contents;
    let mut world = match contents {
        Contents::Clean => World::clean_cluster(schedule.seed, config),
        Contents::Nothing | Contents::OneHasAll => World::new(schedule.seed, config),
    };
    // Of two nodes that both are Primary each reads its own.
    world.checks_content = !schedule.shape.reckless;
    match contents {
        Contents::Clean => world.promote(0),
        Contents::Nothing => {
            for node in 0..world.nodes.len() {
                world.create(node, Content::Nothing);
            }
            world.introduce_all();
            world.carry_out(0, Order::Promote { force: true });
        }
        Contents::OneHasAll => {
            let random = world.random.number();
            world.create(0, Content::Data { random });
            world.promote(0);
            for lba in 0..8 {
                world.write(0, lba * 100, 8);
            }
            for node in 1..world.nodes.len() {
                world.create(node, Content::Nothing);
            }
            world.introduce_all();
        }
    }
    world
}

struct Run {
    world: World,
    began_ns: u64,
    /// Deeds that wait for a moment, by its number, and how long after it they are done.
    waiting: Vec<(u64, u64, Deed)>,
    next_moment: u64,
    /// Deeds whose moment has come, and when they are to be done.
    due: Vec<(u64, Deed)>,
    /// Nodes with a device of somebody else.
    foreign: Vec<usize>,
    /// What the data on such devices was, when they came.
    foreign_generations: Vec<u64>,
    /// Nodes whose new device has not been seen with a volume on it yet.
    unmade: Vec<(usize, Replacement)>,
    reckless: bool,
    lead: Lead,
    /// As the trace was last told.
    told_lead: Lead,
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
        let world = begin_with(schedule, config);
        let reckless = schedule.shape.reckless;
        Run {
            began_ns: world.now_ns,
            world,
            waiting: Vec::new(),
            next_moment: 0,
            due: Vec::new(),
            foreign: Vec::new(),
            foreign_generations: Vec::new(),
            unmade: Vec::new(),
            reckless,
            lead: Lead::Active { node: 0 },
            told_lead: Lead::Active { node: 0 },
            loads: Vec::new(),
            starting: Vec::new(),
            stopping: Vec::new(),
            gave_up_data: false,
        }
    }

    /// Lets the world go on until `end_ns`, with what the operator and the application do meanwhile.
    fn advance(&mut self, end_ns: u64) {
        while self.world.now_ns < end_ns {
            let loads_ns = self.loads.iter().map(|load| load.next_ns);
            let due_ns = self.due.iter().map(|&(at_ns, _)| at_ns);
            let mut until_ns = loads_ns.chain(due_ns).fold(end_ns, u64::min);
            if self.is_waiting() {
                until_ns = until_ns.min(self.world.now_ns + LOOK_NS);
            }
            let time_ns = until_ns.saturating_sub(self.world.now_ns);
            self.world.run_for(time_ns);
            self.perform_due();
            self.submit_due();
            self.look();
        }
    }

    /// Deeds whose moment has come are done when their time has.
    fn perform_due(&mut self) {
        for come in self.world.take_moments() {
            let place = self.waiting.iter().position(|&(id, ..)| id == come);
            if let Some(place) = place {
                let (_, after_ns, deed) = self.waiting.remove(place);
                self.due.push((self.world.now_ns + after_ns, deed));
            }
        }
        let now_ns = self.world.now_ns;
        while let Some(place) = self.due.iter().position(|&(at_ns, _)| at_ns <= now_ns) {
            let (_, deed) = self.due.remove(place);
            self.perform(&deed);
        }
    }

    fn is_waiting(&self) -> bool {
        !self.starting.is_empty()
            || !self.stopping.is_empty()
            || matches!(self.lead, Lead::Promoting { .. } | Lead::Demoting { .. })
    }

    fn note_lead(&mut self) {
        if self.world.config.trace && self.told_lead != self.lead {
            eprintln!("{:>14} lead {:?}", self.world.now_ns, self.lead);
            self.told_lead = self.lead;
        }
    }

    fn look(&mut self) {
        self.lead.look(&mut self.world);
        self.note_lead();
        for node in std::mem::take(&mut self.starting) {
            if is_up(&self.world, node) {
                self.unmade.retain(|&(other, _)| other != node);
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
        if self.world.nodes[node].running {
            return;
        }
        if let Some(&(_, with)) = self.unmade.iter().find(|&&(other, _)| other == node) {
            return self.put_in(node, with);
        }
        self.world.open(node, Goal::Any);
        self.starting.push(node);
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
                place,
            } => self.load(
                Load {
                    random: Random::new(seed),
                    left: count,
                    every_ns: every_us * 1000,
                    next_ns: self.world.now_ns,
                    place: place.map(u64::from),
                },
                seed,
            ),
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
            Deed::Replace { node, with } => self.replace(node, with),
            Deed::Await {
                node,
                moment,
                skip,
                after_us,
                ref then,
            } => {
                let id = self.next_moment;
                self.next_moment += 1;
                self.waiting.push((id, after_us * 1000, Deed::clone(then)));
                self.world.await_moment(id, node, moment, skip);
            }
        }
        self.look();
    }

    /// An application that finds no Primary has one made.
    fn load(&mut self, load: Load, seed: u64) {
        if let Lead::Nobody { .. } = self.lead {
            let nodes = self.world.nodes.len();
            for turn in 0..nodes {
                let node = ((seed % nodes as u64) as usize + turn) % nodes;
                self.lead.promote(&mut self.world, node, false);
            }
        }
        self.loads.push(load);
        self.submit_due();
    }

    /// Only while the application runs elsewhere, on a disk that has everything.
    fn replace(&mut self, node: usize, with: Replacement) {
        let has_all = |lead: usize| self.world.state(lead).disk == DiskState::UpToDate;
        let is_spared = matches!(self.lead, Lead::Active { node: lead }
            if lead != node && is_up(&self.world, lead) && has_all(lead));
        if !is_spared || self.reckless {
            return;
        }
        self.put_in(node, with);
    }

    fn put_in(&mut self, node: usize, with: Replacement) {
        self.stop(node, true);
        self.foreign.retain(|&other| other != node);
        self.unmade.retain(|&(other, _)| other != node);
        self.unmade.push((node, with));
        let content = match with {
            Replacement::Nothing => Content::Nothing,
            Replacement::Foreign => {
                let random = self.world.random.number();
                self.foreign.push(node);
                self.foreign_generations.push(from_random(random));
                Content::Data { random }
            }
        };
        self.world.replace_disk(node);
        self.world.open(node, self.world.creation(node, content));
        self.starting.push(node);
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
        if is_up(&self.world, node) && !self.is_closing(node) {
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
}
