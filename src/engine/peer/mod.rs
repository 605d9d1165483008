//! The peer protocol: commands, their data bodies, states, and the handshake.

pub mod answer;
pub mod body;
pub mod command;
pub mod fields;
pub mod handshake;
pub mod hello;
pub mod state;
