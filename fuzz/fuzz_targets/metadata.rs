//! Bytes of a device, whatever they are, through every parser of metadata. Run it with
//! `cargo +nightly fuzz run metadata`.
//!
//! Most random blocks fail their checksum, so each one is also tried with the right one put in.

#![no_main]

use bdev_repl::engine::meta::activity_log::ring::{self, RingId};
use bdev_repl::engine::meta::block::{BLOCK_SIZE, Block};
use bdev_repl::engine::meta::superblock::{self, Superblock, pick};
use bdev_repl::engine::meta::{bitmap_page, foreign};
use libfuzzer_sys::fuzz_target;

const VOLUME: [u8; 16] = [1; 16];

/// The block with its magic and a matching checksum.
fn sealed(bytes: &[u8], magic: &[u8], crc_offset: usize) -> Block {
    let mut block = [0; BLOCK_SIZE];
    let length = bytes.len().min(BLOCK_SIZE);
    block[..length].copy_from_slice(&bytes[..length]);
    block[..magic.len()].copy_from_slice(magic);
    block[crc_offset..crc_offset + 4].fill(0);
    let sum = crc32c::crc32c(&block);
    block[crc_offset..crc_offset + 4].copy_from_slice(&sum.to_le_bytes());
    block
}

fuzz_target!(|bytes: &[u8]| {
    let block = sealed(bytes, &superblock::MAGIC, 12);
    if let Ok(found) = Superblock::parse(&block) {
        assert_eq!(found.emit(), block);
        let size = found.layout.device_size();
        for place in 0..4 {
            let mut blocks = [None; 4];
            blocks[place] = Some(&block[..]);
            let _ = pick(&blocks, size);
        }
    }
    let quarter = bytes.len() / 4;
    let parts = [0, 1, 2, 3].map(|part| Some(&bytes[part * quarter..(part + 1) * quarter]));
    let _ = pick(&parts, bytes.len() as u64);

    let id = RingId::new(&VOLUME, 0);
    ring::recover(bytes, id, 1 << 20);
    let mut ring = bytes.to_vec();
    for block in ring.chunks_exact_mut(BLOCK_SIZE) {
        block[12..16].copy_from_slice(&crc32c::crc32c(&VOLUME).to_le_bytes());
        let whole = sealed(block, &ring::MAGIC, 8);
        block.copy_from_slice(&whole);
    }
    let found = ring::recover(&ring, id, 1 << 20);
    assert!(found.extents.is_sorted());

    let _ = bitmap_page::parse(bytes, 0);
    let page = sealed(bytes, &[], 0);
    if let Ok(found) = bitmap_page::parse(&page, 0) {
        let mut again = [0; BLOCK_SIZE];
        bitmap_page::emit(Some(&found), 0, &mut again);
        assert_eq!(again, page);
    }
    foreign::recognise(bytes, &bytes[bytes.len() / 2..]);
});
