//! The active extents of one channel: found by number, released in order of use.
//!
//! Used by the activity log only. A fixed slab, an open-addressing table over it and a list of what nobody
//! references; nothing is allocated after it was made.

/// Marks the end of a list and an empty place of the table.
const NOWHERE: u16 = u16::MAX;

/// Where an extent lies in the slab; valid until that extent is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position(u16);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not in use; `next` links the free entries.
    Free,
    /// Referenced by writes.
    Busy,
    /// Nobody references it; linked in order of use.
    Idle,
    /// On its way out; in no list.
    Retiring,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    extent: u32,
    references: u32,
    /// Number of the first transaction that names it.
    named_by: u64,
    state: State,
    previous: u16,
    next: u16,
}

#[derive(Debug)]
pub(super) struct ExtentSet {
    entries: Box<[Entry]>,
    /// Indices into `entries`, by hash of the extent, with linear probing. A power of two, at most half
    /// full.
    table: Box<[u16]>,
    first_free: u16,
    /// Least and most recently used of the idle entries.
    oldest: u16,
    newest: u16,
    len: usize,
    retiring: usize,
}

impl ExtentSet {
    /// `limit` is at most half of what 16 bits can count.
    pub(super) fn new(limit: usize) -> ExtentSet {
        assert!(limit < usize::from(NOWHERE) / 2);
        let entry = |index: usize| Entry {
            extent: 0,
            references: 0,
            named_by: 0,
            state: State::Free,
            previous: NOWHERE,
            next: if index + 1 < limit {
                index as u16 + 1
            } else {
                NOWHERE
            },
        };
        ExtentSet {
            entries: (0..limit).map(entry).collect(),
            table: vec![NOWHERE; (2 * limit).next_power_of_two()].into_boxed_slice(),
            first_free: if limit == 0 { NOWHERE } else { 0 },
            oldest: NOWHERE,
            newest: NOWHERE,
            len: 0,
            retiring: 0,
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn room(&self) -> usize {
        self.limit() - self.len
    }

    pub(super) fn retiring(&self) -> usize {
        self.retiring
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.entries
            .iter()
            .filter(|entry| entry.state != State::Free)
            .map(|entry| entry.extent)
    }

    pub(super) fn find(&self, extent: u32) -> Option<Position> {
        let index = self.table[self.place_of(extent)];
        (index != NOWHERE).then_some(Position(index))
    }

    /// Adds an extent that is not in the set; there must be room. It is idle until referenced.
    pub(super) fn insert(&mut self, extent: u32, named_by: u64) -> Position {
        let index = self.first_free;
        assert!(index != NOWHERE, "no room for another extent");
        let place = self.place_of(extent);
        debug_assert_eq!(self.table[place], NOWHERE);
        self.table[place] = index;
        self.first_free = self.entry(index).next;
        *self.entry_mut(index) = Entry {
            extent,
            references: 0,
            named_by,
            state: State::Idle,
            previous: NOWHERE,
            next: NOWHERE,
        };
        self.link_newest(index);
        self.len += 1;
        Position(index)
    }

    /// Takes a reference, ends any retirement, and returns the first transaction that names the extent.
    pub(super) fn reference(&mut self, at: Position) -> u64 {
        match self.entry(at.0).state {
            State::Idle => self.unlink(at.0),
            State::Retiring => self.retiring -= 1,
            State::Busy | State::Free => (),
        }
        let entry = self.entry_mut(at.0);
        entry.state = State::Busy;
        entry.references += 1;
        entry.named_by
    }

    /// Drops a reference; the last one makes the extent the most recently used idle one.
    pub(super) fn release(&mut self, at: Position) {
        let entry = self.entry_mut(at.0);
        debug_assert!(entry.references > 0);
        entry.references = entry.references.saturating_sub(1);
        if entry.references == 0 && entry.state == State::Busy {
            entry.state = State::Idle;
            self.link_newest(at.0);
        }
    }

    /// The least recently used idle extent, which is retiring from now on.
    pub(super) fn start_retiring_oldest(&mut self) -> Option<u32> {
        let index = self.oldest;
        if index == NOWHERE {
            return None;
        }
        self.unlink(index);
        self.retiring += 1;
        let entry = self.entry_mut(index);
        entry.state = State::Retiring;
        Some(entry.extent)
    }

    pub(super) fn is_retiring(&self, at: Position) -> bool {
        self.entry(at.0).state == State::Retiring
    }

    /// Makes a retiring extent the most recently used idle one.
    pub(super) fn stop_retiring(&mut self, at: Position) {
        self.retiring -= 1;
        self.entry_mut(at.0).state = State::Idle;
        self.link_newest(at.0);
    }

    /// Removes a retiring extent.
    pub(super) fn remove(&mut self, at: Position) {
        let mut hole = self.place_of(self.entry(at.0).extent);
        // Whatever was pushed behind this place by a collision moves up, so that probing finds it.
        let mut place = hole;
        loop {
            self.table[hole] = NOWHERE;
            loop {
                place = (place + 1) & (self.table.len() - 1);
                let index = self.table[place];
                if index == NOWHERE {
                    let free = self.first_free;
                    let entry = self.entry_mut(at.0);
                    entry.state = State::Free;
                    entry.next = free;
                    self.first_free = at.0;
                    self.len -= 1;
                    self.retiring -= 1;
                    return;
                }
                let home = self.home_of(self.entry(index).extent);
                let distance =
                    |from: usize, to: usize| to.wrapping_sub(from) & (self.table.len() - 1);
                if distance(home, place) >= distance(hole, place) {
                    self.table[hole] = index;
                    hole = place;
                    break;
                }
            }
        }
    }

    fn entry(&self, index: u16) -> &Entry {
        &self.entries[usize::from(index)]
    }

    fn entry_mut(&mut self, index: u16) -> &mut Entry {
        &mut self.entries[usize::from(index)]
    }

    fn home_of(&self, extent: u32) -> usize {
        // Fibonacci hashing: neighbours spread, and the high bits are the good ones.
        let hash = extent.wrapping_mul(0x9e37_79b1);
        ((u64::from(hash) * self.table.len() as u64) >> 32) as usize
    }

    /// Where the table holds the extent, or where it would.
    fn place_of(&self, extent: u32) -> usize {
        let mut place = self.home_of(extent);
        loop {
            let index = self.table[place];
            if index == NOWHERE || self.entry(index).extent == extent {
                return place;
            }
            place = (place + 1) & (self.table.len() - 1);
        }
    }

    fn link_newest(&mut self, index: u16) {
        let previous = self.newest;
        let entry = self.entry_mut(index);
        entry.previous = previous;
        entry.next = NOWHERE;
        match previous {
            NOWHERE => self.oldest = index,
            _ => self.entry_mut(previous).next = index,
        }
        self.newest = index;
    }

    fn unlink(&mut self, index: u16) {
        let Entry { previous, next, .. } = *self.entry(index);
        match previous {
            NOWHERE => self.oldest = next,
            _ => self.entry_mut(previous).next = next,
        }
        match next {
            NOWHERE => self.newest = previous,
            _ => self.entry_mut(next).previous = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_set_behaves_like_a_plain_map(limit in 1usize..40, steps in proptest::collection::vec((0u8..4, 0u32..60), 0..300)) {
            let mut set = ExtentSet::new(limit);
            // Extent to references; idle ones also in order of use.
            let mut model = BTreeMap::new();
            let mut idle: Vec<u32> = Vec::new();
            let mut retiring: Vec<u32> = Vec::new();
            for (kind, extent) in steps {
                match (kind, set.find(extent)) {
                    (0, None) if set.room() > 0 => {
                        set.insert(extent, u64::from(extent) + 1);
                        model.insert(extent, 0);
                        idle.push(extent);
                    }
                    (0 | 1, Some(at)) => {
                        prop_assert_eq!(set.reference(at), u64::from(extent) + 1);
                        *model.get_mut(&extent).unwrap() += 1;
                        idle.retain(|&other| other != extent);
                        retiring.retain(|&other| other != extent);
                    }
                    (2, Some(at)) if model[&extent] > 0 => {
                        set.release(at);
                        *model.get_mut(&extent).unwrap() -= 1;
                        if model[&extent] == 0 {
                            idle.push(extent);
                        }
                    }
                    (2, Some(at)) if set.is_retiring(at) => {
                        set.stop_retiring(at);
                        retiring.retain(|&other| other != extent);
                        idle.push(extent);
                    }
                    (3, Some(at)) if set.is_retiring(at) => {
                        set.remove(at);
                        retiring.retain(|&other| other != extent);
                        model.remove(&extent);
                    }
                    (3, _) => {
                        let oldest = set.start_retiring_oldest();
                        prop_assert_eq!(oldest, idle.first().copied());
                        retiring.extend(oldest);
                        idle.drain(..idle.len().min(1));
                    }
                    _ => (),
                }
                prop_assert_eq!(set.len(), model.len());
                prop_assert_eq!(set.retiring(), retiring.len());
                for extent in 0..60 {
                    let at = set.find(extent);
                    prop_assert_eq!(at.is_some(), model.contains_key(&extent));
                    prop_assert_eq!(at.is_some_and(|at| set.is_retiring(at)), retiring.contains(&extent));
                }
                let mut all: Vec<u32> = set.iter().collect();
                all.sort_unstable();
                prop_assert!(all.iter().eq(model.keys()));
            }
        }
    }
}
