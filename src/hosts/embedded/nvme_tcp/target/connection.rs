//! One connection of the target: from ICReq to Connect to a queue that executes commands. Driven by
//! [`super::TargetCore`]; asks the backend for I/O. Knows no disks, and of other connections only what
//! the shared state says.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;

use tracing::{debug, warn};

use super::admin::AdminSession;
use super::association::ControllerLink;
use super::slot::{SlotState, SlotTable};
use super::state::{SharedTarget, lock};
use super::subsystem::{ListenerAddress, Namespace};
use super::{Backend, RequestHandle, TargetOptions};
use crate::hosts::embedded::nvme_tcp::buffer::{BufferPool, DataPointer};
use crate::hosts::embedded::nvme_tcp::command::{
    Cqe, NvmeStatus, Sqe, TransferDirection, admin_opcode, fabrics_type,
};
use crate::hosts::embedded::nvme_tcp::pdu::{
    DataHeader, Digests, Fault, IcReq, IcResp, OFFSET_ALIGNMENT, OFFSET_COMMAND_ID,
    OFFSET_TRANSFER_TAG, OFFSET_VERSION, PduHeader, Sender, TermReq,
};
use crate::hosts::embedded::nvme_tcp::stream::{
    NO_OWNER, Outgoing, ReceiveError, Received, Receiver, SendQueue, Socket,
};

/// Data that a capsule may carry on an admin queue, and before Connect (NVMe/TCP Transport: at least
/// 8192 bytes for Fabrics and admin commands).
pub(super) const ADMIN_CAPSULE_BYTES: u32 = 8192;
/// How long the host may take to read a TermReq and close.
const TERMINATE_TIMEOUT_MS: u64 = 3_000;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing has arrived yet.
    AwaitIcReq,
    /// PDUs flow, but this is not a queue yet.
    AwaitConnect,
    /// An admin or I/O queue.
    Ready,
    /// The host asked to disconnect: close when the answer has gone.
    Leaving,
    /// A TermReq has been sent (or is being): what arrives is thrown away until the host closes.
    Terminating,
    Closed,
}

/// One connection.
pub struct TargetConnection<S: Socket> {
    pub(super) index: u32,
    pub(super) target: SharedTarget,
    pub(super) options: TargetOptions,
    pub(super) listener: ListenerAddress,
    socket: Option<S>,
    pub(super) phase: Phase,
    /// Since when it is in a phase that must not last; set by the first poll in it.
    phase_since_ms: Option<u64>,
    receiver: Receiver,
    /// The request whose payload is arriving, and how long that payload is.
    receiving: Option<(u16, u32)>,
    pub(super) sender: SendQueue,
    pub(super) finished: Vec<u16>,
    digests: Digests,
    /// HPDA.
    host_alignment: u8,
    pub(super) slots: SlotTable,
    /// Requests that wait for large buffers, oldest first.
    pub(super) waiting: VecDeque<u16>,
    pub(super) in_backend: u32,
    pub(super) queue_entries: u16,
    pub(super) queue_head: u16,
    pub(super) flow_control: bool,
    pub(super) link: Option<ControllerLink>,
    /// Some on an admin queue.
    pub(super) admin: Option<Box<AdminSession>>,
    pub(super) namespaces: Vec<Option<Namespace>>,
}

impl<S: Socket> TargetConnection<S> {
    /// A fresh connection that came in at `listener`. `index` goes into its request handles.
    pub(super) fn new(
        index: u32,
        first_generation: u32,
        socket: S,
        listener: ListenerAddress,
        target: SharedTarget,
    ) -> io::Result<TargetConnection<S>> {
        let options = lock(&target).options();
        Ok(TargetConnection {
            index,
            target,
            options,
            listener,
            socket: Some(socket),
            phase: Phase::AwaitIcReq,
            phase_since_ms: None,
            receiver: Receiver::new(Sender::Host),
            receiving: None,
            sender: SendQueue::new(8),
            finished: Vec::with_capacity(8),
            digests: Digests::default(),
            host_alignment: 0,
            slots: SlotTable::new(1, ADMIN_CAPSULE_BYTES, first_generation)?,
            waiting: VecDeque::new(),
            in_backend: 0,
            queue_entries: 1,
            queue_head: 0,
            flow_control: true,
            link: None,
            admin: None,
            namespaces: Vec::new(),
        })
    }

    /// The socket, until the connection has lost it.
    pub fn socket(&self) -> Option<&S> {
        self.socket.as_ref()
    }

    /// Whether something waits to be sent: `on_writable` is wanted.
    pub fn wants_write(&self) -> bool {
        self.socket.is_some() && !self.sender.is_empty()
    }

    /// Over: the socket is closed, and the backend has nothing of it any more.
    pub fn is_closed(&self) -> bool {
        self.socket.is_none() && self.in_backend == 0
    }

    /// Whether requests wait for large buffers.
    pub(super) fn waits_for_buffers(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Receives and executes all that has arrived.
    pub(super) fn on_readable<B: Backend>(&mut self, pool: &mut BufferPool, backend: &mut B) {
        self.adopt_changes(pool);
        while let Some(socket) = self.socket.as_mut() {
            if self.phase == Phase::Terminating {
                let mut waste = [0; 4096];
                match socket.recv(&mut waste) {
                    Ok(0) => self.close(pool),
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => self.close(pool),
                }
                break;
            }
            let result = match self.receiver.next(socket) {
                Ok(Received::Nothing) => break,
                Ok(Received::Header {
                    header,
                    payload_bytes,
                }) => self.on_header(&header, payload_bytes, pool, backend),
                Ok(Received::Payload { digest_matches }) => {
                    self.on_payload(digest_matches, pool, backend);
                    Ok(())
                }
                Err(ReceiveError::Fault(fault)) => Err(fault),
                Err(ReceiveError::Closed(error)) => {
                    debug!(connection = self.index, %error, "connection closed by the host");
                    self.close(pool);
                    break;
                }
            };
            if let Err(fault) = result {
                self.terminate(fault, pool);
            }
        }
        self.report_events(pool);
        self.flush(pool);
    }

    /// Sends what waits.
    pub(super) fn flush(&mut self, pool: &mut BufferPool) {
        let Some(socket) = self.socket.as_mut() else {
            return;
        };
        let result = self.sender.flush(socket, &mut self.finished);
        for slot in self.finished.drain(..) {
            self.slots.release(slot, pool);
        }
        if let Err(error) = result {
            debug!(connection = self.index, %error, "connection lost while sending");
            self.close(pool);
        } else if self.phase == Phase::Leaving && self.sender.is_empty() {
            self.close(pool);
        }
    }

    /// The backend's answer. A handle that is not in use is ignored.
    pub(super) fn complete(
        &mut self,
        request: RequestHandle,
        status: NvmeStatus,
        dword0: u32,
        pool: &mut BufferPool,
    ) {
        let index = request.slot;
        let slot = self.slots.get_mut(index).filter(|slot| {
            slot.generation == request.generation && slot.state == SlotState::Backend
        });
        let Some(slot) = slot else {
            warn!(?request, "completion of a request that is not in progress");
            return;
        };
        self.in_backend = self.in_backend.saturating_sub(1);
        let mut status = status;
        if !slot.second.is_empty() && status.is_success() {
            // SAFETY: both are this request's buffers, and the backend has just given them back.
            let (host, disk) = unsafe { (slot.data.as_slice(), slot.second.as_slice()) };
            if host != disk {
                status = NvmeStatus::COMPARE_FAILURE;
            }
        }
        self.respond(index, status, u64::from(dword0), pool);
    }

    /// Ends what has lasted too long: a connection that does not become a queue, a controller whose host
    /// has stopped sending Keep Alive, a TermReq that is not read. Reports events.
    pub(super) fn poll_timeouts(&mut self, now_ms: u64, pool: &mut BufferPool) {
        self.adopt_changes(pool);
        let limit_ms = match self.phase {
            Phase::AwaitIcReq | Phase::AwaitConnect => Some(self.options.connect_timeout_ms),
            Phase::Terminating | Phase::Leaving => Some(TERMINATE_TIMEOUT_MS),
            Phase::Ready | Phase::Closed => None,
        };
        if let Some(limit_ms) = limit_ms {
            let since = *self.phase_since_ms.get_or_insert(now_ms);
            if now_ms.saturating_sub(since) >= limit_ms {
                debug!(connection = self.index, phase = ?self.phase, "timed out");
                self.close(pool);
            }
        }
        let expired = self
            .admin
            .as_mut()
            .is_some_and(|admin| admin.keep_alive_expired(now_ms));
        if expired && self.phase == Phase::Ready {
            warn!(
                connection = self.index,
                "keep alive timeout: the controller is closed"
            );
            self.close(pool);
        }
        self.report_events(pool);
        self.flush(pool);
    }

    /// Closes the socket at once. What the backend has keeps its memory until it has been completed.
    pub(super) fn close(&mut self, pool: &mut BufferPool) {
        if self.phase == Phase::Closed {
            return;
        }
        self.phase = Phase::Closed;
        self.socket = None;
        self.sender.clear();
        self.finished.clear();
        self.waiting.clear();
        self.slots.release_all_but_backend(pool);
        if let Some(link) = &self.link {
            lock(&self.target).disconnect(link);
        }
    }

    /// Goes on with requests that waited for large buffers.
    pub(super) fn resume_waiting<B: Backend>(&mut self, pool: &mut BufferPool, backend: &mut B) {
        while let Some(index) = self.waiting.pop_front() {
            let waiting_before = self.waiting.len();
            self.dispatch(index, true, pool, backend);
            if self.waiting.len() > waiting_before {
                break;
            }
        }
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.phase_since_ms = None;
    }

    /// Tells the host what it did wrong, and stops listening to it.
    fn terminate(&mut self, fault: Fault, pool: &mut BufferPool) {
        warn!(connection = self.index, %fault, "protocol error of the host");
        let term = TermReq::new(fault, self.receiver.last_header());
        let header = PduHeader::C2hTermReq(term);
        self.sender.push(Outgoing::new(
            &header,
            Digests::default(),
            0,
            DataPointer::NONE,
            NO_OWNER,
        ));
        self.enter(Phase::Terminating);
        // Requests that nothing refers to any more are over; answers that are queued still go out.
        while let Some(index) = self.waiting.pop_front() {
            self.slots.release(index, pool);
        }
    }

    /// Notices that the controller is gone, or that the subsystem has changed.
    fn adopt_changes(&mut self, pool: &mut BufferPool) {
        let Some(link) = self.link.as_mut() else {
            return;
        };
        if self.phase == Phase::Closed {
            return;
        }
        let mut stays = !link.shared.closed.load(Ordering::Acquire);
        if link.queue_id != 0 && link.shared.io_epoch.load(Ordering::Acquire) != link.io_epoch {
            stays = false;
        }
        if stays && link.generation.load(Ordering::Acquire) != link.seen_generation {
            let before = std::mem::take(&mut self.namespaces);
            let state = lock(&self.target);
            stays = state.refresh(link, &self.listener, &mut self.namespaces);
            if let Some(admin) = self.admin.as_mut() {
                admin.note_changes(&before, &self.namespaces);
            }
        }
        if !stays {
            debug!(connection = self.index, "closed by the target");
            self.close(pool);
        }
    }

    fn on_header<B: Backend>(
        &mut self,
        header: &PduHeader,
        payload_bytes: u32,
        pool: &mut BufferPool,
        backend: &mut B,
    ) -> Result<(), Fault> {
        match (header, self.phase) {
            (PduHeader::IcReq(request), Phase::AwaitIcReq) => self.on_ic_req(request),
            (PduHeader::CapsuleCmd(entry), Phase::AwaitConnect | Phase::Ready) => {
                self.on_command(Sqe::parse(entry), payload_bytes, pool, backend)
            }
            (PduHeader::H2cData(data), Phase::Ready | Phase::AwaitConnect) => self.on_data(data),
            (PduHeader::H2cTermReq(term), _) => {
                warn!(
                    connection = self.index,
                    error = term.error,
                    information = term.information,
                    "the host terminates the connection"
                );
                self.close(pool);
                Ok(())
            }
            _ => Err(Fault::sequence()),
        }
    }

    fn on_ic_req(&mut self, request: &IcReq) -> Result<(), Fault> {
        if request.version != 0 {
            return Err(Fault::unsupported(OFFSET_VERSION));
        }
        if request.alignment > 31 {
            return Err(Fault::field(OFFSET_ALIGNMENT));
        }
        self.host_alignment = request.alignment;
        let response = PduHeader::IcResp(IcResp {
            version: 0,
            alignment: 0,
            digests: request.digests,
            max_h2c_data_bytes: self.options.max_io_size,
        });
        self.push(&response, DataPointer::NONE, NO_OWNER);
        self.digests = request.digests;
        self.receiver.set_digests(request.digests);
        self.enter(Phase::AwaitConnect);
        Ok(())
    }

    fn on_command<B: Backend>(
        &mut self,
        sqe: Sqe,
        payload_bytes: u32,
        pool: &mut BufferPool,
        backend: &mut B,
    ) -> Result<(), Fault> {
        if payload_bytes > self.slots.capsule_bytes() {
            return Err(Fault::limit());
        }
        // More commands than the queue has entries.
        let index = self.slots.begin(sqe).ok_or(Fault::sequence())?;
        self.forget_abandoned_event_request(index, pool);
        self.queue_head = (self.queue_head + 1) % self.queue_entries.max(1);
        if payload_bytes == 0 {
            self.dispatch(index, false, pool, backend);
            return Ok(());
        }
        if let Some(slot) = self.slots.get_mut(index) {
            slot.in_capsule_bytes = payload_bytes;
        }
        let data = self.slots.capsule_data(index, payload_bytes);
        self.receiving = Some((index, payload_bytes));
        self.receiver.receive_into(data);
        Ok(())
    }

    /// A host that uses the command id of a waiting Asynchronous Event Request again has given that up:
    /// SPDK's does so before it shuts the controller down. An answer to it would now be taken for the new
    /// command's.
    fn forget_abandoned_event_request(&mut self, index: u16, pool: &mut BufferPool) {
        let (Some(admin), Some(command_id)) = (
            self.admin.as_mut(),
            self.slots.conflicting_command_id(index),
        ) else {
            return;
        };
        if let Some(event_slot) = admin.take_event_request(command_id) {
            self.slots.hand_command_id_over(event_slot, index);
            self.slots.release(event_slot, pool);
        }
    }

    fn on_data(&mut self, data: &DataHeader) -> Result<(), Fault> {
        let index = data.transfer_tag;
        let slot = self
            .slots
            .get_mut(index)
            .filter(|slot| slot.state == SlotState::AwaitingData)
            .ok_or(Fault::field(OFFSET_TRANSFER_TAG))?;
        if slot.sqe.command_id != data.command_id {
            return Err(Fault::field(OFFSET_COMMAND_ID));
        }
        if data.length_bytes > self.options.max_io_size {
            return Err(Fault::limit());
        }
        if data.offset_bytes != slot.received_bytes {
            return Err(Fault::out_of_range());
        }
        let place = slot.data.part(data.offset_bytes, data.length_bytes);
        let place = place.ok_or(Fault::out_of_range())?;
        let is_end = data.offset_bytes + data.length_bytes == slot.data.length_bytes();
        if data.last && !is_end {
            return Err(Fault::out_of_range());
        }
        self.receiving = Some((index, data.length_bytes));
        self.receiver.receive_into(place);
        Ok(())
    }

    fn on_payload<B: Backend>(
        &mut self,
        digest_matches: bool,
        pool: &mut BufferPool,
        backend: &mut B,
    ) {
        let Some((index, length_bytes)) = self.receiving.take() else {
            return;
        };
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.digest_error |= !digest_matches;
        match slot.state {
            SlotState::Receiving => self.dispatch(index, false, pool, backend),
            SlotState::AwaitingData => {
                slot.received_bytes += length_bytes;
                if slot.received_bytes == slot.data.length_bytes() {
                    self.execute(index, pool, backend);
                }
            }
            _ => {}
        }
    }

    /// Answers a command: data first if it has any, then the completion.
    pub(super) fn respond(
        &mut self,
        index: u16,
        status: NvmeStatus,
        result: u64,
        pool: &mut BufferPool,
    ) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if matches!(self.phase, Phase::Terminating | Phase::Closed) {
            return self.slots.release(index, pool);
        }
        slot.state = SlotState::Responding;
        let (sqe, data) = (slot.sqe, slot.data);
        let is_connect =
            sqe.opcode == admin_opcode::FABRICS && sqe.fabrics_type() == fabrics_type::CONNECT;
        let response = PduHeader::CapsuleResp(
            Cqe {
                result,
                queue_head: match self.flow_control {
                    true => self.queue_head,
                    false if is_connect => 0xffff,
                    false => 0,
                },
                command_id: sqe.command_id,
                status,
            }
            .emit(),
        );
        let carries_data = status.is_success()
            && sqe.direction() == TransferDirection::ControllerToHost
            && !data.is_empty();
        if !carries_data {
            return self.push(&response, DataPointer::NONE, index);
        }
        // A completion that is left out cannot move the queue's head, hence only without flow control.
        let success = self.options.c2h_success
            && !self.flow_control
            && status == NvmeStatus::SUCCESS
            && result == 0;
        let header = PduHeader::C2hData(DataHeader {
            command_id: sqe.command_id,
            transfer_tag: 0,
            offset_bytes: 0,
            length_bytes: data.length_bytes(),
            last: true,
            success,
        });
        let mut outgoing = Outgoing::new(&header, self.digests, self.host_alignment, data, index);
        if !success {
            outgoing = outgoing.followed_by(&response, self.digests);
        }
        self.sender.push(outgoing);
    }

    pub(super) fn push(&mut self, header: &PduHeader, data: DataPointer, owner: u16) {
        self.sender.push(Outgoing::new(
            header,
            self.digests,
            self.host_alignment,
            data,
            owner,
        ));
    }

    /// Answers waiting Asynchronous Event Requests with what has happened.
    fn report_events(&mut self, pool: &mut BufferPool) {
        if self.phase != Phase::Ready {
            return;
        }
        while let Some((index, result)) = self.admin.as_mut().and_then(|admin| admin.next_event()) {
            self.respond(index, NvmeStatus::SUCCESS, u64::from(result), pool);
        }
    }
}
