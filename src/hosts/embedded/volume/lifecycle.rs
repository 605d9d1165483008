//! Volumes come and go, on core 0: on every core, in the registry, and as an endpoint for peers. Every step waits for
//! the one before, on all cores.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use serde_json::json;
use uuid::Uuid;

use super::super::bdev::{BdevId, BdevKind};
use super::super::core::Core;
use super::super::initiator;
use super::super::nvme_tcp::target::{ListenerAddress, NamespaceParameters, SubsystemParameters};
use super::super::registry::{self, BdevOrigin, Registration};
use super::super::target;
use super::context::Context;
use super::control::{Control, Pending, bdev_error, control_of, give_order, next_order};
use super::link::Links;
use super::{CoreVolume, ana, with};
use crate::engine::channel::Channel;
use crate::engine::manager::{Manager, Order};
use crate::engine::message::OrderId;
use crate::engine::open::Opened;
use crate::engine::volume::Shared;
use crate::hosts::control::endpoint::{
    ENDPOINT_MODEL, ENDPOINT_NSID, endpoint_name, endpoint_nqn, endpoint_uuid,
};
use crate::hosts::control::{device, refusal};
use crate::hosts::slab::Slab;
use crate::rpc::volume::{Address, CreateVolume, Listen};
use crate::rpc::{Reply, RpcError};

/// The device is open: the volume comes to be, on every core.
pub(super) fn start(
    core: &mut Core,
    volume: u32,
    create: CreateVolume,
    base: (BdevId, String),
    block_size: u32,
    opened: Opened,
    reply: Reply,
) {
    if let Err(error) = device::check_cores(&opened.superblock, core.cores) {
        core.registry.release(base.0);
        return reply.fail(error);
    }
    let geometry = device::geometry(&opened.superblock, block_size);
    let uuid = Uuid::from_bytes(opened.superblock.volume_uuid);
    let node_id = opened.superblock.node_id;
    let cores = core.cores;
    let active_extents: Arc<Vec<AtomicU32>> =
        Arc::new((0..cores).map(|_| AtomicU32::new(0)).collect());
    core.volumes.controls.push(Control {
        volume,
        uuid,
        create,
        base: None,
        listen: None,
        geometry,
        cores,
        active_extents: Arc::clone(&active_extents),
        orders: Vec::new(),
        deleting: false,
        is_demoting: false,
        ana: ana::Listeners::default(),
    });
    let shared = Arc::new(Shared::new(geometry));
    let for_manager = Arc::clone(&shared);
    core.on_all_cores(
        move |core| {
            let this = CoreVolume {
                channel: Channel::new(core.index, Arc::clone(&shared)),
                manager: None,
                links: Links::default(),
                context: Context::new(),
                disk: None,
                block_size,
                in_flight: Slab::default(),
                splits: Slab::default(),
                overflow: std::collections::VecDeque::new(),
                active_extents: Arc::clone(&active_extents),
                next_manager_poll_ns: 0,
                manager_stirred: false,
            };
            let index = volume as usize;
            let volumes = &mut core.volumes.volumes;
            if volumes.len() <= index {
                volumes.resize_with(index + 1, || None);
            }
            volumes[index] = Some(Box::new(this));
        },
        move |core| {
            if let Some(this) = core.volumes.get_mut(volume) {
                let channels = (0..cores).collect();
                this.manager = Some(Manager::new(
                    for_manager,
                    opened.superblock.clone(),
                    channels,
                ));
                this.links.volume_uuid = uuid;
                this.links.node_id = node_id;
            }
            start_attach(
                core,
                volume,
                base,
                block_size,
                opened,
                Pending::Create(reply),
            );
        },
    );
}

/// Every core gets the device, then the manager starts using it. The volume may have got another one, or be going, since
/// the device was asked for.
pub(super) fn start_attach(
    core: &mut Core,
    volume: u32,
    base: (BdevId, String),
    block_size: u32,
    opened: Opened,
    pending: Pending,
) {
    let id = next_order(core);
    let bdev = base.0;
    let control = match control_to_attach(core, volume) {
        Ok(control) => control,
        Err(error) => {
            core.registry.release(bdev);
            return pending.refuse(error);
        }
    };
    control.base = Some(base);
    control.orders.push((id, pending));
    core.on_all_cores(
        move |core| {
            if let Some(this) = core.volumes.get_mut(volume) {
                this.disk = Some((bdev, block_size));
            }
        },
        move |core| {
            if is_going(core, volume) {
                return disk_closed(core, volume, move |core| refused(core, volume, id));
            }
            with(core, volume, |this| {
                if let Some(manager) = &mut this.manager {
                    this.manager_stirred = true;
                    manager.expect_attach(&mut this.context, id);
                    manager.attach(&mut this.context, opened);
                }
            });
        },
    );
}

/// The volume, if it is still there to be given a device.
fn control_to_attach(core: &mut Core, volume: u32) -> Result<&mut Control, RpcError> {
    let mut controls = core.volumes.controls.iter_mut();
    let control = controls
        .find(|control| control.volume == volume)
        .ok_or_else(refusal::gone)?;
    let name = &control.create.name;
    if control.deleting {
        return Err(refusal::being_deleted(name));
    }
    if control.base.is_some() {
        return Err(refusal::has_base_bdev(name));
    }
    Ok(control)
}

fn is_going(core: &Core, volume: u32) -> bool {
    let mut controls = core.volumes.controls.iter();
    controls.any(|control| control.volume == volume && control.deleting)
}

/// The manager is not given this order: its volume is going.
fn refused(core: &mut Core, volume: u32, id: OrderId) {
    let mut controls = core.volumes.controls.iter_mut();
    let Some(control) = controls.find(|control| control.volume == volume) else {
        return;
    };
    let error = refusal::being_deleted(&control.create.name);
    let position = control.orders.iter().position(|(other, _)| *other == id);
    if let Some(position) = position {
        control.orders.swap_remove(position).1.refuse(error);
    }
}

/// The volume has its disk: its bdevs and its endpoint appear.
pub(super) fn publish(core: &mut Core, volume: u32, reply: Reply) {
    let Some(control) = core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let (name, uuid, geometry) = (control.create.name.clone(), control.uuid, control.geometry);
    let registration = Registration {
        name: name.clone(),
        aliases: Vec::new(),
        uuid,
        block_size: geometry.block_size,
        num_blocks: geometry.size_blocks,
        kind: BdevKind::Volume(volume),
        origin: BdevOrigin::Volume,
    };
    let endpoint = Registration {
        name: endpoint_name(&name),
        uuid: endpoint_uuid(&uuid, control.create.node_id),
        kind: BdevKind::Endpoint(volume),
        origin: BdevOrigin::Endpoint,
        ..registration.clone()
    };
    registry::register(core, registration, move |core, result| match result {
        Ok(_) => registry::register(core, endpoint, move |core, result| match result {
            Ok(id) => export_endpoint(core, volume, id, reply),
            Err(error) => undo(core, volume, bdev_error(error), reply),
        }),
        Err(error) => undo(core, volume, bdev_error(error), reply),
    });
}

/// A volume that could not be published goes again.
fn undo(core: &mut Core, volume: u32, error: RpcError, reply: Reply) {
    remove(core, volume, move |_, _| reply.fail(error));
}

fn export_endpoint(core: &mut Core, volume: u32, endpoint: BdevId, reply: Reply) {
    let Some(control) = core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let nqn = endpoint_nqn(&control.uuid, control.create.node_id);
    let geometry = control.geometry;
    let listen = control.create.listen.as_ref().map(|listen| listen.address);
    let uuid = *endpoint_uuid(&control.uuid, control.create.node_id).as_bytes();
    let made = {
        let mut state = core.target.state();
        let mut parameters = SubsystemParameters::new(&nqn);
        parameters.allow_any_host = true;
        parameters.model_number = ENDPOINT_MODEL.into();
        state.create_subsystem(parameters).and_then(|()| {
            state.add_namespace(
                &nqn,
                NamespaceParameters {
                    nsid: Some(ENDPOINT_NSID),
                    handle: target::namespace_handle(endpoint),
                    block_size: geometry.block_size,
                    size_blocks: geometry.size_blocks,
                    nguid: uuid,
                    uuid,
                    eui64: [0; 8],
                    vendor_only: true,
                },
            )
        })
    };
    if let Err(error) = made {
        return undo(core, volume, RpcError::invalid(error.to_string()), reply);
    }
    target::changed(core);
    let Some(Address { traddr, trsvcid }) = listen else {
        return created(core, volume, reply);
    };
    let address = ListenerAddress::tcp(&traddr.to_string(), &trsvcid.to_string());
    target::add_listener(core, &nqn, &address, move |core, result| match result {
        Ok(local) => {
            if let Some(control) = core
                .volumes
                .controls
                .iter_mut()
                .find(|control| control.volume == volume)
            {
                control.listen = Some(local);
                // A saved configuration names the port that the kernel chose.
                control.create.listen = Some(Listen::open(Address {
                    traddr: local.ip(),
                    trsvcid: local.port(),
                }));
            }
            created(core, volume, reply);
        }
        Err(error) => undo(core, volume, bdev_error(error), reply),
    });
}

fn created(core: &mut Core, volume: u32, reply: Reply) {
    match core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    {
        Some(control) => reply.ok(control.create.name.clone()),
        None => reply.fail(RpcError::no_device("the volume was deleted meanwhile")),
    }
}

pub(super) fn delete(core: &mut Core, name: &str, reply: Reply) {
    match control_of(core, name) {
        Ok(control) => {
            let volume = control.volume;
            // A subsystem that exports it loses the namespace with it, as it does in SPDK.
            if let Some(entry) = core.registry.find(name)
                && let Some(holder) = &entry.claimed_by
                && holder != target::CLAIMANT
            {
                return reply.fail(refusal::claimed(name, holder));
            }
            remove(core, volume, move |_, outcome| {
                reply.answer(outcome.map(|()| json!(true)))
            });
        }
        Err(error) => reply.fail(error),
    }
}

/// Ends a volume: its I/O, its connections, its disk, its bdevs; its metadata stays.
fn remove(
    core: &mut Core,
    volume: u32,
    then: impl FnOnce(&mut Core, Result<(), RpcError>) + 'static,
) {
    if let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    {
        control.deleting = true;
    }
    ana::tell(core, volume);
    let pending = Pending::Delete(Box::new(move |core, outcome| match outcome {
        Ok(()) => remove_bdevs(core, volume, then),
        Err(error) => {
            if let Some(control) = core
                .volumes
                .controls
                .iter_mut()
                .find(|control| control.volume == volume)
            {
                control.deleting = false;
            }
            then(core, Err(error));
        }
    }));
    give_order(core, volume, Order::Close, pending);
}

fn remove_bdevs(
    core: &mut Core,
    volume: u32,
    then: impl FnOnce(&mut Core, Result<(), RpcError>) + 'static,
) {
    let Some(control) = core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let name = control.create.name.clone();
    let nqn = endpoint_nqn(&control.uuid, control.create.node_id);
    // It may not be there: the volume may never have been published.
    let _ = target::delete_subsystem(core, &nqn);
    let endpoint = endpoint_name(&name);
    registry::delete(core, &name, move |core, _| {
        registry::delete(core, &endpoint, move |core, _| forget(core, volume, then));
    });
}

fn forget(
    core: &mut Core,
    volume: u32,
    then: impl FnOnce(&mut Core, Result<(), RpcError>) + 'static,
) {
    core.on_all_cores(
        move |core| {
            let queues: Vec<_> = core.volumes.get_mut(volume).map_or_else(Vec::new, |this| {
                super::slots()
                    .filter_map(|slot| this.context.queues[slot])
                    .collect()
            });
            for queue in queues {
                initiator::close(core, queue.key);
            }
            if let Some(slot) = core.volumes.volumes.get_mut(volume as usize) {
                *slot = None;
            }
        },
        move |core| {
            let position = core
                .volumes
                .controls
                .iter()
                .position(|control| control.volume == volume);
            if let Some(position) = position {
                let control = core.volumes.controls.swap_remove(position);
                if let Some((bdev, _)) = control.base {
                    core.registry.release(bdev);
                }
            }
            then(core, Ok(()));
        },
    );
}

/// The engine has let go of the backing bdev on all cores.
pub(super) fn disk_closed(core: &mut Core, volume: u32, then: impl FnOnce(&mut Core) + 'static) {
    core.on_all_cores(
        move |core| {
            if let Some(this) = core.volumes.get_mut(volume) {
                this.disk = None;
            }
        },
        move |core| {
            let control = core
                .volumes
                .controls
                .iter_mut()
                .find(|control| control.volume == volume);
            if let Some((bdev, _)) = control.and_then(|control| control.base.take()) {
                core.registry.release(bdev);
            }
            then(core);
        },
    );
}

/// Ends all volumes, then `then`.
pub(super) fn shutdown(core: &mut Core, then: impl FnOnce(&mut Core) + 'static) {
    core.volumes.awaited.volumes.clear();
    let next = core
        .volumes
        .controls
        .iter()
        .find(|control| !control.deleting);
    match next {
        Some(control) => {
            let volume = control.volume;
            // One after the other; an error leaves the volume as a crash would.
            remove(core, volume, move |core, outcome| {
                if let Err(error) = outcome {
                    tracing::error!("a volume does not close: {}", error.message);
                }
                shutdown_next(core, Box::new(then));
            });
        }
        None => then(core),
    }
}

fn shutdown_next(core: &mut Core, then: Box<dyn FnOnce(&mut Core)>) {
    shutdown(core, then);
}
