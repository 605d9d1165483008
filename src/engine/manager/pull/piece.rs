//! One piece of a resync: registered where every channel sees it, fetched, and written under the range lock, without the
//! granules that a write has overtaken meanwhile. No write ever waits for the network here, only for a piece that is
//! already on its way to the disk.

use super::{PRESS_AFTER, Piece, PullIo, RETRY_NS, Stage};
use crate::engine::manager::{Manager, ManagerIo};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::{PeerCommand, Span};
use crate::engine::volume::GRANULE_BYTES;
use crate::host::{Data, DiskIo, DiskOp, Host, IoStatus, PeerRefusal};

impl<H: Host> Manager<H> {
    pub(super) fn advance_piece(&mut self, cx: &mut H, index: usize) {
        let Some(piece) = &mut self.puller.pieces[index] else {
            return;
        };
        match &mut piece.stage {
            Stage::Ask(not_before_ns) => {
                if cx.now_ns() >= *not_before_ns {
                    self.ask_for_piece(cx, index);
                }
            }
            Stage::Fetching => {}
            Stage::Lock(_) => self.lock_piece(cx, index),
            Stage::Write(..) => self.write_piece(cx, index),
        }
    }

    fn ask_for_piece(&mut self, cx: &mut H, index: usize) {
        let (Some(slot), Some(piece)) = (self.puller.slot, &mut self.puller.pieces[index]) else {
            return;
        };
        let geometry = self.shared.geometry;
        let (lba, blocks) = (piece.lba, piece.blocks);
        let granules = geometry.granules_of(lba, blocks);
        let len = blocks as usize * geometry.block_size as usize;
        let buffer = cx.buffer(len.next_multiple_of(4096));
        let (Some(buffer), Some(span)) = (buffer, Span::new(lba, blocks)) else {
            // Who has the buffers may be waiting for this range.
            self.piece_stop_waiting(index);
            if let Some(piece) = &mut self.puller.pieces[index] {
                piece.lock_failures = 0;
                piece.stage = Stage::Ask(cx.now_ns() + RETRY_NS / 4);
            }
            return;
        };
        // A write that has its range already may be on its way to the source still, and the source's data without it:
        // it is waited for. One that takes its range after the registration sees that and leaves a mark.
        let unlocked = mutation::is(Mutation::PullUnlocked);
        if !unlocked && !self.piece_takes_range(index) {
            return;
        }
        self.shared.touched.clear_range(granules.clone());
        self.shared.partial.clear_range(granules.clone());
        self.shared.pulls.set_range(granules.clone());
        if !unlocked {
            self.piece_unlock(index);
        }
        let Some(piece) = &mut self.puller.pieces[index] else {
            return;
        };
        piece.stage = Stage::Fetching;
        let next = || self.shared.next_control_sequence(slot);
        let command = PeerCommand::ResyncRead {
            session: self.peers[slot].session,
            span,
            must_include: 0,
            sequence: *piece.read.get_or_insert_with(next),
        };
        let token = self.token(ManagerIo::Pull(PullIo::Fetched(index)));
        match cx.peer(slot, token, &command, Data::Buffer(buffer), 0..len) {
            Ok(()) => {}
            Err(refusal) => {
                self.take_io(token);
                self.shared.pulls.clear_range(granules);
                if let Some(piece) = &mut self.puller.pieces[index] {
                    piece.stage = Stage::Ask(cx.now_ns() + RETRY_NS);
                }
                if let PeerRefusal::Down(_) = refusal {
                    self.lose_session(cx, slot, "the link is down");
                }
            }
        }
    }

    pub(super) fn piece_fetched(
        &mut self,
        cx: &mut H,
        index: usize,
        status: IoStatus,
        answer: PeerAnswer,
        buffer: Option<H::Buffer>,
    ) {
        let Some(piece) = &mut self.puller.pieces[index] else {
            return;
        };
        let (true, Some(slot)) = (!piece.dead, self.puller.slot) else {
            if mutation::is(Mutation::LateBufferKept) {
                std::mem::forget(buffer);
            }
            self.puller.pieces[index] = None;
            return;
        };
        let granules = self.shared.geometry.granules_of(piece.lba, piece.blocks);
        match (status, answer) {
            (IoStatus::Ok, PeerAnswer::Ok) => {
                self.puller.fetched_bytes +=
                    u64::from(piece.blocks) * u64::from(self.shared.geometry.block_size);
                piece.stage = Stage::Lock(buffer);
                self.advance_piece(cx, index);
            }
            (IoStatus::Ok, PeerAnswer::Zeroes) => {
                piece.stage = Stage::Lock(None);
                self.advance_piece(cx, index);
            }
            // Not served yet: the same read is asked for again. With a new number it could be served beside the old one,
            // and the source would not know which of them the data is from.
            (IoStatus::Ok, PeerAnswer::NotYet | PeerAnswer::Busy) => {
                self.shared.pulls.clear_range(granules);
                piece.stage = Stage::Ask(cx.now_ns() + RETRY_NS);
            }
            // Served, and the data got lost on the way.
            (IoStatus::Ok, PeerAnswer::Duplicate) => {
                self.shared.pulls.clear_range(granules);
                piece.read = None;
                piece.stage = Stage::Ask(cx.now_ns());
            }
            _ => {
                // Its answer has come: whoever gives up the rest must not wait for it again.
                self.puller.pieces[index] = None;
                self.lose_session(cx, slot, "a resync read was not answered");
            }
        }
    }

    /// Under the range lock no write can come in between: what has no mark now is older than what was fetched.
    fn lock_piece(&mut self, cx: &mut H, index: usize) {
        if !mutation::is(Mutation::ResyncWriteUnlocked) && !self.piece_takes_range(index) {
            return;
        }
        let geometry = self.shared.geometry;
        let Some(piece) = &mut self.puller.pieces[index] else {
            return;
        };
        let granules = geometry.granules_of(piece.lba, piece.blocks);
        let Stage::Lock(buffer) = std::mem::replace(&mut piece.stage, Stage::Write(0, Vec::new()))
        else {
            return;
        };
        let bytes = geometry.bytes_of(piece.lba, piece.blocks);
        let disk_io = |start: u64, end: u64, has_data: bool| DiskIo {
            op: if has_data {
                DiskOp::Write { fua: false }
            } else {
                DiskOp::WriteZeroes { fua: false }
            },
            offset: geometry.data_offset + start,
            len: end - start,
        };
        let mut writes = Vec::new();
        if !self.shared.touched.any(granules.clone()) {
            writes.push((disk_io(bytes.start, bytes.end, buffer.is_some()), buffer));
        } else {
            let unit = piece.unit;
            let mut granule = granules.start;
            while granule < granules.end {
                if self.shared.touched.test(granule) {
                    if self.shared.partial.test(granule)
                        && let Some(Some(unit)) = self.puller.units.get_mut(unit)
                    {
                        unit.again
                            .push((granule * GRANULE_BYTES) >> geometry.granularity_log2);
                    }
                    granule += 1;
                    continue;
                }
                let first = granule;
                while granule < granules.end && !self.shared.touched.test(granule) {
                    granule += 1;
                }
                let start = (first * GRANULE_BYTES).max(bytes.start);
                let end = (granule * GRANULE_BYTES).min(bytes.end);
                let part = match &buffer {
                    None => None,
                    Some(whole) => {
                        let len = (end - start) as usize;
                        let Some(mut part) = cx.buffer(len.next_multiple_of(4096)) else {
                            // No memory for the parts now: fetch these again later.
                            if let Some(Some(unit)) = self.puller.units.get_mut(unit) {
                                let shift = geometry.granularity_log2;
                                unit.again.extend(start >> shift..end.div_ceil(1 << shift));
                            }
                            continue;
                        };
                        let from = (start - bytes.start) as usize;
                        part.as_mut()[..len].copy_from_slice(&whole.as_ref()[from..from + len]);
                        Some(part)
                    }
                };
                writes.push((disk_io(start, end, part.is_some()), part));
            }
        }
        if mutation::is(Mutation::ReportUnwritten) {
            writes.clear();
        }
        piece.stage = Stage::Write(0, writes);
        self.write_piece(cx, index);
    }

    fn write_piece(&mut self, cx: &mut H, index: usize) {
        loop {
            let Some(piece) = &mut self.puller.pieces[index] else {
                return;
            };
            let Stage::Write(in_flight, unsent) = &mut piece.stage else {
                return;
            };
            let Some((io, buffer)) = unsent.pop() else {
                if *in_flight == 0 {
                    self.piece_ended(index);
                }
                return;
            };
            let had_buffer = buffer.is_some();
            let token = self.token(ManagerIo::Pull(PullIo::Written(index)));
            let outcome = cx.disk(token, io, buffer.map_or(Data::None, Data::Buffer));
            let back = match outcome {
                Ok(()) => None,
                Err(data) => {
                    self.take_io(token);
                    Some(data)
                }
            };
            if let Some(Piece {
                stage: Stage::Write(in_flight, unsent),
                ..
            }) = &mut self.puller.pieces[index]
            {
                match back {
                    None => *in_flight += 1,
                    Some(data) => {
                        let buffer = match data {
                            Data::Buffer(buffer) => Some(buffer),
                            _ => None,
                        };
                        debug_assert_eq!(had_buffer, buffer.is_some());
                        unsent.push((io, buffer));
                        return;
                    }
                }
            }
        }
    }

    pub(super) fn piece_written(&mut self, cx: &mut H, index: usize, status: IoStatus) {
        let Some(piece) = &mut self.puller.pieces[index] else {
            return;
        };
        if let Stage::Write(in_flight, unsent) = &mut piece.stage {
            *in_flight -= 1;
            if status != IoStatus::Ok {
                unsent.clear();
                piece.dead = true;
            }
        }
        if status != IoStatus::Ok {
            self.disk_failed(cx);
        }
        let Some(piece) = &self.puller.pieces[index] else {
            return;
        };
        match &piece.stage {
            Stage::Write(0, unsent) if unsent.is_empty() && piece.dead => {
                self.piece_unlock(index);
                self.puller.pieces[index] = None;
            }
            _ => self.write_piece(cx, index),
        }
    }

    /// Under writes that never pause the range is never free by itself: then those that are there are waited for, and
    /// the others wait.
    fn piece_takes_range(&mut self, index: usize) -> bool {
        let Some(piece) = &mut self.puller.pieces[index] else {
            return false;
        };
        let granules = self.shared.geometry.granules_of(piece.lba, piece.blocks);
        let lock = &self.shared.range_lock;
        let taken = if piece.lock_failures < PRESS_AFTER {
            lock.try_lock(granules)
        } else {
            lock.try_lock_pressing(granules)
        };
        piece.lock_failures = if taken { 0 } else { piece.lock_failures + 1 };
        taken
    }

    /// A piece that is given up keeps nobody off its range any more.
    pub(super) fn piece_stop_waiting(&self, index: usize) {
        if let Some(piece) = &self.puller.pieces[index]
            && piece.is_pressing()
        {
            let granules = self.shared.geometry.granules_of(piece.lba, piece.blocks);
            self.shared.range_lock.stop_pressing(granules);
        }
    }

    pub(super) fn piece_unlock(&self, index: usize) {
        if let Some(piece) = &self.puller.pieces[index]
            && !mutation::is(Mutation::ResyncWriteUnlocked)
        {
            let granules = self.shared.geometry.granules_of(piece.lba, piece.blocks);
            self.shared.range_lock.unlock(granules);
        }
    }

    fn piece_ended(&mut self, index: usize) {
        self.piece_unlock(index);
        let Some(piece) = self.puller.pieces[index].take() else {
            return;
        };
        let Some(Some(unit)) = self.puller.units.get_mut(piece.unit) else {
            return;
        };
        unit.pieces_left -= 1;
        if unit.pieces_left > 0 {
            return;
        }
        let Some(Some(mut unit)) = self.puller.units.get_mut(piece.unit).map(Option::take) else {
            return;
        };
        let blocks = self.shared.geometry.blocks_of_bits(&unit.bits);
        let granules = self
            .shared
            .geometry
            .granules_of(blocks.start, (blocks.end - blocks.start) as u32);
        self.shared.pulls.clear_range(granules);
        // What has to come again keeps its bit and waits for the next sweep.
        if mutation::is(Mutation::PartialForgotten) {
            unit.again.clear();
        }
        unit.again.sort_unstable();
        unit.again.dedup();
        let mut start = unit.bits.start;
        for &bit in &unit.again {
            if start < bit {
                self.puller.written.push(start..bit);
            }
            start = bit + 1;
        }
        if start < unit.bits.end {
            self.puller.written.push(start..unit.bits.end);
        }
    }
}
