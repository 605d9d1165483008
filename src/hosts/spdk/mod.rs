//! The SPDK host: the bdev module that runs the engine inside an SPDK application.
//! Compiled with the feature `spdk` only.

pub mod app;
pub mod module;
pub mod sys;
