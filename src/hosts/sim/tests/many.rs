//! Three nodes: one Primary, survivors that agree on what it wrote, and who may be promoted. Random runs of as many and more
//! are in `soak`.

use crate::engine::manager::Order;
use crate::engine::peer::command::opcode;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::hosts::sim::coverage::Kind;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

fn three(seed: u64) -> World {
    let config = Config {
        nodes: 3,
        cores: 1 + (seed % 2) as usize,
        volume_bytes: 16 << 20,
        ..Config::default()
    };
    let mut world = World::clean_cluster(seed, config);
    world.promote(0);
    world
}

#[test]
fn a_write_that_one_survivor_got_is_on_both_or_none_when_the_primary_is_lost() {
    for seed in 0..10 {
        let mut world = three(seed);
        let (has, lacks) = if seed % 4 < 2 { (1, 2) } else { (2, 1) };
        world.cut(0, lacks);
        world.submit(0, 0, RequestKind::Write { fua: false }, 40, 8);
        world.run_for(10 * MS);
        world.kill(0);
        let bytes = 1 << 20..17 << 20;
        let differ = |world: &World| {
            let (one, other) = (&world.nodes[has].disk, &world.nodes[lacks].disk);
            one.first_difference(other, bytes.clone()).is_some()
        };
        assert!(differ(&world), "seed {seed}: the write has reached one");
        world.run_until("the survivors agree", 10 * SECOND, |world| {
            let peer = world.peer(has, lacks);
            peer.conn == ConnState::Connected
                && peer.disk == DiskState::UpToDate
                && peer.out_of_sync_bytes == 0
                && !differ(world)
        });
        world.heal(0, lacks);
        world.restart(0);
        world.settle();
    }
}

#[test]
fn bits_for_nodes_that_got_everything_go_again() {
    for seed in 0..5 {
        let mut world = three(seed);
        for _ in 0..50 {
            world.submit_random_write(0);
            world.run_for(MS);
        }
        world.wait_for_io();
        // Without a resync: both stay what they are.
        for _ in 0..40 {
            world.run_for(10 * MS);
            for node in [1, 2] {
                assert_eq!(world.state(node).disk, DiskState::UpToDate, "seed {seed}");
            }
        }
        // There is nothing left that the survivors would have to agree on.
        world.kill(0);
        world.run_for(2 * SECOND);
        assert_eq!(world.peer(1, 2).conn, ConnState::Connected, "seed {seed}");
        assert_eq!(world.resynced_bytes, 0, "seed {seed}");
        world.restart(0);
        world.settle();
    }
}

#[test]
fn a_node_that_the_primary_goes_on_without_is_outdated_and_not_promoted() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.cut(0, 2);
        world.write(0, 40, 8);
        assert_ne!(world.peer(1, 2).disk, DiskState::UpToDate, "seed {seed}");
        world.run_until("node 2 knows", SECOND, |world| {
            world.state(2).disk == DiskState::Outdated
        });
        let promote = Order::Promote { force: false };
        assert!(world.ordered(2, promote).is_err(), "seed {seed}");
        world.heal(0, 2);
        world.settle();
    }
}

#[test]
fn a_write_is_not_complete_before_all_who_have_it_know_who_lacks_it() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.catch(opcode::NEW_GENERATION);
        world.cut(0, 2);
        let id = world.submit(0, 0, RequestKind::Write { fua: false }, 40, 8);
        world.run_until("node 1 is told", SECOND, |world| world.caught() > 0);
        // A new view for the channels, while the generation is durable here and not there.
        world.run_for(20 * MS);
        world.carry_out(0, Order::PauseResync);
        world.carry_out(0, Order::ResumeResync);
        world.run_for(20 * MS);
        assert_eq!(world.apps[&id].status, None, "seed {seed}");
        world.let_go();
        world.run_until("it completes", SECOND, |world| {
            world.apps.get(&id).is_none_or(|app| app.status.is_some())
        });
        world.heal(0, 2);
        world.settle();
    }
}

#[test]
fn a_second_primary_is_refused_by_who_sees_the_first() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.cut(0, 2);
        world.run_for(500 * MS);
        let promote = Order::Promote { force: false };
        assert!(world.ordered(2, promote).is_err(), "seed {seed}");
        world.heal(0, 2);
        world.settle();
    }
}

/// No campaign meets it: its operator promotes nobody who has not heard of the Primary that there is.
#[test]
fn a_primary_from_apart_is_refused_by_who_sees_another_one() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.cut(0, 2);
        world.cut(1, 2);
        world.run_for(500 * MS);
        world.promote(2);
        world.heal(1, 2);
        world.run_for(500 * MS);
        let outcomes = world.coverage.of(Kind::Outcome);
        let is_it = |&(name, _): &(&str, u64)| name == "AnotherPrimary";
        assert!(outcomes.iter().any(is_it), "seed {seed}: {outcomes:?}");
        assert!(world.peer(1, 2).conn < ConnState::Connected, "seed {seed}");
    }
}
