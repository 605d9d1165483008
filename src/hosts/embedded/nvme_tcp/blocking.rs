//! A small blocking NVMe/TCP client over std's TcpStream: an admin and one I/O queue, and reads and writes
//! of any length, as many at a time as the queue takes. For the demo, tests and tools; not for reactors.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::buffer::DataPointer;
use super::command::{DISCOVERY_NQN, NvmeStatus, Sqe, io_opcode};
use super::controller::{
    ControllerEvent, ControllerInfo, ControllerParameters, InitiatorController, RemoteNamespace,
};
use super::identify::DiscoveryEntry;
use super::initiator::{Completion, InitiatorError, InitiatorQueue};
use super::pdu::Digests;
use thiserror::Error;

/// Transfers are no longer than this, whatever the controller allows.
const TRANSFER_BYTES_MAX: u32 = 131_072;
/// Blocks of one Write Zeroes.
const WRITE_ZEROES_BLOCKS_MAX: u64 = 65_536;
/// How often Keep Alive and timeouts are looked at while waiting.
const TICK: Duration = Duration::from_millis(100);

/// How long the client waits.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For TCP and for bringing the controller up.
    pub connect: Duration,
    /// For any one command, counted from the last sign of life of the queue.
    pub command: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(5),
            command: Duration::from_secs(10),
        }
    }
}

/// Who connects, to which namespace, and how.
#[derive(Clone, Debug)]
pub struct ClientParameters {
    pub nsid: u32,
    pub host_nqn: String,
    /// CRC32C of PDU headers, on both queues.
    pub header_digest: bool,
    /// CRC32C of data, on both queues.
    pub data_digest: bool,
    pub timeouts: Timeouts,
}

impl Default for ClientParameters {
    /// Namespace 1, as [`BlockingClient::HOST_NQN`], without digests.
    fn default() -> ClientParameters {
        ClientParameters {
            nsid: 1,
            host_nqn: BlockingClient::HOST_NQN.into(),
            header_digest: false,
            data_digest: false,
            timeouts: Timeouts::default(),
        }
    }
}

/// What went wrong.
#[derive(Debug, Error)]
pub enum ClientError {
    #[error("{address}: {source}")]
    Socket {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("{address}: {source}")]
    Initiator {
        address: SocketAddr,
        source: InitiatorError,
    },
    #[error("{what} at block {lba}: {status}")]
    Command {
        what: &'static str,
        lba: u64,
        status: NvmeStatus,
    },
    #[error("{address}: subsystem {subsystem_nqn} has no namespace {nsid}")]
    NoNamespace {
        address: SocketAddr,
        subsystem_nqn: String,
        nsid: u32,
    },
    #[error("{0}")]
    Usage(String),
}

/// How a batch ended. Where `result` is an error, those in `acknowledged` were written nevertheless.
#[derive(Debug)]
pub struct BatchOutcome {
    /// Indices of the requests that succeeded, in the order in which they did.
    pub acknowledged: Vec<usize>,
    pub result: Result<(), ClientError>,
}

/// One piece of a request, as long as one command carries.
struct Piece {
    request: usize,
    sqe: Sqe,
    data: DataPointer,
    lba: u64,
}

/// A connected namespace. After an error that is not [`ClientError::Command`] it is of no use any more.
pub struct BlockingClient {
    address: SocketAddr,
    timeouts: Timeouts,
    started: Instant,
    controller: InitiatorController<TcpStream>,
    queue: InitiatorQueue<TcpStream>,
    namespace: RemoteNamespace,
    transfer_blocks: u32,
    completions: Vec<Completion>,
    events: Vec<ControllerEvent>,
}

fn open(address: SocketAddr, timeouts: &Timeouts) -> Result<TcpStream, ClientError> {
    let attempt = || -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&address, timeouts.connect)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    attempt().map_err(|source| ClientError::Socket { address, source })
}

/// Waits until one of the sockets is ready or the time is up.
fn wait(sockets: &[(Option<&TcpStream>, bool)], limit: Duration) {
    let mut polled: Vec<libc::pollfd> = sockets
        .iter()
        .filter_map(|(socket, wants_write)| {
            let events = if *wants_write {
                libc::POLLIN | libc::POLLOUT
            } else {
                libc::POLLIN
            };
            Some(libc::pollfd {
                fd: socket.as_ref()?.as_raw_fd(),
                events,
                revents: 0,
            })
        })
        .collect();
    let limit_ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: an array of that many pollfd of ours. Whatever comes back, the sockets are tried next.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, limit_ms) };
}

fn bring_up(
    address: SocketAddr,
    subsystem_nqn: &str,
    wanted: &ClientParameters,
    started: Instant,
) -> Result<InitiatorController<TcpStream>, ClientError> {
    let stream = open(address, &wanted.timeouts)?;
    let mut host_id = [0; 16];
    let digest = crc32c::crc32c(wanted.host_nqn.as_bytes()).to_le_bytes();
    for (to, from) in host_id.iter_mut().zip(digest.iter().cycle()) {
        *to = *from;
    }
    let parameters = ControllerParameters {
        // The client may well be silent for long.
        keep_alive_ms: 0,
        header_digest: wanted.header_digest,
        data_digest: wanted.data_digest,
        connect_timeout_ms: wanted.timeouts.connect.as_millis() as u64,
        ..ControllerParameters::new(subsystem_nqn, &wanted.host_nqn, host_id)
    };
    let mut controller = InitiatorController::new(stream, parameters)
        .map_err(|source| ClientError::Socket { address, source })?;
    let mut events = Vec::new();
    loop {
        controller.on_time(started.elapsed().as_millis() as u64, &mut events);
        controller.on_readable(&mut events);
        for event in events.drain(..) {
            match event {
                ControllerEvent::Ready => return Ok(controller),
                ControllerEvent::Failed(source) => {
                    return Err(ClientError::Initiator { address, source });
                }
                ControllerEvent::NamespacesChanged => {}
            }
        }
        wait(&[(controller.socket(), controller.wants_write())], TICK);
    }
}

/// Subsystems that the discovery service at this address lists.
pub fn discover(
    address: SocketAddr,
    host_nqn: &str,
    timeouts: Timeouts,
) -> Result<Vec<DiscoveryEntry>, ClientError> {
    let wanted = ClientParameters {
        host_nqn: host_nqn.into(),
        timeouts,
        ..ClientParameters::default()
    };
    let controller = bring_up(address, DISCOVERY_NQN, &wanted, Instant::now())?;
    Ok(controller.info().discovery.clone())
}

impl BlockingClient {
    /// Connects to namespace 1 of a subsystem as [`BlockingClient::HOST_NQN`].
    pub fn connect(
        address: SocketAddr,
        subsystem_nqn: &str,
        timeouts: Timeouts,
    ) -> Result<BlockingClient, ClientError> {
        let wanted = ClientParameters {
            timeouts,
            ..ClientParameters::default()
        };
        BlockingClient::connect_with(address, subsystem_nqn, &wanted)
    }

    /// The host that [`BlockingClient::connect`] is.
    pub const HOST_NQN: &'static str = "nqn.2014-08.org.nvmexpress:bdev-repl-client";

    /// Connects to a namespace of a subsystem.
    pub fn connect_with(
        address: SocketAddr,
        subsystem_nqn: &str,
        wanted: &ClientParameters,
    ) -> Result<BlockingClient, ClientError> {
        let started = Instant::now();
        let timeouts = wanted.timeouts;
        let controller = bring_up(address, subsystem_nqn, wanted, started)?;
        let mut found = controller.info().namespaces.iter();
        let namespace = found.find(|namespace| namespace.nsid == wanted.nsid);
        let namespace = *namespace.ok_or_else(|| ClientError::NoNamespace {
            address,
            subsystem_nqn: subsystem_nqn.into(),
            nsid: wanted.nsid,
        })?;
        let limit = controller
            .info()
            .max_transfer_bytes
            .unwrap_or(TRANSFER_BYTES_MAX);
        let transfer_blocks = limit.min(TRANSFER_BYTES_MAX) / namespace.block_size;
        let queue =
            InitiatorQueue::new(open(address, &timeouts)?, controller.io_queue_parameters(1))
                .map_err(|source| ClientError::Socket { address, source })?;
        let mut client = BlockingClient {
            address,
            timeouts,
            started,
            controller,
            queue,
            namespace,
            transfer_blocks: transfer_blocks.max(1),
            completions: Vec::new(),
            events: Vec::new(),
        };
        client.queue.flush(&mut client.completions);
        let deadline = Instant::now() + timeouts.connect;
        while !client.queue.is_ready() {
            client.turn(deadline, "connecting the I/O queue")?;
        }
        Ok(client)
    }

    /// Bytes.
    pub fn block_size(&self) -> u32 {
        self.namespace.block_size
    }

    /// Size of the namespace.
    pub fn blocks(&self) -> u64 {
        self.namespace.size_blocks
    }

    pub fn namespace(&self) -> &RemoteNamespace {
        &self.namespace
    }

    /// Digests of the I/O queue, as the controller has agreed to them.
    pub fn digests(&self) -> Digests {
        self.queue.digests()
    }

    pub fn info(&self) -> &ControllerInfo {
        self.controller.info()
    }

    /// Reads from block `lba` on; the length must be whole blocks.
    pub fn read(&mut self, lba: u64, data: &mut [u8]) -> Result<(), ClientError> {
        self.read_many(&mut [(lba, data)]).result
    }

    /// Writes from block `lba` on; the length must be whole blocks.
    pub fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), ClientError> {
        self.write_many(&[(lba, data)]).result
    }

    /// Reads several places at once.
    pub fn read_many(&mut self, requests: &mut [(u64, &mut [u8])]) -> BatchOutcome {
        let mut pieces = Vec::new();
        let mut result = Ok(());
        for (index, (lba, data)) in requests.iter_mut().enumerate() {
            let (address, length) = (data.as_mut_ptr(), data.len());
            if result.is_ok() {
                result = self.split(io_opcode::READ, index, *lba, address, length, &mut pieces);
            }
        }
        match result {
            Ok(()) => self.run(&pieces, requests.len(), "read"),
            Err(error) => BatchOutcome::failed(error),
        }
    }

    /// Writes several places at once, in no particular order.
    pub fn write_many(&mut self, requests: &[(u64, &[u8])]) -> BatchOutcome {
        let mut pieces = Vec::new();
        for (index, (lba, data)) in requests.iter().enumerate() {
            // Only read from: a write's data goes to the socket.
            let (address, length) = (data.as_ptr().cast_mut(), data.len());
            let opcode = io_opcode::WRITE;
            if let Err(error) = self.split(opcode, index, *lba, address, length, &mut pieces) {
                return BatchOutcome::failed(error);
            }
        }
        self.run(&pieces, requests.len(), "write")
    }

    /// Zeroes blocks without sending them.
    pub fn write_zeroes(&mut self, lba: u64, blocks: u64) -> Result<(), ClientError> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < blocks {
            let count = (blocks - at).min(WRITE_ZEROES_BLOCKS_MAX);
            let lba = lba.saturating_add(at);
            let opcode = io_opcode::WRITE_ZEROES;
            pieces.push(Piece {
                request: 0,
                sqe: Sqe::block_command(opcode, self.namespace.nsid, lba, count as u32, false),
                data: DataPointer::NONE,
                lba,
            });
            at += count;
        }
        self.run(&pieces, 1, "write zeroes").result
    }

    /// Makes what has been written durable.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let sqe = Sqe {
            opcode: io_opcode::FLUSH,
            nsid: self.namespace.nsid,
            ..Sqe::default()
        };
        let piece = Piece {
            request: 0,
            sqe,
            data: DataPointer::NONE,
            lba: 0,
        };
        self.run(&[piece], 1, "flush").result
    }

    /// Any I/O command; `data` is read into or written from as the opcode says, its length is the SGL's.
    /// Returns the completion, whatever its status.
    pub fn passthrough(&mut self, sqe: Sqe, data: &mut [u8]) -> Result<Completion, ClientError> {
        let length = u32::try_from(data.len())
            .map_err(|_| ClientError::Usage("a command's data is less than 4 GiB".into()))?;
        // SAFETY: data is borrowed until the command has completed or the queue has failed.
        let data = unsafe { DataPointer::new(data.as_mut_ptr(), length) };
        self.submit(sqe, data, 0)?;
        let deadline = Instant::now() + self.timeouts.command;
        loop {
            if let Some(completion) = self.completions.pop() {
                return Ok(completion);
            }
            self.turn(deadline, "waiting for a command")?;
        }
    }

    /// Cuts a request into commands.
    fn split(
        &self,
        opcode: u8,
        request: usize,
        lba: u64,
        address: *mut u8,
        length: usize,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), ClientError> {
        let block_size = self.namespace.block_size as usize;
        if length == 0 || length % block_size != 0 {
            return Err(ClientError::Usage(format!(
                "{length} bytes are not whole blocks of {block_size} bytes"
            )));
        }
        let blocks = length / block_size;
        let mut at = 0;
        while at < blocks {
            let count = (blocks - at).min(self.transfer_blocks as usize);
            let lba = lba.saturating_add(at as u64);
            let start = address.wrapping_add(at * block_size);
            // SAFETY: inside of what the caller lent us until run() returns; run() leaves nothing behind.
            let data = unsafe { DataPointer::new(start, (count * block_size) as u32) };
            pieces.push(Piece {
                request,
                sqe: Sqe::block_command(opcode, self.namespace.nsid, lba, count as u32, false),
                data,
                lba,
            });
            at += count;
        }
        Ok(())
    }

    /// Runs commands, as many at a time as fit, until all have ended.
    fn run(&mut self, pieces: &[Piece], requests: usize, what: &'static str) -> BatchOutcome {
        let mut left = vec![0usize; requests];
        for piece in pieces {
            left[piece.request] += 1;
        }
        let mut outcome = BatchOutcome {
            acknowledged: Vec::new(),
            result: Ok(()),
        };
        let (mut next, mut done) = (0, 0);
        let mut deadline = Instant::now() + self.timeouts.command;
        while done < pieces.len() {
            let mut broken = None;
            while next < pieces.len() && self.queue.available() > 0 && broken.is_none() {
                let piece = &pieces[next];
                broken = self.submit(piece.sqe, piece.data, next as u64).err();
                next += 1;
            }
            if broken.is_none() && self.completions.is_empty() {
                broken = self.turn(deadline, "waiting for commands").err();
            }
            for completion in std::mem::take(&mut self.completions) {
                let Some(piece) = pieces.get(completion.token as usize) else {
                    continue;
                };
                done += 1;
                deadline = Instant::now() + self.timeouts.command;
                let status = completion.status;
                if status.is_success() {
                    left[piece.request] -= 1;
                    if left[piece.request] == 0 {
                        outcome.acknowledged.push(piece.request);
                    }
                } else if outcome.result.is_ok() {
                    // Of a queue that has failed, `broken` says more, and replaces it below.
                    let lba = piece.lba;
                    outcome.result = Err(ClientError::Command { what, lba, status });
                }
            }
            if let Some(error) = broken {
                outcome.result = Err(error);
                break;
            }
        }
        outcome
    }

    /// Any failure here leaves the queue failed, so that nothing refers to the caller's memory.
    fn submit(&mut self, sqe: Sqe, data: DataPointer, token: u64) -> Result<(), ClientError> {
        if let Err(error) = self.queue.submit(sqe, data, token) {
            let text = error.to_string();
            let source = self.queue.error().cloned();
            let source = source.unwrap_or(InitiatorError::Unusable(text));
            return Err(self.give_up(source));
        }
        Ok(())
    }

    fn give_up(&mut self, source: InitiatorError) -> ClientError {
        self.queue.fail(source.clone(), &mut self.completions);
        ClientError::Initiator {
            address: self.address,
            source,
        }
    }

    /// Lets both queues work, and waits for something to happen.
    fn turn(&mut self, deadline: Instant, doing: &'static str) -> Result<(), ClientError> {
        self.queue.flush(&mut self.completions);
        self.queue.on_readable(&mut self.completions);
        if !self.completions.is_empty() && self.queue.error().is_none() {
            return Ok(());
        }
        let now_ms = self.started.elapsed().as_millis() as u64;
        self.controller.on_time(now_ms, &mut self.events);
        self.controller.on_readable(&mut self.events);
        for event in std::mem::take(&mut self.events) {
            if let ControllerEvent::Failed(source) = event {
                return Err(self.give_up(source));
            }
        }
        if let Some(source) = self.queue.error().cloned() {
            return Err(self.give_up(source));
        }
        if self.queue.is_ready() && self.queue.outstanding() == 0 {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let timeout_ms = self.timeouts.command.as_millis() as u64;
            return Err(self.give_up(InitiatorError::Timeout { doing, timeout_ms }));
        }
        let queue = (self.queue.socket(), self.queue.wants_write());
        let controller = (self.controller.socket(), self.controller.wants_write());
        wait(&[queue, controller], left.min(TICK));
        Ok(())
    }
}

impl BatchOutcome {
    fn failed(error: ClientError) -> BatchOutcome {
        BatchOutcome {
            acknowledged: Vec::new(),
            result: Err(error),
        }
    }
}
