//! The ring of transactions of one channel slot on disk, and what it says after a crash.
//!
//! Every transaction names all extents that were active when it was made, so the newest whole one is
//! enough. Read at attach after a crash, and by the offline tool.

use thiserror::Error;

use super::super::block::{
    BLOCK_SIZE, Block, bytes_at, checksum, is_zero, put, u16_at, u32_at, u64_at,
};
use super::EXTENTS_MAX;

/// The first eight bytes of a transaction.
pub const MAGIC: [u8; 8] = *b"bdrepl_A";

const AT_CRC: usize = 8;
const AT_VOLUME: usize = 12;
const AT_NUMBER: usize = 16;
const AT_CHANNEL_SLOT: usize = 24;
const AT_COUNT: usize = 26;
const AT_EXTENTS: usize = 32;

/// Numbers stay below this, so that adding to one never overflows.
const NUMBER_MAX: u64 = 1 << 63;

/// Whose ring it is: a transaction of another ring that strayed here is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingId {
    volume: u32,
    channel_slot: u16,
}

impl RingId {
    pub fn new(volume_uuid: &[u8; 16], channel_slot: u16) -> RingId {
        RingId {
            volume: crc32c::crc32c(volume_uuid),
            channel_slot,
        }
    }

    pub fn channel_slot(&self) -> u16 {
        self.channel_slot
    }
}

/// Block of a ring that the transaction with this number is written to.
pub fn index_of(number: u64, ring_blocks: u32) -> u32 {
    (number % u64::from(ring_blocks)) as u32
}

/// One transaction as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    pub number: u64,
    /// At most 1000, as they were written: in no order.
    pub extents: Vec<u32>,
}

/// Why a block is not a transaction of its ring.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TransactionError {
    #[error("{0} bytes instead of 4096")]
    Length(usize),
    #[error("no transaction of an activity log")]
    Magic,
    #[error("checksum {found:#010x} instead of {computed:#010x}, a torn or damaged transaction")]
    Checksum { found: u32, computed: u32 },
    #[error("it belongs to another volume or channel slot")]
    OtherRing,
    #[error("number {0} is not within 1 to 2^63 - 1")]
    Number(u64),
    #[error("{0} extents are more than 1000")]
    Count(u16),
    #[error("extent {0} lies beyond the end of the volume")]
    Extent(u32),
}

/// Writes a transaction into `block`. Only the first 1000 extents fit; there are never more.
pub(super) fn emit(id: RingId, number: u64, extents: impl Iterator<Item = u32>, block: &mut Block) {
    *block = [0; BLOCK_SIZE];
    put(block, 0, &MAGIC);
    put(block, AT_VOLUME, &id.volume.to_le_bytes());
    put(block, AT_NUMBER, &number.to_le_bytes());
    put(block, AT_CHANNEL_SLOT, &id.channel_slot.to_le_bytes());
    let mut count = 0u16;
    for (index, extent) in extents.take(EXTENTS_MAX).enumerate() {
        put(block, AT_EXTENTS + 4 * index, &extent.to_le_bytes());
        count += 1;
    }
    put(block, AT_COUNT, &count.to_le_bytes());
    let sum = checksum(block, AT_CRC);
    put(block, AT_CRC, &sum.to_le_bytes());
}

/// Reads one transaction of the ring `id` of a volume with `extent_count` extents.
pub fn parse(bytes: &[u8], id: RingId, extent_count: u64) -> Result<Transaction, TransactionError> {
    let block: &Block = bytes
        .try_into()
        .map_err(|_| TransactionError::Length(bytes.len()))?;
    if block[..MAGIC.len()] != MAGIC {
        return Err(TransactionError::Magic);
    }
    let (found, computed) = (u32_at(block, AT_CRC), checksum(block, AT_CRC));
    if found != computed {
        return Err(TransactionError::Checksum { found, computed });
    }
    if u32_at(block, AT_VOLUME) != id.volume || u16_at(block, AT_CHANNEL_SLOT) != id.channel_slot {
        return Err(TransactionError::OtherRing);
    }
    let number = u64_at(block, AT_NUMBER);
    if number == 0 || number >= NUMBER_MAX {
        return Err(TransactionError::Number(number));
    }
    let count = u16_at(block, AT_COUNT);
    if usize::from(count) > EXTENTS_MAX {
        return Err(TransactionError::Count(count));
    }
    let extents: Vec<u32> = (0..usize::from(count))
        .map(|index| u32::from_le_bytes(bytes_at(block, AT_EXTENTS + 4 * index)))
        .collect();
    match extents
        .iter()
        .find(|&&extent| u64::from(extent) >= extent_count)
    {
        Some(&beyond) => Err(TransactionError::Extent(beyond)),
        None => Ok(Transaction { number, extents }),
    }
}

/// What a ring says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Extents whose writes may have been in flight, ascending. When `damaged` these are not all.
    pub extents: Vec<u32>,
    /// Number for the first transaction after this recovery.
    pub next_number: u64,
    /// Whole transactions in the ring.
    pub transactions: u32,
    /// Blocks that are neither a whole transaction nor zeroes. One is what a crash can leave.
    pub broken_blocks: u32,
    /// More is broken than a write that was cut off can explain: the newest transactions are lost, and
    /// every extent of the volume must be taken as active.
    pub damaged: bool,
}

/// Reads a whole ring, the blocks in their order on disk. A block that could not be read is passed as
/// anything that is not a transaction and not all zeroes.
///
/// The extents are those of the newest whole transaction, which names all that are active. A newest one that
/// was torn does not matter: no write that needed it has started.
pub fn recover(bytes: &[u8], id: RingId, extent_count: u64) -> Recovery {
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK_SIZE).collect();
    let ring_blocks = blocks.len() as u32;
    let mut whole: Vec<Transaction> = Vec::new();
    let mut broken = vec![false; blocks.len()];
    for (index, block) in blocks.iter().enumerate() {
        match parse(block, id, extent_count) {
            Ok(transaction) if index_of(transaction.number, ring_blocks) == index as u32 => {
                whole.push(transaction)
            }
            _ => broken[index] = !is_zero(block),
        }
    }
    whole.sort_unstable_by_key(|transaction| std::cmp::Reverse(transaction.number));
    let next_number = whole.first().map_or(1, |newest| newest.number + 1);
    // One write at a time is in flight, the one behind the newest. If the one behind that is broken too,
    // it may have been a later transaction, and so may the first. An untouched one shows that it is not.
    let is_broken = |number: u64| broken.get(index_of(number, ring_blocks) as usize) == Some(&true);
    let damaged = match whole.is_empty() {
        _ if blocks.is_empty() => false,
        // The first transaction ever is the only one that can be torn in an otherwise empty ring.
        true => (0..blocks.len()).any(|index| broken[index] && index != 1 % blocks.len()),
        false => is_broken(next_number) && is_broken(next_number + 1),
    };
    let mut extents: Vec<u32> = whole
        .iter()
        .take(1)
        .flat_map(|transaction| &transaction.extents)
        .copied()
        .collect();
    extents.sort_unstable();
    extents.dedup();
    Recovery {
        extents,
        next_number,
        transactions: whole.len() as u32,
        broken_blocks: broken.iter().filter(|&&broken| broken).count() as u32,
        damaged,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: RingId = RingId {
        volume: 77,
        channel_slot: 2,
    };

    fn ring(ring_blocks: u32, numbers: std::ops::RangeInclusive<u64>) -> Vec<u8> {
        let mut bytes = vec![0; ring_blocks as usize * BLOCK_SIZE];
        for number in numbers {
            let at = index_of(number, ring_blocks) as usize * BLOCK_SIZE;
            let block = (&mut bytes[at..at + BLOCK_SIZE]).try_into().unwrap();
            emit(ID, number, [number as u32, 500].into_iter(), block);
        }
        bytes
    }

    #[test]
    fn an_empty_ring_names_nothing_and_starts_at_one() {
        let found = recover(&[0; 4 * BLOCK_SIZE], ID, 1000);
        assert_eq!(
            found,
            Recovery {
                extents: vec![],
                next_number: 1,
                transactions: 0,
                broken_blocks: 0,
                damaged: false
            }
        );
    }

    #[test]
    fn the_newest_whole_transaction_counts() {
        let mut bytes = ring(4, 1..=10);
        let found = recover(&bytes, ID, 1000);
        assert_eq!((found.extents, found.next_number), (vec![10, 500], 11));
        bytes[2 * BLOCK_SIZE + 100] ^= 1;
        let found = recover(&bytes, ID, 1000);
        assert_eq!(
            (found.extents, found.next_number, found.damaged),
            (vec![9, 500], 10, false)
        );
    }

    #[test]
    fn more_damage_than_one_torn_write_is_reported() {
        let mut bytes = ring(4, 1..=10);
        bytes[2 * BLOCK_SIZE + 100] ^= 1;
        bytes[BLOCK_SIZE + 100] ^= 1;
        assert!(recover(&bytes, ID, 1000).damaged, "9 and 10 are both lost");
        let mut bytes = ring(4, 1..=10);
        bytes[3 * BLOCK_SIZE + 100] ^= 1;
        assert!(
            !recover(&bytes, ID, 1000).damaged,
            "7 was to be overwritten next"
        );
        let mut bytes = ring(4, 1..=1);
        bytes[BLOCK_SIZE + 100] ^= 1;
        assert!(
            !recover(&bytes, ID, 1000).damaged,
            "the first transaction ever was torn"
        );
        bytes[3 * BLOCK_SIZE + 100] ^= 1;
        assert!(recover(&bytes, ID, 1000).damaged);
    }

    #[test]
    fn transactions_of_another_ring_or_beyond_the_volume_are_refused() {
        let bytes = ring(2, 1..=1);
        let block = &bytes[BLOCK_SIZE..];
        assert!(parse(block, ID, 501).is_ok());
        assert_eq!(parse(block, ID, 500), Err(TransactionError::Extent(500)));
        assert_eq!(
            parse(
                block,
                RingId {
                    channel_slot: 3,
                    ..ID
                },
                501
            ),
            Err(TransactionError::OtherRing)
        );
        assert_eq!(
            parse(block, RingId { volume: 78, ..ID }, 501),
            Err(TransactionError::OtherRing)
        );
        assert_eq!(parse(&bytes, ID, 501), Err(TransactionError::Length(8192)));
    }

    proptest! {
        #[test]
        fn what_is_emitted_is_parsed_again(number in 1..NUMBER_MAX, extents in proptest::collection::vec(any::<u32>(), 0..=EXTENTS_MAX)) {
            let mut block = [0xff; BLOCK_SIZE];
            emit(ID, number, extents.iter().copied(), &mut block);
            prop_assert_eq!(parse(&block, ID, 1 << 32), Ok(Transaction { number, extents }));
        }

        #[test]
        fn random_bytes_never_panic(
            changes in proptest::collection::vec((0usize..4 * BLOCK_SIZE, any::<u8>()), 0..20),
            cut in 0usize..=4 * BLOCK_SIZE, number in 1..NUMBER_MAX,
        ) {
            let mut bytes = ring(4, number..=number.saturating_add(3));
            for (offset, byte) in changes {
                bytes[offset] = byte;
            }
            recover(&bytes[..cut], ID, 1000);
            recover(&bytes, ID, 1000);
        }
    }
}
