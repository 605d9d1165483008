//! Tests of the offline tool on files.

use std::fs;
use std::path::Path;

use clap::Parser;
use proptest::prelude::*;
use serde_json::Value;
use tempfile::NamedTempFile;

use super::*;
use crate::engine::bitmap::Page;
use crate::engine::meta::activity_log::ring::RingId;
use crate::engine::meta::activity_log::{ActivityLog, Begin};
use crate::engine::meta::bitmap_page;
use crate::engine::meta::block::BLOCK_SIZE;
use crate::engine::meta::superblock::{PeerSlot, Superblock};

const SIZE: u64 = 8 << 20;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: MetaCommand,
}

fn file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    file
}

/// Runs "meta" with these words, `FILE` standing for the file; the output, or the error's text.
fn meta(words: &str, file: &Path) -> Result<String, String> {
    let file = file.to_str().unwrap();
    let words = ["meta"].into_iter().chain(
        words
            .split(' ')
            .map(|word| if word == "FILE" { file } else { word }),
    );
    let arguments = Arguments::try_parse_from(words).map_err(|error| error.to_string())?;
    let mut out = Vec::new();
    let result = execute(arguments.command, &mut out);
    let out = String::from_utf8(out).unwrap();
    result
        .map(|()| out.clone())
        .map_err(|error| format!("{out}{error}"))
}

fn put(file: &NamedTempFile, offset: u64, bytes: &[u8]) {
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), bytes, offset).unwrap();
}

const CREATE: &str = "create FILE --node-id 1 --name vol0";

fn created() -> NamedTempFile {
    let file = file();
    meta(CREATE, file.path()).unwrap();
    file
}

fn dumped(file: &NamedTempFile) -> Value {
    serde_json::from_str(&meta("dump FILE --json", file.path()).unwrap()).unwrap()
}

#[test]
fn a_created_volume_can_be_dumped_and_checked() {
    let file = created();
    let dump = dumped(&file);
    assert_eq!(dump["volume"]["name"], "vol0");
    assert_eq!(
        (&dump["node_id"], &dump["disk_state"]),
        (&1.into(), &"Inconsistent".into())
    );
    assert_eq!(dump["generations"]["current"], "0000000000000004");
    assert_eq!(dump["layout"]["data_offset"], 1 << 20);
    assert!(meta("dump FILE", file.path()).unwrap().contains("vol0"));
    assert!(meta("check FILE", file.path()).unwrap().contains("whole"));
}

#[test]
fn metadata_is_written_as_real_zeroes() {
    let file = created();
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap());
    assert!(
        blocks * 512 > 1 << 20,
        "only {blocks} sectors are allocated"
    );
}

#[test]
fn a_device_that_carries_something_is_left_as_it_is_unless_forced() {
    for (offset, bytes) in [
        (1024 + 56, &b"\x53\xef"[..]),
        (SIZE - 512, b"EFI PART"),
        (SIZE - 4096, b"bdevrepl"),
    ] {
        let file = file();
        put(&file, offset, bytes);
        let before = fs::read(file.path()).unwrap();
        let error = meta(CREATE, file.path()).unwrap_err();
        assert!(error.contains("nothing was written"), "{error}");
        assert_eq!(fs::read(file.path()).unwrap(), before);
        meta(&format!("{CREATE} --force"), file.path()).unwrap();
        meta("check FILE", file.path()).unwrap();
    }
    let ours = created();
    let before = fs::read(ours.path()).unwrap();
    assert!(meta(CREATE, ours.path()).unwrap_err().contains("bdev_repl"));
    assert_eq!(fs::read(ours.path()).unwrap(), before);
}

#[test]
fn data_in_place_stays_and_a_former_superblock_before_it_does_not() {
    let plain = file();
    put(&plain, 0, &[0xab; 5 << 20]);
    meta(
        &format!("{CREATE} --data-offset 0 --has-data"),
        plain.path(),
    )
    .unwrap();
    assert!(
        fs::read(plain.path()).unwrap()[..5 << 20]
            .iter()
            .all(|&byte| byte == 0xab)
    );
    assert_eq!(dumped(&plain)["disk_state"], "UpToDate");

    let former = created();
    meta(&format!("{CREATE} --data-offset 0 --force"), former.path()).unwrap();
    assert_eq!(dumped(&former)["layout"]["placement"], "in_place");
    meta("check FILE", former.path()).unwrap();
}

#[test]
fn bad_arguments_are_told_and_write_nothing() {
    let file = file();
    for (words, told) in [
        ("--granularity 12K", "granularity"),
        ("--granularity 2M", "granularity"),
        ("--peer-slots 8", "peer slots"),
        ("--channel-slots 0", "channel slots"),
        ("--al-extents 1001", "extents"),
        ("--size 1T", "needs at least"),
        ("--size 99999999999999999999", "not a size"),
        ("--data-offset 4K", "0 or at 1M"),
        ("--block-size 8K", "block size"),
        ("--assume-clean --has-data", "cannot be used with"),
        (
            "--uuid 00000000-0000-0000-0000-000000000000",
            "UUID is zero",
        ),
    ] {
        let error = meta(&format!("{CREATE} {words}"), file.path()).unwrap_err();
        assert!(error.contains(told), "{words}: {error}");
    }
    assert!(fs::read(file.path()).unwrap().iter().all(|&byte| byte == 0));
    assert!(
        meta("dump FILE", Path::new("/nonexistent"))
            .unwrap_err()
            .contains("cannot open")
    );
    assert!(
        meta("dump FILE", Path::new("/dev/null"))
            .unwrap_err()
            .contains("neither")
    );
    file.as_file().set_len(100).unwrap();
    assert!(
        meta("check FILE", file.path())
            .unwrap_err()
            .contains("too few")
    );
}

#[test]
fn nodes_that_assume_clean_get_the_same_uuid_and_generation() {
    let of = |node| {
        let file = file();
        meta(
            &format!("create FILE --node-id {node} --name v --assume-clean"),
            file.path(),
        )
        .unwrap();
        let dump = dumped(&file);
        (
            dump["volume"]["uuid"].clone(),
            dump["generations"]["current"].clone(),
        )
    };
    assert_eq!(of(0), of(1));
}

/// A volume that has been used: a peer, a page of its bitmap, a few transactions.
fn used() -> (NamedTempFile, Superblock) {
    let file = created();
    let mut superblock = pick_of(&file);
    superblock.sequence += 1;
    superblock.peers[0] = Some(PeerSlot {
        node_id: 0,
        disk_state: 8,
        full_sync: false,
    });
    superblock.generations.bump(0x5678, 1);
    for (offset, block) in superblock.write_plan().unwrap() {
        put(&file, offset, &block);
    }
    let mut page = Page::boxed();
    page.set_range(3..10);
    let mut block = [0; BLOCK_SIZE];
    bitmap_page::emit(Some(&page), 0, &mut block);
    put(&file, superblock.layout.bitmap_page_offset(0, 0), &block);

    let mut log = ActivityLog::new(
        4,
        RingId::new(&superblock.volume_uuid, 1),
        superblock.layout.al_ring_blocks(),
        1,
    );
    for extent in 0..2 {
        assert!(matches!(log.begin(extent..=extent), Begin::Join(_)));
        let written = log.next_transaction(&mut block).unwrap();
        put(
            &file,
            superblock.layout.al_block_offset(1, written.ring_index),
            &block,
        );
        log.transaction_done(written.number);
    }
    (file, superblock)
}

fn pick_of(file: &NamedTempFile) -> Superblock {
    inspect::pick_from(&Device::open_to_read(file.path()).unwrap()).unwrap()
}

#[test]
fn the_dump_shows_bitmaps_and_activity_log() {
    let (file, _) = used();
    let dump = dumped(&file);
    assert_eq!(dump["peer_slots"][0]["set_bits"], 7);
    assert_eq!(dump["peer_slots"][0]["peer"]["disk_state"], "UpToDate");
    assert_eq!(
        dump["activity_log"][1]["extents"],
        serde_json::json!([0, 1])
    );
    let text = meta("dump FILE", file.path()).unwrap();
    assert!(
        text.contains("7 bits set (28672 bytes)") && text.contains("2 extents active"),
        "{text}"
    );
    meta("check FILE", file.path()).unwrap();
}

#[test]
fn any_damaged_block_is_found_by_check_and_survived_by_dump() {
    let (file, superblock) = used();
    let layout = &superblock.layout;
    let mut blocks: Vec<u64> = layout.superblock_offsets().collect();
    blocks.push(layout.bitmap_page_offset(0, 0));
    blocks.push(layout.bitmap_page_offset(2, 0));
    blocks.extend([
        layout.al_block_offset(1, 1),
        layout.al_block_offset(1, 2),
        layout.al_block_offset(0, 5),
    ]);
    for offset in blocks {
        let whole = fs::read(file.path()).unwrap()[offset as usize];
        put(&file, offset, &[whole ^ 0x40]);
        let error = meta("check FILE", file.path()).unwrap_err();
        assert!(
            error.contains("1 problem(s) found"),
            "byte {offset}: {error}"
        );
        assert!(meta("dump FILE", file.path()).is_ok(), "byte {offset}");
        put(&file, offset, &[whole]);
    }
    meta("check FILE", file.path()).unwrap();
    for offset in layout.superblock_offsets() {
        put(&file, offset + 100, &[0xee; 8]);
    }
    assert!(
        meta("dump FILE", file.path())
            .unwrap_err()
            .contains("no version of the superblock is whole")
    );
}

#[test]
fn sizes_are_read_with_their_units() {
    assert_eq!(parse_size("4096"), Ok(4096));
    assert_eq!(parse_size("4k"), Ok(4096));
    assert_eq!(parse_size("1MiB"), Ok(1 << 20));
    assert_eq!(parse_size("2G"), Ok(2 << 30));
    for bad in ["", "K", "-1", "1X", "1.5M", "99999999T"] {
        assert!(parse_size(bad).is_err(), "{bad}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn random_damage_never_panics_and_is_never_written_over(
        changes in proptest::collection::vec((any::<bool>(), 0u64..8192, any::<u8>()), 1..30),
    ) {
        let (file, superblock) = used();
        for (at_end, offset, byte) in changes {
            let at = if at_end { SIZE - 8192 } else { 0 };
            put(&file, at + offset, &[byte]);
        }
        put(&file, superblock.layout.al_offset() + 9, &[0x99]);
        let before = fs::read(file.path()).unwrap();
        let _ = meta("dump FILE", file.path());
        let _ = meta("dump FILE --json", file.path());
        prop_assert!(meta("check FILE", file.path()).is_err());
        prop_assert!(meta(CREATE, file.path()).is_err());
        prop_assert_eq!(fs::read(file.path()).unwrap(), before);
    }
}
