//! What the engine asks of disks and peers, as I/O of SPDK's bdevs. Called by `volume.rs`. Whatever SPDK has no room for
//! waits in the volume's queue on this core until SPDK says that it has.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr;

use super::backing::{Disk, Flush};
use super::context::{BdevIo, Context};
use super::core::{Core, Event, State};
use super::volume::{InFlight, InFlightKind, PeerSend, payload, token_of};
use super::{bdev, sys};
use crate::engine::peer::command::PeerCommand;
use crate::host::{AppStatus, Data, DiskIo, DiskOp, PeerSlot, Token};
use crate::hosts::control::received;
use crate::hosts::slab::Key;

/// NVM Express Base Specification, opcode of Flush.
const NVME_FLUSH: u8 = 0;
/// As above, of Write.
const NVME_WRITE: u8 = 1;
/// As above, MDTS: a transfer of one page is always possible.
const NVME_TRANSFER_BYTES_LEAST: u64 = 4096;
/// Force Unit Access in command dword 12 of a write.
pub const CDW12_FUA: u32 = 1 << 30;

/// As above, status code types, and the status of a command whose queue is gone.
const NVME_STATUS_GENERIC: i32 = 0;
const NVME_STATUS_PATH: i32 = 3;
const NVME_ABORTED_SQ_DELETION: i32 = 8;
/// How often a command is sent to a peer before the session is given up.
const SENDS_MAX: u8 = 3;

extern "C" fn completed(io: *mut sys::spdk_bdev_io, success: bool, key: *mut c_void) {
    let (mut dword0, mut code_type, mut code) = (0_u32, 0, 0);
    // SAFETY: the I/O is complete and freed once, here.
    unsafe {
        sys::spdk_bdev_io_get_nvme_status(io, &raw mut dword0, &raw mut code_type, &raw mut code);
        sys::spdk_bdev_free_io(io);
    }
    let is_answer = received::answer(code_type as u8, code as u8, dword0).is_some();
    let is_path_lost = code_type == NVME_STATUS_PATH
        || (code_type == NVME_STATUS_GENERIC && code == NVME_ABORTED_SQ_DELETION);
    let event = if success || is_answer {
        Event::Done(key as u64, Ok(dword0))
    } else if is_path_lost {
        Event::PathLost(key as u64)
    } else {
        Event::Done(key as u64, Err(()))
    };
    if let Some(core) = Core::current() {
        core.enter(event);
    }
}

/// SPDK's argument of a completion: the key of what has been submitted, which is no pointer to anything.
fn argument(key: Key) -> *mut c_void {
    token_of(key) as usize as *mut c_void
}

pub fn submit_disk(state: &mut State, volume: u32, token: Token, io: DiskIo, data: Data<Context>) {
    let key = state.in_flight.insert(InFlight {
        volume,
        token,
        data,
        kind: InFlightKind::Disk(io),
    });
    start(state, volume, key);
}

pub fn submit_peer(
    state: &mut State,
    volume: u32,
    slot: PeerSlot,
    token: Token,
    command: &PeerCommand,
    data: Data<Context>,
    part: Range<usize>,
) {
    let kind = InFlightKind::Peer(PeerSend {
        slot,
        opcode: command.opcode(),
        words: command.emit().0,
        start: part.start,
        len: part.len(),
        sends: 1,
    });
    let key = state.in_flight.insert(InFlight {
        volume,
        token,
        data,
        kind,
    });
    start(state, volume, key);
}

/// Submits, or lets it wait behind what waits already.
fn start(state: &mut State, volume: u32, key: Key) {
    let waits = state.volume(volume).is_some_and(|this| this.is_waiting);
    let result = if waits {
        -libc::ENOMEM
    } else {
        try_start(state, volume, key)
    };
    if result == -libc::ENOMEM {
        if let Some(this) = state.volume(volume) {
            this.waiting.push_back(key);
        }
        if !waits {
            wait_for_room(state, volume, key);
        }
    } else if result != 0 {
        state.core.enter(Event::Done(token_of(key), Err(())));
    }
}

fn try_start(state: &mut State, volume: u32, key: Key) -> c_int {
    let Some(this) = state.volumes.get(volume as usize).and_then(Option::as_ref) else {
        return -libc::ENODEV;
    };
    let Some(entry) = state.in_flight.get_mut(key) else {
        return 0;
    };
    match entry.kind {
        InFlightKind::Disk(io) => match &this.disk {
            Some(disk) => start_disk(disk, io, &mut entry.data, argument(key)),
            None => -libc::ENODEV,
        },
        InFlightKind::FlushAfter => match &this.disk {
            Some(disk) => flush(disk, argument(key)),
            None => -libc::ENODEV,
        },
        InFlightKind::Peer(PeerSend {
            slot,
            opcode,
            words,
            start,
            len,
            ..
        }) => {
            let Some(queue) = &this.context.queues[slot] else {
                return -libc::ENOTCONN;
            };
            let all = payload(&mut entry.data, len);
            // SAFETY: the data is in the slab, and its memory is valid, until the completion.
            let data = unsafe { state.lists.part(key.index, all, start, len) };
            let mut command = sys::spdk_nvme_cmd::default();
            sys::set_command(&mut command, opcode, words);
            // SAFETY: the queue's channel belongs to this thread; the lists live until the completion.
            unsafe {
                match data.iov_count {
                    0 | 1 => {
                        let buffer = if data.iov_count == 0 {
                            ptr::null_mut()
                        } else {
                            (*data.iovs).iov_base
                        };
                        sys::spdk_bdev_nvme_io_passthru(
                            queue.desc,
                            queue.channel,
                            &raw const command,
                            buffer,
                            if data.iov_count == 0 { 0 } else { len },
                            Some(completed),
                            argument(key),
                        )
                    }
                    count => sys::spdk_bdev_nvme_iov_passthru_md(
                        queue.desc,
                        queue.channel,
                        &raw const command,
                        data.iovs,
                        count,
                        len,
                        ptr::null_mut(),
                        0,
                        Some(completed),
                        argument(key),
                    ),
                }
            }
        }
        _ => -libc::EINVAL,
    }
}

/// Whether a write is durable by itself when it completes. SPDK's block layer takes FUA from nobody (bdev_nvme leaves it
/// out of what it sends), so the command is passed through: only what no device finds too long and every device can
/// reach, which are blocks of metadata. Other writes that are to be durable are flushed.
pub fn writes_through(disk: &Disk, io: DiskIo, data: &Data<Context>) -> bool {
    disk.flush == Flush::Nvme
        && io.op == DiskOp::Write { fua: true }
        && io.len <= NVME_TRANSFER_BYTES_LEAST
        && matches!(data, Data::Buffer(_))
}

/// Starts an I/O on a disk; `argument` comes back with its completion.
pub fn start_disk(
    disk: &Disk,
    io: DiskIo,
    data: &mut Data<Context>,
    argument: *mut c_void,
) -> c_int {
    let block = u64::from(disk.block_size.max(1));
    let (lba, blocks) = (io.offset / block, io.len / block);
    let through = writes_through(disk, io, data);
    let data = payload(data, io.len as usize);
    // SAFETY: the channel belongs to this thread; data lives until the completion.
    unsafe {
        match io.op {
            DiskOp::Read => sys::spdk_bdev_readv_blocks(
                disk.desc,
                disk.channel,
                data.iovs,
                data.iov_count,
                lba,
                blocks,
                Some(completed),
                argument,
            ),
            DiskOp::Write { .. } if through => {
                let mut command = sys::spdk_nvme_cmd::default();
                let cdw12 = (blocks as u32).wrapping_sub(1) | CDW12_FUA;
                let words = [0, 0, lba as u32, (lba >> 32) as u32, cdw12, 0, 0, 0];
                sys::set_command(&mut command, NVME_WRITE, words);
                sys::spdk_bdev_nvme_io_passthru(
                    disk.desc,
                    disk.channel,
                    &raw const command,
                    (*data.iovs).iov_base,
                    io.len as usize,
                    Some(completed),
                    argument,
                )
            }
            DiskOp::Write { .. } => sys::spdk_bdev_writev_blocks(
                disk.desc,
                disk.channel,
                data.iovs,
                data.iov_count,
                lba,
                blocks,
                Some(completed),
                argument,
            ),
            // Only zeroes are the same on every replica: what a device reads after an unmap is its own affair.
            DiskOp::WriteZeroes { .. } | DiskOp::Unmap => sys::spdk_bdev_write_zeroes_blocks(
                disk.desc,
                disk.channel,
                lba,
                blocks,
                Some(completed),
                argument,
            ),
            DiskOp::Flush => flush(disk, argument),
        }
    }
}

fn flush(disk: &Disk, argument: *mut c_void) -> c_int {
    // SAFETY: the channel belongs to this thread.
    unsafe {
        match disk.flush {
            Flush::Bdev => sys::spdk_bdev_flush_blocks(
                disk.desc,
                disk.channel,
                0,
                disk.blocks,
                Some(completed),
                argument,
            ),
            Flush::Nvme => {
                // bdev_nvme completes a flush without sending it unless told otherwise; a command it passes through.
                let mut command = sys::spdk_nvme_cmd::default();
                sys::set_command(&mut command, NVME_FLUSH, [0; 8]);
                sys::spdk_bdev_nvme_io_passthru(
                    disk.desc,
                    disk.channel,
                    &raw const command,
                    ptr::null_mut(),
                    0,
                    Some(completed),
                    argument,
                )
            }
            Flush::None => {
                if let Some(core) = Core::current() {
                    core.enter(Event::Done(argument as u64, Ok(0)));
                }
                0
            }
        }
    }
}

/// Sends a command to a peer again whose path is gone, where others may be left or the operator has patience. bdev_nvme
/// does so by itself for those only whose command dwords 12 and 13 are zero: it takes them for something else. The peer
/// carries it out once, however often it arrives. False where nothing is to be done.
pub fn send_again(state: &mut State, token: u64) -> bool {
    let key = super::volume::key_of(token);
    let Some(entry) = state.in_flight.get_mut(key) else {
        return false;
    };
    let volume = entry.volume;
    let InFlightKind::Peer(sent) = &mut entry.kind else {
        return false;
    };
    let this = state.volumes.get(volume as usize).and_then(Option::as_ref);
    let queue = this.and_then(|this| this.context.queues[sent.slot].as_ref());
    if sent.sends >= SENDS_MAX || !queue.is_some_and(|queue| queue.is_patient && !queue.closing) {
        return false;
    }
    sent.sends += 1;
    start(state, volume, key);
    true
}

/// Flushes for a write that has to be durable and is not yet; false where nothing is to be done.
pub fn flush_after(state: &mut State, key: Key) -> bool {
    let Some(entry) = state.in_flight.get(key) else {
        return false;
    };
    let (volume, kind) = (entry.volume, entry.kind);
    let InFlightKind::Disk(io) = kind else {
        return false;
    };
    let this = state.volumes.get(volume as usize).and_then(Option::as_ref);
    let disk = this.and_then(|this| this.disk.as_ref());
    let needed = disk.is_some_and(|disk| match io.op {
        DiskOp::Write { fua } => {
            fua && disk.flush != Flush::None && !writes_through(disk, io, &entry.data)
        }
        DiskOp::WriteZeroes { fua } => fua && disk.flush != Flush::None,
        _ => false,
    });
    if needed {
        if let Some(entry) = state.in_flight.get_mut(key) {
            entry.kind = InFlightKind::FlushAfter;
        }
        start(state, volume, key);
    }
    needed
}

extern "C" fn room_again_cb(volume: *mut c_void) {
    if let Some(core) = Core::current() {
        core.enter(Event::RoomAgain(volume as usize as u32));
    }
}

/// Has SPDK call when the bdev that `key` is for has resources again.
fn wait_for_room(state: &mut State, volume: u32, key: Key) {
    let Some(this) = state
        .volumes
        .get_mut(volume as usize)
        .and_then(Option::as_mut)
    else {
        return;
    };
    let Some(entry) = state.in_flight.get(key) else {
        return;
    };
    let (desc, channel) = match (entry.kind, &this.disk) {
        (InFlightKind::Peer(sent), _) => match &this.context.queues[sent.slot] {
            Some(queue) => (queue.desc, queue.channel),
            None => (ptr::null_mut(), ptr::null_mut()),
        },
        (_, Some(disk)) => (disk.desc, disk.channel),
        (_, None) => (ptr::null_mut(), ptr::null_mut()),
    };
    if !desc.is_null() {
        // SAFETY: descriptor and channel are open; the entry stays where it is until SPDK has called.
        let queued = unsafe {
            let bdev = sys::spdk_bdev_desc_get_bdev(desc);
            let entry = this.wait_entry.as_mut();
            entry.bdev = bdev;
            entry.cb_fn = Some(room_again_cb);
            entry.cb_arg = volume as usize as *mut c_void;
            sys::spdk_bdev_queue_io_wait(bdev, channel, entry)
        };
        if queued == 0 {
            this.is_waiting = true;
            return;
        }
    }
    // There is room already, or nothing to wait for: the loop tries once more.
    state.core.enter(Event::RoomAgain(volume));
}

/// Tries again what waited, in order.
pub fn room_again(state: &mut State, volume: u32) {
    if let Some(this) = state.volume(volume) {
        this.is_waiting = false;
    }
    loop {
        let Some(key) = state
            .volume(volume)
            .and_then(|this| this.waiting.pop_front())
        else {
            return;
        };
        let result = try_start(state, volume, key);
        if result == -libc::ENOMEM {
            if let Some(this) = state.volume(volume) {
                this.waiting.push_front(key);
            }
            return wait_for_room(state, volume, key);
        }
        if result != 0 {
            state.core.enter(Event::Done(token_of(key), Err(())));
        }
    }
}

/// A reset of the volume: SPDK has waited for its I/O in vain. The backing device lets go of what it has; then the
/// engine's I/O ends, and with it the application's.
pub fn reset(state: &mut State, volume: u32, io: BdevIo) {
    let target = state
        .volume(volume)
        .and_then(|this| this.disk.as_ref())
        .map(|disk| (disk.desc, disk.channel));
    let Some((desc, channel)) = target else {
        return bdev::finish(state.core, io, AppStatus::Ok);
    };
    let key = state.in_flight.insert(InFlight {
        volume,
        token: Token(0),
        data: Data::None,
        kind: InFlightKind::Reset(io),
    });
    // SAFETY: the channel belongs to this thread.
    let result = unsafe { sys::spdk_bdev_reset(desc, channel, Some(completed), argument(key)) };
    if result != 0 {
        state.core.enter(Event::Done(token_of(key), Err(())));
    }
}
