//! The engine's host on one core of SPDK: takes what the engine asks for as actions, which `volume.rs` carries out when
//! the engine has returned. Knows no core, so the engine is never entered from within itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr;
use std::rc::Rc;

use super::{endpoint, sys};
use crate::engine::MAX_PEERS;
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::message::{OrderId, OrderOutcome, ToChannel, ToManager};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::host::{
    AppStatus, ChannelId, Data, DiskIo, Host, PeerAddress, PeerRefusal, PeerSlot, Token,
};

/// Commands that may be outstanding on a queue pair to a peer: bdev_nvme's queue is longer, the peer's may not be.
pub const QUEUE_ENTRIES: u16 = 127;
/// Of these, what channels may use; the rest is the manager's, whose pings must not wait for data.
const CHANNEL_COMMANDS: u16 = QUEUE_ENTRIES - 15;

const SMALL_BYTES: usize = 4096;
const LARGE_BYTES: usize = 128 << 10;
/// Buffers that a volume may hold on one core, of each size.
const SMALL_BUFFERS: usize = 512;
const LARGE_BUFFERS: usize = 64;

/// An I/O of a bdev of ours. Valid until it is completed.
#[derive(Clone, Copy, Debug)]
pub struct BdevIo(pub *mut sys::spdk_bdev_io);

// SAFETY: a handle only: it is used on the core where the I/O arrived, and travels to the manager and back.
unsafe impl Send for BdevIo {}

/// Data of an I/O, by reference to its list of pieces.
#[derive(Clone, Copy, Debug)]
pub struct Payload {
    pub iovs: *mut sys::iovec,
    pub iov_count: c_int,
    pub len: usize,
}

/// What the engine has asked for.
pub enum Action {
    Disk(Token, DiskIo, Data<Context>),
    Peer(PeerSlot, Token, PeerCommand, Data<Context>, Range<usize>),
    Finish(BdevIo, AppStatus),
    Answer(BdevIo, PeerAnswer),
    ToManager(ToManager<Context>),
    ToChannel(ChannelId, ToChannel<Context>),
    LinkOpen(PeerSlot, PeerAddress),
    LinkClose(PeerSlot),
    DiskRelease,
    DiskClose,
    Ordered(OrderId, OrderOutcome),
}

/// This core's queue pair to a peer: a channel of the peer's bdev.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub desc: *mut sys::spdk_bdev_desc,
    pub channel: *mut sys::spdk_io_channel,
    pub outstanding: u16,
    /// Nothing more is submitted; the channel goes when what is outstanding has ended.
    pub closing: bool,
    /// What was sent on a path that is lost is sent again.
    pub is_patient: bool,
}

/// Memory that devices can reach.
struct Memory {
    base: *mut c_void,
    capacity: usize,
    /// The part in use, as a list of one piece.
    iov: sys::iovec,
}

impl Memory {
    fn new(capacity: usize) -> Option<Box<Memory>> {
        // SAFETY: plain allocation; freed in `drop`.
        let base = unsafe { sys::spdk_dma_zmalloc(capacity, 4096, ptr::null_mut()) };
        (!base.is_null()).then(|| {
            Box::new(Memory {
                base,
                capacity,
                iov: sys::iovec::default(),
            })
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: from `spdk_dma_zmalloc`, and nothing refers to it any more.
        unsafe { sys::spdk_dma_free(self.base) };
    }
}

/// Free memory for the engine's own I/O. Boxed: a device is given the address of its list.
#[derive(Default)]
#[allow(clippy::vec_box)]
struct Pool {
    small: Vec<Box<Memory>>,
    large: Vec<Box<Memory>>,
    small_out: usize,
    large_out: usize,
}

impl Pool {
    fn take(&mut self, len: usize) -> Option<Box<Memory>> {
        let (free, out, most, capacity) = if len <= SMALL_BYTES {
            (
                &mut self.small,
                &mut self.small_out,
                SMALL_BUFFERS,
                SMALL_BYTES,
            )
        } else if len <= LARGE_BYTES {
            (
                &mut self.large,
                &mut self.large_out,
                LARGE_BUFFERS,
                LARGE_BYTES,
            )
        } else {
            return None;
        };
        if *out >= most {
            return None;
        }
        let memory = free.pop().or_else(|| Memory::new(capacity))?;
        *out += 1;
        Some(memory)
    }

    fn give(&mut self, memory: Box<Memory>) {
        if memory.capacity == SMALL_BYTES {
            self.small_out -= 1;
            self.small.push(memory);
        } else {
            self.large_out -= 1;
            self.large.push(memory);
        }
    }
}

/// Memory of the engine; goes back to its pool when dropped.
pub struct Buffer {
    memory: Option<Box<Memory>>,
    pool: Rc<RefCell<Pool>>,
}

impl Buffer {
    /// The first `len` bytes, as a list of one piece that stays where it is as long as the buffer lives.
    pub fn payload(&mut self, len: usize) -> Payload {
        let Some(memory) = &mut self.memory else {
            return Payload::NONE;
        };
        memory.iov = sys::iovec {
            iov_base: memory.base,
            iov_len: len.min(memory.capacity),
        };
        Payload {
            iovs: &raw mut memory.iov,
            iov_count: 1,
            len,
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| {
            // SAFETY: zeroed when it was allocated, and ours alone.
            unsafe { std::slice::from_raw_parts(memory.base.cast(), memory.capacity) }
        })
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], |memory| {
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts_mut(memory.base.cast(), memory.capacity) }
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.borrow_mut().give(memory);
        }
    }
}

impl Payload {
    pub const NONE: Payload = Payload {
        iovs: ptr::null_mut(),
        iov_count: 0,
        len: 0,
    };

    fn pieces(&self) -> &[sys::iovec] {
        if self.iovs.is_null() {
            return &[];
        }
        // SAFETY: the list of an I/O that is not completed yet.
        unsafe { std::slice::from_raw_parts(self.iovs, self.iov_count as usize) }
    }
}

/// One core's context of one volume.
pub struct Context {
    pub now_ns: u64,
    pub actions: VecDeque<Action>,
    pub queues: [Option<Queue>; MAX_PEERS],
    random: u64,
    pool: Rc<RefCell<Pool>>,
}

impl Context {
    pub fn new() -> Self {
        Self {
            now_ns: now_ns(),
            actions: VecDeque::with_capacity(4096),
            queues: [None; MAX_PEERS],
            random: u64::from(std::process::id()),
            pool: Rc::default(),
        }
    }

    /// The queue pair of a link that is up.
    pub fn queue_in_use(&mut self, slot: PeerSlot) -> Option<&mut Queue> {
        self.queues[slot].as_mut().filter(|queue| !queue.closing)
    }
}

/// SPDK's clock.
pub fn now_ns() -> u64 {
    // SAFETY: reads the clock.
    let (ticks, a_second) = unsafe { (sys::spdk_get_ticks(), sys::spdk_get_ticks_hz()) };
    (u128::from(ticks) * 1_000_000_000 / u128::from(a_second.max(1))) as u64
}

impl Host for Context {
    type Payload = Payload;
    type Buffer = Buffer;
    type Io = BdevIo;
    type PeerIo = BdevIo;

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
        let memory = self.pool.borrow_mut().take(len)?;
        Some(Buffer {
            memory: Some(memory),
            pool: Rc::clone(&self.pool),
        })
    }

    fn read_payload(&self, payload: &Payload) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(payload.len);
        for piece in payload.pieces() {
            let len = piece.iov_len.min(payload.len - bytes.len());
            // SAFETY: the command is not answered yet, and its data does not change until then.
            let piece = unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), len) };
            bytes.extend_from_slice(piece);
        }
        bytes
    }

    fn disk(&mut self, token: Token, io: DiskIo, data: Data<Self>) -> Result<(), Data<Self>> {
        self.actions.push_back(Action::Disk(token, io, data));
        Ok(())
    }

    fn disk_release(&mut self) {
        self.actions.push_back(Action::DiskRelease);
    }

    fn in_capsule_bytes(&self) -> u32 {
        endpoint::in_capsule_bytes()
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
            QUEUE_ENTRIES
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

    fn finish(&mut self, io: BdevIo, status: AppStatus) {
        self.actions.push_back(Action::Finish(io, status));
    }

    fn answer(&mut self, io: BdevIo, answer: PeerAnswer) {
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
