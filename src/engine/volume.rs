//! What all cores of a volume share: its geometry and the structures of atomics. Made once when the volume is
//! opened; knows neither channels nor the manager.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::engine::MAX_PEERS;
use crate::engine::atomic_bits::AtomicBits;
use crate::engine::duplicates::DuplicateWindow;
use crate::engine::meta::superblock::AL_EXTENTS_MIN;
use crate::engine::mutation::{self, Mutation};
use crate::engine::range_lock::RangeLock;
use crate::host::PeerSlot;

/// Bytes of a range lock granule.
pub const GRANULE_BYTES: u64 = 4096;
/// Bytes of an activity log extent.
pub const EXTENT_BYTES: u64 = 4 << 20;
/// The longest read or write, in bytes: what one peer command carries.
pub const MAX_TRANSFER_BYTES: u64 = 128 << 10;
/// The longest unmap or write-zeroes, in bytes: what the activity log can always hold.
pub const MAX_ZEROES_BYTES: u64 = 16 << 20;

/// Resync reads of a peer that are remembered; far more than it has in flight.
const RESYNC_READS: usize = 1024;

// However it lies, it touches one extent more than it is long.
const _: () = assert!(MAX_ZEROES_BYTES / EXTENT_BYTES < AL_EXTENTS_MIN as u64);

/// Sizes of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeGeometry {
    pub block_size: u32,
    pub size_blocks: u64,
    /// Byte offset of block 0 on the backing device.
    pub data_offset: u64,
    pub granularity_log2: u8,
}

impl VolumeGeometry {
    pub fn size_bytes(&self) -> u64 {
        self.size_blocks * u64::from(self.block_size)
    }

    pub fn bits(&self) -> u64 {
        self.size_bytes().div_ceil(1 << self.granularity_log2)
    }

    pub fn granules(&self) -> u64 {
        self.size_bytes().div_ceil(GRANULE_BYTES)
    }

    /// Whether the span lies in the volume and is not empty.
    pub fn contains(&self, lba: u64, blocks: u32) -> bool {
        blocks != 0
            && lba
                .checked_add(u64::from(blocks))
                .is_some_and(|end| end <= self.size_blocks)
    }

    pub fn bytes_of(&self, lba: u64, blocks: u32) -> Range<u64> {
        let block = u64::from(self.block_size);
        lba * block..(lba + u64::from(blocks)) * block
    }

    /// The bitmap bits that the span touches.
    pub fn bits_of(&self, lba: u64, blocks: u32) -> Range<u64> {
        outer(&self.bytes_of(lba, blocks), self.granularity_log2)
    }

    /// The range lock granules that the span touches.
    pub fn granules_of(&self, lba: u64, blocks: u32) -> Range<u64> {
        outer(
            &self.bytes_of(lba, blocks),
            GRANULE_BYTES.trailing_zeros() as u8,
        )
    }

    /// The granules that the span covers from end to end.
    pub fn whole_granules_of(&self, lba: u64, blocks: u32) -> Range<u64> {
        let bytes = self.bytes_of(lba, blocks);
        let start = bytes.start.div_ceil(GRANULE_BYTES);
        // The last granule of the volume may be short: a span up to the end covers it.
        let end = if bytes.end == self.size_bytes() {
            bytes.end.div_ceil(GRANULE_BYTES)
        } else {
            bytes.end / GRANULE_BYTES
        };
        start..end.max(start)
    }

    /// The activity log extents that the span touches.
    pub fn extents_of(&self, lba: u64, blocks: u32) -> RangeInclusive<u32> {
        let bytes = self.bytes_of(lba, blocks);
        (bytes.start / EXTENT_BYTES) as u32..=((bytes.end - 1) / EXTENT_BYTES) as u32
    }

    /// The blocks of a range of bitmap bits.
    pub fn blocks_of_bits(&self, bits: &Range<u64>) -> Range<u64> {
        let log2 = u32::from(self.granularity_log2);
        let block = u64::from(self.block_size);
        (bits.start << log2) / block..((bits.end << log2) / block).min(self.size_blocks)
    }

    /// The bits whose blocks lie wholly in the span.
    pub fn whole_bits_of(&self, lba: u64, blocks: u32) -> Range<u64> {
        let bytes = self.bytes_of(lba, blocks);
        let size = 1u64 << self.granularity_log2;
        let start = bytes.start.div_ceil(size);
        let end = if bytes.end == self.size_bytes() {
            self.bits()
        } else {
            bytes.end / size
        };
        start..end.max(start)
    }
}

fn outer(bytes: &Range<u64>, log2: u8) -> Range<u64> {
    bytes.start >> log2..bytes.end.div_ceil(1 << log2)
}

/// Shared by the channels and the manager of one volume; every operation is lock-free.
pub struct Shared {
    pub geometry: VolumeGeometry,
    /// Granules of writes in flight on this node.
    pub range_lock: RangeLock,
    /// Bits whose local copy is out of date while this node is a sync target.
    pub stale: AtomicBits,
    /// Granules that the resync is pulling.
    pub pulls: AtomicBits,
    /// Granules in `pulls` that a write has touched since they were asked for.
    pub touched: AtomicBits,
    /// Granules in `touched` that a write covered in part.
    pub partial: AtomicBits,
    /// Per peer: granules that were read for its resync and not written since.
    pub served: [AtomicBits; MAX_PEERS],
    /// Per peer: its writes in flight and applied.
    pub duplicates: [DuplicateWindow; MAX_PEERS],
    /// Per peer: its resync reads in flight and served.
    pub resync_reads: [DuplicateWindow; MAX_PEERS],
    /// Some core has seen the disk fail: what is there is not to be read any more, by no core.
    disk_failed: AtomicBool,
    sequence: AtomicU64,
    control_sequences: [AtomicU64; MAX_PEERS],
}

impl Shared {
    pub fn new(geometry: VolumeGeometry) -> Self {
        Self::with_window(geometry, DuplicateWindow::DEFAULT_CAPACITY)
    }

    /// `commands`: how many of each peer's writes are remembered, a power of two; more than it has in flight.
    pub fn with_window(geometry: VolumeGeometry, commands: usize) -> Self {
        let (bits, granules) = (geometry.bits(), geometry.granules());
        Self {
            geometry,
            range_lock: RangeLock::new(granules),
            stale: AtomicBits::new(bits),
            pulls: AtomicBits::new(granules),
            touched: AtomicBits::new(granules),
            partial: AtomicBits::new(granules),
            served: std::array::from_fn(|_| AtomicBits::new(granules)),
            duplicates: std::array::from_fn(|_| DuplicateWindow::new(commands)),
            resync_reads: std::array::from_fn(|_| DuplicateWindow::new(RESYNC_READS)),
            disk_failed: AtomicBool::new(false),
            sequence: AtomicU64::new(0),
            control_sequences: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// The disk is not to be read, whether or not the manager has heard of it.
    pub fn has_disk_failed(&self) -> bool {
        self.disk_failed.load(Ordering::Acquire)
    }

    pub fn set_disk_failed(&self, failed: bool) {
        self.disk_failed.store(failed, Ordering::Release);
    }

    /// The sequence of this node's last write.
    pub fn last_sequence(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    /// The next sequence of a write of this node; with the following ones up to `count` in all.
    pub fn next_sequences(&self, count: u16) -> u64 {
        self.sequence.fetch_add(count.into(), Ordering::Relaxed) + 1
    }

    /// The number of the next command to a peer that is no write, whoever sends it. Numbers go on from session to
    /// session: a command that was made for one never has the number of another one's.
    pub fn next_control_sequence(&self, slot: PeerSlot) -> u64 {
        self.control_sequences[slot].fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Tells a resync that pulls these blocks that a write has overtaken it. Called under the range lock.
    pub fn mark_overtaken(&self, lba: u64, blocks: u32) {
        let granules = self.geometry.granules_of(lba, blocks);
        if !self.pulls.any(granules.clone()) || mutation::is(Mutation::NoMarkForResync) {
            return;
        }
        let whole = self.geometry.whole_granules_of(lba, blocks);
        if granules.start < whole.start.min(granules.end) {
            self.partial.set_range(granules.start..granules.start + 1);
        }
        if granules.end > whole.end.max(granules.start) {
            self.partial.set_range(granules.end - 1..granules.end);
        }
        self.touched.set_range(granules);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> VolumeGeometry {
        VolumeGeometry {
            block_size: 512,
            size_blocks: 100 * 8 + 3,
            data_offset: 1 << 20,
            granularity_log2: 13,
        }
    }

    #[test]
    fn a_span_touches_every_granule_and_bit_that_it_overlaps() {
        let geometry = geometry();
        assert_eq!(geometry.granules_of(7, 2), 0..2);
        assert_eq!(geometry.whole_granules_of(7, 2), 1..1);
        assert_eq!(geometry.whole_granules_of(8, 8), 1..2);
        assert_eq!(geometry.bits_of(15, 2), 0..2);
        assert_eq!(geometry.whole_bits_of(0, 16), 0..1);
        assert_eq!(geometry.granules(), 101);
        assert_eq!(geometry.whole_granules_of(800, 3), 100..101);
        assert_eq!(geometry.whole_bits_of(800, 3), 50..51);
        assert_eq!(geometry.blocks_of_bits(&(50..51)), 800..803);
        assert!(!geometry.contains(803, 1));
        assert!(!geometry.contains(u64::MAX, 2));
    }

    #[test]
    fn a_write_marks_what_it_overtakes_and_which_part_it_covers() {
        let shared = Shared::new(geometry());
        shared.mark_overtaken(0, 8);
        assert!(!shared.touched.any(0..101), "nothing is being pulled");
        shared.pulls.set_range(0..4);
        shared.mark_overtaken(4, 16);
        assert!(shared.touched.test(0) && shared.touched.test(1) && shared.touched.test(2));
        assert!(!shared.touched.test(3));
        assert!(shared.partial.test(0) && !shared.partial.test(1) && shared.partial.test(2));
        shared.partial.clear_all();
        shared.mark_overtaken(10, 2);
        assert!(shared.partial.test(1));
    }
}
