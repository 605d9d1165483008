//! The activity log: which 4 MiB extents may differ between the replicas after a crash.
//!
//! A channel asks [`ActivityLog`] before each write and again after it; attach and the offline tool read
//! what was left on disk ([`ring`]). Neither knows who writes the blocks, or when.

mod extent_set;
pub mod ring;

use std::ops::RangeInclusive;

use self::extent_set::{ExtentSet, Position};
use self::ring::{RingId, emit};
use super::block::Block;

/// Most extents that one channel can have active: a transaction names all of them in 4 KiB.
pub const EXTENTS_MAX: usize = 1000;

/// The answer to a write that wants to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// All extents are on disk and referenced: go on.
    Ready,
    /// All extents are referenced, but the write may only start when the transaction with this number is
    /// durable.
    Join(u64),
    /// No room: nothing was referenced. Queue the request and retire extents.
    Full,
}

/// A transaction whose bytes were put into the caller's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnToWrite {
    /// What [`ActivityLog::transaction_done`] wants to hear.
    pub number: u64,
    /// Block of this channel's ring to write it to.
    pub ring_index: u32,
}

/// The activity log of one channel in memory.
///
/// Transactions are numbered; an extent is on disk when the transaction that was the first to name it is
/// durable. One transaction is written at a time, and all misses meanwhile gather in the next.
/// Everything is allocated in [`ActivityLog::new`].
#[derive(Debug)]
pub struct ActivityLog {
    id: RingId,
    ring_blocks: u32,
    extents: ExtentSet,
    /// Number of the transaction that gathers misses now.
    gathering: u64,
    /// Whether there is an extent that only the gathering transaction will name.
    has_misses: bool,
    in_flight: Option<u64>,
    /// Every transaction up to this one is durable.
    durable: u64,
}

impl ActivityLog {
    /// An empty log for `limit` extents (1 to 1000), whose first transaction has the number
    /// `first_number`: 1 on a ring that was never written, else [`ring::Recovery::next_number`].
    pub fn new(limit: usize, id: RingId, ring_blocks: u32, first_number: u64) -> ActivityLog {
        assert!((1..=EXTENTS_MAX).contains(&limit) && ring_blocks >= 2 && first_number >= 1);
        ActivityLog {
            id,
            ring_blocks,
            extents: ExtentSet::new(limit),
            gathering: first_number,
            has_misses: false,
            in_flight: None,
            durable: first_number - 1,
        }
    }

    /// References all extents that a write touches, or none of them. To be paired with
    /// [`ActivityLog::end`] unless the answer is [`Begin::Full`]. A range longer than the limit never fits:
    /// the volume's own limits must keep requests shorter.
    pub fn begin(&mut self, extents: RangeInclusive<u32>) -> Begin {
        let misses = extents
            .clone()
            .filter(|&extent| self.extents.find(extent).is_none())
            .count();
        if misses > self.extents.room() {
            return Begin::Full;
        }
        let mut named_by = 0;
        for extent in extents {
            let at = match self.extents.find(extent) {
                Some(at) => at,
                None => {
                    self.has_misses = true;
                    self.extents.insert(extent, self.gathering)
                }
            };
            named_by = named_by.max(self.extents.reference(at));
        }
        if self.is_durable(named_by) {
            Begin::Ready
        } else {
            Begin::Join(named_by)
        }
    }

    /// Drops the references that [`ActivityLog::begin`] took for the same range.
    pub fn end(&mut self, extents: RangeInclusive<u32>) {
        for extent in extents {
            let at = self.extents.find(extent);
            debug_assert!(at.is_some(), "extent {extent} ends without having begun");
            if let Some(at) = at {
                self.extents.release(at);
            }
        }
    }

    /// Puts the next transaction into `block`. `None` while one is being written, or when every extent is
    /// on disk.
    pub fn next_transaction(&mut self, block: &mut Block) -> Option<TxnToWrite> {
        if self.in_flight.is_some() || !self.has_misses {
            return None;
        }
        let number = self.gathering;
        emit(self.id, number, self.extents.iter(), block);
        self.gathering += 1;
        self.has_misses = false;
        self.in_flight = Some(number);
        Some(TxnToWrite {
            number,
            ring_index: ring::index_of(number, self.ring_blocks),
        })
    }

    /// Whether an extent is active that no transaction has named.
    pub fn has_misses(&self) -> bool {
        self.has_misses
    }

    /// The transaction is durable on disk: whoever joined it, or one before, may go on.
    pub fn transaction_done(&mut self, number: u64) {
        debug_assert_eq!(self.in_flight, Some(number));
        if self.in_flight == Some(number) {
            self.in_flight = None;
            self.durable = number;
        }
    }

    /// Whether a write that joined transaction `number` may start.
    pub fn is_durable(&self, number: u64) -> bool {
        number <= self.durable
    }

    /// Whether it is time to retire extents: more than three quarters of the room are taken by extents
    /// that are not on their way out.
    pub fn needs_retire(&self) -> bool {
        4 * (self.extents.len() - self.extents.retiring()) > 3 * self.extents.limit()
    }

    /// Up to `want` extents without references, least recently used first; they count as retiring from now
    /// on. Before [`ActivityLog::retired`] the caller makes their bitmap pages durable and flushes the data.
    pub fn retire_candidates(&mut self, want: usize) -> Vec<u32> {
        let mut candidates = Vec::with_capacity(want.min(self.extents.len()));
        while candidates.len() < want {
            let Some(extent) = self.extents.start_retiring_oldest() else {
                break;
            };
            candidates.push(extent);
        }
        candidates
    }

    /// Drops those of the extents that are still retiring: a write that began meanwhile has kept its own.
    /// On disk they vanish with the next transaction.
    pub fn retired(&mut self, extents: &[u32]) {
        for &extent in extents {
            self.for_retiring(extent, ExtentSet::remove);
        }
    }

    /// The extents cannot be retired yet; they are candidates again, as the most recently used ones.
    pub fn retire_later(&mut self, extents: &[u32]) {
        for &extent in extents {
            self.for_retiring(extent, ExtentSet::stop_retiring);
        }
    }

    /// Active extents, in no order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.extents.iter()
    }

    /// How many extents are active.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn for_retiring(&mut self, extent: u32, change: impl FnOnce(&mut ExtentSet, Position)) {
        if let Some(at) = self
            .extents
            .find(extent)
            .filter(|&at| self.extents.is_retiring(at))
        {
            change(&mut self.extents, at);
        }
    }
}

#[cfg(test)]
mod tests;
