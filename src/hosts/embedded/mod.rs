//! The embedded host: a small polled runtime for machines without SPDK.

pub mod nvme_tcp;
pub mod rpc;
