//! The io_uring of one reactor: entries that wait for room, entering the kernel only when there is
//! a reason to, and what a completion belongs to ([`Tag`]). Called by the reactor and the disks;
//! knows nothing of bdevs or sockets beyond their file descriptors.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, squeue, types};

/// What a completion of the ring belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TagKind {
    /// Nobody waits for it (a wake that arrived, a cancellation).
    None = 0,
    /// A disk I/O: the slot of the core's disk queue.
    Disk = 1,
    /// A connection of the target became ready.
    TargetSocket = 2,
    /// A queue pair of the initiator became ready.
    InitiatorSocket = 3,
    /// A listening socket has connections to accept.
    Listener = 4,
    /// Another thread wrote to this reactor's eventfd.
    Event = 5,
    /// Our own message to another ring failed: wake that core by its eventfd.
    WakeFailed = 6,
    /// An admin queue of the initiator became ready.
    AdminSocket = 7,
}

/// The 64 bits that travel with a ring entry: kind (8), slot (24), generation of the slot (32).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    pub kind: TagKind,
    pub slot: u32,
    pub generation: u32,
}

impl Tag {
    pub const SLOT_MAX: u32 = (1 << 24) - 1;

    pub fn new(kind: TagKind, slot: u32, generation: u32) -> Self {
        debug_assert!(slot <= Self::SLOT_MAX);
        Self {
            kind,
            slot,
            generation,
        }
    }

    pub fn encode(self) -> u64 {
        (self.kind as u64) << 56
            | u64::from(self.slot & Self::SLOT_MAX) << 32
            | u64::from(self.generation)
    }

    pub fn decode(bits: u64) -> Self {
        let kind = match (bits >> 56) as u8 {
            1 => TagKind::Disk,
            2 => TagKind::TargetSocket,
            3 => TagKind::InitiatorSocket,
            4 => TagKind::Listener,
            5 => TagKind::Event,
            6 => TagKind::WakeFailed,
            7 => TagKind::AdminSocket,
            _ => TagKind::None,
        };
        Self {
            kind,
            slot: (bits >> 32) as u32 & Self::SLOT_MAX,
            generation: bits as u32,
        }
    }
}

/// One completion, copied out of the ring.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    pub tag: Tag,
    /// What the system call would have returned, or a negative errno.
    pub result: i32,
    /// A multishot entry that stays armed.
    pub more: bool,
}

pub struct Ring {
    uring: IoUring,
    /// Entries that found the submission queue full, oldest first.
    backlog: VecDeque<squeue::Entry>,
    /// First and last address of the memory that the kernel knows, by its number there.
    registered: Vec<(usize, usize)>,
}

/// Pieces of memory that can be registered.
const REGISTERED_MAX: u32 = 16;

const COMPLETION_ENTRIES_PER_SUBMISSION: u32 = 8;

impl Ring {
    /// To be called on the thread that will use the ring: a ring with a single issuer belongs to its
    /// creator. Kernels without that (before 6.1) get plainer rings.
    pub fn new(entries: u32) -> io::Result<Self> {
        let completion_entries = entries * COMPLETION_ENTRIES_PER_SUBMISSION;
        let deferred = || {
            IoUring::builder()
                .setup_cqsize(completion_entries)
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .build(entries)
        };
        let cooperative = || {
            IoUring::builder()
                .setup_cqsize(completion_entries)
                .setup_coop_taskrun()
                .setup_taskrun_flag()
                .build(entries)
        };
        let plain = || {
            IoUring::builder()
                .setup_cqsize(completion_entries)
                .build(entries)
        };
        let uring = deferred().or_else(|_| cooperative()).or_else(|_| plain())?;
        // Only saves a lookup per entry into the kernel; kernels before 5.18 do not have it.
        let _ = uring.submitter().register_ring_fd();
        Ok(Self {
            uring,
            backlog: VecDeque::new(),
            registered: Vec::new(),
        })
    }

    /// Lets the kernel pin memory once rather than for every I/O. Where it refuses (memlock limit, old
    /// kernel) I/O works as well without, only slower.
    ///
    /// # Safety
    /// The memory stays mapped as long as the ring lives.
    pub unsafe fn register_memory(&mut self, memory: *mut u8, length_bytes: usize) {
        let number = self.registered.len() as u32;
        if number >= REGISTERED_MAX {
            return;
        }
        let submitter = self.uring.submitter();
        if number == 0 && submitter.register_buffers_sparse(REGISTERED_MAX).is_err() {
            return;
        }
        let range = libc::iovec {
            iov_base: memory.cast(),
            iov_len: length_bytes,
        };
        // SAFETY: passed on to our caller.
        match unsafe { submitter.register_buffers_update(number, &[range], None) } {
            Ok(()) => {
                let start = memory as usize;
                self.registered.push((start, start + length_bytes));
            }
            Err(error) => tracing::debug!("I/O memory is not registered: {error}"),
        }
    }

    /// The number under which the kernel knows all of this memory.
    pub fn registered_number(&self, memory: *mut u8, length_bytes: usize) -> Option<u16> {
        let start = memory as usize;
        self.registered
            .iter()
            .position(|(first, end)| start >= *first && start + length_bytes <= *end)
            .map(|number| number as u16)
    }

    pub fn fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }

    /// Queues an entry; it reaches the kernel at the next [`enter`](Self::enter) or
    /// [`wait`](Self::wait).
    ///
    /// # Safety
    /// Memory and file descriptors that the entry names stay valid until its completion was seen.
    pub unsafe fn push(&mut self, entry: squeue::Entry, tag: Tag) {
        let entry = entry.user_data(tag.encode());
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: passed on to our caller.
        if unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    fn refill(&mut self) {
        let mut queue = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: the caller of `push` promised it for every entry of the backlog.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// Enters the kernel if entries are queued or deferred completions wait to be run.
    pub fn enter(&mut self) -> io::Result<()> {
        loop {
            if !self.backlog.is_empty() {
                self.refill();
            }
            {
                let queue = self.uring.submission();
                if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                    return Ok(());
                }
            }
            match self.uring.submit() {
                Ok(_) => {}
                Err(error) if is_passing(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
            if self.backlog.is_empty() {
                return Ok(());
            }
        }
    }

    /// Blocks until a completion arrives or `timeout` is over.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if !self.backlog.is_empty() {
            return self.enter();
        }
        let timespec = types::Timespec::from(timeout);
        let arguments = types::SubmitArgs::new().timespec(&timespec);
        match self.uring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Appends the completions that are there.
    pub fn collect(&mut self, into: &mut Vec<Completion>) {
        for entry in self.uring.completion() {
            into.push(Completion {
                tag: Tag::decode(entry.user_data()),
                result: entry.result(),
                more: io_uring::cqueue::more(entry.flags()),
            });
        }
    }
}

/// Answers of `io_uring_enter` after which the next attempt may succeed.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::opcode;
    use std::time::Instant;

    #[test]
    fn a_tag_survives_its_64_bits() {
        for kind in [
            TagKind::None,
            TagKind::Disk,
            TagKind::TargetSocket,
            TagKind::InitiatorSocket,
            TagKind::Listener,
            TagKind::Event,
            TagKind::WakeFailed,
            TagKind::AdminSocket,
        ] {
            let tag = Tag::new(kind, Tag::SLOT_MAX, u32::MAX - 1);
            assert_eq!(Tag::decode(tag.encode()), tag);
        }
    }

    #[test]
    fn more_entries_than_the_ring_holds_all_complete() {
        let mut ring = Ring::new(4).unwrap();
        for slot in 0..100 {
            // SAFETY: a no-op names no memory.
            unsafe { ring.push(opcode::Nop::new().build(), Tag::new(TagKind::Disk, slot, 7)) };
        }
        let mut completions = Vec::new();
        while completions.len() < 100 {
            ring.enter().unwrap();
            ring.collect(&mut completions);
        }
        let slots: Vec<u32> = completions.iter().map(|c| c.tag.slot).collect();
        assert_eq!(slots, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_wait_ends_at_its_timeout() {
        let mut ring = Ring::new(4).unwrap();
        let start = Instant::now();
        ring.wait(Duration::from_millis(5)).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(5));
    }
}
