//! The world: virtual time, a queue of events ordered by time and then by the seed, nodes and what joins them. Tests
//! call it; it calls the engine. Checks what must hold at every step and panics with what was violated.

mod application;
mod checks;
mod deliver;
pub(super) mod disk_faults;
mod faults;
mod findable;
mod left_over;
pub(super) mod moments;
mod opening;
mod orders;
mod overwritten;
mod polls;
mod received;
mod repeat;
mod settled;
pub(super) mod slowness;
mod trace;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::coverage::{Coverage, Seen};
use super::disk::Disk;
use super::ledger::Ledger;
use super::link::Transit;
use super::memory::{Bytes, Payload};
use super::node::{Action, Core, MANAGER, Node};
use super::random::Random;
use super::record::Recorded;
use crate::engine::channel::Channel;
use crate::engine::manager::Manager;
use crate::engine::message::{OrderId, ToChannel, ToManager};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::handshake::Decision;
use crate::engine::request::RequestKind;
use crate::host::{AppStatus, Token};

pub use orders::address;

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1_000 * MS;
/// How much time may pass before a condition is looked at again.
const LOOK_NS: u64 = 100_000;
/// Where the data of a volume begins on each of its devices.
const DATA_OFFSET: u64 = 1 << 20;
/// The name of the volume of a world.
const VOLUME: &str = "volume";
/// The token of all I/O of an opener.
const OPENER: Token = Token(u64::MAX);

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Config {
    pub nodes: usize,
    pub cores: usize,
    pub volume_bytes: u64,
    pub block_size: u32,
    /// Per node, the last one for all that follow.
    pub granularity_log2: Vec<u8>,
    pub al_extents: u32,
    /// Per node, the last one for all that follow: data that it takes with a command.
    pub in_capsule_bytes: Vec<u32>,
    pub volatile_caches: bool,
    /// Commands of each peer that a node remembers.
    pub command_window: usize,
    /// Chance in percent that a node is out of a resource when it asks.
    pub scarcity_percent: u64,
    /// Chance in percent that the transport delivers a command again, or late.
    pub repeat_percent: u64,
    pub ping_interval_ms: u64,
    pub ping_timeout_ms: u64,
    /// Everything that happens goes to standard error.
    pub trace: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            nodes: 2,
            cores: 1,
            volume_bytes: 64 << 20,
            block_size: 512,
            granularity_log2: vec![12],
            al_extents: 8,
            in_capsule_bytes: vec![128 << 10],
            volatile_caches: false,
            command_window: 4096,
            scarcity_percent: 0,
            repeat_percent: 0,
            ping_interval_ms: 50,
            ping_timeout_ms: 200,
            trace: std::env::var_os("BDEV_REPL_SIM_TRACE").is_some(),
        }
    }
}

pub(super) enum What {
    Poll {
        place: usize,
        at_ns: u64,
    },
    DiskDone(u64),
    DiskThaws,
    ToManager(Box<ToManager<Core>>),
    ToChannel(usize, Box<ToChannel<Core>>),
    LinkTried {
        slot: usize,
        id: u64,
    },
    LinkReset {
        slot: usize,
        id: u64,
    },
    /// What was outstanding is told to be gone.
    LinkGone {
        slot: usize,
        command: u64,
    },
    LinkDown {
        slot: usize,
        id: u64,
    },
    Arrived(Box<Transit>),
    Answered {
        slot: usize,
        link: u64,
        command: u64,
        answer: PeerAnswer,
        data: Option<Bytes>,
    },
    Submit(u64),
}

pub(super) struct Event {
    node: usize,
    incarnation: u64,
    what: What,
}

/// An application I/O.
pub struct AppWork {
    pub node: usize,
    pub incarnation: u64,
    pub core: usize,
    pub kind: RequestKind,
    pub lba: u64,
    pub blocks: u32,
    pub memory: Option<Payload>,
    /// Of a flush: what it covers.
    pub mark: u64,
    /// Since its submission a cache was lost that may have held it.
    pub cache_lost: bool,
    pub status: Option<AppStatus>,
}

pub struct World {
    pub config: Config,
    pub now_ns: u64,
    pub random: Random,
    pub nodes: Vec<Node>,
    pub ledger: Ledger,
    /// The content that application writes carry is checked against the ledger; off once data was given up.
    pub checks_content: bool,
    pub apps: BTreeMap<u64, AppWork>,
    /// Commands between two nodes that stopped on the way, in order.
    blocked: BTreeMap<(usize, usize), Vec<Event>>,
    /// What is slow or stands still between two nodes.
    ways: BTreeMap<(usize, usize), slowness::Way>,
    /// Time, chance, a number that makes them unique, and the event's place.
    queue: BinaryHeap<Reverse<(u64, u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    free_events: Vec<usize>,
    next_id: u64,
    trace_hash: trace::TraceHash,
    /// Room for what a call asks for, empty.
    spare_actions: Vec<Action>,
    /// Events delivered.
    pub steps: u64,
    /// Bytes that resync targets were given.
    pub resynced_bytes: u64,
    /// Commands that were answered "fenced".
    pub fenced: u64,
    /// Orders that were given: node, its incarnation, number, what.
    pub orders: Vec<(usize, u64, OrderId, String)>,
    /// Commands that are delivered when the test says so: opcode, and what was caught.
    pub(super) catching: Option<u8>,
    pub(super) caught: Vec<Event>,
    repeats: repeat::Repeats,
    received: received::Received,
    writes: overwritten::Writes,
    /// What happened, for a test that replays it: node and event.
    pub(super) recording: Option<Vec<(usize, Recorded)>>,
    pub coverage: Coverage,
    /// Per node.
    seen: Vec<Seen>,
    moments: moments::Moments,
    /// By the nonces of two Hellos, the lower one first: the node that decided first, and what.
    decisions: BTreeMap<(u64, u64), (usize, Decision)>,
    /// What the trace was last told of each node.
    told: Vec<String>,
}

impl World {
    pub fn new(seed: u64, config: Config) -> World {
        let device = config.volume_bytes + (4 << 20);
        let nodes = (0..config.nodes)
            .map(|_| {
                let disk = Disk::new(device, config.block_size, config.volatile_caches);
                Node::new(disk, config.cores)
            })
            .collect();
        let seen = vec![Seen::NOTHING; config.nodes];
        let told = vec![String::new(); config.nodes];
        World {
            config,
            now_ns: SECOND,
            random: Random::new(seed),
            nodes,
            ledger: Ledger::default(),
            checks_content: true,
            apps: BTreeMap::new(),
            blocked: BTreeMap::new(),
            ways: BTreeMap::new(),
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free_events: Vec::new(),
            next_id: 1,
            trace_hash: trace::TraceHash::default(),
            spare_actions: Vec::new(),
            steps: 0,
            resynced_bytes: 0,
            fenced: 0,
            orders: Vec::new(),
            catching: None,
            caught: Vec::new(),
            repeats: repeat::Repeats::default(),
            received: received::Received::default(),
            writes: overwritten::Writes::default(),
            recording: None,
            coverage: Coverage::default(),
            seen,
            moments: moments::Moments::default(),
            decisions: BTreeMap::new(),
            told,
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn note(&self, node: usize, text: impl FnOnce() -> String) {
        if self.config.trace {
            eprintln!("{:>14} n{node} {}", self.now_ns, text());
        }
    }

    fn schedule(&mut self, at_ns: u64, event: Event) {
        let (id, chance) = (self.id(), self.random.number());
        let place = self.free_events.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.queue.push(Reverse((at_ns, chance, id, place)));
    }

    fn schedule_here(&mut self, node: usize, delay_ns: u64, what: What) {
        let incarnation = self.nodes[node].incarnation;
        let event = Event {
            node,
            incarnation,
            what,
        };
        self.schedule(self.now_ns + delay_ns, event);
    }

    /// Delivers the next event.
    pub fn step(&mut self) {
        let Some(Reverse((at_ns, _, _, place))) = self.queue.pop() else {
            panic!("[liveness] nothing will ever happen again");
        };
        self.now_ns = self.now_ns.max(at_ns);
        self.steps += 1;
        self.free_events.push(place);
        if let Some(event) = self.events[place].take() {
            self.hash_event(&event);
            self.deliver(event);
        }
    }

    /// Panics when it has not come true after `limit_ns`.
    pub fn run_until(&mut self, what: &str, limit_ns: u64, is: impl Fn(&World) -> bool) {
        let end_ns = self.now_ns + limit_ns;
        while !is(self) {
            if self.now_ns > end_ns || self.queue.is_empty() {
                panic!(
                    "[liveness] after {limit_ns} ns still not: {what}\n{}",
                    self.describe()
                );
            }
            // Looking is not free: after a few steps at a time, as long as they are close to each other.
            let look_ns = self.now_ns + LOOK_NS;
            for step in 0..16 {
                if step > 0 && self.next_event_ns().is_none_or(|at_ns| at_ns > look_ns) {
                    break;
                }
                self.step();
            }
        }
    }

    fn next_event_ns(&self) -> Option<u64> {
        self.queue.peek().map(|Reverse((at_ns, ..))| *at_ns)
    }

    /// Or until a moment comes that is awaited.
    pub fn run_for(&mut self, time_ns: u64) {
        let end_ns = self.now_ns + time_ns;
        while self.next_event_ns().is_some_and(|at_ns| at_ns <= end_ns) {
            self.step();
            if self.moments.has_come() {
                return;
            }
        }
        self.now_ns = end_ns;
    }

    /// Calls into a node's engine, then does what it asked for.
    fn call(&mut self, node: usize, place: usize, call: impl FnOnce(&mut Node, &mut Core)) {
        let random = Random::new(self.random.number());
        let mut core = Core {
            random,
            actions: std::mem::take(&mut self.spare_actions),
            ..self.core(node)
        };
        *self.nodes[node].vain_polls(place) = 0;
        call(&mut self.nodes[node], &mut core);
        if place == MANAGER {
            self.observe(node);
        }
        for action in core.actions.drain(..) {
            self.act(node, place, action);
        }
        self.spare_actions = core.actions;
        self.plan_poll(node, place);
    }

    /// The context of a node now, with chance that is always the same.
    fn core(&self, node: usize) -> Core {
        Core {
            now_ns: self.now_ns + self.nodes[node].clock_ahead_ns,
            random: Random::new(0),
            scarcity_percent: self.config.scarcity_percent,
            links_up: self.nodes[node].links_up(),
            in_capsule_bytes: self.in_capsule_bytes(node),
            buffers: self.nodes[node].buffers.clone(),
            has_asked: false,
            actions: Vec::new(),
        }
    }

    fn with_manager(&mut self, node: usize, call: impl FnOnce(&mut Manager<Core>, &mut Core)) {
        self.call(node, MANAGER, |node, core| {
            if let Some(engine) = &mut node.engine {
                call(&mut engine.manager, core);
            }
        });
    }

    fn with_channel(
        &mut self,
        node: usize,
        channel: usize,
        call: impl FnOnce(&mut Channel<Core>, &mut Core),
    ) {
        self.call(node, channel, |node, core| {
            if let Some(engine) = &mut node.engine {
                call(&mut engine.channels[channel], core);
            }
        });
    }
}
