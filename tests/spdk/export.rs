//! SPDK's programs as hosts of a volume that is exported through NVMe/TCP, with a peer attached. The hosts of the two
//! nodes come from the environment, as for the end-to-end tests.

use std::fs;
use std::process::Command;

use bdev_repl::cli::demo::cluster::SUBSYSTEM_NQN;
use serde_json::{Value, json};

use crate::stage::{A, MIB, Stage};
use crate::tools::{
    SECOND_CORE, THREE_CORES_ON_TWO, alone, built, installed, run, run_application, stock,
};

const SIZE_MB: u64 = 64;
/// The volume, as SPDK's initiator calls it.
const BDEV: &str = "farn1";
const BOTH_CORES: &str = "0x3";

/// A configuration with SPDK's initiator connected to the volume on node A.
fn attached(stage: &Stage, digests: bool) -> Value {
    let export = stage.cluster.nodes[A].settings().export;
    let attach = json!({
        "name": "far",
        "trtype": "TCP",
        "adrfam": "IPv4",
        "traddr": export.ip().to_string(),
        "trsvcid": export.port().to_string(),
        "subnqn": SUBSYSTEM_NQN,
        "hdgst": digests,
        "ddgst": digests,
    });
    let calls = json!([{"method": "bdev_nvme_attach_controller", "params": attach}]);
    json!({"subsystems": [{"subsystem": "bdev", "config": calls}]})
}

/// The same, as the programs take it that have no configuration.
fn transport_id(stage: &Stage) -> String {
    let export = stage.cluster.nodes[A].settings().export;
    format!(
        "trtype:TCP adrfam:IPv4 traddr:{} trsvcid:{} subnqn:{SUBSYSTEM_NQN}",
        export.ip(),
        export.port()
    )
}

/// Stops both nodes; whatever has been written must be on both.
fn end(mut stage: Stage) {
    stage.in_sync();
    stage.stop_both(A);
    stage.compare_replicas();
}

#[test]
fn spdk_nvme_identify_describes_the_exported_volume() {
    let _alone = alone();
    let stage = Stage::paired(SIZE_MB, Value::Null);
    let mut command = Command::new(installed("spdk_nvme_identify"));
    command.args([
        "--no-huge",
        "-s",
        "256",
        "-p",
        "1",
        "-r",
        &transport_id(&stage),
    ]);
    let told = run(&stage, &mut command);
    let blocks = SIZE_MB * MIB / 4096;
    for part in [
        "BDEVREPL0",
        SUBSYSTEM_NQN,
        "Namespace ID:1",
        &format!("{blocks} (0GiB)"),
    ] {
        assert!(told.contains(part), "{part} is not in\n{told}");
    }
    end(stage);
}

#[test]
fn spdk_nvme_perf_writes_and_reads_with_and_without_digests() {
    let _alone = alone();
    let stage = Stage::paired(SIZE_MB, Value::Null);
    let shapes = [
        ("4096", "16", "randrw", &[][..]),
        ("131072", "8", "randrw", &["-H", "-I"]),
        ("4096", "16", "randwrite", &["-H", "-I", "-P", "2"]),
        ("1048576", "2", "rw", &[]),
    ];
    for (bytes, depth, pattern, more) in shapes {
        let mut command = Command::new(installed("spdk_nvme_perf"));
        command.args(["--no-huge", "-s", "512", "-c", SECOND_CORE]);
        command.args(["-o", bytes, "-q", depth, "-w", pattern, "-t", "2"]);
        if pattern.ends_with("rw") {
            command.args(["-M", "50"]);
        }
        command.args(more).args(["-r", &transport_id(&stage)]);
        let told = run(&stage, &mut command);
        assert!(told.contains("Total"), "{told}");
        assert!(!told.contains("completed with error"), "{told}");
    }
    end(stage);
}

#[test]
fn what_spdk_dd_puts_in_comes_out_and_is_on_both_replicas() {
    let _alone = alone();
    let mut stage = Stage::paired(SIZE_MB, Value::Null);
    let folder = stage.cluster.settings().directory.clone();
    let (given, taken) = (folder.join("given"), folder.join("taken"));
    let bytes: Vec<u8> = (0..SIZE_MB * MIB)
        .map(|at| (at / 4096) as u8 ^ (at % 253) as u8)
        .collect();
    fs::write(&given, &bytes).unwrap();
    let copy = |stage: &Stage, from: String, to: String| {
        let arguments = [&from, &to, "--bs=65536", "--qd=8"];
        let copy = stock(installed("spdk_dd"), &arguments);
        run_application(stage, &copy, SECOND_CORE, &attached(stage, true));
    };
    copy(
        &stage,
        format!("--if={}", given.display()),
        format!("--ob={BDEV}"),
    );
    copy(
        &stage,
        format!("--ib={BDEV}"),
        format!("--of={}", taken.display()),
    );
    assert!(
        bytes == fs::read(&taken).unwrap(),
        "it is not what was written"
    );
    stage.in_sync();
    stage.stop_both(A);
    let replica = stage.compare_replicas();
    let whole = fs::read(replica.path()).unwrap();
    let data = &whole[replica.data_offset_bytes() as usize..][..bytes.len()];
    assert!(bytes == data, "the replicas are not what was written");
}

#[test]
fn bdevperf_verifies_what_it_writes_from_one_core_and_from_two() {
    let _alone = alone();
    let Some(bdevperf) = built("build/examples/bdevperf") else {
        return;
    };
    let stage = Stage::paired(SIZE_MB, Value::Null);
    for (cores, pattern, digests) in [
        (SECOND_CORE, "verify", false),
        (SECOND_CORE, "randrw", true),
        (BOTH_CORES, "verify", true),
        (BOTH_CORES, "randrw", false),
    ] {
        let mut arguments = vec!["-q", "16", "-o", "4096", "-t", "3", "-C"];
        arguments.extend(["-T", BDEV, "-w", pattern]);
        if pattern == "randrw" {
            arguments.extend(["-M", "50"]);
        }
        let load = stock(bdevperf.clone(), &arguments);
        let told = run_application(&stage, &load, cores, &attached(&stage, digests));
        assert!(told.contains(&format!("workload: {pattern}")), "{told}");
    }
    end(stage);
}

#[test]
fn bdevio_passes_all_its_tests() {
    let _alone = alone();
    let Some(bdevio) = built("test/bdev/bdevio/bdevio") else {
        return;
    };
    let stage = Stage::paired(SIZE_MB, Value::Null);
    let config = attached(&stage, false);
    let told = run_application(&stage, &stock(bdevio, &[]), THREE_CORES_ON_TWO, &config);
    assert!(told.contains(&format!("bdevio tests on: {BDEV}")), "{told}");
    end(stage);
}
