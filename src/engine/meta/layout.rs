//! Where the data and each piece of metadata lie on a backing device.
//!
//! Computed by whoever formats, attaches or dumps a device, always from the same few numbers; the
//! superblock stores those numbers and the offsets that followed from them.

use thiserror::Error;

use super::MAX_PEERS;
use super::block::BLOCK_SIZE;
use crate::engine::bitmap;

/// Where the data of a volume begins when the superblock lies before it.
pub const FRONT_DATA_OFFSET: u64 = 1 << 20;
/// Smallest and largest bitmap granularity, as powers of two: 4 KiB and 1 MiB.
pub const GRANULARITY_LOG2: std::ops::RangeInclusive<u8> = 12..=20;
/// Bytes of an activity log extent.
pub const AL_EXTENT_BYTES: u64 = 4 << 20;
const BITS_PER_PAGE: u64 = bitmap::BITS_PER_PAGE as u64;
/// Largest device and volume in bytes: extents of the activity log are counted in 32 bits.
pub const SIZE_BYTES_MAX: u64 = AL_EXTENT_BYTES << 32;
/// Largest number of channel slots, that is of rings of the activity log.
pub const CHANNEL_SLOTS_MAX: u16 = 1024;
/// Largest number of blocks of one ring. The smallest is 2, so that a torn transaction never lies over
/// the newest whole one.
pub const AL_RING_BLOCKS_MAX: u32 = 1024;

const BLOCK: u64 = BLOCK_SIZE as u64;
const SUPERBLOCK_PAIR: u64 = 2 * BLOCK;

/// Where the data begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// A superblock pair at byte 0, data from 1 MiB, a second superblock pair at the end.
    Front,
    /// Data from byte 0 and all metadata at the end: for a device that already carries data. Other
    /// modules may then recognise that data on the bare backing device.
    InPlace,
}

/// What a layout is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutParams {
    /// Rounded down to 4 KiB by the layout.
    pub device_size_bytes: u64,
    /// 512 to 4096, a power of two.
    pub block_size_bytes: u32,
    pub placement: Placement,
    /// Size of the volume; `None` takes all the room that there is.
    pub data_size_bytes: Option<u64>,
    /// 12 (4 KiB) to 20 (1 MiB) of data for each bit.
    pub granularity_log2: u8,
    /// 1 to 7.
    pub peer_slots: u8,
    /// 1 to 1024; one ring of the activity log each.
    pub channel_slots: u16,
    /// 2 to 1024 transactions of 4 KiB.
    pub al_ring_blocks: u32,
}

/// Why a layout cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    #[error("block size {0} is not 512, 1024, 2048 or 4096")]
    BlockSize(u32),
    #[error("bitmap granularity 2^{0} bytes is not within 4 KiB (2^12) to 1 MiB (2^20)")]
    Granularity(u8),
    #[error("{0} peer slots: there must be 1 to 7")]
    PeerSlots(u8),
    #[error("{0} channel slots: there must be 1 to 1024")]
    ChannelSlots(u16),
    #[error("{0} blocks for each ring of the activity log: there must be 2 to 1024")]
    RingBlocks(u32),
    #[error("a size of {size_bytes} bytes is more than the largest, {SIZE_BYTES_MAX} bytes")]
    TooLarge { size_bytes: u64 },
    #[error("the device has {device_size_bytes} bytes; this volume needs at least {needed_bytes}")]
    DeviceTooSmall {
        device_size_bytes: u64,
        needed_bytes: u64,
    },
    #[error("a volume of {0} bytes is too small: the smallest is 4096 bytes")]
    VolumeTooSmall(u64),
}

/// Where everything lies. Offsets and sizes are in bytes of the backing device, multiples of 4096.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    device_size: u64,
    block_size: u32,
    placement: Placement,
    granularity_log2: u8,
    peer_slots: u8,
    channel_slots: u16,
    al_ring_blocks: u32,
    data_size: u64,
    al_offset: u64,
    bitmap_offset: u64,
}

/// The four places at which a device of this size may carry a superblock: version 0 and 1 at the front,
/// then version 0 and 1 at the end. `None` when the device is too small to hold them apart.
pub fn superblock_places(device_size_bytes: u64) -> Option<[u64; 4]> {
    let end = device_size_bytes / BLOCK * BLOCK;
    let pair = end
        .checked_sub(SUPERBLOCK_PAIR)
        .filter(|&pair| pair >= SUPERBLOCK_PAIR)?;
    Some([0, BLOCK, pair, pair + BLOCK])
}

fn bitmap_bits(data_size: u64, granularity_log2: u8) -> u64 {
    data_size.div_ceil(1 << granularity_log2)
}

impl Layout {
    /// Computes the layout. The volume's size is rounded down to 4 KiB, a multiple of every block size
    /// that is allowed; metadata at the end stays at the device's end however small the volume is.
    pub fn new(params: &LayoutParams) -> Result<Layout, LayoutError> {
        let LayoutParams {
            device_size_bytes,
            block_size_bytes,
            ..
        } = *params;
        if !(512..=4096).contains(&block_size_bytes) || !block_size_bytes.is_power_of_two() {
            return Err(LayoutError::BlockSize(block_size_bytes));
        }
        if !GRANULARITY_LOG2.contains(&params.granularity_log2) {
            return Err(LayoutError::Granularity(params.granularity_log2));
        }
        if params.peer_slots == 0 || usize::from(params.peer_slots) > MAX_PEERS {
            return Err(LayoutError::PeerSlots(params.peer_slots));
        }
        if params.channel_slots == 0 || params.channel_slots > CHANNEL_SLOTS_MAX {
            return Err(LayoutError::ChannelSlots(params.channel_slots));
        }
        if params.al_ring_blocks < 2 || params.al_ring_blocks > AL_RING_BLOCKS_MAX {
            return Err(LayoutError::RingBlocks(params.al_ring_blocks));
        }
        for size_bytes in [device_size_bytes, params.data_size_bytes.unwrap_or(0)] {
            if size_bytes > SIZE_BYTES_MAX {
                return Err(LayoutError::TooLarge { size_bytes });
            }
        }
        // From here on every number is below 2^55, so sums and products cannot overflow.
        let end = device_size_bytes / BLOCK * BLOCK;
        let data_offset = data_offset(params.placement);
        let log_bytes = u64::from(params.channel_slots) * u64::from(params.al_ring_blocks) * BLOCK;
        let bitmap_bytes = |data_size: u64| {
            let pages = bitmap_bits(data_size, params.granularity_log2).div_ceil(BITS_PER_PAGE);
            pages * u64::from(params.peer_slots) * BLOCK
        };
        let fixed = data_offset + log_bytes + SUPERBLOCK_PAIR;
        let needed = |data_size: u64| fixed + data_size + bitmap_bytes(data_size);
        let too_small = |data_size: u64| LayoutError::DeviceTooSmall {
            device_size_bytes,
            needed_bytes: needed(data_size),
        };

        let data_size = match params.data_size_bytes {
            Some(size) => {
                let size = size / BLOCK * BLOCK;
                if size == 0 {
                    return Err(LayoutError::VolumeTooSmall(
                        params.data_size_bytes.unwrap_or(0),
                    ));
                }
                if needed(size) > end {
                    return Err(too_small(size));
                }
                size
            }
            None => {
                if needed(BLOCK) > end {
                    return Err(too_small(BLOCK));
                }
                // What is needed grows with the size: the largest size that fits lies between these two.
                let (mut fits_blocks, mut too_many_blocks) = (1, end / BLOCK);
                while too_many_blocks - fits_blocks > 1 {
                    let blocks = fits_blocks.midpoint(too_many_blocks);
                    if needed(blocks * BLOCK) <= end {
                        fits_blocks = blocks;
                    } else {
                        too_many_blocks = blocks;
                    }
                }
                fits_blocks * BLOCK
            }
        };
        let bitmap_offset = end - SUPERBLOCK_PAIR - bitmap_bytes(data_size);
        Ok(Layout {
            device_size: end,
            block_size: block_size_bytes,
            placement: params.placement,
            granularity_log2: params.granularity_log2,
            peer_slots: params.peer_slots,
            channel_slots: params.channel_slots,
            al_ring_blocks: params.al_ring_blocks,
            data_size,
            al_offset: bitmap_offset - log_bytes,
            bitmap_offset,
        })
    }

    /// The parameters that give exactly this layout again.
    pub fn params(&self) -> LayoutParams {
        LayoutParams {
            device_size_bytes: self.device_size,
            block_size_bytes: self.block_size,
            placement: self.placement,
            data_size_bytes: Some(self.data_size),
            granularity_log2: self.granularity_log2,
            peer_slots: self.peer_slots,
            channel_slots: self.channel_slots,
            al_ring_blocks: self.al_ring_blocks,
        }
    }

    /// Size in bytes of the backing device that this layout is for, rounded down to 4 KiB: where the
    /// metadata ends.
    pub fn device_size(&self) -> u64 {
        self.device_size
    }

    /// Bytes of a logical block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Bytes of data that one bit of a bitmap stands for, as a power of two.
    pub fn granularity_log2(&self) -> u8 {
        self.granularity_log2
    }

    pub fn peer_slots(&self) -> u8 {
        self.peer_slots
    }

    pub fn channel_slots(&self) -> u16 {
        self.channel_slots
    }

    pub fn al_ring_blocks(&self) -> u32 {
        self.al_ring_blocks
    }

    /// Where block 0 of the volume lies.
    pub fn data_offset(&self) -> u64 {
        data_offset(self.placement)
    }

    /// Size of the volume in bytes.
    pub fn data_size(&self) -> u64 {
        self.data_size
    }

    /// Activity log extents that the volume has; the last may be partial.
    pub fn al_extent_count(&self) -> u64 {
        self.data_size.div_ceil(AL_EXTENT_BYTES)
    }

    /// Bits of each peer's bitmap.
    pub fn bitmap_bits(&self) -> u64 {
        bitmap_bits(self.data_size, self.granularity_log2)
    }

    /// Pages of each peer's bitmap.
    pub fn bitmap_pages(&self) -> u32 {
        // At most 2^54 / 2^12 bits, so the pages are below 2^28.
        self.bitmap_bits().div_ceil(BITS_PER_PAGE) as u32
    }

    /// Where the superblock's versions lie: version 0 then version 1 of the first pair, then those of the
    /// second pair if there is one.
    pub fn superblock_offsets(&self) -> impl Iterator<Item = u64> + use<> {
        let front = match self.placement {
            Placement::Front => [Some(0), Some(BLOCK)],
            Placement::InPlace => [None, None],
        };
        let end = [
            Some(self.device_size - SUPERBLOCK_PAIR),
            Some(self.device_size - BLOCK),
        ];
        front.into_iter().chain(end).flatten()
    }

    /// Where the rings of the activity log begin.
    pub fn al_offset(&self) -> u64 {
        self.al_offset
    }

    /// Where block `index` of the ring of `channel_slot` lies; both must be in range.
    pub fn al_block_offset(&self, channel_slot: u16, index: u32) -> u64 {
        assert!(channel_slot < self.channel_slots && index < self.al_ring_blocks);
        let block = u64::from(channel_slot) * u64::from(self.al_ring_blocks) + u64::from(index);
        self.al_offset + block * BLOCK
    }

    /// Where the bitmap slots begin.
    pub fn bitmap_offset(&self) -> u64 {
        self.bitmap_offset
    }

    /// Where page `page` of the bitmap of `peer_slot` lies; both must be in range.
    pub fn bitmap_page_offset(&self, peer_slot: u8, page: u32) -> u64 {
        assert!(peer_slot < self.peer_slots && page < self.bitmap_pages());
        let block = u64::from(peer_slot) * u64::from(self.bitmap_pages()) + u64::from(page);
        self.bitmap_offset + block * BLOCK
    }

    /// Bytes of the device that the metadata takes, the room before the data included.
    pub fn metadata_bytes(&self) -> u64 {
        self.data_offset() + self.device_size - self.al_offset
    }
}

fn data_offset(placement: Placement) -> u64 {
    match placement {
        Placement::Front => FRONT_DATA_OFFSET,
        Placement::InPlace => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn params(device_size_bytes: u64) -> LayoutParams {
        LayoutParams {
            device_size_bytes,
            block_size_bytes: 512,
            placement: Placement::Front,
            data_size_bytes: None,
            granularity_log2: 12,
            peer_slots: 7,
            channel_slots: 16,
            al_ring_blocks: 8,
        }
    }

    #[test]
    fn front_placement_puts_data_at_one_mebibyte_and_metadata_at_the_end() {
        let layout = Layout::new(&params(64 << 20)).unwrap();
        assert_eq!(layout.data_offset(), 1 << 20);
        let end = 64 << 20;
        assert_eq!(
            layout.superblock_offsets().collect::<Vec<_>>(),
            [0, 4096, end - 8192, end - 4096]
        );
        assert_eq!(layout.bitmap_pages(), 1);
        assert_eq!(layout.bitmap_page_offset(0, 0), end - 8192 - 7 * 4096);
        assert_eq!(
            layout.al_block_offset(0, 0),
            layout.bitmap_offset() - 16 * 8 * 4096
        );
        assert_eq!(
            layout.data_offset() + layout.data_size(),
            layout.al_offset()
        );
    }

    #[test]
    fn in_place_leaves_the_front_alone() {
        let layout = Layout::new(&LayoutParams {
            placement: Placement::InPlace,
            ..params(64 << 20)
        })
        .unwrap();
        assert_eq!(layout.data_offset(), 0);
        assert_eq!(layout.superblock_offsets().next(), Some((64 << 20) - 8192));
    }

    #[test]
    fn a_smaller_volume_keeps_its_metadata_at_the_end_of_the_device() {
        let layout = Layout::new(&LayoutParams {
            data_size_bytes: Some((8 << 20) + 5),
            ..params(64 << 20)
        })
        .unwrap();
        assert_eq!(layout.data_size(), 8 << 20);
        assert_eq!(layout.device_size(), 64 << 20);
        assert!(layout.al_offset() > 60 << 20);
    }

    #[test]
    fn a_device_that_is_too_small_is_told_how_large_it_must_be() {
        let Err(LayoutError::DeviceTooSmall { needed_bytes, .. }) = Layout::new(&params(4096))
        else {
            panic!("fits");
        };
        assert!(Layout::new(&params(needed_bytes - 1)).is_err());
        assert_eq!(
            Layout::new(&params(needed_bytes)).unwrap().data_size(),
            4096
        );
        let wish = LayoutParams {
            data_size_bytes: Some(u64::MAX),
            ..params(1 << 30)
        };
        assert_eq!(
            Layout::new(&wish),
            Err(LayoutError::TooLarge {
                size_bytes: u64::MAX
            })
        );
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let good = params(1 << 30);
        let bad = [
            LayoutParams {
                block_size_bytes: 0,
                ..good
            },
            LayoutParams {
                block_size_bytes: 8192,
                ..good
            },
            LayoutParams {
                granularity_log2: 11,
                ..good
            },
            LayoutParams {
                granularity_log2: 21,
                ..good
            },
            LayoutParams {
                peer_slots: 0,
                ..good
            },
            LayoutParams {
                peer_slots: 8,
                ..good
            },
            LayoutParams {
                channel_slots: 0,
                ..good
            },
            LayoutParams {
                al_ring_blocks: 1,
                ..good
            },
            LayoutParams {
                data_size_bytes: Some(4095),
                ..good
            },
        ];
        for params in bad {
            assert!(Layout::new(&params).is_err(), "{params:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_lie_in_order_without_overlap_and_the_layout_can_be_recomputed(
            device_size_bytes in 0..SIZE_BYTES_MAX, shift in 0u32..50,
            in_place: bool, granularity_log2 in 12u8..=20, peer_slots in 1u8..=7,
            channel_slots in 1u16..=64, al_ring_blocks in 2u32..=64,
            wish in proptest::option::of(0u64..SIZE_BYTES_MAX),
        ) {
            let params = LayoutParams {
                device_size_bytes: device_size_bytes >> shift,
                block_size_bytes: 4096,
                placement: if in_place { Placement::InPlace } else { Placement::Front },
                data_size_bytes: wish.map(|size| size >> shift),
                granularity_log2, peer_slots, channel_slots, al_ring_blocks,
            };
            if let Ok(layout) = Layout::new(&params) {
                prop_assert!(layout.data_size() > 0 && layout.data_size() % 4096 == 0);
                prop_assert!(layout.data_offset() + layout.data_size() <= layout.al_offset());
                let last_log = layout.al_block_offset(channel_slots - 1, al_ring_blocks - 1);
                prop_assert_eq!(last_log + 4096, layout.bitmap_offset());
                let last_page = layout.bitmap_page_offset(peer_slots - 1, layout.bitmap_pages() - 1);
                prop_assert_eq!(last_page + 4096, layout.superblock_offsets().nth(if in_place { 0 } else { 2 }).unwrap());
                prop_assert!(layout.device_size() <= params.device_size_bytes);
                prop_assert_eq!(Layout::new(&layout.params()).unwrap(), layout.clone());
                if wish.is_none() {
                    let unused = layout.al_offset() - layout.data_offset() - layout.data_size();
                    // One block more might have needed one more page in each slot.
                    prop_assert!(unused <= u64::from(peer_slots) * 4096, "unused {}", unused);
                }
            }
        }
    }
}
