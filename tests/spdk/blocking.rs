//! Our blocking client, and with it the load of all scenarios, against SPDK's NVMe/TCP target.

use bdev_repl::cli::demo::cluster::{BASE_BDEV, SUBSYSTEM_NQN};
use bdev_repl::hosts::embedded::nvme_tcp::blocking::{
    BlockingClient, ClientError, ClientParameters, discover,
};
use bdev_repl::hosts::embedded::nvme_tcp::command::{NvmeStatus, Sqe};
use serde_json::{Value, json};

use crate::stage::{A, MIB, Stage};
use crate::tools::{alone, stock_target};

/// Only node A is started: a target that exports `bdev`.
fn target(size_mb: u64) -> Stage {
    let launchers = [stock_target(), stock_target()];
    let mut stage = Stage::on(launchers, ["0x1", "0x2"], size_mb, Value::Null);
    stage.cluster.nodes[A].start().unwrap();
    stage
}

fn export(stage: &mut Stage, nsid: u32, bdev: &str) {
    let params = json!({"nqn": SUBSYSTEM_NQN, "namespace": {"bdev_name": bdev, "nsid": nsid}});
    stage.cluster.nodes[A]
        .call("nvmf_subsystem_add_ns", params)
        .unwrap();
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (at / 512) as u8 ^ (at % 251) as u8 ^ seed;
    (0..bytes).map(byte).collect()
}

#[test]
fn reads_and_writes_of_any_length_reach_spdks_target_with_and_without_digests() {
    let _alone = alone();
    let mut stage = target(1);
    for (nsid, block_size) in [(1, 512), (2, 4096)] {
        let name = format!("memory{block_size}");
        let blocks = 64 * MIB / u64::from(block_size);
        let params = json!({"name": name, "num_blocks": blocks, "block_size": block_size});
        stage.cluster.nodes[A]
            .call("bdev_malloc_create", params)
            .unwrap();
        export(&mut stage, nsid, &name);
        for (header_digest, data_digest) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let wanted = ClientParameters {
                nsid,
                header_digest,
                data_digest,
                ..ClientParameters::default()
            };
            let address = stage.cluster.nodes[A].settings().export;
            let mut client = BlockingClient::connect_with(address, SUBSYSTEM_NQN, &wanted).unwrap();
            assert_eq!((client.block_size(), client.blocks()), (block_size, blocks));
            let agreed = client.digests();
            assert_eq!((agreed.header, agreed.data), (header_digest, data_digest));
            exercise(&mut client);
        }
    }
}

/// Everything that the client can do, on a namespace whose content does not matter.
fn exercise(client: &mut BlockingClient) {
    let block = client.block_size() as usize;
    for (lba, blocks) in [(0, 1), (3, 7), (11, 33), (5, (1 << 20) / block + 1)] {
        let bytes = pattern(blocks * block, lba as u8);
        client.write(lba, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        client.read(lba, &mut back).unwrap();
        assert!(back == bytes, "{blocks} blocks from {lba}");
    }
    // More at once than a queue has entries.
    let contents: Vec<Vec<u8>> = (0..400).map(|at| pattern(block, at as u8)).collect();
    let requests: Vec<(u64, &[u8])> = (0u64..)
        .zip(&contents)
        .map(|(at, content)| (at * 3, content.as_slice()))
        .collect();
    let outcome = client.write_many(&requests);
    outcome.result.unwrap();
    assert_eq!(outcome.acknowledged.len(), requests.len());
    for (lba, content) in &requests {
        let mut back = vec![0; block];
        client.read(*lba, &mut back).unwrap();
        assert!(back == *content, "block {lba}");
    }
    client.write_zeroes(3, 9).unwrap();
    client.flush().unwrap();
    let mut back = vec![1; 9 * block];
    client.read(3, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    // What is refused is refused alone.
    let end = client.blocks();
    let refused = client.write(end, &vec![1; block]).unwrap_err();
    let ClientError::Command { status, .. } = refused else {
        panic!("{refused}");
    };
    let out_of_range = NvmeStatus::LBA_OUT_OF_RANGE;
    assert_eq!((status.sct, status.sc), (out_of_range.sct, out_of_range.sc));
    let mut data = vec![0; 4096];
    for opcode in [0x80, 0x81, 0x82] {
        let vendor = Sqe {
            opcode,
            nsid: client.namespace().nsid,
            ..Sqe::default()
        };
        let completion = client.passthrough(vendor, &mut data).unwrap();
        assert!(!completion.status.is_success(), "opcode {opcode:x}");
    }
    client.read(end - 1, &mut back[..block]).unwrap();
}

#[test]
fn spdks_discovery_service_names_the_subsystem() {
    let _alone = alone();
    let stage = target(1);
    let address = stage.cluster.nodes[A].settings().export;
    let wanted = ClientParameters::default();
    let error = BlockingClient::connect_with(address, SUBSYSTEM_NQN, &wanted).err();
    assert!(
        matches!(error, Some(ClientError::NoNamespace { nsid: 1, .. })),
        "{error:?}"
    );
    let found = discover(address, BlockingClient::HOST_NQN, wanted.timeouts).unwrap();
    let names: Vec<&str> = found
        .iter()
        .map(|entry| entry.subsystem_nqn.as_str())
        .collect();
    assert!(names.contains(&SUBSYSTEM_NQN), "{names:?}");
}

#[test]
fn what_the_load_had_acknowledged_is_there_after_kills_of_spdks_target() {
    let _alone = alone();
    let mut stage = target(64);
    export(&mut stage, 1, BASE_BDEV);
    stage.write(A, 0..64 * MIB, 2000);
    for _ in 0..5 {
        let load = stage.load(A, 0..64 * MIB);
        stage.let_write(500);
        stage.cluster.nodes[A].kill().unwrap();
        assert!(load.join().error.is_some());
        // The file is not held by what the dead process had on its way: nothing changes any more.
        stage.cluster.nodes[A].start().unwrap();
        export(&mut stage, 1, BASE_BDEV);
        stage.read_back(A, 0..64 * MIB);
        stage.read_back(A, 0..64 * MIB);
    }
    stage.cluster.nodes[A].stop().unwrap();
}
