//! Hello: what a node says about a volume before there is a session, and what two of them agree on.
//! Called by the manager when a link comes up. Must not decide about resync (that is `handshake`).

use thiserror::Error;
use uuid::Uuid;

use super::fields::{FieldReader, FieldWriter, LayoutError};
use super::state::{DiskState, Role};

/// First and last protocol version that this engine speaks.
pub const PROTOCOL_VERSIONS: (u16, u16) = (2, 2);

/// Feature bits; what both nodes offer is in force.
pub mod feature {
    /// Application I/O goes on while bitmaps are exchanged (DRBD's protocol 96).
    pub const IO_DURING_BITMAP: u64 = 1 << 0;
}

/// "No generation" in a generation field.
pub const GENERATION_NONE: u64 = 0;

/// The current generation of a replica that has never held data.
pub const GENERATION_JUST_CREATED: u64 = 4;

/// Generations that a Hello's history holds.
pub const HISTORY_LEN: usize = 16;

/// The fewest credits that a node gives: resync and what nodes tell each other take up to 24 of them.
pub const CREDITS_MIN: u16 = 32;

/// Node ids are 0 to 7.
const NODES: u8 = 8;

const MAGIC: [u8; 8] = *b"BDRPHELO";

/// Everything that a node tells a peer when the link is up. The sender's view, for this one receiver.
///
/// A Hello is fixed with its nonce: whoever changes anything in it takes a new nonce, which voids what was
/// decided from the old one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Oldest protocol version that the sender speaks.
    pub protocol_min: u16,
    /// Newest protocol version that the sender speaks.
    pub protocol_max: u16,
    /// [`feature`] bits that the sender offers. Unknown ones are kept.
    pub features: u64,
    /// The sender's node id.
    pub node_id: u8,
    /// The node id that the sender believes to talk to.
    pub peer_node_id: u8,
    /// The volume; the same on all its nodes.
    pub volume_uuid: [u8; 16],
    /// Bytes in a block of the volume.
    pub block_size_bytes: u32,
    /// Size of the volume. Of a diskless node: the size that it exports, 0 if it knows none.
    pub size_blocks: u64,
    /// log2 of the bytes that one bit of the sender's bitmap stands for, 12 to 20.
    pub granularity_log2: u8,
    /// The sender's role.
    pub role: Role,
    /// The sender's disk as its metadata has it. A Primary that attaches a disk again says Consistent at
    /// most: what it has written meanwhile is elsewhere.
    pub disk: DiskState,
    /// The sender was Primary when it died, and has not been in sync with the receiver since.
    pub crashed_primary: bool,
    /// The sender's activity log was turned into dirty bits at its last attach.
    pub unclean: bool,
    /// The sender is to be overwritten whole from the receiver (invalidate, or a full sync whose all-set
    /// bitmap is not durable yet).
    pub wants_full_sync: bool,
    /// The operator gives the sender's changes up if this is a split brain.
    pub discard_my_data: bool,
    /// The sender is or was Primary and lost quorum with writes unfinished.
    pub lost_quorum: bool,
    /// The sender has had a session with the receiver since it attached its disk.
    pub had_session: bool,
    /// The sender has a session with a Primary, or with a node that is about to be one, and that is not the receiver.
    pub sees_primary: bool,
    /// The sender fetches a resync, or is about to, from a node that is not the receiver.
    pub is_target: bool,
    /// The sender has started its current generation, or was told it by a Primary, and does not know yet whether all have
    /// it who shall.
    pub told: bool,
    /// The sender's current generation was cut short: nothing was written under it, and nothing will be.
    pub starting: bool,
    /// The sender is Outdated, and a node that is not the receiver may have what it lacks.
    pub has_others: bool,
    /// The sender's current generation. Of a diskless Primary: the generation of the data that its
    /// application has seen.
    pub current_generation: u64,
    /// Generation since which the sender keeps a bitmap for the receiver; 0: none;
    /// [`GENERATION_JUST_CREATED`]: the receiver has had nothing of it.
    pub bitmap_generation: u64,
    /// The sender's earlier generations, newest first, 0 after the last.
    pub history: [u64; HISTORY_LEN],
    /// Bits set in the bitmap that the sender keeps for the receiver.
    pub dirty_bits: u64,
    /// As [`nonce`] makes it; never 0.
    pub nonce: u64,
    /// Largest transfer in one command that the sender takes.
    pub max_transfer_bytes: u32,
    /// Data that the sender takes with one command without waiting for memory that I/O of its hosts may hold; with most
    /// transports what comes in the command capsule.
    pub in_capsule_bytes: u32,
    /// Commands that the receiver may have outstanding at the sender, per queue pair.
    pub credits: u16,
}

impl Hello {
    /// Size on the wire. Bytes behind the last field are 0 and ignored by this version: room to grow.
    pub const BYTES: usize = 512;

    const FIELD_BYTES: usize = 232;

    /// The Hello's bytes.
    pub fn emit(&self) -> [u8; Self::BYTES] {
        let flags = [
            self.crashed_primary,
            self.unclean,
            self.wants_full_sync,
            self.discard_my_data,
            self.lost_quorum,
            self.had_session,
            self.sees_primary,
            self.is_target,
            self.told,
            self.starting,
            self.has_others,
        ];
        let flags = flags
            .iter()
            .enumerate()
            .fold(0, |bits, (bit, &set)| bits | u32::from(set) << bit);
        let fields = FieldWriter::default()
            .bytes(&MAGIC)
            .u16(Self::BYTES as u16)
            .u16(self.protocol_min)
            .u16(self.protocol_max)
            .u8(self.node_id)
            .u8(self.peer_node_id)
            .u64(self.features)
            .bytes(&self.volume_uuid)
            .u64(self.size_blocks)
            .u32(self.block_size_bytes)
            .u8(self.granularity_log2)
            .u8(self.role.as_u8())
            .u8(self.disk.as_u8())
            .u8(0)
            .u32(flags)
            .u32(self.max_transfer_bytes)
            .u32(self.in_capsule_bytes)
            .u16(self.credits)
            .u16(0)
            .u64(self.nonce)
            .u64(self.dirty_bits)
            .u64(self.current_generation)
            .u64(self.bitmap_generation);
        self.history
            .iter()
            .fold(fields, |fields, &generation| fields.u64(generation))
            .finish(Self::FIELD_BYTES)
    }

    /// The Hello in `bytes`. Checks that it makes sense by itself; whether it fits ours, [`negotiate`]
    /// says.
    pub fn parse(bytes: &[u8]) -> Result<Hello, LayoutError> {
        let mut fields = FieldReader::exact("Hello", bytes, Self::BYTES)?;
        let magic: [u8; 8] = fields.array()?;
        if magic != MAGIC {
            return Err(fields.bad_value("magic", u64::from_le_bytes(magic)));
        }
        let length = fields.u16()?;
        if usize::from(length) != Self::BYTES {
            return Err(fields.bad_value("length", u64::from(length)));
        }
        let protocol_min = fields.u16()?;
        let protocol_max = fields.u16()?;
        let node_id = fields.state("node_id", |id| (id < NODES).then_some(id))?;
        let peer_node_id = fields.state("peer_node_id", |id| (id < NODES).then_some(id))?;
        let features = fields.u64()?;
        let volume_uuid = fields.array()?;
        let size_blocks = fields.u64()?;
        let block_size_bytes = fields.u32()?;
        let granularity_log2 = fields.state("granularity_log2", |log2| {
            (12..=20).contains(&log2).then_some(log2)
        })?;
        let role = fields.state("role", |role| {
            Role::from_u8(role).filter(|&role| role != Role::Unknown)
        })?;
        let disk = fields.state("disk", |disk| {
            DiskState::from_u8(disk).filter(|&disk| disk != DiskState::DUnknown)
        })?;
        fields.zeroes::<1>("reserved")?;
        let flags = fields.u32()?;
        if flags >> 11 != 0 {
            return Err(fields.bad_value("flags", u64::from(flags)));
        }
        let flag = |bit: u32| flags >> bit & 1 == 1;
        let max_transfer_bytes = fields.u32()?;
        let in_capsule_bytes = fields.u32()?;
        let credits = fields.u16()?;
        fields.zeroes::<2>("reserved")?;
        let nonce = fields.u64()?;
        let dirty_bits = fields.u64()?;
        let current_generation = fields.u64()?;
        let bitmap_generation = fields.u64()?;
        let mut history = [GENERATION_NONE; HISTORY_LEN];
        for generation in &mut history {
            *generation = fields.u64()?;
        }

        let has_data = disk >= DiskState::Inconsistent;
        let checks = [
            (
                "protocol_max",
                u64::from(protocol_max),
                protocol_min <= protocol_max,
            ),
            (
                "block_size_bytes",
                u64::from(block_size_bytes),
                block_size_bytes.is_power_of_two() && (512..=65536).contains(&block_size_bytes),
            ),
            (
                "size_blocks",
                size_blocks,
                size_blocks <= 1 << 48 && (size_blocks > 0 || !has_data),
            ),
            ("nonce", nonce, nonce != 0),
            ("credits", u64::from(credits), credits >= CREDITS_MIN),
            (
                "max_transfer_bytes",
                u64::from(max_transfer_bytes),
                max_transfer_bytes >= block_size_bytes,
            ),
            (
                "current_generation",
                current_generation,
                match current_generation {
                    GENERATION_NONE => !has_data,
                    GENERATION_JUST_CREATED => disk <= DiskState::Inconsistent,
                    _ => true,
                },
            ),
            (
                "history",
                GENERATION_JUST_CREATED,
                !history.contains(&GENERATION_JUST_CREATED)
                    && history.is_sorted_by_key(|&generation| generation == GENERATION_NONE),
            ),
        ];
        if let Some(&(field, value, _)) = checks.iter().find(|(_, _, holds)| !holds) {
            return Err(fields.bad_value(field, value));
        }
        Ok(Hello {
            protocol_min,
            protocol_max,
            features,
            node_id,
            peer_node_id,
            volume_uuid,
            block_size_bytes,
            size_blocks,
            granularity_log2,
            role,
            disk,
            crashed_primary: flag(0),
            unclean: flag(1),
            wants_full_sync: flag(2),
            discard_my_data: flag(3),
            lost_quorum: flag(4),
            had_session: flag(5),
            sees_primary: flag(6),
            is_target: flag(7),
            told: flag(8),
            starting: flag(9),
            has_others: flag(10),
            current_generation,
            bitmap_generation,
            history,
            dirty_bits,
            nonce,
            max_transfer_bytes,
            in_capsule_bytes,
            credits,
        })
    }

    /// There is a disk with data on it, whatever that is worth.
    pub fn has_data(&self) -> bool {
        self.disk >= DiskState::Inconsistent && self.disk != DiskState::DUnknown
    }
}

/// What two Hellos agree on; the same on both nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// The newest protocol version that both speak.
    pub protocol: u16,
    /// Features that both offer.
    pub features: u64,
    /// log2 of the bytes that a bit stands for in the bitmap exchange: the coarser of the two.
    pub granularity_log2: u8,
    /// Largest transfer in one command, either way.
    pub max_transfer_bytes: u32,
    /// Data that goes with one command, either way, and waits for no memory that the receiver's hosts may hold.
    pub in_capsule_bytes: u32,
    /// Commands outstanding, either way, per queue pair.
    pub credits: u16,
}

/// Why two nodes cannot replicate this volume with each other. "Our" and "their" are from the view of the
/// node that reports it; the other one reports the same reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum IncompatibleReason {
    /// No protocol version is spoken by both.
    #[error(
        "no common protocol version: we speak {} to {}, the peer {} to {}",
        ours.0, ours.1, theirs.0, theirs.1
    )]
    Protocol {
        /// First and last version here.
        ours: (u16, u16),
        /// First and last version there.
        theirs: (u16, u16),
    },
    /// The connection leads to another volume.
    #[error("the peer's volume is {}, ours is {}", Uuid::from_bytes(*theirs), Uuid::from_bytes(*ours))]
    VolumeUuid {
        /// Our volume.
        ours: [u8; 16],
        /// The peer's.
        theirs: [u8; 16],
    },
    /// The connection leads to another node than configured, or the peer expects another than us.
    #[error(
        "we are node {our_id} and expect node {we_expect}; the peer is node {their_id} and expects node \
         {they_expect}"
    )]
    NodeId {
        /// Our node id.
        our_id: u8,
        /// Whom we are configured to meet.
        we_expect: u8,
        /// The peer's node id.
        their_id: u8,
        /// Whom the peer is configured to meet.
        they_expect: u8,
    },
    /// Blocks of different sizes.
    #[error("our block size is {ours} bytes, the peer's {theirs} bytes")]
    BlockSize {
        /// Here.
        ours: u32,
        /// There.
        theirs: u32,
    },
    /// Volumes of different sizes.
    #[error(
        "our volume has {ours} blocks, the peer's {theirs} blocks; create both with the same size"
    )]
    Size {
        /// Here.
        ours: u64,
        /// There.
        theirs: u64,
    },
}

impl IncompatibleReason {
    /// The reason in [`PeerAnswer::Refused`](super::answer::PeerAnswer::Refused), 1 to 5.
    pub const fn code(&self) -> u8 {
        match self {
            IncompatibleReason::Protocol { .. } => 1,
            IncompatibleReason::VolumeUuid { .. } => 2,
            IncompatibleReason::NodeId { .. } => 3,
            IncompatibleReason::BlockSize { .. } => 4,
            IncompatibleReason::Size { .. } => 5,
        }
    }

    /// What a code says to the node that gets it in an answer and knows no numbers.
    pub const fn refusal(code: u8) -> Option<&'static str> {
        Some(match code {
            1 => "the peer speaks no protocol version that this node speaks",
            2 => "the peer's volume has another UUID; create both with the same name or UUID",
            3 => "the peer is another node than was added here, or knows this node by another id",
            4 => "the peer's volume has another block size",
            5 => "the peer's volume has another size; create both with the same size",
            _ => return None,
        })
    }
}

/// What both nodes will use, or why they cannot. Both sides reach the same, from exchanged arguments.
pub fn negotiate(mine: &Hello, theirs: &Hello) -> Result<Negotiated, IncompatibleReason> {
    let protocol = mine.protocol_max.min(theirs.protocol_max);
    if protocol < mine.protocol_min.max(theirs.protocol_min) {
        return Err(IncompatibleReason::Protocol {
            ours: (mine.protocol_min, mine.protocol_max),
            theirs: (theirs.protocol_min, theirs.protocol_max),
        });
    }
    if mine.volume_uuid != theirs.volume_uuid {
        return Err(IncompatibleReason::VolumeUuid {
            ours: mine.volume_uuid,
            theirs: theirs.volume_uuid,
        });
    }
    let as_configured = mine.peer_node_id == theirs.node_id && theirs.peer_node_id == mine.node_id;
    if !as_configured || mine.node_id == theirs.node_id {
        return Err(IncompatibleReason::NodeId {
            our_id: mine.node_id,
            we_expect: mine.peer_node_id,
            their_id: theirs.node_id,
            they_expect: theirs.peer_node_id,
        });
    }
    if mine.block_size_bytes != theirs.block_size_bytes {
        return Err(IncompatibleReason::BlockSize {
            ours: mine.block_size_bytes,
            theirs: theirs.block_size_bytes,
        });
    }
    let sizes_known = mine.size_blocks != 0 && theirs.size_blocks != 0;
    if sizes_known && mine.size_blocks != theirs.size_blocks {
        return Err(IncompatibleReason::Size {
            ours: mine.size_blocks,
            theirs: theirs.size_blocks,
        });
    }
    Ok(Negotiated {
        protocol,
        features: mine.features & theirs.features,
        granularity_log2: mine.granularity_log2.max(theirs.granularity_log2),
        max_transfer_bytes: mine.max_transfer_bytes.min(theirs.max_transfer_bytes),
        in_capsule_bytes: mine.in_capsule_bytes.min(theirs.in_capsule_bytes),
        credits: mine.credits.min(theirs.credits),
    })
}

/// The nonce of a Hello: `start`, random and not 0, one for each start of a volume, and a count of the Hellos since.
/// So a receiver knows which of two is the later one.
pub const fn nonce(start: u32, count: u32) -> u64 {
    (start as u64) << 32 | count as u64
}

/// The start and the count of a nonce.
pub const fn nonce_parts(nonce: u64) -> (u32, u32) {
    ((nonce >> 32) as u32, nonce as u32)
}

/// The id of the session of two nonces, whichever is whose; never 0.
pub fn session_id(nonce_a: u64, nonce_b: u64) -> u32 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&nonce_a.min(nonce_b).to_le_bytes());
    bytes[8..].copy_from_slice(&nonce_a.max(nonce_b).to_le_bytes());
    crc32c::crc32c(&bytes).max(1)
}

#[cfg(test)]
pub(super) mod tests;
