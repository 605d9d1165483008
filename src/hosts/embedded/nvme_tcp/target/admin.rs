//! Commands of admin queues: properties, Identify, log pages, features, events, Keep Alive. One
//! [`AdminSession`] per controller, owned by its admin connection. Knows no sockets.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::TargetOptions;
use super::association::ControllerLink;
use super::io_command::find;
use super::log_page::{self, Window};
use super::state::{SharedTarget, lock};
use super::subsystem::Namespace;
use crate::hosts::embedded::nvme_tcp::command::{
    NSID_ALL, NvmeStatus, Sqe, VERSION_1_4, admin_opcode, cns, fabrics_type, feature,
    log_page as log, property,
};
use crate::hosts::embedded::nvme_tcp::identify::{
    DEALLOCATED_READS_ZEROES, IDENTIFY_BYTES, IdentifyController, IdentifyNamespace,
    NamespaceDescriptors, WRITE_ZEROES_DEALLOCATES,
};

/// AERL + 1.
const ASYNC_EVENTS_MAX: usize = 4;
/// KAS: Keep Alive is measured in units of 1 s.
const KEEP_ALIVE_GRANULARITY_MS: u32 = 1000;
/// Asynchronous events that can be had: namespace attributes, ANA.
const EVENT_NAMESPACES: u32 = 1 << 8;
const EVENT_ANA: u32 = 1 << 11;
/// ELPE + 1.
const ERROR_LOG_ENTRIES: u8 = 1;
/// Entries that fit into the changed namespaces log.
const CHANGED_NAMESPACES_MAX: usize = 1024;

const CC_ENABLE: u32 = 1;
const CSTS_READY: u32 = 1;
/// SHST: shutdown complete.
const CSTS_SHUTDOWN_COMPLETE: u32 = 2 << 2;

/// What becomes of an admin command.
pub(super) enum Outcome {
    Answer(NvmeStatus, u64),
    /// An Asynchronous Event Request: answered when something happens.
    Wait,
    /// An Abort that found its command, an Asynchronous Event Request.
    Aborted {
        event_slot: u16,
    },
}

/// What an admin command may look at.
pub(super) struct AdminContext<'a> {
    pub target: &'a SharedTarget,
    pub link: &'a ControllerLink,
    pub namespaces: &'a [Option<Namespace>],
    pub options: &'a TargetOptions,
}

/// A controller, as far as only its admin queue is concerned.
pub(super) struct AdminSession {
    is_discovery: bool,
    host_id: [u8; 16],
    /// CC and CSTS.
    configuration: u32,
    status: u32,
    keep_alive_ms: u32,
    keep_alive_seen: bool,
    last_alive_ms: Option<u64>,
    event_configuration: u32,
    /// Slot and command id of waiting Asynchronous Event Requests.
    event_requests: Vec<(u16, u16)>,
    changed_namespaces: BTreeSet<u32>,
    ana_changed: bool,
    /// An event has been reported and its log page not been read since.
    namespaces_reported: bool,
    ana_reported: bool,
    /// Arbitration, power management, temperature threshold, error recovery, write atomicity: kept, without
    /// effect.
    inert_features: [u32; 5],
}

impl AdminSession {
    pub fn new(is_discovery: bool, keep_alive_ms: u32, host_id: [u8; 16]) -> AdminSession {
        AdminSession {
            is_discovery,
            host_id,
            configuration: 0,
            status: 0,
            keep_alive_ms: round_keep_alive(keep_alive_ms),
            keep_alive_seen: true,
            last_alive_ms: None,
            event_configuration: EVENT_NAMESPACES | EVENT_ANA,
            event_requests: Vec::with_capacity(ASYNC_EVENTS_MAX),
            changed_namespaces: BTreeSet::new(),
            ana_changed: false,
            namespaces_reported: false,
            ana_reported: false,
            inert_features: [0; 5],
        }
    }

    /// How much data a command moves; checked against its SGL by the connection.
    pub fn data_bytes(&self, sqe: &Sqe, max_io_size: u32) -> Result<u32, NvmeStatus> {
        if sqe.is_fused() {
            return Err(NvmeStatus::INVALID_FIELD);
        }
        let length_bytes = match sqe.opcode {
            admin_opcode::IDENTIFY | admin_opcode::GET_LOG_PAGE => sqe.sgl.length_bytes,
            admin_opcode::GET_FEATURES if sqe.cdw10_15[0] as u8 == feature::HOST_IDENTIFIER => {
                sqe.sgl.length_bytes
            }
            _ => 0,
        };
        if length_bytes > max_io_size {
            return Err(NvmeStatus::INVALID_FIELD);
        }
        Ok(length_bytes)
    }

    /// Executes a command that has slot `slot`; `data` is zeroed where it goes to the host.
    pub fn execute(
        &mut self,
        slot: u16,
        sqe: &Sqe,
        data: &mut [u8],
        context: &AdminContext<'_>,
    ) -> Outcome {
        let result = if sqe.opcode == admin_opcode::FABRICS {
            self.fabrics(sqe, context)
        } else if self.status & CSTS_READY == 0 {
            Err(NvmeStatus::COMMAND_SEQUENCE_ERROR)
        } else {
            match sqe.opcode {
                admin_opcode::IDENTIFY => self.identify(sqe, data, context).map(|()| 0),
                admin_opcode::GET_LOG_PAGE => self.log_page(sqe, data, context).map(|()| 0),
                admin_opcode::GET_FEATURES => self.get_features(sqe, data, context),
                admin_opcode::SET_FEATURES => self.set_features(sqe, context),
                admin_opcode::KEEP_ALIVE => {
                    self.keep_alive_seen = true;
                    Ok(0)
                }
                admin_opcode::ASYNC_EVENT_REQUEST => {
                    if self.event_requests.len() < ASYNC_EVENTS_MAX {
                        self.event_requests.push((slot, sqe.command_id));
                        return Outcome::Wait;
                    }
                    Err(NvmeStatus::ASYNC_EVENT_LIMIT)
                }
                admin_opcode::ABORT => {
                    let queue_id = sqe.cdw10_15[0] as u16;
                    let command_id = (sqe.cdw10_15[0] >> 16) as u16;
                    if queue_id == 0 {
                        if let Some(event_slot) = self.take_event_request(command_id) {
                            return Outcome::Aborted { event_slot };
                        }
                    }
                    // Bit 0: the command was not aborted.
                    Ok(1)
                }
                _ => Err(NvmeStatus::INVALID_OPCODE),
            }
        };
        match result {
            Ok(result) => Outcome::Answer(NvmeStatus::SUCCESS, result),
            Err(status) => Outcome::Answer(status, 0),
        }
    }

    /// Remembers which namespaces differ, for the host to be told.
    pub fn note_changes(&mut self, before: &[Option<Namespace>], after: &[Option<Namespace>]) {
        for index in 0..before.len().max(after.len()) {
            let old = before.get(index).copied().flatten();
            let new = after.get(index).copied().flatten();
            let state =
                |namespace: Option<Namespace>| namespace.map(|namespace| namespace.ana_state);
            if let (Some(mut same), Some(new)) = (old, new) {
                same.ana_state = new.ana_state;
                if same == new {
                    self.ana_changed |= state(old) != state(Some(new));
                    continue;
                }
            }
            if old != new {
                self.changed_namespaces.insert(index as u32 + 1);
            }
        }
    }

    /// Forgets a waiting Asynchronous Event Request; returns its slot.
    pub fn take_event_request(&mut self, command_id: u16) -> Option<u16> {
        let is_it = |(_, id): &(u16, u16)| *id == command_id;
        let at = self.event_requests.iter().position(is_it)?;
        Some(self.event_requests.remove(at).0)
    }

    /// An Asynchronous Event Request to answer, and dword 0 of its completion: type "notice" in bits 2:0,
    /// information in 15:8, the log page to read in 23:16.
    pub fn next_event(&mut self) -> Option<(u16, u32)> {
        let namespaces = !self.changed_namespaces.is_empty()
            && !self.namespaces_reported
            && self.event_configuration & EVENT_NAMESPACES != 0;
        let ana =
            self.ana_changed && !self.ana_reported && self.event_configuration & EVENT_ANA != 0;
        if !(namespaces || ana) || self.event_requests.is_empty() {
            return None;
        }
        let (slot, _) = self.event_requests.remove(0);
        if namespaces {
            self.namespaces_reported = true;
            Some((slot, 0x02 | u32::from(log::CHANGED_NAMESPACES) << 16))
        } else {
            self.ana_reported = true;
            Some((slot, 0x02 | 0x03 << 8 | u32::from(log::ANA) << 16))
        }
    }

    /// Whether the host has been silent for longer than its Keep Alive Timeout. Call often.
    pub fn keep_alive_expired(&mut self, now_ms: u64) -> bool {
        if std::mem::take(&mut self.keep_alive_seen) {
            self.last_alive_ms = Some(now_ms);
        }
        let last_alive_ms = *self.last_alive_ms.get_or_insert(now_ms);
        self.keep_alive_ms != 0
            && now_ms.saturating_sub(last_alive_ms) >= u64::from(self.keep_alive_ms)
    }

    fn fabrics(&mut self, sqe: &Sqe, context: &AdminContext<'_>) -> Result<u64, NvmeStatus> {
        let [attributes, offset, value, ..] = sqe.cdw10_15;
        let is_eight_bytes = attributes & 7 == 1;
        match sqe.fabrics_type() {
            fabrics_type::PROPERTY_GET => match (offset, is_eight_bytes) {
                (property::CAP, true) => Ok(capabilities(context.options)),
                (property::VS, false) => Ok(u64::from(VERSION_1_4)),
                (property::CC, false) => Ok(u64::from(self.configuration)),
                (property::CSTS, false) => Ok(u64::from(self.status)),
                _ => Err(NvmeStatus::INVALID_FIELD),
            },
            fabrics_type::PROPERTY_SET if offset == property::CC && !is_eight_bytes => {
                self.set_configuration(value, context)
            }
            fabrics_type::PROPERTY_SET => Err(NvmeStatus::INVALID_FIELD),
            fabrics_type::CONNECT => Err(NvmeStatus::COMMAND_SEQUENCE_ERROR),
            _ => Err(NvmeStatus::INVALID_OPCODE),
        }
    }

    fn set_configuration(
        &mut self,
        value: u32,
        context: &AdminContext<'_>,
    ) -> Result<u64, NvmeStatus> {
        let old = std::mem::replace(&mut self.configuration, value);
        let shuts_down = value >> 14 & 3 != 0;
        let was_enabled = old & CC_ENABLE != 0;
        let is_enabled = value & CC_ENABLE != 0;
        if is_enabled && !was_enabled {
            // MPS: only 4 KiB pages; CSS: only the NVM command set; AMS: only round robin.
            if value >> 4 & 0x3ff != 0 {
                self.configuration = old;
                return Err(NvmeStatus::INVALID_FIELD);
            }
            self.status = CSTS_READY;
            lock(context.target).enable_controller(context.link, true);
        }
        if was_enabled && (!is_enabled || shuts_down) {
            lock(context.target).enable_controller(context.link, false);
        }
        if !is_enabled {
            self.status &= !CSTS_READY;
        }
        if shuts_down {
            self.status |= CSTS_SHUTDOWN_COMPLETE;
            self.configuration &= !(3 << 14);
        }
        Ok(0)
    }

    fn identify(
        &self,
        sqe: &Sqe,
        data: &mut [u8],
        context: &AdminContext<'_>,
    ) -> Result<(), NvmeStatus> {
        let mut out = [0; IDENTIFY_BYTES];
        let kind = sqe.cdw10_15[0] as u8;
        if self.is_discovery && kind != cns::CONTROLLER {
            return Err(NvmeStatus::INVALID_FIELD);
        }
        let command_set = (sqe.cdw10_15[1] >> 24) as u8;
        match kind {
            cns::CONTROLLER => self.identify_controller(context)?.emit(&mut out),
            cns::NAMESPACE => {
                if let Some(namespace) = checked_namespace(sqe.nsid, context.namespaces)? {
                    identify_namespace(namespace).emit(&mut out);
                }
            }
            cns::ACTIVE_NAMESPACES => {
                if sqe.nsid >= NSID_ALL - 1 {
                    return Err(NvmeStatus::INVALID_NAMESPACE);
                }
                let active = context.namespaces.iter().flatten();
                let after = active.filter(|namespace| namespace.nsid > sqe.nsid);
                for (chunk, namespace) in out.chunks_exact_mut(4).zip(after) {
                    chunk.copy_from_slice(&namespace.nsid.to_le_bytes());
                }
            }
            cns::NAMESPACE_DESCRIPTORS => {
                let namespace = checked_namespace(sqe.nsid, context.namespaces)?;
                let namespace = namespace.ok_or(NvmeStatus::INVALID_NAMESPACE)?;
                NamespaceDescriptors {
                    eui64: Some(namespace.eui64).filter(|id| *id != [0; 8]),
                    nguid: Some(namespace.nguid).filter(|id| *id != [0; 16]),
                    uuid: Some(namespace.uuid).filter(|id| *id != [0; 16]),
                }
                .emit(&mut out);
            }
            // Only the NVM command set; its structures have no fields that must not be zero.
            cns::COMMAND_SET_NAMESPACE if command_set == 0 => {
                checked_namespace(sqe.nsid, context.namespaces)?;
            }
            cns::COMMAND_SET_CONTROLLER if command_set == 0 => {}
            _ => return Err(NvmeStatus::INVALID_FIELD),
        }
        for (to, from) in data.iter_mut().zip(out) {
            *to = from;
        }
        Ok(())
    }

    fn identify_controller(
        &self,
        context: &AdminContext<'_>,
    ) -> Result<IdentifyController, NvmeStatus> {
        let identity = lock(context.target).identity(context.link);
        let identity = identity.ok_or(NvmeStatus::INTERNAL_ERROR)?;
        let options = context.options;
        let ana = identity.ana_reporting;
        let mut controller = IdentifyController {
            serial_number: identity.serial_number,
            model_number: identity.model_number,
            firmware_revision: env!("CARGO_PKG_VERSION").into(),
            max_transfer_exponent: (options.max_io_size / 4096).trailing_zeros() as u8,
            controller_id: context.link.controller_id,
            version: VERSION_1_4,
            // Host identifiers are 128 bits long.
            attributes: 1,
            controller_type: 2,
            async_event_limit: ASYNC_EVENTS_MAX as u8 - 1,
            // Offsets and lengths beyond 4 KiB in Get Log Page; command effects log.
            log_attributes: 0b110,
            error_log_limit: ERROR_LOG_ENTRIES - 1,
            keep_alive_granularity: (KEEP_ALIVE_GRANULARITY_MS / 100) as u16,
            max_commands: options.max_aq_depth,
            // SGLs, of any alignment, with offsets in the capsule and transport data blocks.
            sgl_support: 1 | 1 << 20 | 1 << 21,
            subsystem_nqn: identity.nqn,
            command_capsule_units: 4 + options.in_capsule_data_size / 16,
            response_capsule_units: 1,
            sgl_descriptors_max: 1,
            ..IdentifyController::default()
        };
        if !self.is_discovery {
            // Several ports and controllers; ANA.
            controller.multipath = 0b0011 | u8::from(ana) << 3;
            controller.async_events = EVENT_NAMESPACES | if ana { EVENT_ANA } else { 0 };
            controller.controller_type = 1;
            controller.abort_limit = 3;
            // One firmware slot, read only.
            controller.firmware_updates = 0b11;
            controller.max_commands = options.max_queue_depth;
            controller.namespaces_max = identity.max_namespaces;
            // Compare, Dataset Management, Write Zeroes.
            controller.optional_commands = 1 | 1 << 2 | 1 << 3;
            // Present; Flush takes one namespace at a time.
            controller.volatile_write_cache = 0b101;
            // Disconnect.
            controller.optional_fabric_commands = 1;
            if ana {
                controller.ana_transition_s = 10;
                // Optimized, non-optimized, inaccessible; a namespace never changes its group.
                controller.ana_capabilities = 0b0100_0111;
                controller.ana_group_max = identity.max_namespaces;
                controller.ana_groups = identity.max_namespaces;
                controller.namespaces_allowed = identity.max_namespaces;
            }
        }
        Ok(controller)
    }

    fn log_page(
        &mut self,
        sqe: &Sqe,
        data: &mut [u8],
        context: &AdminContext<'_>,
    ) -> Result<(), NvmeStatus> {
        let [first, second, offset_low, offset_high, ..] = sqe.cdw10_15;
        let page = first as u8;
        let specific = (first >> 8 & 0x7f) as u8;
        let retains_event = first & 1 << 15 != 0;
        let dwords = (u64::from(second & 0xffff) << 16 | u64::from(first >> 16)) + 1;
        let offset = u64::from(offset_low) | u64::from(offset_high) << 32;
        if offset % 4 != 0 {
            return Err(NvmeStatus::INVALID_FIELD);
        }
        if dwords * 4 > data.len() as u64 {
            return Err(NvmeStatus::DATA_SGL_LENGTH_INVALID);
        }
        let wanted = data.get_mut(..(dwords * 4) as usize);
        let mut window = Window::new(offset, wanted.unwrap_or(&mut []));
        if self.is_discovery {
            if page != log::DISCOVERY {
                return Err(NvmeStatus::INVALID_LOG_PAGE);
            }
            let (generation, entries) = lock(context.target).discovery_log(&context.link.host_nqn);
            return log_page::discovery(&mut window, generation, &entries);
        }
        match page {
            log::ERROR => {}
            log::HEALTH => log_page::health(&mut window),
            log::FIRMWARE_SLOT => log_page::firmware_slot(&mut window),
            log::CHANGED_NAMESPACES => {
                if self.changed_namespaces.len() > CHANGED_NAMESPACES_MAX {
                    window.put(0, &NSID_ALL.to_le_bytes());
                } else {
                    for (index, nsid) in self.changed_namespaces.iter().enumerate() {
                        window.put(index as u64 * 4, &nsid.to_le_bytes());
                    }
                }
                if !retains_event {
                    self.changed_namespaces.clear();
                    self.namespaces_reported = false;
                }
            }
            log::COMMAND_EFFECTS => log_page::command_effects(&mut window),
            log::ANA => {
                let identity = lock(context.target).identity(context.link);
                let identity = identity.filter(|identity| identity.ana_reporting);
                let identity = identity.ok_or(NvmeStatus::INVALID_LOG_PAGE)?;
                let groups_only = specific & 1 != 0;
                let changes = identity.ana_change_count;
                log_page::ana(&mut window, changes, context.namespaces, groups_only);
                if !retains_event {
                    self.ana_changed = false;
                    self.ana_reported = false;
                }
            }
            _ => return Err(NvmeStatus::INVALID_LOG_PAGE),
        }
        Ok(())
    }

    /// Where a feature without effect is kept.
    fn inert_feature(&mut self, id: u8) -> Option<&mut u32> {
        let index = match id {
            feature::ARBITRATION => 0,
            feature::POWER_MANAGEMENT => 1,
            feature::TEMPERATURE_THRESHOLD => 2,
            feature::ERROR_RECOVERY => 3,
            feature::WRITE_ATOMICITY => 4,
            _ => return None,
        };
        self.inert_features.get_mut(index)
    }

    fn get_features(
        &mut self,
        sqe: &Sqe,
        data: &mut [u8],
        context: &AdminContext<'_>,
    ) -> Result<u64, NvmeStatus> {
        let id = sqe.cdw10_15[0] as u8;
        // SEL: only current values; nothing can be saved.
        if sqe.cdw10_15[0] >> 8 & 7 != 0 {
            return Err(NvmeStatus::INVALID_FIELD);
        }
        match id {
            feature::KEEP_ALIVE_TIMER => return Ok(u64::from(self.keep_alive_ms)),
            feature::ASYNC_EVENT_CONFIGURATION => return Ok(u64::from(self.event_configuration)),
            _ if self.is_discovery => return Err(NvmeStatus::INVALID_FIELD),
            feature::NUMBER_OF_QUEUES => return Ok(granted_queues(u32::MAX, context)),
            feature::VOLATILE_WRITE_CACHE => {
                let off = context.link.shared.write_through.load(Ordering::Relaxed);
                return Ok(u64::from(!off));
            }
            feature::HOST_IDENTIFIER => {
                // EXHID: on a fabric always the 128-bit one.
                if sqe.cdw10_15[1] & 1 == 0 || data.len() < self.host_id.len() {
                    return Err(NvmeStatus::INVALID_FIELD);
                }
                for (to, from) in data.iter_mut().zip(self.host_id) {
                    *to = from;
                }
                return Ok(0);
            }
            _ => {}
        }
        let value = self.inert_feature(id).map(|value| u64::from(*value));
        value.ok_or(NvmeStatus::INVALID_FIELD)
    }

    fn set_features(&mut self, sqe: &Sqe, context: &AdminContext<'_>) -> Result<u64, NvmeStatus> {
        let [first, value, ..] = sqe.cdw10_15;
        if first & 1 << 31 != 0 {
            return Err(NvmeStatus::FEATURE_NOT_SAVEABLE);
        }
        match first as u8 {
            feature::KEEP_ALIVE_TIMER => {
                self.keep_alive_ms = round_keep_alive(value);
                self.keep_alive_seen = true;
            }
            feature::ASYNC_EVENT_CONFIGURATION => self.event_configuration = value,
            _ if self.is_discovery => return Err(NvmeStatus::INVALID_FIELD),
            feature::NUMBER_OF_QUEUES => {
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(NvmeStatus::INVALID_FIELD);
                }
                if lock(context.target).has_io_queues(context.link) {
                    return Err(NvmeStatus::COMMAND_SEQUENCE_ERROR);
                }
                return Ok(granted_queues(value, context));
            }
            feature::VOLATILE_WRITE_CACHE => {
                let off = value & 1 == 0;
                context
                    .link
                    .shared
                    .write_through
                    .store(off, Ordering::Relaxed);
            }
            // Connect has set it, and it stays.
            feature::HOST_IDENTIFIER => return Err(NvmeStatus::COMMAND_SEQUENCE_ERROR),
            id => *self.inert_feature(id).ok_or(NvmeStatus::INVALID_FIELD)? = value,
        }
        Ok(0)
    }
}

fn round_keep_alive(keep_alive_ms: u32) -> u32 {
    keep_alive_ms
        .checked_next_multiple_of(KEEP_ALIVE_GRANULARITY_MS)
        .unwrap_or(u32::MAX)
}

/// NCQA and NSQA, each one less than the number, for what was asked for in the same form.
fn granted_queues(asked: u32, context: &AdminContext<'_>) -> u64 {
    // The admin queue is one of the queue pairs.
    let most = u32::from(context.options.max_qpairs_per_ctrlr) - 2;
    let submission = (asked & 0xffff).min(most);
    let completion = (asked >> 16).min(most);
    u64::from(completion << 16 | submission)
}

/// CAP: MQES, CQR, TO of 15 s, the NVM command set, pages of 4 KiB.
fn capabilities(options: &TargetOptions) -> u64 {
    u64::from(options.max_queue_depth - 1) | 1 << 16 | 30 << 24 | 1 << 37
}

/// The namespace, None if it is not active; an error if there can be none with this id.
fn checked_namespace(
    nsid: u32,
    namespaces: &[Option<Namespace>],
) -> Result<Option<&Namespace>, NvmeStatus> {
    if nsid == 0 || nsid as usize > namespaces.len() {
        return Err(NvmeStatus::INVALID_NAMESPACE);
    }
    Ok(find(namespaces, nsid))
}

fn identify_namespace(namespace: &Namespace) -> IdentifyNamespace {
    IdentifyNamespace {
        size_blocks: namespace.size_blocks,
        block_size_exponent: namespace.block_size.trailing_zeros() as u8,
        // May be attached to several controllers at a time.
        sharing: 1,
        // What is deallocated reads as zeroes, also by Write Zeroes; there is none without logical blocks.
        deallocate_features: if namespace.vendor_only {
            0
        } else {
            DEALLOCATED_READS_ZEROES | WRITE_ZEROES_DEALLOCATES
        },
        ana_group: namespace.nsid,
        nguid: namespace.nguid,
        eui64: namespace.eui64,
        ..IdentifyNamespace::default()
    }
}
