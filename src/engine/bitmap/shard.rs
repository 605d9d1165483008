//! What one channel knows a peer to miss: a sparse bitmap in plain memory that only its core touches.
//! The channel sets bits and hands whole pages to the manager; only the manager ever clears.

use core::ops::Range;

use super::page::Page;
use super::{page_count, page_ranges};

/// Pages kept ready, so that the I/O path does not allocate.
const FREE_PAGES: usize = 16;

/// A sparse bitmap whose bits are only ever set, and moved out by whole pages.
///
/// A range past the last bit is a mistake of the caller and panics.
#[derive(Debug)]
pub struct Shard {
    bits: u64,
    pages: Box<[Option<Box<Page>>]>,
    /// Indices of the pages that exist; room for all of them from the start.
    touched: Vec<u32>,
    #[expect(clippy::vec_box, reason = "a page moves into the shard without a copy")]
    free: Vec<Box<Page>>,
}

impl Shard {
    /// An empty shard of `bits` bits: 12 bytes for each 32704 of them, and the free list.
    pub fn new(bits: u64) -> Shard {
        let pages = page_count(bits) as usize;
        let mut shard = Shard {
            bits,
            pages: (0..pages).map(|_| None).collect(),
            touched: Vec::with_capacity(pages),
            free: Vec::with_capacity(FREE_PAGES),
        };
        shard.refill();
        shard
    }

    /// How many bits there are.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Tops up the free list. The poller calls it; without it a first touch allocates.
    pub fn refill(&mut self) {
        let wanted = FREE_PAGES.min(self.pages.len() - self.touched.len());
        while self.free.len() < wanted {
            self.free.push(Page::boxed());
        }
    }

    /// Sets every bit of `range`: plain stores.
    #[inline]
    pub fn set_range(&mut self, range: Range<u64>) {
        assert!(
            range.end <= self.bits,
            "bits {range:?} of a shard of {}",
            self.bits
        );
        for (index, within) in page_ranges(range) {
            match &mut self.pages[index] {
                Some(page) => page.set_range(within),
                None => self.touch(index).set_range(within),
            }
        }
    }

    #[cold]
    fn touch(&mut self, index: usize) -> &mut Page {
        self.touched.push(index as u32);
        self.pages[index].insert(self.free.pop().unwrap_or_else(Page::boxed))
    }

    /// Whether any bit of `range` is set here. Harvested bits are not.
    pub fn any(&self, range: Range<u64>) -> bool {
        assert!(
            range.end <= self.bits,
            "bits {range:?} of a shard of {}",
            self.bits
        );
        page_ranges(range).any(|(index, within)| {
            self.pages[index]
                .as_ref()
                .is_some_and(|page| page.any(within))
        })
    }

    /// Whether nothing has been set since the last harvest.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.touched.is_empty()
    }

    /// Hands over all pages, with their indices, in the order of first touch; goes on with none.
    pub fn harvest(&mut self) -> Vec<(u32, Box<Page>)> {
        let pages = &mut self.pages;
        self.touched
            .drain(..)
            .filter_map(|index| pages[index as usize].take().map(|page| (index, page)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::bitmap::BITS_PER_PAGE;

    const PER_PAGE: u64 = BITS_PER_PAGE as u64;

    #[test]
    fn a_harvest_moves_every_bit_out_and_goes_on_empty() {
        let mut shard = Shard::new(10 * PER_PAGE + 5);
        assert!(shard.is_empty());
        shard.set_range(5 * PER_PAGE - 2..5 * PER_PAGE + 3);
        shard.set_range(10 * PER_PAGE + 4..10 * PER_PAGE + 5);
        shard.set_range(7..7);
        assert!(!shard.is_empty());
        assert!(shard.any(0..5 * PER_PAGE) && !shard.any(0..5 * PER_PAGE - 2));
        let pages = shard.harvest();
        let counts: Vec<_> = pages.iter().map(|(at, page)| (*at, page.count())).collect();
        assert_eq!(counts, [(4, 2), (5, 3), (10, 1)]);
        assert!(pages[1].1.test(2) && !pages[1].1.test(3));
        assert!(shard.is_empty() && !shard.any(0..10 * PER_PAGE + 5));
        assert!(shard.harvest().is_empty());
        shard.set_range(0..1);
        assert_eq!(shard.harvest().len(), 1);
    }

    #[test]
    fn pages_are_moved_not_copied() {
        let mut shard = Shard::new(100);
        shard.set_range(0..1);
        let at: *const Page = &**shard.pages[0].as_ref().unwrap();
        let harvested = shard.harvest();
        assert!(core::ptr::eq(at, &*harvested[0].1));
    }

    #[test]
    fn first_touches_take_prepared_pages_and_work_without_them() {
        let mut shard = Shard::new(40 * PER_PAGE);
        assert_eq!(shard.free.len(), FREE_PAGES);
        for page in 0..20 {
            shard.set_range(page * PER_PAGE..page * PER_PAGE + 1);
        }
        assert!(shard.free.is_empty());
        shard.refill();
        assert_eq!(shard.free.len(), FREE_PAGES);
        assert_eq!(shard.harvest().len(), 20);
    }

    #[test]
    fn a_small_shard_prepares_no_page_that_it_cannot_use() {
        let shard = Shard::new(100);
        assert_eq!(shard.free.len(), 1);
    }

    #[test]
    #[should_panic(expected = "of a shard of 100")]
    fn a_range_past_the_end_panics() {
        Shard::new(100).set_range(99..101);
    }
}
