//! The atomics of the few structures that cores share, switched to loom's under `cfg(loom)`.
//! `atomic_bits`, `range_lock` and `duplicates` use it; it knows nothing of what the words mean.
//!
//! Everything here is sequentially consistent, because the rules between structures are of the kind
//! "store here, then look there" on both sides (Dekker), for which acquire and release are not enough.
//! loom treats a sequentially consistent access as acquire/release only (loom's documentation of its
//! limits), so under loom a fence before each load stands for the total order of the hardware build. A
//! word that is read other than through `load` here therefore fails the models.

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use Ordering::SeqCst;

/// Loads `word` in the total order.
#[inline]
pub fn load(word: &AtomicU64) -> u64 {
    #[cfg(loom)]
    fence(SeqCst);
    word.load(SeqCst)
}

/// Stores `value` in the total order.
#[inline]
pub fn store(word: &AtomicU64, value: u64) {
    word.store(value, SeqCst);
}

/// Sets the bits of `mask`; the value before.
#[inline]
pub fn fetch_or(word: &AtomicU64, mask: u64) -> u64 {
    word.fetch_or(mask, SeqCst)
}

/// Keeps only the bits of `mask`; the value before.
#[inline]
pub fn fetch_and(word: &AtomicU64, mask: u64) -> u64 {
    word.fetch_and(mask, SeqCst)
}

/// Replaces `current` by `new`. `Err` holds what was there instead.
#[inline]
pub fn compare_exchange(word: &AtomicU64, current: u64, new: u64) -> Result<u64, u64> {
    word.compare_exchange(current, new, SeqCst, SeqCst)
}
