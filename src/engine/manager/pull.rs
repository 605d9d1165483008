//! The target's side of a resync: it decides what to fetch and when, flushes, reports to the source, and agrees with it
//! on the end. What becomes of one piece is in `piece`.

mod piece;

use std::ops::Range as Blocks;

use super::outbox::Call;
use super::steps::{DiskStep, SessionStep, Then};
use super::{Manager, ManagerIo};
use crate::engine::meta::superblock::PersistedDisk;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::body::{Range, RangesBody, SyncFinishBody};
use crate::engine::peer::command::{FinishPhase, PeerCommand, Span};
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::engine::volume::MAX_TRANSFER_BYTES;
use crate::host::{Data, DiskIo, DiskOp, Host, IoStatus, PeerSlot};

/// Pieces under way at once.
pub(super) const PIECES: usize = 16;
/// Bits that are fetched as one unit: no more bytes than this, or one bit.
const UNIT_BYTES: u64 = 1 << 20;
/// Units after which the target flushes and reports.
const UNITS_PER_FLUSH: usize = 64;
/// Failed attempts at its range after which a piece keeps newcomers off it.
const PRESS_AFTER: u32 = 2;
/// Between two attempts at a piece that the source could not serve.
const RETRY_NS: u64 = 1_000_000;

/// What a completion of the puller belongs to.
pub(super) enum PullIo {
    /// The source's answer for this piece.
    Fetched(usize),
    /// The local write of a part of this piece.
    Written(usize),
    Flushed,
}

/// The next step behind a sweep over the bitmap.
enum Sweep {
    Flush,
    /// No bit is left.
    Finish,
    /// Bits were left, or have come.
    Again,
}

/// Where other nodes' bits for what is to be fetched are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spread {
    Durable,
    InMemory,
    /// On their way to the disk, with or without those that have come since.
    Writing {
        more: bool,
    },
}

struct Unit {
    bits: Blocks<u64>,
    pieces_left: u32,
    /// Bits to be fetched again: a write has covered a part of them.
    again: Vec<u64>,
}

enum Stage<H: Host> {
    /// To be asked for, not before this time.
    Ask(u64),
    Fetching,
    /// Its data is here (`None`: zeroes); the range is not.
    Lock(Option<H::Buffer>),
    /// Local writes in flight, and those that the host has not taken.
    Write(u32, Vec<(DiskIo, Option<H::Buffer>)>),
}

struct Piece<H: Host> {
    unit: usize,
    lba: u64,
    blocks: u32,
    /// The number of its resync read, until the source has served that; else the next one is a new read.
    read: Option<u64>,
    /// Times that its range was taken by somebody else.
    lock_failures: u32,
    stage: Stage<H>,
    /// Its session is over: what is in flight is waited for, nothing more is done.
    dead: bool,
}

impl<H: Host> Piece<H> {
    fn is_pressing(&self) -> bool {
        self.lock_failures > PRESS_AFTER
    }
}

pub(super) struct Puller<H: Host> {
    pub(super) paused: bool,
    slot: Option<PeerSlot>,
    units: Vec<Option<Unit>>,
    pieces: Vec<Option<Piece<H>>>,
    /// Where the sweep over the bitmap is.
    cursor: u64,
    /// Parts of the unit that is being cut into pieces: unit, next block, end block.
    cutting: Option<(usize, u64, u64)>,
    /// Bits on the disk, not yet flushed.
    written: Vec<Blocks<u64>>,
    flushing: Vec<Blocks<u64>>,
    flush_in_flight: bool,
    /// Reports that the source has not answered. Until it has, nothing that they name is fetched again: it could not
    /// tell what it serves then from what they mean.
    reports_unanswered: u32,
    finishing: bool,
    /// What has come to be fetched has bits for other nodes that are not durable.
    spread: Spread,
    /// Bytes that the rate has allowed so far, since when.
    rate_since_ns: u64,
    rate_used_bytes: u64,
    pub(super) fetched_bytes: u64,
}

impl<H: Host> Puller<H> {
    pub(super) fn new() -> Self {
        Self {
            paused: false,
            slot: None,
            units: Vec::new(),
            pieces: (0..PIECES).map(|_| None).collect(),
            cursor: 0,
            cutting: None,
            written: Vec::new(),
            flushing: Vec::new(),
            flush_in_flight: false,
            reports_unanswered: 0,
            finishing: false,
            spread: Spread::Durable,
            rate_since_ns: 0,
            rate_used_bytes: 0,
            fetched_bytes: 0,
        }
    }

    /// This node fetches from a peer.
    pub(super) fn is_running(&self) -> bool {
        self.slot.is_some()
    }

    /// A piece waits for its range, and writes wait for that.
    pub(super) fn is_pressing(&self) -> bool {
        self.pieces.iter().flatten().any(Piece::is_pressing)
    }

    /// I/O on the local disk that has not come back.
    pub(super) fn uses_disk(&self) -> bool {
        self.flush_in_flight
            || self
                .pieces
                .iter()
                .flatten()
                .any(|piece| matches!(piece.stage, Stage::Write(in_flight, _) if in_flight > 0))
    }
}

impl<H: Host> Manager<H> {
    pub(super) fn start_pull(&mut self, slot: PeerSlot) {
        self.puller.slot = Some(slot);
        self.puller.cursor = 0;
        self.puller.reports_unanswered = 0;
        self.puller.finishing = false;
        self.puller.rate_since_ns = 0;
        self.puller.fetched_bytes = 0;
    }

    /// The session is over, or the disk: what is in flight only has to come back.
    pub(super) fn stop_pull(&mut self, slot: PeerSlot) {
        if self.puller.slot != Some(slot) {
            return;
        }
        self.puller.slot = None;
        self.puller.cutting = None;
        self.puller.written.clear();
        // A flush that ends in a later session must not clear bits that are newer than it.
        self.puller.flushing.clear();
        for index in 0..self.puller.pieces.len() {
            let Some(piece) = &mut self.puller.pieces[index] else {
                continue;
            };
            piece.dead = true;
            match &mut piece.stage {
                Stage::Ask(_) | Stage::Lock(_) => {
                    self.piece_stop_waiting(index);
                    self.puller.pieces[index] = None;
                }
                Stage::Write(in_flight, unsent) => {
                    unsent.clear();
                    if *in_flight == 0 {
                        self.piece_unlock(index);
                        self.puller.pieces[index] = None;
                    }
                }
                Stage::Fetching => {}
            }
        }
        self.puller.units.clear();
        self.shared.pulls.clear_all();
    }

    /// New bits: whatever is on its way for them does not count.
    pub(super) fn puller_invalidate(&mut self, slot: PeerSlot) {
        if self.puller.slot != Some(slot) {
            return;
        }
        let master = &self.masters[slot];
        // Everything that is under way has its bits set already, so nothing tells old bits from new ones: all of it is
        // fetched again. This happens when the source finds more bits at the finish, and then nothing is under way.
        debug_assert!(master.bits() > 0);
        self.puller.written.clear();
        self.puller.flushing.clear();
        for unit in self.puller.units.iter_mut().flatten() {
            unit.again = unit.bits.clone().collect();
        }
    }

    pub(super) fn pull_again(&mut self, slot: PeerSlot) {
        if self.puller.slot == Some(slot) {
            self.puller.finishing = false;
            self.puller.cursor = 0;
        }
    }

    /// All that is to be fetched from here on is spread durably, or will be by what is being written.
    pub(super) fn bits_are_spread(&mut self) {
        self.puller.spread = Spread::Durable;
    }

    /// Other nodes have got bits for what is to be fetched. Nothing is until they are durable: after a crash it would be
    /// here, and nobody would know that it is not there.
    pub(super) fn bits_spread(&mut self) {
        if mutation::is(Mutation::SpreadNotDurable) {
            return;
        }
        self.puller.spread = match self.puller.spread {
            Spread::Writing { .. } => Spread::Writing { more: true },
            _ => Spread::InMemory,
        };
    }

    fn write_spread(&mut self, cx: &mut H, slot: PeerSlot) {
        if self.puller.spread == Spread::InMemory {
            self.puller.spread = Spread::Writing { more: false };
            let epoch = self.peers[slot].epoch;
            self.commit_pages(cx, Then::Session(slot, epoch, SessionStep::SpreadDurable));
        }
    }

    pub(super) fn spread_durable(&mut self) {
        self.puller.spread = match self.puller.spread {
            Spread::Writing { more: true } => Spread::InMemory,
            _ => Spread::Durable,
        };
    }

    pub(super) fn poll_pull(&mut self, cx: &mut H) {
        for index in 0..self.puller.pieces.len() {
            self.advance_piece(cx, index);
        }
        let Some(slot) = self.puller.slot else {
            return;
        };
        self.write_spread(cx, slot);
        while self.puller.slot.is_some() && self.may_cut_piece(slot) && self.rate_allows(cx) {
            let Some(free) = self.puller.pieces.iter().position(Option::is_none) else {
                break;
            };
            let Some(piece) = self.cut_piece(slot) else {
                break;
            };
            self.puller.rate_used_bytes +=
                u64::from(piece.blocks) * u64::from(self.shared.geometry.block_size);
            self.puller.pieces[free] = Some(piece);
            self.advance_piece(cx, free);
        }
        self.poll_flush(cx, slot);
    }

    /// The time from which on [`poll_pull`](Self::poll_pull) has something to do.
    pub(super) fn pull_due_ns(&self) -> Option<u64> {
        let of_stage = |piece: &Piece<H>| match &piece.stage {
            Stage::Ask(not_before_ns) => self.puller.slot.map(|_| *not_before_ns),
            Stage::Fetching => None,
            Stage::Lock(_) => Some(0),
            Stage::Write(_, unsent) => (!unsent.is_empty()).then_some(0),
        };
        if let Some(slot) = self.puller.slot
            && (self.may_cut_piece(slot)
                || self.sweep(slot).is_some()
                || self.puller.spread == Spread::InMemory)
        {
            return Some(0);
        }
        self.puller
            .pieces
            .iter()
            .flatten()
            .filter_map(of_stage)
            .min()
    }

    /// There is a piece to be cut and room for it.
    fn may_cut_piece(&self, slot: PeerSlot) -> bool {
        let puller = &self.puller;
        // Bits that come while the source is asked for the end wait for its answer, which may begin the sweep again: of
        // two reads of one place the older one could be written last.
        let asks_for_end = puller.finishing && !mutation::is(Mutation::PullWhileFinishing);
        !puller.paused
            && !asks_for_end
            && puller.spread == Spread::Durable
            && puller.pieces.iter().any(Option::is_none)
            && (puller.cutting.is_some()
                || (puller.written.len() + puller.flushing.len() < 2 * UNITS_PER_FLUSH
                    && self.masters[slot].next_run(puller.cursor, 1).is_some()))
    }

    fn rate_allows(&mut self, cx: &H) -> bool {
        let rate = self.options.resync_rate_bytes;
        if rate == 0 {
            return true;
        }
        let now = cx.now_ns();
        // In windows of a second, so that a pause is not made up for by a burst.
        if now.saturating_sub(self.puller.rate_since_ns) > 1_000_000_000 {
            self.puller.rate_since_ns = now;
            self.puller.rate_used_bytes = 0;
        }
        let elapsed_ms = now.saturating_sub(self.puller.rate_since_ns) / 1_000_000 + 10;
        self.puller.rate_used_bytes < rate.saturating_mul(elapsed_ms) / 1000
    }

    /// The next piece of the sweep: at most one transfer, within one unit.
    fn cut_piece(&mut self, slot: PeerSlot) -> Option<Piece<H>> {
        let geometry = self.shared.geometry;
        if self.puller.cutting.is_none() {
            let max_bits = (UNIT_BYTES >> geometry.granularity_log2).max(1);
            let run = self.masters[slot].next_run(self.puller.cursor, max_bits)?;
            let run = self.widened(slot, run);
            self.puller.cursor = run.end;
            let blocks = geometry.blocks_of_bits(&run);
            let transfer = MAX_TRANSFER_BYTES / u64::from(geometry.block_size);
            let unit = Unit {
                bits: run,
                pieces_left: (blocks.end - blocks.start).div_ceil(transfer) as u32,
                again: Vec::new(),
            };
            let index = match self.puller.units.iter().position(Option::is_none) {
                Some(index) => {
                    self.puller.units[index] = Some(unit);
                    index
                }
                None => {
                    self.puller.units.push(Some(unit));
                    self.puller.units.len() - 1
                }
            };
            self.puller.cutting = Some((index, blocks.start, blocks.end));
        }
        let (unit, next, end) = self.puller.cutting?;
        let transfer = MAX_TRANSFER_BYTES / u64::from(geometry.block_size);
        let blocks = (end - next).min(transfer);
        self.puller.cutting = (next + blocks < end).then_some((unit, next + blocks, end));
        Some(Piece {
            unit,
            lba: next,
            blocks: blocks as u32,
            read: None,
            lock_failures: 0,
            stage: Stage::Ask(0),
            dead: false,
        })
    }

    /// With a source of coarser granularity: whole bits of the source, or it could never clear them.
    fn widened(&self, slot: PeerSlot, run: Blocks<u64>) -> Blocks<u64> {
        let ours = self.shared.geometry.granularity_log2;
        let theirs = self.peers[slot]
            .their_hello
            .map_or(ours, |hello| hello.granularity_log2);
        let Some(shift) = theirs.checked_sub(ours) else {
            return run;
        };
        let start = run.start >> shift << shift;
        let end = (run.end.div_ceil(1 << shift) << shift).min(self.shared.geometry.bits());
        start..end
    }

    pub(super) fn pull_done(
        &mut self,
        cx: &mut H,
        io: PullIo,
        status: IoStatus,
        answer: PeerAnswer,
        buffer: Option<H::Buffer>,
    ) {
        match io {
            PullIo::Fetched(index) => self.piece_fetched(cx, index, status, answer, buffer),
            PullIo::Written(index) => self.piece_written(cx, index, status),
            PullIo::Flushed => self.flushed(cx, status),
        }
    }

    fn poll_flush(&mut self, cx: &mut H, slot: PeerSlot) {
        match self.sweep(slot) {
            Some(Sweep::Flush) => self.flush_written(cx),
            Some(Sweep::Finish) => {
                self.puller.finishing = true;
                self.ask_to_finish(cx, slot);
            }
            Some(Sweep::Again) => self.puller.cursor = 0,
            None => {}
        }
    }

    fn flush_written(&mut self, cx: &mut H) {
        if mutation::is(Mutation::ReportUnflushed) {
            self.puller.flushing = std::mem::take(&mut self.puller.written);
            return self.flushed(cx, IoStatus::Ok);
        }
        let token = self.token(ManagerIo::Pull(PullIo::Flushed));
        let io = DiskIo {
            op: DiskOp::Flush,
            offset: 0,
            len: 0,
        };
        if cx.disk(token, io, Data::None).is_ok() {
            self.puller.flush_in_flight = true;
            self.puller.flushing = std::mem::take(&mut self.puller.written);
        } else {
            self.take_io(token);
        }
    }

    /// What comes next with what was fetched, if anything does now.
    fn sweep(&self, slot: PeerSlot) -> Option<Sweep> {
        let puller = &self.puller;
        if puller.slot != Some(slot) || puller.flush_in_flight || puller.finishing {
            return None;
        }
        let has_swept = puller.cutting.is_none()
            && puller.pieces.iter().all(Option::is_none)
            && self.masters[slot].next_run(puller.cursor, 1).is_none();
        if puller.written.len() >= UNITS_PER_FLUSH || (has_swept && !puller.written.is_empty()) {
            Some(Sweep::Flush)
        } else if !has_swept || puller.reports_unanswered > 0 {
            // The next sweep may come to what was fetched in this one.
            None
        } else if self.masters[slot].is_empty() {
            Some(Sweep::Finish)
        } else {
            Some(Sweep::Again)
        }
    }

    /// The data is durable: the bits can go, here and at the source.
    fn flushed(&mut self, cx: &mut H, status: IoStatus) {
        self.puller.flush_in_flight = false;
        let bits = std::mem::take(&mut self.puller.flushing);
        if status != IoStatus::Ok {
            return self.disk_failed(cx);
        }
        let Some(slot) = self.puller.slot else {
            return;
        };
        let geometry = self.shared.geometry;
        let mut ranges = Vec::with_capacity(bits.len());
        for run in bits {
            let blocks = geometry.blocks_of_bits(&run);
            self.masters[slot].clear_range(run.clone());
            self.shared.stale.clear_range(run);
            if let Some(span) = Span::new(blocks.start, (blocks.end - blocks.start) as u32) {
                ranges.push(Range { span, sequence: 0 });
            }
        }
        let mut rest = &ranges[..];
        let most = self.view.peers[slot].limits.body_bytes as usize;
        while !rest.is_empty() {
            let mut body = vec![0; RangesBody::bytes_for(rest.len()).min(most)];
            let (count, len) = RangesBody::emit(rest, &mut body);
            if count == 0 {
                return;
            }
            body.truncate(len);
            rest = &rest[count..];
            let sequence = self.shared.next_control_sequence(slot);
            let command = PeerCommand::ResyncDone {
                session: self.peers[slot].session,
                sequence,
                len: len as u32,
            };
            self.puller.reports_unanswered += 1;
            self.call(slot, command, body, Call::ResyncDone);
        }
    }

    /// The source has cleared what a report named.
    pub(super) fn reported(&mut self, slot: PeerSlot) {
        if self.puller.slot == Some(slot) {
            self.puller.reports_unanswered -= 1;
        }
    }

    /// Asks the source for the end. A generation that it has started meanwhile is taken over first, durably, while this
    /// disk still is Inconsistent: what is asked for is the end with the source's present one.
    pub(super) fn ask_to_finish(&mut self, cx: &mut H, slot: PeerSlot) {
        let generation = self.peers[slot].current_generation;
        // A Primary starts generations itself; what it knows of the source's may be older than what it has told that.
        let is_current = generation == self.superblock.generations.current;
        if is_current || self.view.role == Role::Primary || self.peers[slot].starts_generation {
            return self.ask_finish(slot, Call::FinishAsk);
        }
        self.superblock.generations.follow_source(generation);
        self.generation_changed();
        self.hello_changed(cx);
        let epoch = self.peers[slot].epoch;
        self.commit_superblock(
            cx,
            Then::Session(slot, epoch, SessionStep::GenerationFollowed),
        );
    }

    pub(super) fn ask_finish(&mut self, slot: PeerSlot, call: Call) {
        let phase = match call {
            Call::FinishDurable => FinishPhase::Durable,
            _ => FinishPhase::Ask,
        };
        let body = SyncFinishBody {
            generation: self.superblock.generations.current,
            bits_set: self.masters[slot].count(),
            blocks_fetched: self.puller.fetched_bytes / u64::from(self.shared.geometry.block_size),
        };
        let sequence = self.shared.next_control_sequence(slot);
        let command = PeerCommand::SyncFinish {
            session: self.peers[slot].session,
            sequence,
            phase,
            len: SyncFinishBody::BYTES as u32,
        };
        self.call(slot, command, body.emit().to_vec(), call);
    }

    /// The source has no bit left either: this node is UpToDate with the source's generation, durably first.
    pub(super) fn finish_agreed(&mut self, cx: &mut H, slot: PeerSlot) {
        let Some(theirs) = self.peers[slot].their_hello else {
            return;
        };
        if !self.masters[slot].is_empty() {
            return self.pull_again(slot);
        }
        let mut source =
            crate::engine::meta::generation::Generations::new(self.superblock.generations.current);
        // What it told last; and what it was of when the session began, if it has gone on since.
        source.history = self.peers[slot].history;
        source.has_been(theirs.current_generation);
        self.superblock
            .generations
            .finish_sync_as_target(&source, slot);
        self.inherit_generations(slot);
        self.superblock.disk = PersistedDisk::UpToDate;
        // This disk has everything, whatever it lacked before, and whatever becomes of its generation.
        for peer in self.superblock.peers.iter_mut().flatten() {
            peer.full_sync = false;
        }
        self.settle_crash(slot);
        let epoch = self.peers[slot].epoch;
        self.commit_pages(cx, Then::Nothing);
        self.commit_superblock(cx, Then::Disk(DiskStep::SyncedDurable(slot, epoch)));
    }

    /// Whether or not the source is still there, this disk has everything.
    pub(super) fn synced(&mut self, cx: &mut H, slot: PeerSlot, epoch: u64) {
        if !self.metadata.enabled || self.superblock.disk != PersistedDisk::UpToDate {
            // The disk is gone, or has become the target of another resync meanwhile.
            return;
        }
        self.view.disk = DiskState::UpToDate;
        self.exposed = None;
        self.shared.stale.clear_all();
        self.adopt(cx, Then::Nothing);
        if self.peers[slot].epoch == epoch {
            self.ask_finish(slot, Call::FinishDurable);
        } else {
            self.hello_changed(cx);
            self.fetched_as_primary(cx);
        }
    }

    /// Those that were connected with this Primary meanwhile may hold other data than its source.
    fn fetched_as_primary(&mut self, cx: &mut H) {
        if self.view.role == Role::Primary {
            self.part_with_others(cx);
        }
    }

    pub(super) fn finish_ended(&mut self, cx: &mut H, slot: PeerSlot) {
        self.puller.slot = None;
        self.peers[slot].exchange = None;
        self.view.peers[slot].conn = ConnState::Connected;
        self.view.peers[slot].pdsk = DiskState::UpToDate;
        self.fetched_as_primary(cx);
        self.adopt(cx, Then::Nothing);
        self.tell_all();
    }
}
