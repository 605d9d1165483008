//! This core's queue pairs of the initiator: connecting with a timeout, readiness in, commands out, their
//! answers to whoever submitted them. Used by the links to peers and by NVMe bdevs; the protocol of a
//! queue is `nvme_tcp::initiator`'s.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;

use super::bdev::{Done, IoError, IoResult, Owner};
use super::core::Core;
use super::nvme_tcp::buffer::DataPointer;
use super::nvme_tcp::command::{NvmeStatus, Sqe};
use super::nvme_tcp::initiator::{
    Completion, InitiatorError, InitiatorQueue, QueueParameters, SubmitError,
};
use super::ring::{Ring, Tag, TagKind};
use super::socket::{Readiness, TcpSocket, unwatch, watch_stream};
use super::timer::TimerId;
use crate::hosts::slab::{Key, Slab};

/// Names a queue pair of this core. Stays unique after the queue is gone.
pub type QueueKey = Key;

/// A queue pair to open.
#[derive(Clone, Debug)]
pub struct OpenParameters {
    pub address: SocketAddr,
    pub queue: QueueParameters,
    /// From the first packet to the answer of Connect.
    pub connect_timeout_ms: u64,
}

/// Who hears of a queue pair's fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueOwner {
    /// A volume's link; `link` is the volume's own name for it.
    Volume { volume: u32, link: u64 },
    /// A controller that NVMe bdevs stand on.
    Remote(u32),
}

/// What became of a queue pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueChange {
    /// Commands can be submitted.
    Up { controller_id: u16 },
    /// It never came up, or is lost: every command has been answered before this, no memory of theirs is
    /// touched any more, and the key is void.
    Down { error: InitiatorError },
}

/// Told with `Up` once at most, and then with `Down` once, also when the owner closed the queue itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueEvent {
    pub queue: QueueKey,
    pub owner: QueueOwner,
    pub change: QueueChange,
}

struct QueuePair {
    queue: InitiatorQueue<TcpSocket>,
    owner: QueueOwner,
    readiness: Rc<Readiness>,
    /// In the list of those to look at.
    queued: bool,
    /// Until it is up.
    timeout: Option<TimerId>,
}

#[derive(Default)]
pub struct CoreInitiators {
    queues: Slab<QueuePair>,
    /// Who gets the answer to each command.
    commands: Slab<Owner>,
    ready: Vec<Key>,
    completions: Vec<Completion>,
    events: VecDeque<QueueEvent>,
}

fn token_of(key: Key) -> u64 {
    u64::from(key.generation) << 32 | u64::from(key.index)
}

fn key_of(token: u64) -> Key {
    Key {
        index: token as u32,
        generation: (token >> 32) as u32,
    }
}

fn result_of(status: NvmeStatus) -> IoResult {
    if status.is_success() {
        Ok(())
    } else {
        Err(IoError::Nvme(status))
    }
}

impl CoreInitiators {
    /// Queue pairs that are connecting or up.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Commands without an answer, on all queues.
    pub fn outstanding(&self) -> usize {
        self.commands.len()
    }

    /// Commands that the queue would take now.
    pub fn available(&self, queue: QueueKey) -> usize {
        self.queues
            .get(queue)
            .map_or(0, |pair| pair.queue.available())
    }

    pub fn take_event(&mut self) -> Option<QueueEvent> {
        self.events.pop_front()
    }

    /// Submits a command whose answer goes to `owner`; see [`InitiatorQueue::submit`]. An error means that
    /// nothing was done.
    pub fn submit(
        &mut self,
        key: QueueKey,
        sqe: Sqe,
        data: DataPointer,
        owner: Owner,
    ) -> Result<(), SubmitError> {
        let pair = self.queues.get_mut(key).ok_or(SubmitError::NotReady)?;
        let command = self.commands.insert(owner);
        let result = pair.queue.submit(sqe, data, token_of(command));
        if result.is_err() {
            self.commands.remove(command);
        } else if !pair.queued {
            pair.queued = true;
            self.ready.push(key);
        }
        result
    }

    /// Receives and sends what is ready, and collects what has ended.
    fn service(&mut self, ring: &mut Ring, timers: &mut Vec<TimerId>) -> bool {
        let mut ready = std::mem::take(&mut self.ready);
        let worked = !ready.is_empty();
        for key in ready.drain(..) {
            let Some(pair) = self.queues.get_mut(key) else {
                continue;
            };
            pair.queued = false;
            let was_ready = pair.queue.is_ready();
            if pair.readiness.is_readable() {
                pair.queue.on_readable(&mut self.completions);
            }
            if pair.readiness.is_writable() && pair.queue.wants_write() {
                pair.queue.on_writable(&mut self.completions);
            }
            if let Some(error) = pair.queue.error().cloned() {
                self.remove(key, error, ring, timers);
            } else if pair.queue.is_ready() && !was_ready {
                timers.extend(pair.timeout.take());
                let controller_id = pair.queue.controller_id();
                let owner = pair.owner;
                self.events.push_back(QueueEvent {
                    queue: key,
                    owner,
                    change: QueueChange::Up { controller_id },
                });
            }
        }
        self.ready = ready;
        worked
    }

    /// Ends a queue pair: its commands are answered, then its owner hears of it.
    fn remove(
        &mut self,
        key: Key,
        error: InitiatorError,
        ring: &mut Ring,
        timers: &mut Vec<TimerId>,
    ) {
        let Some(mut pair) = self.queues.remove(key) else {
            return;
        };
        pair.queue.fail(error.clone(), &mut self.completions);
        unwatch(ring, tag(key));
        timers.extend(pair.timeout);
        self.events.push_back(QueueEvent {
            queue: key,
            owner: pair.owner,
            change: QueueChange::Down { error },
        });
    }
}

fn tag(key: Key) -> Tag {
    Tag::new(TagKind::InitiatorSocket, key.index, key.generation)
}

/// Opens a queue pair. Its owner hears `Up` or `Down`, later, through the loop. Errors: not even a socket;
/// nobody hears anything then.
pub fn open(
    core: &mut Core,
    parameters: OpenParameters,
    owner: QueueOwner,
) -> Result<QueueKey, InitiatorError> {
    let OpenParameters {
        address,
        queue,
        connect_timeout_ms,
    } = parameters;
    let failed = |error: std::io::Error| InitiatorError::Closed(error.to_string());
    let socket = TcpSocket::connect(address).map_err(failed)?;
    let (fd, readiness) = (socket.fd(), socket.readiness());
    let queue = InitiatorQueue::new(socket, queue).map_err(failed)?;
    let key = core.initiators.queues.insert(QueuePair {
        queue,
        owner,
        readiness,
        queued: false,
        timeout: None,
    });
    watch_stream(&mut core.reactor.ring, fd, tag(key));
    let timeout = core.after(connect_timeout_ms, move |core| {
        let error = InitiatorError::Timeout {
            doing: "connecting",
            timeout_ms: connect_timeout_ms,
        };
        end(core, key, error);
    });
    if let Some(pair) = core.initiators.queues.get_mut(key) {
        pair.timeout = Some(timeout);
    }
    Ok(key)
}

/// Closes a queue pair: its commands are answered with an error at once (through the loop), and no memory
/// of theirs is touched after this returns. The owner hears `Down` after the last answer.
pub fn close(core: &mut Core, key: QueueKey) {
    end(core, key, InitiatorError::Closed("closed here".into()));
}

fn end(core: &mut Core, key: QueueKey, error: InitiatorError) {
    let mut timers = Vec::new();
    let ring = &mut core.reactor.ring;
    core.initiators.remove(key, error, ring, &mut timers);
    settle(core, timers);
}

/// For the node's end: all of this core's queue pairs.
pub fn close_all(core: &mut Core) {
    let keys: Vec<Key> = core.initiators.queues.iter().map(|(key, _)| key).collect();
    for key in keys {
        close(core, key);
    }
}

/// The ring's poll reports on a queue pair.
pub fn event(core: &mut Core, event: Tag, result: i32, more: bool) {
    let key = Key {
        index: event.slot,
        generation: event.generation,
    };
    let Some(pair) = core.initiators.queues.get_mut(key) else {
        return;
    };
    pair.readiness.update(result);
    if !pair.queued {
        pair.queued = true;
        core.initiators.ready.push(key);
    }
    if !more {
        if let Some(socket) = pair.queue.socket() {
            watch_stream(&mut core.reactor.ring, socket.fd(), event);
        }
    }
}

/// Once a round of the loop, or twice. Returns whether there was work.
pub fn poll(core: &mut Core) -> bool {
    let mut timers = Vec::new();
    let ring = &mut core.reactor.ring;
    let worked = core.initiators.service(ring, &mut timers);
    if worked {
        settle(core, timers);
    }
    worked
}

/// Hands answers to the core, which delivers them.
fn settle(core: &mut Core, timers: Vec<TimerId>) {
    for timer in timers {
        core.cancel_timer(timer);
    }
    let mut completions = std::mem::take(&mut core.initiators.completions);
    for completion in completions.drain(..) {
        let status = result_of(completion.status);
        let dword0 = completion.dword0();
        if let Some(owner) = core.initiators.commands.remove(key_of(completion.token)) {
            core.answer(Done {
                owner,
                status,
                dword0,
            });
        }
    }
    core.initiators.completions = completions;
}
