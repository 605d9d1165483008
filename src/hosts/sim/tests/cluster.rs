//! Who may be Primary, and what happens when two were.

use crate::engine::manager::Order;
use crate::engine::meta::format::Content;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::hosts::sim::world::{Config, MS, SECOND, World};

fn connect(discard_my_data: bool) -> Order {
    Order::Connect {
        node_id: None,
        discard_my_data,
    }
}

fn errors_contain(world: &World, text: &str) -> bool {
    (0..2).all(|node| {
        let error = world.peer(node, 1 - node).last_error;
        error.is_some_and(|error| error.contains(text))
    })
}

#[test]
fn a_split_brain_is_reported_on_both_sides_and_resolved_by_the_operator() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.checks_content = false;
        world.promote(0);
        world.write(0, 0, 8);
        world.cut(0, 1);
        world.run_for(400 * MS);
        world.promote(1);
        world.write(0, 8, 8);
        world.write(1, 80, 8);
        world.heal(0, 1);
        world.run_until("both report it", 5 * SECOND, |world| {
            errors_contain(world, "SplitBrain")
        });
        world.run_for(SECOND);
        for node in 0..2 {
            assert_eq!(world.peer(node, 1 - node).conn, ConnState::StandAlone);
        }
        world.carry_out(1, Order::Demote);
        world.carry_out(1, connect(true));
        world.carry_out(0, connect(false));
        world.settle();
        assert!(world.is_primary(0));
    }
}

#[test]
fn unrelated_data_is_refused_on_both_sides() {
    let mut world = World::new(1, Config::default());
    for node in 0..2 {
        let random = 0x1000 + node as u64 * 2;
        world.create(node, Content::Data { random });
    }
    world.introduce_all();
    world.run_until("both report it", 5 * SECOND, |world| {
        errors_contain(world, "Unrelated")
    });
}

#[test]
fn data_that_is_there_goes_to_a_new_peer() {
    for seed in 0..5 {
        let config = Config {
            volume_bytes: 8 << 20,
            ..Config::default()
        };
        let mut world = World::new(seed, config);
        world.checks_content = false;
        world.nodes[0].disk.plant(3 << 20, &[7; 4096]);
        world.create(0, Content::Data { random: 0x100 });
        world.create(1, Content::Nothing);
        world.introduce_all();
        world.settle();
        assert_eq!(world.nodes[1].disk.read(3 << 20..(3 << 20) + 1), [7]);
    }
}

#[test]
fn a_second_primary_is_refused() {
    let mut world = World::clean_cluster(1, Config::default());
    world.promote(0);
    for force in [false, true] {
        assert!(world.ordered(1, Order::Promote { force }).is_err());
    }
    world.carry_out(0, Order::Demote);
    world.promote(1);
}

#[test]
fn two_promotes_at_once_make_one_primary_at_most() {
    for seed in 0..60 {
        let mut world = World::clean_cluster(seed, Config::default());
        let first = world.order(0, Order::Promote { force: false });
        world.run_for(seed % 7 * 20_000);
        let second = world.order(1, Order::Promote { force: false });
        world.run_until("both orders have ended", 15 * SECOND, |world| {
            world.outcome(0, first).is_some() && world.outcome(1, second).is_some()
        });
        world.run_for(10 * MS);
        assert!(!(world.is_primary(0) && world.is_primary(1)));
        world.settle();
        if !world.is_primary(0) && !world.is_primary(1) {
            world.promote(0);
        }
    }
}

#[test]
fn a_primary_that_was_overtaken_while_it_was_dead_is_resynced() {
    for seed in 0..30 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        for _ in 0..20 {
            world.submit_random_write(0);
            world.run_for(30_000);
        }
        world.kill(0);
        world.run_for(20 * MS);
        world.promote(1);
        for _ in 0..20 {
            world.submit_random_write(1);
            world.run_for(30_000);
        }
        world.wait_for_io();
        world.restart(0);
        world.settle();
        assert!(world.is_primary(1));
        assert_eq!(world.state(0).disk, DiskState::UpToDate);
    }
}

#[test]
fn both_dead_and_back_agree_without_an_operator() {
    for seed in 0..40 {
        let config = Config {
            volatile_caches: seed % 2 == 1,
            ..Config::default()
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        for _ in 0..20 {
            world.submit_random_write(0);
            world.run_for(30_000);
        }
        let order = if seed % 4 < 2 { [0, 1] } else { [1, 0] };
        for node in order {
            if seed % 2 == 1 {
                world.power_loss(node);
            } else {
                world.kill(node);
            }
            world.run_for(seed % 3 * 100 * MS);
        }
        for node in order {
            world.restart(node);
        }
        world.settle();
    }
}
