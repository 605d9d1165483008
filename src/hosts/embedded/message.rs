//! How the cores of a node reach each other, and how other threads reach a core: a bounded lock-free
//! ring per core, and a wake for a core that blocks. Used by the reactor; does not know what a message
//! does.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering, fence};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::core::Core;
use super::volume::VolumeMessage;

/// What one core tells another.
pub enum Message {
    /// Control path: run this on that core.
    Call(Box<dyn FnOnce(&mut Core) + Send>),
    /// The engine's own messages.
    Volume(Box<VolumeMessage>),
}

/// How many messages a core's ring holds; senders keep what does not fit and try again.
pub const MAILBOX_CAPACITY: usize = 1024;

/// How often a thread that waits for an answer looks whether the node still lives.
const ASK_CHECK: Duration = Duration::from_millis(100);

/// The inbox of one core.
pub struct Mailbox {
    queue: ArrayQueue<Message>,
    /// Set by the owner before it blocks; whoever clears it owes the owner a wake.
    blocked: AtomicBool,
    /// The owner's ring, -1 until it exists and after it is gone.
    ring_fd: AtomicI32,
    event_fd: OwnedFd,
    /// The owner has left its loop: messages are refused.
    closed: AtomicBool,
}

/// How a core that blocks is to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    NotNeeded,
    /// By a message to this ring, or by [`Mailbox::ring_bell`].
    Needed {
        ring_fd: RawFd,
    },
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory involved; the result is checked.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            queue: ArrayQueue::new(MAILBOX_CAPACITY),
            blocked: AtomicBool::new(false),
            ring_fd: AtomicI32::new(-1),
            // SAFETY: the descriptor was just made and has no other owner.
            event_fd: unsafe { OwnedFd::from_raw_fd(fd) },
            closed: AtomicBool::new(false),
        })
    }

    pub fn event_fd(&self) -> RawFd {
        self.event_fd.as_raw_fd()
    }

    pub fn set_ring_fd(&self, fd: RawFd) {
        self.ring_fd.store(fd, Ordering::Release);
    }

    /// Puts a message in; the caller then sees to the wake. A full ring gives the message back.
    pub fn push(&self, message: Message) -> Result<Wake, Message> {
        self.queue.push(message)?;
        // Pairs with the fence in `prepare_to_block`: either we see that the owner blocks, or it sees
        // the message.
        fence(Ordering::SeqCst);
        if self.blocked.load(Ordering::Relaxed) && self.blocked.swap(false, Ordering::AcqRel) {
            return Ok(Wake::Needed {
                ring_fd: self.ring_fd.load(Ordering::Acquire),
            });
        }
        Ok(Wake::NotNeeded)
    }

    pub fn pop(&self) -> Option<Message> {
        self.queue.pop()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether the owner may block: false if a message came in meanwhile.
    pub fn prepare_to_block(&self) -> bool {
        self.blocked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.queue.is_empty() {
            return true;
        }
        self.blocked.store(false, Ordering::Relaxed);
        false
    }

    pub fn has_unblocked(&self) {
        self.blocked.store(false, Ordering::Relaxed);
    }

    /// Wakes the owner through its eventfd; works from any thread.
    pub fn ring_bell(&self) {
        let one: u64 = 1;
        // SAFETY: eight bytes of a live local, as eventfd(2) wants them. The counter cannot overflow to
        // an error that matters: full means that the owner is being woken.
        unsafe {
            libc::write(
                self.event_fd.as_raw_fd(),
                (&raw const one).cast(),
                size_of::<u64>(),
            )
        };
    }

    /// Takes back what [`ring_bell`](Self::ring_bell) did; for the owner.
    pub fn silence_bell(&self) {
        let mut count: u64 = 0;
        // SAFETY: eight bytes of a live local, as eventfd(2) wants them; an empty counter is an error that
        // does not matter.
        unsafe {
            libc::read(
                self.event_fd.as_raw_fd(),
                (&raw mut count).cast(),
                size_of::<u64>(),
            )
        };
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.ring_fd.store(-1, Ordering::Release);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// The mailboxes of all cores of a node; any thread may hold one.
#[derive(Clone)]
pub struct NodeHandle {
    mailboxes: Arc<[Mailbox]>,
}

/// The core has left its loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node is shutting down")]
pub struct NodeGone;

impl NodeHandle {
    pub fn new(cores: usize) -> io::Result<Self> {
        let mailboxes = (0..cores)
            .map(|_| Mailbox::new())
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            mailboxes: mailboxes.into(),
        })
    }

    pub fn cores(&self) -> usize {
        self.mailboxes.len()
    }

    pub fn mailbox(&self, core: usize) -> &Mailbox {
        &self.mailboxes[core]
    }

    /// Runs `f` on a core, from a thread that is not a reactor: waits while that core's ring is full.
    pub fn call(
        &self,
        core: usize,
        f: impl FnOnce(&mut Core) + Send + 'static,
    ) -> Result<(), NodeGone> {
        let mailbox = &self.mailboxes[core];
        let mut message = Message::Call(Box::new(f));
        loop {
            if mailbox.is_closed() {
                return Err(NodeGone);
            }
            match mailbox.push(message) {
                Ok(Wake::NotNeeded) => return Ok(()),
                Ok(Wake::Needed { .. }) => {
                    mailbox.ring_bell();
                    return Ok(());
                }
                Err(back) => message = back,
            }
            std::thread::yield_now();
        }
    }

    /// Runs `f` on a core and waits for what it returns.
    pub fn run<R: Send + 'static>(
        &self,
        core: usize,
        f: impl FnOnce(&mut Core) -> R + Send + 'static,
    ) -> Result<R, NodeGone> {
        self.ask(core, move |core, answer| answer.send(f(core)))
    }

    /// Runs `f` on a core and waits until its answer is sent, then or later.
    pub fn ask<R: Send + 'static>(
        &self,
        core: usize,
        f: impl FnOnce(&mut Core, Answer<R>) + Send + 'static,
    ) -> Result<R, NodeGone> {
        let (sender, receiver) = sync_channel(1);
        self.call(core, move |core| f(core, Answer(sender)))?;
        loop {
            match receiver.recv_timeout(ASK_CHECK) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(NodeGone),
                // A message may have slipped into a mailbox that nobody reads any more.
                Err(RecvTimeoutError::Timeout) if self.mailboxes[core].is_closed() => {
                    return receiver.try_recv().map_err(|_| NodeGone);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Where the answer to [`NodeHandle::ask`] goes.
pub struct Answer<R>(SyncSender<R>);

impl<R> Answer<R> {
    pub fn send(self, value: R) {
        // The asker may have gone; nobody to tell then.
        let _ = self.0.send(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_to_a_core_that_blocks_asks_for_one_wake() {
        let mailbox = Mailbox::new().unwrap();
        assert!(mailbox.prepare_to_block());
        let push = || mailbox.push(Message::Call(Box::new(|_| {}))).ok();
        assert_eq!(push(), Some(Wake::Needed { ring_fd: -1 }));
        assert_eq!(push(), Some(Wake::NotNeeded));
        assert!(!mailbox.prepare_to_block());
    }

    #[test]
    fn a_full_mailbox_gives_the_message_back() {
        let mailbox = Mailbox::new().unwrap();
        for _ in 0..MAILBOX_CAPACITY {
            assert!(mailbox.push(Message::Call(Box::new(|_| {}))).is_ok());
        }
        assert!(mailbox.push(Message::Call(Box::new(|_| {}))).is_err());
    }
}
