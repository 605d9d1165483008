//! The embedded host: a small polled runtime for machines without SPDK.
//!
//! A [`node`] is one [`reactor`] thread per core; each owns a [`core`], reaches the others by
//! [`message`], and drives [`disk`]s and sockets through its own [`ring`]. [`bdev`] is what an I/O and
//! its answer look like, [`registry`] the names that the control path knows. [`target`] serves bdevs to
//! hosts, [`initiator`] reaches other nodes.

pub mod admin;
pub mod bdev;
pub mod core;
pub mod disk;
pub mod initiator;
pub mod listener;
pub mod malloc;
pub mod message;
pub mod node;
pub mod nvme_tcp;
pub mod reactor;
pub mod registry;
pub mod remote;
pub mod ring;
pub mod rpc;
pub mod socket;
pub mod target;
pub mod timer;
pub mod volume;
