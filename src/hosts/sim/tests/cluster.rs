//! Who may be Primary, and what happens when two were.

use crate::engine::manager::Order;
use crate::engine::message::OrderOutcome;
use crate::engine::meta::format::Content;
use crate::engine::peer::command::opcode;
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
fn a_third_node_is_added_to_two_that_go_on() {
    for (seed, content) in [(0, Content::Nothing), (1, Content::AssumeClean)] {
        let config = Config {
            nodes: 3,
            volume_bytes: 8 << 20,
            ..Config::default()
        };
        let mut world = World::new(seed, config);
        for node in 0..2 {
            world.create(node, Content::AssumeClean);
        }
        world.introduce(0, 1);
        world.introduce(1, 0);
        world.promote(0);
        world.write(0, 40, 8);
        world.create(2, content);
        for (node, peer) in [(0, 2), (1, 2), (2, 0), (2, 1)] {
            world.introduce(node, peer);
            world.write(0, 80, 8);
        }
        world.settle();
        world.check_replicas();
        world.carry_out(0, Order::Demote);
        world.promote(2);
        world.read(2, 40, 8);
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

/// Gives an order and returns in the step in which it has ended.
fn promptly(world: &mut World, node: usize, order: Order) -> OrderOutcome {
    let id = world.order(node, order);
    loop {
        if let Some(outcome) = world.outcome(node, id) {
            return outcome.clone();
        }
        world.step();
    }
}

#[test]
fn a_peer_can_be_promoted_at_the_moment_when_demote_has_ended() {
    for seed in 0..40 {
        let config = Config {
            cores: 1 + (seed % 2) as usize,
            scarcity_percent: seed % 3 * 5,
            repeat_percent: seed % 4 * 5,
            ..Config::default()
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        for turn in 0..4 {
            let (one, other) = (turn % 2, 1 - turn % 2);
            world.submit_random_write(one);
            assert_eq!(promptly(&mut world, one, Order::Demote), Ok(()));
            let promoted = promptly(&mut world, other, Order::Promote { force: false });
            assert_eq!(promoted, Ok(()), "seed {seed}, turn {turn}");
        }
    }
}

#[test]
fn a_peer_that_enters_the_session_late_can_be_promoted_at_once_too() {
    let mut behind = 0;
    for seed in 0..200 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.reset(0, 1);
        while world.peer(0, 1).conn == ConnState::Connected {
            world.step();
        }
        while world.peer(0, 1).conn != ConnState::Connected {
            world.step();
        }
        behind += u32::from(world.peer(1, 0).conn < ConnState::Connected);
        assert_eq!(promptly(&mut world, 0, Order::Demote), Ok(()));
        let promoted = promptly(&mut world, 1, Order::Promote { force: false });
        assert_eq!(promoted, Ok(()), "seed {seed}");
    }
    assert!(behind > 0, "node 1 was never behind");
}

#[test]
fn demote_ends_without_a_peer_that_does_not_answer() {
    for lost in [false, true] {
        let mut world = World::clean_cluster(1, Config::default());
        world.promote(0);
        world.catch(opcode::STATE_PUT);
        let id = world.order(0, Order::Demote);
        world.run_until("the peer is told", SECOND, |world| world.caught() > 0);
        world.run_for(100 * MS);
        assert_eq!(world.outcome(0, id), None, "it must not end before");
        if lost {
            world.cut(0, 1);
        }
        let limit_ns = if lost { SECOND } else { 10 * SECOND };
        world.run_until("it has ended", limit_ns, |world| {
            world.outcome(0, id) == Some(&Ok(()))
        });
        assert!(!world.is_primary(0));
        world.heal(0, 1);
        world.let_go();
        world.settle();
    }
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
