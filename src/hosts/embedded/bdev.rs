//! Block devices as a core sees them: what an I/O is, who gets its completion, the table of bdevs that
//! every core has a copy of, and their counters. The control path's side (names, claims) is in
//! `registry.rs`; how an I/O reaches a disk is in `core.rs`.

use std::sync::Arc;

use super::disk::FileDisk;
use super::malloc::MallocDisk;
use super::nvme_tcp::buffer::DataPointer;
use super::nvme_tcp::command::NvmeStatus;
use crate::hosts::slab::Key;

/// A bdev, the same on all cores of the node. An id of a deleted bdev finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BdevId {
    pub index: u32,
    pub generation: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BdevOp {
    Read,
    Write {
        /// Durable when it completes.
        fua: bool,
    },
    /// What completed before this was submitted is durable when this completes; `lba` and `blocks` are
    /// not looked at.
    Flush,
    WriteZeroes,
    /// The blocks read as zeroes afterwards, and their space may be given back.
    Unmap,
    /// An NVMe command with a vendor specific opcode (80h to FFh); only endpoints take it.
    Vendor {
        opcode: u8,
        cdw2: u32,
        cdw3: u32,
        cdw10_15: [u32; 6],
    },
}

/// One I/O, in blocks of its bdev.
#[derive(Clone, Copy, Debug)]
pub struct BdevIo {
    pub op: BdevOp,
    pub lba: u64,
    pub blocks: u64,
    /// Lent until the I/O completes; files want it aligned to their block size (4096 always is).
    pub data: DataPointer,
}

/// Why an I/O failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// A positive errno.
    Errno(i32),
    /// What an NVMe controller said.
    Nvme(NvmeStatus),
}

impl std::fmt::Display for IoError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Errno(errno) => write!(f, "{}", std::io::Error::from_raw_os_error(*errno)),
            Self::Nvme(status) => write!(f, "{status:?}"),
        }
    }
}

pub type IoResult = Result<(), IoError>;

/// Who gets the completion of a block I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A request of a connection of the NVMe/TCP target on this core.
    Nvmf(super::target::RequestHandle),
    /// A request of the target that takes several I/Os.
    Combined(Key),
    /// An I/O of an NVMe bdev, of which this is a command.
    Remote(Key),
    /// The engine: its volume and its token.
    Volume { volume: u32, token: u64 },
    /// A one-shot closure of the control path.
    Control(Key),
}

/// A completion on its way to its owner.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    pub owner: Owner,
    pub status: IoResult,
    /// Dword 0 of the NVMe completion; 0 where there is none.
    pub dword0: u32,
}

/// An I/O that a bdev has taken and has to answer once, by `Core::complete`.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    pub bdev: BdevId,
    pub owner: Owner,
    pub kind: IoKind,
    pub length_bytes: u64,
    pub submitted_ns: u64,
}

/// The kinds of I/O that the counters tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    Read,
    Write,
    Unmap,
    Other,
}

impl From<BdevOp> for IoKind {
    fn from(op: BdevOp) -> Self {
        match op {
            BdevOp::Read => Self::Read,
            BdevOp::Write { .. } => Self::Write,
            BdevOp::Unmap => Self::Unmap,
            BdevOp::Flush | BdevOp::WriteZeroes | BdevOp::Vendor { .. } => Self::Other,
        }
    }
}

/// Counters of one kind of I/O. Ticks are nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationStat {
    pub bytes: u64,
    pub ops: u64,
    pub latency_ticks: u64,
    /// Shortest and longest since the last reset of either.
    pub latency_range_ticks: Option<(u64, u64)>,
}

impl OperationStat {
    fn count(&mut self, length_bytes: u64, latency_ticks: u64) {
        self.add(&Self {
            bytes: length_bytes,
            ops: 1,
            latency_ticks,
            latency_range_ticks: Some((latency_ticks, latency_ticks)),
        });
    }

    fn add(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.ops += other.ops;
        self.latency_ticks += other.latency_ticks;
        self.latency_range_ticks = match (self.latency_range_ticks, other.latency_range_ticks) {
            (Some((low, high)), Some((other_low, other_high))) => {
                Some((low.min(other_low), high.max(other_high)))
            }
            (one, None) | (None, one) => one,
        };
    }
}

/// The counters of SPDK's `bdev_get_iostat`, of one core or summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStat {
    pub read: OperationStat,
    pub write: OperationStat,
    pub unmap: OperationStat,
    pub num_failed_ops: u64,
}

impl IoStat {
    pub const TICK_RATE: u64 = 1_000_000_000;

    fn count(&mut self, kind: IoKind, length_bytes: u64, latency_ticks: u64) {
        match kind {
            IoKind::Read => self.read.count(length_bytes, latency_ticks),
            IoKind::Write => self.write.count(length_bytes, latency_ticks),
            IoKind::Unmap => self.unmap.count(length_bytes, latency_ticks),
            IoKind::Other => {}
        }
    }

    /// Adds another core's counters.
    pub fn add(&mut self, other: &Self) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.unmap.add(&other.unmap);
        self.num_failed_ops += other.num_failed_ops;
    }

    /// Forgets the shortest and longest latencies.
    pub fn reset_latency_ranges(&mut self) {
        for operation in [&mut self.read, &mut self.write, &mut self.unmap] {
            operation.latency_range_ticks = None;
        }
    }
}

/// What a bdev is made of.
#[derive(Clone, Debug)]
pub enum BdevKind {
    Malloc(Arc<MallocDisk>),
    File(Arc<FileDisk>),
    /// A namespace of an NVMe-oF controller that this node is connected to.
    Nvme(super::remote::Place),
    /// The application's side of a replicated volume.
    Volume(u32),
    /// The peers' side of a replicated volume: takes vendor commands only.
    Endpoint(u32),
}

/// One core's view of a bdev.
pub struct CoreBdev {
    pub kind: BdevKind,
    pub block_size: u32,
    pub num_blocks: u64,
    /// Taken and not yet answered, on this core.
    pub in_flight: u32,
    pub stat: IoStat,
    /// Being deleted: takes no more I/O.
    pub closing: bool,
}

/// The bdevs as one core sees them; the same entries on every core.
#[derive(Default)]
pub struct BdevTable {
    slots: Vec<Option<(u32, CoreBdev)>>,
}

impl BdevTable {
    pub fn insert(&mut self, id: BdevId, bdev: CoreBdev) {
        let index = id.index as usize;
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        self.slots[index] = Some((id.generation, bdev));
    }

    pub fn get(&self, id: BdevId) -> Option<&CoreBdev> {
        match self.slots.get(id.index as usize) {
            Some(Some((generation, bdev))) if *generation == id.generation => Some(bdev),
            _ => None,
        }
    }

    pub fn get_mut(&mut self, id: BdevId) -> Option<&mut CoreBdev> {
        match self.slots.get_mut(id.index as usize) {
            Some(Some((generation, bdev))) if *generation == id.generation => Some(bdev),
            _ => None,
        }
    }

    pub fn remove(&mut self, id: BdevId) -> Option<CoreBdev> {
        self.get(id)?;
        self.slots[id.index as usize].take().map(|(_, bdev)| bdev)
    }

    /// Counts an answered I/O.
    pub fn count(&mut self, ticket: &Ticket, status: IoResult, now_ns: u64) {
        let Some(bdev) = self.get_mut(ticket.bdev) else {
            return;
        };
        bdev.in_flight -= 1;
        match status {
            Ok(()) => bdev.stat.count(
                ticket.kind,
                ticket.length_bytes,
                now_ns.saturating_sub(ticket.submitted_ns),
            ),
            Err(_) => bdev.stat.num_failed_ops += 1,
        }
    }
}

impl CoreBdev {
    /// Whether an I/O is one that this bdev may be asked for.
    pub fn check(&self, io: &BdevIo) -> IoResult {
        let refused = |errno| Err(IoError::Errno(errno));
        if self.closing {
            return refused(libc::ENODEV);
        }
        let endpoint = matches!(self.kind, BdevKind::Endpoint(_));
        match io.op {
            BdevOp::Vendor { .. } if endpoint => return Ok(()),
            BdevOp::Vendor { .. } => return refused(libc::EOPNOTSUPP),
            _ if endpoint => return refused(libc::EOPNOTSUPP),
            BdevOp::Flush => return Ok(()),
            BdevOp::Read | BdevOp::Write { .. } => {
                let length_bytes = u64::from(io.data.length_bytes());
                if io.blocks.checked_mul(u64::from(self.block_size)) != Some(length_bytes) {
                    return refused(libc::EINVAL);
                }
            }
            BdevOp::WriteZeroes | BdevOp::Unmap => {}
        }
        let inside = io
            .lba
            .checked_add(io.blocks)
            .is_some_and(|end| end <= self.num_blocks);
        // A write past the end of a file would make the file larger.
        if io.blocks == 0 || !inside {
            return refused(libc::EINVAL);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn malloc_bdev(num_blocks: u64) -> CoreBdev {
        CoreBdev {
            kind: BdevKind::Malloc(Arc::new(MallocDisk::new(num_blocks * 512).unwrap())),
            block_size: 512,
            num_blocks,
            in_flight: 0,
            stat: IoStat::default(),
            closing: false,
        }
    }

    #[test]
    fn io_outside_of_the_bdev_is_refused() {
        let bdev = malloc_bdev(8);
        let zeroes = |lba, blocks| {
            bdev.check(&BdevIo {
                op: BdevOp::WriteZeroes,
                lba,
                blocks,
                data: DataPointer::NONE,
            })
        };
        assert_eq!(zeroes(0, 8), Ok(()));
        assert_eq!(zeroes(7, 1), Ok(()));
        for (lba, blocks) in [(0, 9), (8, 1), (0, 0), (u64::MAX, 1), (1, u64::MAX)] {
            assert_eq!(zeroes(lba, blocks), Err(IoError::Errno(libc::EINVAL)));
        }
    }

    #[test]
    fn a_length_that_is_not_the_blocks_is_refused() {
        let bdev = malloc_bdev(8);
        let read = |blocks, length_bytes| {
            bdev.check(&BdevIo {
                op: BdevOp::Read,
                lba: 0,
                blocks,
                // SAFETY: only checked, never used.
                data: unsafe { DataPointer::new(std::ptr::null_mut(), length_bytes) },
            })
        };
        assert_eq!(read(2, 1024), Ok(()));
        assert_eq!(read(2, 1023), Err(IoError::Errno(libc::EINVAL)));
        assert_eq!(read(u64::MAX / 4, 512), Err(IoError::Errno(libc::EINVAL)));
    }

    #[test]
    fn an_old_id_finds_no_later_bdev() {
        let mut table = BdevTable::default();
        let id = |generation| BdevId {
            index: 3,
            generation,
        };
        table.insert(id(1), malloc_bdev(1));
        assert!(table.get(id(1)).is_some());
        assert!(table.remove(id(1)).is_some());
        table.insert(id(2), malloc_bdev(1));
        assert!(table.get(id(1)).is_none());
        assert!(table.remove(id(1)).is_none());
        assert!(table.get_mut(id(2)).is_some());
    }
}
