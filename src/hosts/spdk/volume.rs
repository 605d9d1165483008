//! The engine's volumes on one core: how I/O, completions and messages reach the engine, and how what it asks for is
//! carried out. Called by the core's loop only. `io` speaks to bdevs, `link` keeps the queue pairs to peers, `node` takes
//! requests on core 0.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::backing::Disk;
use super::bdev::{self, Port};
use super::context::{Action, BdevIo, Context, Payload};
use super::core::{Event, MANAGER_CORE, State};
use super::{ana, awaited, endpoint, frozen, io, lifecycle, link, node, opening, sys};
use crate::engine::channel::{AppIo, Channel, TOKEN_MANAGER};
use crate::engine::manager::Manager;
use crate::engine::message::ToManager;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::request::RequestKind;
use crate::host::{AppStatus, Completion, Data, IoStatus, PeerSlot, Token};
use crate::hosts::control::received;
use crate::hosts::slab::Key;

/// One volume on one core.
pub struct CoreVolume {
    pub channel: Channel<Context>,
    /// On core 0.
    pub manager: Option<Manager<Context>>,
    pub context: Context,
    /// The backing bdev while there is one.
    pub disk: Option<Disk>,
    pub block_size: u32,
    /// Application I/O that the channel had no room for.
    pub overflow: VecDeque<AppIo<Context>>,
    /// What SPDK had no room for: keys, in order. Each waits for the disk or for a peer.
    pub waiting: VecDeque<Key>,
    /// SPDK's own note of that, one a core.
    pub wait_entry: Box<sys::spdk_bdev_io_wait_entry>,
    pub is_waiting: bool,
    /// Extents in each core's activity log, for the report.
    pub active_extents: Arc<Vec<AtomicU32>>,
    pub next_manager_poll_ns: u64,
    /// The manager has something to go on with.
    pub manager_stirred: bool,
}

/// What the engine has under way.
pub struct InFlight {
    pub volume: u32,
    pub token: Token,
    pub data: Data<Context>,
    pub kind: InFlightKind,
}

#[derive(Clone, Copy)]
pub enum InFlightKind {
    Disk(crate::host::DiskIo),
    /// The flush that makes the write before it durable.
    FlushAfter,
    Peer(PeerSend),
    /// The first look at a device, before there is a volume; by the number of the opening.
    Opening(u32, crate::host::DiskIo),
    /// Overwrites the superblock of a device that is no volume's any more.
    Wiping(u32),
    /// The last step of a reset of the volume's bdev.
    Reset(BdevIo),
}

/// A command to a peer.
#[derive(Clone, Copy, Debug)]
pub struct PeerSend {
    pub slot: PeerSlot,
    pub opcode: u8,
    /// Command dwords.
    pub words: [u32; 8],
    /// Which bytes of the data go along.
    pub start: usize,
    pub len: usize,
    /// How often it has been sent.
    pub sends: u8,
}

pub fn token_of(key: Key) -> u64 {
    u64::from(key.generation) << 32 | u64::from(key.index)
}

pub fn key_of(token: u64) -> Key {
    Key {
        index: token as u32,
        generation: (token >> 32) as u32,
    }
}

impl State {
    pub fn volume(&mut self, volume: u32) -> Option<&mut CoreVolume> {
        self.volumes.get_mut(volume as usize)?.as_deref_mut()
    }

    /// On core 0: this node is Primary of the volume.
    pub fn is_primary(&mut self, volume: u32) -> bool {
        self.volume(volume)
            .and_then(|this| this.manager.as_ref())
            .is_some_and(|manager| manager.is_primary())
    }

    pub fn is_manager_core(&self) -> bool {
        self.core.index == MANAGER_CORE
    }
}

/// One event of the core's loop.
pub fn handle(state: &mut State, event: Event) {
    match event {
        Event::Submitted(io) => submitted(state, BdevIo(io)),
        Event::Done(token, outcome) => done(state, token, outcome),
        Event::PathLost(token) => {
            if !io::send_again(state, token) {
                done(state, token, Err(()));
            }
        }
        Event::RoomAgain(volume) => io::room_again(state, volume),
        Event::Job(job) => {
            state.core.note_work();
            job(state);
        }
        Event::ToManager(volume, message) => with_manager(state, volume, |manager, cx| {
            manager.message(cx, message);
        }),
        Event::ToChannel(volume, message) => with(state, volume, |this| {
            this.channel.message(&mut this.context, message);
        }),
        Event::Poll => poll(state),
    }
}

/// Calls the engine, then carries out what it has asked for.
pub fn with(state: &mut State, volume: u32, call: impl FnOnce(&mut CoreVolume)) {
    let Some(this) = state.volume(volume) else {
        return;
    };
    this.context.now_ns = super::context::now_ns();
    call(this);
    carry_out(state, volume);
}

/// As [`with`], for the manager.
pub fn with_manager(
    state: &mut State,
    volume: u32,
    call: impl FnOnce(&mut Manager<Context>, &mut Context),
) {
    with(state, volume, |this| {
        if let Some(manager) = &mut this.manager {
            this.manager_stirred = true;
            call(manager, &mut this.context);
        }
    });
}

fn carry_out(state: &mut State, volume: u32) {
    loop {
        let Some(this) = state.volume(volume) else {
            return;
        };
        let Some(action) = this.context.actions.pop_front() else {
            return;
        };
        state.core.note_work();
        match action {
            Action::Disk(token, io, data) => io::submit_disk(state, volume, token, io, data),
            Action::Peer(slot, token, command, data, part) => {
                io::submit_peer(state, volume, slot, token, &command, data, part);
            }
            Action::Finish(io, status) => bdev::finish(state.core, io, status),
            Action::Answer(io, answer) => bdev::answer(state.core, io, answer),
            Action::ToManager(message) => to_manager(state, volume, message),
            Action::ToChannel(channel, message) => {
                if channel == state.core.index {
                    with(state, volume, |this| {
                        this.channel.message(&mut this.context, message);
                    });
                } else if let Some(core) = super::core::all().get(channel) {
                    core.send(move |state| handle(state, Event::ToChannel(volume, message)));
                }
            }
            Action::LinkOpen(slot, address) => link::open(state, volume, slot, &address),
            Action::LinkClose(slot) => link::close(state, volume, slot, "reset"),
            Action::DiskRelease => {}
            Action::DiskClose => lifecycle::disk_closed(state, volume),
            Action::Ordered(id, outcome) => node::ordered(state, volume, id, outcome),
        }
    }
}

pub fn to_manager(state: &mut State, volume: u32, message: ToManager<Context>) {
    if state.is_manager_core() {
        with_manager(state, volume, |manager, cx| manager.message(cx, message));
    } else if let Some(core) = super::core::manager_core() {
        core.send(move |state| handle(state, Event::ToManager(volume, message)));
    }
}

/// An I/O of one of our bdevs.
fn submitted(state: &mut State, io: BdevIo) {
    let request = bdev::request(io);
    let volume = request.volume;
    if request.port == Port::Application {
        bdev::trace_submitted(io, &request);
    }
    if state.volume(volume).is_none() {
        return bdev::finish(state.core, io, AppStatus::Failed);
    }
    match request.port {
        Port::Application => application(state, volume, io),
        Port::Peers => received(state, volume, io),
    }
}

fn application(state: &mut State, volume: u32, io: BdevIo) {
    let Some((kind, lba, blocks, payload)) = bdev::application_request(io) else {
        return match bdev::other_request(io) {
            bdev::Other::Reset => io::reset(state, volume, io),
            bdev::Other::Abort(target) => abort(state, volume, io, target),
            bdev::Other::Unknown => bdev::finish(state.core, io, AppStatus::Invalid),
        };
    };
    let io = AppIo {
        kind,
        lba,
        blocks,
        payload,
        io,
    };
    with(state, volume, |this| this.offer(io));
}

/// An I/O that has not reached the engine yet can be taken back; any other cannot.
fn abort(state: &mut State, volume: u32, io: BdevIo, target: BdevIo) {
    let core = state.core;
    let Some(this) = state.volume(volume) else {
        return;
    };
    let position = this
        .overflow
        .iter()
        .position(|waiting| std::ptr::eq(waiting.io.0, target.0));
    match position.and_then(|position| this.overflow.remove(position)) {
        Some(waiting) => {
            bdev::aborted(core, waiting.io);
            bdev::finish(core, io, AppStatus::Ok);
        }
        None => bdev::finish(core, io, AppStatus::Failed),
    }
}

fn received(state: &mut State, volume: u32, io: BdevIo) {
    let Some((opcode, words, payload)) = bdev::peer_request(io) else {
        return bdev::finish(state.core, io, AppStatus::Invalid);
    };
    let block_size = state.volume(volume).map_or(0, |this| this.block_size);
    let command = match received::command(opcode, words, payload.len as u32, block_size) {
        Ok(command) => command,
        Err(answer) => return bdev::answer(state.core, io, answer),
    };
    let payload = (payload.len > 0).then_some(payload);
    with(state, volume, |this| {
        this.channel
            .received(&mut this.context, command, payload, io);
    });
}

impl CoreVolume {
    fn offer(&mut self, io: AppIo<Context>) {
        if !self.overflow.is_empty() {
            self.overflow.push_back(io);
        } else if let Err(io) = self.channel.submit(&mut self.context, io) {
            self.overflow.push_back(io);
        }
    }

    fn offer_overflow(&mut self) {
        while let Some(io) = self.overflow.pop_front() {
            if let Err(io) = self.channel.submit(&mut self.context, io) {
                self.overflow.push_front(io);
                return;
            }
        }
    }
}

/// Something that was submitted has ended; `outcome` is completion dword 0.
fn done(state: &mut State, token: u64, outcome: Result<u32, ()>) {
    let key = key_of(token);
    if outcome.is_ok() && io::flush_after(state, key) {
        return;
    }
    let Some(entry) = state.in_flight.remove(key) else {
        return;
    };
    let volume = entry.volume;
    let (status, answer) = match (entry.kind, outcome) {
        (InFlightKind::Opening(opening, _), outcome) => {
            return opening::completed(state, opening, entry, outcome.is_ok());
        }
        (InFlightKind::Wiping(opening), outcome) => {
            return opening::wiped(state, opening, outcome.is_ok());
        }
        (InFlightKind::Reset(io), outcome) => {
            let status = outcome.map_or(AppStatus::Failed, |_| AppStatus::Ok);
            return bdev::finish(state.core, io, status);
        }
        (InFlightKind::Peer(sent), outcome) => {
            link::ended(state, volume, sent.slot);
            match outcome {
                Ok(dword0) => (IoStatus::Ok, PeerAnswer::from_dword0(dword0)),
                // Engines answer in dword 0: anything else is the transport's, and ends the session.
                Err(()) => (IoStatus::Gone, PeerAnswer::Malformed),
            }
        }
        (_, Ok(_)) => (IoStatus::Ok, PeerAnswer::Ok),
        (_, Err(())) => (IoStatus::Failed, PeerAnswer::Ok),
    };
    let completion = Completion {
        token: entry.token,
        status,
        answer,
        data: entry.data,
    };
    with(state, volume, |this| {
        if completion.token.0 & TOKEN_MANAGER == 0 {
            this.channel.complete(&mut this.context, completion);
        } else if let Some(manager) = &mut this.manager {
            this.manager_stirred = true;
            manager.complete(&mut this.context, completion);
        }
    });
}

fn poll(state: &mut State) {
    if state.is_manager_core() {
        awaited::poll(state);
        opening::poll(state);
        endpoint::poll(state);
        ana::poll(state);
        link::poll(state);
        frozen::poll(state);
    }
    if state.volumes.is_empty() {
        return;
    }
    let now_ns = super::context::now_ns();
    for volume in 0..state.volumes.len() as u32 {
        let index = state.core.index;
        let Some(this) = state.volume(volume) else {
            continue;
        };
        let manager_is_due =
            this.manager.is_some() && (this.manager_stirred || now_ns >= this.next_manager_poll_ns);
        if !manager_is_due && this.overflow.is_empty() && this.channel.is_idle() {
            continue;
        }
        with(state, volume, |this| {
            this.offer_overflow();
            this.channel.poll(&mut this.context);
            if manager_is_due && let Some(manager) = &mut this.manager {
                this.manager_stirred = false;
                manager.poll(&mut this.context);
                this.next_manager_poll_ns = now_ns + manager.poll_interval_ns();
            }
        });
        if let Some(this) = state.volume(volume)
            && let Some(active) = this.active_extents.get(index)
        {
            active.store(this.channel.active_extents() as u32, Ordering::Relaxed);
        }
    }
}

/// The data of an entry, as a list of pieces.
pub fn payload(data: &mut Data<Context>, len: usize) -> Payload {
    match data {
        Data::None => Payload::NONE,
        Data::Payload(payload) => *payload,
        Data::Buffer(buffer) => buffer.payload(len),
    }
}

/// Whether the kind of request carries data.
pub fn carries_data(kind: RequestKind) -> bool {
    matches!(kind, RequestKind::Read | RequestKind::Write { .. })
}
