//! Backing devices on the way into a volume: what they are opened for, whether they fit, and why not.
//! Called by a host around the engine's `Opener`. Must not know how a host claims, reads or closes a device.

use uuid::Uuid;

use crate::engine::meta::block::BLOCK_SIZE;
use crate::engine::meta::format::{AL_RING_BLOCKS_DEFAULT, Content, FormatParams};
use crate::engine::meta::layout::{LayoutParams, Placement};
use crate::engine::meta::superblock::Superblock;
use crate::engine::open::{Goal, OpenError};
use crate::engine::volume::VolumeGeometry;
use crate::rpc::RpcError;
use crate::rpc::volume::{CreateVolume, Register};

/// Bytes of one superblock, at each of [`wipe_places`].
pub const WIPE_BYTES: u64 = BLOCK_SIZE as u64;

/// The answer for a device that could not be opened.
pub fn open_error(error: &OpenError) -> RpcError {
    match error {
        OpenError::Io { .. } => RpcError::io(error.to_string()),
        OpenError::TooSmall(_) => RpcError::no_space(error.to_string()),
        OpenError::OtherVolume { .. } => RpcError::exists(error.to_string()),
        _ => RpcError::invalid(error.to_string()),
    }
}

/// What a device is opened for when a volume is to be made on it or brought back from it.
///
/// # Errors
/// The system has no random numbers.
pub fn create_goal(
    create: &CreateVolume,
    backing_uuid: Uuid,
    block_size: u32,
    device_bytes: u64,
) -> Result<Goal, RpcError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random)
        .map_err(|error| RpcError::io(format!("no random numbers: {error}")))?;
    let content = if create.has_data {
        Content::Data {
            random: u64::from_le_bytes(random),
        }
    } else if create.assume_clean {
        Content::AssumeClean
    } else {
        Content::Nothing
    };
    let params = FormatParams {
        name: create.name.clone(),
        volume_uuid: create.uuid.map(|uuid| *uuid.as_bytes()),
        node_id: create.node_id,
        backing_uuid: *backing_uuid.as_bytes(),
        layout: LayoutParams {
            device_size_bytes: device_bytes,
            block_size_bytes: block_size,
            placement: if create.data_offset == Some(0) {
                Placement::InPlace
            } else {
                Placement::Front
            },
            data_size_bytes: create.size_mb.map(|size| size << 20),
            granularity_log2: (u64::from(create.granularity_kb) << 10).trailing_zeros() as u8,
            peer_slots: create.peer_slots,
            channel_slots: u16::from(create.channel_slots),
            al_ring_blocks: AL_RING_BLOCKS_DEFAULT,
        },
        al_extents: create.al_extents,
        content,
    };
    Ok(Goal::Create {
        params: Box::new(params),
        force: create.force,
    })
}

/// What a device is opened for when a diskless volume gets it back.
pub fn attach_goal(volume_uuid: &Uuid, node_id: u8) -> Goal {
    Goal::Existing {
        volume_uuid: *volume_uuid.as_bytes(),
        node_id,
    }
}

/// How the volume on a device would have been asked for; where it listens is not written there.
pub fn found(superblock: &Superblock, base_bdev: &str) -> CreateVolume {
    let layout = &superblock.layout;
    CreateVolume {
        name: superblock.name.as_str().to_owned(),
        base_bdev: Some(base_bdev.to_owned()),
        uuid: Some(Uuid::from_bytes(superblock.volume_uuid)),
        node_id: superblock.node_id,
        granularity_kb: 1 << (layout.granularity_log2().saturating_sub(10)),
        peer_slots: layout.peer_slots(),
        channel_slots: layout.channel_slots() as u8,
        al_extents: superblock.al_extents,
        size_mb: None,
        data_offset: None,
        assume_clean: false,
        has_data: false,
        force: false,
        listen: None,
        ana_listeners: Vec::new(),
        register: Register::Always,
    }
}

/// The sizes of the volume on a device with blocks of `block_size`.
pub fn geometry(superblock: &Superblock, block_size: u32) -> VolumeGeometry {
    let layout = &superblock.layout;
    VolumeGeometry {
        block_size,
        size_blocks: layout.data_size() / u64::from(block_size),
        data_offset: layout.data_offset(),
        granularity_log2: layout.granularity_log2(),
    }
}

/// Whether the device still has the blocks that the volume was made with.
///
/// # Errors
/// It has not; `base_bdev` is its name.
pub fn check_block_size(
    superblock: &Superblock,
    base_bdev: &str,
    block_size: u32,
) -> Result<(), RpcError> {
    let own = superblock.layout.block_size();
    if own == block_size {
        return Ok(());
    }
    Err(RpcError::invalid(format!(
        "the volume has blocks of {own} bytes, bdev {base_bdev} of {block_size}"
    )))
}

/// Whether the metadata has an activity log ring for each core.
///
/// # Errors
/// It has not.
pub fn check_cores(superblock: &Superblock, cores: usize) -> Result<(), RpcError> {
    let room = superblock.layout.channel_slots();
    if cores <= usize::from(room) {
        return Ok(());
    }
    Err(RpcError::invalid(format!(
        "the metadata has room for {room} cores, this node has {cores}; make the volume with more channel_slots"
    )))
}

/// Where zeroes have to be written so that the device carries no volume any more, as byte offsets.
pub fn wipe_places(superblock: &Superblock) -> Vec<u64> {
    superblock.layout.superblock_offsets().collect()
}

/// The answer for a device whose metadata could not be overwritten.
pub fn wipe_error(error: impl std::fmt::Display) -> RpcError {
    RpcError::io(format!("the metadata cannot be overwritten: {error}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::engine::meta::format::format;
    use crate::rpc::volume::VolumeRequest;

    const DEVICE_BYTES: u64 = 256 << 20;

    /// The superblock of a fresh volume, made as a call with these parameters asks for.
    fn made(more: Value) -> Superblock {
        let mut params = json!({
            "name": "v", "node_id": 3, "base_bdev": "b", "granularity_kb": 128,
            "peer_slots": 2, "channel_slots": 4, "al_extents": 99,
        });
        for (key, value) in more.as_object().unwrap() {
            params[key] = value.clone();
        }
        let request = VolumeRequest::parse("bdev_repl_create", Some(params)).unwrap();
        let VolumeRequest::Create(create) = request else {
            panic!("{request:?}");
        };
        match create_goal(&create, Uuid::from_u128(5), 4096, DEVICE_BYTES).unwrap() {
            Goal::Create { params, force } => {
                assert_eq!(force, create.force);
                format(&params).unwrap()
            }
            _ => panic!("not a goal to create"),
        }
    }

    #[test]
    fn a_volume_is_made_as_it_was_asked_for() {
        let uuid = Uuid::from_u128(9);
        let superblock = made(json!({"uuid": uuid, "size_mb": 64, "force": true}));
        assert_eq!(superblock.name.as_str(), "v");
        assert_eq!(superblock.volume_uuid, *uuid.as_bytes());
        assert_eq!(superblock.node_id, 3);
        assert_eq!(superblock.backing_uuid, *Uuid::from_u128(5).as_bytes());
        assert_eq!(superblock.al_extents, 99);
        let layout = &superblock.layout;
        assert_eq!(
            (layout.peer_slots(), layout.channel_slots()),
            (2, 4),
            "room for peers and cores"
        );
        assert_eq!(layout.device_size(), DEVICE_BYTES);
        let geometry = geometry(&superblock, 4096);
        assert_eq!(
            (geometry.block_size, geometry.size_blocks),
            (4096, (64 << 20) / 4096)
        );
        assert_eq!(1 << geometry.granularity_log2, 128 << 10);
        assert!(geometry.data_offset > 0, "metadata in front");
    }

    #[test]
    fn data_that_is_there_stays_where_it_is_and_counts() {
        let in_place = made(json!({"data_offset": 0, "has_data": true}));
        assert_eq!(geometry(&in_place, 4096).data_offset, 0);
        assert_ne!(
            in_place.generations.current,
            made(json!({"data_offset": 0, "has_data": true}))
                .generations
                .current,
            "data of two nodes never looks the same"
        );
        assert!(made(json!({"assume_clean": true})).flags.assume_clean);
        assert!(!made(json!({})).flags.assume_clean);
    }

    #[test]
    fn a_device_that_does_not_fit_is_refused_with_both_numbers() {
        let superblock = made(json!({}));
        assert_eq!(check_block_size(&superblock, "b", 4096), Ok(()));
        let error = check_block_size(&superblock, "b", 512).unwrap_err();
        assert_eq!(error.code, -22);
        assert_eq!(
            error.message,
            "the volume has blocks of 4096 bytes, bdev b of 512"
        );
        assert_eq!(check_cores(&superblock, 4), Ok(()));
        let error = check_cores(&superblock, 5).unwrap_err();
        assert_eq!(error.code, -22);
        assert!(error.message.contains("channel_slots"), "{error}");
    }

    #[test]
    fn why_a_device_was_not_opened_decides_the_code() {
        let io = OpenError::Io {
            what: "read",
            offset: 0,
            len: 4096,
        };
        let other = OpenError::OtherVolume {
            name: "w".into(),
            uuid: Uuid::nil(),
            node_id: 1,
        };
        let shape = OpenError::OtherShape {
            size_bytes: 1,
            data_offset: 2,
        };
        for (error, code) in [
            (io, -5),
            (OpenError::TooSmall(1), -28),
            (other, -17),
            (shape, -22),
        ] {
            let answer = open_error(&error);
            assert_eq!((answer.code, answer.message), (code, error.to_string()));
        }
    }

    #[test]
    fn a_wipe_covers_every_superblock() {
        let superblock = made(json!({}));
        let places = wipe_places(&superblock);
        assert_eq!(places.len(), 4);
        for (offset, block) in superblock.write_plan().unwrap() {
            assert_eq!(block.len() as u64, WIPE_BYTES);
            assert!(places.contains(&offset), "{offset} of {places:?}");
        }
    }
}
