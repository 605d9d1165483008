//! The data that goes with peer commands: one struct per body, each with its checked parse and emit.
//! Called by manager and channels on both sides of a link. Must not know what is done with it.

use super::command::{MAX_TRANSFER_BYTES, Span};
use super::fields::{FieldReader, FieldWriter, LayoutError};
use super::hello::HISTORY_LEN;
use super::state::{ConnState, DiskState, Role};

/// One byte of flags, `bool`s packed from bit 0 up; bits beyond them must be zero.
fn pack_flags<const N: usize>(flags: [bool; N]) -> u8 {
    flags
        .iter()
        .enumerate()
        .fold(0, |byte, (bit, &set)| byte | u8::from(set) << bit)
}

fn unpack_flags<const N: usize>(byte: u8) -> Option<[bool; N]> {
    (u32::from(byte) >> N == 0).then(|| std::array::from_fn(|bit| byte >> bit & 1 == 1))
}

/// What a node tells a connected peer about itself whenever it changes (StatePut). 256 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateBody {
    /// The sender's role.
    pub role: Role,
    /// The sender's disk.
    pub disk: DiskState,
    /// The sender's state towards the receiver.
    pub conn: ConnState,
    /// The operator holds the resync on the sender's side.
    pub resync_paused: bool,
    /// The sender holds application I/O back.
    pub io_suspended: bool,
    /// The sender has quorum (true where quorum is off).
    pub has_quorum: bool,
    /// The sender starts a generation that others do not have yet.
    pub generation_running: bool,
    /// Nodes that the sender is connected to; bit = node id.
    pub connected_nodes: u8,
    /// Nodes that the sender knows to be UpToDate, itself included; bit = node id.
    pub up_to_date_nodes: u8,
    /// The sender's count of its state changes: an older state never replaces a newer one.
    pub revision: u64,
    /// The sender's current generation.
    pub current_generation: u64,
    /// The generation of the bitmap that the sender keeps for the receiver, 0 for none.
    pub bitmap_generation: u64,
    /// The transaction of the sender's last promotion, 0 if it knows none: a Prepare of it is settled.
    pub promotion: u64,
    /// Bits set in the bitmap that the sender keeps for the receiver.
    pub bits_set: u64,
    /// The generation of the bitmap that the sender keeps for each node, by node id: what it passes on to its sync target.
    pub bitmap_generations: [u64; 8],
    /// The sender's earlier generations, newest first, 0 after the last: the past of who fetches from it.
    pub history: [u64; HISTORY_LEN],
}

impl StateBody {
    /// Size on the wire.
    pub const BYTES: usize = 256;

    /// The body's bytes.
    pub fn emit(&self) -> [u8; Self::BYTES] {
        let fields = FieldWriter::default()
            .u8(self.role.as_u8())
            .u8(self.disk.as_u8())
            .u8(self.conn.as_u8())
            .u8(pack_flags([
                self.resync_paused,
                self.io_suspended,
                self.has_quorum,
                self.generation_running,
            ]))
            .u8(self.connected_nodes)
            .u8(self.up_to_date_nodes)
            .u16(0)
            .u64(self.revision)
            .u64(self.current_generation)
            .u64(self.bitmap_generation)
            .u64(self.promotion)
            .u64(self.bits_set);
        self.bitmap_generations
            .iter()
            .chain(&self.history)
            .fold(fields, |fields, &generation| fields.u64(generation))
            .finish(240)
    }

    /// The body in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<StateBody, LayoutError> {
        let mut fields = FieldReader::exact("StateBody", bytes, Self::BYTES)?;
        let role = fields.state("role", Role::from_u8)?;
        let disk = fields.state("disk", DiskState::from_u8)?;
        let conn = fields.state("conn", ConnState::from_u8)?;
        let [resync_paused, io_suspended, has_quorum, generation_running] =
            fields.state("flags", unpack_flags::<4>)?;
        let connected_nodes = fields.u8()?;
        let up_to_date_nodes = fields.u8()?;
        fields.zeroes::<2>("reserved")?;
        let mut body = StateBody {
            role,
            disk,
            conn,
            resync_paused,
            io_suspended,
            has_quorum,
            generation_running,
            connected_nodes,
            up_to_date_nodes,
            revision: fields.u64()?,
            current_generation: fields.u64()?,
            bitmap_generation: fields.u64()?,
            promotion: fields.u64()?,
            bits_set: fields.u64()?,
            bitmap_generations: [0; 8],
            history: [0; HISTORY_LEN],
        };
        let generations = body.bitmap_generations.iter_mut();
        for generation in generations.chain(&mut body.history) {
            *generation = fields.u64()?;
        }
        fields.zeroes::<16>("reserved")?;
        Ok(body)
    }
}

/// One range of a [`RangesBody`]. 24 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// The blocks.
    pub span: Span,
    /// OutOfSync: the sequence of the write that this stands for, so that the frontier has no gap; 0 where
    /// it stands for none. ResyncDone: 0.
    pub sequence: u64,
}

/// A batch of ranges (ResyncDone, OutOfSync): checked when made, read in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RangesBody<'a> {
    entries: &'a [u8],
}

impl<'a> RangesBody<'a> {
    const HEADER_BYTES: usize = 8;
    const ENTRY_BYTES: usize = 24;

    /// The most ranges that one command carries.
    pub const MAX_RANGES: usize =
        (MAX_TRANSFER_BYTES as usize - Self::HEADER_BYTES) / Self::ENTRY_BYTES;

    /// Bytes that `count` ranges take.
    pub const fn bytes_for(count: usize) -> usize {
        Self::HEADER_BYTES + count * Self::ENTRY_BYTES
    }

    /// Writes `ranges` to the front of `buffer` and returns how many of them fitted, and the bytes used
    /// (0 if not even one range fits, or none was given).
    pub fn emit(ranges: &[Range], buffer: &mut [u8]) -> (usize, usize) {
        let room = buffer.len().saturating_sub(Self::HEADER_BYTES) / Self::ENTRY_BYTES;
        let count = ranges.len().min(room).min(Self::MAX_RANGES);
        if count == 0 {
            return (0, 0);
        }
        let (header, entries) = buffer.split_at_mut(Self::HEADER_BYTES);
        let count_field = FieldWriter::<8>::default().u32(count as u32).finish(4);
        header.copy_from_slice(&count_field);
        for (entry, range) in entries
            .chunks_exact_mut(Self::ENTRY_BYTES)
            .zip(&ranges[..count])
        {
            let fields = FieldWriter::<24>::default()
                .u64(range.span.lba())
                .u32(range.span.blocks())
                .u32(0)
                .u64(range.sequence)
                .finish(24);
            entry.copy_from_slice(&fields);
        }
        (count, Self::bytes_for(count))
    }

    /// The batch in `bytes`: a count from 1 to [`Self::MAX_RANGES`], and exactly that many valid ranges.
    pub fn parse(bytes: &'a [u8]) -> Result<RangesBody<'a>, LayoutError> {
        let mut fields = FieldReader::new("RangesBody", bytes);
        let count = fields.u32()?;
        fields.zeroes::<4>("reserved")?;
        if count == 0 || count as usize > Self::MAX_RANGES {
            return Err(fields.bad_value("count", u64::from(count)));
        }
        FieldReader::exact("RangesBody", bytes, Self::bytes_for(count as usize))?;
        let entries = fields.rest();
        for entry in entries.chunks_exact(Self::ENTRY_BYTES) {
            Self::entry(entry)?;
        }
        Ok(RangesBody { entries })
    }

    fn entry(bytes: &[u8]) -> Result<Range, LayoutError> {
        let mut fields = FieldReader::exact("Range", bytes, Self::ENTRY_BYTES)?;
        let lba = fields.u64()?;
        let blocks = fields.u32()?;
        let span = Span::new(lba, blocks).ok_or_else(|| fields.bad_value("lba", lba))?;
        fields.zeroes::<4>("reserved")?;
        Ok(Range {
            span,
            sequence: fields.u64()?,
        })
    }

    /// The ranges, in the order in which they were put.
    pub fn iter(&self) -> impl Iterator<Item = Range> + use<'a> {
        self.entries
            .chunks_exact(Self::ENTRY_BYTES)
            .filter_map(|entry| Self::entry(entry).ok())
    }
}

/// From the source when bitmaps are exchanged: the target makes itself Inconsistent with this current
/// generation, durably, and answers. 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyncStartBody {
    /// The source's current generation.
    pub source_generation: u64,
    /// Bits set after both bitmaps were ORed, as the source counts.
    pub bits_set: u64,
    /// Every block is to be fetched.
    pub full: bool,
}

impl SyncStartBody {
    /// Size on the wire.
    pub const BYTES: usize = 32;

    /// The body's bytes.
    pub fn emit(&self) -> [u8; Self::BYTES] {
        FieldWriter::default()
            .u64(self.source_generation)
            .u64(self.bits_set)
            .u8(pack_flags([self.full]))
            .finish(17)
    }

    /// The body in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<SyncStartBody, LayoutError> {
        let mut fields = FieldReader::exact("SyncStartBody", bytes, Self::BYTES)?;
        let source_generation = fields.u64()?;
        let bits_set = fields.u64()?;
        let [full] = fields.state("flags", unpack_flags::<1>)?;
        fields.zeroes::<15>("reserved")?;
        Ok(SyncStartBody {
            source_generation,
            bits_set,
            full,
        })
    }
}

/// From the target, in both phases of a resync's end. 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyncFinishBody {
    /// The current generation that both ends have.
    pub generation: u64,
    /// Bits still set, as the target counts; 0 when it believes to be done.
    pub bits_set: u64,
    /// Blocks fetched by this resync.
    pub blocks_fetched: u64,
}

impl SyncFinishBody {
    /// Size on the wire.
    pub const BYTES: usize = 32;

    /// The body's bytes.
    pub fn emit(&self) -> [u8; Self::BYTES] {
        FieldWriter::default()
            .u64(self.generation)
            .u64(self.bits_set)
            .u64(self.blocks_fetched)
            .finish(24)
    }

    /// The body in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<SyncFinishBody, LayoutError> {
        let mut fields = FieldReader::exact("SyncFinishBody", bytes, Self::BYTES)?;
        let body = SyncFinishBody {
            generation: fields.u64()?,
            bits_set: fields.u64()?,
            blocks_fetched: fields.u64()?,
        };
        fields.zeroes::<8>("reserved")?;
        Ok(body)
    }
}

/// From a Primary that goes on without some node: the receiver takes over the new current generation,
/// durably, and answers. 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewGenerationBody {
    /// What becomes current.
    pub new_current: u64,
    /// What was current at the sender: a receiver with another current generation refuses.
    pub previous_current: u64,
    /// Nodes that miss writes from here; bit = node id.
    pub missing_nodes: u8,
    /// Nodes that are told this. Others that the receiver knows, and the sender does not, miss those writes too.
    pub told_nodes: u8,
    /// A generation that was told before and never took effect: whoever has it is behind the new one. 0: none.
    pub taken_back: u64,
}

impl NewGenerationBody {
    /// Size on the wire.
    pub const BYTES: usize = 32;

    /// The body's bytes.
    pub fn emit(&self) -> [u8; Self::BYTES] {
        FieldWriter::default()
            .u64(self.new_current)
            .u64(self.previous_current)
            .u64(self.taken_back)
            .u8(self.missing_nodes)
            .u8(self.told_nodes)
            .finish(26)
    }

    /// The body in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<NewGenerationBody, LayoutError> {
        let mut fields = FieldReader::exact("NewGenerationBody", bytes, Self::BYTES)?;
        let new_current = fields.u64()?;
        let previous_current = fields.u64()?;
        let taken_back = fields.u64()?;
        let missing_nodes = fields.u8()?;
        let told_nodes = fields.u8()?;
        fields.zeroes::<6>("reserved")?;
        Ok(NewGenerationBody {
            new_current,
            previous_current,
            missing_nodes,
            told_nodes,
            taken_back,
        })
    }
}

/// What a cluster change does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeKind {
    /// The initiator becomes Primary.
    Promote,
    /// The initiator becomes Secondary.
    Demote,
    /// Nothing changes: the initiator finds out whether nodes hold the same.
    Compare,
}

impl ChangeKind {
    fn from_u8(value: u8) -> Option<ChangeKind> {
        match value {
            1 => Some(ChangeKind::Promote),
            2 => Some(ChangeKind::Demote),
            3 => Some(ChangeKind::Compare),
            _ => None,
        }
    }

    const fn as_u8(self) -> u8 {
        match self {
            ChangeKind::Promote => 1,
            ChangeKind::Demote => 2,
            ChangeKind::Compare => 3,
        }
    }
}

/// A cluster change (Prepare, Commit, Abort). 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PrepareBody {
    /// What is to change.
    pub kind: ChangeKind,
    /// The node that leads it, 0 to 7.
    pub initiator: u8,
    /// Of a Commit of [`ChangeKind::Compare`]: the nodes that hold the same.
    pub nodes: u8,
    /// Names the change: a Commit or Abort that arrives twice, or late, finds its own Prepare or nothing.
    pub transaction: u64,
    /// Of [`ChangeKind::Compare`]: the initiator's current generation.
    pub generation: u64,
}

impl PrepareBody {
    /// Size on the wire.
    pub const BYTES: usize = 32;

    /// The body's bytes.
    pub fn emit(&self) -> [u8; Self::BYTES] {
        FieldWriter::default()
            .u8(self.kind.as_u8())
            .u8(self.initiator)
            .u8(self.nodes)
            .u8(0)
            .u32(0)
            .u64(self.transaction)
            .u64(self.generation)
            .finish(24)
    }

    /// The body in `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<PrepareBody, LayoutError> {
        let mut fields = FieldReader::exact("PrepareBody", bytes, Self::BYTES)?;
        let kind = fields.state("kind", ChangeKind::from_u8)?;
        let initiator = fields.state("initiator", |id| (id < 8).then_some(id))?;
        let nodes = fields.u8()?;
        fields.zeroes::<5>("reserved")?;
        let transaction = fields.u64()?;
        let generation = fields.u64()?;
        fields.zeroes::<8>("reserved")?;
        Ok(PrepareBody {
            kind,
            initiator,
            nodes,
            transaction,
            generation,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::peer::command::LBA_LIMIT;
    use proptest::prelude::*;

    fn state_body() -> impl Strategy<Value = StateBody> {
        let state = (
            prop::sample::select(Role::ALL),
            prop::sample::select(DiskState::ALL),
            prop::sample::select(ConnState::ALL),
        );
        (
            state,
            any::<[bool; 4]>(),
            any::<[u8; 2]>(),
            any::<[u64; 5]>(),
            any::<[u64; 8]>(),
            any::<[u64; HISTORY_LEN]>(),
        )
            .prop_map(
                |((role, disk, conn), flags, nodes, numbers, bitmap_generations, history)| {
                    StateBody {
                        role,
                        disk,
                        conn,
                        resync_paused: flags[0],
                        io_suspended: flags[1],
                        has_quorum: flags[2],
                        generation_running: flags[3],
                        connected_nodes: nodes[0],
                        up_to_date_nodes: nodes[1],
                        revision: numbers[0],
                        current_generation: numbers[1],
                        bitmap_generation: numbers[2],
                        promotion: numbers[3],
                        bits_set: numbers[4],
                        bitmap_generations,
                        history,
                    }
                },
            )
    }

    fn range() -> impl Strategy<Value = Range> {
        (0..LBA_LIMIT - 5000, 1..5000u32, any::<u64>()).prop_map(|(lba, blocks, sequence)| Range {
            span: Span::new(lba, blocks).unwrap(),
            sequence,
        })
    }

    proptest! {
        #[test]
        fn a_state_comes_back_as_it_was_sent(body in state_body()) {
            prop_assert_eq!(StateBody::parse(&body.emit()), Ok(body));
        }

        #[test]
        fn ranges_come_back_as_they_were_sent(ranges in prop::collection::vec(range(), 1..40)) {
            let mut buffer = [0xee; 1024];
            let (count, bytes) = RangesBody::emit(&ranges, &mut buffer);
            prop_assert_eq!(count, ranges.len());
            let parsed = RangesBody::parse(&buffer[..bytes]).unwrap();
            prop_assert_eq!(parsed.iter().collect::<Vec<_>>(), ranges);
        }

        #[test]
        fn fixed_bodies_come_back_as_they_were_sent(numbers in any::<[u64; 3]>(), flag: bool, nodes: u8) {
            let [a, b, c] = numbers;
            let start = SyncStartBody { source_generation: a, bits_set: b, full: flag };
            prop_assert_eq!(SyncStartBody::parse(&start.emit()), Ok(start));
            let finish = SyncFinishBody { generation: a, bits_set: b, blocks_fetched: c };
            prop_assert_eq!(SyncFinishBody::parse(&finish.emit()), Ok(finish));
            let generation =
                NewGenerationBody { new_current: a, previous_current: b, missing_nodes: nodes, told_nodes: !nodes, taken_back: c };
            prop_assert_eq!(NewGenerationBody::parse(&generation.emit()), Ok(generation));
            let kind = if flag { ChangeKind::Promote } else { ChangeKind::Demote };
            let change = PrepareBody { kind, initiator: nodes % 8, nodes, transaction: c, generation: a };
            prop_assert_eq!(PrepareBody::parse(&change.emit()), Ok(change));
        }

        #[test]
        fn arbitrary_bytes_never_panic_and_are_read_as_what_they_say(
            bytes in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 0..136),
        ) {
            if let Ok(body) = StateBody::parse(&bytes) {
                prop_assert_eq!(&body.emit()[..], &bytes[..]);
            }
            if let Ok(body) = SyncStartBody::parse(&bytes) {
                prop_assert_eq!(&body.emit()[..], &bytes[..]);
            }
            if let Ok(body) = SyncFinishBody::parse(&bytes) {
                prop_assert_eq!(&body.emit()[..], &bytes[..]);
            }
            if let Ok(body) = NewGenerationBody::parse(&bytes) {
                prop_assert_eq!(&body.emit()[..], &bytes[..]);
            }
            if let Ok(body) = PrepareBody::parse(&bytes) {
                prop_assert_eq!(&body.emit()[..], &bytes[..]);
            }
            if let Ok(body) = RangesBody::parse(&bytes) {
                prop_assert_eq!(RangesBody::bytes_for(body.iter().count()), bytes.len());
            }
        }
    }

    fn ranges_of(count: usize) -> Vec<Range> {
        (0..count as u64)
            .map(|n| Range {
                span: Span::new(n * 8, 8).unwrap(),
                sequence: n,
            })
            .collect()
    }

    #[test]
    fn ranges_that_do_not_fit_are_left_for_the_next_command() {
        let ranges = ranges_of(5);
        let mut buffer = [0; 8 + 3 * 24 + 23];
        assert_eq!(RangesBody::emit(&ranges, &mut buffer), (3, 80));
        assert_eq!(RangesBody::emit(&ranges, &mut [0; 31]), (0, 0));
        assert_eq!(RangesBody::emit(&ranges, &mut []), (0, 0));
        assert_eq!(RangesBody::emit(&[], &mut buffer), (0, 0));
        let ranges = ranges_of(RangesBody::MAX_RANGES + 1);
        let mut buffer = vec![0; 2 * MAX_TRANSFER_BYTES as usize];
        let (count, bytes) = RangesBody::emit(&ranges, &mut buffer);
        assert_eq!(count, RangesBody::MAX_RANGES);
        assert!(bytes <= MAX_TRANSFER_BYTES as usize);
    }

    #[test]
    fn a_batch_with_a_wrong_count_or_an_impossible_range_is_refused_whole() {
        let mut buffer = [0; 56];
        assert_eq!(RangesBody::emit(&ranges_of(2), &mut buffer), (2, 56));
        for count in [0u32, 1, 3, u32::MAX] {
            let mut bytes = buffer;
            bytes[..4].copy_from_slice(&count.to_le_bytes());
            assert!(RangesBody::parse(&bytes).is_err(), "{count}");
        }
        let mut bytes = buffer;
        bytes[40..44].copy_from_slice(&0u32.to_le_bytes());
        assert!(RangesBody::parse(&bytes).is_err(), "no blocks");
        let mut bytes = buffer;
        bytes[32..40].copy_from_slice(&LBA_LIMIT.to_le_bytes());
        assert!(RangesBody::parse(&bytes).is_err(), "LBA beyond 48 bits");
        assert!(RangesBody::parse(&buffer[..55]).is_err(), "cut short");
    }

    #[test]
    fn a_state_with_a_value_that_means_nothing_is_refused() {
        let body = StateBody {
            role: Role::Primary,
            disk: DiskState::UpToDate,
            conn: ConnState::Connected,
            resync_paused: false,
            io_suspended: false,
            has_quorum: true,
            generation_running: false,
            connected_nodes: 3,
            up_to_date_nodes: 3,
            revision: 1,
            current_generation: 2,
            bitmap_generation: 0,
            promotion: 1,
            bits_set: 0,
            bitmap_generations: [0; 8],
            history: [0; HISTORY_LEN],
        };
        for (at, value) in [
            (0, 3u8),
            (1, 9),
            (2, 24),
            (3, 16),
            (6, 1),
            (240, 1),
            (255, 1),
        ] {
            let mut bytes = body.emit();
            bytes[at] = value;
            assert!(StateBody::parse(&bytes).is_err(), "byte {at} = {value}");
        }
        assert!(StateBody::parse(&body.emit()[..255]).is_err());
    }
}
