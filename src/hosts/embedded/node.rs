//! A node: one reactor thread per core of the mask, their start, and their end in order. Called by the
//! command `tgt`, by the demo and by tests; several nodes can live in one process.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Instant;

use super::admin;
use super::core::Core;
use super::initiator;
use super::listener;
use super::message::{Message, NodeHandle};
use super::nvme_tcp::target::{SharedTarget, TargetOptions, TargetState};
use super::target;
use super::volume;

/// CPUs to run reactors on, as SPDK's `-m` takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreMask(Vec<usize>);

/// What is wrong with a core mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("core mask {0:?} is neither a hexadecimal mask (0x3) nor a list ([0,1] or [0-3])")]
pub struct CoreMaskError(String);

const CPU_MAX: usize = 1023;

impl CoreMask {
    /// `count` reactors on CPUs 0, 1, …
    pub fn first(count: usize) -> Self {
        Self((0..count.max(1)).collect())
    }

    pub fn cpus(&self) -> &[usize] {
        &self.0
    }
}

impl std::str::FromStr for CoreMask {
    type Err = CoreMaskError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let cpus = match text.strip_prefix('[') {
            Some(list) => list.strip_suffix(']').and_then(parse_list),
            None => parse_mask(text),
        };
        match cpus {
            Some(mut cpus) if !cpus.is_empty() => {
                cpus.sort_unstable();
                cpus.dedup();
                Ok(Self(cpus))
            }
            _ => Err(CoreMaskError(text.to_owned())),
        }
    }
}

fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        if first > last || last > CPU_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

fn parse_mask(mask: &str) -> Option<Vec<usize>> {
    let digits = mask.strip_prefix("0x").unwrap_or(mask);
    let mut cpus = Vec::new();
    for (place, digit) in digits.chars().rev().enumerate() {
        let value = digit.to_digit(16)?;
        cpus.extend(
            (0..4)
                .filter(|bit| value >> bit & 1 == 1)
                .map(|bit| place * 4 + bit),
        );
    }
    cpus.iter().all(|cpu| *cpu <= CPU_MAX).then_some(cpus)
}

/// An orderly shutdown takes no longer.
const SHUTDOWN_LIMIT_MS: u64 = 10_000;

pub struct NodeOptions {
    pub core_mask: CoreMask,
    /// SIGTERM and SIGINT shut this node down; a second one ends the process at once. For the one node
    /// of a process whose threads are all started after it.
    pub handle_signals: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            core_mask: CoreMask::first(1),
            handle_signals: false,
        }
    }
}

/// The reactors of a node that runs.
pub struct Node {
    handle: NodeHandle,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Node {
    /// Starts the reactors, and `on_core0` on the first of them. Errors: no io_uring, no threads.
    pub fn start(
        options: &NodeOptions,
        on_core0: impl FnOnce(&mut Core) + Send + 'static,
    ) -> io::Result<Self> {
        if options.handle_signals {
            block_signals()?;
        }
        let cpus = options.core_mask.cpus();
        let handle = NodeHandle::new(cpus.len())?;
        let clock = Instant::now();
        let target = TargetState::new(TargetOptions::default());
        let (started, starts) = sync_channel(cpus.len());
        let mut threads = Vec::new();
        for (index, cpu) in cpus.iter().copied().enumerate() {
            let handle = handle.clone();
            let started = started.clone();
            let target = target.clone();
            let thread = std::thread::Builder::new()
                .name(format!("reactor_{cpu}"))
                .spawn(move || {
                    pin_to(cpu);
                    reactor_thread(index, handle, clock, target, &started)
                })?;
            threads.push(thread);
        }
        let node = Self { handle, threads };
        for _ in cpus {
            let result = starts.recv().unwrap_or_else(|_| Err(closed()));
            if let Err(error) = result {
                node.abandon();
                return Err(error);
            }
        }
        if options.handle_signals {
            let handle = node.handle.clone();
            std::thread::Builder::new()
                .name("signals".to_owned())
                .spawn(move || wait_for_signals(&handle))?;
        }
        node.handle.call(0, on_core0).map_err(|_| closed())?;
        Ok(node)
    }

    pub fn handle(&self) -> &NodeHandle {
        &self.handle
    }

    /// Waits until the node has shut down.
    pub fn join(self) -> io::Result<()> {
        let mut result = Ok(());
        for thread in self.threads {
            let ended = thread.join().unwrap_or_else(|_| Err(closed()));
            result = result.and(ended);
        }
        result
    }

    /// Asks for an orderly shutdown and waits for its end.
    pub fn shutdown(self) -> io::Result<()> {
        // Gone already is as good.
        let _ = self.handle.call(0, shutdown);
        self.join()
    }

    /// Stops what did start.
    fn abandon(self) {
        for core in 0..self.handle.cores() {
            // Those that did not start do not answer.
            let _ = self.handle.call(core, Core::stop);
        }
        let _ = self.join();
    }
}

fn closed() -> io::Error {
    io::Error::other("a reactor thread ended")
}

fn reactor_thread(
    index: usize,
    handle: NodeHandle,
    clock: Instant,
    target: SharedTarget,
    started: &std::sync::mpsc::SyncSender<io::Result<()>>,
) -> io::Result<()> {
    let mailbox_owner = handle.clone();
    let mut core = match Core::new(index, handle, clock, target) {
        Ok(core) => core,
        Err(error) => {
            mailbox_owner.mailbox(index).close();
            // The starter waits for one answer of each thread; there is room for all of them.
            let _ = started.send(Err(error));
            return Ok(());
        }
    };
    let _ = started.send(Ok(()));
    let result = core.run();
    if let Err(error) = &result {
        tracing::error!("reactor {index} stops: {error}");
    }
    result
}

/// A CPU that is not there, or not ours, leaves the thread where it is.
fn pin_to(cpu: usize) {
    // SAFETY: a cpu_set_t is plain bits, all zeroes is the empty set; CPU_SET stays inside for a CPU
    // below its 1024 bits, which CoreMask guarantees.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu.min(CPU_MAX), &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Takes the node down in order, on core 0: hosts are turned away, volumes end what they hold, then the
/// connections and the reactors go.
pub fn shutdown(core: &mut Core) {
    // Whatever does not end in time is left as a crash would leave it.
    core.after(SHUTDOWN_LIMIT_MS, |core| {
        tracing::error!("not everything ended within {SHUTDOWN_LIMIT_MS} ms");
        stop_all(core);
    });
    listener::close_all(core);
    core.on_all_cores(target::close_connections, |core| {
        volume::shutdown(core, |core| {
            core.on_all_cores(close_links, |_| {});
            core.on_all_cores_later(target::wait_for_connections, stop_all);
        });
    });
}

fn stop_all(core: &mut Core) {
    for index in 0..core.cores {
        core.send(index, Message::Call(Box::new(Core::stop)));
    }
}

fn close_links(core: &mut Core) {
    admin::close_all(core);
    initiator::close_all(core);
}

fn termination_signals() -> libc::sigset_t {
    // SAFETY: sigemptyset initialises the set before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        set
    }
}

/// In the calling thread and those that it starts afterwards.
fn block_signals() -> io::Result<()> {
    let set = termination_signals();
    // SAFETY: the set is a live local; the old mask is not asked for.
    let result =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(result))
    }
}

fn wait_for_signals(handle: &NodeHandle) {
    let set = termination_signals();
    let wait = || {
        let mut signal = 0;
        // SAFETY: both point to live locals.
        while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
        signal
    };
    let signal = wait();
    tracing::info!("signal {signal}: shutting down");
    if handle.call(0, shutdown).is_err() {
        return;
    }
    let signal = wait();
    tracing::warn!("signal {signal} again: ending at once");
    // Nothing is to be cleaned up that a crash would not leave too.
    std::process::exit(128 + signal);
}

#[cfg(test)]
mod tests;
