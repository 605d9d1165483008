//! The channel of a volume on one core: a state machine on the I/O path that is told things and asks for things. It
//! never blocks and is never re-entered; the host calls it on its own core only.
//!
//! An I/O goes downward through [`Stage`]: held, range lock, activity log, legs, settled. This file receives; `advance`
//! moves requests on, `legs` talks to disk and peers, `received` takes peer commands, `log` keeps the activity log.

mod advance;
mod legs;
mod log;
mod received;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::engine::MAX_PEERS;
use crate::engine::bitmap::shard::Shard;
use crate::engine::message::{Drain, HarvestedPages, ToChannel, ToManager};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::state::Role;
use crate::engine::request::{LOCAL_MASK, Origin, Request, RequestKind, RequestSlab, Stage};
use crate::engine::view::View;
use crate::engine::volume::{MAX_TRANSFER_BYTES, MAX_ZEROES_BYTES, Shared};
use crate::host::{AppStatus, ChannelId, Completion, Host, PeerSlot, Token};

use log::Log;

/// Requests that a channel holds at once, the peers' included.
const CAPACITY: u16 = 1024;
/// Of these, kept free for received peer commands, so that two Primaries cannot starve each other.
const RECEIVED_RESERVE: usize = 256;

/// Tokens of a channel: bits 24 to 31 tell what they are for.
const TOKEN_LOG: u64 = 1 << 24;
const TOKEN_NOTICE: u64 = 2 << 24;
const TOKEN_KIND: u64 = 0xff << 24;
/// Set in every token of the manager, clear in every token of a channel: a host that runs both on one core looks here.
pub const TOKEN_MANAGER: u64 = 0x80 << 24;

/// An application I/O.
pub struct AppIo<H: Host> {
    pub kind: RequestKind,
    pub lba: u64,
    pub blocks: u32,
    pub payload: Option<H::Payload>,
    pub io: H::Io,
}

/// One core's part of a volume.
pub struct Channel<H: Host> {
    id: ChannelId,
    shared: Arc<Shared>,
    view: Arc<View>,
    requests: RequestSlab<H>,
    /// Requests that something may have changed for; in order of arrival.
    waiting: VecDeque<u16>,
    shards: [Shard; MAX_PEERS],
    log: Log<H>,
    notices: [Notices; MAX_PEERS],
    /// Commands of this channel that each peer has not answered.
    commands: [u16; MAX_PEERS],
    /// Peers that took no more: who came later waits too, until those before it had their turn with the poller.
    short: u8,
    drains: Vec<(u64, Drain)>,
    /// Legs on the local disk, this channel's own included.
    disk_references: u32,
    released: bool,
    requested: RequestFlags,
}

/// What this channel has told the manager and need not tell again under the same view.
#[derive(Default)]
struct RequestFlags {
    generation_for: u8,
    lost: [u32; MAX_PEERS],
    disk_failed: bool,
}

/// Out-of-sync notices to one peer.
#[derive(Default)]
struct Notices {
    /// (lba, blocks), not yet sent.
    queued: VecDeque<(u64, u32)>,
    in_flight: u32,
}

impl<H: Host> Channel<H> {
    pub fn new(id: ChannelId, shared: Arc<Shared>) -> Self {
        let bits = shared.geometry.bits();
        Self {
            id,
            view: Arc::new(View::new()),
            requests: RequestSlab::new(CAPACITY),
            waiting: VecDeque::with_capacity(usize::from(CAPACITY)),
            shards: std::array::from_fn(|_| Shard::new(bits)),
            log: Log::new(),
            notices: std::array::from_fn(|_| Notices {
                queued: VecDeque::with_capacity(usize::from(CAPACITY)),
                in_flight: 0,
            }),
            commands: [0; MAX_PEERS],
            short: 0,
            drains: Vec::new(),
            disk_references: 0,
            released: true,
            requested: RequestFlags::default(),
            shared,
        }
    }

    /// This channel knows that this block and the peer's may differ, and has not handed that over.
    pub fn is_out_of_sync(&self, slot: PeerSlot, lba: u64) -> bool {
        self.shards[slot].any(self.shared.geometry.bits_of(lba, 1))
    }

    /// Takes an application I/O.
    ///
    /// # Errors
    /// The I/O, when the channel is full: the host offers it again later.
    pub fn submit(&mut self, cx: &mut H, io: AppIo<H>) -> Result<(), AppIo<H>> {
        if let Err(status) = self.accepts(&io) {
            cx.finish(io.io, status);
            return Ok(());
        }
        if usize::from(self.requests.capacity()) - self.requests.len() <= RECEIVED_RESERVE {
            return Err(io);
        }
        let request = self.request(
            cx,
            Origin::Application(io.io),
            io.kind,
            io.lba,
            io.blocks,
            io.payload,
        );
        if let Some(index) = self.requests.insert(request) {
            // What came before and waits for the volume goes first.
            self.advance(cx, index);
        }
        self.pump(cx);
        Ok(())
    }

    fn accepts(&self, io: &AppIo<H>) -> Result<(), AppStatus> {
        if self.view.closing || self.view.role != Role::Primary {
            return Err(AppStatus::Inaccessible);
        }
        let bytes = u64::from(io.blocks) * u64::from(self.shared.geometry.block_size);
        let limit = match io.kind {
            RequestKind::Flush => return Ok(()),
            RequestKind::Read | RequestKind::Write { .. } => MAX_TRANSFER_BYTES,
            RequestKind::WriteZeroes { .. } | RequestKind::Unmap => MAX_ZEROES_BYTES,
            RequestKind::ResyncRead => return Err(AppStatus::Invalid),
        };
        if bytes > limit || !self.shared.geometry.contains(io.lba, io.blocks) {
            return Err(AppStatus::Invalid);
        }
        Ok(())
    }

    fn request(
        &self,
        cx: &H,
        origin: Origin<H>,
        kind: RequestKind,
        lba: u64,
        blocks: u32,
        payload: Option<H::Payload>,
    ) -> Request<H> {
        Request {
            origin,
            kind,
            lba,
            blocks,
            payload,
            stage: Stage::Held,
            locked: false,
            reserved: false,
            pressing: false,
            logged: None,
            sequence: 0,
            lock_failures: 0,
            started_ns: cx.now_ns(),
            unsent: 0,
            pending: 0,
            done: 0,
            latest: 0,
            missed: 0,
            local_failed: false,
            tried: 0,
            queued: false,
            unit_blocks: u32::MAX,
            pieces: 1,
            legs: Default::default(),
        }
    }

    /// A leg, a notice or a log transaction has ended.
    pub fn complete(&mut self, cx: &mut H, completion: Completion<H>) {
        match completion.token.0 & TOKEN_KIND {
            TOKEN_LOG => self.log_written(cx, completion),
            TOKEN_NOTICE => self.notice_done(cx, completion),
            _ => self.leg_done(cx, completion),
        }
        self.pump(cx);
    }

    /// The manager says something.
    pub fn message(&mut self, cx: &mut H, message: ToChannel<H>) {
        match message {
            ToChannel::Adopt(view) => self.adopt(cx, view),
            ToChannel::Disk(start) => {
                self.released = false;
                self.requested.disk_failed = false;
                self.log.start(self.id, *start);
            }
            ToChannel::Harvest(id) => {
                let pages = self.harvest();
                cx.to_manager(ToManager::Harvested(self.id, id, pages));
            }
            ToChannel::Drain(id, what) => self.drains.push((id, what)),
            ToChannel::Retired(extents) => self.log.retired(&extents),
            ToChannel::Answer(io, answer) => cx.answer(io, answer),
        }
        self.retry_waiting(cx);
        self.pump(cx);
    }

    /// The per-core poller: retries what waits.
    pub fn poll(&mut self, cx: &mut H) {
        if !self.waiting.is_empty() {
            self.retry_waiting(cx);
        }
        self.pump(cx);
    }

    /// Nothing waits for the poller.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty()
            && self.drains.is_empty()
            && self.notices.iter().all(|n| n.queued.is_empty())
    }

    /// Whether a [`poll`](Self::poll) has something to do; if not, it asks the host for nothing, and that stays so until
    /// something else happens here.
    pub fn wants_poll(&self) -> bool {
        self.waiting
            .iter()
            .any(|&index| self.is_worth_retrying(index))
            || (self.view.disk_is_usable() && self.log.has_transaction())
            || (0..MAX_PEERS).any(|slot| self.may_send_notice(slot))
    }

    /// A request waits for something that ends without a call here; for the others such a call tries again.
    fn is_worth_retrying(&self, index: u16) -> bool {
        let Some(request) = self.requests.get(index) else {
            return false;
        };
        match request.stage {
            Stage::Held => {
                self.view.closing || self.view.role != Role::Primary || self.view.permits_io()
            }
            Stage::Log => !self.view.disk_is_usable(),
            Stage::Settle => request.local_failed || self.view.fails_io(),
            Stage::Lock | Stage::Send | Stage::Flight => true,
        }
    }

    /// Requests that have not ended.
    pub fn under_way(&self) -> usize {
        self.requests.len()
    }

    /// Extents that are in this channel's activity log.
    pub fn active_extents(&self) -> usize {
        self.log.active()
    }

    fn adopt(&mut self, cx: &mut H, view: Arc<View>) {
        let old = std::mem::replace(&mut self.view, view);
        let lost: u8 = (0..MAX_PEERS)
            .filter(|&slot| {
                let before = old.peers[slot].send_session;
                before != 0 && before != self.view.peers[slot].send_session
            })
            .fold(0, |mask, slot| mask | 1 << slot);
        self.requested.generation_for = 0;
        let disk_lost = old.disk_is_usable() && !self.view.disk_is_usable();
        for index in self.requests.indices() {
            if self.requests.get(index).is_some() {
                // In the same step as the loss: no write may be without its bit once the manager has been told.
                self.lose_sessions(index, lost);
                if disk_lost {
                    self.lose_disk(index);
                }
            }
        }
        for slot in 0..MAX_PEERS {
            if lost & (1 << slot) != 0 {
                self.notices[slot].queued.clear();
            }
        }
        cx.to_manager(ToManager::Adopted(self.id, self.view.version));
    }

    fn harvest(&mut self) -> Vec<(PeerSlot, HarvestedPages)> {
        self.shards
            .iter_mut()
            .enumerate()
            .filter(|(_, shard)| !shard.is_empty())
            .map(|(slot, shard)| (slot, shard.harvest()))
            .collect()
    }

    /// Everything that may go on because something has ended.
    fn pump(&mut self, cx: &mut H) {
        self.log_pump(cx);
        self.send_notices(cx);
        self.check_drains(cx);
    }

    fn check_drains(&mut self, cx: &mut H) {
        let mut index = 0;
        while index < self.drains.len() {
            let (id, what) = self.drains[index];
            if self.is_drained(what) {
                self.drains.swap_remove(index);
                if what == Drain::Disk && !self.released {
                    self.released = true;
                    self.log.stop();
                    self.forget_log_references();
                    cx.disk_release();
                }
                cx.to_manager(ToManager::Drained(self.id, id));
            } else {
                index += 1;
            }
        }
    }

    /// The log that requests refer to has ended; the next one knows nothing of them.
    fn forget_log_references(&mut self) {
        for index in self.requests.indices() {
            if let Some(request) = self.requests.get_mut(index) {
                request.logged = None;
            }
        }
    }

    fn is_drained(&self, what: Drain) -> bool {
        match what {
            Drain::Disk => {
                self.disk_references == 0
                    && self
                        .requests
                        .iter()
                        .all(|(_, request)| request.unsent & LOCAL_MASK == 0)
            }
            Drain::Notices(slot) => {
                self.notices[slot].queued.is_empty() && self.notices[slot].in_flight == 0
            }
            Drain::EveryNotice => (0..MAX_PEERS).all(|slot| self.is_drained(Drain::Notices(slot))),
            Drain::Application => self.requests.iter().all(|(_, request)| {
                request.stage == Stage::Held || !matches!(request.origin, Origin::Application(_))
            }),
            Drain::ApplicationUntil(until_ns) => self.requests.iter().all(|(_, request)| {
                request.stage == Stage::Held
                    || request.started_ns > until_ns
                    || !matches!(request.origin, Origin::Application(_))
            }),
            Drain::Received(peer) => {
                let current = self.view.peers[peer].recv_session;
                mutation::is(Mutation::SessionBeforeDrained) || self.requests.iter().all(|(_, request)| {
                    !matches!(request.origin, Origin::Peer { slot, session, .. } if slot == peer && session != current)
                })
            }
        }
    }

    fn token(kind: u64, detail: usize) -> Token {
        Token(kind | detail as u64)
    }
}
