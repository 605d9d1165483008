//! One block as a register: the writes and reads of it that the application has seen, as intervals of time, and whether
//! there is an order of them that explains what was read. Called by the ledger; knows nothing of the engine.
//!
//! Every operation takes effect at one moment between its start and its end, or never, if nobody knows how it ended. So
//! a write of unknown fate is decided once it has ended: who reads afterwards reads the same. Before that nothing is
//! promised: a read does not wait for the writes that it meets, so one may find what the next does not find yet, or what is
//! gone with its node; such a read must be right by itself, and binds nobody. All writes but those of
//! zeroes differ, so the test is that of Gibbons and Korach ("Testing Shared Memories", 1997): from its first end to its
//! last start a content was there, and nothing else was.

use super::WriteId;

/// Before everything.
const BEGINNING: u64 = 0;
/// After everything that has happened.
const NOW: u64 = u64::MAX - 1;
/// The end of what has not ended.
const PENDING: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Read,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Operation {
    io: u64,
    kind: Kind,
    /// Of a read: once it has ended.
    content: WriteId,
    start: u64,
    end: u64,
    /// It has certainly taken effect.
    is_certain: bool,
}

/// The history of a block. Times are unique for each event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Register {
    /// One of these was there before the first operation.
    initial: Vec<WriteId>,
    /// Empty as long as nothing is under way.
    operations: Vec<Operation>,
    /// A power loss may bring back any of these.
    unflushed: Vec<WriteId>,
    /// The number of the last write that has ended, in whatever way.
    last_ended: u64,
    pub(super) was_written: bool,
}

/// A content that somebody has seen, or that was certainly written.
struct Content {
    id: WriteId,
    write_start: u64,
    /// The first end of its write and its reads: it was there by then.
    first_end: u64,
    /// The last start of its write and its reads: it was there still.
    last_start: u64,
}

impl Content {
    /// The time in which nothing else can have been there, if there is any.
    fn reign(&self) -> Option<(u64, u64)> {
        (self.first_end < self.last_start).then_some((self.first_end, self.last_start))
    }
}

/// From `start` to `end`, all of it while something else certainly was there.
fn is_within(reign: (u64, u64), start: u64, end: u64) -> bool {
    reign.0 <= start && end <= reign.1
}

impl Register {
    pub(super) fn zeroes() -> Register {
        Register {
            initial: vec![0],
            operations: Vec::new(),
            unflushed: vec![0],
            last_ended: 0,
            was_written: false,
        }
    }

    pub(super) fn write_begins(&mut self, io: u64, content: WriteId, now: u64) {
        self.was_written = true;
        insert(&mut self.unflushed, content);
        self.begins(io, Kind::Write, content, now);
    }

    pub(super) fn read_begins(&mut self, io: u64, now: u64) {
        self.begins(io, Kind::Read, 0, now);
    }

    fn begins(&mut self, io: u64, kind: Kind, content: WriteId, start: u64) {
        self.operations.push(Operation {
            io,
            kind,
            content,
            start,
            end: PENDING,
            is_certain: false,
        });
    }

    /// `number`: how many writes have ended by now.
    pub(super) fn write_succeeds(&mut self, io: u64, now: u64, number: u64, fua: bool) {
        if let Some(write) = self.operation(io) {
            write.end = now;
            write.is_certain = true;
        }
        self.last_ended = number;
        self.settle();
        if fua && !self.has_pending(Kind::Write) {
            self.unflushed = self.possible();
        }
    }

    /// It has taken effect by now, or never will.
    pub(super) fn write_ends_unknown(&mut self, io: u64, now: u64, number: u64) {
        self.last_ended = number;
        if let Some(write) = self.operation(io) {
            write.end = now;
        }
        self.settle();
    }

    /// Whether it may return that.
    pub(super) fn read_ends(&mut self, io: u64, content: WriteId, now: u64) -> bool {
        let Some(read) = self.operation(io) else {
            return true;
        };
        read.content = content;
        read.end = now;
        read.is_certain = true;
        if !self.is_explained(None) {
            return false;
        }
        // It has met the write of that, whose fate was not known then or never will be.
        let start = self.operation(io).map_or(now, |read| read.start);
        let has_met = |one: &Operation| {
            one.kind == Kind::Write
                && one.content == content
                && !one.is_certain
                && (one.end == PENDING || one.end > start)
        };
        if self.operations.iter().any(has_met) {
            self.operations.retain(|one| one.io != io);
        }
        self.settle();
        true
    }

    /// It has returned nothing.
    pub(super) fn read_is_void(&mut self, io: u64) {
        self.operations.retain(|operation| operation.io != io);
        self.settle();
    }

    /// A flush has succeeded that covers the writes that had ended when it was submitted, so many.
    pub(super) fn flushed(&mut self, number: u64) {
        if self.last_ended <= number && !self.has_pending(Kind::Write) {
            self.unflushed = self.possible();
        }
    }

    /// What was not flushed may be lost. What is under way goes on.
    pub(super) fn power_lost(&mut self) {
        let mut initial = self.possible();
        initial.extend(&self.unflushed);
        if self.has_pending(Kind::Read) {
            // It may have read before.
            initial.extend(&self.initial);
            let done = self.operations.iter().filter(|one| one.end != PENDING);
            initial.extend(done.map(|one| one.content));
        }
        self.operations.retain(|operation| operation.end == PENDING);
        let pending: Vec<WriteId> = self.written().collect();
        initial.retain(|content| *content == 0 || !pending.contains(content));
        initial.sort_unstable();
        initial.dedup();
        self.initial = initial;
    }

    fn operation(&mut self, io: u64) -> Option<&mut Operation> {
        self.operations
            .iter_mut()
            .find(|operation| operation.io == io)
    }

    fn has_pending(&self, kind: Kind) -> bool {
        let mut operations = self.operations.iter();
        operations.any(|one| one.kind == kind && one.end == PENDING)
    }

    fn written(&self) -> impl Iterator<Item = WriteId> + '_ {
        let writes = self.operations.iter().filter(|one| one.kind == Kind::Write);
        writes.map(|write| write.content)
    }

    /// What somebody who reads now may find.
    pub(super) fn possible(&self) -> Vec<WriteId> {
        let mut candidates = self.initial.clone();
        match self.operations.as_slice() {
            [] => return candidates,
            [only] if only.is_certain => return vec![only.content],
            _ => {}
        }
        candidates.extend(self.written());
        candidates.sort_unstable();
        candidates.dedup();
        candidates.retain(|&content| self.is_explained(Some(content)));
        candidates
    }

    /// Nothing is under way: what has happened matters only for what is there now.
    fn settle(&mut self) {
        if self.operations.iter().any(|one| one.end == PENDING) {
            return;
        }
        let possible = self.possible();
        if !possible.is_empty() {
            self.initial = possible;
        }
        self.operations.clear();
    }

    /// Whether an order of the operations explains all reads; and one that returns `found`, now.
    fn is_explained(&self, found: Option<WriteId>) -> bool {
        let Some(contents) = self.contents(found) else {
            return false;
        };
        let reigns: Vec<(u64, u64)> = contents.iter().filter_map(Content::reign).collect();
        for (index, one) in reigns.iter().enumerate() {
            let rest = &reigns[index + 1..];
            if rest.iter().any(|two| one.0 < two.1 && two.0 < one.1) {
                return false;
            }
        }
        let is_free = |start, end| !reigns.iter().any(|&reign| is_within(reign, start, end));
        let others = contents.iter().filter(|one| one.reign().is_none());
        for other in others {
            if !is_free(other.last_start, other.first_end) {
                return false;
            }
        }
        self.zeroes_are_explained(found, &contents, is_free)
    }

    /// Everything but zeroes. `None` if somebody has read what nobody wrote, or before it was written.
    fn contents(&self, found: Option<WriteId>) -> Option<Vec<Content>> {
        let mut contents: Vec<Content> = Vec::new();
        let mut see = |id: WriteId, start: u64, end: u64| {
            if let Some(content) = contents.iter_mut().find(|content| content.id == id) {
                content.first_end = content.first_end.min(end);
                content.last_start = content.last_start.max(start);
                return end >= content.write_start;
            }
            let mut writes = self.operations.iter().filter(|one| one.kind == Kind::Write);
            let (write_start, write_end) = match writes.find(|write| write.content == id) {
                Some(write) => (write.start, write.end),
                None if self.initial.contains(&id) => (BEGINNING, BEGINNING),
                None => return false,
            };
            contents.push(Content {
                id,
                write_start,
                first_end: write_end.min(end),
                last_start: write_start.max(start),
            });
            end >= write_start
        };
        for one in &self.operations {
            if one.is_certain && one.content != 0 && !see(one.content, one.start, one.end) {
                return None;
            }
        }
        match found {
            Some(id) if id != 0 && !see(id, NOW, NOW) => None,
            _ => Some(contents),
        }
    }

    /// Zeroes may be of any write of zeroes: of one at least that nothing has replaced in between.
    fn zeroes_are_explained(
        &self,
        found: Option<WriteId>,
        contents: &[Content],
        is_free: impl Fn(u64, u64) -> bool,
    ) -> bool {
        let zeroes = || self.operations.iter().filter(|one| one.content == 0);
        if !zeroes().all(|one| !one.is_certain || is_free(one.start, one.end)) {
            return false;
        }
        let is_source = |start: u64, end: u64, (read_start, read_end): (u64, u64)| {
            let is_replaced =
                |other: &Content| end < other.write_start && other.first_end < read_start;
            start < read_end && is_free(start, end) && !contents.iter().any(is_replaced)
        };
        let is_explained = |read: (u64, u64)| {
            let initially = self.initial.contains(&0) && is_source(BEGINNING, BEGINNING, read);
            let mut writes = zeroes().filter(|one| one.kind == Kind::Write);
            initially || writes.any(|write| is_source(write.start, write.end, read))
        };
        let mut reads = zeroes().filter(|one| one.kind == Kind::Read && one.is_certain);
        reads.all(|read| is_explained((read.start, read.end)))
            && (found != Some(0) || (is_free(NOW, NOW) && is_explained((NOW, NOW))))
    }
}

fn insert(contents: &mut Vec<WriteId>, content: WriteId) {
    if let Err(at) = contents.binary_search(&content) {
        contents.insert(at, content);
    }
}

#[cfg(test)]
mod tests;
