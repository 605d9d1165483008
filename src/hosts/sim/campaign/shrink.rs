//! Makes a failing schedule small: deeds are taken out, in large pieces first, as long as it fails in the same way; then the
//! world is made simpler.

use std::time::Instant;

use super::schedule::{Deed, Schedule, Shape};
use super::verdict::{Violation, judge};

/// A schedule that fails, and how.
#[derive(Clone, Debug)]
pub struct Failure {
    pub schedule: Schedule,
    pub violation: Violation,
    /// Schedules that were tried to find it.
    pub tries: u32,
}

/// Looks for a smaller schedule that fails as this one does, until `until`.
pub fn shrink(schedule: &Schedule, violation: &Violation, until: Instant) -> Failure {
    let mut shrinking = Shrinking {
        best: Failure {
            schedule: schedule.clone(),
            violation: violation.clone(),
            tries: 0,
        },
        until,
    };
    loop {
        let before = shrinking.best.schedule.clone();
        shrinking.take_out_deeds();
        shrinking.simplify_loads();
        shrinking.simplify_shape();
        if before == shrinking.best.schedule || shrinking.is_over() {
            return shrinking.best;
        }
    }
}

struct Shrinking {
    best: Failure,
    until: Instant,
}

impl Shrinking {
    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    /// Keeps it if it fails in the same way.
    fn try_with(&mut self, schedule: Schedule) -> bool {
        if schedule == self.best.schedule || self.is_over() {
            return false;
        }
        self.best.tries += 1;
        match judge(&schedule, false) {
            Err(violation) if violation.is_like(&self.best.violation) => {
                self.best.schedule = schedule;
                self.best.violation = violation;
                true
            }
            _ => false,
        }
    }

    fn take_out_deeds(&mut self) {
        let mut piece = self.best.schedule.deeds.len().div_ceil(2).max(1);
        loop {
            let mut at = 0;
            while at < self.best.schedule.deeds.len() {
                let mut schedule = self.best.schedule.clone();
                let end = (at + piece).min(schedule.deeds.len());
                schedule.deeds.drain(at..end);
                if !self.try_with(schedule) {
                    at += piece;
                }
            }
            if piece == 1 || self.is_over() {
                return;
            }
            piece = piece.div_ceil(2);
        }
    }

    fn simplify_loads(&mut self) {
        for index in 0..self.best.schedule.deeds.len() {
            while let Deed::Load { count, .. } = self.best.schedule.deeds[index].deed
                && count > 1
            {
                let mut schedule = self.best.schedule.clone();
                if let Deed::Load { count, .. } = &mut schedule.deeds[index].deed {
                    *count /= 2;
                }
                if !self.try_with(schedule) {
                    break;
                }
            }
        }
    }

    fn simplify_shape(&mut self) {
        let simpler: [fn(&mut Shape); 7] = [
            |shape| shape.cores = 1,
            |shape| shape.scarcity_percent = 0,
            |shape| shape.repeat_percent = 0,
            |shape| shape.volatile_caches = false,
            |shape| shape.volume_mib = 8,
            |shape| shape.granularity_log2.fill(12),
            |shape| shape.in_capsule_bytes.fill(128 << 10),
        ];
        for simplify in simpler {
            let mut schedule = self.best.schedule.clone();
            simplify(&mut schedule.shape);
            self.try_with(schedule);
        }
    }
}
