//! Which commands of a session have been begun and applied, so that a transport that sends one again
//! gets it applied once. The endpoint asks on every core; it knows sequences only, no command. What goes to
//! the manager is known there (`manager/known.rs`).

use super::sync::{self, AtomicU64};

const IN_FLIGHT: u64 = 1;
const APPLIED: u64 = 2;
const ABANDONED: u64 = 3;
const FAILED: u64 = 4;
const STATE_BITS: u32 = 3;
const STATE_MASK: u64 = (1 << STATE_BITS) - 1;

/// What [`DuplicateWindow::begin`] says of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Never seen: the caller has claimed it and ends with `applied`, `failed` or `abandon`.
    Fresh,
    /// Applied before: answer, do not apply.
    Applied,
    /// Failed before, perhaps half-way: answer, do not apply.
    Failed,
    /// Somebody is applying it: join, or have it sent again later.
    InFlight,
    /// Its place is taken by an older one still in flight: have it sent again later.
    Busy,
    /// Its place is taken by a newer one: so old that nothing is known of it. A sender that keeps fewer
    /// commands under way than the window holds never meets this.
    TooOld,
}

/// The last `capacity` sequences of a session, shared by all cores, lock-free.
///
/// Sequence `s` lives in the entry `s mod capacity` as one word, `(s / capacity) << 3 | state`; zero is
/// an entry that was never used. An abandoned sequence keeps its entry, so that what it had replaced is
/// still known to be too old.
pub struct DuplicateWindow {
    entries: Box<[AtomicU64]>,
    capacity_log2: u32,
}

impl core::fmt::Debug for DuplicateWindow {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DuplicateWindow")
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

impl DuplicateWindow {
    /// What is kept unless somebody needs otherwise: 512 KiB.
    pub const DEFAULT_CAPACITY: usize = 65536;

    /// An empty window over `capacity` sequences, a power of two of at least 8 (panics otherwise: with
    /// fewer, three bits of state would not fit beside a 64-bit sequence).
    pub fn new(capacity: usize) -> DuplicateWindow {
        assert!(
            capacity.is_power_of_two() && capacity >= 1 << STATE_BITS,
            "capacity {capacity} is not a power of two of at least 8"
        );
        DuplicateWindow {
            entries: (0..capacity).map(|_| AtomicU64::new(0)).collect(),
            capacity_log2: capacity.trailing_zeros(),
        }
    }

    /// How many sequences are remembered.
    pub fn capacity(&self) -> usize {
        self.entries.len()
    }

    #[inline]
    fn entry(&self, sequence: u64) -> (&AtomicU64, u64) {
        let index = sequence as usize & (self.entries.len() - 1);
        (&self.entries[index], sequence >> self.capacity_log2)
    }

    /// Claims `sequence`, or says why not.
    #[inline]
    pub fn begin(&self, sequence: u64) -> Begin {
        let (entry, lap) = self.entry(sequence);
        let claimed = lap << STATE_BITS | IN_FLIGHT;
        let mut current = sync::load(entry);
        loop {
            let state = current & STATE_MASK;
            if current != 0 {
                match (current >> STATE_BITS).cmp(&lap) {
                    core::cmp::Ordering::Greater => return Begin::TooOld,
                    core::cmp::Ordering::Less if state == IN_FLIGHT => return Begin::Busy,
                    core::cmp::Ordering::Equal if state == IN_FLIGHT => return Begin::InFlight,
                    core::cmp::Ordering::Equal if state == APPLIED => return Begin::Applied,
                    core::cmp::Ordering::Equal if state == FAILED => return Begin::Failed,
                    _ => {}
                }
            }
            match sync::compare_exchange(entry, current, claimed) {
                Ok(_) => return Begin::Fresh,
                Err(now) => current = now,
            }
        }
    }

    /// The claimed `sequence` has been applied.
    #[inline]
    pub fn applied(&self, sequence: u64) {
        self.finish(sequence, APPLIED);
    }

    /// The claimed `sequence` has failed for good: it will not be tried again.
    #[inline]
    pub fn failed(&self, sequence: u64) {
        self.finish(sequence, FAILED);
    }

    /// The claimed `sequence` was not applied after all; when it is sent again it is fresh.
    #[inline]
    pub fn abandon(&self, sequence: u64) {
        self.finish(sequence, ABANDONED);
    }

    /// While a sequence is in flight only its claimer changes the entry. An end without a claim (a late
    /// one, after a reset) changes nothing.
    fn finish(&self, sequence: u64, state: u64) {
        let (entry, lap) = self.entry(sequence);
        let ended = sync::compare_exchange(
            entry,
            lap << STATE_BITS | IN_FLIGHT,
            lap << STATE_BITS | state,
        );
        debug_assert!(ended.is_ok(), "sequence {sequence} ended without a claim");
    }

    /// Forgets everything, for a new session. Only while no channel uses it: the old session's commands
    /// have ended, and all channels have adopted the fence.
    pub fn reset(&self) {
        for entry in &self.entries {
            sync::store(entry, 0);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_fresh_once() {
        let window = DuplicateWindow::new(8);
        assert_eq!(window.begin(1), Begin::Fresh);
        assert_eq!(window.begin(1), Begin::InFlight);
        window.applied(1);
        assert_eq!(window.begin(1), Begin::Applied);
        assert_eq!(window.begin(2), Begin::Fresh);
        window.failed(2);
        assert_eq!(window.begin(2), Begin::Failed);
    }

    #[test]
    fn an_abandoned_sequence_is_fresh_again_but_what_it_replaced_is_not() {
        let window = DuplicateWindow::new(8);
        assert_eq!(window.begin(1), Begin::Fresh);
        window.applied(1);
        assert_eq!(window.begin(9), Begin::Fresh);
        window.abandon(9);
        assert_eq!(window.begin(1), Begin::TooOld);
        assert_eq!(window.begin(9), Begin::Fresh);
        window.applied(9);
        assert_eq!(window.begin(9), Begin::Applied);
    }

    #[test]
    fn a_newer_sequence_waits_for_an_older_one_in_flight() {
        let window = DuplicateWindow::new(8);
        assert_eq!(window.begin(3), Begin::Fresh);
        assert_eq!(window.begin(11), Begin::Busy);
        window.applied(3);
        assert_eq!(window.begin(11), Begin::Fresh);
        assert_eq!(window.begin(3), Begin::TooOld);
        window.applied(11);
        assert_eq!(window.begin(3), Begin::TooOld);
    }

    #[test]
    fn any_number_is_a_valid_sequence() {
        let window = DuplicateWindow::new(8);
        for sequence in [0, 1, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
            let window = DuplicateWindow::new(8);
            assert_eq!(window.begin(sequence), Begin::Fresh);
            window.applied(sequence);
            assert_eq!(window.begin(sequence), Begin::Applied);
        }
        assert_eq!(window.begin(u64::MAX), Begin::Fresh);
        assert_eq!(window.begin(7), Begin::TooOld);
    }

    #[test]
    fn a_reset_forgets() {
        let window = DuplicateWindow::new(8);
        assert_eq!(window.begin(9), Begin::Fresh);
        window.applied(9);
        window.reset();
        assert_eq!(window.begin(1), Begin::Fresh);
        assert_eq!(window.begin(2), Begin::Fresh);
    }

    #[test]
    #[should_panic(expected = "power of two")]
    fn a_capacity_that_is_no_power_of_two_panics() {
        DuplicateWindow::new(6);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::engine::sync::Ordering;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn loom_of_two_that_begin_the_same_sequence_one_is_fresh() {
        loom::model(|| {
            let window = Arc::new(DuplicateWindow::new(8));
            let run = |window: &DuplicateWindow| {
                let begin = window.begin(1);
                if begin == Begin::Fresh {
                    window.applied(1);
                }
                begin
            };
            let other = {
                let window = window.clone();
                thread::spawn(move || run(&window))
            };
            let both = [run(&window), other.join().unwrap()];
            let fresh = both.iter().filter(|begin| **begin == Begin::Fresh);
            assert_eq!(fresh.count(), 1, "{both:?}");
            assert!(!both.contains(&Begin::Busy) && !both.contains(&Begin::TooOld));
            assert_eq!(window.begin(1), Begin::Applied);
        });
    }

    #[test]
    fn loom_a_newer_sequence_never_replaces_one_in_flight() {
        loom::model(|| {
            let window = Arc::new(DuplicateWindow::new(8));
            let in_flight = Arc::new(AtomicU64::new(0));
            let run = |window: &DuplicateWindow, in_flight: &AtomicU64, sequence| {
                let begin = window.begin(sequence);
                if begin == Begin::Fresh {
                    assert_eq!(in_flight.fetch_add(1, Ordering::Relaxed), 0);
                    in_flight.fetch_sub(1, Ordering::Relaxed);
                    window.applied(sequence);
                }
                begin
            };
            let other = {
                let (window, in_flight) = (window.clone(), in_flight.clone());
                thread::spawn(move || run(&window, &in_flight, 9))
            };
            let older = run(&window, &in_flight, 1);
            let newer = other.join().unwrap();
            match (older, newer) {
                (Begin::Fresh, Begin::Fresh) | (Begin::Fresh, Begin::Busy) => {}
                (Begin::TooOld, Begin::Fresh) => {}
                unexpected => panic!("{unexpected:?}"),
            }
        });
    }
}
