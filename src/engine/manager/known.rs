//! Which commands of a peer's session the manager has been given, and what it answered, so that one that a transport
//! delivers again is not carried out again: it joins the first, or gets the first one's answer. And which Hellos came
//! before. Asked by `received` and `handshake`.

use std::collections::BTreeMap;

use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::hello;

/// Answers that are remembered of a session; far more than a peer has commands in flight.
const REMEMBERED: usize = 1024;

/// What is known of a command that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing: it is to be carried out, and ends with [`KnownCommands::answered`].
    New,
    /// It is being carried out: this reply gets the same answer.
    Joined,
    /// It was carried out, with this answer.
    Answered(PeerAnswer),
    /// So old that its answer is forgotten. It is not carried out.
    TooOld,
}

#[derive(Debug)]
enum State {
    /// Being carried out; replies that wait beside the first one's.
    Running(Vec<usize>),
    Answered(PeerAnswer),
}

/// The commands of one session by their sequences. They may arrive in any order.
#[derive(Debug, Default)]
pub(super) struct KnownCommands {
    states: BTreeMap<u64, State>,
    answered: usize,
    /// Nothing is known any more of what is not in `states` up to here.
    forgotten_to: u64,
}

impl KnownCommands {
    /// A command has arrived that is to be answered by `reply`.
    pub(super) fn begin(&mut self, sequence: u64, reply: usize) -> Known {
        match self.states.get_mut(&sequence) {
            Some(State::Running(joined)) => {
                joined.push(reply);
                Known::Joined
            }
            Some(State::Answered(answer)) => Known::Answered(*answer),
            None if sequence <= self.forgotten_to => Known::TooOld,
            None => {
                self.states.insert(sequence, State::Running(Vec::new()));
                Known::New
            }
        }
    }

    /// A command has been answered for the first time; the replies that get the same answer.
    pub(super) fn answered(&mut self, sequence: u64, answer: PeerAnswer) -> Vec<usize> {
        let Some(state) = self.states.get_mut(&sequence) else {
            return Vec::new();
        };
        let State::Running(joined) = std::mem::replace(state, State::Answered(answer)) else {
            debug_assert!(false, "command {sequence} was answered twice");
            return Vec::new();
        };
        self.answered += 1;
        if self.answered > REMEMBERED {
            self.forget_oldest();
        }
        joined
    }

    fn forget_oldest(&mut self) {
        let is_answered = |(&sequence, state): (&u64, &State)| {
            matches!(state, State::Answered(_)).then_some(sequence)
        };
        if let Some(oldest) = self.states.iter().find_map(is_answered) {
            self.states.remove(&oldest);
            self.answered -= 1;
            self.forgotten_to = self.forgotten_to.max(oldest);
        }
    }
}

/// Starts of a peer that are remembered.
const STARTS: usize = 8;

/// The Hellos of a peer, which come before there is a session, by the starts and counts of their nonces.
///
/// Which of two starts is the later one no Hello tells: a node that has started again itself may see the older one's
/// last. So a start that was not seen yet is believed, and if it was an old one the peer's next Hello puts that right.
#[derive(Debug, Default)]
pub(super) struct KnownHellos {
    /// Start and highest count, the latest first; start 0: none.
    seen: [(u32, u32); STARTS],
}

impl KnownHellos {
    /// Whether this is later than what was seen of its start; it is then the newest itself.
    pub(super) fn is_newest(&mut self, nonce: u64) -> bool {
        let (start, count) = hello::nonce_parts(nonce);
        if let Some((_, seen)) = self.seen.iter_mut().find(|(seen, _)| *seen == start) {
            // A count that has gone round is still later than the one before it.
            let later = count != *seen && count.wrapping_sub(*seen) < 1 << 31;
            if later {
                *seen = count;
            }
            return later;
        }
        self.seen.rotate_right(1);
        self.seen[0] = (start, count);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_new_once_and_then_has_its_first_answer() {
        let mut known = KnownCommands::default();
        assert_eq!(known.begin(7, 1), Known::New);
        assert_eq!(known.begin(7, 2), Known::Joined);
        assert_eq!(known.begin(7, 3), Known::Joined);
        assert_eq!(known.answered(7, PeerAnswer::NotYet), [2, 3]);
        assert_eq!(known.begin(7, 4), Known::Answered(PeerAnswer::NotYet));
        assert_eq!(known.begin(5, 5), Known::New, "order does not matter");
    }

    #[test]
    fn what_is_forgotten_is_never_new_again() {
        let mut known = KnownCommands::default();
        assert_eq!(known.begin(1, 0), Known::New);
        let last = 2 + REMEMBERED as u64;
        for sequence in 2..=last {
            assert_eq!(known.begin(sequence, 0), Known::New);
            known.answered(sequence, PeerAnswer::Ok);
        }
        assert_eq!(known.begin(2, 0), Known::TooOld);
        assert_eq!(known.begin(3, 0), Known::Answered(PeerAnswer::Ok));
        // However long it takes, what is being carried out is known.
        assert_eq!(known.begin(1, 9), Known::Joined);
        assert_eq!(known.answered(1, PeerAnswer::Again), [9]);
        assert_eq!(known.begin(1, 0), Known::TooOld);
        assert_eq!(known.states.len(), REMEMBERED);
    }
    #[test]
    fn a_hello_is_the_newest_once_and_never_after_a_later_one() {
        let mut known = KnownHellos::default();
        let nonce = hello::nonce;
        assert!(known.is_newest(nonce(7, 1)));
        assert!(!known.is_newest(nonce(7, 1)));
        assert!(known.is_newest(nonce(7, 4)));
        assert!(!known.is_newest(nonce(7, 3)), "older, though never seen");
        assert!(known.is_newest(nonce(3, u32::MAX)));
        assert!(known.is_newest(nonce(3, 0)), "the count went round");
        assert!(!known.is_newest(nonce(3, u32::MAX)));
        assert!(
            known.is_newest(nonce(7, 5)),
            "no Hello says which start is later"
        );
    }
}
