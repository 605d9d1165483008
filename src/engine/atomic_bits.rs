//! A sparse bitmap that all cores share: "stale here", outstanding pulls, marks, served entries, and the
//! words of the range lock. Its users decide what a bit means; it knows of no volume and no peer.

use core::ops::Range;

use super::bitmap::words::word_masks;
use super::sync::{self, AtomicU64};

/// Words of one page. Under loom every atomic costs states, so a page is a single word there.
#[cfg(not(loom))]
const WORDS_PER_PAGE: usize = 512;
#[cfg(loom)]
const WORDS_PER_PAGE: usize = 1;

const BITS_PER_PAGE: u64 = WORDS_PER_PAGE as u64 * 64;

type Words = [AtomicU64; WORDS_PER_PAGE];

fn words_of(value: u64) -> Words {
    core::array::from_fn(|_| AtomicU64::new(value))
}

/// Where the words of a page are, once somebody has touched it.
#[cfg(not(loom))]
struct Slot(once_cell::race::OnceBox<Words>);

#[cfg(not(loom))]
impl Slot {
    fn new() -> Slot {
        Slot(once_cell::race::OnceBox::new())
    }

    #[inline]
    fn get(&self) -> Option<&Words> {
        self.0.get()
    }

    #[inline]
    fn get_or_create(&self, value: u64) -> &Words {
        self.0.get_or_init(|| Box::new(words_of(value)))
    }
}

/// loom cannot see into `OnceBox`: the words are there from the start.
#[cfg(loom)]
struct Slot(Words);

#[cfg(loom)]
impl Slot {
    fn new() -> Slot {
        Slot(words_of(0))
    }

    fn get(&self) -> Option<&Words> {
        Some(&self.0)
    }

    fn get_or_create(&self, _value: u64) -> &Words {
        &self.0
    }
}

/// A bitmap of atomics in pages of 4 KiB that are allocated when first touched and live as long as it.
///
/// Every operation is lock-free and sequentially consistent: a core that sets a bit in one bitmap and
/// then finds a bit of another one clear can rely on it that a core which does the reverse sees the
/// first core's bit. An operation on a range that spans words is not atomic as a whole.
///
/// A range that reaches past the last bit is a mistake of the caller and panics.
pub struct AtomicBits {
    bits: u64,
    slots: Box<[Slot]>,
    /// One bit per page that may hold set bits. `OnceBox` publishes with acquire and release only: a
    /// core could find a page missing after another one has set a bit in it, outside of the total
    /// order. So "missing" is read here, where it is ordered.
    present: Box<[AtomicU64]>,
}

impl core::fmt::Debug for AtomicBits {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("AtomicBits")
            .field("bits", &self.bits)
            .finish_non_exhaustive()
    }
}

impl AtomicBits {
    /// `bits` clear bits. Costs 8 bytes and a bit per 32768 bits until something is set.
    pub fn new(bits: u64) -> AtomicBits {
        let pages = bits.div_ceil(BITS_PER_PAGE) as usize;
        AtomicBits {
            bits,
            slots: (0..pages).map(|_| Slot::new()).collect(),
            present: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// How many bits there are.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    #[inline]
    pub(super) fn check(&self, range: &Range<u64>) {
        assert!(
            range.end <= self.bits,
            "bits {range:?} of a bitmap of {}",
            self.bits
        );
    }

    /// The page if anybody has set a bit in it.
    #[inline]
    fn existing(&self, page: usize) -> Option<&Words> {
        if sync::load(&self.present[page / 64]) >> (page % 64) & 1 == 0 {
            return None;
        }
        self.slots[page].get()
    }

    /// The page, made now with all words `value` if it was missing.
    #[inline]
    fn created(&self, page: usize, value: u64) -> &Words {
        let words = self.slots[page].get_or_create(value);
        let present = &self.present[page / 64];
        let mask = 1 << (page % 64);
        if sync::load(present) & mask == 0 {
            sync::fetch_or(present, mask);
        }
        words
    }

    /// Word `index` if its page exists; all its bits are clear otherwise.
    #[inline]
    pub(super) fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.existing(index / WORDS_PER_PAGE)
            .map(|words| &words[index % WORDS_PER_PAGE])
    }

    /// Word `index`, to set bits in.
    #[inline]
    pub(super) fn word_to_set(&self, index: usize) -> &AtomicU64 {
        &self.created(index / WORDS_PER_PAGE, 0)[index % WORDS_PER_PAGE]
    }

    /// Sets every bit of `range`.
    #[inline]
    pub fn set_range(&self, range: Range<u64>) {
        self.check(&range);
        for (index, mask) in word_masks(range) {
            sync::fetch_or(self.word_to_set(index), mask);
        }
    }

    /// Clears every bit of `range`. Words without a set bit in it are only read.
    #[inline]
    pub fn clear_range(&self, range: Range<u64>) {
        self.check(&range);
        for (index, mask) in word_masks(range) {
            let word = self.word(index);
            if let Some(word) = word.filter(|word| sync::load(word) & mask != 0) {
                sync::fetch_and(word, !mask);
            }
        }
    }

    /// Whether any bit of `range` is set.
    #[inline]
    pub fn any(&self, range: Range<u64>) -> bool {
        self.check(&range);
        word_masks(range).any(|(index, mask)| {
            self.word(index)
                .is_some_and(|word| sync::load(word) & mask != 0)
        })
    }

    /// Whether `bit` is set.
    #[inline]
    pub fn test(&self, bit: u64) -> bool {
        assert!(bit < self.bits, "bit {bit} of a bitmap of {}", self.bits);
        self.any(bit..bit + 1)
    }

    /// How many bits of `range` are set. Exact only while nobody changes them.
    pub fn count(&self, range: Range<u64>) -> u64 {
        self.check(&range);
        let mut count = 0;
        let mut from = range.start;
        while from < range.end {
            let page_end = (from / BITS_PER_PAGE + 1) * BITS_PER_PAGE;
            let end = page_end.min(range.end);
            if let Some(words) = self.existing((from / BITS_PER_PAGE) as usize) {
                for (index, mask) in word_masks(from..end) {
                    let word = sync::load(&words[index % WORDS_PER_PAGE]);
                    count += u64::from((word & mask).count_ones());
                }
            }
            from = end;
        }
        count
    }

    /// The first set bit of `from..end`.
    pub fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        self.check(&(from..end));
        let mut from = from;
        while from < end {
            let page = from / BITS_PER_PAGE;
            let page_end = (page + 1) * BITS_PER_PAGE;
            if let Some(words) = self.existing(page as usize) {
                for (index, mask) in word_masks(from..page_end.min(end)) {
                    let found = sync::load(&words[index % WORDS_PER_PAGE]) & mask;
                    if found != 0 {
                        return Some(index as u64 * 64 + u64::from(found.trailing_zeros()));
                    }
                }
            }
            from = page_end;
        }
        None
    }

    /// Clears everything. Pages stay allocated.
    pub fn clear_all(&self) {
        for page in 0..self.slots.len() {
            for word in self.existing(page).into_iter().flatten() {
                if sync::load(word) != 0 {
                    sync::store(word, 0);
                }
            }
        }
    }

    /// Sets everything, and so allocates all pages: 1 MiB of memory per 8 Mi bits.
    pub fn set_all(&self) {
        let full_pages = self.bits / BITS_PER_PAGE;
        for page in 0..full_pages as usize {
            for word in self.created(page, u64::MAX) {
                if sync::load(word) != u64::MAX {
                    sync::store(word, u64::MAX);
                }
            }
        }
        self.set_range(full_pages * BITS_PER_PAGE..self.bits);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const BITS: u64 = 3 * 32768 + 77;

    #[test]
    fn nothing_is_allocated_until_a_bit_is_set() {
        let bits = AtomicBits::new(1 << 28);
        bits.clear_range(0..1 << 28);
        bits.clear_all();
        assert!(!bits.any(0..1 << 28));
        assert!(bits.slots.iter().all(|slot| slot.get().is_none()));
        bits.set_range(40_000..40_001);
        let pages = bits.slots.iter().filter(|slot| slot.get().is_some());
        assert_eq!(pages.count(), 1);
    }

    #[test]
    fn set_all_sets_every_bit_and_clear_all_none() {
        let bits = AtomicBits::new(BITS);
        bits.set_range(5..9);
        bits.set_all();
        assert_eq!(bits.count(0..BITS), BITS);
        assert!(bits.test(BITS - 1));
        bits.clear_all();
        assert_eq!(bits.count(0..BITS), 0);
        assert_eq!(bits.next_set(0, BITS), None);
    }

    #[test]
    fn an_empty_range_touches_nothing() {
        let bits = AtomicBits::new(100);
        bits.set_range(50..50);
        assert!(!bits.any(0..100));
        bits.set_all();
        bits.clear_range(50..50);
        assert!(!bits.any(50..50));
        assert_eq!(bits.count(0..100), 100);
    }

    #[test]
    #[should_panic(expected = "of a bitmap of 100")]
    fn a_range_past_the_end_panics() {
        AtomicBits::new(100).set_range(99..101);
    }

    #[test]
    fn bits_set_by_many_threads_in_one_word_are_all_there() {
        let bits = AtomicBits::new(BITS);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let bits = &bits;
                scope.spawn(move || {
                    for bit in (thread..BITS).step_by(4) {
                        bits.set_range(bit..bit + 1);
                    }
                });
            }
        });
        assert_eq!(bits.count(0..BITS), BITS);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_set_of_integers(
            operations in proptest::collection::vec((any::<bool>(), 0..BITS, 0..200u64), 1..40),
            from in 0..BITS,
        ) {
            let bits = AtomicBits::new(BITS);
            let mut model = BTreeSet::new();
            for (set, start, length) in operations {
                let range = start..(start + length).min(BITS);
                if set {
                    bits.set_range(range.clone());
                    model.extend(range);
                } else {
                    bits.clear_range(range.clone());
                    model.retain(|bit| !range.contains(bit));
                }
            }
            prop_assert_eq!(bits.count(0..BITS), model.len() as u64);
            prop_assert_eq!(bits.count(from..BITS), model.range(from..).count() as u64);
            prop_assert_eq!(bits.any(from..BITS), model.range(from..).next().is_some());
            let mut found = Vec::new();
            let mut next = from;
            while let Some(bit) = bits.next_set(next, BITS) {
                prop_assert!(bits.test(bit));
                found.push(bit);
                next = bit + 1;
            }
            prop_assert_eq!(found, model.range(from..).copied().collect::<Vec<_>>());
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn loom_two_bitmaps_set_then_look_never_both_miss() {
        loom::model(|| {
            let here = Arc::new(AtomicBits::new(64));
            let there = Arc::new(AtomicBits::new(64));
            let other = {
                let (here, there) = (here.clone(), there.clone());
                thread::spawn(move || {
                    there.set_range(3..5);
                    here.any(4..6)
                })
            };
            here.set_range(4..6);
            let saw = there.any(3..5);
            assert!(other.join().unwrap() || saw);
        });
    }

    #[test]
    fn loom_setting_and_clearing_neighbours_in_a_word_loses_nothing() {
        loom::model(|| {
            let bits = Arc::new(AtomicBits::new(64));
            bits.set_range(0..2);
            let other = {
                let bits = bits.clone();
                thread::spawn(move || bits.clear_range(0..2))
            };
            bits.set_range(2..4);
            other.join().unwrap();
            assert_eq!(bits.count(0..64), 2);
            assert!(bits.test(2) && bits.test(3));
        });
    }
}
