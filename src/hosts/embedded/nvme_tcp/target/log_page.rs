//! Log pages of the target, written into the window that the host asks for. Knows no sessions.

use super::subsystem::Namespace;
use crate::hosts::embedded::nvme_tcp::command::{NvmeStatus, admin_opcode, io_opcode};
use crate::hosts::embedded::nvme_tcp::identify::{DISCOVERY_RECORD_BYTES, DiscoveryEntry};

/// The part of a log page that is asked for: everything outside of it is dropped.
pub(super) struct Window<'a> {
    offset: u64,
    out: &'a mut [u8],
}

impl Window<'_> {
    /// `out` shows the page from byte `offset` on.
    pub fn new(offset: u64, out: &mut [u8]) -> Window<'_> {
        Window { offset, out }
    }

    /// Writes bytes at their place in the page.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let place = (at + index as u64).checked_sub(self.offset);
            let place = place.and_then(|place| usize::try_from(place).ok());
            if let Some(place) = place.and_then(|place| self.out.get_mut(place)) {
                *place = *byte;
            }
        }
    }
}

/// Discovery (70h): header and one record per subsystem and listener.
pub(super) fn discovery(
    window: &mut Window<'_>,
    generation: u64,
    entries: &[DiscoveryEntry],
) -> Result<(), NvmeStatus> {
    let record = DISCOVERY_RECORD_BYTES as u64;
    if window.offset > record * (entries.len() as u64 + 1) {
        return Err(NvmeStatus::INVALID_FIELD);
    }
    window.put(0, &generation.to_le_bytes());
    window.put(8, &(entries.len() as u64).to_le_bytes());
    for (index, entry) in entries.iter().enumerate() {
        window.put((index as u64 + 1) * record, &entry.emit());
    }
    Ok(())
}

/// SMART / Health (02h): in good health, at 300 K, all spare available.
pub(super) fn health(window: &mut Window<'_>) {
    window.put(1, &300u16.to_le_bytes());
    window.put(3, &[100]);
}

/// Firmware Slot (03h): one slot with this crate's version.
pub(super) fn firmware_slot(window: &mut Window<'_>) {
    window.put(0, &[1]);
    window.put(8, b"        ");
    window.put(8, env!("CARGO_PKG_VERSION").as_bytes());
}

/// Commands Supported and Effects (05h).
pub(super) fn command_effects(window: &mut Window<'_>) {
    const SUPPORTED: u32 = 1;
    const CHANGES_BLOCKS: u32 = 1 << 1;
    let admin = [
        admin_opcode::GET_LOG_PAGE,
        admin_opcode::IDENTIFY,
        admin_opcode::ABORT,
        admin_opcode::SET_FEATURES,
        admin_opcode::GET_FEATURES,
        admin_opcode::ASYNC_EVENT_REQUEST,
        admin_opcode::KEEP_ALIVE,
    ];
    for opcode in admin {
        window.put(u64::from(opcode) * 4, &SUPPORTED.to_le_bytes());
    }
    let io = [
        (io_opcode::FLUSH, SUPPORTED),
        (io_opcode::WRITE, SUPPORTED | CHANGES_BLOCKS),
        (io_opcode::READ, SUPPORTED),
        (io_opcode::COMPARE, SUPPORTED),
        (io_opcode::WRITE_ZEROES, SUPPORTED | CHANGES_BLOCKS),
        (io_opcode::DATASET_MANAGEMENT, SUPPORTED | CHANGES_BLOCKS),
    ];
    for (opcode, effects) in io {
        window.put(1024 + u64::from(opcode) * 4, &effects.to_le_bytes());
    }
}

/// ANA (0Ch): one group per namespace, with the same number.
pub(super) fn ana(
    window: &mut Window<'_>,
    change_count: u64,
    namespaces: &[Option<Namespace>],
    groups_only: bool,
) {
    let active = || namespaces.iter().flatten();
    window.put(0, &change_count.to_le_bytes());
    window.put(8, &(active().count() as u16).to_le_bytes());
    let mut at = 16;
    for namespace in active() {
        let listed = u32::from(!groups_only);
        window.put(at, &namespace.nsid.to_le_bytes());
        window.put(at + 4, &listed.to_le_bytes());
        window.put(at + 8, &change_count.to_le_bytes());
        window.put(at + 16, &[namespace.ana_state as u8]);
        at += 32;
        if !groups_only {
            window.put(at, &namespace.nsid.to_le_bytes());
            at += 4;
        }
    }
}
