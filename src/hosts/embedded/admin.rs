//! This core's admin queues of the initiator: a controller of another node is brought up, kept alive and
//! watched. Used by NVMe bdevs and by links to peers, which open their I/O queues with what is learned
//! here; the sequence of commands is `nvme_tcp::controller`'s.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;

use super::core::Core;
use super::initiator::QueueOwner;
use super::nvme_tcp::controller::{ControllerEvent, ControllerParameters, InitiatorController};
use super::nvme_tcp::initiator::InitiatorError;
use super::ring::{Ring, Tag, TagKind};
use super::socket::{Readiness, TcpSocket, unwatch, watch_stream};
use crate::hosts::slab::{Key, Slab};

/// Names a controller on the core that opened it. Stays unique after the controller is gone.
pub type ControllerKey = Key;

/// What became of a controller. `Failed` is the last word: the key is void then. One that its owner closed
/// says nothing more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminEvent {
    pub controller: ControllerKey,
    pub owner: QueueOwner,
    pub change: ControllerEvent,
}

struct Admin {
    controller: InitiatorController<TcpSocket>,
    owner: QueueOwner,
    readiness: Rc<Readiness>,
    queued: bool,
}

#[derive(Default)]
pub struct CoreAdmins {
    admins: Slab<Admin>,
    ready: Vec<Key>,
    changes: Vec<ControllerEvent>,
    events: VecDeque<AdminEvent>,
    next_check_ns: u64,
}

/// How often controllers look at their timeouts.
const CHECK_NS: u64 = 50_000_000;

fn tag(key: Key) -> Tag {
    Tag::new(TagKind::AdminSocket, key.index, key.generation)
}

impl CoreAdmins {
    /// What has been learned of a controller, and the parameters of its I/O queues.
    pub fn controller(&self, key: ControllerKey) -> Option<&InitiatorController<TcpSocket>> {
        self.admins.get(key).map(|admin| &admin.controller)
    }

    pub fn take_event(&mut self) -> Option<AdminEvent> {
        self.events.pop_front()
    }

    pub fn next_deadline_ns(&self) -> Option<u64> {
        (!self.admins.is_empty()).then_some(self.next_check_ns)
    }

    fn service(&mut self, ring: &mut Ring, now_ns: u64) -> bool {
        let mut worked = !self.ready.is_empty();
        let mut ready = std::mem::take(&mut self.ready);
        for key in ready.drain(..) {
            let Some(admin) = self.admins.get_mut(key) else {
                continue;
            };
            admin.queued = false;
            if admin.readiness.is_readable() {
                admin.controller.on_readable(&mut self.changes);
            }
            if admin.readiness.is_writable() && admin.controller.wants_write() {
                admin.controller.on_writable(&mut self.changes);
            }
            self.report(ring, key);
        }
        self.ready = ready;
        if now_ns >= self.next_check_ns {
            self.next_check_ns = now_ns + CHECK_NS;
            let keys: Vec<Key> = self.admins.iter().map(|(key, _)| key).collect();
            for key in keys {
                if let Some(admin) = self.admins.get_mut(key) {
                    let now_ms = now_ns / 1_000_000;
                    admin.controller.on_time(now_ms, &mut self.changes);
                    self.report(ring, key);
                }
            }
            worked |= !self.events.is_empty();
        }
        worked
    }

    /// Passes on what a controller has just reported.
    fn report(&mut self, ring: &mut Ring, key: Key) {
        let Some(owner) = self.admins.get(key).map(|admin| admin.owner) else {
            return;
        };
        for change in self.changes.drain(..) {
            if matches!(change, ControllerEvent::Failed(_)) && self.admins.remove(key).is_some() {
                unwatch(ring, tag(key));
            }
            self.events.push_back(AdminEvent {
                controller: key,
                owner,
                change,
            });
        }
    }
}

/// Connects to a controller and learns what it offers. Its owner hears `Ready` or `Failed`, later, through
/// the loop. Errors: not even a socket; nobody hears anything then.
pub fn open(
    core: &mut Core,
    address: SocketAddr,
    parameters: ControllerParameters,
    owner: QueueOwner,
) -> Result<ControllerKey, InitiatorError> {
    let failed = |error: std::io::Error| InitiatorError::Closed(error.to_string());
    let socket = TcpSocket::connect(address).map_err(failed)?;
    let (fd, readiness) = (socket.fd(), socket.readiness());
    let controller = InitiatorController::new(socket, parameters).map_err(failed)?;
    let key = core.admins.admins.insert(Admin {
        controller,
        owner,
        readiness,
        queued: false,
    });
    watch_stream(&mut core.reactor.ring, fd, tag(key));
    // Its time starts with the next look at it.
    core.admins.next_check_ns = 0;
    Ok(key)
}

/// Gives a controller up. Its I/O queues are their owner's to close.
pub fn close(core: &mut Core, key: ControllerKey) {
    if let Some(mut admin) = core.admins.admins.remove(key) {
        admin.controller.close();
        unwatch(&mut core.reactor.ring, tag(key));
    }
}

/// For the node's end.
pub fn close_all(core: &mut Core) {
    let keys: Vec<Key> = core.admins.admins.iter().map(|(key, _)| key).collect();
    for key in keys {
        close(core, key);
    }
}

/// The ring's poll reports on a controller's socket.
pub fn event(core: &mut Core, event: Tag, result: i32, more: bool) {
    let key = Key {
        index: event.slot,
        generation: event.generation,
    };
    let Some(admin) = core.admins.admins.get_mut(key) else {
        return;
    };
    admin.readiness.update(result);
    if !admin.queued {
        admin.queued = true;
        core.admins.ready.push(key);
    }
    if !more {
        if let Some(socket) = admin.controller.socket() {
            watch_stream(&mut core.reactor.ring, socket.fd(), event);
        }
    }
}

/// Once a round of the loop. Returns whether there was work.
pub fn poll(core: &mut Core) -> bool {
    let now_ns = core.reactor.now_ns();
    core.admins.service(&mut core.reactor.ring, now_ns)
}
