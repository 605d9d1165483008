//! On-disk metadata: where it lies, what it says, how it survives a crash.

pub mod activity_log;
pub mod generation;
pub mod layout;
pub mod superblock;
