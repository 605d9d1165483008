//! What a target's connection does with a command: finds the place of its data, fetches what is missing,
//! executes or submits it. The connection receives and answers; this knows no PDUs but R2T.

use std::sync::atomic::Ordering;

use tracing::{debug, warn};

use super::admin::{AdminContext, AdminSession, Outcome};
use super::association::ConnectRefusal;
use super::connection::{ADMIN_CAPSULE_BYTES, Phase, TargetConnection};
use super::io_command;
use super::slot::SlotState;
use super::state::lock;
use super::{Backend, IoKind, RequestHandle};
use crate::hosts::embedded::nvme_tcp::buffer::{BufferPool, BufferUser, DataPointer};
use crate::hosts::embedded::nvme_tcp::command::{
    CONNECT_DATA_BYTES, CONNECT_OFFSET_CONTROLLER_ID, CONNECT_OFFSET_SUBSYSTEM_NQN,
    CONTROLLER_ID_DYNAMIC, ConnectCommand, ConnectData, DISCOVERY_NQN, NvmeStatus, Sgl, Sqe,
    TransferDirection, admin_opcode, fabrics_type,
};
use crate::hosts::embedded::nvme_tcp::pdu::{PduHeader, R2t};
use crate::hosts::embedded::nvme_tcp::stream::{NO_OWNER, Socket};

/// Offset of SQSIZE and of QID in Connect's submission queue entry.
const CONNECT_OFFSET_QUEUE_SIZE: u32 = 44;
const CONNECT_OFFSET_QUEUE_ID: u32 = 42;

/// What a command needs before it can be executed.
struct Need {
    direction: TransferDirection,
    length_bytes: u32,
    compare: bool,
    user: BufferUser,
}

/// What stands between a command and its execution.
enum Placed {
    Nothing,
    Data,
    Buffers,
}

impl<S: Socket> TargetConnection<S> {
    /// A command with all that came in its capsule: fetches what is missing, then executes it.
    pub(super) fn dispatch<B: Backend>(
        &mut self,
        index: u16,
        waited: bool,
        pool: &mut BufferPool,
        backend: &mut B,
    ) {
        match self.place(index, waited, pool) {
            Err(status) => self.respond(index, status, 0, pool),
            Ok(Placed::Nothing) => self.execute(index, pool, backend),
            Ok(Placed::Data) => self.request_data(index),
            Ok(Placed::Buffers) => {
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.state = SlotState::WaitingForBuffer;
                }
                if waited {
                    self.waiting.push_front(index);
                } else {
                    self.waiting.push_back(index);
                }
            }
        }
    }

    fn need(&mut self, index: u16) -> Result<Need, NvmeStatus> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Err(NvmeStatus::INTERNAL_ERROR);
        };
        if slot.digest_error {
            return Err(NvmeStatus::TRANSIENT_TRANSPORT_ERROR);
        }
        if !slot.owns_command_id {
            return Err(NvmeStatus::COMMAND_ID_CONFLICT);
        }
        let sqe = slot.sqe;
        let is_fabrics = sqe.opcode == admin_opcode::FABRICS;
        let is_connect = is_fabrics && sqe.fabrics_type() == fabrics_type::CONNECT;
        let mut need = Need {
            direction: sqe.direction(),
            length_bytes: 0,
            compare: false,
            user: BufferUser::Host,
        };
        if self.phase == Phase::AwaitConnect {
            if !is_connect {
                return Err(NvmeStatus::COMMAND_SEQUENCE_ERROR);
            }
            need.length_bytes = CONNECT_DATA_BYTES as u32;
        } else if let Some(admin) = &self.admin {
            need.length_bytes = admin.data_bytes(&sqe, self.options.max_io_size)?;
        } else if is_fabrics {
            // As SPDK's target answers, to a second Connect too; SPDK's bdevio insists on it.
            if sqe.fabrics_type() != fabrics_type::DISCONNECT {
                return Err(NvmeStatus::INVALID_OPCODE);
            }
        } else {
            let plan = io_command::plan(&sqe, &self.namespaces, self.options.max_io_size, false)?;
            need.length_bytes = plan.length_bytes;
            need.compare = plan.compare;
            need.user = plan.user;
        }
        Ok(need)
    }

    /// Finds the place of a command's data.
    fn place(
        &mut self,
        index: u16,
        waited: bool,
        pool: &mut BufferPool,
    ) -> Result<Placed, NvmeStatus> {
        let need = self.need(index)?;
        let length_bytes = need.length_bytes;
        if length_bytes == 0 || need.direction == TransferDirection::None {
            return Ok(Placed::Nothing);
        }
        let own = self.slots.capsule_data(index, self.slots.capsule_bytes());
        let Some(slot) = self.slots.get_mut(index) else {
            return Err(NvmeStatus::INTERNAL_ERROR);
        };
        let sgl = slot.sqe.sgl;
        if slot.sqe.flags >> 6 != Sqe::FLAGS_SGL >> 6 {
            return Err(NvmeStatus::INVALID_FIELD);
        }
        let from_host = need.direction == TransferDirection::HostToController;
        let in_capsule = match sgl.kind {
            Sgl::KIND_IN_CAPSULE if from_host => true,
            Sgl::KIND_TRANSPORT if slot.in_capsule_bytes == 0 => false,
            _ => return Err(NvmeStatus::SGL_DESCRIPTOR_TYPE_INVALID),
        };
        if in_capsule {
            let offset = u32::try_from(sgl.address).unwrap_or(u32::MAX);
            if offset > slot.in_capsule_bytes {
                return Err(NvmeStatus::SGL_OFFSET_INVALID);
            }
            if sgl.length_bytes > slot.in_capsule_bytes - offset {
                return Err(NvmeStatus::DATA_SGL_LENGTH_INVALID);
            }
            if sgl.length_bytes == length_bytes && offset > 0 {
                let whole = offset as usize..(offset + length_bytes) as usize;
                // SAFETY: the slot's own memory; its data has arrived and nobody else has it yet.
                unsafe { own.as_mut_slice() }.copy_within(whole, 0);
                slot.sqe.sgl.address = 0;
                slot.in_capsule_bytes = length_bytes;
            }
        }
        if sgl.length_bytes != length_bytes {
            return Err(NvmeStatus::DATA_SGL_LENGTH_INVALID);
        }
        let large = length_bytes > own.length_bytes();
        let buffers = usize::from(large) + usize::from(need.compare);
        if buffers > 0 {
            // All or none, so that nobody waits for one while holding another.
            let others_first = !waited && !self.waiting.is_empty();
            if others_first || pool.available(need.user) < buffers {
                return Ok(Placed::Buffers);
            }
        }
        slot.data = match own.part(0, length_bytes) {
            Some(data) => data,
            None => match pool.take(need.user) {
                Some(buffer) => slot.keep(buffer, length_bytes),
                None => return Err(NvmeStatus::INTERNAL_ERROR),
            },
        };
        if need.compare {
            slot.second = match pool.take(need.user) {
                Some(buffer) => slot.keep(buffer, length_bytes),
                None => return Err(NvmeStatus::INTERNAL_ERROR),
            };
        }
        Ok(if from_host && !in_capsule {
            Placed::Data
        } else {
            Placed::Nothing
        })
    }

    fn request_data(&mut self, index: u16) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.state = SlotState::AwaitingData;
        let ready = PduHeader::R2t(R2t {
            command_id: slot.sqe.command_id,
            transfer_tag: index,
            offset_bytes: 0,
            length_bytes: slot.data.length_bytes(),
        });
        self.push(&ready, DataPointer::NONE, NO_OWNER);
    }

    pub(super) fn execute<B: Backend>(
        &mut self,
        index: u16,
        pool: &mut BufferPool,
        backend: &mut B,
    ) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        if slot.digest_error {
            return self.respond(index, NvmeStatus::TRANSIENT_TRANSPORT_ERROR, 0, pool);
        }
        let (sqe, data) = (slot.sqe, slot.data);
        if self.phase == Phase::AwaitConnect {
            match self.connect(&sqe, data) {
                Ok(controller_id) => {
                    self.respond(index, NvmeStatus::SUCCESS, u64::from(controller_id), pool);
                }
                Err((status, result)) => self.respond(index, status, u64::from(result), pool),
            }
        } else if self.admin.is_some() {
            self.execute_admin(index, &sqe, data, pool);
        } else if sqe.opcode == admin_opcode::FABRICS {
            self.respond(index, NvmeStatus::SUCCESS, 0, pool);
            self.enter(Phase::Leaving);
        } else if let Err(status) = self.submit(index, &sqe, data, pool, backend) {
            self.respond(index, status, 0, pool);
        }
    }

    /// Hands an I/O to the backend. What the namespaces were when the command came may have changed since.
    fn submit<B: Backend>(
        &mut self,
        index: u16,
        sqe: &Sqe,
        data: DataPointer,
        pool: &mut BufferPool,
        backend: &mut B,
    ) -> Result<(), NvmeStatus> {
        let link = self.link.as_ref().ok_or(NvmeStatus::INTERNAL_ERROR)?;
        let write_through = link.shared.write_through.load(Ordering::Relaxed);
        let max_io_size = self.options.max_io_size;
        let plan = io_command::plan(sqe, &self.namespaces, max_io_size, write_through)?;
        if plan.length_bytes != data.length_bytes() {
            return Err(NvmeStatus::NAMESPACE_NOT_READY);
        }
        if let IoKind::Unmap { .. } = plan.io.kind {
            let namespace = io_command::find(&self.namespaces, sqe.nsid);
            let size_blocks = namespace.map_or(0, |namespace| namespace.size_blocks);
            // SAFETY: the request's data, all of it received, and the backend does not have it yet.
            io_command::check_ranges(unsafe { data.as_slice() }, size_blocks)?;
        }
        if plan.no_operation {
            self.respond(index, NvmeStatus::SUCCESS, 0, pool);
            return Ok(());
        }
        let slot = self
            .slots
            .get_mut(index)
            .ok_or(NvmeStatus::INTERNAL_ERROR)?;
        slot.state = SlotState::Backend;
        let mut io = plan.io;
        io.data = if plan.compare { slot.second } else { data };
        let request = RequestHandle {
            connection: self.index,
            slot: index,
            generation: slot.generation,
        };
        self.in_backend += 1;
        backend.submit(plan.namespace, io, request);
        Ok(())
    }

    /// Fabrics Connect. Fails with the status and dword 0 of the completion.
    fn connect(&mut self, sqe: &Sqe, data: DataPointer) -> Result<u16, (NvmeStatus, u32)> {
        // Dword 0 of a refusal: IPO, and in bit 16 whether that is in the data or in the entry.
        let in_entry = |offset: u32| (NvmeStatus::CONNECT_INVALID_PARAMETERS, offset);
        let in_data = |offset: u32| (NvmeStatus::CONNECT_INVALID_PARAMETERS, offset | 1 << 16);
        let command = ConnectCommand::parse(sqe);
        if command.record_format != 0 {
            return Err((NvmeStatus::CONNECT_INCOMPATIBLE_FORMAT, 0));
        }
        // SAFETY: the request's data, all of it received, and used by nobody else.
        let bytes = unsafe { data.as_slice() };
        let bytes = bytes
            .first_chunk()
            .ok_or((NvmeStatus::DATA_SGL_LENGTH_INVALID, 0))?;
        let data = ConnectData::parse(bytes).map_err(in_data)?;
        let is_admin = command.queue_id == 0;
        let depth_max = if is_admin {
            self.options.max_aq_depth
        } else {
            self.options.max_queue_depth
        };
        if command.queue_size == 0 || command.queue_size >= depth_max {
            return Err(in_entry(CONNECT_OFFSET_QUEUE_SIZE));
        }
        if command.queue_id >= self.options.max_qpairs_per_ctrlr {
            return Err(in_entry(CONNECT_OFFSET_QUEUE_ID));
        }
        let mut state = lock(&self.target);
        let link = if is_admin {
            if data.controller_id != CONTROLLER_ID_DYNAMIC {
                return Err(in_data(CONNECT_OFFSET_CONTROLLER_ID));
            }
            state.connect_admin(&data.subsystem_nqn, &data.host_nqn, &self.listener)
        } else {
            let (nqn, host) = (&data.subsystem_nqn, &data.host_nqn);
            let (controller, queue) = (data.controller_id, command.queue_id);
            state.connect_io(nqn, host, &self.listener, controller, queue)
        };
        let link = link.map_err(|refusal| match refusal {
            ConnectRefusal::UnknownSubsystem => in_data(CONNECT_OFFSET_SUBSYSTEM_NQN),
            ConnectRefusal::UnknownController => in_data(CONNECT_OFFSET_CONTROLLER_ID),
            ConnectRefusal::HostNotAllowed => (NvmeStatus::CONNECT_INVALID_HOST, 0),
            ConnectRefusal::QueueInUse => in_entry(CONNECT_OFFSET_QUEUE_ID),
            ConnectRefusal::ControllerNotEnabled => (NvmeStatus::COMMAND_SEQUENCE_ERROR, 0),
            ConnectRefusal::NoControllerFree => (NvmeStatus::CONNECT_CONTROLLER_BUSY, 0),
        })?;
        let entries = command.queue_size + 1;
        let capsule_bytes = if is_admin {
            ADMIN_CAPSULE_BYTES
        } else {
            self.options.in_capsule_data_size
        };
        if let Err(error) = self.slots.grow(entries, capsule_bytes) {
            warn!(%error, entries, "no memory for the queue of a host");
            state.disconnect(&link);
            return Err((NvmeStatus::CONNECT_CONTROLLER_BUSY, 0));
        }
        drop(state);
        let count = self.slots.count();
        self.sender.reserve(2 * count + 8);
        self.finished.reserve(count);
        self.waiting.reserve(count);
        self.queue_entries = entries;
        self.queue_head = 1 % entries;
        self.flow_control = !command.disable_flow_control;
        if is_admin {
            let is_discovery = data.subsystem_nqn == DISCOVERY_NQN;
            let session = AdminSession::new(is_discovery, command.keep_alive_ms, data.host_id);
            self.admin = Some(Box::new(session));
        }
        let controller_id = link.controller_id;
        debug!(
            connection = self.index,
            subsystem = data.subsystem_nqn,
            host = data.host_nqn,
            controller_id,
            queue_id = command.queue_id,
            "connected"
        );
        let mut link = link;
        lock(&self.target).refresh(&mut link, &self.listener, &mut self.namespaces);
        self.link = Some(link);
        self.enter(Phase::Ready);
        Ok(controller_id)
    }

    fn execute_admin(&mut self, index: u16, sqe: &Sqe, data: DataPointer, pool: &mut BufferPool) {
        let (Some(admin), Some(link)) = (self.admin.as_mut(), self.link.as_ref()) else {
            return;
        };
        // SAFETY: the request's data, all of it received, and used by nobody else.
        let data = unsafe { data.as_mut_slice() };
        if sqe.direction() == TransferDirection::ControllerToHost {
            data.fill(0);
        }
        let context = AdminContext {
            target: &self.target,
            link,
            namespaces: &self.namespaces,
            options: &self.options,
        };
        match admin.execute(index, sqe, data, &context) {
            Outcome::Answer(status, result) => self.respond(index, status, result, pool),
            Outcome::Wait => {
                if let Some(slot) = self.slots.get_mut(index) {
                    slot.state = SlotState::AsyncEvent;
                }
            }
            Outcome::Aborted { event_slot } => {
                self.respond(event_slot, NvmeStatus::ABORT_REQUESTED, 0, pool);
                self.respond(index, NvmeStatus::SUCCESS, 0, pool);
            }
        }
    }
}
