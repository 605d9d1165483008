//! Volumes on core 0 as the operator meets them: requests become orders to the manager, and its outcomes answers.
//! Devices are opened in `opening`; volumes come and go in `lifecycle`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::bdev::BdevId;
use super::super::core::Core;
use super::super::registry::BdevError;
use super::lifecycle::{delete, publish};
use super::opening::{Purpose, attach, create as create_volume, open_device};
use super::{CoreVolume, ana, with};
use crate::engine::manager::Order;
use crate::engine::message::{OrderId, OrderOutcome};
use crate::engine::volume::VolumeGeometry;
use crate::hosts::control::awaited::Turn;
use crate::hosts::control::order::{self, Asked};
use crate::hosts::control::report::{self, Facts};
use crate::hosts::control::{config as saved, refusal};
use crate::rpc::volume::{
    CreateVolume, PeerTransport, SetOptions, VolumeReport, VolumeRequest, no_volume,
};
use crate::rpc::{Reply, RpcError};

/// Until a request for a volume that is being made is tried again.
const LATER_MS: u64 = 10;

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
    /// The order to demote is on its way.
    pub(super) is_demoting: bool,
    pub(super) ana: ana::Listeners,
}

impl Control {
    fn facts(&self) -> Facts<'_> {
        Facts {
            base_bdev: self.base.as_ref().map(|(_, name)| name.as_str()),
            listen: self.listen,
            geometry: self.geometry,
            cores: self.cores,
            active_extents: self
                .active_extents
                .iter()
                .map(|used| used.load(Ordering::Relaxed))
                .sum(),
        }
    }
}

/// What is to be done when a volume has ended.
pub(super) type Ended = Box<dyn FnOnce(&mut Core, Result<(), RpcError>)>;

/// What an order's outcome is for.
pub(super) enum Pending {
    Reply(Reply),
    /// Hosts are told that this node serves.
    Promote(Reply),
    /// Hosts have been sent away.
    Demote(Reply),
    /// The first attach of a new volume.
    Create(Reply),
    Delete(Ended),
}

impl Pending {
    /// The manager was not given the order.
    pub(super) fn refuse(self, error: RpcError) {
        match self {
            Pending::Reply(reply)
            | Pending::Promote(reply)
            | Pending::Demote(reply)
            | Pending::Create(reply) => reply.fail(error),
            // Nothing else ends a volume.
            Pending::Delete(_) => {}
        }
    }
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
        Some(control) if control.deleting => Err(refusal::being_deleted(name)),
        Some(control) => Ok(control),
        None => Err(no_volume(name)),
    }
}

/// Carries out a call of a volume method, on core 0.
pub fn request(core: &mut Core, request: VolumeRequest, reply: Reply) {
    let request = match core.volumes.awaited.volumes.request(request) {
        Turn::Other(request) => request,
        Turn::Answered(answer) => return reply.answer(answer),
        Turn::Later(request) => {
            core.after(LATER_MS, move |core| self::request(core, request, reply));
            return;
        }
    };
    let (name, order) = match order::ask(request) {
        Asked::Order(name, order) => (name, order),
        Asked::AddPeer(name, order, transport) => match transport.refuse_on_embedded() {
            Ok(()) => (name, order),
            Err(error) => return reply.fail(error),
        },
        Asked::Create(create) => return create_volume(core, create, reply),
        Asked::Delete { name } => return delete(core, &name, reply),
        Asked::Wipe { base_bdev } => return open_device(core, base_bdev, Purpose::Wipe, reply),
        Asked::GetVolumes { name } => return reply.answer(get_volumes(core, name.as_deref())),
        Asked::Attach { name, base_bdev } => return attach(core, &name, base_bdev, reply),
        Asked::SetOptions(options) => return reply.answer(set_options(core, &options)),
    };
    let control = match control_of(core, &name) {
        Ok(control) => control,
        Err(error) => return reply.fail(error),
    };
    let volume = control.volume;
    let pending = match order {
        Order::Promote { .. } | Order::Demote if control.is_demoting => {
            return reply.fail(refusal::being_demoted(&name));
        }
        Order::Promote { .. } => Pending::Promote(reply),
        Order::Demote => {
            // Hosts go to the next Primary before this one stops serving.
            control.is_demoting = true;
            ana::tell(core, volume);
            Pending::Demote(reply)
        }
        _ => Pending::Reply(reply),
    };
    give_order(core, volume, order, pending);
}

pub(super) fn next_order(core: &mut Core) -> OrderId {
    core.volumes.next_order += 1;
    core.volumes.next_order
}

pub(super) fn give_order(core: &mut Core, volume: u32, order: Order, pending: Pending) {
    let has_manager = core
        .volumes
        .get_mut(volume)
        .is_some_and(|this| this.manager.is_some());
    let mut controls = core.volumes.controls.iter();
    if !has_manager && controls.any(|control| control.volume == volume) {
        core.after(LATER_MS, move |core| {
            give_order(core, volume, order, pending)
        });
        return;
    }
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
    if let Pending::Demote(_) = pending {
        control.is_demoting = false;
    }
    if let Pending::Promote(_) | Pending::Demote(_) = pending {
        ana::tell(core, volume);
    }
    let outcome = outcome.map_err(order::order_error);
    match pending {
        Pending::Reply(reply) | Pending::Promote(reply) | Pending::Demote(reply) => {
            reply.answer(outcome.map(|()| json!(true)))
        }
        Pending::Create(reply) => publish(core, volume, reply),
        Pending::Delete(then) => then(core, outcome),
    }
}

fn get_volumes(core: &mut Core, name: Option<&str>) -> Result<Value, RpcError> {
    let mut reports: Vec<VolumeReport> = Vec::new();
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
        reports.push(report::volume(control.facts(), manager, &this.context));
    }
    let awaited = core.volumes.awaited.volumes.reports(name);
    // While it is being made, a volume may be there already.
    let is_shown = |own: &VolumeReport| reports.iter().any(|report| report.name == own.name);
    let awaited: Vec<_> = awaited.filter(|own| !is_shown(own)).collect();
    reports.extend(awaited);
    report::answer(&reports, name)
}

fn set_options(core: &mut Core, wanted: &SetOptions) -> Result<Value, RpcError> {
    let control = control_of(core, &wanted.name)?;
    let volume = control.volume;
    if let Some(listeners) = &wanted.ana_listeners {
        control.create.ana_listeners.clone_from(listeners);
        control.ana = ana::Listeners::default();
    }
    let Some(CoreVolume {
        manager: Some(manager),
        ..
    }) = core.volumes.get_mut(volume)
    else {
        return Err(refusal::being_made());
    };
    manager.set_options(order::options(wanted, manager.options()));
    Ok(json!(true))
}

/// The calls that make the volumes of this node again.
pub fn config(core: &Core) -> Vec<VolumeRequest> {
    let mut calls = Vec::new();
    let awaited = &core.volumes.awaited.volumes;
    // What is being made is saved with those that wait until it has all that it was asked for.
    let made = core.volumes.controls.iter();
    for control in made.filter(|control| !awaited.has(&control.create.name)) {
        let this = core
            .volumes
            .volumes
            .get(control.volume as usize)
            .and_then(Option::as_ref);
        let Some((manager, this)) = this.and_then(|this| Some((this.manager.as_ref()?, this)))
        else {
            continue;
        };
        calls.extend(saved::calls(
            &control.create,
            manager,
            &this.context,
            |_| PeerTransport::default(),
        ));
    }
    calls.extend(awaited.calls());
    calls
}
