//! One core of the SPDK host: an `spdk_thread` that never leaves its CPU, what the engine keeps there, and how anything
//! gets in. SPDK's callbacks only put events into the inbox; the loop in [`Core::run`] takes them out, one at a time, so
//! that the engine is never entered from within itself, whatever completes inside a submission.
//!
//! Core 0 is the application's own thread: bdevs, subsystems and RPCs live there, and so do the managers.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use once_cell::sync::OnceCell;

use super::part::Lists;
use super::sys;
use super::volume::{self, CoreVolume, InFlight};
use crate::engine::message::{ToChannel, ToManager};
use crate::hosts::slab::Slab;
use crate::hosts::spdk::context::Context;

/// The core on which the managers are.
pub const MANAGER_CORE: usize = 0;

/// What waits at a core's door.
pub enum Event {
    /// An I/O that a bdev of ours was given on this CPU.
    Submitted(*mut sys::spdk_bdev_io),
    /// Something that the engine asked for has ended: its key, and how.
    Done(u64, Result<u32, ()>),
    /// As a failure, but nobody knows whether it was carried out: the connection that it was sent on is gone.
    PathLost(u64),
    /// A backing bdev or a peer has resources again.
    RoomAgain(u32),
    /// From another core or from an RPC.
    Job(Job),
    ToManager(u32, ToManager<Context>),
    ToChannel(u32, ToChannel<Context>),
    Poll,
}

pub type Job = Box<dyn FnOnce(&mut State)>;

/// What only the loop of this core touches.
pub struct State {
    pub core: &'static Core,
    pub volumes: Vec<Option<Box<CoreVolume>>>,
    pub in_flight: Slab<InFlight>,
    pub lists: Lists,
    /// On core 0.
    pub node: super::node::Node,
}

pub struct Core {
    pub index: usize,
    pub thread: *mut sys::spdk_thread,
    poller: Cell<*mut sys::spdk_poller>,
    is_running: Cell<bool>,
    /// The thread from which the loop was entered, when that is not this core's own.
    entered_from: Cell<*mut sys::spdk_thread>,
    inbox: RefCell<VecDeque<Event>>,
    state: RefCell<Option<State>>,
    worked: Cell<bool>,
}

/// All cores, in order. Set once by the module's init.
struct Cores(Vec<&'static Core>);

// SAFETY: other CPUs only read `index` and `thread` of a core, which never change; everything else is reached through
// `Core::current`, which finds the core of the own CPU.
unsafe impl Send for Cores {}
// SAFETY: as above.
unsafe impl Sync for Cores {}

static CORES: OnceCell<Cores> = OnceCell::new();
/// Cores that have not said yet that they have ended.
static LEFT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CURRENT: Cell<Option<&'static Core>> = const { Cell::new(None) };
}

/// All cores; none before the module's init.
pub fn all() -> &'static [&'static Core] {
    CORES.get().map_or(&[], |cores| &cores.0)
}

pub fn manager_core() -> Option<&'static Core> {
    all().first().copied()
}

/// Makes a core for each CPU of the application; called on the application's thread.
///
/// # Errors
/// Negative errno.
pub fn start() -> Result<(), c_int> {
    // SAFETY: plain calls of the environment, on a thread of SPDK.
    let (application, own_cpu) =
        unsafe { (sys::spdk_get_thread(), sys::spdk_env_get_current_core()) };
    let mut cores = vec![Core::make(0, application)];
    // SAFETY: as above.
    let mut cpu = unsafe { sys::spdk_env_get_first_core() };
    while cpu != u32::MAX {
        if cpu != own_cpu {
            let index = cores.len();
            let name = CString::new(format!("bdev_repl_{index}")).unwrap_or_default();
            let mut mask = sys::spdk_cpuset::default();
            // SAFETY: the mask is ours, the name lives long enough.
            let thread = unsafe {
                sys::spdk_cpuset_set_cpu(&raw mut mask, cpu, true);
                sys::spdk_thread_create(name.as_ptr(), &raw const mask)
            };
            if thread.is_null() {
                return Err(-libc::ENOMEM);
            }
            cores.push(Core::make(index, thread));
        }
        // SAFETY: as above.
        cpu = unsafe { sys::spdk_env_get_next_core(cpu) };
    }
    LEFT.store(cores.len(), Ordering::Relaxed);
    let first = cores[0];
    let others: Vec<_> = cores[1..].to_vec();
    if CORES.set(Cores(cores)).is_err() {
        return Err(-libc::EALREADY);
    }
    first.begin();
    for core in others {
        core.call(begin_here);
    }
    Ok(())
}

extern "C" fn begin_here(core: *mut c_void) {
    // SAFETY: `call` passes a core, and cores live for ever.
    unsafe { &*core.cast::<Core>() }.begin();
}

extern "C" fn poll(core: *mut c_void) -> c_int {
    // SAFETY: the poller was registered with a core, and cores live for ever.
    let core = unsafe { &*core.cast::<Core>() };
    core.worked.set(false);
    core.enter(Event::Poll);
    c_int::from(core.worked.get())
}

extern "C" fn run_job(job: *mut c_void) {
    // SAFETY: made by `send` from a box, for this one call.
    let job = unsafe { Box::from_raw(job.cast::<Job>()) };
    if let Some(core) = Core::current() {
        core.enter(Event::Job(*job));
    }
}

impl Core {
    fn make(index: usize, thread: *mut sys::spdk_thread) -> &'static Core {
        Box::leak(Box::new(Core {
            index,
            thread,
            poller: Cell::new(ptr::null_mut()),
            is_running: Cell::new(false),
            entered_from: Cell::new(ptr::null_mut()),
            inbox: RefCell::new(VecDeque::with_capacity(1024)),
            state: RefCell::new(None),
            worked: Cell::new(false),
        }))
    }

    /// The core of the CPU that this runs on.
    pub fn current() -> Option<&'static Core> {
        CURRENT.with(Cell::get)
    }

    /// Has `function` called with this core on its thread.
    fn call(&'static self, function: unsafe extern "C" fn(*mut c_void)) {
        let this: *const Core = self;
        send_to(self.thread, function, this.cast_mut().cast());
    }

    fn begin(&'static self) {
        CURRENT.with(|current| current.set(Some(self)));
        *self.state.borrow_mut() = Some(State {
            core: self,
            volumes: Vec::new(),
            in_flight: Slab::default(),
            lists: Lists::default(),
            node: super::node::Node::default(),
        });
        let this: *const Core = self;
        // SAFETY: cores live for ever; the poller belongs to this thread.
        let poller = unsafe { sys::spdk_poller_register(Some(poll), this.cast_mut().cast(), 0) };
        self.poller.set(poller);
    }

    /// Runs `job` on this core, after what is on its way there already.
    pub fn send(&'static self, job: impl FnOnce(&mut State) + 'static) {
        let job: Job = Box::new(job);
        let job = Box::into_raw(Box::new(job));
        send_to(self.thread, run_job, job.cast());
    }

    /// Takes an event, on this core's CPU; handles it now unless the loop is running.
    pub fn enter(&'static self, event: Event) {
        self.inbox.borrow_mut().push_back(event);
        if !self.is_running.get() {
            self.run();
        }
    }

    fn run(&'static self) {
        // SAFETY: asks for the current thread only.
        let from = unsafe { sys::spdk_get_thread() };
        let is_own = ptr::eq(from, self.thread);
        self.is_running.set(true);
        if !is_own {
            // Another thread of the same CPU: its I/O goes straight into the engine, in this core's name.
            self.entered_from.set(from);
            // SAFETY: this thread is not being polled elsewhere: it never leaves this CPU.
            unsafe { sys::spdk_set_thread(self.thread) };
        }
        if let Some(state) = self.state.borrow_mut().as_mut() {
            loop {
                let next = self.inbox.borrow_mut().pop_front();
                let Some(event) = next else { break };
                volume::handle(state, event);
            }
        }
        if !is_own {
            self.entered_from.set(ptr::null_mut());
            // SAFETY: back to what was current before.
            unsafe { sys::spdk_set_thread(from) };
        }
        self.is_running.set(false);
    }

    /// Reads what the loop keeps, from a callback of SPDK that wants its answer at once. `None` inside the loop.
    pub fn look<T>(&self, look: impl FnOnce(&mut State) -> T) -> Option<T> {
        let mut state = self.state.try_borrow_mut().ok()?;
        state.as_mut().map(look)
    }

    /// There was work in this round of the poller.
    pub fn note_work(&self) {
        self.worked.set(true);
    }

    /// Calls `function` with `argument` on `thread`: now where that is possible, else by message.
    pub fn on_thread(
        &self,
        thread: *mut sys::spdk_thread,
        function: unsafe extern "C" fn(*mut c_void),
        argument: *mut c_void,
    ) {
        if ptr::eq(thread, self.thread) {
            // SAFETY: the caller's function for the caller's argument.
            unsafe { function(argument) };
        } else if ptr::eq(thread, self.entered_from.get()) {
            // SAFETY: that thread is being polled by this CPU just now, further up the stack.
            unsafe {
                sys::spdk_set_thread(thread);
                function(argument);
                sys::spdk_set_thread(self.thread);
            }
        } else {
            send_to(thread, function, argument);
        }
    }
}

/// SPDK's message to a thread. There is no way on without it: SPDK's own modules end the process too.
pub fn send_to(
    thread: *mut sys::spdk_thread,
    function: unsafe extern "C" fn(*mut c_void),
    argument: *mut c_void,
) {
    // SAFETY: the caller gives a function and what it takes.
    let sent = unsafe { sys::spdk_thread_send_msg(thread, Some(function), argument) };
    if sent != 0 {
        tracing::error!("a message to an SPDK thread cannot be sent: {sent}");
        std::process::abort();
    }
}

/// Runs `each` on every core, one after the other, then `then` on core 0.
pub fn on_all(each: impl Fn(&mut State) + 'static, then: impl FnOnce(&mut State) + 'static) {
    on_core(0, Box::new(each), Box::new(then));
}

fn on_core(index: usize, each: Box<dyn Fn(&mut State)>, then: Job) {
    match all().get(index) {
        Some(core) => core.send(move |state| {
            each(state);
            on_core(index + 1, each, then);
        }),
        None => {
            if let Some(core) = manager_core() {
                core.send(then);
            }
        }
    }
}

/// Ends all cores; `then` on the application's thread when the last has ended. Nothing may be left on them.
pub fn stop(then: extern "C" fn()) {
    for core in all() {
        core.send(move |state| {
            let core = state.core;
            let mut poller = core.poller.replace(ptr::null_mut());
            // SAFETY: registered on this thread.
            unsafe { sys::spdk_poller_unregister(&raw mut poller) };
            if core.index != MANAGER_CORE {
                // SAFETY: the thread has no pollers and no channels any more.
                unsafe { sys::spdk_thread_exit(core.thread) };
            }
            if LEFT.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(first) = manager_core()
            {
                first.send(move |_| then());
            }
        });
    }
}
