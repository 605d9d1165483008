use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn parse(method: &str, params: Value) -> Result<VolumeRequest, RpcError> {
    VolumeRequest::parse(method, Some(params))
}

fn code(method: &str, params: Value) -> i32 {
    parse(method, params).unwrap_err().code
}

#[test]
fn create_needs_only_name_and_node_id() {
    let VolumeRequest::Create(create) = parse(
        "bdev_repl_create",
        json!({"name": "v", "base_bdev": "b", "node_id": 1}),
    )
    .unwrap() else {
        panic!()
    };
    assert_eq!((create.granularity_kb, create.peer_slots), (4, 3));
    assert_eq!((create.channel_slots, create.al_extents), (8, 256));
    assert_eq!(
        (create.size_mb, create.data_offset, create.listen),
        (None, None, None)
    );
    assert_eq!(create.ana_listeners, []);
    assert!(!create.assume_clean && !create.has_data && !create.force);
}

#[test]
fn a_wrong_unknown_or_missing_parameter_is_32603() {
    for params in [
        json!({"name": "v"}),
        json!({"node_id": 1}),
        json!({"name": 1, "node_id": 1}),
        json!({"name": "v", "node_id": 8}),
        json!({"name": "v", "node_id": -1}),
        json!({"name": "v", "node_id": 1, "peer_slots": 0}),
        json!({"name": "v", "node_id": 1, "peer_slots": 8}),
        json!({"name": "v", "node_id": 1, "force": 1}),
        json!({"name": "v", "node_id": 1, "uuid": "zz"}),
        json!({"name": "v", "node_id": 1, "base": "b"}),
        json!({"name": "v", "node_id": 1, "listen_address": "10.0.0.1"}),
        json!({"name": "v", "node_id": 1, "listen_address": {"traddr": "10.0.0.1", "trsvcid": "4420", "x": 1}}),
        json!({"name": "v", "node_id": 1, "listen_address": {"traddr": "10.0.0.1", "trsvcid": "0"}}),
        json!({"name": "v", "node_id": 1, "ana_listeners": {"nqn": "n", "traddr": "10.0.0.1", "trsvcid": "1"}}),
        json!({"name": "v", "node_id": 1, "ana_listeners": ["10.0.0.1"]}),
        json!({"name": "v", "node_id": 1, "ana_listeners": [{"traddr": "10.0.0.1", "trsvcid": "1"}]}),
        json!({"name": "v", "node_id": 1, "ana_listeners": [{"nqn": "n", "traddr": "10.0.0.1"}]}),
        json!({"name": "v", "node_id": 1, "ana_listeners": [{"nqn": "n", "traddr": "::1", "trsvcid": "1", "x": 1}]}),
        json!({"name": "v", "node_id": 1, "ana_listeners": [{"nqn": "n", "traddr": "::1", "trsvcid": 1, "anagrpid": 0}]}),
    ] {
        assert_eq!(code("bdev_repl_create", params.clone()), -32603, "{params}");
    }
}

#[test]
fn a_value_that_cannot_be_is_22() {
    let base = json!({"name": "v", "node_id": 1, "base_bdev": "b"});
    for (key, value) in [
        ("name", json!("")),
        ("name", json!("x".repeat(64))),
        ("name", json!("a b")),
        ("name", json!("a/b")),
        ("name", json!("größe")),
        ("granularity_kb", json!(12)),
        ("data_offset", json!(4096)),
        (
            "listen_address",
            json!({"traddr": "host.example", "trsvcid": "4420"}),
        ),
        (
            "listen_address",
            json!({"traddr": "10.0.0.1", "trsvcid": "4420", "adrfam": "IPv6"}),
        ),
        (
            "listen_address",
            json!({"traddr": "10.0.0.1", "trsvcid": "4420", "trtype": "RDMA"}),
        ),
        (
            "ana_listeners",
            json!([{"nqn": "", "traddr": "10.0.0.1", "trsvcid": 1}]),
        ),
        (
            "ana_listeners",
            json!([{"nqn": "n".repeat(224), "traddr": "10.0.0.1", "trsvcid": 1}]),
        ),
        (
            "ana_listeners",
            json!([{"nqn": "n", "traddr": "10.0.0.1", "trsvcid": 1, "trtype": "FC"}]),
        ),
        (
            "ana_listeners",
            json!([
                {"nqn": "n", "traddr": "10.0.0.1", "trsvcid": 1},
                {"nqn": "n", "traddr": "10.0.0.1", "trsvcid": "1", "trtype": "tcp"},
            ]),
        ),
    ] {
        let mut params = base.clone();
        params[key] = value;
        assert_eq!(code("bdev_repl_create", params.clone()), -22, "{params}");
    }
    let both = json!({"name": "v", "node_id": 1, "base_bdev": "b", "assume_clean": true, "has_data": true});
    assert_eq!(code("bdev_repl_create", both), -22);
    let diskless = json!({"name": "v", "node_id": 1, "has_data": true});
    assert_eq!(code("bdev_repl_create", diskless), -22);
}

#[test]
fn a_port_may_be_a_number_or_a_string() {
    for port in [json!(4420), json!("4420")] {
        let params = json!({"name": "v", "node_id": 2, "traddr": "::1", "trsvcid": port});
        let VolumeRequest::AddPeer(peer) = parse("bdev_repl_add_peer", params).unwrap() else {
            panic!()
        };
        assert_eq!(peer.address.to_string(), "[::1]:4420");
        assert!(peer.connect && !peer.hdgst && !peer.ddgst);
    }
}

#[test]
fn every_method_refuses_an_unknown_parameter_and_says_which() {
    for method in METHODS {
        let params = json!({
            "name": "v", "base_bdev": "b", "node_id": 1, "traddr": "10.0.0.1", "trsvcid": "4420",
        });
        let mut all = params.as_object().unwrap().clone();
        // Take out what this method does not know, then add one that none knows.
        loop {
            match VolumeRequest::parse(method, Some(Value::Object(all.clone()))) {
                Ok(_) => break,
                Err(error) => {
                    let name = error.message.split('\'').nth(1).unwrap().to_owned();
                    assert!(all.remove(&name).is_some(), "{method}: {error}");
                }
            }
        }
        all.insert("colour".to_owned(), json!("red"));
        let error = VolumeRequest::parse(method, Some(Value::Object(all))).unwrap_err();
        assert_eq!(error.code, -32603);
        assert!(
            error.message.contains("unknown parameter 'colour'"),
            "{error}"
        );
    }
}

#[test]
fn another_method_is_not_found() {
    assert_eq!(code("bdev_repl_explode", json!({})), -32601);
}

fn address_strategy() -> impl Strategy<Value = Address> {
    let ip = prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from),
    ];
    (ip, 1u16..).prop_map(|(traddr, trsvcid)| Address { traddr, trsvcid })
}

fn listeners_strategy() -> impl Strategy<Value = Vec<AnaListener>> {
    let listener = (
        "nqn[.]2025-01[.]x:[ -~]{0,20}",
        any::<bool>(),
        address_strategy(),
        proptest::option::of(1u32..),
    )
        .prop_map(|(nqn, rdma, address, anagrpid)| AnaListener {
            nqn,
            transport: if rdma {
                Transport::Rdma
            } else {
                Transport::Tcp
            },
            address,
            anagrpid,
        });
    proptest::collection::vec(listener, 0..3).prop_filter("each listener once", |all| {
        all.len() < 2 || all[0] != all[1]
    })
}

fn name_strategy() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_.:-]{1,63}"
}

fn create_strategy() -> impl Strategy<Value = VolumeRequest> {
    let shape = (0u8..=7, 2u32..=10, 1u8..=7, 1u8..=64, 7u32..=1000);
    let device = (
        proptest::option::of("[a-z0-9]{1,20}"),
        proptest::option::of(1u64..1 << 40),
    );
    let flags = (any::<bool>(), 0u8..3, any::<bool>());
    let uuid = proptest::option::of(any::<u128>().prop_map(Uuid::from_u128));
    (
        name_strategy(),
        shape,
        device,
        flags,
        uuid,
        (
            proptest::option::of(address_strategy()),
            listeners_strategy(),
        ),
    )
        .prop_map(
            |(
                name,
                shape,
                (base_bdev, size_mb),
                (in_place, first, force),
                uuid,
                (listen, ana_listeners),
            )| {
                let disk = base_bdev.is_some();
                VolumeRequest::Create(CreateVolume {
                    name,
                    base_bdev,
                    uuid,
                    node_id: shape.0,
                    granularity_kb: 1 << shape.1,
                    peer_slots: shape.2,
                    channel_slots: shape.3,
                    al_extents: shape.4,
                    size_mb,
                    data_offset: (disk && in_place).then_some(0),
                    assume_clean: disk && first == 1,
                    has_data: disk && first == 2,
                    force: disk && force,
                    listen,
                    ana_listeners,
                })
            },
        )
}

fn request_strategy() -> impl Strategy<Value = VolumeRequest> {
    let node_id = || proptest::option::of(0u8..=7);
    let interval = || proptest::option::of(50u32..=120_000);
    prop_oneof![
        create_strategy(),
        name_strategy().prop_map(|name| VolumeRequest::Delete { name }),
        name_strategy().prop_map(|base_bdev| VolumeRequest::Wipe { base_bdev }),
        proptest::option::of(name_strategy()).prop_map(|name| VolumeRequest::GetVolumes { name }),
        (name_strategy(), name_strategy())
            .prop_map(|(name, base_bdev)| VolumeRequest::Attach { name, base_bdev }),
        name_strategy().prop_map(|name| VolumeRequest::Detach { name }),
        (
            name_strategy(),
            0u8..=7,
            address_strategy(),
            any::<[bool; 3]>()
        )
            .prop_map(|(name, node_id, address, [hdgst, ddgst, connect])| {
                VolumeRequest::AddPeer(AddPeer {
                    name,
                    node_id,
                    address,
                    hdgst,
                    ddgst,
                    connect,
                })
            }),
        (name_strategy(), 0u8..=7)
            .prop_map(|(name, node_id)| VolumeRequest::RemovePeer { name, node_id }),
        (name_strategy(), node_id(), any::<bool>()).prop_map(|(name, node_id, discard_my_data)| {
            VolumeRequest::Connect {
                name,
                node_id,
                discard_my_data,
            }
        }),
        (name_strategy(), node_id())
            .prop_map(|(name, node_id)| VolumeRequest::Disconnect { name, node_id }),
        (name_strategy(), any::<bool>())
            .prop_map(|(name, force)| VolumeRequest::Promote { name, force }),
        name_strategy().prop_map(|name| VolumeRequest::Demote { name }),
        name_strategy().prop_map(|name| VolumeRequest::Invalidate { name }),
        name_strategy().prop_map(|name| VolumeRequest::PauseResync { name }),
        name_strategy().prop_map(|name| VolumeRequest::ResumeResync { name }),
        (
            name_strategy(),
            interval(),
            interval(),
            interval(),
            proptest::option::of(any::<u32>()),
            proptest::option::of(listeners_strategy())
        )
            .prop_map(
                |(
                    name,
                    ping_interval_ms,
                    ping_timeout_ms,
                    connect_interval_ms,
                    resync_rate_mb,
                    ana_listeners,
                )| {
                    VolumeRequest::SetOptions(SetOptions {
                        name,
                        ping_interval_ms,
                        ping_timeout_ms,
                        connect_interval_ms,
                        resync_rate_mb,
                        ana_listeners,
                    })
                }
            ),
    ]
}

proptest! {
    #[test]
    fn what_a_configuration_writes_is_what_parsing_it_gives(request in request_strategy()) {
        let (method, params) = request.to_call();
        prop_assert_eq!(VolumeRequest::parse(method, Some(params)).unwrap(), request);
    }
}
