//! The engine in simulated clusters.

mod basic;
mod cluster;
mod disk;
mod disk_faults;
mod link;
mod many;
mod orders;
mod pieces;
mod repeat;
mod slowness;
mod soak;
mod torn;
