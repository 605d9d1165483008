//! What all cores share of the target: subsystems, their namespaces, listeners and hosts, and the
//! controllers. Changed by RPCs, Connect and admin commands under one lock; I/O paths only compare a
//! generation counter. Knows no sockets.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::{NamespaceHandle, TargetOptions};
use crate::hosts::embedded::nvme_tcp::command::{DISCOVERY_NQN, NQN_BYTES_MAX};
use crate::hosts::embedded::nvme_tcp::identify::DiscoveryEntry;

/// Most namespaces that a subsystem may be given room for.
const NAMESPACES_MAX: u32 = 1024;

/// Why a change was refused; nothing has been changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TargetError {
    #[error("{what} {name} already exists")]
    Exists { what: &'static str, name: String },
    #[error("{what} {name} does not exist")]
    NotFound { what: &'static str, name: String },
    #[error("{what} {name}: {reason}")]
    Invalid {
        what: &'static str,
        name: String,
        reason: String,
    },
}

/// Asymmetric namespace access state, as on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AnaState {
    Optimized = 0x01,
    NonOptimized = 0x02,
    Inaccessible = 0x03,
}

/// Where a subsystem can be reached; SPDK's words.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListenerAddress {
    /// "TCP".
    pub trtype: String,
    /// "IPv4" or "IPv6".
    pub adrfam: String,
    pub traddr: String,
    pub trsvcid: String,
}

impl ListenerAddress {
    /// A TCP listener at this address; the family is read off the address.
    pub fn tcp(traddr: &str, trsvcid: &str) -> ListenerAddress {
        ListenerAddress {
            trtype: "TCP".into(),
            adrfam: if traddr.contains(':') { "IPv6" } else { "IPv4" }.into(),
            traddr: traddr.into(),
            trsvcid: trsvcid.into(),
        }
    }

    fn is_same_place(&self, other: &ListenerAddress) -> bool {
        self.traddr == other.traddr && self.trsvcid == other.trsvcid
    }
}

/// What a subsystem is created with; the names are those of SPDK's nvmf_create_subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemParameters {
    pub nqn: String,
    pub serial_number: String,
    pub model_number: String,
    /// 0 means SPDK's default of 32.
    pub max_namespaces: u32,
    pub allow_any_host: bool,
    pub min_cntlid: u16,
    pub max_cntlid: u16,
    pub ana_reporting: bool,
}

impl SubsystemParameters {
    /// SPDK's defaults.
    pub fn new(nqn: &str) -> SubsystemParameters {
        SubsystemParameters {
            nqn: nqn.into(),
            serial_number: "00000000000000000000".into(),
            model_number: "SPDK bdev Controller".into(),
            max_namespaces: 32,
            allow_any_host: false,
            min_cntlid: 1,
            max_cntlid: 0xffef,
            ana_reporting: false,
        }
    }
}

/// What a namespace is added with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceParameters {
    /// The lowest free one if not given.
    pub nsid: Option<u32>,
    pub handle: NamespaceHandle,
    /// Bytes: a power of two from 512 to 65536.
    pub block_size: u32,
    pub size_blocks: u64,
    pub nguid: [u8; 16],
    pub uuid: [u8; 16],
    pub eui64: [u8; 8],
    /// Refuses everything but vendor specific commands (the endpoint of a peer).
    pub vendor_only: bool,
}

/// A namespace as connections see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub nsid: u32,
    pub handle: NamespaceHandle,
    pub block_size: u32,
    pub size_blocks: u64,
    pub nguid: [u8; 16],
    pub uuid: [u8; 16],
    pub eui64: [u8; 8],
    pub vendor_only: bool,
    pub ana_state: AnaState,
}

/// A subsystem as nvmf_get_subsystems shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemSummary {
    pub parameters: SubsystemParameters,
    pub listeners: Vec<ListenerAddress>,
    pub hosts: Vec<String>,
    pub namespaces: Vec<Namespace>,
    /// CNTLID and host NQN of every controller.
    pub controllers: Vec<(u16, String)>,
}

struct Subsystem {
    id: u64,
    parameters: SubsystemParameters,
    listeners: Vec<ListenerAddress>,
    hosts: BTreeSet<String>,
    /// Index is NSID - 1.
    namespaces: Vec<Option<Namespace>>,
    /// Goes up with every change that a connection must notice.
    generation: Arc<AtomicU64>,
    ana_change_count: u64,
    next_controller: u16,
}

impl Subsystem {
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn admits(&self, host_nqn: &str, listener: &ListenerAddress) -> bool {
        (self.parameters.allow_any_host || self.hosts.contains(host_nqn))
            && self.listeners.iter().any(|at| at.is_same_place(listener))
    }
}

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

struct Controller {
    id: u16,
    /// None: the discovery subsystem.
    subsystem: Option<u64>,
    host_nqn: String,
    enabled: bool,
    /// I/O queue ids in use.
    queues: BTreeSet<u16>,
    shared: Arc<ControllerShared>,
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

/// The shared state of a target.
pub struct TargetState {
    options: TargetOptions,
    subsystems: Vec<Subsystem>,
    next_subsystem: u64,
    controllers: Vec<Controller>,
    next_discovery_controller: u16,
    /// GENCTR of the discovery log page.
    discovery_generation: u64,
    /// The discovery subsystem has no namespaces, and nothing of it changes.
    discovery_marker: Arc<AtomicU64>,
}

/// How the cores hold the state.
pub type SharedTarget = Arc<Mutex<TargetState>>;

/// The lock, also after a thread has died holding it: every change is made at the end, in one step.
pub(super) fn lock(target: &SharedTarget) -> MutexGuard<'_, TargetState> {
    target.lock().unwrap_or_else(PoisonError::into_inner)
}

fn invalid(what: &'static str, name: impl ToString, reason: impl ToString) -> TargetError {
    TargetError::Invalid {
        what,
        name: name.to_string(),
        reason: reason.to_string(),
    }
}

/// NQN rules of NVMe Base ("NVMe Qualified Names"), as far as they protect us.
fn check_nqn(what: &'static str, nqn: &str) -> Result<(), TargetError> {
    if nqn.len() > NQN_BYTES_MAX {
        return Err(invalid(what, nqn, "longer than 223 bytes"));
    }
    if !nqn.starts_with("nqn.") || nqn.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(invalid(
            what,
            nqn,
            "an NQN looks like nqn.2016-06.io.spdk:name",
        ));
    }
    Ok(())
}

impl TargetState {
    pub fn new(options: TargetOptions) -> SharedTarget {
        Arc::new(Mutex::new(TargetState {
            options: options.normalised(),
            subsystems: Vec::new(),
            next_subsystem: 1,
            controllers: Vec::new(),
            next_discovery_controller: 1,
            discovery_generation: 0,
            discovery_marker: Arc::default(),
        }))
    }

    pub fn options(&self) -> TargetOptions {
        self.options
    }

    /// For connections accepted from now on.
    pub fn set_options(&mut self, options: TargetOptions) {
        self.options = options.normalised();
    }

    pub fn create_subsystem(
        &mut self,
        mut parameters: SubsystemParameters,
    ) -> Result<(), TargetError> {
        let what = "subsystem";
        let nqn = parameters.nqn.clone();
        check_nqn(what, &nqn)?;
        if nqn == DISCOVERY_NQN || self.find(&nqn).is_ok() {
            return Err(TargetError::Exists { what, name: nqn });
        }
        if parameters.max_namespaces == 0 {
            parameters.max_namespaces = 32;
        }
        if parameters.max_namespaces > NAMESPACES_MAX {
            return Err(invalid(what, nqn, "max_namespaces is at most 1024"));
        }
        if parameters.serial_number.len() > 20 || !parameters.serial_number.is_ascii() {
            return Err(invalid(
                what,
                nqn,
                "serial_number is at most 20 ASCII characters",
            ));
        }
        if parameters.model_number.len() > 40 || !parameters.model_number.is_ascii() {
            return Err(invalid(
                what,
                nqn,
                "model_number is at most 40 ASCII characters",
            ));
        }
        let (low, high) = (parameters.min_cntlid, parameters.max_cntlid);
        if low == 0 || low > high || high > 0xffef {
            return Err(invalid(what, nqn, "cntlid range must lie in 1 to 65519"));
        }
        self.subsystems.push(Subsystem {
            id: self.next_subsystem,
            listeners: Vec::new(),
            hosts: BTreeSet::new(),
            namespaces: vec![None; parameters.max_namespaces as usize],
            generation: Arc::default(),
            ana_change_count: 0,
            next_controller: low,
            parameters,
        });
        self.next_subsystem += 1;
        self.discovery_generation += 1;
        Ok(())
    }

    /// Its connections close when their cores look next.
    pub fn delete_subsystem(&mut self, nqn: &str) -> Result<(), TargetError> {
        let index = self.find(nqn)?;
        let subsystem = self.subsystems.swap_remove(index);
        for controller in &self.controllers {
            if controller.subsystem == Some(subsystem.id) {
                controller.shared.closed.store(true, Ordering::Release);
            }
        }
        subsystem.changed();
        self.discovery_generation += 1;
        Ok(())
    }

    /// Returns the NSID.
    pub fn add_namespace(
        &mut self,
        nqn: &str,
        parameters: NamespaceParameters,
    ) -> Result<u32, TargetError> {
        let what = "namespace";
        let subsystem = self.find_mut(nqn)?;
        let nsid = match parameters.nsid {
            Some(nsid) => nsid,
            None => subsystem
                .namespaces
                .iter()
                .position(Option::is_none)
                .map(|index| index as u32 + 1)
                .ok_or_else(|| invalid(what, nqn, "the subsystem has no namespace id left"))?,
        };
        let block_size = parameters.block_size;
        if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
            return Err(invalid(
                what,
                nsid,
                "block size must be a power of two, 512 to 65536",
            ));
        }
        let place = (nsid as usize)
            .checked_sub(1)
            .and_then(|index| subsystem.namespaces.get_mut(index))
            .ok_or_else(|| invalid(what, nsid, "not in 1 to max_namespaces"))?;
        if place.is_some() {
            let name = nsid.to_string();
            return Err(TargetError::Exists { what, name });
        }
        *place = Some(Namespace {
            nsid,
            handle: parameters.handle,
            block_size,
            size_blocks: parameters.size_blocks,
            nguid: parameters.nguid,
            uuid: parameters.uuid,
            eui64: parameters.eui64,
            vendor_only: parameters.vendor_only,
            ana_state: AnaState::Optimized,
        });
        subsystem.changed();
        Ok(nsid)
    }

    /// I/O that is on its way may still reach the backend; it is the backend's to refuse.
    pub fn remove_namespace(&mut self, nqn: &str, nsid: u32) -> Result<(), TargetError> {
        let subsystem = self.find_mut(nqn)?;
        *Self::namespace_mut(subsystem, nsid)? = None;
        subsystem.changed();
        Ok(())
    }

    /// The namespace behind has another size now; hosts are told.
    pub fn resize_namespace(
        &mut self,
        nqn: &str,
        nsid: u32,
        size_blocks: u64,
    ) -> Result<(), TargetError> {
        let subsystem = self.find_mut(nqn)?;
        if let Some(namespace) = Self::namespace_mut(subsystem, nsid)? {
            namespace.size_blocks = size_blocks;
        }
        subsystem.changed();
        Ok(())
    }

    /// Only shown to hosts if the subsystem has `ana_reporting`.
    pub fn set_ana_state(
        &mut self,
        nqn: &str,
        nsid: u32,
        state: AnaState,
    ) -> Result<(), TargetError> {
        let subsystem = self.find_mut(nqn)?;
        if let Some(namespace) = Self::namespace_mut(subsystem, nsid)? {
            namespace.ana_state = state;
        }
        subsystem.ana_change_count += 1;
        subsystem.changed();
        Ok(())
    }

    pub fn add_listener(&mut self, nqn: &str, address: ListenerAddress) -> Result<(), TargetError> {
        let subsystem = self.find_mut(nqn)?;
        if subsystem
            .listeners
            .iter()
            .any(|at| at.is_same_place(&address))
        {
            return Err(TargetError::Exists {
                what: "listener",
                name: format!("{}:{}", address.traddr, address.trsvcid),
            });
        }
        subsystem.listeners.push(address);
        self.discovery_generation += 1;
        Ok(())
    }

    /// Connections of this subsystem that came in there close. Returns whether another subsystem still
    /// listens at that address.
    pub fn remove_listener(
        &mut self,
        nqn: &str,
        address: &ListenerAddress,
    ) -> Result<bool, TargetError> {
        let subsystem = self.find_mut(nqn)?;
        let before = subsystem.listeners.len();
        subsystem.listeners.retain(|at| !at.is_same_place(address));
        if subsystem.listeners.len() == before {
            return Err(TargetError::NotFound {
                what: "listener",
                name: format!("{}:{}", address.traddr, address.trsvcid),
            });
        }
        subsystem.changed();
        self.discovery_generation += 1;
        Ok(self.is_listening(address))
    }

    /// Whether any subsystem listens at this address.
    pub fn is_listening(&self, address: &ListenerAddress) -> bool {
        let mut listeners = self
            .subsystems
            .iter()
            .flat_map(|subsystem| &subsystem.listeners);
        listeners.any(|at| at.is_same_place(address))
    }

    pub fn add_host(&mut self, nqn: &str, host_nqn: &str) -> Result<(), TargetError> {
        check_nqn("host", host_nqn)?;
        if !self.find_mut(nqn)?.hosts.insert(host_nqn.into()) {
            return Err(TargetError::Exists {
                what: "host",
                name: host_nqn.into(),
            });
        }
        Ok(())
    }

    /// Its connections close, unless any host is allowed.
    pub fn remove_host(&mut self, nqn: &str, host_nqn: &str) -> Result<(), TargetError> {
        let subsystem = self.find_mut(nqn)?;
        if !subsystem.hosts.remove(host_nqn) {
            return Err(TargetError::NotFound {
                what: "host",
                name: host_nqn.into(),
            });
        }
        subsystem.changed();
        Ok(())
    }

    pub fn allow_any_host(&mut self, nqn: &str, allow: bool) -> Result<(), TargetError> {
        let subsystem = self.find_mut(nqn)?;
        subsystem.parameters.allow_any_host = allow;
        subsystem.changed();
        Ok(())
    }

    /// All subsystems but discovery, in order of creation.
    pub fn subsystems(&self) -> Vec<SubsystemSummary> {
        let mut ordered: Vec<&Subsystem> = self.subsystems.iter().collect();
        ordered.sort_by_key(|subsystem| subsystem.id);
        let summary = |subsystem: &Subsystem| SubsystemSummary {
            parameters: subsystem.parameters.clone(),
            listeners: subsystem.listeners.clone(),
            hosts: subsystem.hosts.iter().cloned().collect(),
            namespaces: subsystem.namespaces.iter().flatten().copied().collect(),
            controllers: self
                .controllers
                .iter()
                .filter(|controller| controller.subsystem == Some(subsystem.id))
                .map(|controller| (controller.id, controller.host_nqn.clone()))
                .collect(),
        };
        ordered.into_iter().map(summary).collect()
    }

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

    fn find(&self, nqn: &str) -> Result<usize, TargetError> {
        let is_it = |subsystem: &Subsystem| subsystem.parameters.nqn == nqn;
        self.subsystems
            .iter()
            .position(is_it)
            .ok_or_else(|| TargetError::NotFound {
                what: "subsystem",
                name: nqn.into(),
            })
    }

    fn find_mut(&mut self, nqn: &str) -> Result<&mut Subsystem, TargetError> {
        let is_it = |subsystem: &&mut Subsystem| subsystem.parameters.nqn == nqn;
        self.subsystems
            .iter_mut()
            .find(is_it)
            .ok_or_else(|| TargetError::NotFound {
                what: "subsystem",
                name: nqn.into(),
            })
    }

    fn namespace_mut(
        subsystem: &mut Subsystem,
        nsid: u32,
    ) -> Result<&mut Option<Namespace>, TargetError> {
        (nsid as usize)
            .checked_sub(1)
            .and_then(|index| subsystem.namespaces.get_mut(index))
            .filter(|namespace| namespace.is_some())
            .ok_or_else(|| TargetError::NotFound {
                what: "namespace",
                name: nsid.to_string(),
            })
    }
}
