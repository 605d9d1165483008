//! The queue pairs from here to a peer's endpoint: an admin queue on core 0, which gives the controller, and one I/O
//! queue a core. A link is up when all of them are; when one is lost all are closed, and it is down when the last has
//! said so.

use std::net::{IpAddr, SocketAddr};

use uuid::Uuid;

use super::super::admin::{self, ControllerKey};
use super::super::core::Core;
use super::super::initiator::{self, OpenParameters, QueueChange, QueueKey, QueueOwner};
use super::super::nvme_tcp::controller::{ControllerEvent, ControllerParameters};
use super::context::{QUEUE_ENTRIES, Queue};
use super::{MANAGER_CORE, VolumeMessage, with};
use crate::engine::MAX_PEERS;
use crate::host::{PeerAddress, PeerSlot};
use crate::hosts::control::endpoint::{endpoint_nqn, host_id};

/// From the first packet to the answer of Connect.
const CONNECT_TIMEOUT_MS: u64 = 3000;

/// Core 0's knowledge of a volume's links.
#[derive(Default)]
pub(super) struct Links {
    pub(super) volume_uuid: Uuid,
    pub(super) node_id: u8,
    /// Node ids by slot; kept by the manager's report.
    slots: [Link; MAX_PEERS],
}

#[derive(Default)]
struct Link {
    generation: u32,
    address: Option<SocketAddr>,
    admin: Option<ControllerKey>,
    /// Queue pairs that have not said that they are down.
    open: usize,
    up: usize,
    closing: bool,
    reason: String,
}

/// Between core 0 and the others.
pub enum LinkMessage {
    /// Connect this core's queue.
    Open {
        slot: PeerSlot,
        generation: u32,
        parameters: Box<OpenParameters>,
    },
    Close {
        slot: PeerSlot,
        generation: u32,
    },
    /// To core 0: a queue of this link came up, or is gone.
    Up {
        slot: PeerSlot,
        generation: u32,
    },
    Down {
        slot: PeerSlot,
        generation: u32,
        reason: String,
    },
}

fn link_id(slot: PeerSlot, generation: u32) -> u64 {
    u64::from(generation) << 32 | slot as u64
}

/// The manager wants queue pairs to a peer; on core 0.
pub(super) fn open(core: &mut Core, volume: u32, slot: PeerSlot, address: &PeerAddress) {
    let io_queues = core.cores as u16;
    // Peers have buffers of their own beside those of hosts: the longest transfer is not kept waiting by any host.
    let in_capsule_bytes = core.target.state().options().max_io_size;
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    this.context.in_capsule_bytes = in_capsule_bytes;
    let peer = this
        .manager
        .as_ref()
        .and_then(|manager| manager.peer_node(slot))
        .unwrap_or_default();
    let links = &mut this.links;
    let link = &mut links.slots[slot];
    link.generation += 1;
    link.closing = false;
    link.open = 1;
    link.up = 0;
    link.admin = None;
    link.reason = String::new();
    let generation = link.generation;
    let ip: Result<IpAddr, _> = address.traddr.parse();
    let Ok(ip) = ip else {
        return queue_down(
            core,
            volume,
            slot,
            generation,
            format!("{} is no address", address.traddr),
        );
    };
    let parameters = ControllerParameters {
        subsystem_nqn: endpoint_nqn(&links.volume_uuid, peer),
        host_nqn: endpoint_nqn(&links.volume_uuid, links.node_id),
        host_id: host_id(&links.volume_uuid, links.node_id),
        // The engine pings.
        keep_alive_ms: 0,
        header_digest: address.header_digest,
        data_digest: address.data_digest,
        io_queues,
        io_entries: QUEUE_ENTRIES,
        connect_timeout_ms: CONNECT_TIMEOUT_MS,
    };
    let address = SocketAddr::new(ip, address.trsvcid);
    link.address = Some(address);
    let owner = QueueOwner::Volume {
        volume,
        link: link_id(slot, generation),
    };
    match admin::open(core, address, parameters, owner) {
        Ok(key) => {
            if let Some(this) = core.volumes.get_mut(volume) {
                this.links.slots[slot].admin = Some(key);
            }
        }
        Err(error) => queue_down(core, volume, slot, generation, error.to_string()),
    }
}

/// Closes what there is of a link; on core 0.
pub(super) fn close(core: &mut Core, volume: u32, slot: PeerSlot, reason: &str) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let link = &mut this.links.slots[slot];
    if link.closing || link.open == 0 {
        return;
    }
    link.closing = true;
    link.reason = reason.to_owned();
    let generation = link.generation;
    let admin = link.admin.take();
    for index in 0..core.cores {
        let message = LinkMessage::Close { slot, generation };
        core.send_volume(index, VolumeMessage::Link(volume, message));
    }
    if let Some(controller) = admin {
        admin::close(core, controller);
        queue_down(core, volume, slot, generation, reason.to_owned());
    }
}

pub(super) fn event(core: &mut Core, volume: u32, link: u64, queue: QueueKey, change: QueueChange) {
    let slot = (link & 0xff) as usize;
    let generation = (link >> 32) as u32;
    if slot >= MAX_PEERS {
        return;
    }
    match change {
        QueueChange::Up { .. } => {
            if let Some(this) = core.volumes.get_mut(volume)
                && let Some(own) = &mut this.context.queues[slot]
                && own.key == queue
            {
                own.is_up = true;
            }
            tell_core0(core, volume, LinkMessage::Up { slot, generation });
        }
        QueueChange::Down { error } => {
            if let Some(this) = core.volumes.get_mut(volume) {
                if this.context.queues[slot].is_some_and(|own| own.key == queue) {
                    this.context.queues[slot] = None;
                }
            }
            let reason = error.to_string();
            tell_core0(
                core,
                volume,
                LinkMessage::Down {
                    slot,
                    generation,
                    reason,
                },
            );
        }
    }
}

fn tell_core0(core: &mut Core, volume: u32, said: LinkMessage) {
    if core.index == MANAGER_CORE {
        message(core, volume, said);
    } else {
        core.send_volume(MANAGER_CORE, VolumeMessage::Link(volume, said));
    }
}

/// News of the admin queue.
pub(super) fn admin_event(
    core: &mut Core,
    volume: u32,
    link: u64,
    controller: ControllerKey,
    change: ControllerEvent,
) {
    let slot = (link & 0xff) as usize;
    let generation = (link >> 32) as u32;
    match change {
        ControllerEvent::Ready => open_queues(core, volume, slot, generation, controller),
        ControllerEvent::NamespacesChanged => {}
        ControllerEvent::Failed(error) => {
            let known = core.volumes.get_mut(volume).is_some_and(|this| {
                let own = &mut this.links.slots[slot].admin;
                own.take_if(|own| *own == controller).is_some()
            });
            if known {
                admin::close(core, controller);
                queue_down(core, volume, slot, generation, error.to_string());
            }
        }
    }
}

/// The controller is enabled: every core connects its queue.
fn open_queues(
    core: &mut Core,
    volume: u32,
    slot: PeerSlot,
    generation: u32,
    controller: ControllerKey,
) {
    let cores = core.cores;
    let granted = core.admins.controller(controller).map(|controller| {
        (
            controller.info().io_queues,
            controller.io_queue_parameters(1),
        )
    });
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let link = &mut this.links.slots[slot];
    let (Some((io_queues, mut queue)), Some(address)) = (granted, link.address) else {
        return;
    };
    if link.generation != generation || link.closing {
        return;
    }
    if usize::from(io_queues) < cores {
        let reason =
            format!("the peer grants {io_queues} queue pairs, this node has {cores} cores");
        return close(core, volume, slot, &reason);
    }
    link.open += cores;
    for index in 0..cores {
        queue.queue_id = index as u16 + 1;
        let message = LinkMessage::Open {
            slot,
            generation,
            parameters: Box::new(OpenParameters {
                address,
                queue: queue.clone(),
                connect_timeout_ms: CONNECT_TIMEOUT_MS,
            }),
        };
        core.send_volume(index, VolumeMessage::Link(volume, message));
    }
}

pub(super) fn message(core: &mut Core, volume: u32, message: LinkMessage) {
    match message {
        LinkMessage::Open {
            slot,
            generation,
            parameters,
        } => {
            let owner = QueueOwner::Volume {
                volume,
                link: link_id(slot, generation),
            };
            match initiator::open(core, *parameters, owner) {
                Ok(key) => {
                    if let Some(this) = core.volumes.get_mut(volume) {
                        this.context.queues[slot] = Some(Queue {
                            key,
                            generation,
                            is_up: false,
                            outstanding: 0,
                        });
                    }
                }
                Err(error) => tell_core0(
                    core,
                    volume,
                    LinkMessage::Down {
                        slot,
                        generation,
                        reason: error.to_string(),
                    },
                ),
            }
        }
        LinkMessage::Close { slot, generation } => {
            let queue = core
                .volumes
                .get_mut(volume)
                .and_then(|this| this.context.queues[slot]);
            if let Some(queue) = queue.filter(|queue| queue.generation == generation) {
                initiator::close(core, queue.key);
            }
        }
        LinkMessage::Up { slot, generation } => queue_up(core, volume, slot, generation),
        LinkMessage::Down {
            slot,
            generation,
            reason,
        } => queue_down(core, volume, slot, generation, reason),
    }
}

fn queue_up(core: &mut Core, volume: u32, slot: PeerSlot, generation: u32) {
    let cores = core.cores;
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let link = &mut this.links.slots[slot];
    if link.generation != generation || link.closing {
        return;
    }
    link.up += 1;
    if link.up == cores {
        with(core, volume, |this| {
            if let Some(manager) = &mut this.manager {
                manager.link_up(&mut this.context, slot);
            }
        });
    }
}

fn queue_down(core: &mut Core, volume: u32, slot: PeerSlot, generation: u32, reason: String) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let link = &mut this.links.slots[slot];
    if link.generation != generation || link.open == 0 {
        return;
    }
    link.open -= 1;
    if link.open > 0 {
        // One queue less is no link any more.
        return close(core, volume, slot, &reason);
    }
    let reason = if link.reason.is_empty() {
        reason
    } else {
        std::mem::take(&mut link.reason)
    };
    with(core, volume, |this| {
        if let Some(manager) = &mut this.manager {
            this.manager_stirred = true;
            manager.link_down(&mut this.context, slot, &reason);
        }
    });
}
