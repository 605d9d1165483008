//! SPDK's initiator against our target, and our initiator against SPDK's: one node exports its disk, the other attaches
//! it and exports it again.

use bdev_repl::cli::demo::cluster::{BASE_BDEV, SUBSYSTEM_NQN};
use bdev_repl::cli::demo::launcher::Launcher;
use serde_json::{Value, json};

use crate::hosts::embedded;
use crate::stage::{A, B, MIB, Stage};
use crate::tools::{alone, stock_target};

/// Node A attaches what node B exports, writes through it, and reads back on both ways.
fn through(hosts: [Launcher; 2], header_digest: bool, data_digest: bool) {
    let mut stage = Stage::on(hosts, ["0x1", "0x2"], 32, Value::Null);
    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
    }
    let export = |stage: &mut Stage, index: usize, bdev: &str| {
        let params = json!({"nqn": SUBSYSTEM_NQN, "namespace": {"bdev_name": bdev, "nsid": 1}});
        let node = &mut stage.cluster.nodes[index];
        node.call("nvmf_subsystem_add_ns", params).unwrap();
    };
    export(&mut stage, B, BASE_BDEV);
    let address = stage.cluster.nodes[B].settings().export;
    let attach = json!({
        "name": "far",
        "trtype": "TCP",
        "adrfam": "IPv4",
        "traddr": address.ip().to_string(),
        "trsvcid": address.port().to_string(),
        "subnqn": SUBSYSTEM_NQN,
        "hdgst": header_digest,
        "ddgst": data_digest,
    });
    let names = stage.cluster.nodes[A]
        .call("bdev_nvme_attach_controller", attach)
        .unwrap();
    assert_eq!(names, json!(["farn1"]));
    export(&mut stage, A, "farn1");
    stage.write(A, 0..32 * MIB, 3000);
    stage.client(A).flush().unwrap();
    stage.read_back(A, 0..32 * MIB);
    stage.read_back(B, 0..32 * MIB);
    let removed = json!({"nqn": SUBSYSTEM_NQN, "nsid": 1});
    let detached = json!({"name": "far"});
    let node = &mut stage.cluster.nodes[A];
    node.call("nvmf_subsystem_remove_ns", removed).unwrap();
    node.call("bdev_nvme_detach_controller", detached).unwrap();
    for index in [A, B] {
        stage.cluster.nodes[index].stop().unwrap();
    }
}

#[test]
fn spdks_initiator_works_with_our_target_with_and_without_digests() {
    let _alone = alone();
    for (header_digest, data_digest) in [(false, false), (true, false), (false, true), (true, true)]
    {
        through([stock_target(), embedded()], header_digest, data_digest);
    }
}

#[test]
fn our_initiator_works_with_spdks_target_with_and_without_digests() {
    let _alone = alone();
    for (header_digest, data_digest) in [(false, false), (true, false), (false, true), (true, true)]
    {
        through([embedded(), stock_target()], header_digest, data_digest);
    }
}
