//! The data structures that Identify and Get Log Page return: what a target fills in and an initiator
//! reads. Knows no queues and no policy; offsets are those of NVMe Base 1.4 and NVMe-oF 1.1.

/// Length of every Identify structure, in bytes.
pub const IDENTIFY_BYTES: usize = 4096;
/// Length of the header and of each entry of the discovery log page, in bytes.
pub const DISCOVERY_RECORD_BYTES: usize = 1024;

fn put(out: &mut [u8], offset: usize, bytes: &[u8]) {
    for (to, from) in out.iter_mut().skip(offset).zip(bytes) {
        *to = *from;
    }
}

fn take<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

/// Text of a fixed field: cut to `width`, padded with spaces.
fn put_text(out: &mut [u8], offset: usize, width: usize, text: &str) {
    for index in 0..width {
        let byte = text.as_bytes().get(index).copied().unwrap_or(b' ');
        put(out, offset + index, &[byte]);
    }
}

/// Text of a fixed field, with the padding (spaces or zeroes) taken off.
fn take_text(bytes: &[u8], offset: usize, width: usize) -> String {
    let field = bytes.get(offset..offset + width).unwrap_or(&[]);
    let length = field.iter().position(|byte| *byte == 0).unwrap_or(width);
    let field = field.get(..length).unwrap_or(field);
    String::from_utf8_lossy(field).trim_end().to_owned()
}

/// Identify Controller (CNS 01h), the fields that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdentifyController {
    pub serial_number: String,
    pub model_number: String,
    pub firmware_revision: String,
    /// CMIC.
    pub multipath: u8,
    /// MDTS: the longest transfer is 4096 bytes times two to the power of this; 0 is no limit.
    pub max_transfer_exponent: u8,
    pub controller_id: u16,
    pub version: u32,
    /// OAES.
    pub async_events: u32,
    /// CTRATT.
    pub attributes: u32,
    /// CNTRLTYPE: 1 I/O, 2 discovery.
    pub controller_type: u8,
    pub abort_limit: u8,
    pub async_event_limit: u8,
    pub firmware_updates: u8,
    pub log_attributes: u8,
    pub error_log_limit: u8,
    /// KAS, in units of 100 ms.
    pub keep_alive_granularity: u16,
    pub ana_transition_s: u8,
    pub ana_capabilities: u8,
    pub ana_group_max: u32,
    pub ana_groups: u32,
    pub max_commands: u16,
    /// NN.
    pub namespaces_max: u32,
    /// MNAN; needed with ANA, since hosts make room for the ANA log by it.
    pub namespaces_allowed: u32,
    /// ONCS.
    pub optional_commands: u16,
    /// VWC.
    pub volatile_write_cache: u8,
    /// SGLS.
    pub sgl_support: u32,
    pub subsystem_nqn: String,
    /// IOCCSZ, in units of 16 bytes.
    pub command_capsule_units: u32,
    /// IORCSZ, in units of 16 bytes.
    pub response_capsule_units: u32,
    /// ICDOFF, in units of 16 bytes.
    pub in_capsule_offset_units: u16,
    /// MSDBD.
    pub sgl_descriptors_max: u8,
    /// OFCS.
    pub optional_fabric_commands: u16,
}

impl IdentifyController {
    /// Fills a zeroed structure.
    pub fn emit(&self, out: &mut [u8; IDENTIFY_BYTES]) {
        put_text(out, 4, 20, &self.serial_number);
        put_text(out, 24, 40, &self.model_number);
        put_text(out, 64, 8, &self.firmware_revision);
        put(out, 76, &[self.multipath, self.max_transfer_exponent]);
        put(out, 78, &self.controller_id.to_le_bytes());
        put(out, 80, &self.version.to_le_bytes());
        put(out, 92, &self.async_events.to_le_bytes());
        put(out, 96, &self.attributes.to_le_bytes());
        put(out, 111, &[self.controller_type]);
        let limits = [
            self.abort_limit,
            self.async_event_limit,
            self.firmware_updates,
            self.log_attributes,
            self.error_log_limit,
        ];
        put(out, 258, &limits);
        put(out, 320, &self.keep_alive_granularity.to_le_bytes());
        put(out, 342, &[self.ana_transition_s, self.ana_capabilities]);
        put(out, 344, &self.ana_group_max.to_le_bytes());
        put(out, 348, &self.ana_groups.to_le_bytes());
        // SQES and CQES: entries of 64 and 16 bytes, required and maximal.
        put(out, 512, &[0x66, 0x44]);
        put(out, 514, &self.max_commands.to_le_bytes());
        put(out, 516, &self.namespaces_max.to_le_bytes());
        put(out, 520, &self.optional_commands.to_le_bytes());
        put(out, 525, &[self.volatile_write_cache]);
        put(out, 536, &self.sgl_support.to_le_bytes());
        put(out, 540, &self.namespaces_allowed.to_le_bytes());
        put(out, 768, self.subsystem_nqn.as_bytes());
        put(out, 1792, &self.command_capsule_units.to_le_bytes());
        put(out, 1796, &self.response_capsule_units.to_le_bytes());
        put(out, 1800, &self.in_capsule_offset_units.to_le_bytes());
        put(out, 1803, &[self.sgl_descriptors_max]);
        put(out, 1804, &self.optional_fabric_commands.to_le_bytes());
    }

    pub fn parse(bytes: &[u8; IDENTIFY_BYTES]) -> IdentifyController {
        let byte = |offset: usize| take::<1>(bytes, offset)[0];
        let half = |offset| u16::from_le_bytes(take(bytes, offset));
        let word = |offset| u32::from_le_bytes(take(bytes, offset));
        IdentifyController {
            serial_number: take_text(bytes, 4, 20),
            model_number: take_text(bytes, 24, 40),
            firmware_revision: take_text(bytes, 64, 8),
            multipath: byte(76),
            max_transfer_exponent: byte(77),
            controller_id: half(78),
            version: word(80),
            async_events: word(92),
            attributes: word(96),
            controller_type: byte(111),
            abort_limit: byte(258),
            async_event_limit: byte(259),
            firmware_updates: byte(260),
            log_attributes: byte(261),
            error_log_limit: byte(262),
            keep_alive_granularity: half(320),
            ana_transition_s: byte(342),
            ana_capabilities: byte(343),
            ana_group_max: word(344),
            ana_groups: word(348),
            max_commands: half(514),
            namespaces_max: word(516),
            optional_commands: half(520),
            volatile_write_cache: byte(525),
            sgl_support: word(536),
            namespaces_allowed: word(540),
            subsystem_nqn: take_text(bytes, 768, 256),
            command_capsule_units: word(1792),
            response_capsule_units: word(1796),
            in_capsule_offset_units: half(1800),
            sgl_descriptors_max: byte(1803),
            optional_fabric_commands: half(1804),
        }
    }
}

/// DLFEAT bits 2:0: what is read after deallocation is zeroes (NVMe NVM Command Set 1.0).
pub const DEALLOCATED_READS_ZEROES: u8 = 1;
/// DLFEAT bit 3: the namespace takes the deallocate bit of Write Zeroes.
pub const WRITE_ZEROES_DEALLOCATES: u8 = 1 << 3;

/// Identify Namespace (CNS 00h), the fields that matter here. One LBA format without metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IdentifyNamespace {
    /// NSZE, NCAP and NUSE; 0 means that the namespace is not active.
    pub size_blocks: u64,
    /// LBADS of the format in use: blocks of two to the power of this bytes.
    pub block_size_exponent: u8,
    /// Bytes of metadata with each block in the format in use.
    pub metadata_bytes: u16,
    /// NSFEAT.
    pub features: u8,
    /// NMIC.
    pub sharing: u8,
    /// DLFEAT.
    pub deallocate_features: u8,
    pub ana_group: u32,
    pub nguid: [u8; 16],
    pub eui64: [u8; 8],
}

impl IdentifyNamespace {
    /// Fills a zeroed structure.
    pub fn emit(&self, out: &mut [u8; IDENTIFY_BYTES]) {
        let size = self.size_blocks.to_le_bytes();
        for offset in [0, 8, 16] {
            put(out, offset, &size);
        }
        put(out, 24, &[self.features]);
        put(out, 30, &[self.sharing]);
        put(out, 33, &[self.deallocate_features]);
        put(out, 92, &self.ana_group.to_le_bytes());
        put(out, 104, &self.nguid);
        put(out, 120, &self.eui64);
        let format = u32::from(self.metadata_bytes) | u32::from(self.block_size_exponent) << 16;
        put(out, 128, &format.to_le_bytes());
    }

    pub fn parse(bytes: &[u8; IDENTIFY_BYTES]) -> IdentifyNamespace {
        // FLBAS bits 3:0 choose among at most 16 formats.
        let chosen = usize::from(take::<1>(bytes, 26)[0] & 0x0f);
        let format = u32::from_le_bytes(take(bytes, 128 + 4 * chosen));
        IdentifyNamespace {
            size_blocks: u64::from_le_bytes(take(bytes, 0)),
            block_size_exponent: (format >> 16) as u8,
            metadata_bytes: format as u16,
            features: take::<1>(bytes, 24)[0],
            sharing: take::<1>(bytes, 30)[0],
            deallocate_features: take::<1>(bytes, 33)[0],
            ana_group: u32::from_le_bytes(take(bytes, 92)),
            nguid: take(bytes, 104),
            eui64: take(bytes, 120),
        }
    }

    /// Block size in bytes; None if it is not one that anybody uses (512 to 65536).
    pub fn block_size_bytes(&self) -> Option<u32> {
        (9..=16)
            .contains(&self.block_size_exponent)
            .then(|| 1 << self.block_size_exponent)
    }
}

/// Namespace Identification Descriptor list (CNS 03h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceDescriptors {
    pub eui64: Option<[u8; 8]>,
    pub nguid: Option<[u8; 16]>,
    pub uuid: Option<[u8; 16]>,
}

impl NamespaceDescriptors {
    const EUI64: u8 = 1;
    const NGUID: u8 = 2;
    const UUID: u8 = 3;
    const COMMAND_SET: u8 = 4;

    /// Fills a zeroed structure.
    pub fn emit(&self, out: &mut [u8; IDENTIFY_BYTES]) {
        let mut at = 0;
        let mut add = |kind: u8, value: &[u8]| {
            put(out, at, &[kind, value.len() as u8]);
            put(out, at + 4, value);
            at += 4 + value.len();
        };
        if let Some(eui64) = &self.eui64 {
            add(NamespaceDescriptors::EUI64, eui64);
        }
        if let Some(nguid) = &self.nguid {
            add(NamespaceDescriptors::NGUID, nguid);
        }
        if let Some(uuid) = &self.uuid {
            add(NamespaceDescriptors::UUID, uuid);
        }
        // The NVM command set is number 0.
        add(NamespaceDescriptors::COMMAND_SET, &[0]);
    }

    /// Takes what it knows and stops at the end of the list or at nonsense.
    pub fn parse(bytes: &[u8; IDENTIFY_BYTES]) -> NamespaceDescriptors {
        let mut found = NamespaceDescriptors::default();
        let mut rest: &[u8] = bytes;
        while let [kind, length, _, _, after @ ..] = rest {
            let length = usize::from(*length);
            if length == 0 {
                break;
            }
            let Some((value, next)) = after.split_at_checked(length) else {
                break;
            };
            match *kind {
                NamespaceDescriptors::EUI64 => found.eui64 = value.try_into().ok(),
                NamespaceDescriptors::NGUID => found.nguid = value.try_into().ok(),
                NamespaceDescriptors::UUID => found.uuid = value.try_into().ok(),
                _ => {}
            }
            rest = next;
        }
        found
    }
}

/// Active Namespace ID list (CNS 02h): the NSIDs up to the first zero.
pub fn parse_active_namespaces(bytes: &[u8; IDENTIFY_BYTES]) -> impl Iterator<Item = u32> + '_ {
    bytes
        .chunks_exact(4)
        .map(|chunk| u32::from_le_bytes(take(chunk, 0)))
        .take_while(|nsid| *nsid != 0)
}

/// One entry of the discovery log page: a subsystem at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryEntry {
    /// 3 is TCP.
    pub transport_type: u8,
    /// 1 IPv4, 2 IPv6.
    pub address_family: u8,
    /// 2 is an NVM subsystem.
    pub subsystem_type: u8,
    pub port_id: u16,
    /// TRSVCID: the port, as text.
    pub service: String,
    pub subsystem_nqn: String,
    pub address: String,
}

impl DiscoveryEntry {
    pub fn emit(&self) -> [u8; DISCOVERY_RECORD_BYTES] {
        let mut out = [0; DISCOVERY_RECORD_BYTES];
        // TREQ: secure channel not required, flow control may be switched off.
        let kinds = [
            self.transport_type,
            self.address_family,
            self.subsystem_type,
            0x06,
        ];
        put(&mut out, 0, &kinds);
        put(&mut out, 4, &self.port_id.to_le_bytes());
        // CNTLID: any; ASQSZ: 32 entries at least.
        put(&mut out, 6, &0xffffu16.to_le_bytes());
        put(&mut out, 8, &32u16.to_le_bytes());
        put_text(&mut out, 32, 32, &self.service);
        put(&mut out, 256, self.subsystem_nqn.as_bytes());
        put_text(&mut out, 512, 256, &self.address);
        out
    }

    pub fn parse(bytes: &[u8; DISCOVERY_RECORD_BYTES]) -> DiscoveryEntry {
        DiscoveryEntry {
            transport_type: bytes[0],
            address_family: bytes[1],
            subsystem_type: bytes[2],
            port_id: u16::from_le_bytes(take(bytes, 4)),
            service: take_text(bytes, 32, 32),
            subsystem_nqn: take_text(bytes, 256, 256),
            address: take_text(bytes, 512, 256),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_controller_structure_survives_the_wire_with_fields_at_their_offsets() {
        let controller = IdentifyController {
            serial_number: "S1".into(),
            model_number: "bdev_repl".into(),
            firmware_revision: "0.1".into(),
            max_transfer_exponent: 5,
            controller_id: 0x1234,
            version: 0x10400,
            namespaces_max: 32,
            sgl_support: 0x30_0001,
            subsystem_nqn: "nqn.2016-06.io.spdk:cnode1".into(),
            command_capsule_units: 260,
            response_capsule_units: 1,
            controller_type: 1,
            keep_alive_granularity: 10,
            ..IdentifyController::default()
        };
        let mut out = [0; IDENTIFY_BYTES];
        controller.emit(&mut out);
        assert_eq!(IdentifyController::parse(&out), controller);
        assert_eq!(&out[4..8], b"S1  ");
        assert_eq!(out[77], 5);
        assert_eq!(out[78..80], [0x34, 0x12]);
        assert_eq!(out[320], 10);
        assert_eq!(out[512..514], [0x66, 0x44]);
        assert_eq!(out[1792..1794], [4, 1]);
        assert_eq!(out[111], 1);
    }

    proptest! {
        #[test]
        fn the_namespace_structure_survives_the_wire(
            size_blocks in any::<u64>(), block_size_exponent in any::<u8>(), nguid in any::<[u8; 16]>(),
            eui64 in any::<[u8; 8]>(), ana_group in any::<u32>(), sharing in any::<u8>(),
        ) {
            let namespace = IdentifyNamespace {
                size_blocks, block_size_exponent, nguid, eui64, ana_group, sharing,
                ..IdentifyNamespace::default()
            };
            let mut out = [0; IDENTIFY_BYTES];
            namespace.emit(&mut out);
            prop_assert_eq!(IdentifyNamespace::parse(&out), namespace);
        }

        #[test]
        fn descriptors_survive_the_wire(
            eui64 in any::<Option<[u8; 8]>>(), nguid in any::<Option<[u8; 16]>>(),
            uuid in any::<Option<[u8; 16]>>(),
        ) {
            let descriptors = NamespaceDescriptors { eui64, nguid, uuid };
            let mut out = [0; IDENTIFY_BYTES];
            descriptors.emit(&mut out);
            prop_assert_eq!(NamespaceDescriptors::parse(&out), descriptors);
        }

        #[test]
        fn any_structure_is_parsed_without_a_panic(seed in prop::collection::vec(any::<u8>(), 1..64)) {
            let mut bytes = [0; IDENTIFY_BYTES];
            for (to, from) in bytes.iter_mut().zip(seed.iter().cycle()) {
                *to = *from;
            }
            let _ = IdentifyController::parse(&bytes);
            let _ = IdentifyNamespace::parse(&bytes).block_size_bytes();
            let _ = NamespaceDescriptors::parse(&bytes);
            let _ = parse_active_namespaces(&bytes).count();
            let _ = DiscoveryEntry::parse(bytes.first_chunk().unwrap());
        }

        #[test]
        fn a_discovery_entry_survives_the_wire(
            port_id in any::<u16>(), service in "[0-9]{1,5}", subsystem_nqn in "[a-z:.]{1,223}",
            address in "[0-9.]{1,15}",
        ) {
            let entry = DiscoveryEntry {
                transport_type: 3, address_family: 1, subsystem_type: 2,
                port_id, service, subsystem_nqn, address,
            };
            prop_assert_eq!(DiscoveryEntry::parse(&entry.emit()), entry);
        }
    }
}
