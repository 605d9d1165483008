//! A saved configuration: the calls that make a volume again, out of how it was made and what its manager says.
//! Called by a host for each of its volumes when a configuration is asked for. Must not know any host.

use crate::engine::manager::{Manager, Options, PeerReport};
use crate::host::Host;
use crate::rpc::volume::{
    AddPeer, Address, CreateVolume, PeerTransport, SetOptions, VolumeRequest,
};

/// The calls that make one volume again, in order. The host tells how each node that it was given is reached.
pub fn calls<H: Host>(
    create: &CreateVolume,
    manager: &Manager<H>,
    cx: &H,
    transport: impl Fn(u8) -> PeerTransport,
) -> Vec<VolumeRequest> {
    let peers = manager.report(cx).peers;
    calls_of(create, manager.options(), &peers, transport)
}

fn calls_of(
    create: &CreateVolume,
    options: Options,
    peers: &[PeerReport],
    transport: impl Fn(u8) -> PeerTransport,
) -> Vec<VolumeRequest> {
    let mut calls = vec![VolumeRequest::Create(CreateVolume {
        // Only for the first time: a configuration that is loaded must not overwrite what came between.
        force: false,
        ..create.clone()
    })];
    calls.extend(changed_options(&create.name, options));
    for peer in peers {
        let Some(address) = &peer.address else {
            continue;
        };
        let Ok(traddr) = address.traddr.parse() else {
            continue;
        };
        calls.push(VolumeRequest::AddPeer(AddPeer {
            name: create.name.clone(),
            node_id: peer.node_id,
            address: Address {
                traddr,
                trsvcid: address.trsvcid,
            },
            hdgst: address.header_digest,
            ddgst: address.data_digest,
            transport: transport(peer.node_id),
            connect: peer.wanted,
        }));
    }
    calls
}

/// The call that sets options which are not as they come.
pub fn changed_options(name: &str, options: Options) -> Option<VolumeRequest> {
    (options != Options::default()).then(|| {
        VolumeRequest::SetOptions(SetOptions {
            name: name.to_owned(),
            ping_interval_ms: Some(options.ping_interval_ms as u32),
            ping_timeout_ms: Some(options.ping_timeout_ms as u32),
            connect_interval_ms: Some(options.connect_interval_ms as u32),
            resync_rate_mb: Some((options.resync_rate_bytes >> 20) as u32),
            // The call that makes the volume has them.
            ana_listeners: None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::manager::Order;
    use crate::engine::peer::state::{ConnState, DiskState, Role};
    use crate::host::PeerAddress;
    use crate::hosts::control::order::{Asked, ask, options};
    use crate::rpc::volume::{AnaListener, Listen, Register, Transport};

    fn create() -> CreateVolume {
        CreateVolume {
            name: "v".into(),
            base_bdev: Some("b".into()),
            uuid: Some(uuid::Uuid::from_u128(7)),
            node_id: 1,
            granularity_kb: 64,
            peer_slots: 2,
            channel_slots: 4,
            al_extents: 99,
            size_mb: Some(512),
            data_offset: None,
            assume_clean: true,
            has_data: false,
            force: true,
            listen: Some(Listen::open(Address {
                traddr: "10.0.0.1".parse().unwrap(),
                trsvcid: 4420,
            })),
            ana_listeners: vec![AnaListener {
                nqn: "nqn.2025-01.io.bdev-repl:v".into(),
                transport: Transport::Tcp,
                address: Address {
                    traddr: "fd00::1".parse().unwrap(),
                    trsvcid: 4420,
                },
                anagrpid: Some(3),
            }],
            register: Register::OnPromote,
        }
    }

    fn peer(node_id: u8, address: Option<PeerAddress>) -> PeerReport {
        PeerReport {
            slot: usize::from(node_id),
            node_id,
            address,
            wanted: node_id == 2,
            conn: ConnState::StandAlone,
            role: Role::Unknown,
            disk: DiskState::DUnknown,
            bitmap_generation: 0,
            out_of_sync_bytes: 0,
            resync: None,
            last_error: None,
        }
    }

    fn address(traddr: &str, header_digest: bool) -> PeerAddress {
        PeerAddress {
            traddr: traddr.into(),
            trsvcid: 4421,
            header_digest,
            data_digest: !header_digest,
        }
    }

    #[test]
    fn the_calls_of_a_configuration_ask_for_the_same_volume_options_and_peers() {
        let changed = Options {
            ping_interval_ms: 60,
            ping_timeout_ms: 70,
            connect_interval_ms: 80,
            resync_rate_bytes: 90 << 20,
        };
        let peers = [
            peer(2, Some(address("fd00::2", true))),
            peer(3, Some(address("10.0.0.3", false))),
        ];
        let transport = |node_id: u8| PeerTransport {
            reconnect_delay_sec: Some(node_id.into()),
            ..PeerTransport::default()
        };
        let calls = calls_of(&create(), changed, &peers, transport);
        let mut asked = calls.into_iter().map(|request| {
            let (method, params) = request.to_call();
            let parsed = VolumeRequest::parse(method, Some(params)).unwrap();
            assert_eq!(parsed, request);
            ask(parsed)
        });
        let Some(Asked::Create(again)) = asked.next() else {
            panic!("the volume comes first");
        };
        assert_eq!(
            again,
            CreateVolume {
                force: false,
                ..create()
            }
        );
        let Some(Asked::SetOptions(wanted)) = asked.next() else {
            panic!("the options come before the peers");
        };
        assert_eq!(wanted.name, "v");
        assert_eq!(options(&wanted, Options::default()), changed);
        for known in &peers {
            let Some(Asked::AddPeer(name, order, reached)) = asked.next() else {
                panic!("peer {} is missing", known.node_id);
            };
            let Order::AddPeer {
                node_id,
                address,
                connect,
            } = order
            else {
                panic!("{order:?}");
            };
            assert_eq!(
                (name.as_str(), node_id, Some(address), connect),
                ("v", known.node_id, known.address.clone(), known.wanted)
            );
            assert_eq!(reached, transport(known.node_id));
        }
        assert!(asked.next().is_none());
    }

    #[test]
    fn what_is_as_it_comes_is_not_written() {
        let transport = |_| PeerTransport::default();
        let calls = calls_of(&create(), Options::default(), &[peer(2, None)], transport);
        assert_eq!(
            calls.len(),
            1,
            "no options, and no peer that the operator has not named: {calls:?}"
        );
    }
}
