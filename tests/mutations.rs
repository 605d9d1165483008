//! Breaks the engine on purpose, one rule at a time, and shows that the simulator notices each break within `SEEDS_MAX`
//! seeds. A break that it does not notice is a hole in its schedules or checkers.
//!
//! `BDEV_REPL_MUTATIONS` names the breaks to be made, separated by commas; if it is not set, all of them are.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bdev_repl::engine::mutation::{self, Mutation};
use bdev_repl::hosts::sim::campaign::{Schedule, Scope, Violation, judge};

/// Seeds in which a break has to be noticed.
const SEEDS_MAX: u64 = 2000;

/// Worlds in which a story that is kept is told: it happens a little differently in each.
const WORLDS_MAX: u64 = 200;

/// What has noticed a break first.
enum Noticed {
    /// A schedule that is kept for it, as seeds that show it are rare.
    ByStory(Violation),
    BySeed(u64, Violation),
}

/// What the break violates in this schedule, if nothing is violated without it: that would say nothing about it.
fn violated(mutation: Mutation, schedule: &Schedule) -> Option<Violation> {
    mutation::set(Some(mutation));
    let violation = judge(schedule, false).err();
    mutation::set(None);
    let violation = violation?;
    judge(schedule, false).is_ok().then_some(violation)
}

/// The first that notices the break: the story in `tests/breaks` with its name, if there is one, or a seed.
fn first_violation(mutation: Mutation) -> Option<Noticed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join(format!("tests/breaks/{mutation:?}.json"));
    if let Ok(text) = std::fs::read_to_string(path) {
        let story: Schedule = serde_json::from_str(&text).expect("a schedule");
        let in_world = |world: u64| Schedule {
            seed: story.seed.wrapping_add(world),
            ..story.clone()
        };
        let found = (0..WORLDS_MAX).find_map(|world| violated(mutation, &in_world(world)));
        if let Some(violation) = found {
            return Some(Noticed::ByStory(violation));
        }
    }
    let nodes = mutation.nodes();
    let scope = Scope {
        nodes: nodes..=nodes,
    };
    (0..SEEDS_MAX).find_map(|seed| {
        let violation = violated(mutation, &Schedule::from_seed(seed, &scope))?;
        Some(Noticed::BySeed(seed, violation))
    })
}

/// The breaks that the environment names, or all that something notices.
fn chosen() -> Vec<Mutation> {
    let Ok(names) = std::env::var("BDEV_REPL_MUTATIONS") else {
        if !Mutation::HOLES.is_empty() {
            println!("left out, as nothing notices them: {:?}", Mutation::HOLES);
        }
        let known = |mutation: &Mutation| !Mutation::HOLES.contains(mutation);
        return Mutation::ALL.iter().copied().filter(known).collect();
    };
    let of_name = |name: &str| {
        let mut all = Mutation::ALL.iter().copied();
        let found = all.find(|mutation| format!("{mutation:?}") == name);
        found.unwrap_or_else(|| panic!("there is no break {name}; src/engine/mutation.rs has them"))
    };
    names.split(',').map(of_name).collect()
}

#[test]
fn the_simulator_notices_every_break_of_the_engine() {
    let mutations = chosen();
    let next = AtomicUsize::new(0);
    let unnoticed = Mutex::new(Vec::new());
    std::thread::scope(|threads| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            threads.spawn(|| {
                while let Some(&mutation) = mutations.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let name = format!("{} {mutation:?}", mutation.invariant());
                    let began = Instant::now();
                    let found = first_violation(mutation);
                    let seconds = began.elapsed().as_secs_f64();
                    let Some(noticed) = found else {
                        println!("{name:<32} not noticed in {SEEDS_MAX} seeds, {seconds:.1} s");
                        unnoticed.lock().unwrap().push(name);
                        continue;
                    };
                    let (how, violation) = match noticed {
                        Noticed::ByStory(violation) => ("its story ".to_owned(), violation),
                        Noticed::BySeed(seed, violation) => {
                            (format!("{:>4} seeds", seed + 1), violation)
                        }
                    };
                    let (invariant, title) = (&violation.invariant, violation.title());
                    println!("{name:<32} {how} {seconds:>5.1} s  [{invariant}] {title}");
                }
            });
        }
    });
    let unnoticed = unnoticed.into_inner().unwrap();
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:#?}");
}

#[test]
fn the_engine_without_a_break_violates_nothing() {
    mutation::set(None);
    for seed in 0..20 {
        judge(&Schedule::from_seed(seed, &Scope::default()), false).unwrap();
    }
}
