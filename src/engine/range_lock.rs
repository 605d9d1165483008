//! The range lock of a volume: two writes that overlap are never in flight together, on any core.
//! Channels take it before a write, a resync write or a source's read; it knows nothing of requests.

use core::ops::Range;

use super::atomic_bits::AtomicBits;
use super::bitmap::words::word_masks;
use super::sync;

/// Bytes that one bit of the range lock stands for.
pub const GRANULE_BYTES: u64 = 4096;

/// A lock over ranges of granules, all of a range or none, that never blocks: whoever fails tries again
/// from its poller. There are no owners: a range is given back exactly as it was taken.
///
/// A waiter that has failed a few times calls [`try_reserve`](RangeLock::try_reserve) and goes on with
/// [`try_lock_reserved`](RangeLock::try_lock_reserved): newcomers then fail on these granules, so those
/// who hold them drain and the waiter gets its turn. Of two overlapping reservations the second one
/// fails, and its waiter remains a plain one until the first is served.
///
/// So under writes that never pause one waiter could find the range reserved by another one each time it looks. A
/// resync must not: it [presses](RangeLock::try_lock_pressing), which needs no turn of its own. From then on nobody
/// else locks or reserves a granule of its range; who has done so already is waited for.
///
/// Sequentially consistent with every [`AtomicBits`]: "lock, then look into a bitmap" on one core and
/// "set in that bitmap, then look at the lock" on another never miss each other both.
///
/// A range past the last granule is a mistake of the caller and panics.
#[derive(Debug)]
pub struct RangeLock {
    locked: AtomicBits,
    reserved: AtomicBits,
    pressed: AtomicBits,
}

impl RangeLock {
    /// A lock over `granules` granules. Memory grows with the parts of the volume that are used: 4 KiB
    /// for each 128 MiB.
    pub fn new(granules: u64) -> RangeLock {
        RangeLock {
            locked: AtomicBits::new(granules),
            reserved: AtomicBits::new(granules),
            pressed: AtomicBits::new(granules),
        }
    }

    /// How many granules there are.
    pub fn granules(&self) -> u64 {
        self.locked.bits()
    }

    /// Takes all of `range`, or nothing: then a granule of it is locked, or a waiter keeps it. It can
    /// also fail because another attempt that fails is just giving its part back.
    #[inline]
    pub fn try_lock(&self, range: Range<u64>) -> bool {
        !self.pressed.any(range.clone())
            && !self.reserved.any(range.clone())
            && claim(&self.locked, range)
    }

    /// Gives back `range`, taken before as this same range.
    #[inline]
    pub fn unlock(&self, range: Range<u64>) {
        give_back(&self.locked, range);
    }

    /// Whether any granule of `range` is locked (for a moment, by a failing attempt, too).
    #[inline]
    pub fn is_locked(&self, range: Range<u64>) -> bool {
        self.locked.any(range)
    }

    /// Keeps newcomers off all of `range`, or off nothing: then somebody else has reserved a part of it.
    pub fn try_reserve(&self, range: Range<u64>) -> bool {
        !self.pressed.any(range.clone()) && claim(&self.reserved, range)
    }

    /// Takes `range`, reserved before as this same range, and ends the reservation; or leaves it
    /// reserved and returns false while somebody holds a granule of it.
    pub fn try_lock_reserved(&self, range: Range<u64>) -> bool {
        let taken = claim(&self.locked, range.clone());
        if taken {
            give_back(&self.reserved, range);
        }
        taken
    }

    /// Ends a reservation without taking the lock: the waiter has gone.
    pub fn cancel_reservation(&self, range: Range<u64>) {
        give_back(&self.reserved, range);
    }

    /// Takes `range`; or keeps newcomers off all of it until that succeeds or is given up. Two that press on the same
    /// granules take it from each other, and press again with their next attempt.
    pub fn try_lock_pressing(&self, range: Range<u64>) -> bool {
        let taken = !self.reserved.any(range.clone()) && claim(&self.locked, range.clone());
        if taken {
            self.pressed.clear_range(range);
        } else {
            self.pressed.set_range(range);
        }
        taken
    }

    /// Whoever pressed has gone.
    pub fn stop_pressing(&self, range: Range<u64>) {
        self.pressed.clear_range(range);
    }
}

/// Sets all bits of `range` if none was set. Words are taken in ascending order, so of several attempts
/// that meet, the one that is furthest up is not stopped by another one's failure.
#[inline]
fn claim(bits: &AtomicBits, range: Range<u64>) -> bool {
    bits.check(&range);
    for (index, mask) in word_masks(range.clone()) {
        let word = bits.word_to_set(index);
        // Looking first keeps the usual conflict from showing bits that are taken back at once.
        let mut before = sync::load(word);
        if before & mask == 0 {
            before = sync::fetch_or(word, mask);
            if before & mask == 0 {
                continue;
            }
            // Only what this attempt has set: the bits of `before` are somebody else's.
            sync::fetch_and(word, !(mask & !before));
        }
        give_back(bits, range.start..(index as u64 * 64).max(range.start));
        return false;
    }
    true
}

#[inline]
fn give_back(bits: &AtomicBits, range: Range<u64>) {
    bits.check(&range);
    for (index, mask) in word_masks(range) {
        let before = sync::fetch_and(bits.word_to_set(index), !mask);
        debug_assert_eq!(before & mask, mask, "given back without having been taken");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn overlapping_ranges_exclude_each_other_and_neighbours_do_not() {
        let lock = RangeLock::new(1000);
        assert!(lock.try_lock(60..130));
        assert!(!lock.try_lock(129..131));
        assert!(!lock.try_lock(0..61));
        assert!(!lock.try_lock(64..65));
        assert!(lock.try_lock(130..200));
        assert!(lock.try_lock(0..60));
        lock.unlock(60..130);
        assert!(lock.try_lock(129..130));
    }

    #[test]
    fn a_failed_attempt_leaves_no_granule_behind() {
        let lock = RangeLock::new(1000);
        assert!(lock.try_lock(500..501));
        assert!(!lock.try_lock(100..600));
        assert!(!lock.is_locked(0..500));
        assert!(!lock.is_locked(501..1000));
        assert!(lock.is_locked(500..501));
        // In the word of the conflict itself, too.
        assert!(!lock.try_lock(490..510));
        assert!(lock.try_lock(490..500));
        assert!(lock.try_lock(501..510));
    }

    #[test]
    fn an_empty_range_is_always_free() {
        let lock = RangeLock::new(10);
        assert!(lock.try_lock(0..10));
        assert!(lock.try_lock(5..5));
        lock.unlock(5..5);
        assert!(lock.is_locked(5..6));
    }

    #[test]
    #[should_panic(expected = "of a bitmap of 10")]
    fn a_range_past_the_end_panics() {
        RangeLock::new(10).try_lock(5..11);
    }

    #[test]
    fn a_reservation_lets_holders_drain_and_keeps_newcomers_out() {
        let lock = RangeLock::new(256);
        assert!(lock.try_lock(0..2));
        assert!(lock.try_lock(100..102));
        assert!(lock.try_reserve(0..128));
        assert!(!lock.try_lock_reserved(0..128));
        lock.unlock(0..2);
        assert!(!lock.try_lock(0..2), "a newcomer overtakes the waiter");
        assert!(lock.try_lock(128..130), "outside of the reservation");
        assert!(!lock.try_lock_reserved(0..128));
        lock.unlock(100..102);
        assert!(lock.try_lock_reserved(0..128));
        lock.unlock(0..128);
        assert!(
            lock.try_lock(0..128),
            "the reservation outlived its service"
        );
    }

    #[test]
    fn whoever_presses_waits_for_those_who_were_there_and_for_nobody_else() {
        let lock = RangeLock::new(256);
        assert!(lock.try_lock(0..2));
        assert!(lock.try_reserve(0..10));
        assert!(!lock.try_lock_pressing(5..20));
        assert!(!lock.try_lock(15..16), "a newcomer overtakes it");
        assert!(!lock.try_reserve(15..30), "a later waiter overtakes it");
        assert!(lock.try_lock(20..22), "outside of its range");
        lock.unlock(0..2);
        assert!(!lock.try_lock_pressing(5..20), "it overtakes a waiter");
        assert!(lock.try_lock_reserved(0..10));
        assert!(!lock.try_lock_pressing(5..20));
        lock.unlock(0..10);
        assert!(!lock.try_lock(5..6));
        assert!(lock.try_lock_pressing(5..20));
        assert!(!lock.try_lock(5..6));
        lock.unlock(5..20);
        assert!(lock.try_lock(5..20), "it presses still");
        assert!(!lock.try_lock_pressing(0..6));
        lock.stop_pressing(0..6);
        assert!(lock.try_lock(0..5));
    }

    #[test]
    fn the_second_of_two_overlapping_reservations_fails_whole() {
        let lock = RangeLock::new(256);
        assert!(lock.try_reserve(100..120));
        assert!(!lock.try_reserve(10..101));
        assert!(lock.try_lock(10..100), "the failed one has left something");
        assert!(lock.try_reserve(10..100));
        lock.cancel_reservation(10..100);
        lock.cancel_reservation(100..120);
        assert!(lock.try_lock(100..120));
    }

    #[test]
    fn two_threads_never_hold_the_same_granule() {
        use std::sync::atomic::{AtomicU32, Ordering};
        const GRANULES: u64 = 200;
        let lock = RangeLock::new(GRANULES);
        let holders: Vec<AtomicU32> = (0..GRANULES).map(|_| AtomicU32::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 0..3u64 {
                let (lock, holders) = (&lock, &holders);
                scope.spawn(move || {
                    let mut random = thread + 1;
                    for _ in 0..5_000 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                        let start = (random >> 33) % GRANULES;
                        let end = (start + 1 + (random >> 20) % 100).min(GRANULES);
                        if lock.try_lock(start..end) {
                            for granule in start..end {
                                let before =
                                    holders[granule as usize].fetch_add(1, Ordering::SeqCst);
                                assert_eq!(before, 0);
                            }
                            for granule in start..end {
                                holders[granule as usize].fetch_sub(1, Ordering::SeqCst);
                            }
                            lock.unlock(start..end);
                        }
                    }
                });
            }
        });
        assert!(!lock.is_locked(0..GRANULES));
    }

    proptest! {
        #[test]
        fn a_lock_succeeds_exactly_when_no_granule_is_held(
            ranges in proptest::collection::vec((0..300u64, 0..150u64), 1..60),
        ) {
            let lock = RangeLock::new(300);
            let mut held: Vec<Range<u64>> = Vec::new();
            for (start, length) in ranges {
                let range = start..(start + length).min(300);
                let overlap = held
                    .iter()
                    .any(|other| range.start.max(other.start) < range.end.min(other.end));
                prop_assert_eq!(lock.try_lock(range.clone()), !overlap);
                if !overlap {
                    held.push(range);
                } else if length % 3 == 0 {
                    lock.unlock(held.swap_remove(0));
                }
            }
            for range in held {
                lock.unlock(range);
            }
            prop_assert!(!lock.is_locked(0..300));
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::thread;

    /// Takes `range` if it can, and shows through `holders` whether somebody else is inside.
    fn enter(lock: &RangeLock, holders: &AtomicU32, range: Range<u64>) -> bool {
        if !lock.try_lock(range.clone()) {
            return false;
        }
        assert_eq!(holders.fetch_add(1, Ordering::Relaxed), 0);
        holders.fetch_sub(1, Ordering::Relaxed);
        lock.unlock(range);
        true
    }

    #[test]
    fn loom_two_overlapping_lockers_never_both_hold() {
        loom::model(|| {
            let lock = Arc::new(RangeLock::new(128));
            let holders = Arc::new(AtomicU32::new(0));
            let other = {
                let (lock, holders) = (lock.clone(), holders.clone());
                thread::spawn(move || enter(&lock, &holders, 63..66))
            };
            enter(&lock, &holders, 65..70);
            other.join().unwrap();
            assert!(!lock.is_locked(0..128));
        });
    }

    #[test]
    fn loom_a_rollback_does_not_lose_the_other_ones_lock() {
        loom::model(|| {
            let lock = Arc::new(RangeLock::new(64));
            let other = {
                let lock = lock.clone();
                thread::spawn(move || lock.try_lock(0..8))
            };
            let mine = lock.try_lock(4..12);
            let others = other.join().unwrap();
            assert!(!(mine && others));
            assert_eq!(lock.is_locked(0..4), others);
            assert_eq!(lock.is_locked(4..8), mine || others);
            assert_eq!(lock.is_locked(8..12), mine);
        });
    }

    #[test]
    fn loom_disjoint_lockers_in_one_word_both_succeed() {
        loom::model(|| {
            let lock = Arc::new(RangeLock::new(64));
            let other = {
                let lock = lock.clone();
                thread::spawn(move || lock.try_lock(0..8))
            };
            assert!(lock.try_lock(8..16));
            assert!(other.join().unwrap());
            lock.unlock(0..8);
            assert!(lock.is_locked(8..16) && !lock.is_locked(0..8));
        });
    }

    #[test]
    fn loom_a_reservation_excludes_newcomers() {
        loom::model(|| {
            let lock = Arc::new(RangeLock::new(64));
            assert!(lock.try_lock(0..2));
            assert!(lock.try_reserve(0..4));
            let newcomer = {
                let lock = lock.clone();
                thread::spawn(move || lock.try_lock(1..6))
            };
            lock.unlock(0..2);
            assert!(lock.try_lock_reserved(0..4), "a newcomer has come first");
            assert!(!newcomer.join().unwrap(), "both hold the range");
        });
    }

    #[test]
    fn loom_pressing_excludes_newcomers() {
        loom::model(|| {
            let lock = Arc::new(RangeLock::new(64));
            assert!(lock.try_lock(0..2));
            assert!(!lock.try_lock_pressing(0..4));
            let newcomer = {
                let lock = lock.clone();
                thread::spawn(move || lock.try_lock(1..6))
            };
            lock.unlock(0..2);
            assert!(lock.try_lock_pressing(0..4), "a newcomer has come first");
            assert!(!newcomer.join().unwrap(), "both hold the range");
        });
    }

    #[test]
    fn loom_lock_then_look_and_set_then_look_never_both_miss() {
        loom::model(|| {
            let lock = Arc::new(RangeLock::new(64));
            let outstanding = Arc::new(AtomicBits::new(64));
            let puller = {
                let (lock, outstanding) = (lock.clone(), outstanding.clone());
                thread::spawn(move || {
                    outstanding.set_range(0..4);
                    lock.is_locked(0..4)
                })
            };
            assert!(lock.try_lock(2..6));
            let writer_saw = outstanding.any(2..6);
            assert!(puller.join().unwrap() || writer_saw);
        });
    }
}
