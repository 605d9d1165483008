//! Application I/O on its way into the engine. An unmap or write-zeroes that is longer than the engine takes goes
//! there in parts, one after the other.

use super::super::bdev::{BdevIo, BdevOp, IoError, IoResult, Ticket};
use super::super::core::Core;
use super::super::nvme_tcp::buffer::DataPointer;
use super::super::slab::Key;
use super::context::AppHandle;
use super::submit_app;
use crate::engine::request::RequestKind;
use crate::engine::volume::MAX_ZEROES_BYTES;

/// A long I/O.
pub(super) struct Split {
    ticket: Ticket,
    kind: RequestKind,
    next_lba: u64,
    left_blocks: u64,
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
    let most = most_blocks(this.block_size);
    let carries_no_data = matches!(kind, RequestKind::WriteZeroes { .. } | RequestKind::Unmap);
    if carries_no_data && io.blocks > most {
        let key = this.splits.insert(Split {
            ticket,
            kind,
            next_lba: io.lba,
            left_blocks: io.blocks,
        });
        return go_on(core, volume, key);
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

fn most_blocks(block_size: u32) -> u64 {
    MAX_ZEROES_BYTES / u64::from(block_size.max(1))
}

fn go_on(core: &mut Core, volume: u32, key: Key) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    let most = most_blocks(this.block_size);
    let Some(split) = this.splits.get_mut(key) else {
        return;
    };
    let blocks = split.left_blocks.min(most);
    let (kind, lba) = (split.kind, split.next_lba);
    split.next_lba += blocks;
    split.left_blocks -= blocks;
    submit_app(
        core,
        volume,
        kind,
        lba,
        blocks as u32,
        DataPointer::NONE,
        AppHandle::Part(key),
    );
}

pub(super) fn part_done(core: &mut Core, volume: u32, key: Key, status: IoResult) {
    let Some(this) = core.volumes.get_mut(volume) else {
        return;
    };
    if status.is_ok()
        && this
            .splits
            .get_mut(key)
            .is_some_and(|split| split.left_blocks > 0)
    {
        return go_on(core, volume, key);
    }
    if let Some(split) = this.splits.remove(key) {
        core.complete(split.ticket, status, 0);
    }
}
