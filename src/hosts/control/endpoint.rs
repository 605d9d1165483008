//! The names of a node's peer endpoint of a volume: peers of any host find each other by them.
//! Called where the endpoint is exported and where a peer's is connected to. Must not know how either is done.

use uuid::Uuid;

/// The endpoint's namespace in its subsystem.
pub const ENDPOINT_NSID: u32 = 1;
/// The model number of its controller.
pub const ENDPOINT_MODEL: &str = "bdev_repl endpoint";

/// The subsystem of a node's endpoint of a volume; also the host NQN of that node towards its peers.
pub fn endpoint_nqn(volume: &Uuid, node_id: u8) -> String {
    format!("nqn.2026-11.io.bdev-repl:volume:{volume}:node{node_id}")
}

/// The bdev of the endpoint of a volume of this name.
pub fn endpoint_name(name: &str) -> String {
    format!("{name}.endpoint")
}

/// UUID and NGUID of a node's endpoint: not the volume's, which is another namespace.
pub fn endpoint_uuid(volume: &Uuid, node_id: u8) -> Uuid {
    Uuid::new_v5(volume, &[node_id])
}

/// The NVMe host identifier of a node towards its peers; node ids are 0 to 7.
pub fn host_id(volume: &Uuid, node_id: u8) -> [u8; 16] {
    let mut host_id = *volume.as_bytes();
    host_id[15] ^= node_id + 1;
    host_id
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_names_of_an_endpoint_never_change() {
        let volume = Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
        assert_eq!(
            endpoint_nqn(&volume, 3),
            "nqn.2026-11.io.bdev-repl:volume:01020304-0506-0708-090a-0b0c0d0e0f10:node3"
        );
        assert_eq!(endpoint_name("v"), "v.endpoint");
        let host_id = host_id(&volume, 3);
        assert_eq!((host_id[0], host_id[14], host_id[15]), (1, 15, 0x14));
    }

    #[test]
    fn no_two_nodes_of_a_volume_have_a_name_in_common() {
        let volume = Uuid::from_u128(7);
        let nqns: HashSet<_> = (0..8).map(|node| endpoint_nqn(&volume, node)).collect();
        let mut uuids: HashSet<_> = (0..8).map(|node| endpoint_uuid(&volume, node)).collect();
        let hosts: HashSet<_> = (0..8).map(|node| host_id(&volume, node)).collect();
        assert_eq!((nqns.len(), hosts.len()), (8, 8));
        uuids.insert(volume);
        assert_eq!(uuids.len(), 9, "nor with the volume itself");
    }
}
