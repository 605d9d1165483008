//! I5: a node's disk gets no write of a session that the node has ended, and no write twice. Judged by what is sent and by
//! whose data reaches the disk; `deliver` tells. Nothing here changes the run.

use std::collections::{BTreeMap, HashSet};

use super::World;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::host::Data;
use crate::hosts::sim::memory::ReceivedWrite;
use crate::hosts::sim::node::Core;

/// What has been received, in all nodes.
#[derive(Default)]
pub(super) struct Received {
    /// By two nodes, the lower one first: their sessions, in the order in which the first command of each was sent.
    sessions: BTreeMap<(usize, usize), Vec<u32>>,
    /// By node and peer.
    ends: BTreeMap<(usize, usize), End>,
    /// By the numbers of their arrivals: writes that have no data, and were not answered.
    zeroes: BTreeMap<u64, ReceivedWrite>,
}

/// How one node stands to a peer.
#[derive(Default)]
struct End {
    /// The place of the newest session in which it has sent a command. It has ended all older ones by then.
    newest: usize,
    /// Of the newest session: sequences of the peer's writes that were given to its disk.
    written: HashSet<u64>,
}

pub(super) fn received_write(from: usize, command: &PeerCommand) -> Option<ReceivedWrite> {
    match *command {
        PeerCommand::Write { session, order, .. }
        | PeerCommand::WriteZeroes { session, order, .. }
        | PeerCommand::Unmap { session, order, .. } => Some(ReceivedWrite {
            from,
            session,
            sequence: order.sequence(),
        }),
        _ => None,
    }
}

impl Received {
    /// The place of a session among those of two nodes; a new one is the newest.
    fn place(&mut self, one: usize, other: usize, session: u32) -> usize {
        let ends = (one.min(other), one.max(other));
        let sessions = self.sessions.entry(ends).or_default();
        let known = sessions.iter().rposition(|&known| known == session);
        known.unwrap_or_else(|| {
            sessions.push(session);
            sessions.len() - 1
        })
    }
}

impl World {
    /// A node sends a command in this session; 0 is none.
    pub(super) fn speaks_in(&mut self, node: usize, peer: usize, session: u32) {
        if session == 0 {
            return;
        }
        let place = self.received.place(node, peer, session);
        let end = self.received.ends.entry((node, peer)).or_default();
        if place <= end.newest {
            return;
        }
        end.newest = place;
        end.written.clear();
        let writes = self.nodes[node].disk_work.values();
        let mut of_peer = writes.filter_map(|work| write(&work.data));
        if let Some(late) = of_peer.find(|write| write.from == peer && write.session != session) {
            panic!(
                "[I5] node {node} is in session {session:08x} with node {peer} while {late:?} is still being written\n{}",
                self.describe()
            );
        }
    }

    /// A command has arrived; data tells by itself whose it is.
    pub(super) fn expect_zeroes(&mut self, arrival: u64, write: Option<ReceivedWrite>) {
        if let Some(write) = write {
            self.received.zeroes.insert(arrival, write);
        }
    }

    /// A command is answered: one that was carried out is of a session that the node has not ended.
    pub(super) fn check_answered(&mut self, node: usize, arrival: u64, answer: PeerAnswer) {
        let Some(write) = self.received.zeroes.remove(&arrival) else {
            return;
        };
        let place = self.received.place(node, write.from, write.session);
        let end = self.received.ends.get(&(node, write.from));
        let is_late = end.is_some_and(|end| place < end.newest);
        assert!(
            !is_late || answer != PeerAnswer::Ok,
            "[I5] node {node} carried out {write:?}, of a session that it has ended\n{}",
            self.describe()
        );
    }

    /// Data is given to a node's disk.
    pub(super) fn check_received(&mut self, node: usize, data: &Data<Core>) {
        let Some(write) = write(data) else {
            return;
        };
        let place = self.received.place(node, write.from, write.session);
        let end = self.received.ends.entry((node, write.from)).or_default();
        let is_late = place < end.newest;
        // Who receives in a session has confirmed it before, or is about to: then what comes is of the newest.
        let is_second = place == end.newest && !end.written.insert(write.sequence);
        assert!(
            !is_late,
            "[I5] node {node} writes {write:?}, of a session that it has ended\n{}",
            self.describe()
        );
        assert!(
            !is_second,
            "[I5] node {node} writes {write:?} twice\n{}",
            self.describe()
        );
    }
}

fn write(data: &Data<Core>) -> Option<ReceivedWrite> {
    match data {
        Data::Payload(memory) => memory.write(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::sim::memory::{Bytes, Count, Payload};
    use crate::hosts::sim::world::Config;

    const OLD: u32 = 7;
    const NEW: u32 = 8;

    fn write_of(session: u32) -> Data<Core> {
        let write = ReceivedWrite {
            from: 0,
            session,
            sequence: 1,
        };
        let count = Count::default();
        Data::Payload(Payload::received(Bytes::zeroes(512), Some(write), &count))
    }

    fn after_two_sessions() -> World {
        let mut world = World::new(1, Config::default());
        for session in [OLD, NEW] {
            world.speaks_in(0, 1, session);
            world.speaks_in(1, 0, session);
            world.check_received(1, &write_of(session));
        }
        world
    }

    #[test]
    #[should_panic(expected = "[I5]")]
    fn a_write_of_a_session_that_has_ended_is_found() {
        after_two_sessions().check_received(1, &write_of(OLD));
    }

    #[test]
    #[should_panic(expected = "[I5]")]
    fn a_write_that_is_carried_out_twice_is_found() {
        after_two_sessions().check_received(1, &write_of(NEW));
    }

    #[test]
    #[should_panic(expected = "[I5]")]
    fn zeroes_of_a_session_that_has_ended_are_found() {
        let mut world = after_two_sessions();
        let write = |session| ReceivedWrite {
            from: 0,
            session,
            sequence: 2,
        };
        for (arrival, session) in [(1, NEW), (2, OLD), (3, OLD)] {
            world.expect_zeroes(arrival, Some(write(session)));
        }
        world.check_answered(1, 1, PeerAnswer::Ok);
        world.check_answered(1, 2, PeerAnswer::Fenced);
        world.check_answered(1, 3, PeerAnswer::Ok);
    }

    #[test]
    #[should_panic(expected = "[I5]")]
    fn a_write_under_way_when_the_next_session_begins_is_found() {
        let mut world = after_two_sessions();
        let io = crate::host::DiskIo {
            op: crate::host::DiskOp::Write { fua: false },
            offset: 1 << 20,
            len: 512,
        };
        world.nodes[1].disk_work.insert(
            1,
            crate::hosts::sim::node::DiskWork {
                core: 0,
                token: crate::host::Token(0),
                io,
                data: write_of(NEW),
                submitted: 0,
            },
        );
        world.speaks_in(1, 0, 9);
    }
}
