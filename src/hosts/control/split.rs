//! The parts in which an unmap or write-zeroes that is longer than the engine takes goes there, one after the other.
//! Called by a host on the I/O path; keeps numbers only.

use crate::engine::request::RequestKind;
use crate::engine::volume::MAX_ZEROES_BYTES;

/// What of a long I/O is still to be submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    next_lba: u64,
    left_blocks: u64,
    most_blocks: u64,
}

impl Parts {
    /// The parts of an I/O; `None` if it goes to the engine as it is.
    pub fn of(kind: RequestKind, lba: u64, blocks: u64, block_size: u32) -> Option<Parts> {
        let carries_no_data = matches!(kind, RequestKind::WriteZeroes { .. } | RequestKind::Unmap);
        let most_blocks = MAX_ZEROES_BYTES / u64::from(block_size.max(1));
        (carries_no_data && blocks > most_blocks).then_some(Parts {
            next_lba: lba,
            left_blocks: blocks,
            most_blocks,
        })
    }

    /// The first block and the number of blocks of the next part; `None` after the last.
    pub fn next_part(&mut self) -> Option<(u64, u32)> {
        let lba = self.next_lba;
        let blocks = self.left_blocks.min(self.most_blocks);
        if blocks == 0 {
            return None;
        }
        // Past the last LBA that there is the engine refuses it.
        self.next_lba = lba.saturating_add(blocks);
        self.left_blocks -= blocks;
        Some((lba, blocks as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = MAX_ZEROES_BYTES / 512;

    #[test]
    fn a_long_unmap_is_covered_once_by_parts_that_the_engine_takes() {
        for blocks in [MOST + 1, 2 * MOST, 3 * MOST - 1, u64::from(u32::MAX) + 5] {
            let mut parts = Parts::of(RequestKind::Unmap, 9, blocks, 512).unwrap();
            let mut next = 9;
            while let Some((lba, len)) = parts.next_part() {
                assert_eq!(lba, next);
                assert!(len > 0 && u64::from(len) <= MOST, "{len}");
                next += u64::from(len);
            }
            assert_eq!(next, 9 + blocks);
        }
    }

    #[test]
    fn what_the_engine_takes_is_not_split() {
        let zeroes = RequestKind::WriteZeroes { fua: false };
        assert_eq!(Parts::of(zeroes, 0, MOST, 512), None);
        assert!(Parts::of(zeroes, 0, MOST + 1, 512).is_some());
        assert_eq!(Parts::of(RequestKind::Read, 0, 10 * MOST, 512), None);
        assert_eq!(
            Parts::of(RequestKind::Write { fua: false }, 0, 10 * MOST, 512),
            None
        );
        assert!(
            Parts::of(zeroes, 0, 10 * MOST, 0).is_none(),
            "a block size that is not there divides nothing"
        );
    }
}
