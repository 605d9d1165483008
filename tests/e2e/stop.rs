//! SIGTERM in every state: the node ends, with exit code 0.

use std::process::Command;

use bdev_repl::cli::demo::cluster::{VOLUME, peer};
use bdev_repl::cli::demo::link::LinkState;
use bdev_repl::rpc::volume::VolumeReport;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, PATIENCE, Stage};

/// Signals from outside, as an init system does it.
fn terminate(stage: &mut Stage, index: usize) {
    let node = &mut stage.cluster.nodes[index];
    let pid = node.pid().unwrap().to_string();
    let status = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(status.success());
    node.wait_for_end()
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_node_without_volumes_ends() {
    let mut stage = Stage::new(16, Value::Null);
    stage.cluster.nodes[A].start().unwrap();
    terminate(&mut stage, A);
}

#[test]
fn new_and_unconnected_nodes_end() {
    let mut stage = Stage::new(16, Value::Null);
    stage.cluster.start(A, &Value::Null).unwrap();
    stage.cluster.nodes[B].start().unwrap();
    stage.cluster.create(B, &Value::Null).unwrap();
    terminate(&mut stage, B);
    terminate(&mut stage, A);
}

#[test]
fn connected_nodes_end_the_primary_first_or_last() {
    for first in [A, B] {
        let mut stage = Stage::paired(16, Value::Null);
        stage.write(A, 0..16 * MIB, 200);
        terminate(&mut stage, first);
        terminate(&mut stage, 1 - first);
        stage.compare();
        // What ended cleanly comes back without any resync.
        for index in [A, B] {
            stage.cluster.start(index, &Value::Null).unwrap();
        }
        stage.in_sync();
        stage.promote(A);
        stage.read_back(A, 0..16 * MIB);
        stage.end(A);
    }
}

#[test]
fn nodes_end_under_load() {
    let mut stage = Stage::paired(32, Value::Null);
    let load = stage.load(A, 0..32 * MIB);
    stage.let_write(100);
    terminate(&mut stage, B);
    stage.let_write(100);
    terminate(&mut stage, A);
    assert!(load.join().error.is_some());
    for index in [A, B] {
        stage.cluster.start(index, &Value::Null).unwrap();
    }
    stage.in_sync();
    stage.promote(A);
    stage.read_back(A, 0..32 * MIB);
    stage.end(A);
}

#[test]
fn nodes_end_while_the_link_is_silent_and_writes_are_held() {
    let mut stage = Stage::paired(16, Value::Null);
    let patient = json!({"name": VOLUME, "ping_timeout_ms": 120_000});
    for index in [A, B] {
        stage.cluster.nodes[index]
            .call("bdev_repl_set_options", patient.clone())
            .unwrap();
    }
    let load = stage.load(A, 0..16 * MIB);
    stage.let_write(100);
    stage.cluster.link.set(LinkState::Silent);
    terminate(&mut stage, A);
    terminate(&mut stage, B);
    assert!(load.join().error.is_some());
}

#[test]
fn nodes_end_in_the_middle_of_a_resync_running_or_paused() {
    for (first, paused) in [(A, false), (B, false), (A, true), (B, true)] {
        let mut stage = Stage::paired(32, Value::Null);
        let slow = json!({"name": VOLUME, "resync_rate_mb": 1});
        stage.cluster.nodes[B]
            .call("bdev_repl_set_options", slow)
            .unwrap();
        stage.write(A, 0..32 * MIB, 1000);
        stage.cluster.call(B, "bdev_repl_invalidate").unwrap();
        let started = |report: &VolumeReport| {
            peer(report).is_some_and(|peer| peer.connection == "SyncTarget")
        };
        stage
            .cluster
            .wait_until(B, "the resync has begun", PATIENCE, started)
            .unwrap();
        if paused {
            stage.cluster.call(B, "bdev_repl_pause_resync").unwrap();
        }
        terminate(&mut stage, first);
        terminate(&mut stage, 1 - first);
        for index in [A, B] {
            stage.cluster.start(index, &Value::Null).unwrap();
        }
        stage.in_sync();
        stage.compare();
    }
}

#[test]
fn a_diskless_node_ends() {
    let mut stage = Stage::paired(16, Value::Null);
    stage.write(A, 0..16 * MIB, 100);
    stage.cluster.call(A, "bdev_repl_detach").unwrap();
    terminate(&mut stage, A);
    terminate(&mut stage, B);
}
