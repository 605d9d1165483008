//! Campaigns: runs out of many seeds, on several threads. Each is judged by itself; a failure is made small and told with
//! everything that is needed to replay it.
//!
//! [`schedule`] says what happens, [`drawing`] and [`stories`] draw it; [`run`] carries it out, with an [`operator`] and a [`workload`]; [`verdict`] says what
//! was violated; [`shrink`] takes out of a schedule what does not matter.

pub mod drawing;
pub mod operator;
pub mod run;
pub mod schedule;
pub mod shrink;
pub mod stories;
pub mod verdict;
pub mod workload;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::coverage::Coverage;
pub use run::Outcome;
pub use schedule::{Schedule, Scope};
pub use shrink::{Failure, shrink};
pub use verdict::{Violation, judge};

/// What a campaign has found.
#[derive(Debug, Default)]
pub struct Findings {
    pub runs: u64,
    pub virtual_ns: u64,
    pub steps: u64,
    /// Of the runs that violated nothing.
    pub coverage: Coverage,
    /// Failed seeds, in their order.
    pub failures: Vec<(u64, Violation)>,
}

/// Runs all seeds on `jobs` threads, and stops when `failures_max` have failed. `progress` is told how many have been run.
pub fn campaign(
    seeds: Range<u64>,
    scope: &Scope,
    jobs: usize,
    failures_max: usize,
    progress: &(dyn Fn(u64, usize) + Sync),
) -> Findings {
    let next = AtomicU64::new(seeds.start);
    let is_over = AtomicBool::new(false);
    let findings = Mutex::new(Findings::default());
    std::thread::scope(|threads| {
        for _ in 0..jobs.max(1) {
            threads.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let result = judge(&Schedule::from_seed(seed, scope), false);
                    let mut findings = findings.lock().unwrap_or_else(|error| error.into_inner());
                    findings.runs += 1;
                    match result {
                        Ok(outcome) => {
                            findings.virtual_ns += outcome.virtual_ns;
                            findings.steps += outcome.steps;
                            findings.coverage.add(&outcome.coverage);
                        }
                        Err(violation) => findings.failures.push((seed, violation)),
                    }
                    if findings.failures.len() >= failures_max {
                        is_over.store(true, Ordering::Relaxed);
                    }
                    progress(findings.runs, findings.failures.len());
                }
            });
        }
    });
    let mut findings = findings
        .into_inner()
        .unwrap_or_else(|error| error.into_inner());
    findings.failures.sort_by_key(|&(seed, _)| seed);
    findings
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_once_failed_does_not_fail_again() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
        let mut schedules = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let schedule = serde_json::from_str(&text).unwrap();
            if let Err(violation) = judge(&schedule, false) {
                panic!("{}: {violation:?}", path.display());
            }
            schedules += 1;
        }
        assert!(schedules > 0);
    }

    #[test]
    fn a_schedule_gives_the_same_trace_every_time() {
        for seed in 0..5 {
            let schedule = Schedule::from_seed(seed, &Scope::default());
            let outcomes = [(); 2].map(|()| judge(&schedule, false).unwrap());
            assert_eq!(outcomes[0], outcomes[1], "seed {seed}");
        }
    }
}
