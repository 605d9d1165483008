//! Cores, nodes and links that are slow for a while, and clocks that jump.

use crate::engine::peer::state::ConnState;
use crate::engine::request::RequestKind;
use crate::host::AppStatus;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

const WRITE: RequestKind = RequestKind::Write { fua: false };

fn primary_pair(seed: u64, cores: usize) -> World {
    let config = Config {
        cores,
        ping_interval_ms: 1000,
        ping_timeout_ms: 300,
        ..Config::default()
    };
    let mut world = World::clean_cluster(seed, config);
    world.promote(0);
    world.write(0, 0, 8);
    world
}

#[test]
fn what_is_sent_over_a_link_that_stands_still_arrives_when_it_goes_on() {
    for seed in 0..8 {
        let mut world = primary_pair(seed, 1);
        let (from, to) = if seed % 2 == 0 { (0, 1) } else { (1, 0) };
        let links = world.link_ids();
        world.stall(from, to, 200 * MS);
        let ids: Vec<u64> = (0..20)
            .map(|lba| world.submit(0, 0, WRITE, lba * 8, 8))
            .collect();
        world.run_for(190 * MS);
        assert!(ids.iter().all(|id| world.apps[id].status.is_none()));
        world.run_for(20 * MS);
        assert!(
            ids.iter()
                .all(|id| world.apps[id].status == Some(AppStatus::Ok))
        );
        assert_eq!(links, world.link_ids(), "the session was lost");
        world.settle();
    }
}

#[test]
fn a_link_that_stands_still_in_one_direction_for_too_long_is_given_up_and_made_again() {
    for seed in 0..8 {
        let mut world = primary_pair(seed, 2);
        let (from, to) = if seed % 2 == 0 { (0, 1) } else { (1, 0) };
        world.stall(from, to, 4 * SECOND);
        let id = world.submit(0, 0, WRITE, 80, 8);
        world.run_for(3 * SECOND);
        assert_eq!(world.apps[&id].status, Some(AppStatus::Ok));
        assert_ne!(world.peer(0, 1).conn, ConnState::Connected);
        world.run_for(2 * SECOND);
        world.settle();
    }
}

#[test]
fn io_goes_on_where_a_node_or_a_link_is_slow() {
    for seed in 0..8 {
        let mut world = primary_pair(seed, 2);
        let node = (seed % 2) as usize;
        if seed % 4 < 2 {
            world.slow_node(node, 20 * MS, 3 * SECOND);
        } else {
            world.slow_way(node, 1 - node, 40 * MS, 3 * SECOND);
        }
        let began_ns = world.now_ns;
        for lba in 0..8 {
            world.write(0, lba * 9000, 8);
        }
        assert!(world.now_ns - began_ns > 20 * MS);
        world.run_for(3 * SECOND);
        world.settle();
    }
}

#[test]
fn a_core_that_adopts_seconds_after_the_others_loses_nothing() {
    for seed in 0..16 {
        let mut world = primary_pair(seed, 3);
        let node = (seed % 2) as usize;
        world.slow_core(node, 1 + (seed / 2 % 2) as usize, 2 * SECOND, 6 * SECOND);
        world.run_for(MS);
        world.cut(0, 1);
        for step in 0..30 {
            world.submit(0, step % 3, WRITE, step as u64 * 500, 8);
            world.run_for(100 * MS);
        }
        world.heal(0, 1);
        for step in 0..30 {
            world.submit(0, step % 3, WRITE, step as u64 * 500 + 4, 8);
            world.run_for(100 * MS);
        }
        world.wait_for_io();
        world.settle();
    }
}

#[test]
fn a_clock_that_jumps_forward_costs_a_session_at_most() {
    for seed in 0..16 {
        let mut world = primary_pair(seed, 2);
        for step in 0..20 {
            world.submit(0, step % 2, WRITE, step as u64 * 500, 8);
            if step % 5 == 0 {
                let by_ns = [MS, 300 * MS, 5 * SECOND, 3600 * SECOND][step / 5];
                world.jump_clock((seed % 2) as usize, by_ns);
            }
            world.run_for(10 * MS);
        }
        world.wait_for_io();
        world.settle();
        assert_eq!(world.io(0, WRITE, 0, 8), AppStatus::Ok);
    }
}
