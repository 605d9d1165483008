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
    assert_eq!(create.register, Register::Always);
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
        json!({"name": "v", "node_id": 1, "register": true}),
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
        ("register", json!("on_demand")),
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

fn peer(more: Value) -> Result<PeerTransport, RpcError> {
    let mut params = json!({"name": "v", "node_id": 2, "traddr": "10.0.0.2", "trsvcid": "4430"});
    let more = more.as_object().unwrap().clone();
    params.as_object_mut().unwrap().extend(more);
    match parse("bdev_repl_add_peer", params)? {
        VolumeRequest::AddPeer(peer) => Ok(peer.transport),
        other => panic!("{other:?}"),
    }
}

fn listen(more: Value) -> Result<Option<Listen>, RpcError> {
    let mut params = json!({
        "name": "v", "node_id": 1, "base_bdev": "b",
        "listen_address": {"traddr": "10.0.0.1", "trsvcid": "4430"},
    });
    let more = more.as_object().unwrap().clone();
    params.as_object_mut().unwrap().extend(more);
    match parse("bdev_repl_create", params)? {
        VolumeRequest::Create(create) => Ok(create.listen),
        other => panic!("{other:?}"),
    }
}

fn patience(more: Value) -> (i32, u32, u32) {
    let patience = peer(more).unwrap().patience();
    (
        patience.ctrlr_loss_timeout_sec,
        patience.reconnect_delay_sec,
        patience.fast_io_fail_timeout_sec,
    )
}

#[test]
fn a_lost_path_ends_the_link_unless_there_are_others_or_the_operator_is_patient() {
    assert_eq!(patience(json!({})), (0, 0, 0));
    let other = json!([{"traddr": "10.1.0.2", "trsvcid": 4430}]);
    assert_eq!(patience(json!({"alternate_addresses": other})), (-1, 1, 1));
    assert_eq!(patience(json!({"reconnect_delay_sec": 3})), (-1, 3, 3));
    assert_eq!(
        patience(json!({"ctrlr_loss_timeout_sec": 9, "fast_io_fail_timeout_sec": 0})),
        (9, 1, 0)
    );
    assert_eq!(
        patience(json!({"ctrlr_loss_timeout_sec": 0, "alternate_addresses": other})),
        (0, 0, 0)
    );
}

#[test]
fn what_bdev_nvme_would_refuse_is_refused_with_a_reason() {
    let other = json!([{"traddr": "10.1.0.2", "trsvcid": 4430}]);
    for (more, part) in [
        (
            json!({"multipath": "yes"}),
            "none of disable, failover, multipath",
        ),
        (
            json!({"multipath": "disable", "alternate_addresses": other}),
            "excludes",
        ),
        (
            json!({"alternate_addresses": vec![other[0].clone(); 8]}),
            "at most 7",
        ),
        (json!({"psk": ""}), "keyring_get_keys"),
        (json!({"dhchap_ctrlr_key": "k"}), "needs a dhchap_key"),
        (
            json!({"ctrlr_loss_timeout_sec": 0, "reconnect_delay_sec": 1}),
            "no second attempt",
        ),
        (
            json!({"ctrlr_loss_timeout_sec": 5, "reconnect_delay_sec": 0}),
            "at least 1",
        ),
        (
            json!({"ctrlr_loss_timeout_sec": 5, "reconnect_delay_sec": 6}),
            "not be longer",
        ),
        (
            json!({"reconnect_delay_sec": 2, "fast_io_fail_timeout_sec": 1}),
            "from reconnect_delay_sec",
        ),
        (
            json!({"ctrlr_loss_timeout_sec": 5, "fast_io_fail_timeout_sec": 6}),
            "to ctrlr_loss_timeout_sec",
        ),
    ] {
        let error = peer(more.clone()).unwrap_err();
        assert_eq!(error.code, -22, "{more}: {error}");
        assert!(error.message.contains(part), "{more}: {error}");
    }
    for more in [
        json!({"ctrlr_loss_timeout_sec": -2}),
        json!({"reconnect_delay_sec": -1}),
        json!({"fast_io_fail_timeout_sec": "1"}),
        json!({"psk": 1}),
        json!({"alternate_addresses": "10.1.0.2"}),
        json!({"alternate_addresses": [{"traddr": "10.1.0.2"}]}),
        json!({"alternate_addresses": [{"traddr": "10.1.0.2", "trsvcid": 1, "hdgst": true}]}),
    ] {
        assert_eq!(peer(more.clone()).unwrap_err().code, -32603, "{more}");
    }
}

#[test]
fn a_secure_endpoint_names_who_may_connect_and_each_has_a_key() {
    let hosts = json!([{"node_id": 2, "psk": "k", "dhchap_key": "d", "dhchap_ctrlr_key": "c"}]);
    let secure = listen(json!({"secure_channel": true, "allowed_hosts": hosts})).unwrap();
    let secure = secure.unwrap();
    assert!(secure.secure_channel);
    let keys = &secure.allowed_hosts[0].keys;
    let names = [&keys.psk, &keys.dhchap_key, &keys.dhchap_ctrlr_key];
    assert_eq!(
        names.map(|name| name.as_deref().unwrap_or_default()),
        ["k", "d", "c"]
    );
    for (more, part) in [
        (json!({"secure_channel": true}), "needs allowed_hosts"),
        (json!({"allowed_hosts": []}), "no peer could connect"),
        (
            json!({"allowed_hosts": [{"node_id": 1}]}),
            "this node itself",
        ),
        (
            json!({"allowed_hosts": [{"node_id": 2}, {"node_id": 2}]}),
            "twice",
        ),
        (
            json!({"allowed_hosts": [{"node_id": 2, "psk": "k"}]}),
            "together or not at all",
        ),
        (
            json!({"secure_channel": true, "allowed_hosts": [{"node_id": 2, "dhchap_key": "k"}]}),
            "together or not at all",
        ),
        (
            json!({"listen_address": null, "allowed_hosts": [{"node_id": 2}]}),
            "nvmf_subsystem_add_host",
        ),
        (
            json!({"listen_address": null, "secure_channel": true}),
            "add_listener",
        ),
    ] {
        let error = listen(more.clone()).unwrap_err();
        assert_eq!(error.code, -22, "{more}: {error}");
        assert!(error.message.contains(part), "{more}: {error}");
    }
    for more in [
        json!({"allowed_hosts": [{"psk": "k"}]}),
        json!({"allowed_hosts": [{"node_id": 8}]}),
        json!({"allowed_hosts": [{"node_id": 2, "key": "k"}]}),
        json!({"secure_channel": 1}),
    ] {
        assert_eq!(listen(more.clone()).unwrap_err().code, -32603, "{more}");
    }
    let error = listen(json!({"allowed_hosts": [{"node_id": 2}, {"psk": "k"}]})).unwrap_err();
    assert!(
        error.message.contains("'allowed_hosts[1].node_id'"),
        "{error}"
    );
}

#[test]
fn the_embedded_host_says_what_of_it_needs_spdk() {
    let other = json!([{"traddr": "10.1.0.2", "trsvcid": 4430}]);
    for (more, part) in [
        (json!({"psk": "k"}), "TLS (psk)"),
        (json!({"dhchap_key": "k"}), "DH-HMAC-CHAP"),
        (json!({"alternate_addresses": other}), "multipath"),
        (json!({"multipath": "failover"}), "multipath"),
        (json!({"reconnect_delay_sec": 1}), "reconnect_delay_sec"),
    ] {
        let error = peer(more.clone())
            .unwrap()
            .refuse_on_embedded()
            .unwrap_err();
        assert_eq!(error.code, -95, "{more}: {error}");
        assert!(error.message.contains(part), "{more}: {error}");
        assert!(error.message.contains("in SPDK"), "{more}: {error}");
    }
    for more in [
        json!({}),
        json!({"multipath": "disable", "ctrlr_loss_timeout_sec": 0}),
    ] {
        peer(more).unwrap().refuse_on_embedded().unwrap();
    }
    for (more, part) in [
        (
            json!({"secure_channel": true, "allowed_hosts": [{"node_id": 2, "psk": "k"}]}),
            "TLS (secure_channel)",
        ),
        (
            json!({"allowed_hosts": [{"node_id": 2, "dhchap_key": "k"}]}),
            "DH-HMAC-CHAP",
        ),
        (json!({"allowed_hosts": [{"node_id": 2}]}), "every host"),
    ] {
        let error = listen(more.clone()).unwrap().unwrap();
        let error = error.refuse_on_embedded().unwrap_err();
        assert_eq!(error.code, -95, "{more}: {error}");
        assert!(error.message.contains(part), "{more}: {error}");
    }
    listen(json!({}))
        .unwrap()
        .unwrap()
        .refuse_on_embedded()
        .unwrap();
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

fn keys_strategy() -> impl Strategy<Value = Keys> {
    let key = || proptest::option::of("[a-z0-9]{1,9}");
    (key(), key(), key()).prop_map(|(psk, dhchap_key, dhchap_ctrlr_key)| Keys {
        psk,
        dhchap_ctrlr_key: dhchap_ctrlr_key.filter(|_| dhchap_key.is_some()),
        dhchap_key,
    })
}

fn listen_strategy() -> impl Strategy<Value = Listen> {
    let hosts = proptest::collection::btree_map(0u8..=7, keys_strategy(), 0..4);
    (address_strategy(), any::<bool>(), hosts).prop_map(|(address, secure_channel, hosts)| Listen {
        address,
        secure_channel: secure_channel && !hosts.is_empty(),
        allowed_hosts: hosts
            .into_iter()
            .map(|(node_id, mut keys)| {
                keys.psk = secure_channel.then(|| keys.psk.unwrap_or_else(|| "k".to_owned()));
                AllowedHost { node_id, keys }
            })
            .collect(),
    })
}

fn transport_strategy() -> impl Strategy<Value = PeerTransport> {
    let patience = proptest::option::of((1u32..9, 0u32..9, proptest::option::of(0i32..9)))
        .prop_map(|some| match some {
            None => (None, None, None),
            Some((delay, more, loss)) => {
                let fast = delay + more;
                let loss = loss.map(|more| fast as i32 + more);
                (loss, Some(delay), Some(fast))
            }
        });
    let mode = prop_oneof![
        Just(None),
        Just(Some(Multipath::Disable)),
        Just(Some(Multipath::Failover)),
        Just(Some(Multipath::Multipath)),
    ];
    let others = proptest::collection::vec(address_strategy(), 0..3);
    (others, mode, keys_strategy(), patience).prop_map(|(others, multipath, keys, patience)| {
        PeerTransport {
            multipath: multipath.filter(|mode| others.is_empty() || *mode != Multipath::Disable),
            alternate_addresses: others,
            keys,
            ctrlr_loss_timeout_sec: patience.0,
            reconnect_delay_sec: patience.1,
            fast_io_fail_timeout_sec: patience.2,
        }
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
            proptest::option::of(listen_strategy()),
            listeners_strategy(),
            any::<bool>(),
        ),
    )
        .prop_map(
            |(
                name,
                shape,
                (base_bdev, size_mb),
                (in_place, first, force),
                uuid,
                (listen, ana_listeners, on_promote),
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
                    listen: listen.map(|mut listen: Listen| {
                        listen.allowed_hosts.retain(|host| host.node_id != shape.0);
                        listen.secure_channel &= !listen.allowed_hosts.is_empty();
                        listen
                    }),
                    ana_listeners,
                    register: if on_promote {
                        Register::OnPromote
                    } else {
                        Register::Always
                    },
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
            any::<[bool; 3]>(),
            transport_strategy(),
        )
            .prop_map(
                |(name, node_id, address, [hdgst, ddgst, connect], transport)| {
                    VolumeRequest::AddPeer(AddPeer {
                        name,
                        node_id,
                        address,
                        hdgst,
                        ddgst,
                        transport,
                        connect,
                    })
                }
            ),
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
