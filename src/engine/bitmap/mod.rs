//! Bitmaps of what a peer misses: per-core shards, the merged master, and their wire form.
//! This file holds what they share: how a bitmap is cut into pages.
//! Nothing here knows of peers, disks or messages.

pub mod convert;
pub mod geometry;
pub mod master;
pub mod page;
pub mod shard;
pub mod wire;
pub mod words;

pub use geometry::{Geometry, GeometryError, Granularity};
pub use master::Master;
pub use page::{BITS_PER_PAGE, PAGE_BYTES, Page, WORDS_PER_PAGE};
pub use shard::Shard;

use core::ops::Range;

/// Pages of a bitmap of `bits` bits.
pub fn page_count(bits: u64) -> u32 {
    let pages = bits.div_ceil(u64::from(BITS_PER_PAGE));
    u32::try_from(pages).expect("Geometry admits no volume with so many bits")
}

/// Bits that page `index` of a bitmap of `bits` bits holds: less than a page for the last one.
pub fn page_bits(bits: u64, index: u32) -> u32 {
    let start = u64::from(index) * u64::from(BITS_PER_PAGE);
    bits.saturating_sub(start).min(u64::from(BITS_PER_PAGE)) as u32
}

/// `range` cut at page borders: `(page index, bits within the page)`.
#[inline]
fn page_ranges(range: Range<u64>) -> impl Iterator<Item = (usize, Range<u32>)> {
    let per_page = u64::from(BITS_PER_PAGE);
    let mut page = range.start / per_page;
    let mut first = range.start - page * per_page;
    let mut left = range.end.saturating_sub(range.start);
    core::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let length = left.min(per_page - first);
        let cut = (page as usize, first as u32..(first + length) as u32);
        left -= length;
        page += 1;
        first = 0;
        Some(cut)
    })
}
