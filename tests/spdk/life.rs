//! A volume's life in SPDK: found by itself, its disk pulled, deleted and shut down in the middle of
//! everything. After each, SPDK has nothing left over, and the replicas are the same.

use std::io::Write;
use std::os::unix::net::UnixStream;

use bdev_repl::cli::demo::cluster::{BASE_BDEV, SUBSYSTEM_NQN, VOLUME, peer};
use bdev_repl::cli::demo::link::LinkState;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, Stage};
use crate::targets::{
    FAULTY, ONE_CORE_EACH, TWO_CORES_EACH, call, delete, end, has_disk, inject, is_diskless, log,
    paired_with_a_faulty_disk, remove_disk, return_disk, stop, targets, wait,
};
use crate::tools::alone;

const SIZE_MB: u64 = 32;
const WHOLE: std::ops::Range<u64> = 0..SIZE_MB * MIB;

fn paired(core_masks: [&str; 2]) -> Stage {
    targets(core_masks, SIZE_MB, Value::Null).pair()
}

#[test]
fn a_volume_comes_back_when_its_backing_bdev_appears_and_a_configuration_completes_it() {
    let _alone = alone();
    let mut stage = paired(ONE_CORE_EACH);
    stage.write(A, WHOLE, 300);
    stage.demote(A);
    stop(&mut stage, A);
    stage.cluster.nodes[A].start().unwrap();
    call(&mut stage, A, "bdev_wait_for_examine", Value::Null);
    let found = stage.cluster.report(A).unwrap();
    assert_eq!(
        (found.name.as_str(), found.base_bdev.as_deref()),
        (VOLUME, Some(BASE_BDEV))
    );
    assert!(
        found
            .peers
            .iter()
            .all(|peer| peer.connection != "Connected")
    );
    // With another node id it is not the same.
    let mut other = stage.cluster.create_parameters(A, &Value::Null);
    other["node_id"] = json!(5);
    let refused = stage.cluster.nodes[A].call("bdev_repl_create", other);
    assert!(refused.is_err(), "{refused:?}");
    stage.cluster.create(A, &Value::Null).unwrap();
    stage.cluster.add_peer(A).unwrap();
    stage.cluster.export(A).unwrap();
    stage.in_sync();
    stage.promote(A);
    stage.read_back(A, WHOLE);
    end(stage, A);
}

#[test]
fn a_copy_of_a_replica_is_left_alone_and_the_original_is_not() {
    let _alone = alone();
    let mut stage = paired(ONE_CORE_EACH);
    stage.demote(A);
    delete(&mut stage, A);
    remove_disk(&mut stage, A);
    let copy = "6f2a7f0c-3c52-4c2e-9d0b-5f8a3a1e00ff";
    return_disk(&mut stage, A, Some(copy));
    call(&mut stage, A, "bdev_wait_for_examine", Value::Null);
    let volumes = call(&mut stage, A, "bdev_repl_get_volumes", Value::Null);
    assert_eq!(volumes, json!([]));
    assert!(log(&stage, A).contains("a copy is not attached"));
    remove_disk(&mut stage, A);
    return_disk(&mut stage, A, None);
    call(&mut stage, A, "bdev_wait_for_examine", Value::Null);
    assert_eq!(
        stage.cluster.report(A).unwrap().base_bdev.as_deref(),
        Some(BASE_BDEV)
    );
    for index in [A, B] {
        stop(&mut stage, index);
    }
}

#[test]
fn a_disk_that_is_pulled_under_load_and_put_back_is_resynced_by_itself() {
    let _alone = alone();
    for (pulled, core_masks) in [(A, ONE_CORE_EACH), (B, ONE_CORE_EACH), (A, TWO_CORES_EACH)] {
        let mut stage = paired(core_masks);
        let load = stage.load(A, WHOLE);
        stage.let_write(200);
        remove_disk(&mut stage, pulled);
        wait(&mut stage, pulled, "the disk is gone", is_diskless);
        stage.let_write(200);
        return_disk(&mut stage, pulled, None);
        stage.in_sync();
        stage.let_write(200);
        let report = load.stop();
        assert!(report.error.is_none(), "{:?}", report.error);
        stage.in_sync();
        end(stage, A);
    }
}

#[test]
fn two_reactors_replicate_through_cuts_resyncs_detaches_and_deletion() {
    let _alone = alone();
    let mut stage = paired(TWO_CORES_EACH);
    let load = stage.load(A, WHOLE);
    stage.let_write(200);
    for state in [LinkState::Closed, LinkState::Silent] {
        stage.cluster.link.set(state);
        stage.wait_until_alone(A);
        stage.let_write(200);
        stage.cluster.link.set(LinkState::Up);
        stage.in_sync();
    }
    stage.cluster.call(B, "bdev_repl_invalidate").unwrap();
    stage.let_write(200);
    stage.in_sync();
    for index in [B, A] {
        stage.cluster.call(index, "bdev_repl_detach").unwrap();
        wait(&mut stage, index, "the disk is detached", is_diskless);
        stage.let_write(200);
        let attach = json!({"name": VOLUME, "base_bdev": BASE_BDEV});
        call(&mut stage, index, "bdev_repl_attach", attach);
        stage.in_sync();
    }
    // The peer is deleted under load, and comes back.
    delete(&mut stage, B);
    stage.let_write(200);
    stage.cluster.create(B, &Value::Null).unwrap();
    stage.cluster.add_peer(B).unwrap();
    stage.in_sync();
    stage.let_write(200);
    // Then the volume, with the hosts that write to it.
    delete(&mut stage, A);
    assert!(load.join().error.is_some());
    stage.cluster.create(A, &Value::Null).unwrap();
    stage.cluster.add_peer(A).unwrap();
    stage.cluster.export(A).unwrap();
    stage.in_sync();
    stage.promote(A);
    stage.read_back(A, WHOLE);
    end(stage, A);
}

#[test]
fn two_reactors_end_under_load_and_in_the_middle_of_a_resync() {
    let _alone = alone();
    for first in [A, B] {
        let mut stage = paired(TWO_CORES_EACH);
        let slow = json!({"name": VOLUME, "resync_rate_mb": 1});
        call(&mut stage, B, "bdev_repl_set_options", slow);
        let load = stage.load(A, WHOLE);
        stage.let_write(500);
        stage.cluster.call(B, "bdev_repl_invalidate").unwrap();
        wait(&mut stage, B, "the resync has begun", |report| {
            peer(report).is_some_and(|peer| peer.connection == "SyncTarget")
        });
        stop(&mut stage, first);
        stop(&mut stage, 1 - first);
        assert!(load.join().error.is_some());
        for index in [A, B] {
            stage.cluster.start(index, &Value::Null).unwrap();
        }
        stage.in_sync();
        stage.promote(A);
        stage.read_back(A, WHOLE);
        end(stage, A);
    }
}

#[test]
fn a_volume_is_deleted_while_its_writes_are_held() {
    let _alone = alone();
    let mut stage = paired(ONE_CORE_EACH);
    let patient = json!({"name": VOLUME, "ping_timeout_ms": 120_000});
    for index in [A, B] {
        call(&mut stage, index, "bdev_repl_set_options", patient.clone());
    }
    let load = stage.load(A, WHOLE);
    stage.let_write(100);
    stage.cluster.link.set(LinkState::Silent);
    delete(&mut stage, A);
    assert!(load.join().error.is_some());
    delete(&mut stage, B);
    for index in [A, B] {
        stop(&mut stage, index);
    }
}

#[test]
fn a_device_that_is_opened_when_its_volume_is_deleted_is_let_go() {
    let _alone = alone();
    let mut stage = paired(ONE_CORE_EACH);
    stage.demote(A);
    call(&mut stage, A, "bdev_repl_detach", json!({"name": VOLUME}));
    let request = |method: &str, params: Value| {
        json!({"jsonrpc": "2.0", "id": method, "method": method, "params": params}).to_string()
    };
    let attach = json!({"name": VOLUME, "base_bdev": BASE_BDEV});
    let attach = request("bdev_repl_attach", attach);
    let delete = request("bdev_repl_delete", json!({"name": VOLUME}));
    // What arrives together is begun together.
    let path = &stage.cluster.nodes[A].settings().rpc_socket;
    let mut socket = UnixStream::connect(path).unwrap();
    socket.write_all((attach + &delete).as_bytes()).unwrap();
    let answers = serde_json::Deserializer::from_reader(&socket).into_iter::<Value>();
    for answer in answers.take(2) {
        let answer = answer.unwrap();
        if answer["id"] == "bdev_repl_attach" {
            assert_eq!(answer["error"]["code"], -16, "{answer}");
        } else {
            assert_eq!(answer["result"], true, "{answer}");
        }
    }
    let bdev = call(&mut stage, A, "bdev_get_bdevs", json!({"name": BASE_BDEV}));
    assert_eq!(bdev[0]["claimed"], false);
    stage.cluster.create(A, &Value::Null).unwrap();
    stage.cluster.add_peer(A).unwrap();
    stage.in_sync();
    for index in [A, B] {
        stop(&mut stage, index);
    }
}

#[test]
fn a_volume_is_deleted_below_logical_volumes() {
    let _alone = alone();
    let mut stage = paired(ONE_CORE_EACH);
    let namespace = json!({"nqn": SUBSYSTEM_NQN, "nsid": 1});
    call(&mut stage, A, "nvmf_subsystem_remove_ns", namespace);
    let store = json!({"bdev_name": VOLUME, "lvs_name": "store", "cluster_sz": 1 << 20});
    call(&mut stage, A, "bdev_lvol_create_lvstore", store);
    let volume = json!({"lvs_name": "store", "lvol_name": "v", "size_in_mib": 8});
    call(&mut stage, A, "bdev_lvol_create", volume);
    let namespace = json!({"bdev_name": "store/v", "nsid": 1});
    let namespace = json!({"nqn": SUBSYSTEM_NQN, "namespace": namespace});
    call(&mut stage, A, "nvmf_subsystem_add_ns", namespace);
    let load = stage.load(A, 0..8 * MIB);
    stage.let_write(200);
    delete(&mut stage, A);
    assert!(load.join().error.is_some());
    let stores = call(&mut stage, A, "bdev_lvol_get_lvstores", Value::Null);
    assert_eq!(stores, json!([]));
    // What was on its way when it ended may be on one of the replicas only: the volume comes back for that.
    stage.cluster.create(A, &Value::Null).unwrap();
    stage.cluster.add_peer(A).unwrap();
    stage.in_sync();
    for index in [A, B] {
        stop(&mut stage, index);
    }
    stage.compare_replicas();
}

#[test]
fn a_disk_whose_writes_fail_is_detached_and_the_peer_goes_on() {
    let _alone = alone();
    let mut stage = paired_with_a_faulty_disk(ONE_CORE_EACH, SIZE_MB);
    let load = stage.load(A, WHOLE);
    stage.let_write(200);
    inject(&mut stage, "write", "failure", 1000);
    wait(&mut stage, A, "the disk is given up", is_diskless);
    wait(&mut stage, B, "the peer knows", |report| {
        has_disk(report, "Diskless")
    });
    stage.let_write(200);
    inject(&mut stage, "clear", "failure", 0);
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
fn a_volume_goes_on_when_its_backing_bdev_grows_and_it_is_said_what_that_means() {
    let _alone = alone();
    let mut stage = paired(ONE_CORE_EACH);
    let load = stage.load(A, WHOLE);
    stage.let_write(200);
    let path = stage.cluster.nodes[A].settings().backing.clone();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(bytes + MIB).unwrap();
    call(&mut stage, A, "bdev_aio_rescan", json!({"name": BASE_BDEV}));
    stage.let_write(200);
    let report = load.stop();
    assert!(report.error.is_none(), "{:?}", report.error);
    assert!(log(&stage, A).contains("backing bdev disk0 has grown from"));
    let size = call(&mut stage, A, "bdev_get_bdevs", json!({"name": VOLUME}));
    let blocks = size[0]["num_blocks"].as_u64().unwrap();
    assert_eq!(
        blocks * size[0]["block_size"].as_u64().unwrap(),
        SIZE_MB * MIB
    );
    // It is found again on a bdev of its former size.
    stop(&mut stage, A);
    file.set_len(bytes).unwrap();
    stage.cluster.start(A, &Value::Null).unwrap();
    stage.in_sync();
    stage.promote(A);
    stage.read_back(A, WHOLE);
    end(stage, A);
}
