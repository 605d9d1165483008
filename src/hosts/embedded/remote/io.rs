//! I/O of NVMe bdevs on one core: cut into commands of what the controller takes, one after the other, and
//! kept while the queue pair is full. Called by the core's dispatch and loop; which queue pair there is
//! the control path's business.

use std::collections::BTreeMap;

use super::{CoreRemotes, Path, TRANSFER_MAX_BYTES};
use crate::hosts::embedded::bdev::{BdevIo, BdevKind, BdevOp, IoError, IoResult, Owner, Ticket};
use crate::hosts::embedded::core::Core;
use crate::hosts::embedded::initiator::QueueKey;
use crate::hosts::embedded::nvme_tcp::buffer::DataPointer;
use crate::hosts::embedded::nvme_tcp::command::{Sqe, io_opcode};
use crate::hosts::embedded::nvme_tcp::initiator::SubmitError;
use crate::hosts::slab::Key;

/// NLB has 16 bits, and is one less.
const BLOCKS_MAX: u64 = 1 << 16;
/// Dword 12 of Write Zeroes: deallocate (NVMe NVM Command Set 1.0, DEAC).
const DEALLOCATE: u32 = 1 << 25;

/// Where an I/O goes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub controller: u32,
    pub namespace_id: u32,
    /// The namespace is there, and is the disk that the bdev was made of.
    pub present: bool,
    /// Write Zeroes may deallocate.
    pub deallocates: bool,
}

/// One I/O on its way.
pub(super) struct RemoteIo {
    ticket: Ticket,
    io: BdevIo,
    place: Place,
    block_size: u32,
    done_blocks: u64,
}

impl CoreRemotes {
    /// I/O that found its queue full is started as far as there is room.
    fn take_waiting(&mut self, available: impl Fn(QueueKey) -> usize) -> Option<Key> {
        self.paths.values_mut().find_map(|path| {
            let room = path.queue.map_or(0, &available);
            if room > 0 || !path.up {
                path.waiting.pop_front()
            } else {
                None
            }
        })
    }
}

/// Starts an I/O of an NVMe bdev.
pub fn submit(core: &mut Core, place: Place, ticket: Ticket, io: BdevIo) {
    let block_size = core
        .bdevs
        .get(ticket.bdev)
        .map_or(512, |bdev| bdev.block_size);
    let key = core.remotes.ios.insert(RemoteIo {
        ticket,
        io,
        place,
        block_size,
        done_blocks: 0,
    });
    step(core, key);
}

/// A command was answered: the next one, or the end of the I/O.
pub fn go_on(core: &mut Core, key: Key, status: IoResult, dword0: u32) {
    let Some(io) = core.remotes.ios.get_mut(key) else {
        return;
    };
    if status.is_ok() {
        io.done_blocks += io.next_blocks(transfer_of(&core.remotes.paths, io.place.controller));
        if io.done_blocks < io.io.blocks && io.io.op != BdevOp::Flush {
            return step(core, key);
        }
    }
    if let Some(io) = core.remotes.ios.remove(key) {
        core.complete(io.ticket, status, dword0);
    }
}

fn transfer_of(paths: &BTreeMap<u32, Path>, controller: u32) -> u32 {
    paths
        .get(&controller)
        .map_or(TRANSFER_MAX_BYTES, |path| path.max_transfer_bytes)
}

impl RemoteIo {
    /// Blocks of the command that is under way or comes next.
    fn next_blocks(&self, max_transfer_bytes: u32) -> u64 {
        let limit = match self.io.op {
            BdevOp::Read | BdevOp::Write { .. } => {
                u64::from(max_transfer_bytes / self.block_size).clamp(1, BLOCKS_MAX)
            }
            _ => BLOCKS_MAX,
        };
        (self.io.blocks - self.done_blocks).min(limit)
    }

    fn command(&self, max_transfer_bytes: u32) -> Option<(Sqe, DataPointer)> {
        let blocks = self.next_blocks(max_transfer_bytes);
        let lba = self.io.lba + self.done_blocks;
        let namespace_id = self.place.namespace_id;
        let plain = |opcode, fua| Sqe::block_command(opcode, namespace_id, lba, blocks as u32, fua);
        let data = || {
            let offset_bytes = self.done_blocks * u64::from(self.block_size);
            let length_bytes = blocks * u64::from(self.block_size);
            self.io.data.part(
                u32::try_from(offset_bytes).ok()?,
                u32::try_from(length_bytes).ok()?,
            )
        };
        let none = DataPointer::NONE;
        Some(match self.io.op {
            BdevOp::Read => (plain(io_opcode::READ, false), data()?),
            BdevOp::Write { fua } => (plain(io_opcode::WRITE, fua), data()?),
            BdevOp::WriteZeroes => (plain(io_opcode::WRITE_ZEROES, false), none),
            BdevOp::Unmap => {
                // Dataset Management promises nothing about what is read afterwards.
                let mut sqe = plain(io_opcode::WRITE_ZEROES, false);
                if self.place.deallocates {
                    sqe.cdw10_15[2] |= DEALLOCATE;
                }
                (sqe, none)
            }
            BdevOp::Flush => {
                let sqe = Sqe {
                    opcode: io_opcode::FLUSH,
                    nsid: namespace_id,
                    ..Sqe::default()
                };
                (sqe, none)
            }
            BdevOp::Vendor { .. } => return None,
        })
    }
}

fn step(core: &mut Core, key: Key) {
    let remotes = &mut core.remotes;
    let Some(io) = remotes.ios.get(key) else {
        return;
    };
    // As it is now: the disk can have gone since the I/O began.
    let present = core
        .bdevs
        .get(io.ticket.bdev)
        .is_some_and(|bdev| matches!(bdev.kind, BdevKind::Nvme(place) if place.present));
    let path = remotes.paths.get_mut(&io.place.controller);
    let ready = path.and_then(|path| Some((path.queue.filter(|_| path.up && present)?, path)));
    let Some((queue, path)) = ready else {
        return fail(core, key, libc::ENXIO);
    };
    let Some((sqe, data)) = io.command(path.max_transfer_bytes) else {
        return fail(core, key, libc::EOPNOTSUPP);
    };
    match core.initiators.submit(queue, sqe, data, Owner::Remote(key)) {
        Ok(()) => {}
        Err(SubmitError::Busy) => path.waiting.push_back(key),
        Err(SubmitError::NotReady) => fail(core, key, libc::ENXIO),
    }
}

fn fail(core: &mut Core, key: Key, errno: i32) {
    if let Some(io) = core.remotes.ios.remove(key) {
        core.complete(io.ticket, Err(IoError::Errno(errno)), 0);
    }
}

/// Once a round of the loop: I/O that found its queue full. Returns whether there was work.
pub fn poll(core: &mut Core) -> bool {
    let mut worked = false;
    loop {
        let initiators = &core.initiators;
        let next = core
            .remotes
            .take_waiting(|queue| initiators.available(queue));
        let Some(key) = next else {
            return worked;
        };
        worked = true;
        step(core, key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::embedded::bdev::{BdevId, IoKind};

    #[test]
    fn unmap_deallocates_only_where_the_namespace_takes_that() {
        let ticket = Ticket {
            bdev: BdevId {
                index: 0,
                generation: 0,
            },
            owner: Owner::Volume {
                volume: 0,
                token: 0,
            },
            kind: IoKind::Unmap,
            length_bytes: 4096,
            submitted_ns: 0,
        };
        let sent = |op, deallocates| {
            let io = RemoteIo {
                ticket,
                io: BdevIo {
                    op,
                    lba: 8,
                    blocks: 8,
                    data: DataPointer::NONE,
                },
                place: Place {
                    controller: 0,
                    namespace_id: 3,
                    present: true,
                    deallocates,
                },
                block_size: 512,
                done_blocks: 0,
            };
            let (sqe, _) = io.command(TRANSFER_MAX_BYTES).unwrap();
            (sqe.opcode, sqe.cdw10_15[2])
        };
        let opcode = io_opcode::WRITE_ZEROES;
        assert_eq!(sent(BdevOp::Unmap, true), (opcode, DEALLOCATE | 7));
        assert_eq!(sent(BdevOp::Unmap, false), (opcode, 7));
        assert_eq!(sent(BdevOp::WriteZeroes, true), (opcode, 7));
    }
}
