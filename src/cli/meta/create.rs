//! `bdev-repl meta create`: everything is checked before the first byte is written.

use std::io::Write;

use uuid::Uuid;

use super::device::Device;
use super::inspect::pick_from;
use super::{CreateArgs, MetaError};
use crate::engine::meta::foreign::{END_BYTES, FRONT_BYTES, Foreign, recognise};
use crate::engine::meta::format::{
    AL_RING_BLOCKS_DEFAULT, Content, FormatParams, check_occupied, erase_plan, format,
};
use crate::engine::meta::layout::{LayoutParams, Placement};

pub(super) fn create(args: &CreateArgs, out: &mut impl Write) -> Result<(), MetaError> {
    if !args.granularity.is_power_of_two() {
        return Err(MetaError::Granularity(args.granularity));
    }
    let device = Device::open_to_write(&args.file)?;
    let block_size = args.block_size.unwrap_or(device.logical_block_size());
    let params = FormatParams {
        name: args.name.clone(),
        volume_uuid: args.uuid.map(Uuid::into_bytes),
        node_id: args.node_id,
        backing_uuid: args.backing_uuid.unwrap_or_default().into_bytes(),
        layout: LayoutParams {
            device_size_bytes: device.size_bytes(),
            block_size_bytes: block_size
                .try_into()
                .map_err(|_| MetaError::BlockSize(block_size))?,
            placement: if args.data_offset == 0 {
                Placement::InPlace
            } else {
                Placement::Front
            },
            data_size_bytes: args.size,
            granularity_log2: args.granularity.trailing_zeros() as u8,
            peer_slots: args.peer_slots,
            channel_slots: args.channel_slots,
            al_ring_blocks: AL_RING_BLOCKS_DEFAULT,
        },
        al_extents: args.al_extents,
        content: match (args.assume_clean, args.has_data) {
            (true, _) => Content::AssumeClean,
            (_, true) => Content::Data {
                random: getrandom::u64().map_err(MetaError::Random)?,
            },
            (false, false) => Content::Nothing,
        },
    };
    let refused = |error| MetaError::Format {
        path: args.file.clone(),
        source: error,
    };
    let superblock = format(&params).map_err(refused)?;
    let layout = &superblock.layout;
    let plan = superblock
        .write_plan()
        .map_err(|error| refused(error.into()))?;
    if !args.force {
        check_occupied(carried(&device)?.as_ref(), layout).map_err(refused)?;
    }

    let erase = erase_plan(layout, pick_from(&device).ok().as_ref());
    for range in erase.superblocks {
        device.write_zeroes(range)?;
    }
    device.flush()?;
    for range in erase.rest {
        device.write_zeroes(range)?;
    }
    device.flush()?;
    for (offset, block) in plan {
        device.write_block(offset, &block)?;
        device.flush()?;
    }
    // Something else on the device must not be taken for the volume instead.
    pick_from(&device)?;
    writeln!(
        out,
        "{}: volume \"{}\" ({}) for node {}, {} bytes of data from byte {}, {} bytes of metadata",
        device.path().display(),
        superblock.name.as_str(),
        Uuid::from_bytes(superblock.volume_uuid),
        superblock.node_id,
        layout.data_size(),
        layout.data_offset(),
        layout.metadata_bytes(),
    )?;
    Ok(out.flush()?)
}

fn carried(device: &Device) -> Result<Option<Foreign>, MetaError> {
    let size = device.size_bytes();
    let front = device.read(0, size.min(FRONT_BYTES as u64) as usize)?;
    let end_bytes = size.min(END_BYTES as u64);
    let end = device.read(size - end_bytes, end_bytes as usize)?;
    Ok(recognise(&front, &end))
}
