//! Controllers: which host is tied to which subsystem by which queues. Made by Connect, ended with the admin
//! queue; used by the target's connections under the state's lock. Knows no sockets.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::state::TargetState;
use super::subsystem::{ListenerAddress, Namespace};
use crate::hosts::embedded::nvme_tcp::command::DISCOVERY_NQN;
use crate::hosts::embedded::nvme_tcp::identify::DiscoveryEntry;

/// What the connections of one controller share.
#[derive(Default)]
pub(super) struct ControllerShared {
    /// The controller is gone: its connections close.
    pub closed: AtomicBool,
    /// Goes up with every controller reset: I/O queues of an older epoch close.
    pub io_epoch: AtomicU32,
    /// The host has switched the volatile write cache off: every write is made durable.
    pub write_through: AtomicBool,
}

pub(super) struct Controller {
    pub id: u16,
    /// None: the discovery subsystem.
    pub subsystem: Option<u64>,
    pub host_nqn: String,
    pub enabled: bool,
    /// I/O queue ids in use.
    pub queues: BTreeSet<u16>,
    pub shared: Arc<ControllerShared>,
}

/// A connection's tie to its controller.
#[derive(Clone)]
pub(super) struct ControllerLink {
    pub controller_id: u16,
    pub subsystem: Option<u64>,
    pub shared: Arc<ControllerShared>,
    pub generation: Arc<AtomicU64>,
    pub seen_generation: u64,
    pub io_epoch: u32,
    pub queue_id: u16,
    pub host_nqn: String,
}

/// Why a Connect is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectRefusal {
    UnknownSubsystem,
    HostNotAllowed,
    UnknownController,
    ControllerNotEnabled,
    QueueInUse,
    NoControllerFree,
}

/// What identifies a subsystem to a host.
pub(super) struct SubsystemIdentity {
    pub nqn: String,
    pub serial_number: String,
    pub model_number: String,
    pub max_namespaces: u32,
    pub ana_reporting: bool,
    pub ana_change_count: u64,
}

impl TargetState {
    /// Admin Connect: makes a controller.
    pub(super) fn connect_admin(
        &mut self,
        subsystem_nqn: &str,
        host_nqn: &str,
        listener: &ListenerAddress,
    ) -> Result<ControllerLink, ConnectRefusal> {
        let (id, subsystem, generation) = if subsystem_nqn == DISCOVERY_NQN {
            let first = self.next_discovery_controller.max(1);
            let id = self.free_controller_id(None, first, (1, 0xffef))?;
            self.next_discovery_controller = id.wrapping_add(1);
            (id, None, self.discovery_marker.clone())
        } else {
            let index = self
                .find(subsystem_nqn)
                .map_err(|_| ConnectRefusal::UnknownSubsystem)?;
            let Some(subsystem) = self.subsystems.get(index) else {
                return Err(ConnectRefusal::UnknownSubsystem);
            };
            if !subsystem.admits(host_nqn, listener) {
                return Err(ConnectRefusal::HostNotAllowed);
            }
            let parameters = &subsystem.parameters;
            let range = (parameters.min_cntlid, parameters.max_cntlid);
            let (key, generation) = (subsystem.id, subsystem.generation.clone());
            let id = self.free_controller_id(Some(key), subsystem.next_controller, range)?;
            if let Some(subsystem) = self.subsystems.get_mut(index) {
                subsystem.next_controller = id.wrapping_add(1);
            }
            (id, Some(key), generation)
        };
        let shared = Arc::<ControllerShared>::default();
        self.controllers.push(Controller {
            id,
            subsystem,
            host_nqn: host_nqn.into(),
            enabled: false,
            queues: BTreeSet::new(),
            shared: shared.clone(),
        });
        Ok(ControllerLink {
            controller_id: id,
            subsystem,
            shared,
            seen_generation: u64::MAX,
            generation,
            io_epoch: 0,
            queue_id: 0,
            host_nqn: host_nqn.into(),
        })
    }

    /// Next controller id that nobody has, beginning at `first`: an id is used again as late as possible.
    fn free_controller_id(
        &self,
        subsystem: Option<u64>,
        first: u16,
        (low, high): (u16, u16),
    ) -> Result<u16, ConnectRefusal> {
        let first = if (low..=high).contains(&first) {
            first
        } else {
            low
        };
        let used = |id: u16| {
            let same =
                |controller: &Controller| controller.id == id && controller.subsystem == subsystem;
            self.controllers.iter().any(same)
        };
        (first..=high)
            .chain(low..first)
            .find(|id| !used(*id))
            .ok_or(ConnectRefusal::NoControllerFree)
    }

    /// I/O Connect: adds a queue to a controller.
    pub(super) fn connect_io(
        &mut self,
        subsystem_nqn: &str,
        host_nqn: &str,
        listener: &ListenerAddress,
        controller_id: u16,
        queue_id: u16,
    ) -> Result<ControllerLink, ConnectRefusal> {
        let index = self
            .find(subsystem_nqn)
            .map_err(|_| ConnectRefusal::UnknownSubsystem)?;
        let Some(subsystem) = self.subsystems.get(index) else {
            return Err(ConnectRefusal::UnknownSubsystem);
        };
        if !subsystem.admits(host_nqn, listener) {
            return Err(ConnectRefusal::HostNotAllowed);
        }
        let key = Some(subsystem.id);
        let generation = subsystem.generation.clone();
        let controller = self
            .controllers
            .iter_mut()
            .find(|controller| controller.id == controller_id && controller.subsystem == key)
            .filter(|controller| controller.host_nqn == host_nqn)
            .filter(|controller| !controller.shared.closed.load(Ordering::Acquire))
            .ok_or(ConnectRefusal::UnknownController)?;
        if !controller.enabled {
            return Err(ConnectRefusal::ControllerNotEnabled);
        }
        if !controller.queues.insert(queue_id) {
            return Err(ConnectRefusal::QueueInUse);
        }
        Ok(ControllerLink {
            controller_id,
            subsystem: key,
            shared: controller.shared.clone(),
            seen_generation: u64::MAX,
            generation,
            io_epoch: controller.shared.io_epoch.load(Ordering::Acquire),
            queue_id,
            host_nqn: host_nqn.into(),
        })
    }

    /// A connection is gone. With the admin queue goes its controller.
    pub(super) fn disconnect(&mut self, link: &ControllerLink) {
        let Some(index) = self.controller_index(link) else {
            return;
        };
        if link.queue_id == 0 {
            link.shared.closed.store(true, Ordering::Release);
            self.controllers.swap_remove(index);
        } else if link.shared.io_epoch.load(Ordering::Acquire) == link.io_epoch {
            if let Some(controller) = self.controllers.get_mut(index) {
                controller.queues.remove(&link.queue_id);
            }
        }
    }

    fn controller_index(&self, link: &ControllerLink) -> Option<usize> {
        let is_it = |controller: &Controller| Arc::ptr_eq(&controller.shared, &link.shared);
        self.controllers.iter().position(is_it)
    }

    /// CC.EN went up or down, or the host shuts down. Down: the I/O queues are gone.
    pub(super) fn enable_controller(&mut self, link: &ControllerLink, enabled: bool) {
        let index = self.controller_index(link);
        if let Some(controller) = index.and_then(|index| self.controllers.get_mut(index)) {
            controller.enabled = enabled;
            if !enabled {
                controller.queues.clear();
                controller.shared.io_epoch.fetch_add(1, Ordering::Release);
            }
        }
    }

    /// Whether the controller has I/O queues.
    pub(super) fn has_io_queues(&self, link: &ControllerLink) -> bool {
        let index = self.controller_index(link);
        let controller = index.and_then(|index| self.controllers.get(index));
        controller.is_some_and(|controller| !controller.queues.is_empty())
    }

    /// Copies the namespaces for a connection and brings its generation up to date. False: the connection
    /// has no business here any more (subsystem deleted, listener or host removed).
    pub(super) fn refresh(
        &self,
        link: &mut ControllerLink,
        listener: &ListenerAddress,
        namespaces: &mut Vec<Option<Namespace>>,
    ) -> bool {
        let generation = link.generation.load(Ordering::Acquire);
        link.seen_generation = generation;
        let Some(id) = link.subsystem else {
            return true;
        };
        let Some(subsystem) = self.subsystems.iter().find(|subsystem| subsystem.id == id) else {
            return false;
        };
        namespaces.clone_from(&subsystem.namespaces);
        subsystem.admits(&link.host_nqn, listener)
    }

    /// What Identify Controller says of the subsystem. None: it is gone.
    pub(super) fn identity(&self, link: &ControllerLink) -> Option<SubsystemIdentity> {
        let Some(id) = link.subsystem else {
            return Some(SubsystemIdentity {
                nqn: DISCOVERY_NQN.into(),
                serial_number: String::new(),
                model_number: "bdev_repl discovery".into(),
                max_namespaces: 0,
                ana_reporting: false,
                ana_change_count: 0,
            });
        };
        let subsystem = self
            .subsystems
            .iter()
            .find(|subsystem| subsystem.id == id)?;
        let parameters = &subsystem.parameters;
        Some(SubsystemIdentity {
            nqn: parameters.nqn.clone(),
            serial_number: parameters.serial_number.clone(),
            model_number: parameters.model_number.clone(),
            max_namespaces: parameters.max_namespaces,
            ana_reporting: parameters.ana_reporting,
            ana_change_count: subsystem.ana_change_count,
        })
    }

    /// GENCTR and the entries of the discovery log page, as this host may see them.
    pub(super) fn discovery_log(&self, host_nqn: &str) -> (u64, Vec<DiscoveryEntry>) {
        let mut entries = Vec::new();
        for subsystem in &self.subsystems {
            if !subsystem.parameters.allow_any_host && !subsystem.hosts.contains(host_nqn) {
                continue;
            }
            for (port, listener) in subsystem.listeners.iter().enumerate() {
                entries.push(DiscoveryEntry {
                    transport_type: 3,
                    address_family: if listener.adrfam.eq_ignore_ascii_case("ipv6") {
                        2
                    } else {
                        1
                    },
                    subsystem_type: 2,
                    port_id: port as u16,
                    service: listener.trsvcid.clone(),
                    subsystem_nqn: subsystem.parameters.nqn.clone(),
                    address: listener.traddr.clone(),
                });
            }
        }
        (self.discovery_generation, entries)
    }
}
