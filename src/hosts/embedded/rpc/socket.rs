//! The RPC socket: a thread of its own that speaks JSON-RPC on a Unix socket and hands calls on.
//! Started by the node. Must not know any method: calls go to a handler, answers come back by `Reply`.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use serde_json::Value;

use crate::rpc::server::{Call, Connection};
use crate::rpc::{Reply, RpcError};

/// Connections at a time, as SPDK's server has it; the next one waits in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 64;
const READ_BYTES: usize = 16 * 1024;

/// What a call becomes when it has been read: method, parameters and where the answer goes.
pub type Handler = dyn Fn(String, Option<Value>, Reply) + Send;

/// The RPC socket and its thread. Dropped, it closes every connection and removes the socket.
pub struct RpcSocket {
    stop: Arc<AtomicBool>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    lock_path: PathBuf,
    /// Held locked while the socket is ours.
    _lock: File,
}

struct Answer {
    connection: u64,
    call: u64,
    result: Result<Value, RpcError>,
}

impl RpcSocket {
    /// Makes the socket at `path`, for its owner only (mode 0600), and serves it.
    ///
    /// As SPDK does, `path.lock` says whether a living target has the path: then this fails with
    /// `AddrInUse`; a socket that a dead one left is replaced.
    pub fn start(path: &Path, handler: Box<Handler>) -> io::Result<RpcSocket> {
        let lock_path = PathBuf::from(format!("{}.lock", path.display()));
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)?;
        // SAFETY: flock takes a descriptor, which `lock` keeps open, and no memory.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            return Err(if error.kind() == io::ErrorKind::WouldBlock {
                let text = format!(
                    "RPC socket {} is in use by another process; choose another with -r",
                    path.display()
                );
                io::Error::new(io::ErrorKind::AddrInUse, text)
            } else {
                error
            });
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = listen(path)?;
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, answers) = mpsc::channel();
        let mut server = Server {
            listener,
            woken,
            wake: Arc::new(wake.try_clone()?),
            answers,
            sender,
            handler,
            connections: HashMap::new(),
            next: 0,
            stop: stop.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("rpc".to_owned())
            .spawn(move || server.run())?;
        Ok(RpcSocket {
            stop,
            wake,
            thread: Some(thread),
            path: path.to_owned(),
            lock_path,
            _lock: lock,
        })
    }
}

impl Drop for RpcSocket {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        wake(&self.wake);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// A full pipe has woken the thread already, and a closed one has nobody to wake.
fn wake(mut stream: &UnixStream) {
    let _ = stream.write(&[1]);
}

/// Binds with the mode set first, so that there is no moment in which others could connect.
fn listen(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        let text = format!(
            "RPC socket path must have 1 to {} bytes, '{}' has {}",
            address.sun_path.len() - 1,
            path.display(),
            bytes.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: no memory is passed.
    let fd = unsafe {
        libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `fd` is open; `address` lives through the calls and its true size is given.
    let failed = unsafe {
        libc::fchmod(fd.as_raw_fd(), 0o600) != 0
            || libc::bind(
                fd.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                size_of::<libc::sockaddr_un>() as libc::socklen_t,
            ) != 0
            || libc::listen(fd.as_raw_fd(), 512) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(UnixListener::from(fd))
}

struct Client {
    stream: UnixStream,
    connection: Connection,
}

struct Server {
    listener: UnixListener,
    woken: UnixStream,
    wake: Arc<UnixStream>,
    answers: Receiver<Answer>,
    sender: Sender<Answer>,
    handler: Box<Handler>,
    connections: HashMap<u64, Client>,
    next: u64,
    stop: Arc<AtomicBool>,
}

impl Server {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Acquire) {
            let (mut polled, numbers) = self.interests();
            // SAFETY: `polled` is a live array of the length given.
            let ready =
                unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                tracing::error!("the RPC socket is no longer served: poll: {error}");
                return;
            }
            let mut drained = [0; 64];
            while matches!(self.woken.read(&mut drained), Ok(length) if length == drained.len()) {}
            while let Ok(answer) = self.answers.try_recv() {
                // The client may have gone in the meantime.
                if let Some(client) = self.connections.get_mut(&answer.connection) {
                    client.connection.answer(answer.call, answer.result);
                    self.send(answer.connection);
                }
            }
            for (entry, number) in polled.iter().skip(2).zip(numbers) {
                if entry.revents & libc::POLLOUT != 0 {
                    self.send(number);
                }
                if entry.revents & libc::POLLIN != 0 {
                    self.receive(number);
                } else if entry.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0 {
                    self.connections.remove(&number);
                }
            }
            if polled.first().is_some_and(|entry| entry.revents != 0) {
                self.accept();
            }
        }
    }

    /// What to poll for: the listener, the wake-up, then each connection, with their numbers.
    fn interests(&self) -> (Vec<libc::pollfd>, Vec<u64>) {
        let entry = |fd: RawFd, events: i16| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let accepts = if self.connections.len() < CONNECTIONS_MAX {
            libc::POLLIN
        } else {
            0
        };
        let mut polled = vec![
            entry(self.listener.as_raw_fd(), accepts),
            entry(self.woken.as_raw_fd(), libc::POLLIN),
        ];
        let mut numbers = Vec::with_capacity(self.connections.len());
        for (number, client) in &self.connections {
            let mut events = 0;
            if client.connection.wants_input() {
                events |= libc::POLLIN;
            }
            if !client.connection.output().is_empty() {
                events |= libc::POLLOUT;
            }
            polled.push(entry(client.stream.as_raw_fd(), events));
            numbers.push(*number);
        }
        (polled, numbers)
    }

    fn accept(&mut self) {
        while self.connections.len() < CONNECTIONS_MAX {
            let Ok((stream, _)) = self.listener.accept() else {
                return;
            };
            if stream.set_nonblocking(true).is_ok() {
                self.next += 1;
                self.connections.insert(
                    self.next,
                    Client {
                        stream,
                        connection: Connection::new(),
                    },
                );
            }
        }
    }

    fn receive(&mut self, number: u64) {
        let Some(client) = self.connections.get_mut(&number) else {
            return;
        };
        let mut piece = [0; READ_BYTES];
        let length = match client.stream.read(&mut piece) {
            Ok(0) => {
                self.connections.remove(&number);
                return;
            }
            Ok(length) => length,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return;
            }
            Err(_) => {
                self.connections.remove(&number);
                return;
            }
        };
        let mut calls = Vec::new();
        let received = client
            .connection
            .receive(piece.get(..length).unwrap_or_default(), &mut calls);
        for Call {
            number: call,
            method,
            params,
        } in calls
        {
            (self.handler)(method, params, self.reply(number, call));
        }
        if let Err(close) = received {
            tracing::warn!("an RPC connection is closed: {close}");
            self.connections.remove(&number);
            return;
        }
        self.send(number);
    }

    fn reply(&self, connection: u64, call: u64) -> Reply {
        let sender = self.sender.clone();
        let stream = self.wake.clone();
        Reply::new(move |result| {
            // Fails only when the socket is closed, and then nobody waits for the answer.
            let _ = sender.send(Answer {
                connection,
                call,
                result,
            });
            wake(&stream);
        })
    }

    fn send(&mut self, number: u64) {
        let Some(client) = self.connections.get_mut(&number) else {
            return;
        };
        while !client.connection.output().is_empty() {
            match client.stream.write(client.connection.output()) {
                Ok(length) => client.connection.sent(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.connections.remove(&number);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::rpc::client::Client as RpcClient;

    fn echo() -> Box<Handler> {
        Box::new(|method, params, reply| {
            let call = move || match method.as_str() {
                "echo" => reply.ok(params.unwrap_or_default()),
                "drop" => drop(reply),
                _ => reply.fail(RpcError::method_not_found(&method)),
            };
            // Answers come from another thread in production.
            std::thread::spawn(call);
        })
    }

    fn connect(path: &Path) -> RpcClient {
        RpcClient::connect(path, Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn calls_are_answered_and_a_dropped_one_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        let socket = RpcSocket::start(&path, echo()).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let mut client = connect(&path);
        let large = "ü".repeat(80_000);
        assert_eq!(
            client.call("echo", json!({"a": large})).unwrap()["a"],
            large
        );
        assert_eq!(
            client.call("drop", Value::Null).unwrap_err().code(),
            Some(-125)
        );
        assert_eq!(
            client.call("nothing", Value::Null).unwrap_err().code(),
            Some(-32601)
        );
        drop(socket);
        assert!(client.call("echo", Value::Null).is_err());
        assert!(!path.exists() && fs::read_dir(folder.path()).unwrap().next().is_none());
    }

    #[test]
    fn a_socket_in_use_is_refused_and_one_left_over_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        let socket = RpcSocket::start(&path, echo()).unwrap();
        let error = RpcSocket::start(&path, echo()).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        connect(&path).call("echo", Value::Null).unwrap();
        drop(socket);
        // What a killed process leaves behind.
        drop(UnixListener::bind(&path).unwrap());
        File::create(folder.path().join("rpc.sock.lock")).unwrap();
        let _socket = RpcSocket::start(&path, echo()).unwrap();
        connect(&path).call("echo", Value::Null).unwrap();
    }

    #[test]
    fn the_sixty_fifth_connection_waits_until_another_one_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        let _socket = RpcSocket::start(&path, echo()).unwrap();
        let mut clients: Vec<RpcClient> = (0..CONNECTIONS_MAX).map(|_| connect(&path)).collect();
        for client in &mut clients {
            client.call("echo", Value::Null).unwrap();
        }
        let mut waiting = RpcClient::connect(&path, Duration::from_millis(50)).unwrap();
        assert!(waiting.call("echo", Value::Null).is_err());
        drop(waiting);
        clients.pop();
        connect(&path)
            .call("echo", Value::Null)
            .unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    fn malformed_json_ends_that_connection_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rpc.sock");
        let _socket = RpcSocket::start(&path, echo()).unwrap();
        let mut good = connect(&path);
        let mut bad = UnixStream::connect(&path).unwrap();
        bad.write_all(b"nonsense").unwrap();
        assert!(matches!(bad.read(&mut [0; 16]), Ok(0) | Err(_)));
        good.call("echo", Value::Null).unwrap();
    }

    #[test]
    fn a_path_that_is_too_long_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x".repeat(120));
        assert_eq!(
            RpcSocket::start(&path, echo()).err().unwrap().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
