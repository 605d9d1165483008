//! Turns the panic of a run into a verdict: which invariant, the text with the last states, and where.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::run::{Outcome, run};
use super::schedule::Schedule;

/// What a run has violated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The name of the invariant, or "engine" for an assertion of the engine's own.
    pub invariant: String,
    /// The first line says what, the others show the last states of all nodes.
    pub text: String,
    /// File and line.
    pub place: String,
}

impl Violation {
    /// `[name] text`.
    fn parse(message: &str, place: String) -> Violation {
        let parsed = message
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("] "));
        let (invariant, text) = match parsed {
            Some((invariant, text)) => (invariant, text),
            None if place.contains("engine") => ("engine", message),
            None => ("simulator", message),
        };
        Violation {
            invariant: invariant.to_owned(),
            text: text.to_owned(),
            place,
        }
    }

    /// The same kind of failure, whatever it was about.
    pub fn is_like(&self, other: &Violation) -> bool {
        self.invariant == other.invariant && self.place == other.place
    }

    /// What was violated, in a line.
    pub fn title(&self) -> &str {
        self.text.lines().next().unwrap_or_default()
    }
}

thread_local! {
    /// What the panic hook has seen on this thread, while a run is being judged.
    static SEEN: RefCell<Option<Option<Violation>>> = const { RefCell::new(None) };
}

/// A run ends before its time: these are the states of its nodes, for a violation that does not tell them itself.
pub(super) fn ends_in(states: &str) {
    SEEN.with_borrow_mut(|seen| {
        if let Some(Some(violation)) = seen
            && !violation.text.contains('\n')
        {
            violation.text = format!("{}\n{states}", violation.text);
        }
    });
}

/// Runs a schedule and catches what it violates; with `trace`, everything that happens goes to standard error. Other panics
/// of the process are reported as ever.
///
/// # Errors
/// What was violated.
pub fn judge(schedule: &Schedule, trace: bool) -> Result<Outcome, Violation> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let is_judged = SEEN.with_borrow_mut(|seen| {
                let Some(seen) = seen else { return false };
                let place = info.location().map(ToString::to_string);
                let payload = info.payload();
                let message = match payload.downcast_ref::<String>() {
                    Some(message) => message,
                    None => payload.downcast_ref::<&str>().copied().unwrap_or_default(),
                };
                // What panics while the first one unwinds is not the cause.
                seen.get_or_insert_with(|| Violation::parse(message, place.unwrap_or_default()));
                true
            });
            if !is_judged {
                usual(info);
            }
        }));
    });
    SEEN.set(Some(None));
    let result = catch_unwind(AssertUnwindSafe(|| run(schedule, trace)));
    let seen = SEEN.take().flatten();
    result.map_err(|_| {
        seen.unwrap_or_else(|| Violation::parse("a panic that nobody saw", String::new()))
    })
}

#[cfg(test)]
mod tests {
    use super::super::schedule::{Deed, Planned, Scope};
    use super::*;

    #[test]
    fn a_violation_shows_the_last_states() {
        let mut schedule = Schedule::from_seed(1, &Scope::default());
        let deed = Deed::Kill { node: 9 };
        schedule.deeds = vec![Planned { at_us: 1000, deed }];
        let violation = judge(&schedule, false).unwrap_err();
        assert_eq!(violation.invariant, "simulator");
        assert!(violation.text.contains("\nnode 1: Secondary UpToDate"));
    }

    #[test]
    fn a_violation_says_which_invariant_it_is_about() {
        let violation = Violation::parse("[I4] two writes\nat 5 ns", "src/a.rs:1".to_owned());
        assert_eq!(violation.invariant, "I4");
        assert_eq!(violation.title(), "two writes");
        let place = "src/engine/channel/mod.rs:1".to_owned();
        assert_eq!(Violation::parse("what", place).invariant, "engine");
    }
}
