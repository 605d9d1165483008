//! The backing device: it is attached, fails, and is let go. What a crash left in the activity logs becomes bits
//! before anything else is written.

use super::Manager;
use super::orders::busy;
use super::steps::{DiskStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::{DiskStart, Drain, OrderError, OrderErrorKind, ToChannel};
use crate::engine::meta::generation::{JUST_CREATED, NONE};
use crate::engine::meta::superblock::{self, PersistedDisk};
use crate::engine::mutation::{self, Mutation};
use crate::engine::open::Opened;
use crate::engine::peer::state::{DiskState, Role};
use crate::engine::volume::EXTENT_BYTES;
use crate::host::{Host, PeerSlot};

/// How long a Primary that attaches a disk again waits for a peer before its I/O fails.
const REATTACH_NS: u64 = 10_000_000_000;

impl<H: Host> Manager<H> {
    /// Starts using a device that has been opened. Channels get it when its metadata says that it is in use.
    pub fn attach(&mut self, cx: &mut H, opened: Opened) {
        if self.is_promoting() {
            // Peers are being told that this node goes on without its disk.
            cx.disk_close();
            let text = "the volume is being promoted; try again";
            self.attach_ended(cx, busy(text));
            return self.run(cx);
        }
        self.view.disk = DiskState::Attaching;
        if self.view.role == Role::Primary {
            // What has begun may need a generation of what the peers have, and this disk has another past.
            self.opened = Some(Box::new(opened));
            self.hold_for_attach(cx);
        } else {
            self.take_disk(cx, opened);
        }
        self.run(cx);
    }

    fn hold_for_attach(&mut self, cx: &mut H) {
        self.view.suspended = true;
        self.adopt(cx, Then::Disk(DiskStep::AttachHeld));
    }

    /// From here on this node is what its disk says.
    fn take_disk(&mut self, cx: &mut H, opened: Opened) {
        let geometry = self.shared.geometry;
        // What this node was last told is durable here or at a peer, whatever this disk says.
        let saw = self.exposed.unwrap_or(self.durable.current);
        // One that was being written when the disk failed, and is there after all, is newer than that.
        let generations = &opened.superblock.generations;
        let has_it = generations.current == saw || generations.history_contains(saw);
        self.exposed = (!has_it).then_some(saw);
        let told = self.superblock.generations.current;
        self.was_told = told != self.durable.current
            && told != generations.current
            && self.peers.iter().any(|peer| peer.node_id.is_some());
        let may_be_there = self.was_told && self.view.role == Role::Primary;
        self.void_generation(may_be_there.then_some(told));
        self.superblock = opened.superblock;
        self.durable = self.superblock.generations.clone();
        for (slot, index, page) in opened.pages {
            if mutation::is(Mutation::PagesForgotten) {
                break;
            }
            self.masters[slot].adopt_page(index, page);
        }
        for &(slot, index) in &opened.damaged_pages {
            let first = u64::from(index) * u64::from(crate::engine::bitmap::page::BITS_PER_PAGE);
            let end = (first + u64::from(crate::engine::bitmap::page::BITS_PER_PAGE))
                .min(geometry.bits());
            self.masters[slot].or_range(first..end);
        }
        self.keep_peers();
        let crashed = self.superblock.flags.attached;
        self.unclean = crashed && (!opened.active_extents.is_empty() || opened.log_damaged);
        if crashed {
            let per_extent = EXTENT_BYTES >> geometry.granularity_log2;
            for slot in 0..MAX_PEERS {
                if self.superblock.peers[slot].is_none() {
                    continue;
                }
                for &extent in &opened.active_extents {
                    let first = u64::from(extent) * per_extent;
                    let end = (first + per_extent).min(geometry.bits());
                    self.masters[slot].or_range(first..end);
                }
                if opened.log_damaged {
                    self.masters[slot].set_all();
                }
            }
        }
        if !mutation::is(Mutation::BitsNotWrittenAgain) {
            // Pages that were on their way to a disk when it failed, or was let go, count as written.
            for master in &mut self.masters {
                master.mark_set_dirty();
            }
        }
        self.log_sequences = opened.log_numbers;
        self.metadata.start();
        self.shared.set_disk_failed(false);
        self.view.own_disk_may_miss = false;
        if std::mem::take(&mut self.disk_is_behind)
            && self.view.role == Role::Secondary
            && matches!(
                self.superblock.disk,
                PersistedDisk::UpToDate | PersistedDisk::Consistent
            )
        {
            // It does not know what was written without it. A Primary waits for who does.
            self.superblock.disk = PersistedDisk::Outdated;
        }
        self.superblock.flags.attached = true;
        self.superblock.flags.primary |= self.view.role == Role::Primary;
        self.commit_pages(cx, Then::Nothing);
        self.commit_superblock(cx, Then::Disk(DiskStep::AttachDurable));
    }

    /// The peers are those that the operator has named, even if the disk failed before it was told of the last.
    fn keep_peers(&mut self) {
        for slot in 0..MAX_PEERS {
            let node_id = self.peers[slot].node_id;
            let known = self.superblock.peers[slot].map(|peer| peer.node_id);
            if node_id == known {
                continue;
            }
            self.name_peer(slot, node_id);
            if node_id.is_some() {
                self.masters[slot].set_all();
            }
            self.generation_may_be_shared();
        }
    }

    /// Whose slot this is from now on; nothing is known of what that one has.
    pub(super) fn name_peer(&mut self, slot: PeerSlot, node_id: Option<u8>) {
        let is_partial = self.superblock.disk == PersistedDisk::Inconsistent
            && self.superblock.generations.current != JUST_CREATED;
        self.superblock.peers[slot] = node_id.map(|node_id| superblock::PeerSlot {
            node_id,
            disk_state: DiskState::DUnknown.as_u8(),
            // What it lacks has no bits for a new slot.
            full_sync: is_partial,
        });
        self.superblock.generations.bitmap[slot] = NONE;
        // That nothing is known of what it lacks does not count it in.
        self.superblock.flags.told = false;
        self.masters[slot].clear_all();
        self.masters[slot].mark_all_dirty();
    }

    /// Writes the disk state into the superblock, where it is one that outlives an attach.
    pub(super) fn record_disk(&mut self) {
        self.superblock.disk = match self.view.disk {
            DiskState::UpToDate => PersistedDisk::UpToDate,
            DiskState::Consistent => PersistedDisk::Consistent,
            DiskState::Outdated => PersistedDisk::Outdated,
            DiskState::Inconsistent => PersistedDisk::Inconsistent,
            _ => self.superblock.disk,
        };
    }

    fn persisted_disk(&self) -> DiskState {
        match self.superblock.disk {
            PersistedDisk::UpToDate => DiskState::UpToDate,
            PersistedDisk::Consistent => DiskState::Consistent,
            PersistedDisk::Outdated => DiskState::Outdated,
            PersistedDisk::Inconsistent => DiskState::Inconsistent,
        }
    }

    pub(super) fn disk_step(&mut self, cx: &mut H, step: DiskStep) {
        match step {
            DiskStep::AttachDurable => self.attach_durable(cx),
            DiskStep::AttachHeld => {
                self.drain(cx, Drain::Application, Then::Disk(DiskStep::AttachQuiet))
            }
            DiskStep::AttachQuiet => match self.opened.take() {
                Some(opened) if self.view.disk == DiskState::Attaching && !self.closing => {
                    self.take_disk(cx, *opened);
                }
                _ => self.attach_quiet(cx),
            },
            DiskStep::Attached => {
                self.hello_changed(cx);
                self.attach_ended(cx, Ok(()));
            }
            DiskStep::FailedAdopted => {
                self.drain(cx, Drain::EveryNotice, Then::Disk(DiskStep::FailedNoticed))
            }
            DiskStep::FailedNoticed => self.failed_noticed(cx),
            DiskStep::FailedDrained => {
                self.view.disk = DiskState::Diskless;
                self.tell_all();
                self.adopt(cx, Then::Disk(DiskStep::Released));
            }
            DiskStep::Released => self.when_quiet(Then::Disk(DiskStep::Quiet)),
            DiskStep::Quiet => cx.disk_close(),
            DiskStep::SyncedDurable(slot, epoch) => self.synced(cx, slot, epoch),
        }
    }

    fn attach_durable(&mut self, cx: &mut H) {
        if self.view.role == Role::Primary {
            // What has begun has nothing but the sessions that are about to end.
            self.hold_for_attach(cx);
        } else {
            self.attach_quiet(cx);
        }
    }

    fn attach_quiet(&mut self, cx: &mut H) {
        // Until the disk is in use, or has failed.
        self.view.suspended = false;
        if !self.metadata.enabled || self.view.disk != DiskState::Attaching {
            let text = "the disk failed or was let go while it was attached";
            self.adopt(cx, Then::Nothing);
            return self.attach_ended(cx, Err(OrderError::new(OrderErrorKind::Io, text)));
        }
        for &channel in &self.channels {
            let start = DiskStart {
                layout: self.superblock.layout.clone(),
                volume: uuid::Uuid::from_bytes(self.superblock.volume_uuid),
                al_extents: self.superblock.al_extents as usize,
                al_number: self.log_sequences.get(channel).copied().unwrap_or(1),
            };
            cx.to_channel(channel, ToChannel::Disk(Box::new(start)));
        }
        self.view.disk = self.persisted_disk();
        if self.view.role == Role::Primary {
            // What the application has written meanwhile is elsewhere; it waits until this disk has been compared.
            if self.view.disk == DiskState::UpToDate {
                self.view.disk = DiskState::Consistent;
            }
            self.view.suspended = true;
            self.reattach_until_ns = Some(cx.now_ns() + REATTACH_NS);
        } else if (self.exposed.is_some() || self.was_told) && self.view.disk == DiskState::UpToDate
        {
            self.view.disk = DiskState::Consistent;
        }
        // Sessions that know this node without a disk have to be made anew: their decision was another.
        for slot in 0..MAX_PEERS {
            if self.peers[slot].established {
                self.lose_session(cx, slot, "a disk was attached");
                self.peers[slot].retry_at_ns = 0;
            }
        }
        self.adopt(cx, Then::Disk(DiskStep::Attached));
    }

    /// A peer has been compared with, or none can be.
    pub(super) fn end_reattach(&mut self, cx: &mut H) {
        if self.reattach_until_ns.take().is_some() {
            self.view.suspended = mutation::is(Mutation::SuspendedForEver);
            self.adopt(cx, Then::Nothing);
        }
    }

    /// The device failed an I/O, of whoever's.
    pub(super) fn disk_failed(&mut self, cx: &mut H) {
        if self.view.disk <= DiskState::Failed && self.view.disk != DiskState::Attaching {
            return;
        }
        self.view.disk = DiskState::Failed;
        self.shared.set_disk_failed(true);
        self.disable_metadata();
        if let Some(slot) = self.source() {
            self.lose_session(cx, slot, "the disk failed");
        }
        self.tell_all();
        self.hello_changed(cx);
        self.adopt(cx, Then::Disk(DiskStep::FailedAdopted));
    }

    fn failed_noticed(&mut self, cx: &mut H) {
        if self.goes_on_without_disk() {
            self.start_generation(cx, 0, true);
        }
        self.drain(cx, Drain::Disk, Then::Disk(DiskStep::FailedDrained));
    }

    /// A Primary whose peers have the data.
    pub(super) fn goes_on_without_disk(&self) -> bool {
        self.view.role == Role::Primary && self.view.peers.iter().any(|peer| peer.has_latest())
    }
}
