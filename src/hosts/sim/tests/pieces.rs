//! Writes that are longer than what a peer takes with one command: they go in pieces, and count as one.

use crate::engine::manager::Order;
use crate::engine::message::ToManager;
use crate::engine::peer::command::{PeerCommand, opcode};
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::host::AppStatus;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

const WRITE: RequestKind = RequestKind::Write { fua: false };

fn taking(in_capsule_bytes: &[u32]) -> Config {
    Config {
        in_capsule_bytes: in_capsule_bytes.to_vec(),
        ..Config::default()
    }
}

/// Sequence, LBA and blocks of the writes that have arrived.
fn arrived_writes(world: &World) -> Vec<(u64, u64, u32)> {
    let commands = world.kept_commands().into_iter();
    let mut writes: Vec<_> = commands
        .filter_map(|command| match command {
            PeerCommand::Write { span, order, .. } => {
                Some((order.sequence(), span.lba(), span.blocks()))
            }
            _ => None,
        })
        .collect();
    writes.sort_unstable();
    writes
}

#[test]
fn a_write_goes_in_pieces_of_what_both_nodes_take() {
    // Ours, theirs, and the blocks of each piece: of 250 blocks from block 5 on.
    for (mine, theirs, blocks) in [
        (128 << 10, 128 << 10, vec![250]),
        (128 << 10, 0, vec![250]),
        (65_536, 128 << 10, vec![123, 127]),
        (128 << 10, 20_479, vec![27, 32, 32, 32, 32, 32, 32, 31]),
        (1 << 20, 1023, vec![1; 250]),
    ] {
        for seed in 0..3 {
            let mut world = World::clean_cluster(seed, taking(&[mine, theirs]));
            world.promote(0);
            world.keep_copies(Some(opcode::WRITE));
            world.write(0, 5, 250);
            let writes = arrived_writes(&world);
            let lengths: Vec<u32> = writes.iter().map(|write| write.2).collect();
            assert_eq!(lengths, blocks, "{mine} and {theirs}");
            let mut next = (writes[0].0, 5);
            for (sequence, lba, blocks) in writes {
                assert_eq!((sequence, lba), next, "in a row, without a gap");
                next = (sequence + 1, lba + u64::from(blocks));
            }
            // The write after it has numbers of its own.
            world.write(0, 5, 1);
            assert_eq!(arrived_writes(&world).last(), Some(&(next.0, 5, 1)));
            world.settle();
        }
    }
}

#[test]
fn what_fits_goes_whole_however_it_lies() {
    let mut world = World::clean_cluster(1, taking(&[8192]));
    world.promote(0);
    world.keep_copies(Some(opcode::WRITE));
    world.write(0, 7, 16);
    assert_eq!(world.kept(), 1);
    world.settle();
}

#[test]
fn a_write_ends_when_its_last_piece_is_answered() {
    let mut world = World::clean_cluster(1, taking(&[1024]));
    world.promote(0);
    world.catch(opcode::WRITE);
    // Two rounds: the second is sent when the first has ended.
    let id = world.submit(0, 0, WRITE, 0, 200);
    for round in [64, 36] {
        world.run_until("the round is on its way", SECOND, |world| {
            world.caught() == round
        });
        world.run_for(20 * MS);
        assert_eq!(world.caught(), round);
        assert_eq!(world.apps[&id].status, None);
        world.let_go_but(1);
        world.run_for(20 * MS);
        assert_eq!(world.caught(), 1);
        assert_eq!(world.apps[&id].status, None);
        world.let_go_but(0);
    }
    world.let_go();
    world.settle();
    assert!(world.apps[&id].status.is_some());
}

#[test]
fn a_write_of_which_a_piece_was_not_answered_is_missed_whole() {
    for seed in 0..20 {
        let mut world = World::clean_cluster(seed, taking(&[4096]));
        world.promote(0);
        world.catch(opcode::WRITE);
        let id = world.submit(0, 0, WRITE, 0, 256);
        world.run_until("all pieces are on their way", SECOND, |world| {
            world.caught() == 32
        });
        // Some of them arrive.
        world.let_go_but(1 + seed as usize);
        world.run_for(20 * MS);
        world.cut(0, 1);
        world.run_until("the write has ended", SECOND, |world| {
            world.apps[&id].status.is_some()
        });
        // What channels hold is counted too.
        world.tell_manager(0, ToManager::NeedGeneration(0));
        world.run_until("the session is over", SECOND, |world| {
            world.peer(0, 1).conn < ConnState::Connected
        });
        world.let_go();
        world.heal(0, 1);
        world.run_until("bits are exchanged", 5 * SECOND, |world| {
            world.resynced_bytes > 0
        });
        world.settle();
        assert!(
            world.resynced_bytes >= 128 << 10,
            "{}",
            world.resynced_bytes
        );
    }
}

#[test]
fn a_write_that_the_only_disk_took_in_part_has_failed() {
    let mut failed = 0;
    for seed in 0..200 {
        let config = Config {
            // So that the pieces do not stay together.
            scarcity_percent: 20,
            ..taking(&[4096])
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        world.carry_out(0, Order::Detach);
        world.write(0, 9000, 8);
        let id = world.submit(0, 0, WRITE, 0, 256);
        world.run_for(20_000 + seed * 5000);
        world.order(1, Order::Detach);
        world.run_until("the write has ended", 20 * SECOND, |world| {
            world.apps[&id].status.is_some()
        });
        failed += u32::from(world.apps[&id].status != Some(AppStatus::Ok));
        world.check_content(1);
    }
    assert!(failed > 0, "it was never in the middle");
}

#[test]
fn pieces_that_find_the_peer_busy_are_sent_again() {
    let mut again = 0;
    for seed in 0..20 {
        let config = Config {
            // The peer has no room for more of them at a time.
            command_window: 16,
            ..taking(&[4096])
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        world.keep_copies(Some(opcode::WRITE));
        world.write(0, 0, 256);
        again += world.kept() - 32;
        world.settle();
    }
    assert!(again > 0, "none was busy");
}

#[test]
fn a_link_that_ends_in_the_middle_of_a_write_costs_nothing() {
    for seed in 0..100 {
        let config = Config {
            cores: 1 + (seed % 2) as usize,
            scarcity_percent: seed % 3 * 5,
            repeat_percent: seed % 4 * 5,
            ..taking(&[[512, 4096, 8192][(seed % 3) as usize]])
        };
        let mut world = World::clean_cluster(seed, config);
        world.promote(0);
        for round in 0..5 {
            for place in 0..3 {
                let core = world.random.below(world.config.cores as u64) as usize;
                let lba = place * 10_000 + 3 * round;
                world.submit(0, core, WRITE, lba, 256);
            }
            let time_ns = world.random.below(MS);
            world.run_for(time_ns);
            match world.random.below(3) {
                0 => world.reset(0, 1),
                1 => {
                    world.kill(1);
                    world.restart(1);
                }
                _ => {
                    world.kill(0);
                    world.restart(0);
                    world.promote(0);
                }
            }
            world.settle();
            world.wait_for_io();
        }
    }
}

#[test]
fn no_more_commands_are_under_way_than_the_peer_gives_credit_for() {
    for in_capsule_bytes in [4096, 128 << 10] {
        for disk_fails in [false, true] {
            let mut world = World::clean_cluster(1, taking(&[in_capsule_bytes]));
            world.promote(0);
            for index in 0..300 {
                world.submit(0, 0, WRITE, index * 64, 64);
            }
            let mut most = 0;
            while world.apps.values().any(|app| app.status.is_none()) {
                most = most.max(world.outstanding(0, 1));
                if disk_fails && most == 72 && world.state(0).disk == DiskState::UpToDate {
                    // What is on its way to the disk is announced as out of sync.
                    world.tell_manager(0, ToManager::DiskFailed);
                }
                world.step();
            }
            // 96, without the manager's 24.
            assert_eq!(most, 72);
            if disk_fails {
                world.run_until("the disk is let go", SECOND, |world| {
                    !world.nodes[0].disk_open
                });
                world.attach(0);
            }
            world.settle();
        }
    }
}

#[test]
fn who_waits_for_a_credit_has_its_turn_before_newcomers() {
    for seed in 0..5 {
        let mut world = World::clean_cluster(seed, taking(&[4096]));
        world.promote(0);
        let mut next = 0;
        let mut submit = |world: &mut World| {
            next += 1;
            world.submit(0, 0, WRITE, next % 1000 * 8, 8)
        };
        for _ in 0..72 {
            submit(&mut world);
        }
        let waiting = submit(&mut world);
        let end_ns = world.now_ns + 20 * MS;
        while world.apps[&waiting].status.is_none() {
            assert!(world.now_ns < end_ns, "it never has its turn");
            world.step();
            // Whatever becomes free is asked for at once.
            let under_way = world.apps.values().filter(|app| app.status.is_none());
            let room = 600usize.saturating_sub(under_way.count());
            for _ in 0..72usize.saturating_sub(world.outstanding(0, 1)).min(room) {
                submit(&mut world);
            }
        }
        world.settle();
    }
}

/// The world looks at the length of whatever is sent.
#[test]
fn what_a_resync_tells_goes_in_pieces_too() {
    for seed in 0..5 {
        let mut world = World::clean_cluster(seed, taking(&[600]));
        world.promote(0);
        world.cut(0, 1);
        for index in 0..400 {
            world.submit(0, 0, WRITE, index * 300, 8);
        }
        world.wait_for_io();
        world.catch(opcode::BITMAP_END);
        world.heal(0, 1);
        world.run_until("bitmaps are exchanged", 5 * SECOND, |world| {
            world.peer(0, 1).conn == ConnState::WFBitMapS && world.caught() > 0
        });
        for index in 0..200 {
            world.submit(0, 0, WRITE, index * 16 + 400, 8);
        }
        world.run_for(20 * MS);
        world.let_go();
        world.settle();
    }
}
