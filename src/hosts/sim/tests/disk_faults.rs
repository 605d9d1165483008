//! Disks that are slow, fail, freeze or rot, under a volume that is used.

use crate::engine::peer::state::DiskState;
use crate::engine::request::RequestKind;
use crate::host::AppStatus;
use crate::hosts::sim::world::disk_faults::{Failing, MetadataBlock};
use crate::hosts::sim::world::{Config, MS, SECOND, World};

const WRITE: RequestKind = RequestKind::Write { fua: false };

fn primary_pair(seed: u64) -> World {
    let config = Config {
        cores: 1 + (seed % 2) as usize,
        volatile_caches: seed % 3 == 0,
        ..Config::default()
    };
    let mut world = World::clean_cluster(seed, config);
    world.promote(0);
    for lba in 0..20 {
        world.write(0, lba * 3000, 8);
    }
    world
}

/// Every kind of request that a disk may fail, one at a time.
fn all_failing() -> [Failing; 4] {
    let none = Failing::default();
    [
        Failing {
            reads: true,
            ..none
        },
        Failing {
            writes: true,
            ..none
        },
        Failing {
            flushes: true,
            ..none
        },
        Failing {
            metadata: true,
            ..none
        },
    ]
}

#[test]
fn a_disk_that_fails_anything_is_let_go_and_no_io_fails_while_the_peer_has_the_data() {
    for seed in 0..16 {
        let (node, failing) = ((seed / 4 % 2) as usize, all_failing()[seed as usize % 4]);
        let mut world = primary_pair(seed);
        world.fail_disk(node, failing, 100, SECOND);
        let what = if failing.reads && node == 0 {
            RequestKind::Read
        } else {
            WRITE
        };
        for lba in 0..40 {
            // Far apart, so that the activity log has to be written.
            let status = world.io(0, what, lba % 20 * 6000, 8);
            assert_eq!(status, AppStatus::Ok, "seed {seed}: {}", world.describe());
            let kind = RequestKind::Flush;
            assert_eq!(world.io(0, kind, 0, 0), AppStatus::Ok, "seed {seed}");
        }
        // A Secondary has nothing to read.
        if !(failing.reads && node == 1) {
            world.run_until("the disk is let go", SECOND, |world| {
                world.state(node).disk == DiskState::Diskless && !world.nodes[node].disk_open
            });
        }
        world.mend_disk(node);
        if !world.nodes[node].disk_open {
            world.attach(node);
        }
        world.settle();
        for lba in 0..20 {
            world.read(0, lba * 3000, 8);
        }
    }
}

#[test]
fn what_a_frozen_disk_keeps_ends_when_it_thaws() {
    for seed in 0..8 {
        let mut world = primary_pair(seed);
        let node = (seed % 2) as usize;
        world.freeze_disk(node, 2 * SECOND);
        let id = world.submit(0, 0, WRITE, 4096, 8);
        world.run_for(1900 * MS);
        assert_eq!(world.apps[&id].status, None);
        world.run_for(200 * MS);
        assert_eq!(world.apps[&id].status, Some(AppStatus::Ok));
        world.settle();
    }
}

#[test]
fn what_a_frozen_disk_keeps_is_lost_or_done_when_its_node_is_killed() {
    for seed in 0..8 {
        let mut world = primary_pair(seed);
        world.freeze_disk(1, u64::MAX);
        let id = world.submit(0, 0, WRITE, 4096, 8);
        world.run_for(SECOND);
        assert_eq!(world.apps[&id].status, None);
        world.kill(1);
        world.run_for(SECOND);
        assert_eq!(world.apps[&id].status, Some(AppStatus::Ok));
        world.restart(1);
        world.settle();
    }
}

#[test]
fn a_slow_disk_delays_and_fails_nothing() {
    for seed in 0..4 {
        let mut world = primary_pair(seed);
        world.slow_disk((seed % 2) as usize, 400 * MS, 4 * SECOND);
        let began_ns = world.now_ns;
        for lba in 0..4 {
            world.write(0, lba * 9000, 8);
        }
        assert!(world.now_ns - began_ns > 100 * MS);
        world.run_for(4 * SECOND);
        let began_ns = world.now_ns;
        world.write(0, 0, 8);
        assert!(world.now_ns - began_ns < 50 * MS);
        world.settle();
    }
}

#[test]
fn a_node_opens_with_any_block_of_its_metadata_rotten_and_loses_nothing() {
    let mut rotten = 0;
    for seed in 0..64 {
        let mut world = primary_pair(seed);
        let node = (seed % 2) as usize;
        let block = match seed / 2 % 3 {
            0 => MetadataBlock::Superblock((seed / 6) as u8),
            1 => MetadataBlock::Log((seed / 6) as u32),
            _ => MetadataBlock::Bitmap((seed / 6) as u32),
        };
        // Something is under way, and something is missed.
        if seed % 4 < 2 {
            world.cut(0, 1);
            world.run_for(SECOND);
        }
        for lba in 0..4 {
            world.submit(0, 0, WRITE, lba * 20_000, 16);
        }
        world.run_for(200_000);
        if seed % 8 < 4 {
            world.power_loss(node);
        } else {
            world.kill(node);
        }
        rotten += u32::from(world.rot(node, block));
        world.heal(0, 1);
        world.restart(node);
        if !world.is_primary(0) {
            world.run_until("connected", 5 * SECOND, World::is_settled);
            world.promote(0);
        }
        world.settle();
    }
    // Not all blocks have been written to.
    assert!(rotten > 24, "{rotten}");
}
