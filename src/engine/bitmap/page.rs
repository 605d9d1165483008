//! One page of a bitmap: 511 words, which with an 8-byte header fill 4 KiB on disk.
//! Shards, the master, metadata and the wire form hand it around; it does not know its own index.

use core::ops::Range;

use super::words::word_masks;

/// Words of a page.
pub const WORDS_PER_PAGE: usize = 511;
/// Bits of a page.
pub const BITS_PER_PAGE: u32 = WORDS_PER_PAGE as u32 * 64;
/// Bytes of a page's words as they lie on disk, little-endian, without the header.
pub const PAGE_BYTES: usize = WORDS_PER_PAGE * 8;

/// Words that are looked at together, to pass over those without a set bit. Divides a page.
const GROUP_WORDS: usize = 7;
const _: () = assert!(WORDS_PER_PAGE % GROUP_WORDS == 0);

/// The bits of one page. Bit `b` is bit `b % 64` of word `b / 64`.
///
/// A range past the end of the page is a mistake of the caller and panics.
#[derive(Clone, PartialEq, Eq)]
pub struct Page(pub [u64; WORDS_PER_PAGE]);

impl core::fmt::Debug for Page {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Page({} of {BITS_PER_PAGE} set)", self.count())
    }
}

/// The page with every bit set.
pub(super) static FULL_PAGE: Page = Page([u64::MAX; WORDS_PER_PAGE]);

fn wide(range: Range<u32>) -> Range<u64> {
    u64::from(range.start)..u64::from(range.end)
}

impl Page {
    /// A page without a set bit, where pages live.
    pub fn boxed() -> Box<Page> {
        Box::new(Page([0; WORDS_PER_PAGE]))
    }

    /// Whether `bit` is set.
    #[inline]
    pub fn test(&self, bit: u32) -> bool {
        self.0[bit as usize / 64] >> (bit % 64) & 1 == 1
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// How many bits are set.
    pub fn count(&self) -> u32 {
        let mut set = 0;
        for words in self.0.chunks_exact(GROUP_WORDS) {
            // Most words of most pages are clear, and counting is dear without a popcount instruction.
            if words.iter().fold(0, |any, word| any | word) != 0 {
                set += words.iter().map(|word| word.count_ones()).sum::<u32>();
            }
        }
        set
    }

    /// Whether any bit of `range` is set.
    #[inline]
    pub fn any(&self, range: Range<u32>) -> bool {
        word_masks(wide(range)).any(|(index, mask)| self.0[index] & mask != 0)
    }

    /// Sets `range`. Plain stores: nothing is counted.
    #[inline]
    pub fn set_range(&mut self, range: Range<u32>) {
        let low = range.start % 64;
        let width = range.end.saturating_sub(range.start);
        if width > 0 && width <= 64 - low {
            self.0[range.start as usize / 64] |= (u64::MAX >> (64 - width)) << low;
            return;
        }
        for (index, mask) in word_masks(wide(range)) {
            self.0[index] |= mask;
        }
    }

    /// Sets `range`; how many of its bits were clear.
    pub fn set_range_counted(&mut self, range: Range<u32>) -> u32 {
        let mut changed = 0;
        for (index, mask) in word_masks(wide(range)) {
            changed += (mask & !self.0[index]).count_ones();
            self.0[index] |= mask;
        }
        changed
    }

    /// Clears `range`; how many of its bits were set.
    pub fn clear_range(&mut self, range: Range<u32>) -> u32 {
        let mut changed = 0;
        for (index, mask) in word_masks(wide(range)) {
            changed += (mask & self.0[index]).count_ones();
            self.0[index] &= !mask;
        }
        changed
    }

    /// Sets what `other` has set; how many bits were clear before.
    pub fn or_from(&mut self, other: &Page) -> u32 {
        let mut changed = 0;
        let groups = self.0.chunks_exact_mut(GROUP_WORDS);
        for (words, from) in groups.zip(other.0.chunks_exact(GROUP_WORDS)) {
            if from.iter().fold(0, |any, word| any | word) != 0 {
                for (word, from) in words.iter_mut().zip(from) {
                    changed += (from & !*word).count_ones();
                    *word |= from;
                }
            }
        }
        changed
    }

    /// The first set bit at or after `from`.
    pub fn next_set(&self, from: u32) -> Option<u32> {
        self.next_where(from, |word| word)
    }

    /// The first clear bit at or after `from`.
    pub fn next_clear(&self, from: u32) -> Option<u32> {
        self.next_where(from, |word| !word)
    }

    fn next_where(&self, from: u32, wanted: impl Fn(u64) -> u64) -> Option<u32> {
        let first = from as usize / 64;
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in self.0.iter().enumerate().skip(first) {
            let found = wanted(*word) & mask;
            if found != 0 {
                return Some(index as u32 * 64 + found.trailing_zeros());
            }
            mask = u64::MAX;
        }
        None
    }

    /// Runs of set bits, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut next = 0;
        core::iter::from_fn(move || {
            let start = self.next_set(next)?;
            let end = self.next_clear(start).unwrap_or(BITS_PER_PAGE);
            next = end;
            Some(start..end)
        })
    }

    /// The words as they lie on disk.
    pub fn emit(&self, bytes: &mut [u8; PAGE_BYTES]) {
        for (word, out) in self.0.iter().zip(bytes.chunks_exact_mut(8)) {
            out.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Reads what [`emit`](Page::emit) wrote. Any bytes are a page; the reader checks their CRC.
    pub fn parse(bytes: &[u8; PAGE_BYTES]) -> Box<Page> {
        let mut page = Page::boxed();
        for (word, from) in page.0.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(from);
            *word = u64::from_le_bytes(eight);
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_and_its_header_fill_4_kib() {
        assert_eq!(size_of::<Page>() + 8, 4096);
        assert_eq!(BITS_PER_PAGE, 32704);
    }

    #[test]
    fn counts_of_change_are_exact() {
        let mut page = Page::boxed();
        assert_eq!(page.set_range_counted(60..70), 10);
        assert_eq!(page.set_range_counted(65..75), 5);
        assert_eq!(page.clear_range(0..62), 2);
        let mut other = Page::boxed();
        other.set_range(BITS_PER_PAGE - 1..BITS_PER_PAGE);
        assert_eq!(page.or_from(&other), 1);
        assert_eq!(page.or_from(&other), 0);
        assert_eq!(page.count(), 14);
    }

    proptest! {
        #[test]
        fn runs_are_what_was_set(ranges in proptest::collection::vec((0..BITS_PER_PAGE, 1..300u32), 0..20)) {
            let mut page = Page::boxed();
            let mut model = vec![false; BITS_PER_PAGE as usize];
            for (start, length) in ranges {
                let range = start..(start + length).min(BITS_PER_PAGE);
                page.set_range(range.clone());
                model[range.start as usize..range.end as usize].fill(true);
            }
            let mut rebuilt = vec![false; BITS_PER_PAGE as usize];
            let mut last_end = None;
            for run in page.runs() {
                prop_assert!(last_end.is_none_or(|end| run.start > end));
                last_end = Some(run.end);
                rebuilt[run.start as usize..run.end as usize].fill(true);
            }
            prop_assert_eq!(rebuilt, model);
        }

        #[test]
        fn a_page_survives_its_disk_form(ranges in proptest::collection::vec((0..BITS_PER_PAGE, 1..300u32), 0..20)) {
            let mut page = Page::boxed();
            for (start, length) in ranges {
                page.set_range(start..(start + length).min(BITS_PER_PAGE));
            }
            let mut bytes = [0u8; PAGE_BYTES];
            page.emit(&mut bytes);
            prop_assert_eq!(Page::parse(&bytes), page);
        }
    }
}
