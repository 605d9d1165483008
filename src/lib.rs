//! bdev_repl keeps a block device identical on two or more nodes, in user space, in polled mode.
//!
//! From the bottom up:
//!
//! - [`engine`]: the replication itself. Deterministic state machines that are told things and ask for
//!   things: no threads, clocks, sockets, files or `unsafe`.
//! - [`host`]: the trait through which the engine asks for a disk, a peer, time and messages.
//! - [`hosts`]: what implements that trait. `embedded` is a small polled runtime of this crate.
//! - [`rpc`]: JSON-RPC methods, parameters and errors, one implementation for all hosts.
//! - [`cli`]: the command `bdev-repl`.

pub mod cli;
pub mod engine;
pub mod host;
pub mod hosts;
pub mod rpc;
