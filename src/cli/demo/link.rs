//! The cable between two nodes: TCP proxies that can be cut and healed, and count what passes.
//! Used by the demo and the end-to-end tests. Knows nothing of what the bytes mean.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const PIECE_BYTES: usize = 256 << 10;
/// How long a target may take to accept, before its proxy gives the connection up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a silent link looks whether it is to go on.
const SILENT_TICK: Duration = Duration::from_millis(5);

/// What the cable does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Everything passes.
    Up,
    /// Connections are closed, new ones too as soon as they are made.
    Closed,
    /// Nothing passes and nobody is told: a pulled plug.
    Silent,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<LinkState>,
    silent: AtomicBool,
    ended: AtomicBool,
    passed_bytes: AtomicU64,
    /// Both ends of every connection, so that they can be closed. Pairs that have ended are swept.
    connections: Mutex<Vec<Arc<(TcpStream, TcpStream)>>>,
}

/// A cable with one proxy for each way. Dropped, it is cut for good.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    proxies: Vec<(SocketAddr, JoinHandle<()>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Starts one proxy for each target, on a free port of `address`.
    pub fn new(address: IpAddr, targets: &[SocketAddr]) -> io::Result<Link> {
        let mut link = Link {
            shared: Arc::new(Shared {
                state: Mutex::new(LinkState::Up),
                silent: AtomicBool::new(false),
                ended: AtomicBool::new(false),
                passed_bytes: AtomicU64::new(0),
                connections: Mutex::new(Vec::new()),
            }),
            proxies: Vec::new(),
        };
        for target in targets {
            let listener = TcpListener::bind((address, 0))?;
            let front = listener.local_addr()?;
            let (shared, target) = (link.shared.clone(), *target);
            let proxy = thread::spawn(move || shared.accept(&listener, target));
            link.proxies.push((front, proxy));
        }
        Ok(link)
    }

    /// Where the target at this position is reached through the cable.
    pub fn address(&self, index: usize) -> SocketAddr {
        self.proxies[index].0
    }

    /// Cuts or heals. When it returns, a cut link passes nothing any more.
    pub fn set(&self, state: LinkState) {
        let mut now = lock(&self.shared.state);
        *now = state;
        self.shared
            .silent
            .store(state == LinkState::Silent, Ordering::Release);
        if state == LinkState::Closed {
            self.shared.close_all();
        }
    }

    /// Bytes that have passed, both ways together.
    pub fn passed_bytes(&self) -> u64 {
        self.shared.passed_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.set(LinkState::Closed);
        for (front, proxy) in self.proxies.drain(..) {
            // Wakes the accept; should it fail, the thread ends with the process.
            if TcpStream::connect(front).is_ok() {
                let _ = proxy.join();
            }
        }
    }
}

impl Shared {
    fn accept(self: Arc<Shared>, listener: &TcpListener, target: SocketAddr) {
        loop {
            let accepted = listener.accept();
            if self.ended.load(Ordering::Acquire) {
                return;
            }
            match accepted {
                Ok((front, _)) => {
                    let shared = self.clone();
                    thread::spawn(move || shared.connect(front, target));
                }
                // Out of descriptors, most likely: something will end.
                Err(_) => thread::sleep(SILENT_TICK),
            }
        }
    }

    fn connect(self: Arc<Shared>, front: TcpStream, target: SocketAddr) {
        self.hold_while_silent();
        if *lock(&self.state) == LinkState::Closed {
            return;
        }
        let Ok(back) = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT) else {
            return;
        };
        if front.set_nodelay(true).is_err() || back.set_nodelay(true).is_err() {
            return;
        }
        let pair = Arc::new((front, back));
        {
            // Under the lock: a cut must either see the connection or be seen here.
            let state = lock(&self.state);
            if *state == LinkState::Closed {
                return;
            }
            let mut connections = lock(&self.connections);
            connections.retain(|pair| Arc::strong_count(pair) > 1);
            connections.push(pair.clone());
        }
        let other = (self.clone(), pair.clone());
        let backward = thread::spawn(move || other.0.carry(&other.1, &other.1.1, &other.1.0));
        self.carry(&pair, &pair.0, &pair.1);
        let _ = backward.join();
    }

    /// Copies one way until either end is closed, then closes both: half-closed is of no use to NVMe/TCP.
    fn carry(&self, pair: &(TcpStream, TcpStream), mut from: &TcpStream, mut to: &TcpStream) {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = match from.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            self.hold_while_silent();
            // Counted first, so that whoever has received it finds it counted.
            self.passed_bytes
                .fetch_add(length as u64, Ordering::Relaxed);
            if to.write_all(&piece[..length]).is_err() {
                break;
            }
        }
        close(pair);
    }

    fn hold_while_silent(&self) {
        while self.silent.load(Ordering::Acquire) {
            thread::sleep(SILENT_TICK);
        }
    }

    fn close_all(&self) {
        for pair in lock(&self.connections).drain(..) {
            close(&pair);
        }
    }
}

/// An end that is closed already is as good.
fn close(pair: &(TcpStream, TcpStream)) {
    let _ = pair.0.shutdown(Shutdown::Both);
    let _ = pair.1.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    /// Sends back what it gets, plus one.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() {
                        byte[0] += 1;
                        if stream.write_all(&byte).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn ask(stream: &mut TcpStream, byte: u8) -> io::Result<u8> {
        let mut answer = [byte];
        stream.write_all(&answer)?;
        stream.read_exact(&mut answer)?;
        Ok(answer[0])
    }

    #[test]
    fn what_passes_is_counted_and_a_cut_link_passes_nothing_until_it_is_healed() {
        let link = Link::new(Ipv4Addr::LOCALHOST.into(), &[echo(), echo()]).unwrap();
        let mut first = TcpStream::connect(link.address(0)).unwrap();
        let mut second = TcpStream::connect(link.address(1)).unwrap();
        assert_eq!(ask(&mut first, 1).unwrap(), 2);
        assert_eq!(ask(&mut second, 5).unwrap(), 6);
        assert_eq!(link.passed_bytes(), 4);

        link.set(LinkState::Closed);
        assert!(ask(&mut first, 1).is_err());
        let mut refused = TcpStream::connect(link.address(0)).unwrap();
        assert!(ask(&mut refused, 1).is_err());
        assert_eq!(link.passed_bytes(), 4);

        link.set(LinkState::Up);
        let mut again = TcpStream::connect(link.address(0)).unwrap();
        assert_eq!(ask(&mut again, 8).unwrap(), 9);
    }

    #[test]
    fn a_silent_link_tells_nobody_and_delivers_later() {
        let link = Link::new(Ipv4Addr::LOCALHOST.into(), &[echo()]).unwrap();
        let mut stream = TcpStream::connect(link.address(0)).unwrap();
        assert_eq!(ask(&mut stream, 1).unwrap(), 2);
        link.set(LinkState::Silent);
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let error = ask(&mut stream, 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        link.set(LinkState::Up);
        stream.set_read_timeout(None).unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [2]);
    }

    #[test]
    fn a_link_in_every_state_can_be_dropped() {
        for state in [LinkState::Up, LinkState::Closed, LinkState::Silent] {
            let link = Link::new(Ipv4Addr::LOCALHOST.into(), &[echo()]).unwrap();
            let mut stream = TcpStream::connect(link.address(0)).unwrap();
            assert_eq!(ask(&mut stream, 1).unwrap(), 2);
            link.set(state);
            drop(link);
            assert!(ask(&mut stream, 1).is_err());
        }
    }
}
