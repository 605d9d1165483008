//! What the application does: reads, writes, write-zeroes, unmaps and flushes of every size, at a few places that meet
//! again and again.

use crate::engine::request::RequestKind;
use crate::engine::volume::{EXTENT_BYTES, MAX_TRANSFER_BYTES, MAX_ZEROES_BYTES};
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::World;

/// How much of the volume a load with a place goes to.
const HOT_BYTES: u64 = 64 << 10;

/// I/Os still to be submitted.
#[derive(Clone, Debug)]
pub struct Load {
    pub random: Random,
    pub left: u32,
    pub every_ns: u64,
    pub next_ns: u64,
    /// Most of it goes here.
    pub place: Option<u64>,
}

impl Load {
    /// Submits the next I/O to a node.
    pub fn submit(&mut self, world: &mut World, node: usize) {
        self.left -= 1;
        self.next_ns += self.every_ns;
        let kind = match self.random.below(20) {
            0 => RequestKind::Flush,
            1 => RequestKind::WriteZeroes { fua: false },
            2 => RequestKind::WriteZeroes { fua: true },
            3 => RequestKind::Unmap,
            4 => RequestKind::Write { fua: true },
            5..10 if self.place.is_none() => RequestKind::Read,
            5..8 => RequestKind::Read,
            _ => RequestKind::Write { fua: false },
        };
        let (lba, blocks) = match kind {
            RequestKind::Flush => (0, 0),
            kind => self.range(world, kind),
        };
        let core = self.random.below(world.config.cores as u64) as usize;
        world.submit(node, core, kind, lba, blocks);
    }

    /// Where it goes: near one of a few places, or across the border of two extents.
    fn range(&mut self, world: &World, kind: RequestKind) -> (u64, u32) {
        let random = &mut self.random;
        let block = u64::from(world.config.block_size);
        let size_blocks = world.config.volume_bytes / block;
        let places = 8;
        if let Some(place) = self.place
            && !random.chance(15)
        {
            // Parts of a few granules, so that they meet each other and whatever else goes there.
            let blocks = random.between(1, (8192 / block).max(1));
            let lba = place % places * (size_blocks / places) + random.below(HOT_BYTES / block);
            return (lba.min(size_blocks - blocks), blocks as u32);
        }
        let most_bytes = match kind {
            RequestKind::WriteZeroes { .. } | RequestKind::Unmap => MAX_ZEROES_BYTES,
            _ => MAX_TRANSFER_BYTES,
        };
        let bytes = match random.below(20) {
            0 => most_bytes,
            1..3 => random.between(1, most_bytes),
            3..6 => 4096 * random.between(1, 8),
            _ => random.between(1, 12 << 10),
        };
        let blocks = (bytes.div_ceil(block)).min(size_blocks / 2).max(1);
        let place = match random.below(5) {
            0 => random.between(1, world.config.volume_bytes / EXTENT_BYTES) * EXTENT_BYTES / block,
            _ => random.below(places) * (size_blocks / places),
        };
        let lba = (place + random.below(64)).saturating_sub(16);
        (lba.min(size_blocks - blocks), blocks as u32)
    }
}
