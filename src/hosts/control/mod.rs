//! What every host does in the same way for the operator: requests become orders, devices are opened for a purpose, the
//! manager's state becomes a report and a configuration, and the endpoint has its names.
//! Called by the hosts that serve volumes. Functions without state, but for what waits for a bdev; must not
//! know any host.

#![forbid(unsafe_code)]

pub mod awaited;
pub mod config;
pub mod device;
pub mod endpoint;
pub mod order;
pub mod received;
pub mod refusal;
pub mod report;
pub mod split;
