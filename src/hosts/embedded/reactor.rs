//! What makes a thread a reactor: its ring, its clock, its mailbox and outboxes, and the policy of when
//! to poll, to yield and to block. Driven by the core's loop; knows nothing of what the work is.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue, types};

use super::message::{Message, NodeHandle, Wake};
use super::ring::{Completion, Ring, Tag, TagKind};

/// Poll this long after the last work, yielding the CPU in between, before blocking.
const SPIN_NS: u64 = 100_000;
/// A yield that took longer than this means that somebody else needs this CPU …
const YIELD_SLOW_NS: u64 = 300_000;
/// … so for this long do not spin at all.
const CROWDED_NS: u64 = 20_000_000;
/// A block lasts no longer, whatever the timers say.
const BLOCK_MAX_NS: u64 = 1_000_000_000;

const RING_ENTRIES: u32 = 512;

pub struct Reactor {
    pub index: usize,
    pub ring: Ring,
    node: NodeHandle,
    /// Messages that found another core's mailbox full, oldest first.
    outboxes: Vec<VecDeque<Message>>,
    clock: Instant,
    now_ns: u64,
    last_work_ns: u64,
    crowded_until_ns: u64,
    busy_ns: u64,
    idle_ns: u64,
}

impl Reactor {
    /// To be made on its own thread. `clock` is the node's common zero of time.
    pub fn new(index: usize, node: NodeHandle, clock: Instant) -> io::Result<Self> {
        let ring = Ring::new(RING_ENTRIES)?;
        node.mailbox(index).set_ring_fd(ring.fd());
        let mut reactor = Self {
            index,
            ring,
            outboxes: (0..node.cores()).map(|_| VecDeque::new()).collect(),
            node,
            clock,
            now_ns: 0,
            last_work_ns: 0,
            crowded_until_ns: 0,
            busy_ns: 0,
            idle_ns: 0,
        };
        reactor.arm_event();
        reactor.tick();
        reactor.last_work_ns = reactor.now_ns;
        Ok(reactor)
    }

    pub fn node(&self) -> &NodeHandle {
        &self.node
    }

    /// Nanoseconds since the node started, as of the beginning of this round of the loop; the same clock
    /// on all cores.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Nanoseconds spent working and idle, as `framework_get_reactors` reports them.
    pub fn busy_and_idle_ns(&self) -> (u64, u64) {
        (self.busy_ns, self.idle_ns)
    }

    /// Reads the clock.
    pub fn tick(&mut self) {
        self.now_ns = self.clock.elapsed().as_nanos() as u64;
    }

    /// Sends, or keeps until there is room; messages to one core stay in order.
    pub fn send(&mut self, core: usize, message: Message) {
        if !self.outboxes[core].is_empty() {
            self.outboxes[core].push_back(message);
            return;
        }
        match self.node.mailbox(core).push(message) {
            Ok(wake) => self.wake(core, wake),
            Err(message) => self.outboxes[core].push_back(message),
        }
    }

    /// Tries again what did not fit. Returns whether something still waits.
    pub fn flush_outboxes(&mut self) -> bool {
        let mut waiting = false;
        for core in 0..self.outboxes.len() {
            while let Some(message) = self.outboxes[core].pop_front() {
                // Nobody will ever read it.
                if self.node.mailbox(core).is_closed() {
                    continue;
                }
                match self.node.mailbox(core).push(message) {
                    Ok(wake) => self.wake(core, wake),
                    Err(message) => {
                        self.outboxes[core].push_front(message);
                        waiting = true;
                        break;
                    }
                }
            }
        }
        waiting
    }

    pub fn receive(&mut self) -> Option<Message> {
        self.node.mailbox(self.index).pop()
    }

    fn wake(&mut self, core: usize, wake: Wake) {
        let Wake::Needed { ring_fd } = wake else {
            return;
        };
        if core == self.index {
            return;
        }
        if ring_fd < 0 {
            self.node.mailbox(core).ring_bell();
            return;
        }
        let arrived = Tag::new(TagKind::None, 0, 0).encode();
        let entry = opcode::MsgRingData::new(types::Fd(ring_fd), 0, arrived, None)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS);
        let failed = Tag::new(TagKind::WakeFailed, core as u32, 0);
        // SAFETY: no memory is named; a ring that is gone by then makes the entry fail.
        unsafe { self.ring.push(entry, failed) };
    }

    /// A message to another ring did not arrive (a kernel before 5.18, or the ring is gone).
    pub fn wake_failed(&mut self, core: u32) {
        if (core as usize) < self.node.cores() {
            self.node.mailbox(core as usize).ring_bell();
        }
    }

    /// Listens to the eventfd; to be called again each time it has rung.
    pub fn arm_event(&mut self) {
        let fd = types::Fd(self.node.mailbox(self.index).event_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
        // SAFETY: no memory is named; the node keeps the eventfd.
        unsafe { self.ring.push(entry, Tag::new(TagKind::Event, 0, 0)) };
    }

    /// The eventfd has rung.
    pub fn event_rang(&mut self) {
        self.node.mailbox(self.index).silence_bell();
        self.arm_event();
    }

    /// Appends the completions that are there.
    pub fn collect(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        self.ring.enter()?;
        self.ring.collect(into);
        Ok(())
    }

    /// Accounts for a round of the loop that found work.
    pub fn worked(&mut self) {
        let before = self.now_ns;
        self.tick();
        self.busy_ns += self.now_ns - before;
        self.last_work_ns = self.now_ns;
    }

    /// A round of the loop found nothing to do: yields or blocks, until `deadline_ns` at the latest.
    pub fn idle(&mut self, deadline_ns: Option<u64>) -> io::Result<()> {
        let before = self.now_ns;
        self.tick();
        let spinning = self.now_ns < self.last_work_ns + SPIN_NS;
        if spinning && self.now_ns >= self.crowded_until_ns {
            std::thread::yield_now();
            let yielded = self.now_ns;
            self.tick();
            if self.now_ns - yielded > YIELD_SLOW_NS {
                self.crowded_until_ns = self.now_ns + CROWDED_NS;
            }
        } else {
            self.block(deadline_ns)?;
        }
        self.idle_ns += self.now_ns - before;
        Ok(())
    }

    fn block(&mut self, deadline_ns: Option<u64>) -> io::Result<()> {
        let timeout_ns = deadline_ns
            .map_or(BLOCK_MAX_NS, |deadline| {
                deadline.saturating_sub(self.now_ns)
            })
            .min(BLOCK_MAX_NS);
        if timeout_ns == 0 || !self.node.mailbox(self.index).prepare_to_block() {
            return Ok(());
        }
        let result = self.ring.wait(Duration::from_nanos(timeout_ns));
        self.node.mailbox(self.index).has_unblocked();
        self.tick();
        result
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.node.mailbox(self.index).close();
        while self.node.mailbox(self.index).pop().is_some() {}
    }
}
