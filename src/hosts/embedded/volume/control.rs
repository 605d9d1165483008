//! Volumes on core 0: made from a backing bdev, given orders, ended. Everything here is the control path; what a
//! request waits for is kept in [`Opening`]s and in the orders of a [`Control`].

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use serde_json::{Value, json};
use uuid::Uuid;

use super::super::bdev::{BdevId, BdevIo, BdevKind, BdevOp, IoResult, Owner};
use super::super::core::Core;
use super::super::nvme_tcp::target::{ListenerAddress, NamespaceParameters, SubsystemParameters};
use super::super::registry::{self, BdevError, BdevOrigin, Registration};
use super::super::slab::Slab;
use super::super::target;
use super::context::{Action, Context};
use super::link::{ENDPOINT_NSID, Links, endpoint_nqn};
use super::{CoreVolume, disk_status, pointer, report, with};
use crate::engine::channel::Channel;
use crate::engine::manager::{Manager, Options, Order};
use crate::engine::message::{OrderErrorKind, OrderId, OrderOutcome};
use crate::engine::meta::format::{AL_RING_BLOCKS_DEFAULT, Content, FormatParams};
use crate::engine::meta::layout::{LayoutParams, Placement};
use crate::engine::open::{Goal, OpenError, Opened, Opener};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::volume::{Shared, VolumeGeometry};
use crate::host::{Completion, Data, DiskOp, PeerAddress, Token};
use crate::rpc::volume::{AddPeer, Address, CreateVolume, SetOptions, VolumeRequest, no_volume};
use crate::rpc::{Reply, RpcError};

/// What claims a backing bdev.
const CLAIM: &str = "bdev_repl";

/// A volume as core 0 knows it.
pub(super) struct Control {
    pub(super) volume: u32,
    pub(super) uuid: Uuid,
    /// How it was asked for, for a saved configuration.
    pub(super) create: CreateVolume,
    /// The backing bdev while it is claimed.
    pub(super) base: Option<(BdevId, String)>,
    pub(super) listen: Option<std::net::SocketAddr>,
    pub(super) geometry: VolumeGeometry,
    pub(super) cores: usize,
    pub(super) active_extents: Arc<Vec<AtomicU32>>,
    orders: Vec<(OrderId, Pending)>,
    deleting: bool,
}

/// What is to be done when a volume has ended.
type Ended = Box<dyn FnOnce(&mut Core, Result<(), RpcError>)>;

/// What an order's outcome is for.
enum Pending {
    Reply(Reply),
    /// The first attach of a new volume.
    Create(Reply),
    Delete(Ended),
}

/// Why a device is being opened.
enum Purpose {
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

fn bdev_error(error: BdevError) -> RpcError {
    RpcError::new(error.code, error.message)
}

fn open_error(error: &OpenError) -> RpcError {
    match error {
        OpenError::Io { .. } => RpcError::io(error.to_string()),
        OpenError::TooSmall(_) => RpcError::no_space(error.to_string()),
        OpenError::OtherVolume { .. } => RpcError::exists(error.to_string()),
        _ => RpcError::invalid(error.to_string()),
    }
}

fn control_of<'a>(core: &'a mut Core, name: &str) -> Result<&'a mut Control, RpcError> {
    let found = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.create.name == name);
    match found {
        Some(control) if control.deleting => {
            Err(RpcError::busy(format!("volume '{name}' is being deleted")))
        }
        Some(control) => Ok(control),
        None => Err(no_volume(name)),
    }
}

/// Carries out a call of a volume method, on core 0.
pub fn request(core: &mut Core, request: VolumeRequest, reply: Reply) {
    let (name, order) = match request {
        VolumeRequest::Create(create) => return self::create(core, create, reply),
        VolumeRequest::Delete { name } => return delete(core, &name, reply),
        VolumeRequest::Wipe { base_bdev } => {
            return open_device(core, base_bdev, Purpose::Wipe, reply);
        }
        VolumeRequest::GetVolumes { name } => {
            return reply.answer(get_volumes(core, name.as_deref()));
        }
        VolumeRequest::Attach { name, base_bdev } => return attach(core, &name, base_bdev, reply),
        VolumeRequest::SetOptions(options) => return reply.answer(set_options(core, &options)),
        VolumeRequest::Detach { name } => (name, Order::Detach),
        VolumeRequest::AddPeer(peer) => {
            let order = Order::AddPeer {
                node_id: peer.node_id,
                address: PeerAddress {
                    traddr: peer.address.traddr.to_string(),
                    trsvcid: peer.address.trsvcid,
                    header_digest: peer.hdgst,
                    data_digest: peer.ddgst,
                },
                connect: peer.connect,
            };
            (peer.name, order)
        }
        VolumeRequest::RemovePeer { name, node_id } => (name, Order::RemovePeer { node_id }),
        VolumeRequest::Connect {
            name,
            node_id,
            discard_my_data,
        } => (
            name,
            Order::Connect {
                node_id,
                discard_my_data,
            },
        ),
        VolumeRequest::Disconnect { name, node_id } => (name, Order::Disconnect { node_id }),
        VolumeRequest::Promote { name, force } => (name, Order::Promote { force }),
        VolumeRequest::Demote { name } => (name, Order::Demote),
        VolumeRequest::Invalidate { name } => (name, Order::Invalidate),
        VolumeRequest::PauseResync { name } => (name, Order::PauseResync),
        VolumeRequest::ResumeResync { name } => (name, Order::ResumeResync),
    };
    match control_of(core, &name) {
        Ok(control) => {
            let volume = control.volume;
            give_order(core, volume, order, Pending::Reply(reply));
        }
        Err(error) => reply.fail(error),
    }
}

fn next_order(core: &mut Core) -> OrderId {
    core.volumes.next_order += 1;
    core.volumes.next_order
}

fn give_order(core: &mut Core, volume: u32, order: Order, pending: Pending) {
    let id = next_order(core);
    if let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    {
        control.orders.push((id, pending));
    }
    with(core, volume, |this| {
        if let Some(manager) = &mut this.manager {
            this.manager_stirred = true;
            manager.order(&mut this.context, id, order);
        }
    });
}

/// The manager has ended an order.
pub(super) fn ordered(core: &mut Core, volume: u32, id: OrderId, outcome: OrderOutcome) {
    let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let Some(position) = control.orders.iter().position(|(other, _)| *other == id) else {
        return;
    };
    let (_, pending) = control.orders.swap_remove(position);
    let outcome = outcome.map_err(|error| match error.kind {
        OrderErrorKind::Busy => RpcError::busy(error.text),
        OrderErrorKind::Exists => RpcError::exists(error.text),
        OrderErrorKind::NotFound => RpcError::no_device(error.text),
        OrderErrorKind::Invalid => RpcError::invalid(error.text),
        OrderErrorKind::Io => RpcError::io(error.text),
    });
    match pending {
        Pending::Reply(reply) => reply.answer(outcome.map(|()| json!(true))),
        Pending::Create(reply) => publish(core, volume, reply),
        Pending::Delete(then) => then(core, outcome),
    }
}

/// A device is taken, and opened for `purpose`.
fn open_device(core: &mut Core, base_name: String, purpose: Purpose, reply: Reply) {
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
    Ok(match purpose {
        Purpose::Wipe => Goal::Any,
        Purpose::Attach(volume) => {
            let control = core
                .volumes
                .controls
                .iter()
                .find(|control| control.volume == *volume);
            let control = control.ok_or_else(|| RpcError::no_device("the volume is gone"))?;
            Goal::Existing {
                volume_uuid: *control.uuid.as_bytes(),
                node_id: control.create.node_id,
            }
        }
        Purpose::Create(create) => {
            let mut random = [0; 8];
            getrandom::fill(&mut random)
                .map_err(|error| RpcError::io(format!("no random numbers: {error}")))?;
            let content = if create.has_data {
                Content::Data {
                    random: u64::from_le_bytes(random),
                }
            } else if create.assume_clean {
                Content::AssumeClean
            } else {
                Content::Nothing
            };
            let params = FormatParams {
                name: create.name.clone(),
                volume_uuid: create.uuid.map(|uuid| *uuid.as_bytes()),
                node_id: create.node_id,
                backing_uuid: *backing.as_bytes(),
                layout: LayoutParams {
                    device_size_bytes: device_bytes,
                    block_size_bytes: block_size,
                    placement: if create.data_offset == Some(0) {
                        Placement::InPlace
                    } else {
                        Placement::Front
                    },
                    data_size_bytes: create.size_mb.map(|size| size << 20),
                    granularity_log2: (u64::from(create.granularity_kb) << 10).trailing_zeros()
                        as u8,
                    peer_slots: create.peer_slots,
                    channel_slots: u16::from(create.channel_slots),
                    al_ring_blocks: AL_RING_BLOCKS_DEFAULT,
                },
                al_extents: create.al_extents,
                content,
            };
            Goal::Create {
                params: Box::new(params),
                force: create.force,
            }
        }
    })
}

fn create(core: &mut Core, create: CreateVolume, reply: Reply) {
    let name = &create.name;
    let opening =
        core.volumes.openings.iter().any(
            |opening| matches!(&opening.purpose, Purpose::Create(other) if other.name == *name),
        );
    if opening || core.registry.find(name).is_some() {
        return reply.fail(RpcError::exists(format!("a bdev {name} exists already")));
    }
    if core
        .volumes
        .controls
        .iter()
        .any(|control| control.create.name == *name)
    {
        return reply.fail(RpcError::exists(format!("volume '{name}' exists already")));
    }
    let Some(base) = create.base_bdev.clone() else {
        return reply.fail(RpcError::not_supported(
            "a volume needs a backing bdev to be made; detach it later for a diskless node",
        ));
    };
    open_device(core, base, Purpose::Create(Box::new(create)), reply);
}

fn attach(core: &mut Core, name: &str, base_bdev: String, reply: Reply) {
    match control_of(core, name) {
        Ok(control) if control.base.is_some() => {
            let text = format!("volume '{name}' has a backing bdev already; detach it first");
            reply.fail(RpcError::busy(text));
        }
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
    let opened = match outcome {
        Ok(opened) if opened.superblock.layout.block_size() == opening.block_size => opened,
        Ok(opened) => {
            core.registry.release(opening.bdev);
            let text = format!(
                "the volume has blocks of {} bytes, bdev {} of {}",
                opened.superblock.layout.block_size(),
                opening.base_name,
                opening.block_size
            );
            return reply.fail(RpcError::invalid(text));
        }
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
            let places: Vec<u64> = opened.superblock.layout.superblock_offsets().collect();
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
        blocks: 4096 / block,
        data: super::DataPointer::NONE,
    };
    core.submit_control(bdev, io, move |core, status, _| match status {
        Ok(()) => wipe(core, bdev, block_size, places, reply),
        Err(error) => {
            core.registry.release(bdev);
            reply.fail(RpcError::io(format!(
                "the metadata cannot be overwritten: {error}"
            )));
        }
    });
}

/// The device is open: the volume comes to be, on every core.
fn start(
    core: &mut Core,
    volume: u32,
    create: CreateVolume,
    base: (BdevId, String),
    block_size: u32,
    opened: Opened,
    reply: Reply,
) {
    let layout = &opened.superblock.layout;
    if core.cores > usize::from(layout.channel_slots()) {
        core.registry.release(base.0);
        let text = format!(
            "the metadata has room for {} cores, this node has {}; make the volume with more channel_slots",
            layout.channel_slots(),
            core.cores
        );
        return reply.fail(RpcError::invalid(text));
    }
    let geometry = VolumeGeometry {
        block_size,
        size_blocks: layout.data_size() / u64::from(block_size),
        data_offset: layout.data_offset(),
        granularity_log2: layout.granularity_log2(),
    };
    let uuid = Uuid::from_bytes(opened.superblock.volume_uuid);
    let node_id = opened.superblock.node_id;
    let cores = core.cores;
    let active_extents: Arc<Vec<AtomicU32>> =
        Arc::new((0..cores).map(|_| AtomicU32::new(0)).collect());
    core.volumes.controls.push(Control {
        volume,
        uuid,
        create,
        base: None,
        listen: None,
        geometry,
        cores,
        active_extents: Arc::clone(&active_extents),
        orders: Vec::new(),
        deleting: false,
    });
    let shared = Arc::new(Shared::new(geometry));
    let for_manager = Arc::clone(&shared);
    core.on_all_cores(
        move |core| {
            let this = CoreVolume {
                channel: Channel::new(core.index, Arc::clone(&shared)),
                manager: None,
                links: Links::default(),
                context: Context::new(),
                disk: None,
                block_size,
                in_flight: Slab::default(),
                splits: Slab::default(),
                overflow: std::collections::VecDeque::new(),
                active_extents: Arc::clone(&active_extents),
                next_manager_poll_ns: 0,
                manager_stirred: false,
            };
            let index = volume as usize;
            let volumes = &mut core.volumes.volumes;
            if volumes.len() <= index {
                volumes.resize_with(index + 1, || None);
            }
            volumes[index] = Some(Box::new(this));
        },
        move |core| {
            if let Some(this) = core.volumes.get_mut(volume) {
                let channels = (0..cores).collect();
                this.manager = Some(Manager::new(
                    for_manager,
                    opened.superblock.clone(),
                    channels,
                ));
                this.links.volume_uuid = uuid;
                this.links.node_id = node_id;
            }
            start_attach(
                core,
                volume,
                base,
                block_size,
                opened,
                Pending::Create(reply),
            );
        },
    );
}

/// Every core gets the device, then the manager starts using it.
fn start_attach(
    core: &mut Core,
    volume: u32,
    base: (BdevId, String),
    block_size: u32,
    opened: Opened,
    pending: Pending,
) {
    let id = next_order(core);
    let bdev = base.0;
    if let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    {
        control.base = Some(base);
        control.orders.push((id, pending));
    }
    core.on_all_cores(
        move |core| {
            if let Some(this) = core.volumes.get_mut(volume) {
                this.disk = Some((bdev, block_size));
            }
        },
        move |core| {
            with(core, volume, |this| {
                if let Some(manager) = &mut this.manager {
                    this.manager_stirred = true;
                    manager.expect_attach(&mut this.context, id);
                    manager.attach(&mut this.context, opened);
                }
            });
        },
    );
}

/// The volume has its disk: its bdevs and its endpoint appear.
fn publish(core: &mut Core, volume: u32, reply: Reply) {
    let Some(control) = core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let (name, uuid, geometry) = (control.create.name.clone(), control.uuid, control.geometry);
    let registration = Registration {
        name: name.clone(),
        aliases: Vec::new(),
        uuid,
        block_size: geometry.block_size,
        num_blocks: geometry.size_blocks,
        kind: BdevKind::Volume(volume),
        origin: BdevOrigin::Volume,
    };
    let endpoint = Registration {
        name: endpoint_name(&name),
        uuid: Uuid::new_v5(&uuid, &[control.create.node_id]),
        kind: BdevKind::Endpoint(volume),
        origin: BdevOrigin::Endpoint,
        ..registration.clone()
    };
    registry::register(core, registration, move |core, result| match result {
        Ok(_) => registry::register(core, endpoint, move |core, result| match result {
            Ok(id) => export_endpoint(core, volume, id, reply),
            Err(error) => undo(core, volume, bdev_error(error), reply),
        }),
        Err(error) => undo(core, volume, bdev_error(error), reply),
    });
}

/// A volume that could not be published goes again.
fn undo(core: &mut Core, volume: u32, error: RpcError, reply: Reply) {
    remove(core, volume, move |_, _| reply.fail(error));
}

fn endpoint_name(name: &str) -> String {
    format!("{name}.endpoint")
}

fn export_endpoint(core: &mut Core, volume: u32, endpoint: BdevId, reply: Reply) {
    let Some(control) = core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let nqn = endpoint_nqn(&control.uuid, control.create.node_id);
    let geometry = control.geometry;
    let listen = control.create.listen;
    let uuid = *Uuid::new_v5(&control.uuid, &[control.create.node_id]).as_bytes();
    let made = {
        let mut state = core.target.state();
        let mut parameters = SubsystemParameters::new(&nqn);
        parameters.allow_any_host = true;
        parameters.model_number = "bdev_repl endpoint".into();
        state.create_subsystem(parameters).and_then(|()| {
            state.add_namespace(
                &nqn,
                NamespaceParameters {
                    nsid: Some(ENDPOINT_NSID),
                    handle: target::namespace_handle(endpoint),
                    block_size: geometry.block_size,
                    size_blocks: geometry.size_blocks,
                    nguid: uuid,
                    uuid,
                    eui64: [0; 8],
                    vendor_only: true,
                },
            )
        })
    };
    if let Err(error) = made {
        return undo(core, volume, RpcError::invalid(error.to_string()), reply);
    }
    target::changed(core);
    let Some(Address { traddr, trsvcid }) = listen else {
        return created(core, volume, reply);
    };
    let address = ListenerAddress::tcp(&traddr.to_string(), &trsvcid.to_string());
    target::add_listener(core, &nqn, &address, move |core, result| match result {
        Ok(local) => {
            if let Some(control) = core
                .volumes
                .controls
                .iter_mut()
                .find(|control| control.volume == volume)
            {
                control.listen = Some(local);
                // A saved configuration names the port that the kernel chose.
                control.create.listen = Some(Address {
                    traddr: local.ip(),
                    trsvcid: local.port(),
                });
            }
            created(core, volume, reply);
        }
        Err(error) => undo(core, volume, bdev_error(error), reply),
    });
}

fn created(core: &mut Core, volume: u32, reply: Reply) {
    match core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    {
        Some(control) => reply.ok(control.create.name.clone()),
        None => reply.fail(RpcError::no_device("the volume was deleted meanwhile")),
    }
}

fn delete(core: &mut Core, name: &str, reply: Reply) {
    match control_of(core, name) {
        Ok(control) => {
            let volume = control.volume;
            if let Some(entry) = core.registry.find(name)
                && let Some(holder) = &entry.claimed_by
            {
                let text = format!("volume '{name}' is claimed by {holder}: delete that first");
                return reply.fail(RpcError::busy(text));
            }
            remove(core, volume, move |_, outcome| {
                reply.answer(outcome.map(|()| json!(true)))
            });
        }
        Err(error) => reply.fail(error),
    }
}

/// Ends a volume: its I/O, its connections, its disk, its bdevs; its metadata stays.
fn remove(
    core: &mut Core,
    volume: u32,
    then: impl FnOnce(&mut Core, Result<(), RpcError>) + 'static,
) {
    if let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    {
        control.deleting = true;
    }
    let pending = Pending::Delete(Box::new(move |core, outcome| match outcome {
        Ok(()) => remove_bdevs(core, volume, then),
        Err(error) => {
            if let Some(control) = core
                .volumes
                .controls
                .iter_mut()
                .find(|control| control.volume == volume)
            {
                control.deleting = false;
            }
            then(core, Err(error));
        }
    }));
    give_order(core, volume, Order::Close, pending);
}

fn remove_bdevs(
    core: &mut Core,
    volume: u32,
    then: impl FnOnce(&mut Core, Result<(), RpcError>) + 'static,
) {
    let Some(control) = core
        .volumes
        .controls
        .iter()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let name = control.create.name.clone();
    let nqn = endpoint_nqn(&control.uuid, control.create.node_id);
    // It may not be there: the volume may never have been published.
    let _ = target::delete_subsystem(core, &nqn);
    let endpoint = endpoint_name(&name);
    registry::delete(core, &name, move |core, _| {
        registry::delete(core, &endpoint, move |core, _| forget(core, volume, then));
    });
}

fn forget(
    core: &mut Core,
    volume: u32,
    then: impl FnOnce(&mut Core, Result<(), RpcError>) + 'static,
) {
    core.on_all_cores(
        move |core| {
            let queues: Vec<_> = core.volumes.get_mut(volume).map_or_else(Vec::new, |this| {
                super::slots()
                    .filter_map(|slot| this.context.queues[slot])
                    .collect()
            });
            for queue in queues {
                super::super::initiator::close(core, queue.key);
            }
            if let Some(slot) = core.volumes.volumes.get_mut(volume as usize) {
                *slot = None;
            }
        },
        move |core| {
            let position = core
                .volumes
                .controls
                .iter()
                .position(|control| control.volume == volume);
            if let Some(position) = position {
                let control = core.volumes.controls.swap_remove(position);
                if let Some((bdev, _)) = control.base {
                    core.registry.release(bdev);
                }
            }
            then(core, Ok(()));
        },
    );
}

/// The engine has let go of the backing bdev on all cores.
pub(super) fn disk_closed(core: &mut Core, volume: u32) {
    core.on_all_cores(
        move |core| {
            if let Some(this) = core.volumes.get_mut(volume) {
                this.disk = None;
            }
        },
        move |core| {
            let control = core
                .volumes
                .controls
                .iter_mut()
                .find(|control| control.volume == volume);
            if let Some((bdev, _)) = control.and_then(|control| control.base.take()) {
                core.registry.release(bdev);
            }
        },
    );
}

fn get_volumes(core: &mut Core, name: Option<&str>) -> Result<Value, RpcError> {
    let mut reports = Vec::new();
    for control in &core.volumes.controls {
        if name.is_some_and(|name| name != control.create.name) {
            continue;
        }
        let this = core
            .volumes
            .volumes
            .get(control.volume as usize)
            .and_then(Option::as_ref);
        let Some((manager, this)) = this.and_then(|this| Some((this.manager.as_ref()?, this)))
        else {
            continue;
        };
        reports.push(report::volume(control, manager, &this.context));
    }
    match name {
        Some(name) if reports.is_empty() => Err(no_volume(name)),
        _ => serde_json::to_value(reports).map_err(|error| RpcError::io(error.to_string())),
    }
}

fn set_options(core: &mut Core, wanted: &SetOptions) -> Result<Value, RpcError> {
    let volume = control_of(core, &wanted.name)?.volume;
    let Some(CoreVolume {
        manager: Some(manager),
        ..
    }) = core.volumes.get_mut(volume)
    else {
        return Err(RpcError::busy("the volume is being made"));
    };
    let old = manager.options();
    let milliseconds = |new: Option<u32>, old: u64| new.map_or(old, u64::from);
    manager.set_options(Options {
        ping_interval_ms: milliseconds(wanted.ping_interval_ms, old.ping_interval_ms),
        ping_timeout_ms: milliseconds(wanted.ping_timeout_ms, old.ping_timeout_ms),
        connect_interval_ms: milliseconds(wanted.connect_interval_ms, old.connect_interval_ms),
        resync_rate_bytes: wanted
            .resync_rate_mb
            .map_or(old.resync_rate_bytes, |rate| u64::from(rate) << 20),
    });
    Ok(json!(true))
}

/// The calls that make the volumes of this node again.
pub fn config(core: &Core) -> Vec<VolumeRequest> {
    let mut calls = Vec::new();
    for control in &core.volumes.controls {
        let this = core
            .volumes
            .volumes
            .get(control.volume as usize)
            .and_then(Option::as_ref);
        let Some((manager, this)) = this.and_then(|this| Some((this.manager.as_ref()?, this)))
        else {
            continue;
        };
        let name = control.create.name.clone();
        calls.push(VolumeRequest::Create(CreateVolume {
            // Only for the first time: a configuration that is loaded must not overwrite what came between.
            force: false,
            ..control.create.clone()
        }));
        let options = manager.options();
        if options != Options::default() {
            calls.push(VolumeRequest::SetOptions(SetOptions {
                name: name.clone(),
                ping_interval_ms: Some(options.ping_interval_ms as u32),
                ping_timeout_ms: Some(options.ping_timeout_ms as u32),
                connect_interval_ms: Some(options.connect_interval_ms as u32),
                resync_rate_mb: Some((options.resync_rate_bytes >> 20) as u32),
            }));
        }
        for peer in manager.report(&this.context).peers {
            let Some(address) = peer.address else {
                continue;
            };
            let Ok(traddr) = address.traddr.parse() else {
                continue;
            };
            calls.push(VolumeRequest::AddPeer(AddPeer {
                name: name.clone(),
                node_id: peer.node_id,
                address: Address {
                    traddr,
                    trsvcid: address.trsvcid,
                },
                hdgst: address.header_digest,
                ddgst: address.data_digest,
                connect: peer.wanted,
            }));
        }
    }
    calls
}

/// Ends all volumes, then `then`.
pub(super) fn shutdown(core: &mut Core, then: impl FnOnce(&mut Core) + 'static) {
    let next = core
        .volumes
        .controls
        .iter()
        .find(|control| !control.deleting);
    match next {
        Some(control) => {
            let volume = control.volume;
            // One after the other; an error leaves the volume as a crash would.
            remove(core, volume, move |core, outcome| {
                if let Err(error) = outcome {
                    tracing::error!("a volume does not close: {}", error.message);
                }
                shutdown_next(core, Box::new(then));
            });
        }
        None => then(core),
    }
}

fn shutdown_next(core: &mut Core, then: Box<dyn FnOnce(&mut Core)>) {
    shutdown(core, then);
}
