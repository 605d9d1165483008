//! Generations: numbers by which two nodes know whether their data is the same, and whose is newer.
//!
//! Changed by the manager at promotions, losses of a peer and resyncs; stored in the superblock; compared
//! by the handshake. Pure: the random number of a new generation comes from the caller.

use super::MAX_PEERS;

/// No generation: in a bitmap slot, that the peer has the latest data as far as is known here.
pub const NONE: u64 = 0;
/// The current generation of a volume that never held data.
pub const JUST_CREATED: u64 = 4;
/// How many generations of the past are remembered.
pub const HISTORY: usize = 16;

/// The generations of one node's data. The low bit of each is unused and zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generations {
    /// The generation of the data here.
    pub current: u64,
    /// For each peer slot, the generation that the peer had when its bits began to be set.
    pub bitmap: [u64; MAX_PEERS],
    /// Earlier generations of this data, newest first, each once, [`NONE`] behind the last.
    pub history: [u64; HISTORY],
}

/// Makes a generation of a random number: the low bit is dropped, and the two reserved values avoided.
pub fn from_random(random: u64) -> u64 {
    match random & !1 {
        NONE | JUST_CREATED => 1 << 63,
        generation => generation,
    }
}

/// Whether the number can be a generation (or [`NONE`], or [`JUST_CREATED`]).
pub fn is_generation(number: u64) -> bool {
    number & 1 == 0
}

impl Generations {
    /// Those of a fresh volume with this current generation.
    pub fn new(current: u64) -> Generations {
        Generations {
            current,
            bitmap: [NONE; MAX_PEERS],
            history: [NONE; HISTORY],
        }
    }

    /// Whether a write that misses the peer of this slot needs a new current generation first: the peer
    /// still has the current one, as far as is known here.
    pub fn needs_bump(&self, slot: usize) -> bool {
        self.bitmap[slot] == NONE || self.bitmap[slot] == self.current
    }

    /// Starts generation `new`, of which the peers in the mask `missing_slots` (bit n is slot n) get
    /// nothing: their bitmap generation becomes the old current one, unless they have missed an earlier
    /// one already.
    pub fn bump(&mut self, new: u64, missing_slots: u8) {
        debug_assert!(
            is_generation(new) && new != NONE && new != JUST_CREATED && new != self.current
        );
        for slot in 0..MAX_PEERS {
            if missing_slots & (1 << slot) != 0 && self.needs_bump(slot) {
                self.bitmap[slot] = self.current;
            }
        }
        self.become_current(new);
    }

    /// The data here, a part of which is of the current generation and the rest older, is declared to be generation `new`.
    /// It never reached the one that it was on the way to: whoever has that is not its past.
    pub fn declare_partial(&mut self, new: u64) {
        for bitmap in &mut self.bitmap {
            if *bitmap == self.current {
                *bitmap = NONE;
            }
        }
        self.current = new;
    }

    /// Data that this is newer than is of `generation`, which never took effect.
    pub fn remember_taken_back(&mut self, generation: u64) {
        self.remember(generation);
    }

    /// This data was of that generation too.
    pub fn has_been(&mut self, generation: u64) {
        if !self.history_contains(generation) {
            self.remember(generation);
        }
    }

    /// The current generation never took effect: this data is of `earlier`, one of its past.
    pub fn go_back(&mut self, earlier: u64) {
        self.current = earlier;
        self.forget(earlier);
    }

    /// The current generation, which was started where the data is not, never took effect. Whoever was to miss it had the one
    /// before, as far as is known here.
    pub fn take_back(&mut self) {
        let earlier = self.history[0];
        for bitmap in &mut self.bitmap {
            if *bitmap == earlier {
                *bitmap = NONE;
            }
        }
        self.go_back(earlier);
    }

    /// A resync towards the peer of this slot begins: when it ends the peer has the current generation.
    pub fn start_sync_as_source(&mut self, slot: usize) {
        self.bitmap[slot] = self.current;
    }

    /// A resync from a peer with this current generation and this past begins. The disk must be Inconsistent from now on
    /// until the resync is finished. What is to be replaced may be other than what the source has gone on from, as when it
    /// was given up: who has that still does not have the past of this data.
    pub fn start_sync_as_target(&mut self, source_current: u64, past: &[u64]) {
        self.history = [NONE; HISTORY];
        self.current = source_current;
        for &generation in past.iter().rev() {
            self.remember(generation);
        }
    }

    /// The source of a running resync has gone on to this generation.
    pub fn follow_source(&mut self, source_current: u64) {
        self.become_current(source_current);
    }

    /// The peer of this slot has everything.
    pub fn finish_sync_as_source(&mut self, slot: usize) {
        let done = std::mem::replace(&mut self.bitmap[slot], NONE);
        self.remember(done);
    }

    /// Everything has come from the peer of this slot, whose generations are `source`. Its past is now
    /// this data's past too, ahead of what was remembered here.
    pub fn finish_sync_as_target(&mut self, source: &Generations, slot: usize) {
        let done = std::mem::replace(&mut self.bitmap[slot], NONE);
        for &generation in source.history.iter().rev() {
            self.remember(generation);
        }
        self.remember(done);
        self.become_current(source.current);
    }

    /// Whether `generation` is one of this data's earlier ones.
    pub fn history_contains(&self, generation: u64) -> bool {
        generation != NONE && self.history.contains(&generation)
    }

    fn become_current(&mut self, generation: u64) {
        let old = std::mem::replace(&mut self.current, generation);
        if old != generation {
            self.remember(old);
        }
        self.forget(generation);
    }

    fn remember(&mut self, generation: u64) {
        if generation == NONE || generation == JUST_CREATED || generation == self.current {
            return;
        }
        let seen = self.history.iter().position(|&known| known == generation);
        // Rotates the generation, or the oldest one, to the front and overwrites it there.
        self.history[..=seen.unwrap_or(HISTORY - 1)].rotate_right(1);
        self.history[0] = generation;
    }

    fn forget(&mut self, generation: u64) {
        if let Some(at) = self.history.iter().position(|&known| known == generation) {
            self.history[at..].rotate_left(1);
            self.history[HISTORY - 1] = NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn past(generations: &Generations) -> Vec<u64> {
        generations
            .history
            .iter()
            .copied()
            .take_while(|&generation| generation != NONE)
            .collect()
    }

    #[test]
    fn a_bump_gives_the_old_current_to_those_who_miss_it_first() {
        let mut mine = Generations::new(0x10);
        mine.bump(0x20, 0b01);
        assert_eq!(
            (mine.current, mine.bitmap[0], mine.bitmap[1]),
            (0x20, 0x10, NONE)
        );
        mine.bump(0x30, 0b11);
        assert_eq!(
            (mine.bitmap[0], mine.bitmap[1]),
            (0x10, 0x20),
            "slot 0 stays at what it missed first"
        );
        assert_eq!(past(&mine), [0x20, 0x10]);
    }

    #[test]
    fn a_bump_is_needed_once_for_each_loss_of_a_peer() {
        let mut mine = Generations::new(JUST_CREATED);
        assert!(mine.needs_bump(3));
        mine.bump(0x20, 1 << 3);
        assert!(!mine.needs_bump(3));
        assert!(mine.needs_bump(2));
        mine.start_sync_as_source(3);
        assert!(
            mine.needs_bump(3),
            "a peer lost while it synced would else share the generation"
        );
        assert!(
            past(&mine).is_empty(),
            "a volume that never held data has no past"
        );
    }

    #[test]
    fn a_resync_ends_with_the_same_generation_on_both_sides_and_the_old_ones_in_history() {
        let mut source = Generations::new(0x10);
        let mut target = source.clone();
        source.bump(0x20, 1);
        source.start_sync_as_source(0);
        target.start_sync_as_target(source.current, &source.history);
        assert_eq!((target.current, past(&target)), (0x20, vec![0x10]));
        source.finish_sync_as_source(0);
        target.finish_sync_as_target(&source, 0);
        assert_eq!(source.current, target.current);
        assert_eq!((source.bitmap[0], target.bitmap[0]), (NONE, NONE));
        assert_eq!(past(&source), [0x10]);
        assert_eq!(past(&target), [0x10]);
    }

    #[test]
    fn a_target_has_the_sources_past_and_no_other() {
        let mut source = Generations::new(0x10);
        source.bump(0x20, 1);
        source.bump(0x30, 1);
        let mut target = Generations::new(0x90);
        target.start_sync_as_target(0x30, &source.history);
        target.finish_sync_as_target(&source, 0);
        assert_eq!(past(&target), [0x20, 0x10]);
    }

    #[test]
    fn a_source_that_moves_on_during_the_resync_is_followed() {
        let mut source = Generations::new(0x10);
        let mut target = Generations::new(JUST_CREATED);
        source.start_sync_as_source(0);
        target.start_sync_as_target(source.current, &source.history);
        source.bump(0x20, 0b10);
        assert_eq!(source.bitmap[0], 0x10);
        target.finish_sync_as_target(&source, 0);
        assert_eq!((target.current, past(&target)), (0x20, vec![0x10]));
    }

    #[test]
    fn what_was_on_the_way_to_a_generation_does_not_have_it_as_its_past() {
        let mut target = Generations::new(6);
        target.start_sync_as_target(20, &[10, NONE]);
        target.bitmap[1] = 20;
        target.declare_partial(30);
        assert_eq!(target.current, 30);
        assert!(target.history_contains(10) && !target.history_contains(20));
        assert_eq!(target.bitmap[1], NONE);
    }

    #[test]
    fn a_generation_that_is_taken_back_leaves_no_trace() {
        let mut mine = Generations::new(0x10);
        mine.bump(0x20, 1 << 1);
        let before = mine.clone();
        mine.bump(0x30, 0b11);
        mine.take_back();
        assert_eq!(mine, before);
    }

    proptest! {
        #[test]
        fn history_is_without_gaps_repeats_and_reserved_values(steps in proptest::collection::vec((0u8..6, 1u64..40, 0usize..7), 0..60)) {
            let mut mine = Generations::new(JUST_CREATED);
            let mut other = Generations::new(from_random(2));
            for (kind, number, slot) in steps {
                let new = from_random(number * 2);
                match kind {
                    0 | 1 if new != mine.current => mine.bump(new, 1 << slot),
                    2 => mine.start_sync_as_source(slot),
                    3 => mine.start_sync_as_target(other.current, &other.history),
                    4 => mine.finish_sync_as_source(slot),
                    5 => { mine.finish_sync_as_target(&other, slot); std::mem::swap(&mut mine, &mut other); }
                    _ => (),
                }
                let known = past(&mine);
                prop_assert!(mine.history[known.len()..].iter().all(|&generation| generation == NONE));
                let mut sorted = known.clone();
                sorted.sort_unstable();
                sorted.dedup();
                prop_assert_eq!(sorted.len(), known.len());
                prop_assert!(!known.contains(&JUST_CREATED) && !known.contains(&mine.current));
            }
        }

        #[test]
        fn a_random_generation_is_never_a_reserved_one(random: u64) {
            for random in [random, random & 7] {
                let generation = from_random(random);
                prop_assert!(is_generation(generation) && generation != NONE && generation != JUST_CREATED);
            }
        }
    }
}
