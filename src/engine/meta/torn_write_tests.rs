//! Every prefix of every metadata write, and every set of its sectors, as a crash point.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::activity_log::ring::{RingId, recover};
use super::activity_log::{ActivityLog, Begin};
use super::bitmap_page;
use super::block::{BLOCK_SIZE, Block};
use super::format::{Content, FormatParams, format};
use super::layout::{LayoutParams, Placement, superblock_places};
use super::superblock::{PickError, Superblock, pick};
use crate::engine::bitmap::Page;

const DEVICE: u64 = 4 << 20;
const SECTOR: usize = 512;

fn volume(placement: Placement) -> Superblock {
    let params = FormatParams {
        name: "torn".into(),
        volume_uuid: None,
        node_id: 0,
        backing_uuid: [0; 16],
        layout: LayoutParams {
            device_size_bytes: DEVICE,
            block_size_bytes: 512,
            placement,
            data_size_bytes: None,
            granularity_log2: 12,
            peer_slots: 1,
            channel_slots: 1,
            al_ring_blocks: 2,
        },
        al_extents: 8,
        content: Content::Nothing,
    };
    format(&params).unwrap()
}

/// Each superblock differs from the one before in many places.
fn next(superblock: &Superblock) -> Superblock {
    let mut next = superblock.clone();
    next.sequence += 1;
    next.flags.primary = !next.flags.primary;
    next.generations.bump(next.sequence << 8, 0x7f);
    next
}

fn picked(device: &[u8]) -> Result<Superblock, PickError> {
    let blocks = superblock_places(DEVICE)
        .unwrap()
        .map(|offset| Some(&device[offset as usize..][..BLOCK_SIZE]));
    pick(&blocks, DEVICE)
}

/// Every way in which a write of `new` over `old` can end when cut off after some of its sectors.
fn torn_by_sectors(old: &Block, new: &Block) -> impl Iterator<Item = Block> {
    (0..1u32 << (BLOCK_SIZE / SECTOR)).map(|written| {
        let mut torn = *old;
        for sector in (0..BLOCK_SIZE / SECTOR).filter(|sector| written & (1 << sector) != 0) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            torn[range.clone()].copy_from_slice(&new[range]);
        }
        torn
    })
}

/// Writes a few superblocks one after the other; at every step `cut` gives the states that a crash could
/// leave in the block that is being written.
fn superblocks_survive(
    placement: Placement,
    versions: u64,
    cut: impl Fn(&Block, &Block) -> Vec<Block>,
) {
    let mut device = vec![0; DEVICE as usize];
    let mut current = volume(placement);
    for (offset, block) in current.write_plan().unwrap() {
        device[offset as usize..][..BLOCK_SIZE].copy_from_slice(&block);
    }
    for _ in 0..versions {
        let newer = next(&current);
        for (offset, block) in newer.write_plan().unwrap() {
            let at = offset as usize..offset as usize + BLOCK_SIZE;
            let before: Block = device[at.clone()].try_into().unwrap();
            for torn in cut(&before, &block) {
                device[at.clone()].copy_from_slice(&torn);
                let found = picked(&device).expect("no superblock after a torn write");
                assert!(
                    found == current || found == newer,
                    "neither the old nor the new superblock"
                );
            }
            device[at].copy_from_slice(&block);
            assert_eq!(
                picked(&device).as_ref(),
                Ok(&newer),
                "the first copy is enough"
            );
        }
        current = newer;
    }
}

#[test]
fn a_superblock_cut_off_at_any_byte_leaves_the_old_or_the_new_one() {
    // Beyond the last byte in which the two differ there is nothing to cut off.
    let prefixes = |old: &Block, new: &Block| {
        let different = (0..BLOCK_SIZE)
            .rfind(|&index| old[index] != new[index])
            .map_or(0, |index| index + 1);
        let torn = |length: usize| {
            let mut torn = *old;
            torn[..length].copy_from_slice(&new[..length]);
            torn
        };
        (0..=different).map(torn).collect()
    };
    superblocks_survive(Placement::Front, 3, prefixes);
    superblocks_survive(Placement::InPlace, 3, prefixes);
}

#[test]
fn a_superblock_of_which_any_sectors_were_written_leaves_the_old_or_the_new_one() {
    superblocks_survive(Placement::Front, 3, |old, new| {
        torn_by_sectors(old, new).collect()
    });
    superblocks_survive(Placement::InPlace, 3, |old, new| {
        torn_by_sectors(old, new).collect()
    });
}

#[test]
fn a_bitmap_page_of_which_any_sectors_were_written_is_old_new_or_refused() {
    let page = |mask: u64| Page(std::array::from_fn(|word| word as u64 ^ mask));
    let block_of = |page: &Page| {
        let mut block = [0; BLOCK_SIZE];
        bitmap_page::emit(Some(page), 5, &mut block);
        block
    };
    let new = page(0xf0f0);
    for old in [[0; BLOCK_SIZE], block_of(&page(0))] {
        let old_page = *bitmap_page::parse(&old, 5).unwrap();
        let mut refused = 0;
        for torn in torn_by_sectors(&old, &block_of(&new)) {
            match bitmap_page::parse(&torn, 5) {
                Ok(found) => assert!(*found == old_page || *found == new),
                Err(_) => refused += 1,
            }
        }
        assert_eq!(refused, 254, "all but nothing and everything");
    }
}

/// A channel with its ring on disk, and what a crash at this moment must find.
struct Channel {
    log: ActivityLog,
    ring: Vec<u8>,
    ring_blocks: u32,
    id: RingId,
    /// Requests that hold references, with what they wait for.
    requests: Vec<(std::ops::RangeInclusive<u32>, Option<u64>)>,
    /// Extents in which a write may have started and that were not retired since.
    started: BTreeSet<u32>,
    block: Block,
    in_flight: Option<(u64, usize)>,
}

impl Channel {
    fn new(limit: usize, ring_blocks: u32) -> Channel {
        let id = RingId::new(&[7; 16], 3);
        Channel {
            log: ActivityLog::new(limit, id, ring_blocks, 1),
            ring: vec![0; ring_blocks as usize * BLOCK_SIZE],
            ring_blocks,
            id,
            requests: Vec::new(),
            started: BTreeSet::new(),
            block: [0; BLOCK_SIZE],
            in_flight: None,
        }
    }

    fn start_what_may(&mut self) {
        for (extents, joined) in &mut self.requests {
            if joined.is_none_or(|number| self.log.is_durable(number)) {
                *joined = None;
                self.started.extend(extents.clone());
            }
        }
    }

    fn check(&self, ring: &[u8]) {
        let found = recover(ring, self.id, 1 << 20);
        assert!(!found.damaged, "one torn write is not damage");
        for extent in &self.started {
            assert!(found.extents.contains(extent), "extent {extent} is lost");
        }
        assert!(found.next_number <= self.in_flight.map_or(u64::MAX, |(number, _)| number + 1));
    }

    /// The write in flight as it may be cut off: any set of its sectors.
    fn check_every_crash(&mut self) {
        let Some((_, index)) = self.in_flight else {
            return self.check(&self.ring);
        };
        let at = index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE;
        let old: Block = self.ring[at.clone()].try_into().unwrap();
        let mut ring = self.ring.clone();
        for torn in torn_by_sectors(&old, &self.block) {
            ring[at.clone()].copy_from_slice(&torn);
            self.check(&ring);
        }
    }

    fn step(&mut self, kind: u8, number: u32) {
        match kind {
            0..=2 => {
                let extents = number..=number + u32::from(kind) % 2;
                match self.log.begin(extents.clone()) {
                    Begin::Ready => self.requests.push((extents, None)),
                    Begin::Join(joined) => self.requests.push((extents, Some(joined))),
                    Begin::Full => (),
                }
            }
            3 if !self.requests.is_empty() => {
                let index = number as usize % self.requests.len();
                // A request ends only after it has started.
                if self.requests[index].1.is_none() {
                    let (extents, _) = self.requests.swap_remove(index);
                    self.log.end(extents);
                }
            }
            4 => {
                let retiring = self.log.retire_candidates(1 + number as usize % 3);
                self.log.retired(&retiring);
                for extent in retiring {
                    self.started.remove(&extent);
                }
            }
            5 | 6 => match self.in_flight.take() {
                None => {
                    let written = self.log.next_transaction(&mut self.block);
                    self.in_flight =
                        written.map(|written| (written.number, written.ring_index as usize));
                    self.check_every_crash();
                }
                Some((number, index)) => {
                    self.ring[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE]
                        .copy_from_slice(&self.block);
                    self.log.transaction_done(number);
                }
            },
            _ => {
                // A crash that leaves some sectors of the write in flight, and a new start: what was
                // found became bits, and the ring goes on.
                if let Some((_, index)) = self.in_flight {
                    let at = index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE;
                    let old: Block = self.ring[at.clone()].try_into().unwrap();
                    let torn = torn_by_sectors(&old, &self.block).nth(number as usize * 23);
                    self.ring[at].copy_from_slice(&torn.unwrap());
                }
                self.check(&self.ring);
                let found = recover(&self.ring, self.id, 1 << 20);
                let fresh = Channel::new(8, self.ring_blocks);
                let log = ActivityLog::new(8, self.id, self.ring_blocks, found.next_number);
                *self = Channel {
                    log,
                    ring: std::mem::take(&mut self.ring),
                    ..fresh
                };
            }
        }
        self.start_what_may();
        self.check(&self.ring);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn recovery_covers_every_extent_whose_writes_may_have_started(
        ring_blocks in 2u32..5, steps in proptest::collection::vec((0u8..36, 0u32..12), 1..60),
    ) {
        let mut channel = Channel::new(8, ring_blocks);
        for (kind, number) in steps {
            // The start after a crash is rare, the others are equally likely.
            channel.step(if kind == 35 { 7 } else { kind % 7 }, number);
        }
    }
}
