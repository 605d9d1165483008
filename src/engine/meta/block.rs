//! A metadata block: 4096 bytes with little-endian fields at fixed offsets and a CRC32C.
//!
//! Used by the parse and emit pairs of this folder, which know what the fields mean.

/// Size in bytes of every metadata block, and the alignment of each of them on the device.
pub const BLOCK_SIZE: usize = 4096;

/// The bytes of one metadata block.
pub type Block = [u8; BLOCK_SIZE];

/// Whether the block was never written: formatting writes zeroes over the whole metadata area.
pub fn is_zero(block: &[u8]) -> bool {
    // By pieces, which are compared as a whole: an attach looks at every block of the metadata.
    let is_zero = |piece: &[u8]| piece.iter().fold(0, |all, byte| all | byte) == 0;
    block.chunks(64).all(is_zero)
}

/// CRC32C of the block as if the four bytes of the CRC at `crc_offset` were zero.
pub(super) fn checksum(block: &Block, crc_offset: usize) -> u32 {
    let before = crc32c::crc32c(&block[..crc_offset]);
    let field = crc32c::crc32c_append(before, &[0; 4]);
    crc32c::crc32c_append(field, &block[crc_offset + 4..])
}

pub(super) fn bytes_at<const N: usize>(block: &Block, offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[offset..offset + N]);
    bytes
}

pub(super) fn u16_at(block: &Block, offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(block, offset))
}

pub(super) fn u32_at(block: &Block, offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(block, offset))
}

pub(super) fn u64_at(block: &Block, offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(block, offset))
}

pub(super) fn put(block: &mut Block, offset: usize, bytes: &[u8]) {
    block[offset..offset + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_ignores_the_crc_field_and_covers_everything_else() {
        let mut block = [7; BLOCK_SIZE];
        let sum = checksum(&block, 12);
        put(&mut block, 12, &sum.to_le_bytes());
        assert_eq!(checksum(&block, 12), sum);
        for offset in [0, 11, 16, BLOCK_SIZE - 1] {
            block[offset] ^= 1;
            assert_ne!(checksum(&block, 12), sum, "byte {offset}");
            block[offset] ^= 1;
        }
    }
}
