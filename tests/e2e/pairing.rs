//! Two nodes become a pair; the cable between them is cut and healed; roles change.

use bdev_repl::cli::demo::DemoError;
use bdev_repl::cli::demo::cluster::{VOLUME, peer};
use bdev_repl::cli::demo::link::LinkState;
use bdev_repl::hosts::embedded::nvme_tcp::blocking::ClientError;
use bdev_repl::rpc::volume::VolumeReport;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, PATIENCE, Stage};

fn code(error: &DemoError) -> Option<i32> {
    match error {
        DemoError::Rpc { source, .. } => source.code(),
        _ => None,
    }
}

fn connection(report: &VolumeReport) -> &str {
    &peer(report).unwrap().connection
}

#[test]
fn two_new_nodes_are_paired_by_three_calls_and_the_second_gets_all_data() {
    let mut stage = Stage::new(24, Value::Null);
    let cluster = &mut stage.cluster;
    cluster.nodes[A].start().unwrap();
    cluster.nodes[B].start().unwrap();
    for index in [A, B] {
        cluster.create(index, &Value::Null).unwrap();
        cluster.add_peer(index).unwrap();
        cluster.export(index).unwrap();
    }
    let report = cluster
        .wait_until(A, "connected", PATIENCE, |report| {
            connection(report) == "Connected"
        })
        .unwrap();
    assert_eq!(
        (report.disk.as_str(), report.role.as_str()),
        ("Inconsistent", "Secondary")
    );
    // Which of two new devices has the data, only the operator can say.
    let error = cluster.call(A, "bdev_repl_promote").unwrap_err();
    assert!(error.to_string().contains("force"), "{error}");
    let forced = json!({"name": VOLUME, "force": true});
    cluster.nodes[A].call("bdev_repl_promote", forced).unwrap();
    stage.write(A, 0..8 * MIB, 500);
    stage.in_sync();
    let report = stage.cluster.report(A).unwrap();
    assert_eq!(report.role, "Primary");
    let passed = stage.cluster.link.passed_bytes();
    assert!(passed > 0);
    stage.write(A, 8 * MIB..24 * MIB, 500);
    stage.end(A);
}

#[test]
fn an_existing_device_gives_its_data_to_the_second_node() {
    let mut stage = Stage::new(16, Value::Null);
    stage.cluster.start(A, &json!({"has_data": true})).unwrap();
    stage.promote(A);
    stage.write(A, 0..16 * MIB, 800);
    stage.cluster.start(B, &Value::Null).unwrap();
    stage.in_sync();
    stage.end(A);
}

#[test]
fn a_cut_link_costs_a_resync_of_what_was_written_meanwhile() {
    let mut stage = Stage::paired(64, json!({"al_extents": 8}));
    for (state, round) in [(LinkState::Closed, 0), (LinkState::Silent, 1)] {
        let options = json!({"name": VOLUME, "ping_interval_ms": 100, "ping_timeout_ms": 500});
        for index in [A, B] {
            stage.cluster.nodes[index]
                .call("bdev_repl_set_options", options.clone())
                .unwrap();
        }
        stage.write(A, 0..16 * MIB, 200);
        stage.cluster.link.set(state);
        // Writes that meet the cut are held until it is noticed, then go on.
        let written = stage.write(A, 16 * MIB..32 * MIB, 400);
        stage.wait_until_alone(A);
        stage.wait_until_alone(B);
        stage.write(A, 16 * MIB..32 * MIB, 100);
        let passed = stage.cluster.link.passed_bytes();
        stage.cluster.link.set(LinkState::Up);
        stage.in_sync();
        let passed = stage.cluster.link.passed_bytes() - passed;
        assert!(
            passed < 32 * MIB,
            "round {round}: {passed} bytes for {written} written"
        );
        stage.read_back(A, 0..32 * MIB);
        stage.compare();
    }
    stage.end(A);
}

#[test]
fn the_primary_may_be_the_one_that_is_resynced() {
    let mut stage = Stage::paired(64, Value::Null);
    // B goes on alone and becomes the newer one, then gives the role back while it is still away.
    stage.demote(A);
    stage.in_sync();
    stage.cluster.link.set(LinkState::Closed);
    stage.wait_until_alone(A);
    stage.wait_until_alone(B);
    stage.promote(B);
    stage.write(B, 0..32 * MIB, 3000);
    stage.demote(B);
    // Slow enough to be Primary in the middle of it.
    let slow = json!({"name": VOLUME, "resync_rate_mb": 1});
    stage.cluster.nodes[A]
        .call("bdev_repl_set_options", slow)
        .unwrap();
    stage.cluster.link.set(LinkState::Up);
    stage
        .cluster
        .wait_until(A, "A is the target of a resync", PATIENCE, |report| {
            connection(report) == "SyncTarget"
        })
        .unwrap();
    stage.promote(A);
    assert_eq!(stage.connection(A), "SyncTarget");
    // Stale blocks are read from B; new ones are written to both.
    stage.read_back(A, 0..32 * MIB);
    stage.write(A, 0..32 * MIB, 300);
    stage.read_back(A, 0..32 * MIB);
    let fast = json!({"name": VOLUME, "resync_rate_mb": 0});
    stage.cluster.nodes[A]
        .call("bdev_repl_set_options", fast)
        .unwrap();
    stage.in_sync();
    stage.end(A);
}

#[test]
fn only_one_node_is_primary_and_only_it_takes_writes() {
    let mut stage = Stage::paired(16, Value::Null);
    let what = "A is known to be Primary";
    stage
        .cluster
        .wait_until(B, what, PATIENCE, |report| {
            peer(report).is_some_and(|peer| peer.role == "Primary")
        })
        .unwrap();
    let error = stage.cluster.call(B, "bdev_repl_promote").unwrap_err();
    assert!(error.to_string().contains("Primary"), "{error}");
    assert_eq!(code(&error), Some(-16));
    let forced = json!({"name": VOLUME, "force": true});
    let forced = stage.cluster.nodes[B].call("bdev_repl_promote", forced);
    assert_eq!(code(&forced.unwrap_err()), Some(-16));

    stage.write(A, 0..16 * MIB, 100);
    let written = stage.client(B).write(0, &[1; 4096]);
    assert!(
        matches!(written, Err(ClientError::Command { .. })),
        "{written:?}"
    );

    stage.demote(A);
    let written = stage.client(A).write(0, &[1; 4096]);
    assert!(
        matches!(written, Err(ClientError::Command { .. })),
        "{written:?}"
    );
    stage.promote(B);
    stage.write(B, 0..16 * MIB, 100);
    stage.read_back(B, 0..16 * MIB);
    stage.end(B);
}

#[test]
fn a_resync_can_be_paused_and_an_invalidated_replica_is_fetched_whole() {
    let mut stage = Stage::paired(16, Value::Null);
    stage.write(A, 0..16 * MIB, 1000);
    stage.cluster.call(B, "bdev_repl_pause_resync").unwrap();
    stage.cluster.call(B, "bdev_repl_invalidate").unwrap();
    let paused = |report: &VolumeReport| {
        peer(report).is_some_and(|peer| {
            peer.connection == "PausedSyncT" && peer.resync.is_some_and(|resync| resync.paused)
        })
    };
    let report = stage
        .cluster
        .wait_until(B, "the resync is paused", PATIENCE, paused)
        .unwrap();
    assert_eq!(report.disk, "Inconsistent");
    stage.cluster.call(B, "bdev_repl_resume_resync").unwrap();
    stage.in_sync();
    stage.end(A);
}

#[test]
fn a_deleted_volume_leaves_its_metadata_and_comes_back_with_its_data() {
    let mut stage = Stage::paired(16, Value::Null);
    stage.write(A, 0..16 * MIB, 300);
    stage.demote(A);
    for index in [A, B] {
        // As in SPDK, the namespace that exports it goes along.
        let cluster = &mut stage.cluster;
        cluster.call(index, "bdev_repl_delete").unwrap();
        let left = cluster.nodes[index]
            .call("bdev_repl_get_volumes", Value::Null)
            .unwrap();
        assert_eq!(left, json!([]));
    }
    for index in [A, B] {
        stage.cluster.create(index, &Value::Null).unwrap();
        stage.cluster.add_peer(index).unwrap();
        stage.cluster.export(index).unwrap();
    }
    stage.in_sync();
    stage.promote(B);
    stage.read_back(B, 0..16 * MIB);
    stage.end(B);
}

#[test]
fn a_node_goes_on_without_its_disk_and_gets_it_back() {
    let mut stage = Stage::paired(16, Value::Null);
    stage.write(A, 0..16 * MIB, 300);
    stage.cluster.call(A, "bdev_repl_detach").unwrap();
    let report = stage.cluster.report(A).unwrap();
    assert_eq!(
        (report.disk.as_str(), report.role.as_str()),
        ("Diskless", "Primary")
    );
    stage.read_back(A, 0..16 * MIB);
    stage.write(A, 0..16 * MIB, 300);
    let attach = json!({"name": VOLUME, "base_bdev": "disk0"});
    stage.cluster.nodes[A]
        .call("bdev_repl_attach", attach)
        .unwrap();
    stage.in_sync();
    stage.read_back(A, 0..16 * MIB);
    stage.end(A);
}
