//! What is made on a volume is found on the volume, and never on the disk below it: there, somebody would write past
//! replication. A stock target without the module looks at the disk, too, for there nothing keeps it from being taken.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use bdev_repl::cli::demo::cluster::{BASE_BDEV, SUBSYSTEM_NQN, VOLUME};
use bdev_repl::cli::demo::compare::Replica;
use bdev_repl::cli::demo::node::{Node, NodeSettings};
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, Stage};
use crate::targets::{ONE_CORE_EACH, call, log, stop, targets};
use crate::tools::{alone, stock_target};

const SIZE_MB: u64 = 64;
const BLOCK_BYTES: usize = 4096;
/// A partition table has room for this many (UEFI Specification, 5.3.1: 16 KiB at least).
const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;
const HEADER_BYTES: usize = 92;
/// The type of partitions that SPDK takes for its own, as it is stored.
const SPDK_PARTITION: uuid::Uuid = uuid::uuid!("6527994e-2c5a-4eec-9613-8f5944074e8b");
/// The first block of the partition, and the first that a partition may have.
const FIRST: u64 = 16;

/// The CRC-32 of Ethernet, which UEFI takes.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// The first blocks of a disk of this many blocks with one partition for SPDK: protective MBR, header, entries (UEFI
/// Specification, 5.2.3, 5.3.2 and 5.3.3).
fn partition_table(blocks: u64) -> Vec<u8> {
    let mut table = vec![0; 2 * BLOCK_BYTES + ENTRIES * ENTRY_BYTES];
    let mut put = |at: usize, bytes: &[u8]| table[at..at + bytes.len()].copy_from_slice(bytes);
    let last = blocks - 1 - FIRST;
    put(446 + 4, &[0xee]);
    put(446 + 8, &1_u32.to_le_bytes());
    put(446 + 12, &(blocks as u32 - 1).to_le_bytes());
    put(510, &[0x55, 0xaa]);

    let entry = 2 * BLOCK_BYTES;
    put(entry, &SPDK_PARTITION.to_bytes_le());
    put(entry + 16, &uuid::Uuid::from_u128(7).to_bytes_le());
    put(entry + 32, &FIRST.to_le_bytes());
    put(entry + 40, &last.to_le_bytes());

    let header = BLOCK_BYTES;
    put(header, b"EFI PART");
    put(header + 8, &0x0001_0000_u32.to_le_bytes());
    put(header + 12, &(HEADER_BYTES as u32).to_le_bytes());
    let places = [1, blocks - 1, FIRST, last];
    for (index, block) in places.into_iter().enumerate() {
        put(header + 24 + 8 * index, &block.to_le_bytes());
    }
    put(header + 56, &uuid::Uuid::from_u128(8).to_bytes_le());
    put(header + 72, &2_u64.to_le_bytes());
    put(header + 80, &(ENTRIES as u32).to_le_bytes());
    put(header + 84, &(ENTRY_BYTES as u32).to_le_bytes());
    let entries = crc32(&table[entry..]);
    table[header + 88..][..4].copy_from_slice(&entries.to_le_bytes());
    let whole = crc32(&table[header..][..HEADER_BYTES]);
    table[header + 16..][..4].copy_from_slice(&whole.to_le_bytes());
    table
}

/// Names of what there is: bdevs with their aliases, and stores of logical volumes. Not the module's own, which are the
/// volume's endpoint and the way to its peer.
fn found(node: &mut Node) -> Vec<String> {
    let mut ask = |method: &str| node.call(method, Value::Null).unwrap();
    ask("bdev_wait_for_examine");
    let (bdevs, stores) = (ask("bdev_get_bdevs"), ask("bdev_lvol_get_lvstores"));
    let aliases = bdevs.as_array().unwrap().iter();
    let aliases = aliases.flat_map(|bdev| bdev["aliases"].as_array().unwrap());
    let names = [&bdevs, &stores].into_iter();
    let names = names.flat_map(|all| all.as_array().unwrap().iter().map(|one| &one["name"]));
    let text = |name: &Value| name.as_str().unwrap().to_owned();
    let mut all: Vec<_> = names.chain(aliases).map(text).collect();
    let own = format!("{VOLUME}.");
    all.retain(|name| uuid::Uuid::parse_str(name).is_err() && !name.starts_with(&own));
    all.sort();
    all
}

/// A stock target on the disk of node A, which is stopped: what it finds there, and in a copy of the volume's data.
fn seen_without_the_module(stage: &Stage) -> [Vec<String>; 2] {
    let settings = stage.cluster.nodes[A].settings();
    let folder = &stage.cluster.settings().directory;
    let replica = Replica::open("A", &settings.backing).unwrap();
    let mut data = vec![0; (SIZE_MB * MIB) as usize];
    let disk = File::open(&settings.backing).unwrap();
    disk.read_exact_at(&mut data, replica.data_offset_bytes())
        .unwrap();
    let copy = folder.join("data");
    fs::write(&copy, &data).unwrap();

    let mut node = Node::new(NodeSettings {
        launcher: stock_target(),
        log: folder.join("stock.log"),
        ..settings.clone()
    });
    node.start().unwrap();
    let on_disk = found(&mut node);
    let params = json!({"name": "copy", "filename": copy, "block_size": BLOCK_BYTES});
    node.call("bdev_aio_create", params).unwrap();
    let in_data = found(&mut node);
    node.stop().unwrap();
    [on_disk, in_data]
}

/// Makes a store with a logical volume on this bdev.
fn make_store(stage: &mut Stage, bdev: &str) {
    let store = json!({"bdev_name": bdev, "lvs_name": "store", "cluster_sz": MIB});
    call(stage, A, "bdev_lvol_create_lvstore", store);
    let logical = json!({"lvs_name": "store", "lvol_name": "v", "size_in_mib": 8});
    call(stage, A, "bdev_lvol_create", logical);
}

/// Gives the volume a partition table; SPDK looks for one when the bdev appears.
fn make_partition(stage: &mut Stage) {
    stage.cluster.export(A).unwrap();
    let mut client = stage.client(A);
    assert_eq!(client.block_size() as usize, BLOCK_BYTES);
    let table = partition_table(SIZE_MB * MIB / BLOCK_BYTES as u64);
    client.write(0, &table).unwrap();
    drop(client);
    let namespace = json!({"nqn": SUBSYSTEM_NQN, "nsid": 1});
    call(stage, A, "nvmf_subsystem_remove_ns", namespace);
    stage.demote(A);
    stage.promote(A);
}

/// Gives a node its volume, which is a bdev on the Primary only.
fn create(stage: &mut Stage, index: usize) {
    let more = json!({"assume_clean": true, "register": "on_promote"});
    stage.cluster.create(index, &more).unwrap();
    stage.cluster.add_peer(index).unwrap();
}

/// What must be there on the Primary, once `make` has made it.
fn on_the_volume_only(make: impl Fn(&mut Stage), above: &[&str], in_data: &[&str]) {
    let mut stage = targets(ONE_CORE_EACH, SIZE_MB, Value::Null);
    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
        create(&mut stage, index);
    }
    stage.in_sync();
    stage.promote(A);
    make(&mut stage);
    let mut wanted = vec![BASE_BDEV, VOLUME];
    wanted.extend(above);
    wanted.sort_unstable();
    assert_eq!(found(&mut stage.cluster.nodes[A]), wanted);
    // As Primary: what is built on it ends while the volume still serves, and is clean when it is found again.
    for index in [A, B] {
        stop(&mut stage, index);
    }

    let [on_disk, copied] = seen_without_the_module(&stage);
    assert_eq!(on_disk, [BASE_BDEV]);
    assert_eq!(copied, in_data, "it would be found where data begins");

    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
        let all = found(&mut stage.cluster.nodes[index]);
        assert_eq!(all, [BASE_BDEV, VOLUME], "a Secondary cannot be read");
        create(&mut stage, index);
    }
    stage.in_sync();
    // Either node finds it, each on the volume.
    for index in [A, B] {
        stage.promote(index);
        assert_eq!(found(&mut stage.cluster.nodes[index]), wanted);
        stage.demote(index);
        assert_eq!(found(&mut stage.cluster.nodes[index]), [BASE_BDEV]);
    }
    for index in [A, B] {
        stop(&mut stage, index);
        let log = log(&stage, index);
        assert!(!log.contains("recovery on blobstore"), "{log}");
    }
    stage.compare_replicas();
}

#[test]
fn a_store_of_logical_volumes_is_found_on_the_volume_and_not_on_its_disk() {
    let _alone = alone();
    on_the_volume_only(
        |stage| make_store(stage, VOLUME),
        &["store", "store/v"],
        &["copy", BASE_BDEV, "store", "store/v"],
    );
}

#[test]
fn a_partition_and_what_is_in_it_is_found_on_the_volume_and_not_on_its_disk() {
    let _alone = alone();
    let partition = format!("{VOLUME}p1");
    on_the_volume_only(
        |stage| {
            make_partition(stage);
            make_store(stage, &partition);
        },
        &[&partition, "store", "store/v"],
        &["copy", "copyp1", BASE_BDEV, "store", "store/v"],
    );
}

#[test]
fn the_checksum_is_the_one_that_partition_tables_have() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}
