//! From a link that is up to a session: both nodes put their Hello, compute the same decision, have all channels accept
//! the session's commands, confirm, and enter the decided state. Called by `session`, which also ends what begins here.

use super::Manager;
use super::outbox::{self, Call};
use super::peer::{Asked, Decided, Link};
use super::pull;
use super::steps::{SessionStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::handshake::{Decision, Outcome, RefuseReason, Rule, decide, takes_back};
use crate::engine::peer::hello::{
    self, CREDITS_MIN, Hello, IncompatibleReason, PROTOCOL_VERSIONS, feature, negotiate, session_id,
};
use crate::engine::peer::state::{ConnState, DiskState, PeerState, Role};
use crate::engine::view::PeerLimits;
use crate::engine::volume::MAX_TRANSFER_BYTES;
use crate::host::{Host, PeerSlot};

/// Between two attempts at a question that was answered "not yet".
const ASK_AGAIN_NS: u64 = 10_000_000;
/// Received commands that a peer may have outstanding on a queue pair, whose depth is usually 128.
const CREDITS: u16 = 96;
/// Those of the credits that the manager needs on its core; a channel has the others.
const MANAGER_COMMANDS: u16 = outbox::IN_FLIGHT as u16 + pull::PIECES as u16;

const _: () = assert!(MANAGER_COMMANDS < CREDITS_MIN);
/// Reasons of `Refused` beside those of an incompatible Hello: the two have diverged, or were never the same.
const SPLIT_BRAIN: u8 = 100;
const UNRELATED: u8 = 101;

impl<H: Host> Manager<H> {
    /// Something that our Hellos say may have changed before a decision was confirmed: if so, a new nonce, and all
    /// over again.
    pub(super) fn hello_changed(&mut self, cx: &mut H) {
        for slot in 0..MAX_PEERS {
            self.check_hello(cx, slot);
        }
    }

    /// Whether the Hello that the peer decides by still holds; if not, the handshake starts again.
    fn check_hello(&mut self, cx: &mut H, slot: PeerSlot) -> bool {
        let peer = &self.peers[slot];
        let Some(said) = peer.my_hello else {
            return true;
        };
        if peer.link != Link::Open || peer.established || mutation::is(Mutation::DecisionNeverVoid)
        {
            return true;
        }
        // Bits are looked at again when the state has been entered.
        let now = Hello {
            dirty_bits: said.dirty_bits,
            ..self.hello(cx, slot, said.nonce)
        };
        if now == said {
            return true;
        }
        if self.peers[slot].confirmed_theirs {
            // The peer may have entered the state already: only a new session is safe.
            self.lose_session(cx, slot, "the state changed during the handshake");
        } else {
            self.restart_handshake(cx, slot);
        }
        false
    }

    fn restart_handshake(&mut self, cx: &mut H, slot: PeerSlot) {
        let theirs = self.peers[slot].their_hello;
        let had_session = self.peers[slot].session != 0;
        self.forget_session(cx, slot);
        self.view.peers[slot].conn = ConnState::WFReportParams;
        self.peers[slot].their_hello = theirs;
        if had_session {
            self.fence(cx, slot);
        } else {
            self.say_hello(cx, slot);
        }
    }

    /// Harvest first: no Hello leaves before every bit of the old session is in the master.
    pub(super) fn say_hello(&mut self, cx: &mut H, slot: PeerSlot) {
        if !self.may_say_hello(slot) {
            return;
        }
        self.peers[slot].hello = Asked::InFlight;
        let epoch = self.peers[slot].epoch;
        self.harvest(cx, Then::Session(slot, epoch, SessionStep::Hello));
    }

    pub(super) fn may_say_hello(&self, slot: PeerSlot) -> bool {
        !self.peers[slot].draining
            && self.peers[slot].link == Link::Open
            && self.view.disk != DiskState::Attaching
            && self.generation_is_durable()
    }

    /// A peer that is told of a generation keeps it, and this node has to know it again after a crash.
    pub(super) fn generation_is_durable(&self) -> bool {
        !self.metadata.enabled || self.durable.current == self.superblock.generations.current
    }

    pub(super) fn send_hello(&mut self, cx: &mut H, slot: PeerSlot) {
        if !self.generation_is_durable() {
            self.peers[slot].hello = Asked::Again;
            return;
        }
        if self.hello_start == 0 {
            self.hello_start = cx.random() as u32 | 1;
        }
        self.hello_count = self.hello_count.wrapping_add(1);
        let nonce = hello::nonce(self.hello_start, self.hello_count);
        let hello = self.hello(cx, slot, nonce);
        let peer = &mut self.peers[slot];
        peer.nonce = nonce;
        peer.my_hello = Some(hello);
        self.call(
            slot,
            PeerCommand::HelloPut {
                len: Hello::BYTES as u32,
            },
            hello.emit().to_vec(),
            Call::Hello(nonce),
        );
    }

    fn hello(&self, cx: &H, slot: PeerSlot, nonce: u64) -> Hello {
        let geometry = &self.shared.geometry;
        let superblock = &self.superblock;
        let generations = &superblock.generations;
        let role = self.told_role();
        let is_exposed = self.exposed.is_some() && !self.view.disk_is_usable();
        Hello {
            protocol_min: PROTOCOL_VERSIONS.0,
            protocol_max: PROTOCOL_VERSIONS.1,
            features: feature::IO_DURING_BITMAP,
            node_id: superblock.node_id,
            peer_node_id: self.peers[slot].node_id.unwrap_or_default(),
            volume_uuid: superblock.volume_uuid,
            block_size_bytes: geometry.block_size,
            size_blocks: geometry.size_blocks,
            granularity_log2: geometry.granularity_log2,
            role,
            disk: self.view.disk,
            crashed_primary: superblock.flags.primary && role != Role::Primary,
            unclean: self.unclean,
            wants_full_sync: superblock.peers[slot].is_some_and(|peer| peer.full_sync),
            discard_my_data: self.peers[slot].discard_my_data,
            lost_quorum: false,
            had_session: self.peers[slot].epoch > 0,
            sees_primary: self.sees_primary(Some(slot)),
            is_target: self.is_target(Some(slot)),
            told: superblock.flags.told,
            starting: self.was_cut_short()
                && !is_exposed
                && (self.view.disk <= DiskState::Inconsistent
                    || (role != Role::Primary && !self.is_promoting())),
            has_others: self.view.disk == DiskState::Outdated && self.has_third_nodes(),
            current_generation: match self.exposed {
                Some(exposed) if is_exposed => exposed,
                _ => generations.current,
            },
            bitmap_generation: generations.bitmap[slot],
            history: generations.history,
            dirty_bits: self.masters[slot].count(),
            nonce,
            max_transfer_bytes: MAX_TRANSFER_BYTES as u32,
            in_capsule_bytes: cx.in_capsule_bytes(),
            credits: CREDITS,
        }
    }

    pub(super) fn hello_answered(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        nonce: u64,
        answer: PeerAnswer,
    ) {
        if self.peers[slot].nonce != nonce {
            return;
        }
        self.peers[slot].next_try_ns = ask_again_ns(cx);
        match answer {
            PeerAnswer::Ok | PeerAnswer::Duplicate => {
                self.peers[slot].hello = Asked::Yes;
                self.try_confirm(cx, slot);
            }
            PeerAnswer::NotYet | PeerAnswer::Busy => self.peers[slot].hello = Asked::Again,
            PeerAnswer::Refused(code @ (SPLIT_BRAIN | UNRELATED))
                if !mutation::is(Mutation::SplitBrainOverlooked) =>
            {
                let text = if mutation::is(Mutation::SplitBrainUnreported) {
                    "refused by the peer"
                } else if code == SPLIT_BRAIN {
                    "SplitBrain: found by the peer"
                } else {
                    "Unrelated: found by the peer"
                };
                self.stand_alone(cx, slot, text);
            }
            answer => {
                let reason = match answer {
                    PeerAnswer::Refused(code) => IncompatibleReason::refusal(code),
                    _ => None,
                };
                if let Some(reason) = reason {
                    return self.stand_alone(cx, slot, reason);
                }
                let text = format!("the peer does not accept this node: {answer:?}");
                self.peers[slot].last_error = Some(text.clone());
                self.lose_session(cx, slot, &text);
            }
        }
    }

    pub(super) fn received_hello(&mut self, cx: &mut H, body: &[u8], reply: usize) {
        let Ok(theirs) = Hello::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        let slot = (0..MAX_PEERS).find(|&slot| self.peers[slot].node_id == Some(theirs.node_id));
        let Some(slot) = slot else {
            return self.answer(cx, reply, PeerAnswer::Refused(0));
        };
        let peer = &mut self.peers[slot];
        if peer.their_hello != Some(theirs) && !peer.hellos.is_newest(theirs.nonce) {
            // Late: it must not end what has begun since. Whoever still waits for
            // this answer puts a new one.
            return self.answer(cx, reply, PeerAnswer::NotYet);
        }
        if !self.peers[slot].wanted || self.closing {
            // It may have missed why: tell it.
            let mine = self.hello(cx, slot, 1);
            let decision = decide(&mine, &theirs);
            let code = if negotiate(&mine, &theirs).is_ok() {
                refusal_code(&decision)
            } else {
                0
            };
            return self.answer(cx, reply, PeerAnswer::Refused(code));
        }
        if let Err(reason) = negotiate(&self.hello(cx, slot, 1), &theirs) {
            self.peers[slot].last_error = Some(reason.to_string());
            self.answer(cx, reply, PeerAnswer::Refused(reason.code()));
            return self.stand_alone(cx, slot, &reason.to_string());
        }
        if self.peers[slot].session != 0 && self.peers[slot].their_hello != Some(theirs) {
            // The peer starts again: what was begun with its former Hello is void, on all channels first.
            if self.peers[slot].established {
                self.lose_session(cx, slot, "the peer has started a new session");
            } else {
                self.restart_handshake(cx, slot);
                self.peers[slot].their_hello = None;
            }
            return self.answer(cx, reply, PeerAnswer::NotYet);
        }
        if self.peers[slot].draining
            || self.awaits_promotion(slot)
            || self.awaits_newer_data_than(cx, slot, &theirs)
        {
            return self.answer(cx, reply, PeerAnswer::NotYet);
        }
        if self.peers[slot].link == Link::Closed {
            // It is there: no need to wait for our own turn.
            self.peers[slot].retry_at_ns = 0;
        }
        self.peers[slot].their_hello = Some(theirs);
        self.answer(cx, reply, PeerAnswer::Ok);
        self.try_confirm(cx, slot);
    }

    /// Of whom a promotion asks is settled when it begins: who comes later waits until that is over, and meets a Primary or a
    /// promotion that was given up. It might else fetch, or be fetched from, as if nobody was about to be Primary.
    fn awaits_promotion(&self, slot: PeerSlot) -> bool {
        let is_promoted = |other: usize| other != slot && self.peers[other].promoting.is_some();
        !mutation::is(Mutation::SessionDuringPromotion)
            && (self.is_promoting() || (0..MAX_PEERS).any(is_promoted))
    }

    /// What a peer misses, or may have lost with its cache, others have, and it learns that from them: a Primary that has no
    /// disk would read from it, and one that has just got its disk back would fetch from it.
    fn awaits_others_than(&self, theirs: &Hello) -> bool {
        if self.view.role != Role::Primary || !self.has_third_nodes() {
            return false;
        }
        if self.view.disk_is_usable() {
            return self.reattach_until_ns.is_some() && theirs.disk == DiskState::Outdated;
        }
        theirs.unclean
            && theirs.dirty_bits > 0
            && theirs.disk > DiskState::Outdated
            && self.view.read_source(0).is_some()
    }

    /// The application has seen newer data than this Primary's disk has, and this peer would not give it: whoever has it
    /// goes first, or the application would read what is old.
    fn awaits_newer_data_than(&self, cx: &H, slot: PeerSlot, theirs: &Hello) -> bool {
        if self.awaits_others_than(theirs) {
            return true;
        }
        let Some(exposed) = self.exposed.filter(|_| self.view.disk_is_usable()) else {
            return false;
        };
        let has_other_data = theirs.current_generation != exposed;
        match decide(&self.hello(cx, slot, 1), theirs).outcome {
            // One that was invalidated has given up its data, not its generation.
            Outcome::SyncSource { .. } => has_other_data || theirs.disk < DiskState::Outdated,
            Outcome::InSync | Outcome::ConnectWithoutSync | Outcome::Ahead => has_other_data,
            // Newer than this disk it may be, and still lack what the application has seen since.
            Outcome::SyncTarget { .. } | Outcome::Behind => {
                self.view.role == Role::Primary
                    && has_other_data
                    && !theirs.history.contains(&exposed)
            }
            _ => false,
        }
    }

    /// Both Hellos are known: decide, have the channels accept the session, and confirm.
    pub(super) fn try_confirm(&mut self, cx: &mut H, slot: PeerSlot) {
        if !self.may_confirm(slot) {
            return;
        }
        let now = cx.now_ns();
        let peer = &mut self.peers[slot];
        let (Some(mine), Some(theirs)) = (peer.my_hello, peer.their_hello) else {
            return;
        };
        let session = session_id(mine.nonce, theirs.nonce);
        if peer.session == 0 && self.awaits_promotion(slot) {
            // Its Hello came before.
            self.peers[slot].next_try_ns = ask_again_ns(cx);
            return;
        }
        let peer = &self.peers[slot];
        if peer.session == 0 && self.awaits_newer_data_than(cx, slot, &theirs) {
            // Its Hello came before the disk.
            let text = "another peer has what the application has seen, and goes first";
            return self.lose_session_for(cx, slot, text);
        }
        let peer = &mut self.peers[slot];
        if peer.session == 0 {
            let mut decision = decide(&mine, &theirs);
            let overlooked = match decision.outcome {
                Outcome::SplitBrain => mutation::is(Mutation::SplitBrainOverlooked),
                Outcome::SyncSource { .. } => mutation::is(Mutation::DecisionUnmirrored),
                _ => false,
            };
            if overlooked && mine.node_id < theirs.node_id {
                decision.outcome = Outcome::InSync;
            }
            peer.decided = Some(Decided {
                mine: mine.nonce,
                theirs: theirs.nonce,
                decision,
            });
            // A Primary without its disk may get that back.
            let may_pass = match decision.outcome {
                Outcome::Refuse(RefuseReason::NotWhatPrimarySaw) => true,
                Outcome::SplitBrain | Outcome::Unrelated | Outcome::Refuse(_) => {
                    self.has_third_nodes()
                }
                _ => false,
            };
            if let (Some(text), true) = (refusal(&decision), may_pass) {
                // A third node may be the one to mend it: of these two, one may have the other's data already, or may
                // have been Primary a moment ago.
                return self.lose_session_for(cx, slot, &text);
            }
            if let Some(text) = refusal(&decision) {
                // The peer has both Hellos too: it comes to the same end.
                return self.stand_alone(cx, slot, &text);
            }
            if theirs.role == Role::Primary {
                let text = "a Primary is connected, and is the source";
                self.end_other_resyncs(cx, slot, text);
            }
            let peer = &mut self.peers[slot];
            peer.session = session;
            peer.decision = Some(decision);
            self.view.peers[slot].recv_session = session;
            self.view.peers[slot].diskless = theirs.disk < DiskState::Inconsistent;
            let epoch = self.peers[slot].epoch;
            self.adopt(cx, Then::Session(slot, epoch, SessionStep::Receivable));
        } else if now >= peer.next_try_ns {
            peer.confirm = Asked::InFlight;
            self.call(
                slot,
                PeerCommand::Confirm { session },
                Vec::new(),
                Call::Confirm(session),
            );
        }
    }

    /// Both Hellos are known, and the next step is ours.
    pub(super) fn may_confirm(&self, slot: PeerSlot) -> bool {
        let peer = &self.peers[slot];
        let is_asked = !matches!(peer.confirm, Asked::No | Asked::Again);
        peer.my_hello.is_some()
            && peer.their_hello.is_some()
            && peer.hello == Asked::Yes
            && !peer.established
            && peer.link == Link::Open
            && (peer.session == 0 || (peer.receivable && !is_asked))
    }

    pub(super) fn received_confirm(&mut self, cx: &mut H, session: u32, reply: usize) {
        let slot = (0..MAX_PEERS).find(|&slot| self.peers[slot].session == session && session != 0);
        let answer = match slot {
            Some(slot) if self.peers[slot].receivable && self.check_hello(cx, slot) => {
                self.peers[slot].confirmed_theirs = true;
                PeerAnswer::Ok
            }
            Some(_) => PeerAnswer::NotYet,
            // Somebody's Hello may be about to make this session.
            None if self
                .peers
                .iter()
                .any(|peer| peer.their_hello.is_some() && peer.session == 0) =>
            {
                PeerAnswer::NotYet
            }
            None => PeerAnswer::Fenced,
        };
        self.answer(cx, reply, answer);
    }

    pub(super) fn confirm_answered(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        session: u32,
        answer: PeerAnswer,
    ) {
        let peer = &mut self.peers[slot];
        if peer.session != session || peer.established {
            return;
        }
        match answer {
            PeerAnswer::Ok | PeerAnswer::Duplicate => {
                peer.confirm = Asked::Yes;
                self.enter(cx, slot);
            }
            // The peer does not know our Hello, or has taken back its own.
            PeerAnswer::Fenced => self.restart_handshake(cx, slot),
            _ => {
                peer.confirm = Asked::Again;
                peer.next_try_ns = ask_again_ns(cx);
            }
        }
    }

    /// The decision holds: into its state.
    fn enter(&mut self, cx: &mut H, slot: PeerSlot) {
        if !self.check_hello(cx, slot) {
            return;
        }
        let peer = &self.peers[slot];
        let (Some(decision), Some(mine), Some(theirs)) =
            (peer.decision, peer.my_hello, peer.their_hello)
        else {
            return;
        };
        let agreed = match negotiate(&mine, &theirs) {
            Ok(agreed) => agreed,
            Err(reason) => return self.stand_alone(cx, slot, &reason.to_string()),
        };
        let conn = match decision.outcome {
            Outcome::InSync | Outcome::ConnectWithoutSync | Outcome::Ahead | Outcome::Behind => {
                ConnState::Connected
            }
            Outcome::SyncSource { full } => {
                if full {
                    self.masters[slot].set_all();
                }
                ConnState::WFBitMapS
            }
            Outcome::SyncTarget { full } => {
                if full {
                    self.masters[slot].set_all();
                }
                ConnState::WFBitMapT
            }
            Outcome::SplitBrain | Outcome::Unrelated | Outcome::Refuse(_) => return,
        };
        // A source that its peers know as Consistent has the newest data all the same: so it was decided.
        let reported = if conn == ConnState::WFBitMapT {
            DiskState::UpToDate
        } else if decision.outcome == Outcome::Ahead {
            theirs.disk.min(DiskState::Outdated)
        } else {
            theirs.disk
        };
        let Ok(state) = PeerState::lowered(conn, reported) else {
            return self.stand_alone(cx, slot, "the peer's disk does not fit the decision");
        };
        let now = cx.now_ns();
        let peer = &mut self.peers[slot];
        peer.established = true;
        // It may have told us more than its Hello did, while it was ahead of us.
        peer.role = peer.early_state.map_or(theirs.role, |state| state.role);
        peer.current_generation = theirs.current_generation;
        peer.history = theirs.history;
        peer.heard_ns = now;
        peer.ping_sent_ns = now;
        peer.last_error = None;
        peer.discard_my_data = false;
        peer.exchange = matches!(conn, ConnState::WFBitMapS | ConnState::WFBitMapT).then(|| {
            // What the peer has sent while it was ahead of us counts.
            peer.exchange.unwrap_or_default()
        });
        let session = peer.session;
        let epoch = peer.epoch;
        let view = &mut self.view.peers[slot];
        view.conn = state.conn();
        view.pdsk = state.pdsk();
        view.send_session = session;
        view.limits = PeerLimits::new(
            &self.shared.geometry,
            agreed.in_capsule_bytes,
            agreed.credits.saturating_sub(MANAGER_COMMANDS),
        );
        view.io_during_bitmap = agreed.features & feature::IO_DURING_BITMAP != 0;
        if conn == ConnState::WFBitMapT {
            // Reads of these blocks go to the peer, and that before any channel is a target.
            self.mark_stale(slot);
        }
        self.agree_again();
        self.compare.void(slot);
        if self.peers[slot].role == Role::Primary {
            // A resync with a third node may have begun since this was decided.
            let text = "a Primary is connected, and is the source";
            self.end_other_resyncs(cx, slot, text);
            self.hello_changed(cx);
        }
        self.settle_start(cx, &mine, &theirs);
        if decision.rule == Rule::TakenBack
            && matches!(
                decision.outcome,
                Outcome::SyncSource { .. } | Outcome::Ahead
            )
        {
            // Others may have that generation too, and not know that it never took effect.
            self.superblock
                .generations
                .remember_taken_back(theirs.current_generation);
            self.commit_superblock(cx, Then::Nothing);
        }
        if decision.outcome == Outcome::Behind {
            if decision.rule == Rule::CountedIn {
                // What the sender went on from: others, who know nothing of ours, will recognize it.
                let kept = theirs.bitmap_generation;
                let generations = &mut self.superblock.generations;
                generations.go_back(if generations.history_contains(kept) {
                    kept
                } else {
                    theirs.current_generation
                });
                self.generation_changed();
                self.superblock.flags.told = false;
                self.commit_superblock(cx, Then::Nothing);
                self.hello_changed(cx);
            }
            self.outdated(cx);
        }
        if conn == ConnState::WFBitMapT {
            let text = "this node fetches from another one";
            self.end_other_resyncs(cx, slot, text);
            self.hello_changed(cx);
        }
        self.adopt(cx, Then::Session(slot, epoch, SessionStep::Entered));
    }

    /// What has become of a generation that was started here, where the data is not: this peer has it, or it never was.
    fn settle_start(&mut self, cx: &mut H, mine: &Hello, theirs: &Hello) {
        if !mine.starting || mine.disk > DiskState::Inconsistent {
            return;
        }
        if takes_back(mine, theirs) {
            self.superblock.generations.take_back();
            self.superblock.flags.told = false;
            if self.view.role == Role::Primary {
                // Somebody may have taken it and not been able to say so: the next one that it starts names it.
                self.generation_taken_back(mine.current_generation);
            }
        } else if !theirs.has_data()
            || theirs.starting
            || theirs.current_generation != mine.current_generation
        {
            return;
        }
        self.generation_changed();
        self.commit_superblock(cx, Then::Nothing);
        self.tell_all();
        self.hello_changed(cx);
    }

    /// There is newer data than this node has, and it cannot have it yet.
    fn outdated(&mut self, cx: &mut H) {
        if self.view.role != Role::Primary && self.view.disk > DiskState::Outdated {
            self.view.disk = DiskState::Outdated;
            self.record_disk();
            self.commit_superblock(cx, Then::Nothing);
            self.tell_all();
            self.hello_changed(cx);
        }
    }
}

/// Why this decision ends the connection, for the operator; `None` if it does not.
fn refusal(decision: &Decision) -> Option<String> {
    let Decision { rule, outcome } = decision;
    if mutation::is(Mutation::SplitBrainUnreported) && *outcome == Outcome::SplitBrain {
        return Some("refused".to_owned());
    }
    (!outcome.connects()).then(|| format!("{outcome:?}: {rule}"))
}

/// What a node that does not want the connection answers to Hello, if the reason is the data.
fn refusal_code(decision: &Decision) -> u8 {
    match decision.outcome {
        Outcome::SplitBrain => SPLIT_BRAIN,
        Outcome::Unrelated => UNRELATED,
        _ => 0,
    }
}

/// Both nodes may be asking each other: not in step for ever.
fn ask_again_ns<H: Host>(cx: &mut H) -> u64 {
    cx.now_ns() + ASK_AGAIN_NS + cx.random() % ASK_AGAIN_NS
}
