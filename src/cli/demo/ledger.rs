//! The ledger of the load: per 4 KiB block, what was written last and what of it was acknowledged.
//! Filled by the load, asked by the comparison. Knows no disk and no connection.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a block of the ledger.
pub const BLOCK_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"ledgered");
/// The content repeats after this many bytes: cheap to make, and a changed byte is found all the same.
const LINE_BYTES: usize = 64;
const LINES: usize = BLOCK_BYTES / LINE_BYTES;
const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// Every write of a block has a number, its generation; 0 is the zeroes that a new device has.
#[derive(Debug, Default)]
struct Entry {
    issued: AtomicU32,
    acknowledged: AtomicU32,
}

/// What was written to a range of a volume. Shared by writers, of which no two may write the same block at
/// the same time.
#[derive(Debug)]
pub struct Ledger {
    offset_bytes: u64,
    seed: u64,
    entries: Vec<Entry>,
    acknowledged_blocks: AtomicU64,
}

/// Why the content of a block cannot be what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// A write that the ledger knows, but not one that may be there: the acknowledged one is lost.
    Generation {
        /// What is there.
        found: u32,
        /// The last write that was acknowledged.
        acknowledged: u32,
        /// The last write that was sent.
        issued: u32,
    },
    /// The content of another block.
    Misplaced {
        /// The block that it was written to.
        block: u64,
    },
    /// The right header, but not the bytes that follow it, from this byte on.
    Torn {
        /// Offset in the block.
        byte: usize,
    },
    /// Nothing that the load wrote.
    Foreign,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Generation {
                found,
                acknowledged,
                issued,
            } => write!(
                f,
                "it holds write {found}, but write {acknowledged} was acknowledged and {issued} was the last one sent"
            ),
            Mismatch::Misplaced { block } => {
                write!(f, "it holds what was written to block {block}")
            }
            Mismatch::Torn { byte } => write!(f, "its content is torn from byte {byte} on"),
            Mismatch::Foreign => write!(f, "it holds nothing that was ever written"),
        }
    }
}

/// SplitMix64: a step of the filler, and the load's source of chance.
pub fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl Ledger {
    /// A ledger of `length_bytes` of a zeroed volume from `offset_bytes` on, both rounded down to blocks.
    pub fn new(offset_bytes: u64, length_bytes: u64, seed: u64) -> Ledger {
        let blocks = (length_bytes / BLOCK_BYTES as u64) as usize;
        let mut entries = Vec::new();
        entries.resize_with(blocks, Entry::default);
        Ledger {
            offset_bytes: offset_bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64,
            seed,
            entries,
            acknowledged_blocks: AtomicU64::new(0),
        }
    }

    /// Where block 0 of the ledger lies on the volume.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Blocks that were acknowledged, those that were written again counted again.
    pub fn acknowledged_blocks(&self) -> u64 {
        self.acknowledged_blocks.load(Ordering::Relaxed)
    }

    /// Blocks that were written at least once.
    pub fn touched_blocks(&self) -> u64 {
        let touched = |entry: &&Entry| entry.issued.load(Ordering::Relaxed) > 0;
        self.entries.iter().filter(touched).count() as u64
    }

    /// Fills `content` (one block) with the block's next write. It may be on the disk from now on.
    pub fn issue(&self, block: u64, content: &mut [u8]) {
        let generation = self.entries[block as usize]
            .issued
            .fetch_add(1, Ordering::Relaxed)
            + 1;
        self.fill(block, generation, content);
    }

    /// The last write of this block was acknowledged: it must be on the disk from now on.
    pub fn acknowledge(&self, block: u64) {
        let entry = &self.entries[block as usize];
        entry
            .acknowledged
            .store(entry.issued.load(Ordering::Relaxed), Ordering::Relaxed);
        self.acknowledged_blocks.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether `content` may be what the block holds: the last acknowledged write, or one after it whose
    /// fate is not known.
    pub fn check(&self, block: u64, content: &[u8]) -> Result<(), Mismatch> {
        let entry = &self.entries[block as usize];
        let acknowledged = entry.acknowledged.load(Ordering::Relaxed);
        let issued = entry.issued.load(Ordering::Relaxed);
        let found = self.identify(block, content)?;
        if found < acknowledged || found > issued {
            return Err(Mismatch::Generation {
                found,
                acknowledged,
                issued,
            });
        }
        Ok(())
    }

    /// Which write of this block the content is.
    fn identify(&self, block: u64, content: &[u8]) -> Result<u32, Mismatch> {
        if content == ZEROES {
            return Ok(0);
        }
        let mut words = content.chunks_exact(8).map(word);
        let (Some(magic), Some(written_to), Some(generation)) =
            (words.next(), words.next(), words.next())
        else {
            return Err(Mismatch::Foreign);
        };
        if magic != MAGIC ^ self.seed {
            return Err(Mismatch::Foreign);
        }
        if written_to != block {
            return Err(Mismatch::Misplaced { block: written_to });
        }
        let generation = u32::try_from(generation).map_err(|_| Mismatch::Foreign)?;
        let mut expected = ZEROES;
        self.fill(block, generation, &mut expected);
        if content == expected {
            return Ok(generation);
        }
        let different = content.iter().zip(&expected).position(|(a, b)| a != b);
        Err(different.map_or(Mismatch::Foreign, |byte| Mismatch::Torn { byte }))
    }

    fn fill(&self, block: u64, generation: u32, content: &mut [u8]) {
        let mut state = self.seed ^ block.rotate_left(32) ^ u64::from(generation);
        let mut line = [0; LINE_BYTES];
        for bytes in line.chunks_exact_mut(8) {
            bytes.copy_from_slice(&mix(&mut state).to_le_bytes());
        }
        content.copy_from_slice(&[line; LINES].concat());
        let header = [MAGIC ^ self.seed, block, u64::from(generation)];
        for (word, bytes) in header.iter().zip(content.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn issue(ledger: &Ledger, block: u64) -> Vec<u8> {
        let mut content = vec![0; BLOCK_BYTES];
        ledger.issue(block, &mut content);
        content
    }

    #[test]
    fn a_block_never_written_must_be_zero() {
        let ledger = Ledger::new(8192, 5 * 4096, 1);
        assert_eq!((ledger.offset_bytes(), ledger.blocks()), (8192, 5));
        assert_eq!(ledger.check(3, &[0; BLOCK_BYTES]), Ok(()));
        assert_eq!(ledger.check(3, &[1; BLOCK_BYTES]), Err(Mismatch::Foreign));
        assert_eq!(ledger.check(3, &[0; 100]), Err(Mismatch::Foreign));
    }

    #[test]
    fn an_acknowledged_write_must_be_there_and_one_without_answer_may_be() {
        let ledger = Ledger::new(0, 4 * 4096, 7);
        let first = issue(&ledger, 2);
        assert_eq!(ledger.check(2, &first), Ok(()));
        assert_eq!(ledger.check(2, &[0; BLOCK_BYTES]), Ok(()));
        ledger.acknowledge(2);
        let lost = Mismatch::Generation {
            found: 0,
            acknowledged: 1,
            issued: 1,
        };
        assert_eq!(ledger.check(2, &[0; BLOCK_BYTES]), Err(lost));
        let second = issue(&ledger, 2);
        assert_eq!(ledger.check(2, &first), Ok(()));
        assert_eq!(ledger.check(2, &second), Ok(()));
        ledger.acknowledge(2);
        let lost = Mismatch::Generation {
            found: 1,
            acknowledged: 2,
            issued: 2,
        };
        assert_eq!(ledger.check(2, &first), Err(lost));
        assert_eq!(
            (ledger.acknowledged_blocks(), ledger.touched_blocks()),
            (2, 1)
        );
    }

    #[test]
    fn every_changed_byte_of_a_block_is_found() {
        let ledger = Ledger::new(0, 4096 * 2, 3);
        let content = issue(&ledger, 1);
        ledger.acknowledge(1);
        for byte in 0..BLOCK_BYTES {
            let mut changed = content.clone();
            changed[byte] ^= 0x10;
            assert!(ledger.check(1, &changed).is_err(), "byte {byte}");
        }
        assert_eq!(
            ledger.check(0, &content),
            Err(Mismatch::Misplaced { block: 1 })
        );
    }
}
