//! How the bytes of a volume map to the bits of its bitmaps.
//! Volume, metadata and handshake ask; it holds no bits.

use core::ops::Range;

use super::page::BITS_PER_PAGE;

/// Why a granularity or a volume cannot be tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two between 4 KiB and 1 MiB.
    #[error(
        "bitmap granularity of {bytes} bytes: it must be a power of two from 4096 (4 KiB) to 1048576 (1 MiB)"
    )]
    Granularity {
        /// What was asked for.
        bytes: u64,
    },
    /// Not a power of two of at least 512, or larger than the granularity.
    #[error(
        "block size of {block_size} bytes: it must be a power of two from 512 to the bitmap granularity of {granularity_bytes} bytes"
    )]
    BlockSize {
        /// What was asked for.
        block_size: u32,
        /// The granularity it has to fit into.
        granularity_bytes: u64,
    },
    /// More bytes or more bitmap pages than their numbers hold.
    #[error(
        "a volume of {size_blocks} blocks of {block_size} bytes is too large; a coarser bitmap granularity may help"
    )]
    TooLarge {
        /// Blocks asked for.
        size_blocks: u64,
        /// Bytes of a block.
        block_size: u32,
    },
}

/// Bytes that one bit stands for: a power of two from 4 KiB to 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granularity(u8);

impl Granularity {
    /// 4 KiB.
    pub const MIN: Granularity = Granularity(12);
    /// 1 MiB.
    pub const MAX: Granularity = Granularity(20);

    /// From a number of bytes.
    pub fn from_bytes(bytes: u64) -> Result<Granularity, GeometryError> {
        if !bytes.is_power_of_two() {
            return Err(GeometryError::Granularity { bytes });
        }
        Granularity::from_log2(bytes.trailing_zeros() as u8)
    }

    /// From its binary logarithm, 12 to 20, as it lies on disk and travels in Hello.
    pub fn from_log2(log2: u8) -> Result<Granularity, GeometryError> {
        if (Granularity::MIN.0..=Granularity::MAX.0).contains(&log2) {
            Ok(Granularity(log2))
        } else {
            Err(GeometryError::Granularity {
                bytes: 1u64.checked_shl(log2.into()).unwrap_or(0),
            })
        }
    }

    /// Binary logarithm of the bytes.
    pub fn log2(self) -> u8 {
        self.0
    }

    /// Bytes of one bit.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Bits that a volume of `size_bytes` needs; the last one may be covered in part.
    pub fn bits_for(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.bytes())
    }
}

/// Size, block size and granularity of a volume, checked to fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    granularity: Granularity,
    block_size_log2: u8,
    size_blocks: u64,
}

impl Geometry {
    /// A volume of `size_blocks` blocks of `block_size` bytes.
    pub fn new(
        granularity: Granularity,
        block_size: u32,
        size_blocks: u64,
    ) -> Result<Geometry, GeometryError> {
        let granularity_bytes = granularity.bytes();
        if !block_size.is_power_of_two()
            || block_size < 512
            || u64::from(block_size) > granularity_bytes
        {
            return Err(GeometryError::BlockSize {
                block_size,
                granularity_bytes,
            });
        }
        let pages = size_blocks
            .checked_mul(u64::from(block_size))
            .map(|size_bytes| granularity.bits_for(size_bytes))
            .map(|bits| bits.div_ceil(u64::from(BITS_PER_PAGE)));
        if pages.is_none_or(|pages| pages > u64::from(u32::MAX)) {
            return Err(GeometryError::TooLarge {
                size_blocks,
                block_size,
            });
        }
        Ok(Geometry {
            granularity,
            block_size_log2: block_size.trailing_zeros() as u8,
            size_blocks,
        })
    }

    /// Bytes of one bit.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of one block.
    pub fn block_size(&self) -> u32 {
        1 << self.block_size_log2
    }

    /// Blocks of the volume.
    pub fn size_blocks(&self) -> u64 {
        self.size_blocks
    }

    /// Bytes of the volume.
    pub fn size_bytes(&self) -> u64 {
        self.size_blocks << self.block_size_log2
    }

    /// Bits of a bitmap of the volume.
    pub fn bits(&self) -> u64 {
        self.granularity.bits_for(self.size_bytes())
    }

    /// Pages of a bitmap of the volume.
    pub fn page_count(&self) -> u32 {
        super::page_count(self.bits())
    }

    /// Every bit that `bytes` touches, for setting. What lies past the end of the volume is cut off.
    pub fn outer(&self, bytes: Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.size_bytes());
        if bytes.start >= end {
            return 0..0;
        }
        bytes.start >> self.granularity.0..end.div_ceil(self.granularity.bytes())
    }

    /// Every bit whose bytes lie wholly in `bytes`, for clearing. The last bit of the volume counts when
    /// `bytes` reaches the volume's end.
    pub fn inner(&self, bytes: Range<u64>) -> Range<u64> {
        let start = bytes.start.div_ceil(self.granularity.bytes());
        let end = if bytes.end >= self.size_bytes() {
            self.bits()
        } else {
            bytes.end >> self.granularity.0
        };
        if start < end { start..end } else { 0..0 }
    }

    /// [`outer`](Geometry::outer) of a range of blocks.
    pub fn outer_blocks(&self, blocks: Range<u64>) -> Range<u64> {
        self.outer(self.bytes_of(blocks))
    }

    /// [`inner`](Geometry::inner) of a range of blocks.
    pub fn inner_blocks(&self, blocks: Range<u64>) -> Range<u64> {
        self.inner(self.bytes_of(blocks))
    }

    fn bytes_of(&self, blocks: Range<u64>) -> Range<u64> {
        blocks.start.min(self.size_blocks) << self.block_size_log2
            ..blocks.end.min(self.size_blocks) << self.block_size_log2
    }

    /// The bytes that `bits` stand for, cut at the end of the volume.
    pub fn bytes_of_bits(&self, bits: Range<u64>) -> Range<u64> {
        let last = self.bits();
        let size = self.size_bytes();
        let start = bits.start.min(last) << self.granularity.0;
        let end = bits.end.min(last) << self.granularity.0;
        start.min(size)..end.min(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_powers_of_two_from_4_kib_to_1_mib_are_granularities() {
        assert_eq!(Granularity::from_bytes(4096), Ok(Granularity::MIN));
        assert_eq!(Granularity::from_bytes(1 << 20), Ok(Granularity::MAX));
        for bytes in [0, 1, 2048, 4095, 4097, 12288, 1 << 21, 1 << 63, u64::MAX] {
            assert_eq!(
                Granularity::from_bytes(bytes),
                Err(GeometryError::Granularity { bytes })
            );
        }
        for log2 in (0..12).chain(21..=255) {
            assert!(Granularity::from_log2(log2).is_err());
        }
    }

    #[test]
    fn a_volume_that_cannot_be_tracked_is_an_error() {
        let fine = Granularity::MIN;
        for block_size in [0, 1, 256, 520, 4104, 8192] {
            assert!(Geometry::new(fine, block_size, 100).is_err());
        }
        assert!(Geometry::new(fine, 512, u64::MAX).is_err());
        assert!(Geometry::new(fine, 4096, 1 << 51).is_err());
        assert!(Geometry::new(Granularity::MAX, 4096, 1 << 50).is_ok());
        assert_eq!(Geometry::new(fine, 512, 0).unwrap().bits(), 0);
    }

    #[test]
    fn outer_is_everything_touched_and_inner_what_is_wholly_covered() {
        // 64 KiB per bit; the last bit stands for 512 bytes only.
        let granularity = Granularity::from_bytes(65536).unwrap();
        let geometry = Geometry::new(granularity, 512, 128 * 10 + 1).unwrap();
        assert_eq!(geometry.bits(), 11);
        assert_eq!(geometry.outer(65535..65537), 0..2);
        assert_eq!(geometry.inner(65535..65537), 0..0);
        assert_eq!(geometry.outer(65536..131072), 1..2);
        assert_eq!(geometry.inner(65536..131072), 1..2);
        assert_eq!(geometry.inner(1..196608), 1..3);
        assert_eq!(geometry.outer_blocks(1279..1281), 9..11);
        assert_eq!(geometry.inner_blocks(1280..1281), 10..11);
        assert_eq!(geometry.outer(655360..u64::MAX), 10..11);
        assert_eq!(geometry.outer_blocks(u64::MAX - 1..u64::MAX), 0..0);
        assert_eq!(geometry.bytes_of_bits(10..11), 655360..655872);
    }

    proptest! {
        #[test]
        fn inner_lies_in_outer_and_no_byte_is_missed(
            log2 in 12u8..=20, blocks in 1u64..100_000, a in 0u64..60_000_000, length in 0u64..9_000_000,
        ) {
            let geometry = Geometry::new(Granularity::from_log2(log2).unwrap(), 512, blocks).unwrap();
            let bytes = a..a + length;
            let (outer, inner) = (geometry.outer(bytes.clone()), geometry.inner(bytes.clone()));
            let inside = bytes.start..bytes.end.min(geometry.size_bytes());
            if !inside.is_empty() {
                let covered = geometry.bytes_of_bits(outer.clone());
                prop_assert!(covered.start <= inside.start && covered.end >= inside.end);
            }
            prop_assert!(outer.end <= geometry.bits());
            if !inner.is_empty() {
                let covered = geometry.bytes_of_bits(inner.clone());
                prop_assert!(covered.start >= inside.start && covered.end <= inside.end);
                prop_assert!(inner.start >= outer.start && inner.end <= outer.end);
            }
        }
    }
}
