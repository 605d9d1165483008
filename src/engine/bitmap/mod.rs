//! Bitmaps of what a peer misses: per-core shards, the merged master, and their wire form.

pub mod master;
pub mod shard;
pub mod wire;
