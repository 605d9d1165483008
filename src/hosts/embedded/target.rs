//! This core's connections of the NVMe/TCP target.

/// A request of a connection of this core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHandle {
    pub connection: u32,
    pub slot: u16,
    pub generation: u32,
}
