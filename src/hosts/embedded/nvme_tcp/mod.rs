//! NVMe over TCP as the NVMe Base, NVMe-oF and NVMe/TCP Transport specifications have it: a target, an
//! initiator, and what they share. State machines driven by a reactor: no threads, no clock, no waiting.
//! Only the blocking client waits; it is for tools and tests.

pub mod blocking;
pub mod buffer;
pub mod command;
pub mod controller;
pub mod identify;
pub mod initiator;
pub mod pdu;
pub mod stream;
pub mod target;
