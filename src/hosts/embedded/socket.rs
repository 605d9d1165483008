//! TCP sockets of a core: readiness from one multishot poll of the ring per socket, transfers by plain
//! non-blocking calls. Used by the target's and the initiator's connections; knows no protocol.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use io_uring::{opcode, types};

use super::nvme_tcp::stream::Socket;
use super::ring::{Ring, Tag, TagKind};

/// What is known of a socket without asking the kernel. It stays true until a transfer finds otherwise,
/// and becomes true again by the ring's poll, which reports changes only.
#[derive(Default)]
pub struct Readiness {
    readable: Cell<bool>,
    writable: Cell<bool>,
    /// The other side has ended or broken the stream. There may be no further event, so it stays readable
    /// until that has been read.
    ended: Cell<bool>,
}

impl Readiness {
    pub fn is_readable(&self) -> bool {
        self.readable.get()
    }

    pub fn is_writable(&self) -> bool {
        self.writable.get()
    }

    /// Takes the answer of the poll: an event mask, or a negative errno.
    pub fn update(&self, result: i32) {
        let events = if result < 0 {
            // Let the transfers find out.
            libc::POLLERR
        } else {
            result as libc::c_short
        };
        let broken = libc::POLLERR | libc::POLLHUP;
        if events & (libc::POLLRDHUP | broken) != 0 {
            self.ended.set(true);
        }
        if events & (libc::POLLIN | libc::POLLRDHUP | broken) != 0 {
            self.readable.set(true);
        }
        if events & (libc::POLLOUT | broken) != 0 {
            self.writable.set(true);
        }
    }
}

/// A connected (or connecting) stream that never blocks. Its other half is the [`Readiness`] that the
/// core's loop looks at.
pub struct TcpSocket {
    stream: TcpStream,
    readiness: Rc<Readiness>,
}

impl TcpSocket {
    /// Makes the stream non-blocking, without Nagle's delay.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            readiness: Rc::default(),
        })
    }

    /// Begins to connect; writable says that it ended, [`connect_error`](Self::connect_error) how.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let family = match address {
            SocketAddr::V4(_) => libc::AF_INET,
            SocketAddr::V6(_) => libc::AF_INET6,
        };
        let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no memory involved; the result is checked.
        let fd = unsafe { libc::socket(family, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let socket = Self::new(stream)?;
        if start_connect(fd, address) != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINPROGRESS) {
                return Err(error);
            }
        }
        Ok(socket)
    }

    /// Why connecting failed, if it did.
    pub fn connect_error(&self) -> io::Result<()> {
        match self.stream.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub fn readiness(&self) -> Rc<Readiness> {
        self.readiness.clone()
    }
}

impl Drop for TcpSocket {
    fn drop(&mut self) {
        // The ring's poll may hold the file a moment longer than we do; the peer is to know now. An error
        // says that there is no connection any more.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn start_connect(fd: RawFd, address: SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(address) => {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            // SAFETY: a live local of the length that is stated.
            unsafe { libc::connect(fd, (&raw const name).cast(), length) }
        }
        SocketAddr::V6(address) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            };
            let length = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            // SAFETY: a live local of the length that is stated.
            unsafe { libc::connect(fd, (&raw const name).cast(), length) }
        }
    }
}

impl Socket for TcpSocket {
    fn recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = io::Read::read(&mut self.stream, buffer);
        let drained = match &result {
            // Less than there was room for: the kernel has no more, and the poll tells of new data.
            Ok(length) => *length > 0 && *length < buffer.len() && !self.readiness.ended.get(),
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        if drained {
            self.readiness.readable.set(false);
        }
        result
    }

    fn send_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let result = io::Write::write_vectored(&mut self.stream, slices);
        if result
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        {
            self.readiness.writable.set(false);
        }
        result
    }
}

/// Arms a multishot poll for everything that can happen to a stream.
pub fn watch_stream(ring: &mut Ring, fd: RawFd, tag: Tag) {
    let events = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
    let entry = opcode::PollAdd::new(types::Fd(fd), events as u32)
        .multi(true)
        .build();
    // SAFETY: no memory is named. The caller sends this entry before it closes the descriptor, because
    // every round of the loop enters the ring.
    unsafe { ring.push(entry, tag) };
}

/// Arms a multishot poll for connections to accept.
pub fn watch_listener(ring: &mut Ring, fd: RawFd, tag: Tag) {
    let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
        .multi(true)
        .build();
    // SAFETY: as for `watch_stream`.
    unsafe { ring.push(entry, tag) };
}

/// Ends the poll that `tag` names. Completions of it may still come.
pub fn unwatch(ring: &mut Ring, tag: Tag) {
    let entry = opcode::PollRemove::new(tag.encode()).build();
    // SAFETY: no memory is named.
    unsafe { ring.push(entry, Tag::new(TagKind::None, 0, 0)) };
}

#[cfg(test)]
mod tests {
    use super::super::ring::Completion;
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::time::Duration;

    const TAG: Tag = Tag {
        kind: TagKind::TargetSocket,
        slot: 5,
        generation: 9,
    };

    fn next_event(ring: &mut Ring, readiness: &Readiness) {
        let mut completions: Vec<Completion> = Vec::new();
        while completions.is_empty() {
            ring.wait(Duration::from_secs(1)).unwrap();
            ring.collect(&mut completions);
        }
        for completion in completions {
            assert_eq!(completion.tag, TAG);
            assert!(completion.more);
            readiness.update(completion.result);
        }
    }

    #[test]
    fn readiness_follows_what_arrives_and_what_was_taken() {
        let mut ring = Ring::new(8).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpSocket::connect(listener.local_addr().unwrap()).unwrap();
        let readiness = socket.readiness();
        watch_stream(&mut ring, socket.fd(), TAG);
        next_event(&mut ring, &readiness);
        assert!(readiness.is_writable());
        socket.connect_error().unwrap();
        let (mut other, _) = listener.accept().unwrap();
        for _ in 0..3 {
            other.write_all(&[7; 100]).unwrap();
            while !readiness.is_readable() {
                next_event(&mut ring, &readiness);
            }
            let mut buffer = [0; 100];
            let mut received = 0;
            while received < 100 {
                while !readiness.is_readable() {
                    next_event(&mut ring, &readiness);
                }
                received += socket.recv(&mut buffer[received..]).unwrap();
            }
            assert_eq!(buffer, [7; 100]);
            let again = socket.recv(&mut buffer).unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
            assert!(!readiness.is_readable());
        }
        drop(other);
        while !readiness.is_readable() {
            next_event(&mut ring, &readiness);
        }
        assert_eq!(socket.recv(&mut [0; 1]).unwrap(), 0);
        assert!(readiness.is_readable());
    }

    #[test]
    fn a_refused_connection_is_an_error_soon() {
        let mut ring = Ring::new(8).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let socket = TcpSocket::connect(address).unwrap();
        let readiness = socket.readiness();
        watch_stream(&mut ring, socket.fd(), TAG);
        while !readiness.is_writable() {
            next_event(&mut ring, &readiness);
        }
        let error = socket.connect_error().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
