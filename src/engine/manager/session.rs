//! Sessions: from a closed link to Connected, and back. `handshake` makes one; here it is watched, its steps are taken,
//! and it ends. Whoever loses one direction gives the session up on all channels before anything else changes.

use super::Manager;
use super::known::KnownCommands;
use super::outbox::Call;
use super::peer::{Asked, Exchange, Link};
use super::steps::{FenceStep, SessionStep, Then};
use crate::engine::message::Drain;
use crate::engine::meta::superblock::PersistedDisk;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::handshake::Outcome;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::host::{Host, PeerSlot};

/// How long a handshake may take before the link is reset.
const HANDSHAKE_TIMEOUT_NS: u64 = 10_000_000_000;

impl<H: Host> Manager<H> {
    /// All queue pairs to the peer are up.
    pub fn link_up(&mut self, cx: &mut H, slot: PeerSlot) {
        if self.peers[slot].link != Link::Opening {
            return;
        }
        self.peers[slot].link = Link::Open;
        self.view.peers[slot].conn = ConnState::WFReportParams;
        self.peers[slot].heard_ns = cx.now_ns();
        self.say_hello(cx, slot);
        self.run(cx);
    }

    /// The queue pairs to the peer are gone, and nothing is outstanding on them.
    pub fn link_down(&mut self, cx: &mut H, slot: PeerSlot, reason: &str) {
        let was = std::mem::replace(&mut self.peers[slot].link, Link::Closed);
        self.peers[slot].retry_at_ns = cx.now_ns() + self.options.connect_interval_ms * 1_000_000;
        match was {
            Link::Open => {
                self.lose_session(cx, slot, reason);
                self.peers[slot].link = Link::Closed;
            }
            Link::Opening => {
                self.peers[slot].last_error = Some(reason.to_owned());
                self.view.peers[slot].conn = self.unconnected(slot);
            }
            Link::Closing | Link::Closed => {}
        }
        self.run(cx);
    }

    fn unconnected(&self, slot: PeerSlot) -> ConnState {
        if self.peers[slot].wanted {
            ConnState::Unconnected
        } else {
            ConnState::StandAlone
        }
    }

    pub(super) fn poll_session(&mut self, cx: &mut H, slot: PeerSlot) {
        let now = cx.now_ns();
        let peer = &self.peers[slot];
        match peer.link {
            Link::Closed => {
                if now >= peer.retry_at_ns && self.may_open_link(slot) {
                    self.open_link(cx, slot);
                }
            }
            Link::Open if peer.established => {
                self.poll_ping(cx, slot);
                self.poll_again(cx, slot);
                self.poll_difference(cx, slot);
            }
            Link::Open => {
                if now.saturating_sub(peer.heard_ns) > HANDSHAKE_TIMEOUT_NS {
                    self.lose_session(cx, slot, "the handshake took too long");
                } else if now >= peer.next_try_ns {
                    if matches!(peer.hello, Asked::No | Asked::Again) {
                        self.say_hello(cx, slot);
                    } else {
                        self.try_confirm(cx, slot);
                    }
                }
            }
            Link::Opening | Link::Closing => {}
        }
    }

    fn may_open_link(&self, slot: PeerSlot) -> bool {
        let peer = &self.peers[slot];
        let never = mutation::is(Mutation::LinkNeverOpenedAgain) && peer.epoch > 0;
        peer.wanted && !peer.draining && !self.closing && peer.address.is_some() && !never
    }

    fn open_link(&mut self, cx: &mut H, slot: PeerSlot) {
        if let Some(address) = self.peers[slot].address.clone() {
            self.peers[slot].link = Link::Opening;
            self.view.peers[slot].conn = ConnState::Connecting;
            cx.link_open(slot, &address);
        }
    }

    /// The time from which on [`poll_session`](Self::poll_session) has something to do.
    pub(super) fn session_due_ns(&self, slot: PeerSlot) -> Option<u64> {
        let peer = &self.peers[slot];
        match peer.link {
            Link::Closed => self.may_open_link(slot).then_some(peer.retry_at_ns),
            Link::Open if peer.established => {
                let timeout_ns = self.options.ping_timeout_ms * 1_000_000;
                let interval_ns = self.options.ping_interval_ms * 1_000_000;
                let silent_ns = peer.heard_ns + timeout_ns + interval_ns + 1;
                let ping_ns = if peer.ping_in_flight {
                    peer.ping_sent_ns + timeout_ns + 1
                } else {
                    peer.ping_sent_ns + interval_ns
                };
                let again_ns = peer.again.map(|(_, not_before_ns)| not_before_ns);
                let difference_ns = self.difference_due_ns(slot);
                [Some(silent_ns), Some(ping_ns), again_ns, difference_ns]
                    .into_iter()
                    .flatten()
                    .min()
            }
            Link::Open => {
                let late_ns = peer.heard_ns + HANDSHAKE_TIMEOUT_NS + 1;
                let may_go_on = if matches!(peer.hello, Asked::No | Asked::Again) {
                    self.may_say_hello(slot)
                } else {
                    self.may_confirm(slot)
                };
                Some(if may_go_on {
                    late_ns.min(peer.next_try_ns)
                } else {
                    late_ns
                })
            }
            Link::Opening | Link::Closing => None,
        }
    }

    fn poll_ping(&mut self, cx: &mut H, slot: PeerSlot) {
        let now = cx.now_ns();
        let timeout_ns = self.options.ping_timeout_ms * 1_000_000;
        let interval_ns = self.options.ping_interval_ms * 1_000_000;
        let peer = &mut self.peers[slot];
        let unanswered = peer.ping_in_flight && now.saturating_sub(peer.ping_sent_ns) > timeout_ns;
        let silent = now.saturating_sub(peer.heard_ns) > timeout_ns + interval_ns;
        if unanswered || silent {
            let what = if unanswered {
                "a ping was not answered"
            } else {
                "the peer does not ping"
            };
            return self.lose_session(cx, slot, what);
        }
        if !peer.ping_in_flight && now.saturating_sub(peer.ping_sent_ns) >= interval_ns {
            peer.ping_in_flight = true;
            peer.ping_sent_ns = now;
            let session = peer.session;
            self.call(slot, PeerCommand::Ping { session }, Vec::new(), Call::Ping);
        }
    }

    /// Gives up whatever there is with the peer, and resets the link. First the channels, then everything else.
    pub(super) fn lose_session(&mut self, cx: &mut H, slot: PeerSlot, reason: &str) {
        let was_established = self.peers[slot].established;
        let had_session = self.peers[slot].session != 0;
        let was_primary = self.peers[slot].role == Role::Primary;
        self.forget_session(cx, slot);
        if was_established || self.peers[slot].last_error.is_none() {
            self.peers[slot].last_error = Some(reason.to_owned());
        }
        self.view.peers[slot].conn = self.unconnected(slot);
        if matches!(self.peers[slot].link, Link::Open | Link::Opening) {
            self.peers[slot].link = Link::Closing;
            cx.link_close(slot);
        }
        if had_session {
            self.fence(cx, slot);
        } else {
            self.adopt(cx, Then::Nothing);
        }
        if was_primary {
            self.hello_changed(cx);
        }
    }

    /// A session that is over is over: nothing of it is continued.
    pub(super) fn forget_session(&mut self, cx: &mut H, slot: PeerSlot) {
        let peer = &mut self.peers[slot];
        peer.epoch += 1;
        peer.session = 0;
        peer.receivable = false;
        peer.established = false;
        peer.hello = Asked::No;
        peer.confirm = Asked::No;
        peer.confirmed_theirs = false;
        peer.my_hello = None;
        peer.their_hello = None;
        peer.decision = None;
        peer.exchange = None;
        peer.promoting = None;
        peer.paused_by_peer = false;
        peer.ping_in_flight = false;
        peer.state_revision = 0;
        peer.starts_generation = false;
        peer.role = Role::Unknown;
        peer.outbox.clear();
        peer.known = KnownCommands::default();
        peer.again = None;
        peer.early_state = None;
        peer.differs_since_ns = None;
        peer.may_differ = false;
        let view = &mut self.view.peers[slot];
        view.pdsk = DiskState::DUnknown;
        view.send_session = 0;
        view.recv_session = 0;
        view.serve = false;
        view.diskless = false;
        if !mutation::is(Mutation::NoAnswerWhenFenced) {
            self.answer_fenced(cx, slot);
        }
        self.stop_pull(slot);
        self.generation_lost_peer(cx, slot);
        self.order_lost_peer(cx, slot);
        self.compare_lost_peer(cx, slot);
    }

    pub(super) fn fence(&mut self, cx: &mut H, slot: PeerSlot) {
        self.peers[slot].draining = true;
        self.adopt(cx, Then::Fence(slot, FenceStep::Adopted));
    }

    pub(super) fn fence_step(&mut self, cx: &mut H, slot: PeerSlot, step: FenceStep) {
        match step {
            FenceStep::Adopted => {
                self.drain(
                    cx,
                    Drain::Received(slot),
                    Then::Fence(slot, FenceStep::Drained),
                );
            }
            FenceStep::Drained => {
                self.peers[slot].draining = false;
                if self.has_third_nodes() {
                    // The last writes of a Primary that is lost have set bits for others, with whom there is a session.
                    self.harvest(cx, Then::Nothing);
                }
                self.shared.duplicates[slot].reset();
                self.shared.resync_reads[slot].reset();
                self.shared.served[slot].clear_all();
                if self.peers[slot].link == Link::Open && self.peers[slot].hello == Asked::No {
                    self.say_hello(cx, slot);
                }
            }
        }
    }

    /// The same, with a reason that is to be seen until there is a session.
    pub(super) fn lose_session_for(&mut self, cx: &mut H, slot: PeerSlot, reason: &str) {
        self.peers[slot].last_error = Some(reason.to_owned());
        self.lose_session(cx, slot, reason);
    }

    /// Ends the connection until the operator asks for it again.
    pub(super) fn stand_alone(&mut self, cx: &mut H, slot: PeerSlot, reason: &str) {
        self.peers[slot].wanted = false;
        self.peers[slot].last_error = Some(reason.to_owned());
        self.lose_session(cx, slot, reason);
        self.peers[slot].last_error = Some(reason.to_owned());
    }

    pub(super) fn session_step(&mut self, cx: &mut H, slot: PeerSlot, step: SessionStep) {
        match step {
            SessionStep::Hello => self.send_hello(cx, slot),
            SessionStep::Outdated(reply) => self.parted(cx, slot, reply),
            SessionStep::Receivable => {
                self.peers[slot].receivable = true;
                self.peers[slot].next_try_ns = 0;
                self.try_confirm(cx, slot);
            }
            SessionStep::Entered => {
                self.tell_state(slot);
                self.end_reattach(cx);
                if let Some(body) = self.peers[slot].early_state.take() {
                    self.take_state(cx, slot, body);
                }
                match self.view.peers[slot].conn {
                    ConnState::WFBitMapS | ConnState::WFBitMapT => self.start_exchange(cx, slot),
                    _ if mutation::is(Mutation::ConnectedWithoutHarvest) => {
                        self.connected(cx, slot)
                    }
                    _ => {
                        // A write that began under the old state has set its bit by now, and nobody else knows of it.
                        let epoch = self.peers[slot].epoch;
                        self.harvest(cx, Then::Session(slot, epoch, SessionStep::Connected));
                    }
                }
            }
            SessionStep::Connected => self.connected(cx, slot),
            SessionStep::ExchangeHarvested => self.begin_bitmap(cx, slot),
            SessionStep::TargetDurable(reply) => self.target_durable(cx, slot, reply),
            SessionStep::TargetEntered(reply) => self.target_entered(cx, slot, reply),
            SessionStep::SpreadDurable => self.spread_durable(),
            SessionStep::SourceDurable => self.source_durable(cx, slot),
            SessionStep::SourceEntered => self.source_entered(cx, slot),
            SessionStep::SourceNoticed => self.source_noticed(cx, slot),
            SessionStep::GenerationFollowed => self.ask_to_finish(cx, slot),
            SessionStep::FinishNoted(reply) => self.finish_noted(cx, slot, reply),
            SessionStep::FinishHarvested(reply) => self.finish_harvested(cx, slot, reply),
            SessionStep::FinishRecorded(reply) => self.finish_recorded(cx, slot, reply),
            SessionStep::MarkHarvested(reply, id) => self.mark_harvested(cx, slot, reply, id),
            SessionStep::EqualHarvested(reply) => self.equal_harvested(cx, reply),
            SessionStep::GenerationKept(reply) => self.agree(cx, slot, reply),
            SessionStep::Agreed(reply) => self.agreed(cx, slot, reply),
            SessionStep::Reconciled => {
                if self.view.disk == DiskState::Consistent {
                    self.view.disk = DiskState::UpToDate;
                    self.exposed = None;
                    self.tell_all();
                    self.adopt(cx, Then::Nothing);
                }
            }
        }
    }

    /// Connected with nothing to resync: what an interrupted finish or a crash left behind is put right.
    fn connected(&mut self, cx: &mut H, slot: PeerSlot) {
        let epoch = self.peers[slot].epoch;
        let outcome = self.peers[slot].decision.map(|decision| decision.outcome);
        if outcome != Some(Outcome::InSync) {
            return;
        }
        if !self.masters[slot].is_empty() {
            return self.lose_session(cx, slot, "writes came during the handshake");
        }
        self.superblock.generations.finish_sync_as_source(slot);
        self.settle_crash(slot);
        if self.view.disk == DiskState::Consistent {
            // Attached again, and nothing was written meanwhile.
            self.superblock.disk = PersistedDisk::UpToDate;
        }
        self.commit_pages(cx, Then::Nothing);
        self.commit_superblock(cx, Then::Session(slot, epoch, SessionStep::Reconciled));
    }

    /// In sync with a peer: what a crash of ours may have left is no longer in question.
    pub(super) fn settle_crash(&mut self, _slot: PeerSlot) {
        self.unclean = false;
        if self.view.role != Role::Primary && !self.is_promoting() {
            self.superblock.flags.primary = false;
        }
    }

    pub(super) fn start_exchange(&mut self, cx: &mut H, slot: PeerSlot) {
        let epoch = self.peers[slot].epoch;
        self.peers[slot]
            .exchange
            .get_or_insert_with(Exchange::default);
        self.harvest(
            cx,
            Then::Session(slot, epoch, SessionStep::ExchangeHarvested),
        );
    }
}
