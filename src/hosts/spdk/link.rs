//! The queue pairs from here to a peer's endpoint: a controller of bdev_nvme, opened and deleted on core 0, and a channel
//! of its bdev on every core. A link is up when every core has its channel. It is closed by a reset of the bdev, which
//! completes what is outstanding without another try; then the channels go, and the controller.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::connect::{self, Path};
use super::context::Queue;
use super::core::{Job, State, manager_core, on_all};
use super::node::Control;
use super::volume::with_manager;
use super::{module, silence, sys};
use crate::engine::MAX_PEERS;
use crate::host::{PeerAddress, PeerSlot};
use crate::rpc::volume::PeerTransport;

/// More than a path id of bdev_nvme; all zeroes means every path.
const PATH_ID_BYTES: usize = 4096;
/// Between two looks for paths that are to be tried again.
const PATH_LOOK_NS: u64 = 500_000_000;
/// How long the reset of a link that ends may try to connect once more: whoever answers does so sooner.
const RESET_PATIENCE_NS: u64 = 1_000_000_000;

/// Core 0's knowledge of the way to one peer.
#[derive(Default)]
pub struct Link {
    /// Counts the times that it was opened, so that what comes late is told apart.
    generation: u32,
    state: LinkState,
    /// Why it is closed.
    reason: String,
    /// What bdev_nvme knows it as.
    controller: String,
    /// There is such a controller: at least one path has been connected.
    has_controller: bool,
    /// The node at the other end, and how it is reached.
    peer: u8,
    transport: PeerTransport,
    /// Paths that are still to be connected, the one that is being connected, and those that could not be.
    untried: VecDeque<PeerAddress>,
    connecting: Option<PeerAddress>,
    unreached: Vec<PeerAddress>,
    retry_at_ns: u64,
    desc: Option<*mut sys::spdk_bdev_desc>,
    /// When the reset that is under way began.
    reset_at_ns: Option<u64>,
    deletion: Deletion,
}

impl Link {
    fn not_reached(&mut self, address: PeerAddress, reason: String) {
        let delay_sec = self.transport.patience().reconnect_delay_sec.max(1);
        self.retry_at_ns = super::context::now_ns() + u64::from(delay_sec) * 1_000_000_000;
        self.unreached.push(address);
        if self.state == LinkState::Connecting {
            self.reason = reason;
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum LinkState {
    #[default]
    Down,
    /// bdev_nvme connects.
    Connecting,
    /// Every core gets its channel.
    Opening,
    Up,
    /// The bdev is being reset.
    Resetting,
    /// Waits for the last commands.
    Closing,
    /// Waits for a path that is being connected, then for the controller to go.
    Deleting,
}

/// Of the controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Deletion {
    #[default]
    None,
    Begun,
    Ended,
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
    let transport = control.transport(peer);
    let alternate = transport
        .alternate_addresses
        .iter()
        .map(|other| PeerAddress {
            traddr: other.traddr.to_string(),
            trsvcid: other.trsvcid,
            ..address.clone()
        });
    let untried = std::iter::once(address.clone()).chain(alternate).collect();
    let controller = format!("{}.node{peer}", control.create.name);
    CONTROLLERS.with_borrow_mut(|controllers| controllers.push(controller.clone()));
    let link = &mut control.links[slot];
    *link = Link {
        generation: link.generation.wrapping_add(1),
        state: LinkState::Connecting,
        controller,
        peer,
        transport,
        untried,
        ..Link::default()
    };
    connect_next(state, volume, slot);
}

/// Has bdev_nvme connect the next path, one at a time; without any the link is down.
fn connect_next(state: &mut State, volume: u32, slot: PeerSlot) {
    let Some(control) = state.node.control(volume) else {
        return;
    };
    let (uuid, own) = (control.uuid, control.create.node_id);
    let link = &mut control.links[slot];
    if !matches!(
        link.state,
        LinkState::Connecting | LinkState::Opening | LinkState::Up
    ) {
        return;
    }
    while let Some(address) = link.untried.pop_front() {
        let outcome = connect::connect(&Path {
            volume,
            slot,
            uuid,
            nodes: (own, link.peer),
            controller: &link.controller,
            address: &address,
            transport: &link.transport,
        });
        match outcome {
            Ok(()) => {
                link.connecting = Some(address);
                return;
            }
            Err(reason) => link.not_reached(address, reason),
        }
    }
    if link.state == LinkState::Connecting {
        delete(state, volume, slot);
    }
}

/// bdev_nvme has connected a path and found a bdev of this name, or has not.
pub fn connected(state: &mut State, volume: u32, slot: PeerSlot, outcome: Result<String, String>) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    let Some(address) = link.connecting.take() else {
        return;
    };
    link.has_controller |= outcome.is_ok();
    if link.state == LinkState::Deleting {
        return delete(state, volume, slot);
    }
    match outcome {
        Err(reason) => link.not_reached(address, reason),
        Ok(name) if link.state == LinkState::Connecting => {
            if name.is_empty() {
                // The listener is there before the namespace: the next attempt finds it.
                link.reason = "the peer's endpoint has no namespace yet".to_owned();
                return delete(state, volume, slot);
            }
            attach(state, volume, slot, &name);
        }
        Ok(_) => {}
    }
    connect_next(state, volume, slot);
}

/// With each round of the poller: paths that were not reached are tried again while the link lives by others.
pub fn poll(state: &mut State) {
    let now_ns = super::context::now_ns();
    if now_ns < state.node.next_path_ns {
        return;
    }
    state.node.next_path_ns = now_ns + PATH_LOOK_NS;
    let (mut due, mut overdue) = (Vec::new(), Vec::new());
    for control in &mut state.node.controls {
        let is_ending = state.node.frozen.is_ending || control.deleting;
        for (slot, link) in control.links.iter_mut().enumerate() {
            let is_late = |began_ns| now_ns >= began_ns + RESET_PATIENCE_NS;
            if is_ending && link.reset_at_ns.is_some_and(is_late) {
                overdue.push((control.volume, slot));
            }
            let is_due = link.state == LinkState::Up && now_ns >= link.retry_at_ns;
            if is_due && link.connecting.is_none() && !link.unreached.is_empty() {
                link.untried.extend(link.unreached.drain(..));
                due.push((control.volume, slot));
            }
        }
    }
    for (volume, slot) in overdue {
        cut_short(state, volume, slot);
    }
    for (volume, slot) in due {
        connect_next(state, volume, slot);
    }
}

/// A reset completes what is outstanding and then connects once more, for which it waits ten seconds where the other side
/// takes the connection and says nothing. A link that does not come back needs no connection: its controller is on its way
/// out before bdev_nvme can try again, and its try fails. With several paths bdev_nvme is not prepared for that order.
fn cut_short(state: &mut State, volume: u32, slot: PeerSlot) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    let (Some(desc), LinkState::Resetting) = (link.desc, link.state) else {
        return;
    };
    if is_single(state, volume, slot) {
        delete_controller(state, volume, slot);
        silence::give_up(desc);
    }
}

/// Whether the volume, or the whole application, ends: its links do not come back.
fn is_ending(state: &mut State, volume: u32) -> bool {
    let is_deleted = |control: &mut Control| control.deleting;
    state.node.frozen.is_ending || state.node.control(volume).is_some_and(is_deleted)
}

/// Whether there is one path to the peer.
fn is_single(state: &mut State, volume: u32, slot: PeerSlot) -> bool {
    link(state, volume, slot).is_some_and(|link| link.transport.alternate_addresses.is_empty())
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
    let is_patient = link.transport.patience().ctrlr_loss_timeout_sec != 0;
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
                is_patient,
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
            link.state = LinkState::Deleting;
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

/// No core submits any more; then the bdev is reset if anything is outstanding, or waits for the reset that bdev_nvme does.
fn reset(volume: u32, slot: PeerSlot) {
    let is_outstanding = Arc::new(AtomicBool::new(false));
    let found = Arc::clone(&is_outstanding);
    on_all(
        move |state| {
            if let Some(this) = state.volume(volume)
                && let Some(queue) = &mut this.context.queues[slot]
            {
                queue.closing = true;
                found.fetch_or(queue.outstanding > 0, Ordering::Relaxed);
            }
        },
        move |state| {
            let queue = state
                .volume(volume)
                .and_then(|this| this.context.queues[slot]);
            let Some(queue) = queue else {
                return drain(state, volume, slot);
            };
            let waits = is_outstanding.load(Ordering::Relaxed)
                || is_single(state, volume, slot)
                    && (!queue.is_patient || is_ending(state, volume))
                    && silence::is_connecting(queue.desc);
            if !waits {
                // A reset would connect once more first.
                return drain(state, volume, slot);
            }
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
            } else if let Some(link) = link(state, volume, slot) {
                link.reset_at_ns = Some(super::context::now_ns());
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

/// Every core gives its channel back when its last command has ended, and the controller goes.
fn drain(state: &mut State, volume: u32, slot: PeerSlot) {
    if let Some(link) = link(state, volume, slot) {
        link.state = LinkState::Closing;
        link.reset_at_ns = None;
        // Before the channels, since bdev_nvme soon resets by itself what has failed, and a controller that is being
        // reset stays.
        delete_controller(state, volume, slot);
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
    if link.connecting.is_none() && (!link.has_controller || link.deletion == Deletion::Ended) {
        return is_down(state, volume, slot);
    }
    delete_controller(state, volume, slot);
}

/// Has bdev_nvme take the controller away, once; it is gone when its bdev has been closed, too.
fn delete_controller(state: &mut State, volume: u32, slot: PeerSlot) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    if link.connecting.is_some() || link.deletion != Deletion::None {
        // A path that is being connected would make the controller anew; `connected` goes on from here.
        return;
    }
    link.deletion = Deletion::Begun;
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
        controller_deleted(state, volume, slot);
    }
}

unsafe extern "C" fn deleted(argument: *mut c_void, _: c_int) {
    let (volume, slot) = (argument as usize >> 8, argument as usize & 0xff);
    if let Some(core) = manager_core() {
        core.send(move |state| controller_deleted(state, volume as u32, slot));
    }
}

fn controller_deleted(state: &mut State, volume: u32, slot: PeerSlot) {
    let Some(link) = link(state, volume, slot) else {
        return;
    };
    link.deletion = Deletion::Ended;
    if link.state == LinkState::Deleting {
        is_down(state, volume, slot);
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
