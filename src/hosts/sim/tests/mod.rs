//! The engine in simulated clusters.

mod basic;
mod soak;
