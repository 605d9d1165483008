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

/// A bdev that comes later is not overwritten whatever it carries.
pub fn force_is_for_now(base_bdev: &str) -> RpcError {
    RpcError::no_device(format!(
        "no bdev is named {base_bdev}, and force is not kept for one that comes later: leave it out to have the volume \
         made when the bdev appears"
    ))
}

/// Two volumes cannot be made on one bdev.
pub fn awaited(base_bdev: &str, name: &str) -> RpcError {
    RpcError::not_permitted(format!(
        "bdev {base_bdev} is claimed by bdev_repl: volume '{name}' waits for it"
    ))
}

/// A volume that is not made yet.
pub fn waits(name: &str, base_bdev: &str) -> RpcError {
    RpcError::busy(format!(
        "volume '{name}' is not made yet: it waits for its backing bdev {base_bdev}; bdev_repl_get_volumes says more"
    ))
}

/// A node is not its own peer.
pub fn own_node_id(node_id: u8) -> RpcError {
    RpcError::invalid(format!("node id {node_id} is this node's own"))
}

/// A peer cannot be made known twice.
pub fn peer_exists(node_id: u8) -> RpcError {
    RpcError::exists(format!("a peer with node id {node_id} exists already"))
}

/// A peer that was not made known.
pub fn no_peer(node_id: u8) -> RpcError {
    RpcError::no_device(format!(
        "there is no peer with node id {node_id}; bdev_repl_get_volumes lists them"
    ))
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
