//! JSON-RPC methods, parameters and errors: one implementation for all hosts.
//! Called by the hosts, which bring bytes or values in and carry answers out, and by the command line.
//! Must not know sockets of a host, reactors or bdevs.

pub mod client;
pub mod error;
pub mod parameters;
pub mod reply;
pub mod server;
pub mod volume;

pub use error::RpcError;
pub use reply::Reply;
