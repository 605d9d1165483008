//! Trace points of a request's life, for spdk_trace.

use super::context::BdevIo;
use crate::engine::request::RequestKind;
use crate::host::AppStatus;

pub fn register() {}

pub fn submitted(_: BdevIo, _: RequestKind, _: u64, _: u32) {}

pub fn completed(_: BdevIo, _: AppStatus) {}
