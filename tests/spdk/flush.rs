//! An NVMe bdev with a volatile cache below a volume in SPDK: bdev_nvme acknowledges flushes without sending them. What
//! the device really gets is read off the wire to it; the device is node B's disk, by NVMe/TCP.

use std::ops::Range;

use bdev_repl::cli::demo::cluster::{BASE_BDEV, SUBSYSTEM_NQN, VOLUME};
use bdev_repl::cli::demo::launcher::Launcher;
use bdev_repl::hosts::embedded::nvme_tcp::command::Sqe;
use serde_json::{Value, json};

use crate::hosts::{embedded, spdk_target};
use crate::stage::{A, B, MIB, Stage};
use crate::tools::{alone, with_module};
use crate::wire::{Command, Wire};

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const SIZE_MB: u64 = 32;
/// Blocks of the device that hold the volume's data: what is in front of them and behind is metadata.
const DATA: Range<u64> = MIB / 4096..(SIZE_MB + 1) * MIB / 4096;

/// Node A in SPDK with the disk of node B as its bdev `farn1`.
fn far_disk() -> (Stage, Wire) {
    let hosts = [Launcher::Spdk(with_module(spdk_target(), &[])), embedded()];
    let mut stage = Stage::on(hosts, ["0x1", "0x2"], SIZE_MB, Value::Null);
    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
    }
    let params = json!({"nqn": SUBSYSTEM_NQN, "namespace": {"bdev_name": BASE_BDEV, "nsid": 1}});
    stage.cluster.nodes[B]
        .call("nvmf_subsystem_add_ns", params)
        .unwrap();
    let device = stage.cluster.nodes[B].settings().export;
    let wire = Wire::to(device, stage.cluster.settings().link_address);
    (stage, wire)
}

fn attach(stage: &mut Stage, wire: &Wire) {
    let params = json!({
        "name": "far",
        "trtype": "TCP",
        "adrfam": "IPv4",
        "traddr": wire.front().ip().to_string(),
        "trsvcid": wire.front().port().to_string(),
        "subnqn": SUBSYSTEM_NQN,
    });
    let names = stage.cluster.nodes[A]
        .call("bdev_nvme_attach_controller", params)
        .unwrap();
    assert_eq!(names, json!(["farn1"]));
}

fn create_on(stage: &mut Stage, bdev: &str) -> Result<(), String> {
    let params = json!({"base_bdev": bdev, "assume_clean": true});
    stage
        .cluster
        .create(A, &params)
        .map_err(|error| error.to_string())
}

/// Makes the volume usable by hosts.
fn serve(stage: &mut Stage) {
    stage.promote(A);
    stage.cluster.export(A).unwrap();
}

fn flushes(wire: &Wire) -> usize {
    let is_flush = |command: &&Command| command.opcode() == FLUSH;
    wire.seen().iter().filter(is_flush).count()
}

/// Writes and flushes in turn: each flush of the application has brought one to the device.
fn flush_reaches_the_device(stage: &Stage, wire: &Wire) {
    let mut host = stage.client(A);
    for lba in 0..5 {
        host.write(lba, &[7; 4096]).unwrap();
        let before = flushes(wire);
        host.flush().unwrap();
        assert!(flushes(wire) > before, "flush {lba} has not been sent");
    }
}

#[test]
fn a_write_that_an_application_wants_durable_is_flushed_on_the_device() {
    let _alone = alone();
    let (mut stage, wire) = far_disk();
    attach(&mut stage, &wire);
    create_on(&mut stage, "farn1").unwrap();
    serve(&mut stage);
    let mut host = stage.client(A);
    for lba in 0..5 {
        let before = flushes(&wire);
        host.write(lba, &[1; 4096]).unwrap();
        assert_eq!(flushes(&wire), before, "nobody has asked for one");
        let sqe = Sqe {
            opcode: WRITE,
            nsid: 1,
            cdw10_15: [lba as u32, 0, 1 << 30, 0, 0, 0],
            ..Sqe::default()
        };
        host.passthrough(sqe, &mut [3; 4096]).unwrap();
        assert!(flushes(&wire) > before, "write {lba} may be lost");
    }
    drop(host);
    end(stage);
}

fn end(mut stage: Stage) {
    for index in [A, B] {
        stage.cluster.nodes[index].stop().unwrap();
    }
}

#[test]
fn every_flush_reaches_an_nvme_device_with_a_volatile_cache() {
    let _alone = alone();
    let (mut stage, wire) = far_disk();
    attach(&mut stage, &wire);
    create_on(&mut stage, "farn1").unwrap();
    serve(&mut stage);
    flush_reaches_the_device(&stage, &wire);
    end(stage);
}

#[test]
fn metadata_is_durable_on_an_nvme_device_before_the_data_that_relies_on_it_is_written() {
    let _alone = alone();
    let (mut stage, wire) = far_disk();
    attach(&mut stage, &wire);
    create_on(&mut stage, "farn1").unwrap();
    // Without a peer there is nobody to find differences to, and no log of where they could be.
    let mut peer = stage.cluster.peer_parameters(A);
    peer["connect"] = json!(false);
    stage.cluster.nodes[A]
        .call("bdev_repl_add_peer", peer)
        .unwrap();
    serve(&mut stage);
    let before = wire.seen().len();
    // Each in an extent of its own, so that each needs the activity log first.
    let mut host = stage.client(A);
    for extent in 0..6 {
        host.write(extent * 4 * MIB / 4096, &[9; 4096]).unwrap();
    }
    let seen = wire.seen().split_off(before);
    let writes = || seen.iter().filter(|command| command.opcode() == WRITE);
    let (data, metadata) =
        writes().partition::<Vec<&Command>, _>(|write| DATA.contains(&write.lba()));
    assert!(
        metadata.len() >= 6,
        "the activity log was not written: {metadata:?}"
    );
    for write in metadata {
        assert!(
            write.has_fua(),
            "metadata at block {} may be lost",
            write.lba()
        );
    }
    assert_eq!(data.len(), 6);
    assert!(
        data.iter().all(|write| !write.has_fua()),
        "data need no FUA"
    );
    drop(host);
    end(stage);
}

#[test]
fn a_bdev_over_an_nvme_device_is_refused_until_flushes_are_sent() {
    let _alone = alone();
    let (mut stage, wire) = far_disk();
    attach(&mut stage, &wire);
    let layer = json!({"name": "layer", "base_bdev_name": "farn1"});
    let node = &mut stage.cluster.nodes[A];
    node.call("bdev_passthru_create", layer.clone()).unwrap();
    let error = create_on(&mut stage, "layer").unwrap_err();
    for part in ["layer", "passthru", "bdev_nvme_set_options", "enable_flush"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let node = &mut stage.cluster.nodes[A];
    node.call("bdev_passthru_delete", json!({"name": "layer"}))
        .unwrap();
    node.call("bdev_nvme_detach_controller", json!({"name": "far"}))
        .unwrap();
    node.call("bdev_nvme_set_options", json!({"enable_flush": true}))
        .unwrap();
    attach(&mut stage, &wire);
    let node = &mut stage.cluster.nodes[A];
    node.call("bdev_passthru_create", layer).unwrap();
    create_on(&mut stage, "layer").unwrap();
    serve(&mut stage);
    flush_reaches_the_device(&stage, &wire);
    end(stage);
}

#[test]
fn a_bdev_with_metadata_of_its_own_is_refused_and_stays_free() {
    let _alone = alone();
    let (mut stage, _wire) = far_disk();
    for (name, interleaved) in [("separate", false), ("interleaved", true)] {
        let params = json!({
            "name": name, "num_blocks": 16384, "block_size": 4096, "md_size": 8, "md_interleave": interleaved,
        });
        let node = &mut stage.cluster.nodes[A];
        node.call("bdev_malloc_create", params).unwrap();
        let error = create_on(&mut stage, name).unwrap_err();
        let says = format!("bdev {name} has 8 bytes of metadata a block");
        assert!(
            error.contains(&says) && error.contains("format it"),
            "{error}"
        );
        let node = &mut stage.cluster.nodes[A];
        let bdevs = node.call("bdev_get_bdevs", json!({"name": name})).unwrap();
        assert_eq!(bdevs[0]["claimed"], json!(false));
        assert_eq!(
            node.call("bdev_repl_get_volumes", json!({})).unwrap(),
            json!([])
        );
        assert!(!bdevs.to_string().contains(VOLUME));
    }
    end(stage);
}
