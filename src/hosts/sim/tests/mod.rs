//! The engine in simulated clusters.

mod basic;
