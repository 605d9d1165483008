//! Commands of I/O queues: checked against their namespace and turned into what the backend is asked.
//! Pure functions; knows no connection.

use super::subsystem::{AnaState, Namespace};
use super::{IoKind, NamespaceHandle, NvmfIo};
use crate::hosts::embedded::nvme_tcp::buffer::{BufferUser, DataPointer};
use crate::hosts::embedded::nvme_tcp::command::{
    DatasetRange, NvmeStatus, Sqe, TransferDirection, io_opcode,
};

/// What a command needs before it can be started, and what is then started.
#[derive(Clone, Copy, Debug)]
pub(super) struct IoPlan {
    pub namespace: NamespaceHandle,
    /// Without its data.
    pub io: NvmfIo,
    pub length_bytes: u32,
    /// The backend reads into a second buffer, which is compared with the host's data.
    pub compare: bool,
    pub user: BufferUser,
    /// A Dataset Management without Deallocate: only hints, nothing to do.
    pub no_operation: bool,
}

/// The namespace with this id, if it is active.
pub(super) fn find(namespaces: &[Option<Namespace>], nsid: u32) -> Option<&Namespace> {
    namespaces.get((nsid as usize).checked_sub(1)?)?.as_ref()
}

/// Checks opcode, namespace, LBA range and length.
pub(super) fn plan(
    sqe: &Sqe,
    namespaces: &[Option<Namespace>],
    max_io_size: u32,
    write_through: bool,
) -> Result<IoPlan, NvmeStatus> {
    if sqe.is_fused() {
        return Err(NvmeStatus::INVALID_FIELD);
    }
    let is_vendor = sqe.opcode >= io_opcode::VENDOR_FIRST;
    let is_known = matches!(
        sqe.opcode,
        io_opcode::FLUSH
            | io_opcode::WRITE
            | io_opcode::READ
            | io_opcode::COMPARE
            | io_opcode::WRITE_ZEROES
            | io_opcode::DATASET_MANAGEMENT
    );
    if !is_vendor && !is_known {
        return Err(NvmeStatus::INVALID_OPCODE);
    }
    let namespace = find(namespaces, sqe.nsid).ok_or(NvmeStatus::INVALID_NAMESPACE)?;
    if namespace.vendor_only != is_vendor {
        return Err(if is_vendor {
            NvmeStatus::INVALID_OPCODE
        } else {
            NvmeStatus::ACCESS_DENIED
        });
    }
    if namespace.ana_state == AnaState::Inaccessible {
        return Err(NvmeStatus::ANA_INACCESSIBLE);
    }
    let mut plan = IoPlan {
        namespace: namespace.handle,
        io: NvmfIo {
            kind: IoKind::Flush,
            lba: 0,
            blocks: 0,
            data: DataPointer::NONE,
        },
        length_bytes: 0,
        compare: false,
        user: if namespace.vendor_only {
            BufferUser::Peer
        } else {
            BufferUser::Host
        },
        no_operation: false,
    };
    let fua = sqe.force_unit_access() || write_through;
    match sqe.opcode {
        io_opcode::FLUSH => {}
        io_opcode::DATASET_MANAGEMENT => {
            let [count, attributes, ..] = sqe.cdw10_15;
            let ranges = (count & 0xff) as u16 + 1;
            plan.length_bytes = u32::from(ranges) * DatasetRange::BYTES as u32;
            plan.io.kind = IoKind::Unmap { ranges };
            // AD, attribute deallocate.
            plan.no_operation = attributes & 1 << 2 == 0;
        }
        _ if is_vendor => {
            plan.io.kind = IoKind::Vendor {
                opcode: sqe.opcode,
                cdw2: sqe.cdw2,
                cdw3: sqe.cdw3,
                cdw10_15: sqe.cdw10_15,
            };
            match sqe.direction() {
                TransferDirection::None => {}
                TransferDirection::Both => return Err(NvmeStatus::INVALID_OPCODE),
                _ => plan.length_bytes = sqe.sgl.length_bytes,
            }
        }
        opcode => {
            let (lba, blocks) = (sqe.lba(), sqe.blocks());
            let end = lba.checked_add(u64::from(blocks));
            if end.is_none_or(|end| end > namespace.size_blocks) {
                return Err(NvmeStatus::LBA_OUT_OF_RANGE);
            }
            plan.io.lba = lba;
            plan.io.blocks = blocks;
            plan.io.kind = match opcode {
                io_opcode::WRITE => IoKind::Write { fua },
                io_opcode::WRITE_ZEROES => IoKind::WriteZeroes {
                    fua,
                    may_unmap: sqe.cdw10_15[2] & 1 << 25 != 0,
                },
                _ => IoKind::Read,
            };
            plan.compare = opcode == io_opcode::COMPARE;
            if opcode != io_opcode::WRITE_ZEROES {
                plan.length_bytes = blocks
                    .checked_mul(namespace.block_size)
                    .ok_or(NvmeStatus::INVALID_FIELD)?;
            }
        }
    }
    // MDTS.
    if plan.length_bytes > max_io_size {
        return Err(NvmeStatus::INVALID_FIELD);
    }
    Ok(plan)
}

/// Whether every range of a Dataset Management lies inside of the namespace.
pub(super) fn check_ranges(data: &[u8], size_blocks: u64) -> Result<(), NvmeStatus> {
    for bytes in data.chunks_exact(DatasetRange::BYTES) {
        let Some(range) = bytes.first_chunk().map(DatasetRange::parse) else {
            return Err(NvmeStatus::INVALID_FIELD);
        };
        let end = range.lba.checked_add(u64::from(range.blocks));
        if end.is_none_or(|end| end > size_blocks) {
            return Err(NvmeStatus::LBA_OUT_OF_RANGE);
        }
    }
    Ok(())
}
