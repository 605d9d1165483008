//! Volumes that are asked for before their backing bdev is there, as in a configuration that names them first: accepted,
//! shown, saved, and made when the bdev appears; what does not fit is seen then.

use std::fs::File;
use std::path::PathBuf;

use bdev_repl::cli::demo::cluster::{BASE_BDEV, VOLUME};
use bdev_repl::rpc::volume::VolumeReport;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, PATIENCE, Stage};

fn call(stage: &mut Stage, method: &str, params: Value) -> Value {
    let answer = stage.cluster.nodes[A].call(method, params);
    answer.unwrap_or_else(|error| panic!("{method}: {error}"))
}

fn add(stage: &mut Stage, name: &str, path: &PathBuf) {
    let params = json!({"name": name, "filename": path, "block_size": 4096});
    call(stage, "bdev_aio_create", params);
}

fn remove(stage: &mut Stage, name: &str) {
    call(stage, "bdev_aio_delete", json!({"name": name}));
}

/// A file of this size, which is no bdev yet.
fn file(stage: &Stage, name: &str, size_bytes: u64) -> PathBuf {
    let path = stage.cluster.settings().directory.join(name);
    let file = File::create_new(&path).unwrap();
    file.set_len(size_bytes).unwrap();
    path
}

fn wait(stage: &mut Stage, what: &str, done: impl FnMut(&VolumeReport) -> bool) -> VolumeReport {
    let waited = stage.cluster.wait_until(A, what, PATIENCE, done);
    waited.unwrap_or_else(|error| panic!("{error}"))
}

/// The calls of a saved configuration that have to do with volumes, in order.
fn saved(stage: &mut Stage) -> Vec<Value> {
    let config = call(stage, "framework_get_config", json!({"name": "bdev"}));
    let calls = config.as_array().unwrap().iter();
    let ours = |call: &&Value| call["method"].as_str().unwrap().starts_with("bdev_repl_");
    calls.filter(ours).cloned().collect()
}

#[test]
fn a_volume_is_made_with_its_peer_when_its_backing_bdev_appears() {
    let mut stage = Stage::new(8, json!({"assume_clean": true}));
    stage.cluster.start(B, &Value::Null).unwrap();
    stage.cluster.nodes[A].start().unwrap();
    remove(&mut stage, BASE_BDEV);

    stage.cluster.create(A, &Value::Null).unwrap();
    stage.cluster.add_peer(A).unwrap();
    let options = json!({"name": VOLUME, "resync_rate_mb": 77});
    call(&mut stage, "bdev_repl_set_options", options);
    let report = stage.cluster.report(A).unwrap();
    assert_eq!(
        (report.disk.as_str(), report.base_bdev.as_deref()),
        ("Diskless", Some(BASE_BDEV))
    );
    assert!(report.last_error.unwrap().contains("not there yet"));
    assert_eq!(report.peers.len(), 1);
    let promoted = stage.cluster.call(A, "bdev_repl_promote");
    assert!(promoted.unwrap_err().to_string().contains("waits"));
    // A saved configuration asks for all of it again.
    let asked = saved(&mut stage);
    let methods: Vec<_> = asked.iter().map(|call| &call["method"]).collect();
    assert_eq!(
        methods,
        [
            "bdev_repl_create",
            "bdev_repl_set_options",
            "bdev_repl_add_peer"
        ]
    );
    call(&mut stage, "bdev_repl_delete", json!({"name": VOLUME}));
    assert_eq!(saved(&mut stage), Vec::<Value>::new());
    for mut again in asked {
        let method = again["method"].as_str().unwrap().to_owned();
        call(&mut stage, &method, again["params"].take());
    }

    let backing = stage.cluster.nodes[A].settings().backing.clone();
    add(&mut stage, BASE_BDEV, &backing);
    call(&mut stage, "bdev_wait_for_examine", Value::Null);
    stage.cluster.export(A).unwrap();
    stage.in_sync();
    let report = stage.cluster.report(A).unwrap();
    assert_eq!(
        (report.last_error, report.options.resync_rate_mb),
        (None, 77)
    );
    assert_eq!(saved(&mut stage).len(), 3);
    stage.promote(A);
    stage.write(A, 0..8 * MIB, 100);
    stage.end(A);
}

#[test]
fn a_bdev_on_which_a_waiting_volume_has_no_room_is_reported_and_replaced() {
    let mut stage = Stage::new(8, Value::Null);
    stage.cluster.nodes[A].start().unwrap();
    let small = file(&stage, "small", 32 << 10);
    let large = file(&stage, "large", 64 * MIB);
    let create = json!({"base_bdev": "late"});
    stage.cluster.create(A, &create).unwrap();
    add(&mut stage, "late", &small);
    let refused = |report: &VolumeReport| {
        let error = report.last_error.as_deref().unwrap_or_default();
        error.contains("cannot be made")
    };
    let report = wait(&mut stage, "the bdev is too small", refused);
    assert!(report.last_error.unwrap().contains("too few"));
    remove(&mut stage, "late");
    wait(&mut stage, "it waits again", |report| !refused(report));
    add(&mut stage, "late", &large);
    let is_made = |report: &VolumeReport| report.last_error.is_none() && report.num_blocks > 0;
    wait(&mut stage, "it is made on what has room", is_made);

    // Deleted while it waits, it does not come.
    call(&mut stage, "bdev_repl_delete", json!({"name": VOLUME}));
    remove(&mut stage, "late");
    stage.cluster.create(A, &create).unwrap();
    call(&mut stage, "bdev_repl_delete", json!({"name": VOLUME}));
    let fresh = file(&stage, "fresh", 64 * MIB);
    add(&mut stage, "late", &fresh);
    call(&mut stage, "bdev_wait_for_examine", Value::Null);
    let volumes = call(&mut stage, "bdev_repl_get_volumes", Value::Null);
    assert_eq!(volumes, json!([]));
    stage.cluster.nodes[A].stop().unwrap();
}
