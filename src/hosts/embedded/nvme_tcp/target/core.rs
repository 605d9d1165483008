//! The target's connections on one core, with their pool of large buffers. Owned by the core's reactor,
//! which tells it of sockets, time and completions. Knows no event loop.

use std::collections::VecDeque;
use std::io;

use super::connection::TargetConnection;
use super::state::{SharedTarget, lock};
use super::subsystem::ListenerAddress;
use super::{Backend, RequestHandle};
use crate::hosts::embedded::nvme_tcp::buffer::BufferPool;
use crate::hosts::embedded::nvme_tcp::command::NvmeStatus;
use crate::hosts::embedded::nvme_tcp::stream::Socket;

/// All connections of a core.
///
/// The reactor calls [`accept`](Self::accept) for a new socket, [`on_readable`](Self::on_readable) and
/// [`on_writable`](Self::on_writable) when it is ready, [`complete`](Self::complete) for every answer of
/// the backend, [`poll`](Self::poll) after a batch of any of these, [`poll_timeouts`](Self::poll_timeouts)
/// a few times a second, and [`remove`](Self::remove) when [`is_closed`](Self::is_closed).
pub struct TargetCore<S: Socket> {
    target: SharedTarget,
    pool: BufferPool,
    connections: Vec<Option<TargetConnection<S>>>,
    free: Vec<u32>,
    /// Connections with something new to send.
    to_flush: VecDeque<u32>,
    /// Connections with requests that wait for large buffers, in the order in which they began to.
    waiting: VecDeque<u32>,
    /// Makes request handles of different connections in the same place differ.
    next_generation: u32,
}

impl<S: Socket> TargetCore<S> {
    /// With a pool of the size that the target's options say now.
    pub fn new(target: SharedTarget) -> io::Result<TargetCore<S>> {
        let options = lock(&target).options();
        let pool = BufferPool::new(
            options.max_io_size,
            options.buffers_per_core,
            options.peer_buffers_per_core,
        )?;
        Ok(TargetCore {
            target,
            pool,
            connections: Vec::new(),
            free: Vec::new(),
            to_flush: VecDeque::new(),
            waiting: VecDeque::new(),
            next_generation: 1,
        })
    }

    /// The large buffers, all in one piece, for registration with a device.
    pub fn buffer_memory(&self) -> (*mut u8, usize) {
        self.pool.memory()
    }

    /// Takes a connection that came in at `listener`; returns its index on this core.
    pub fn accept(&mut self, socket: S, listener: ListenerAddress) -> io::Result<u32> {
        let index = match self.free.last() {
            Some(index) => *index,
            None => u32::try_from(self.connections.len())
                .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?,
        };
        let target = self.target.clone();
        let connection =
            TargetConnection::new(index, self.next_generation, socket, listener, target)?;
        self.next_generation = self.next_generation.wrapping_add(0x0010_0001);
        if self.free.pop().is_some() {
            if let Some(place) = self.connections.get_mut(index as usize) {
                *place = Some(connection);
            }
        } else {
            self.connections.push(Some(connection));
        }
        Ok(index)
    }

    /// Connections that have not been removed.
    pub fn connections(&self) -> impl Iterator<Item = (u32, &TargetConnection<S>)> {
        let indexed = self.connections.iter().enumerate();
        indexed.filter_map(|(index, connection)| Some((index as u32, connection.as_ref()?)))
    }

    pub fn connection(&self, index: u32) -> Option<&TargetConnection<S>> {
        self.connections.get(index as usize)?.as_ref()
    }

    /// The socket has something to receive, or has ended. Reads until it would block.
    pub fn on_readable<B: Backend>(&mut self, index: u32, backend: &mut B) {
        let Some(connection) = get_mut(&mut self.connections, index) else {
            return;
        };
        let waited = connection.waits_for_buffers();
        connection.on_readable(&mut self.pool, backend);
        if !waited && connection.waits_for_buffers() {
            self.waiting.push_back(index);
        }
    }

    /// The socket can take more.
    pub fn on_writable(&mut self, index: u32) {
        if let Some(connection) = get_mut(&mut self.connections, index) {
            connection.flush(&mut self.pool);
        }
    }

    /// The backend's answer to a request. `dword0` is the completion's first dword. The answer leaves with
    /// the next [`poll`](Self::poll).
    pub fn complete(&mut self, request: RequestHandle, status: NvmeStatus, dword0: u32) {
        let Some(connection) = get_mut(&mut self.connections, request.connection) else {
            return;
        };
        connection.complete(request, status, dword0, &mut self.pool);
        if connection.wants_write() && self.to_flush.back() != Some(&request.connection) {
            self.to_flush.push_back(request.connection);
        }
    }

    /// Sends the answers since the last call, and starts requests for which there are buffers now.
    pub fn poll<B: Backend>(&mut self, backend: &mut B) {
        while let Some(index) = self.to_flush.pop_front() {
            self.on_writable(index);
        }
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else {
                break;
            };
            let Some(connection) = get_mut(&mut self.connections, index) else {
                continue;
            };
            connection.resume_waiting(&mut self.pool, backend);
            connection.flush(&mut self.pool);
            if connection.waits_for_buffers() {
                self.waiting.push_back(index);
            }
        }
    }

    /// Whether [`poll`](Self::poll) has something to do that no event announces.
    pub fn wants_poll(&self) -> bool {
        !self.to_flush.is_empty()
    }

    /// Time passes: Keep Alive, connections that never become queues; changes of the target are noticed.
    /// Call a few times a second, and after every change of the [`super::TargetState`]. `now_ms` only goes
    /// forward.
    pub fn poll_timeouts(&mut self, now_ms: u64) {
        for connection in self.connections.iter_mut().flatten() {
            connection.poll_timeouts(now_ms, &mut self.pool);
        }
    }

    pub fn wants_write(&self, index: u32) -> bool {
        self.connection(index)
            .is_some_and(TargetConnection::wants_write)
    }

    /// The connection is over and can be removed; true also if there is none.
    pub fn is_closed(&self, index: u32) -> bool {
        self.connection(index)
            .is_none_or(TargetConnection::is_closed)
    }

    /// Closes a connection's socket; it can be removed once [`is_closed`](Self::is_closed).
    pub fn close(&mut self, index: u32) {
        if let Some(connection) = get_mut(&mut self.connections, index) {
            connection.close(&mut self.pool);
        }
    }

    /// Forgets a connection that is closed. False: it is not, the backend still uses its memory.
    pub fn remove(&mut self, index: u32) -> bool {
        if !self.is_closed(index) {
            return false;
        }
        if let Some(place) = self.connections.get_mut(index as usize) {
            if place.take().is_some() {
                self.free.push(index);
                self.waiting.retain(|waiting| *waiting != index);
            }
        }
        true
    }
}

fn get_mut<S: Socket>(
    connections: &mut [Option<TargetConnection<S>>],
    index: u32,
) -> Option<&mut TargetConnection<S>> {
    connections.get_mut(index as usize)?.as_mut()
}
