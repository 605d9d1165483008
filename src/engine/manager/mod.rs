//! The manager of a volume: one core owns the truth about it. It keeps metadata and the merged bitmaps, holds the
//! sessions with the peers, decides about resync, and carries out orders. Channels follow by adopting its views.
//!
//! Every flow is a chain of [`Then`]s: what to do when all channels have adopted, handed over or drained something,
//! when metadata is durable, or when a peer has answered. A chain that belongs to a session dies with its epoch.
//!
//! `steps` counts channels in; `metadata` writes; `session` connects, by a `handshake`; `exchange` and `source` resync from here, `pull`
//! to here; `generation` starts generations; `received` is what the nodes of a session tell
//! each other, each once, which `known` sees to; `compare` and `newest` are for three nodes and more; `orders` are the operator's, of which `promote` has to be
//! agreed and `demote` taken in; `report` is what they see; `due` is when it wants to be polled.

mod close;
mod compare;
mod demote;
mod disk;
mod due;
mod exchange;
mod generation;
mod handshake;
mod known;
mod metadata;
mod newest;
mod orders;
mod outbox;
mod peer;
mod promote;
mod pull;
mod received;
mod report;
mod session;
mod source;
mod steps;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::engine::MAX_PEERS;
use crate::engine::bitmap::master::Master;
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::message::{OrderId, ToChannel, ToManager};
use crate::engine::meta::superblock::Superblock;
use crate::engine::mutation::{self, Mutation};
use crate::engine::open::Opened;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::state::{DiskState, Role};
use crate::engine::view::View;
use crate::engine::volume::Shared;
use crate::host::{ChannelId, Completion, Data, Host, PeerSlot, Token};

pub use orders::Order;
pub use report::{PeerReport, ResyncReport, VolumeState};

use compare::Compare;
use metadata::MetadataWriter;
use outbox::Call;
pub use peer::Decided;
use peer::Peer;
use pull::{PullIo, Puller};
use steps::{Steps, Then};

/// What the operator may change while the volume runs. Times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub ping_interval_ms: u64,
    pub ping_timeout_ms: u64,
    pub connect_interval_ms: u64,
    /// Bytes a second that a resync may fetch; 0: as fast as it goes.
    pub resync_rate_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ping_interval_ms: 1000,
            ping_timeout_ms: 5000,
            connect_interval_ms: 500,
            resync_rate_bytes: 0,
        }
    }
}

/// What a completion of the manager's own I/O belongs to.
enum ManagerIo {
    /// A superblock, or a flush or a page of a bitmap commit.
    Metadata,
    /// A command to a peer, of this epoch of its slot.
    Call(PeerSlot, u64, Call),
    Pull(PullIo),
}

/// A received command that waits for its answer.
struct Reply<H: Host> {
    channel: ChannelId,
    io: H::PeerIo,
    /// The peer whose session it belongs to; when that ends so does the wait.
    slot: Option<PeerSlot>,
    /// The number by which it is known in that session, if it is the first with it.
    sequence: Option<u64>,
}

/// One volume's manager.
pub struct Manager<H: Host> {
    shared: Arc<Shared>,
    channels: Vec<ChannelId>,
    /// What the disk says, or will say with the next commit.
    superblock: Superblock,
    /// The generations that are durable.
    durable: crate::engine::meta::generation::Generations,
    /// The state as the next view will say it.
    view: View,
    masters: [Master; MAX_PEERS],
    peers: [Peer; MAX_PEERS],
    steps: Steps<H>,
    metadata: MetadataWriter<H>,
    generation: generation::Bump,
    compare: Compare,
    puller: Puller<H>,
    orders: Vec<orders::Running>,
    options: Options,
    ios: Vec<(u32, Option<ManagerIo>)>,
    free_ios: Vec<usize>,
    /// Continuations that are ready to run; run one after the other, never nested.
    ready: VecDeque<Then>,
    /// What waits for the manager's own I/O on the disk to come back.
    quiet: Vec<Then>,
    /// Received commands whose answers wait, by a number that is used once.
    replies: BTreeMap<usize, Reply<H>>,
    next_reply: usize,
    /// This node's data was the newest when it last was Primary and crashed.
    unclean: bool,
    /// The activity logs' last sequences, for channels that start.
    log_sequences: Vec<u64>,
    revision: u64,
    /// The parts of the next nonce: random, one for as long as this runs, and a count.
    hello_start: u32,
    hello_count: u32,
    /// A Primary with a disk that was attached again holds I/O until a peer is there, or until then.
    reattach_until_ns: Option<u64>,
    /// The disk that a Primary attaches, while what has begun without it ends.
    opened: Option<Box<Opened>>,
    /// The generation that this node went on with while it had no disk, if the disk that was attached since has another.
    exposed: Option<u64>,
    /// Peers may have been told of a generation that the disk that was attached since does not have.
    was_told: bool,
    /// The disk that was let go lacks what may have been written since.
    disk_is_behind: bool,
    /// The transaction of the last promotion.
    promotion: u64,
    closing: bool,
}

impl<H: Host> Manager<H> {
    /// A manager of a volume that has been opened; its disk starts with [`Manager::attach`].
    pub fn new(shared: Arc<Shared>, superblock: Superblock, channels: Vec<ChannelId>) -> Self {
        let bits = shared.geometry.bits();
        let peers =
            std::array::from_fn(|slot| Peer::new(superblock.peers[slot].map(|peer| peer.node_id)));
        let mut view = View::new();
        for (slot, peer) in superblock.peers.iter().enumerate() {
            view.peers[slot].configured = peer.is_some();
        }
        Self {
            channels,
            durable: superblock.generations.clone(),
            view,
            masters: std::array::from_fn(|_| Master::new(bits)),
            peers,
            steps: Steps::new(),
            metadata: MetadataWriter::new(),
            generation: generation::Bump::default(),
            compare: Compare::new(bits),
            puller: Puller::new(),
            orders: Vec::new(),
            options: Options::default(),
            ios: Vec::new(),
            free_ios: Vec::new(),
            ready: VecDeque::new(),
            quiet: Vec::new(),
            replies: BTreeMap::new(),
            next_reply: 0,
            unclean: false,
            log_sequences: Vec::new(),
            revision: 0,
            hello_start: 0,
            hello_count: 0,
            reattach_until_ns: None,
            opened: None,
            exposed: None,
            was_told: false,
            disk_is_behind: false,
            promotion: 0,
            closing: false,
            superblock,
            shared,
        }
    }

    /// A channel, or the manager on behalf of a peer, says something.
    pub fn message(&mut self, cx: &mut H, message: ToManager<H>) {
        match message {
            ToManager::Adopted(channel, version) => {
                self.steps.adopted(channel, version, &mut self.ready)
            }
            ToManager::Harvested(channel, id, pages) => {
                self.merge(pages);
                self.steps.answered(channel, id, &mut self.ready);
            }
            ToManager::Drained(channel, id) => self.steps.answered(channel, id, &mut self.ready),
            ToManager::Retire(channel, extents, pages) => {
                self.merge(pages);
                if mutation::is(Mutation::RetireWithoutPages) {
                    self.ready.push_back(Then::Retire(channel, extents));
                } else {
                    self.commit_pages(cx, Then::Retire(channel, extents));
                }
            }
            ToManager::NeedGeneration(slots) => self.need_generation(cx, slots),
            ToManager::PeerLost(slot, session) => {
                if self.peers[slot].session == session {
                    self.lose_session(cx, slot, "a command was not answered");
                }
            }
            ToManager::DiskFailed => self.disk_failed(cx),
            ToManager::Command {
                channel,
                command,
                body,
                io,
            } => {
                let reply = self.hold_reply(channel, io);
                self.command(cx, command, &body, reply);
            }
        }
        self.run(cx);
    }

    /// An I/O of the manager has ended; its token has [`TOKEN_MANAGER`] set.
    pub fn complete(&mut self, cx: &mut H, completion: Completion<H>) {
        let Completion {
            token,
            status,
            answer,
            data,
        } = completion;
        let Some(io) = self.take_io(token) else {
            debug_assert!(false, "a completion of no I/O");
            return;
        };
        match io {
            ManagerIo::Metadata => self.metadata_done(cx, status),
            ManagerIo::Call(slot, epoch, call) => {
                if self.peers[slot].epoch == epoch {
                    self.peers[slot].outbox.in_flight -= 1;
                    self.called(cx, slot, call, status, answer);
                }
            }
            ManagerIo::Pull(io) => {
                let buffer = match data {
                    Data::Buffer(buffer) => Some(buffer),
                    _ => None,
                };
                self.pull_done(cx, io, status, answer, buffer);
            }
        }
        self.run(cx);
    }

    /// To be called from time to time (milliseconds): timers, and what could not be sent before.
    pub fn poll(&mut self, cx: &mut H) {
        self.poll_metadata(cx);
        for slot in 0..MAX_PEERS {
            if self.peers[slot].node_id.is_some() {
                self.poll_session(cx, slot);
                self.pump_outbox(cx, slot);
            }
        }
        self.poll_pull(cx);
        self.poll_compare(cx);
        self.poll_generation(cx);
        self.poll_newest(cx);
        self.poll_orders(cx);
        if self
            .reattach_until_ns
            .is_some_and(|until| cx.now_ns() >= until)
        {
            self.end_reattach(cx);
        }
        self.run(cx);
    }

    /// Does `then` when nothing of the manager's own is in flight on the disk.
    fn when_quiet(&mut self, then: Then) {
        self.quiet.push(then);
    }

    /// How long after the last call the next one of [`poll`](Self::poll) is wanted, in nanoseconds, if nothing happens
    /// meanwhile.
    pub fn poll_interval_ns(&self) -> u64 {
        let connecting = self
            .peers
            .iter()
            .any(|peer| peer.wanted && !peer.established);
        if self.puller.is_pressing() {
            200_000
        } else if self.puller.is_running() || connecting || !self.orders.is_empty() {
            2_000_000
        } else {
            20_000_000
        }
    }

    /// Runs what has become ready, until nothing is.
    fn run(&mut self, cx: &mut H) {
        if !self.quiet.is_empty() && !self.puller.uses_disk() && self.metadata.in_flight() == 0 {
            self.ready.extend(self.quiet.drain(..));
        }
        while let Some(then) = self.ready.pop_front() {
            self.then(cx, then);
        }
        self.pump_metadata(cx);
        for slot in 0..MAX_PEERS {
            if !self.peers[slot].outbox.is_empty() {
                self.pump_outbox(cx, slot);
            }
        }
    }

    fn then(&mut self, cx: &mut H, then: Then) {
        match then {
            Then::Nothing => {}
            Then::Retire(channel, extents) => {
                if self.view.disk_is_usable() && !mutation::is(Mutation::LogStaysFull) {
                    cx.to_channel(channel, ToChannel::Retired(extents));
                }
            }
            Then::Answer(reply, answer) => self.answer(cx, reply, answer),
            Then::Publish(reply) => {
                // A disk that has failed meanwhile does not have it.
                let answer = if self.metadata.enabled {
                    PeerAnswer::Ok
                } else {
                    PeerAnswer::DiskError
                };
                self.adopt(cx, Then::Answer(reply, answer));
            }
            Then::Order(id, outcome) => self.order_ended(cx, id, outcome),
            Then::Session(slot, epoch, step) => {
                if self.peers[slot].epoch == epoch {
                    self.session_step(cx, slot, step);
                }
            }
            Then::Fence(slot, step) => self.fence_step(cx, slot, step),
            Then::Generation(round) => self.generation_durable(cx, round),
            Then::Disk(step) => self.disk_step(cx, step),
            Then::Compare(id, step) => self.compare_step(cx, id, step),
            Then::OrderStep(id, step) => self.order_step(cx, id, step),
        }
    }

    /// Publishes the state: every channel adopts it, then `then`.
    fn adopt(&mut self, cx: &mut H, then: Then) {
        // From here on the application may see what only the peers have.
        self.disk_is_behind |= self.view.role == Role::Primary
            && self.view.disk <= DiskState::Failed
            && self.view.disk != DiskState::Attaching
            && self.view.own_disk_may_miss
            && self.view.peers.iter().any(|peer| peer.has_latest());
        self.view.version += 1;
        for slot in 0..MAX_PEERS {
            self.view.peers[slot].may_miss = self.may_miss(slot);
        }
        let view = Arc::new(self.view.clone());
        self.steps
            .adopt(view.version, &self.channels, then, &mut self.ready);
        for &channel in &self.channels {
            cx.to_channel(channel, ToChannel::Adopt(Arc::clone(&view)));
        }
    }

    /// ORs what the channels hold into the masters, then `then`.
    fn harvest(&mut self, cx: &mut H, then: Then) {
        let id = self.steps.ask(&self.channels, then, &mut self.ready);
        for &channel in &self.channels {
            cx.to_channel(channel, ToChannel::Harvest(id));
        }
    }

    fn drain(&mut self, cx: &mut H, what: crate::engine::message::Drain, then: Then) {
        let id = self.steps.ask(&self.channels, then, &mut self.ready);
        for &channel in &self.channels {
            cx.to_channel(channel, ToChannel::Drain(id, what));
        }
    }

    fn merge(&mut self, pages: Vec<(PeerSlot, crate::engine::message::HarvestedPages)>) {
        for (slot, pages) in pages {
            for (index, page) in pages {
                self.compare.note(slot, index, &page);
                self.masters[slot].adopt_page(index, page);
            }
        }
    }

    fn command(&mut self, cx: &mut H, command: PeerCommand, body: &[u8], reply: usize) {
        match command {
            PeerCommand::HelloPut { .. } => self.received_hello(cx, body, reply),
            PeerCommand::Confirm { session } => self.received_confirm(cx, session, reply),
            _ => self.received_in_session(cx, command, body, reply),
        }
    }

    fn hold_reply(&mut self, channel: ChannelId, io: H::PeerIo) -> usize {
        self.next_reply += 1;
        let reply = Reply {
            channel,
            io,
            slot: None,
            sequence: None,
        };
        self.replies.insert(self.next_reply, reply);
        self.next_reply
    }

    /// Answers a received command, and whoever has joined it.
    fn answer(&mut self, cx: &mut H, reply: usize, answer: PeerAnswer) {
        let Some(reply) = self.replies.remove(&reply) else {
            return;
        };
        cx.to_channel(reply.channel, ToChannel::Answer(reply.io, answer));
        if let (Some(slot), Some(sequence)) = (reply.slot, reply.sequence) {
            for joined in self.peers[slot].known.answered(sequence, answer) {
                self.answer(cx, joined, answer);
            }
        }
    }

    /// What was to answer the commands of this peer's session has become void with it.
    fn answer_fenced(&mut self, cx: &mut H, slot: PeerSlot) {
        let of_slot =
            |(&reply, held): (&usize, &Reply<H>)| (held.slot == Some(slot)).then_some(reply);
        let replies: Vec<usize> = self.replies.iter().filter_map(of_slot).collect();
        for reply in replies {
            self.answer(cx, reply, PeerAnswer::Fenced);
        }
    }

    fn token(&mut self, io: ManagerIo) -> Token {
        let index = self.free_ios.pop().unwrap_or_else(|| {
            self.ios.push((0, None));
            self.ios.len() - 1
        });
        self.ios[index].1 = Some(io);
        Token(u64::from(self.ios[index].0) << 32 | TOKEN_MANAGER | index as u64)
    }

    fn take_io(&mut self, token: Token) -> Option<ManagerIo> {
        let index = (token.0 & (TOKEN_MANAGER - 1)) as usize;
        let slot = self.ios.get_mut(index)?;
        if slot.0 != (token.0 >> 32) as u32 {
            return None;
        }
        let io = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1);
        self.free_ios.push(index);
        Some(io)
    }

    /// This node is Primary.
    pub fn is_primary(&self) -> bool {
        self.view.role == Role::Primary
    }

    /// The disk state as the manager knows it.
    pub fn disk(&self) -> DiskState {
        self.view.disk
    }

    /// How the options stand.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Changes the options; they hold from the next use on.
    pub fn set_options(&mut self, options: Options) {
        self.options = options;
    }

    /// Ends a received order's bookkeeping for the host.
    fn order_ended(
        &mut self,
        cx: &mut H,
        id: OrderId,
        outcome: crate::engine::message::OrderOutcome,
    ) {
        self.orders.retain(|order| order.id != id);
        cx.ordered(id, outcome);
    }
}
