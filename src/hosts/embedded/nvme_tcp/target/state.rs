//! What all cores share of the target: subsystems, their namespaces, listeners and hosts, and the
//! controllers. Changed by RPCs, Connect and admin commands under one lock; I/O paths only compare a
//! generation counter. Knows no sockets.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::TargetOptions;
use super::association::Controller;
use super::subsystem::{
    AnaState, ListenerAddress, Namespace, NamespaceParameters, SubsystemParameters,
    SubsystemSummary, TargetError,
};
use crate::hosts::embedded::nvme_tcp::command::{DISCOVERY_NQN, NQN_BYTES_MAX};

/// Most namespaces that a subsystem may be given room for.
const NAMESPACES_MAX: u32 = 1024;

pub(super) struct Subsystem {
    pub id: u64,
    pub parameters: SubsystemParameters,
    pub listeners: Vec<ListenerAddress>,
    pub hosts: BTreeSet<String>,
    /// Index is NSID - 1.
    pub namespaces: Vec<Option<Namespace>>,
    /// Goes up with every change that a connection must notice.
    pub generation: Arc<AtomicU64>,
    pub ana_change_count: u64,
    pub next_controller: u16,
}

impl Subsystem {
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub fn admits(&self, host_nqn: &str, listener: &ListenerAddress) -> bool {
        (self.parameters.allow_any_host || self.hosts.contains(host_nqn))
            && self.listeners.iter().any(|at| at.is_same_place(listener))
    }
}

/// The shared state of a target.
pub struct TargetState {
    pub(super) options: TargetOptions,
    pub(super) subsystems: Vec<Subsystem>,
    pub(super) next_subsystem: u64,
    pub(super) controllers: Vec<Controller>,
    pub(super) next_discovery_controller: u16,
    /// GENCTR of the discovery log page.
    pub(super) discovery_generation: u64,
    /// The discovery subsystem has no namespaces, and nothing of it changes.
    pub(super) discovery_marker: Arc<AtomicU64>,
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

    /// The first namespace that is `wanted` of a subsystem that listens at `at`, and whether its ANA state is shown.
    pub fn namespace_at(
        &self,
        nqn: &str,
        at: &ListenerAddress,
        wanted: impl Fn(&Namespace) -> bool,
    ) -> Option<(Namespace, bool)> {
        let subsystem = self.subsystems.get(self.find(nqn).ok()?)?;
        let listens = subsystem
            .listeners
            .iter()
            .any(|listener| listener.is_same_place(at));
        let namespace = subsystem
            .namespaces
            .iter()
            .flatten()
            .find(|namespace| wanted(namespace))
            .filter(|_| listens)?;
        Some((*namespace, subsystem.parameters.ana_reporting))
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

    pub(super) fn find(&self, nqn: &str) -> Result<usize, TargetError> {
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
