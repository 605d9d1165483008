//! I9: what the application was told is written is not replaced by what is older, unless the operator has said so; and two
//! nodes that each have such writes of their own report it. Judged by the content of the disks and by when each write was
//! submitted and ended. Nothing here changes the run.

use std::collections::HashMap;
use std::ops::Range;

use super::{DATA_OFFSET, World};
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::manager::Order;
use crate::engine::peer::state::DiskState;
use crate::host::{Data, DiskIo, DiskOp, Token};
use crate::hosts::sim::ledger::{WriteId, identify};
use crate::hosts::sim::memory::Bytes;
use crate::hosts::sim::node::Core;

/// The application's writes, in the order of their numbers, which are moments too.
#[derive(Default)]
pub(super) struct Writes {
    all: HashMap<WriteId, Write>,
    /// What is older than this may have been given up, whoever has it.
    counted_from: u64,
    /// The same for what a single node has.
    gives_up: HashMap<usize, u64>,
}

struct Write {
    /// Of those that leave zeroes.
    zeroes: Option<Range<u64>>,
    /// When it has ended, well or not. From then on it is there or never will be.
    ended: Option<u64>,
    acknowledged: bool,
}

impl Writes {
    pub(super) fn submitted(&mut self, id: WriteId, zeroes: Option<Range<u64>>) {
        let write = Write {
            zeroes,
            ended: None,
            acknowledged: false,
        };
        self.all.insert(id, write);
    }

    pub(super) fn ended(&mut self, id: WriteId, now: u64, acknowledged: bool) {
        if let Some(write) = self.all.get_mut(&id) {
            write.ended = Some(now);
            write.acknowledged = acknowledged;
        }
    }

    /// The application was told that it is written, and nobody has given it up on this node.
    fn counts(&self, node: usize, id: WriteId) -> bool {
        let gives_up = self.gives_up.get(&node).copied().unwrap_or_default();
        let is_acknowledged = || self.all.get(&id).is_some_and(|write| write.acknowledged);
        id >= self.counted_from && id >= gives_up && is_acknowledged()
    }

    /// What leaves this content in the block had ended before the write began.
    fn is_older(&self, content: WriteId, than: WriteId, lba: u64) -> bool {
        let ended_before = |write: &Write| write.ended.is_some_and(|ended| ended < than);
        if content != 0 {
            return self.all.get(&content).is_some_and(ended_before);
        }
        let zeroed = |write: &&Write| {
            let zeroes = write.zeroes.as_ref();
            zeroes.is_some_and(|zeroes| zeroes.contains(&lba))
        };
        self.all.values().filter(zeroed).all(ended_before)
    }
}

impl World {
    /// The operator says something: some of it gives data up.
    pub(super) fn given_up_by(&mut self, node: usize, order: &Order) {
        match order {
            Order::Promote { force: true } => self.nothing_counts(),
            // It may be carried out much later; `all_is_well` ends it.
            Order::Invalidate => drop(self.writes.gives_up.insert(node, u64::MAX)),
            Order::Connect {
                node_id: keeps,
                discard_my_data: true,
            } => {
                self.writes.gives_up.insert(node, u64::MAX);
                for other in self.side_of(node, keeps.map(usize::from)) {
                    self.writes.gives_up.insert(other, u64::MAX);
                }
            }
            _ => {}
        }
    }

    /// Who follows a node that gives up its data for that of the node `keeps`: those that have not what that one has.
    fn side_of(&self, node: usize, keeps: Option<usize>) -> Vec<usize> {
        let current = |node: usize| {
            let engine = self.nodes[node].engine.as_ref();
            engine.map(|_| self.state(node).generations.current)
        };
        let kept = keeps.and_then(current);
        let others = (0..self.nodes.len()).filter(|&other| other != node && Some(other) != keeps);
        others.filter(|&other| current(other) != kept).collect()
    }

    /// What was acknowledged so far may be lost from now on.
    pub(super) fn nothing_counts(&mut self) {
        self.writes.counted_from = self.next_id;
    }

    /// Data is given to a node's disk: what a resync writes is no older than what is there.
    pub(super) fn check_overwritten(
        &self,
        node: usize,
        token: Token,
        io: &DiskIo,
        data: &Data<Core>,
    ) {
        let volume = DATA_OFFSET..DATA_OFFSET + self.config.volume_bytes;
        let is_write = matches!(io.op, DiskOp::Write { .. } | DiskOp::WriteZeroes { .. });
        if token.0 & TOKEN_MANAGER == 0 || !is_write || !volume.contains(&io.offset) {
            return;
        }
        let block = self.config.block_size as usize;
        let there = self.nodes[node].disk.content(io.offset..io.offset + io.len);
        if let Bytes::Zeroes(_) = there {
            return;
        }
        let first = (io.offset - DATA_OFFSET) / block as u64;
        let olds = there.bytes().chunks_exact(block);
        for (index, old) in olds.enumerate() {
            let new = match data {
                Data::Buffer(buffer) => &buffer.as_ref()[index * block..(index + 1) * block],
                _ => &[][..],
            };
            let lba = first + index as u64;
            if old == new {
                continue;
            }
            let new = match new {
                [] => Some(0),
                new => identify(new, lba),
            };
            if let (Some(old), Some(new)) = (identify(old, lba), new) {
                assert!(
                    !self.has_newer(node, old, new, lba) || self.is_elsewhere(node, old, lba),
                    "[I9] a resync of node {node} replaces the last copy of write {old} in block {lba}, which was acknowledged, by the older {new}\n{}",
                    self.describe()
                );
            }
        }
    }

    fn has_newer(&self, node: usize, old: WriteId, new: WriteId, lba: u64) -> bool {
        self.writes.counts(node, old) && self.writes.is_older(new, old, lba)
    }

    /// Another node has this write or a newer one, and gets it to all. Two nodes that are behind a Primary may agree with
    /// each other first, on what neither knows to be acknowledged.
    fn is_elsewhere(&self, node: usize, write: WriteId, lba: u64) -> bool {
        let block = u64::from(self.config.block_size);
        let at = DATA_OFFSET + lba * block;
        let others = (0..self.nodes.len()).filter(|&other| other != node);
        others
            .filter_map(|other| identify(&self.nodes[other].disk.read(at..at + block), lba))
            .any(|found| found == write || !self.writes.is_older(found, write, lba))
    }

    /// A node has something that the application was told is written, and another has something older instead.
    fn has_more(&self, node: usize, than: usize) -> bool {
        let block = u64::from(self.config.block_size);
        let bytes = DATA_OFFSET..DATA_OFFSET + self.config.volume_bytes;
        let (disk, other) = (&self.nodes[node].disk, &self.nodes[than].disk);
        let pages = disk.different_pages(other, bytes);
        let mut places = pages
            .iter()
            .flat_map(|&page| (page..page + 4096).step_by(block as usize));
        places.any(|at| {
            let lba = (at - DATA_OFFSET) / block;
            let [mine, theirs] =
                [disk, other].map(|disk| identify(&disk.read(at..at + block), lba));
            let (Some(mine), Some(theirs)) = (mine, theirs) else {
                return false;
            };
            self.has_newer(node, mine, theirs, lba)
        })
    }

    /// Of two nodes each has what the other lacks.
    pub fn have_diverged(&self, one: usize, other: usize) -> bool {
        let is_whole = |node: usize| {
            let engine = self.nodes[node].engine.as_ref();
            engine.is_some_and(|engine| engine.manager.disk() > DiskState::Inconsistent)
        };
        is_whole(one) && is_whole(other) && self.has_more(one, other) && self.has_more(other, one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::RequestKind;
    use crate::hosts::sim::ledger::content;
    use crate::hosts::sim::memory::{Buffer, Count};
    use crate::hosts::sim::world::Config;

    const LBA: u64 = 100;
    const BLOCK: usize = 512;

    fn pair() -> World {
        let mut world = World::clean_cluster(1, Config::default());
        world.promote(0);
        world
    }

    fn write(world: &mut World, lba: u64) -> WriteId {
        let id = world.submit(0, 0, RequestKind::Write { fua: false }, lba, 1);
        world.wait_for_io();
        id
    }

    /// A resync of node 1 writes this into a block.
    fn resync(world: &mut World, new: WriteId) {
        let at = DATA_OFFSET + LBA * BLOCK as u64;
        world.nodes[0].disk.plant(at, &content(new, LBA, 1, BLOCK));
        let data = Bytes::Held(content(new, LBA, 1, BLOCK));
        let data = Data::Buffer(Buffer::new(data, &Count::default()));
        let io = DiskIo {
            op: DiskOp::Write { fua: false },
            offset: DATA_OFFSET + LBA * BLOCK as u64,
            len: BLOCK as u64,
        };
        world.check_overwritten(1, Token(TOKEN_MANAGER), &io, &data);
    }

    #[test]
    #[should_panic(expected = "[I9]")]
    fn an_acknowledged_write_that_a_resync_replaces_by_an_older_one_is_found() {
        let mut world = pair();
        let old = write(&mut world, LBA);
        let new = write(&mut world, LBA);
        resync(&mut world, new);
        resync(&mut world, old);
    }

    #[test]
    #[should_panic(expected = "[I9]")]
    fn an_acknowledged_write_that_a_resync_replaces_by_what_was_never_written_is_found() {
        let mut world = pair();
        write(&mut world, LBA);
        resync(&mut world, 0);
    }

    #[test]
    fn a_copy_may_be_replaced_while_a_third_node_has_another() {
        let mut world = World::clean_cluster(
            1,
            Config {
                nodes: 3,
                ..Config::default()
            },
        );
        world.promote(0);
        write(&mut world, LBA);
        resync(&mut world, 0);
    }

    #[test]
    fn a_write_that_the_operator_has_given_up_may_be_replaced() {
        let mut world = pair();
        write(&mut world, LBA);
        world.given_up_by(1, &Order::Invalidate);
        resync(&mut world, 0);
    }

    #[test]
    fn zeroes_that_were_written_later_are_not_older() {
        let mut world = pair();
        write(&mut world, LBA);
        let zeroes = RequestKind::WriteZeroes { fua: false };
        world.submit(0, 0, zeroes, LBA - 1, 2);
        resync(&mut world, 0);
    }

    #[test]
    fn nodes_have_diverged_when_each_lacks_what_the_other_has() {
        let mut world = pair();
        for (lba, lacks) in [(LBA, 1), (2 * LBA, 0)] {
            assert!(!world.have_diverged(0, 1));
            write(&mut world, lba);
            let at = DATA_OFFSET + lba * BLOCK as u64;
            world.nodes[lacks].disk.plant(at, &[0; BLOCK]);
        }
        assert!(world.have_diverged(0, 1) && world.have_diverged(1, 0));
        world.given_up_by(1, &Order::Invalidate);
        assert!(!world.have_diverged(0, 1));
    }
}
