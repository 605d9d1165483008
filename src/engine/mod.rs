//! The replication engine: deterministic state machines without threads, clocks, sockets or files.

#![forbid(unsafe_code)]

pub mod atomic_bits;
pub mod bitmap;
pub mod duplicates;
pub mod meta;
pub mod peer;
pub mod range_lock;
pub mod sync;
