//! Calls that cannot be carried out: each has its own text and SPDK's code, and nothing changes on any disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bdev_repl::cli::demo::DemoError;
use bdev_repl::cli::demo::cluster::{VOLUME, peer};
use bdev_repl::rpc::client::ClientError;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, PATIENCE, Stage};

struct Devices {
    stage: Stage,
    files: Vec<PathBuf>,
    texts: HashSet<String>,
}

impl Devices {
    fn new() -> Devices {
        let mut stage = Stage::new(4, Value::Null);
        stage.cluster.nodes[A].start().unwrap();
        let files = vec![stage.cluster.nodes[A].settings().backing.clone()];
        Devices {
            stage,
            files,
            texts: HashSet::new(),
        }
    }

    /// A file in the stage's folder, filled by `fill`, as a bdev of this name.
    fn add(&mut self, name: &str, size_bytes: u64, fill: impl FnOnce(&Path, &File)) {
        let path = self.stage.cluster.settings().directory.join(name);
        let file = File::create_new(&path).unwrap();
        file.set_len(size_bytes).unwrap();
        fill(&path, &file);
        let params = json!({"name": name, "filename": path, "block_size": 4096});
        self.stage.cluster.nodes[A]
            .call("bdev_aio_create", params)
            .unwrap();
        self.files.push(path);
    }

    fn content(&self) -> Vec<Vec<u8>> {
        self.files
            .iter()
            .map(|path| fs::read(path).unwrap())
            .collect()
    }

    /// The call fails with this code and a text of its own that has this part, and no file has changed.
    fn refused(&mut self, method: &str, params: Value, code: i32, part: &str) {
        let before = self.content();
        let called = self.stage.cluster.nodes[A].call(method, params.clone());
        let Err(DemoError::Rpc {
            source: ClientError::Rpc { error, .. },
            ..
        }) = called
        else {
            panic!("{method} {params}: {called:?}");
        };
        assert_eq!(error.code, code, "{method} {params}: {error}");
        assert!(error.message.contains(part), "{method} {params}: {error}");
        assert!(
            self.texts.insert(error.message.clone()),
            "{method} {params}: another error has the same text: {error}"
        );
        assert!(
            before == self.content(),
            "{method} {params} wrote something"
        );
    }
}

fn create(base_bdev: &str, more: Value) -> Value {
    let mut params = json!({"name": "other", "base_bdev": base_bdev, "node_id": 0});
    for (name, value) in more.as_object().into_iter().flatten() {
        params[name] = value.clone();
    }
    params
}

#[test]
fn a_device_that_carries_something_is_refused_by_its_name_until_force() {
    let mut devices = Devices::new();
    devices.add("ext4", 8 * MIB, |path, _| {
        let made = Command::new("/usr/sbin/mke2fs")
            .args(["-q", "-F", "-t", "ext4"])
            .arg(path)
            .status();
        assert!(made.unwrap().success());
    });
    devices.add("lvm", 8 * MIB, |_, file| {
        file.write_all_at(b"LABELONE", 512).unwrap();
        file.write_all_at(b"LVM2 001", 512 + 24).unwrap();
    });
    devices.add("mbr", 8 * MIB, |_, file| {
        // One Linux partition from sector 2048 on.
        let entry = [0, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0];
        file.write_all_at(&entry, 446).unwrap();
        file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    });
    devices.add("xfs", 8 * MIB, |_, file| {
        file.write_all_at(b"XFSB\0\0\x10\0", 0).unwrap();
    });
    for (name, part) in [
        ("ext4", "ext"),
        ("lvm", "LVM"),
        ("mbr", "partition"),
        ("xfs", "XFS"),
    ] {
        devices.refused("bdev_repl_create", create(name, json!({})), -22, part);
    }
    let forced = create("lvm", json!({"force": true}));
    devices.stage.cluster.nodes[A]
        .call("bdev_repl_create", forced)
        .unwrap();
}

#[test]
fn a_device_of_another_volume_or_node_is_refused() {
    let mut devices = Devices::new();
    for name in ["first", "second"] {
        devices.add(name, 16 * MIB, |_, _| {});
    }
    let node = &mut devices.stage.cluster.nodes[A];
    node.call(
        "bdev_repl_create",
        json!({"name": "mine", "base_bdev": "first", "node_id": 3}),
    )
    .unwrap();
    node.call("bdev_repl_delete", json!({"name": "mine"}))
        .unwrap();
    devices.refused("bdev_repl_create", create("first", json!({})), -17, "mine");
    // The same reason and text for another node of the same volume.
    devices.texts.clear();
    let params = json!({"name": "mine", "base_bdev": "first", "node_id": 4});
    devices.refused("bdev_repl_create", params, -17, "node 3");

    let params = json!({"name": "mine", "base_bdev": "first", "node_id": 3});
    let node = &mut devices.stage.cluster.nodes[A];
    node.call("bdev_repl_create", params).unwrap();
    // In use: by its own volume, and for every other.
    devices.refused(
        "bdev_repl_create",
        create("first", json!({})),
        -1,
        "claimed",
    );
    let attach = json!({"name": "mine", "base_bdev": "second"});
    devices.refused("bdev_repl_attach", attach.clone(), -16, "already");
    let node = &mut devices.stage.cluster.nodes[A];
    node.call("bdev_repl_detach", json!({"name": "mine"}))
        .unwrap();
    devices.refused("bdev_repl_attach", attach, -22, "superblock");
}

#[test]
fn a_wiped_device_is_a_new_one() {
    let mut devices = Devices::new();
    devices.add("first", 16 * MIB, |_, _| {});
    devices.refused("bdev_repl_wipe", json!({"base_bdev": "none"}), -19, "none");
    devices.refused(
        "bdev_repl_wipe",
        json!({"base_bdev": "first"}),
        -22,
        "superblock",
    );
    let params = json!({"name": "mine", "base_bdev": "first", "node_id": 3});
    let node = &mut devices.stage.cluster.nodes[A];
    node.call("bdev_repl_create", params).unwrap();
    let wipe = json!({"base_bdev": "first"});
    devices.refused("bdev_repl_wipe", wipe.clone(), -1, "claimed");
    let node = &mut devices.stage.cluster.nodes[A];
    node.call("bdev_repl_delete", json!({"name": "mine"}))
        .unwrap();
    node.call("bdev_repl_wipe", wipe).unwrap();
    node.call("bdev_repl_create", create("first", json!({})))
        .unwrap();
}

#[test]
fn wrong_names_parameters_and_sizes_are_refused_before_anything_is_written() {
    let mut devices = Devices::new();
    devices.add("small", 32 << 10, |_, _| {});
    let none = json!({"name": "none"});
    for method in [
        "bdev_repl_delete",
        "bdev_repl_get_volumes",
        "bdev_repl_detach",
        "bdev_repl_connect",
        "bdev_repl_disconnect",
        "bdev_repl_promote",
        "bdev_repl_demote",
        "bdev_repl_invalidate",
        "bdev_repl_pause_resync",
        "bdev_repl_resume_resync",
        "bdev_repl_set_options",
    ] {
        // One text for one thing: a volume that is not there.
        devices.texts.clear();
        devices.refused(method, none.clone(), -19, "none");
    }
    devices.texts.clear();
    for (params, code, part) in [
        (json!({}), -32603, "name"),
        (create("disk0", json!({"nonsense": 1})), -32603, "nonsense"),
        (create("disk0", json!({"node_id": "x"})), -32603, "node_id"),
        (create("disk0", json!({"node_id": 8})), -32603, "node_id"),
        (
            create("disk0", json!({"granularity_kb": 3})),
            -32603,
            "granularity_kb",
        ),
        (
            create("disk0", json!({"peer_slots": 8})),
            -32603,
            "peer_slots",
        ),
        (
            create("disk0", json!({"al_extents": 2})),
            -32603,
            "al_extents",
        ),
        (
            create("disk0", json!({"data_offset": 4096})),
            -22,
            "data_offset",
        ),
        (
            create("disk0", json!({"assume_clean": true, "has_data": true})),
            -22,
            "exclude",
        ),
        (create("none", json!({"force": true})), -19, "none"),
        (create("disk0", json!({"size_mb": 100_000})), -22, "device"),
        (create("small", json!({})), -28, "few"),
        (create("disk0", json!({"name": "a b"})), -22, "printable"),
    ] {
        devices.refused("bdev_repl_create", params, code, part);
    }
}

#[test]
fn what_the_state_does_not_allow_is_refused() {
    let mut devices = Devices::new();
    let cluster = &mut devices.stage.cluster;
    cluster.create(A, &Value::Null).unwrap();
    cluster.add_peer(A).unwrap();
    cluster.export(A).unwrap();
    let name = json!({"name": VOLUME});
    let peer_of = |node_id: u8| json!({"name": VOLUME, "node_id": node_id, "traddr": "127.0.0.1", "trsvcid": "1"});
    devices.refused(
        "bdev_repl_create",
        create("disk0", json!({"name": VOLUME})),
        -17,
        "exists",
    );
    devices.refused("bdev_repl_add_peer", peer_of(1), -17, "exists");
    devices.refused("bdev_repl_add_peer", peer_of(0), -22, "own");
    devices.refused(
        "bdev_repl_add_peer",
        json!({"name": VOLUME, "node_id": 2}),
        -32603,
        "traddr",
    );
    let other = json!({"name": VOLUME, "node_id": 5});
    devices.refused("bdev_repl_remove_peer", other, -19, "5");
    devices.refused("bdev_repl_promote", name.clone(), -16, "force");
    devices.refused("bdev_repl_invalidate", name.clone(), -16, "UpToDate");
    let forced = json!({"name": VOLUME, "force": true});
    devices.stage.cluster.nodes[A]
        .call("bdev_repl_promote", forced)
        .unwrap();
    devices.refused("bdev_repl_detach", name.clone(), -16, "Primary");
    devices.refused("bdev_repl_invalidate", name, -16, "demote");
    let interval = json!({"name": VOLUME, "ping_interval_ms": 1});
    devices.refused(
        "bdev_repl_set_options",
        interval,
        -32603,
        "ping_interval_ms",
    );
}

#[test]
fn nodes_whose_volumes_do_not_match_say_so_on_both_sides() {
    let mut stage = Stage::new(8, json!({"assume_clean": true}));
    stage.cluster.start(A, &json!({"size_mb": 4})).unwrap();
    stage.cluster.start(B, &json!({"size_mb": 8})).unwrap();
    for index in [A, B] {
        let told = |report: &bdev_repl::rpc::volume::VolumeReport| {
            peer(report).is_some_and(|peer| {
                let error = peer.last_error.as_deref().unwrap_or_default();
                error.contains("size") || error.contains("bytes")
            })
        };
        stage
            .cluster
            .wait_until(index, "the sizes are reported", PATIENCE, told)
            .unwrap();
    }
}

#[test]
fn a_volume_that_is_there_is_not_brought_back_with_another_size() {
    let mut devices = Devices::new();
    devices.add("first", 16 * MIB, |_, _| {});
    let node = &mut devices.stage.cluster.nodes[A];
    let params = json!({"name": "mine", "base_bdev": "first", "node_id": 3});
    node.call("bdev_repl_create", params).unwrap();
    node.call("bdev_repl_delete", json!({"name": "mine"}))
        .unwrap();
    let params = json!({"name": "mine", "base_bdev": "first", "node_id": 3, "size_mb": 4});
    devices.refused("bdev_repl_create", params, -22, "size");
}
