//! The metadata of a fresh volume, what it may replace, and the order in which it is written.
//!
//! Used by the offline tool and by the RPC that creates a volume. They do the reading and writing.

use std::ops::Range;

use thiserror::Error;
use uuid::Uuid;

use super::MAX_PEERS;
use super::block::BLOCK_SIZE;
use super::foreign::Foreign;
use super::generation::{self, Generations};
use super::layout::{Layout, LayoutError, LayoutParams, Placement};
use super::superblock::{Flags, PersistedDisk, Superblock, SuperblockError, VolumeName};

/// Bitmap granularity unless told: 4 KiB.
pub const GRANULARITY_LOG2_DEFAULT: u8 = 12;
/// Peer slots unless told.
pub const PEER_SLOTS_DEFAULT: u8 = 3;
/// Channel slots unless told: rings of the activity log, one for each core that uses the volume.
pub const CHANNEL_SLOTS_DEFAULT: u16 = 8;
/// Blocks of each ring unless told.
pub const AL_RING_BLOCKS_DEFAULT: u32 = 8;
/// Extents of 4 MiB in each channel's activity log unless told: 1 GiB.
pub const AL_EXTENTS_DEFAULT: u32 = 256;

/// Namespace of the volume UUIDs that are made of names, and of first generations.
const NAMESPACE: Uuid = Uuid::from_u128(0x5f1d_0a8e_6c3b_4e0f_9a57_2b64_d1c8_7e93);

/// What a fresh volume is made of.
#[derive(Clone, Debug)]
pub struct FormatParams {
    /// 1 to 63 bytes of UTF-8.
    pub name: String,
    /// The same on all nodes; `None` makes it of the name.
    pub volume_uuid: Option<[u8; 16]>,
    /// 0 to 7.
    pub node_id: u8,
    /// UUID of the backing bdev, zero if it has none.
    pub backing_uuid: [u8; 16],
    pub layout: LayoutParams,
    /// 7 to 1000 extents of 4 MiB for each channel.
    pub al_extents: u32,
    pub content: Content,
}

/// What the device holds when the volume is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that matters: whatever a peer has is better.
    Nothing,
    /// The same as on every other node of which this is said: no first resync between them.
    AssumeClean,
    /// Data that the peers have not: they get all of it. `random` makes this node's first generation.
    Data { random: u64 },
}

/// Why a volume cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error("the device carries {what}; nothing was written (force overrides)")]
    Occupied { what: &'static str },
    #[error(
        "the device carries {what} of {extent_bytes} bytes, but only the first {data_bytes} bytes can be the \
         volume's data; shrink it first, nothing was written (force overrides)"
    )]
    ReachesIntoMetadata {
        what: &'static str,
        extent_bytes: u64,
        data_bytes: u64,
    },
    #[error(
        "the device carries {what}, of which it is not known whether it reaches into the last \
         {metadata_bytes} bytes that the metadata takes; nothing was written (force overrides)"
    )]
    MayReachIntoMetadata {
        what: &'static str,
        metadata_bytes: u64,
    },
}

/// The UUID of a volume that was given only a name: the same on every node.
pub fn volume_uuid_of_name(name: &str) -> [u8; 16] {
    *Uuid::new_v5(&NAMESPACE, name.as_bytes()).as_bytes()
}

/// The first generation of a volume that was declared clean: the same on every node.
pub fn clean_generation(volume_uuid: &[u8; 16]) -> u64 {
    let hash = Uuid::new_v5(&NAMESPACE, volume_uuid);
    generation::from_random(hash.as_u64_pair().0)
}

/// Makes the first superblock of a fresh volume, without peers. It holds the layout.
pub fn format(params: &FormatParams) -> Result<Superblock, FormatError> {
    let name = VolumeName::new(&params.name)?;
    let volume_uuid = params
        .volume_uuid
        .unwrap_or_else(|| volume_uuid_of_name(&params.name));
    let (current, disk) = match params.content {
        Content::Nothing => (generation::JUST_CREATED, PersistedDisk::Inconsistent),
        Content::AssumeClean => (clean_generation(&volume_uuid), PersistedDisk::UpToDate),
        Content::Data { random } => (generation::from_random(random), PersistedDisk::UpToDate),
    };
    let superblock = Superblock {
        sequence: 1,
        volume_uuid,
        name,
        node_id: params.node_id,
        backing_uuid: params.backing_uuid,
        layout: Layout::new(&params.layout)?,
        al_extents: params.al_extents,
        flags: Flags {
            assume_clean: params.content == Content::AssumeClean,
            ..Flags::default()
        },
        disk,
        generations: Generations::new(current),
        peers: [None; MAX_PEERS],
    };
    superblock.validate()?;
    Ok(superblock)
}

/// Whether a volume of this layout may be made, without force, on a device on which this was recognised.
/// Data that stays in place may be a file system that ends before the metadata begins.
pub fn check_occupied(found: Option<&Foreign>, layout: &Layout) -> Result<(), FormatError> {
    let Some(&Foreign {
        what,
        is_ours,
        extent_bytes,
    }) = found
    else {
        return Ok(());
    };
    let data_bytes = layout.data_size();
    match (layout.placement(), extent_bytes) {
        (Placement::InPlace, Some(extent_bytes)) if !is_ours => {
            if extent_bytes <= data_bytes {
                return Ok(());
            }
            Err(FormatError::ReachesIntoMetadata {
                what,
                extent_bytes,
                data_bytes,
            })
        }
        (Placement::InPlace, None) if !is_ours => Err(FormatError::MayReachIntoMetadata {
            what,
            metadata_bytes: layout.metadata_bytes(),
        }),
        _ => Err(FormatError::Occupied { what }),
    }
}

/// What has to be overwritten with zeroes before the first superblock is written, as byte ranges of the
/// device. Each step must be durable before the next begins, so that a crash leaves either the old volume
/// as it was or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErasePlan {
    /// The superblocks, old and new; the newest old one last, so that it is not an older one that is left.
    pub superblocks: Vec<Range<u64>>,
    /// Everything else that the metadata takes.
    pub rest: Vec<Range<u64>>,
}

/// What to erase for a fresh volume of this layout. `replaced` is the superblock that was found on the
/// device: it may lie in other places.
pub fn erase_plan(layout: &Layout, replaced: Option<&Superblock>) -> ErasePlan {
    let newest: Vec<u64> = replaced
        .into_iter()
        .flat_map(|old| {
            let offsets = old.layout.superblock_offsets();
            offsets.skip(old.version_index()).step_by(2)
        })
        .collect();
    let mut offsets: Vec<u64> = layout.superblock_offsets().collect();
    offsets.extend(
        replaced
            .into_iter()
            .flat_map(|old| old.layout.superblock_offsets()),
    );
    offsets.sort_unstable_by_key(|offset| (newest.contains(offset), *offset));
    offsets.dedup();
    let superblocks = offsets
        .into_iter()
        .map(|offset| offset..offset + BLOCK_SIZE as u64)
        .collect();
    let rest = [
        0..layout.data_offset(),
        layout.al_offset()..layout.device_size(),
    ];
    ErasePlan {
        superblocks,
        rest: rest.into_iter().filter(|range| !range.is_empty()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> FormatParams {
        FormatParams {
            name: "vol0".into(),
            volume_uuid: None,
            node_id: 0,
            backing_uuid: [0; 16],
            layout: LayoutParams {
                device_size_bytes: 64 << 20,
                block_size_bytes: 512,
                placement: Placement::Front,
                data_size_bytes: None,
                granularity_log2: GRANULARITY_LOG2_DEFAULT,
                peer_slots: PEER_SLOTS_DEFAULT,
                channel_slots: CHANNEL_SLOTS_DEFAULT,
                al_ring_blocks: AL_RING_BLOCKS_DEFAULT,
            },
            al_extents: AL_EXTENTS_DEFAULT,
            content: Content::Nothing,
        }
    }

    fn in_place() -> Layout {
        Layout::new(&LayoutParams {
            placement: Placement::InPlace,
            ..params().layout
        })
        .unwrap()
    }

    #[test]
    fn a_fresh_volume_is_just_created_and_inconsistent() {
        let fresh = format(&params()).unwrap();
        assert_eq!(
            (fresh.generations.current, fresh.disk),
            (generation::JUST_CREATED, PersistedDisk::Inconsistent)
        );
        assert_eq!(Superblock::parse(&fresh.emit()), Ok(fresh));
    }

    #[test]
    fn nodes_that_assume_clean_agree_without_being_told() {
        let here = format(&FormatParams {
            content: Content::AssumeClean,
            ..params()
        })
        .unwrap();
        let there = format(&FormatParams {
            content: Content::AssumeClean,
            node_id: 1,
            ..params()
        })
        .unwrap();
        assert_eq!(here.volume_uuid, there.volume_uuid);
        assert_eq!(here.generations, there.generations);
        assert_ne!(here.generations.current, generation::JUST_CREATED);
        assert_eq!(here.disk, PersistedDisk::UpToDate);
        assert_ne!(here.volume_uuid, volume_uuid_of_name("vol1"));
    }

    #[test]
    fn a_device_that_has_the_data_is_up_to_date_with_a_generation_of_its_own() {
        let of = |random| {
            format(&FormatParams {
                content: Content::Data { random },
                ..params()
            })
            .unwrap()
        };
        assert_eq!(
            (of(0x1235).generations.current, of(0x1235).disk),
            (0x1234, PersistedDisk::UpToDate)
        );
        assert_ne!(of(0).generations.current, generation::NONE);
        assert!(!of(7).flags.assume_clean);
    }

    #[test]
    fn impossible_parameters_are_refused() {
        for bad in [
            FormatParams {
                name: String::new(),
                ..params()
            },
            FormatParams {
                name: "x".repeat(64),
                ..params()
            },
            FormatParams {
                volume_uuid: Some([0; 16]),
                ..params()
            },
            FormatParams {
                node_id: 8,
                ..params()
            },
            FormatParams {
                al_extents: 6,
                ..params()
            },
            FormatParams {
                al_extents: 1001,
                ..params()
            },
        ] {
            assert!(format(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn data_stays_in_place_only_when_it_ends_before_the_metadata() {
        let layout = in_place();
        let what = "a file system";
        let of = |extent_bytes| Foreign {
            what,
            is_ours: false,
            extent_bytes,
        };
        assert_eq!(check_occupied(None, &layout), Ok(()));
        assert_eq!(
            check_occupied(Some(&of(Some(layout.data_size()))), &layout),
            Ok(())
        );
        assert!(check_occupied(Some(&of(Some(layout.data_size() + 1))), &layout).is_err());
        assert!(check_occupied(Some(&of(None)), &layout).is_err());
        assert!(
            check_occupied(
                Some(&Foreign {
                    is_ours: true,
                    ..of(Some(4096))
                }),
                &layout
            )
            .is_err()
        );
        let front = format(&params()).unwrap().layout;
        assert_eq!(
            check_occupied(Some(&of(Some(4096))), &front),
            Err(FormatError::Occupied { what })
        );
    }

    #[test]
    fn every_byte_of_metadata_is_erased_and_no_byte_of_data() {
        let old = format(&params()).unwrap();
        let layout = in_place();
        let plan = erase_plan(&layout, Some(&old));
        assert_eq!(plan.rest, vec![layout.al_offset()..layout.device_size(); 1]);
        assert_eq!(
            plan.superblocks.len(),
            4,
            "the old pair at the front would else be found again"
        );
        assert_eq!(erase_plan(&layout, None).superblocks.len(), 2);
        let front = erase_plan(&old.layout, None);
        assert_eq!(front.rest[0], 0..1 << 20);
    }
}
