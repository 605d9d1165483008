//! What goes wrong with a node's disk: it is slow, it fails some of what it is asked for, it keeps requests and says
//! nothing, a block of its metadata rots. Called by tests and campaigns; `deliver` asks here how a request ends.

use super::{DATA_OFFSET, SECOND, VOLUME, What, World};
use crate::engine::meta::activity_log::ring::{RingId, parse};
use crate::engine::meta::block::BLOCK_SIZE;
use crate::engine::meta::format::volume_uuid_of_name;
use crate::engine::meta::layout::Layout;
use crate::host::{Data, DiskIo, DiskOp};
use crate::hosts::sim::node::DiskWork;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// Which requests fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Failing {
    pub reads: bool,
    pub writes: bool,
    pub flushes: bool,
    /// Whatever is asked for outside of the volume's data.
    pub metadata: bool,
}

/// What is wrong with a disk now, and until when.
#[derive(Clone, Debug, Default)]
pub struct DiskFaults {
    slow_ns: u64,
    slow_until_ns: u64,
    failing: Failing,
    /// Of the requests that may fail.
    failing_percent: u64,
    failing_until_ns: u64,
    frozen_until_ns: u64,
    /// Requests that were kept since the disk froze.
    kept: Vec<u64>,
    /// Since the node was started it has failed something.
    pub(super) has_failed: bool,
    /// A block has rotted since the node has ended.
    has_rotted: bool,
}

impl DiskFaults {
    /// The node has ended: a frozen disk lets go of what it has kept.
    pub(super) fn ends(&mut self) {
        self.frozen_until_ns = 0;
        self.kept.clear();
        self.has_failed = false;
        self.has_rotted = false;
    }
}

/// A copy of metadata of which there is another, or without which the volume is taken to differ everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum MetadataBlock {
    /// One of the four places, counted from the front.
    Superblock(u8),
    /// A block of an activity log, but for a ring's newest: that one rotten looks like one that was torn.
    Log(u32),
    /// A page of a bitmap.
    Bitmap(u32),
}

impl World {
    /// Each request to the disk takes up to this much longer, for a while.
    pub fn slow_disk(&mut self, node: usize, most_ns: u64, for_ns: u64) {
        let faults = &mut self.nodes[node].disk_faults;
        faults.slow_ns = most_ns;
        faults.slow_until_ns = self.now_ns + for_ns;
    }

    /// Some of what the disk is asked for fails, for a while.
    pub fn fail_disk(&mut self, node: usize, failing: Failing, percent: u64, for_ns: u64) {
        let faults = &mut self.nodes[node].disk_faults;
        faults.failing = failing;
        faults.failing_percent = percent;
        faults.failing_until_ns = self.now_ns + for_ns;
    }

    /// The disk keeps what it is asked for, and answers when the time is over; or never, if the node ends before.
    pub fn freeze_disk(&mut self, node: usize, for_ns: u64) {
        self.note(node, || "the disk freezes".to_owned());
        let until_ns = self.now_ns.saturating_add(for_ns);
        self.nodes[node].disk_faults.frozen_until_ns = until_ns;
        if for_ns < 3600 * SECOND {
            self.schedule_here(node, for_ns, What::DiskThaws);
        }
    }

    /// The disk is as good as any again; what it has kept is done soon.
    pub fn mend_disk(&mut self, node: usize) {
        let faults = &mut self.nodes[node].disk_faults;
        let kept = std::mem::take(&mut faults.kept);
        faults.slow_until_ns = 0;
        faults.failing_until_ns = 0;
        faults.frozen_until_ns = 0;
        self.go_on_with(node, kept);
    }

    pub(super) fn disk_thaws(&mut self, node: usize) {
        // It may have frozen anew meanwhile.
        if self.nodes[node].disk_faults.frozen_until_ns <= self.now_ns {
            let kept = std::mem::take(&mut self.nodes[node].disk_faults.kept);
            self.go_on_with(node, kept);
        }
    }

    fn go_on_with(&mut self, node: usize, kept: Vec<u64>) {
        for id in kept {
            let delay_ns = self.random.below(1_000_000);
            self.schedule_here(node, delay_ns, What::DiskDone(id));
        }
    }

    /// How much longer a request takes.
    pub(super) fn disk_lag_ns(&mut self, node: usize) -> u64 {
        let faults = &self.nodes[node].disk_faults;
        if self.now_ns < faults.slow_until_ns && faults.slow_ns > 0 {
            self.random.below(faults.slow_ns)
        } else {
            0
        }
    }

    /// Whether the disk keeps this request, as it is frozen.
    pub(super) fn disk_keeps(&mut self, node: usize, id: u64) -> bool {
        let faults = &mut self.nodes[node].disk_faults;
        let is_frozen = self.now_ns < faults.frozen_until_ns;
        if is_frozen {
            faults.kept.push(id);
        }
        is_frozen
    }

    /// Whether this request fails. Of a write that does, any part may have been done.
    pub(super) fn disk_fails(&mut self, node: usize, work: &DiskWork) -> bool {
        let faults = &self.nodes[node].disk_faults;
        if self.now_ns >= faults.failing_until_ns {
            return false;
        }
        let (failing, percent) = (faults.failing, faults.failing_percent);
        let data = DATA_OFFSET..DATA_OFFSET + self.config.volume_bytes;
        let may_fail = match work.io.op {
            DiskOp::Flush => failing.flushes,
            _ if !data.contains(&work.io.offset) => failing.metadata,
            DiskOp::Read => failing.reads,
            _ => failing.writes,
        };
        if !may_fail || !self.random.chance(percent) {
            return false;
        }
        self.note(node, || format!("the disk fails {:?}", work.io));
        self.nodes[node].disk_faults.has_failed = true;
        let written = written_bytes(work.io, &work.data);
        let disk = &mut self.nodes[node].disk;
        disk.interrupt(work.io, &written, true, &mut self.random);
        true
    }

    /// Spoils a block of metadata of a node that is down; false if there is no such block that could be spared, or one is
    /// spoilt already.
    pub fn rot(&mut self, node: usize, block: MetadataBlock) -> bool {
        assert!(!self.nodes[node].running, "node {node} uses its disk");
        if self.nodes[node].disk_faults.has_rotted {
            return false;
        }
        let Ok(layout) = Layout::new(&self.layout_params(node)) else {
            return false;
        };
        let offset = match block {
            MetadataBlock::Superblock(place) => {
                let places: Vec<u64> = layout.superblock_offsets().collect();
                places[usize::from(place) % places.len()]
            }
            MetadataBlock::Log(index) => {
                let ring = layout.al_ring_blocks();
                let slot = index / ring % self.config.cores as u32;
                let index = index % ring;
                if self.is_newest(node, &layout, slot as u16, index) {
                    return false;
                }
                layout.al_block_offset(slot as u16, index)
            }
            MetadataBlock::Bitmap(page) => {
                let slot = page / layout.bitmap_pages() % u32::from(layout.peer_slots());
                layout.bitmap_page_offset(slot as u8, page % layout.bitmap_pages())
            }
        };
        let mut bytes = self.nodes[node].disk.read(offset..offset + BLOCK);
        if bytes.iter().all(|&byte| byte == 0) {
            // Nothing was ever written there.
            return false;
        }
        for byte in &mut bytes[512..1024] {
            *byte ^= 0x5a;
        }
        self.note(node, || format!("{block:?} at byte {offset} rots"));
        self.nodes[node].disk.plant(offset, &bytes);
        self.nodes[node].disk_faults.has_rotted = true;
        true
    }

    /// No transaction of the ring is younger than the one in this block; or none is that a power loss would leave there.
    fn is_newest(&self, node: usize, layout: &Layout, slot: u16, index: u32) -> bool {
        let id = RingId::new(&volume_uuid_of_name(VOLUME), slot);
        let disk = &self.nodes[node].disk;
        let number = |bytes: &[u8]| {
            let found = parse(bytes, id, layout.al_extent_count());
            found.map_or(0, |transaction| transaction.number)
        };
        let is_newest_of = |read: &dyn Fn(std::ops::Range<u64>) -> Vec<u8>| {
            let numbers: Vec<u64> = (0..layout.al_ring_blocks())
                .map(|index| layout.al_block_offset(slot, index))
                .map(|offset| number(&read(offset..offset + BLOCK)))
                .collect();
            numbers[index as usize] >= numbers.iter().copied().max().unwrap_or(0)
        };
        is_newest_of(&|bytes| disk.read(bytes))
            || is_newest_of(&|bytes| disk.durable_content(bytes).bytes().to_vec())
    }
}

/// The data of a write, whoever has it.
pub(super) fn written_bytes(io: DiskIo, data: &Data<super::Core>) -> Vec<u8> {
    let bytes = match data {
        Data::Payload(memory) => memory.bytes().to_vec(),
        Data::Buffer(buffer) => buffer.as_ref().to_vec(),
        Data::None => Vec::new(),
    };
    bytes.into_iter().take(io.len as usize).collect()
}
