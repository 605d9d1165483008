//! The engine's host on one core: takes what the engine asks for as actions, which `mod.rs` carries out when the
//! engine has returned. Knows no core, so the engine is never entered from within itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use crate::engine::MAX_PEERS;
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::message::{OrderId, OrderOutcome, ToChannel, ToManager};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::host::{
    AppStatus, ChannelId, Data, DiskIo, Host, PeerAddress, PeerRefusal, PeerSlot, Token,
};
use crate::hosts::embedded::bdev::Ticket;
use crate::hosts::embedded::initiator::QueueKey;
use crate::hosts::embedded::nvme_tcp::buffer::{AlignedBuf, DataPointer};
use crate::hosts::slab::Key;

/// Entries of a queue pair to a peer; one less can be outstanding.
pub(super) const QUEUE_ENTRIES: u16 = 128;
/// Commands that channels may have outstanding; the rest is the manager's, whose pings must not wait for data.
const CHANNEL_COMMANDS: u16 = QUEUE_ENTRIES - 16;

const SMALL_BYTES: usize = 4096;
const LARGE_BYTES: usize = 128 << 10;
/// Buffers that a volume may hold on one core, of each size.
const SMALL_BUFFERS: usize = 512;
const LARGE_BUFFERS: usize = 64;

/// An application I/O, or a part of a long one.
#[derive(Debug)]
pub enum AppHandle {
    Whole(Ticket),
    Part(Key),
}

/// A received peer command, and its opcode.
#[derive(Debug)]
pub struct PeerTicket {
    pub(super) ticket: Ticket,
    pub(super) opcode: u8,
}

/// What the engine has asked for.
pub(super) enum Action {
    Disk(Token, DiskIo, Data<Context>),
    Peer(PeerSlot, Token, PeerCommand, Data<Context>, Range<usize>),
    Finish(AppHandle, AppStatus),
    Answer(PeerTicket, PeerAnswer),
    ToManager(ToManager<Context>),
    ToChannel(ChannelId, ToChannel<Context>),
    LinkOpen(PeerSlot, PeerAddress),
    LinkClose(PeerSlot),
    DiskClose,
    Ordered(OrderId, OrderOutcome),
}

/// This core's queue pair to a peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    pub(super) key: QueueKey,
    /// Counts the times that the link was opened.
    pub(super) generation: u32,
    pub(super) is_up: bool,
    pub(super) outstanding: u16,
}

/// Free memory for the engine's own I/O.
#[derive(Default)]
struct Pool {
    small: Vec<AlignedBuf>,
    large: Vec<AlignedBuf>,
    small_out: usize,
    large_out: usize,
}

/// Memory of the engine; goes back to its pool when dropped.
pub struct Buffer {
    memory: Option<AlignedBuf>,
    pool: Rc<RefCell<Pool>>,
}

impl Buffer {
    pub(super) fn data(&self, length_bytes: usize) -> DataPointer {
        match &self.memory {
            // SAFETY: whoever uses this keeps the buffer among the I/O in flight until it completes.
            Some(memory) => unsafe { DataPointer::new(memory.as_ptr(), length_bytes as u32) },
            None => DataPointer::NONE,
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], AlignedBuf::as_slice)
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.memory
            .as_mut()
            .map_or(&mut [], AlignedBuf::as_mut_slice)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else {
            return;
        };
        let mut pool = self.pool.borrow_mut();
        if memory.length_bytes() == SMALL_BYTES {
            pool.small_out -= 1;
            pool.small.push(memory);
        } else {
            pool.large_out -= 1;
            pool.large.push(memory);
        }
    }
}

/// One core's context of one volume.
pub struct Context {
    pub(super) now_ns: u64,
    pub(super) actions: VecDeque<Action>,
    pub(super) queues: [Option<Queue>; MAX_PEERS],
    /// What this node's target takes from a peer; on core 0.
    pub(super) in_capsule_bytes: u32,
    random: u64,
    pool: Rc<RefCell<Pool>>,
}

impl Context {
    pub(super) fn new() -> Self {
        let mut seed = [0; 8];
        // Without entropy there is still the clock of the core; sessions only have to differ.
        if getrandom::fill(&mut seed).is_err() {
            seed = (std::process::id() as u64).to_le_bytes();
        }
        Self {
            now_ns: 0,
            actions: VecDeque::with_capacity(4096),
            queues: [None; MAX_PEERS],
            in_capsule_bytes: 0,
            random: u64::from_le_bytes(seed),
            pool: Rc::default(),
        }
    }

    /// The queue pair of a link that is up.
    pub(super) fn queue_in_use(&mut self, slot: PeerSlot) -> Option<&mut Queue> {
        self.queues[slot].as_mut().filter(|queue| queue.is_up)
    }
}

impl Host for Context {
    type Payload = DataPointer;
    type Buffer = Buffer;
    type Io = AppHandle;
    type PeerIo = PeerTicket;

    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn random(&mut self) -> u64 {
        let mut bytes = [0; 8];
        if getrandom::fill(&mut bytes).is_ok() {
            return u64::from_le_bytes(bytes);
        }
        // SplitMix64 over the clock.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ self.now_ns;
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 27)
    }

    fn buffer(&mut self, len: usize) -> Option<Buffer> {
        let mut pool = self.pool.borrow_mut();
        let memory = if len <= SMALL_BYTES {
            if pool.small_out >= SMALL_BUFFERS {
                return None;
            }
            pool.small_out += 1;
            pool.small
                .pop()
                .or_else(|| AlignedBuf::new(SMALL_BYTES).ok())
        } else if len <= LARGE_BYTES {
            if pool.large_out >= LARGE_BUFFERS {
                return None;
            }
            pool.large_out += 1;
            pool.large
                .pop()
                .or_else(|| AlignedBuf::new(LARGE_BYTES).ok())
        } else {
            return None;
        };
        if memory.is_none() {
            if len <= SMALL_BYTES {
                pool.small_out -= 1;
            } else {
                pool.large_out -= 1;
            }
            return None;
        }
        Some(Buffer {
            memory,
            pool: Rc::clone(&self.pool),
        })
    }

    fn read_payload(&self, payload: &DataPointer) -> Vec<u8> {
        // SAFETY: the command is not answered yet, and its data does not change until then.
        unsafe { payload.as_slice() }.to_vec()
    }

    fn disk(&mut self, token: Token, io: DiskIo, data: Data<Self>) -> Result<(), Data<Self>> {
        self.actions.push_back(Action::Disk(token, io, data));
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
        let limit = if token.0 & TOKEN_MANAGER == 0 {
            CHANNEL_COMMANDS
        } else {
            QUEUE_ENTRIES - 1
        };
        let Some(queue) = self.queue_in_use(slot) else {
            return Err(PeerRefusal::Down(data));
        };
        if queue.outstanding >= limit {
            return Err(PeerRefusal::Later(data));
        }
        queue.outstanding += 1;
        self.actions
            .push_back(Action::Peer(slot, token, *command, data, part));
        Ok(())
    }

    fn finish(&mut self, io: AppHandle, status: AppStatus) {
        self.actions.push_back(Action::Finish(io, status));
    }

    fn answer(&mut self, io: PeerTicket, answer: PeerAnswer) {
        self.actions.push_back(Action::Answer(io, answer));
    }

    fn to_manager(&mut self, message: ToManager<Self>) {
        self.actions.push_back(Action::ToManager(message));
    }

    fn to_channel(&mut self, channel: ChannelId, message: ToChannel<Self>) {
        self.actions.push_back(Action::ToChannel(channel, message));
    }

    fn link_open(&mut self, slot: PeerSlot, address: &PeerAddress) {
        self.actions
            .push_back(Action::LinkOpen(slot, address.clone()));
    }

    fn link_close(&mut self, slot: PeerSlot) {
        self.actions.push_back(Action::LinkClose(slot));
    }

    fn disk_close(&mut self) {
        self.actions.push_back(Action::DiskClose);
    }

    fn ordered(&mut self, id: OrderId, outcome: OrderOutcome) {
        self.actions.push_back(Action::Ordered(id, outcome));
    }
}
