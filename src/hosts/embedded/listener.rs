//! The listening sockets of a node. Core 0 accepts and hands the connections to the cores in turn.
//! Called by the target's control path; knows nothing of what is spoken on a connection.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use super::core::Core;
use super::message::Message;
use super::registry::BdevError;
use super::ring::{Tag, TagKind};
use super::socket::{unwatch, watch_listener};
use super::target;
use crate::hosts::slab::{Key, Slab};

struct Listener {
    /// What was asked for: with port 0 not what the socket has.
    asked: SocketAddr,
    local: SocketAddr,
    socket: TcpListener,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // The ring's poll may hold the socket a moment longer than we do; nobody is to be let in by then.
        // SAFETY: a plain system call on a descriptor that we own; an error leaves what close does.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

/// Filled on core 0 only.
#[derive(Default)]
pub struct Listeners {
    open: Slab<Listener>,
    /// Whose turn it is to get a connection.
    next_core: usize,
}

/// How long to wait for a port that somebody holds (a process that was killed does for some 11 ms), and
/// how often to look.
const BIND_WAIT_MS: u64 = 5_000;
const BIND_RETRY_MS: u64 = 10;

/// When to look again after the node ran out of descriptors.
const ACCEPT_RETRY_MS: u64 = 50;

impl Listeners {
    fn find(&self, address: SocketAddr) -> Option<(Key, SocketAddr)> {
        self.open
            .iter()
            .find(|(_, listener)| listener.asked == address || listener.local == address)
            .map(|(key, listener)| (key, listener.local))
    }
}

fn tag(key: Key) -> Tag {
    Tag::new(TagKind::Listener, key.index, key.generation)
}

/// Listens at an address, if that is not done already; a port in use is waited for. To be called on core
/// 0; `then` gets the socket's address (port 0 asks for any).
pub fn listen(
    core: &mut Core,
    address: SocketAddr,
    then: impl FnOnce(&mut Core, Result<SocketAddr, BdevError>) + 'static,
) {
    let give_up_ns = core.reactor.now_ns() + BIND_WAIT_MS * 1_000_000;
    try_listen(core, address, give_up_ns, then);
}

fn try_listen(
    core: &mut Core,
    address: SocketAddr,
    give_up_ns: u64,
    then: impl FnOnce(&mut Core, Result<SocketAddr, BdevError>) + 'static,
) {
    if let Some((_, local)) = core.listeners.find(address) {
        return then(core, Ok(local));
    }
    match bind(address) {
        Ok((socket, local)) => {
            let fd = socket.as_raw_fd();
            let key = core.listeners.open.insert(Listener {
                asked: address,
                local,
                socket,
            });
            watch_listener(&mut core.reactor.ring, fd, tag(key));
            then(core, Ok(local));
        }
        Err(error)
            if error.kind() == io::ErrorKind::AddrInUse && core.reactor.now_ns() < give_up_ns =>
        {
            core.after(BIND_RETRY_MS, move |core| {
                try_listen(core, address, give_up_ns, then);
            });
        }
        Err(error) => {
            let message = format!("cannot listen at {address}: {error}");
            then(core, Err(BdevError::from_io(&error, message)));
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    // The standard library sets SO_REUSEADDR, so that connections that linger do not matter.
    let socket = TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    let local = socket.local_addr()?;
    Ok((socket, local))
}

/// Accepts no more at an address. Connections stay.
pub fn close(core: &mut Core, address: SocketAddr) {
    if let Some((key, _)) = core.listeners.find(address) {
        core.listeners.open.remove(key);
        unwatch(&mut core.reactor.ring, tag(key));
    }
}

/// For the node's end.
pub fn close_all(core: &mut Core) {
    let keys: Vec<Key> = core.listeners.open.iter().map(|(key, _)| key).collect();
    for key in keys {
        core.listeners.open.remove(key);
        unwatch(&mut core.reactor.ring, tag(key));
    }
}

/// The ring says that connections may be waiting.
pub fn ready(core: &mut Core, event: Tag, more: bool) {
    let key = Key {
        index: event.slot,
        generation: event.generation,
    };
    loop {
        let Some(listener) = core.listeners.open.get(key) else {
            return;
        };
        let local = listener.local;
        match listener.socket.accept() {
            Ok((stream, _)) => hand_over(core, stream, local),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if is_passing(&error) => {}
            Err(error) => {
                // Out of descriptors or memory: there may be no further event for those that wait.
                tracing::warn!("accepting at {local}: {error}");
                core.after(ACCEPT_RETRY_MS, move |core| ready(core, event, true));
                break;
            }
        }
    }
    if !more {
        if let Some(listener) = core.listeners.open.get(key) {
            let fd = listener.socket.as_raw_fd();
            watch_listener(&mut core.reactor.ring, fd, tag(key));
        }
    }
}

/// Errors of one connection that are not the listener's (accept(2)).
fn is_passing(error: &io::Error) -> bool {
    let out_of = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error
        .raw_os_error()
        .is_some_and(|errno| !out_of.contains(&errno) && errno != libc::EINVAL)
}

fn hand_over(core: &mut Core, stream: TcpStream, local: SocketAddr) {
    let chosen = core.listeners.next_core % core.cores;
    core.listeners.next_core = chosen + 1;
    let take = move |core: &mut Core| target::accept(core, stream, local);
    core.send(chosen, Message::Call(Box::new(take)));
}
