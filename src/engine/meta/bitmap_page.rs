//! One page of a peer's bitmap on disk: 8 bytes of header and 511 words.
//!
//! Written by the manager from the merged bitmap, read at attach and by the offline tool. It knows
//! nothing of what a bit stands for.

use thiserror::Error;

use super::block::{BLOCK_SIZE, Block, checksum, is_zero, put, u32_at, u64_at};
use crate::engine::bitmap::Page;

const CRC: usize = 0;
const INDEX: usize = 4;
const WORDS: usize = 8;

/// Why a page cannot be believed. All of its bits then count as set: that costs a resync of what the page
/// covers, while believing it could lose a difference between the replicas.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BitmapPageError {
    #[error("bitmap page {page_index}: {found_bytes} bytes instead of 4096")]
    Length { page_index: u32, found_bytes: usize },
    #[error(
        "bitmap page {page_index}: checksum {found:#010x} instead of {computed:#010x}, a torn or damaged page"
    )]
    Checksum {
        page_index: u32,
        found: u32,
        computed: u32,
    },
    #[error("bitmap page {page_index}: it says that it is page {found}")]
    Index { page_index: u32, found: u32 },
}

/// Reads the page that was found at `page_index`. A block of zeroes is a page that was never written
/// and has no bit set.
pub fn parse(bytes: &[u8], page_index: u32) -> Result<Box<Page>, BitmapPageError> {
    let block: &Block = bytes.try_into().map_err(|_| BitmapPageError::Length {
        page_index,
        found_bytes: bytes.len(),
    })?;
    let mut page = Page::boxed();
    if is_zero(block) {
        return Ok(page);
    }
    let (found, computed) = (u32_at(block, CRC), checksum(block, CRC));
    if found != computed {
        return Err(BitmapPageError::Checksum {
            page_index,
            found,
            computed,
        });
    }
    let found = u32_at(block, INDEX);
    if found != page_index {
        return Err(BitmapPageError::Index { page_index, found });
    }
    for (index, word) in page.0.iter_mut().enumerate() {
        *word = u64_at(block, WORDS + 8 * index);
    }
    Ok(page)
}

/// Writes page `page_index` into `block`; `None` is a page without a set bit.
pub fn emit(page: Option<&Page>, page_index: u32, block: &mut Block) {
    *block = [0; BLOCK_SIZE];
    put(block, INDEX, &page_index.to_le_bytes());
    for (index, word) in page.iter().flat_map(|page| page.0.iter().enumerate()) {
        put(block, WORDS + 8 * index, &word.to_le_bytes());
    }
    let sum = checksum(block, CRC);
    put(block, CRC, &sum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn emitted(page: Option<&Page>, page_index: u32) -> Block {
        let mut block = [0xff; BLOCK_SIZE];
        emit(page, page_index, &mut block);
        block
    }

    #[test]
    fn a_page_that_was_never_written_is_clear() {
        assert!(parse(&[0; BLOCK_SIZE], 9).unwrap().is_empty());
        let clear = emitted(None, 9);
        assert!(parse(&clear, 9).unwrap().is_empty());
        assert_eq!(clear, emitted(Some(&Page::boxed()), 9));
        assert!(
            !is_zero(&emitted(None, 0)),
            "the checksum of zeroes is not zero"
        );
    }

    #[test]
    fn a_damaged_or_misplaced_page_is_refused() {
        let mut block = emitted(None, 3);
        assert_eq!(
            parse(&block, 4),
            Err(BitmapPageError::Index {
                page_index: 4,
                found: 3
            })
        );
        assert!(matches!(
            parse(&block[1..], 3),
            Err(BitmapPageError::Length { .. })
        ));
        block[4095] ^= 0x80;
        assert!(matches!(
            parse(&block, 3),
            Err(BitmapPageError::Checksum { .. })
        ));
    }

    proptest! {
        #[test]
        fn what_is_emitted_is_parsed_again(seed: u64, index: u32) {
            let word = |word: usize| seed.rotate_left(word as u32).wrapping_mul(word as u64);
            let page = Page(std::array::from_fn(word));
            prop_assert_eq!(parse(&emitted(Some(&page), index), index), Ok(Box::new(page)));
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000), index: u32) {
            let _ = parse(&bytes, index);
        }
    }
}
