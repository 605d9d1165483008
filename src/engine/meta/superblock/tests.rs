//! Tests of the superblock: what is refused, and which of several is chosen.

use proptest::prelude::*;

use super::*;
use crate::engine::meta::layout::superblock_places;

const DEVICE: u64 = 16 << 20;

fn layout(placement: Placement) -> Layout {
    Layout::new(&LayoutParams {
        device_size_bytes: DEVICE,
        block_size_bytes: 512,
        placement,
        data_size_bytes: None,
        granularity_log2: 12,
        peer_slots: 3,
        channel_slots: 2,
        al_ring_blocks: 4,
    })
    .unwrap()
}

fn sample(sequence: u64) -> Superblock {
    let mut generations = Generations::new(0x1000);
    generations.bump(0x2000, 0b10);
    Superblock {
        sequence,
        volume_uuid: [9; 16],
        name: VolumeName::new("vol0").unwrap(),
        node_id: 1,
        backing_uuid: [0; 16],
        layout: layout(Placement::Front),
        al_extents: 64,
        flags: Flags {
            primary: true,
            attached: true,
            assume_clean: false,
            told: false,
            parted: false,
            starting: false,
        },
        disk: PersistedDisk::UpToDate,
        generations,
        peers: [
            Some(PeerSlot {
                node_id: 0,
                disk_state: 8,
                full_sync: false,
            }),
            Some(PeerSlot {
                node_id: 7,
                disk_state: 6,
                full_sync: true,
            }),
            None,
            None,
            None,
            None,
            None,
        ],
    }
}

fn reseal(mut block: Block) -> Block {
    let sum = checksum(&block, AT_CRC);
    put(&mut block, AT_CRC, &sum.to_le_bytes());
    block
}

/// The blocks of a device that carries these superblocks, each where it belongs.
fn written(superblocks: &[Superblock]) -> Vec<u8> {
    let mut device = vec![0; DEVICE as usize];
    for superblock in superblocks {
        for (offset, block) in superblock.write_plan().unwrap() {
            device[offset as usize..][..BLOCK_SIZE].copy_from_slice(&block);
        }
    }
    device
}

fn pick_from(device: &[u8]) -> Result<Superblock, PickError> {
    let places = superblock_places(device.len() as u64).unwrap();
    let blocks = places.map(|offset| Some(&device[offset as usize..][..BLOCK_SIZE]));
    pick(&blocks, device.len() as u64)
}

#[test]
fn the_newest_whole_version_is_picked() {
    let mut device = written(&[sample(6), sample(7)]);
    assert_eq!(pick_from(&device).unwrap().sequence, 7);
    // Version 1 damaged at the front: its copy at the end is as good.
    device[4096 + 100] ^= 1;
    assert_eq!(pick_from(&device).unwrap().sequence, 7);
    device[DEVICE as usize - 4096 + 100] ^= 1;
    assert_eq!(pick_from(&device).unwrap().sequence, 6);
}

#[test]
fn why_there_is_no_superblock_is_told() {
    assert_eq!(
        pick_from(&vec![0; DEVICE as usize]),
        Err(PickError::NoSuperblock)
    );
    assert_eq!(pick(&[None; 4], DEVICE), Err(PickError::NoSuperblock));

    let mut device = written(&[sample(1)]);
    let cut = &device[..8 << 20];
    assert_eq!(
        pick_from(cut),
        Err(PickError::OtherDeviceSize {
            stored_bytes: DEVICE,
            actual_bytes: 8 << 20
        })
    );

    device[4096 + 2000] = 1;
    device[DEVICE as usize - 4096 + 2000] = 1;
    assert!(matches!(
        pick_from(&device),
        Err(PickError::Damaged(SuperblockError::Checksum { .. }))
    ));
}

#[test]
fn a_newer_format_is_not_passed_over_for_an_older_version_beside_it() {
    let mut device = written(&[sample(1), sample(2)]);
    let mut block: Block = device[..BLOCK_SIZE].try_into().unwrap();
    block[AT_VERSION] = 2;
    device[..BLOCK_SIZE].copy_from_slice(&reseal(block));
    assert_eq!(pick_from(&device), Err(PickError::UnsupportedVersion(2)));
}

#[test]
fn with_data_in_place_a_volume_inside_the_data_is_not_taken_for_ours() {
    let outer = Superblock {
        layout: layout(Placement::InPlace),
        ..sample(1)
    };
    let mut device = written(std::slice::from_ref(&outer));
    let inner_layout = Layout::new(&LayoutParams {
        device_size_bytes: outer.layout.data_size(),
        data_size_bytes: None,
        ..layout(Placement::Front).params()
    });
    let inner = Superblock {
        sequence: 99,
        volume_uuid: [1; 16],
        layout: inner_layout.unwrap(),
        ..sample(99)
    };
    for (offset, block) in inner.write_plan().unwrap() {
        device[offset as usize..][..BLOCK_SIZE].copy_from_slice(&block);
    }
    assert_eq!(pick_from(&device), Ok(outer));
}

#[test]
fn superblocks_of_two_volumes_are_not_mixed() {
    let other = Superblock {
        volume_uuid: [3; 16],
        ..sample(2)
    };
    assert_eq!(
        pick_from(&written(&[sample(1), other])),
        Err(PickError::Contradictory)
    );
}

#[test]
fn a_version_in_the_place_of_the_other_is_ignored() {
    let mut device = written(&[sample(2)]);
    let block = sample(3).emit();
    device[..BLOCK_SIZE].copy_from_slice(&block);
    assert_eq!(pick_from(&device).unwrap().sequence, 2);
}

#[test]
fn every_field_is_validated() {
    type Change = (usize, &'static [u8]);
    let changes: [Change; 22] = [
        (AT_SEQUENCE, &[0; 8]),
        (AT_SEQUENCE + 7, &[0x80]),
        (AT_DEVICE_SIZE, &[1]),
        (AT_VOLUME_UUID, &[0; 16]),
        (AT_NAME, &[0]),
        (AT_NAME, &[64]),
        (AT_NAME + 1, &[0xff]),
        (AT_NAME + 1, b"\n"),
        (AT_NAME + 10, &[1]),
        (AT_DATA_OFFSET, &[1]),
        (AT_DATA_SIZE, &[1]),
        (AT_AL_OFFSET + 1, &[0x55]),
        (AT_BITMAP_OFFSET + 1, &[0x55]),
        (AT_AL_EXTENTS, &[0xff, 0xff]),
        (AT_GRANULARITY, &[11]),
        (AT_PEER_SLOTS, &[1]),
        (AT_NODE_ID, &[8]),
        (AT_NODE_ID, &[7]),
        (AT_DISK, &[4]),
        (AT_FLAGS, &[64]),
        (AT_PEERS + 3, &[1]),
        (END, &[1]),
    ];
    let good = sample(4).emit();
    for (offset, bytes) in changes {
        let mut block = good;
        put(&mut block, offset, bytes);
        assert_ne!(block, good, "offset {offset} is not changed");
        assert!(
            Superblock::parse(&reseal(block)).is_err(),
            "offset {offset}"
        );
    }
    for (offset, bytes) in [
        (AT_CURRENT, 0u64),
        (AT_CURRENT, 3),
        (AT_HISTORY, 4),
        (AT_HISTORY + 16, 8),
    ] {
        let mut block = good;
        put(&mut block, offset, &bytes.to_le_bytes());
        assert!(
            Superblock::parse(&reseal(block)).is_err(),
            "offset {offset}"
        );
    }
}

#[test]
fn what_could_not_be_read_again_is_not_written() {
    let mut twice = sample(1);
    twice.peers[2] = twice.peers[0];
    assert_eq!(
        twice.write_plan(),
        Err(SuperblockError::PeerNodeId {
            slot: 2,
            node_id: 0
        })
    );
    let ours = Superblock {
        node_id: 7,
        ..sample(1)
    };
    assert!(ours.write_plan().is_err());
    let mut beyond = sample(1);
    beyond.peers.swap(0, 3);
    assert_eq!(
        beyond.write_plan(),
        Err(SuperblockError::PeerSlot {
            slot: 3,
            peer_slots: 3
        })
    );
}

proptest! {
    #[test]
    fn what_is_emitted_is_parsed_again(
        sequence in 1..SEQUENCE_MAX, uuid in 1u128.., backing: u128, name in "[^\\p{C}]{1,15}",
        in_place: bool, al_extents in AL_EXTENTS_MIN..=AL_EXTENTS_MAX, flags in 0u8..64, disk in 0u8..4,
        generations in proptest::collection::vec(any::<u64>(), 1..20),
        peers in proptest::collection::vec((0u8..=8, any::<bool>()), 0..=3), node_id in 3u8..=7,
    ) {
        let mut known = Generations::new(generation::from_random(generations[0]));
        for (slot, &random) in generations.iter().enumerate().skip(1) {
            if generation::from_random(random) != known.current {
                known.bump(generation::from_random(random), 1 << (slot % MAX_PEERS));
            }
        }
        let superblock = Superblock {
            sequence,
            volume_uuid: uuid.to_le_bytes(),
            name: VolumeName::new(&name).unwrap(),
            node_id,
            backing_uuid: backing.to_le_bytes(),
            layout: layout(if in_place { Placement::InPlace } else { Placement::Front }),
            al_extents,
            flags: Flags { primary: flags & 1 != 0, attached: flags & 2 != 0, assume_clean: flags & 4 != 0, told: flags & 8 != 0, parted: flags & 16 != 0, starting: flags & 32 != 0 },
            disk: PersistedDisk::from_byte(disk).unwrap(),
            generations: known,
            peers: std::array::from_fn(|slot| {
                peers.get(slot).map(|&(disk_state, full_sync)| PeerSlot { node_id: slot as u8, disk_state, full_sync })
            }),
        };
        prop_assert_eq!(Superblock::parse(&superblock.emit()), Ok(superblock));
    }

    #[test]
    fn random_bytes_never_panic(changes in proptest::collection::vec((0usize..BLOCK_SIZE, any::<u8>()), 0..40), cut in 0usize..=BLOCK_SIZE) {
        let mut block = sample(1).emit();
        for (offset, byte) in changes {
            block[8 + offset % 500] = byte;
        }
        let block = reseal(block);
        let _ = Superblock::parse(&block);
        let _ = pick(&[Some(&block), None, Some(&block[..cut]), Some(&block)], DEVICE);
    }
}
