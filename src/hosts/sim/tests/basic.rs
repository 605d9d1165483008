//! A pair without faults, and one link that comes and goes.

use crate::engine::manager::Order;
use crate::engine::meta::format::Content;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::host::AppStatus;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

#[test]
fn two_nodes_declared_clean_are_up_to_date_at_once() {
    for seed in 0..10 {
        let world = World::clean_cluster(seed, Config::default());
        assert_eq!(world.resynced_bytes, 0);
    }
}

#[test]
fn writes_are_on_both_replicas_and_are_read_back() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        for lba in 0..50 {
            world.write(0, lba * 37, 9);
        }
        for lba in 0..50 {
            world.read(0, lba * 37, 9);
        }
        world.settle();
        assert_eq!(world.resynced_bytes, 0);
    }
}

#[test]
fn a_new_pair_starts_by_a_full_sync() {
    for seed in 0..5 {
        let config = Config {
            volume_bytes: 16 << 20,
            ..Config::default()
        };
        let mut world = World::new(seed, config);
        world.checks_content = false;
        for node in 0..2 {
            world.nodes[node]
                .disk
                .plant((1 << 20) + 8192, &[node as u8 + 1; 4096]);
            world.create(node, Content::Nothing);
        }
        world.introduce_all();
        world.run_until("connected", SECOND, |world| {
            world.peer(0, 1).conn == ConnState::Connected
        });
        assert!(world.ordered(0, Order::Promote { force: false }).is_err());
        world.carry_out(0, Order::Promote { force: true });
        world.settle();
        assert!(world.resynced_bytes >= 16 << 20);
        assert_eq!(
            world.nodes[1].disk.read((1 << 20) + 8192..(1 << 20) + 8193),
            [1]
        );
    }
}

#[test]
fn a_flush_reaches_both_disks() {
    let mut world = World::clean_cluster(1, Config::default());
    world.promote(0);
    world.write(0, 0, 8);
    let before: Vec<u64> = world.nodes.iter().map(|node| node.disk.flushes).collect();
    assert_eq!(world.io(0, RequestKind::Flush, 0, 0), AppStatus::Ok);
    for (node, before) in before.into_iter().enumerate() {
        assert_eq!(world.nodes[node].disk.flushes, before + 1, "node {node}");
    }
    let before: Vec<u64> = world
        .nodes
        .iter()
        .map(|node| node.disk.fua_writes)
        .collect();
    let status = world.io(0, RequestKind::Write { fua: true }, 0, 8);
    assert_eq!(status, AppStatus::Ok);
    for (node, before) in before.into_iter().enumerate() {
        assert_eq!(world.nodes[node].disk.fua_writes, before + 1, "node {node}");
    }
}

#[test]
fn a_write_missed_by_the_peer_completes_after_a_new_generation_and_is_resynced() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        let before = world.state(0).generations.current;
        world.cut(0, 1);
        world.write(0, 1000, 8);
        assert_ne!(world.state(0).generations.current, before);
        world.write(0, 2000, 8);
        assert_eq!(world.peer(0, 1).disk, DiskState::DUnknown);
        world.run_for(300 * MS);
        world.heal(0, 1);
        world.settle();
        assert!(world.resynced_bytes > 0);
        assert!(
            world.resynced_bytes <= 16 << 10,
            "{} bytes",
            world.resynced_bytes
        );
    }
}
