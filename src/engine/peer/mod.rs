//! The peer protocol: commands, states, and the handshake.

pub mod command;
pub mod handshake;
pub mod hello;
pub mod state;
