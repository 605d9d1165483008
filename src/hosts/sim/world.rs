//! The world: virtual time, a queue of events ordered by time and then by the seed, nodes and what joins them. Tests
//! call it; it calls the engine. Checks what must hold at every step and panics with what was violated.

mod application;
mod checks;
mod deliver;
pub(super) mod disk_faults;
mod faults;
mod findable;
mod polls;
mod repeat;
pub(super) mod slowness;
mod trace;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use super::coverage::{Coverage, Seen};
use super::disk::Disk;
use super::ledger::Ledger;
use super::link::Transit;
use super::memory::{Bytes, Payload};
use super::node::{Core, Engine, MANAGER, Node};
use super::random::Random;
use super::record::Recorded;
use crate::engine::channel::Channel;
use crate::engine::manager::{Manager, Options, Order, PeerReport, VolumeState};
use crate::engine::message::{OrderId, OrderOutcome, ToChannel, ToManager};
use crate::engine::meta::format::{Content, FormatParams};
use crate::engine::meta::layout::{LayoutParams, Placement};
use crate::engine::open::{Goal, OpenError, Opened, Opener};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::handshake::Decision;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::engine::volume::{Shared, VolumeGeometry};
use crate::host::{AppStatus, PeerAddress, Token};

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1_000 * MS;
/// How much time may pass before a condition is looked at again.
const LOOK_NS: u64 = 100_000;
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
    ToManager(ToManager<Core>),
    ToChannel(usize, ToChannel<Core>),
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
    /// What happened, for a test that replays it: node and event.
    pub(super) recording: Option<Vec<(usize, Recorded)>>,
    pub coverage: Coverage,
    /// Per node.
    seen: Vec<Seen>,
    /// By the nonces of two Hellos, the lower one first: the node that decided first, and what.
    decisions: BTreeMap<(u64, u64), (usize, Decision)>,
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
            steps: 0,
            resynced_bytes: 0,
            fenced: 0,
            orders: Vec::new(),
            catching: None,
            caught: Vec::new(),
            repeats: repeat::Repeats::default(),
            recording: None,
            coverage: Coverage::default(),
            seen,
            decisions: BTreeMap::new(),
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

    pub fn run_for(&mut self, time_ns: u64) {
        let end_ns = self.now_ns + time_ns;
        while self.next_event_ns().is_some_and(|at_ns| at_ns <= end_ns) {
            self.step();
        }
        self.now_ns = end_ns;
    }

    /// Calls into a node's engine, then does what it asked for.
    fn call(&mut self, node: usize, place: usize, call: impl FnOnce(&mut Node, &mut Core)) {
        let random = Random::new(self.random.number());
        let mut core = Core {
            random,
            ..self.core(node)
        };
        call(&mut self.nodes[node], &mut core);
        if place == MANAGER {
            self.observe(node);
        }
        for action in core.actions {
            self.act(node, place, action);
        }
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

    // What tests ask for.

    fn granularity_log2(&self, node: usize) -> u8 {
        let all = &self.config.granularity_log2;
        *all.get(node).or(all.last()).unwrap_or(&12)
    }

    pub(super) fn in_capsule_bytes(&self, node: usize) -> u32 {
        let all = &self.config.in_capsule_bytes;
        *all.get(node).or(all.last()).unwrap_or(&4096)
    }

    fn format_params(&self, node: usize, content: Content) -> FormatParams {
        FormatParams {
            name: VOLUME.to_owned(),
            volume_uuid: None,
            node_id: node as u8,
            backing_uuid: [0; 16],
            layout: self.layout_params(node),
            al_extents: self.config.al_extents,
            content,
        }
    }

    fn layout_params(&self, node: usize) -> LayoutParams {
        LayoutParams {
            device_size_bytes: self.nodes[node].disk.size_bytes(),
            block_size_bytes: self.config.block_size,
            placement: Placement::Front,
            data_size_bytes: Some(self.config.volume_bytes),
            granularity_log2: self.granularity_log2(node),
            peer_slots: 3.max(self.config.nodes as u8 - 1),
            channel_slots: self.config.cores as u16,
            al_ring_blocks: 8,
        }
    }

    /// What a node's device is made for.
    pub fn creation(&self, node: usize, content: Content) -> Goal {
        Goal::Create {
            params: Box::new(self.format_params(node, content)),
            force: false,
        }
    }

    /// Starts a node on an empty device.
    pub fn create(&mut self, node: usize, content: Content) {
        self.open(node, self.creation(node, content));
        self.wait_attached(node);
    }

    /// Starts a node that was killed.
    pub fn start(&mut self, node: usize) {
        self.open(node, Goal::Any);
        self.wait_attached(node);
    }

    /// Gives a detached node its disk again.
    pub fn attach(&mut self, node: usize) {
        self.open(node, Goal::Any);
        self.wait_attached(node);
    }

    /// Begins to open the device; what follows happens by itself.
    pub fn open(&mut self, node: usize, goal: Goal) {
        let size_bytes = self.nodes[node].disk.size_bytes();
        self.nodes[node].running = true;
        self.nodes[node].disk_open = true;
        self.nodes[node].opener = Some(Opener::new(goal, OPENER, size_bytes));
        self.plan_poll(node, MANAGER);
    }

    fn wait_attached(&mut self, node: usize) {
        self.run_until("the disk is attached", 5 * SECOND, |world| {
            world.nodes[node]
                .engine
                .as_ref()
                .is_some_and(|engine| engine.manager.disk() >= DiskState::Inconsistent)
        });
    }

    /// A device that fails cannot be used for now; any other one can.
    fn not_opened(&mut self, node: usize, error: &OpenError) {
        let is_failing = self.nodes[node].disk_faults.has_failed;
        assert!(
            is_failing && matches!(error, OpenError::Io { .. }),
            "node {node} cannot be opened: {error}"
        );
        self.note(node, || format!("cannot be opened: {error}"));
        let node = &mut self.nodes[node];
        node.opener = None;
        node.disk_open = false;
        if node.engine.is_none() {
            node.running = false;
        }
    }

    fn opened(&mut self, node: usize, opened: Opened) {
        let Config {
            cores,
            command_window,
            ..
        } = self.config;
        let options = self.options();
        let order = self.id();
        let incarnation = self.nodes[node].incarnation;
        self.orders
            .push((node, incarnation, order, "attach".to_owned()));
        self.call(node, MANAGER, |node, core| {
            node.opener = None;
            let engine = node.engine.get_or_insert_with(|| {
                let layout = &opened.superblock.layout;
                let geometry = VolumeGeometry {
                    block_size: layout.block_size(),
                    size_blocks: layout.data_size() / u64::from(layout.block_size()),
                    data_offset: layout.data_offset(),
                    granularity_log2: layout.granularity_log2(),
                };
                let shared = Arc::new(Shared::with_window(geometry, command_window));
                let mut manager = Manager::new(
                    Arc::clone(&shared),
                    opened.superblock.clone(),
                    (0..cores).collect(),
                );
                manager.set_options(options);
                Engine {
                    channels: (0..cores)
                        .map(|id| Channel::new(id, Arc::clone(&shared)))
                        .collect(),
                    manager,
                    shared,
                }
            });
            engine.manager.attach(core, opened);
            engine.manager.expect_attach(core, order);
        });
    }

    /// What every node starts with.
    pub fn options(&self) -> Options {
        Options {
            ping_interval_ms: self.config.ping_interval_ms,
            ping_timeout_ms: self.config.ping_timeout_ms,
            connect_interval_ms: 50,
            resync_rate_bytes: 0,
        }
    }

    /// Changes a node's options, if it runs.
    pub fn set_options(&mut self, node: usize, options: Options) {
        self.with_manager(node, |manager, _| manager.set_options(options));
    }

    /// Gives an order and returns its number.
    pub fn order(&mut self, node: usize, order: Order) -> OrderId {
        let id = self.id();
        self.note(node, || format!("order {id}: {order:?}"));
        let incarnation = self.nodes[node].incarnation;
        self.orders
            .push((node, incarnation, id, format!("{order:?}")));
        self.with_manager(node, |manager, core| manager.order(core, id, order));
        id
    }

    /// How an order ended, if it has.
    pub fn outcome(&self, node: usize, id: OrderId) -> Option<&OrderOutcome> {
        self.nodes[node].outcomes.get(&id)
    }

    pub fn orders_have_ended(&self) -> bool {
        self.orders.iter().all(|(node, incarnation, id, _)| {
            self.nodes[*node].incarnation != *incarnation || self.outcome(*node, *id).is_some()
        })
    }

    /// Every order to an engine that still runs has ended.
    pub fn check_orders(&self) {
        for (node, incarnation, id, text) in &self.orders {
            assert!(
                self.nodes[*node].incarnation != *incarnation || self.outcome(*node, *id).is_some(),
                "[I10] {text} on node {node} is stuck\n{}",
                self.describe()
            );
        }
    }

    /// Gives an order and waits for its end.
    pub fn ordered(&mut self, node: usize, order: Order) -> OrderOutcome {
        let text = format!("{order:?} has ended");
        let id = self.order(node, order);
        self.run_until(&text, 15 * SECOND, |world| {
            world.outcome(node, id).is_some()
        });
        self.outcome(node, id).cloned().unwrap_or(Ok(()))
    }

    /// Gives an order that must be carried out.
    pub fn carry_out(&mut self, node: usize, order: Order) {
        let text = format!("{order:?} on node {node}");
        if let Err(error) = self.ordered(node, order) {
            panic!("{text}: {}\n{}", error.text, self.describe());
        }
    }

    /// Tells a node where another one is.
    pub fn introduce(&mut self, node: usize, peer: usize) {
        let order = Order::AddPeer {
            node_id: peer as u8,
            address: address(peer),
            connect: true,
        };
        self.carry_out(node, order);
    }

    pub fn promote(&mut self, node: usize) {
        self.carry_out(node, Order::Promote { force: false });
    }

    /// All nodes on empty devices, paired each with each; `assume_clean`, so nothing is to resync.
    pub fn clean_cluster(seed: u64, config: Config) -> World {
        let mut world = World::new(seed, config);
        for node in 0..world.config.nodes {
            world.create(node, Content::AssumeClean);
        }
        world.introduce_all();
        world.settle();
        world
    }

    /// Every node is told of every other.
    pub fn introduce_all(&mut self) {
        for node in 0..self.config.nodes {
            for peer in 0..self.config.nodes {
                if node != peer {
                    self.introduce(node, peer);
                }
            }
        }
    }

    pub fn state(&self, node: usize) -> VolumeState {
        let core = self.core(node);
        let engine = self.nodes[node].engine.as_ref();
        engine.expect("the node runs").manager.report(&core)
    }

    pub fn peer(&self, node: usize, peer: usize) -> PeerReport {
        let peers = self.state(node).peers;
        let found = peers
            .into_iter()
            .find(|one| usize::from(one.node_id) == peer);
        found.expect("they were introduced")
    }

    pub fn is_primary(&self, node: usize) -> bool {
        let engine = self.nodes[node].engine.as_ref();
        engine.is_some_and(|engine| engine.manager.is_primary())
    }

    /// All nodes run, are connected with each other, UpToDate, and nothing is under way.
    pub fn is_settled(&self) -> bool {
        self.apps.values().all(|app| app.status.is_some())
            && (0..self.nodes.len()).all(|node| {
                self.nodes[node].engine.is_some() && self.nodes[node].unanswered.is_empty() && {
                    let state = self.state(node);
                    state.disk == DiskState::UpToDate
                        && !state.suspended
                        && state.peers.iter().all(|peer| {
                            peer.conn == ConnState::Connected
                                && peer.disk == DiskState::UpToDate
                                && (self.nodes.len() == 2 || peer.out_of_sync_bytes == 0)
                        })
                }
            })
    }

    /// Waits until everything is well again, and checks that it is.
    pub fn settle(&mut self) {
        self.run_until("connected and UpToDate", 60 * SECOND, World::is_settled);
        self.run_for(20 * MS);
        if !self.is_settled() {
            return self.settle();
        }
        self.check_replicas();
    }

    /// The replicas are identical, hold what was acknowledged, and no bit is set.
    pub fn check_replicas(&self) {
        let start = 1 << 20;
        let bytes = start..start + self.config.volume_bytes;
        for node in 1..self.nodes.len() {
            let (first, other) = (&self.nodes[0].disk, &self.nodes[node].disk);
            if let Some(at) = first.first_difference(other, bytes.clone()) {
                let block = u64::from(self.config.block_size);
                let at = at / block * block;
                let of = |disk: &Disk| {
                    super::ledger::identify(&disk.read(at..at + block), (at - start) / block)
                };
                panic!(
                    "[replicas] nodes 0 and {node} differ in block {}: {:?} and {:?}\n{}",
                    (at - start) / block,
                    of(first),
                    of(other),
                    self.describe()
                );
            }
        }
        for node in 0..self.nodes.len() {
            assert!(self.is_unlocked(node), "[I10] node {node}: a range is kept");
            for peer in self.state(node).peers {
                assert_eq!(
                    peer.out_of_sync_bytes, 0,
                    "[replicas] node {node}: bits for {}",
                    peer.node_id
                );
            }
        }
        if self.checks_content {
            self.check_content(0);
        }
    }

    /// Nobody holds a range of the node's volume, or keeps others off one.
    pub fn is_unlocked(&self, node: usize) -> bool {
        let engine = self.nodes[node].engine.as_ref();
        engine.is_none_or(|engine| {
            let all = 0..engine.shared.geometry.granules();
            let free = engine.shared.range_lock.try_lock(all.clone());
            if free {
                engine.shared.range_lock.unlock(all);
            }
            free
        })
    }

    /// What the disk of a node holds is what the application may read.
    pub fn check_content(&self, node: usize) {
        let block = u64::from(self.config.block_size);
        for lba in self.ledger.blocks() {
            let at = (1 << 20) + lba * block;
            let bytes = self.nodes[node].disk.read(at..at + block);
            if let Err(text) = self.ledger.check(lba, &bytes) {
                panic!("[durability] node {node}: {text}\n{}", self.describe());
            }
        }
    }

    /// What a failed test shows.
    pub fn describe(&self) -> String {
        let mut text = format!("at {} ns", self.now_ns);
        for node in 0..self.nodes.len() {
            if self.nodes[node].engine.is_none() {
                text += &format!("\nnode {node}: down");
                continue;
            }
            let state = self.state(node);
            text += &format!(
                "\nnode {node}: {} {} suspended={} current={:x}",
                state.role, state.disk, state.suspended, state.generations.current
            );
            for peer in &state.peers {
                text += &format!(
                    "\n  peer {}: {} {} {} bitmap={:x} oos={} error={:?} link={:?}/{}",
                    peer.node_id,
                    peer.conn,
                    peer.role,
                    peer.disk,
                    peer.bitmap_generation,
                    peer.out_of_sync_bytes,
                    peer.last_error,
                    self.nodes[node].links[peer.slot].state,
                    self.nodes[node].links[peer.slot].outstanding.len(),
                );
            }
            text += &format!(
                "\n  unanswered {:?}, disk work {}",
                self.nodes[node].unanswered,
                self.nodes[node].disk_work.len()
            );
        }
        let stuck = self
            .apps
            .values()
            .filter(|app| app.status.is_none())
            .count();
        text + &format!("\n{stuck} application I/Os under way")
    }
}

/// Where a node's endpoint listens.
pub fn address(node: usize) -> PeerAddress {
    PeerAddress {
        traddr: format!("node-{node}"),
        trsvcid: 4420,
        header_digest: false,
        data_digest: false,
    }
}
