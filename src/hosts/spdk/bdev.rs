//! The bdevs of this module: the volume, and its endpoint for peers. Made and unmade by `lifecycle`; their I/O goes to the
//! core of the CPU on which it arrives. What an I/O asks for is read here, and its answer given here.

use std::ffi::{CString, c_int, c_void};

use uuid::Uuid;

use super::context::{BdevIo, Payload};
use super::core::{Core, Event, manager_core};
use super::{lifecycle, module, node, rpc, sys};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::request::RequestKind;
use crate::engine::volume::{MAX_TRANSFER_BYTES, MAX_ZEROES_BYTES, VolumeGeometry};
use crate::host::AppStatus;
use crate::hosts::control::received;
use crate::hosts::spdk::trace;

/// Which side of a volume an I/O comes in at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Application,
    Peers,
}

/// Pieces that one I/O may have: what one NVMe/TCP command can carry.
pub const SEGMENTS_MAX: u32 = 16;
/// SPDK lets I/O drain for so long before a reset reaches the module.
const RESET_DRAIN_S: u16 = sys::SPDK_BDEV_RESET_IO_DRAIN_RECOMMENDED_VALUE as u16;

/// A bdev as SPDK knows it, and what we must find again from it.
struct OwnBdev {
    bdev: sys::spdk_bdev,
    volume: u32,
    port: Port,
    /// As which its I/O is traced.
    trace_owner: u16,
    // What the bdev points to.
    name: CString,
    _product: CString,
}

/// A registered bdev. Copies name the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered(*mut OwnBdev);

/// The module's part of an I/O.
#[derive(Clone, Copy)]
#[repr(C)]
struct IoContext {
    /// How it ends: SPDK's status, or as NVMe says it.
    status: sys::spdk_bdev_io_status,
    nvme: Option<(u32, c_int, c_int)>,
    /// The one piece of an I/O that came without a list.
    piece: sys::iovec,
}

pub fn io_context_bytes() -> usize {
    size_of::<IoContext>()
}

fn io_context(io: BdevIo) -> *mut IoContext {
    // SAFETY: SPDK made room for it behind the I/O, as `get_ctx_size` asked for; cache line aligned.
    unsafe { (*io.0).driver_ctx.as_mut_ptr().cast() }
}

/// What a bdev is made of.
pub struct Parameters {
    pub name: String,
    pub volume: u32,
    pub port: Port,
    pub uuid: Uuid,
    pub geometry: VolumeGeometry,
    /// Of the backing bdev, as a power of two.
    pub alignment: u8,
}

static VOLUME_FUNCTIONS: sys::spdk_bdev_fn_table = functions(volume_supports);
static ENDPOINT_FUNCTIONS: sys::spdk_bdev_fn_table = functions(endpoint_supports);

type Supports = unsafe extern "C" fn(*mut c_void, sys::spdk_bdev_io_type) -> bool;

const fn functions(supports: Supports) -> sys::spdk_bdev_fn_table {
    // SAFETY: a table without functions is all zeroes.
    let mut table: sys::spdk_bdev_fn_table = unsafe { std::mem::zeroed() };
    table.destruct = Some(destruct);
    table.submit_request = Some(submit_request);
    table.io_type_supported = Some(supports);
    table.get_io_channel = Some(get_io_channel);
    table.dump_info_json = Some(dump_info_json);
    table.write_config_json = Some(write_config_json);
    table
}

unsafe extern "C" fn volume_supports(_: *mut c_void, kind: sys::spdk_bdev_io_type) -> bool {
    matches!(
        kind,
        sys::SPDK_BDEV_IO_TYPE_READ
            | sys::SPDK_BDEV_IO_TYPE_WRITE
            | sys::SPDK_BDEV_IO_TYPE_UNMAP
            | sys::SPDK_BDEV_IO_TYPE_WRITE_ZEROES
            | sys::SPDK_BDEV_IO_TYPE_FLUSH
            | sys::SPDK_BDEV_IO_TYPE_RESET
            | sys::SPDK_BDEV_IO_TYPE_ABORT
    )
}

unsafe extern "C" fn endpoint_supports(_: *mut c_void, kind: sys::spdk_bdev_io_type) -> bool {
    matches!(
        kind,
        sys::SPDK_BDEV_IO_TYPE_NVME_IO | sys::SPDK_BDEV_IO_TYPE_NVME_IOV_MD
    )
}

/// Registers a bdev, on the application's thread.
///
/// # Errors
/// Negative errno.
pub fn register(parameters: Parameters) -> Result<Registered, c_int> {
    let Parameters {
        name,
        volume,
        port,
        uuid,
        geometry,
        alignment,
    } = parameters;
    let name = CString::new(name).map_err(|_| -libc::EINVAL)?;
    let product = match port {
        Port::Application => c"Replicated Volume",
        Port::Peers => c"Replicated Volume Endpoint",
    };
    let blocks = |bytes: u64| (bytes / u64::from(geometry.block_size.max(1))) as u32;
    let mut own = Box::new(OwnBdev {
        bdev: sys::spdk_bdev::default(),
        volume,
        port,
        trace_owner: match port {
            Port::Application => trace::begin_owner(&name),
            Port::Peers => 0,
        },
        name,
        _product: product.to_owned(),
    });
    own.bdev.name = own.name.as_ptr().cast_mut();
    own.bdev.product_name = own._product.as_ptr().cast_mut();
    own.bdev.blocklen = geometry.block_size;
    own.bdev.phys_blocklen = geometry.block_size;
    own.bdev.blockcnt = geometry.size_blocks;
    // A peer's disk may have a volatile cache: flushes are wanted.
    own.bdev.write_cache = 1;
    own.bdev.required_alignment = alignment;
    own.bdev.max_num_segments = SEGMENTS_MAX;
    own.bdev.max_segment_size = MAX_TRANSFER_BYTES as u32;
    own.bdev.max_rw_size = blocks(MAX_TRANSFER_BYTES);
    own.bdev.max_unmap = blocks(MAX_ZEROES_BYTES);
    own.bdev.max_unmap_segments = 1;
    own.bdev.max_write_zeroes = blocks(MAX_ZEROES_BYTES);
    own.bdev.uuid = sys::uuid_from(&uuid);
    own.bdev.reset_io_drain_timeout = RESET_DRAIN_S;
    own.bdev.module = module::get();
    own.bdev.fn_table = match port {
        Port::Application => &raw const VOLUME_FUNCTIONS,
        Port::Peers => &raw const ENDPOINT_FUNCTIONS,
    };
    let own = Box::into_raw(own);
    // SAFETY: the bdev stays where it is until `destruct` has freed it.
    unsafe {
        (*own).bdev.ctxt = own.cast();
        sys::spdk_io_device_register(
            own.cast(),
            Some(create_channel),
            Some(destroy_channel),
            0,
            (*own).name.as_ptr(),
        );
        let result = sys::spdk_bdev_register(&raw mut (*own).bdev);
        if result != 0 {
            sys::spdk_io_device_unregister(own.cast(), Some(free_unregistered));
            return Err(result);
        }
    }
    Ok(Registered(own))
}

extern "C" fn create_channel(_: *mut c_void, _: *mut c_void) -> c_int {
    0
}

extern "C" fn destroy_channel(_: *mut c_void, _: *mut c_void) {}

unsafe extern "C" fn free_unregistered(own: *mut c_void) {
    // SAFETY: made by `register`, and nobody else knows it.
    drop(unsafe { Box::from_raw(own.cast::<OwnBdev>()) });
}

impl Drop for OwnBdev {
    fn drop(&mut self) {
        trace::end_owner(self.trace_owner);
    }
}

type Then = Box<dyn FnOnce()>;

impl Registered {
    /// Something is built on it.
    pub fn is_claimed(self) -> bool {
        // SAFETY: registered, on the application's thread, where claims are made.
        unsafe { (*self.0).bdev.internal.claim_type != sys::SPDK_BDEV_CLAIM_NONE }
    }

    /// Takes the bdev away; `then` when everybody has let go of it.
    pub fn unregister(self, then: impl FnOnce() + 'static) {
        unsafe extern "C" fn gone(then: *mut c_void, _: c_int) {
            // SAFETY: the box of below.
            let then = unsafe { Box::from_raw(then.cast::<Then>()) };
            then();
        }
        let then: Then = Box::new(then);
        let then = Box::into_raw(Box::new(then));
        // SAFETY: registered, and unregistered once: the handle is given up.
        unsafe { sys::spdk_bdev_unregister(&raw mut (*self.0).bdev, Some(gone), then.cast()) };
    }

    /// Frees it; to be called once, after `destruct`.
    fn release(self) {
        unsafe extern "C" fn done(own: *mut c_void) {
            // SAFETY: nobody has a channel of it any more; `spdk_bdev_destruct_done` is the last use of the bdev.
            unsafe {
                let own = own.cast::<OwnBdev>();
                sys::spdk_bdev_destruct_done(&raw mut (*own).bdev, 0);
                drop(Box::from_raw(own));
            }
        }
        // SAFETY: registered with the bdev.
        unsafe { sys::spdk_io_device_unregister(self.0.cast(), Some(done)) };
    }
}

unsafe extern "C" fn destruct(own: *mut c_void) -> c_int {
    let registered = Registered(own.cast());
    // SAFETY: registered with the bdev.
    let volume = unsafe { (*registered.0).volume };
    match manager_core() {
        Some(core) => core.send(move |state| {
            lifecycle::taken_away(state, volume, registered, move || registered.release());
        }),
        None => registered.release(),
    }
    1
}

unsafe extern "C" fn get_io_channel(own: *mut c_void) -> *mut sys::spdk_io_channel {
    // SAFETY: registered with the bdev.
    unsafe { sys::spdk_get_io_channel(own) }
}

unsafe extern "C" fn dump_info_json(own: *mut c_void, w: *mut sys::spdk_json_write_ctx) -> c_int {
    // SAFETY: SPDK hands back what was registered, and a writer inside an object.
    let volume = unsafe { (*own.cast::<OwnBdev>()).volume };
    let report = manager_core()
        .and_then(|core| core.look(|state| node::report_json(state, volume)))
        .flatten();
    if let Some(report) = report {
        // SAFETY: the text lives during the calls.
        unsafe {
            sys::spdk_json_write_name(w, c"repl".as_ptr());
            sys::spdk_json_write_val_raw(w, report.as_ptr().cast(), report.len());
        }
    }
    0
}

/// SPDK asks bdev after bdev, in the order in which they came: a volume after what it is made on. Its first bdev writes
/// it whole, ahead of what SPDK itself has to say of that bdev, such as its limits.
unsafe extern "C" fn write_config_json(
    bdev: *mut sys::spdk_bdev,
    w: *mut sys::spdk_json_write_ctx,
) {
    // SAFETY: SPDK hands back what was registered.
    let own = unsafe { (*bdev).ctxt.cast::<OwnBdev>() };
    // SAFETY: as above.
    let volume = unsafe { (*own).volume };
    let is_first = manager_core()
        .and_then(|core| core.look(|state| state.node.is_first_bdev(volume, Registered(own))));
    if is_first == Some(true) {
        // SAFETY: SPDK's writer, inside an array.
        unsafe { rpc::write_config(|state| node::config(state, volume), w) };
    }
}

unsafe extern "C" fn submit_request(_: *mut sys::spdk_io_channel, io: *mut sys::spdk_bdev_io) {
    // SAFETY: an I/O that SPDK has just submitted.
    unsafe {
        if u32::from((*io).type_) == sys::SPDK_BDEV_IO_TYPE_READ {
            let length = (*io).u.bdev.num_blocks * u64::from((*(*io).bdev).blocklen);
            sys::spdk_bdev_io_get_buf(io, Some(got_buffer), length);
        } else {
            enter(io);
        }
    }
}

unsafe extern "C" fn got_buffer(
    _: *mut sys::spdk_io_channel,
    io: *mut sys::spdk_bdev_io,
    success: bool,
) {
    if success {
        enter(io);
    } else {
        // SAFETY: completes the I/O once.
        unsafe { sys::spdk_bdev_io_complete(io, sys::SPDK_BDEV_IO_STATUS_FAILED) };
    }
}

fn enter(io: *mut sys::spdk_bdev_io) {
    extern "C" fn entered(io: *mut c_void) {
        if let Some(core) = Core::current() {
            core.enter(Event::Submitted(io.cast()));
        }
    }
    match (Core::current(), manager_core()) {
        (Some(core), _) => core.enter(Event::Submitted(io)),
        // A thread that no reactor runs.
        (None, Some(core)) => super::core::send_to(core.thread, entered, io.cast()),
        // SAFETY: completes the I/O once.
        (None, None) => unsafe {
            sys::spdk_bdev_io_complete(io, sys::SPDK_BDEV_IO_STATUS_FAILED);
        },
    }
}

pub struct Request {
    pub volume: u32,
    pub port: Port,
    trace_owner: u16,
}

/// Where an I/O belongs.
pub fn request(io: BdevIo) -> Request {
    // SAFETY: the bdev of an I/O that is not complete is ours and lives.
    unsafe {
        let own = (*(*io.0).bdev).ctxt.cast::<OwnBdev>();
        Request {
            volume: (*own).volume,
            port: (*own).port,
            trace_owner: (*own).trace_owner,
        }
    }
}

fn kind_of(io: BdevIo) -> sys::spdk_bdev_io_type {
    // SAFETY: an I/O that is not complete.
    u32::from(unsafe { (*io.0).type_ })
}

/// Shows an application's I/O to who traces it.
pub fn trace_submitted(io: BdevIo, request: &Request) {
    trace::submitted(io, request.trace_owner, || {
        // SAFETY: an I/O that is not complete; what has no blocks has other plain data there.
        let asked = unsafe { &(*io.0).u.bdev };
        let kind = match kind_of(io) {
            sys::SPDK_BDEV_IO_TYPE_READ => c"read",
            sys::SPDK_BDEV_IO_TYPE_WRITE => c"write",
            sys::SPDK_BDEV_IO_TYPE_WRITE_ZEROES => c"write_zeroes",
            sys::SPDK_BDEV_IO_TYPE_UNMAP => c"unmap",
            sys::SPDK_BDEV_IO_TYPE_FLUSH => c"flush",
            sys::SPDK_BDEV_IO_TYPE_RESET => return (c"reset", 0, 0),
            sys::SPDK_BDEV_IO_TYPE_ABORT => return (c"abort", 0, 0),
            _ => return (c"unknown", 0, 0),
        };
        let blocks = u32::try_from(asked.num_blocks).unwrap_or(u32::MAX);
        (kind, asked.offset_blocks, blocks)
    });
}

/// What an application's I/O asks for: kind, first block, blocks, data.
pub fn application_request(io: BdevIo) -> Option<(RequestKind, u64, u32, Option<Payload>)> {
    // SAFETY: an I/O of one of the kinds below has this part of the union.
    let asked = unsafe { &(*io.0).u.bdev };
    // SAFETY: plain data.
    let fua = unsafe { asked.nvme_cdw12.raw } & super::io::CDW12_FUA != 0;
    let kind = match kind_of(io) {
        sys::SPDK_BDEV_IO_TYPE_READ => RequestKind::Read,
        sys::SPDK_BDEV_IO_TYPE_WRITE => RequestKind::Write { fua },
        sys::SPDK_BDEV_IO_TYPE_WRITE_ZEROES => RequestKind::WriteZeroes { fua: false },
        sys::SPDK_BDEV_IO_TYPE_UNMAP => RequestKind::Unmap,
        sys::SPDK_BDEV_IO_TYPE_FLUSH => return Some((RequestKind::Flush, 0, 0, None)),
        _ => return None,
    };
    let blocks = u32::try_from(asked.num_blocks).ok()?;
    // SAFETY: the bdev lives.
    let block_size = unsafe { (*(*io.0).bdev).blocklen } as usize;
    let payload = super::volume::carries_data(kind).then_some(Payload {
        iovs: asked.iovs,
        iov_count: asked.iovcnt,
        len: blocks as usize * block_size,
    });
    Some((kind, asked.offset_blocks, blocks, payload))
}

pub enum Other {
    Reset,
    Abort(BdevIo),
    Unknown,
}

pub fn other_request(io: BdevIo) -> Other {
    match kind_of(io) {
        sys::SPDK_BDEV_IO_TYPE_RESET => Other::Reset,
        sys::SPDK_BDEV_IO_TYPE_ABORT => {
            // SAFETY: an abort has this part of the union.
            Other::Abort(BdevIo(unsafe { (*io.0).u.abort.bio_to_abort }))
        }
        _ => Other::Unknown,
    }
}

/// A peer's command: opcode, words, data.
pub fn peer_request(io: BdevIo) -> Option<(u8, [u32; 8], Payload)> {
    let kind = kind_of(io);
    if !matches!(
        kind,
        sys::SPDK_BDEV_IO_TYPE_NVME_IO | sys::SPDK_BDEV_IO_TYPE_NVME_IOV_MD
    ) {
        return None;
    }
    // SAFETY: an I/O of these kinds has this part of the union.
    let asked = unsafe { &(*io.0).u.nvme_passthru };
    let (opcode, words) = sys::command_words(&asked.cmd);
    let payload = if asked.nbytes == 0 {
        Payload::NONE
    } else if kind == sys::SPDK_BDEV_IO_TYPE_NVME_IOV_MD {
        Payload {
            iovs: asked.iovs,
            iov_count: asked.iovcnt,
            len: asked.nbytes,
        }
    } else {
        // SAFETY: our own part of the I/O, until it is complete.
        let piece = unsafe { &raw mut (*io_context(io)).piece };
        // SAFETY: as above.
        unsafe {
            piece.write(sys::iovec {
                iov_base: asked.buf,
                iov_len: asked.nbytes,
            });
        }
        Payload {
            iovs: piece,
            iov_count: 1,
            len: asked.nbytes,
        }
    };
    Some((opcode, words, payload))
}

extern "C" fn complete(io: *mut c_void) {
    let io = BdevIo(io.cast());
    // SAFETY: on the I/O's own thread, once; `end` has written how.
    unsafe {
        let IoContext { status, nvme, .. } = *io_context(io);
        match nvme {
            Some((dword0, code_type, code)) => {
                sys::spdk_bdev_io_complete_nvme_status(io.0, dword0, code_type, code);
            }
            None => sys::spdk_bdev_io_complete(io.0, status),
        }
    }
}

fn end(
    core: &Core,
    io: BdevIo,
    status: sys::spdk_bdev_io_status,
    nvme: Option<(u32, c_int, c_int)>,
) {
    // SAFETY: the I/O is not complete yet.
    let thread = unsafe {
        let context = io_context(io);
        (&raw mut (*context).status).write(status);
        (&raw mut (*context).nvme).write(nvme);
        sys::spdk_bdev_io_get_thread(io.0)
    };
    core.on_thread(thread, complete, io.0.cast());
}

/// Ends an application's I/O.
pub fn finish(core: &Core, io: BdevIo, status: AppStatus) {
    let asked = request(io);
    if asked.port == Port::Application {
        trace::completed(io, asked.trace_owner, status);
    }
    let nvme = |code_type: u32, code: u32| Some((0, code_type as c_int, code as c_int));
    let failed = sys::SPDK_BDEV_IO_STATUS_FAILED;
    match status {
        AppStatus::Ok => end(core, io, sys::SPDK_BDEV_IO_STATUS_SUCCESS, None),
        AppStatus::Failed => end(core, io, failed, None),
        AppStatus::Invalid => {
            let code = nvme(sys::SPDK_NVME_SCT_GENERIC, sys::SPDK_NVME_SC_INVALID_FIELD);
            end(core, io, failed, code);
        }
        // A host with another path takes it.
        AppStatus::Inaccessible => {
            let code = sys::SPDK_NVME_SC_ASYMMETRIC_ACCESS_INACCESSIBLE;
            end(core, io, failed, nvme(sys::SPDK_NVME_SCT_PATH, code));
        }
    }
}

pub fn aborted(core: &Core, io: BdevIo) {
    trace::aborted(io, request(io).trace_owner);
    end(core, io, sys::SPDK_BDEV_IO_STATUS_ABORTED, None);
}

/// Answers a peer's command.
pub fn answer(core: &Core, io: BdevIo, answer: PeerAnswer) {
    // SAFETY: a command of a peer has this part of the union.
    let (opcode, _) = sys::command_words(unsafe { &(*io.0).u.nvme_passthru.cmd });
    let (code_type, code) = if received::is_without_data(opcode, answer) {
        received::NO_DATA
    } else {
        (0, 0)
    };
    let nvme = (
        answer.to_dword0(),
        c_int::from(code_type),
        c_int::from(code),
    );
    end(core, io, sys::SPDK_BDEV_IO_STATUS_FAILED, Some(nvme));
}
