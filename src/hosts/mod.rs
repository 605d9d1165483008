//! The hosts of the engine. A host never knows another host; what they have in common is in `control` and `slab`.

pub mod control;
pub mod embedded;
pub mod sim;
pub mod slab;
#[cfg(feature = "spdk")]
pub mod spdk;
