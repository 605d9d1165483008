//! The ANA state of the listeners that the user has named follows the role, so that a host's multipath follows the
//! Primary. `role` says when a change must have been told; the poller of core 0 looks after the rest: listeners appear
//! later than their volume, and come back without their state.

use std::ffi::{CString, c_int, c_void};
use std::net::IpAddr;

use super::core::{Job, State, manager_core};
use super::node::Control;
use super::{endpoint, sys};
use crate::rpc::volume::{AnaListener, Transport};

/// Between two looks at listeners that are as they should be.
const LOOK_NS: u64 = 50_000_000;
/// How long a change of role waits for a subsystem that is busy.
const PATIENCE_NS: u64 = 2_000_000_000;
/// Until a listener whose state cannot be set is tried again.
const REFUSED_NS: u64 = 5_000_000_000;

/// What is known of the listeners of a volume.
#[derive(Default)]
pub struct Listeners {
    /// A state is being set.
    is_busy: bool,
    next_look_ns: u64,
    /// Those that SPDK has refused, until when.
    refused: Vec<(AnaListener, u64)>,
    /// What goes on when all have been told, or when their time is over.
    waiting: Vec<(u64, Job)>,
}

impl Listeners {
    /// The user has named others.
    pub fn changed(&mut self) {
        self.next_look_ns = 0;
        self.refused.clear();
    }
}

/// Runs `then` when the listeners that are there tell the role, or cannot be made to.
pub fn settle(state: &mut State, volume: u32, then: impl FnOnce(&mut State) + 'static) {
    let now_ns = super::context::now_ns();
    match state.node.control(volume) {
        Some(control) if control.ana.is_busy || !control.create.ana_listeners.is_empty() => {
            let until_ns = now_ns + PATIENCE_NS;
            control.ana.waiting.push((until_ns, Box::new(then)));
            control.ana.changed();
            look(state, volume);
        }
        _ => then(state),
    }
}

/// With each round of the poller.
pub fn poll(state: &mut State) {
    let now_ns = super::context::now_ns();
    for index in 0..state.node.controls.len() {
        let Some(control) = state.node.controls.get(index) else {
            return;
        };
        let has_some = !control.create.ana_listeners.is_empty() || !control.ana.waiting.is_empty();
        if has_some && !control.ana.is_busy && now_ns >= control.ana.next_look_ns {
            let volume = control.volume;
            look(state, volume);
        }
    }
}

/// Sets the first state that is not as it should be; with none left, goes on with what waits.
fn look(state: &mut State, volume: u32) {
    let now_ns = super::context::now_ns();
    let is_primary = state.is_primary(volume);
    let Some(control) = state.node.control(volume) else {
        return;
    };
    if control.ana.is_busy {
        return;
    }
    let wanted = if is_primary && !control.deleting && !control.is_demoting {
        sys::SPDK_NVME_ANA_OPTIMIZED_STATE
    } else {
        sys::SPDK_NVME_ANA_INACCESSIBLE_STATE
    };
    control.ana.next_look_ns = now_ns + LOOK_NS;
    control
        .ana
        .refused
        .retain(|(_, until_ns)| now_ns < *until_ns);
    match find_wrong(control, wanted) {
        None => {}
        Some(Wrong::Change(change)) => {
            control.ana.is_busy = true;
            return change.begin();
        }
        Some(Wrong::Refused(listener, why)) => {
            refuse(control, listener, &why);
            // The others are looked at in the next round.
            control.ana.next_look_ns = 0;
            return;
        }
    }
    for (_, then) in std::mem::take(&mut control.ana.waiting) {
        then(state);
    }
}

fn refuse(control: &mut Control, listener: AnaListener, why: &str) {
    tracing::error!(
        "hosts at {} of {} are not told the role of volume '{}': {why}",
        listener.address,
        listener.nqn,
        control.create.name
    );
    let until_ns = super::context::now_ns() + REFUSED_NS;
    control.ana.refused.push((listener, until_ns));
}

enum Wrong {
    Change(Box<Change>),
    Refused(AnaListener, String),
}

/// A state that is being set: what SPDK's callbacks need to go on.
struct Change {
    volume: u32,
    listener: AnaListener,
    subsystem: *mut sys::spdk_nvmf_subsystem,
    trid: sys::spdk_nvme_transport_id,
    group: u32,
    wanted: sys::spdk_nvme_ana_state,
    outcome: Result<(), Failure>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The subsystem changes its state for somebody else.
    Busy,
    Refused(c_int),
}

/// The first of the volume's listeners whose state is another than `wanted`.
fn find_wrong(control: &Control, wanted: sys::spdk_nvme_ana_state) -> Option<Wrong> {
    let target = endpoint::target();
    if target.is_null() {
        return None;
    }
    for listener in &control.create.ana_listeners {
        if control
            .ana
            .refused
            .iter()
            .any(|(other, _)| other == listener)
        {
            continue;
        }
        let Ok(nqn) = CString::new(listener.nqn.as_str()) else {
            continue;
        };
        // SAFETY: on the application's thread, where subsystems, listeners and namespaces come and go.
        unsafe {
            let subsystem = sys::spdk_nvmf_tgt_find_subsystem(target, nqn.as_ptr());
            if subsystem.is_null() {
                continue;
            }
            let Some(trid) = find_listener(subsystem, listener) else {
                continue;
            };
            let group = listener.anagrpid;
            let Some(group) = group.or_else(|| group_of(subsystem, &control.create.name)) else {
                continue;
            };
            let mut shown = 0;
            let result =
                sys::spdk_nvmf_subsystem_get_ana_state(subsystem, trid, group, &raw mut shown);
            if result != 0 {
                let why = format!(
                    "the subsystem must be created with ana_reporting and have an ANA group {group}"
                );
                return Some(Wrong::Refused(listener.clone(), why));
            }
            if shown != wanted {
                return Some(Wrong::Change(Box::new(Change {
                    volume: control.volume,
                    listener: listener.clone(),
                    subsystem,
                    trid: *trid,
                    group,
                    wanted,
                    outcome: Ok(()),
                })));
            }
        }
    }
    None
}

/// # Safety
/// The subsystem lives.
unsafe fn find_listener(
    subsystem: *mut sys::spdk_nvmf_subsystem,
    wanted: &AnaListener,
) -> Option<*const sys::spdk_nvme_transport_id> {
    let transport = match wanted.transport {
        Transport::Tcp => sys::SPDK_NVME_TRANSPORT_TCP,
        Transport::Rdma => sys::SPDK_NVME_TRANSPORT_RDMA,
    };
    // SAFETY: the caller's word; a listener keeps its address.
    unsafe {
        let mut listener = sys::spdk_nvmf_subsystem_get_first_listener(subsystem);
        while !listener.is_null() {
            let trid = sys::spdk_nvmf_subsystem_listener_get_trid(listener);
            let address = sys::text((*trid).traddr.as_ptr()).parse::<IpAddr>();
            let port = sys::text((*trid).trsvcid.as_ptr()).parse::<u16>();
            if (*trid).trtype == transport
                && address == Ok(wanted.address.traddr)
                && port == Ok(wanted.address.trsvcid)
            {
                return Some(trid);
            }
            listener = sys::spdk_nvmf_subsystem_get_next_listener(subsystem, listener);
        }
    }
    None
}

/// The ANA group of the namespace that a bdev is.
///
/// # Safety
/// The subsystem lives.
unsafe fn group_of(subsystem: *mut sys::spdk_nvmf_subsystem, bdev: &str) -> Option<u32> {
    // SAFETY: the caller's word; the bdev of a namespace lives.
    unsafe {
        let mut namespace = sys::spdk_nvmf_subsystem_get_first_ns(subsystem);
        while !namespace.is_null() {
            let own = sys::spdk_nvmf_ns_get_bdev(namespace);
            if !own.is_null() && sys::text(sys::spdk_bdev_get_name(own)) == bdev {
                let mut options = sys::nvmf_ns_opts();
                let size = size_of_val(&options);
                sys::spdk_nvmf_ns_get_opts(namespace, &raw mut options, size);
                return Some(options.anagrpid);
            }
            namespace = sys::spdk_nvmf_subsystem_get_next_ns(subsystem, namespace);
        }
    }
    None
}

impl Change {
    /// SPDK wants the subsystem paused. No namespace needs to be: I/O goes on.
    fn begin(self: Box<Self>) {
        let subsystem = self.subsystem;
        let this = Box::into_raw(self);
        // SAFETY: found just now; the callback takes the box back.
        let result =
            unsafe { sys::spdk_nvmf_subsystem_pause(subsystem, 0, Some(paused), this.cast()) };
        if result != 0 {
            // SAFETY: refused, so the callback will not come.
            unsafe { Box::from_raw(this) }.end(Err(Failure::Busy));
        }
    }

    /// Has the subsystem go on. What others do with it meanwhile is not known: so it is done here and now.
    fn resume(self: Box<Self>) {
        let subsystem = self.subsystem;
        let this = Box::into_raw(self);
        // SAFETY: a subsystem that is paused is not destroyed; the callback takes the box back.
        let result =
            unsafe { sys::spdk_nvmf_subsystem_resume(subsystem, Some(resumed), this.cast()) };
        if result == 0 {
            return;
        }
        // SAFETY: refused, so the callback will not come.
        let this = unsafe { Box::from_raw(this) };
        if result == -libc::ENOMEM {
            // It must not stay paused.
            return on_core_0(move |state| {
                state.node.deferred.push(Box::new(move |_| this.resume()));
            });
        }
        this.end(Err(Failure::Refused(result)));
    }

    fn end(self: Box<Self>, outcome: Result<(), Failure>) {
        on_core_0(move |state| ended(state, *self, outcome));
    }
}

fn on_core_0(job: impl FnOnce(&mut State) + 'static) {
    if let Some(core) = manager_core() {
        core.send(job);
    }
}

unsafe extern "C" fn paused(
    subsystem: *mut sys::spdk_nvmf_subsystem,
    change: *mut c_void,
    result: c_int,
) {
    // SAFETY: the box of `begin`.
    let change = unsafe { Box::from_raw(change.cast::<Change>()) };
    if result != 0 {
        return change.end(Err(Failure::Busy));
    }
    let (group, wanted) = (change.group, change.wanted);
    let change = Box::into_raw(change);
    // SAFETY: paused now, and until this function returns; the callback takes the box back.
    unsafe {
        sys::spdk_nvmf_subsystem_set_ana_state(
            subsystem,
            &raw const (*change).trid,
            wanted,
            group,
            Some(set),
            change.cast(),
        );
    }
}

unsafe extern "C" fn set(change: *mut c_void, result: c_int) {
    // SAFETY: the box of `paused`.
    let mut change = unsafe { Box::from_raw(change.cast::<Change>()) };
    if result != 0 {
        change.outcome = Err(Failure::Refused(result));
    }
    change.resume();
}

unsafe extern "C" fn resumed(_: *mut sys::spdk_nvmf_subsystem, change: *mut c_void, result: c_int) {
    // SAFETY: the box of `resume`.
    let change = unsafe { Box::from_raw(change.cast::<Change>()) };
    if result != 0 {
        tracing::error!(
            "subsystem {} does not go on after its ANA state was set: {result}",
            change.listener.nqn
        );
    }
    let outcome = change.outcome;
    change.end(outcome);
}

fn ended(state: &mut State, change: Change, outcome: Result<(), Failure>) {
    let Change {
        volume, listener, ..
    } = change;
    let now_ns = super::context::now_ns();
    let Some(control) = state.node.control(volume) else {
        return;
    };
    control.ana.is_busy = false;
    match outcome {
        Ok(()) => {
            let told = if change.wanted == sys::SPDK_NVME_ANA_OPTIMIZED_STATE {
                "optimized"
            } else {
                "inaccessible"
            };
            tracing::info!(
                "hosts at {} of {} are told: {told}",
                listener.address,
                listener.nqn
            );
        }
        // The poller tries again.
        Err(Failure::Busy) => return give_up_waiting(state, volume, now_ns),
        Err(Failure::Refused(result)) => {
            let why = std::io::Error::from_raw_os_error(result.saturating_abs());
            refuse(control, listener, &why.to_string());
        }
    }
    look(state, volume);
}

/// What has waited long enough goes on: an I/O that comes to a node that is not Primary is answered as inaccessible, so
/// hosts find out by themselves.
fn give_up_waiting(state: &mut State, volume: u32, now_ns: u64) {
    let Some(control) = state.node.control(volume) else {
        return;
    };
    let waiting = std::mem::take(&mut control.ana.waiting);
    let (over, left) = waiting
        .into_iter()
        .partition(|(until_ns, _): &(u64, Job)| now_ns >= *until_ns);
    control.ana.waiting = left;
    let over: Vec<(u64, Job)> = over;
    for (_, then) in over {
        tracing::warn!(
            "a change of role goes on without hosts being told: their subsystem is busy"
        );
        then(state);
    }
}
