//! How many simulated minutes the simulated host runs in a real second on one core: a pair under bursts of I/O, with a
//! cut link, a node that is killed, and a resync after each. `cargo bench --bench sim` prints the rate; with `--test` a
//! few runs show that it works; `--seeds N` runs N of them.

use std::time::Instant;

use bdev_repl::engine::request::RequestKind;
use bdev_repl::hosts::sim::World;
use bdev_repl::hosts::sim::world::{Config, SECOND};

const MINUTE_NS: u64 = 60 * SECOND;
/// A burst every two seconds.
const BURSTS: u64 = 30;
const BURST_IOS: u64 = 20;
const CUT_AT: u64 = 5;
const HEAL_AT: u64 = 8;
const KILL_AT: u64 = 14;
const RESTART_AT: u64 = 17;

/// One simulated minute; returns how many events there were.
fn run(seed: u64) -> u64 {
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
    world.steps
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value_of = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse().ok()
    };
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let seeds: u64 = value_of("--seeds").unwrap_or(if is_test { 4 } else { 400 });
    let started = Instant::now();
    let events: u64 = (0..seeds).map(run).sum();
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{seeds} runs of a simulated minute in {seconds:.2} s: {:.0} runs/s, {} events a run, {:.0} ns an event",
        seeds as f64 / seconds,
        events / seeds,
        seconds * 1e9 / events as f64
    );
}
