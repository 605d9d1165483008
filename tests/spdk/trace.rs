//! The trace points of a volume's requests, by SPDK's own tools.

use std::process::Command;

use bdev_repl::cli::demo::cluster::VOLUME;
use bdev_repl::cli::demo::launcher::Launcher;
use serde_json::Value;

use crate::hosts::{embedded, spdk_target};
use crate::stage::{A, Stage};
use crate::tools::{alone, installed, run, with_module};

/// The events of the volume's own requests, without the time and the number of the core in front of them.
fn events(told: &str) -> Vec<String> {
    let own = |line: &&str| line.contains("REPL_IO_");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    told.lines().filter(own).map(words).collect()
}

/// Whether one event has all of these parts.
fn has(events: &[String], parts: &[&str]) -> bool {
    events
        .iter()
        .any(|event| parts.iter().all(|part| event.contains(part)))
}

#[test]
fn spdk_trace_shows_what_a_request_asks_for_and_how_it_ended() {
    let _alone = alone();
    let traced = with_module(spdk_target(), &["-e", "bdev_repl"]);
    let hosts = [Launcher::Spdk(traced), embedded()];
    let mut stage = Stage::on(hosts, ["0x1", "0x2"], 64, Value::Null).pair();
    let mut host = stage.client(A);
    host.write(5, &[1; 3 * 4096]).unwrap();
    host.read(6, &mut [0; 4096]).unwrap();
    host.write_zeroes(64, 32).unwrap();
    host.flush().unwrap();
    let pid = stage.cluster.nodes[A].pid().unwrap().to_string();
    let mut command = Command::new(installed("spdk_trace"));
    let told = run(&stage, command.args(["-s", "spdk_tgt", "-p", &pid]));
    let events = events(&told);
    for parts in [
        &["kind: write", "lba: 5 ", "blocks:3"][..],
        &["kind: read", "lba: 6 ", "blocks:1"],
        &["kind: write_zeroes", "lba: 64 ", "blocks:32"],
        &["kind: flush"],
        &["REPL_IO_DONE", "status:ok"],
        // SPDK has looked at the volume when it appeared, on a Secondary.
        &["REPL_IO_DONE", "status:inaccessible"],
    ] {
        let parts = [parts, &[VOLUME]].concat();
        assert!(has(&events, &parts), "{parts:?} is not in\n{told}");
    }
    drop(host);
    stage.stop_both(A);
    stage.compare_replicas();
}
