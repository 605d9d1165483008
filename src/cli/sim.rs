//! `bdev-repl sim`: runs the engine in simulated worlds, one for each seed, and tells which invariant a seed violates and how
//! little of it is needed for that. Called by the command line.

use std::io::{IsTerminal, Write};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::hosts::sim::campaign::{Findings, Schedule, Scope, Violation, campaign, judge, shrink};
use crate::hosts::sim::coverage::{Coverage, Kind, met_by};

/// A line for whoever reads it. That nobody does any more, as behind `head`, neither ends the runs nor changes how they end.
macro_rules! say {
    ($($text:tt)*) => { drop(writeln!(std::io::stdout(), $($text)*)) };
}

/// The same on standard error.
macro_rules! warn {
    ($($text:tt)*) => { drop(writeln!(std::io::stderr(), $($text)*)) };
}

/// Arguments of `sim`.
#[derive(Debug, Args)]
pub struct SimArguments {
    /// Run this seed only, and tell its trace hash
    #[arg(long, value_name = "S", conflicts_with_all = ["seeds", "schedule"])]
    seed: Option<u64>,
    /// Run seeds from A to B, without B
    #[arg(long, value_name = "A..B", value_parser = parse_range, default_value = "0..1000")]
    seeds: Range<u64>,
    /// Run what a file says, as written by --save
    #[arg(long, value_name = "FILE", conflicts_with = "seeds")]
    schedule: Option<PathBuf>,
    /// Runs at the same time
    #[arg(long, value_name = "N", default_value_t = default_jobs())]
    jobs: usize,
    /// Nodes of a run: a number, or a range as in 2..=5
    #[arg(long, value_name = "NODES", value_parser = parse_nodes, default_value = "2")]
    nodes: RangeInclusive<usize>,
    /// Stop after so many failed seeds
    #[arg(long, value_name = "N", default_value_t = 1)]
    failures: usize,
    /// Seconds that are spent on making a failure small; 0 tells it as it is
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    shrink: u64,
    /// Write the small schedule of the first failure here
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Write how often what has happened here, as JSON
    #[arg(long, value_name = "FILE")]
    coverage: Option<PathBuf>,
    /// Write the whole story of a single run to standard error
    #[arg(long)]
    trace: bool,
}

fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let wrong = || format!("{text:?} is no range of seeds; write it as in 0..1000");
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let start = start.parse().map_err(|_| wrong())?;
    let end = end.parse().map_err(|_| wrong())?;
    if start < end {
        Ok(start..end)
    } else {
        Err(format!("{text:?} has no seed in it"))
    }
}

fn parse_nodes(text: &str) -> Result<RangeInclusive<usize>, String> {
    let (start, end) = text.split_once("..=").unwrap_or((text, text));
    match (start.parse(), end.parse()) {
        (Ok(start), Ok(end)) if 2 <= start && start <= end && end <= 5 => Ok(start..=end),
        _ => Err(format!(
            "{text:?} is no number of nodes; from 2 to 5, or a range as in 2..=5"
        )),
    }
}

/// Runs the command. The exit code is 1 if an invariant was violated, 2 if there was nothing to run.
pub fn run(arguments: &SimArguments) -> ExitCode {
    let scope = Scope {
        nodes: arguments.nodes.clone(),
    };
    let single = match (&arguments.schedule, arguments.seed) {
        (Some(path), _) => match read_schedule(path) {
            Ok(schedule) => Some(schedule),
            Err(error) => {
                warn!("{error}");
                return ExitCode::from(2);
            }
        },
        (None, Some(seed)) => Some(Schedule::from_seed(seed, &scope)),
        (None, None) => None,
    };
    match single {
        Some(schedule) => run_one(arguments, &schedule),
        None => run_many(arguments, &scope),
    }
}

fn read_schedule(path: &Path) -> Result<Schedule, String> {
    let shown = path.display();
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("{shown} is no schedule: {error}"))
}

fn run_one(arguments: &SimArguments, schedule: &Schedule) -> ExitCode {
    match judge(schedule, arguments.trace) {
        Ok(outcome) => {
            say!(
                "seed {}: ok, {:.1} virtual seconds, {} steps, trace hash {:016x}",
                schedule.seed,
                outcome.virtual_ns as f64 / 1e9,
                outcome.steps,
                outcome.trace_hash
            );
            tell_coverage(arguments, &outcome.coverage);
            ExitCode::SUCCESS
        }
        Err(violation) => {
            tell(arguments, schedule, &violation);
            ExitCode::FAILURE
        }
    }
}

fn run_many(arguments: &SimArguments, scope: &Scope) -> ExitCode {
    let seeds = &arguments.seeds;
    say!(
        "seeds {}..{}, {} jobs",
        seeds.start,
        seeds.end,
        arguments.jobs
    );
    let began = Instant::now();
    let findings = with_progress(seeds.end - seeds.start, |progress| {
        campaign(
            seeds.clone(),
            scope,
            arguments.jobs,
            arguments.failures,
            progress,
        )
    });
    summarise(&findings, began.elapsed());
    tell_coverage(arguments, &findings.coverage);
    for (seed, violation) in findings.failures.iter().skip(1) {
        say!(
            "seed {seed} violates {}: {}",
            violation.invariant,
            violation.title()
        );
    }
    match findings.failures.first() {
        None => ExitCode::SUCCESS,
        Some((seed, violation)) => {
            tell(arguments, &Schedule::from_seed(*seed, scope), violation);
            ExitCode::FAILURE
        }
    }
}

fn with_progress<T>(runs: u64, work: impl FnOnce(&(dyn Fn(u64, usize) + Sync)) -> T) -> T {
    if !std::io::stderr().is_terminal() {
        let began = Instant::now();
        let told_s = AtomicU64::new(0);
        return work(&|done, failed| {
            let seconds = began.elapsed().as_secs();
            if seconds >= told_s.load(Ordering::Relaxed) + 10 {
                told_s.store(seconds, Ordering::Relaxed);
                warn!(
                    "{done} of {runs} runs, {} a second, {failed} failed",
                    done / seconds
                );
            }
        });
    }
    let bar = ProgressBar::new(runs);
    let style = "{wide_bar} {pos}/{len} runs, {per_sec}, {msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    let result = work(&|done, failed| {
        bar.set_position(done);
        bar.set_message(format!("{failed} failed"));
    });
    bar.finish();
    result
}

fn summarise(findings: &Findings, took: Duration) {
    let seconds = took.as_secs_f64().max(0.001);
    say!(
        "{} runs, {} failed; {:.0} virtual seconds in {seconds:.1} s, {:.1} runs and {:.0} steps a second",
        findings.runs,
        findings.failures.len(),
        findings.virtual_ns as f64 / 1e9,
        findings.runs as f64 / seconds,
        findings.steps as f64 / seconds,
    );
}

/// How often what has happened, and what never has.
fn tell_coverage(arguments: &SimArguments, coverage: &Coverage) {
    for kind in Kind::ALL {
        let counters = coverage.of(kind).into_iter();
        let counters: Vec<String> = counters
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        say!("{}: {}", kind.name(), counters.join(", "));
    }
    for (kind, name) in coverage.missing() {
        match met_by(kind, &name, *arguments.nodes.end()) {
            Some(place) => say!("never among {}: {name}; met by {place}", kind.name()),
            None => say!("never among {}: {name}", kind.name()),
        }
    }
    for (kind, name) in coverage.surprises() {
        say!(
            "among {}, though said to be unreachable: {name}",
            kind.name()
        );
    }
    if let Some(path) = &arguments.coverage {
        let text = serde_json::to_string_pretty(&coverage.json()).unwrap_or_default();
        match std::fs::write(path, text + "\n") {
            Ok(()) => say!("written to {}", path.display()),
            Err(error) => warn!("cannot write {}: {error}", path.display()),
        }
    }
}

/// Everything that is needed to replay and to understand a failure.
fn tell(arguments: &SimArguments, schedule: &Schedule, violation: &Violation) {
    say!(
        "seed {} violates {}: {}",
        schedule.seed,
        violation.invariant,
        violation.text
    );
    say!("at {}", violation.place);
    say!("commit {}", commit());
    if arguments.schedule.is_none() {
        let (fewest, most) = (arguments.nodes.start(), arguments.nodes.end());
        say!(
            "again with: bdev-repl sim --seed {} --nodes {fewest}..={most}",
            schedule.seed
        );
    }
    if arguments.shrink == 0 {
        return;
    }
    let until = Instant::now() + Duration::from_secs(arguments.shrink);
    let failure = shrink(schedule, violation, until);
    say!(
        "\nas small as it gets ({} of {} deeds, {} tries), it says: {}",
        failure.schedule.deeds.len(),
        schedule.deeds.len(),
        failure.tries,
        failure.violation.text
    );
    say!("{:?}", failure.schedule.shape);
    for planned in &failure.schedule.deeds {
        say!("  {:>9} µs  {:?}", planned.at_us, planned.deed);
    }
    if let Some(path) = &arguments.save {
        let text = serde_json::to_string_pretty(&failure.schedule).unwrap_or_default();
        match std::fs::write(path, text + "\n") {
            Ok(()) => say!("written to {}", path.display()),
            Err(error) => warn!("cannot write {}: {error}", path.display()),
        }
    }
}

/// Of the sources that it was built from; they may have changed since, so what does not fail again was built before that.
fn commit() -> String {
    let git = std::process::Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR")])
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    match git {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => format!("unknown, version {}", env!("CARGO_PKG_VERSION")),
    }
}
