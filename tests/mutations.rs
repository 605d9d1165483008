//! Breaks the engine on purpose, one rule at a time, and shows that the simulator notices each break within `SEEDS_MAX`
//! seeds. A break that it does not notice is a hole in its schedules or checkers.
//!
//! `BDEV_REPL_MUTATIONS` names the breaks to be made, separated by commas; if it is not set, all of them are.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bdev_repl::engine::mutation::{self, Mutation};
use bdev_repl::hosts::sim::campaign::{Schedule, Scope, Violation, judge};

/// Seeds of two nodes in which a break has to be noticed.
const SEEDS_MAX: u64 = 2000;

/// The first seed that notices the break, and how.
fn first_violation(mutation: Mutation) -> Option<(u64, Violation)> {
    let scope = Scope::default();
    (0..SEEDS_MAX).find_map(|seed| {
        let schedule = Schedule::from_seed(seed, &scope);
        mutation::set(Some(mutation));
        let violation = judge(&schedule, false).err();
        mutation::set(None);
        let violation = violation?;
        // What is violated without the break too says nothing about it.
        judge(&schedule, false).is_ok().then_some((seed, violation))
    })
}

/// The breaks that the environment names, or all that have been noticed before.
fn chosen() -> Vec<Mutation> {
    let Ok(names) = std::env::var("BDEV_REPL_MUTATIONS") else {
        println!("left out, as no seed notices them: {:?}", Mutation::HOLES);
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
                    let Some((seed, violation)) = found else {
                        println!("{name:<32} not noticed in {SEEDS_MAX} seeds, {seconds:.1} s");
                        unnoticed.lock().unwrap().push(name);
                        continue;
                    };
                    let Violation { invariant, .. } = &violation;
                    let (seeds, title) = (seed + 1, violation.title());
                    println!("{name:<32} {seeds:>4} seeds {seconds:>5.1} s  [{invariant}] {title}");
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
