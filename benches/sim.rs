//! How many simulated minutes the simulated host runs in a second of one core. `cargo bench --bench sim` prints the rate;
//! with `--test` a few runs show that it works, and that this build has the same trace as others; `--seeds N` runs N.

use bdev_repl::hosts::sim::minute::{HASH_OF_SEED_1, run};
use std::time::Instant;

/// Time that this process has had a core, in seconds: others may share it. `None` where the kernel does not tell.
fn core_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    let on_core_ns: f64 = text.split(' ').next()?.parse().ok()?;
    Some(on_core_ns / 1e9)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value_of = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse().ok()
    };
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let seeds: u64 = value_of("--seeds").unwrap_or(if is_test { 4 } else { 400 });
    if is_test {
        let hash = run(1).trace_hash();
        assert_eq!(
            hash, HASH_OF_SEED_1,
            "seed 1 has the trace hash {hash:#x} in this build, {HASH_OF_SEED_1:#x} is pinned"
        );
    }
    let (started, on_core) = (Instant::now(), core_seconds());
    let events: u64 = (0..seeds).map(|seed| run(seed).steps).sum();
    let seconds = started.elapsed().as_secs_f64();
    let on_core = core_seconds()
        .zip(on_core)
        .map_or(seconds, |(end, start)| end - start);
    println!(
        "{seeds} runs of a simulated minute in {seconds:.2} s, {on_core:.2} s of them on a core: {:.0} runs per second of \
         a core, {} events a run, {:.0} ns an event",
        seeds as f64 / on_core,
        events / seeds,
        on_core * 1e9 / events as f64
    );
}
