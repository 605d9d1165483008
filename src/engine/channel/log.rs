//! The channel's activity log: when its transactions are written and how extents leave it again.

use std::ops::RangeInclusive;

use super::{Channel, TOKEN_LOG};
use crate::engine::message::{DiskStart, ToManager};
use crate::engine::meta::activity_log::ring::RingId;
use crate::engine::meta::activity_log::{ActivityLog, Begin, TxnToWrite};
use crate::engine::meta::block::BLOCK_SIZE;
use crate::engine::meta::layout::Layout;
use crate::host::{ChannelId, Completion, Data, DiskIo, DiskOp, Host, IoStatus};

/// The log and where it is written; without a disk there is none.
pub(super) struct Log<H: Host> {
    open: Option<Open>,
    buffer: Option<H::Buffer>,
    /// The number of the transaction that is being written.
    writing: Option<u64>,
    /// A transaction that stands in the buffer and that the host has not taken.
    unsent: Option<TxnToWrite>,
    retiring: bool,
    /// A request found no room.
    full: bool,
}

struct Open {
    log: ActivityLog,
    limit: usize,
    layout: Layout,
}

impl<H: Host> Log<H> {
    pub(super) fn new() -> Self {
        Self {
            open: None,
            buffer: None,
            writing: None,
            unsent: None,
            retiring: false,
            full: false,
        }
    }

    /// With a fresh log: what the ring on disk says has become bits.
    pub(super) fn start(&mut self, channel: ChannelId, start: DiskStart) {
        let id = RingId::new(start.volume.as_bytes(), channel as u16);
        self.open = Some(Open {
            log: ActivityLog::new(
                start.al_extents,
                id,
                start.layout.al_ring_blocks(),
                start.al_number,
            ),
            limit: start.al_extents,
            layout: start.layout,
        });
        self.unsent = None;
        self.retiring = false;
        self.full = false;
    }

    pub(super) fn stop(&mut self) {
        self.open = None;
        self.unsent = None;
    }

    pub(super) fn active(&self) -> usize {
        self.open.as_ref().map_or(0, |open| open.log.len())
    }

    /// There is a transaction for the disk, which has none of this log.
    pub(super) fn has_transaction(&self) -> bool {
        let is_gathered = |open: &Open| self.unsent.is_some() || open.log.has_misses();
        self.writing.is_none() && self.open.as_ref().is_some_and(is_gathered)
    }

    /// Whether the extents are in the log on disk: `Ok` with the transaction that holds the references, or `Err` with
    /// the transaction that was joined, if there was room.
    pub(super) fn enter(
        &mut self,
        extents: RangeInclusive<u32>,
        joined: Option<u64>,
    ) -> Result<u64, Option<u64>> {
        let Some(open) = &mut self.open else {
            return Err(None);
        };
        let transaction = match joined {
            Some(transaction) => transaction,
            None => match open.log.begin(extents) {
                Begin::Ready => return Ok(0),
                Begin::Join(transaction) => transaction,
                Begin::Full => {
                    self.full = true;
                    return Err(None);
                }
            },
        };
        if open.log.is_durable(transaction) {
            Ok(transaction)
        } else {
            Err(Some(transaction))
        }
    }

    pub(super) fn leave(&mut self, extents: RangeInclusive<u32>) {
        if let Some(open) = &mut self.open {
            open.log.end(extents);
        }
    }

    pub(super) fn retired(&mut self, extents: &[u32]) {
        self.retiring = false;
        if let Some(open) = &mut self.open {
            open.log.retired(extents);
        }
    }
}

impl<H: Host> Channel<H> {
    pub(super) fn log_pump(&mut self, cx: &mut H) {
        if !self.view.disk_is_usable() {
            return;
        }
        self.write_transaction(cx);
        let Some(open) = &mut self.log.open else {
            return;
        };
        if !self.log.retiring && (self.log.full || open.log.needs_retire()) {
            let extents: Vec<u32> = open.log.retire_candidates(open.limit.div_ceil(4));
            if !extents.is_empty() {
                self.log.retiring = true;
                self.log.full = false;
                let pages = self.harvest();
                cx.to_manager(ToManager::Retire(self.id, extents, pages));
            }
        }
    }

    fn write_transaction(&mut self, cx: &mut H) {
        if !self.log.has_transaction() {
            return;
        }
        let Some(open) = &mut self.log.open else {
            return;
        };
        let transaction = match self.log.unsent.take() {
            Some(transaction) => transaction,
            None => {
                let Some(mut buffer) = self.log.buffer.take().or_else(|| cx.buffer(BLOCK_SIZE))
                else {
                    return;
                };
                let block = buffer.as_mut().first_chunk_mut::<BLOCK_SIZE>();
                let transaction = block.and_then(|block| open.log.next_transaction(block));
                self.log.buffer = Some(buffer);
                match transaction {
                    Some(transaction) => transaction,
                    None => return,
                }
            }
        };
        let Some(buffer) = self.log.buffer.take() else {
            return;
        };
        let io = DiskIo {
            op: DiskOp::Write { fua: true },
            offset: open
                .layout
                .al_block_offset(self.id as u16, transaction.ring_index),
            len: BLOCK_SIZE as u64,
        };
        let token = Self::token(TOKEN_LOG, 0);
        match cx.disk(token, io, Data::Buffer(buffer)) {
            Ok(()) => {
                self.log.writing = Some(transaction.number);
                self.disk_references += 1;
            }
            Err(data) => {
                self.log.unsent = Some(transaction);
                if let Data::Buffer(buffer) = data {
                    self.log.buffer = Some(buffer);
                }
            }
        }
    }

    pub(super) fn log_written(&mut self, cx: &mut H, completion: Completion<H>) {
        self.disk_references -= 1;
        if let Data::Buffer(buffer) = completion.data {
            self.log.buffer = Some(buffer);
        }
        let number = self.log.writing.take();
        if completion.status == IoStatus::Ok {
            if let (Some(open), Some(number)) = (&mut self.log.open, number) {
                open.log.transaction_done(number);
            }
        } else {
            self.report_disk_failed(cx);
        }
        self.retry_waiting(cx);
    }
}
