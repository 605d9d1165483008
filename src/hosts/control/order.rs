//! A volume request as what a host does with it: most are orders to the manager, which look the same on every host.
//! Called with each request, and with the outcome of each order. Must not know who the manager's host is.

use crate::engine::manager::{Options, Order};
use crate::engine::message::{OrderError, OrderErrorKind};
use crate::host::PeerAddress;
use crate::rpc::RpcError;
use crate::rpc::volume::{CreateVolume, PeerTransport, SetOptions, VolumeRequest};

/// What a request asks a host to do.
#[derive(Clone, Debug)]
pub enum Asked {
    /// Hand the order to the manager of the volume of this name; its outcome is the answer.
    Order(String, Order),
    /// The same, and remember how the peer is reached, of which the manager knows only the address.
    AddPeer(String, Order, PeerTransport),
    /// Make a volume, or bring back the one that the device carries.
    Create(CreateVolume),
    /// End a volume, with an order to close that the host follows up.
    Delete { name: String },
    /// Overwrite the superblocks on a bdev.
    Wipe { base_bdev: String },
    /// Report all volumes, or the one named.
    GetVolumes { name: Option<String> },
    /// Open a backing bdev for a diskless volume.
    Attach { name: String, base_bdev: String },
    /// Change what the manager goes by.
    SetOptions(SetOptions),
}

/// Sorts a request by what a host has to do.
pub fn ask(request: VolumeRequest) -> Asked {
    let (name, order) = match request {
        VolumeRequest::Create(create) => return Asked::Create(create),
        VolumeRequest::Delete { name } => return Asked::Delete { name },
        VolumeRequest::Wipe { base_bdev } => return Asked::Wipe { base_bdev },
        VolumeRequest::GetVolumes { name } => return Asked::GetVolumes { name },
        VolumeRequest::Attach { name, base_bdev } => return Asked::Attach { name, base_bdev },
        VolumeRequest::SetOptions(options) => return Asked::SetOptions(options),
        VolumeRequest::Detach { name } => (name, Order::Detach),
        VolumeRequest::AddPeer(peer) => {
            let order = Order::AddPeer {
                node_id: peer.node_id,
                address: PeerAddress {
                    traddr: peer.address.traddr.to_string(),
                    trsvcid: peer.address.trsvcid,
                    header_digest: peer.hdgst,
                    data_digest: peer.ddgst,
                },
                connect: peer.connect,
            };
            return Asked::AddPeer(peer.name, order, peer.transport);
        }
        VolumeRequest::RemovePeer { name, node_id } => (name, Order::RemovePeer { node_id }),
        VolumeRequest::Connect {
            name,
            node_id,
            discard_my_data,
        } => (
            name,
            Order::Connect {
                node_id,
                discard_my_data,
            },
        ),
        VolumeRequest::Disconnect { name, node_id } => (name, Order::Disconnect { node_id }),
        VolumeRequest::Promote { name, force } => (name, Order::Promote { force }),
        VolumeRequest::Demote { name } => (name, Order::Demote),
        VolumeRequest::Invalidate { name } => (name, Order::Invalidate),
        VolumeRequest::PauseResync { name } => (name, Order::PauseResync),
        VolumeRequest::ResumeResync { name } => (name, Order::ResumeResync),
    };
    Asked::Order(name, order)
}

/// The answer for an order that was not carried out.
pub fn order_error(error: OrderError) -> RpcError {
    match error.kind {
        OrderErrorKind::Busy => RpcError::busy(error.text),
        OrderErrorKind::Exists => RpcError::exists(error.text),
        OrderErrorKind::NotFound => RpcError::no_device(error.text),
        OrderErrorKind::Invalid => RpcError::invalid(error.text),
        OrderErrorKind::Io => RpcError::io(error.text),
    }
}

/// The options that a request leads to: what it does not name stays as it is.
pub fn options(wanted: &SetOptions, old: Options) -> Options {
    let milliseconds = |new: Option<u32>, old: u64| new.map_or(old, u64::from);
    Options {
        ping_interval_ms: milliseconds(wanted.ping_interval_ms, old.ping_interval_ms),
        ping_timeout_ms: milliseconds(wanted.ping_timeout_ms, old.ping_timeout_ms),
        connect_interval_ms: milliseconds(wanted.connect_interval_ms, old.connect_interval_ms),
        resync_rate_bytes: wanted
            .resync_rate_mb
            .map_or(old.resync_rate_bytes, |rate| u64::from(rate) << 20),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The order of a call, with all that it carries, for the volume `v`.
    fn order_of(method: &str, mut params: Value) -> String {
        params["name"] = json!("v");
        match ask(VolumeRequest::parse(method, Some(params)).unwrap()) {
            Asked::Order(name, order) | Asked::AddPeer(name, order, _) if name == "v" => {
                format!("{order:?}")
            }
            other => panic!("{method}: {other:?}"),
        }
    }

    #[test]
    fn a_call_that_only_the_manager_answers_is_its_order() {
        let peer = json!({"node_id": 3, "traddr": "::1", "trsvcid": 4420, "ddgst": true, "connect": false});
        for (method, params, order) in [
            ("bdev_repl_detach", json!({}), "Detach"),
            (
                "bdev_repl_add_peer",
                peer,
                "AddPeer { node_id: 3, address: PeerAddress { traddr: \"::1\", trsvcid: 4420, \
                 header_digest: false, data_digest: true }, connect: false }",
            ),
            (
                "bdev_repl_remove_peer",
                json!({"node_id": 3}),
                "RemovePeer { node_id: 3 }",
            ),
            (
                "bdev_repl_connect",
                json!({"node_id": 3, "discard_my_data": true}),
                "Connect { node_id: Some(3), discard_my_data: true }",
            ),
            (
                "bdev_repl_disconnect",
                json!({}),
                "Disconnect { node_id: None }",
            ),
            (
                "bdev_repl_promote",
                json!({"force": true}),
                "Promote { force: true }",
            ),
            ("bdev_repl_demote", json!({}), "Demote"),
            ("bdev_repl_invalidate", json!({}), "Invalidate"),
            ("bdev_repl_pause_resync", json!({}), "PauseResync"),
            ("bdev_repl_resume_resync", json!({}), "ResumeResync"),
        ] {
            assert_eq!(order_of(method, params), order, "{method}");
        }
    }

    #[test]
    fn what_needs_the_host_stays_a_request() {
        let asked = |method, params| ask(VolumeRequest::parse(method, Some(params)).unwrap());
        let create = json!({"name": "v", "node_id": 1, "base_bdev": "b"});
        assert!(
            matches!(asked("bdev_repl_create", create), Asked::Create(create) if create.name == "v")
        );
        let named = || json!({"name": "v"});
        let peer = json!({
            "name": "v", "node_id": 3, "traddr": "::1", "trsvcid": 1, "psk": "k", "reconnect_delay_sec": 2,
        });
        let Asked::AddPeer(_, _, transport) = asked("bdev_repl_add_peer", peer) else {
            panic!()
        };
        assert_eq!(transport.keys.psk.as_deref(), Some("k"));
        assert_eq!(transport.reconnect_delay_sec, Some(2));
        assert!(
            matches!(asked("bdev_repl_delete", named()), Asked::Delete { name } if name == "v")
        );
        assert!(matches!(
            asked("bdev_repl_get_volumes", named()),
            Asked::GetVolumes { name: Some(name) } if name == "v"
        ));
        assert!(matches!(
            asked("bdev_repl_wipe", json!({"base_bdev": "b"})),
            Asked::Wipe { base_bdev } if base_bdev == "b"
        ));
        assert!(matches!(
            asked("bdev_repl_attach", json!({"name": "v", "base_bdev": "b"})),
            Asked::Attach { name, base_bdev } if name == "v" && base_bdev == "b"
        ));
        assert!(matches!(
            asked("bdev_repl_set_options", json!({"name": "v", "resync_rate_mb": 7})),
            Asked::SetOptions(options) if options.resync_rate_mb == Some(7)
        ));
    }

    #[test]
    fn the_reason_why_an_order_failed_decides_the_code() {
        for (kind, code) in [
            (OrderErrorKind::Busy, -16),
            (OrderErrorKind::Exists, -17),
            (OrderErrorKind::NotFound, -19),
            (OrderErrorKind::Invalid, -22),
            (OrderErrorKind::Io, -5),
        ] {
            let error = order_error(OrderError::new(kind, "why"));
            assert_eq!((error.code, error.message.as_str()), (code, "why"));
        }
    }

    #[test]
    fn an_option_that_is_not_named_stays() {
        let old = Options {
            ping_interval_ms: 1,
            ping_timeout_ms: 2,
            connect_interval_ms: 3,
            resync_rate_bytes: 4,
        };
        assert_eq!(options(&SetOptions::default(), old), old);
        let only = |wanted: SetOptions| options(&wanted, old);
        assert_eq!(
            only(SetOptions {
                ping_interval_ms: Some(50),
                ..SetOptions::default()
            }),
            Options {
                ping_interval_ms: 50,
                ..old
            }
        );
        assert_eq!(
            only(SetOptions {
                ping_timeout_ms: Some(60),
                ..SetOptions::default()
            }),
            Options {
                ping_timeout_ms: 60,
                ..old
            }
        );
        assert_eq!(
            only(SetOptions {
                connect_interval_ms: Some(70),
                ..SetOptions::default()
            }),
            Options {
                connect_interval_ms: 70,
                ..old
            }
        );
        assert_eq!(
            only(SetOptions {
                resync_rate_mb: Some(u32::MAX),
                ..SetOptions::default()
            }),
            Options {
                resync_rate_bytes: u64::from(u32::MAX) << 20,
                ..old
            }
        );
    }
}
