//! Moments of a run that a campaign waits for, to do something just then: a command arrives, a state is entered. Looked at
//! where commands are delivered and managers observed. Nothing here changes the run until somebody waits.

use serde::{Deserialize, Serialize};

use super::World;
use crate::engine::peer::command::opcode;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::hosts::sim::coverage::Seen;

/// Something that happens on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Moment {
    // A command arrives at it.
    Hello,
    Confirm,
    /// A part of a peer's bitmap.
    Bitmap,
    SyncStart,
    ResyncRead,
    /// Blocks that a target has.
    Report,
    /// A target takes its resync for finished.
    Finish,
    /// Ranges that it does not get.
    Notice,
    Write,
    NewGeneration,
    Prepare,
    // It enters a state.
    WaitsForBitmap,
    Source,
    Target,
    Connected,
    /// A session is over.
    Lost,
    Primary,
    Diskless,
}

impl Moment {
    fn of_command(op: u8) -> Option<Moment> {
        Some(match op {
            opcode::HELLO_PUT => Moment::Hello,
            opcode::CONFIRM => Moment::Confirm,
            opcode::BITMAP_OR | opcode::BITMAP_END => Moment::Bitmap,
            opcode::SYNC_START => Moment::SyncStart,
            opcode::RESYNC_READ => Moment::ResyncRead,
            opcode::RESYNC_DONE => Moment::Report,
            opcode::SYNC_FINISH => Moment::Finish,
            opcode::OUT_OF_SYNC => Moment::Notice,
            opcode::WRITE | opcode::WRITE_ZEROES => Moment::Write,
            opcode::NEW_GENERATION => Moment::NewGeneration,
            opcode::PREPARE => Moment::Prepare,
            _ => return None,
        })
    }

    fn of_connection(before: ConnState, now: ConnState) -> Option<Moment> {
        Some(match now {
            _ if before == now => return None,
            ConnState::WFBitMapS | ConnState::WFBitMapT => Moment::WaitsForBitmap,
            ConnState::SyncSource => Moment::Source,
            ConnState::SyncTarget => Moment::Target,
            ConnState::Connected => Moment::Connected,
            _ if before >= ConnState::Connected && now < ConnState::Connected => Moment::Lost,
            _ => return None,
        })
    }
}

/// Somebody waits for a moment.
struct Awaited {
    id: u64,
    node: usize,
    moment: Moment,
    /// So many of them are let pass.
    skip: u32,
}

/// Who waits, and for whom the moment has come.
#[derive(Default)]
pub(super) struct Moments {
    awaited: Vec<Awaited>,
    come: Vec<u64>,
}

impl Moments {
    fn comes(&mut self, node: usize, moment: Moment) {
        let come = &mut self.come;
        self.awaited.retain_mut(|awaited| {
            let is_it = awaited.node == node && awaited.moment == moment;
            if is_it && awaited.skip == 0 {
                come.push(awaited.id);
                return false;
            }
            awaited.skip -= u32::from(is_it);
            true
        });
    }

    pub(super) fn has_come(&self) -> bool {
        !self.come.is_empty()
    }
}

impl World {
    /// From here on [`World::run_for`] stops when this moment comes, after `skip` others of its kind.
    pub fn await_moment(&mut self, id: u64, node: usize, moment: Moment, skip: u32) {
        self.moments.awaited.push(Awaited {
            id,
            node,
            moment,
            skip,
        });
    }

    /// The ids of those whose moment has come since this was last asked.
    pub fn take_moments(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.moments.come)
    }

    pub fn await_nothing(&mut self) {
        self.moments = Moments::default();
    }

    pub(super) fn command_comes(&mut self, node: usize, op: u8) {
        if !self.moments.awaited.is_empty()
            && let Some(moment) = Moment::of_command(op)
        {
            self.moments.comes(node, moment);
        }
    }

    /// A manager was `before` and is what has been seen of it since.
    pub(super) fn states_come(&mut self, node: usize, before: &Seen) {
        if self.moments.awaited.is_empty() {
            return;
        }
        let now = &self.seen[node];
        let conns = before.conns.iter().zip(now.conns);
        let mut come: Vec<Moment> = conns
            .filter_map(|(&before, now)| Moment::of_connection(before, now))
            .collect();
        if before.role != now.role && now.role == Role::Primary {
            come.push(Moment::Primary);
        }
        if before.disk != now.disk && now.disk == DiskState::Diskless {
            come.push(Moment::Diskless);
        }
        for moment in come {
            self.moments.comes(node, moment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::sim::world::{Config, SECOND};

    #[test]
    fn the_world_stops_at_the_moment_that_is_awaited_and_at_no_earlier_one() {
        let mut world = World::clean_cluster(1, Config::default());
        world.promote(0);
        world.await_moment(7, 1, Moment::Write, 1);
        world.await_moment(8, 1, Moment::Lost, 0);
        world.write(0, 0, 8);
        world.run_for(SECOND);
        assert!(world.take_moments().is_empty(), "the first one passes");
        world.write(0, 8, 8);
        assert_eq!(world.take_moments(), [7]);
        world.reset(0, 1);
        let before_ns = world.now_ns;
        world.run_for(SECOND);
        assert!(world.now_ns < before_ns + SECOND);
        assert_eq!(world.take_moments(), [8]);
    }
}
