//! The replication engine: deterministic state machines without threads, clocks, sockets or files.
//!
//! - [`channel`]: a volume on one core, on the I/O path; [`request`] is what it works on, [`view`] what it goes by.
//! - [`manager`]: the one owner of a volume's truth; [`message`] is what it and the channels tell each other.
//! - [`volume`]: what all cores share; [`range_lock`], [`atomic_bits`] and [`duplicates`] are made of atomics.
//! - [`bitmap`], [`meta`], [`peer`]: what a peer misses, what is on disk, what is on the wire.
//! - [`open`]: a backing device before there is a volume.
//! - [`mutation`]: breaks, for the test that shows that the simulator notices each.

#![forbid(unsafe_code)]

pub mod atomic_bits;
pub mod bitmap;
pub mod channel;
pub mod duplicates;
pub mod manager;
pub mod message;
pub mod meta;
pub mod mutation;
pub mod open;
pub mod peer;
pub mod range_lock;
pub mod request;
pub mod sync;
pub mod view;
pub mod volume;

pub use meta::MAX_PEERS;
