//! PDUs over a byte stream: the receiving and the sending half of a connection, for target and initiator.
//! Headers pass through a small staging buffer; payload goes straight to and from where the owner says.
//! Knows neither commands nor queues.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};

use super::buffer::DataPointer;
use super::pdu::{
    COMMON_HEADER_BYTES, CommonHeader, DIGEST_BYTES, Digests, EMIT_BYTES_MAX, Fault,
    HEADER_BYTES_MAX, PduHeader, Sender, TERM_HEADER_BYTES_MAX, data_digest,
};

/// A connected stream that never blocks: `WouldBlock` says "later", `Ok(0)` of `recv` the end.
pub trait Socket {
    fn recv(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    fn send_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
}

/// The stream must have been made non-blocking.
impl Socket for std::net::TcpStream {
    fn recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read(buffer)
    }

    fn send_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_vectored(slices)
    }
}

/// Calls again after EINTR; None for `WouldBlock`.
fn attempt(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Why nothing more can be received.
#[derive(Debug)]
pub enum ReceiveError {
    /// The other side broke the protocol; it is to be told so.
    Fault(Fault),
    /// The stream ended or failed.
    Closed(io::Error),
}

/// What has arrived.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // handed over once per PDU, on the stack
pub enum Received {
    /// A header. When `payload_bytes` is not 0, [`Receiver::receive_into`] must follow.
    Header {
        header: PduHeader,
        payload_bytes: u32,
    },
    /// The payload of the last header is where it was wanted.
    Payload { digest_matches: bool },
    /// Nothing more for now.
    Nothing,
}

const STAGING_BYTES: usize = 1024;
const _: () = assert!(STAGING_BYTES >= HEADER_BYTES_MAX);

#[derive(Clone, Copy)]
enum Phase {
    Header,
    /// A header has been handed out, its payload has no place yet.
    Placeless {
        payload_bytes: u32,
        digest: bool,
    },
    Payload {
        data: DataPointer,
        received_bytes: u32,
        digest: bool,
    },
    Digest {
        data: DataPointer,
    },
}

/// The receiving half.
pub struct Receiver {
    sender: Sender,
    digests: Digests,
    staging: Box<[u8; STAGING_BYTES]>,
    start: usize,
    end: usize,
    /// Where in the staging buffer the header handed out last (or refused) begins, and its length.
    last_header: (usize, usize),
    phase: Phase,
}

impl Receiver {
    /// Receives what `sender` sends.
    pub fn new(sender: Sender) -> Receiver {
        Receiver {
            sender,
            digests: Digests::default(),
            staging: Box::new([0; STAGING_BYTES]),
            start: 0,
            end: 0,
            last_header: (0, 0),
            phase: Phase::Header,
        }
    }

    /// From the next PDU on, these digests are expected.
    pub fn set_digests(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// The header handed out or refused last, for a TermReq. Only valid until the next call of `next`.
    pub fn last_header(&self) -> &[u8] {
        let (start, length) = self.last_header;
        let length = length.min(TERM_HEADER_BYTES_MAX);
        self.staging.get(start..start + length).unwrap_or(&[])
    }

    /// Says where the payload of the header just received goes; exactly as long as it was announced.
    pub fn receive_into(&mut self, data: DataPointer) {
        if let Phase::Placeless {
            payload_bytes,
            digest,
        } = self.phase
        {
            debug_assert_eq!(payload_bytes, data.length_bytes());
            self.phase = Phase::Payload {
                data,
                received_bytes: 0,
                digest,
            };
        }
    }

    /// Receives until there is something to tell.
    pub fn next<S: Socket>(&mut self, socket: &mut S) -> Result<Received, ReceiveError> {
        loop {
            let staged = self.end - self.start;
            match self.phase {
                Phase::Header => {
                    if let Some(received) = self.parse_staged().map_err(ReceiveError::Fault)? {
                        return Ok(received);
                    }
                }
                Phase::Placeless { .. } => return Ok(Received::Nothing),
                Phase::Payload {
                    data,
                    received_bytes,
                    digest,
                } => {
                    let missing = data.length_bytes() - received_bytes;
                    if missing == 0 {
                        if digest {
                            self.phase = Phase::Digest { data };
                            continue;
                        }
                        self.phase = Phase::Header;
                        return Ok(Received::Payload {
                            digest_matches: true,
                        });
                    }
                    let Some(rest) = data.part(received_bytes, missing) else {
                        return Err(ReceiveError::Fault(Fault::out_of_range()));
                    };
                    // SAFETY: whoever called receive_into() keeps the place for us until the payload
                    // is in it, and touches it only then.
                    let rest = unsafe { rest.as_mut_slice() };
                    let count = if staged > 0 {
                        let count = staged.min(rest.len());
                        rest[..count]
                            .copy_from_slice(&self.staging[self.start..self.start + count]);
                        self.start += count;
                        count
                    } else {
                        match Receiver::recv(socket, rest)? {
                            Some(count) => count,
                            None => return Ok(Received::Nothing),
                        }
                    };
                    self.phase = Phase::Payload {
                        data,
                        received_bytes: received_bytes + count as u32,
                        digest,
                    };
                    continue;
                }
                Phase::Digest { data } => {
                    let at = self.start;
                    if let Some(digest) = self.staging[at..self.end].first_chunk::<DIGEST_BYTES>() {
                        // SAFETY: as above, and all of it has been received.
                        let digest_matches = *digest == data_digest(unsafe { data.as_slice() });
                        self.start += DIGEST_BYTES;
                        self.phase = Phase::Header;
                        return Ok(Received::Payload { digest_matches });
                    }
                }
            }
            self.make_room();
            match Receiver::recv(socket, &mut self.staging[self.end..])? {
                Some(count) => self.end += count,
                None => return Ok(Received::Nothing),
            }
        }
    }

    /// A header if all of it is staged.
    fn parse_staged(&mut self) -> Result<Option<Received>, Fault> {
        let staged = &self.staging[self.start..self.end];
        let Some(first) = staged.first_chunk::<COMMON_HEADER_BYTES>() else {
            return Ok(None);
        };
        self.last_header = (self.start, COMMON_HEADER_BYTES);
        let common = CommonHeader::parse(first, self.sender, self.digests)?;
        let length = common.bytes_before_payload();
        if staged.len() < length {
            return Ok(None);
        }
        self.last_header = (self.start, usize::from(staged[2]).min(length));
        let header = PduHeader::parse(&common, staged)?;
        self.start += length;
        let payload_bytes = common.payload_bytes();
        if payload_bytes > 0 {
            self.phase = Phase::Placeless {
                payload_bytes,
                digest: common.has_payload_digest(),
            };
        }
        Ok(Some(Received::Header {
            header,
            payload_bytes,
        }))
    }

    fn make_room(&mut self) {
        if self.start > 0 {
            self.staging.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    fn recv<S: Socket>(socket: &mut S, buffer: &mut [u8]) -> Result<Option<usize>, ReceiveError> {
        match attempt(|| socket.recv(buffer)) {
            Ok(Some(0)) => Err(ReceiveError::Closed(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => Ok(count.map(|count| count.min(buffer.len()))),
            Err(error) => Err(ReceiveError::Closed(error)),
        }
    }
}

/// Owner of an [`Outgoing`] of which nobody wants to hear when it has been sent.
pub const NO_OWNER: u16 = u16::MAX;

/// Bytes that may follow a payload: its digest and a response capsule with header digest.
const TAIL_BYTES_MAX: usize = 32;

/// What is to be sent in one piece: a PDU, and possibly a second small one behind it.
pub struct Outgoing {
    head: [u8; EMIT_BYTES_MAX],
    head_bytes: u16,
    payload: DataPointer,
    tail: [u8; TAIL_BYTES_MAX],
    tail_bytes: u8,
    /// Told back by [`SendQueue::flush`] when the last byte has gone.
    pub owner: u16,
}

impl Outgoing {
    /// A PDU with `payload` behind it. The payload must stay as it is until the owner is told.
    pub fn new(
        header: &PduHeader,
        digests: Digests,
        alignment: u8,
        payload: DataPointer,
        owner: u16,
    ) -> Outgoing {
        let mut outgoing = Outgoing {
            head: [0; EMIT_BYTES_MAX],
            head_bytes: 0,
            payload,
            tail: [0; TAIL_BYTES_MAX],
            tail_bytes: 0,
            owner,
        };
        let length = payload.length_bytes();
        outgoing.head_bytes = header.emit(digests, alignment, length, &mut outgoing.head) as u16;
        if length > 0 && digests.data {
            // SAFETY: whoever sends a payload keeps it unchanged until it has been sent.
            outgoing.append(&data_digest(unsafe { payload.as_slice() }));
        }
        outgoing
    }

    /// Puts a PDU without payload, no longer than a response capsule, behind the first.
    pub fn followed_by(mut self, header: &PduHeader, digests: Digests) -> Outgoing {
        let mut head = [0; EMIT_BYTES_MAX];
        let length = header.emit(digests, 0, 0, &mut head);
        self.append(&head[..length]);
        self
    }

    fn append(&mut self, bytes: &[u8]) {
        let at = usize::from(self.tail_bytes);
        self.tail[at..at + bytes.len()].copy_from_slice(bytes);
        self.tail_bytes += bytes.len() as u8;
    }

    fn parts(&self) -> [&[u8]; 3] {
        [
            &self.head[..usize::from(self.head_bytes)],
            // SAFETY: as in new().
            unsafe { self.payload.as_slice() },
            &self.tail[..usize::from(self.tail_bytes)],
        ]
    }

    fn length_bytes(&self) -> usize {
        usize::from(self.head_bytes)
            + self.payload.length_bytes() as usize
            + usize::from(self.tail_bytes)
    }
}

/// At most so many PDUs leave in one call of the socket.
const BATCH: usize = 16;

/// The sending half.
pub struct SendQueue {
    queue: VecDeque<Outgoing>,
    /// Bytes of the first one that have been sent.
    sent_bytes: usize,
}

impl SendQueue {
    /// Room for `capacity` PDUs before memory must be allocated.
    pub fn new(capacity: usize) -> SendQueue {
        SendQueue {
            queue: VecDeque::with_capacity(capacity),
            sent_bytes: 0,
        }
    }

    pub fn reserve(&mut self, capacity: usize) {
        self.queue.reserve(capacity);
    }

    pub fn push(&mut self, outgoing: Outgoing) {
        self.queue.push_back(outgoing);
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Forgets everything. Nothing of it is read any more.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.sent_bytes = 0;
    }

    /// Sends until all is sent or the socket is full. The owners of what has been sent are appended to
    /// `finished`, in order.
    pub fn flush<S: Socket>(&mut self, socket: &mut S, finished: &mut Vec<u16>) -> io::Result<()> {
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); BATCH * 3];
            let mut used = 0;
            let mut skip = self.sent_bytes;
            for outgoing in self.queue.iter().take(BATCH) {
                for part in outgoing.parts() {
                    let skipped = skip.min(part.len());
                    skip -= skipped;
                    if skipped < part.len() {
                        slices[used] = IoSlice::new(&part[skipped..]);
                        used += 1;
                    }
                }
            }
            match attempt(|| socket.send_vectored(&slices[..used]))? {
                None => return Ok(()),
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(count) => self.sent_bytes += count,
            }
            while let Some(first) = self.queue.front() {
                let length = first.length_bytes();
                if self.sent_bytes < length {
                    break;
                }
                self.sent_bytes -= length;
                if first.owner != NO_OWNER {
                    finished.push(first.owner);
                }
                self.queue.pop_front();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::hosts::embedded::nvme_tcp::buffer::AlignedBuf;
    use crate::hosts::embedded::nvme_tcp::pdu::DataHeader;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    /// One end of an in-memory connection.
    pub struct Pipe {
        incoming: Arc<Mutex<Lane>>,
        outgoing: Arc<Mutex<Lane>>,
        /// At most so many bytes per call.
        pub chunk_bytes: usize,
    }

    #[derive(Default)]
    struct Lane {
        bytes: VecDeque<u8>,
        closed: bool,
        /// Bytes that fit before the sender has to wait; 0 means no limit.
        room_bytes: usize,
    }

    /// Two ends of an in-memory connection; `room_bytes` as a socket's buffer (0: any amount).
    pub fn pipe(room_bytes: usize) -> (Pipe, Pipe) {
        let lane = || {
            Arc::new(Mutex::new(Lane {
                room_bytes,
                ..Lane::default()
            }))
        };
        let (there, back) = (lane(), lane());
        let end = |incoming: &Arc<Mutex<Lane>>, outgoing: &Arc<Mutex<Lane>>| Pipe {
            incoming: incoming.clone(),
            outgoing: outgoing.clone(),
            chunk_bytes: usize::MAX,
        };
        (end(&back, &there), end(&there, &back))
    }

    impl Drop for Pipe {
        fn drop(&mut self) {
            self.outgoing.lock().unwrap().closed = true;
            self.incoming.lock().unwrap().closed = true;
        }
    }

    impl Socket for Pipe {
        fn recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let mut lane = self.incoming.lock().unwrap();
            if lane.bytes.is_empty() {
                return if lane.closed {
                    Ok(0)
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                };
            }
            let count = buffer.len().min(lane.bytes.len()).min(self.chunk_bytes);
            for (to, from) in buffer.iter_mut().zip(lane.bytes.drain(..count)) {
                *to = from;
            }
            Ok(count)
        }

        fn send_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
            let mut lane = self.outgoing.lock().unwrap();
            if lane.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let room = if lane.room_bytes == 0 {
                usize::MAX
            } else {
                lane.room_bytes.saturating_sub(lane.bytes.len())
            };
            if room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let mut left = room.min(self.chunk_bytes);
            let mut count = 0;
            for slice in slices {
                let part = slice.len().min(left);
                lane.bytes.extend(&slice[..part]);
                left -= part;
                count += part;
            }
            Ok(count)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_sent_arrives_however_the_stream_is_cut(
            lengths in prop::collection::vec(1u32..20_000, 1..8),
            header in any::<bool>(), data in any::<bool>(),
            room_bytes in 1usize..5000, chunk_bytes in 1usize..5000, alignment in 0u8..32,
        ) {
            let digests = Digests { header, data };
            let (mut near, mut far) = pipe(room_bytes);
            near.chunk_bytes = chunk_bytes;
            far.chunk_bytes = chunk_bytes;
            let mut source = AlignedBuf::new(20_000).unwrap();
            for (index, byte) in source.as_mut_slice().iter_mut().enumerate() {
                *byte = (index * 7 + index / 251) as u8;
            }
            let mut queue = SendQueue::new(8);
            let payload_header = |length_bytes| PduHeader::H2cData(DataHeader {
                command_id: 1, transfer_tag: 2, offset_bytes: 0, length_bytes, last: true, success: false,
            });
            for (owner, length) in lengths.iter().enumerate() {
                // SAFETY: source outlives the queue and is not written to.
                let payload = unsafe { DataPointer::new(source.as_ptr(), *length) };
                let header = payload_header(*length);
                queue.push(Outgoing::new(&header, digests, alignment, payload, owner as u16));
            }
            let mut receiver = Receiver::new(Sender::Host);
            receiver.set_digests(digests);
            let target = AlignedBuf::new(20_000).unwrap();
            let mut finished = Vec::new();
            let mut arrived = Vec::new();
            let mut announced = 0;
            while arrived.len() < lengths.len() {
                queue.flush(&mut near, &mut finished).unwrap();
                loop {
                    match receiver.next(&mut far).unwrap() {
                        Received::Nothing => break,
                        Received::Header { header, payload_bytes } => {
                            prop_assert_eq!(header, payload_header(payload_bytes));
                            announced = payload_bytes;
                            // SAFETY: target outlives the receiver.
                            receiver.receive_into(unsafe { DataPointer::new(target.as_ptr(), payload_bytes) });
                        }
                        Received::Payload { digest_matches } => {
                            prop_assert!(digest_matches);
                            let length = announced as usize;
                            prop_assert!(target.as_slice()[..length] == source.as_slice()[..length]);
                            arrived.push(announced);
                        }
                    }
                }
            }
            prop_assert_eq!(&arrived, &lengths);
            prop_assert_eq!(finished, (0..lengths.len() as u16).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_payload_changed_on_the_way_does_not_match_its_digest() {
        let digests = Digests {
            header: false,
            data: true,
        };
        let (mut near, mut far) = pipe(0);
        let mut source = AlignedBuf::new(4096).unwrap();
        // SAFETY: source outlives the queue.
        let payload = unsafe { DataPointer::new(source.as_ptr(), 512) };
        let header = PduHeader::CapsuleCmd([1; 64]);
        let mut queue = SendQueue::new(1);
        queue.push(Outgoing::new(&header, digests, 0, payload, 0));
        source.as_mut_slice()[100] ^= 1;
        queue.flush(&mut near, &mut Vec::new()).unwrap();
        let mut receiver = Receiver::new(Sender::Host);
        receiver.set_digests(digests);
        receiver.next(&mut far).unwrap();
        let target = AlignedBuf::new(4096).unwrap();
        // SAFETY: target outlives the receiver.
        receiver.receive_into(unsafe { DataPointer::new(target.as_ptr(), 512) });
        let received = receiver.next(&mut far).unwrap();
        assert!(matches!(
            received,
            Received::Payload {
                digest_matches: false
            }
        ));
    }
}
