//! Application I/O on its way into the engine. An unmap or write-zeroes that is longer than the engine takes goes
//! there in parts, one after the other.

use super::super::bdev::{BdevIo, BdevOp, IoError, IoResult, Ticket};
use super::super::core::Core;
use super::super::nvme_tcp::buffer::DataPointer;
use super::context::AppHandle;
use super::submit_app;
use crate::engine::request::RequestKind;
use crate::hosts::control::split::Parts;
use crate::hosts::slab::Key;

/// A long I/O.
pub(super) struct Split {
    ticket: Ticket,
    kind: RequestKind,
    parts: Parts,
}

pub(super) fn submit(core: &mut Core, volume: u32, ticket: Ticket, io: BdevIo) {
    let kind = match io.op {
        BdevOp::Read => RequestKind::Read,
        BdevOp::Write { fua } => RequestKind::Write { fua },
        BdevOp::Flush => RequestKind::Flush,
        BdevOp::WriteZeroes => RequestKind::WriteZeroes { fua: false },
        BdevOp::Unmap => RequestKind::Unmap,
        BdevOp::Vendor { .. } => {
            return core.complete(ticket, Err(IoError::Errno(libc::EOPNOTSUPP)), 0);
        }
    };
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    if let Some(parts) = Parts::of(kind, io.lba, io.blocks, this.block_size) {
        let split = Split {
            ticket,
            kind,
            parts,
        };
        let key = this.splits.insert(split);
        return go_on(core, volume, key, Ok(()));
    }
    let Ok(blocks) = u32::try_from(io.blocks) else {
        return core.complete(ticket, Err(IoError::Errno(libc::EINVAL)), 0);
    };
    submit_app(
        core,
        volume,
        kind,
        io.lba,
        blocks,
        io.data,
        AppHandle::Whole(ticket),
    );
}

/// The part before has ended like this: the next one, or the end of all.
pub(super) fn go_on(core: &mut Core, volume: u32, key: Key, status: IoResult) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    if status.is_ok()
        && let Some(split) = this.splits.get_mut(key)
        && let Some((lba, blocks)) = split.parts.next_part()
    {
        let (kind, part) = (split.kind, AppHandle::Part(key));
        return submit_app(core, volume, kind, lba, blocks, DataPointer::NONE, part);
    }
    if let Some(split) = this.splits.remove(key) {
        core.complete(split.ticket, status, 0);
    }
}
