//! Backing bdevs that are being opened, on core 0: read, and made into volumes if they are to be, before there is a
//! volume or a disk for one. Asked for by an RPC, or by SPDK's examination of a bdev that has appeared.

use std::ffi::c_void;

use super::awaited::bdev_named;
use super::backing::{self, Backing, Disk, Flush};
use super::context::{Action, Context};
use super::core::State;
use super::lifecycle::{start, start_attach};
use super::node::{Control, Pending};
use super::volume::{InFlight, InFlightKind, token_of};
use super::{awaited, io};
use crate::engine::open::{Goal, OpenError, Opened, Opener};
use crate::engine::peer::answer::PeerAnswer;
use crate::host::{Completion, Data, DiskIo, DiskOp, IoStatus, Token};
use crate::hosts::control::{device, refusal};
use crate::rpc::volume::CreateVolume;
use crate::rpc::{Reply, RpcError};

/// Why a device is being opened.
enum Purpose {
    Create(Box<CreateVolume>),
    /// For the volume of this number.
    Attach(u32),
    Wipe,
    /// To see whether it carries a volume that is to come back.
    Examine,
}

/// A device that is being opened, under a volume number of its own.
pub struct Opening {
    pub volume: u32,
    /// Its bdev has gone meanwhile.
    pub is_removed: bool,
    number: u32,
    purpose: Purpose,
    opener: Opener<Context>,
    context: Context,
    pub backing: Backing,
    claimed: bool,
    disk: Disk,
    /// What SPDK had no room for.
    waiting: Option<(Token, DiskIo, Data<Context>)>,
    is_busy: bool,
    /// Where zeroes are still to be written.
    places: Vec<u64>,
    reply: Option<Reply>,
}

pub fn create(state: &mut State, create: CreateVolume, reply: Reply) {
    let name = create.name.clone();
    let Some(base) = create.base_bdev.clone() else {
        return reply.fail(refusal::needs_base_bdev());
    };
    // A bdev that has just appeared is being looked at; what comes of that is known soon.
    let examined =
        state.node.openings.iter().any(|opening| {
            matches!(opening.purpose, Purpose::Examine) && opening.backing.name == base
        });
    let found = state
        .node
        .controls
        .iter()
        .find(|control| control.create.name == name);
    if examined || found.is_some_and(|control| control.is_found && !control.is_published) {
        let again = move |state: &mut State| self::create(state, create, reply);
        return state.node.deferred.push(Box::new(again));
    }
    if let Some(control) = found {
        let is_same = control.is_found
            && control.create.node_id == create.node_id
            && create.uuid.is_none_or(|uuid| uuid == control.uuid)
            && control.backing.as_ref().is_some_and(|own| own.name == base);
        if !is_same {
            return reply.fail(refusal::volume_exists(&name));
        }
        let volume = control.volume;
        return super::lifecycle::complete_found(state, volume, create, reply);
    }
    let is_being_made =
        state.node.openings.iter().any(
            |opening| matches!(&opening.purpose, Purpose::Create(other) if other.name == name),
        );
    if is_being_made || bdev_named(&name).is_some() {
        return reply.fail(refusal::bdev_exists(&name));
    }
    if bdev_named(&base).is_none() {
        return awaited::defer(state, create, reply);
    }
    open(state, &base, Purpose::Create(Box::new(create)), reply);
}

/// The backing bdev of a volume has appeared at last.
pub fn create_awaited(state: &mut State, create: CreateVolume, reply: Reply) {
    let name = &create.name;
    let is_known = |control: &Control| control.create.name == *name;
    if state.node.controls.iter().any(is_known) {
        return reply.fail(refusal::volume_exists(name));
    }
    if bdev_named(name).is_some() {
        return reply.fail(refusal::bdev_exists(name));
    }
    let base = create.base_bdev.clone().unwrap_or_default();
    open(state, &base, Purpose::Create(Box::new(create)), reply);
}

pub fn attach(state: &mut State, name: &str, base_bdev: &str, reply: Reply) {
    match state.node.named(name) {
        Ok(control) if control.backing.is_some() => reply.fail(refusal::has_base_bdev(name)),
        Ok(control) => {
            let volume = control.volume;
            open(state, base_bdev, Purpose::Attach(volume), reply);
        }
        Err(error) => reply.fail(error),
    }
}

pub fn wipe(state: &mut State, base_bdev: &str, reply: Reply) {
    open(state, base_bdev, Purpose::Wipe, reply);
}

/// Looks whether a bdev carries a volume; `reply` is answered in any case.
pub fn examine(state: &mut State, name: &str, reply: Reply) {
    open(state, name, Purpose::Examine, reply);
}

/// A device is taken, and opened for `purpose`.
fn open(state: &mut State, name: &str, purpose: Purpose, reply: Reply) {
    let claimed = !matches!(purpose, Purpose::Examine);
    let opened = if claimed {
        backing::open(name)
    } else {
        backing::look(name)
    };
    let backing = match opened {
        Ok(backing) => backing,
        Err(error) => return reply.fail(error),
    };
    let goal = match goal_of(state, &purpose, &backing) {
        Ok(goal) => goal,
        Err(error) => {
            backing::close(state, &backing, claimed);
            return reply.fail(error);
        }
    };
    let Some(disk) = backing.disk() else {
        backing::close(state, &backing, claimed);
        return reply.fail(RpcError::no_memory(format!("bdev {name} gives no channel")));
    };
    let number = state.node.next_number();
    let volume = state.node.free_volume();
    state.node.openings.push(Opening {
        volume,
        is_removed: false,
        number,
        purpose,
        opener: Opener::new(goal, Token(0), backing.bytes()),
        context: Context::new(),
        backing,
        claimed,
        disk,
        waiting: None,
        is_busy: false,
        places: Vec::new(),
        reply: Some(reply),
    });
    // The poller goes on with it: a bdev that is being examined by its name only gets no I/O yet.
}

fn goal_of(state: &mut State, purpose: &Purpose, backing: &Backing) -> Result<Goal, RpcError> {
    match purpose {
        Purpose::Wipe | Purpose::Examine => Ok(Goal::Any),
        Purpose::Attach(volume) => {
            let control = state.node.control(*volume).ok_or_else(refusal::gone)?;
            Ok(device::attach_goal(&control.uuid, control.create.node_id))
        }
        Purpose::Create(create) => {
            device::create_goal(create, backing.uuid, backing.block_size, backing.bytes())
        }
    }
}

fn find(state: &mut State, number: u32) -> Option<&mut Opening> {
    state
        .node
        .openings
        .iter_mut()
        .find(|opening| opening.number == number)
}

/// With each round of the poller: what waited for memory is tried again.
pub fn poll(state: &mut State) {
    for index in 0..state.node.openings.len() {
        if let Some(opening) = state.node.openings.get(index)
            && !opening.is_busy
            && opening.places.is_empty()
        {
            let number = opening.number;
            go_on(state, number);
        }
    }
    if !state.node.deferred.is_empty() {
        for job in std::mem::take(&mut state.node.deferred) {
            job(state);
        }
    }
}

fn go_on(state: &mut State, number: u32) {
    let Some(opening) = find(state, number) else {
        return;
    };
    let next = match opening.waiting.take() {
        Some(next) => Some(next),
        None => {
            opening.context.now_ns = super::context::now_ns();
            if let Err(error) = opening.opener.poll(&mut opening.context) {
                return end(state, number, Err(error));
            }
            match opening.context.actions.pop_front() {
                Some(Action::Disk(token, io, data)) => Some((token, io, data)),
                _ => None,
            }
        }
    };
    let Some((token, io, data)) = next else {
        return;
    };
    opening.is_busy = true;
    let (volume, disk) = (opening.volume, opening.disk);
    let key = state.in_flight.insert(InFlight {
        volume,
        token,
        data,
        kind: InFlightKind::Opening(number, io),
    });
    let Some(entry) = state.in_flight.get_mut(key) else {
        return;
    };
    let result = io::start_disk(&disk, io, &mut entry.data, token_of(key) as *mut c_void);
    if result == 0 {
        return;
    }
    let Some(entry) = state.in_flight.remove(key) else {
        return;
    };
    if result == -libc::ENOMEM {
        if let Some(opening) = find(state, number) {
            opening.is_busy = false;
            opening.waiting = Some((token, io, entry.data));
        }
        return;
    }
    completed(state, number, entry, false);
}

/// An I/O of an opening has ended.
pub fn completed(state: &mut State, number: u32, entry: InFlight, is_ok: bool) {
    let InFlightKind::Opening(_, io) = entry.kind else {
        return;
    };
    // What has been made must survive the next loss of power: a write that is to be durable is flushed.
    let Some(opening) = find(state, number) else {
        return;
    };
    let needs_flush = is_ok
        && matches!(
            io.op,
            DiskOp::Write { fua: true } | DiskOp::WriteZeroes { fua: true }
        )
        && opening.disk.flush != Flush::None
        && !io::writes_through(&opening.disk, io, &entry.data);
    opening.is_busy = false;
    if needs_flush {
        let flush = DiskIo {
            op: DiskOp::Flush,
            offset: 0,
            len: 0,
        };
        opening.waiting = Some((entry.token, flush, entry.data));
        return go_on(state, number);
    }
    let completion = Completion {
        token: entry.token,
        status: if is_ok {
            IoStatus::Ok
        } else {
            IoStatus::Failed
        },
        answer: PeerAnswer::Ok,
        data: entry.data,
    };
    match opening.opener.complete(completion) {
        Ok(None) => go_on(state, number),
        Ok(Some(opened)) => end(state, number, Ok(opened)),
        Err(error) => end(state, number, Err(error)),
    }
}

fn end(state: &mut State, number: u32, outcome: Result<Opened, OpenError>) {
    let position = state
        .node
        .openings
        .iter()
        .position(|opening| opening.number == number);
    let Some(position) = position else {
        return;
    };
    let mut opening = state.node.openings.swap_remove(position);
    let Some(reply) = opening.reply.take() else {
        return;
    };
    let (volume, backing, claimed) = (opening.volume, opening.backing, opening.claimed);
    let refuse = |state: &mut State, reply: Reply, error: RpcError| {
        backing::close(state, &backing, claimed);
        reply.fail(error);
    };
    if !matches!(opening.purpose, Purpose::Wipe) || outcome.is_err() {
        opening.disk.put();
    }
    let opened = match outcome {
        Ok(opened) => opened,
        Err(error) => return refuse(state, reply, device::open_error(&error)),
    };
    let checked = device::check_block_size(&opened.superblock, &backing.name, backing.block_size);
    match opening.purpose {
        Purpose::Wipe => {
            let places = device::wipe_places(&opened.superblock);
            state.node.openings.push(Opening {
                volume,
                is_removed: opening.is_removed,
                number,
                purpose: Purpose::Wipe,
                opener: opening.opener,
                context: opening.context,
                backing,
                claimed,
                disk: opening.disk,
                waiting: None,
                is_busy: true,
                places,
                reply: Some(reply),
            });
            wipe_next(state, number);
        }
        _ if checked.is_err() => {
            if let Err(error) = checked {
                refuse(state, reply, error);
            }
        }
        Purpose::Create(create) => start(state, volume, *create, backing, opened, reply, false),
        Purpose::Attach(volume) => {
            start_attach(state, volume, backing, opened, Pending::Reply(reply));
        }
        Purpose::Examine => found(state, volume, backing, opened, reply),
    }
}

/// A bdev that has appeared carries a volume: it comes back, or gets its disk back.
fn found(state: &mut State, volume: u32, backing: Backing, opened: Opened, reply: Reply) {
    let superblock = &opened.superblock;
    let uuid = uuid::Uuid::from_bytes(superblock.volume_uuid);
    let name = backing.name.clone();
    backing::close(state, &backing, false);
    if superblock.backing_uuid != *backing.uuid.as_bytes() && !backing.uuid.is_nil() {
        tracing::warn!(
            "bdev {name} carries volume {uuid}, but its metadata was made on another bdev: a copy is not attached by \
             itself (bdev_repl_attach or bdev_repl_create do it)"
        );
        return reply.ok(true);
    }
    let known = state
        .node
        .controls
        .iter()
        .find(|control| control.uuid == uuid);
    let known = known.map(|control| (control.volume, control.backing.is_some(), control.deleting));
    match known {
        Some((_, true, _)) => {
            tracing::warn!("bdev {name} carries volume {uuid} too; it is left alone");
            reply.ok(true);
        }
        Some((_, _, true)) => reply.ok(true),
        Some((volume, false, false)) => match backing::open(&name) {
            Ok(backing) => start_attach(state, volume, backing, opened, Pending::Reply(reply)),
            Err(error) => reply.fail(error),
        },
        None if state.node.awaited.volumes.has(superblock.name.as_str()) => {
            tracing::warn!(
                "bdev {name} carries volume '{}', which waits for another bdev: it is left alone",
                superblock.name.as_str()
            );
            reply.ok(true);
        }
        None => match backing::open(&name) {
            Ok(backing) => {
                let create = device::found(superblock, &name);
                tracing::info!(
                    "bdev {name} carries volume '{}': it comes back",
                    create.name
                );
                start(state, volume, create, backing, opened, reply, true);
            }
            Err(error) => reply.fail(error),
        },
    }
}

/// Overwrites the superblocks, one after the other.
fn wipe_next(state: &mut State, number: u32) {
    let Some(opening) = find(state, number) else {
        return;
    };
    let Some(&offset) = opening.places.last() else {
        return wiped_all(state, number, Ok(()));
    };
    let io = DiskIo {
        op: DiskOp::WriteZeroes { fua: false },
        offset,
        len: device::WIPE_BYTES,
    };
    let (volume, disk) = (opening.volume, opening.disk);
    let key = state.in_flight.insert(InFlight {
        volume,
        token: Token(0),
        data: Data::None,
        kind: InFlightKind::Wiping(number),
    });
    let mut data = Data::None;
    let result = io::start_disk(&disk, io, &mut data, token_of(key) as *mut c_void);
    if result != 0 {
        state.in_flight.remove(key);
        if result == -libc::ENOMEM {
            let again = move |state: &mut State| wipe_next(state, number);
            return state.node.deferred.push(Box::new(again));
        }
        let error = std::io::Error::from_raw_os_error(-result);
        wiped_all(state, number, Err(device::wipe_error(error)));
    }
}

/// One superblock has been overwritten.
pub fn wiped(state: &mut State, number: u32, is_ok: bool) {
    if !is_ok {
        return wiped_all(
            state,
            number,
            Err(device::wipe_error("the device failed the write")),
        );
    }
    if let Some(opening) = find(state, number) {
        opening.places.pop();
    }
    wipe_next(state, number);
}

fn wiped_all(state: &mut State, number: u32, outcome: Result<(), RpcError>) {
    let position = state
        .node
        .openings
        .iter()
        .position(|opening| opening.number == number);
    if let Some(position) = position {
        let opening = state.node.openings.swap_remove(position);
        opening.disk.put();
        backing::close(state, &opening.backing, opening.claimed);
        if let Some(reply) = opening.reply {
            reply.answer(outcome.map(|()| true.into()));
        }
    }
}
