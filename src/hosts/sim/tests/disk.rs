//! The backing device of one node goes and comes back while the other one goes on.

use crate::engine::manager::Order;
use crate::engine::meta::format::Content;
use crate::engine::open::Goal;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::host::AppStatus;
use crate::hosts::sim::world::{Config, MS, World};

#[test]
fn a_primary_that_detached_its_disk_gets_back_what_the_disk_missed() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Detach);
        assert_eq!(world.state(0).disk, DiskState::Diskless);
        for lba in 0..20 {
            world.write(0, lba * 100, 8);
        }
        world.read(0, 500, 8);
        world.attach(0);
        world.settle();
        world.read(0, 500, 8);
    }
}

#[test]
fn a_disk_that_its_own_node_has_written_without_is_outdated() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Detach);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Demote);
        world.cut(0, 1);
        world.attach(0);
        assert_eq!(world.state(0).disk, DiskState::Outdated);
        if seed % 2 == 0 {
            world.kill(0);
            world.restart(0);
        }
        assert!(world.ordered(0, Order::Promote { force: false }).is_err());
        world.heal(0, 1);
        world.settle();
        world.promote(0);
        world.read(0, 0, 8);
    }
}

#[test]
fn a_primary_that_detached_its_disk_and_wrote_nothing_is_up_to_date_again() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Detach);
        world.attach(0);
        world.settle();
        world.read(0, 0, 8);
    }
}

#[test]
fn no_write_fails_while_a_primary_that_is_written_to_gets_its_disk_back() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.write(0, 0, 8);
        world.carry_out(0, Order::Detach);
        world.open(0, Goal::Any);
        // Up to the loss of the session, and a while into the next.
        while world.peer(0, 1).conn == ConnState::Connected {
            world.submit_random_write(0);
            world.run_for(20_000);
        }
        for _ in 0..20 {
            world.submit_random_write(0);
            world.run_for(20_000);
        }
        world.settle();
        world.wait_for_io();
        assert!(
            world
                .apps
                .values()
                .all(|app| app.status == Some(AppStatus::Ok)),
            "seed {seed}"
        );
    }
}

#[test]
fn a_replica_declared_the_newest_in_the_middle_of_a_resync_can_be_read() {
    for seed in 0..10 {
        let mut world = World::clean_cluster(seed, Config::default());
        world.promote(0);
        world.cut(0, 1);
        for lba in 0..40 {
            world.write(0, lba * 100, 8);
        }
        world.heal(0, 1);
        world.run_until("inconsistent", 10_000 * MS, |world| {
            world.state(1).disk == DiskState::Inconsistent
        });
        world.kill(0);
        world.checks_content = false;
        world.run_for(10_000 * MS);
        world.carry_out(1, Order::Promote { force: true });
        world.read(1, 3900, 8);
        world.read(1, 0, 8);
    }
}

#[test]
fn making_a_volume_leaves_nothing_in_front_of_the_data() {
    let mut world = World::new(1, Config::default());
    let disk = &mut world.nodes[0].disk;
    disk.plant(64 << 10, &[1; 4096]);
    disk.plant(1 << 20, &[2; 4096]);
    world.create(0, Content::Nothing);
    let disk = &world.nodes[0].disk;
    assert_eq!(disk.read(64 << 10..(64 << 10) + 4096), [0; 4096]);
    assert_eq!(disk.read(1 << 20..(1 << 20) + 4096), [2; 4096]);
}
