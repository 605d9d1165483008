//! Backing bdevs that are being opened, on core 0: read, and made into volumes if they are to be, before there is a
//! volume or a disk for one.

use uuid::Uuid;

use super::super::bdev::{BdevId, BdevIo, BdevOp, IoResult, Owner};
use super::super::core::Core;
use super::context::{Action, Context};
use super::control::{Pending, bdev_error, control_of};
use super::lifecycle::{start, start_attach};
use super::{awaited, disk_status, pointer};
use crate::engine::open::{Goal, Opened, Opener};
use crate::engine::peer::answer::PeerAnswer;
use crate::host::{Completion, Data, DiskOp, Token};
use crate::hosts::control::device::{self, open_error};
use crate::hosts::control::refusal;
use crate::rpc::volume::{CreateVolume, Listen, Register};
use crate::rpc::{Reply, RpcError};

/// What claims a backing bdev.
const CLAIM: &str = "bdev_repl";

/// Why a device is being opened.
pub(super) enum Purpose {
    Create(Box<CreateVolume>),
    /// For the volume of this number.
    Attach(u32),
    Wipe,
}

/// A device that is being opened, under a volume number of its own.
pub(super) struct Opening {
    volume: u32,
    purpose: Purpose,
    opener: Opener<Context>,
    context: Context,
    bdev: BdevId,
    base_name: String,
    block_size: u32,
    in_flight: Option<(Token, Data<Context>)>,
    reply: Option<Reply>,
}

/// A device is taken, and opened for `purpose`.
pub(super) fn open_device(core: &mut Core, base_name: String, purpose: Purpose, reply: Reply) {
    let entry = match core.registry.claim(&base_name, CLAIM) {
        Ok(entry) => entry,
        Err(error) => return reply.fail(bdev_error(error)),
    };
    let device_bytes = entry.num_blocks * u64::from(entry.block_size);
    let goal = match goal_of(core, &purpose, entry.block_size, device_bytes, entry.uuid) {
        Ok(goal) => goal,
        Err(error) => {
            core.registry.release(entry.id);
            return reply.fail(error);
        }
    };
    let taken = |volume: u32| {
        core.volumes
            .openings
            .iter()
            .any(|opening| opening.volume == volume)
            || core
                .volumes
                .controls
                .iter()
                .any(|control| control.volume == volume)
    };
    let volume = (0..).find(|&volume| !taken(volume)).unwrap_or(u32::MAX);
    core.volumes.openings.push(Opening {
        volume,
        purpose,
        opener: Opener::new(goal, Token(0), device_bytes),
        context: Context::new(),
        bdev: entry.id,
        base_name,
        block_size: entry.block_size,
        in_flight: None,
        reply: Some(reply),
    });
    go_on_opening(core, volume);
}

fn goal_of(
    core: &mut Core,
    purpose: &Purpose,
    block_size: u32,
    device_bytes: u64,
    backing: Uuid,
) -> Result<Goal, RpcError> {
    match purpose {
        Purpose::Wipe => Ok(Goal::Any),
        Purpose::Attach(volume) => {
            let control = core
                .volumes
                .controls
                .iter()
                .find(|control| control.volume == *volume);
            let control = control.ok_or_else(refusal::gone)?;
            Ok(device::attach_goal(&control.uuid, control.create.node_id))
        }
        Purpose::Create(create) => device::create_goal(create, backing, block_size, device_bytes),
    }
}

pub(super) fn create(core: &mut Core, create: CreateVolume, reply: Reply) {
    if let Some(Err(error)) = create.listen.as_ref().map(Listen::refuse_on_embedded) {
        return reply.fail(error);
    }
    if create.register == Register::OnPromote {
        return reply.fail(refusal::always_registered());
    }
    let name = &create.name;
    let opening =
        core.volumes.openings.iter().any(
            |opening| matches!(&opening.purpose, Purpose::Create(other) if other.name == *name),
        );
    if opening || core.registry.find(name).is_some() {
        return reply.fail(refusal::bdev_exists(name));
    }
    if core
        .volumes
        .controls
        .iter()
        .any(|control| control.create.name == *name)
    {
        return reply.fail(refusal::volume_exists(name));
    }
    let Some(base) = create.base_bdev.clone() else {
        return reply.fail(refusal::needs_base_bdev());
    };
    if core.registry.find(&base).is_none() {
        return awaited::defer(core, create, reply);
    }
    open_device(core, base, Purpose::Create(Box::new(create)), reply);
}

/// The backing bdev of a volume has appeared at last.
pub(super) fn create_awaited(core: &mut Core, create: CreateVolume, reply: Reply) {
    if core.registry.find(&create.name).is_some() {
        return reply.fail(refusal::bdev_exists(&create.name));
    }
    let base = create.base_bdev.clone().unwrap_or_default();
    open_device(core, base, Purpose::Create(Box::new(create)), reply);
}

pub(super) fn attach(core: &mut Core, name: &str, base_bdev: String, reply: Reply) {
    match control_of(core, name) {
        Ok(control) if control.base.is_some() => reply.fail(refusal::has_base_bdev(name)),
        Ok(control) => {
            let volume = control.volume;
            open_device(core, base_bdev, Purpose::Attach(volume), reply);
        }
        Err(error) => reply.fail(error),
    }
}

/// What waited for memory is tried again.
pub(super) fn poll_openings(core: &mut Core) {
    for index in 0..core.volumes.openings.len() {
        if let Some(opening) = core.volumes.openings.get(index)
            && opening.in_flight.is_none()
        {
            go_on_opening(core, opening.volume);
        }
    }
}

fn go_on_opening(core: &mut Core, volume: u32) {
    let Some(position) = core
        .volumes
        .openings
        .iter()
        .position(|opening| opening.volume == volume)
    else {
        return;
    };
    let opening = &mut core.volumes.openings[position];
    if let Err(error) = opening.opener.poll(&mut opening.context) {
        return end_opening(core, position, Err(open_error(&error)));
    }
    let Some(Action::Disk(token, io, data)) = opening.context.actions.pop_front() else {
        return;
    };
    let op = match io.op {
        DiskOp::Read => BdevOp::Read,
        DiskOp::Write { fua } => BdevOp::Write { fua },
        DiskOp::WriteZeroes { .. } => BdevOp::WriteZeroes,
        DiskOp::Unmap => BdevOp::Unmap,
        DiskOp::Flush => BdevOp::Flush,
    };
    let block = u64::from(opening.block_size);
    let bdev_io = BdevIo {
        op,
        lba: io.offset / block,
        blocks: io.len / block,
        data: pointer(&data, io.len as usize),
    };
    opening.in_flight = Some((token, data));
    let bdev = opening.bdev;
    core.submit(bdev, bdev_io, Owner::Volume { volume, token: 0 });
}

/// Whether the answer was an opening's.
pub(super) fn opening_completed(
    core: &mut Core,
    volume: u32,
    token: u64,
    status: IoResult,
) -> bool {
    let Some(position) = core
        .volumes
        .openings
        .iter()
        .position(|opening| opening.volume == volume)
    else {
        return false;
    };
    debug_assert_eq!(token, 0);
    let opening = &mut core.volumes.openings[position];
    let Some((token, data)) = opening.in_flight.take() else {
        return true;
    };
    let completion = Completion {
        token,
        status: disk_status(status),
        answer: PeerAnswer::Ok,
        data,
    };
    match opening.opener.complete(completion) {
        Ok(None) => go_on_opening(core, volume),
        Ok(Some(opened)) => end_opening(core, position, Ok(opened)),
        Err(error) => end_opening(core, position, Err(open_error(&error))),
    }
    true
}

fn end_opening(core: &mut Core, position: usize, outcome: Result<Opened, RpcError>) {
    let mut opening = core.volumes.openings.swap_remove(position);
    let Some(reply) = opening.reply.take() else {
        return;
    };
    let fits = outcome.and_then(|opened| {
        let superblock = &opened.superblock;
        device::check_block_size(superblock, &opening.base_name, opening.block_size)?;
        Ok(opened)
    });
    let opened = match fits {
        Ok(opened) => opened,
        Err(error) => {
            core.registry.release(opening.bdev);
            return reply.fail(error);
        }
    };
    let volume = opening.volume;
    match opening.purpose {
        Purpose::Create(create) => {
            let base = (opening.bdev, opening.base_name);
            start(
                core,
                volume,
                *create,
                base,
                opening.block_size,
                opened,
                reply,
            );
        }
        Purpose::Attach(volume) => start_attach(
            core,
            volume,
            (opening.bdev, opening.base_name),
            opening.block_size,
            opened,
            Pending::Reply(reply),
        ),
        Purpose::Wipe => {
            let places = device::wipe_places(&opened.superblock);
            wipe(core, opening.bdev, opening.block_size, places, reply);
        }
    }
}

/// Overwrites the superblocks, one after the other.
fn wipe(core: &mut Core, bdev: BdevId, block_size: u32, mut places: Vec<u64>, reply: Reply) {
    let Some(offset) = places.pop() else {
        core.registry.release(bdev);
        return reply.ok(true);
    };
    let block = u64::from(block_size);
    let io = BdevIo {
        op: BdevOp::WriteZeroes,
        lba: offset / block,
        blocks: device::WIPE_BYTES / block,
        data: super::DataPointer::NONE,
    };
    core.submit_control(bdev, io, move |core, status, _| match status {
        Ok(()) => wipe(core, bdev, block_size, places, reply),
        Err(error) => {
            core.registry.release(bdev);
            reply.fail(device::wipe_error(error));
        }
    });
}
