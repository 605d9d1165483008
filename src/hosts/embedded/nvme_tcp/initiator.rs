//! One queue pair of the initiator over one socket: ICReq, Connect, then commands. Used by the controller
//! (admin queue), by a core's link to a peer (I/O queues) and by the blocking client. Knows no namespaces.

use thiserror::Error;

use super::buffer::{AlignedBuf, DataPointer};
use super::command::{
    CONNECT_DATA_BYTES, ConnectCommand, ConnectData, Cqe, NvmeStatus, Sgl, Sqe, TransferDirection,
};
use super::pdu::{
    DataHeader, Digests, Fault, IcReq, IcResp, OFFSET_ALIGNMENT, OFFSET_COMMAND_ID,
    OFFSET_MAX_H2C_DATA, OFFSET_VERSION, PduHeader, R2t, Sender, TermReq,
};
use super::stream::{NO_OWNER, Outgoing, ReceiveError, Received, Receiver, SendQueue, Socket};

/// In-capsule data of admin queues (NVMe/TCP Transport).
pub const ADMIN_CAPSULE_BYTES: u32 = 8192;
/// Offset of the command id in a response capsule.
const OFFSET_RESPONSE_COMMAND_ID: u32 = 20;
/// Offset of the digest bits in ICResp.
const OFFSET_DIGESTS: u32 = 11;
/// MAXH2CDATA may not be less (NVMe/TCP Transport, ICResp).
const MAX_H2C_DATA_MIN: u32 = 4096;

/// What a queue is connected with.
#[derive(Clone, Debug)]
pub struct QueueParameters {
    /// 0 is the admin queue.
    pub queue_id: u16,
    /// Entries; one less can be outstanding. At least 2.
    pub entries: u16,
    /// 0xffff on the admin queue, else what the admin queue's Connect gave.
    pub controller_id: u16,
    pub subsystem_nqn: String,
    pub host_nqn: String,
    pub host_id: [u8; 16],
    /// KATO (admin queue only); 0 switches it off.
    pub keep_alive_ms: u32,
    pub header_digest: bool,
    pub data_digest: bool,
    /// Writes up to this long travel in the command's capsule.
    pub in_capsule_bytes: u32,
}

/// Why a queue does not work (any more).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InitiatorError {
    #[error("connection lost: {0}")]
    Closed(String),
    #[error("the target broke the protocol: {0}")]
    Protocol(#[from] Fault),
    #[error("the target ended the connection: fatal error {error}, information {information:#x}")]
    Terminated { error: u16, information: u32 },
    #[error("Connect to {subsystem_nqn} refused: {status}, parameter {result:#x}")]
    Refused {
        subsystem_nqn: String,
        status: NvmeStatus,
        result: u32,
    },
    #[error("{step} failed: {status}")]
    Command {
        step: &'static str,
        status: NvmeStatus,
    },
    #[error("no answer within {timeout_ms} ms while {doing}")]
    Timeout {
        doing: &'static str,
        timeout_ms: u64,
    },
    #[error("{0}")]
    Unusable(String),
}

/// Why a command was not taken. Nothing has been done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SubmitError {
    #[error("all entries of the queue are in use")]
    Busy,
    #[error("the queue is not connected")]
    NotReady,
}

/// A command's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As given to [`InitiatorQueue::submit`].
    pub token: u64,
    pub status: NvmeStatus,
    /// Dwords 0 and 1 of the completion.
    pub result: u64,
}

impl Completion {
    pub fn dword0(&self) -> u32 {
        self.result as u32
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    AwaitIcResp,
    AwaitConnect,
    Ready,
    Failed(InitiatorError),
}

#[derive(Clone, Copy)]
struct Slot {
    in_use: bool,
    token: u64,
    data: DataPointer,
    direction: TransferDirection,
    /// PDUs that refer to the data and have not been sent yet.
    unsent: u32,
    /// Reads: data received. Writes: data that R2Ts have asked for.
    moved_bytes: u32,
    in_capsule: bool,
    digest_error: bool,
    /// The answer has come, while data of the command is still being sent.
    answer: Option<(NvmeStatus, u64)>,
}

const FREE_SLOT: Slot = Slot {
    in_use: false,
    token: 0,
    data: DataPointer::NONE,
    direction: TransferDirection::None,
    unsent: 0,
    moved_bytes: 0,
    in_capsule: false,
    digest_error: false,
    answer: None,
};

/// Token of the queue's own Connect.
const CONNECT_TOKEN: u64 = u64::MAX;

/// One queue pair. Owned by whoever owns the socket's readiness; after `submit`, `on_readable` or
/// `on_writable`, [`wants_write`](Self::wants_write) says whether the socket is full.
pub struct InitiatorQueue<S: Socket> {
    socket: Option<S>,
    parameters: QueueParameters,
    state: State,
    receiver: Receiver,
    /// The command whose data is arriving, how long that is, and whether it is then over.
    receiving: Option<(u16, u32, bool)>,
    sender: SendQueue,
    finished: Vec<u16>,
    digests: Digests,
    alignment: u8,
    max_h2c_data_bytes: u32,
    slots: Vec<Slot>,
    free: Vec<u16>,
    controller_id: u16,
    connect_data: AlignedBuf,
}

impl<S: Socket> InitiatorQueue<S> {
    /// Begins on a connected socket: queues the ICReq; [`flush`](Self::flush) sends it.
    pub fn new(socket: S, parameters: QueueParameters) -> std::io::Result<InitiatorQueue<S>> {
        let count = parameters.entries.clamp(2, 0x4000) - 1;
        let mut queue = InitiatorQueue {
            socket: Some(socket),
            state: State::AwaitIcResp,
            receiver: Receiver::new(Sender::Controller),
            receiving: None,
            sender: SendQueue::new(2 * usize::from(count) + 8),
            finished: Vec::with_capacity(usize::from(count)),
            digests: Digests::default(),
            alignment: 0,
            max_h2c_data_bytes: MAX_H2C_DATA_MIN,
            slots: vec![FREE_SLOT; usize::from(count)],
            free: (0..count).rev().collect(),
            controller_id: parameters.controller_id,
            connect_data: AlignedBuf::new(CONNECT_DATA_BYTES)?,
            parameters,
        };
        let request = PduHeader::IcReq(IcReq {
            version: 0,
            alignment: 0,
            digests: Digests {
                header: queue.parameters.header_digest,
                data: queue.parameters.data_digest,
            },
            max_r2t: 0,
        });
        queue.push(&request, DataPointer::NONE, NO_OWNER);
        Ok(queue)
    }

    pub fn is_ready(&self) -> bool {
        self.state == State::Ready
    }

    /// Why it has failed, once it has.
    pub fn error(&self) -> Option<&InitiatorError> {
        match &self.state {
            State::Failed(error) => Some(error),
            _ => None,
        }
    }

    /// CNTLID, once connected.
    pub fn controller_id(&self) -> u16 {
        self.controller_id
    }

    pub fn socket(&self) -> Option<&S> {
        self.socket.as_ref()
    }

    /// What the controller has agreed to; none before the queue is ready.
    pub fn digests(&self) -> Digests {
        self.digests
    }

    /// Commands that have not been completed.
    pub fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Commands that can be submitted now.
    pub fn available(&self) -> usize {
        if self.is_ready() { self.free.len() } else { 0 }
    }

    /// Writes up to this long travel in the capsule.
    pub fn in_capsule_bytes(&self) -> u32 {
        self.parameters.in_capsule_bytes
    }

    pub fn wants_write(&self) -> bool {
        self.socket.is_some() && !self.sender.is_empty()
    }

    /// Queues a command; [`flush`](Self::flush) sends it. Command id, SGL and PSDT are filled in here. The
    /// opcode says which way `data` goes; it must stay until the command's completion has been handed out.
    pub fn submit(&mut self, sqe: Sqe, data: DataPointer, token: u64) -> Result<(), SubmitError> {
        if !self.is_ready() {
            return Err(SubmitError::NotReady);
        }
        self.start(sqe, data, token)
    }

    fn start(&mut self, mut sqe: Sqe, data: DataPointer, token: u64) -> Result<(), SubmitError> {
        let index = self.free.pop().ok_or(SubmitError::Busy)?;
        let direction = sqe.direction();
        let from_host = direction == TransferDirection::HostToController;
        let in_capsule = from_host
            && !data.is_empty()
            && data.length_bytes() <= self.parameters.in_capsule_bytes;
        sqe.command_id = index;
        sqe.flags |= Sqe::FLAGS_SGL;
        sqe.sgl = if in_capsule {
            Sgl::in_capsule(data.length_bytes())
        } else {
            Sgl::transport(data.length_bytes())
        };
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            *slot = Slot {
                in_use: true,
                token,
                data,
                direction,
                unsent: 1,
                in_capsule,
                ..FREE_SLOT
            };
        }
        let payload = if in_capsule { data } else { DataPointer::NONE };
        self.push(&PduHeader::CapsuleCmd(sqe.emit()), payload, index);
        Ok(())
    }

    /// Sends what is queued. Commands whose last byte was awaited are completed here.
    pub fn flush(&mut self, completions: &mut Vec<Completion>) {
        let Some(socket) = self.socket.as_mut() else {
            return;
        };
        let result = self.sender.flush(socket, &mut self.finished);
        let mut finished = std::mem::take(&mut self.finished);
        for index in finished.drain(..) {
            if let Some(slot) = self.slots.get_mut(usize::from(index)) {
                slot.unsent = slot.unsent.saturating_sub(1);
                self.finish_if_over(index, completions);
            }
        }
        self.finished = finished;
        if let Err(error) = result {
            self.fail(InitiatorError::Closed(error.to_string()), completions);
        }
    }

    /// The socket can take more.
    pub fn on_writable(&mut self, completions: &mut Vec<Completion>) {
        self.flush(completions);
    }

    /// Receives all that has arrived. When the connection dies, every command is completed with
    /// [`NvmeStatus::HOST_PATH_ERROR`] and no data of theirs is touched any more.
    pub fn on_readable(&mut self, completions: &mut Vec<Completion>) {
        while let Some(socket) = self.socket.as_mut() {
            let result = match self.receiver.next(socket) {
                Ok(Received::Nothing) => break,
                Ok(Received::Header {
                    header,
                    payload_bytes,
                }) => self.on_header(&header, payload_bytes, completions),
                Ok(Received::Payload { digest_matches }) => {
                    self.on_payload(digest_matches, completions);
                    Ok(())
                }
                Err(ReceiveError::Fault(fault)) => Err(InitiatorError::Protocol(fault)),
                Err(ReceiveError::Closed(error)) => Err(InitiatorError::Closed(error.to_string())),
            };
            if let Err(error) = result {
                if let InitiatorError::Protocol(fault) = &error {
                    self.send_term_req(*fault);
                }
                self.fail(error, completions);
            }
        }
        self.flush(completions);
    }

    /// Gives up: closes the socket and completes everything with [`NvmeStatus::HOST_PATH_ERROR`]. After
    /// this no data of any command is touched.
    pub fn fail_all(&mut self, completions: &mut Vec<Completion>) {
        self.fail(InitiatorError::Closed("closed here".into()), completions);
    }

    /// As [`fail_all`](Self::fail_all), with the reason to remember. The first reason stays.
    pub fn fail(&mut self, error: InitiatorError, completions: &mut Vec<Completion>) {
        self.socket = None;
        self.sender.clear();
        self.receiving = None;
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Failed(error);
        }
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.in_use {
                if slot.token != CONNECT_TOKEN {
                    completions.push(Completion {
                        token: slot.token,
                        status: NvmeStatus::HOST_PATH_ERROR,
                        result: 0,
                    });
                }
                *slot = FREE_SLOT;
                self.free.push(index as u16);
            }
        }
    }

    /// Says goodbye as well as it still can.
    fn send_term_req(&mut self, fault: Fault) {
        let term = PduHeader::H2cTermReq(TermReq::new(fault, self.receiver.last_header()));
        let digests = Digests::default();
        self.sender.push(Outgoing::new(
            &term,
            digests,
            0,
            DataPointer::NONE,
            NO_OWNER,
        ));
        if let Some(socket) = self.socket.as_mut() {
            // The connection ends either way.
            let _ = self.sender.flush(socket, &mut Vec::new());
        }
    }

    fn push(&mut self, header: &PduHeader, data: DataPointer, owner: u16) {
        let outgoing = Outgoing::new(header, self.digests, self.alignment, data, owner);
        self.sender.push(outgoing);
    }

    fn on_header(
        &mut self,
        header: &PduHeader,
        payload_bytes: u32,
        completions: &mut Vec<Completion>,
    ) -> Result<(), InitiatorError> {
        match (header, &self.state) {
            (PduHeader::C2hTermReq(term), _) => Err(InitiatorError::Terminated {
                error: term.error,
                information: term.information,
            }),
            (PduHeader::IcResp(response), State::AwaitIcResp) => self.on_ic_resp(response),
            (_, State::AwaitIcResp) => Err(Fault::sequence().into()),
            (PduHeader::CapsuleResp(entry), _) => {
                let cqe = Cqe::parse(entry);
                let slot = self.slot(cqe.command_id);
                let slot = slot.filter(|slot| slot.answer.is_none());
                let slot = slot.ok_or(Fault::field(OFFSET_RESPONSE_COMMAND_ID))?;
                slot.answer = Some((cqe.status, cqe.result));
                if slot.token == CONNECT_TOKEN {
                    if slot.unsent > 0 {
                        return Err(Fault::sequence().into());
                    }
                    return self.on_connected(&cqe);
                }
                self.finish_if_over(cqe.command_id, completions);
                Ok(())
            }
            (PduHeader::C2hData(data), _) => Ok(self.on_data(data, payload_bytes)?),
            (PduHeader::R2t(ready), _) => Ok(self.on_r2t(ready)?),
            _ => Err(Fault::sequence().into()),
        }
    }

    fn slot(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots
            .get_mut(usize::from(index))
            .filter(|slot| slot.in_use)
    }

    fn on_ic_resp(&mut self, response: &IcResp) -> Result<(), InitiatorError> {
        if response.version != 0 {
            return Err(Fault::unsupported(OFFSET_VERSION).into());
        }
        if response.alignment > 31 {
            return Err(Fault::field(OFFSET_ALIGNMENT).into());
        }
        let asked = (self.parameters.header_digest, self.parameters.data_digest);
        if response.digests.header && !asked.0 || response.digests.data && !asked.1 {
            return Err(Fault::field(OFFSET_DIGESTS).into());
        }
        if response.max_h2c_data_bytes < MAX_H2C_DATA_MIN {
            return Err(Fault::field(OFFSET_MAX_H2C_DATA).into());
        }
        self.digests = response.digests;
        self.receiver.set_digests(response.digests);
        self.alignment = response.alignment;
        self.max_h2c_data_bytes = response.max_h2c_data_bytes / 4 * 4;
        self.state = State::AwaitConnect;
        let data = ConnectData {
            host_id: self.parameters.host_id,
            controller_id: self.parameters.controller_id,
            subsystem_nqn: self.parameters.subsystem_nqn.clone(),
            host_nqn: self.parameters.host_nqn.clone(),
        };
        let out = self.connect_data.as_mut_slice();
        out[..CONNECT_DATA_BYTES].copy_from_slice(&data.emit());
        let command = ConnectCommand {
            record_format: 0,
            queue_id: self.parameters.queue_id,
            queue_size: self.slots.len() as u16,
            // Nothing here looks at SQHD: never more than a queue's worth is outstanding.
            disable_flow_control: self.parameters.queue_id != 0,
            keep_alive_ms: self.parameters.keep_alive_ms,
        };
        // SAFETY: the buffer lives as long as the queue and is not touched after this.
        let data =
            unsafe { DataPointer::new(self.connect_data.as_ptr(), CONNECT_DATA_BYTES as u32) };
        // Connect's data may always travel in its capsule, whatever the I/O queue's limit.
        let limit = self.parameters.in_capsule_bytes;
        self.parameters.in_capsule_bytes = limit.max(CONNECT_DATA_BYTES as u32);
        let started = self.start(command.emit(), data, CONNECT_TOKEN);
        self.parameters.in_capsule_bytes = limit;
        started.map_err(|error| InitiatorError::Unusable(error.to_string()))
    }

    fn on_connected(&mut self, cqe: &Cqe) -> Result<(), InitiatorError> {
        if !cqe.status.is_success() {
            return Err(InitiatorError::Refused {
                subsystem_nqn: self.parameters.subsystem_nqn.clone(),
                status: cqe.status,
                result: cqe.result as u32,
            });
        }
        if cqe.result & 0xffff_0000 != 0 {
            return Err(InitiatorError::Unusable(
                "the target requires authentication, which this initiator does not have".into(),
            ));
        }
        self.controller_id = cqe.result as u16;
        if let Some(slot) = self.slots.get_mut(usize::from(cqe.command_id)) {
            *slot = FREE_SLOT;
            self.free.push(cqe.command_id);
        }
        self.state = State::Ready;
        Ok(())
    }

    fn on_data(&mut self, data: &DataHeader, payload_bytes: u32) -> Result<(), Fault> {
        let index = data.command_id;
        let slot = self.slot(index).filter(|slot| slot.answer.is_none());
        let slot = slot.ok_or(Fault::field(OFFSET_COMMAND_ID))?;
        if slot.direction != TransferDirection::ControllerToHost {
            return Err(Fault::field(OFFSET_COMMAND_ID));
        }
        if data.offset_bytes != slot.moved_bytes {
            return Err(Fault::out_of_range());
        }
        let place = slot.data.part(data.offset_bytes, payload_bytes);
        let place = place.ok_or(Fault::out_of_range())?;
        self.receiving = Some((index, payload_bytes, data.success));
        self.receiver.receive_into(place);
        Ok(())
    }

    fn on_payload(&mut self, digest_matches: bool, completions: &mut Vec<Completion>) {
        let Some((index, length_bytes, success)) = self.receiving.take() else {
            return;
        };
        let Some(slot) = self.slot(index) else {
            return;
        };
        slot.moved_bytes += length_bytes;
        slot.digest_error |= !digest_matches;
        if success {
            slot.answer = Some((NvmeStatus::SUCCESS, 0));
        }
        self.finish_if_over(index, completions);
    }

    fn on_r2t(&mut self, ready: &R2t) -> Result<(), Fault> {
        let max_h2c_data_bytes = self.max_h2c_data_bytes;
        let slot = self
            .slot(ready.command_id)
            .filter(|slot| slot.answer.is_none());
        let slot = slot.ok_or(Fault::field(OFFSET_COMMAND_ID))?;
        if slot.direction != TransferDirection::HostToController || slot.in_capsule {
            return Err(Fault::field(OFFSET_COMMAND_ID));
        }
        // MAXR2T allowed for one at a time: the data of the last has not even been sent.
        if slot.unsent > 0 {
            return Err(Fault::limit());
        }
        if ready.offset_bytes != slot.moved_bytes || ready.length_bytes == 0 {
            return Err(Fault::out_of_range());
        }
        let all = slot.data.part(ready.offset_bytes, ready.length_bytes);
        let all = all.ok_or(Fault::out_of_range())?;
        slot.moved_bytes += ready.length_bytes;
        slot.unsent += ready.length_bytes.div_ceil(max_h2c_data_bytes);
        let mut at = 0;
        while at < ready.length_bytes {
            let length_bytes = (ready.length_bytes - at).min(max_h2c_data_bytes);
            let part = all.part(at, length_bytes).ok_or(Fault::out_of_range())?;
            let header = PduHeader::H2cData(DataHeader {
                command_id: ready.command_id,
                transfer_tag: ready.transfer_tag,
                offset_bytes: ready.offset_bytes + at,
                length_bytes,
                last: at + length_bytes == ready.length_bytes,
                success: false,
            });
            self.push(&header, part, ready.command_id);
            at += length_bytes;
        }
        Ok(())
    }

    /// Completes a command that has been answered and whose data nobody sends any more.
    fn finish_if_over(&mut self, index: u16, completions: &mut Vec<Completion>) {
        let Some(slot) = self.slot(index) else {
            return;
        };
        let (Some((mut status, result)), 0) = (slot.answer, slot.unsent) else {
            return;
        };
        let is_short = slot.direction == TransferDirection::ControllerToHost
            && slot.moved_bytes < slot.data.length_bytes();
        if status.is_success() && (slot.digest_error || is_short) {
            status = NvmeStatus::TRANSIENT_TRANSPORT_ERROR;
        }
        completions.push(Completion {
            token: slot.token,
            status,
            result,
        });
        *slot = FREE_SLOT;
        self.free.push(index);
    }
}

#[cfg(test)]
mod tests;
