//! Endpoints for peers: subsystems of the application's NVMe-oF target, one a volume. Called on core 0.
//!
//! The application may have no TCP transport yet: its configuration makes bdevs first. What is to listen waits for it.
//! A configuration that was saved has the subsystem in the target's part: what is there already is used.

use std::ffi::{CStr, CString, c_int, c_void};
use std::net::{IpAddr, SocketAddr};
use std::ptr;

use super::core::{Job, State, manager_core};
use super::{access, sys};
use crate::engine::peer::hello::Hello;
use crate::engine::volume::MAX_TRANSFER_BYTES;
use crate::hosts::control::endpoint::{
    ENDPOINT_MODEL, ENDPOINT_NSID, endpoint_name, endpoint_nqn, endpoint_uuid,
};
use crate::hosts::control::refusal;
use crate::rpc::RpcError;
use crate::rpc::volume::{Address, Listen};

/// The name that SPDK gives the target of an application.
const TARGET: &CStr = c"nvmf_tgt";
/// A port that a dead process held is free after some milliseconds.
const BIND_PATIENCE_NS: u64 = 5_000_000_000;
/// The transport's in_capsule_data_size where nobody says otherwise.
const USUAL_IN_CAPSULE_BYTES: u32 = 4096;
/// Between two looks whether there is a transport by now.
const LOOK_NS: u64 = 50_000_000;

/// What waits for the application's target.
#[derive(Default)]
pub struct Exporter {
    waiting: Vec<(u32, Listen)>,
    next_look_ns: u64,
    /// What listens by our own doing, by subsystem.
    exports: Vec<(String, sys::spdk_nvme_transport_id)>,
}

type Outcome = Box<dyn FnOnce(&mut State, Result<SocketAddr, RpcError>)>;

fn failed(what: &str, result: c_int) -> RpcError {
    let error = std::io::Error::from_raw_os_error(result.saturating_abs());
    RpcError::errno(result, format!("{what}: {error}"))
}

/// Runs `job` on core 0, from a callback of SPDK.
fn later(job: impl FnOnce(&mut State) + 'static) {
    if let Some(core) = manager_core() {
        core.send(job);
    }
}

fn boxed<T>(value: T) -> *mut c_void {
    Box::into_raw(Box::new(value)).cast()
}

/// # Safety
/// `value` comes from [`boxed`] with this type, and is taken once.
unsafe fn unboxed<T>(value: *mut c_void) -> T {
    // SAFETY: the caller's word.
    *unsafe { Box::from_raw(value.cast::<T>()) }
}

/// The application's target; null where it has none.
pub fn target() -> *mut sys::spdk_nvmf_tgt {
    // SAFETY: on the application's thread, where targets come and go.
    unsafe {
        let target = sys::spdk_nvmf_get_tgt(TARGET.as_ptr());
        if target.is_null() {
            sys::spdk_nvmf_get_first_tgt()
        } else {
            target
        }
    }
}

fn transport(target: *mut sys::spdk_nvmf_tgt) -> *mut sys::spdk_nvmf_transport {
    if target.is_null() {
        return ptr::null_mut();
    }
    // SAFETY: as above.
    unsafe { sys::spdk_nvmf_tgt_get_transport(target, c"TCP".as_ptr()) }
}

/// Lets peers reach a volume's endpoint at an address: now, or when the application has a TCP transport.
pub fn export(
    state: &mut State,
    volume: u32,
    listen: Listen,
    then: impl FnOnce(&mut State, Result<Option<SocketAddr>, RpcError>) + 'static,
) {
    let address = listen.address;
    if address.trsvcid == 0 {
        let text = "an SPDK target cannot choose the port: name one in listen_address".to_owned();
        return then(state, Err(RpcError::invalid(text)));
    }
    if transport(target()).is_null() {
        tracing::info!(
            "the endpoint waits for nvmf_create_transport -t TCP to listen at {address}"
        );
        state.node.exporter.waiting.push((volume, listen));
        return then(state, Ok(None));
    }
    make(
        state,
        volume,
        listen,
        Box::new(move |state, outcome| then(state, outcome.map(Some))),
    );
}

/// With each round of the poller: what waits for a transport.
pub fn poll(state: &mut State) {
    let exporter = &mut state.node.exporter;
    let now_ns = super::context::now_ns();
    if exporter.waiting.is_empty() || now_ns < exporter.next_look_ns {
        return;
    }
    exporter.next_look_ns = now_ns + LOOK_NS;
    if transport(target()).is_null() {
        return;
    }
    for (volume, listen) in std::mem::take(&mut exporter.waiting) {
        let then = move |state: &mut State, outcome: Result<SocketAddr, RpcError>| match outcome {
            Ok(local) => {
                if let Some(control) = state.node.control(volume) {
                    control.listen = Some(local);
                }
            }
            Err(error) => tracing::error!("no peer can connect: {}", error.message),
        };
        make(state, volume, listen, Box::new(then));
    }
}

/// Where a volume's endpoint listens by the target's own configuration.
pub fn listens_at(volume: &uuid::Uuid, node_id: u8) -> Option<SocketAddr> {
    let target = target();
    if target.is_null() {
        return None;
    }
    let nqn = CString::new(endpoint_nqn(volume, node_id)).ok()?;
    // SAFETY: on the application's thread, where subsystems come and go.
    let (address, port) = unsafe {
        let subsystem = sys::spdk_nvmf_tgt_find_subsystem(target, nqn.as_ptr());
        if subsystem.is_null() {
            return None;
        }
        let listener = sys::spdk_nvmf_subsystem_get_first_listener(subsystem);
        if listener.is_null() {
            return None;
        }
        let trid = sys::spdk_nvmf_subsystem_listener_get_trid(listener);
        (
            sys::text((*trid).traddr.as_ptr()),
            sys::text((*trid).trsvcid.as_ptr()),
        )
    };
    Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
}

fn trid_of(address: Address) -> sys::spdk_nvme_transport_id {
    let mut trid = sys::spdk_nvme_transport_id {
        trtype: sys::SPDK_NVME_TRANSPORT_TCP,
        adrfam: match address.traddr {
            IpAddr::V4(_) => sys::SPDK_NVMF_ADRFAM_IPV4,
            IpAddr::V6(_) => sys::SPDK_NVMF_ADRFAM_IPV6,
        },
        ..Default::default()
    };
    let texts = [
        (&mut trid.trstring[..], "TCP".to_owned()),
        (&mut trid.traddr[..], address.traddr.to_string()),
        (&mut trid.trsvcid[..], address.trsvcid.to_string()),
    ];
    for (to, from) in texts {
        sys::set_text(to, &from);
    }
    trid
}

/// What a peer's command brings along beside the pool of buffers that hosts of the same target use up. On core 0.
pub fn in_capsule_bytes() -> u32 {
    let transport = transport(target());
    if transport.is_null() {
        // What the transport will be is not known, and no peer can connect before it is there.
        return USUAL_IN_CAPSULE_BYTES;
    }
    // SAFETY: a transport of the target.
    unsafe { (*sys::spdk_nvmf_get_transport_opts(transport)).in_capsule_data_size }
}

/// Peers send writes in pieces of what comes with a command; but a block is not cut.
fn tell_of_small_capsules(block_size: u32) {
    let bytes = in_capsule_bytes();
    let needed = block_size.max(Hello::BYTES as u32);
    if bytes < needed {
        tracing::warn!(
            "the TCP transport takes {bytes} bytes with a command, less than a block: if each of two nodes is Primary of a \
             volume, their writes can wait for each other's buffers for ever; nvmf_create_transport with \
             in_capsule_data_size {} prevents it",
            needed.max(USUAL_IN_CAPSULE_BYTES)
        );
    } else if u64::from(bytes) < MAX_TRANSFER_BYTES {
        tracing::info!(
            "the TCP transport takes {bytes} bytes with a command: longer writes of peers come in pieces; a larger \
             in_capsule_data_size of nvmf_create_transport makes fewer of them, and takes max_queue_depth times as much \
             memory for each queue pair"
        );
    }
}

/// Makes the subsystem with its namespace, and has it listen.
fn make(state: &mut State, volume: u32, wanted: Listen, then: Outcome) {
    let target = target();
    let Some(control) = state.node.control(volume).filter(|_| !target.is_null()) else {
        return then(state, Err(refusal::gone()));
    };
    let node_id = control.create.node_id;
    let volume_uuid = control.uuid;
    let address = wanted.address;
    let nqn = endpoint_nqn(&volume_uuid, node_id);
    let name = endpoint_name(&control.create.name);
    let uuid = endpoint_uuid(&control.uuid, node_id);
    let (Ok(nqn_text), Ok(name_text)) = (CString::new(nqn.clone()), CString::new(name)) else {
        return then(
            state,
            Err(RpcError::invalid("the name has a zero byte".to_owned())),
        );
    };
    tell_of_small_capsules(control.geometry.block_size);
    // SAFETY: the text lives during the call.
    if !unsafe { sys::spdk_nvmf_tgt_find_subsystem(target, nqn_text.as_ptr()) }.is_null() {
        return then(state, Ok(SocketAddr::new(address.traddr, address.trsvcid)));
    }
    // SAFETY: the texts live during the calls, which copy them.
    let made = unsafe {
        let subsystem =
            sys::nvmf_subsystem_create(target, &nqn_text, ENDPOINT_NSID, ENDPOINT_MODEL);
        if subsystem.is_null() {
            Err(RpcError::exists(format!("subsystem {nqn} exists already")))
        } else {
            let mut options = sys::nvmf_ns_opts();
            options.nsid = ENDPOINT_NSID;
            options.uuid = sys::uuid_from(&uuid);
            options.nguid = *uuid.as_bytes();
            let nsid = sys::spdk_nvmf_subsystem_add_ns_ext(
                subsystem,
                name_text.as_ptr(),
                &raw const options,
                size_of_val(&options),
                ptr::null(),
            );
            if nsid == 0 {
                sys::spdk_nvmf_subsystem_destroy(subsystem, None, ptr::null_mut());
                Err(RpcError::io(
                    "the endpoint cannot become a namespace".to_owned(),
                ))
            } else {
                Ok(subsystem)
            }
        }
    };
    let made = made.and_then(|subsystem| {
        let allowed = access::allow(subsystem, &volume_uuid, &wanted.allowed_hosts);
        if allowed.is_err() {
            // SAFETY: made above, and never started.
            unsafe { sys::spdk_nvmf_subsystem_destroy(subsystem, None, ptr::null_mut()) };
        }
        allowed.map(|()| subsystem)
    });
    match made {
        Ok(subsystem) => {
            let trid = trid_of(address);
            state.node.exporter.exports.push((nqn, trid));
            let until_ns = super::context::now_ns() + BIND_PATIENCE_NS;
            let secure = wanted.secure_channel;
            listen(state, subsystem, (address, secure), trid, until_ns, then);
        }
        Err(error) => then(state, Err(error)),
    }
}

fn listen(
    state: &mut State,
    subsystem: *mut sys::spdk_nvmf_subsystem,
    (address, secure_channel): (Address, bool),
    trid: sys::spdk_nvme_transport_id,
    until_ns: u64,
    then: Outcome,
) {
    let target = target();
    if target.is_null() {
        return then(state, Err(refusal::gone()));
    }
    let mut options = sys::nvmf_listen_opts();
    options.secure_channel = secure_channel;
    // SAFETY: reads structures of ours.
    let result =
        unsafe { sys::spdk_nvmf_tgt_listen_ext(target, &raw const trid, &raw mut options) };
    if result != 0 {
        if super::context::now_ns() < until_ns {
            let again = move |state: &mut State| {
                let how = (address, secure_channel);
                listen(state, subsystem, how, trid, until_ns, then);
            };
            return state.node.deferred.push(Box::new(again));
        }
        let what = format!("the endpoint cannot listen at {address}");
        return then(state, Err(failed(&what, result)));
    }
    unsafe extern "C" fn started(
        _: *mut sys::spdk_nvmf_subsystem,
        then: *mut c_void,
        result: c_int,
    ) {
        // SAFETY: boxed below.
        let (address, then) = unsafe { unboxed::<(Address, Outcome)>(then) };
        later(move |state| {
            let outcome = if result == 0 {
                Ok(SocketAddr::new(address.traddr, address.trsvcid))
            } else {
                Err(failed("the endpoint cannot be started", result))
            };
            then(state, outcome);
        });
    }
    unsafe extern "C" fn added(argument: *mut c_void, result: c_int) {
        type Argument = (*mut sys::spdk_nvmf_subsystem, Address, Outcome);
        // SAFETY: boxed below.
        let (subsystem, address, then) = unsafe { unboxed::<Argument>(argument) };
        later(move |state| {
            if result != 0 {
                return then(state, Err(failed("the endpoint cannot listen", result)));
            }
            let argument = boxed((address, then));
            // SAFETY: the subsystem is inactive, and nothing else changes its state.
            let result =
                unsafe { sys::spdk_nvmf_subsystem_start(subsystem, Some(started), argument) };
            if result != 0 {
                // SAFETY: refused, so the callback will not come.
                let (_, then) = unsafe { unboxed::<(Address, Outcome)>(argument) };
                then(state, Err(failed("the endpoint cannot be started", result)));
            }
        });
    }
    let argument = boxed((subsystem, address, then));
    let mut options = sys::nvmf_listener_opts();
    options.secure_channel = secure_channel;
    // SAFETY: the subsystem is inactive; the callback takes the argument back, the options are read before it returns.
    unsafe {
        sys::spdk_nvmf_subsystem_add_listener_ext(
            subsystem,
            &raw const trid,
            Some(added),
            argument,
            &raw mut options,
        );
    }
}

/// Takes a volume's endpoint out of the target, if it is there; then `then`.
pub fn unexport(state: &mut State, volume: u32, then: impl FnOnce(&mut State) + 'static) {
    let exporter = &mut state.node.exporter;
    exporter.waiting.retain(|(waiting, _)| *waiting != volume);
    let target = target();
    let Some(control) = state.node.control(volume).filter(|_| !target.is_null()) else {
        return then(state);
    };
    let nqn = endpoint_nqn(&control.uuid, control.create.node_id);
    let text = CString::new(nqn.clone()).unwrap_or_default();
    // SAFETY: the text lives during the call.
    let subsystem = unsafe { sys::spdk_nvmf_tgt_find_subsystem(target, text.as_ptr()) };
    let exports = &mut state.node.exporter.exports;
    let position = exports.iter().position(|(export, _)| *export == nqn);
    let own = position.map(|position| exports.swap_remove(position).1);
    if subsystem.is_null() {
        return then(state);
    }
    // SAFETY: on the application's thread, where listeners come and go.
    let configured = unsafe {
        let listener = sys::spdk_nvmf_subsystem_get_first_listener(subsystem);
        (!listener.is_null()).then(|| *sys::spdk_nvmf_subsystem_listener_get_trid(listener))
    };
    // One that a configuration has made goes too: without its namespace it is of no use to anybody.
    stop(state, target, subsystem, own.or(configured), Box::new(then));
}

type Stopping = (
    *mut sys::spdk_nvmf_tgt,
    Option<sys::spdk_nvme_transport_id>,
    Job,
);

fn stop(
    state: &mut State,
    target: *mut sys::spdk_nvmf_tgt,
    subsystem: *mut sys::spdk_nvmf_subsystem,
    trid: Option<sys::spdk_nvme_transport_id>,
    then: Job,
) {
    unsafe extern "C" fn destroyed(then: *mut c_void) {
        // SAFETY: boxed below.
        later(unsafe { unboxed::<Job>(then) });
    }
    unsafe extern "C" fn stopped(
        subsystem: *mut sys::spdk_nvmf_subsystem,
        argument: *mut c_void,
        _: c_int,
    ) {
        // SAFETY: boxed below.
        let (target, trid, then) = unsafe { unboxed::<Stopping>(argument) };
        later(move |state| {
            let argument = boxed(then);
            // SAFETY: stopped: nobody uses it any more, and the callback takes the argument back.
            let result = unsafe {
                if let Some(trid) = &trid {
                    sys::spdk_nvmf_subsystem_remove_listener(subsystem, trid);
                    sys::spdk_nvmf_tgt_stop_listen(target, trid);
                }
                sys::spdk_nvmf_subsystem_destroy(subsystem, Some(destroyed), argument)
            };
            if result != -libc::EINPROGRESS {
                // SAFETY: done already, so the callback does not come.
                let then = unsafe { unboxed::<Job>(argument) };
                then(state);
            }
        });
    }
    let argument = boxed::<Stopping>((target, trid, then));
    // SAFETY: the callback takes the argument back.
    let result = unsafe { sys::spdk_nvmf_subsystem_stop(subsystem, Some(stopped), argument) };
    if result != 0 {
        // SAFETY: refused, so the callback will not come.
        let (target, trid, then) = unsafe { unboxed::<Stopping>(argument) };
        // It is on its way from one state to another.
        let again = move |state: &mut State| stop(state, target, subsystem, trid, then);
        state.node.deferred.push(Box::new(again));
    }
}
