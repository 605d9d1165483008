//! The hosts of the engine. A host never knows another host; what they have in common is in `control`.

pub mod control;
pub mod embedded;
pub mod sim;
#[cfg(feature = "spdk")]
pub mod spdk;
