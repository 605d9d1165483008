//! The queue pairs from here to a peer's endpoint: a controller of bdev_nvme, opened and deleted on core 0, and a channel
//! of its bdev on every core. A link is up when every core has its channel. It is closed by a reset of the bdev, which
//! completes what is outstanding without another try; then the channels go, and the controller.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

use super::context::Queue;
use super::core::{Job, State, manager_core, on_all};
use super::volume::with_manager;
use super::{module, sys};
use crate::engine::MAX_PEERS;
use crate::host::{PeerAddress, PeerSlot};
use crate::hosts::control::endpoint::{endpoint_nqn, host_id};

/// From sending Connect to its answer, for each queue.
const CONNECT_TIMEOUT_US: u64 = 3_000_000;
/// For the TCP connection; SPDK has one setting for the whole process and none by default.
const TCP_CONNECT_TIMEOUT_MS: u32 = 3000;
/// More than a path id of bdev_nvme; all zeroes means every path.
const PATH_ID_BYTES: usize = 4096;

/// Core 0's knowledge of the way to one peer.
#[derive(Default)]
pub struct Link {
    /// Counts the times that it was opened, so that what comes late is told apart.
    generation: u32,
    state: LinkState,
    /// Why it is closed.
    reason: String,
    /// Commands that have not ended, over all cores, are none when this many cores have said so.
    controller: String,
    desc: Option<*mut sys::spdk_bdev_desc>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LinkState {
    #[default]
    Down,
    /// bdev_nvme connects.
    Connecting,
    /// As before, but nobody wants it any more.
    Unwanted,
    /// Every core gets its channel.
    Opening,
    Up,
    /// The bdev is being reset.
    Resetting,
    /// Waits for the last commands, then for the controller to go.
    Closing,
    Deleting,
}

/// What bdev_nvme calls back with.
struct Ticket {
    volume: u32,
    slot: PeerSlot,
    generation: u32,
    names: [*const c_char; 4],
    /// What the options refer to while bdev_nvme has them.
    _texts: Vec<CString>,
}

thread_local! {
    /// Controllers that are there by our doing, for `examine_config`, which comes in the middle of things.
    static CONTROLLERS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Whether a bdev of bdev_nvme is a peer's endpoint. With a claim nobody else looks at what is on it.
pub fn is_endpoint_of_peer(bdev: &str) -> bool {
    CONTROLLERS.with_borrow(|controllers| {
        controllers.iter().any(|controller| {
            let namespace = bdev.strip_prefix(controller.as_str());
            namespace.is_some_and(|rest| rest.starts_with('n') && rest[1..].parse::<u32>().is_ok())
        })
    })
}

fn link(state: &mut State, volume: u32, slot: PeerSlot) -> Option<&mut Link> {
    state.node.control(volume)?.links.get_mut(slot)
}

/// Copies a text into an array of C, with its end; false if it is too long.
fn copy_text(to: &mut [c_char], text: &str) -> bool {
    if text.len() >= to.len() {
        return false;
    }
    for (to, from) in to.iter_mut().zip(text.bytes().chain([0])) {
        *to = from as c_char;
    }
    true
}

/// The manager wants queue pairs to a peer.
pub fn open(state: &mut State, volume: u32, slot: PeerSlot, address: &PeerAddress) {
    let peer = state
        .volume(volume)
        .and_then(|this| this.manager.as_ref())
        .and_then(|manager| manager.peer_node(slot))
        .unwrap_or_default();
    let Some(control) = state.node.control(volume) else {
        return;
    };
    let (uuid, node_id) = (control.uuid, control.create.node_id);
    let controller = format!("{}.node{peer}", control.create.name);
    let link = &mut control.links[slot];
    link.generation = link.generation.wrapping_add(1);
    link.state = LinkState::Connecting;
    link.reason = String::new();
    link.controller = controller.clone();
    let generation = link.generation;
    if let Err(reason) = connect(volume, slot, generation, &controller, address, |options| {
        options.hostid_ext_from(host_id(&uuid, node_id));
        (endpoint_nqn(&uuid, peer), endpoint_nqn(&uuid, node_id))
    }) {
        link.state = LinkState::Down;
        down(state, volume, slot, &reason);
    }
}

/// Extended host identifier, NVM Express Base Specification.
trait HostId {
    fn hostid_ext_from(&mut self, id: [u8; 16]);
}

impl HostId for sys::spdk_nvme_ctrlr_opts {
    fn hostid_ext_from(&mut self, id: [u8; 16]) {
        self.extended_host_id = id;
    }
}

fn connect(
    volume: u32,
    slot: PeerSlot,
    generation: u32,
    controller: &str,
    address: &PeerAddress,
    identify: impl FnOnce(&mut sys::spdk_nvme_ctrlr_opts) -> (String, String),
) -> Result<(), String> {
    limit_tcp_connect();
    CONTROLLERS.with_borrow_mut(|controllers| controllers.push(controller.to_owned()));
    let mut trid = sys::spdk_nvme_transport_id::default();
    let mut driver = sys::spdk_nvme_ctrlr_opts::default();
    let mut bdev = sys::spdk_bdev_nvme_ctrlr_opts::default();
    // SAFETY: both fill in structures of ours.
    unsafe {
        sys::spdk_nvme_ctrlr_get_default_ctrlr_opts(&raw mut driver, size_of_val(&driver));
        sys::spdk_bdev_nvme_get_default_ctrlr_opts(&raw mut bdev);
    }
    let (subsystem_nqn, host_nqn) = identify(&mut driver);
    trid.trtype = sys::SPDK_NVME_TRANSPORT_TCP;
    trid.adrfam = if address.traddr.contains(':') {
        sys::SPDK_NVMF_ADRFAM_IPV6
    } else {
        sys::SPDK_NVMF_ADRFAM_IPV4
    };
    let fits = copy_text(&mut trid.trstring, "TCP")
        && copy_text(&mut trid.traddr, &address.traddr)
        && copy_text(&mut trid.trsvcid, &address.trsvcid.to_string())
        && copy_text(&mut trid.subnqn, &subsystem_nqn)
        && copy_text(&mut driver.hostnqn, &host_nqn);
    if !fits {
        return Err(format!("{} is no address", address.traddr));
    }
    driver.header_digest = address.header_digest;
    driver.data_digest = address.data_digest;
    driver.fabrics_connect_timeout_us = CONNECT_TIMEOUT_US;
    // The volume's own configuration names the peer: bdev_nvme leaves controllers of a discovery service out of a
    // saved one.
    bdev.from_discovery_service = true;
    // No second try of bdev_nvme's own: the session ends, and the manager asks for the next link.
    bdev.ctrlr_loss_timeout_sec = 0;
    bdev.reconnect_delay_sec = 0;
    bdev.fast_io_fail_timeout_sec = 0;
    let name = CString::new(controller).map_err(|_| "the volume's name has a zero".to_owned())?;
    let mut ticket = Box::new(Ticket {
        volume,
        slot,
        generation,
        names: [ptr::null(); 4],
        _texts: Vec::new(),
    });
    let names = ticket.names.as_mut_ptr();
    let count = ticket.names.len() as u32;
    let ticket = Box::into_raw(ticket);
    // SAFETY: the ticket, with the names in it, lives until the callback takes it back; the rest is copied.
    let result = unsafe {
        sys::spdk_bdev_nvme_create(
            &raw mut trid,
            name.as_ptr(),
            names,
            count,
            Some(connected),
            ticket.cast(),
            &raw mut driver,
            &raw mut bdev,
        )
    };
    if result == 0 {
        return Ok(());
    }
    // SAFETY: refused, so the callback will not come.
    drop(unsafe { Box::from_raw(ticket) });
    let error = std::io::Error::from_raw_os_error(-result);
    Err(format!("bdev_nvme refuses to connect: {error}"))
}

/// Without a limit an attempt to reach a peer that is not there lasts as long as the kernel's.
fn limit_tcp_connect() {
    let mut options = sys::spdk_nvme_transport_opts::default();
    // SAFETY: fills in, and reads, a structure of ours.
    unsafe {
        sys::spdk_nvme_transport_get_opts(&raw mut options, size_of_val(&options));
        if options.tcp_connect_timeout_ms == 0 {
            options.tcp_connect_timeout_ms = TCP_CONNECT_TIMEOUT_MS;
            sys::spdk_nvme_transport_set_opts(&raw const options, size_of_val(&options));
        }
    }
}

unsafe extern "C" fn connected(ticket: *mut c_void, bdevs: usize, result: c_int) {
    // SAFETY: made by `connect`, called back once.
    let ticket = unsafe { Box::from_raw(ticket.cast::<Ticket>()) };
    let name = if bdevs > 0 {
        // SAFETY: bdev_nvme has set as many names as it has bdevs.
        unsafe { sys::text(ticket.names[0]) }
    } else {
        String::new()
    };
    let Some(core) = manager_core() else {
        return;
    };
    core.send(move |state| {
        let (volume, slot) = (ticket.volume, ticket.slot);
        let Some(link) = link(state, volume, slot) else {
            return;
        };
        if link.generation != ticket.generation {
            return;
        }
        if result != 0 {
            link.state = LinkState::Down;
            let error = std::io::Error::from_raw_os_error(-result);
            return down(
                state,
                volume,
                slot,
                &format!("the peer is not reached: {error}"),
            );
        }
        if link.state == LinkState::Unwanted {
            return delete(state, volume, slot);
        }
        if name.is_empty() {
            // The listener is there before the namespace: the next attempt finds it.
            link.reason = "the peer's endpoint has no namespace yet".to_owned();
            return delete(state, volume, slot);
        }
        attach(state, volume, slot, &name);
    });
}

unsafe extern "C" fn event(
    kind: sys::spdk_bdev_event_type,
    _: *mut sys::spdk_bdev,
    argument: *mut c_void,
) {
    if kind != sys::SPDK_BDEV_EVENT_REMOVE {
        return;
    }
    let (volume, slot) = (argument as usize >> 8, argument as usize & 0xff);
    if let Some(core) = manager_core() {
        core.send(move |state| {
            close(state, volume as u32, slot, "the peer's namespace went away");
        });
    }
}

/// The peer's bdev is there: every core gets its channel.
fn attach(state: &mut State, volume: u32, slot: PeerSlot, name: &str) {
    let mut desc = ptr::null_mut();
    let text = CString::new(name).unwrap_or_default();
    let argument = (volume as usize) << 8 | slot;
    // SAFETY: the name lives during the call.
    let result = unsafe {
        sys::spdk_bdev_open_ext(
            text.as_ptr(),
            false,
            Some(event),
            argument as *mut c_void,
            &raw mut desc,
        )
    };
    if result == 0 {
        // SAFETY: open. The claim is this module's since the bdev appeared; with the descriptor it lets us write.
        unsafe {
            let bdev = sys::spdk_bdev_desc_get_bdev(desc);
            if std::ptr::eq(sys::claiming_module(bdev), module::get()) {
                sys::spdk_bdev_module_release_bdev(bdev);
            }
            sys::spdk_bdev_module_claim_bdev(bdev, desc, module::get());
        }
    }
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    if result != 0 {
        let error = std::io::Error::from_raw_os_error(-result);
        link.reason = format!("bdev {name} of the peer cannot be opened: {error}");
        return delete(state, volume, slot);
    }
    link.desc = Some(desc);
    link.state = LinkState::Opening;
    let generation = link.generation;
    on_all(
        move |state| {
            let Some(this) = state.volume(volume) else {
                return;
            };
            // SAFETY: the descriptor stays open until every core has put its channel.
            let channel = unsafe { sys::spdk_bdev_get_io_channel(desc) };
            this.context.queues[slot] = (!channel.is_null()).then_some(Queue {
                desc,
                channel,
                outstanding: 0,
                closing: false,
            });
            if channel.is_null()
                && let Some(core) = manager_core()
            {
                core.send(move |state| close(state, volume, slot, "a core gets no queue pair"));
            }
        },
        move |state| {
            let up = link_if(state, volume, slot, generation, LinkState::Opening);
            if let Some(link) = up {
                link.state = LinkState::Up;
                with_manager(state, volume, |manager, cx| manager.link_up(cx, slot));
            } else {
                // Closed meanwhile: the channels that have come since go too.
                reset(volume, slot);
            }
        },
    );
}

fn link_if(
    state: &mut State,
    volume: u32,
    slot: PeerSlot,
    generation: u32,
    is: LinkState,
) -> Option<&mut Link> {
    link(state, volume, slot).filter(|link| link.generation == generation && link.state == is)
}

/// Closes a link; the manager is told when it is down.
pub fn close(state: &mut State, volume: u32, slot: PeerSlot, reason: &str) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    match link.state {
        LinkState::Connecting => {
            link.reason = reason.to_owned();
            link.state = LinkState::Unwanted;
        }
        LinkState::Opening => {
            link.reason = reason.to_owned();
            link.state = LinkState::Resetting;
        }
        LinkState::Up => {
            link.reason = reason.to_owned();
            link.state = LinkState::Resetting;
            reset(volume, slot);
        }
        _ => {}
    }
}

/// No core submits any more; then the bdev is reset if anything is outstanding.
fn reset(volume: u32, slot: PeerSlot) {
    on_all(
        move |state| {
            if let Some(this) = state.volume(volume)
                && let Some(queue) = &mut this.context.queues[slot]
            {
                queue.closing = true;
            }
        },
        move |state| {
            let queue = state
                .volume(volume)
                .and_then(|this| this.context.queues[slot]);
            let Some(queue) = queue else {
                return drain(state, volume, slot);
            };
            let argument = (volume as usize) << 8 | slot;
            // SAFETY: the channel is this core's, and stays until the reset has ended.
            let result = unsafe {
                sys::spdk_bdev_reset(
                    queue.desc,
                    queue.channel,
                    Some(was_reset),
                    argument as *mut c_void,
                )
            };
            if result != 0 {
                drain(state, volume, slot);
            }
        },
    );
}

unsafe extern "C" fn was_reset(io: *mut sys::spdk_bdev_io, _: bool, argument: *mut c_void) {
    let (volume, slot) = (argument as usize >> 8, argument as usize & 0xff);
    // SAFETY: complete, freed once.
    unsafe { sys::spdk_bdev_free_io(io) };
    if let Some(core) = manager_core() {
        core.send(move |state| drain(state, volume as u32, slot));
    }
}

/// Every core gives its channel back when its last command has ended; then the controller goes.
fn drain(state: &mut State, volume: u32, slot: PeerSlot) {
    if let Some(link) = link(state, volume, slot) {
        link.state = LinkState::Closing;
    }
    drain_core(0, volume, slot);
}

fn drain_core(index: usize, volume: u32, slot: PeerSlot) {
    let Some(core) = super::core::all().get(index) else {
        if let Some(core) = manager_core() {
            core.send(move |state| {
                if let Some(desc) = link(state, volume, slot).and_then(|link| link.desc.take()) {
                    // SAFETY: opened and claimed on this thread, and no core has a channel of it any more.
                    unsafe {
                        sys::spdk_bdev_module_release_bdev(sys::spdk_bdev_desc_get_bdev(desc));
                        sys::spdk_bdev_close(desc);
                    }
                }
                delete(state, volume, slot);
            });
        }
        return;
    };
    core.send(move |state| {
        let Some(this) = state.volume(volume) else {
            return drain_core(index + 1, volume, slot);
        };
        match this.context.queues[slot] {
            Some(queue) if queue.outstanding > 0 => drain_core(index, volume, slot),
            Some(queue) => {
                this.context.queues[slot] = None;
                // SAFETY: this core's, and nothing is outstanding on it.
                unsafe { sys::spdk_put_io_channel(queue.channel) };
                drain_core(index + 1, volume, slot);
            }
            None => drain_core(index + 1, volume, slot),
        }
    });
}

/// A command to a peer has ended.
pub fn ended(state: &mut State, volume: u32, slot: PeerSlot) {
    if let Some(this) = state.volume(volume)
        && let Some(queue) = &mut this.context.queues[slot]
    {
        queue.outstanding = queue.outstanding.saturating_sub(1);
    }
}

fn delete(state: &mut State, volume: u32, slot: PeerSlot) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    link.state = LinkState::Deleting;
    let name = CString::new(link.controller.clone()).unwrap_or_default();
    let every_path = [0_u64; PATH_ID_BYTES / 8];
    let argument = (volume as usize) << 8 | slot;
    // SAFETY: the name and the path live during the call, which copies them.
    let result = unsafe {
        sys::spdk_bdev_nvme_delete(
            name.as_ptr(),
            every_path.as_ptr().cast(),
            Some(deleted),
            argument as *mut c_void,
        )
    };
    if result != 0 {
        // It is gone already.
        is_down(state, volume, slot);
    }
}

unsafe extern "C" fn deleted(argument: *mut c_void, _: c_int) {
    let (volume, slot) = (argument as usize >> 8, argument as usize & 0xff);
    if let Some(core) = manager_core() {
        core.send(move |state| is_down(state, volume as u32, slot));
    }
}

fn is_down(state: &mut State, volume: u32, slot: PeerSlot) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    link.state = LinkState::Down;
    let reason = std::mem::take(&mut link.reason);
    down(state, volume, slot, &reason);
}

fn down(state: &mut State, volume: u32, slot: PeerSlot, reason: &str) {
    if let Some(link) = link(state, volume, slot) {
        let gone = &link.controller;
        CONTROLLERS.with_borrow_mut(|controllers| controllers.retain(|name| name != gone));
    }
    with_manager(state, volume, |manager, cx| {
        manager.link_down(cx, slot, reason);
    });
}

/// Closes every link of a volume, then `then`.
pub fn close_all(state: &mut State, volume: u32, then: Job) {
    let mut open = false;
    for slot in 0..MAX_PEERS {
        close(state, volume, slot, "the volume is being deleted");
        open |= link(state, volume, slot).is_some_and(|link| link.state != LinkState::Down);
    }
    if !open {
        return then(state);
    }
    state
        .node
        .deferred
        .push(Box::new(move |state| close_all(state, volume, then)));
}
