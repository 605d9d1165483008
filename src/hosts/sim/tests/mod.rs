//! The engine in simulated clusters.

mod basic;
mod disk;
mod soak;
mod torn;
