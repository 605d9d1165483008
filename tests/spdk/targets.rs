//! Pairs of stock SPDK targets with the module preloaded, and what must hold when they have ended.
//! Used by the tests of a volume's life.

use std::fs;
use std::time::{Duration, Instant};

use bdev_repl::cli::demo::cluster::{BASE_BDEV, VOLUME, peer};
use bdev_repl::cli::demo::launcher::Launcher;
use bdev_repl::rpc::volume::VolumeReport;
use serde_json::{Value, json};

use crate::hosts::spdk_target;
use crate::stage::{A, B, PATIENCE, Stage};
use crate::tools::with_module;

pub const ONE_CORE_EACH: [&str; 2] = ["0x1", "0x2"];
pub const TWO_CORES_EACH: [&str; 2] = ["0x3", "0x3"];
/// What ends by a deadline ends within this time, on a machine that has other things to do.
pub const SECONDS: Duration = Duration::from_secs(30);

/// What SPDK, or a panic, says of what has not been given back.
const LEFT_OVER: [&str; 9] = [
    "not unregistered",
    "still has",
    "still registered",
    "is still",
    "but should be",
    "pool count",
    "Assertion",
    "panicked",
    "not released",
];

/// Two targets that have not been started.
pub fn targets(core_masks: [&str; 2], size_mb: u64, create: Value) -> Stage {
    let target = || Launcher::Spdk(with_module(spdk_target(), &[]));
    Stage::on([target(), target()], core_masks, size_mb, create)
}

/// Calls a method of one node; it must succeed.
pub fn call(stage: &mut Stage, index: usize, method: &str, params: Value) -> Value {
    let answer = stage.cluster.nodes[index].call(method, params);
    answer.unwrap_or_else(|error| panic!("{method}: {error}"))
}

/// What a node has logged.
pub fn log(stage: &Stage, index: usize) -> String {
    let log = fs::read(&stage.cluster.nodes[index].settings().log).unwrap();
    String::from_utf8_lossy(&log).into_owned()
}

/// SIGTERM: exit code 0, within seconds, and nothing is left over.
pub fn stop(stage: &mut Stage, index: usize) {
    let began = Instant::now();
    let stopped = stage.cluster.nodes[index].stop();
    stopped.unwrap_or_else(|error| panic!("{error}"));
    assert!(began.elapsed() < SECONDS, "it took {:?}", began.elapsed());
    let log = log(stage, index);
    for line in log.lines() {
        let left = LEFT_OVER.iter().find(|part| line.contains(*part));
        assert!(left.is_none(), "{line}");
    }
}

/// Stops both; whatever was acknowledged is on both replicas.
pub fn end(mut stage: Stage, primary: usize) {
    stage.demote(primary);
    stage.in_sync();
    for index in [A, B] {
        stop(&mut stage, index);
    }
    stage.compare();
}

pub fn wait(stage: &mut Stage, index: usize, what: &str, done: impl FnMut(&VolumeReport) -> bool) {
    let waited = stage.cluster.wait_until(index, what, PATIENCE, done);
    waited.unwrap_or_else(|error| panic!("{error}"));
}

pub fn is_diskless(report: &VolumeReport) -> bool {
    report.disk == "Diskless" && report.base_bdev.is_none()
}

pub fn has_disk(report: &VolumeReport, disk: &str) -> bool {
    peer(report).is_some_and(|peer| peer.disk == disk)
}

/// Takes the backing bdev away from a node, as a pulled disk is.
pub fn remove_disk(stage: &mut Stage, index: usize) {
    let params = json!({"name": BASE_BDEV});
    call(stage, index, "bdev_aio_delete", params);
}

/// Puts it back, with the UUID of its configuration or another.
pub fn return_disk(stage: &mut Stage, index: usize, uuid: Option<&str>) {
    let text = fs::read_to_string(&stage.cluster.nodes[index].settings().config).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let calls = config["subsystems"][0]["config"].as_array().unwrap();
    let create = calls
        .iter()
        .find(|call| call["method"] == "bdev_aio_create");
    let mut params = create.unwrap()["params"].clone();
    if let Some(uuid) = uuid {
        params["uuid"] = json!(uuid);
    }
    call(stage, index, "bdev_aio_create", params);
}

pub fn delete(stage: &mut Stage, index: usize) {
    let began = Instant::now();
    call(stage, index, "bdev_repl_delete", json!({"name": VOLUME}));
    assert!(began.elapsed() < SECONDS, "it took {:?}", began.elapsed());
}

/// A bdev that fails or keeps what it is told to, below the volume of node A.
pub const FAULTY: &str = "EE_disk0";

/// What happens to the next I/O of this type.
pub fn inject(stage: &mut Stage, io_type: &str, error_type: &str, times: u32) {
    let params =
        json!({"name": FAULTY, "io_type": io_type, "error_type": error_type, "num": times});
    call(stage, A, "bdev_error_inject_error", params);
}

/// Two targets with a volume each, connected; A is Primary, and its disk can fail.
pub fn paired_with_a_faulty_disk(core_masks: [&str; 2], size_mb: u64) -> Stage {
    let uuid = "6f2a7f0c-3c52-4c2e-9d0b-5f8a3a1e00ee";
    let params = json!({"base_name": BASE_BDEV, "uuid": uuid});
    paired_over(core_masks, size_mb, "bdev_error_create", params, FAULTY)
}

/// The same over a bdev of this name, which node A gets by this call.
pub fn paired_over(
    core_masks: [&str; 2],
    size_mb: u64,
    method: &str,
    params: Value,
    bdev: &str,
) -> Stage {
    let mut stage = targets(core_masks, size_mb, Value::Null);
    for (index, base) in [(A, bdev), (B, BASE_BDEV)] {
        stage.cluster.nodes[index].start().unwrap();
        if index == A {
            call(&mut stage, A, method, params.clone());
        }
        let more = json!({"assume_clean": true, "base_bdev": base});
        stage.cluster.create(index, &more).unwrap();
        stage.cluster.add_peer(index).unwrap();
        stage.cluster.export(index).unwrap();
    }
    stage.in_sync();
    stage.promote(A);
    stage
}
