//! A node: its disk, its links, and the engine's objects while it runs. [`Core`] is the context that the engine gets;
//! what it asks for is queued there and done by the world after the engine has returned.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::disk::Disk;
use super::link::{Link, LinkState, PeerIo};
use super::memory::{Buffer, Bytes, Count, Payload};
use super::numbered::Numbered;
use super::random::Random;
use super::world::disk_faults::DiskFaults;
use super::world::slowness::Slowness;
use crate::engine::MAX_PEERS;
use crate::engine::channel::Channel;
use crate::engine::manager::Manager;
use crate::engine::message::{OrderId, OrderOutcome, ToChannel, ToManager};
use crate::engine::open::Opener;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::{CommandWords, PeerCommand};
use crate::engine::volume::Shared;
use crate::host::{
    AppStatus, ChannelId, Data, DiskIo, Host, PeerAddress, PeerRefusal, PeerSlot, Token,
};

/// The place of the manager; channels have their own numbers.
pub const MANAGER: usize = usize::MAX;

/// What the engine has asked for.
pub enum Action {
    Disk(Token, DiskIo, Data<Core>),
    Peer {
        slot: PeerSlot,
        token: Token,
        session: u32,
        opcode: u8,
        words: CommandWords,
        data: Data<Core>,
        part: Range<usize>,
    },
    Finish(u64, AppStatus),
    Answer(PeerIo, PeerAnswer),
    ToManager(ToManager<Core>),
    ToChannel(ChannelId, ToChannel<Core>),
    LinkOpen(PeerSlot, PeerAddress),
    LinkClose(PeerSlot),
    DiskClose,
    Ordered(OrderId, OrderOutcome),
}

/// One core's context of one volume.
pub struct Core {
    pub now_ns: u64,
    pub random: Random,
    /// Chance in percent that a resource is not to be had.
    pub scarcity_percent: u64,
    pub links_up: [bool; MAX_PEERS],
    pub in_capsule_bytes: u32,
    /// Buffers that it was given and has not let go.
    pub buffers: Count,
    /// The engine has asked for something that may be refused.
    pub has_asked: bool,
    pub actions: Vec<Action>,
}

impl Core {
    fn is_scarce(&mut self) -> bool {
        self.has_asked = true;
        self.scarcity_percent > 0 && self.random.chance(self.scarcity_percent)
    }
}

impl Host for Core {
    type Payload = Payload;
    type Buffer = Buffer;
    type Io = u64;
    type PeerIo = PeerIo;

    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn random(&mut self) -> u64 {
        self.random.number()
    }

    fn buffer(&mut self, len: usize) -> Option<Buffer> {
        assert!(len > 0 && len % 4096 == 0, "a buffer of {len} bytes");
        (!self.is_scarce()).then(|| Buffer::new(Bytes::fresh(len), &self.buffers))
    }

    fn read_payload(&self, payload: &Payload) -> Vec<u8> {
        payload.bytes().to_vec()
    }

    fn disk(&mut self, token: Token, io: DiskIo, data: Data<Self>) -> Result<(), Data<Self>> {
        if self.is_scarce() {
            return Err(data);
        }
        self.actions.push(Action::Disk(token, io, data));
        Ok(())
    }

    fn disk_release(&mut self) {}

    fn in_capsule_bytes(&self) -> u32 {
        self.in_capsule_bytes
    }

    fn peer(
        &mut self,
        slot: PeerSlot,
        token: Token,
        command: &PeerCommand,
        data: Data<Self>,
        part: Range<usize>,
    ) -> Result<(), PeerRefusal<Self>> {
        if !self.links_up[slot] {
            return Err(PeerRefusal::Down(data));
        }
        if self.is_scarce() {
            return Err(PeerRefusal::Later(data));
        }
        self.actions.push(Action::Peer {
            slot,
            token,
            session: command.session(),
            opcode: command.opcode(),
            words: command.emit(),
            data,
            part,
        });
        Ok(())
    }

    fn finish(&mut self, io: u64, status: AppStatus) {
        self.actions.push(Action::Finish(io, status));
    }

    fn answer(&mut self, io: PeerIo, answer: PeerAnswer) {
        self.actions.push(Action::Answer(io, answer));
    }

    fn to_manager(&mut self, message: ToManager<Self>) {
        self.actions.push(Action::ToManager(message));
    }

    fn to_channel(&mut self, channel: ChannelId, message: ToChannel<Self>) {
        self.actions.push(Action::ToChannel(channel, message));
    }

    fn link_open(&mut self, slot: PeerSlot, address: &PeerAddress) {
        self.actions.push(Action::LinkOpen(slot, address.clone()));
    }

    fn link_close(&mut self, slot: PeerSlot) {
        // From here on nothing can be sent.
        self.links_up[slot] = false;
        self.actions.push(Action::LinkClose(slot));
    }

    fn disk_close(&mut self) {
        self.actions.push(Action::DiskClose);
    }

    fn ordered(&mut self, id: OrderId, outcome: OrderOutcome) {
        self.actions.push(Action::Ordered(id, outcome));
    }
}

/// A disk I/O that the device is executing.
pub struct DiskWork {
    pub core: usize,
    pub token: Token,
    pub io: DiskIo,
    pub data: Data<Core>,
    /// The disk's order when it was submitted.
    pub submitted: u64,
}

/// The engine of a volume.
pub struct Engine {
    pub shared: Arc<Shared>,
    pub manager: Manager<Core>,
    pub channels: Vec<Channel<Core>>,
}

/// One machine.
pub struct Node {
    pub disk: Disk,
    /// Counts starts: what belongs to an earlier one is void.
    pub incarnation: u64,
    /// The number of what came first after its last power loss.
    pub lost_power_at: u64,
    /// Its cache went with that, and it has not been started since.
    pub has_lost_cache: bool,
    pub running: bool,
    pub engine: Option<Engine>,
    pub opener: Option<Opener<Core>>,
    /// The engine has the disk.
    pub disk_open: bool,
    /// It has been told to let everything go: a device that is being opened then is not taken.
    pub is_closing: bool,
    /// Since then it has taken leave of a peer that it leaves up to date.
    pub has_taken_leave: bool,
    pub disk_work: Numbered<DiskWork>,
    pub disk_faults: DiskFaults,
    pub slowness: Slowness,
    /// By how much its clock is ahead of the world's.
    pub clock_ahead_ns: u64,
    pub links: Vec<Link>,
    /// Received commands that were not answered, with their opcode.
    pub unanswered: Numbered<u8>,
    /// Buffers that the engine has, or has given away to be used.
    pub buffers: Count,
    /// Memory of received commands that somebody refers to.
    pub received_memory: Count,
    pub outcomes: BTreeMap<OrderId, OrderOutcome>,
    /// When the last message between two places of this node arrives.
    pub message_ns: BTreeMap<(usize, usize), u64>,
    /// When the channels are polled next, and last when the manager is.
    pub planned_polls_ns: Vec<Option<u64>>,
    /// By the same places: polls that have done nothing since anything else happened there.
    pub vain_polls: Vec<u32>,
}

impl Node {
    pub fn new(disk: Disk, cores: usize) -> Node {
        Node {
            disk,
            incarnation: 0,
            lost_power_at: 0,
            has_lost_cache: false,
            running: false,
            engine: None,
            opener: None,
            disk_open: false,
            is_closing: false,
            has_taken_leave: false,
            disk_work: Numbered::default(),
            disk_faults: DiskFaults::default(),
            slowness: Slowness::default(),
            clock_ahead_ns: 0,
            links: (0..MAX_PEERS).map(|_| Link::new(cores)).collect(),
            unanswered: Numbered::default(),
            buffers: Count::default(),
            received_memory: Count::default(),
            outcomes: BTreeMap::new(),
            message_ns: BTreeMap::new(),
            planned_polls_ns: vec![None; cores + 1],
            vain_polls: vec![0; cores + 1],
        }
    }

    pub fn planned_poll_ns(&mut self, place: usize) -> &mut Option<u64> {
        let last = self.planned_polls_ns.len() - 1;
        &mut self.planned_polls_ns[place.min(last)]
    }

    pub fn vain_polls(&mut self, place: usize) -> &mut u32 {
        let last = self.vain_polls.len() - 1;
        &mut self.vain_polls[place.min(last)]
    }

    /// From when on this place wants to be polled.
    pub fn poll_due_ns(&self, place: usize) -> Option<u64> {
        if place == MANAGER && self.opener.as_ref().is_some_and(Opener::wants_poll) {
            return Some(0);
        }
        let engine = self.engine.as_ref()?;
        if place == MANAGER {
            engine.manager.next_poll_ns()
        } else {
            engine.channels[place].wants_poll().then_some(0)
        }
    }

    pub fn poll(&mut self, place: usize, cx: &mut Core) {
        if place == MANAGER
            && let Some(opener) = &mut self.opener
        {
            opener.poll(cx).expect("the device is large enough");
        }
        match &mut self.engine {
            Some(engine) if place == MANAGER => engine.manager.poll(cx),
            Some(engine) => engine.channels[place].poll(cx),
            None => {}
        }
    }

    pub fn links_up(&self) -> [bool; MAX_PEERS] {
        std::array::from_fn(|slot| self.links[slot].state == LinkState::Up)
    }
}
