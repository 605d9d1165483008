//! A backing bdev that does not answer, and the end of whatever waits for it: deletion, detach, hot remove, and SIGTERM with
//! hosts that still wait for their I/O.

use std::time::{Duration, Instant};

use bdev_repl::cli::demo::cluster::{BASE_BDEV, VOLUME};
use serde_json::json;

use crate::stage::{A, B, MIB, Stage};
use crate::targets::{
    FAULTY, ONE_CORE_EACH, TWO_CORES_EACH, call, delete, end, inject, is_diskless, log,
    paired_over, paired_with_a_faulty_disk, stop, wait,
};
use crate::tools::alone;

const SIZE_MB: u64 = 32;
const WHOLE: std::ops::Range<u64> = 0..SIZE_MB * MIB;
/// Overdue after three seconds, then a reset; twice, since what the engine does then may meet the same device.
const SOON: Duration = Duration::from_secs(25);

fn freeze(stage: &mut Stage) {
    inject(stage, "write", "pending", 1_000_000);
}

fn thaw(stage: &mut Stage) {
    inject(stage, "clear", "pending", 0);
}

/// It took a reset to get the I/O back, and not long.
fn was_reset_soon(stage: &Stage, began: Instant) {
    assert!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
    let log = log(stage, A);
    assert!(log.contains("it is reset"), "nothing was frozen");
    assert!(!log.contains("still holds I/O after a reset"));
}

#[test]
fn a_volume_is_deleted_whose_disk_does_not_answer() {
    let _alone = alone();
    for core_masks in [ONE_CORE_EACH, TWO_CORES_EACH] {
        let mut stage = paired_with_a_faulty_disk(core_masks, SIZE_MB);
        let load = stage.load(A, WHOLE);
        stage.let_write(200);
        freeze(&mut stage);
        let began = Instant::now();
        delete(&mut stage, A);
        was_reset_soon(&stage, began);
        assert!(load.join().error.is_some());
        thaw(&mut stage);
        let more = json!({"base_bdev": FAULTY});
        stage.cluster.create(A, &more).unwrap();
        stage.cluster.add_peer(A).unwrap();
        stage.cluster.export(A).unwrap();
        stage.in_sync();
        stage.promote(A);
        stage.read_back(A, WHOLE);
        end(stage, A);
    }
}

#[test]
fn a_disk_that_does_not_answer_can_be_pulled_and_the_hosts_go_on() {
    let _alone = alone();
    let mut stage = paired_with_a_faulty_disk(ONE_CORE_EACH, SIZE_MB);
    let load = stage.load(A, WHOLE);
    stage.let_write(200);
    freeze(&mut stage);
    let began = Instant::now();
    call(&mut stage, A, "bdev_error_delete", json!({"name": FAULTY}));
    wait(&mut stage, A, "the disk is gone", is_diskless);
    was_reset_soon(&stage, began);
    stage.let_write(200);
    let report = load.stop();
    assert!(report.error.is_none(), "{:?}", report.error);
    let attach = json!({"name": VOLUME, "base_bdev": BASE_BDEV});
    call(&mut stage, A, "bdev_repl_attach", attach);
    stage.in_sync();
    end(stage, A);
}

#[test]
fn a_disk_that_does_not_answer_is_detached_and_the_hosts_go_on() {
    let _alone = alone();
    let mut stage = paired_with_a_faulty_disk(ONE_CORE_EACH, SIZE_MB);
    let load = stage.load(A, WHOLE);
    stage.let_write(200);
    freeze(&mut stage);
    let began = Instant::now();
    call(&mut stage, A, "bdev_repl_detach", json!({"name": VOLUME}));
    wait(&mut stage, A, "the disk is detached", is_diskless);
    was_reset_soon(&stage, began);
    stage.let_write(200);
    thaw(&mut stage);
    let attach = json!({"name": VOLUME, "base_bdev": FAULTY});
    call(&mut stage, A, "bdev_repl_attach", attach);
    stage.in_sync();
    stage.let_write(200);
    let report = load.stop();
    assert!(report.error.is_none(), "{:?}", report.error);
    stage.in_sync();
    end(stage, A);
}

#[test]
fn a_target_ends_whose_hosts_wait_for_a_disk_that_does_not_answer() {
    let _alone = alone();
    for core_masks in [ONE_CORE_EACH, TWO_CORES_EACH] {
        let mut stage = paired_with_a_faulty_disk(core_masks, SIZE_MB);
        let load = stage.load(A, WHOLE);
        stage.let_write(200);
        freeze(&mut stage);
        let began = Instant::now();
        stop(&mut stage, A);
        was_reset_soon(&stage, began);
        assert!(load.join().error.is_some());
        stop(&mut stage, B);
    }
}

/// A disk below the volume of node A that answers as late as it is told to.
const LATE: &str = "late0";

fn delay(stage: &mut Stage, latency: Duration) {
    for kind in ["avg_write", "p99_write"] {
        let latency_us = latency.as_micros() as u64;
        let params =
            json!({"delay_bdev_name": LATE, "latency_type": kind, "latency_us": latency_us});
        call(stage, A, "bdev_delay_update_latency", params);
    }
}

#[test]
fn volumes_and_targets_end_over_a_disk_that_answers_late() {
    let _alone = alone();
    for (latency, is_reset) in [(500, false), (600_000, true)] {
        let params = json!({
            "base_bdev_name": BASE_BDEV, "name": LATE, "uuid": "6f2a7f0c-3c52-4c2e-9d0b-5f8a3a1e00ef",
            "avg_read_latency": 0, "p99_read_latency": 0, "avg_write_latency": 0, "p99_write_latency": 0,
        });
        let mut stage = paired_over(ONE_CORE_EACH, SIZE_MB, "bdev_delay_create", params, LATE);
        for is_deleted in [true, false] {
            let load = stage.load(A, WHOLE);
            stage.let_write(200);
            delay(&mut stage, Duration::from_millis(latency));
            if !is_reset {
                stage.let_write(8);
            }
            let began = Instant::now();
            if is_deleted {
                delete(&mut stage, A);
            } else {
                stop(&mut stage, A);
            }
            assert!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
            assert_eq!(log(&stage, A).contains("it is reset"), is_reset);
            assert!(load.join().error.is_some());
            if is_deleted {
                delay(&mut stage, Duration::ZERO);
                let more = json!({"base_bdev": LATE});
                stage.cluster.create(A, &more).unwrap();
                stage.cluster.add_peer(A).unwrap();
                stage.cluster.export(A).unwrap();
                stage.in_sync();
                stage.promote(A);
                stage.read_back(A, WHOLE);
            }
        }
        stop(&mut stage, B);
    }
}
