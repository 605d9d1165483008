//! Volumes come and go, on core 0: on every core, in SPDK, and as an endpoint for peers. Every step waits for the one
//! before, on all cores.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use serde_json::json;
use uuid::Uuid;

use super::backing::{self, Backing};
use super::bdev::{self, Parameters, Port};
use super::context::{Context, now_ns};
use super::core::{Job, State, all, manager_core, on_all};
use super::node::{Control, Pending, give_order};
use super::volume::{CoreVolume, with_manager};
use super::{ana, endpoint, link, sys};
use crate::engine::channel::Channel;
use crate::engine::manager::{Manager, Order};
use crate::engine::message::{OrderId, ToManager};
use crate::engine::open::Opened;
use crate::engine::volume::Shared;
use crate::hosts::control::endpoint::{endpoint_name, endpoint_uuid};
use crate::hosts::control::{device, refusal};
use crate::rpc::volume::{CreateVolume, Register};
use crate::rpc::{Reply, RpcError};

/// How long a volume that ends serves on for those who have its bdev open: a store of logical volumes writes that it is
/// clean. Who waits for I/O that is held takes longer, and is told that it has failed.
const LETTING_GO_NS: u64 = 3_000_000_000;

/// The device is open: the volume comes to be, on every core. `is_found`: by itself.
pub fn start(
    state: &mut State,
    volume: u32,
    create: CreateVolume,
    backing: Backing,
    opened: Opened,
    reply: Reply,
    is_found: bool,
) {
    let cores = all().len();
    if let Err(error) = device::check_cores(&opened.superblock, cores) {
        backing::close(state, &backing, true);
        return reply.fail(error);
    }
    let block_size = backing.block_size;
    let geometry = device::geometry(&opened.superblock, block_size);
    let active_extents: Arc<Vec<AtomicU32>> =
        Arc::new((0..cores).map(|_| AtomicU32::new(0)).collect());
    state.node.controls.push(Control {
        volume,
        uuid: Uuid::from_bytes(opened.superblock.volume_uuid),
        create,
        backing: None,
        listen: None,
        geometry,
        alignment: backing.alignment,
        active_extents: Arc::clone(&active_extents),
        orders: Vec::new(),
        deleting: false,
        is_demoting: false,
        is_unregistering: false,
        ana: ana::Listeners::default(),
        is_published: false,
        is_found,
        bdev: None,
        endpoint: None,
        links: Default::default(),
        transports: Default::default(),
    });
    let shared = Arc::new(Shared::new(geometry));
    let for_manager = Arc::clone(&shared);
    on_all(
        move |state| {
            let this = CoreVolume {
                channel: Channel::new(state.core.index, Arc::clone(&shared)),
                manager: None,
                context: Context::new(),
                disk: None,
                block_size,
                overflow: VecDeque::new(),
                waiting: VecDeque::new(),
                wait_entry: Box::new(sys::spdk_bdev_io_wait_entry::default()),
                is_waiting: false,
                active_extents: Arc::clone(&active_extents),
                next_manager_poll_ns: 0,
                manager_stirred: false,
            };
            let index = volume as usize;
            if state.volumes.len() <= index {
                state.volumes.resize_with(index + 1, || None);
            }
            state.volumes[index] = Some(Box::new(this));
        },
        move |state| {
            if let Some(this) = state.volume(volume) {
                let channels = (0..cores).collect();
                let superblock = opened.superblock.clone();
                this.manager = Some(Manager::new(for_manager, superblock, channels));
            }
            start_attach(state, volume, backing, opened, Pending::Create(reply));
        },
    );
}

/// Every core gets the device, then the manager starts using it. The volume may have got another one, or be going, since
/// the device was asked for.
pub fn start_attach(
    state: &mut State,
    volume: u32,
    backing: Backing,
    opened: Opened,
    pending: Pending,
) {
    let id = state.node.next_order();
    let control = match control_to_attach(state, volume) {
        Ok(control) => control,
        Err(error) => {
            backing::close(state, &backing, true);
            return pending.refuse(error);
        }
    };
    control.backing = Some(backing.clone());
    control.orders.push((id, pending));
    on_all(
        move |state| {
            let disk = backing.disk();
            if let Some(this) = state.volume(volume) {
                this.disk = disk;
            } else if let Some(disk) = disk {
                disk.put();
            }
        },
        move |state| {
            let control = state.node.control(volume);
            if control.is_some_and(|control| control.deleting) {
                disk_closed(state, volume);
                return refused(state, volume, id);
            }
            with_manager(state, volume, |manager, cx| {
                manager.expect_attach(cx, id);
                manager.attach(cx, opened);
            });
        },
    );
}

/// The volume, if it is still there to be given a device.
fn control_to_attach(state: &mut State, volume: u32) -> Result<&mut Control, RpcError> {
    let control = state.node.control(volume).ok_or_else(refusal::gone)?;
    let name = &control.create.name;
    if control.deleting {
        return Err(refusal::being_deleted(name));
    }
    if control.backing.is_some() {
        return Err(refusal::has_base_bdev(name));
    }
    Ok(control)
}

/// The manager is not given this order: its volume is going.
fn refused(state: &mut State, volume: u32, id: OrderId) {
    let Some(control) = state.node.control(volume) else {
        return;
    };
    let error = refusal::being_deleted(&control.create.name);
    let position = control.orders.iter().position(|(other, _)| *other == id);
    if let Some(position) = position {
        control.orders.swap_remove(position).1.refuse(error);
    }
}

/// The volume has its disk: its bdevs and its endpoint appear.
pub fn publish(state: &mut State, volume: u32, reply: Reply) {
    let Some(control) = state.node.control(volume) else {
        return reply.fail(refusal::gone());
    };
    let endpoint = Parameters {
        name: endpoint_name(&control.create.name),
        volume,
        port: Port::Peers,
        uuid: endpoint_uuid(&control.uuid, control.create.node_id),
        geometry: control.geometry,
        alignment: 0,
    };
    let own = match control.create.register {
        Register::Always => register_volume(control),
        // Nobody can be Primary before.
        Register::OnPromote => Ok(()),
    };
    let registered = own
        .and_then(|()| bdev::register(endpoint))
        .map(|endpoint| control.endpoint = Some(endpoint));
    if let Err(errno) = registered {
        let text = format!(
            "the bdevs of volume '{}' cannot be registered",
            control.create.name
        );
        return undo(state, volume, RpcError::errno(errno, text), reply);
    }
    control.is_published = true;
    export(state, volume, reply);
}

/// Registers the bdev that applications use.
pub fn register_volume(control: &mut Control) -> Result<(), i32> {
    let bdev = bdev::register(Parameters {
        name: control.create.name.clone(),
        volume: control.volume,
        port: Port::Application,
        uuid: control.uuid,
        geometry: control.geometry,
        alignment: control.alignment,
    })?;
    control.bdev = Some(bdev);
    Ok(())
}

/// Takes the bdev that applications use away, if it is there; `then` when its users have let go of it.
pub fn unregister_volume(state: &mut State, volume: u32, then: impl FnOnce(&mut State) + 'static) {
    let Some(control) = state.node.control(volume) else {
        return then(state);
    };
    let Some(bdev) = control.bdev.take() else {
        return then(state);
    };
    control.is_unregistering = true;
    let gone = move |state: &mut State| {
        if let Some(control) = state.node.control(volume) {
            control.is_unregistering = false;
        }
        then(state);
    };
    unregister(bdev, Box::new(gone));
}

/// Lets peers in, where the volume is to listen.
fn export(state: &mut State, volume: u32, reply: Reply) {
    let Some(control) = state.node.control(volume) else {
        return reply.fail(refusal::gone());
    };
    let name = control.create.name.clone();
    let Some(listen) = control.create.listen.clone() else {
        return reply.ok(name);
    };
    endpoint::export(state, volume, listen, move |state, outcome| match outcome {
        Ok(local) => {
            if let Some(control) = state.node.control(volume) {
                control.listen = local;
            }
            reply.ok(name);
        }
        Err(error) => undo(state, volume, error, reply),
    });
}

/// A volume that came back by itself is what a configuration asks for: the rest of it is added.
pub fn complete_found(state: &mut State, volume: u32, create: CreateVolume, reply: Reply) {
    let is_primary = state.is_primary(volume);
    if let Some(control) = state.node.control(volume) {
        control.is_found = false;
        control.create = create;
        if control.create.register == Register::OnPromote && !is_primary {
            return unregister_volume(state, volume, move |state| export(state, volume, reply));
        }
    }
    export(state, volume, reply);
}

/// A volume that could not be published goes again.
pub fn undo(state: &mut State, volume: u32, error: RpcError, reply: Reply) {
    remove(state, volume, move |_, _| reply.fail(error));
}

pub fn delete(state: &mut State, name: &str, reply: Reply) {
    let volume = match state.node.named(name) {
        Ok(control) => control.volume,
        Err(error) => return reply.fail(error),
    };
    remove(state, volume, move |_, outcome| {
        reply.answer(outcome.map(|()| json!(true)));
    });
}

/// Ends a volume: its I/O, its connections, its disk, its bdevs; its metadata stays.
pub fn remove(
    state: &mut State,
    volume: u32,
    then: impl FnOnce(&mut State, Result<(), RpcError>) + 'static,
) {
    let Some(control) = state.node.control(volume) else {
        return then(state, Ok(()));
    };
    control.deleting = true;
    ana::settle(state, volume, move |state| {
        unregister_volume(state, volume, |_| ());
        let until_ns = now_ns() + LETTING_GO_NS;
        close(state, volume, until_ns, then);
    });
}

fn is_unregistering(state: &mut State, volume: u32) -> bool {
    let control = state.node.control(volume);
    control.is_some_and(|control| control.is_unregistering)
}

fn close(
    state: &mut State,
    volume: u32,
    until_ns: u64,
    then: impl FnOnce(&mut State, Result<(), RpcError>) + 'static,
) {
    if is_unregistering(state, volume) && now_ns() < until_ns {
        let again = move |state: &mut State| close(state, volume, until_ns, then);
        return state.node.deferred.push(Box::new(again));
    }
    let pending = Pending::Delete(Box::new(move |state, outcome| match outcome {
        Ok(()) => {
            let remove = move |state: &mut State| remove_endpoint(state, volume, then);
            link::close_all(state, volume, Box::new(remove));
        }
        Err(error) => {
            if let Some(control) = state.node.control(volume) {
                control.deleting = false;
            }
            then(state, Err(error));
        }
    }));
    give_order(state, volume, Order::Close, pending);
}

fn remove_endpoint(
    state: &mut State,
    volume: u32,
    then: impl FnOnce(&mut State, Result<(), RpcError>) + 'static,
) {
    endpoint::unexport(state, volume, move |state| {
        let Some(control) = state.node.control(volume) else {
            return then(state, Ok(()));
        };
        let gone = move |state: &mut State| forget_unregistered(state, volume, then);
        match control.endpoint.take() {
            Some(endpoint) => unregister(endpoint, Box::new(gone)),
            None => gone(state),
        }
    });
}

/// Whoever has not let go of the volume's bdev before does so now: the volume has ended their I/O.
fn forget_unregistered(
    state: &mut State,
    volume: u32,
    then: impl FnOnce(&mut State, Result<(), RpcError>) + 'static,
) {
    if is_unregistering(state, volume) {
        let again = move |state: &mut State| forget_unregistered(state, volume, then);
        return state.node.deferred.push(Box::new(again));
    }
    forget(state, volume, then);
}

/// Takes a bdev away; `then` when everybody has let go of it.
fn unregister(bdev: bdev::Registered, then: Job) {
    if let Some(core) = manager_core() {
        core.send(move |_| bdev.unregister(move || core.send(then)));
    }
}

fn forget(
    state: &mut State,
    volume: u32,
    then: impl FnOnce(&mut State, Result<(), RpcError>) + 'static,
) {
    // The engine has let go of a disk by now; what it has not is let go of here.
    disk_closed(state, volume);
    on_all(
        move |state| {
            if let Some(slot) = state.volumes.get_mut(volume as usize) {
                *slot = None;
            }
        },
        move |state| {
            state
                .node
                .controls
                .retain(|control| control.volume != volume);
            then(state, Ok(()));
        },
    );
}

/// The engine has let go of the backing bdev on all cores.
pub fn disk_closed(state: &mut State, volume: u32) {
    let Some(backing) = state
        .node
        .control(volume)
        .and_then(|control| control.backing.clone())
    else {
        return;
    };
    let desc = backing.desc;
    on_all(
        move |state| {
            if let Some(this) = state.volume(volume)
                && let Some(disk) = this.disk.take_if(|disk| std::ptr::eq(disk.desc, desc))
            {
                disk.put();
            }
        },
        move |state| {
            let control = state.node.control(volume);
            let own = control
                .and_then(|control| control.backing.take_if(|own| std::ptr::eq(own.desc, desc)));
            if let Some(backing) = own {
                backing::close(state, &backing, true);
            }
        },
    );
}

/// A bdev goes away under its volume: a failure of the disk, which the volume outlives.
pub fn backing_removed(state: &mut State, name: &str) {
    let volume = state.node.controls.iter().find_map(|control| {
        let own = control.backing.as_ref()?;
        (own.name == name).then_some(control.volume)
    });
    for opening in &mut state.node.openings {
        opening.is_removed |= opening.backing.name == name;
    }
    if let Some(volume) = volume {
        tracing::error!("backing bdev {name} was removed");
        with_manager(state, volume, |manager, cx| {
            manager.message(cx, ToManager::DiskFailed);
        });
    }
}

/// A bdev has become larger under its volume, which goes on with what it has.
pub fn backing_grew(state: &mut State, name: &str, blocks: u64) {
    let controls = state.node.controls.iter();
    let mut backed = controls.filter_map(|control| Some((control, control.backing.as_ref()?)));
    if let Some((control, own)) = backed.find(|(_, own)| own.name == name) {
        tracing::warn!(
            "backing bdev {name} has grown from {} to {blocks} blocks: volume '{}' goes on with its own size, but a volume is \
             found again only on a bdev of the size that it was made on; before this node starts again, give the bdev \
             its former size back, or make this replica anew (bdev_repl_delete, then bdev_repl_create with force)",
            own.blocks,
            control.create.name
        );
    }
}

/// Ends volumes, one after the other, then `then`. An error leaves a volume as a crash would. A volume with something
/// built on it serves on: SPDK takes bdevs away from the top, and it is not prepared for another order by now.
pub fn shutdown(state: &mut State, then: Job) {
    let is_below = |control: &Control| control.bdev.is_some_and(|bdev| bdev.is_claimed());
    let controls = state.node.controls.iter();
    let (below, rest): (Vec<_>, Vec<_>) = controls
        .filter(|control| !control.deleting)
        .partition(|control| is_below(control));
    if let Some(control) = rest.first() {
        let volume = control.volume;
        return remove(state, volume, move |state, outcome| {
            if let Err(error) = outcome {
                tracing::error!("a volume does not close: {}", error.message);
                if let Some(control) = state.node.control(volume) {
                    control.deleting = true;
                }
            }
            shutdown(state, then);
        });
    }
    if !state.node.openings.is_empty() || state.node.frozen.is_resetting(None) {
        // What is still being opened, or reset, holds a bdev that SPDK is about to take away.
        let again = move |state: &mut State| shutdown(state, then);
        return state.node.deferred.push(Box::new(again));
    }
    let until_ns = now_ns() + LETTING_GO_NS;
    for volume in below
        .iter()
        .map(|control| control.volume)
        .collect::<Vec<_>>()
    {
        close_at(state, volume, until_ns);
    }
    then(state);
}

/// Ends the I/O of a volume that is still there at this time: what is built on it cannot go while it waits.
fn close_at(state: &mut State, volume: u32, until_ns: u64) {
    let control = state.node.control(volume);
    if control.is_none_or(|control| control.deleting) {
        return;
    }
    if now_ns() < until_ns {
        let again = move |state: &mut State| close_at(state, volume, until_ns);
        return state.node.deferred.push(Box::new(again));
    }
    give_order(
        state,
        volume,
        Order::Close,
        Pending::Delete(Box::new(|_, _| ())),
    );
}

/// A bdev of a volume is being taken away; `then` when the volume is ready for it. If it is not the volume itself that
/// takes it away, the application is going down, and nothing is left that was built on it: the volume ends, too.
pub fn taken_away(
    state: &mut State,
    volume: u32,
    bdev: bdev::Registered,
    then: impl FnOnce() + 'static,
) {
    let control = state.node.control(volume);
    let own = control.and_then(|control| control.bdev.take_if(|own| *own == bdev));
    match own {
        Some(_) => remove(state, volume, move |_, _| then()),
        None => then(),
    }
}
