//! What a crash of any node leaves: read from the disks alone, as a node reads its own when it starts, and compared with
//! each other. Called at moments that the run chooses. Nothing here changes the run.

use super::{DATA_OFFSET, OPENER, What, World};
use crate::engine::bitmap::page::{BITS_PER_PAGE, Page};
use crate::engine::message::{HarvestedPages, ToManager};
use crate::engine::meta::block::BLOCK_SIZE;
use crate::engine::meta::generation::Generations;
use crate::engine::meta::layout::superblock_places;
use crate::engine::meta::superblock::{PersistedDisk, Superblock, pick};
use crate::engine::open::{Goal, Opened, Opener};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::engine::volume::EXTENT_BYTES;
use crate::host::{Completion, Data, IoStatus};
use crate::hosts::sim::ledger::identify;
use crate::hosts::sim::memory::Buffer;
use crate::hosts::sim::node::{Action, Core, Engine};

impl World {
    /// What a node that starts now finds on its disk; `None` if it is none of this volume, or damaged.
    fn recovered(&self, node: usize) -> Option<Opened> {
        let disk = &self.nodes[node].disk;
        let mut opener = Opener::new(Goal::Any, OPENER, disk.size_bytes());
        let mut core = Core {
            scarcity_percent: 0,
            ..self.core(node)
        };
        loop {
            opener.poll(&mut core).ok()?;
            let Some(Action::Disk(token, io, _)) = core.actions.pop() else {
                return None;
            };
            let found = disk.durable_content(io.offset..io.offset + io.len);
            let completion = Completion {
                token,
                status: IoStatus::Ok,
                answer: PeerAnswer::Ok,
                data: Data::Buffer(Buffer::new(found, &core.buffers)),
            };
            if let Some(opened) = opener.complete(completion).ok()? {
                return Some(opened);
            }
        }
    }

    /// Of what a node that starts now finds, the superblock.
    fn durable_superblock(&self, node: usize) -> Option<Superblock> {
        let disk = &self.nodes[node].disk;
        let places = superblock_places(disk.size_bytes())?;
        let blocks = places.map(|at| disk.durable_content(at..at + BLOCK_SIZE as u64));
        let blocks = blocks.each_ref().map(|block| Some(block.bytes()));
        pick(&blocks, disk.size_bytes()).ok()
    }

    /// I1 and I7: wherever two replicas differ, one of the two knows, whatever crashes now. To be asked only while no data
    /// was given up.
    pub fn check_findable(&self) {
        let nodes = self.nodes.len();
        let bytes = DATA_OFFSET..DATA_OFFSET + self.config.volume_bytes;
        let mut found: Vec<Option<Option<Opened>>> = (0..nodes).map(|_| None).collect();
        for one in 0..nodes {
            for other in 0..one {
                let (first, second) = (&self.nodes[one].disk, &self.nodes[other].disk);
                let different = first.different_pages(second, bytes.clone());
                // Where nothing differs nobody needs to know anything.
                if different.is_empty() {
                    continue;
                }
                for node in [one, other] {
                    found[node].get_or_insert_with(|| self.recovered(node));
                }
                if let (Some(Some(here)), Some(Some(there))) = (&found[one], &found[other]) {
                    self.check_findable_between((one, here), (other, there), &different);
                }
            }
        }
    }

    fn check_findable_between(
        &self,
        (one, here): (usize, &Opened),
        (other, there): (usize, &Opened),
        different: &[u64],
    ) {
        let (Some(slot), Some(back)) = (
            slot_of(&here.superblock, other),
            slot_of(&there.superblock, one),
        ) else {
            return;
        };
        let is_full = |opened: &Opened, slot: usize| {
            opened.superblock.peers[slot].is_some_and(|peer| peer.full_sync)
        };
        if is_full(here, slot) || is_full(there, back) {
            return;
        }
        let (mine, theirs) = (&here.superblock.generations, &there.superblock.generations);
        let keeps =
            |of: &Generations, slot: usize, since: &Generations| of.bitmap[slot] == since.current;
        let go_by_bitmap = mine.current == theirs.current
            || keeps(mine, slot, theirs)
            || keeps(theirs, back, mine);
        if !go_by_bitmap {
            return;
        }
        for at in different {
            let at = at - DATA_OFFSET;
            assert!(
                knows(here, slot, at) || knows(there, back, at),
                "[I1] nodes {one} and {other} differ at byte {at} of the volume, and after a crash neither would know\n{}",
                self.describe()
            );
        }
    }

    /// I2: a write ends as done on a node. Whoever lacks it is durably known to be of an older generation.
    pub(super) fn check_generation(&self, node: usize, id: u64, lba: u64) {
        let block = u64::from(self.config.block_size);
        let at = DATA_OFFSET + lba * block;
        let has =
            |node: usize| identify(&self.nodes[node].disk.read(at..at + block), lba) == Some(id);
        // What a node that is losing its disk has said is judged by what is read afterwards.
        let engine = self.nodes[node].engine.as_ref();
        let has_disk = engine.is_some_and(|engine| engine.manager.disk() == DiskState::UpToDate);
        if !has_disk || !has(node) {
            return;
        }
        let peers = self.state(node).peers;
        for other in (0..self.nodes.len()).filter(|&other| !has(other)) {
            // It may have had it in its cache; or the operator has had it removed, which is about to be durable.
            let lost_it =
                self.nodes[other].engine.is_none() || self.nodes[other].lost_power_at > id;
            let has_lost = self.config.volatile_caches && lost_it;
            let is_peer = peers.iter().any(|peer| usize::from(peer.node_id) == other);
            if has_lost || !is_peer {
                continue;
            }
            let found = [node, other].map(|node| self.durable_superblock(node));
            let [Some(here), Some(there)] = found else {
                continue;
            };
            let is_equal = here.generations.current == there.generations.current;
            assert!(
                slot_of(&here, other).is_none()
                    || !is_equal
                    || there.disk != PersistedDisk::UpToDate,
                "[I2] write {id} is done on node {node} without node {other}, which is of the same generation\n{}",
                self.describe()
            );
        }
    }

    /// I2: a node that is shut down has told a peer so. That one has all that the application was told, and may be the next
    /// one that it uses.
    pub(super) fn check_leave(&self, node: usize, id: u64, kind: RequestKind) {
        let changes = kind.writes() || kind == RequestKind::Flush;
        assert!(
            !changes || !self.nodes[node].has_taken_leave,
            "[I2] I/O {id} is done on node {node}, which has taken leave of an up-to-date peer\n{}",
            self.describe()
        );
    }

    /// I6: two nodes that say of each other that all is well, with nothing under way, hold the same. Two Secondaries may not
    /// have heard yet that their Primary is gone, or goes on with one of them only: of these, one knows what differs.
    pub fn check_idle_replicas(&self) {
        let is_idle = self.apps.values().all(|app| app.status.is_some())
            && self
                .nodes
                .iter()
                .all(|node| node.unanswered.is_empty() && node.disk_work.is_empty());
        if !is_idle {
            return;
        }
        let bytes = DATA_OFFSET..DATA_OFFSET + self.config.volume_bytes;
        for one in 0..self.nodes.len() {
            for other in (0..one).filter(|&other| self.are_well(one, other)) {
                let (first, second) = (&self.nodes[one].disk, &self.nodes[other].disk);
                let has_primary = self.is_primary(one) || self.is_primary(other);
                for at in first.different_pages(second, bytes.clone()) {
                    let lba = (at - DATA_OFFSET) / u64::from(self.config.block_size);
                    let is_known = self.is_out_of_sync(one, other, lba)
                        || self.is_out_of_sync(other, one, lba);
                    assert!(
                        is_known && !has_primary,
                        "[I6] nodes {one} and {other} are connected, UpToDate and idle, and differ from byte {} of the volume on\n{}",
                        at - DATA_OFFSET,
                        self.describe()
                    );
                }
            }
        }
    }

    /// Each says so of itself and of the other.
    fn are_well(&self, one: usize, other: usize) -> bool {
        let says_well = |one: usize, other: usize| {
            let Some((engine, slot)) = self.engine_and_slot(one, other) else {
                return false;
            };
            let view = engine.manager.view();
            let peer = &view.peers[slot];
            view.disk == DiskState::UpToDate
                && peer.conn == ConnState::Connected
                && peer.has_latest()
        };
        says_well(one, other) && says_well(other, one)
    }

    /// A node knows that it may differ from another in this block: the bit is in its manager, in a channel, or between them.
    fn is_out_of_sync(&self, node: usize, other: usize, lba: u64) -> bool {
        let Some((engine, slot)) = self.engine_and_slot(node, other) else {
            return false;
        };
        let (page, bit) = page_of(lba * u64::from(self.config.block_size), engine);
        let has_bit = |(of, pages): &(usize, HarvestedPages)| {
            let mut pages = pages.iter();
            *of == slot && pages.any(|(number, content)| *number == page && content.test(bit))
        };
        engine.manager.is_out_of_sync(slot, lba)
            || engine
                .channels
                .iter()
                .any(|channel| channel.is_out_of_sync(slot, lba))
            || self.events.iter().flatten().any(|event| {
                let What::ToManager(message) = &event.what else {
                    return false;
                };
                match &**message {
                    ToManager::Harvested(_, _, pages) | ToManager::Retire(_, _, pages) => {
                        event.node == node && pages.iter().any(has_bit)
                    }
                    _ => false,
                }
            })
    }

    fn engine_and_slot(&self, node: usize, other: usize) -> Option<(&Engine, usize)> {
        let engine = self.nodes[node].engine.as_ref()?;
        let slots = 0..engine.manager.view().peers.len();
        let mut slots = slots.filter(|&slot| engine.manager.peer_node(slot) == Some(other as u8));
        Some((engine, slots.next()?))
    }
}

/// Page of a bitmap and bit in it for a byte of the volume.
fn page_of(at: u64, engine: &Engine) -> (u32, u32) {
    let bit = at >> engine.shared.geometry.granularity_log2;
    let bits = u64::from(BITS_PER_PAGE);
    ((bit / bits) as u32, (bit % bits) as u32)
}

fn slot_of(superblock: &Superblock, node: usize) -> Option<usize> {
    let peers = &superblock.peers;
    peers
        .iter()
        .position(|peer| peer.is_some_and(|peer| usize::from(peer.node_id) == node))
}

/// A bit of this slot or the activity log covers this byte of the volume.
fn knows(opened: &Opened, slot: usize, at: u64) -> bool {
    let bit = at >> opened.superblock.layout.granularity_log2();
    let (page, bit) = (
        (bit / u64::from(BITS_PER_PAGE)) as u32,
        (bit % u64::from(BITS_PER_PAGE)) as u32,
    );
    let extent = (at / EXTENT_BYTES) as u32;
    let has_bit = |(of, number, content): &(usize, u32, Box<Page>)| {
        *of == slot && *number == page && content.test(bit)
    };
    opened.log_damaged
        || opened.active_extents.contains(&extent)
        || opened.damaged_pages.contains(&(slot, page))
        || opened.pages.iter().any(has_bit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::RequestKind;
    use crate::hosts::sim::world::{Config, MS};

    fn pair() -> World {
        let mut world = World::clean_cluster(1, Config::default());
        world.promote(0);
        world.write(0, 100, 8);
        world.run_for(20 * MS);
        world.check_findable();
        world.check_idle_replicas();
        world
    }

    #[test]
    #[should_panic(expected = "[I1]")]
    fn a_difference_that_nobody_knows_of_is_found() {
        let mut world = pair();
        // Far from what the activity logs cover.
        world.nodes[1]
            .disk
            .plant(DATA_OFFSET + (32 << 20), &[1; 512]);
        world.check_findable();
    }

    #[test]
    #[should_panic(expected = "[I6]")]
    fn a_difference_while_all_is_said_to_be_well_is_found() {
        let mut world = pair();
        world.nodes[1].disk.plant(DATA_OFFSET, &[1; 512]);
        world.check_idle_replicas();
    }

    /// Three nodes, of which the Primary has just died while one of the others has a write that the third has not.
    fn survivors() -> World {
        let config = Config {
            nodes: 3,
            ..Config::default()
        };
        let mut world = World::clean_cluster(1, config);
        world.promote(0);
        world.write(0, 100, 8);
        world.run_for(200 * MS);
        world.cut(0, 2);
        let write = RequestKind::Write { fua: false };
        world.submit(0, 0, write, 500, 1);
        world.run_for(10 * MS);
        world.kill(0);
        world.run_for(MS);
        world
    }

    #[test]
    fn survivors_of_a_primary_may_differ_where_one_of_them_knows() {
        let world = survivors();
        let bytes = DATA_OFFSET..DATA_OFFSET + (1 << 20);
        let [_, first, second] = &world.nodes[..] else {
            panic!("three nodes");
        };
        assert_eq!(first.disk.different_pages(&second.disk, bytes).len(), 1);
        assert!(world.are_well(1, 2));
        world.check_idle_replicas();
    }

    #[test]
    #[should_panic(expected = "[I6]")]
    fn a_difference_of_survivors_that_neither_knows_of_is_found() {
        let mut world = survivors();
        world.nodes[1]
            .disk
            .plant(DATA_OFFSET + (32 << 20), &[1; 512]);
        world.check_idle_replicas();
    }

    #[test]
    #[should_panic(expected = "[I2]")]
    fn a_write_that_ends_without_a_peer_of_the_same_generation_is_found() {
        let mut world = pair();
        let write = RequestKind::Write { fua: false };
        let id = world.submit(0, 0, write, 500, 1);
        world.wait_for_io();
        world.nodes[1]
            .disk
            .plant(DATA_OFFSET + 500 * 512, &[0; 512]);
        world.check_generation(0, id, 500);
    }
}
