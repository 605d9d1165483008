//! Requests that a host refuses because of what it has and the engine does not know: names, claims, backing bdevs.
//! Called where a host looks at those, so that an operator reads the same on every host.

use crate::rpc::RpcError;

/// A volume cannot have the name of a bdev.
pub fn bdev_exists(name: &str) -> RpcError {
    RpcError::exists(format!("a bdev {name} exists already"))
}

/// A volume cannot be made twice.
pub fn volume_exists(name: &str) -> RpcError {
    RpcError::exists(format!("volume '{name}' exists already"))
}

/// A volume without a backing bdev cannot be made.
pub fn needs_base_bdev() -> RpcError {
    RpcError::not_supported(
        "a volume needs a backing bdev to be made; detach it later for a diskless node",
    )
}

/// A volume whose bdev comes and goes where nothing could be built on it.
pub fn always_registered() -> RpcError {
    RpcError::not_supported(
        "register on_promote is for what SPDK builds on a volume: on this host a volume is a bdev always; leave it out",
    )
}

/// A volume that has a backing bdev cannot be given another.
pub fn has_base_bdev(name: &str) -> RpcError {
    RpcError::busy(format!(
        "volume '{name}' has a backing bdev already; detach it first"
    ))
}

/// A volume is going.
pub fn being_deleted(name: &str) -> RpcError {
    RpcError::busy(format!("volume '{name}' is being deleted"))
}

/// A volume changes its role.
pub fn being_demoted(name: &str) -> RpcError {
    RpcError::busy(format!("volume '{name}' is being demoted"))
}

/// A volume is coming.
pub fn being_made() -> RpcError {
    RpcError::busy("the volume is being made")
}

/// A volume that something else is built on stays.
pub fn claimed(name: &str, holder: &str) -> RpcError {
    RpcError::busy(format!(
        "volume '{name}' is claimed by {holder}: delete that first"
    ))
}

/// A volume went while something was done for it.
pub fn gone() -> RpcError {
    RpcError::no_device("the volume is gone")
}
