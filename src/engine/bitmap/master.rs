//! The manager's bitmap of one peer: what all shards, notices and exchanges have said, merged.
//! Only the manager's core touches it, and only here are bits cleared. It keeps note of the pages that
//! differ from the disk but knows nothing of metadata or messages.

use core::ops::Range;

use super::page::{BITS_PER_PAGE, FULL_PAGE, Page};
use super::{page_bits, page_count, page_ranges};

/// The merged bitmap. A page that is all clear or all set takes no memory.
///
/// A range, bit or page index past the end is a mistake of the caller and panics.
#[derive(Debug, Clone)]
pub struct Master {
    bits: u64,
    /// `None` where `set_in_page` says all: 0, or `BITS_PER_PAGE`.
    pages: Box<[Option<Box<Page>>]>,
    set_in_page: Box<[u16]>,
    set: u64,
    /// One bit per page that has changed since it was last taken for writing.
    dirty: Box<[u64]>,
    dirty_pages: u32,
}

const ALL: u16 = BITS_PER_PAGE as u16;

impl Master {
    /// `bits` clear bits, nothing to be written.
    pub fn new(bits: u64) -> Master {
        let pages = page_count(bits) as usize;
        Master {
            bits,
            pages: (0..pages).map(|_| None).collect(),
            set_in_page: vec![0; pages].into(),
            set: 0,
            dirty: vec![0; pages.div_ceil(64)].into(),
            dirty_pages: 0,
        }
    }

    /// How many bits there are.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// How many pages there are.
    pub fn page_count(&self) -> u32 {
        self.pages.len() as u32
    }

    /// How many bits are set. O(1).
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.set == 0
    }

    fn check(&self, range: &Range<u64>) {
        assert!(
            range.end <= self.bits,
            "bits {range:?} of a bitmap of {}",
            self.bits
        );
    }

    /// The page as it is to be written or sent; `None` if all its bits are clear.
    pub fn page(&self, index: u32) -> Option<&Page> {
        match self.set_in_page[index as usize] {
            0 => None,
            ALL => Some(&FULL_PAGE),
            _ => self.pages[index as usize].as_deref(),
        }
    }

    /// Whether every bit that page `index` holds is set.
    pub fn is_page_full(&self, index: u32) -> bool {
        u32::from(self.set_in_page[index as usize]) == page_bits(self.bits, index)
    }

    /// Whether `bit` is set.
    pub fn test(&self, bit: u64) -> bool {
        assert!(bit < self.bits, "bit {bit} of a bitmap of {}", self.bits);
        let per_page = u64::from(BITS_PER_PAGE);
        self.page((bit / per_page) as u32)
            .is_some_and(|page| page.test((bit % per_page) as u32))
    }

    /// The page in memory, to change bits in it.
    fn page_to_change(&mut self, index: usize) -> &mut Page {
        let full = self.set_in_page[index] == ALL;
        self.pages[index].get_or_insert_with(|| {
            if full {
                Box::new(FULL_PAGE.clone())
            } else {
                Page::boxed()
            }
        })
    }

    /// Takes over a page's new number of set bits, and drops the page if that number says all.
    fn settle(&mut self, index: usize, set: u16) -> u32 {
        let changed = self.set_in_page[index].abs_diff(set);
        self.set = self.set - u64::from(self.set_in_page[index]) + u64::from(set);
        self.set_in_page[index] = set;
        if set == 0 || set == ALL {
            self.pages[index] = None;
        }
        u32::from(changed)
    }

    /// Sets what `page` has set, as page `index`; how many bits were clear before. Bits past the end of
    /// the volume are left out.
    pub fn or_page(&mut self, index: u32, page: &Page) -> u32 {
        let added = self.or_unwritten(index as usize, page);
        if added > 0 {
            self.mark_dirty(index);
        }
        added
    }

    /// [`or_page`](Master::or_page) of a harvested page, which becomes the master's where it had none.
    pub fn adopt_page(&mut self, index: u32, page: Box<Page>) -> u32 {
        let added = self.adopt_unwritten(index as usize, page);
        if added > 0 {
            self.mark_dirty(index);
        }
        added
    }

    /// Takes a page that was read from disk: ORed in like any other, but it does not need writing for
    /// that. Bits past the end of the volume are left out.
    pub fn load_page(&mut self, index: u32, page: Box<Page>) {
        self.adopt_unwritten(index as usize, page);
    }

    fn or_unwritten(&mut self, index: usize, page: &Page) -> u32 {
        if self.set_in_page[index] == ALL {
            return 0;
        }
        let held = page_bits(self.bits, index as u32);
        let before = u32::from(self.set_in_page[index]);
        let target = self.page_to_change(index);
        let mut after = before + target.or_from(page);
        after -= target.clear_range(held..BITS_PER_PAGE);
        self.settle(index, after as u16)
    }

    fn adopt_unwritten(&mut self, index: usize, mut page: Box<Page>) -> u32 {
        if self.set_in_page[index] != 0 {
            return self.or_unwritten(index, &page);
        }
        page.clear_range(page_bits(self.bits, index as u32)..BITS_PER_PAGE);
        let set = page.count() as u16;
        self.pages[index] = Some(page);
        self.settle(index, set)
    }

    /// Sets `range`; how many of its bits were clear.
    pub fn or_range(&mut self, range: Range<u64>) -> u64 {
        self.check(&range);
        let mut added = 0;
        for (index, within) in page_ranges(range) {
            let before = self.set_in_page[index];
            let changed = if before == ALL {
                0
            } else if within.len() == BITS_PER_PAGE as usize {
                self.settle(index, ALL)
            } else {
                let changed = self.page_to_change(index).set_range_counted(within);
                self.settle(index, before + changed as u16)
            };
            if changed > 0 {
                self.mark_dirty(index as u32);
            }
            added += u64::from(changed);
        }
        added
    }

    /// Clears `range`; how many of its bits were set.
    pub fn clear_range(&mut self, range: Range<u64>) -> u64 {
        self.check(&range);
        let mut removed = 0;
        for (index, within) in page_ranges(range) {
            let before = self.set_in_page[index];
            let changed = if before == 0 {
                0
            } else if within.len() == BITS_PER_PAGE as usize {
                self.settle(index, 0)
            } else {
                let changed = self.page_to_change(index).clear_range(within);
                self.settle(index, before - changed as u16)
            };
            if changed > 0 {
                self.mark_dirty(index as u32);
            }
            removed += u64::from(changed);
        }
        removed
    }

    /// Clears what `other`, a bitmap of as many bits, has clear.
    pub fn retain(&mut self, other: &Master) {
        let mut kept = Vec::new();
        let mut from = 0;
        while let Some(run) = other.next_run(from, u64::MAX) {
            let mut within = run.start;
            while let Some(mine) = self.next_run(within, u64::MAX)
                && mine.start < run.end
            {
                within = mine.end.min(run.end);
                kept.push(mine.start..within);
            }
            from = run.end;
        }
        self.clear_all();
        for run in kept {
            self.or_range(run);
        }
    }

    /// Sets every bit.
    pub fn set_all(&mut self) {
        self.or_range(0..self.bits);
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        self.clear_range(0..self.bits);
    }

    /// The first set bit at or after `from`.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.next_where(from, 0, |page, bit| page.next_set(bit))
    }

    /// The first run of set bits at or after `from`, its first `max_bits` bits at most.
    pub fn next_run(&self, from: u64, max_bits: u64) -> Option<Range<u64>> {
        let start = self.next_set(from)?;
        let limit = start.saturating_add(max_bits).min(self.bits);
        let end = self
            .next_where(start, ALL, |page, bit| page.next_clear(bit))
            .map_or(limit, |end| end.min(limit));
        Some(start..end)
    }

    /// The first bit at or after `from` that `find` finds in its page; pages with `skip` set bits have
    /// none.
    fn next_where(
        &self,
        from: u64,
        skip: u16,
        find: impl Fn(&Page, u32) -> Option<u32>,
    ) -> Option<u64> {
        static EMPTY_PAGE: Page = Page([0; super::WORDS_PER_PAGE]);
        let per_page = u64::from(BITS_PER_PAGE);
        let mut first = (from % per_page) as u32;
        for index in (from / per_page).min(self.pages.len() as u64) as usize..self.pages.len() {
            if self.set_in_page[index] != skip {
                let page = self.page(index as u32).unwrap_or(&EMPTY_PAGE);
                if let Some(bit) = find(page, first) {
                    return Some(index as u64 * per_page + u64::from(bit));
                }
            }
            first = 0;
        }
        None
    }

    /// How many pages have changed since they were taken for writing.
    pub fn dirty_pages(&self) -> u32 {
        self.dirty_pages
    }

    /// Takes up to `max` changed pages for writing, in ascending order. They count as clean from now: a
    /// change while the write is under way makes them dirty again, and so must whoever finds that the
    /// write has failed, with [`mark_dirty`](Master::mark_dirty).
    pub fn take_dirty_pages(&mut self, max: usize) -> Vec<u32> {
        let mut taken = Vec::with_capacity(max.min(self.dirty_pages as usize));
        for (index, word) in self.dirty.iter_mut().enumerate() {
            while *word != 0 && taken.len() < max {
                taken.push(index as u32 * 64 + word.trailing_zeros());
                *word &= *word - 1;
            }
        }
        self.dirty_pages -= taken.len() as u32;
        taken
    }

    /// Whether page `index` has changed since it was taken for writing.
    pub fn is_dirty(&self, index: u32) -> bool {
        self.dirty[index as usize / 64] >> (index % 64) & 1 == 1
    }

    /// Page `index` has to be written.
    pub fn mark_dirty(&mut self, index: u32) {
        assert!(index < self.page_count(), "page {index} does not exist");
        if !self.is_dirty(index) {
            self.dirty[index as usize / 64] |= 1 << (index % 64);
            self.dirty_pages += 1;
        }
    }

    /// Page `index` is on disk as it is here.
    pub fn mark_clean(&mut self, index: u32) {
        if self.is_dirty(index) {
            self.dirty[index as usize / 64] &= !(1 << (index % 64));
            self.dirty_pages -= 1;
        }
    }

    /// Every page that has bits set has to be written: who was given it may not have it.
    pub fn mark_set_dirty(&mut self) {
        for index in 0..self.page_count() {
            if self.set_in_page[index as usize] > 0 {
                self.mark_dirty(index);
            }
        }
    }

    /// Every page has to be written: the slot on disk is new, or holds something else.
    pub fn mark_all_dirty(&mut self) {
        for index in 0..self.page_count() {
            self.mark_dirty(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PER_PAGE: u64 = BITS_PER_PAGE as u64;
    const BITS: u64 = 2 * PER_PAGE + 100;

    #[test]
    fn what_is_retained_is_set_in_both() {
        let (mut mine, mut other) = (Master::new(BITS), Master::new(BITS));
        for range in [3..9, 20..30, PER_PAGE - 4..PER_PAGE + 4, 2 * PER_PAGE..BITS] {
            mine.or_range(range);
        }
        for range in [0..5, 7..25, PER_PAGE..BITS] {
            other.or_range(range);
        }
        let both: Vec<u64> = (0..BITS)
            .filter(|&bit| mine.test(bit) && other.test(bit))
            .collect();
        mine.retain(&other);
        let kept: Vec<u64> = (0..BITS).filter(|&bit| mine.test(bit)).collect();
        assert_eq!(kept, both);
    }

    #[test]
    fn a_full_bitmap_of_1_tib_takes_no_page() {
        let mut master = Master::new(1 << 28);
        master.set_all();
        assert_eq!(master.count(), 1 << 28);
        let allocated = master.pages.iter().flatten().count();
        // The last page holds less than a page, so it is there.
        assert_eq!(allocated, 1);
        assert_eq!(master.next_run(5, u64::MAX), Some(5..1 << 28));
        assert_eq!(master.next_run(5, 10), Some(5..15));
        master.clear_range(PER_PAGE..PER_PAGE + 1);
        assert_eq!(master.count(), (1 << 28) - 1);
        assert_eq!(master.next_run(5, u64::MAX), Some(5..PER_PAGE));
        master.clear_all();
        assert_eq!(master.count(), 0);
        assert!(master.pages.iter().all(Option::is_none));
    }

    #[test]
    fn a_harvested_page_becomes_the_masters_where_it_had_none() {
        let mut master = Master::new(BITS);
        let mut page = Page::boxed();
        page.set_range(3..9);
        let at: *const Page = &*page;
        assert_eq!(master.adopt_page(1, page), 6);
        assert!(core::ptr::eq(at, master.page(1).unwrap()));
        let mut again = Page::boxed();
        again.set_range(8..12);
        assert_eq!(master.adopt_page(1, again), 3);
        assert_eq!(master.next_run(0, 100), Some(PER_PAGE + 3..PER_PAGE + 12));
        assert_eq!(master.count(), 9);
    }

    #[test]
    fn bits_past_the_end_of_the_volume_are_left_out() {
        for adopt in [true, false] {
            let mut master = Master::new(BITS);
            let added = if adopt {
                master.adopt_page(2, Box::new(FULL_PAGE.clone()))
            } else {
                master.or_page(2, &FULL_PAGE)
            };
            assert_eq!(added, 100);
            assert_eq!(master.count(), 100);
            assert!(master.is_page_full(2));
            assert_eq!(
                master.next_run(0, u64::MAX),
                Some(2 * PER_PAGE..2 * PER_PAGE + 100)
            );
        }
    }

    #[test]
    fn a_page_is_dirty_when_it_has_changed_and_only_then() {
        let mut master = Master::new(BITS);
        master.load_page(0, Box::new(FULL_PAGE.clone()));
        assert_eq!(master.dirty_pages(), 0);
        master.or_range(0..50);
        master.clear_range(PER_PAGE..BITS);
        assert_eq!(master.dirty_pages(), 0);
        master.clear_range(0..1);
        master.or_range(2 * PER_PAGE..2 * PER_PAGE + 1);
        assert_eq!(master.take_dirty_pages(1), [0]);
        assert_eq!(master.dirty_pages(), 1);
        master.or_range(0..1);
        assert_eq!(master.take_dirty_pages(10), [0, 2]);
        assert!(master.take_dirty_pages(10).is_empty());
        master.mark_dirty(1);
        assert!(master.is_dirty(1));
        master.mark_all_dirty();
        assert_eq!(master.dirty_pages(), 3);
        master.mark_clean(1);
        assert_eq!(master.take_dirty_pages(10), [0, 2]);
        assert_eq!(master.dirty_pages(), 0);
        master.mark_set_dirty();
        assert_eq!(master.take_dirty_pages(10), [0, 2]);
    }

    #[test]
    fn an_empty_bitmap_has_no_pages() {
        let mut master = Master::new(0);
        master.set_all();
        master.mark_all_dirty();
        assert_eq!((master.page_count(), master.count()), (0, 0));
        assert_eq!(master.next_set(0), None);
        assert_eq!(master.next_set(u64::MAX), None);
    }

    #[derive(Debug, Clone)]
    enum Operation {
        Set(Range<u64>),
        Clear(Range<u64>),
        Page(u32, Vec<Range<u32>>),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let range = (0..BITS, prop_oneof![0..200u64, 0..BITS])
            .prop_map(|(start, length)| start..(start + length).min(BITS));
        let runs = proptest::collection::vec(
            (0..BITS_PER_PAGE, 0..100u32)
                .prop_map(|(start, length)| start..(start + length).min(BITS_PER_PAGE)),
            0..5,
        );
        prop_oneof![
            range.clone().prop_map(Operation::Set),
            range.prop_map(Operation::Clear),
            (0..2u32, runs).prop_map(|(index, runs)| Operation::Page(index, runs)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_agrees_with_a_set_of_integers(
            operations in proptest::collection::vec(operation(), 1..12), from in 0..BITS,
        ) {
            let mut master = Master::new(BITS);
            let mut model = vec![false; BITS as usize];
            for operation in operations {
                let before = model.clone();
                let changed = match operation {
                    Operation::Set(range) => {
                        model[range.start as usize..range.end as usize].fill(true);
                        master.or_range(range)
                    }
                    Operation::Clear(range) => {
                        model[range.start as usize..range.end as usize].fill(false);
                        master.clear_range(range)
                    }
                    Operation::Page(index, runs) => {
                        let mut page = Page::boxed();
                        for run in runs {
                            let start = index as usize * BITS_PER_PAGE as usize + run.start as usize;
                            model[start..start + run.len()].fill(true);
                            page.set_range(run);
                        }
                        if index == 0 {
                            master.or_page(index, &page).into()
                        } else {
                            master.adopt_page(index, page).into()
                        }
                    }
                };
                let differing: Vec<usize> =
                    (0..BITS as usize).filter(|bit| before[*bit] != model[*bit]).collect();
                prop_assert_eq!(changed, differing.len() as u64);
                let pages: BTreeSet<u32> =
                    differing.iter().map(|bit| (*bit as u64 / PER_PAGE) as u32).collect();
                prop_assert_eq!(master.take_dirty_pages(9), pages.into_iter().collect::<Vec<_>>());
            }
            prop_assert_eq!(master.count(), model.iter().filter(|set| **set).count() as u64);
            for bit in 0..BITS {
                prop_assert_eq!(master.test(bit), model[bit as usize]);
            }
            let expected = (from..BITS).find(|bit| model[*bit as usize]);
            prop_assert_eq!(master.next_set(from), expected);
            let run = expected.map(|start| {
                let end = (start..BITS).find(|bit| !model[*bit as usize]).unwrap_or(BITS);
                start..end
            });
            prop_assert_eq!(master.next_run(from, u64::MAX), run.clone());
            prop_assert_eq!(
                master.next_run(from, 7),
                run.map(|run| run.start..run.end.min(run.start + 7))
            );
        }
    }
}
