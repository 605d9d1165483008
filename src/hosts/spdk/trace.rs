//! Trace points of a request's life, for SPDK's `spdk_trace` and `spdk_trace_record`: group `bdev_repl`. Registered by the
//! constructor; recorded where an application's I/O comes in, and where it is answered. Off, a point costs a look at a mask.

use std::cell::UnsafeCell;
use std::ffi::{CStr, c_int};

use super::context::BdevIo;
use super::sys;
use crate::host::AppStatus;

/// Numbers of groups and types are not given out by anybody: these are free in the versions that are supported.
const GROUP: u16 = 0x7;
const OWNER_VOLUME: u8 = 0x47;
const OBJECT_REQUEST: u8 = 0xd7;

/// An I/O has reached the volume: what it asks for.
const SUBMITTED: u16 = sys::trace_point(GROUP, 0);
/// It is answered: how.
const DONE: u16 = sys::trace_point(GROUP, 1);

/// Bytes of a text in a trace, with the zero at its end.
const TEXT_BYTES: u8 = 16;

/// What SPDK links into its list.
struct Group(UnsafeCell<sys::spdk_trace_register_fn>);

// SAFETY: only its address is used here, by the constructor; what changes in it is SPDK's.
unsafe impl Sync for Group {}

static REGISTRATION: Group = Group(UnsafeCell::new(sys::spdk_trace_register_fn {
    name: c"bdev_repl".as_ptr(),
    tgroup_id: GROUP as u8,
    reg_fn: Some(describe),
    next: std::ptr::null_mut(),
}));

/// Makes the group known; by the constructor, before anything of SPDK runs.
pub fn register() {
    // SAFETY: called once, before other threads; the registration lives for ever.
    unsafe { sys::spdk_trace_add_register_fn(REGISTRATION.0.get()) };
}

/// SPDK calls it when there is a trace: what its tools are to show.
unsafe extern "C" fn describe() {
    let text = (sys::SPDK_TRACE_ARG_TYPE_STR, TEXT_BYTES);
    let number = |bytes| (sys::SPDK_TRACE_ARG_TYPE_INT, bytes);
    let points = [
        point(
            c"REPL_IO_SUBMIT",
            SUBMITTED,
            true,
            &[(c"kind", text), (c"lba", number(8)), (c"blocks", number(4))],
        ),
        point(c"REPL_IO_DONE", DONE, false, &[(c"status", text)]),
    ];
    // SAFETY: there is a trace by now; SPDK copies what it is given.
    unsafe {
        sys::spdk_trace_register_owner_type(OWNER_VOLUME, b'v' as _);
        sys::spdk_trace_register_object(OBJECT_REQUEST, b'r' as _);
        sys::spdk_trace_register_description_ext(points.as_ptr(), points.len());
    }
}

fn point(
    name: &'static CStr,
    id: u16,
    begins: bool,
    arguments: &[(&'static CStr, (u32, u8))],
) -> sys::spdk_trace_tpoint_opts {
    // SAFETY: numbers and pointers only; an argument without a name is none.
    let mut point: sys::spdk_trace_tpoint_opts = unsafe { std::mem::zeroed() };
    point.name = name.as_ptr();
    point.tpoint_id = id;
    point.owner_type = OWNER_VOLUME;
    point.object_type = OBJECT_REQUEST;
    point.new_object = u8::from(begins);
    for (slot, (name, (kind, bytes))) in point.args.iter_mut().zip(arguments) {
        slot.name = name.as_ptr();
        slot.type_ = *kind as u8;
        slot.size = *bytes;
    }
    point
}

/// A volume whose requests are shown by its name; 0 where there is no trace.
pub fn begin_owner(name: &CStr) -> u16 {
    // SAFETY: SPDK copies the name.
    unsafe { sys::spdk_trace_register_owner(OWNER_VOLUME, name.as_ptr()) }
}

pub fn end_owner(owner: u16) {
    // SAFETY: given by `begin_owner`, and given back once.
    unsafe { sys::spdk_trace_unregister_owner(owner) };
}

/// An application's I/O has come in. `asked` says what for: kind, first block, blocks; only called where it is recorded.
#[inline]
pub fn submitted(io: BdevIo, owner: u16, asked: impl FnOnce() -> (&'static CStr, u64, u32)) {
    if sys::trace_is_on(SUBMITTED) {
        let (kind, lba, blocks) = asked();
        const ARGUMENTS: c_int = 3;
        // SAFETY: the arguments are as described; a request is known by its address.
        unsafe {
            sys::_spdk_trace_record(
                0,
                SUBMITTED,
                owner,
                0,
                io.0 as u64,
                ARGUMENTS,
                kind.as_ptr(),
                lba,
                blocks,
            );
        }
    }
}

/// It is answered.
#[inline]
pub fn completed(io: BdevIo, owner: u16, status: AppStatus) {
    ended(io, owner, || match status {
        AppStatus::Ok => c"ok",
        AppStatus::Failed => c"failed",
        AppStatus::Inaccessible => c"inaccessible",
        AppStatus::Invalid => c"invalid",
    });
}

/// It was taken back.
pub fn aborted(io: BdevIo, owner: u16) {
    ended(io, owner, || c"aborted");
}

#[inline]
fn ended(io: BdevIo, owner: u16, status: impl FnOnce() -> &'static CStr) {
    if sys::trace_is_on(DONE) {
        const ARGUMENTS: c_int = 1;
        // SAFETY: as in `submitted`.
        unsafe {
            sys::_spdk_trace_record(0, DONE, owner, 0, io.0 as u64, ARGUMENTS, status().as_ptr());
        }
    }
}
