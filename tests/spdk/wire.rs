//! A cable to one NVMe/TCP target that reads along: which commands a host sends on its I/O queues. It can be cut, and
//! answers can be kept from the host. Used by tests of what SPDK sends by itself. Without digests and TLS.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// NVMe/TCP: a capsule with a command.
const CAPSULE_COMMAND: u8 = 4;
const COMMON_HEADER_BYTES: usize = 8;
const COMMAND_BYTES: usize = 64;
const FABRICS: u8 = 0x7f;
const FABRICS_CONNECT: u8 = 1;

/// A command as it is on the wire: the submission queue entry.
#[derive(Clone, Copy, Debug)]
pub struct Command(pub [u8; COMMAND_BYTES]);

impl Command {
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }

    fn dword(&self, index: usize) -> u32 {
        let bytes = self.0[index * 4..][..4].try_into().unwrap();
        u32::from_le_bytes(bytes)
    }

    /// Of a read, write and the like.
    pub fn lba(&self) -> u64 {
        u64::from(self.dword(11)) << 32 | u64::from(self.dword(10))
    }

    pub fn has_fua(&self) -> bool {
        self.dword(12) & 1 << 30 != 0
    }

    /// What a peer's engine sees of it: opcode and the dwords that it carries.
    pub fn meaning(&self) -> Vec<u32> {
        let dwords = [2, 3, 10, 11, 12, 13, 14, 15].map(|index| self.dword(index));
        std::iter::once(u32::from(self.opcode()))
            .chain(dwords)
            .collect()
    }
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Vec<Command>>,
    connections: Mutex<Vec<TcpStream>>,
    is_mute: AtomicBool,
    /// Pieces of answers that were thrown away.
    kept: AtomicUsize,
    has_ended: AtomicBool,
}

pub struct Wire {
    shared: Arc<Shared>,
    front: SocketAddr,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    pub fn to(target: SocketAddr, near: IpAddr) -> Wire {
        let listener = TcpListener::bind((near, 0)).unwrap();
        let front = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let inside = Arc::clone(&shared);
        thread::spawn(move || {
            for host in listener.incoming() {
                if inside.has_ended.load(Ordering::SeqCst) {
                    return;
                }
                // Without a target the host's connection is closed at once.
                if let (Ok(host), Ok(target)) = (host, TcpStream::connect(target)) {
                    inside.carry(host, target);
                }
            }
        });
        Wire { shared, front }
    }

    /// Where the target is reached.
    pub fn front(&self) -> SocketAddr {
        self.front
    }

    /// The commands of all I/O queues so far, in the order in which they passed.
    pub fn seen(&self) -> Vec<Command> {
        lock(&self.shared.seen).clone()
    }

    /// From now on, or no longer, answers are thrown away.
    pub fn keep_answers(&self, keep: bool) {
        self.shared.is_mute.store(keep, Ordering::SeqCst);
    }

    /// How often an answer, or a part of one, was thrown away.
    pub fn kept_answers(&self) -> usize {
        self.shared.kept.load(Ordering::SeqCst)
    }

    /// Closes all connections; new ones are let through.
    pub fn cut(&self) {
        for connection in lock(&self.shared.connections).drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        self.cut();
        let _ = TcpStream::connect(self.front);
    }
}

impl Shared {
    fn carry(self: &Arc<Shared>, host: TcpStream, target: TcpStream) {
        for end in [&host, &target] {
            end.set_nodelay(true).unwrap();
            lock(&self.connections).push(end.try_clone().unwrap());
        }
        let (mut from, mut to) = (target.try_clone().unwrap(), host.try_clone().unwrap());
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let mut piece = vec![0; 256 << 10];
            while let Ok(bytes @ 1..) = from.read(&mut piece) {
                if shared.is_mute.load(Ordering::SeqCst) {
                    shared.kept.fetch_add(1, Ordering::SeqCst);
                } else if to.write_all(&piece[..bytes]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
        let shared = Arc::clone(self);
        thread::spawn(move || {
            shared.read_along(&host, &target);
            let _ = target.shutdown(Shutdown::Both);
        });
    }

    /// Until one of both ends.
    fn read_along(&self, mut host: &TcpStream, mut target: &TcpStream) -> Option<()> {
        let mut is_io_queue = false;
        let mut pdu = vec![0; COMMON_HEADER_BYTES];
        loop {
            pdu.resize(COMMON_HEADER_BYTES, 0);
            host.read_exact(&mut pdu).ok()?;
            let bytes = u32::from_le_bytes(pdu[4..].try_into().ok()?) as usize;
            pdu.resize(bytes.max(COMMON_HEADER_BYTES), 0);
            host.read_exact(&mut pdu[COMMON_HEADER_BYTES..]).ok()?;
            let command = pdu[COMMON_HEADER_BYTES..].first_chunk();
            if let Some(command) = command.filter(|_| pdu[0] == CAPSULE_COMMAND) {
                if command[0] != FABRICS {
                    if is_io_queue {
                        lock(&self.seen).push(Command(*command));
                    }
                } else if command[4] == FABRICS_CONNECT {
                    is_io_queue = command[42..44] != [0, 0];
                }
            }
            target.write_all(&pdu).ok()?;
        }
    }
}
