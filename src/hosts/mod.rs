//! The hosts of the engine. A host never knows another host.

pub mod embedded;
pub mod sim;
