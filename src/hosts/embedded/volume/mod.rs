//! The engine's volumes on one core: how I/O, completions and messages reach the engine, and how what it asks for is
//! carried out. The core's loop calls the functions here. `context` is the engine's host, `link` keeps the queue pairs
//! to peers, `control` takes requests on core 0, where `opening` and `lifecycle` make and end volumes.

mod ana;
mod awaited;
mod context;
mod control;
mod lifecycle;
mod link;
mod opening;
mod split;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::admin::ControllerKey;
use super::bdev::{BdevId, BdevIo, BdevOp, IoError, IoResult, Owner, Ticket};
use super::core::Core;
use super::initiator::{QueueChange, QueueKey};
use super::nvme_tcp::buffer::DataPointer;
use super::nvme_tcp::command::{NvmeStatus, Sqe};
use super::nvme_tcp::controller::ControllerEvent;
use crate::engine::MAX_PEERS;
use crate::engine::channel::{AppIo, Channel, TOKEN_MANAGER};
use crate::engine::manager::Manager;
use crate::engine::message::{ToChannel, ToManager};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::engine::request::RequestKind;
use crate::host::{AppStatus, Completion, Data, DiskIo, DiskOp, IoStatus, PeerSlot, Token};
use crate::hosts::control::endpoint::ENDPOINT_NSID;
use crate::hosts::control::received;
use crate::hosts::slab::{Key, Slab};

pub use awaited::is_making;
pub use control::{config, request};

use awaited::Awaited;
use context::{Action, AppHandle, Context, PeerTicket};
use control::Control;
use link::Links;
use opening::Opening;
use split::Split;

/// Between two looks at a device that is being opened and waits for memory.
const OPENING_POLL_NS: u64 = 2_000_000;
/// Between two calls of a channel's poller while requests wait.
const CHANNEL_POLL_NS: u64 = 100_000;

/// The core on which the managers are.
const MANAGER_CORE: usize = 0;

/// The volumes of one core.
#[derive(Default)]
pub struct CoreVolumes {
    volumes: Vec<Option<Box<CoreVolume>>>,
    /// Devices that are being opened; on core 0.
    openings: Vec<Opening>,
    /// What only core 0 knows of each volume.
    controls: Vec<Control>,
    awaited: Awaited,
    next_order: u64,
}

/// What the engine's cores tell each other.
pub enum VolumeMessage {
    ToManager(u32, ToManager<Context>),
    ToChannel(u32, ToChannel<Context>),
    Link(u32, link::LinkMessage),
}

/// One volume on one core.
struct CoreVolume {
    channel: Channel<Context>,
    /// On core 0.
    manager: Option<Manager<Context>>,
    links: Links,
    context: Context,
    /// The backing bdev while there is one.
    disk: Option<(BdevId, u32)>,
    block_size: u32,
    in_flight: Slab<InFlight>,
    splits: Slab<Split>,
    /// Application I/O that the channel had no room for.
    overflow: VecDeque<AppIo<Context>>,
    /// Extents in each core's activity log, for the report.
    active_extents: Arc<Vec<AtomicU32>>,
    next_manager_poll_ns: u64,
    /// The manager has something to go on with.
    manager_stirred: bool,
}

/// What the engine has under way.
struct InFlight {
    token: Token,
    data: Data<Context>,
    kind: InFlightKind,
}

#[derive(Clone, Copy)]
enum InFlightKind {
    Disk,
    /// A flush is still to follow.
    DiskThenFlush,
    Peer(PeerSlot),
}

/// Which side of a volume an I/O came in at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Application,
    Peers,
}

impl CoreVolumes {
    fn get_mut(&mut self, volume: u32) -> Option<&mut CoreVolume> {
        self.volumes.get_mut(volume as usize)?.as_deref_mut()
    }
}

/// Calls the engine, then carries out what it has asked for.
fn with(core: &mut Core, volume: u32, call: impl FnOnce(&mut CoreVolume)) {
    core.reactor.tick();
    let now_ns = core.reactor.now_ns();
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    this.context.now_ns = now_ns;
    call(this);
    carry_out(core, volume);
}

fn carry_out(core: &mut Core, volume: u32) {
    loop {
        let Some(this) = core.volumes.get_mut(volume) else {
            return;
        };
        let Some(action) = this.context.actions.pop_front() else {
            return;
        };
        match action {
            Action::Disk(token, io, data) => submit_disk(core, volume, token, io, data),
            Action::Peer(slot, token, command, data, part) => {
                submit_peer(core, volume, slot, token, &command, data, part);
            }
            Action::Finish(io, status) => finish(core, volume, io, status),
            Action::Answer(io, answer) => answer_peer(core, io, answer),
            Action::ToManager(message) => {
                if core.index == MANAGER_CORE {
                    to_manager(core, volume, message);
                } else {
                    core.send_volume(MANAGER_CORE, VolumeMessage::ToManager(volume, message));
                }
            }
            Action::ToChannel(channel, message) => {
                if channel == core.index {
                    to_channel(core, volume, message);
                } else {
                    core.send_volume(channel, VolumeMessage::ToChannel(volume, message));
                }
            }
            Action::LinkOpen(slot, address) => link::open(core, volume, slot, &address),
            Action::LinkClose(slot) => link::close(core, volume, slot, "reset"),
            Action::DiskClose => lifecycle::disk_closed(core, volume, |_| ()),
            Action::Ordered(id, outcome) => control::ordered(core, volume, id, outcome),
        }
    }
}

fn to_manager(core: &mut Core, volume: u32, message: ToManager<Context>) {
    if let Some(CoreVolume {
        manager: Some(manager),
        context,
        manager_stirred,
        ..
    }) = core.volumes.get_mut(volume)
    {
        *manager_stirred = true;
        manager.message(context, message);
    }
}

fn to_channel(core: &mut Core, volume: u32, message: ToChannel<Context>) {
    if let Some(this) = core.volumes.get_mut(volume) {
        this.channel.message(&mut this.context, message);
    }
}

fn pointer(data: &Data<Context>, len: usize) -> DataPointer {
    match data {
        Data::None => DataPointer::NONE,
        Data::Payload(payload) => *payload,
        Data::Buffer(buffer) => buffer.data(len),
    }
}

/// A part of the data that the engine has checked to be there.
fn part_of(data: &Data<Context>, part: Range<usize>) -> DataPointer {
    pointer(data, part.end)
        .part(part.start as u32, part.len() as u32)
        .unwrap_or(DataPointer::NONE)
}

fn token_of(key: Key) -> u64 {
    u64::from(key.generation) << 32 | u64::from(key.index)
}

fn key_of(token: u64) -> Key {
    Key {
        index: token as u32,
        generation: (token >> 32) as u32,
    }
}

fn submit_disk(core: &mut Core, volume: u32, token: Token, io: DiskIo, data: Data<Context>) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let disk = this.disk;
    let bytes = pointer(&data, io.len as usize);
    let (op, kind) = match io.op {
        DiskOp::Read => (BdevOp::Read, InFlightKind::Disk),
        DiskOp::Write { fua } => (BdevOp::Write { fua }, InFlightKind::Disk),
        DiskOp::WriteZeroes { fua: false } => (BdevOp::WriteZeroes, InFlightKind::Disk),
        DiskOp::WriteZeroes { fua: true } => (BdevOp::WriteZeroes, InFlightKind::DiskThenFlush),
        DiskOp::Unmap => (BdevOp::Unmap, InFlightKind::Disk),
        DiskOp::Flush => (BdevOp::Flush, InFlightKind::Disk),
    };
    let key = this.in_flight.insert(InFlight { token, data, kind });
    let owner = Owner::Volume {
        volume,
        token: token_of(key),
    };
    match disk {
        Some((bdev, block_size)) => {
            let block = u64::from(block_size);
            let io = BdevIo {
                op,
                lba: io.offset / block,
                blocks: io.len / block,
                data: bytes,
            };
            core.submit(bdev, io, owner);
        }
        None => answer_later(core, owner, Err(IoError::Errno(libc::ENODEV))),
    }
}

fn answer_peer(core: &mut Core, io: PeerTicket, answer: PeerAnswer) {
    let status = if received::is_without_data(io.opcode, answer) {
        Err(IoError::Nvme(NvmeStatus::ABORT_REQUESTED))
    } else {
        Ok(())
    };
    core.complete(io.ticket, status, answer.to_dword0());
}

fn answer_later(core: &mut Core, owner: Owner, status: IoResult) {
    core.answer(super::bdev::Done {
        owner,
        status,
        dword0: 0,
    });
}

fn submit_peer(
    core: &mut Core,
    volume: u32,
    slot: PeerSlot,
    token: Token,
    command: &PeerCommand,
    data: Data<Context>,
    part: Range<usize>,
) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let bytes = part_of(&data, part);
    let queue = this.context.queue_in_use(slot).map(|queue| queue.key);
    let key = this.in_flight.insert(InFlight {
        token,
        data,
        kind: InFlightKind::Peer(slot),
    });
    let owner = Owner::Volume {
        volume,
        token: token_of(key),
    };
    let words = command.emit().0;
    let sqe = Sqe {
        opcode: command.opcode(),
        nsid: ENDPOINT_NSID,
        cdw2: words[0],
        cdw3: words[1],
        cdw10_15: [words[2], words[3], words[4], words[5], words[6], words[7]],
        ..Sqe::default()
    };
    let taken = queue.is_some_and(|queue| core.initiators.submit(queue, sqe, bytes, owner).is_ok());
    if !taken {
        // The queue pair has ended meanwhile; its link event is on the way.
        answer_later(core, owner, Err(IoError::Errno(libc::ENOTCONN)));
    }
}

fn finish(core: &mut Core, volume: u32, io: AppHandle, status: AppStatus) {
    let status = match status {
        AppStatus::Ok => Ok(()),
        AppStatus::Failed => Err(IoError::Errno(libc::EIO)),
        AppStatus::Invalid => Err(IoError::Errno(libc::EINVAL)),
        AppStatus::Inaccessible => Err(IoError::Nvme(NvmeStatus::ANA_INACCESSIBLE)),
    };
    match io {
        AppHandle::Whole(ticket) => core.complete(ticket, status, 0),
        AppHandle::Part(key) => split::go_on(core, volume, key, status),
    }
}

/// An I/O for a volume; answered by [`Core::complete`] with the ticket.
pub fn submit(core: &mut Core, volume: u32, port: Port, ticket: Ticket, io: BdevIo) {
    if core.volumes.get_mut(volume).is_none() {
        return core.complete(ticket, Err(IoError::Errno(libc::ENODEV)), 0);
    }
    match port {
        Port::Application => split::submit(core, volume, ticket, io),
        Port::Peers => peer_command(core, volume, ticket, io),
    }
}

fn submit_app(
    core: &mut Core,
    volume: u32,
    kind: RequestKind,
    lba: u64,
    blocks: u32,
    data: DataPointer,
    io: AppHandle,
) {
    let io = AppIo {
        kind,
        lba,
        blocks,
        payload: (!data.is_empty()).then_some(data),
        io,
    };
    with(core, volume, |this| this.offer(io));
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

fn peer_command(core: &mut Core, volume: u32, ticket: Ticket, io: BdevIo) {
    let BdevOp::Vendor {
        opcode,
        cdw2,
        cdw3,
        cdw10_15: [cdw10, cdw11, cdw12, cdw13, cdw14, cdw15],
    } = io.op
    else {
        return core.complete(ticket, Err(IoError::Errno(libc::EOPNOTSUPP)), 0);
    };
    let words = [cdw2, cdw3, cdw10, cdw11, cdw12, cdw13, cdw14, cdw15];
    let len = io.data.length_bytes();
    let block_size = core
        .volumes
        .get_mut(volume)
        .map_or(0, |this| this.block_size);
    let command = match received::command(opcode, words, len, block_size) {
        Ok(command) => command,
        Err(answer) => return answer_peer(core, PeerTicket { ticket, opcode }, answer),
    };
    let io_of_peer = PeerTicket { ticket, opcode };
    let payload = (len > 0).then_some(io.data);
    with(core, volume, |this| {
        this.channel
            .received(&mut this.context, command, payload, io_of_peer);
    });
}

/// An I/O that the volume submitted as `Owner::Volume` was answered.
pub fn complete(core: &mut Core, volume: u32, token: u64, status: IoResult, dword0: u32) {
    if opening::opening_completed(core, volume, token, status) {
        return;
    }
    let key = key_of(token);
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    if status.is_ok()
        && let Some(entry) = this.in_flight.get_mut(key)
        && matches!(entry.kind, InFlightKind::DiskThenFlush)
        && let Some((bdev, _)) = this.disk
    {
        entry.kind = InFlightKind::Disk;
        let flush = BdevIo {
            op: BdevOp::Flush,
            lba: 0,
            blocks: 0,
            data: DataPointer::NONE,
        };
        return core.submit(bdev, flush, Owner::Volume { volume, token });
    }
    let Some(entry) = this.in_flight.remove(key) else {
        return;
    };
    let (io_status, answer) = match entry.kind {
        InFlightKind::Peer(slot) => {
            if let Some(queue) = &mut this.context.queues[slot] {
                queue.outstanding = queue.outstanding.saturating_sub(1);
            }
            let answer = match status {
                Ok(()) => received::answer(0, 0, dword0),
                Err(IoError::Nvme(status)) => received::answer(status.sct, status.sc, dword0),
                Err(IoError::Errno(_)) => None,
            };
            // Anything that is no engine's answer is the transport's, and ends the session.
            answer.map_or((IoStatus::Gone, PeerAnswer::Malformed), |answer| {
                (IoStatus::Ok, answer)
            })
        }
        _ => (disk_status(status), PeerAnswer::Ok),
    };
    let completion = Completion {
        token: entry.token,
        status: io_status,
        answer,
        data: entry.data,
    };
    with(core, volume, |this| {
        if completion.token.0 & TOKEN_MANAGER == 0 {
            this.channel.complete(&mut this.context, completion);
        } else if let Some(manager) = &mut this.manager {
            this.manager_stirred = true;
            manager.complete(&mut this.context, completion);
        }
    });
}

fn disk_status(status: IoResult) -> IoStatus {
    match status {
        Ok(()) => IoStatus::Ok,
        Err(IoError::Errno(libc::ENODEV)) => IoStatus::Gone,
        Err(_) => IoStatus::Failed,
    }
}

/// Another core's message.
pub fn message(core: &mut Core, message: VolumeMessage) {
    match message {
        VolumeMessage::ToManager(volume, message) => with(core, volume, |this| {
            if let Some(manager) = &mut this.manager {
                this.manager_stirred = true;
                manager.message(&mut this.context, message);
            }
        }),
        VolumeMessage::ToChannel(volume, message) => with(core, volume, |this| {
            this.channel.message(&mut this.context, message);
        }),
        VolumeMessage::Link(volume, message) => link::message(core, volume, message),
    }
}

/// A queue pair that the volume opened came up or is gone; `link` is the volume's name for it.
pub fn link_event(core: &mut Core, volume: u32, link: u64, queue: QueueKey, change: QueueChange) {
    link::event(core, volume, link, queue, change);
}

/// News of a controller that the volume opened for a link.
pub fn admin_event(
    core: &mut Core,
    volume: u32,
    link: u64,
    controller: ControllerKey,
    change: ControllerEvent,
) {
    link::admin_event(core, volume, link, controller, change);
}

/// Once a round of the loop; returns whether there was work.
pub fn poll(core: &mut Core) -> bool {
    awaited::poll(core);
    opening::poll_openings(core);
    let now_ns = core.reactor.now_ns();
    let mut worked = false;
    for volume in 0..core.volumes.volumes.len() as u32 {
        let Some(this) = core.volumes.get_mut(volume) else {
            continue;
        };
        let manager_is_due =
            this.manager.is_some() && (this.manager_stirred || now_ns >= this.next_manager_poll_ns);
        if !manager_is_due && this.overflow.is_empty() && this.channel.is_idle() {
            continue;
        }
        with(core, volume, |this| {
            this.offer_overflow();
            this.channel.poll(&mut this.context);
            if manager_is_due && let Some(manager) = &mut this.manager {
                this.manager_stirred = false;
                manager.poll(&mut this.context);
                this.next_manager_poll_ns = now_ns + manager.poll_interval_ns();
            }
            worked |= !this.context.actions.is_empty();
        });
        if manager_is_due {
            ana::poll(core, volume);
        }
        let index = core.index;
        if let Some(this) = core.volumes.get_mut(volume)
            && let Some(active) = this.active_extents.get(index)
        {
            active.store(this.channel.active_extents() as u32, Ordering::Relaxed);
        }
    }
    worked
}

/// When `poll` wants to be called again though nothing happens, on the reactor's clock.
pub fn next_deadline_ns(core: &Core) -> Option<u64> {
    let now_ns = core.reactor.now_ns();
    let volumes = core.volumes.volumes.iter().flatten().filter_map(|this| {
        let manager = this.manager.as_ref().map(|_| this.next_manager_poll_ns);
        let waits = !this.channel.is_idle() || !this.overflow.is_empty();
        let channel = waits.then_some(now_ns + CHANNEL_POLL_NS);
        manager.into_iter().chain(channel).min()
    });
    let opening = (!core.volumes.openings.is_empty()).then_some(now_ns + OPENING_POLL_NS);
    volumes.chain(opening).min()
}

/// The node is going down, called on core 0: `then` when no volume is left.
pub fn shutdown(core: &mut Core, then: impl FnOnce(&mut Core) + 'static) {
    lifecycle::shutdown(core, then);
}

/// Slots of a volume's peers.
fn slots() -> std::ops::Range<PeerSlot> {
    0..MAX_PEERS
}

#[cfg(test)]
mod tests;
