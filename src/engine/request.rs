//! A request on its way through a channel, and the slab of fixed capacity in which all of them live. A token is
//! index plus generation plus leg, so a late completion of a request that is gone matches nothing.

use crate::engine::MAX_PEERS;
use crate::host::{Host, PeerSlot, Token};

/// The leg on the local disk; legs below are the peers' slots.
pub const LOCAL: usize = MAX_PEERS;
/// The mask of the local leg.
pub const LOCAL_MASK: u8 = 1 << LOCAL;

/// Who gets the answer.
pub enum Origin<H: Host> {
    Application(H::Io),
    Peer {
        io: H::PeerIo,
        slot: PeerSlot,
        session: u32,
        /// For a write or a resync read: its sequence.
        sequence: Option<u64>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Read,
    Write {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
    },
    Unmap,
    Flush,
    /// A sync target reads.
    ResyncRead,
}

impl RequestKind {
    /// It changes blocks.
    pub fn writes(self) -> bool {
        matches!(
            self,
            RequestKind::Write { .. } | RequestKind::WriteZeroes { .. } | RequestKind::Unmap
        )
    }
}

/// What the request waits for. In the order of its life; some kinds skip some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// For the volume to take I/O.
    Held,
    /// For its range.
    Lock,
    /// For its extents to be in the activity log on disk.
    Log,
    /// For the host to take its legs.
    Send,
    /// For its legs.
    Flight,
    /// For the manager to make its missing legs known.
    Settle,
}

/// One request.
pub struct Request<H: Host> {
    pub origin: Origin<H>,
    pub kind: RequestKind,
    pub lba: u64,
    pub blocks: u32,
    pub payload: Option<H::Payload>,
    pub stage: Stage,
    pub locked: bool,
    pub reserved: bool,
    /// It keeps newcomers off its range.
    pub pressing: bool,
    /// Its extents are referenced in the activity log, from this transaction on.
    pub logged: Option<u64>,
    pub sequence: u64,
    /// Times that the range was taken by somebody else.
    pub lock_failures: u32,
    pub started_ns: u64,
    /// Legs not yet given to the host.
    pub unsent: u8,
    /// Legs that the host has.
    pub pending: u8,
    /// Legs that ended well.
    pub done: u8,
    /// Legs that had the latest data when the request started: one of them has to succeed.
    pub latest: u8,
    /// Peers whose bit was set for this request.
    pub missed: u8,
    /// The local disk failed it.
    pub local_failed: bool,
    /// For a read: sources that were tried.
    pub tried: u8,
    /// It is in the channel's waiting list.
    pub queued: bool,
    /// The session of each peer leg.
    pub sessions: [u32; MAX_PEERS],
}

/// Fixed capacity; a slot's generation changes whenever it is reused.
pub struct RequestSlab<H: Host> {
    slots: Vec<(u32, Option<Request<H>>)>,
    free: Vec<u16>,
}

impl<H: Host> RequestSlab<H> {
    pub fn new(capacity: u16) -> Self {
        Self {
            slots: (0..capacity).map(|_| (0, None)).collect(),
            free: (0..capacity).rev().collect(),
        }
    }

    /// How many are there.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The request's index; `None` when full.
    pub fn insert(&mut self, request: Request<H>) -> Option<u16> {
        let index = self.free.pop()?;
        self.slots[usize::from(index)].1 = Some(request);
        Some(index)
    }

    pub fn remove(&mut self, index: u16) -> Option<Request<H>> {
        let slot = self.slots.get_mut(usize::from(index))?;
        let request = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1);
        self.free.push(index);
        Some(request)
    }

    pub fn get(&self, index: u16) -> Option<&Request<H>> {
        self.slots.get(usize::from(index))?.1.as_ref()
    }

    pub fn get_mut(&mut self, index: u16) -> Option<&mut Request<H>> {
        self.slots.get_mut(usize::from(index))?.1.as_mut()
    }

    pub fn capacity(&self) -> u16 {
        self.slots.len() as u16
    }

    /// All requests that are there.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Request<H>)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| Some((index as u16, slot.1.as_ref()?)))
    }

    /// A token for a leg of a request: generation 32 bits, kind 8, index 16, leg 8.
    pub fn token(&self, index: u16, leg: usize) -> Token {
        let generation = self.slots[usize::from(index)].0;
        Token(u64::from(generation) << 32 | u64::from(index) << 8 | leg as u64)
    }

    /// The request and leg of a token, if that request is still there.
    pub fn resolve(&self, token: Token) -> Option<(u16, usize)> {
        let (generation, index, leg) =
            ((token.0 >> 32) as u32, (token.0 >> 8) as u16, token.0 as u8);
        let slot = self.slots.get(usize::from(index))?;
        (slot.0 == generation && slot.1.is_some()).then_some((index, usize::from(leg)))
    }
}
