//! Volumes on core 0 as the operator meets them: requests become orders to the manager, and its outcomes answers.
//! Devices are opened in `opening`; volumes come and go in `lifecycle`.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::bdev::BdevId;
use super::super::core::Core;
use super::super::registry::BdevError;
use super::lifecycle::{delete, publish};
use super::opening::{Purpose, attach, create as create_volume, open_device};
use super::{CoreVolume, report, with};
use crate::engine::manager::{Options, Order};
use crate::engine::message::{OrderErrorKind, OrderId, OrderOutcome};
use crate::engine::volume::VolumeGeometry;
use crate::host::PeerAddress;
use crate::rpc::volume::{AddPeer, Address, CreateVolume, SetOptions, VolumeRequest, no_volume};
use crate::rpc::{Reply, RpcError};

/// A volume as core 0 knows it.
pub(super) struct Control {
    pub(super) volume: u32,
    pub(super) uuid: Uuid,
    /// How it was asked for, for a saved configuration.
    pub(super) create: CreateVolume,
    /// The backing bdev while it is claimed.
    pub(super) base: Option<(BdevId, String)>,
    pub(super) listen: Option<std::net::SocketAddr>,
    pub(super) geometry: VolumeGeometry,
    pub(super) cores: usize,
    pub(super) active_extents: Arc<Vec<AtomicU32>>,
    pub(super) orders: Vec<(OrderId, Pending)>,
    pub(super) deleting: bool,
}

/// What is to be done when a volume has ended.
pub(super) type Ended = Box<dyn FnOnce(&mut Core, Result<(), RpcError>)>;

/// What an order's outcome is for.
pub(super) enum Pending {
    Reply(Reply),
    /// The first attach of a new volume.
    Create(Reply),
    Delete(Ended),
}

pub(super) fn bdev_error(error: BdevError) -> RpcError {
    RpcError::new(error.code, error.message)
}

pub(super) fn control_of<'a>(core: &'a mut Core, name: &str) -> Result<&'a mut Control, RpcError> {
    let found = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.create.name == name);
    match found {
        Some(control) if control.deleting => {
            Err(RpcError::busy(format!("volume '{name}' is being deleted")))
        }
        Some(control) => Ok(control),
        None => Err(no_volume(name)),
    }
}

/// Carries out a call of a volume method, on core 0.
pub fn request(core: &mut Core, request: VolumeRequest, reply: Reply) {
    let (name, order) = match request {
        VolumeRequest::Create(create) => return create_volume(core, create, reply),
        VolumeRequest::Delete { name } => return delete(core, &name, reply),
        VolumeRequest::Wipe { base_bdev } => {
            return open_device(core, base_bdev, Purpose::Wipe, reply);
        }
        VolumeRequest::GetVolumes { name } => {
            return reply.answer(get_volumes(core, name.as_deref()));
        }
        VolumeRequest::Attach { name, base_bdev } => return attach(core, &name, base_bdev, reply),
        VolumeRequest::SetOptions(options) => return reply.answer(set_options(core, &options)),
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
            (peer.name, order)
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
    match control_of(core, &name) {
        Ok(control) => {
            let volume = control.volume;
            give_order(core, volume, order, Pending::Reply(reply));
        }
        Err(error) => reply.fail(error),
    }
}

pub(super) fn next_order(core: &mut Core) -> OrderId {
    core.volumes.next_order += 1;
    core.volumes.next_order
}

pub(super) fn give_order(core: &mut Core, volume: u32, order: Order, pending: Pending) {
    let id = next_order(core);
    if let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    {
        control.orders.push((id, pending));
    }
    with(core, volume, |this| {
        if let Some(manager) = &mut this.manager {
            this.manager_stirred = true;
            manager.order(&mut this.context, id, order);
        }
    });
}

/// The manager has ended an order.
pub(super) fn ordered(core: &mut Core, volume: u32, id: OrderId, outcome: OrderOutcome) {
    let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let Some(position) = control.orders.iter().position(|(other, _)| *other == id) else {
        return;
    };
    let (_, pending) = control.orders.swap_remove(position);
    let outcome = outcome.map_err(|error| match error.kind {
        OrderErrorKind::Busy => RpcError::busy(error.text),
        OrderErrorKind::Exists => RpcError::exists(error.text),
        OrderErrorKind::NotFound => RpcError::no_device(error.text),
        OrderErrorKind::Invalid => RpcError::invalid(error.text),
        OrderErrorKind::Io => RpcError::io(error.text),
    });
    match pending {
        Pending::Reply(reply) => reply.answer(outcome.map(|()| json!(true))),
        Pending::Create(reply) => publish(core, volume, reply),
        Pending::Delete(then) => then(core, outcome),
    }
}

fn get_volumes(core: &mut Core, name: Option<&str>) -> Result<Value, RpcError> {
    let mut reports = Vec::new();
    for control in &core.volumes.controls {
        if name.is_some_and(|name| name != control.create.name) {
            continue;
        }
        let this = core
            .volumes
            .volumes
            .get(control.volume as usize)
            .and_then(Option::as_ref);
        let Some((manager, this)) = this.and_then(|this| Some((this.manager.as_ref()?, this)))
        else {
            continue;
        };
        reports.push(report::volume(control, manager, &this.context));
    }
    match name {
        Some(name) if reports.is_empty() => Err(no_volume(name)),
        _ => serde_json::to_value(reports).map_err(|error| RpcError::io(error.to_string())),
    }
}

fn set_options(core: &mut Core, wanted: &SetOptions) -> Result<Value, RpcError> {
    let volume = control_of(core, &wanted.name)?.volume;
    let Some(CoreVolume {
        manager: Some(manager),
        ..
    }) = core.volumes.get_mut(volume)
    else {
        return Err(RpcError::busy("the volume is being made"));
    };
    let old = manager.options();
    let milliseconds = |new: Option<u32>, old: u64| new.map_or(old, u64::from);
    manager.set_options(Options {
        ping_interval_ms: milliseconds(wanted.ping_interval_ms, old.ping_interval_ms),
        ping_timeout_ms: milliseconds(wanted.ping_timeout_ms, old.ping_timeout_ms),
        connect_interval_ms: milliseconds(wanted.connect_interval_ms, old.connect_interval_ms),
        resync_rate_bytes: wanted
            .resync_rate_mb
            .map_or(old.resync_rate_bytes, |rate| u64::from(rate) << 20),
    });
    Ok(json!(true))
}

/// The calls that make the volumes of this node again.
pub fn config(core: &Core) -> Vec<VolumeRequest> {
    let mut calls = Vec::new();
    for control in &core.volumes.controls {
        let this = core
            .volumes
            .volumes
            .get(control.volume as usize)
            .and_then(Option::as_ref);
        let Some((manager, this)) = this.and_then(|this| Some((this.manager.as_ref()?, this)))
        else {
            continue;
        };
        let name = control.create.name.clone();
        calls.push(VolumeRequest::Create(CreateVolume {
            // Only for the first time: a configuration that is loaded must not overwrite what came between.
            force: false,
            ..control.create.clone()
        }));
        let options = manager.options();
        if options != Options::default() {
            calls.push(VolumeRequest::SetOptions(SetOptions {
                name: name.clone(),
                ping_interval_ms: Some(options.ping_interval_ms as u32),
                ping_timeout_ms: Some(options.ping_timeout_ms as u32),
                connect_interval_ms: Some(options.connect_interval_ms as u32),
                resync_rate_mb: Some((options.resync_rate_bytes >> 20) as u32),
            }));
        }
        for peer in manager.report(&this.context).peers {
            let Some(address) = peer.address else {
                continue;
            };
            let Ok(traddr) = address.traddr.parse() else {
                continue;
            };
            calls.push(VolumeRequest::AddPeer(AddPeer {
                name: name.clone(),
                node_id: peer.node_id,
                address: Address {
                    traddr,
                    trsvcid: address.trsvcid,
                },
                hdgst: address.header_digest,
                ddgst: address.data_digest,
                connect: peer.wanted,
            }));
        }
    }
    calls
}
