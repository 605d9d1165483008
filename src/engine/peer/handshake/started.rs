//! A generation that was started, and under which nothing was written: when it is as if it had never been. Called by the
//! decision, and by the manager that enters it.

use super::is_past;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::hello::{GENERATION_NONE, HISTORY_LEN, Hello};
use crate::engine::peer::state::DiskState;

/// The generation that `one` has started without having the data is to be taken back when it meets `other`, who does not
/// have it, and is of the one before, or went on from there.
pub fn takes_back(one: &Hello, other: &Hello) -> bool {
    let before = one.history[0];
    one.starting
        && one.disk <= DiskState::Inconsistent
        && is_past(before)
        && is_past(one.current_generation)
        && other.has_data()
        && other.current_generation != one.current_generation
        && (other.current_generation == before || other.history.contains(&before))
        && !mutation::is(Mutation::StartedGenerationKept)
}

/// The Hello as it is to be read: of a generation that was cut short, a sender that has no whole data has nothing but the
/// number, unless the other has it too.
pub(super) fn in_effect(one: &Hello, other: &Hello) -> Hello {
    let is_number_only = one.disk == DiskState::Inconsistent
        && is_past(one.current_generation)
        && one.current_generation != other.current_generation
        // One that is older is so whatever has become of it.
        && !one.history.contains(&other.current_generation)
        && !mutation::is(Mutation::NeverTakenBack)
        && !mutation::is(Mutation::StartedGenerationKept);
    match before_start(one) {
        Some(before) if is_number_only || takes_back(one, other) => before,
        _ => *one,
    }
}

/// The sender as it was before it started its current generation, if that was cut short.
pub(super) fn before_start(one: &Hello) -> Option<Hello> {
    let current_generation = one.history[0];
    if !one.starting || !is_past(current_generation) {
        return None;
    }
    let mut before = Hello {
        starting: false,
        current_generation,
        ..*one
    };
    before.history.rotate_left(1);
    before.history[HISTORY_LEN - 1] = GENERATION_NONE;
    if before.bitmap_generation == current_generation {
        before.bitmap_generation = GENERATION_NONE;
    }
    Some(before)
}
