//! Which blocks a command names, and where a write stands among the Primary's writes.
//! Called by everything that makes or reads a peer command. Must not know opcodes or words.

/// First LBA that a command cannot name: LBAs have 48 bits.
pub const LBA_LIMIT: u64 = 1 << 48;

/// Blocks of the volume, in volume blocks: at least one, all below [`LBA_LIMIT`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Span {
    lba: u64,
    blocks: u32,
}

impl Span {
    /// `None` for an empty span or one that passes [`LBA_LIMIT`].
    pub fn new(lba: u64, blocks: u32) -> Option<Span> {
        let end = lba.checked_add(u64::from(blocks))?;
        (blocks > 0 && end <= LBA_LIMIT).then_some(Span { lba, blocks })
    }

    /// First block.
    pub const fn lba(self) -> u64 {
        self.lba
    }

    /// Number of blocks, at least 1.
    pub const fn blocks(self) -> u32 {
        self.blocks
    }

    /// First block after the span.
    pub const fn end_lba(self) -> u64 {
        self.lba + self.blocks as u64
    }
}

/// Where a write stands among the Primary's writes.
///
/// The two points are sent as 32-bit distances below the sequence; a point that is farther away or
/// unknown is not sent at all, which a receiver takes as "nothing known".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteOrder {
    pub(super) sequence: u64,
    pub(super) applied_distance: u32,
    pub(super) dependency_distance: u32,
    pub(super) applied_nodes: u8,
}

/// The distance that stands for "no point".
pub(super) const NO_POINT: u32 = u32::MAX;

fn distance_below(sequence: u64, point: Option<u64>) -> u32 {
    point
        .and_then(|point| sequence.checked_sub(point))
        .and_then(|distance| u32::try_from(distance).ok())
        .unwrap_or(NO_POINT)
}

fn point_below(sequence: u64, distance: u32) -> Option<u64> {
    if distance == NO_POINT {
        None
    } else {
        sequence.checked_sub(u64::from(distance))
    }
}

impl WriteOrder {
    /// A write with this sequence and neither point.
    pub const fn new(sequence: u64) -> WriteOrder {
        WriteOrder {
            sequence,
            applied_distance: NO_POINT,
            dependency_distance: NO_POINT,
            applied_nodes: 0,
        }
    }

    /// Adds the report that the nodes in `nodes` (bit = node id) hold everything up to `point`.
    pub fn with_all_applied(self, point: u64, nodes: u8) -> WriteOrder {
        let applied_distance = distance_below(self.sequence, Some(point));
        WriteOrder {
            applied_distance,
            applied_nodes: nodes,
            ..self
        }
    }

    /// Adds the highest sequence that had completed upward when this write was submitted
    /// (protocols A and B).
    pub fn with_dependency(self, point: u64) -> WriteOrder {
        WriteOrder {
            dependency_distance: distance_below(self.sequence, Some(point)),
            ..self
        }
    }

    /// The write's own sequence.
    pub const fn sequence(self) -> u64 {
        self.sequence
    }

    /// The sequence up to which, and the nodes (bit = node id) by which, everything is held.
    pub fn all_applied(self) -> Option<(u64, u8)> {
        point_below(self.sequence, self.applied_distance).map(|point| (point, self.applied_nodes))
    }

    /// The sequence that must be applied before this write.
    pub fn dependency(self) -> Option<u64> {
        point_below(self.sequence, self.dependency_distance)
    }
}
