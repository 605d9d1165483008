//! The exchange of bitmaps: everything is ORed on both sides while application writes go on setting bits.

use super::Manager;
use super::outbox::{CALL_AGAIN_NS, Call};
use super::peer::Exchange;
use super::steps::{SessionStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::bitmap::geometry::Granularity;
use crate::engine::bitmap::{convert, wire};
use crate::engine::meta::generation::NONE;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{RangesBody, SyncStartBody};
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::handshake::{Outcome, Rule};
use crate::engine::peer::state::{ConnState, DiskState};
use crate::host::{Host, PeerSlot};

/// Bytes of bitmap in one command.
const BITMAP_BYTES: usize = 64 << 10;

impl<H: Host> Manager<H> {
    pub(super) fn begin_bitmap(&mut self, cx: &mut H, slot: PeerSlot) {
        if let Some(exchange) = &mut self.peers[slot].exchange {
            exchange.cursor = Some(0);
        }
        self.send_bitmap(cx, slot);
    }

    /// The next piece of our bitmap, or its end.
    pub(super) fn send_bitmap(&mut self, _cx: &mut H, slot: PeerSlot) {
        let Some(Exchange {
            cursor,
            sent: false,
            ..
        }) = self.peers[slot].exchange
        else {
            return;
        };
        if let Some(cursor) = cursor
            && let Some((body, next)) = self.bitmap_body(slot, cursor)
        {
            if let Some(exchange) = &mut self.peers[slot].exchange {
                exchange.cursor = next;
            }
            return self.send_bitmap_body(slot, body, Call::Bitmap);
        }
        let bits_set = self.masters[slot].count();
        let sequence = self.shared.next_control_sequence(slot);
        let command = PeerCommand::BitmapEnd {
            session: self.peers[slot].session,
            sequence,
            bits_set,
        };
        self.call(slot, command, Vec::new(), Call::BitmapEnd);
    }

    /// Encoded set bits from `cursor` on, and where to go on; `None` when there are none.
    pub(super) fn bitmap_body(
        &self,
        slot: PeerSlot,
        cursor: u64,
    ) -> Option<(Vec<u8>, Option<u64>)> {
        let most = self.view.peers[slot].limits.body_bytes as usize;
        let mut body = vec![0; BITMAP_BYTES.min(most)];
        let encoded = wire::encode(&self.masters[slot], cursor, &mut body);
        body.truncate(encoded.len);
        (encoded.len > 0).then_some((body, encoded.next))
    }

    pub(super) fn send_bitmap_body(&mut self, slot: PeerSlot, body: Vec<u8>, call: Call) {
        let sequence = self.shared.next_control_sequence(slot);
        let command = PeerCommand::BitmapOr {
            session: self.peers[slot].session,
            sequence,
            len: body.len() as u32,
        };
        self.call(slot, command, body, call);
    }

    pub(super) fn bitmap_sent(&mut self, cx: &mut H, slot: PeerSlot) {
        if let Some(exchange) = &mut self.peers[slot].exchange {
            exchange.sent = true;
        }
        self.check_exchange(cx, slot);
    }

    pub(super) fn received_bitmap(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        let geometry = self.shared.geometry;
        let theirs = self.peers[slot]
            .their_hello
            .map(|hello| hello.granularity_log2);
        let (Some(Ok(from)), Ok(to)) = (
            theirs.map(Granularity::from_log2),
            Granularity::from_log2(geometry.granularity_log2),
        ) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        let mut pages = Vec::new();
        let decoded = wire::decode(body, from.bits_for(geometry.size_bytes()), |index, page| {
            pages.push((index, Box::new(page.clone())));
        });
        if decoded.is_err() {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        }
        if mutation::is(Mutation::BitmapIgnored) {
            pages.clear();
        }
        for (index, page) in pages {
            convert::or_converted(&mut self.masters[slot], to, from, index, &page);
        }
        self.bits_arrived(slot);
        self.answer(cx, reply, PeerAnswer::Ok);
    }

    /// Bits that this node did not know of: what is being pulled for them has to be pulled again.
    fn bits_arrived(&mut self, slot: PeerSlot) {
        if self.fetches_from(slot) {
            self.mark_stale(slot);
            self.puller_invalidate(slot);
            if self.has_third_nodes() {
                self.spread_bits(slot);
                self.bits_spread();
            }
        }
    }

    /// Reads of what this peer's bitmap says are stale from now on.
    pub(super) fn mark_stale(&mut self, slot: PeerSlot) {
        let master = &self.masters[slot];
        let mut from = 0;
        while let Some(run) = master.next_run(from, u64::MAX) {
            from = run.end;
            self.shared.stale.set_range(run);
        }
    }

    pub(super) fn received_bitmap_end(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        self.peers[slot]
            .exchange
            .get_or_insert_with(Exchange::default)
            .received = true;
        self.answer(cx, reply, PeerAnswer::Ok);
        self.check_exchange(cx, slot);
    }

    /// Writes of the Primary that this node does not get.
    pub(super) fn received_notice(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        let geometry = self.shared.geometry;
        let Ok(ranges) = RangesBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        for range in ranges.iter() {
            let (lba, blocks) = (range.span.lba(), range.span.blocks());
            if geometry.contains(lba, blocks) {
                self.masters[slot].or_range(geometry.bits_of(lba, blocks));
            }
        }
        self.bits_arrived(slot);
        self.answer(cx, reply, PeerAnswer::Ok);
    }

    fn exchange_is_complete(&self, slot: PeerSlot) -> bool {
        self.peers[slot].established
            && self.peers[slot]
                .exchange
                .is_some_and(|exchange| exchange.sent && exchange.received)
    }

    /// The source starts the resync when both bitmaps are on both sides.
    fn check_exchange(&mut self, cx: &mut H, slot: PeerSlot) {
        if !self.exchange_is_complete(slot) || self.view.peers[slot].conn != ConnState::WFBitMapS {
            return;
        }
        self.send_sync_start(cx, slot);
    }

    pub(super) fn send_sync_start(&mut self, cx: &mut H, slot: PeerSlot) {
        if !self.generation_is_durable() {
            // The target would keep one that this node does not know any more after a crash.
            self.peers[slot].again = Some((Call::SyncStart, cx.now_ns() + CALL_AGAIN_NS));
            return;
        }
        let outcome = self.peers[slot].decision.map(|decision| decision.outcome);
        let body = SyncStartBody {
            source_generation: self.superblock.generations.current,
            bits_set: self.masters[slot].count(),
            full: outcome == Some(Outcome::SyncSource { full: true }),
        };
        let sequence = self.shared.next_control_sequence(slot);
        let command = PeerCommand::SyncStart {
            session: self.peers[slot].session,
            sequence,
            len: SyncStartBody::BYTES as u32,
        };
        self.call(slot, command, body.emit().to_vec(), Call::SyncStart);
    }

    /// As target: Inconsistent, with all bits, durably; only then the source goes on.
    pub(super) fn received_sync_start(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        body: &[u8],
        reply: usize,
    ) {
        let Ok(body) = SyncStartBody::parse(body) else {
            return self.answer(cx, reply, PeerAnswer::Malformed);
        };
        if self.view.peers[slot].conn != ConnState::WFBitMapT || !self.exchange_is_complete(slot) {
            return self.answer(cx, reply, PeerAnswer::NotYet);
        }
        self.peers[slot].current_generation = body.source_generation;
        let rule = self.peers[slot].decision.map(|decision| decision.rule);
        // What it had when the session began is its past if it has gone on since.
        let mut past = self.peers[slot].history.to_vec();
        if let Some(hello) = self.peers[slot].their_hello
            && !past.contains(&hello.current_generation)
        {
            past.insert(0, hello.current_generation);
        }
        self.superblock
            .generations
            .start_sync_as_target(body.source_generation, &past);
        self.generation_changed();
        let source = self.peers[slot].their_hello;
        self.superblock.flags.starting = source.is_some_and(|source| {
            source.starting && source.current_generation == body.source_generation
        });
        if rule == Some(Rule::GivenUp) {
            // What this node was on the way to before is another's: who has it is not behind.
            self.superblock.generations.bitmap = [NONE; MAX_PEERS];
        }
        self.inherit_generations(slot);
        self.view.disk = DiskState::Inconsistent;
        self.record_disk();
        for peer in self.superblock.peers.iter_mut().flatten() {
            peer.full_sync = false;
        }
        self.spread_bits(slot);
        self.bits_are_spread();
        let epoch = self.peers[slot].epoch;
        self.commit_pages(cx, Then::Nothing);
        self.commit_superblock(
            cx,
            Then::Session(slot, epoch, SessionStep::TargetDurable(reply)),
        );
    }

    pub(super) fn target_durable(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        self.view.peers[slot].conn = if self.puller.paused {
            ConnState::PausedSyncT
        } else {
            ConnState::SyncTarget
        };
        self.view.peers[slot].pdsk = DiskState::UpToDate;
        let epoch = self.peers[slot].epoch;
        self.adopt(
            cx,
            Then::Session(slot, epoch, SessionStep::TargetEntered(reply)),
        );
    }

    pub(super) fn target_entered(&mut self, cx: &mut H, slot: PeerSlot, reply: usize) {
        self.answer(cx, reply, PeerAnswer::Ok);
        self.start_resync_report(cx, slot);
        self.start_pull(slot);
        self.tell_all();
    }

    pub(super) fn start_resync_report(&mut self, cx: &H, slot: PeerSlot) {
        self.peers[slot].resync_total_bits = self.masters[slot].count();
        self.peers[slot].resync_started_ns = cx.now_ns();
    }
}
