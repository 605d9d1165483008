//! NVMe bdevs: namespaces of controllers that this node is connected to, with an admin queue on core 0 and
//! a queue pair on every core. Called by the control path (attach, detach); I/O is in `io.rs`. A connection
//! that is lost is made again and again; I/O fails meanwhile.

mod io;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use uuid::Uuid;

use super::admin::{self, ControllerKey};
use super::bdev::{BdevId, BdevKind};
use super::core::{Acknowledgement, Core};
use super::initiator::{self, OpenParameters, QueueChange, QueueKey, QueueOwner};
use super::message::Message;
use super::nvme_tcp::controller::{ControllerEvent, ControllerParameters, RemoteNamespace};
use super::nvme_tcp::initiator::{InitiatorError, QueueParameters};
use super::registry::{self, BdevError, BdevOrigin, Registration};
use super::target;
use crate::hosts::slab::{Key, Slab};
use io::RemoteIo;
pub use io::{Place, go_on, poll, submit};

/// This core's way to one controller.
struct Path {
    /// The connection that the queue belongs to, by its admin queue on core 0.
    admin: ControllerKey,
    queue: Option<QueueKey>,
    up: bool,
    max_transfer_bytes: u32,
    /// Paid when the queue is up, or has failed.
    opening: Option<(Acknowledgement, Arc<AtomicUsize>)>,
    /// I/O that found the queue full.
    waiting: VecDeque<Key>,
}

/// The NVMe bdevs' side of one core.
#[derive(Default)]
pub struct CoreRemotes {
    paths: BTreeMap<u32, Path>,
    ios: Slab<RemoteIo>,
    /// Core 0 only.
    controllers: BTreeMap<u32, Remote>,
    next_controller: u32,
}

type AttachTask = Box<dyn FnOnce(&mut Core, Result<Vec<String>, BdevError>)>;

/// A controller as core 0 knows it.
struct Remote {
    name: String,
    address: SocketAddr,
    parameters: ControllerParameters,
    admin: Option<ControllerKey>,
    state: RemoteState,
    /// As the namespaces were when their bdevs were made.
    bdevs: Vec<(RemoteNamespace, BdevId)>,
    /// Who waits for the first connection.
    attaching: Option<AttachTask>,
    detaching: bool,
}

/// How a controller stands, in SPDK's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteState {
    Connecting,
    Enabled,
    Resetting,
}

/// A controller for `bdev_nvme_get_controllers`.
#[derive(Clone, Debug)]
pub struct RemoteSummary {
    pub name: String,
    pub address: SocketAddr,
    pub parameters: ControllerParameters,
    pub state: RemoteState,
    pub controller_id: u16,
}

const RECONNECT_MS: u64 = 1_000;

/// Longest transfer of one command where the controller names no limit.
const TRANSFER_MAX_BYTES: u32 = 1 << 20;
impl CoreRemotes {
    pub fn summaries(&self, core: &Core) -> Vec<RemoteSummary> {
        self.controllers
            .values()
            .map(|remote| RemoteSummary {
                name: remote.name.clone(),
                address: remote.address,
                parameters: remote.parameters.clone(),
                state: remote.state,
                controller_id: remote
                    .admin
                    .and_then(|key| core.admins.controller(key))
                    .map_or(0, |controller| controller.controller_id()),
            })
            .collect()
    }
}

/// Connects to a controller and makes a bdev of each of its namespaces, `<name>n<nsid>`. On core 0; `then`
/// gets the names of the bdevs. Errors: EEXIST (name), EIO with what went wrong while connecting.
pub fn attach(
    core: &mut Core,
    name: &str,
    address: SocketAddr,
    mut parameters: ControllerParameters,
    then: impl FnOnce(&mut Core, Result<Vec<String>, BdevError>) + 'static,
) {
    let exists = |remote: &Remote| remote.name == name;
    if core.remotes.controllers.values().any(exists) {
        let message = format!("a controller named {name} exists already");
        return then(core, Err(BdevError::from_errno(libc::EEXIST, message)));
    }
    parameters.io_queues = core.cores as u16;
    let id = core.remotes.next_controller;
    core.remotes.next_controller += 1;
    core.remotes.controllers.insert(
        id,
        Remote {
            name: name.to_owned(),
            address,
            parameters,
            admin: None,
            state: RemoteState::Connecting,
            bdevs: Vec::new(),
            attaching: Some(Box::new(then)),
            detaching: false,
        },
    );
    connect(core, id);
}

/// Deletes the bdevs of a controller and disconnects. On core 0. Errors: ENODEV; EBUSY when one of its
/// bdevs is claimed (nothing is done then).
pub fn detach(
    core: &mut Core,
    name: &str,
    then: impl FnOnce(&mut Core, Result<(), BdevError>) + 'static,
) {
    let found = core
        .remotes
        .controllers
        .iter()
        .find(|(_, remote)| remote.name == name && !remote.detaching)
        .map(|(id, remote)| {
            let bdevs = remote.bdevs.iter().map(|(_, bdev)| *bdev);
            (*id, bdevs.collect::<Vec<BdevId>>())
        });
    let Some((id, bdevs)) = found else {
        let message = format!("there is no controller named {name}");
        return then(core, Err(BdevError::from_errno(libc::ENODEV, message)));
    };
    for bdev in &bdevs {
        if let Some(entry) = core.registry.get(*bdev) {
            if let Some(holder) = &entry.claimed_by {
                let message = format!("bdev {} is claimed by {holder}", entry.name);
                return then(core, Err(BdevError::from_errno(libc::EBUSY, message)));
            }
        }
    }
    if let Some(remote) = core.remotes.controllers.get_mut(&id) {
        remote.detaching = true;
    }
    disconnect(core, id, move |core| {
        delete_bdevs(core, bdevs, move |core| {
            core.on_all_cores(
                move |core| {
                    core.remotes.paths.remove(&id);
                },
                move |core| {
                    core.remotes.controllers.remove(&id);
                    then(core, Ok(()));
                },
            );
        });
    });
}

fn delete_bdevs(core: &mut Core, mut bdevs: Vec<BdevId>, then: impl FnOnce(&mut Core) + 'static) {
    let Some(bdev) = bdevs.pop() else {
        return then(core);
    };
    let name = core.registry.get(bdev).map(|entry| entry.name.clone());
    let Some(name) = name else {
        return delete_bdevs(core, bdevs, then);
    };
    registry::delete(core, &name, move |core, result| {
        if let Err(error) = result {
            tracing::warn!("detaching: {error}");
        }
        delete_bdevs(core, bdevs, then);
    });
}

fn connect(core: &mut Core, id: u32) {
    let Some(remote) = core.remotes.controllers.get(&id) else {
        return;
    };
    if remote.detaching {
        return;
    }
    let (address, parameters) = (remote.address, remote.parameters.clone());
    let owner = QueueOwner::Remote(id);
    match admin::open(core, address, parameters, owner) {
        Ok(key) => {
            if let Some(remote) = core.remotes.controllers.get_mut(&id) {
                remote.admin = Some(key);
            }
        }
        Err(error) => lost(core, id, None, &error),
    }
}

/// The connection with this admin queue failed (or none came about): that ends an attach, later it is
/// mended. What is heard of a connection that was given up already does not matter.
fn lost(core: &mut Core, id: u32, admin: Option<ControllerKey>, error: &InitiatorError) {
    let Some(remote) = core.remotes.controllers.get_mut(&id) else {
        return;
    };
    if remote.detaching || remote.admin != admin {
        return;
    }
    let (name, address) = (remote.name.clone(), remote.address);
    remote.state = RemoteState::Resetting;
    if let Some(then) = remote.attaching.take() {
        remote.detaching = true;
        let message = format!("cannot attach {name} at {address}: {error}");
        return disconnect(core, id, move |core| {
            core.on_all_cores(
                move |core| {
                    core.remotes.paths.remove(&id);
                },
                move |core| {
                    core.remotes.controllers.remove(&id);
                    then(core, Err(BdevError::from_errno(libc::EIO, message)));
                },
            );
        });
    }
    tracing::warn!("controller {name} at {address}: {error}; connecting again");
    disconnect(core, id, move |core| {
        core.after(RECONNECT_MS, move |core| connect(core, id));
    });
}

/// Closes all queues of a controller.
fn disconnect(core: &mut Core, id: u32, then: impl FnOnce(&mut Core) + 'static) {
    let admin = core
        .remotes
        .controllers
        .get_mut(&id)
        .and_then(|remote| remote.admin.take());
    if let Some(key) = admin {
        admin::close(core, key);
    }
    core.on_all_cores(
        move |core| {
            let Some(path) = core.remotes.paths.get_mut(&id) else {
                return;
            };
            path.up = false;
            let (queue, opening) = (path.queue.take(), path.opening.take());
            if let Some(queue) = queue {
                initiator::close(core, queue);
            }
            if let Some((acknowledgement, _)) = opening {
                acknowledgement.send(core);
            }
        },
        then,
    );
}

/// News of a controller's admin queue, on core 0.
pub fn admin_event(core: &mut Core, id: u32, key: ControllerKey, change: &ControllerEvent) {
    let current = core
        .remotes
        .controllers
        .get(&id)
        .is_some_and(|remote| remote.admin == Some(key));
    if !current {
        return;
    }
    match change {
        ControllerEvent::Ready => {
            check_namespaces(core, id, key, move |core| open_queues(core, id, key));
        }
        ControllerEvent::NamespacesChanged => check_namespaces(core, id, key, move |core| {
            register_namespaces(core, id, key);
        }),
        ControllerEvent::Failed(error) => lost(core, id, Some(key), error),
    }
}

fn open_queues(core: &mut Core, id: u32, key: ControllerKey) {
    let Some(controller) = core.admins.controller(key) else {
        return;
    };
    let info = controller.info();
    let cores = core.cores;
    if usize::from(info.io_queues) < cores {
        let text = format!(
            "the controller grants {} I/O queues, {cores} are needed (one per core)",
            info.io_queues
        );
        return lost(core, id, Some(key), &InitiatorError::Unusable(text));
    }
    let limit = info.max_transfer_bytes.unwrap_or(TRANSFER_MAX_BYTES);
    let max_transfer_bytes = limit.min(TRANSFER_MAX_BYTES);
    let queues: Vec<QueueParameters> = (0..cores)
        .map(|core| controller.io_queue_parameters(core as u16 + 1))
        .collect();
    let Some(remote) = core.remotes.controllers.get(&id) else {
        return;
    };
    let address = remote.address;
    let connect_timeout_ms = remote.parameters.connect_timeout_ms;
    let up = Arc::new(AtomicUsize::new(0));
    let all_up = up.clone();
    core.on_all_cores_later(
        move |core, acknowledgement| {
            let parameters = OpenParameters {
                address,
                queue: queues[core.index].clone(),
                connect_timeout_ms,
            };
            let queue = initiator::open(core, parameters, QueueOwner::Remote(id));
            let path = core.remotes.paths.entry(id).or_insert_with(|| Path {
                admin: key,
                queue: None,
                up: false,
                max_transfer_bytes,
                opening: None,
                waiting: VecDeque::new(),
            });
            path.admin = key;
            path.max_transfer_bytes = max_transfer_bytes;
            match queue {
                Ok(queue) => {
                    path.queue = Some(queue);
                    path.opening = Some((acknowledgement, up.clone()));
                }
                Err(error) => {
                    tracing::warn!("I/O queue to {address}: {error}");
                    acknowledgement.send(core);
                }
            }
        },
        move |core| {
            let Some(remote) = core.remotes.controllers.get_mut(&id) else {
                return;
            };
            if remote.admin != Some(key) {
                return;
            }
            if all_up.load(Ordering::Acquire) < core.cores {
                let text = "not all I/O queues could be connected".to_owned();
                return lost(core, id, Some(key), &InitiatorError::Unusable(text));
            }
            remote.state = RemoteState::Enabled;
            register_namespaces(core, id, key);
        },
    );
}

/// News of this core's queue to a controller.
pub fn queue_event(core: &mut Core, id: u32, queue: QueueKey, change: &QueueChange) {
    let Some(path) = core.remotes.paths.get_mut(&id) else {
        return;
    };
    if path.queue != Some(queue) {
        return;
    }
    let opening = path.opening.take();
    match change {
        QueueChange::Up { .. } => {
            path.up = true;
            if let Some((acknowledgement, up)) = opening {
                up.fetch_add(1, Ordering::AcqRel);
                acknowledgement.send(core);
            }
        }
        QueueChange::Down { error } => {
            path.up = false;
            path.queue = None;
            if let Some((acknowledgement, _)) = opening {
                acknowledgement.send(core);
                return;
            }
            let (error, admin) = (error.clone(), path.admin);
            let tell = move |core: &mut Core| lost(core, id, Some(admin), &error);
            core.send(0, Message::Call(Box::new(tell)));
        }
    }
}

/// Compares what the controller has now with what the bdevs were made of, before any I/O. A namespace id can
/// stand for another disk after a reconnect: a bdev whose disk is not there answers ENXIO on every core when
/// `then` is called, and is itself again when its disk returns.
fn check_namespaces(
    core: &mut Core,
    id: u32,
    key: ControllerKey,
    then: impl FnOnce(&mut Core) + 'static,
) {
    let (Some(controller), Some(remote)) = (
        core.admins.controller(key),
        core.remotes.controllers.get(&id),
    ) else {
        return;
    };
    let listed = &controller.info().namespaces;
    let place = |(known, bdev): &(RemoteNamespace, BdevId)| {
        let now = listed.iter().find(|now| now.is_same_disk(known));
        if now.is_none() {
            tracing::warn!("namespace {} of {} is gone", known.nsid, remote.name);
        }
        let place = Place {
            controller: id,
            namespace_id: known.nsid,
            present: now.is_some(),
            deallocates: now.unwrap_or(known).write_zeroes_deallocates,
        };
        (*bdev, place)
    };
    let places: Vec<(BdevId, Place)> = remote.bdevs.iter().map(place).collect();
    core.on_all_cores(
        move |core| {
            for (bdev, place) in &places {
                if let Some(bdev) = core.bdevs.get_mut(*bdev) {
                    bdev.kind = BdevKind::Nvme(*place);
                }
            }
        },
        then,
    );
}

/// Makes bdevs of namespaces that have none yet, and deletes those whose disk is gone. One that something
/// else holds stays, without its disk.
fn register_namespaces(core: &mut Core, id: u32, key: ControllerKey) {
    let Some(controller) = core.admins.controller(key) else {
        return;
    };
    let listed = controller.info().namespaces.clone();
    let Some(remote) = core.remotes.controllers.get_mut(&id) else {
        return;
    };
    let registry = &core.registry;
    let mut gone = Vec::new();
    remote.bdevs.retain(|(known, bdev)| {
        let is_there = listed.iter().any(|now| now.is_same_disk(known));
        let holder = registry
            .get(*bdev)
            .and_then(|entry| entry.claimed_by.as_deref());
        let stays = is_there || holder.is_some_and(|holder| holder != target::CLAIMANT);
        if !stays {
            gone.push(*bdev);
        }
        stays
    });
    let has_bdev = |nsid| remote.bdevs.iter().any(|(known, _)| known.nsid == nsid);
    let new: Vec<RemoteNamespace> = listed
        .into_iter()
        .filter(|namespace| !has_bdev(namespace.nsid))
        .collect();
    delete_bdevs(core, gone, move |core| register_next(core, id, new));
}

fn register_next(core: &mut Core, id: u32, mut new: Vec<RemoteNamespace>) {
    let Some(remote) = core.remotes.controllers.get_mut(&id) else {
        return;
    };
    if new.is_empty() {
        let Some(then) = remote.attaching.take() else {
            return;
        };
        let bdevs = remote.bdevs.clone();
        let names = bdevs
            .iter()
            .filter_map(|(_, bdev)| core.registry.get(*bdev))
            .map(|entry| entry.name.clone())
            .collect();
        return then(core, Ok(names));
    }
    let namespace = new.remove(0);
    let uuid = Uuid::from_bytes(namespace.uuid);
    let registration = Registration {
        name: format!("{}n{}", remote.name, namespace.nsid),
        aliases: Vec::new(),
        uuid: if uuid.is_nil() { Uuid::new_v4() } else { uuid },
        block_size: namespace.block_size,
        num_blocks: namespace.size_blocks,
        kind: BdevKind::Nvme(Place {
            controller: id,
            namespace_id: namespace.nsid,
            present: true,
            deallocates: namespace.write_zeroes_deallocates,
        }),
        origin: BdevOrigin::Nvme {
            controller: remote.name.clone(),
            namespace_id: namespace.nsid,
        },
    };
    registry::register(core, registration, move |core, result| {
        match (result, core.remotes.controllers.get_mut(&id)) {
            (Ok(bdev), Some(remote)) => remote.bdevs.push((namespace, bdev)),
            (Err(error), _) => tracing::warn!("namespace {}: {error}", namespace.nsid),
            _ => {}
        }
        register_next(core, id, new);
    });
}

#[cfg(test)]
mod tests;
