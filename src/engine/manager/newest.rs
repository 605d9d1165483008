//! Whether this replica is the newest there is: an Outdated one of three or more may turn out to be, and one that is must not be
//! invalidated. Called by `poll` and `orders`; who is whose source is the handshake's business.

use super::Manager;
use super::orders::Work;
use super::steps::Then;
use crate::engine::MAX_PEERS;
use crate::engine::peer::handshake::Outcome;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::host::{Host, PeerSlot};

impl<H: Host> Manager<H> {
    /// This node is Outdated: somebody went on without it. When all others are there, and each of them is behind this node or
    /// the same, what they went on to is lost, and this node has the newest data that there is.
    pub(super) fn has_become_newest(&self) -> bool {
        let is_changing = |work: &Work| {
            matches!(
                work,
                Work::Promoting { .. } | Work::Committing | Work::Demoting | Work::Leaving
            )
        };
        self.view.disk == DiskState::Outdated
            && self.view.role != Role::Primary
            && self.has_third_nodes()
            && self.metadata.enabled
            && !self.closing
            && !self.sees_primary(None)
            && !self.is_under_way(is_changing)
            && (0..MAX_PEERS)
                .filter(|&slot| self.peers[slot].node_id.is_some())
                .all(|slot| self.is_no_newer(slot))
    }

    /// What this peer has, and has had since the session began, is known to be in what this node has.
    fn is_no_newer(&self, slot: PeerSlot) -> bool {
        let peer = &self.peers[slot];
        let view = &self.view.peers[slot];
        let outcome = peer.decision.map(|decision| decision.outcome);
        let is_unchanged = match (peer.my_hello, peer.their_hello) {
            (Some(mine), Some(theirs)) => {
                mine.current_generation == self.superblock.generations.current
                    && theirs.current_generation == peer.current_generation
            }
            _ => false,
        };
        peer.established
            && is_unchanged
            && view.conn == ConnState::Connected
            && matches!(view.pdsk, DiskState::Inconsistent | DiskState::Outdated)
            && matches!(outcome, Some(Outcome::Ahead | Outcome::InSync))
    }

    pub(super) fn poll_newest(&mut self, cx: &mut H) {
        if !self.has_become_newest() {
            return;
        }
        self.view.disk = DiskState::UpToDate;
        self.exposed = None;
        self.record_disk();
        self.commit_superblock(cx, Then::Nothing);
        self.tell_all();
        self.hello_changed(cx);
        self.adopt(cx, Then::Nothing);
    }

    /// A connected peer has what this replica has.
    pub(super) fn has_another(&self) -> bool {
        let is_newest = self.view.disk > DiskState::Outdated;
        let current = self.superblock.generations.current;
        (0..MAX_PEERS).any(|slot| {
            // A peer may not have heard yet that it is behind.
            let is_behind = is_newest && self.peers[slot].current_generation != current;
            self.view.peers[slot].has_latest() && !is_behind
        })
    }
}
