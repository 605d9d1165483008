//! On-disk metadata of a volume: where it lies, what it says, how it survives a crash.
//!
//! Called by the manager, by the channels (activity log) and by the offline tool. Bytes in, bytes out:
//! nothing here reads or writes a device. The bytes are described in `docs/metadata.md`.
//!
//! - [`layout`]: where everything lies on a backing device of a given size.
//! - [`superblock`]: the 4 KiB that say whose device it is and what state it is in.
//! - [`generation`]: the generations by which two nodes know whose data is newer.
//! - [`activity_log`]: which extents may be different after a crash.
//! - [`bitmap_page`]: one page of a peer's bitmap.
//! - [`format`](mod@format): the metadata of a fresh volume, and the order in which it is written.
//! - [`foreign`]: what a device already carries, so that nobody formats it by mistake.

pub mod activity_log;
pub mod bitmap_page;
pub mod block;
pub mod foreign;
pub mod format;
pub mod generation;
pub mod layout;
pub mod superblock;

#[cfg(test)]
mod torn_write_tests;

/// Highest number of peers of a volume; a peer slot is 0 to 6.
pub const MAX_PEERS: usize = 7;

/// Highest node id; a cluster has at most eight nodes.
pub const MAX_NODE_ID: u8 = 7;
