//! Links that are lost and come back at every moment: what was missed is found, what is late is refused.

use crate::engine::manager::Order;
use crate::engine::peer::command::opcode;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::host::AppStatus;
use crate::hosts::sim::world::{Config, MS, SECOND, World};

const WRITE: RequestKind = RequestKind::Write { fua: false };

fn primary_pair(seed: u64, config: Config) -> World {
    let mut world = World::clean_cluster(seed, config);
    world.promote(0);
    world
}

/// Node 1 lacks `extents` times a few blocks of what node 0 has, and they are about to connect.
pub fn behind(seed: u64, config: Config) -> World {
    let mut world = primary_pair(seed, config);
    world.write(0, 0, 16);
    world.cut(0, 1);
    for place in 0..40 {
        world.write(0, place * 211, 24);
    }
    world.run_for(300 * MS);
    world
}

#[test]
fn a_bit_that_appears_between_hello_and_connected_is_not_forgotten() {
    for caught in [opcode::HELLO_PUT, opcode::CONFIRM] {
        for seed in 0..20 {
            let mut world = primary_pair(seed, Config::default());
            world.reset(0, 1);
            world.catch(caught);
            world.run_until("a handshake is under way", SECOND, |world| {
                world.caught() >= 1
            });
            world.run_for(seed * 100_000);
            let write = world.submit(0, 0, WRITE, 80, 8);
            world.run_for(seed % 3 * MS);
            world.let_go();
            world.run_until("it is acknowledged", 5 * SECOND, |world| {
                world.apps[&write].status.is_some()
            });
            world.settle();
        }
    }
}

#[test]
fn a_late_write_of_an_old_session_is_refused() {
    for seed in 0..20 {
        let mut world = primary_pair(seed, Config::default());
        world.catch(opcode::WRITE);
        let old = world.submit(0, 0, WRITE, 8, 8);
        world.run_until("the write is on its way", SECOND, |world| {
            world.caught() == 1
        });
        world.reset(0, 1);
        world.run_until("it is acknowledged without the peer", SECOND, |world| {
            world.apps[&old].status == Some(AppStatus::Ok)
        });
        world.settle();
        // Not by `write`: a newer one must not be caught.
        world.io(0, RequestKind::WriteZeroes { fua: false }, 8, 8);
        let fenced = world.fenced;
        world.let_go();
        world.run_for(20 * MS);
        assert_eq!(world.fenced, fenced + 1);
        world.settle();
    }
}

#[test]
fn a_write_completes_while_a_resync_read_of_its_blocks_is_on_its_way() {
    for seed in 0..10 {
        let mut world = behind(seed, Config::default());
        world.catch(opcode::RESYNC_READ);
        world.heal(0, 1);
        world.run_until("it is being pulled", SECOND, |world| world.caught() > 0);
        world.write(0, 2, 3);
        world.write(0, 211, 24);
        world.let_go();
        world.settle();
    }
}

#[test]
fn a_write_that_the_target_got_while_it_pulled_is_not_overwritten_by_older_data() {
    for seed in 0..40 {
        let mut world = behind(seed, Config::default());
        world.heal(0, 1);
        world.run_until("it pulls", SECOND, |world| {
            world.peer(1, 0).conn == ConnState::SyncTarget
        });
        for _ in 0..40 {
            for _ in 0..4 {
                let lba = world.random.below(40) * 211 + world.random.below(30);
                let busy = world.apps.values().any(|app| {
                    app.status.is_none()
                        && app.lba < lba + 6
                        && lba < app.lba + u64::from(app.blocks)
                });
                if !busy {
                    world.submit(0, 0, WRITE, lba, 1 + (lba % 5) as u32);
                }
            }
            world.run_for(50_000);
        }
        world.wait_for_io();
        world.settle();
    }
}

#[test]
fn a_primary_that_is_the_target_reads_stale_blocks_from_the_source() {
    for seed in 0..40 {
        let config = Config {
            cores: 1 + (seed % 2) as usize,
            ..Config::default()
        };
        let mut world = behind(seed, config);
        world.carry_out(1, Order::PauseResync);
        world.heal(0, 1);
        world.run_until("the resync is held", SECOND, |world| {
            world.peer(1, 0).conn == ConnState::PausedSyncT
        });
        world.run_for(5 * MS);
        world.carry_out(0, Order::Demote);
        world.run_for(5 * MS);
        world.promote(1);
        for place in 0..40 {
            world.read(1, place * 211, 24);
        }
        world.write(1, 211, 3);
        world.read(1, 211, 24);
        world.carry_out(1, Order::ResumeResync);
        for _ in 0..60 {
            let lba = world.random.below(40) * 211 + world.random.below(30);
            let busy = world.apps.values().any(|app| {
                app.status.is_none() && app.lba < lba + 6 && lba < app.lba + u64::from(app.blocks)
            });
            if !busy {
                world.submit(1, 0, WRITE, lba, 1 + (lba % 5) as u32);
            }
            world.submit(1, 0, RequestKind::Read, lba, 6);
            world.run_for(40_000);
        }
        world.wait_for_io();
        world.settle();
        assert!(world.is_primary(1));
    }
}

#[test]
fn a_resync_that_is_cut_off_at_any_step_goes_on() {
    for step in 0..60 {
        let mut world = behind(step, Config::default());
        world.heal(0, 1);
        world.run_until("it pulls", SECOND, |world| {
            world.peer(0, 1).conn >= ConnState::WFBitMapS
        });
        for _ in 0..step * 12 {
            world.step();
        }
        match step % 4 {
            0 => world.reset(0, 1),
            1 => {
                world.cut(0, 1);
                world.run_for(500 * MS);
                world.heal(0, 1);
            }
            2 => {
                world.kill(1);
                world.run_for(10 * MS);
                world.restart(1);
            }
            _ => {
                world.kill(0);
                world.run_for(10 * MS);
                world.restart(0);
                world.settle();
                world.promote(0);
            }
        }
        world.write(0, 5000, 8);
        world.settle();
        // What was missed, and for a crash two channels' logs; never the device.
        assert!(
            world.resynced_bytes < 48 << 20,
            "{} bytes",
            world.resynced_bytes
        );
    }
}

#[test]
fn a_target_that_loses_power_when_the_bits_are_gone_has_the_data() {
    for seed in 0..30 {
        let config = Config {
            volatile_caches: true,
            ..Config::default()
        };
        let mut world = behind(seed, config);
        world.heal(0, 1);
        world.run_until("it pulls", SECOND, |world| {
            world.peer(0, 1).conn == ConnState::SyncSource
        });
        let some = world.peer(0, 1).out_of_sync_bytes;
        let left = if seed % 2 == 0 { 0 } else { some - 1 };
        while world.peer(0, 1).out_of_sync_bytes > left {
            world.step();
        }
        world.power_loss(1);
        world.restart(1);
        world.settle();
    }
}

#[test]
fn resynced_bytes_are_those_that_were_missed() {
    for granularity_log2 in [vec![12], vec![12, 16], vec![16, 12], vec![20, 14]] {
        for seed in 0..5 {
            let config = Config {
                granularity_log2: granularity_log2.clone(),
                ..Config::default()
            };
            let mut world = behind(seed, config);
            world.heal(0, 1);
            world.settle();
            let coarsest = granularity_log2.iter().copied().max().unwrap_or(12);
            let most = 41 * (2 << coarsest).max(24 * 512 + 8192);
            assert!(
                world.resynced_bytes <= most,
                "{} bytes",
                world.resynced_bytes
            );
        }
    }
}

#[test]
fn a_secondary_whose_primary_went_on_is_outdated_by_disconnect_and_comes_back() {
    let mut world = primary_pair(3, Config::default());
    world.carry_out(0, Order::Disconnect { node_id: None });
    world.run_for(20 * MS);
    assert_eq!(world.state(1).disk, DiskState::Outdated);
    assert!(world.ordered(1, Order::Promote { force: false }).is_err());
    world.write(0, 100, 8);
    let connect = Order::Connect {
        node_id: None,
        discard_my_data: false,
    };
    world.carry_out(0, connect.clone());
    world.carry_out(1, connect);
    world.settle();
}
/// Writes of the first granules of the volume without pause: for each of them one under way, and some that wait for it.
struct WithoutPause {
    node: usize,
    granules: usize,
    under_way: Vec<Option<u64>>,
}

impl WithoutPause {
    fn new(node: usize, granules: usize, per_granule: usize) -> WithoutPause {
        WithoutPause {
            node,
            granules,
            under_way: vec![None; granules * per_granule],
        }
    }

    fn go_on(&mut self, world: &mut World) {
        for (index, write) in self.under_way.iter_mut().enumerate() {
            if write.is_none_or(|id| world.apps[&id].status.is_some()) {
                let core = world.random.below(world.config.cores as u64) as usize;
                let lba = (index % self.granules * 8) as u64;
                *write = Some(world.submit(self.node, core, WRITE, lba, 8));
            }
        }
    }
}

#[test]
fn a_piece_of_a_resync_gets_its_turn_among_writes_without_pause() {
    for seed in 0..16 {
        let config = Config {
            cores: 1 + (seed % 2) as usize,
            ..Config::default()
        };
        // Many that are there at any time; and few, of which some always wait for so long that they reserve.
        let (granules, per_granule) = if seed < 8 { (32, 2) } else { (4, 20) };
        let mut world = primary_pair(seed, config);
        world.checks_content = false;
        world.cut(0, 1);
        world.write(0, 0, granules as u32 * 8);
        world.run_for(300 * MS);
        world.carry_out(1, Order::PauseResync);
        world.heal(0, 1);
        world.run_until("the resync is held", SECOND, |world| {
            world.peer(1, 0).conn == ConnState::PausedSyncT
        });
        world.run_for(5 * MS);
        let primary = (seed / 2 % 2) as usize;
        if primary == 1 {
            // The Primary itself is the target.
            world.carry_out(0, Order::Demote);
            world.run_for(5 * MS);
            world.promote(1);
        }
        let mut writes = WithoutPause::new(primary, granules, per_granule);
        let resume = world.order(1, Order::ResumeResync);
        let end_ns = world.now_ns + 300 * MS;
        while world.peer(0, 1).conn != ConnState::Connected
            || world.state(1).disk != DiskState::UpToDate
        {
            assert!(world.now_ns < end_ns, "{}", world.describe());
            for _ in 0..16 {
                writes.go_on(&mut world);
                world.step();
            }
        }
        assert!(world.outcome(1, resume).is_some());
        world.wait_for_io();
        world.settle();
    }
}

#[test]
fn what_a_resync_waited_for_is_free_when_it_is_given_up() {
    for primary in 0..2 {
        let mut world = behind(1, Config::default());
        world.carry_out(1, Order::PauseResync);
        world.heal(0, 1);
        world.run_until("the resync is held", SECOND, |world| {
            world.peer(1, 0).conn == ConnState::PausedSyncT
        });
        world.run_for(5 * MS);
        if primary == 1 {
            world.carry_out(0, Order::Demote);
            world.run_for(5 * MS);
            world.promote(1);
        }
        // It has its range at the Primary, and does not get through to the other.
        world.catch(opcode::WRITE);
        world.submit(primary, 0, WRITE, 208, 8);
        world.run_until("the write is on its way", SECOND, |world| {
            world.caught() == 1
        });
        world.carry_out(1, Order::ResumeResync);
        world.run_for(50 * MS);
        let engine = world.nodes[primary].engine.as_ref().expect("it runs");
        // A part of the same piece that nobody writes.
        assert!(!engine.shared.range_lock.try_lock(28..29));
        world.cut(0, 1);
        world.run_for(500 * MS);
        world.wait_for_io();
        assert!(world.is_unlocked(0) && world.is_unlocked(1));
        world.heal(0, 1);
        world.let_go();
        world.settle();
    }
}
