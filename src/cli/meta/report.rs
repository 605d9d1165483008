//! The metadata of a device as text and as JSON.

use std::io::{self, Write};

use serde_json::{Value, json};
use uuid::Uuid;

use super::inspect::Inspection;
use crate::engine::meta::generation;
use crate::engine::meta::layout::Placement;
use crate::engine::meta::superblock::PersistedDisk;

/// Disk states of a peer, by the number that the superblock holds.
const PEER_DISK_STATES: [&str; 9] = [
    "Diskless",
    "Attaching",
    "Failed",
    "Negotiating",
    "Inconsistent",
    "Outdated",
    "DUnknown",
    "Consistent",
    "UpToDate",
];

fn disk(disk: PersistedDisk) -> &'static str {
    match disk {
        PersistedDisk::Inconsistent => "Inconsistent",
        PersistedDisk::Outdated => "Outdated",
        PersistedDisk::Consistent => "Consistent",
        PersistedDisk::UpToDate => "UpToDate",
    }
}

fn peer_disk(state: u8) -> &'static str {
    PEER_DISK_STATES
        .get(usize::from(state))
        .copied()
        .unwrap_or("unknown")
}

fn placement(placement: Placement) -> &'static str {
    match placement {
        Placement::Front => "front",
        Placement::InPlace => "in_place",
    }
}

/// Numbers of 64 bits are text: many readers of JSON keep 53 bits only.
fn hex(generation: u64) -> String {
    format!("{generation:016x}")
}

fn known(generations: &[u64]) -> Vec<String> {
    generations
        .iter()
        .filter(|&&generation| generation != generation::NONE)
        .map(|&generation| hex(generation))
        .collect()
}

pub(super) fn json(inspection: &Inspection) -> Value {
    let superblock = &inspection.superblock;
    let layout = &superblock.layout;
    let places = inspection.places.iter().map(|place| match &place.found {
        Ok(found) => json!({ "offset": place.offset, "sequence": found.as_ref().map(|found| found.sequence) }),
        Err(error) => json!({ "offset": place.offset, "error": error }),
    });
    let slots = inspection.bitmaps.iter().map(|bitmap| {
        let peer = superblock.peers[usize::from(bitmap.slot)];
        json!({
            "slot": bitmap.slot,
            "peer": peer.map(|peer| json!({
                "node_id": peer.node_id,
                "disk_state": peer_disk(peer.disk_state),
                "full_sync": peer.full_sync,
            })),
            "bitmap_generation": hex(superblock.generations.bitmap[usize::from(bitmap.slot)]),
            "set_bits": bitmap.set_bits,
            "damaged_pages": bitmap.damaged,
        })
    });
    let rings = inspection.rings.iter().enumerate().map(|(slot, ring)| {
        json!({
            "channel_slot": slot,
            "newest": ring.next_number - 1,
            "transactions": ring.transactions,
            "broken_blocks": ring.broken_blocks,
            "damaged": ring.damaged,
            "extents": ring.extents,
        })
    });
    json!({
        "volume": {
            "name": superblock.name.as_str(),
            "uuid": Uuid::from_bytes(superblock.volume_uuid),
            "size": layout.data_size(),
            "block_size": layout.block_size(),
        },
        "node_id": superblock.node_id,
        "backing_uuid": Uuid::from_bytes(superblock.backing_uuid),
        "sequence": superblock.sequence,
        "disk_state": disk(superblock.disk),
        "primary": superblock.flags.primary,
        "attached": superblock.flags.attached,
        "assume_clean": superblock.flags.assume_clean,
        "told": superblock.flags.told,
        "generations": {
            "current": hex(superblock.generations.current),
            "history": known(&superblock.generations.history),
        },
        "layout": {
            "placement": placement(layout.placement()),
            "device_size": layout.device_size(),
            "data_offset": layout.data_offset(),
            "al_offset": layout.al_offset(),
            "al_ring_blocks": layout.al_ring_blocks(),
            "al_extents": superblock.al_extents,
            "channel_slots": layout.channel_slots(),
            "bitmap_offset": layout.bitmap_offset(),
            "bitmap_granularity": 1u64 << layout.granularity_log2(),
            "bitmap_bits": layout.bitmap_bits(),
            "bitmap_pages": layout.bitmap_pages(),
            "peer_slots": layout.peer_slots(),
        },
        "superblocks": places.collect::<Vec<_>>(),
        "peer_slots": slots.collect::<Vec<_>>(),
        "activity_log": rings.collect::<Vec<_>>(),
    })
}

pub(super) fn text(inspection: &Inspection, out: &mut impl Write) -> io::Result<()> {
    let superblock = &inspection.superblock;
    let layout = &superblock.layout;
    let yes = |flag: bool| if flag { "yes" } else { "no" };
    let granularity = 1u64 << layout.granularity_log2();
    writeln!(out, "volume          {}", superblock.name.as_str())?;
    writeln!(
        out,
        "uuid            {}",
        Uuid::from_bytes(superblock.volume_uuid)
    )?;
    writeln!(
        out,
        "size            {} bytes in blocks of {}",
        layout.data_size(),
        layout.block_size()
    )?;
    writeln!(out, "node id         {}", superblock.node_id)?;
    if superblock.backing_uuid != [0; 16] {
        writeln!(
            out,
            "backing bdev    {}",
            Uuid::from_bytes(superblock.backing_uuid)
        )?;
    }
    writeln!(out, "disk state      {}", disk(superblock.disk))?;
    writeln!(out, "primary         {}", yes(superblock.flags.primary))?;
    writeln!(out, "attached        {}", yes(superblock.flags.attached))?;
    writeln!(
        out,
        "assume clean    {}",
        yes(superblock.flags.assume_clean)
    )?;
    writeln!(
        out,
        "generation      {}",
        hex(superblock.generations.current)
    )?;
    for (index, generation) in known(&superblock.generations.history).iter().enumerate() {
        writeln!(
            out,
            "{:16}{generation}",
            if index == 0 { "history" } else { "" }
        )?;
    }
    writeln!(
        out,
        "\nlayout of a device of {} bytes",
        layout.device_size()
    )?;
    writeln!(out, "  {:>16}  data", layout.data_offset())?;
    writeln!(
        out,
        "  {:>16}  activity log: {} rings of {} blocks, {} extents of 4 MiB each",
        layout.al_offset(),
        layout.channel_slots(),
        layout.al_ring_blocks(),
        superblock.al_extents
    )?;
    writeln!(
        out,
        "  {:>16}  bitmaps: {} slots of {} pages, {granularity} bytes a bit",
        layout.bitmap_offset(),
        layout.peer_slots(),
        layout.bitmap_pages()
    )?;
    for place in &inspection.places {
        let what = match &place.found {
            Ok(Some(found)) if found == superblock => {
                format!("sequence {}, the newest", found.sequence)
            }
            Ok(Some(found)) => format!("sequence {}", found.sequence),
            Ok(None) => "never written".to_owned(),
            Err(error) => error.clone(),
        };
        writeln!(out, "  {:>16}  superblock: {what}", place.offset)?;
    }
    writeln!(out, "\npeer slots")?;
    for bitmap in &inspection.bitmaps {
        let slot = usize::from(bitmap.slot);
        match superblock.peers[slot] {
            Some(peer) => write!(
                out,
                "  {slot}  node {}, last seen {}, bitmap generation {}{}",
                peer.node_id,
                peer_disk(peer.disk_state),
                hex(superblock.generations.bitmap[slot]),
                if peer.full_sync {
                    ", full resync wanted"
                } else {
                    ""
                }
            )?,
            None => write!(out, "  {slot}  not in use")?,
        }
        writeln!(
            out,
            "; {} bits set ({} bytes)",
            bitmap.set_bits,
            u128::from(bitmap.set_bits) * u128::from(granularity)
        )?;
        for damaged in &bitmap.damaged {
            writeln!(out, "     {damaged}")?;
        }
    }
    let active = inspection.active_extents();
    writeln!(out, "\nactivity log: {} extents active", active.len())?;
    for (slot, ring) in inspection.rings.iter().enumerate() {
        if ring.transactions == 0 && ring.broken_blocks == 0 {
            continue;
        }
        write!(
            out,
            "  ring {slot}: newest transaction {}, {} broken blocks",
            ring.next_number - 1,
            ring.broken_blocks
        )?;
        if ring.damaged {
            write!(out, ", newest transactions lost")?;
        }
        writeln!(out, ", extents {:?}", ring.extents)?;
    }
    Ok(())
}
