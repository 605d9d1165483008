//! SPDK's programs with the module preloaded: each is node A itself, and its own I/O goes to the volume, with node B,
//! on the embedded host, attached.

use std::fs;
use std::path::PathBuf;

use bdev_repl::cli::demo::cluster::{SUBSYSTEM_NQN, VOLUME};
use bdev_repl::cli::demo::launcher::Launcher;
use serde_json::{Value, json};

use crate::hosts::{embedded, spdk_target};
use crate::stage::{A, Stage};
use crate::tools::{THREE_CORES_ON_TWO, alone, built, installed, run_application, with_module};

const SIZE_MB: u64 = 64;

/// A pair of which node A is this program. It must wait for `perform_tests`.
fn pair(program: PathBuf, arguments: &[&str], core_mask: &str) -> Stage {
    let hosts = [Launcher::Spdk(with_module(program, arguments)), embedded()];
    Stage::on(hosts, [core_mask, "0x2"], SIZE_MB, Value::Null).pair()
}

/// The target has claimed what it exports: the program gets it for itself.
fn take_from_target(stage: &mut Stage) {
    let params = json!({"nqn": SUBSYSTEM_NQN, "nsid": 1});
    stage.cluster.nodes[A]
        .call("nvmf_subsystem_remove_ns", params)
        .unwrap();
}

/// Stops both nodes; whatever has been written must be on both.
fn end(mut stage: Stage) {
    stage.in_sync();
    stage.stop_both(A);
    stage.compare_replicas();
}

#[test]
fn bdevio_passes_all_its_tests_on_the_volume() {
    let _alone = alone();
    let Some(bdevio) = built("test/bdev/bdevio/bdevio") else {
        return;
    };
    let mut stage = pair(bdevio, &["-w"], THREE_CORES_ON_TWO);
    take_from_target(&mut stage);
    let failures = stage.cluster.nodes[A]
        .call("perform_tests", json!({"name": VOLUME}))
        .unwrap();
    assert_eq!(failures, json!(0));
    end(stage);
}

#[test]
fn bdevperf_verifies_what_it_writes_to_the_volume_from_one_core_and_from_two() {
    let _alone = alone();
    let Some(bdevperf) = built("build/examples/bdevperf") else {
        return;
    };
    for (cores, pattern) in [
        ("0x1", "verify"),
        ("0x1", "randrw"),
        ("0x3", "verify"),
        ("0x3", "randrw"),
    ] {
        let mut arguments = vec!["-z", "-q", "32", "-o", "4096", "-t", "3", "-C"];
        arguments.extend(["-T", VOLUME, "-w", pattern]);
        if pattern == "randrw" {
            arguments.extend(["-M", "50"]);
        }
        let mut stage = pair(bdevperf.clone(), &arguments, cores);
        take_from_target(&mut stage);
        let told = stage.cluster.nodes[A]
            .call("perform_tests", Value::Null)
            .unwrap();
        let jobs = told["results"].as_array().unwrap();
        assert!(!jobs.is_empty(), "{told}");
        for job in jobs {
            assert_eq!(job["status"], "finished", "{told}");
            assert_eq!(job["io_failed"], 0, "{told}");
            assert!(job["iops"].as_f64().unwrap() > 0.0, "{told}");
        }
        end(stage);
    }
}

#[test]
fn what_spdk_dd_puts_into_the_volume_comes_out_and_is_on_both_replicas() {
    let _alone = alone();
    let mut stage = pair(spdk_target(), &[], "0x1");
    // It has no RPC, so its configuration has to do everything that makes a Primary.
    stage.demote(A);
    stage.in_sync();
    stage.cluster.nodes[A].stop().unwrap();
    let settings = stage.cluster.nodes[A].settings();
    let mut config: Value = serde_json::from_slice(&fs::read(&settings.config).unwrap()).unwrap();
    let calls = json!([
        {"method": "bdev_repl_create", "params": stage.cluster.create_parameters(A, &Value::Null)},
        {"method": "bdev_repl_add_peer", "params": stage.cluster.peer_parameters(A)},
        {"method": "bdev_repl_promote", "params": {"name": VOLUME}},
    ]);
    let subsystems = config["subsystems"].as_array_mut().unwrap();
    subsystems.push(json!({"subsystem": "bdev", "config": calls}));

    let folder = stage.cluster.settings().directory.clone();
    let (given, taken) = (folder.join("given"), folder.join("taken"));
    let bytes: Vec<u8> = (0..SIZE_MB << 20)
        .map(|at| (at / 4096) as u8 ^ (at % 253) as u8)
        .collect();
    fs::write(&given, &bytes).unwrap();
    for (from, to) in [
        (
            format!("--if={}", given.display()),
            format!("--ob={VOLUME}"),
        ),
        (
            format!("--ib={VOLUME}"),
            format!("--of={}", taken.display()),
        ),
    ] {
        let arguments = [&from, &to, "--bs=65536", "--qd=8"];
        let copy = with_module(installed("spdk_dd"), &arguments);
        run_application(&stage, &copy, "0x1", &config);
    }
    assert!(
        bytes == fs::read(&taken).unwrap(),
        "it is not what was written"
    );

    stage.cluster.start(A, &Value::Null).unwrap();
    stage.in_sync();
    stage.promote(A);
    stage.stop_both(A);
    let replica = stage.compare_replicas();
    let whole = fs::read(replica.path()).unwrap();
    let data = &whole[replica.data_offset_bytes() as usize..][..bytes.len()];
    assert!(bytes == data, "the replicas are not what was written");
}
