//! JSON-RPC of the embedded host: its socket, and the methods that SPDK has and users need here too.
//! Used by the node. Volume methods are `crate::rpc`'s.

pub mod socket;
