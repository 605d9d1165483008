//! What the application may read: the history of every block as it saw it, and what that leaves possible. Knows nothing
//! of the engine. The world tells it of every I/O that the application submits and of every end of one.
//!
//! A [`register`] judges one block. Blocks with the same history are kept together, as ranges.

mod register;

use std::collections::BTreeMap;
use std::ops::Range;

use register::Register;

use super::memory::Bytes;

/// Number of a write; 0 is "zeroes".
pub type WriteId = u64;

#[derive(Clone)]
pub struct Ledger {
    /// By the first block; each reaches to the next one.
    ranges: BTreeMap<u64, Register>,
    ended_writes: u64,
    /// Counts what it is told.
    now: u64,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            ranges: BTreeMap::from([(0, Register::zeroes())]),
            ended_writes: 0,
            now: 0,
        }
    }
}

/// Content of blocks of a write.
pub fn content(id: WriteId, lba: u64, blocks: u32, block_size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(blocks as usize * block_size);
    for lba in lba..lba + u64::from(blocks) {
        let word = if id == 0 {
            0
        } else {
            id << 24 | lba & 0xff_ffff
        };
        for _ in 0..block_size / 8 {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

/// The write that a block is from; `None` when it is no write's.
pub fn identify(block: &[u8], lba: u64) -> Option<WriteId> {
    let word = u64::from_le_bytes(block.get(..8)?.try_into().ok()?);
    // Each word is like the one before it.
    let uniform = block.len() % 8 == 0 && block[8..] == block[..block.len() - 8];
    let fits = word == 0 || word & 0xff_ffff == lba & 0xff_ffff;
    (uniform && fits).then_some(word >> 24)
}

impl Ledger {
    /// A write of this content begins; `io` is its number, and no other I/O's.
    pub fn submitted(&mut self, io: u64, content: WriteId, lba: u64, blocks: u32) {
        let now = self.tick();
        self.each(lba, blocks, |range| range.write_begins(io, content, now));
    }

    pub fn acknowledged(&mut self, io: u64, lba: u64, blocks: u32, fua: bool) {
        let now = self.tick();
        self.ended_writes += 1;
        let number = self.ended_writes;
        self.each(lba, blocks, |range| {
            range.write_succeeds(io, now, number, fua)
        });
    }

    /// It failed, or its node died: it is there by now, or never will be.
    pub fn unknown(&mut self, io: u64, lba: u64, blocks: u32) {
        let now = self.tick();
        self.ended_writes += 1;
        let number = self.ended_writes;
        self.each(lba, blocks, |range| {
            range.write_ends_unknown(io, now, number)
        });
    }

    /// What a flush that is submitted now covers.
    pub fn flush_mark(&self) -> u64 {
        self.ended_writes
    }

    pub fn flushed(&mut self, mark: u64) {
        for range in self.ranges.values_mut() {
            range.flushed(mark);
        }
    }

    /// The content of a volatile cache is gone, and nobody else is sure to have it.
    pub fn power_lost(&mut self) {
        self.tick();
        for range in self.ranges.values_mut() {
            range.power_lost();
        }
    }

    pub fn read_begins(&mut self, io: u64, lba: u64, blocks: u32) {
        let now = self.tick();
        self.each(lba, blocks, |range| range.read_begins(io, now));
    }

    /// It has returned nothing, or what it has returned does not count.
    pub fn read_is_void(&mut self, io: u64, lba: u64, blocks: u32) {
        self.each(lba, blocks, |range| range.read_is_void(io));
    }

    /// Whether a read may return this, after everything that the application has seen.
    ///
    /// # Errors
    /// What was read, and the history of the block that does not allow for it.
    pub fn read_ends(
        &mut self,
        io: u64,
        lba: u64,
        bytes: &[u8],
        block_size: usize,
    ) -> Result<(), String> {
        let now = self.tick();
        let mut found = Vec::new();
        for (lba, block) in (lba..).zip(bytes.chunks(block_size)) {
            let Some(id) = identify(block, lba) else {
                return Err(format!("block {lba} holds what nobody wrote"));
            };
            found.push(id);
        }
        let mut first = lba;
        for same in found.chunk_by(|one, other| one == other) {
            let mut wrong = None;
            self.each(first, same.len() as u32, |range| {
                let before = range.clone();
                if !range.read_ends(io, same[0], now) {
                    wrong.get_or_insert(before);
                }
            });
            if let Some(history) = wrong {
                return Err(format!(
                    "of blocks {first}+{} it returned write {}, after {history:?}",
                    same.len(),
                    same[0]
                ));
            }
            first += same.len() as u64;
        }
        Ok(())
    }

    /// Whether this content may be in these blocks now.
    ///
    /// # Errors
    /// What is there instead.
    pub fn check(&self, lba: u64, content: &Bytes, block_size: usize) -> Result<(), String> {
        let end = lba + (content.bytes().len() / block_size) as u64;
        let mut at = lba;
        while at < end {
            let next = self.ranges.range(at + 1..end).next();
            let next = next.map_or(end, |(&first, _)| first);
            let possible = match self.ranges.range(..=at).next_back() {
                Some((_, range)) => range.possible(),
                None => vec![0],
            };
            if !(matches!(content, Bytes::Zeroes(_)) && possible.contains(&0)) {
                let from = (at - lba) as usize * block_size;
                let blocks = content.bytes()[from..].chunks_exact(block_size);
                for (lba, block) in (at..next).zip(blocks) {
                    let found = identify(block, lba);
                    if !found.is_some_and(|found| possible.contains(&found)) {
                        return Err(format!(
                            "block {lba} holds {found:?}, but one of {possible:?} is right"
                        ));
                    }
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Blocks that were ever written, as ranges.
    pub fn written(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let ends = self.ranges.keys().skip(1).copied();
        let ranges = self.ranges.iter().zip(ends);
        let written = ranges.filter(|((_, range), _)| range.was_written);
        written.map(|((&first, _), end)| first..end)
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Tells all blocks of a range, and puts together what has become the same.
    fn each(&mut self, lba: u64, blocks: u32, mut tell: impl FnMut(&mut Register)) {
        let end = lba + u64::from(blocks);
        if lba == end {
            return;
        }
        self.split(lba);
        self.split(end);
        for (_, range) in self.ranges.range_mut(lba..end) {
            tell(range);
        }
        let before = self
            .ranges
            .range(..lba)
            .next_back()
            .map(|(&first, _)| first);
        let mut kept = before.unwrap_or(lba);
        let others: Vec<u64> = self
            .ranges
            .range(kept + 1..=end)
            .map(|(&first, _)| first)
            .collect();
        for other in others {
            if self.ranges[&kept] == self.ranges[&other] {
                self.ranges.remove(&other);
            } else {
                kept = other;
            }
        }
    }

    /// A range begins here.
    fn split(&mut self, at: u64) {
        let covering = self.ranges.range(..=at).next_back();
        if let Some((&first, range)) = covering
            && first != at
        {
            let range = range.clone();
            self.ranges.insert(at, range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 512;

    fn read(ledger: &mut Ledger, io: u64, lba: u64, contents: &[WriteId]) -> Result<(), String> {
        ledger.read_begins(io, lba, contents.len() as u32);
        let blocks = (lba..).zip(contents);
        let bytes: Vec<u8> = blocks
            .flat_map(|(lba, &id)| content(id, lba, 1, BLOCK))
            .collect();
        ledger.read_ends(io, lba, &bytes, BLOCK)
    }

    fn check(ledger: &Ledger, lba: u64, bytes: Vec<u8>) -> Result<(), String> {
        ledger.check(lba, &Bytes::Held(bytes), BLOCK)
    }

    #[test]
    fn of_many_blocks_each_is_judged_by_its_own_history() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 1, 10, 10);
        ledger.acknowledged(1, 10, 10, true);
        let right = [content(0, 8, 2, BLOCK), content(1, 10, 10, BLOCK)].concat();
        let right = [right, content(0, 20, 2, BLOCK)].concat();
        assert_eq!(check(&ledger, 8, right.clone()), Ok(()));
        for block in 0..14 {
            let mut wrong = right.clone();
            wrong[block * BLOCK + 100] ^= 1;
            assert!(check(&ledger, 8, wrong).is_err(), "block {block}");
        }
        let zeroes = |blocks: usize| Bytes::zeroes(blocks * BLOCK);
        assert_eq!(ledger.check(20, &zeroes(9), BLOCK), Ok(()));
        assert!(ledger.check(8, &zeroes(3), BLOCK).is_err());
        assert!(ledger.check(19, &zeroes(3), BLOCK).is_err());
    }

    #[test]
    fn an_acknowledged_write_is_the_only_one_that_may_be_there() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 1, 5, 1);
        assert!(check(&ledger, 5, content(0, 5, 1, BLOCK)).is_ok());
        ledger.acknowledged(1, 5, 1, false);
        assert!(check(&ledger, 5, content(0, 5, 1, BLOCK)).is_err());
        assert!(check(&ledger, 5, content(1, 6, 1, BLOCK)).is_err());
        assert!(check(&ledger, 5, content(1, 5, 1, BLOCK)).is_ok());
        ledger.power_lost();
        assert!(check(&ledger, 5, content(0, 5, 1, BLOCK)).is_ok());
    }

    #[test]
    fn overlapping_writes_end_in_either_order_and_mixtures_never() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 1, 0, 2);
        ledger.submitted(2, 2, 0, 1);
        ledger.acknowledged(1, 0, 2, false);
        ledger.acknowledged(2, 0, 1, false);
        assert!(check(&ledger, 0, content(1, 0, 1, BLOCK)).is_ok());
        assert!(check(&ledger, 0, content(2, 0, 1, BLOCK)).is_ok());
        assert!(check(&ledger, 1, content(0, 1, 1, BLOCK)).is_err());
        let mut mixed = content(1, 0, 1, BLOCK);
        mixed[256..].copy_from_slice(&content(2, 0, 1, 256));
        assert!(check(&ledger, 0, mixed.clone()).is_err());
        ledger.read_begins(3, 0, 1);
        assert!(ledger.read_ends(3, 0, &mixed, BLOCK).is_err());
    }

    #[test]
    fn each_block_has_a_history_of_its_own() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 1, 10, 10);
        ledger.unknown(1, 10, 10);
        // Torn between blocks: so it stays.
        assert_eq!(read(&mut ledger, 2, 14, &[1, 1, 0, 0]), Ok(()));
        assert!(read(&mut ledger.clone(), 3, 14, &[0]).is_err());
        assert!(read(&mut ledger.clone(), 3, 16, &[1]).is_err());
        assert_eq!(read(&mut ledger, 3, 18, &[1]), Ok(()));
        let written: Vec<u64> = ledger.written().flatten().collect();
        assert_eq!(written, (10..20).collect::<Vec<_>>());
    }

    #[test]
    fn ranges_with_the_same_history_are_one() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 1, 0, 100);
        ledger.acknowledged(1, 0, 100, true);
        for lba in 0..100 {
            assert_eq!(read(&mut ledger, 1000 + lba, lba, &[1]), Ok(()));
        }
        assert_eq!(ledger.ranges.len(), 2);
    }

    #[test]
    fn a_power_loss_brings_back_what_was_not_flushed_and_then_it_stays() {
        let mut ledger = Ledger::default();
        for id in 1..=3 {
            ledger.submitted(id, id, 0, 1);
            ledger.acknowledged(id, 0, 1, false);
            if id == 1 {
                let mark = ledger.flush_mark();
                ledger.flushed(mark);
            }
        }
        ledger.power_lost();
        assert!(
            read(&mut ledger.clone(), 10, 0, &[0]).is_err(),
            "it was flushed over"
        );
        assert_eq!(read(&mut ledger, 11, 0, &[2]), Ok(()));
        assert!(read(&mut ledger.clone(), 12, 0, &[3]).is_err());
        ledger.power_lost();
        assert_eq!(read(&mut ledger, 13, 0, &[3]), Ok(()));
    }

    #[test]
    fn a_flush_covers_no_write_that_fails_after_it_was_submitted() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 1, 0, 1);
        let mark = ledger.flush_mark();
        ledger.unknown(1, 0, 1);
        assert_eq!(read(&mut ledger, 10, 0, &[1]), Ok(()));
        ledger.flushed(mark);
        ledger.power_lost();
        assert_eq!(read(&mut ledger, 11, 0, &[0]), Ok(()));
    }
}
