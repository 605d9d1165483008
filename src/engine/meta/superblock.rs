//! The superblock: whose device it is, what lies where, and what state the data was in.
//!
//! Written by the manager whenever one of that changes, read at attach and by the offline tool. Knows the
//! bytes and what they must fulfil; the meaning of states and generations lies elsewhere.

use thiserror::Error;

use super::block::{BLOCK_SIZE, Block, bytes_at, checksum, put, u16_at, u32_at, u64_at};
use super::generation::{self, Generations, HISTORY};
use super::layout::{Layout, LayoutError, LayoutParams, Placement};
use super::{MAX_NODE_ID, MAX_PEERS};

/// The first eight bytes of a superblock.
pub const MAGIC: [u8; 8] = *b"bdevrepl";
/// The format that this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// Longest volume name in bytes of UTF-8.
pub const NAME_BYTES_MAX: usize = 63;
/// Fewest extents that a channel's activity log may be limited to: the longest request has to fit.
pub const AL_EXTENTS_MIN: u32 = 7;
/// Most extents that the activity log of one channel can hold.
pub const AL_EXTENTS_MAX: u32 = super::activity_log::EXTENTS_MAX as u32;

// The first 32 bytes mean the same in every format version.
const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_CRC: usize = 12;
const AT_SEQUENCE: usize = 16;
const AT_DEVICE_SIZE: usize = 24;
const AT_VOLUME_UUID: usize = 32;
const AT_BACKING_UUID: usize = 48;
const AT_NAME: usize = 64;
const AT_DATA_OFFSET: usize = 128;
const AT_DATA_SIZE: usize = 136;
const AT_AL_OFFSET: usize = 144;
const AT_BITMAP_OFFSET: usize = 152;
const AT_BLOCK_SIZE: usize = 160;
const AT_AL_RING_BLOCKS: usize = 164;
const AT_AL_EXTENTS: usize = 168;
const AT_CHANNEL_SLOTS: usize = 172;
const AT_GRANULARITY: usize = 174;
const AT_PEER_SLOTS: usize = 175;
const AT_NODE_ID: usize = 176;
const AT_DISK: usize = 177;
const AT_FLAGS: usize = 180;
const AT_CURRENT: usize = 184;
const AT_HISTORY: usize = 192;
const AT_PEERS: usize = 320;
const PEER_BYTES: usize = 16;
const END: usize = AT_PEERS + PEER_BYTES * MAX_PEERS;

const FLAG_PRIMARY: u32 = 1;
const FLAG_ATTACHED: u32 = 2;
const FLAG_ASSUME_CLEAN: u32 = 4;
const FLAG_TOLD: u32 = 8;
const FLAG_PARTED: u32 = 16;
const FLAG_STARTING: u32 = 32;
const FLAGS: u32 =
    FLAG_PRIMARY | FLAG_ATTACHED | FLAG_ASSUME_CLEAN | FLAG_TOLD | FLAG_PARTED | FLAG_STARTING;
const PEER_CONFIGURED: u8 = 1;
const PEER_FULL_SYNC: u8 = 2;

/// Sequences stay below this, so that adding to one never overflows.
const SEQUENCE_MAX: u64 = 1 << 63;

/// The disk states that outlive an attach, in the order of DRBD's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum PersistedDisk {
    Inconsistent = 0,
    Outdated = 1,
    Consistent = 2,
    UpToDate = 3,
}

impl PersistedDisk {
    fn from_byte(byte: u8) -> Option<PersistedDisk> {
        [
            Self::Inconsistent,
            Self::Outdated,
            Self::Consistent,
            Self::UpToDate,
        ]
        .get(usize::from(byte))
        .copied()
    }
}

/// The name of a volume: 1 to 63 bytes of UTF-8 without control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeName(String);

impl VolumeName {
    pub fn new(name: &str) -> Result<VolumeName, SuperblockError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(SuperblockError::Name);
        }
        Ok(VolumeName(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What must survive a crash besides data, bitmaps and activity log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Set while this node is Primary. Found set at attach: a Primary that crashed.
    pub primary: bool,
    /// Set from attach to a clean detach. Found set at attach: the activity log must be replayed.
    pub attached: bool,
    /// The volume was declared the same on all nodes when it was made.
    pub assume_clean: bool,
    /// The current generation was started by this node, or told by a Primary, and it is not known yet whether all have
    /// it who shall.
    pub told: bool,
    /// A node that is no peer any more may have the current generation: nothing is to be written under it.
    pub parted: bool,
    /// The current generation was started, and nothing has been written under it: not all have it yet who shall.
    pub starting: bool,
}

/// A peer slot that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerSlot {
    /// 0 to 7, not ours, and not that of another slot.
    pub node_id: u8,
    /// The disk state that the peer was last known to have: 0 (Diskless) to 8 (UpToDate), in the order of
    /// `Diskless, Attaching, Failed, Negotiating, Inconsistent, Outdated, DUnknown, Consistent, UpToDate`.
    pub disk_state: u8,
    /// All of the volume has to be synchronised with this peer, whatever its bitmap says.
    pub full_sync: bool,
}

/// Highest value of [`PeerSlot::disk_state`].
pub const PEER_DISK_STATE_MAX: u8 = 8;

/// Everything that a superblock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Counts the superblocks that were written; its parity says in which of the two versions this one
    /// lies. From 1.
    pub sequence: u64,
    pub volume_uuid: [u8; 16],
    pub name: VolumeName,
    /// 0 to 7.
    pub node_id: u8,
    /// UUID of the backing bdev, zero if it has none. Another one at attach: a clone.
    pub backing_uuid: [u8; 16],
    pub layout: Layout,
    /// Extents that one channel may have in its activity log, 7 to 1000.
    pub al_extents: u32,
    pub flags: Flags,
    pub disk: PersistedDisk,
    pub generations: Generations,
    /// Slots beyond the layout's `peer_slots` are `None`.
    pub peers: [Option<PeerSlot>; MAX_PEERS],
}

/// Why a block is not a superblock, or why one cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SuperblockError {
    #[error("{0} bytes instead of 4096")]
    Length(usize),
    #[error("no superblock (the first bytes are not \"bdevrepl\")")]
    Magic,
    #[error("checksum {found:#010x} instead of {computed:#010x}, a torn or damaged superblock")]
    Checksum { found: u32, computed: u32 },
    #[error("format version {0} is not supported; this program supports version 1")]
    Version(u32),
    #[error("sequence {0} is not within 1 to 2^63 - 1")]
    Sequence(u64),
    #[error("the volume's UUID is zero")]
    NoVolumeUuid,
    #[error("the volume's name is not 1 to 63 bytes of UTF-8 without control characters")]
    Name,
    #[error("node id {0} is not within 0 to 7")]
    NodeId(u8),
    #[error("{what} lies at {found}, but with these sizes it would lie at {computed}")]
    Offset {
        what: &'static str,
        found: u64,
        computed: u64,
    },
    #[error("data cannot begin at byte {0}: only 0 and 1048576 are possible")]
    DataOffset(u64),
    #[error("the layout is impossible: {0}")]
    Layout(#[from] LayoutError),
    #[error("{0} extents for each activity log: there must be 7 to 1000")]
    AlExtents(u32),
    #[error("unknown flags {0:#x}")]
    Flags(u32),
    #[error("disk state {0} is not within 0 to 3")]
    DiskState(u8),
    #[error("generation {0:#018x} has its low bit set, or there is no current generation")]
    Generation(u64),
    #[error("the history of generations has gaps, repeats or reserved values")]
    History,
    #[error("peer slot {slot} is in use, but there are only {peer_slots} slots")]
    PeerSlot { slot: usize, peer_slots: u8 },
    #[error("peer slot {slot}: node id {node_id} is ours, in use twice or above 7")]
    PeerNodeId { slot: usize, node_id: u8 },
    #[error("peer slot {slot}: disk state {disk_state} is not within 0 to 8")]
    PeerDiskState { slot: usize, disk_state: u8 },
    #[error("peer slot {slot}: unknown flags {flags:#x}, or content in a slot that is not in use")]
    PeerFlags { slot: usize, flags: u8 },
    #[error("bytes that must be zero are not")]
    Reserved,
}

/// Why no superblock of a device can be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PickError {
    #[error("no superblock found: the device carries no metadata of bdev_repl")]
    NoSuperblock,
    #[error("metadata of bdev_repl found, but no version of the superblock is whole: {0}")]
    Damaged(SuperblockError),
    #[error("the metadata has format version {0}; this program supports version 1")]
    UnsupportedVersion(u32),
    #[error(
        "the superblock belongs to a device of {stored_bytes} bytes, but this one has {actual_bytes}: \
         a resized device or a partial copy"
    )]
    OtherDeviceSize {
        stored_bytes: u64,
        actual_bytes: u64,
    },
    #[error(
        "the superblocks of the device belong to different volumes; wipe those that are not wanted"
    )]
    Contradictory,
}

impl Superblock {
    /// Which of the two versions this superblock is written to, 0 or 1.
    pub fn version_index(&self) -> usize {
        (self.sequence & 1) as usize
    }

    /// Reads one block and checks everything that can be checked without the device.
    pub fn parse(bytes: &[u8]) -> Result<Superblock, SuperblockError> {
        let block: &Block = bytes
            .try_into()
            .map_err(|_| SuperblockError::Length(bytes.len()))?;
        check_envelope(block)?;
        let version = u32_at(block, AT_VERSION);
        if version != FORMAT_VERSION {
            return Err(SuperblockError::Version(version));
        }
        let superblock = Superblock {
            sequence: u64_at(block, AT_SEQUENCE),
            volume_uuid: bytes_at(block, AT_VOLUME_UUID),
            name: parse_name(block)?,
            node_id: block[AT_NODE_ID],
            backing_uuid: bytes_at(block, AT_BACKING_UUID),
            layout: parse_layout(block)?,
            al_extents: u32_at(block, AT_AL_EXTENTS),
            flags: parse_flags(block)?,
            disk: PersistedDisk::from_byte(block[AT_DISK])
                .ok_or(SuperblockError::DiskState(block[AT_DISK]))?,
            generations: Generations {
                current: u64_at(block, AT_CURRENT),
                bitmap: std::array::from_fn(|slot| u64_at(block, AT_PEERS + PEER_BYTES * slot + 8)),
                history: std::array::from_fn(|index| u64_at(block, AT_HISTORY + 8 * index)),
            },
            peers: parse_peers(block)?,
        };
        superblock.validate()?;
        // Whatever is not a field must be zero, so that a later version can give it a meaning.
        if superblock.emit() != *block {
            return Err(SuperblockError::Reserved);
        }
        Ok(superblock)
    }

    /// The bytes of this superblock.
    pub fn emit(&self) -> Block {
        let mut block = [0; BLOCK_SIZE];
        let layout = &self.layout;
        put(&mut block, AT_MAGIC, &MAGIC);
        put(&mut block, AT_VERSION, &FORMAT_VERSION.to_le_bytes());
        put(&mut block, AT_SEQUENCE, &self.sequence.to_le_bytes());
        put(
            &mut block,
            AT_DEVICE_SIZE,
            &layout.device_size().to_le_bytes(),
        );
        put(&mut block, AT_VOLUME_UUID, &self.volume_uuid);
        put(&mut block, AT_BACKING_UUID, &self.backing_uuid);
        let name = self.name.as_str().as_bytes();
        block[AT_NAME] = name.len() as u8;
        put(&mut block, AT_NAME + 1, name);
        put(
            &mut block,
            AT_DATA_OFFSET,
            &layout.data_offset().to_le_bytes(),
        );
        put(&mut block, AT_DATA_SIZE, &layout.data_size().to_le_bytes());
        put(&mut block, AT_AL_OFFSET, &layout.al_offset().to_le_bytes());
        put(
            &mut block,
            AT_BITMAP_OFFSET,
            &layout.bitmap_offset().to_le_bytes(),
        );
        put(
            &mut block,
            AT_BLOCK_SIZE,
            &layout.block_size().to_le_bytes(),
        );
        put(
            &mut block,
            AT_AL_RING_BLOCKS,
            &layout.al_ring_blocks().to_le_bytes(),
        );
        put(&mut block, AT_AL_EXTENTS, &self.al_extents.to_le_bytes());
        put(
            &mut block,
            AT_CHANNEL_SLOTS,
            &layout.channel_slots().to_le_bytes(),
        );
        block[AT_GRANULARITY] = layout.granularity_log2();
        block[AT_PEER_SLOTS] = layout.peer_slots();
        block[AT_NODE_ID] = self.node_id;
        block[AT_DISK] = self.disk as u8;
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags = flag(self.flags.primary, FLAG_PRIMARY)
            | flag(self.flags.attached, FLAG_ATTACHED)
            | flag(self.flags.assume_clean, FLAG_ASSUME_CLEAN)
            | flag(self.flags.told, FLAG_TOLD)
            | flag(self.flags.parted, FLAG_PARTED)
            | flag(self.flags.starting, FLAG_STARTING);
        put(&mut block, AT_FLAGS, &flags.to_le_bytes());
        put(
            &mut block,
            AT_CURRENT,
            &self.generations.current.to_le_bytes(),
        );
        for (index, generation) in self.generations.history.iter().enumerate() {
            put(
                &mut block,
                AT_HISTORY + 8 * index,
                &generation.to_le_bytes(),
            );
        }
        for (slot, peer) in self.peers.iter().enumerate() {
            let at = AT_PEERS + PEER_BYTES * slot;
            if let Some(peer) = peer {
                block[at] = PEER_CONFIGURED | if peer.full_sync { PEER_FULL_SYNC } else { 0 };
                block[at + 1] = peer.node_id;
                block[at + 2] = peer.disk_state;
            }
            put(
                &mut block,
                at + 8,
                &self.generations.bitmap[slot].to_le_bytes(),
            );
        }
        let sum = checksum(&block, AT_CRC);
        put(&mut block, AT_CRC, &sum.to_le_bytes());
        block
    }

    /// Whether every field holds what [`Superblock::parse`] would accept.
    pub fn validate(&self) -> Result<(), SuperblockError> {
        if self.sequence == 0 || self.sequence >= SEQUENCE_MAX {
            return Err(SuperblockError::Sequence(self.sequence));
        }
        if self.volume_uuid == [0; 16] {
            return Err(SuperblockError::NoVolumeUuid);
        }
        if self.node_id > MAX_NODE_ID {
            return Err(SuperblockError::NodeId(self.node_id));
        }
        if !(AL_EXTENTS_MIN..=AL_EXTENTS_MAX).contains(&self.al_extents) {
            return Err(SuperblockError::AlExtents(self.al_extents));
        }
        self.validate_generations()?;
        let mut seen = 1u32 << self.node_id;
        for (slot, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            if slot >= usize::from(self.layout.peer_slots()) {
                return Err(SuperblockError::PeerSlot {
                    slot,
                    peer_slots: self.layout.peer_slots(),
                });
            }
            if peer.node_id > MAX_NODE_ID || seen & (1 << peer.node_id) != 0 {
                return Err(SuperblockError::PeerNodeId {
                    slot,
                    node_id: peer.node_id,
                });
            }
            seen |= 1 << peer.node_id;
            if peer.disk_state > PEER_DISK_STATE_MAX {
                return Err(SuperblockError::PeerDiskState {
                    slot,
                    disk_state: peer.disk_state,
                });
            }
        }
        Ok(())
    }

    fn validate_generations(&self) -> Result<(), SuperblockError> {
        let Generations {
            current,
            bitmap,
            history,
        } = &self.generations;
        if *current == generation::NONE {
            return Err(SuperblockError::Generation(*current));
        }
        let all = bitmap.iter().chain(history).chain([current]);
        if let Some(&odd) = all
            .into_iter()
            .find(|&&generation| !generation::is_generation(generation))
        {
            return Err(SuperblockError::Generation(odd));
        }
        let known = history
            .iter()
            .take_while(|&&generation| generation != generation::NONE)
            .count();
        let repeated = (1..known).any(|index| history[..index].contains(&history[index]));
        let gap = history[known..]
            .iter()
            .any(|&generation| generation != generation::NONE);
        if gap || repeated || history.contains(&generation::JUST_CREATED) {
            return Err(SuperblockError::History);
        }
        Ok(())
    }

    /// What to write, and where, for this superblock to become the newest. One write after the other: the
    /// next one only when the one before is durable. Each goes over the older version of its pair, so
    /// whenever the writing stops, the superblock before this one or this one can be read.
    ///
    /// Raise `sequence` by one for every plan. Refuses a superblock that could not be read again.
    pub fn write_plan(&self) -> Result<Vec<(u64, Block)>, SuperblockError> {
        self.validate()?;
        let block = self.emit();
        let offsets = self
            .layout
            .superblock_offsets()
            .skip(self.version_index())
            .step_by(2);
        Ok(offsets.map(|offset| (offset, block)).collect())
    }
}

/// Magic and checksum, which every format version has in the same place.
fn check_envelope(block: &Block) -> Result<(), SuperblockError> {
    if block[..MAGIC.len()] != MAGIC {
        return Err(SuperblockError::Magic);
    }
    let (found, computed) = (u32_at(block, AT_CRC), checksum(block, AT_CRC));
    if found != computed {
        return Err(SuperblockError::Checksum { found, computed });
    }
    Ok(())
}

fn parse_name(block: &Block) -> Result<VolumeName, SuperblockError> {
    let length = usize::from(block[AT_NAME]);
    let bytes = block[AT_NAME + 1..AT_DATA_OFFSET]
        .get(..length)
        .ok_or(SuperblockError::Name)?;
    VolumeName::new(std::str::from_utf8(bytes).map_err(|_| SuperblockError::Name)?)
}

fn parse_layout(block: &Block) -> Result<Layout, SuperblockError> {
    let placement = match u64_at(block, AT_DATA_OFFSET) {
        0 => Placement::InPlace,
        super::layout::FRONT_DATA_OFFSET => Placement::Front,
        other => return Err(SuperblockError::DataOffset(other)),
    };
    let data_size = u64_at(block, AT_DATA_SIZE);
    let layout = Layout::new(&LayoutParams {
        device_size_bytes: u64_at(block, AT_DEVICE_SIZE),
        block_size_bytes: u32_at(block, AT_BLOCK_SIZE),
        placement,
        data_size_bytes: Some(data_size),
        granularity_log2: block[AT_GRANULARITY],
        peer_slots: block[AT_PEER_SLOTS],
        channel_slots: u16_at(block, AT_CHANNEL_SLOTS),
        al_ring_blocks: u32_at(block, AT_AL_RING_BLOCKS),
    })?;
    let stored = [
        (
            "the end of the device",
            u64_at(block, AT_DEVICE_SIZE),
            layout.device_size(),
        ),
        ("the end of the data", data_size, layout.data_size()),
        (
            "the activity log",
            u64_at(block, AT_AL_OFFSET),
            layout.al_offset(),
        ),
        (
            "the bitmap area",
            u64_at(block, AT_BITMAP_OFFSET),
            layout.bitmap_offset(),
        ),
    ];
    for (what, found, computed) in stored {
        if found != computed {
            return Err(SuperblockError::Offset {
                what,
                found,
                computed,
            });
        }
    }
    Ok(layout)
}

fn parse_flags(block: &Block) -> Result<Flags, SuperblockError> {
    let flags = u32_at(block, AT_FLAGS);
    if flags & !FLAGS != 0 {
        return Err(SuperblockError::Flags(flags));
    }
    Ok(Flags {
        primary: flags & FLAG_PRIMARY != 0,
        attached: flags & FLAG_ATTACHED != 0,
        assume_clean: flags & FLAG_ASSUME_CLEAN != 0,
        told: flags & FLAG_TOLD != 0,
        parted: flags & FLAG_PARTED != 0,
        starting: flags & FLAG_STARTING != 0,
    })
}

fn parse_peers(block: &Block) -> Result<[Option<PeerSlot>; MAX_PEERS], SuperblockError> {
    let mut peers = [None; MAX_PEERS];
    for (slot, peer) in peers.iter_mut().enumerate() {
        let [flags, node_id, disk_state, _] = bytes_at(block, AT_PEERS + PEER_BYTES * slot);
        *peer = match flags {
            0 if node_id == 0 && disk_state == 0 => None,
            PEER_CONFIGURED => Some(PeerSlot {
                node_id,
                disk_state,
                full_sync: false,
            }),
            f if f == PEER_CONFIGURED | PEER_FULL_SYNC => Some(PeerSlot {
                node_id,
                disk_state,
                full_sync: true,
            }),
            _ => return Err(SuperblockError::PeerFlags { slot, flags }),
        };
    }
    Ok(peers)
}

/// Chooses among the blocks that were read from [`super::layout::superblock_places`] of a device of
/// `device_size_bytes`, in that order, `None` for one that could not be read. The valid superblock with
/// the highest sequence wins.
///
/// A superblock for another device size is passed over while there is one for this size: with data in
/// place, the volume's data may begin with the superblock of a volume inside it.
pub fn pick(blocks: &[Option<&[u8]>; 4], device_size_bytes: u64) -> Result<Superblock, PickError> {
    let device_size_bytes = device_size_bytes / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
    let mut newest: Option<Superblock> = None;
    let mut other_size = None;
    let mut unsupported = None;
    let mut damaged = None;
    for (place, block) in blocks.iter().enumerate() {
        let Some(bytes) = block else { continue };
        match Superblock::parse(bytes) {
            Ok(found) => {
                let stored_bytes = found.layout.device_size();
                let expected_here = found.version_index() == place % 2
                    && (found.layout.placement() == Placement::Front || place >= 2);
                if stored_bytes != device_size_bytes {
                    other_size.get_or_insert(stored_bytes);
                } else if expected_here {
                    let Some(best) = &newest else {
                        newest = Some(found);
                        continue;
                    };
                    if best.volume_uuid != found.volume_uuid
                        || best.layout.placement() != found.layout.placement()
                    {
                        return Err(PickError::Contradictory);
                    }
                    if found.sequence > best.sequence {
                        newest = Some(found);
                    }
                }
            }
            Err(SuperblockError::Magic | SuperblockError::Length(_)) => (),
            Err(SuperblockError::Version(version)) => {
                // The device size lies in the part that every version has in common.
                let stored = bytes.get(AT_DEVICE_SIZE..AT_DEVICE_SIZE + 8);
                if stored == Some(&device_size_bytes.to_le_bytes()[..]) {
                    unsupported = Some(version);
                } else {
                    damaged.get_or_insert(SuperblockError::Version(version));
                }
            }
            Err(error) => {
                damaged.get_or_insert(error);
            }
        }
    }
    // A newer program has been here: the older version beside it may be long out of date.
    if let Some(version) = unsupported {
        return Err(PickError::UnsupportedVersion(version));
    }
    if let Some(superblock) = newest {
        return Ok(superblock);
    }
    if let Some(stored_bytes) = other_size {
        return Err(PickError::OtherDeviceSize {
            stored_bytes,
            actual_bytes: device_size_bytes,
        });
    }
    Err(damaged.map_or(PickError::NoSuperblock, PickError::Damaged))
}

// END is where the reserved rest begins; the fields must fit before the end of the block.
const _: () = assert!(END <= BLOCK_SIZE && AT_NAME + 1 + NAME_BYTES_MAX == AT_DATA_OFFSET);
const _: () = assert!(AT_HISTORY + 8 * HISTORY == AT_PEERS);

#[cfg(test)]
mod tests;
