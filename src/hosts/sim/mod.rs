//! The simulated host: whole clusters in one thread, in virtual time, out of one seed. Tests drive a [`World`]; the
//! engine in it is the real one and must not be able to tell.
//!
//! [`world`] has time and events; [`node`] is what the engine sees of a core; [`disk`] and [`link`] are what fails;
//! [`ledger`] knows what the application may read; [`coverage`] counts what has happened; [`campaign`] makes runs out of seeds and judges them.

pub mod campaign;
pub mod coverage;
pub mod disk;
pub mod ledger;
pub mod link;
pub mod memory;
pub mod minute;
pub mod node;
pub mod numbered;
pub mod random;
pub mod record;
pub mod world;

pub use world::{Config, World};

#[cfg(test)]
mod tests;
