//! What the application may read: per block, the writes of which one must be there. Knows nothing of the engine.

use std::collections::{BTreeMap, BTreeSet};

/// Number of a write; 0 is "zeroes".
pub type WriteId = u64;

#[derive(Clone, Debug)]
struct Block {
    /// One of these is there.
    possible: BTreeSet<WriteId>,
    /// Everything that a power loss may bring back.
    unflushed: BTreeSet<WriteId>,
    pending: BTreeSet<WriteId>,
    /// Ended while others were pending.
    concurrent: BTreeSet<WriteId>,
    acknowledged_at: u64,
    /// Every write, in the order of submission.
    submitted: Vec<(u64, WriteId)>,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            possible: BTreeSet::from([0]),
            unflushed: BTreeSet::from([0]),
            pending: BTreeSet::new(),
            concurrent: BTreeSet::new(),
            acknowledged_at: 0,
            submitted: Vec::new(),
        }
    }
}

#[derive(Default)]
pub struct Ledger {
    blocks: BTreeMap<u64, Block>,
    /// Blocks of which a power loss may bring back something that is not possible without one.
    volatile: BTreeSet<u64>,
    acknowledged: u64,
    submissions: u64,
}

/// What a read may return that has begun at some moment, whatever else is written until it ends.
#[derive(Clone, Debug, Default)]
pub struct ReadMark {
    submissions: u64,
    possible: BTreeMap<u64, BTreeSet<WriteId>>,
}

/// Content of one block of a write.
pub fn content(id: WriteId, lba: u64, block_size: usize) -> Vec<u8> {
    let word = if id == 0 {
        0
    } else {
        id << 24 | lba & 0xff_ffff
    };
    word.to_le_bytes().repeat(block_size / 8)
}

/// The write that a block is from; `None` when it is no write's.
pub fn identify(block: &[u8], lba: u64) -> Option<WriteId> {
    let word = u64::from_le_bytes(block.get(..8)?.try_into().ok()?);
    let uniform = block.chunks_exact(8).all(|other| other == &block[..8]);
    let fits = word == 0 || word & 0xff_ffff == lba & 0xff_ffff;
    (uniform && fits).then_some(word >> 24)
}

impl Ledger {
    pub fn submitted(&mut self, id: WriteId, lba: u64, blocks: u32) {
        self.submissions += 1;
        for lba in lba..lba + u64::from(blocks) {
            let block = self.blocks.entry(lba).or_default();
            block.possible.insert(id);
            block.unflushed.insert(id);
            block.pending.insert(id);
            block.submitted.push((self.submissions, id));
            self.volatile.insert(lba);
        }
    }

    pub fn acknowledged(&mut self, id: WriteId, lba: u64, blocks: u32, fua: bool) {
        self.acknowledged += 1;
        for lba in lba..lba + u64::from(blocks) {
            let block = self.blocks.entry(lba).or_default();
            block.pending.remove(&id);
            block.concurrent.insert(id);
            block.acknowledged_at = self.acknowledged;
            if block.pending.is_empty() {
                block.possible = std::mem::take(&mut block.concurrent);
                if fua {
                    block.unflushed = block.possible.clone();
                }
            }
        }
    }

    /// It failed, or its node died: it may be there or not.
    pub fn unknown(&mut self, id: WriteId, lba: u64, blocks: u32) {
        for lba in lba..lba + u64::from(blocks) {
            let block = self.blocks.entry(lba).or_default();
            block.pending.remove(&id);
            if block.pending.is_empty() {
                block.concurrent.clear();
            } else {
                block.concurrent.insert(id);
            }
        }
    }

    /// What a flush that is submitted now covers.
    pub fn flush_mark(&self) -> u64 {
        self.acknowledged
    }

    pub fn flushed(&mut self, mark: u64) {
        self.volatile.retain(|lba| {
            let Some(block) = self.blocks.get_mut(lba) else {
                return false;
            };
            let is_covered = block.pending.is_empty() && block.acknowledged_at <= mark;
            if is_covered {
                block.unflushed = block.possible.clone();
            }
            !is_covered
        });
    }

    /// Volatile caches are gone.
    pub fn power_lost(&mut self) {
        for block in self.blocks.values_mut() {
            block.possible.extend(block.unflushed.iter().copied());
        }
    }

    /// A read of these blocks begins.
    pub fn read_begins(&self, lba: u64, blocks: u32) -> ReadMark {
        let blocks = lba..lba + u64::from(blocks);
        ReadMark {
            submissions: self.submissions,
            possible: self
                .blocks
                .range(blocks)
                .map(|(&lba, block)| (lba, block.possible.clone()))
                .collect(),
        }
    }

    /// Whether a read that began at `mark` may return this content.
    ///
    /// # Errors
    /// What was read instead.
    pub fn check_read(&self, mark: &ReadMark, lba: u64, bytes: &[u8]) -> Result<(), String> {
        let error = match self.check(lba, bytes) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let Some(found) = identify(bytes, lba) else {
            return Err(error);
        };
        let before = mark.possible.get(&lba);
        let was_there = before.map_or(found == 0, |possible| possible.contains(&found));
        let since = self.blocks.get(&lba).is_some_and(|block| {
            block
                .submitted
                .iter()
                .any(|&(at, id)| at > mark.submissions && id == found)
        });
        if was_there || since {
            Ok(())
        } else {
            Err(error)
        }
    }

    /// Whether this content may be there.
    ///
    /// # Errors
    /// What is there instead.
    pub fn check(&self, lba: u64, bytes: &[u8]) -> Result<(), String> {
        let found = identify(bytes, lba);
        let possible = self.blocks.get(&lba).map(|block| &block.possible);
        let fits = match (found, possible) {
            (Some(found), Some(possible)) => possible.contains(&found),
            (Some(found), None) => found == 0,
            (None, _) => false,
        };
        if fits {
            return Ok(());
        }
        Err(format!(
            "block {lba} holds {found:?}, but one of {possible:?} is right"
        ))
    }

    /// Blocks that were ever written.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.blocks.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_write_is_the_only_one_that_may_be_there() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 5, 1);
        assert!(ledger.check(5, &content(0, 5, 512)).is_ok());
        ledger.acknowledged(1, 5, 1, false);
        assert!(ledger.check(5, &content(0, 5, 512)).is_err());
        assert!(ledger.check(5, &content(1, 6, 512)).is_err());
        assert!(ledger.check(5, &content(1, 5, 512)).is_ok());
        ledger.power_lost();
        assert!(ledger.check(5, &content(0, 5, 512)).is_ok());
    }

    #[test]
    fn overlapping_writes_end_in_either_order_and_mixtures_never() {
        let mut ledger = Ledger::default();
        ledger.submitted(1, 0, 2);
        ledger.submitted(2, 0, 1);
        ledger.acknowledged(1, 0, 2, false);
        ledger.acknowledged(2, 0, 1, false);
        assert!(ledger.check(0, &content(1, 0, 512)).is_ok());
        assert!(ledger.check(0, &content(2, 0, 512)).is_ok());
        assert!(ledger.check(1, &content(0, 1, 512)).is_err());
        let mut mixed = content(1, 0, 512);
        mixed[256..].copy_from_slice(&content(2, 0, 256));
        assert!(ledger.check(0, &mixed).is_err());
    }
}
