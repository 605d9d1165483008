//! The operator's orders in every state: each ends, and what it leaves is sound.

use super::link::behind;
use super::soak::{any_in_capsule_bytes, for_seeds};
use crate::engine::manager::Order;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

#[test]
fn a_secondary_that_was_detached_gets_what_it_missed() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        for round in 0..3 {
            for _ in 0..10 {
                world.submit_random_write(0);
                world.run_for(20_000);
            }
            let id = world.order(1, Order::Detach);
            for _ in 0..10 {
                world.submit_random_write(0);
                world.run_for(20_000);
            }
            world.run_until("detached", 15 * SECOND, |world| {
                world.outcome(1, id).is_some()
            });
            assert!(!world.nodes[1].disk_open, "round {round}");
            assert_eq!(world.state(1).disk, DiskState::Diskless);
            world.wait_for_io();
            world.attach(1);
            world.settle();
        }
    }
}

#[test]
fn a_primary_goes_on_without_its_disk_and_gets_it_back() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        for _ in 0..2 {
            for _ in 0..10 {
                world.submit_random_write(0);
                world.run_for(20_000);
            }
            let id = world.order(0, Order::Detach);
            for _ in 0..10 {
                world.submit_random_write(0);
                world.run_for(20_000);
            }
            world.run_until("detached", 15 * SECOND, |world| {
                world.outcome(0, id).is_some()
            });
            assert_eq!(world.outcome(0, id), Some(&Ok(())));
            for _ in 0..10 {
                world.submit_random_write(0);
                world.submit_random_read(0);
                world.run_for(20_000);
            }
            world.wait_for_io();
            world.attach(0);
            for _ in 0..10 {
                world.submit_random_write(0);
                world.submit_random_read(0);
                world.run_for(200_000);
            }
            world.settle();
            world.wait_for_io();
            assert!(world.is_primary(0));
        }
    }
}

#[test]
fn a_diskless_primary_that_dies_has_lost_nothing() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Detach);
        world.write(0, 4, 8);
        world.write(0, 9000, 8);
        if seed % 2 == 0 {
            world.kill(1);
            world.restart(1);
            world.run_until("connected", 5 * SECOND, |world| {
                world.peer(0, 1).conn == ConnState::Connected
            });
        }
        world.kill(0);
        world.restart(0);
        world.settle();
    }
}

#[test]
fn a_node_promoted_without_its_disk_gets_it_back() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Demote);
        world.carry_out(0, Order::Detach);
        world.run_for(5 * MS);
        world.promote(0);
        world.write(0, 4, 8);
        world.write(0, 9000, 8);
        if seed % 2 == 0 {
            world.attach(0);
        } else {
            world.kill(0);
            world.restart(0);
        }
        world.settle();
    }
}

#[test]
fn an_invalidated_replica_is_fetched_whole() {
    let config = Config {
        volume_bytes: 8 << 20,
        ..Config::default()
    };
    let mut world = World::clean_cluster(1, config);
    world.promote(0);
    world.write(0, 0, 8);
    world.nodes[1].disk.plant(2 << 20, &[9; 512]);
    assert!(world.ordered(0, Order::Invalidate).is_err());
    world.carry_out(1, Order::Invalidate);
    world.settle();
    assert!(world.resynced_bytes >= 8 << 20);
}

#[test]
fn a_paused_resync_fetches_nothing_until_it_is_resumed() {
    let mut world = behind(1, Config::default());
    world.carry_out(1, Order::PauseResync);
    world.heal(0, 1);
    world.run_for(SECOND);
    assert_eq!(world.resynced_bytes, 0);
    assert_eq!(world.peer(1, 0).conn, ConnState::PausedSyncT);
    assert_eq!(world.peer(0, 1).conn, ConnState::PausedSyncS);
    world.write(0, 100, 8);
    world.carry_out(1, Order::ResumeResync);
    world.settle();
}

#[test]
fn a_peer_that_was_removed_can_be_added_again() {
    for seed in 0..5 {
        let config = Config {
            volume_bytes: 8 << 20,
            ..Config::default()
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        world.write(0, 0, 8);
        for (node, peer) in [(0, 1), (1, 0)] {
            world.carry_out(node, Order::RemovePeer { node_id: peer });
        }
        world.write(0, 4, 8);
        world.introduce_all();
        world.settle();
    }
}

#[test]
fn a_write_that_missed_a_peer_ends_when_that_is_removed() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.cut(0, 1);
        world.order(0, Order::RemovePeer { node_id: 1 });
        while world.now_ns < 3 * SECOND {
            world.submit_random_write(0);
            world.run_for(20 * MS);
        }
        world.wait_for_io();
        world.check_orders();
    }
}

/// One order in the middle of whatever is going on.
fn random_order(world: &mut World, node: usize) {
    let peer = Some(1 - node as u8);
    let order = match world.random.below(12) {
        0 => Order::Promote { force: false },
        1 => Order::Demote,
        2 | 3 => Order::Detach,
        4 => Order::Invalidate,
        5 => Order::PauseResync,
        6 | 7 => Order::ResumeResync,
        8 => Order::Disconnect { node_id: peer },
        9 => Order::Promote { force: true },
        _ => Order::Connect {
            node_id: peer,
            discard_my_data: true,
        },
    };
    world.order(node, order);
}

fn random_orders(seed: u64) {
    let config = Config {
        cores: 1 + (seed % 2) as usize,
        al_extents: 8,
        scarcity_percent: seed % 3 * 2,
        repeat_percent: seed / 2 % 3 * 5,
        in_capsule_bytes: vec![any_in_capsule_bytes(&mut Random::new(seed))],
        ..Config::default()
    };
    let mut world = World::clean_cluster(seed, config);
    world.checks_content = false;
    world.promote(0);
    for _ in 0..60 {
        let node = world.random.below(2) as usize;
        match world.random.below(12) {
            0 => world.cut(0, 1),
            1 | 2 => world.heal(0, 1),
            3 => world.reset(0, 1),
            4 if world.nodes[node].engine.is_some() => {
                world.kill(node);
                world.run_for(5 * MS);
                world.restart(node);
            }
            5 if world.state(node).disk == DiskState::Diskless && !world.nodes[node].disk_open => {
                world.open(node, crate::engine::open::Goal::Any);
            }
            6..8 => random_order(&mut world, node),
            _ => {
                for node in 0..2 {
                    if world.is_primary(node) {
                        world.submit_random_write(node);
                        world.submit_random_read(node);
                    }
                }
            }
        }
        let time_ns = world.random.below(5 * MS);
        world.run_for(time_ns);
    }
    world.heal(0, 1);
    let mut closing = Vec::new();
    for node in 0..2 {
        closing.push(world.order(node, Order::Close));
        let time_ns = world.random.below(3 * MS);
        world.run_for(time_ns);
    }
    world.run_until("both are closed", 30 * SECOND, |world| {
        (0..2).all(|node| world.outcome(node, closing[node]).is_some())
    });
    world.run_until("nothing is left", 5 * SECOND, |world| {
        (0..2).all(|node| {
            world.nodes[node].disk_work.is_empty()
                && world.nodes[node].unanswered.is_empty()
                && !world.nodes[node].disk_open
        }) && world.apps.values().all(|app| app.status.is_some())
    });
    world.check_orders();
}

#[test]
fn orders_in_any_state_end_and_closing_leaves_nothing_behind() {
    for_seeds(100, random_orders);
}
