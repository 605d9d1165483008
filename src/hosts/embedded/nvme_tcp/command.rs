//! Submission and completion queue entries, status codes, opcodes and what Fabrics commands carry.
//! Used by target and initiator; knows no PDU and no socket. Field names and offsets are those of the
//! NVMe Base and NVMe over Fabrics specifications.

use std::fmt;

/// Version that controllers of ours report (VS): NVMe 1.4.
pub const VERSION_1_4: u32 = 0x0001_0400;
/// The well-known discovery subsystem (NVMe-oF, "Discovery Service").
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Longest NQN in bytes, without the terminating zero.
pub const NQN_BYTES_MAX: usize = 223;
/// "All namespaces".
pub const NSID_ALL: u32 = u32::MAX;
/// CNTLID of Connect that asks for any controller (dynamic model).
pub const CONTROLLER_ID_DYNAMIC: u16 = 0xffff;
/// Length of Connect's data in bytes.
pub const CONNECT_DATA_BYTES: usize = 1024;

/// Opcodes of the admin queue.
pub mod admin_opcode {
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub const KEEP_ALIVE: u8 = 0x18;
    pub const FABRICS: u8 = 0x7f;
}

/// Opcodes of I/O queues (NVM command set).
pub mod io_opcode {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Vendor specific opcodes begin here.
    pub const VENDOR_FIRST: u8 = 0x80;
}

/// Types of Fabrics commands (FCTYPE).
pub mod fabrics_type {
    pub const PROPERTY_SET: u8 = 0x00;
    pub const CONNECT: u8 = 0x01;
    pub const PROPERTY_GET: u8 = 0x04;
    pub const DISCONNECT: u8 = 0x08;
}

/// Controller properties by offset.
pub mod property {
    pub const CAP: u32 = 0x00;
    pub const VS: u32 = 0x08;
    pub const CC: u32 = 0x14;
    pub const CSTS: u32 = 0x1c;
}

/// Feature identifiers.
pub mod feature {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENT_CONFIGURATION: u8 = 0x0b;
    pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
    pub const HOST_IDENTIFIER: u8 = 0x81;
}

/// Log page identifiers.
pub mod log_page {
    pub const ERROR: u8 = 0x01;
    pub const HEALTH: u8 = 0x02;
    pub const FIRMWARE_SLOT: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const COMMAND_EFFECTS: u8 = 0x05;
    pub const ANA: u8 = 0x0c;
    pub const DISCOVERY: u8 = 0x70;
}

/// Values of CNS of Identify.
pub mod cns {
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    pub const COMMAND_SET_NAMESPACE: u8 = 0x05;
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
}

/// Status of a completed command.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NvmeStatus {
    /// Status Code Type: 0 generic, 1 command specific, 2 media and data integrity, 3 path, 7 vendor.
    pub sct: u8,
    /// Status Code.
    pub sc: u8,
    /// More information is in the error log.
    pub more: bool,
    /// Do Not Retry.
    pub dnr: bool,
}

impl NvmeStatus {
    pub const SUCCESS: NvmeStatus = NvmeStatus::retry(0, 0x00);
    pub const INVALID_OPCODE: NvmeStatus = NvmeStatus::no_retry(0, 0x01);
    pub const INVALID_FIELD: NvmeStatus = NvmeStatus::no_retry(0, 0x02);
    pub const COMMAND_ID_CONFLICT: NvmeStatus = NvmeStatus::no_retry(0, 0x03);
    pub const INTERNAL_ERROR: NvmeStatus = NvmeStatus::retry(0, 0x06);
    pub const ABORT_REQUESTED: NvmeStatus = NvmeStatus::retry(0, 0x07);
    pub const INVALID_NAMESPACE: NvmeStatus = NvmeStatus::no_retry(0, 0x0b);
    pub const COMMAND_SEQUENCE_ERROR: NvmeStatus = NvmeStatus::no_retry(0, 0x0c);
    pub const DATA_SGL_LENGTH_INVALID: NvmeStatus = NvmeStatus::no_retry(0, 0x0f);
    pub const SGL_DESCRIPTOR_TYPE_INVALID: NvmeStatus = NvmeStatus::no_retry(0, 0x11);
    pub const SGL_OFFSET_INVALID: NvmeStatus = NvmeStatus::no_retry(0, 0x16);
    pub const TRANSIENT_TRANSPORT_ERROR: NvmeStatus = NvmeStatus::retry(0, 0x22);
    pub const LBA_OUT_OF_RANGE: NvmeStatus = NvmeStatus::no_retry(0, 0x80);
    pub const NAMESPACE_NOT_READY: NvmeStatus = NvmeStatus::retry(0, 0x82);
    pub const INVALID_LOG_PAGE: NvmeStatus = NvmeStatus::no_retry(1, 0x09);
    pub const ASYNC_EVENT_LIMIT: NvmeStatus = NvmeStatus::no_retry(1, 0x05);
    pub const FEATURE_NOT_SAVEABLE: NvmeStatus = NvmeStatus::no_retry(1, 0x0d);
    pub const CONNECT_INCOMPATIBLE_FORMAT: NvmeStatus = NvmeStatus::no_retry(1, 0x80);
    pub const CONNECT_CONTROLLER_BUSY: NvmeStatus = NvmeStatus::retry(1, 0x81);
    pub const CONNECT_INVALID_PARAMETERS: NvmeStatus = NvmeStatus::no_retry(1, 0x82);
    pub const CONNECT_INVALID_HOST: NvmeStatus = NvmeStatus::no_retry(1, 0x84);
    pub const WRITE_FAULT: NvmeStatus = NvmeStatus::retry(2, 0x80);
    pub const UNRECOVERED_READ_ERROR: NvmeStatus = NvmeStatus::retry(2, 0x81);
    pub const COMPARE_FAILURE: NvmeStatus = NvmeStatus::no_retry(2, 0x85);
    pub const ACCESS_DENIED: NvmeStatus = NvmeStatus::no_retry(2, 0x86);
    pub const ANA_INACCESSIBLE: NvmeStatus = NvmeStatus::retry(3, 0x02);
    /// The host's own: the connection is gone, nobody knows what became of the command.
    pub const HOST_PATH_ERROR: NvmeStatus = NvmeStatus::retry(3, 0x70);

    const fn retry(sct: u8, sc: u8) -> NvmeStatus {
        NvmeStatus {
            sct,
            sc,
            more: false,
            dnr: false,
        }
    }

    const fn no_retry(sct: u8, sc: u8) -> NvmeStatus {
        NvmeStatus {
            sct,
            sc,
            more: false,
            dnr: true,
        }
    }

    pub fn is_success(&self) -> bool {
        self.sct == 0 && self.sc == 0
    }

    /// The status field of a completion: bits 15:0 with the phase tag (bit 0) clear.
    pub fn to_wire(self) -> u16 {
        u16::from(self.sc) << 1
            | u16::from(self.sct & 7) << 9
            | u16::from(self.more) << 14
            | u16::from(self.dnr) << 15
    }

    pub fn from_wire(value: u16) -> NvmeStatus {
        NvmeStatus {
            sct: (value >> 9) as u8 & 7,
            sc: (value >> 1) as u8,
            more: value & 1 << 14 != 0,
            dnr: value & 1 << 15 != 0,
        }
    }
}

impl fmt::Debug for NvmeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for NvmeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVMe status {:x}h/{:02x}h", self.sct, self.sc)?;
        let name = match (self.sct, self.sc) {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid opcode",
            (0, 0x02) => "invalid field",
            (0, 0x06) => "internal error",
            (0, 0x07) => "abort requested",
            (0, 0x0b) => "invalid namespace",
            (0, 0x0c) => "command sequence error",
            (0, 0x22) => "transient transport error",
            (0, 0x80) => "LBA out of range",
            (0, 0x82) => "namespace not ready",
            (1, 0x82) => "invalid Connect parameters (does the subsystem exist?)",
            (1, 0x84) => "this host may not connect",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x85) => "compare failure",
            (2, 0x86) => "access denied",
            (3, 0x02) => "ANA inaccessible",
            (3, 0x70) => "connection lost",
            _ => return Ok(()),
        };
        write!(f, " ({name})")
    }
}

/// Which way a command's data goes (opcode bits 1:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransferDirection {
    None,
    HostToController,
    ControllerToHost,
    Both,
}

impl TransferDirection {
    pub fn of_opcode(opcode: u8) -> TransferDirection {
        match opcode & 3 {
            0 => TransferDirection::None,
            1 => TransferDirection::HostToController,
            2 => TransferDirection::ControllerToHost,
            _ => TransferDirection::Both,
        }
    }
}

/// The SGL descriptor in a submission queue entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sgl {
    /// Address, or offset in the capsule for [`Sgl::KIND_IN_CAPSULE`].
    pub address: u64,
    pub length_bytes: u32,
    /// Type in bits 7:4, subtype in 3:0.
    pub kind: u8,
}

impl Sgl {
    /// Data block with an offset: the data follows in the capsule.
    pub const KIND_IN_CAPSULE: u8 = 0x01;
    /// Transport data block: the data moves in data PDUs.
    pub const KIND_TRANSPORT: u8 = 0x5a;

    pub fn in_capsule(length_bytes: u32) -> Sgl {
        Sgl {
            address: 0,
            length_bytes,
            kind: Sgl::KIND_IN_CAPSULE,
        }
    }

    pub fn transport(length_bytes: u32) -> Sgl {
        Sgl {
            address: 0,
            length_bytes,
            kind: Sgl::KIND_TRANSPORT,
        }
    }
}

/// Submission queue entry, 64 bytes on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sqe {
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub flags: u8,
    pub command_id: u16,
    /// NSID; Fabrics commands have FCTYPE in its lowest byte.
    pub nsid: u32,
    pub cdw2: u32,
    pub cdw3: u32,
    /// MPTR.
    pub metadata_pointer: u64,
    pub sgl: Sgl,
    /// CDW10 to CDW15.
    pub cdw10_15: [u32; 6],
}

impl Sqe {
    /// PSDT: an SGL describes the data, as it must on a fabric.
    pub const FLAGS_SGL: u8 = 0x40;

    pub fn parse(bytes: &[u8; 64]) -> Sqe {
        let word = |index: usize| -> u32 {
            let at = index * 4;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let double = |index: usize| u64::from(word(index)) | u64::from(word(index + 1)) << 32;
        Sqe {
            opcode: bytes[0],
            flags: bytes[1],
            command_id: u16::from_le_bytes([bytes[2], bytes[3]]),
            nsid: word(1),
            cdw2: word(2),
            cdw3: word(3),
            metadata_pointer: double(4),
            sgl: Sgl {
                address: double(6),
                length_bytes: word(8),
                kind: bytes[39],
            },
            cdw10_15: [word(10), word(11), word(12), word(13), word(14), word(15)],
        }
    }

    pub fn emit(&self) -> [u8; 64] {
        let mut out = [0; 64];
        out[0] = self.opcode;
        out[1] = self.flags;
        out[2..4].copy_from_slice(&self.command_id.to_le_bytes());
        out[4..8].copy_from_slice(&self.nsid.to_le_bytes());
        out[8..12].copy_from_slice(&self.cdw2.to_le_bytes());
        out[12..16].copy_from_slice(&self.cdw3.to_le_bytes());
        out[16..24].copy_from_slice(&self.metadata_pointer.to_le_bytes());
        out[24..32].copy_from_slice(&self.sgl.address.to_le_bytes());
        out[32..36].copy_from_slice(&self.sgl.length_bytes.to_le_bytes());
        out[39] = self.sgl.kind;
        for (chunk, word) in out[40..].chunks_exact_mut(4).zip(self.cdw10_15) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// FUSE is set: one half of a fused pair.
    pub fn is_fused(&self) -> bool {
        self.flags & 3 != 0
    }

    /// SLBA of the block commands.
    pub fn lba(&self) -> u64 {
        u64::from(self.cdw10_15[0]) | u64::from(self.cdw10_15[1]) << 32
    }

    /// NLB of the block commands, as a count (1 to 65536).
    pub fn blocks(&self) -> u32 {
        (self.cdw10_15[2] & 0xffff) + 1
    }

    /// FUA of the block commands.
    pub fn force_unit_access(&self) -> bool {
        self.cdw10_15[2] & 1 << 30 != 0
    }

    /// A Read, Write, Compare or Write Zeroes. `blocks` is 1 to 65536.
    pub fn block_command(opcode: u8, nsid: u32, lba: u64, blocks: u32, fua: bool) -> Sqe {
        Sqe {
            opcode,
            nsid,
            cdw10_15: [
                lba as u32,
                (lba >> 32) as u32,
                (blocks.wrapping_sub(1) & 0xffff) | u32::from(fua) << 30,
                0,
                0,
                0,
            ],
            ..Sqe::default()
        }
    }

    /// A Fabrics command of this type.
    pub fn fabrics(fctype: u8, cdw10_15: [u32; 6]) -> Sqe {
        Sqe {
            opcode: admin_opcode::FABRICS,
            nsid: u32::from(fctype),
            cdw10_15,
            ..Sqe::default()
        }
    }

    /// FCTYPE of a Fabrics command.
    pub fn fabrics_type(&self) -> u8 {
        self.nsid as u8
    }

    /// Which way the data goes; for Fabrics commands FCTYPE says so.
    pub fn direction(&self) -> TransferDirection {
        TransferDirection::of_opcode(if self.opcode == admin_opcode::FABRICS {
            self.fabrics_type()
        } else {
            self.opcode
        })
    }
}

/// Completion queue entry, 16 bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    /// Dwords 0 and 1.
    pub result: u64,
    /// SQHD.
    pub queue_head: u16,
    pub command_id: u16,
    pub status: NvmeStatus,
}

impl Cqe {
    pub fn parse(bytes: &[u8; 16]) -> Cqe {
        let [a, b, c, d, e, f, g, h, i, j, _, _, k, l, m, n] = *bytes;
        Cqe {
            result: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            queue_head: u16::from_le_bytes([i, j]),
            command_id: u16::from_le_bytes([k, l]),
            status: NvmeStatus::from_wire(u16::from_le_bytes([m, n])),
        }
    }

    pub fn emit(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[0..8].copy_from_slice(&self.result.to_le_bytes());
        out[8..10].copy_from_slice(&self.queue_head.to_le_bytes());
        out[12..14].copy_from_slice(&self.command_id.to_le_bytes());
        out[14..16].copy_from_slice(&self.status.to_wire().to_le_bytes());
        out
    }
}

/// Connect, the fields of its submission queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectCommand {
    /// RECFMT; 0 is the only one.
    pub record_format: u16,
    pub queue_id: u16,
    /// SQSIZE as on the wire: entries less one.
    pub queue_size: u16,
    /// CATTR bit 2: no submission queue flow control.
    pub disable_flow_control: bool,
    /// KATO; 0 switches it off.
    pub keep_alive_ms: u32,
}

impl ConnectCommand {
    pub fn parse(sqe: &Sqe) -> ConnectCommand {
        let [first, second, third, ..] = sqe.cdw10_15;
        ConnectCommand {
            record_format: first as u16,
            queue_id: (first >> 16) as u16,
            queue_size: second as u16,
            disable_flow_control: second & 1 << 18 != 0,
            keep_alive_ms: third,
        }
    }

    pub fn emit(&self) -> Sqe {
        let first = u32::from(self.record_format) | u32::from(self.queue_id) << 16;
        let second = u32::from(self.queue_size) | u32::from(self.disable_flow_control) << 18;
        Sqe::fabrics(
            fabrics_type::CONNECT,
            [first, second, self.keep_alive_ms, 0, 0, 0],
        )
    }
}

/// Connect's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectData {
    pub host_id: [u8; 16],
    pub controller_id: u16,
    pub subsystem_nqn: String,
    pub host_nqn: String,
}

/// Offset of CNTLID in Connect's data.
pub const CONNECT_OFFSET_CONTROLLER_ID: u32 = 16;
/// Offset of SUBNQN in Connect's data.
pub const CONNECT_OFFSET_SUBSYSTEM_NQN: u32 = 256;
/// Offset of HOSTNQN in Connect's data.
pub const CONNECT_OFFSET_HOST_NQN: u32 = 512;

/// A zero-terminated NQN field of 256 bytes; None if it is too long or not UTF-8.
fn parse_nqn(field: &[u8]) -> Option<String> {
    let length = field.iter().position(|byte| *byte == 0)?;
    if length > NQN_BYTES_MAX {
        return None;
    }
    let text = std::str::from_utf8(field.get(..length)?).ok()?;
    Some(text.to_owned())
}

impl ConnectData {
    /// Fails with the offset of the field that is wrong. A host without a name is taken, as SPDK's target
    /// takes it: SPDK's `spdk_nvme_perf` has none.
    pub fn parse(bytes: &[u8; CONNECT_DATA_BYTES]) -> Result<ConnectData, u32> {
        let subsystem_nqn = parse_nqn(&bytes[256..512]).filter(|nqn| !nqn.is_empty());
        let mut host_id = [0; 16];
        host_id.copy_from_slice(&bytes[..16]);
        Ok(ConnectData {
            host_id,
            controller_id: u16::from_le_bytes([bytes[16], bytes[17]]),
            subsystem_nqn: subsystem_nqn.ok_or(CONNECT_OFFSET_SUBSYSTEM_NQN)?,
            host_nqn: parse_nqn(&bytes[512..768]).ok_or(CONNECT_OFFSET_HOST_NQN)?,
        })
    }

    /// NQNs longer than [`NQN_BYTES_MAX`] are cut.
    pub fn emit(&self) -> [u8; CONNECT_DATA_BYTES] {
        let mut out = [0; CONNECT_DATA_BYTES];
        out[..16].copy_from_slice(&self.host_id);
        out[16..18].copy_from_slice(&self.controller_id.to_le_bytes());
        for (at, nqn) in [(256, &self.subsystem_nqn), (512, &self.host_nqn)] {
            let bytes = nqn.as_bytes();
            let length = bytes.len().min(NQN_BYTES_MAX);
            out[at..at + length].copy_from_slice(&bytes[..length]);
        }
        out
    }
}

/// One range of Dataset Management, 16 bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatasetRange {
    pub lba: u64,
    pub blocks: u32,
}

impl DatasetRange {
    pub const BYTES: usize = 16;

    pub fn parse(bytes: &[u8; DatasetRange::BYTES]) -> DatasetRange {
        let [_, _, _, _, a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
        DatasetRange {
            blocks: u32::from_le_bytes([a, b, c, d]),
            lba: u64::from_le_bytes([e, f, g, h, i, j, k, l]),
        }
    }

    pub fn emit(&self) -> [u8; DatasetRange::BYTES] {
        let mut out = [0; DatasetRange::BYTES];
        out[4..8].copy_from_slice(&self.blocks.to_le_bytes());
        out[8..].copy_from_slice(&self.lba.to_le_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_submission_entry_survives_the_wire(
            head in any::<(u8, u8, u16, u32, u32, u32)>(),
            tail in any::<(u64, u64, u32, u8, [u32; 6])>(),
        ) {
            let sqe = Sqe {
                opcode: head.0,
                flags: head.1,
                command_id: head.2,
                nsid: head.3,
                cdw2: head.4,
                cdw3: head.5,
                metadata_pointer: tail.0,
                sgl: Sgl { address: tail.1, length_bytes: tail.2, kind: tail.3 },
                cdw10_15: tail.4,
            };
            prop_assert_eq!(Sqe::parse(&sqe.emit()), sqe);
        }

        #[test]
        fn a_completion_entry_survives_the_wire(
            result in any::<u64>(), queue_head in any::<u16>(), command_id in any::<u16>(),
            sct in 0u8..8, sc in any::<u8>(), more in any::<bool>(), dnr in any::<bool>(),
        ) {
            let status = NvmeStatus { sct, sc, more, dnr };
            let cqe = Cqe { result, queue_head, command_id, status };
            prop_assert_eq!(Cqe::parse(&cqe.emit()), cqe);
        }

        #[test]
        fn connect_survives_the_wire(
            host_id in any::<[u8; 16]>(), controller_id in any::<u16>(),
            subsystem_nqn in "[a-z.:0-9]{1,223}", host_nqn in "[a-z.:0-9]{1,223}",
            queue_id in any::<u16>(), queue_size in any::<u16>(),
            disable_flow_control in any::<bool>(), keep_alive_ms in any::<u32>(),
        ) {
            let data = ConnectData { host_id, controller_id, subsystem_nqn, host_nqn };
            prop_assert_eq!(ConnectData::parse(&data.emit()), Ok(data));
            let command = ConnectCommand {
                record_format: 0, queue_id, queue_size, disable_flow_control, keep_alive_ms,
            };
            prop_assert_eq!(ConnectCommand::parse(&command.emit()), command);
        }

        #[test]
        fn a_dataset_range_survives_the_wire(lba in any::<u64>(), blocks in any::<u32>()) {
            let range = DatasetRange { lba, blocks };
            prop_assert_eq!(DatasetRange::parse(&range.emit()), range);
        }
    }

    #[test]
    fn a_connect_without_an_end_of_its_nqn_names_the_field() {
        let mut bytes = [b'n'; CONNECT_DATA_BYTES];
        assert_eq!(
            ConnectData::parse(&bytes),
            Err(CONNECT_OFFSET_SUBSYSTEM_NQN)
        );
        bytes[300] = 0;
        assert_eq!(ConnectData::parse(&bytes), Err(CONNECT_OFFSET_HOST_NQN));
        bytes[256] = 0;
        assert_eq!(
            ConnectData::parse(&bytes),
            Err(CONNECT_OFFSET_SUBSYSTEM_NQN)
        );
    }

    #[test]
    fn a_host_without_a_name_can_connect() {
        let nameless = ConnectData {
            host_id: [1; 16],
            controller_id: CONTROLLER_ID_DYNAMIC,
            subsystem_nqn: "nqn.2016-06.io.spdk:cnode1".into(),
            host_nqn: String::new(),
        };
        assert_eq!(ConnectData::parse(&nameless.emit()), Ok(nameless));
    }
}
