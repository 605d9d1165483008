//! Volumes on core 0 as the operator meets them: requests become orders to the manager, and its outcomes answers.
//! Devices are opened in `opening`; volumes come and go in `lifecycle`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use uuid::Uuid;

use super::awaited::Awaited;
use super::backing::Backing;
use super::bdev::Registered;
use super::core::{Job, State, all};
use super::endpoint::{self, Exporter};
use super::frozen::Frozen;
use super::link::Link;
use super::opening::Opening;
use super::volume::with_manager;
use super::{ana, lifecycle, opening, role};
use crate::engine::MAX_PEERS;
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

/// Node ids are 0 to 7.
const MAX_NODES: usize = MAX_PEERS + 1;

/// What only core 0 knows.
#[derive(Default)]
pub struct Node {
    pub controls: Vec<Control>,
    pub openings: Vec<Opening>,
    /// Tried again with each round of the poller.
    pub deferred: Vec<Job>,
    pub exporter: Exporter,
    pub awaited: Awaited,
    pub frozen: Frozen,
    /// When paths to peers are looked at next.
    pub next_path_ns: u64,
    next_order: OrderId,
    next_number: u32,
}

/// A volume as core 0 knows it.
pub struct Control {
    pub volume: u32,
    pub uuid: Uuid,
    /// How it was asked for, for a saved configuration.
    pub create: CreateVolume,
    /// The backing bdev while it is claimed.
    pub backing: Option<Backing>,
    pub listen: Option<SocketAddr>,
    pub geometry: VolumeGeometry,
    pub alignment: u8,
    pub active_extents: Arc<Vec<AtomicU32>>,
    pub orders: Vec<(OrderId, Pending)>,
    pub deleting: bool,
    /// Hosts are being sent away, or the order to demote is on its way.
    pub is_demoting: bool,
    /// Its bdev is going, and waits for its users.
    pub is_unregistering: bool,
    pub ana: ana::Listeners,
    /// Its bdevs are there.
    pub is_published: bool,
    /// It came back by itself: a configuration that makes it completes it.
    pub is_found: bool,
    pub bdev: Option<Registered>,
    pub endpoint: Option<Registered>,
    pub links: [Link; MAX_PEERS],
    /// How nodes are reached that a peer was made known with.
    pub transports: [PeerTransport; MAX_NODES],
}

/// What is to be done when a volume has ended.
pub type Ended = Box<dyn FnOnce(&mut State, Result<(), RpcError>)>;

/// What an order's outcome is for.
pub enum Pending {
    Reply(Reply),
    /// A peer was made known: how this node was reached before, if it is refused.
    AddPeer(Reply, u8, PeerTransport),
    Promote(Reply),
    Demote(Reply),
    /// The first attach of a new volume.
    Create(Reply),
    Detach(Reply),
    Delete(Ended),
}

impl Pending {
    /// The manager was not given the order.
    pub fn refuse(self, error: RpcError) {
        match self {
            Pending::Reply(reply)
            | Pending::AddPeer(reply, ..)
            | Pending::Promote(reply)
            | Pending::Demote(reply)
            | Pending::Create(reply)
            | Pending::Detach(reply) => reply.fail(error),
            // Nothing else ends a volume.
            Pending::Delete(_) => {}
        }
    }
}

impl Node {
    pub fn control(&mut self, volume: u32) -> Option<&mut Control> {
        self.controls
            .iter_mut()
            .find(|control| control.volume == volume)
    }

    pub fn named(&mut self, name: &str) -> Result<&mut Control, RpcError> {
        let found = self
            .controls
            .iter_mut()
            .find(|control| control.create.name == name);
        match found {
            Some(control) if control.deleting => Err(refusal::being_deleted(name)),
            Some(control) => Ok(control),
            None => Err(no_volume(name)),
        }
    }

    /// Whether of the volume's bdevs this one came first.
    pub fn is_first_bdev(&mut self, volume: u32, bdev: Registered) -> bool {
        self.control(volume)
            .and_then(|control| control.bdev.or(control.endpoint))
            == Some(bdev)
    }

    /// Counts orders, and what has no number of its own.
    pub fn next_order(&mut self) -> OrderId {
        self.next_order += 1;
        self.next_order
    }

    /// A number for a volume that none has: the lowest, since each core has a table.
    pub fn free_volume(&self) -> u32 {
        let taken = |volume| {
            self.controls.iter().any(|control| control.volume == volume)
                || self.openings.iter().any(|opening| opening.volume == volume)
        };
        (0..).find(|&volume| !taken(volume)).unwrap_or(u32::MAX)
    }

    pub fn next_number(&mut self) -> u32 {
        self.next_number = self.next_number.wrapping_add(1);
        self.next_number
    }
}

impl Control {
    /// How a node is reached.
    pub fn transport(&self, node_id: u8) -> PeerTransport {
        let known = self.transports.get(usize::from(node_id));
        known.cloned().unwrap_or_default()
    }

    /// Returns what was known before.
    fn set_transport(&mut self, node_id: u8, transport: PeerTransport) -> PeerTransport {
        match self.transports.get_mut(usize::from(node_id)) {
            Some(known) => std::mem::replace(known, transport),
            None => PeerTransport::default(),
        }
    }

    /// The operator waits for the disk to be let go of.
    pub fn is_detaching(&self) -> bool {
        let mut orders = self.orders.iter();
        orders.any(|(_, pending)| matches!(pending, Pending::Detach(_)))
    }

    fn facts(&self) -> Facts<'_> {
        Facts {
            base_bdev: self.backing.as_ref().map(|backing| backing.name.as_str()),
            listen: self
                .listen
                .or_else(|| endpoint::listens_at(&self.uuid, self.create.node_id)),
            geometry: self.geometry,
            cores: all().len(),
            active_extents: self
                .active_extents
                .iter()
                .map(|used| used.load(Ordering::Relaxed))
                .sum(),
        }
    }
}

/// Carries out a call of a volume method, on core 0.
pub fn request(state: &mut State, request: VolumeRequest, reply: Reply) {
    let request = match state.node.awaited.volumes.request(request) {
        Turn::Other(request) => request,
        Turn::Answered(answer) => return reply.answer(answer),
        Turn::Later(request) => {
            let again = move |state: &mut State| self::request(state, request, reply);
            return state.node.deferred.push(Box::new(again));
        }
    };
    let (name, order) = match order::ask(request) {
        Asked::Order(name, order) => (name, order),
        Asked::AddPeer(name, order, transport) => {
            return add_peer(state, &name, order, transport, reply);
        }
        Asked::Create(create) => return opening::create(state, create, reply),
        Asked::Delete { name } => return lifecycle::delete(state, &name, reply),
        Asked::Wipe { base_bdev } => return opening::wipe(state, &base_bdev, reply),
        Asked::GetVolumes { name } => return reply.answer(get_volumes(state, name.as_deref())),
        Asked::Attach { name, base_bdev } => {
            return opening::attach(state, &name, &base_bdev, reply);
        }
        Asked::SetOptions(options) => return reply.answer(set_options(state, &options)),
    };
    let volume = match state.node.named(&name) {
        Ok(control) => control.volume,
        Err(error) => return reply.fail(error),
    };
    match order {
        Order::Promote { .. } => role::promote(state, volume, order, reply),
        Order::Demote => role::demote(state, volume, reply),
        Order::Detach => give_order(state, volume, order, Pending::Detach(reply)),
        _ => give_order(state, volume, order, Pending::Reply(reply)),
    }
}

/// The manager may open the link while it carries the order out, so what the link needs is there before.
fn add_peer(state: &mut State, name: &str, order: Order, transport: PeerTransport, reply: Reply) {
    let control = match state.node.named(name) {
        Ok(control) => control,
        Err(error) => return reply.fail(error),
    };
    let Order::AddPeer { node_id, .. } = order else {
        return;
    };
    let volume = control.volume;
    let before = control.set_transport(node_id, transport);
    give_order(
        state,
        volume,
        order,
        Pending::AddPeer(reply, node_id, before),
    );
}

/// An order for a volume that is being made is kept until it has its manager.
pub fn give_order(state: &mut State, volume: u32, order: Order, pending: Pending) {
    let has_manager = state
        .volume(volume)
        .is_some_and(|this| this.manager.is_some());
    if !has_manager && state.node.control(volume).is_some() {
        let again = move |state: &mut State| give_order(state, volume, order, pending);
        return state.node.deferred.push(Box::new(again));
    }
    let id = state.node.next_order();
    let Some(control) = state.node.control(volume) else {
        return;
    };
    control.orders.push((id, pending));
    with_manager(state, volume, |manager, cx| manager.order(cx, id, order));
}

/// The manager has ended an order.
pub fn ordered(state: &mut State, volume: u32, id: OrderId, outcome: OrderOutcome) {
    let Some(control) = state.node.control(volume) else {
        return;
    };
    let Some(position) = control.orders.iter().position(|(other, _)| *other == id) else {
        return;
    };
    let (_, pending) = control.orders.swap_remove(position);
    let outcome = outcome.map_err(order::order_error);
    match pending {
        Pending::Reply(reply) | Pending::Detach(reply) => {
            reply.answer(outcome.map(|()| json!(true)));
        }
        Pending::AddPeer(reply, node_id, before) => {
            if outcome.is_err() {
                control.set_transport(node_id, before);
            }
            reply.answer(outcome.map(|()| json!(true)));
        }
        Pending::Promote(reply) => role::promoted(state, volume, outcome, reply),
        Pending::Demote(reply) => role::demoted(state, volume, outcome, reply),
        Pending::Create(reply) => match outcome {
            Ok(()) => lifecycle::publish(state, volume, reply),
            Err(error) => lifecycle::undo(state, volume, error, reply),
        },
        Pending::Delete(then) => then(state, outcome),
    }
}

fn get_volumes(state: &State, name: Option<&str>) -> Result<Value, RpcError> {
    let mut reports: Vec<VolumeReport> = Vec::new();
    for control in &state.node.controls {
        if name.is_some_and(|name| name != control.create.name) {
            continue;
        }
        let this = state
            .volumes
            .get(control.volume as usize)
            .and_then(Option::as_ref);
        if let Some(this) = this
            && let Some(manager) = &this.manager
        {
            reports.push(report::volume(control.facts(), manager, &this.context));
        }
    }
    let awaited = state.node.awaited.volumes.reports(name);
    // While it is being made, a volume may be there already.
    let is_shown = |own: &VolumeReport| reports.iter().any(|report| report.name == own.name);
    let awaited: Vec<_> = awaited.filter(|own| !is_shown(own)).collect();
    reports.extend(awaited);
    report::answer(&reports, name)
}

/// What `bdev_get_bdevs` says of a volume in addition.
pub fn report_json(state: &mut State, volume: u32) -> Option<String> {
    let name = state.node.control(volume)?.create.name.clone();
    let answer = get_volumes(state, Some(&name)).ok()?;
    Some(answer.get(0)?.to_string())
}

fn set_options(state: &mut State, wanted: &SetOptions) -> Result<Value, RpcError> {
    let control = state.node.named(&wanted.name)?;
    let volume = control.volume;
    if let Some(listeners) = &wanted.ana_listeners {
        control.create.ana_listeners.clone_from(listeners);
        control.ana.changed();
    }
    let manager = state
        .volume(volume)
        .and_then(|this| this.manager.as_mut())
        .ok_or_else(refusal::being_made)?;
    manager.set_options(order::options(wanted, manager.options()));
    Ok(json!(true))
}

/// The calls that make a volume again.
pub fn config(state: &State, volume: u32) -> Vec<VolumeRequest> {
    let mut controls = state.node.controls.iter();
    let control = controls.find(|control| control.volume == volume);
    let this = state.volumes.get(volume as usize).and_then(Option::as_ref);
    let (Some(control), Some(this)) = (control, this) else {
        return Vec::new();
    };
    let Some(manager) = &this.manager else {
        return Vec::new();
    };
    if state.node.awaited.volumes.has(&control.create.name) {
        // It is saved with those that wait until it has all that it was asked for.
        return Vec::new();
    }
    let mut create = control.create.clone();
    if endpoint::listens_at(&control.uuid, create.node_id).is_some() {
        // The target's own part of the configuration has it.
        create.listen = None;
    }
    saved::calls(&create, manager, &this.context, |node_id| {
        control.transport(node_id)
    })
}
