//! Writes metadata: superblocks one place after the other, bitmap pages with a flush behind them. One job runs at a
//! time; whoever comes meanwhile shares the next one.

use super::steps::Then;
use super::{Manager, ManagerIo};
use crate::engine::MAX_PEERS;
use crate::engine::meta::bitmap_page;
use crate::engine::meta::block::{BLOCK_SIZE, Block};
use crate::engine::meta::generation::Generations;
use crate::engine::mutation::{self, Mutation};
use crate::host::{Data, DiskIo, DiskOp, Host, IoStatus};

/// Page writes in flight.
const PAGES_IN_FLIGHT: u32 = 16;

enum Job {
    Superblock {
        /// What is still to be written, the next one last.
        plan: Vec<(u64, Block)>,
        generations: Box<Generations>,
    },
    Pages {
        /// (slot, page) still to be written.
        todo: Vec<(usize, u32)>,
        flushed: bool,
    },
}

pub(super) struct MetadataWriter<H: Host> {
    /// There is a disk to write to.
    pub(super) enabled: bool,
    job: Option<Job>,
    in_flight: u32,
    /// Of the running job.
    thens: Vec<Then>,
    want_superblock: Vec<Then>,
    want_pages: Vec<Then>,
    failed: bool,
    host: std::marker::PhantomData<fn(H)>,
}

impl<H: Host> MetadataWriter<H> {
    pub(super) fn new() -> Self {
        Self {
            enabled: false,
            job: None,
            in_flight: 0,
            thens: Vec::new(),
            want_superblock: Vec::new(),
            want_pages: Vec::new(),
            failed: false,
            host: std::marker::PhantomData,
        }
    }

    /// There is a disk, of which nothing is known yet: what was in flight on the last one when that was let go may have failed.
    pub(super) fn start(&mut self) {
        self.enabled = true;
        self.failed = false;
    }

    /// Metadata I/O that the disk has.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }
}

impl<H: Host> Manager<H> {
    /// Makes the superblock durable as it stands, or as it stands later.
    pub(super) fn commit_superblock(&mut self, cx: &mut H, then: Then) {
        self.metadata.want_superblock.push(then);
        self.pump_metadata(cx);
    }

    /// Makes the bitmaps durable as they stand, and everything that the device has completed.
    pub(super) fn commit_pages(&mut self, cx: &mut H, then: Then) {
        self.metadata.want_pages.push(then);
        self.pump_metadata(cx);
    }

    /// No disk from now on: whatever waits for it goes on without.
    pub(super) fn disable_metadata(&mut self) {
        let writer = &mut self.metadata;
        writer.enabled = false;
        if writer.in_flight == 0 {
            writer.job = None;
            self.ready.extend(writer.thens.drain(..));
        }
        self.ready.extend(writer.want_pages.drain(..));
        self.ready.extend(writer.want_superblock.drain(..));
    }

    pub(super) fn poll_metadata(&mut self, cx: &mut H) {
        self.pump_metadata(cx);
    }

    pub(super) fn pump_metadata(&mut self, cx: &mut H) {
        loop {
            if !self.metadata.enabled {
                if self.metadata.job.is_some()
                    || !self.metadata.want_pages.is_empty()
                    || !self.metadata.want_superblock.is_empty()
                {
                    self.disable_metadata();
                }
                return;
            }
            if self.metadata.job.is_none() && !self.start_job() {
                return;
            }
            if !self.feed_job(cx) {
                return;
            }
        }
    }

    fn start_job(&mut self) -> bool {
        let writer = &mut self.metadata;
        if !writer.want_pages.is_empty() {
            let mut todo = Vec::new();
            for slot in 0..MAX_PEERS.min(usize::from(self.superblock.layout.peer_slots())) {
                for page in self.masters[slot].take_dirty_pages(usize::MAX) {
                    todo.push((slot, page));
                }
            }
            writer.thens.append(&mut writer.want_pages);
            writer.job = Some(Job::Pages {
                todo,
                flushed: mutation::is(Mutation::RetireWithoutFlush),
            });
            return true;
        }
        if !writer.want_superblock.is_empty() {
            self.superblock.sequence += 1;
            let mut plan = match self.superblock.write_plan() {
                Ok(plan) => plan,
                Err(error) => {
                    debug_assert!(false, "an invalid superblock: {error}");
                    writer.failed = true;
                    Vec::new()
                }
            };
            plan.reverse();
            writer.thens.append(&mut writer.want_superblock);
            writer.job = Some(Job::Superblock {
                plan,
                generations: Box::new(self.superblock.generations.clone()),
            });
            return true;
        }
        false
    }

    /// Gives the job's next I/O to the disk; true when the job has ended.
    fn feed_job(&mut self, cx: &mut H) -> bool {
        loop {
            if self.metadata.failed && self.metadata.in_flight == 0 {
                self.metadata.failed = false;
                self.disk_failed(cx);
                self.disable_metadata();
                return false;
            }
            let Some((io, bytes)) = self.next_io() else {
                return self.metadata.in_flight == 0 && self.finish_job();
            };
            let Some(data) = self.metadata_buffer(cx, bytes) else {
                return false;
            };
            let token = self.token(ManagerIo::Metadata);
            if cx.disk(token, io, data).is_err() {
                self.take_io(token);
                return false;
            }
            self.metadata.in_flight += 1;
            match &mut self.metadata.job {
                Some(Job::Superblock { plan, .. }) => drop(plan.pop()),
                Some(Job::Pages { todo, .. }) if io.op != DiskOp::Flush => drop(todo.pop()),
                Some(Job::Pages { flushed, .. }) => *flushed = true,
                None => {}
            }
        }
    }

    fn metadata_buffer(&mut self, cx: &mut H, bytes: Option<Block>) -> Option<Data<H>> {
        let Some(bytes) = bytes else {
            return Some(Data::None);
        };
        let mut buffer = cx.buffer(BLOCK_SIZE)?;
        buffer.as_mut()[..BLOCK_SIZE].copy_from_slice(&bytes);
        Some(Data::Buffer(buffer))
    }

    /// Whether a pump has something to do that is not waiting for the disk.
    pub(super) fn metadata_is_due(&self) -> bool {
        let writer = &self.metadata;
        let wants = !writer.want_pages.is_empty() || !writer.want_superblock.is_empty();
        match (&writer.job, writer.enabled) {
            (Some(_), true) => writer.in_flight == 0 || self.has_next_io(),
            (None, true) => wants,
            (job, false) => wants || (job.is_some() && writer.in_flight == 0),
        }
    }

    fn has_next_io(&self) -> bool {
        let in_flight = self.metadata.in_flight;
        match &self.metadata.job {
            // Never two at once: the first must be whole before the second is touched.
            Some(Job::Superblock { plan, .. }) => in_flight == 0 && !plan.is_empty(),
            Some(Job::Pages { todo, .. }) if !todo.is_empty() => in_flight < PAGES_IN_FLIGHT,
            Some(Job::Pages { flushed, .. }) => in_flight == 0 && !flushed,
            None => false,
        }
    }

    fn next_io(&self) -> Option<(DiskIo, Option<Block>)> {
        if !self.has_next_io() {
            return None;
        }
        let write = |offset| DiskIo {
            op: DiskOp::Write { fua: true },
            offset,
            len: BLOCK_SIZE as u64,
        };
        match self.metadata.job.as_ref()? {
            Job::Superblock { plan, .. } => plan
                .last()
                .map(|&(offset, block)| (write(offset), Some(block))),
            Job::Pages { todo, .. } if !todo.is_empty() => {
                let &(slot, page) = todo.last()?;
                let mut block = [0; BLOCK_SIZE];
                bitmap_page::emit(self.masters[slot].page(page), page, &mut block);
                let offset = self.superblock.layout.bitmap_page_offset(slot as u8, page);
                Some((
                    DiskIo {
                        op: DiskOp::Write { fua: false },
                        ..write(offset)
                    },
                    Some(block),
                ))
            }
            Job::Pages { .. } => Some((
                DiskIo {
                    op: DiskOp::Flush,
                    offset: 0,
                    len: 0,
                },
                None,
            )),
        }
    }

    /// True when the job was really at its end.
    fn finish_job(&mut self) -> bool {
        match &self.metadata.job {
            Some(Job::Superblock { plan, generations }) if plan.is_empty() => {
                self.durable = (**generations).clone();
            }
            Some(Job::Pages { todo, flushed }) if todo.is_empty() && *flushed => {}
            _ => return false,
        }
        self.metadata.job = None;
        self.ready.extend(self.metadata.thens.drain(..));
        true
    }

    pub(super) fn metadata_done(&mut self, cx: &mut H, status: IoStatus) {
        self.metadata.in_flight -= 1;
        self.metadata.failed |= status != IoStatus::Ok;
        self.pump_metadata(cx);
    }
}
