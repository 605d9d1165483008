//! A request on its way through a channel, and the slab of fixed capacity in which all of them live. A token is
//! index plus generation plus leg, so a late completion of a request that is gone matches nothing.

use core::ops::Range;

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
    /// Peers that do not get this request: if it writes, their bits are set.
    pub missed: u8,
    /// The local disk failed it.
    pub local_failed: bool,
    /// For a read: sources that were tried.
    pub tried: u8,
    /// It is in the channel's waiting list.
    pub queued: bool,
    /// What a peer leg sends with one command at most.
    pub unit_blocks: u32,
    /// Commands that a peer leg consists of, each with a sequence of its own.
    pub pieces: u16,
    pub legs: [PeerLeg; MAX_PEERS],
}

/// Pieces that a peer leg has under way at once.
const ROUND: u16 = 64;

/// How far a leg on a peer is. It goes in rounds of up to 64 pieces; the next one begins when the last has ended.
#[derive(Clone, Copy, Default)]
pub struct PeerLeg {
    /// Pieces of this round that the host has not taken.
    pub unsent: u64,
    pub session: u32,
    /// The round's first piece.
    pub first: u16,
    /// Pieces that the host has.
    pub in_flight: u8,
}

impl PeerLeg {
    fn begin_round(&mut self, first: u16, pieces: u16) {
        self.first = first;
        self.unsent = u64::MAX >> (ROUND - (pieces - first).clamp(1, ROUND));
    }

    /// Goes on with the next round; false when the last one has ended.
    pub fn next_round(&mut self, pieces: u16) -> bool {
        let first = self.first + ROUND;
        let more = first < pieces;
        if more {
            self.begin_round(first, pieces);
        }
        more
    }
}

impl<H: Host> Request<H> {
    /// The peer gets this request, under this session.
    pub fn assign_peer(&mut self, slot: PeerSlot, session: u32) {
        self.unsent |= 1 << slot;
        let leg = &mut self.legs[slot];
        leg.session = session;
        leg.begin_round(0, self.pieces);
    }

    /// Nothing more is sent to the peer; what is in flight comes back.
    pub fn drop_peer(&mut self, slot: PeerSlot) {
        self.unsent &= !(1 << slot);
        self.tried |= 1 << slot;
        self.legs[slot].unsent = 0;
    }

    /// The blocks of a piece: LBA and number.
    pub fn piece(&self, piece: u16) -> (u64, u32) {
        piece_of(self.lba, self.blocks, self.unit_blocks, piece)
    }
}

/// Into how many pieces a write of these blocks is cut for its peers. The cuts are at multiples of the unit, so that no two
/// pieces touch the same granule where a unit is whole granules.
pub fn pieces_of(lba: u64, blocks: u32, unit_blocks: u32) -> u16 {
    if blocks <= unit_blocks {
        return 1;
    }
    let unit = u64::from(unit_blocks);
    (lba % unit + u64::from(blocks)).div_ceil(unit) as u16
}

fn piece_of(lba: u64, blocks: u32, unit_blocks: u32, piece: u16) -> (u64, u32) {
    if blocks <= unit_blocks {
        return (lba, blocks);
    }
    let unit = u64::from(unit_blocks);
    let place = (lba / unit + u64::from(piece)) * unit;
    let start = place.max(lba);
    let end = (place + unit).min(lba + u64::from(blocks));
    (start, (end - start) as u32)
}

/// The largest index that a token has room for.
const MAX_INDEX: u16 = (1 << 15) - 1;

/// Fixed capacity; a slot's generation changes whenever it is reused.
pub struct RequestSlab<H: Host> {
    /// As many as were ever in use at a time, so that going through them costs no more. There is room for all from the
    /// start.
    slots: Vec<(u32, Option<Request<H>>)>,
    free: Vec<u16>,
    capacity: u16,
}

impl<H: Host> RequestSlab<H> {
    /// `capacity`: 32768 at most.
    pub fn new(capacity: u16) -> Self {
        debug_assert!(
            capacity <= MAX_INDEX + 1,
            "an index has to fit into a token"
        );
        Self {
            slots: Vec::with_capacity(usize::from(capacity)),
            free: Vec::with_capacity(usize::from(capacity)),
            capacity,
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
        if let Some(index) = self.free.pop() {
            self.slots[usize::from(index)].1 = Some(request);
            return Some(index);
        }
        let index = self.slots.len() as u16;
        if index == self.capacity {
            return None;
        }
        self.slots.push((0, Some(request)));
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
        self.capacity
    }

    /// Every index below which there may be a request.
    pub fn indices(&self) -> Range<u16> {
        0..self.slots.len() as u16
    }

    /// All requests that are there.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Request<H>)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| Some((index as u16, slot.1.as_ref()?)))
    }

    /// A token for a piece of a leg of a request: generation 32 bits, kind 8, index 15, place of the piece in its
    /// round 6, leg 3.
    pub fn token(&self, index: u16, leg: usize, place: u32) -> Token {
        let generation = self.slots[usize::from(index)].0;
        let what = u64::from(index) << 9 | u64::from(place) << 3 | leg as u64;
        Token(u64::from(generation) << 32 | what)
    }

    /// The request, leg and place of a token, if that request is still there.
    pub fn resolve(&self, token: Token) -> Option<(u16, usize, u32)> {
        let (generation, index) = ((token.0 >> 32) as u32, (token.0 >> 9) as u16 & MAX_INDEX);
        let slot = self.slots.get(usize::from(index))?;
        let (leg, place) = (token.0 as usize & 7, (token.0 >> 3) as u32 & 63);
        (slot.0 == generation && slot.1.is_some()).then_some((index, leg, place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_write_cut_at_multiples_of_the_unit() {
        for lba in 0..40 {
            for blocks in 1..=300 {
                for unit in [1, 2, 8, 24, 256, u32::MAX] {
                    let count = pieces_of(lba, blocks, unit);
                    let mut next = lba;
                    for piece in 0..count {
                        let (start, length) = piece_of(lba, blocks, unit, piece);
                        assert_eq!(start, next);
                        assert!((1..=unit).contains(&length));
                        assert!(piece == 0 || start % u64::from(unit) == 0);
                        next = start + u64::from(length);
                    }
                    assert_eq!(next, lba + u64::from(blocks));
                    assert!(blocks > unit || count == 1);
                }
            }
        }
    }

    #[test]
    fn rounds_come_to_every_piece_once() {
        for pieces in 1..=257 {
            let mut leg = PeerLeg::default();
            leg.begin_round(0, pieces);
            let mut sent = Vec::new();
            loop {
                let of_round = (0..ROUND).filter(|place| leg.unsent & 1 << place != 0);
                sent.extend(of_round.map(|place| leg.first + place));
                if !leg.next_round(pieces) {
                    break;
                }
            }
            assert!(sent.into_iter().eq(0..pieces));
        }
    }
}
