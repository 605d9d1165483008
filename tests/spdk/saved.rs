//! Saved configurations of SPDK: what its own client saves of a node makes the same volumes again, in whatever order bdevs
//! have come and gone before. Both nodes are spdk_tgt with the module preloaded.

use std::fs;
use std::path::Path;
use std::process::Command;

use bdev_repl::cli::demo::cluster::VOLUME;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, Stage};
use crate::targets::{
    ONE_CORE_EACH, call, delete, end, is_diskless, log, remove_disk, return_disk, stop, targets,
    wait,
};
use crate::tools::{alone, built};

const SIZE_MB: u64 = 32;
const WHOLE: std::ops::Range<u64> = 0..SIZE_MB * MIB;

/// What SPDK's own client saves of a node; the parts that have to do with volumes.
fn save(stage: &Stage, index: usize, rpc: &Path) -> Value {
    let settings = stage.cluster.nodes[index].settings();
    let mut command = Command::new("python3");
    command.arg(rpc).arg("-s").arg(&settings.rpc_socket);
    let saved = command.arg("save_config").output().unwrap();
    let said = String::from_utf8_lossy(&saved.stderr).into_owned();
    assert!(saved.status.success(), "{said}");
    let all: Value = serde_json::from_slice(&saved.stdout).unwrap();
    let ours = all["subsystems"].as_array().unwrap().iter();
    let ours = ours.filter(|part| part["subsystem"] == "bdev" || part["subsystem"] == "nvmf");
    json!({"subsystems": ours.collect::<Vec<_>>()})
}

/// Hands a configuration to SPDK's own client.
fn load(stage: &Stage, index: usize, rpc: &Path, config: &Value) {
    let settings = stage.cluster.nodes[index].settings();
    let path = stage.cluster.settings().directory.join("load.json");
    fs::write(&path, config.to_string()).unwrap();
    let mut command = Command::new("python3");
    command.arg(rpc).arg("-s").arg(&settings.rpc_socket);
    let loaded = command.arg("load_config").arg("-j").arg(&path).output();
    let loaded = loaded.unwrap();
    let said = String::from_utf8_lossy(&loaded.stderr).into_owned();
    assert!(loaded.status.success(), "{said}");
}

/// Has a node start with this configuration from now on.
fn configure(stage: &Stage, index: usize, config: &Value) {
    let path = &stage.cluster.nodes[index].settings().config;
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_saved_configuration_makes_the_same_volumes_again() {
    let _alone = alone();
    let Some(rpc) = built("scripts/rpc.py") else {
        return;
    };
    let mut stage = targets(ONE_CORE_EACH, SIZE_MB, json!({"granularity_kb": 16})).pair();
    for index in [A, B] {
        let options = json!({"name": VOLUME, "resync_rate_mb": 77});
        call(&mut stage, index, "bdev_repl_set_options", options);
    }
    stage.write(A, WHOLE, 300);
    stage.demote(A);
    let before = [A, B].map(|index| stage.cluster.report(index).unwrap());
    let saved = [A, B].map(|index| save(&stage, index, &rpc));
    for config in &saved {
        let text = config.to_string();
        assert!(!text.contains("bdev_nvme_attach_controller"), "{text}");
        assert_eq!(text.matches("bdev_repl_create").count(), 1, "{text}");
    }
    for index in [A, B] {
        stop(&mut stage, index);
    }

    configure(&stage, A, &saved[A]);
    stage.cluster.nodes[A].start().unwrap();
    configure(&stage, B, &json!({"subsystems": []}));
    stage.cluster.nodes[B].start().unwrap();
    load(&stage, B, &rpc, &saved[B]);
    stage.in_sync();
    for index in [A, B] {
        assert_eq!(save(&stage, index, &rpc), saved[index]);
        let (was, is) = (&before[index], stage.cluster.report(index).unwrap());
        assert_eq!((&was.uuid, &was.options), (&is.uuid, &is.options));
        assert_eq!(was.listen_address, is.listen_address);
        assert_eq!(was.granularity, is.granularity);
    }
    stage.promote(A);
    stage.read_back(A, WHOLE);
    stage.write(A, WHOLE, 300);

    // Deleted and made again, the endpoint is there again too.
    delete(&mut stage, B);
    stage.cluster.create(B, &Value::Null).unwrap();
    stage.cluster.add_peer(B).unwrap();
    stage.in_sync();
    end(stage, A);
}

/// Where in the saved bdevs the first call of this method stands.
fn place(saved: &Value, method: &str) -> usize {
    let part = |part: &&Value| part["subsystem"] == "bdev";
    let bdevs = saved["subsystems"].as_array().unwrap().iter().find(part);
    let calls = bdevs.unwrap()["config"].as_array().unwrap().iter();
    let mut methods = calls.map(|call| call["method"].as_str().unwrap());
    methods.position(|name| name == method).unwrap()
}

#[test]
fn a_configuration_saved_after_the_disk_was_pulled_and_put_back_names_the_volume_first_and_loads() {
    let _alone = alone();
    let Some(rpc) = built("scripts/rpc.py") else {
        return;
    };
    let mut stage = targets(ONE_CORE_EACH, SIZE_MB, Value::Null).pair();
    let options = json!({"name": VOLUME, "resync_rate_mb": 77});
    call(&mut stage, A, "bdev_repl_set_options", options);
    stage.write(A, WHOLE, 300);
    stage.demote(A);
    remove_disk(&mut stage, A);
    wait(&mut stage, A, "the disk is gone", is_diskless);
    return_disk(&mut stage, A, None);
    stage.in_sync();
    let before = stage.cluster.report(A).unwrap();
    let saved = save(&stage, A, &rpc);
    assert!(
        place(&saved, "bdev_repl_create") < place(&saved, "bdev_aio_create"),
        "{saved}"
    );

    stop(&mut stage, A);
    configure(&stage, A, &saved);
    stage.cluster.nodes[A].start().unwrap();
    stage.in_sync();
    assert!(log(&stage, A).contains("waits for its backing bdev"));
    let again = stage.cluster.report(A).unwrap();
    assert_eq!(
        (&again.uuid, &again.options),
        (&before.uuid, &before.options)
    );
    assert_eq!(again.listen_address, before.listen_address);
    // Now they have come in their order.
    let ordered = save(&stage, A, &rpc);
    assert!(
        place(&ordered, "bdev_aio_create") < place(&ordered, "bdev_repl_create"),
        "{ordered}"
    );
    stage.promote(A);
    stage.read_back(A, WHOLE);
    end(stage, A);
}

#[test]
fn a_volume_whose_disk_has_not_come_is_saved_and_takes_what_it_waits_for_before_others_look_at_it()
{
    let _alone = alone();
    let Some(rpc) = built("scripts/rpc.py") else {
        return;
    };
    let mut stage = targets(ONE_CORE_EACH, SIZE_MB, Value::Null);
    stage.cluster.nodes[A].start().unwrap();
    // With its data in place, the backing bdev carries a logical volume store as the volume does.
    let in_place = json!({"data_offset": 0, "has_data": true});
    stage.cluster.create(A, &in_place).unwrap();
    stage.promote(A);
    let store = json!({"bdev_name": VOLUME, "lvs_name": "store", "cluster_sz": 1 << 20});
    call(&mut stage, A, "bdev_lvol_create_lvstore", store);
    delete(&mut stage, A);
    remove_disk(&mut stage, A);

    stage.cluster.create(A, &in_place).unwrap();
    let saved = save(&stage, A, &rpc);
    assert_eq!(
        saved.to_string().matches("bdev_repl_create").count(),
        1,
        "{saved}"
    );
    return_disk(&mut stage, A, None);
    call(&mut stage, A, "bdev_wait_for_examine", Value::Null);
    let report = stage.cluster.report(A).unwrap();
    assert_eq!(
        (report.disk.as_str(), report.last_error),
        ("UpToDate", None)
    );
    let stores = call(&mut stage, A, "bdev_lvol_get_lvstores", Value::Null);
    assert_eq!(
        stores,
        json!([]),
        "the store is behind the volume, which is Secondary"
    );
    stop(&mut stage, A);
}
