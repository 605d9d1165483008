//! The SPDK host: the bdev module that runs the engine inside an SPDK application.
//! Compiled with the feature `spdk` only.
//!
//! `module` is what SPDK calls; `core` is a CPU and how anything gets in, `volume` the engine there, `io` what it asks of
//! bdevs. On core 0, `node` takes requests, `opening` looks at backing bdevs, `lifecycle` makes and ends volumes, `link`
//! reaches peers and `endpoint` lets them in; `frozen` and `silence` look after what does not answer; `role` and `ana` tell hosts which node serves.

mod access;
mod ana;
pub mod app;
mod awaited;
mod backing;
mod bdev;
mod connect;
mod context;
mod core;
mod ending;
mod endpoint;
mod frozen;
mod io;
mod lifecycle;
mod link;
mod log;
pub mod module;
mod node;
mod opening;
mod part;
mod role;
mod rpc;
mod silence;
pub mod sys;
mod trace;
mod volume;
