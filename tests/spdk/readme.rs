//! The README's way from two running targets to a paired volume, run as it stands there.

use std::env;
use std::fs;
use std::process::Command;

use bdev_repl::cli::demo::launcher::Launcher;
use serde_json::{Value, json};

use crate::hosts::spdk_target;
use crate::stage::{A, B, Stage};
use crate::tools::{alone, with_module};

const MARK: &str = "<!-- run by the tests of the SPDK host -->";

/// The commands below the mark.
fn commands() -> String {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let (_, rest) = readme.split_once(MARK).expect("the README has the mark");
    let (_, block) = rest.split_once("```sh\n").expect("commands follow it");
    let (block, _) = block.split_once("```").expect("they end");
    block.to_owned()
}

#[test]
fn two_running_targets_are_paired_as_the_readme_says() {
    let _alone = alone();
    // The official client; ci/test installs it.
    let Some(client) = env::var_os("BDEV_REPL_RPC") else {
        println!("skipped: BDEV_REPL_RPC does not name SPDK's RPC client");
        return;
    };
    let hosts = [(); 2].map(|()| Launcher::Spdk(with_module(spdk_target(), &[])));
    let mut stage = Stage::on(hosts, ["0x1", "0x2"], 32, Value::Null);
    for index in [A, B] {
        stage.cluster.nodes[index].start().unwrap();
    }
    let [a, b] = [A, B].map(|index| {
        let socket = &stage.cluster.nodes[index].settings().rpc_socket;
        format!(
            "{} --plugin bdev_repl -s {}",
            client.to_string_lossy(),
            socket.display()
        )
    });
    let [address_a, address_b] = [A, B].map(|index| {
        stage.cluster.nodes[index]
            .settings()
            .endpoint
            .ip()
            .to_string()
    });
    let ran = Command::new("bash")
        .args(["-euc", &commands()])
        .env("PYTHONPATH", concat!(env!("CARGO_MANIFEST_DIR"), "/python"))
        .env("a", a)
        .env("b", b)
        .env("base", "disk0")
        .env("address_a", address_a)
        .env("address_b", address_b)
        .output()
        .unwrap();
    assert!(
        ran.status.success(),
        "{}{}",
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr)
    );
    let name = json!({"name": "vol0"});
    let mut in_sync = false;
    let started = std::time::Instant::now();
    while !in_sync {
        assert!(started.elapsed() < crate::stage::PATIENCE, "no resync");
        in_sync = [(A, "Primary"), (B, "Secondary")]
            .iter()
            .all(|&(index, role)| {
                let report = stage.cluster.nodes[index]
                    .call("bdev_repl_get_volumes", name.clone())
                    .unwrap();
                let (volume, peer) = (&report[0], &report[0]["peers"][0]);
                volume["role"] == role
                    && volume["disk"] == "UpToDate"
                    && peer["disk"] == "UpToDate"
                    && peer["connection"] == "Connected"
            });
    }
    for index in [A, B] {
        stage.cluster.nodes[index].stop().unwrap();
    }
}
