//! The application: submits I/O with content that tells who wrote it, and checks what it reads.

use super::{What, World};
use crate::engine::channel::AppIo;
use crate::engine::request::RequestKind;
use crate::host::AppStatus;
use crate::hosts::sim::ledger::content;
use crate::hosts::sim::memory::{Bytes, Payload};

use super::AppWork;

/// One write in so many is looked for on all disks when it ends.
const LOOKS_ONE_IN: u64 = 4;

impl World {
    /// Submits an I/O and returns its number.
    pub fn submit(
        &mut self,
        node: usize,
        core: usize,
        kind: RequestKind,
        lba: u64,
        blocks: u32,
    ) -> u64 {
        let id = self.id();
        let block = self.config.block_size as usize;
        let memory = match kind {
            RequestKind::Write { .. } => Some(Bytes::Held(content(id, lba, blocks, block))),
            RequestKind::Read => Some(Bytes::fresh(blocks as usize * block)),
            _ => None,
        };
        if let Some(written) = written(id, kind) {
            self.ledger.submitted(id, written, lba, blocks);
            let zeroes = (written == 0).then(|| lba..lba + u64::from(blocks));
            self.writes.submitted(id, zeroes);
        }
        if kind == RequestKind::Read && self.checks_content {
            self.ledger.read_begins(id, lba, blocks);
        }
        self.note(node, || format!("app {id}: {kind:?} {lba}+{blocks}"));
        self.apps.insert(
            id,
            AppWork {
                node,
                incarnation: self.nodes[node].incarnation,
                core,
                kind,
                lba,
                blocks,
                memory: memory.map(Payload::new),
                mark: self.ledger.flush_mark(),
                cache_lost: false,
                status: None,
            },
        );
        self.offer(id);
        id
    }

    pub(super) fn offer(&mut self, id: u64) {
        let Some(app) = self.apps.get(&id) else {
            return;
        };
        let (node, core) = (app.node, app.core);
        if app.incarnation != self.nodes[node].incarnation {
            return;
        }
        let io = AppIo {
            kind: app.kind,
            lba: app.lba,
            blocks: app.blocks,
            payload: app.memory.clone(),
            io: id,
        };
        let mut refused = false;
        self.with_channel(node, core, |channel, cx| {
            refused = channel.submit(cx, io).is_err();
        });
        if refused {
            self.schedule_here(node, 100_000, What::Submit(id));
        }
    }

    pub(super) fn finished(&mut self, id: u64, status: AppStatus) {
        let Some(app) = self.apps.get_mut(&id) else {
            panic!("[I11] the end of an I/O that does not exist");
        };
        assert!(app.status.is_none(), "[I11] I/O {id} ended twice");
        app.status = Some(status);
        let memory = app.memory.as_ref().map(Payload::take_back);
        let (node, kind, lba, blocks, mark) = (app.node, app.kind, app.lba, app.blocks, app.mark);
        let cache_lost = app.cache_lost;
        self.note(node, || format!("app {id} ended: {status:?}"));
        let is_volatile = matches!(
            kind,
            RequestKind::Write { fua: false }
                | RequestKind::WriteZeroes { fua: false }
                | RequestKind::Unmap
        );
        // What was acknowledged out of a cache may have gone with it before the application heard of it.
        if status != AppStatus::Ok || (is_volatile && cache_lost) {
            return self.forget(id, kind, lba, blocks);
        }
        self.check_leave(node, id, kind);
        match kind {
            RequestKind::Write { fua } | RequestKind::WriteZeroes { fua } => {
                self.ledger.acknowledged(id, lba, blocks, fua);
                self.writes.ended(id, self.next_id, true);
                let is_write = matches!(kind, RequestKind::Write { .. });
                if is_write && self.checks_content && id % LOOKS_ONE_IN == 0 {
                    self.check_generation(node, id, lba);
                }
            }
            RequestKind::Unmap => {
                self.ledger.acknowledged(id, lba, blocks, false);
                self.writes.ended(id, self.next_id, true);
            }
            RequestKind::Flush => self.ledger.flushed(mark),
            RequestKind::Read | RequestKind::ResyncRead => {
                let block = self.config.block_size as usize;
                let memory = memory.unwrap_or(Bytes::Zeroes(0));
                if !self.checks_content {
                    return self.forget(id, kind, lba, blocks);
                }
                if let Err(text) = self.ledger.read_ends(id, lba, memory.bytes(), block) {
                    panic!(
                        "[linearizability] read {id} on node {node}: {text}\n{}",
                        self.describe()
                    );
                }
            }
        }
    }

    /// The application does not hear whether it was done.
    pub(super) fn forget(&mut self, id: u64, kind: RequestKind, lba: u64, blocks: u32) {
        match kind {
            RequestKind::Read | RequestKind::ResyncRead => {
                self.ledger.read_is_void(id, lba, blocks);
            }
            RequestKind::Flush => {}
            _ => {
                self.ledger.unknown(id, lba, blocks);
                self.writes.ended(id, self.next_id, false);
            }
        }
    }

    /// Submits, and waits for the end.
    pub fn io(&mut self, node: usize, kind: RequestKind, lba: u64, blocks: u32) -> AppStatus {
        let core = self.random.below(self.config.cores as u64) as usize;
        let id = self.submit(node, core, kind, lba, blocks);
        self.run_until("the I/O has ended", 30 * super::SECOND, |world| {
            world.apps[&id].status.is_some()
        });
        self.apps[&id].status.unwrap_or(AppStatus::Failed)
    }

    /// Writes, and waits until it is acknowledged.
    pub fn write(&mut self, node: usize, lba: u64, blocks: u32) {
        let status = self.io(node, RequestKind::Write { fua: false }, lba, blocks);
        assert_eq!(status, AppStatus::Ok, "{}", self.describe());
    }

    /// Reads, and checks what is read.
    pub fn read(&mut self, node: usize, lba: u64, blocks: u32) {
        let status = self.io(node, RequestKind::Read, lba, blocks);
        assert_eq!(status, AppStatus::Ok, "{}", self.describe());
    }

    /// Submits a write of a few blocks somewhere that no other write under way touches.
    pub fn submit_random_write(&mut self, node: usize) -> Option<u64> {
        let size_blocks = self.config.volume_bytes / u64::from(self.config.block_size);
        let blocks = 1 + self.random.below(24) as u32;
        // Near one of a few places, so that writes meet each other and the same extents again.
        let place = self.random.below(16) * (size_blocks / 16);
        let lba = (place + self.random.below(128)).saturating_sub(32);
        let end = lba + u64::from(blocks);
        let busy = self.apps.values().any(|app| {
            app.status.is_none() && app.lba < end && lba < app.lba + u64::from(app.blocks)
        });
        if busy {
            return None;
        }
        let core = self.random.below(self.config.cores as u64) as usize;
        let kind = match self.random.below(10) {
            0 => RequestKind::WriteZeroes { fua: false },
            1 => RequestKind::Unmap,
            2 => RequestKind::Write { fua: true },
            _ => RequestKind::Write { fua: false },
        };
        Some(self.submit(node, core, kind, lba, blocks))
    }

    pub fn submit_random_read(&mut self, node: usize) {
        let size_blocks = self.config.volume_bytes / u64::from(self.config.block_size);
        let lba = self.random.below(16) * (size_blocks / 16) + self.random.below(128);
        let core = self.random.below(self.config.cores as u64) as usize;
        self.submit(node, core, RequestKind::Read, lba, 8);
    }

    /// No application I/O is under way.
    pub fn wait_for_io(&mut self) {
        self.run_until(
            "all application I/O has ended",
            30 * super::SECOND,
            |world| world.apps.values().all(|app| app.status.is_some()),
        );
        self.apps.clear();
    }
}

/// Whose content a write leaves behind.
fn written(id: u64, kind: RequestKind) -> Option<u64> {
    match kind {
        RequestKind::Write { .. } => Some(id),
        RequestKind::WriteZeroes { .. } | RequestKind::Unmap => Some(0),
        _ => None,
    }
}
