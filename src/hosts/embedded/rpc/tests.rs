use std::time::Duration;

use serde_json::{Value, json};

use super::socket::RpcSocket;
use crate::hosts::embedded::node::{CoreMask, Node, NodeOptions};
use crate::rpc::client::Client;

/// A node with its RPC socket, in this process.
struct Target {
    client: Client,
    _socket: RpcSocket,
    node: Option<Node>,
    folder: tempfile::TempDir,
}

impl Target {
    fn new() -> Target {
        let target = Target::unstarted();
        target
            .node()
            .handle()
            .run(0, |core| core.control.start())
            .unwrap();
        target
            .node()
            .handle()
            .run(0, |core| core.control.set_ready())
            .unwrap();
        target
    }

    fn unstarted() -> Target {
        let folder = tempfile::tempdir().unwrap();
        let options = NodeOptions {
            core_mask: CoreMask::first(2),
            handle_signals: false,
        };
        let node = Node::start(&options, |_| {}).unwrap();
        let path = folder.path().join("rpc.sock");
        let socket =
            RpcSocket::start(&path, Box::new(super::handler(node.handle().clone()))).unwrap();
        let client = Client::connect(&path, Duration::from_secs(20)).unwrap();
        Target {
            client,
            _socket: socket,
            node: Some(node),
            folder,
        }
    }

    fn node(&self) -> &Node {
        self.node.as_ref().unwrap()
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.client
            .call(method, params)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn code(&mut self, method: &str, params: Value) -> i32 {
        self.client
            .call(method, params)
            .unwrap_err()
            .code()
            .unwrap()
    }

    /// A file of 16 MiB.
    fn file(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(16 << 20)
            .unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.node.take().unwrap().shutdown().unwrap();
    }
}

#[test]
fn a_call_answers_with_spdks_codes() {
    let mut target = Target::new();
    assert_eq!(target.code("no_such_method", Value::Null), -32601);
    assert_eq!(
        target.code("spdk_get_version", json!({})),
        -32602,
        "parameters where none are taken"
    );
    assert_eq!(
        target.code("bdev_malloc_create", json!({"block_size": 512})),
        -32603,
        "missing"
    );
    assert_eq!(
        target.code("bdev_get_bdevs", json!({"name": 5})),
        -32603,
        "wrong type"
    );
    let malloc = json!({"name": "m", "num_blocks": 64, "block_size": 512});
    target.call("bdev_malloc_create", malloc.clone());
    assert_eq!(target.code("bdev_malloc_create", malloc), -17);
    assert_eq!(
        target.code(
            "bdev_malloc_create",
            json!({"num_blocks": 64, "block_size": 500})
        ),
        -22
    );
    assert_eq!(
        target.code(
            "bdev_malloc_create",
            json!({"num_blocks": 0, "block_size": 512})
        ),
        -22
    );
    assert_eq!(target.code("bdev_malloc_delete", json!({"name": "x"})), -19);
    assert_eq!(
        target.code("bdev_aio_delete", json!({"name": "m"})),
        -19,
        "another module's bdev"
    );
    assert_eq!(target.code("bdev_get_bdevs", json!({"name": "x"})), -19);
    assert_eq!(target.code("bdev_get_iostat", json!({"names": ["x"]})), -19);
    assert_eq!(
        target.code(
            "bdev_aio_create",
            json!({"name": "a", "filename": "/nonexistent/x"})
        ),
        -2
    );
    assert_eq!(
        target.code("framework_get_config", json!({"name": "x"})),
        -32602
    );
    assert_eq!(
        target.code("spdk_kill_instance", json!({"sig_name": "SIGWHAT"})),
        -32602
    );
}

#[test]
fn parameters_of_other_versions_are_ignored_for_spdks_methods() {
    let mut target = Target::new();
    let params = json!({"name": "m", "num_blocks": 64, "block_size": 512, "numa_id": -1, "some_later_one": {}});
    assert_eq!(target.call("bdev_malloc_create", params), "m");
    let file = target.file("f");
    let params = json!({"name": "a", "filename": file, "fallocate": false, "nowait": false});
    assert_eq!(target.call("bdev_aio_create", params), "a");
    let options = json!({"bdev_io_pool_size": 1, "anything": true});
    assert_eq!(target.call("bdev_set_options", options), true);
}

#[test]
fn bdevs_come_and_go_and_are_described() {
    let mut target = Target::new();
    assert_eq!(
        target.call(
            "bdev_malloc_create",
            json!({"num_blocks": 64, "block_size": 512})
        ),
        "Malloc0"
    );
    assert_eq!(
        target.call(
            "bdev_malloc_create",
            json!({"num_blocks": 64, "block_size": 512})
        ),
        "Malloc1"
    );
    let file = target.file("f");
    let params = json!({"name": "u", "filename": file, "block_size": 4096});
    assert_eq!(target.call("bdev_uring_create", params), "u");
    let all = target.call("bdev_get_bdevs", Value::Null);
    assert_eq!(all.as_array().unwrap().len(), 3);
    let one = target.call("bdev_get_bdevs", json!({"name": "u"}));
    assert_eq!(one[0]["num_blocks"], 4096);
    assert_eq!(one[0]["product_name"], "URING bdev");
    assert_eq!(one[0]["supported_io_types"]["write"], true);
    let uuid = one[0]["uuid"].clone();
    assert_eq!(one[0]["aliases"], json!([uuid]));
    assert_eq!(
        target.call("bdev_get_bdevs", json!({"name": uuid}))[0]["name"],
        "u"
    );
    assert_eq!(target.call("bdev_uring_delete", json!({"name": "u"})), true);
    assert_eq!(
        target.call("bdev_malloc_delete", json!({"name": "Malloc0"})),
        true
    );
    assert_eq!(
        target
            .call("bdev_get_bdevs", Value::Null)
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        target.call(
            "bdev_malloc_create",
            json!({"num_blocks": 64, "block_size": 512})
        ),
        "Malloc0"
    );
}

#[test]
fn get_bdevs_waits_for_a_bdev_as_long_as_it_is_told() {
    let mut target = Target::new();
    let mut other = Client::connect(
        target.folder.path().join("rpc.sock"),
        Duration::from_secs(20),
    )
    .unwrap();
    let waiting = std::thread::spawn(move || {
        other.call("bdev_get_bdevs", json!({"name": "m", "timeout": 15_000}))
    });
    target.call(
        "bdev_malloc_create",
        json!({"name": "m", "num_blocks": 64, "block_size": 512}),
    );
    assert_eq!(waiting.join().unwrap().unwrap()[0]["name"], "m");
    assert_eq!(
        target.code("bdev_get_bdevs", json!({"name": "x", "timeout": 30})),
        -110
    );
}

#[test]
fn iostat_has_an_entry_for_each_bdev_or_each_core() {
    let mut target = Target::new();
    target.call(
        "bdev_malloc_create",
        json!({"name": "m", "num_blocks": 64, "block_size": 512}),
    );
    let all = target.call("bdev_get_iostat", Value::Null);
    assert_eq!(all["bdevs"][0]["name"], "m");
    let operations = [
        ("read", "read"),
        ("write", "written"),
        ("unmap", "unmapped"),
        ("copy", "copied"),
    ];
    for (name, done) in operations {
        for counter in [
            format!("bytes_{done}"),
            format!("num_{name}_ops"),
            format!("{name}_latency_ticks"),
            format!("max_{name}_latency_ticks"),
            format!("min_{name}_latency_ticks"),
        ] {
            assert_eq!(all["bdevs"][0][&counter], 0, "{counter}");
        }
    }
    let params = json!({"names": ["m"], "per_channel": true, "reset_mode": "all"});
    let channels = target.call("bdev_get_iostat", params);
    assert_eq!(channels["channels"].as_array().unwrap().len(), 2);
    assert_eq!(
        target.code("bdev_get_iostat", json!({"per_channel": true})),
        -22
    );
}

#[test]
fn reactors_are_listed_one_a_core() {
    let mut target = Target::new();
    let reactors = target.call("framework_get_reactors", Value::Null);
    assert_eq!(reactors["reactors"].as_array().unwrap().len(), 2);
    assert_eq!(reactors["pid"], std::process::id());
}

#[test]
fn before_the_start_only_what_may_be_called_is_listed_and_works() {
    let mut target = Target::unstarted();
    assert_eq!(target.code("bdev_get_bdevs", Value::Null), -1);
    assert_eq!(target.code("bdev_repl_get_volumes", Value::Null), -1);
    let names = |list: Value| {
        list.as_array()
            .unwrap()
            .iter()
            .map(|name| name.to_string())
            .collect::<Vec<_>>()
    };
    let current = names(target.call("rpc_get_methods", json!({"current": true})));
    let all = names(target.call("rpc_get_methods", json!({"include_aliases": true})));
    assert!(current.contains(&"\"framework_start_init\"".to_owned()));
    assert!(
        current
            .iter()
            .all(|name| !name.contains("bdev_get_bdevs") && !name.contains("bdev_repl"))
    );
    assert!(all.iter().any(|name| name.contains("bdev_repl_create")));

    let (starter, starts) = std::sync::mpsc::channel();
    target
        .node()
        .handle()
        .run(0, move |core| core.control.set_starter(starter))
        .unwrap();
    let node = target.node().handle().clone();
    let starting = std::thread::spawn(move || {
        let reply = starts.recv().unwrap();
        node.run(0, |core| core.control.start()).unwrap();
        node.run(0, |core| core.control.set_ready()).unwrap();
        reply.ok(true);
    });
    let mut other = Client::connect(
        target.folder.path().join("rpc.sock"),
        Duration::from_secs(20),
    )
    .unwrap();
    let waiting = std::thread::spawn(move || other.call("framework_wait_init", Value::Null));
    assert_eq!(target.call("framework_start_init", Value::Null), true);
    assert_eq!(waiting.join().unwrap().unwrap(), true);
    starting.join().unwrap();
    assert_eq!(target.code("framework_start_init", Value::Null), -1);
    assert_eq!(target.call("bdev_get_bdevs", Value::Null), json!([]));
}

#[test]
fn a_saved_configuration_makes_the_same_bdevs_again() {
    let mut first = Target::new();
    let file = first.file("f");
    first.call(
        "bdev_malloc_create",
        json!({"name": "m", "num_blocks": 64, "block_size": 512}),
    );
    first.call(
        "bdev_aio_create",
        json!({"name": "a", "filename": file, "readonly": true}),
    );
    let saved = first.call("framework_get_config", json!({"name": "bdev"}));
    // The file is locked while a node has it.
    first.call("bdev_aio_delete", json!({"name": "a"}));

    let mut second = Target::new();
    for entry in saved.as_array().unwrap() {
        second.call(entry["method"].as_str().unwrap(), entry["params"].clone());
    }
    assert_eq!(
        second.call("framework_get_config", json!({"name": "bdev"})),
        saved
    );
    for subsystem in second
        .call("framework_get_subsystems", Value::Null)
        .as_array()
        .unwrap()
    {
        second.call(
            "framework_get_config",
            json!({"name": subsystem["subsystem"], "with_batches": false}),
        );
    }
}

const NQN: &str = "nqn.2016-06.io.spdk:cnode1";

fn listener(port: u16) -> Value {
    let listen_address = json!({"trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    json!({"nqn": NQN, "listen_address": listen_address})
}

/// A port that nobody listens at.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn export(target: &mut Target) -> u16 {
    target.call(
        "nvmf_create_transport",
        json!({"trtype": "TCP", "no_srq": false, "c2h_success": true}),
    );
    target.call(
        "bdev_malloc_create",
        json!({"name": "m", "num_blocks": 64, "block_size": 512}),
    );
    target.call(
        "nvmf_create_subsystem",
        json!({"nqn": NQN, "allow_any_host": true, "serial_number": "S1"}),
    );
    let namespace = json!({"nqn": NQN, "namespace": {"bdev_name": "m"}, "tgt_name": null});
    assert_eq!(target.call("nvmf_subsystem_add_ns", namespace), 1);
    let port = free_port();
    target.call("nvmf_subsystem_add_listener", listener(port));
    port
}

#[test]
fn a_bdev_is_exported_shown_and_taken_back() {
    let mut target = Target::new();
    let port = export(&mut target);
    let shown = target.call("nvmf_get_subsystems", Value::Null);
    assert_eq!(shown[0]["subtype"], "Discovery");
    assert_eq!(shown[1]["namespaces"][0]["bdev_name"], "m");
    assert_eq!(shown[1]["listen_addresses"][0]["trsvcid"], port.to_string());
    assert_eq!(
        target
            .call("nvmf_get_subsystems", json!({"nqn": NQN}))
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        target.call("nvmf_subsystem_get_listeners", json!({"nqn": NQN}))[0]["address"]["adrfam"],
        "IPv4"
    );
    assert_eq!(
        target.call("bdev_get_bdevs", json!({"name": "m"}))[0]["claimed"],
        true
    );
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());

    target.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1}));
    assert_eq!(
        target.call("bdev_get_bdevs", json!({"name": "m"}))[0]["claimed"],
        false
    );
    target.call(
        "nvmf_subsystem_add_ns",
        json!({"nqn": NQN, "namespace": {"bdev_name": "m", "nsid": 3}}),
    );
    target.call("bdev_malloc_delete", json!({"name": "m"}));
    let shown = target.call("nvmf_get_subsystems", json!({"nqn": NQN}));
    assert_eq!(
        shown[0]["namespaces"],
        json!([]),
        "a deleted bdev is no longer exported"
    );
    target.call("nvmf_subsystem_remove_listener", listener(port));
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    assert_eq!(
        target.call("nvmf_subsystem_get_listeners", json!({"nqn": NQN})),
        json!([])
    );
    target.call("nvmf_delete_subsystem", json!({"nqn": NQN}));
    assert_eq!(
        target
            .call("nvmf_get_subsystems", Value::Null)
            .as_array()
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn the_target_refuses_with_spdks_codes() {
    let mut target = Target::new();
    assert_eq!(
        target.code("nvmf_create_transport", json!({"trtype": "RDMA"})),
        -32602
    );
    assert_eq!(
        target.code("nvmf_get_transports", json!({"trtype": "TCP"})),
        -19
    );
    target.call("nvmf_create_subsystem", json!({"nqn": NQN}));
    assert_eq!(
        target.code("nvmf_subsystem_add_listener", listener(free_port())),
        -32602,
        "no transport yet"
    );
    target.call("nvmf_delete_subsystem", json!({"nqn": NQN}));
    let port = export(&mut target);
    assert_eq!(
        target.code("nvmf_create_transport", json!({"trtype": "TCP"})),
        -32603
    );
    assert_eq!(
        target.code("nvmf_create_subsystem", json!({"nqn": NQN})),
        -32603
    );
    assert_eq!(
        target.code("nvmf_create_subsystem", json!({"nqn": "x"})),
        -32602
    );
    assert_eq!(
        target.code(
            "nvmf_delete_subsystem",
            json!({"nqn": "nqn.2016-06.io.spdk:x"})
        ),
        -32602
    );
    assert_eq!(
        target.code(
            "nvmf_get_subsystems",
            json!({"nqn": "nqn.2016-06.io.spdk:x"})
        ),
        -19
    );
    assert_eq!(
        target.code("nvmf_subsystem_add_listener", listener(port)),
        -32602
    );
    assert_eq!(
        target.code("nvmf_subsystem_remove_listener", listener(free_port())),
        -32602
    );
    for namespace in [
        json!({"bdev_name": "x"}),
        json!({"bdev_name": "m"}),
        json!({"bdev_name": "m", "nguid": "12"}),
        json!({"bdev_name": "m", "eui64": "zzzzzzzzzzzzzzzz"}),
    ] {
        let params = json!({"nqn": NQN, "namespace": namespace});
        assert_eq!(
            target.code("nvmf_subsystem_add_ns", params),
            -32602,
            "{namespace}"
        );
    }
    target.call(
        "bdev_malloc_create",
        json!({"name": "n", "num_blocks": 64, "block_size": 512}),
    );
    let taken = json!({"nqn": NQN, "namespace": {"bdev_name": "n", "nsid": 1}});
    assert_eq!(target.code("nvmf_subsystem_add_ns", taken), -32602);
    let bdev = target.call("bdev_get_bdevs", json!({"name": "n"}));
    assert_eq!(
        bdev[0]["claimed"], false,
        "a refused namespace leaves nothing behind"
    );
    assert_eq!(
        target.code("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 9})),
        -32602
    );
    let host = json!({"nqn": NQN, "host": "nqn.2014-08.org.example:h", "psk": "key0"});
    assert_eq!(target.code("nvmf_subsystem_add_host", host), -32602);
    let host = json!({"nqn": NQN, "host": "nqn.2014-08.org.example:h"});
    assert_eq!(target.call("nvmf_subsystem_add_host", host.clone()), true);
    assert_eq!(target.code("nvmf_subsystem_add_host", host.clone()), -32603);
    for (method, code) in [
        ("nvmf_create_subsystem", -32602),
        ("nvmf_subsystem_add_ns", -32602),
        ("framework_get_config", -32602),
        ("spdk_kill_instance", -32602),
        ("bdev_malloc_create", -32603),
        ("log_set_level", -32603),
    ] {
        assert_eq!(target.code(method, json!({})), code, "{method}");
    }
    assert_eq!(
        target.call("nvmf_subsystem_remove_host", host.clone()),
        true
    );
    assert_eq!(target.code("nvmf_subsystem_remove_host", host), -32603);
}

#[test]
fn a_saved_target_is_the_same_after_loading() {
    let mut first = Target::new();
    let port = export(&mut first);
    first.call(
        "nvmf_subsystem_allow_any_host",
        json!({"nqn": NQN, "allow_any_host": false}),
    );
    first.call(
        "nvmf_subsystem_add_host",
        json!({"nqn": NQN, "host": "nqn.2014-08.org.example:h"}),
    );
    let save = |target: &mut Target| {
        ["bdev", "nvmf"].map(|name| target.call("framework_get_config", json!({"name": name})))
    };
    let shown = first.call("nvmf_get_subsystems", Value::Null);
    let saved = save(&mut first);
    first.call("nvmf_subsystem_remove_listener", listener(port));
    let mut second = Target::new();
    for entry in saved.iter().flat_map(|config| config.as_array().unwrap()) {
        second.call(entry["method"].as_str().unwrap(), entry["params"].clone());
    }
    assert_eq!(save(&mut second), saved);
    assert_eq!(second.call("nvmf_get_subsystems", Value::Null), shown);
}

#[test]
fn a_controller_is_attached_saved_and_detached() {
    let mut exporter = Target::new();
    let port = export(&mut exporter).to_string();
    let mut target = Target::new();
    let params = json!({
        "name": "N", "trtype": "tcp", "adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": port, "subnqn": NQN,
        "hdgst": true, "ddgst": true, "disable_sq_flow_control": false,
    });
    assert_eq!(
        target.call("bdev_nvme_attach_controller", params.clone()),
        json!(["Nn1"])
    );
    assert_eq!(
        target.code("bdev_nvme_attach_controller", params.clone()),
        -17
    );
    let bdev = target.call("bdev_get_bdevs", json!({"name": "Nn1"}));
    assert_eq!(bdev[0]["num_blocks"], 64);
    let shown = target.call("bdev_nvme_get_controllers", json!({"name": "N"}));
    assert_eq!(shown[0]["ctrlrs"][0]["state"], "enabled");
    assert_eq!(shown[0]["ctrlrs"][0]["trid"]["trsvcid"], port);
    let saved = target.call("framework_get_config", json!({"name": "bdev"}));

    let mut second = Target::new();
    for entry in saved.as_array().unwrap() {
        second.call(entry["method"].as_str().unwrap(), entry["params"].clone());
    }
    assert_eq!(
        second.call("framework_get_config", json!({"name": "bdev"})),
        saved
    );
    assert_eq!(
        target.call("bdev_nvme_detach_controller", json!({"name": "N"})),
        true
    );
    assert_eq!(target.call("bdev_get_bdevs", Value::Null), json!([]));
    assert_eq!(
        target.code("bdev_nvme_detach_controller", json!({"name": "N"})),
        -19
    );
    assert_eq!(
        target.code("bdev_nvme_get_controllers", json!({"name": "N"})),
        -22
    );
    for (key, value) in [
        ("trtype", "RDMA"),
        ("traddr", "host"),
        ("adrfam", "ipv6"),
        ("psk", "k"),
        ("trsvcid", "0"),
    ] {
        let mut wrong = params.clone();
        wrong[key] = json!(value);
        assert_eq!(
            target.code("bdev_nvme_attach_controller", wrong),
            -22,
            "{key}"
        );
    }
}
