//! The initiator's side of a controller: brings its admin queue up, learns what it offers, keeps it alive
//! and follows its namespaces. Driven by a reactor; opens no sockets, and I/O queues are its owner's.

use super::buffer::{AlignedBuf, DataPointer};
use super::command::{
    CONTROLLER_ID_DYNAMIC, DISCOVERY_NQN, NvmeStatus, Sqe, admin_opcode, cns, fabrics_type,
    feature, log_page, property,
};
use super::identify::{
    DISCOVERY_RECORD_BYTES, DiscoveryEntry, IDENTIFY_BYTES, IdentifyController, IdentifyNamespace,
    NamespaceDescriptors, WRITE_ZEROES_DEALLOCATES, parse_active_namespaces,
};
use super::initiator::{
    ADMIN_CAPSULE_BYTES, Completion, InitiatorError, InitiatorQueue, QueueParameters,
};
use super::stream::Socket;

/// Entries of the admin queue.
const ADMIN_ENTRIES: u16 = 32;
/// How often a controller that is not ready yet is asked again.
const READY_INTERVAL_MS: u64 = 50;
/// Namespaces that are looked at; what Identify lists beyond is left alone.
const NAMESPACES_MAX: usize = 1024;
/// Records of a discovery log page that are read.
const DISCOVERY_RECORDS_MAX: u64 = 4096;
const DISCOVERY_RECORDS_PER_READ: u64 = (IDENTIFY_BYTES / DISCOVERY_RECORD_BYTES) as u64;

const STEP_TOKEN: u64 = 1;
const KEEP_ALIVE_TOKEN: u64 = 2;
const EVENT_TOKEN: u64 = 3;

/// What to connect to, and how.
#[derive(Clone, Debug)]
pub struct ControllerParameters {
    /// [`DISCOVERY_NQN`] reads the discovery log page instead of namespaces.
    pub subsystem_nqn: String,
    pub host_nqn: String,
    pub host_id: [u8; 16],
    /// 0: no Keep Alive.
    pub keep_alive_ms: u32,
    pub header_digest: bool,
    pub data_digest: bool,
    /// I/O queues that are wanted; the controller may grant fewer.
    pub io_queues: u16,
    /// Entries that an I/O queue is to have; the controller may allow fewer.
    pub io_entries: u16,
    /// All of bringing it up must be done in this time.
    pub connect_timeout_ms: u64,
}

impl ControllerParameters {
    /// One I/O queue of 128 entries, no digests, Keep Alive of 10 s.
    pub fn new(subsystem_nqn: &str, host_nqn: &str, host_id: [u8; 16]) -> ControllerParameters {
        ControllerParameters {
            subsystem_nqn: subsystem_nqn.into(),
            host_nqn: host_nqn.into(),
            host_id,
            keep_alive_ms: 10_000,
            header_digest: false,
            data_digest: false,
            io_queues: 1,
            io_entries: 128,
            connect_timeout_ms: 10_000,
        }
    }
}

/// A namespace of a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteNamespace {
    pub nsid: u32,
    pub block_size: u32,
    pub size_blocks: u64,
    pub nguid: [u8; 16],
    /// Zeroes if it has none.
    pub uuid: [u8; 16],
    pub eui64: [u8; 8],
    /// Takes the deallocate bit of Write Zeroes; SPDK's do not, and refuse the command.
    pub write_zeroes_deallocates: bool,
}

impl RemoteNamespace {
    /// Whether this is the disk that `other` was, as far as its identifiers tell. It may have been resized.
    pub fn is_same_disk(&self, other: &RemoteNamespace) -> bool {
        self.nsid == other.nsid
            && self.block_size == other.block_size
            && self.nguid == other.nguid
            && self.uuid == other.uuid
            && self.eui64 == other.eui64
    }
}

/// What has been learned.
#[derive(Clone, Debug, Default)]
pub struct ControllerInfo {
    pub identify: IdentifyController,
    /// Longest transfer of a command, in bytes; None if there is no limit.
    pub max_transfer_bytes: Option<u32>,
    /// Data that fits into the capsule of an I/O queue.
    pub in_capsule_bytes: u32,
    /// I/O queues that may be connected.
    pub io_queues: u16,
    /// Entries that an I/O queue may have.
    pub io_entries: u16,
    pub namespaces: Vec<RemoteNamespace>,
    /// Only of a discovery controller.
    pub discovery: Vec<DiscoveryEntry>,
}

/// What the owner should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControllerEvent {
    /// Everything is learned; I/O queues can be connected.
    Ready,
    /// Namespaces have come, gone or changed; [`InitiatorController::info`] has the new ones.
    NamespacesChanged,
    /// The admin queue is gone, and with it the controller: its I/O queues are to be closed.
    Failed(InitiatorError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Connect,
    ReadCapabilities,
    Enable,
    /// CSTS is asked for until it is ready.
    WaitReady,
    IdentifyController,
    SetQueues,
    SetEvents,
    ActiveNamespaces,
    Namespace(usize),
    Descriptors(usize),
    DiscoveryHeader,
    DiscoveryRecords(u64),
    /// Reads the changed namespaces log, which re-arms the event.
    ChangedNamespaces,
    Idle,
    Failed,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Connect => "Connect",
            Step::ReadCapabilities => "Property Get (CAP)",
            Step::Enable => "Property Set (CC)",
            Step::WaitReady => "Property Get (CSTS)",
            Step::IdentifyController => "Identify Controller",
            Step::SetQueues => "Set Features (Number of Queues)",
            Step::SetEvents => "Set Features (Asynchronous Event Configuration)",
            Step::ActiveNamespaces => "Identify (Active Namespaces)",
            Step::Namespace(_) => "Identify Namespace",
            Step::Descriptors(_) => "Identify (Namespace Descriptors)",
            Step::DiscoveryHeader | Step::DiscoveryRecords(_) => "Get Log Page (Discovery)",
            Step::ChangedNamespaces => "Get Log Page (Changed Namespaces)",
            Step::Idle => "idle",
            Step::Failed => "failed",
        }
    }
}

/// A controller of a remote subsystem.
pub struct InitiatorController<S: Socket> {
    queue: InitiatorQueue<S>,
    parameters: ControllerParameters,
    step: Step,
    /// The step's command is on its way.
    step_sent: bool,
    buffer: AlignedBuf,
    info: ControllerInfo,
    /// The namespaces of the scan that is going on.
    scanned: Vec<RemoteNamespace>,
    active: Vec<u32>,
    discovery_records: u64,
    was_ready: bool,
    /// Something changed while a scan was going on.
    scan_again: bool,
    completions: Vec<Completion>,
    started_ms: Option<u64>,
    asked_ms: u64,
    kept_alive_ms: u64,
    keep_alive_pending: bool,
    now_ms: u64,
}

impl<S: Socket> InitiatorController<S> {
    /// Begins on a connected socket. [`on_writable`](Self::on_writable) sends the first bytes.
    pub fn new(
        socket: S,
        parameters: ControllerParameters,
    ) -> std::io::Result<InitiatorController<S>> {
        let queue = InitiatorQueue::new(
            socket,
            QueueParameters {
                queue_id: 0,
                entries: ADMIN_ENTRIES,
                controller_id: CONTROLLER_ID_DYNAMIC,
                subsystem_nqn: parameters.subsystem_nqn.clone(),
                host_nqn: parameters.host_nqn.clone(),
                host_id: parameters.host_id,
                keep_alive_ms: parameters.keep_alive_ms,
                header_digest: parameters.header_digest,
                data_digest: parameters.data_digest,
                in_capsule_bytes: ADMIN_CAPSULE_BYTES,
            },
        )?;
        Ok(InitiatorController {
            queue,
            parameters,
            step: Step::Connect,
            step_sent: false,
            buffer: AlignedBuf::new(IDENTIFY_BYTES)?,
            info: ControllerInfo::default(),
            scanned: Vec::new(),
            active: Vec::new(),
            discovery_records: 0,
            was_ready: false,
            scan_again: false,
            completions: Vec::new(),
            started_ms: None,
            asked_ms: 0,
            kept_alive_ms: 0,
            keep_alive_pending: false,
            now_ms: 0,
        })
    }

    pub fn info(&self) -> &ControllerInfo {
        &self.info
    }

    pub fn controller_id(&self) -> u16 {
        self.queue.controller_id()
    }

    pub fn is_ready(&self) -> bool {
        self.was_ready && self.step != Step::Failed
    }

    pub fn socket(&self) -> Option<&S> {
        self.queue.socket()
    }

    pub fn wants_write(&self) -> bool {
        self.queue.wants_write()
    }

    /// What an I/O queue with this id (from 1 on) is connected with; once ready.
    pub fn io_queue_parameters(&self, queue_id: u16) -> QueueParameters {
        QueueParameters {
            queue_id,
            entries: self.info.io_entries,
            controller_id: self.queue.controller_id(),
            subsystem_nqn: self.parameters.subsystem_nqn.clone(),
            host_nqn: self.parameters.host_nqn.clone(),
            host_id: self.parameters.host_id,
            keep_alive_ms: 0,
            header_digest: self.parameters.header_digest,
            data_digest: self.parameters.data_digest,
            in_capsule_bytes: self.info.in_capsule_bytes,
        }
    }

    pub fn on_readable(&mut self, events: &mut Vec<ControllerEvent>) {
        self.queue.on_readable(&mut self.completions);
        self.advance(events);
    }

    pub fn on_writable(&mut self, events: &mut Vec<ControllerEvent>) {
        self.queue.on_writable(&mut self.completions);
        self.advance(events);
    }

    /// Time passes: Keep Alive, timeouts. Call a few times a second; `now_ms` only goes forward.
    pub fn on_time(&mut self, now_ms: u64, events: &mut Vec<ControllerEvent>) {
        self.now_ms = now_ms;
        let started_ms = *self.started_ms.get_or_insert(now_ms);
        let timeout_ms = self.parameters.connect_timeout_ms;
        if self.step == Step::Failed {
            return;
        }
        if !self.was_ready && now_ms.saturating_sub(started_ms) >= timeout_ms {
            let doing = self.step.name();
            self.fail(InitiatorError::Timeout { doing, timeout_ms }, events);
            return;
        }
        if self.step == Step::WaitReady
            && !self.step_sent
            && now_ms.saturating_sub(self.asked_ms) >= READY_INTERVAL_MS
        {
            self.send_step(events);
        }
        let keep_alive_ms = u64::from(self.parameters.keep_alive_ms);
        if self.was_ready && keep_alive_ms > 0 {
            let since_ms = now_ms.saturating_sub(self.kept_alive_ms);
            if self.keep_alive_pending && since_ms >= keep_alive_ms {
                let doing = "waiting for Keep Alive";
                let timeout_ms = keep_alive_ms;
                self.fail(InitiatorError::Timeout { doing, timeout_ms }, events);
                return;
            }
            if !self.keep_alive_pending && since_ms >= keep_alive_ms / 2 {
                let sqe = Sqe {
                    opcode: admin_opcode::KEEP_ALIVE,
                    ..Sqe::default()
                };
                if self
                    .queue
                    .submit(sqe, DataPointer::NONE, KEEP_ALIVE_TOKEN)
                    .is_ok()
                {
                    self.keep_alive_pending = true;
                    self.kept_alive_ms = now_ms;
                }
            }
        }
        self.queue.flush(&mut self.completions);
        self.advance(events);
    }

    /// Gives the controller up.
    pub fn close(&mut self) {
        self.queue.fail_all(&mut self.completions);
        self.completions.clear();
        self.step = Step::Failed;
    }

    fn fail(&mut self, error: InitiatorError, events: &mut Vec<ControllerEvent>) {
        if self.step != Step::Failed {
            self.step = Step::Failed;
            self.queue.fail(error.clone(), &mut self.completions);
            self.completions.clear();
            events.push(ControllerEvent::Failed(error));
        }
    }

    /// Goes on as far as the completions allow.
    fn advance(&mut self, events: &mut Vec<ControllerEvent>) {
        if let Some(error) = self.queue.error() {
            let error = error.clone();
            return self.fail(error, events);
        }
        if self.step == Step::Connect && self.queue.is_ready() {
            self.go(Step::ReadCapabilities, events);
        }
        while let Some(completion) = self.completions.pop() {
            match completion.token {
                STEP_TOKEN => self.on_step(&completion, events),
                KEEP_ALIVE_TOKEN => {
                    self.keep_alive_pending = false;
                    if !completion.status.is_success() {
                        let (step, status) = ("Keep Alive", completion.status);
                        self.fail(InitiatorError::Command { step, status }, events);
                    }
                }
                EVENT_TOKEN => self.on_async_event(&completion, events),
                _ => {}
            }
        }
        self.queue.flush(&mut self.completions);
        if let Some(error) = self.queue.error() {
            let error = error.clone();
            self.fail(error, events);
        }
    }

    fn go(&mut self, step: Step, events: &mut Vec<ControllerEvent>) {
        self.step = step;
        self.send_step(events);
    }

    fn send_step(&mut self, events: &mut Vec<ControllerEvent>) {
        let property = |offset: u32, eight_bytes: bool| {
            let words = [u32::from(eight_bytes), offset, 0, 0, 0, 0];
            (Sqe::fabrics(fabrics_type::PROPERTY_GET, words), 0)
        };
        let admin = |opcode: u8, nsid: u32, words: [u32; 6], length_bytes: usize| {
            let sqe = Sqe {
                opcode,
                nsid,
                cdw10_15: words,
                ..Sqe::default()
            };
            (sqe, length_bytes as u32)
        };
        let identify = |kind: u8, nsid: u32| {
            let words = [u32::from(kind), 0, 0, 0, 0, 0];
            admin(admin_opcode::IDENTIFY, nsid, words, IDENTIFY_BYTES)
        };
        let log = |page: u8, offset: u64, length_bytes: usize| {
            let dwords = length_bytes as u32 / 4 - 1;
            let first = u32::from(page) | (dwords & 0xffff) << 16;
            let words = [
                first,
                dwords >> 16,
                offset as u32,
                (offset >> 32) as u32,
                0,
                0,
            ];
            admin(admin_opcode::GET_LOG_PAGE, 0, words, length_bytes)
        };
        let set_feature = |id: u8, value: u32| {
            let words = [u32::from(id), value, 0, 0, 0, 0];
            admin(admin_opcode::SET_FEATURES, 0, words, 0)
        };
        let nsid = |index: usize| self.active.get(index).copied().unwrap_or(0);
        let (sqe, length_bytes) = match self.step {
            Step::Connect | Step::Idle | Step::Failed => return,
            Step::ReadCapabilities => property(property::CAP, true),
            Step::Enable => {
                // IOSQES 64 bytes, IOCQES 16 bytes, enable.
                let configuration = 6 << 16 | 4 << 20 | 1;
                let words = [0, property::CC, configuration, 0, 0, 0];
                (Sqe::fabrics(fabrics_type::PROPERTY_SET, words), 0)
            }
            Step::WaitReady => property(property::CSTS, false),
            Step::IdentifyController => identify(cns::CONTROLLER, 0),
            Step::SetQueues => {
                let queues = u32::from(self.parameters.io_queues.max(1) - 1);
                set_feature(feature::NUMBER_OF_QUEUES, queues << 16 | queues)
            }
            Step::SetEvents => set_feature(feature::ASYNC_EVENT_CONFIGURATION, 1 << 8),
            Step::ActiveNamespaces => identify(
                cns::ACTIVE_NAMESPACES,
                self.active.last().copied().unwrap_or(0),
            ),
            Step::Namespace(index) => identify(cns::NAMESPACE, nsid(index)),
            Step::Descriptors(index) => identify(cns::NAMESPACE_DESCRIPTORS, nsid(index)),
            Step::DiscoveryHeader => log(log_page::DISCOVERY, 0, DISCOVERY_RECORD_BYTES),
            Step::DiscoveryRecords(from) => {
                let count = (self.discovery_records - from).min(DISCOVERY_RECORDS_PER_READ);
                let offset = (from + 1) * DISCOVERY_RECORD_BYTES as u64;
                log(
                    log_page::DISCOVERY,
                    offset,
                    count as usize * DISCOVERY_RECORD_BYTES,
                )
            }
            Step::ChangedNamespaces => log(log_page::CHANGED_NAMESPACES, 0, IDENTIFY_BYTES),
        };
        let data = if length_bytes > 0 {
            // SAFETY: the buffer lives as long as the queue; there is one step's command at a time, and the
            // buffer is looked at only after its completion.
            unsafe { DataPointer::new(self.buffer.as_ptr(), length_bytes) }
        } else {
            DataPointer::NONE
        };
        self.step_sent = true;
        self.asked_ms = self.now_ms;
        if let Err(error) = self.queue.submit(sqe, data, STEP_TOKEN) {
            self.fail(InitiatorError::Unusable(error.to_string()), events);
        }
    }

    fn identified(&self) -> &[u8; IDENTIFY_BYTES] {
        const NOTHING: &[u8; IDENTIFY_BYTES] = &[0; IDENTIFY_BYTES];
        self.buffer.as_slice().first_chunk().unwrap_or(NOTHING)
    }

    fn on_step(&mut self, completion: &Completion, events: &mut Vec<ControllerEvent>) {
        self.step_sent = false;
        let status = completion.status;
        let step = self.step;
        // A namespace can go between being listed and being looked at; not every target has descriptors
        // or lets events be configured.
        let may_fail = matches!(
            step,
            Step::Namespace(_) | Step::Descriptors(_) | Step::SetEvents | Step::ChangedNamespaces
        );
        if !status.is_success() && (!may_fail || status == NvmeStatus::HOST_PATH_ERROR) {
            let step = step.name();
            return self.fail(InitiatorError::Command { step, status }, events);
        }
        match step {
            Step::Connect | Step::Idle | Step::Failed => {}
            Step::ReadCapabilities => {
                // MQES is entries less one.
                let entries = (completion.result as u16).saturating_add(1).max(2);
                self.info.io_entries = self.parameters.io_entries.clamp(2, entries);
                self.go(Step::Enable, events);
            }
            Step::Enable => self.go(Step::WaitReady, events),
            Step::WaitReady => {
                if completion.result & 2 != 0 {
                    let text = "the controller has a fatal error (CSTS.CFS)";
                    self.fail(InitiatorError::Unusable(text.into()), events);
                } else if completion.result & 1 != 0 {
                    self.go(Step::IdentifyController, events);
                }
            }
            Step::IdentifyController => {
                let identify = IdentifyController::parse(self.identified());
                let units = identify.command_capsule_units;
                let capsule_bytes = units.saturating_mul(16);
                // Data with an offset in the capsule is not what we send.
                self.info.in_capsule_bytes = match identify.in_capsule_offset_units {
                    0 => capsule_bytes.saturating_sub(64),
                    _ => 0,
                };
                let exponent = u32::from(identify.max_transfer_exponent);
                self.info.max_transfer_bytes = match exponent {
                    0 => None,
                    _ => 4096u32.checked_shl(exponent).filter(|bytes| *bytes >= 4096),
                };
                self.info.identify = identify;
                if self.parameters.subsystem_nqn == DISCOVERY_NQN {
                    self.go(Step::DiscoveryHeader, events);
                } else {
                    self.go(Step::SetQueues, events);
                }
            }
            Step::SetQueues => {
                // NSQA in 15:0, NCQA in 31:16, each less one.
                let (submission, completion) =
                    (completion.result as u16, (completion.result >> 16) as u16);
                let granted = submission.min(completion).saturating_add(1);
                self.info.io_queues = granted.min(self.parameters.io_queues.max(1));
                self.go(Step::SetEvents, events);
            }
            Step::SetEvents => {
                self.request_event();
                self.begin_scan(events);
            }
            Step::ChangedNamespaces => {
                self.request_event();
                self.begin_scan(events);
            }
            Step::ActiveNamespaces => {
                let list = self.identified();
                let last = self.active.last().copied().unwrap_or(0);
                // Ascending, or it would never end.
                let found: Vec<u32> = parse_active_namespaces(list)
                    .filter(|nsid| *nsid > last)
                    .collect();
                let is_full = found.len() == IDENTIFY_BYTES / 4;
                self.active.extend(found);
                if is_full && self.active.len() < NAMESPACES_MAX {
                    return self.go(Step::ActiveNamespaces, events);
                }
                self.active.truncate(NAMESPACES_MAX);
                self.next_namespace(0, events);
            }
            Step::Namespace(index) => {
                let namespace = IdentifyNamespace::parse(self.identified());
                let usable = status.is_success()
                    && namespace.size_blocks > 0
                    && namespace.metadata_bytes == 0;
                let block_size = namespace.block_size_bytes().filter(|_| usable);
                let nsid = self.active.get(index).copied();
                let (Some(block_size), Some(nsid)) = (block_size, nsid) else {
                    return self.next_namespace(index + 1, events);
                };
                self.scanned.push(RemoteNamespace {
                    nsid,
                    block_size,
                    size_blocks: namespace.size_blocks,
                    nguid: namespace.nguid,
                    uuid: [0; 16],
                    eui64: namespace.eui64,
                    write_zeroes_deallocates: namespace.deallocate_features
                        & WRITE_ZEROES_DEALLOCATES
                        != 0,
                });
                self.go(Step::Descriptors(index), events);
            }
            Step::Descriptors(index) => {
                if status.is_success() {
                    let descriptors = NamespaceDescriptors::parse(self.identified());
                    if let Some(namespace) = self.scanned.last_mut() {
                        namespace.uuid = descriptors.uuid.unwrap_or_default();
                    }
                }
                self.next_namespace(index + 1, events);
            }
            Step::DiscoveryHeader => {
                let header = self.identified();
                let (_, count) = header.split_at(8);
                let count = count
                    .first_chunk()
                    .map_or(0, |bytes| u64::from_le_bytes(*bytes));
                self.discovery_records = count.min(DISCOVERY_RECORDS_MAX);
                self.info.discovery.clear();
                self.next_records(0, events);
            }
            Step::DiscoveryRecords(from) => {
                let count = (self.discovery_records - from).min(DISCOVERY_RECORDS_PER_READ);
                let records = self.buffer.as_slice().chunks_exact(DISCOVERY_RECORD_BYTES);
                let records = records.take(count as usize).filter_map(<[u8]>::first_chunk);
                self.info
                    .discovery
                    .extend(records.map(DiscoveryEntry::parse));
                self.next_records(from + count, events);
            }
        }
    }

    fn next_records(&mut self, from: u64, events: &mut Vec<ControllerEvent>) {
        if from < self.discovery_records {
            self.go(Step::DiscoveryRecords(from), events);
        } else {
            self.become_idle(events);
        }
    }

    fn begin_scan(&mut self, events: &mut Vec<ControllerEvent>) {
        self.scan_again = false;
        self.active.clear();
        self.scanned.clear();
        self.go(Step::ActiveNamespaces, events);
    }

    fn next_namespace(&mut self, index: usize, events: &mut Vec<ControllerEvent>) {
        if index < self.active.len() {
            return self.go(Step::Namespace(index), events);
        }
        let changed = self.info.namespaces != self.scanned;
        self.info.namespaces = std::mem::take(&mut self.scanned);
        if self.was_ready && changed {
            events.push(ControllerEvent::NamespacesChanged);
        }
        self.become_idle(events);
    }

    fn become_idle(&mut self, events: &mut Vec<ControllerEvent>) {
        self.step = Step::Idle;
        if !self.was_ready {
            self.was_ready = true;
            self.kept_alive_ms = self.now_ms;
            events.push(ControllerEvent::Ready);
        }
        if self.scan_again {
            self.scan_again = false;
            self.go(Step::ChangedNamespaces, events);
        }
    }

    fn request_event(&mut self) {
        let sqe = Sqe {
            opcode: admin_opcode::ASYNC_EVENT_REQUEST,
            ..Sqe::default()
        };
        // A full queue only means that changes are noticed at the next connect.
        let _ = self.queue.submit(sqe, DataPointer::NONE, EVENT_TOKEN);
    }

    fn on_async_event(&mut self, completion: &Completion, events: &mut Vec<ControllerEvent>) {
        if !completion.status.is_success() {
            return;
        }
        let (kind, information) = (completion.result & 7, completion.result >> 8 & 0xff);
        let namespaces_changed = kind == 2 && information == 0;
        if !namespaces_changed {
            self.request_event();
        } else if self.step == Step::Idle {
            self.go(Step::ChangedNamespaces, events);
        } else {
            self.scan_again = true;
        }
    }
}
