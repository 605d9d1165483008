//! How the module learns that the application is going down. SPDK ends its subsystems last come, first gone: the NVMe-oF
//! target waits there for the I/O of its hosts, long before the bdev library asks its modules. So the module has a
//! subsystem of its own, which comes after all others. Called by `module`.

#[cfg(spdk_subsystems)]
pub use subsystem::listen;

/// Headers before 26.05 have no subsystems for others: the module hears of the end from the bdev library only.
#[cfg(not(spdk_subsystems))]
pub fn listen() {}

#[cfg(spdk_subsystems)]
mod subsystem {
    use std::cell::UnsafeCell;

    use super::super::core::manager_core;
    use super::super::sys;

    /// SPDK links it into its list.
    struct Subsystem(UnsafeCell<sys::spdk_subsystem>);

    // SAFETY: only its address is used here; SPDK touches it on the application's thread.
    unsafe impl Sync for Subsystem {}

    static SUBSYSTEM: Subsystem = Subsystem(UnsafeCell::new(subsystem()));

    const fn subsystem() -> sys::spdk_subsystem {
        // SAFETY: a subsystem without functions is all zeroes.
        let mut subsystem: sys::spdk_subsystem = unsafe { std::mem::zeroed() };
        subsystem.name = c"bdev_repl".as_ptr();
        subsystem.init = Some(init);
        subsystem.fini = Some(fini);
        subsystem
    }

    /// While SPDK goes through its list: what is added now is at its end, behind whatever the application is made of.
    pub fn listen() {
        // SAFETY: on the application's thread, once; the subsystem lives for ever.
        unsafe { sys::spdk_add_subsystem(SUBSYSTEM.0.get()) };
    }

    unsafe extern "C" fn init() {
        // SAFETY: called by SPDK, which waits for it.
        unsafe { sys::spdk_subsystem_init_next(0) };
    }

    unsafe extern "C" fn fini() {
        if let Some(core) = manager_core() {
            core.send(|state| state.node.frozen.is_ending = true);
        }
        // SAFETY: called by SPDK, which waits for it.
        unsafe { sys::spdk_subsystem_fini_next() };
    }
}
