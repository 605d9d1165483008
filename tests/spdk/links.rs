//! Links between two nodes in SPDK: keys, several paths, commands that bdev_nvme sends again, and namespaces that appear
//! late. All against real targets.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

use bdev_repl::cli::demo::cluster::{VOLUME, peer};
use bdev_repl::cli::demo::launcher::Launcher;
use serde_json::{Value, json};

use crate::hosts::spdk_target;
use crate::stage::{A, B, MIB, PATIENCE, Stage};
use crate::tools::{alone, with_module};
use crate::wire::{Command, Wire};

/// In the interchange format: version 1, SHA-256, a key of 32 bytes with its CRC.
const PSK: &str = "NVMeTLSkey-1:01:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYOtVl3:";
/// Two secrets of 32 bytes.
const HOST_KEY: &str = "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
const CONTROLLER_KEY: &str = "DHHC-1:00:ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj/jBqb2:";
/// First byte of commands of a peer's engine.
const VENDOR: u8 = 0x80;

/// Two nodes that run, without volumes.
fn started() -> Stage {
    let spdk = || Launcher::Spdk(with_module(spdk_target(), &[]));
    let mut stage = Stage::on([spdk(), spdk()], ["0x1", "0x2"], 32, Value::Null);
    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
    }
    stage
}

fn create(stage: &mut Stage, index: usize, more: &Value) {
    let mut params = json!({"assume_clean": true});
    merge(&mut params, more);
    stage.cluster.create(index, &params).unwrap();
}

fn merge(params: &mut Value, more: &Value) {
    for (name, value) in more.as_object().into_iter().flatten() {
        params[name] = value.clone();
    }
}

fn add_peer(stage: &mut Stage, index: usize, more: &Value) {
    let mut params = stage.cluster.peer_parameters(index);
    merge(&mut params, more);
    stage.cluster.nodes[index]
        .call("bdev_repl_add_peer", params)
        .unwrap();
}

fn at(address: SocketAddr) -> Value {
    json!({"traddr": address.ip().to_string(), "trsvcid": address.port().to_string()})
}

/// Waits until a node says of its peer that it is not reached, and why.
fn refused(stage: &mut Stage, index: usize) -> String {
    let is_refused = |report: &_| peer(report).is_some_and(|peer| peer.last_error.is_some());
    let report = stage
        .cluster
        .wait_until(index, "it is told why", PATIENCE, is_refused)
        .unwrap();
    let peer = peer(&report).unwrap();
    assert_ne!(peer.connection, "Connected");
    peer.last_error.clone().unwrap()
}

/// Replicates, and ends in order.
fn replicate(mut stage: Stage) {
    stage.in_sync();
    stage.promote(A);
    stage.cluster.export(A).unwrap();
    stage.write(A, 0..32 * MIB, 500);
    stage.end(A);
}

/// A link that comes up with these keys and not without: `host` is how a node lets the other in, `own` how it connects.
fn with_keys(create_more: &Value, host: &Value, own: &Value, says: &str) {
    let _alone = alone();
    let mut stage = started();
    for index in [A, B] {
        for (name, key) in [
            ("psk0", PSK),
            ("host0", HOST_KEY),
            ("ctrlr0", CONTROLLER_KEY),
        ] {
            let path = stage.cluster.settings().directory.join(name);
            fs::write(&path, key).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            stage.cluster.nodes[index]
                .call("keyring_file_add_key", json!({"name": name, "path": path}))
                .unwrap();
        }
        let mut allowed = json!({"node_id": 1 - index});
        merge(&mut allowed, host);
        let mut more = json!({"allowed_hosts": [allowed]});
        merge(&mut more, create_more);
        create(&mut stage, index, &more);
    }
    add_peer(&mut stage, B, own);
    add_peer(&mut stage, A, &json!({}));
    let error = refused(&mut stage, A);
    assert!(error.contains("not reached"), "{error}");
    let remove = json!({"name": VOLUME, "node_id": 1});
    let node = &mut stage.cluster.nodes[A];
    node.call("bdev_repl_remove_peer", remove.clone()).unwrap();
    let mut missing = own.clone();
    for key in missing.as_object_mut().unwrap().values_mut() {
        *key = json!("nowhere");
    }
    add_peer(&mut stage, A, &missing);
    let error = refused(&mut stage, A);
    assert!(error.contains("'nowhere': add it"), "{error}");
    let node = &mut stage.cluster.nodes[A];
    node.call("bdev_repl_remove_peer", remove).unwrap();
    add_peer(&mut stage, A, own);
    stage.in_sync();
    let node = &mut stage.cluster.nodes[A];
    let config = node
        .call("framework_get_config", json!({"name": "bdev"}))
        .unwrap();
    let calls = config.as_array().unwrap();
    let added = calls
        .iter()
        .find(|call| call["method"] == "bdev_repl_add_peer")
        .unwrap();
    for (name, key) in own.as_object().unwrap() {
        assert_eq!(added["params"][name], *key, "{added}");
    }
    let config = node
        .call("framework_get_config", json!({"name": "nvmf"}))
        .unwrap();
    assert!(config.to_string().contains(says), "{config:#}");
    replicate(stage);
}

#[test]
fn a_link_with_tls_connects_with_the_key_and_not_without() {
    let secure = json!({"secure_channel": true});
    let key = json!({"psk": "psk0"});
    with_keys(&secure, &key, &key, "\"secure_channel\":true");
}

#[test]
fn a_link_with_dh_hmac_chap_connects_with_both_keys_and_not_without() {
    let keys = json!({"dhchap_key": "host0", "dhchap_ctrlr_key": "ctrlr0"});
    with_keys(&json!({}), &keys, &keys, "\"dhchap_ctrlr_key\":\"ctrlr0\"");
}

#[test]
fn a_link_with_two_paths_outlives_the_loss_of_either() {
    let _alone = alone();
    let mut stage = started();
    for index in [A, B] {
        create(&mut stage, index, &json!({}));
    }
    let near = stage.cluster.settings().link_address;
    let endpoint = stage.cluster.nodes[B].settings().endpoint;
    let paths = [(); 2].map(|()| Wire::to(endpoint, near));
    add_peer(&mut stage, B, &json!({}));
    let mut both = at(paths[0].front());
    both["alternate_addresses"] = json!([at(paths[1].front())]);
    add_peer(&mut stage, A, &both);
    stage.in_sync();
    stage.promote(A);
    stage.cluster.export(A).unwrap();
    // Both paths are there when either has carried something.
    let connected = |stage: &mut Stage| {
        let node = &mut stage.cluster.nodes[A];
        let all = node.call("bdev_nvme_get_controllers", Value::Null).unwrap();
        let text = all.to_string();
        text.matches("\"enabled\"").count()
    };
    let wait_for_both = |stage: &mut Stage| {
        let started = std::time::Instant::now();
        while connected(stage) < 2 {
            assert!(
                started.elapsed() < PATIENCE,
                "the second path is not connected"
            );
        }
    };
    wait_for_both(&mut stage);
    // A Primary that has written without its peer would begin another.
    let generation = stage.cluster.report(A).unwrap().generations.current;
    let load = stage.load(A, 0..32 * MIB);
    for path in [&paths[0], &paths[1], &paths[0]] {
        stage.let_write(200);
        path.cut();
        stage.let_write(200);
        wait_for_both(&mut stage);
    }
    let report = load.stop();
    assert!(report.error.is_none(), "{:?}", report.error);
    let now = stage.cluster.report(A).unwrap().generations.current;
    assert_eq!(
        now, generation,
        "the link was lost although a path was left"
    );
    stage.end(A);
}

#[test]
fn what_bdev_nvme_sends_again_is_carried_out_once() {
    let _alone = alone();
    let mut stage = started();
    for index in [A, B] {
        create(&mut stage, index, &json!({}));
    }
    let near = stage.cluster.settings().link_address;
    let wire = Wire::to(stage.cluster.nodes[B].settings().endpoint, near);
    add_peer(&mut stage, B, &json!({}));
    // With patience bdev_nvme keeps what is outstanding and sends it on the next connection.
    let mut patient = at(wire.front());
    merge(
        &mut patient,
        &json!({"ctrlr_loss_timeout_sec": -1, "reconnect_delay_sec": 1, "fast_io_fail_timeout_sec": 0}),
    );
    add_peer(&mut stage, A, &patient);
    stage.in_sync();
    stage.promote(A);
    stage.cluster.export(A).unwrap();
    // A Primary that has written without its peer would begin another.
    let generation = stage.cluster.report(A).unwrap().generations.current;
    let load = stage.load(A, 0..32 * MIB);
    for _ in 0..3 {
        stage.let_write(200);
        // They arrive and are carried out, and nobody here hears of it.
        wire.keep_answers(true);
        let before = wire.kept_answers();
        let started = std::time::Instant::now();
        while wire.kept_answers() == before {
            assert!(started.elapsed() < PATIENCE, "nothing is answered");
            std::thread::yield_now();
        }
        wire.cut();
        wire.keep_answers(false);
        stage.let_write(200);
    }
    let report = load.stop();
    assert!(report.error.is_none(), "{:?}", report.error);
    let now = stage.cluster.report(A).unwrap().generations.current;
    assert_eq!(now, generation, "the link was lost instead");
    let mut all: Vec<_> = wire
        .seen()
        .iter()
        .filter(|command| command.opcode() >= VENDOR)
        .map(Command::meaning)
        .collect();
    let sent = all.len();
    all.sort_unstable();
    all.dedup();
    assert!(sent > all.len(), "nothing has been sent again");
    stage.end(A);
}

#[test]
fn a_peer_whose_namespace_appears_after_its_listener_is_reached() {
    let _alone = alone();
    let mut stage = started();
    create(&mut stage, A, &json!({}));
    let volume = stage.cluster.report(A).unwrap().uuid;
    let nqn = format!("nqn.2026-11.io.bdev-repl:volume:{volume}:node1");
    let endpoint = stage.cluster.nodes[B].settings().endpoint;
    let mut address = at(endpoint);
    address["trtype"] = json!("TCP");
    address["adrfam"] = json!("IPv4");
    let node = &mut stage.cluster.nodes[B];
    for (method, params) in [
        (
            "nvmf_create_subsystem",
            json!({"nqn": nqn, "allow_any_host": true}),
        ),
        (
            "nvmf_subsystem_add_listener",
            json!({"nqn": nqn, "listen_address": address}),
        ),
    ] {
        node.call(method, params).unwrap();
    }
    add_peer(&mut stage, A, &json!({}));
    let error = refused(&mut stage, A);
    assert!(error.contains("no namespace yet"), "{error}");
    create(&mut stage, B, &json!({"listen_address": null}));
    let namespace = json!({"bdev_name": format!("{VOLUME}.endpoint"), "nsid": 1});
    let node = &mut stage.cluster.nodes[B];
    node.call(
        "nvmf_subsystem_add_ns",
        json!({"nqn": nqn, "namespace": namespace}),
    )
    .unwrap();
    add_peer(&mut stage, B, &json!({}));
    replicate(stage);
}
