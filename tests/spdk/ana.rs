//! A host that has a path to each node: its multipath follows the Primary by what the listeners tell. The hosts of the two
//! nodes come from the environment.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use bdev_repl::cli::demo::cluster::{SUBSYSTEM_NQN, VOLUME};
use bdev_repl::cli::demo::node::LOOK_INTERVAL;
use bdev_repl::rpc::client::Client;
use serde_json::{Value, json};

use crate::stage::{A, B, PATIENCE, Stage};
use crate::tools::{SECOND_CORE, alone, built, run_in, stock};

/// The volume, as SPDK's initiator calls it.
const BDEV: &str = "farn1";
/// Long enough for three changes of role on a busy machine; how fast they are is not what is tested.
const LOAD_SECONDS: &str = "20";

/// SPDK's initiator with a path to each node, which tries an I/O again as long as there may be a path.
fn two_paths(stage: &Stage) -> Value {
    let mut calls =
        vec![json!({"method": "bdev_nvme_set_options", "params": {"bdev_retry_count": -1}})];
    for node in &stage.cluster.nodes {
        let export = node.settings().export;
        let params = json!({
            "name": "far",
            "trtype": "TCP",
            "adrfam": "IPv4",
            "traddr": export.ip().to_string(),
            "trsvcid": export.port().to_string(),
            "subnqn": SUBSYSTEM_NQN,
            "multipath": "multipath",
        });
        calls.push(json!({"method": "bdev_nvme_attach_controller", "params": params}));
    }
    json!({"subsystems": [{"subsystem": "bdev", "config": calls}]})
}

/// The addresses through which the host reaches the volume: one listener each that is optimized.
fn accessible(host: &mut Client) -> Vec<String> {
    let answer = host
        .call("bdev_nvme_get_io_paths", json!({"name": BDEV}))
        .unwrap();
    let paths = answer["poll_groups"].as_array().unwrap().iter();
    let paths = paths.flat_map(|group| group["io_paths"].as_array().unwrap());
    let open = paths.filter(|path| path["accessible"] == json!(true));
    let address = |path: &Value| path["transport"]["traddr"].as_str().unwrap().to_owned();
    open.map(address).collect()
}

/// Writes that a node's volume has been given.
fn writes(stage: &mut Stage, index: usize) -> u64 {
    let answer = stage.cluster.nodes[index]
        .call("bdev_get_iostat", Value::Null)
        .unwrap();
    let mut bdevs = answer["bdevs"].as_array().unwrap().iter();
    let volume = bdevs.find(|bdev| bdev["name"] == json!(VOLUME)).unwrap();
    volume["num_write_ops"].as_u64().unwrap()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        thread::sleep(LOOK_INTERVAL);
    }
}

fn connect(socket: &PathBuf) -> Client {
    let mut client = None;
    wait_until("the host's RPC socket appears", || {
        client = Client::connect(socket, Duration::from_secs(30)).ok();
        client.is_some()
    });
    client.unwrap()
}

#[test]
fn a_host_with_a_path_to_each_node_follows_the_primary() {
    let _alone = alone();
    let Some(bdevperf) = built("build/examples/bdevperf") else {
        return;
    };
    let mut stage = Stage::paired(64, Value::Null);
    let directory = stage.cluster.settings().directory.clone();
    let (config, socket) = (directory.join("host.json"), directory.join("host.sock"));
    std::fs::write(&config, two_paths(&stage).to_string()).unwrap();
    let arguments = ["-q", "8", "-o", "4096", "-w", "verify", "-T", BDEV];
    let mut command = stock(bdevperf, &arguments).command();
    command.args(["-t", LOAD_SECONDS, "-m", SECOND_CORE, "-r"]);
    command.arg(&socket).arg("-c").arg(&config);
    thread::scope(|scope| {
        let load = scope.spawn(|| run_in(&directory, &mut command));
        let mut host = connect(&socket);
        for (primary, former) in [(A, None), (B, Some(A)), (A, Some(B))] {
            if let Some(former) = former {
                stage.demote(former);
                stage.promote(primary);
            }
            let way = stage.cluster.nodes[primary].settings().export.ip();
            wait_until("the host takes the path to the Primary alone", || {
                accessible(&mut host) == [way.to_string()]
            });
            let before = writes(&mut stage, primary);
            wait_until("the host writes at the Primary", || {
                writes(&mut stage, primary) > before
            });
        }
        let told = load.join().unwrap();
        assert!(told.contains("workload: verify"), "{told}");
    });
    stage.in_sync();
    stage.stop_both(A);
    stage.compare_replicas();
}
