//! This core's connections of the NVMe/TCP target: readiness in, I/O of namespaces out to the bdevs,
//! their answers back; and the control path's listeners and namespaces. The protocol is
//! `nvme_tcp::target`'s; what a bdev does is the core's.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::{MutexGuard, PoisonError};

use super::bdev::{BdevId, BdevIo, BdevOp, Done, IoError, IoResult, Owner};
use super::core::{Acknowledgement, Core};
use super::listener;
use super::nvme_tcp::buffer::DataPointer;
use super::nvme_tcp::command::NvmeStatus;
pub use super::nvme_tcp::target::RequestHandle;
use super::nvme_tcp::target::{
    Backend, IoKind, ListenerAddress, NamespaceHandle, NvmfIo, SharedTarget, TargetCore,
    TargetError, TargetState,
};
use super::registry::BdevError;
use super::ring::{Tag, TagKind};
use super::socket::{Readiness, TcpSocket, unwatch, watch_stream};
use crate::hosts::slab::{Key, Slab};

/// How often connections look for what no event announces: Keep Alive, changes of their subsystem.
const CHECK_NS: u64 = 250_000_000;

/// The target on one core.
pub struct CoreTarget {
    shared: SharedTarget,
    /// Made with the first connection: its buffers are as the transport's options say by then.
    connections: Option<TargetCore<TcpSocket>>,
    /// By index of the connection.
    watches: Vec<Option<Watch>>,
    next_watch: u32,
    /// Connections with something to receive, or room to send what waits.
    ready: Vec<u32>,
    /// Connections without a socket whose I/O has not come back.
    closing: Vec<u32>,
    submissions: VecDeque<Submission>,
    combined: Slab<Combined>,
    next_check_ns: u64,
    /// The node is going down: who waits for the last connection.
    stopping: Option<Acknowledgement>,
    refusing: bool,
}

struct Watch {
    tag: Tag,
    readiness: Rc<Readiness>,
    queued: bool,
}

/// An I/O as the target handed it out.
type Submission = (NamespaceHandle, NvmfIo, RequestHandle);

/// A request that takes several I/Os of its bdev, one after the other.
struct Combined {
    request: RequestHandle,
    bdev: BdevId,
    io: NvmfIo,
    next_range: u16,
}

/// The target's I/O waits here until no connection is borrowed.
struct Collector<'a>(&'a mut VecDeque<Submission>);

impl Backend for Collector<'_> {
    fn submit(&mut self, namespace: NamespaceHandle, io: NvmfIo, request: RequestHandle) {
        self.0.push_back((namespace, io, request));
    }
}

/// Who holds a bdev that a namespace was made of.
pub const CLAIMANT: &str = "NVMe-oF target";

/// How the target knows a bdev.
pub fn namespace_handle(id: BdevId) -> NamespaceHandle {
    NamespaceHandle(u64::from(id.generation) << 32 | u64::from(id.index))
}

/// The bdev that a namespace was made of.
pub fn bdev_of(handle: NamespaceHandle) -> BdevId {
    BdevId {
        index: handle.0 as u32,
        generation: (handle.0 >> 32) as u32,
    }
}

impl CoreTarget {
    pub fn new(shared: SharedTarget) -> Self {
        Self {
            shared,
            connections: None,
            watches: Vec::new(),
            next_watch: 0,
            ready: Vec::new(),
            closing: Vec::new(),
            submissions: VecDeque::new(),
            combined: Slab::default(),
            next_check_ns: 0,
            stopping: None,
            refusing: false,
        }
    }

    /// Subsystems, namespaces, hosts and listeners, for the control path; call [`changed`] after a change.
    pub fn state(&self) -> MutexGuard<'_, TargetState> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections on this core, those on their way out too.
    pub fn connections(&self) -> usize {
        self.connections
            .as_ref()
            .map_or(0, |connections| connections.connections().count())
    }

    fn has_connections(&self) -> bool {
        !self.closing.is_empty() || self.watches.iter().any(Option::is_some)
    }

    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.has_connections().then_some(self.next_check_ns)
    }

    /// An answer of a bdev to a request of a connection.
    pub fn complete(&mut self, request: RequestHandle, status: IoResult, dword0: u32) {
        if let Some(connections) = &mut self.connections {
            connections.complete(request, nvme_status(status), dword0);
        }
    }
}

/// What a host is told of a bdev's error.
pub fn nvme_status(status: IoResult) -> NvmeStatus {
    match status {
        Ok(()) => NvmeStatus::SUCCESS,
        Err(IoError::Nvme(status)) => status,
        Err(IoError::Errno(errno)) => match errno {
            libc::EOPNOTSUPP => NvmeStatus::INVALID_OPCODE,
            libc::EINVAL => NvmeStatus::INVALID_FIELD,
            libc::EROFS | libc::EPERM | libc::EACCES => NvmeStatus::ACCESS_DENIED,
            libc::ENODEV => NvmeStatus::NAMESPACE_NOT_READY,
            // As SPDK's target answers a bdev's failure.
            _ => NvmeStatus::INTERNAL_ERROR,
        },
    }
}

/// Takes a connection that a listener has accepted.
pub fn accept(core: &mut Core, stream: TcpStream, at: SocketAddr) {
    if core.target.refusing {
        return;
    }
    if let Err(error) = try_accept(core, stream, at) {
        tracing::warn!("a connection at {at} is dropped: {error}");
    }
}

fn try_accept(core: &mut Core, stream: TcpStream, at: SocketAddr) -> std::io::Result<()> {
    let ring = &mut core.reactor.ring;
    let target = &mut core.target;
    if target.connections.is_none() {
        let connections = TargetCore::new(target.shared.clone())?;
        let (memory, length_bytes) = connections.buffer_memory();
        // SAFETY: the buffers belong to the core, which drops them after its ring.
        unsafe { ring.register_memory(memory, length_bytes) };
        target.connections = Some(connections);
    }
    let Some(connections) = &mut target.connections else {
        return Ok(());
    };
    let socket = TcpSocket::new(stream)?;
    let (fd, readiness) = (socket.fd(), socket.readiness());
    let listener = ListenerAddress::tcp(&at.ip().to_string(), &at.port().to_string());
    let index = connections.accept(socket, listener)?;
    target.next_watch = target.next_watch.wrapping_add(1);
    let tag = Tag::new(TagKind::TargetSocket, index, target.next_watch);
    watch_stream(ring, fd, tag);
    let place = index as usize;
    if target.watches.len() <= place {
        target.watches.resize_with(place + 1, || None);
    }
    target.watches[place] = Some(Watch {
        tag,
        readiness,
        queued: false,
    });
    Ok(())
}

/// The ring's poll reports on a connection.
pub fn event(core: &mut Core, tag: Tag, result: i32, more: bool) {
    let target = &mut core.target;
    let Some(Some(watch)) = target.watches.get_mut(tag.slot as usize) else {
        return;
    };
    if watch.tag != tag {
        return;
    }
    watch.readiness.update(result);
    if !watch.queued {
        watch.queued = true;
        target.ready.push(tag.slot);
    }
    if !more {
        let socket = target
            .connections
            .as_ref()
            .and_then(|connections| connections.connection(tag.slot)?.socket());
        if let Some(socket) = socket {
            watch_stream(&mut core.reactor.ring, socket.fd(), tag);
        }
    }
}

/// Once a round of the loop: receives, sends, submits. Returns whether there was work.
pub fn poll(core: &mut Core) -> bool {
    let now_ns = core.reactor.now_ns();
    let target = &mut core.target;
    let Some(connections) = &mut target.connections else {
        return acknowledge_stopped(core);
    };
    let mut worked = !target.ready.is_empty();
    let ready = std::mem::take(&mut target.ready);
    for &index in &ready {
        let Some(Some(watch)) = target.watches.get_mut(index as usize) else {
            continue;
        };
        watch.queued = false;
        if watch.readiness.is_readable() {
            connections.on_readable(index, &mut Collector(&mut target.submissions));
        }
        if watch.readiness.is_writable() && connections.wants_write(index) {
            connections.on_writable(index);
        }
        settle(
            &mut target.watches,
            connections,
            &mut core.reactor.ring,
            index,
            &mut target.closing,
        );
    }
    // Gives the memory back; events during the round came before it.
    let mut ready = ready;
    ready.clear();
    ready.append(&mut target.ready);
    target.ready = ready;
    worked |= connections.wants_poll();
    connections.poll(&mut Collector(&mut target.submissions));
    if now_ns >= target.next_check_ns {
        target.next_check_ns = now_ns + CHECK_NS;
        check(core);
    }
    let target = &mut core.target;
    if let Some(connections) = &mut target.connections {
        target.closing.retain(|index| !connections.remove(*index));
    }
    worked |= !core.target.submissions.is_empty();
    while let Some((namespace, io, request)) = core.target.submissions.pop_front() {
        start(core, bdev_of(namespace), io, request);
    }
    worked | acknowledge_stopped(core)
}

/// A connection may have lost its socket: the poll ends, and the rest when its I/O has come back.
fn settle(
    watches: &mut [Option<Watch>],
    connections: &TargetCore<TcpSocket>,
    ring: &mut super::ring::Ring,
    index: u32,
    closing: &mut Vec<u32>,
) {
    let lost = connections
        .connection(index)
        .is_none_or(|connection| connection.socket().is_none());
    if !lost {
        return;
    }
    if let Some(watch) = watches.get_mut(index as usize).and_then(Option::take) {
        unwatch(ring, watch.tag);
        closing.push(index);
    }
}

/// Looks at every connection, whatever the events say.
fn check(core: &mut Core) {
    let now_ms = core.reactor.now_ns() / 1_000_000;
    let target = &mut core.target;
    let Some(connections) = &mut target.connections else {
        return;
    };
    connections.poll_timeouts(now_ms);
    for index in 0..target.watches.len() {
        settle(
            &mut target.watches,
            connections,
            &mut core.reactor.ring,
            index as u32,
            &mut target.closing,
        );
    }
}

fn start(core: &mut Core, bdev: BdevId, io: NvmfIo, request: RequestHandle) {
    let op = match io.kind {
        IoKind::Read => BdevOp::Read,
        IoKind::Write { fua } => BdevOp::Write { fua },
        IoKind::Flush => BdevOp::Flush,
        IoKind::WriteZeroes { fua: false, .. } => BdevOp::WriteZeroes,
        IoKind::Vendor {
            opcode,
            cdw2,
            cdw3,
            cdw10_15,
        } => BdevOp::Vendor {
            opcode,
            cdw2,
            cdw3,
            cdw10_15,
        },
        IoKind::WriteZeroes { fua: true, .. } | IoKind::Unmap { .. } => {
            let key = core.target.combined.insert(Combined {
                request,
                bdev,
                io,
                next_range: 0,
            });
            return go_on(core, key, Ok(()));
        }
    };
    let io = BdevIo {
        op,
        lba: io.lba,
        blocks: u64::from(io.blocks),
        data: io.data,
    };
    core.submit(bdev, io, Owner::Nvmf(request));
}

/// Another I/O of a combined request has been answered (or none yet): the next one, or the answer.
pub fn go_on(core: &mut Core, key: Key, status: IoResult) {
    let Some(combined) = core.target.combined.get_mut(key) else {
        return;
    };
    let next = match status {
        Ok(()) => next_of(combined),
        Err(_) => None,
    };
    let (bdev, request) = (combined.bdev, combined.request);
    if let Some(io) = next {
        core.submit(bdev, io, Owner::Combined(key));
        return;
    }
    core.target.combined.remove(key);
    core.answer(Done {
        owner: Owner::Nvmf(request),
        status,
        dword0: 0,
    });
}

fn next_of(combined: &mut Combined) -> Option<BdevIo> {
    let plain = |op, lba, blocks| BdevIo {
        op,
        lba,
        blocks,
        data: DataPointer::NONE,
    };
    let step = combined.next_range;
    match combined.io.kind {
        IoKind::Unmap { ranges } => {
            for index in step..ranges {
                // SAFETY: the request is in flight: its answer is what this leads to.
                let range = unsafe { combined.io.unmap_range(index) }?;
                combined.next_range = index + 1;
                if range.blocks > 0 {
                    return Some(plain(BdevOp::Unmap, range.lba, u64::from(range.blocks)));
                }
            }
            None
        }
        IoKind::WriteZeroes { .. } => {
            combined.next_range = step.saturating_add(1);
            let blocks = u64::from(combined.io.blocks);
            match step {
                0 => Some(plain(BdevOp::WriteZeroes, combined.io.lba, blocks)),
                1 => Some(plain(BdevOp::Flush, 0, 0)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// After a change of the target's state: all cores look at it now rather than soon.
pub fn changed(core: &mut Core) {
    core.on_all_cores(check, |_| {});
}

fn target_error(error: &TargetError) -> BdevError {
    let errno = match error {
        TargetError::Exists { .. } => libc::EEXIST,
        TargetError::NotFound { .. } => libc::ENODEV,
        TargetError::Invalid { .. } => libc::EINVAL,
    };
    BdevError::from_errno(errno, error.to_string())
}

/// The address of a listener in numbers.
fn parse_address(address: &ListenerAddress) -> Result<SocketAddr, BdevError> {
    let ListenerAddress {
        traddr, trsvcid, ..
    } = address;
    let invalid =
        |what: &str, text: &str| BdevError::invalid(format!("{what} {text} is not valid"));
    let ip: IpAddr = traddr.parse().map_err(|_| invalid("traddr", traddr))?;
    let port: u16 = trsvcid.parse().map_err(|_| invalid("trsvcid", trsvcid))?;
    Ok(SocketAddr::new(ip, port))
}

/// Lets a subsystem be reached at an address. On core 0; `then` gets the address, with the port that the
/// kernel chose if 0 was asked for. Errors: EINVAL, ENODEV (subsystem), EEXIST, what bind answers.
pub fn add_listener(
    core: &mut Core,
    nqn: &str,
    address: &ListenerAddress,
    then: impl FnOnce(&mut Core, Result<SocketAddr, BdevError>) + 'static,
) {
    let socket_address = match parse_address(address) {
        Ok(socket_address) => socket_address,
        Err(error) => return then(core, Err(error)),
    };
    let nqn = nqn.to_owned();
    listener::listen(core, socket_address, move |core, result| {
        let result = result.and_then(|local| {
            let numeric = ListenerAddress::tcp(&local.ip().to_string(), &local.port().to_string());
            let added = core.target.state().add_listener(&nqn, numeric.clone());
            if added.is_err() {
                close_if_unused(core, local, &numeric);
            }
            added.map(|()| local).map_err(|error| target_error(&error))
        });
        then(core, result);
    });
}

/// A subsystem is no longer reached at an address: its connections from there close. On core 0.
pub fn remove_listener(
    core: &mut Core,
    nqn: &str,
    address: &ListenerAddress,
) -> Result<(), BdevError> {
    let socket_address = parse_address(address)?;
    let numeric = ListenerAddress::tcp(
        &socket_address.ip().to_string(),
        &socket_address.port().to_string(),
    );
    core.target
        .state()
        .remove_listener(nqn, &numeric)
        .map_err(|error| target_error(&error))?;
    close_if_unused(core, socket_address, &numeric);
    changed(core);
    Ok(())
}

fn close_if_unused(core: &mut Core, address: SocketAddr, numeric: &ListenerAddress) {
    if !core.target.state().is_listening(numeric) {
        listener::close(core, address);
    }
}

/// Deletes a subsystem: its connections close, and the listeners that nobody else uses. On core 0.
pub fn delete_subsystem(core: &mut Core, nqn: &str) -> Result<(), BdevError> {
    let subsystems = core.target.state().subsystems();
    let listeners = subsystems
        .into_iter()
        .find(|subsystem| subsystem.parameters.nqn == nqn)
        .map(|subsystem| subsystem.listeners)
        .unwrap_or_default();
    core.target
        .state()
        .delete_subsystem(nqn)
        .map_err(|error| target_error(&error))?;
    for numeric in listeners {
        if let Ok(address) = parse_address(&numeric) {
            close_if_unused(core, address, &numeric);
        }
    }
    changed(core);
    Ok(())
}

/// Takes a bdev out of the subsystems that export it. On core 0.
pub fn remove_bdev(core: &mut Core, id: BdevId) {
    let handle = namespace_handle(id);
    let subsystems = core.target.state().subsystems();
    let mut removed = false;
    for subsystem in &subsystems {
        for namespace in &subsystem.namespaces {
            if namespace.handle == handle {
                let nqn = &subsystem.parameters.nqn;
                let result = core.target.state().remove_namespace(nqn, namespace.nsid);
                removed |= result.is_ok();
            }
        }
    }
    if removed {
        changed(core);
    }
}

/// The node is going down: closes this core's connections and takes no more. Requests that a bdev has
/// are answered to nobody.
pub fn close_connections(core: &mut Core) {
    core.target.refusing = true;
    if let Some(connections) = &mut core.target.connections {
        for index in 0..core.target.watches.len() {
            connections.close(index as u32);
        }
    }
    check(core);
}

/// Acknowledges when the last connection of this core is gone.
pub fn wait_for_connections(core: &mut Core, acknowledgement: Acknowledgement) {
    core.target.stopping = Some(acknowledgement);
}

fn acknowledge_stopped(core: &mut Core) -> bool {
    if core.target.stopping.is_none() || core.target.has_connections() {
        return false;
    }
    if let Some(acknowledgement) = core.target.stopping.take() {
        acknowledgement.send(core);
    }
    true
}

#[cfg(test)]
mod tests;
