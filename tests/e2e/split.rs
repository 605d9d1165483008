//! Both nodes were Primary without knowing of each other: both say so, nothing is overwritten, the operator
//! decides.

use bdev_repl::cli::demo::cluster::{VOLUME, peer};
use bdev_repl::cli::demo::compare::Replica;
use bdev_repl::cli::demo::link::LinkState;
use bdev_repl::rpc::volume::VolumeReport;
use serde_json::json;

use crate::stage::{A, B, MIB, PATIENCE, Stage};

#[test]
fn a_split_brain_is_reported_on_both_sides_and_mended_by_discarding_one() {
    let mut stage = Stage::paired(32, json!({}));
    stage.write(A, 0..8 * MIB, 200);
    stage.cluster.link.set(LinkState::Closed);
    stage.wait_until_alone(A);
    stage.wait_until_alone(B);
    // A's writes count: they are in the ledger. B's are the ones that will be given up.
    stage.write(A, 8 * MIB..16 * MIB, 200);
    stage.promote(B);
    let mut client = stage.client(B);
    for block in 0..64 {
        client.write(block * 16, &[0xbb; 4096]).unwrap();
    }
    drop(client);
    stage.cluster.link.set(LinkState::Up);
    let split = |report: &VolumeReport| {
        peer(report).is_some_and(|peer| {
            let error = peer.last_error.as_deref().unwrap_or_default();
            error.to_lowercase().contains("split")
        })
    };
    for index in [A, B] {
        let report = stage
            .cluster
            .wait_until(index, "the split brain is reported", PATIENCE, split)
            .unwrap();
        assert_eq!(report.role, "Primary");
        assert_eq!(peer(&report).unwrap().connection, "StandAlone");
    }
    // Nothing was touched: each has its own.
    stage.read_back(A, 0..32 * MIB);
    let mut content = [0; 4096];
    stage.client(B).read(0, &mut content).unwrap();
    assert_eq!(content, [0xbb; 4096]);

    stage.demote(B);
    let discard = json!({"name": VOLUME, "discard_my_data": true});
    stage.cluster.nodes[B]
        .call("bdev_repl_connect", discard)
        .unwrap();
    stage.cluster.call(A, "bdev_repl_connect").unwrap();
    stage.in_sync();
    stage.read_back(A, 0..32 * MIB);
    stage.end(A);
}

#[test]
fn data_of_another_origin_is_refused_and_left_alone() {
    let mut stage = Stage::new(16, json!({"uuid": "11111111-2222-4333-8444-555555555555"}));
    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
        stage
            .cluster
            .create(index, &json!({"has_data": true}))
            .unwrap();
        stage.cluster.export(index).unwrap();
    }
    // Each with a history of its own.
    stage.promote(A);
    stage.write(A, 0..16 * MIB, 100);
    stage.demote(A);
    for index in [A, B] {
        stage.cluster.add_peer(index).unwrap();
    }
    for index in [A, B] {
        let told = |report: &VolumeReport| {
            peer(report)
                .is_some_and(|peer| peer.connection == "StandAlone" && peer.last_error.is_some())
        };
        stage
            .cluster
            .wait_until(index, "the refusal is reported", PATIENCE, told)
            .unwrap();
    }
    stage.promote(A);
    stage.read_back(A, 0..16 * MIB);
    let settings = stage.cluster.nodes[B].settings();
    let other = Replica::open("B", &settings.backing).unwrap();
    assert_eq!(other.data_size_bytes(), 16 * MIB);
    let bytes = std::fs::read(other.path()).unwrap();
    let data = other.data_offset_bytes() as usize..(other.data_offset_bytes() + 16 * MIB) as usize;
    assert!(bytes[data].iter().all(|byte| *byte == 0));
}
