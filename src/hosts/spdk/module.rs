//! What an SPDK application learns of this library when it is loaded: the bdev module. Called by the dynamic loader, or
//! by the start of the program that it is linked into; then by the bdev library.

use std::cell::UnsafeCell;
use std::ffi::c_int;

use super::core::{self, Event, manager_core};
use super::{awaited, bdev, ending, lifecycle, link, log, opening, rpc, sys, trace};
use crate::hosts::control::endpoint::endpoint_name;
use crate::rpc::Reply;

/// The loader calls what stands in this section. By the name, a linker takes it out of `libbdev_repl.a`
/// (`-u bdev_repl_register`).
#[used]
#[allow(non_upper_case_globals)]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".init_array")]
pub static bdev_repl_register: extern "C" fn() = register;

/// The module, which SPDK links into its list and writes to.
struct Module(UnsafeCell<sys::spdk_bdev_module>);

// SAFETY: only its address is used here; SPDK locks what it changes.
unsafe impl Sync for Module {}

static MODULE: Module = Module(UnsafeCell::new(module()));

const fn module() -> sys::spdk_bdev_module {
    // SAFETY: a module without functions is all zeroes.
    let mut module: sys::spdk_bdev_module = unsafe { std::mem::zeroed() };
    module.name = c"repl".as_ptr();
    module.module_init = Some(module_init);
    module.fini_start = Some(fini_start);
    module.async_fini_start = true;
    module.module_fini = Some(module_fini);
    module.async_fini = true;
    module.config_json = Some(config_json);
    module.get_ctx_size = Some(get_ctx_size);
    module.examine_config = Some(examine_config);
    module.examine_disk = Some(examine_disk);
    module
}

/// The module as SPDK names it.
pub fn get() -> *mut sys::spdk_bdev_module {
    MODULE.0.get()
}

extern "C" fn register() {
    log::register();
    trace::register();
    // SAFETY: called once, before anything of SPDK runs; the module lives for ever.
    unsafe { sys::spdk_bdev_module_list_add(get()) };
    rpc::register();
}

unsafe extern "C" fn module_init() -> c_int {
    match core::start() {
        Ok(()) => {
            ending::listen();
            0
        }
        Err(errno) => errno,
    }
}

/// The application is going down: volumes end before their bdevs are taken away, but for those that others build on.
unsafe extern "C" fn fini_start() {
    fn done() {
        // SAFETY: on the application's thread, once.
        unsafe { sys::spdk_bdev_module_fini_start_done() };
    }
    match manager_core() {
        Some(core) => core.send(|state| {
            state.node.awaited.volumes.clear();
            state.node.frozen.is_ending = true;
            lifecycle::shutdown(state, Box::new(|_| done()));
        }),
        None => done(),
    }
}

/// All bdevs are gone, and so are all volumes.
unsafe extern "C" fn module_fini() {
    extern "C" fn done() {
        // SAFETY: on the application's thread, once.
        unsafe { sys::spdk_bdev_module_fini_done() };
    }
    match manager_core() {
        Some(_) => core::stop(done),
        None => done(),
    }
}

unsafe extern "C" fn get_ctx_size() -> c_int {
    bdev::io_context_bytes() as c_int
}

/// Volumes that have no bdev yet: what has one writes itself.
unsafe extern "C" fn config_json(w: *mut sys::spdk_json_write_ctx) -> c_int {
    // SAFETY: SPDK's writer, inside an array.
    unsafe { rpc::write_config(|state| state.node.awaited.volumes.calls(), w) };
    0
}

/// An endpoint of ours is for peers only, and what a volume waits for is its own: with a claim nobody else looks at what
/// is on it.
unsafe extern "C" fn examine_config(bdev: *mut sys::spdk_bdev) {
    // SAFETY: SPDK's bdev, during the call.
    unsafe {
        let own = std::ptr::eq((*bdev).module, get()) && is_endpoint(bdev);
        if own || link::is_endpoint_of_peer(&sys::text(sys::spdk_bdev_get_name(bdev))) {
            sys::spdk_bdev_module_claim_bdev(bdev, std::ptr::null_mut(), get());
        } else if let Some(core) = manager_core() {
            core.enter(Event::Job(Box::new(awaited::appeared)));
        }
        sys::spdk_bdev_module_examine_done(get());
    }
}

unsafe fn is_endpoint(bdev: *mut sys::spdk_bdev) -> bool {
    // SAFETY: the caller's bdev.
    let name = unsafe { sys::text(sys::spdk_bdev_get_name(bdev)) };
    name.strip_suffix(&endpoint_name("")).is_some()
}

/// Looks whether a bdev that has appeared carries a volume.
unsafe extern "C" fn examine_disk(bdev: *mut sys::spdk_bdev) {
    // SAFETY: SPDK's bdev, during the call.
    let (name, is_ours, is_claimed) = unsafe {
        (
            sys::text(sys::spdk_bdev_get_name(bdev)),
            std::ptr::eq((*bdev).module, get()),
            (*bdev).internal.claim_type != sys::SPDK_BDEV_CLAIM_NONE,
        )
    };
    let reply = Reply::new(|outcome| {
        if let Err(error) = outcome {
            tracing::debug!("no volume comes back: {}", error.message);
        }
        // SAFETY: on the application's thread, once for each call of `examine_disk`.
        unsafe { sys::spdk_bdev_module_examine_done(get()) };
    });
    match manager_core() {
        // By us: nobody else is asked to examine what somebody has claimed.
        Some(core) if is_claimed => core.send(move |state| {
            awaited::when_made(state, name, reply);
        }),
        Some(core) if !is_ours => core.send(move |state| {
            opening::examine(state, &name, reply);
        }),
        _ => reply.ok(true),
    }
}
