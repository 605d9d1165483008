//! Reads all metadata of a device, and says what is wrong with it.

use super::MetaError;
use super::device::Device;
use crate::engine::bitmap::{BITS_PER_PAGE, page_bits};
use crate::engine::meta::activity_log::ring::{Recovery, RingId, recover};
use crate::engine::meta::bitmap_page;
use crate::engine::meta::block::{BLOCK_SIZE, is_zero};
use crate::engine::meta::layout::superblock_places;
use crate::engine::meta::superblock::{PickError, Superblock, pick};

/// Bitmap pages that are read at once.
const PAGES_AT_ONCE: u32 = 256;

/// One of the places where the superblock lies.
pub(super) struct Place {
    pub(super) offset: u64,
    /// The superblock there, `None` where none was written yet, or what is wrong.
    pub(super) found: Result<Option<Superblock>, String>,
}

/// The bitmap of one peer slot.
pub(super) struct Bitmap {
    pub(super) slot: u8,
    /// Bits that are set within the volume, damaged pages counted as all set.
    pub(super) set_bits: u64,
    /// What is wrong with the pages that are damaged.
    pub(super) damaged: Vec<String>,
}

/// Everything that the metadata of a device says.
pub(super) struct Inspection {
    /// The one that counts.
    pub(super) superblock: Superblock,
    pub(super) places: Vec<Place>,
    /// By channel slot.
    pub(super) rings: Vec<Recovery>,
    /// By peer slot.
    pub(super) bitmaps: Vec<Bitmap>,
}

/// The superblock of a device that counts.
pub(super) fn pick_from(device: &Device) -> Result<Superblock, MetaError> {
    let size_bytes = device.size_bytes();
    let path = || device.path().to_owned();
    let places = superblock_places(size_bytes).ok_or_else(|| MetaError::TooSmall {
        path: path(),
        size_bytes,
    })?;
    let blocks = places.map(|offset| device.try_read_block(offset));
    let found = pick(&blocks.each_ref().map(Option::as_deref), size_bytes);
    found.map_err(|source: PickError| MetaError::Pick {
        path: path(),
        source,
    })
}

impl Inspection {
    pub(super) fn read(device: &Device) -> Result<Inspection, MetaError> {
        let superblock = pick_from(device)?;
        let layout = &superblock.layout;
        let places = layout
            .superblock_offsets()
            .map(|offset| read_place(device, offset))
            .collect();
        let rings = (0..layout.channel_slots())
            .map(|slot| read_ring(device, &superblock, slot))
            .collect();
        let bitmaps = (0..layout.peer_slots())
            .map(|slot| read_bitmap(device, &superblock, slot))
            .collect::<Result<_, _>>()?;
        Ok(Inspection {
            places,
            rings,
            bitmaps,
            superblock,
        })
    }

    /// Extents that the activity log names: all rings together, ascending.
    pub(super) fn active_extents(&self) -> Vec<u32> {
        let mut extents: Vec<u32> = self
            .rings
            .iter()
            .flat_map(|ring| &ring.extents)
            .copied()
            .collect();
        extents.sort_unstable();
        extents.dedup();
        extents
    }

    /// What is damaged, each in one line.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (index, place) in self.places.iter().enumerate() {
            let at = format!("superblock at byte {}", place.offset);
            match &place.found {
                Err(error) => problems.push(format!("{at}: {error}")),
                // The other version is written with sequence 2.
                Ok(None) if self.superblock.sequence > 1 || index % 2 == 1 => {
                    problems.push(format!("{at}: overwritten with zeroes"));
                }
                Ok(None) => (),
                Ok(Some(found)) => {
                    if found.version_index() != index % 2 {
                        problems.push(format!(
                            "{at}: sequence {} belongs to the other version",
                            found.sequence
                        ));
                    }
                    let newest = &self.superblock;
                    if (found.volume_uuid, &found.layout) != (newest.volume_uuid, &newest.layout) {
                        problems.push(format!("{at}: of another volume or layout"));
                    }
                }
            }
        }
        for (slot, ring) in self.rings.iter().enumerate() {
            if ring.damaged {
                problems.push(format!(
                    "activity log of channel slot {slot}: the newest transactions are lost; after a crash the \
                     whole volume would be resynchronised"
                ));
            } else if ring.broken_blocks > 0 {
                problems.push(format!(
                    "activity log of channel slot {slot}: {} torn or damaged block(s), none of which is needed",
                    ring.broken_blocks
                ));
            }
        }
        for bitmap in &self.bitmaps {
            problems.extend(
                bitmap
                    .damaged
                    .iter()
                    .map(|page| format!("bitmap of peer slot {}: {page}", bitmap.slot)),
            );
        }
        problems
    }
}

fn read_place(device: &Device, offset: u64) -> Place {
    let found = match device.read(offset, BLOCK_SIZE) {
        Err(error) => Err(error.to_string()),
        Ok(block) if is_zero(&block) => Ok(None),
        Ok(block) => Superblock::parse(&block)
            .map(Some)
            .map_err(|error| error.to_string()),
    };
    Place { offset, found }
}

fn read_ring(device: &Device, superblock: &Superblock, slot: u16) -> Recovery {
    let layout = &superblock.layout;
    let mut ring = Vec::new();
    for index in 0..layout.al_ring_blocks() {
        // What cannot be read is damaged: neither zeroes nor a transaction.
        let block = device.try_read_block(layout.al_block_offset(slot, index));
        ring.extend(block.unwrap_or_else(|| vec![0xff; BLOCK_SIZE]));
    }
    recover(
        &ring,
        RingId::new(&superblock.volume_uuid, slot),
        layout.al_extent_count(),
    )
}

fn read_bitmap(device: &Device, superblock: &Superblock, slot: u8) -> Result<Bitmap, MetaError> {
    let layout = &superblock.layout;
    let mut bitmap = Bitmap {
        slot,
        set_bits: 0,
        damaged: Vec::new(),
    };
    for first in (0..layout.bitmap_pages()).step_by(PAGES_AT_ONCE as usize) {
        let count = PAGES_AT_ONCE.min(layout.bitmap_pages() - first);
        let bytes = device.read(
            layout.bitmap_page_offset(slot, first),
            count as usize * BLOCK_SIZE,
        )?;
        for (index, block) in (first..).zip(bytes.chunks(BLOCK_SIZE)) {
            let bits = page_bits(layout.bitmap_bits(), index);
            match bitmap_page::parse(block, index) {
                Err(error) => {
                    bitmap.set_bits += u64::from(bits);
                    bitmap.damaged.push(error.to_string());
                }
                Ok(mut page) => {
                    if page.clear_range(bits..BITS_PER_PAGE) > 0 {
                        bitmap.damaged.push(format!(
                            "bitmap page {index}: bits beyond the end of the volume"
                        ));
                    }
                    bitmap.set_bits += u64::from(page.count());
                }
            }
        }
    }
    Ok(bitmap)
}
