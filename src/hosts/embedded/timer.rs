//! One-shot timers of one core, for the control path: a heap of deadlines, closures beside it.
//! Called by the core's loop; time is whatever the loop says it is.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Names a timer until it has fired or was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerId(u64);

/// `T` is what a timer delivers when it fires.
pub struct Timers<T> {
    deadlines: BinaryHeap<Reverse<(u64, TimerId)>>,
    pending: HashMap<TimerId, T>,
    next_id: u64,
}

impl<T> Default for Timers<T> {
    fn default() -> Self {
        Self {
            deadlines: BinaryHeap::new(),
            pending: HashMap::new(),
            next_id: 0,
        }
    }
}

impl<T> Timers<T> {
    pub fn add(&mut self, deadline_ns: u64, value: T) -> TimerId {
        let id = TimerId(self.next_id);
        self.next_id += 1;
        self.pending.insert(id, value);
        self.deadlines.push(Reverse((deadline_ns, id)));
        id
    }

    /// Whether the timer was still to fire.
    pub fn cancel(&mut self, id: TimerId) -> bool {
        let cancelled = self.pending.remove(&id).is_some();
        self.drop_cancelled();
        cancelled
    }

    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.deadlines
            .peek()
            .map(|Reverse((deadline, _))| *deadline)
    }

    /// The next timer that is due; in order of deadlines, equal ones in order of their making.
    pub fn pop_due(&mut self, now_ns: u64) -> Option<T> {
        while self.next_deadline_ns()? <= now_ns {
            let Reverse((_, id)) = self.deadlines.pop()?;
            if let Some(value) = self.pending.remove(&id) {
                self.drop_cancelled();
                return Some(value);
            }
        }
        None
    }

    fn drop_cancelled(&mut self) {
        while let Some(Reverse((_, id))) = self.deadlines.peek() {
            if self.pending.contains_key(id) {
                break;
            }
            self.deadlines.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_in_order_and_cancelled_ones_never() {
        let mut timers = Timers::default();
        timers.add(30, 'c');
        let cancelled = timers.add(10, 'x');
        timers.add(20, 'a');
        timers.add(20, 'b');
        assert!(timers.cancel(cancelled));
        assert!(!timers.cancel(cancelled));
        assert_eq!(timers.next_deadline_ns(), Some(20));
        assert_eq!(timers.pop_due(19), None);
        assert_eq!(timers.pop_due(25), Some('a'));
        assert_eq!(timers.pop_due(25), Some('b'));
        assert_eq!(timers.pop_due(25), None);
        assert_eq!(timers.pop_due(30), Some('c'));
        assert_eq!(timers.next_deadline_ns(), None);
    }
}
