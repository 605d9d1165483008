//! One simulated minute of a pair: bursts of I/O, a cut link, a node that is killed, a resync after each. What the
//! benchmark measures, and the run whose trace hash every build must agree on.

use super::world::{Config, SECOND, World};
use crate::engine::request::RequestKind;

const MINUTE_NS: u64 = 60 * SECOND;
/// A burst every two seconds.
const BURSTS: u64 = 30;
const BURST_IOS: u64 = 20;
const CUT_AT: u64 = 5;
const HEAL_AT: u64 = 8;
const KILL_AT: u64 = 14;
const RESTART_AT: u64 = 17;

/// The trace hash of seed 1. It changes with whatever the engine does differently; a build that finds another one than
/// the others is not deterministic.
pub const HASH_OF_SEED_1: u64 = 0xd635_5d16_f5f4_24f5;

/// The world at the end of the minute, settled and checked.
pub fn run(seed: u64) -> World {
    let config = Config {
        cores: 1 + (seed % 2) as usize,
        ping_interval_ms: 1000,
        ping_timeout_ms: 300,
        ..Config::default()
    };
    let mut world = World::clean_cluster(seed, config);
    world.promote(0);
    let start_ns = world.now_ns;
    for burst in 0..BURSTS {
        match burst {
            CUT_AT => world.cut(0, 1),
            HEAL_AT => world.heal(0, 1),
            KILL_AT => world.kill(1),
            RESTART_AT => world.restart(1),
            _ => {}
        }
        for _ in 0..BURST_IOS {
            match world.random.below(10) {
                0 => drop(world.submit(0, 0, RequestKind::Flush, 0, 0)),
                1..4 => world.submit_random_read(0),
                _ => drop(world.submit_random_write(0)),
            }
        }
        let next_ns = start_ns + (burst + 1) * MINUTE_NS / BURSTS;
        world.run_for(next_ns.saturating_sub(world.now_ns));
    }
    world.wait_for_io();
    world.settle();
    world
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_has_one_trace_in_every_build() {
        let hashes = [run(1), run(1)].map(|world| world.trace_hash());
        assert_eq!(hashes[0], hashes[1], "two runs of one seed differ");
        assert_eq!(
            hashes[0], HASH_OF_SEED_1,
            "the engine or the world has changed: then pin {:#x}; if neither has, this build differs from others",
            hashes[0]
        );
        assert_ne!(run(2).trace_hash(), hashes[0]);
    }
}
