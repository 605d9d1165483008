//! A volume that is a bdev on the Primary only: what is built on it comes up there, and is there after a change of role.
//! Both nodes are spdk_tgt with the module preloaded.

use bdev_repl::cli::demo::cluster::{SUBSYSTEM_NQN, VOLUME};
use bdev_repl::cli::demo::launcher::Launcher;
use serde_json::{Value, json};

use crate::hosts::spdk_target;
use crate::stage::{A, B, Stage};
use crate::tools::{alone, with_module};

/// A logical volume on the volume.
const LOGICAL: &str = "lvs0/lv0";

/// Starts a node; its volume is exported by nobody.
fn start(stage: &mut Stage, index: usize) {
    let cluster = &mut stage.cluster;
    cluster.nodes[index].start().unwrap();
    cluster
        .create(index, &json!({"assume_clean": true}))
        .unwrap();
    cluster.add_peer(index).unwrap();
}

fn call(stage: &mut Stage, index: usize, method: &str, params: Value) -> Value {
    stage.cluster.nodes[index].call(method, params).unwrap()
}

/// The bdevs of this name, or alias.
fn bdevs(stage: &mut Stage, index: usize, name: &str) -> usize {
    let all = call(stage, index, "bdev_get_bdevs", Value::Null);
    let is_it = |bdev: &&Value| {
        let aliases = bdev["aliases"].as_array().unwrap();
        bdev["name"] == json!(name) || aliases.contains(&json!(name))
    };
    all.as_array().unwrap().iter().filter(is_it).count()
}

fn export(stage: &mut Stage, index: usize) {
    let params = json!({"nqn": SUBSYSTEM_NQN, "namespace": {"bdev_name": LOGICAL, "nsid": 1}});
    call(stage, index, "nvmf_subsystem_add_ns", params);
}

#[test]
fn a_logical_volume_on_it_follows_the_primary() {
    let _alone = alone();
    let hosts = [A, B].map(|_| Launcher::Spdk(with_module(spdk_target(), &[])));
    let create = json!({"register": "on_promote"});
    let mut stage = Stage::on(hosts, ["0x1", "0x2"], 64, create);
    for index in [A, B] {
        start(&mut stage, index);
        assert_eq!(bdevs(&mut stage, index, VOLUME), 0);
    }
    stage.in_sync();
    stage.promote(A);
    assert_eq!(bdevs(&mut stage, A, VOLUME), 1);
    let store = json!({"bdev_name": VOLUME, "lvs_name": "lvs0"});
    call(&mut stage, A, "bdev_lvol_create_lvstore", store);
    let logical = json!({"lvs_name": "lvs0", "lvol_name": "lv0", "size_in_mib": 16});
    call(&mut stage, A, "bdev_lvol_create", logical);
    export(&mut stage, A);
    let written = vec![0x5a; 64 * 4096];
    stage.client(A).write(7, &written).unwrap();

    // Its users are still there: the target has it open.
    stage.demote(A);
    for name in [VOLUME, LOGICAL] {
        assert_eq!(bdevs(&mut stage, A, name), 0, "{name}");
    }
    stage.promote(B);
    assert_eq!(
        bdevs(&mut stage, B, LOGICAL),
        1,
        "it is there with the answer"
    );
    export(&mut stage, B);
    let mut read = vec![0; written.len()];
    stage.client(B).read(7, &mut read).unwrap();
    assert!(read == written);

    // The configuration says so, and what came back by itself is told by it.
    let saved = call(
        &mut stage,
        A,
        "framework_get_config",
        json!({"name": "bdev"}),
    );
    let methods = saved.as_array().unwrap().iter();
    let methods: Vec<_> = methods
        .map(|call| call["method"].as_str().unwrap())
        .collect();
    let place = |method| methods.iter().position(|other| *other == method).unwrap();
    assert!(
        place("bdev_aio_create") < place("bdev_repl_create"),
        "{methods:?}"
    );
    let create = &saved[place("bdev_repl_create")]["params"];
    assert_eq!(create["register"], "on_promote");
    stage.cluster.nodes[A].stop().unwrap();
    start(&mut stage, A);
    assert_eq!(bdevs(&mut stage, A, VOLUME), 0);
    stage.in_sync();
    stage.stop_both(B);
    stage.compare_replicas();
}
