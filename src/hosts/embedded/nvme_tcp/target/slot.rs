//! The requests of one connection: preallocated slots with a piece of capsule memory each, and the set of
//! command ids in use. Used by the target's connection; knows no sockets and no namespaces.

use std::io;
use std::mem::ManuallyDrop;

use crate::hosts::embedded::nvme_tcp::buffer::{
    AlignedBuf, BUFFER_ALIGNMENT_BYTES, BufferPool, DataPointer, PoolBuffer,
};
use crate::hosts::embedded::nvme_tcp::command::Sqe;

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    Free,
    /// Its capsule's data is being received.
    Receiving,
    /// Waits for large buffers.
    WaitingForBuffer,
    /// An R2T has been sent; data arrives.
    AwaitingData,
    /// The backend has it.
    Backend,
    /// An Asynchronous Event Request that waits for an event.
    AsyncEvent,
    /// The answer is on its way to the host.
    Responding,
}

pub(super) struct Slot {
    pub state: SlotState,
    pub generation: u32,
    pub sqe: Sqe,
    /// Bytes of data that came in the capsule.
    pub in_capsule_bytes: u32,
    /// The command's data.
    pub data: DataPointer,
    /// What a Compare reads.
    pub second: DataPointer,
    pub received_bytes: u32,
    pub digest_error: bool,
    /// False: the command id belongs to a request that is still in progress.
    pub owns_command_id: bool,
    buffers: [Option<PoolBuffer>; 2],
}

impl Slot {
    fn new(generation: u32) -> Slot {
        Slot {
            state: SlotState::Free,
            generation,
            sqe: Sqe::default(),
            in_capsule_bytes: 0,
            data: DataPointer::NONE,
            second: DataPointer::NONE,
            received_bytes: 0,
            digest_error: false,
            owns_command_id: false,
            buffers: [None, None],
        }
    }

    /// Keeps a large buffer until the request is over; returns its first `length_bytes`.
    pub fn keep(&mut self, buffer: PoolBuffer, length_bytes: u32) -> DataPointer {
        let data = buffer.data(length_bytes);
        let [first, second] = &mut self.buffers;
        let place = if first.is_none() { first } else { second };
        *place = Some(buffer);
        data
    }
}

pub(super) struct SlotTable {
    slots: Vec<Slot>,
    free: Vec<u16>,
    command_ids: Box<[u64; 1024]>,
    /// `ManuallyDrop` because it must outlive what the backend still has.
    memory: ManuallyDrop<AlignedBuf>,
    capsule_bytes: u32,
    stride_bytes: usize,
    /// Generation that every slot begins with.
    first_generation: u32,
}

impl SlotTable {
    /// `count` slots, with `capsule_bytes` of memory each for in-capsule data and small transfers.
    pub fn new(count: u16, capsule_bytes: u32, first_generation: u32) -> io::Result<SlotTable> {
        let mut table = SlotTable {
            slots: Vec::new(),
            free: Vec::new(),
            command_ids: Box::new([0; 1024]),
            memory: ManuallyDrop::new(AlignedBuf::new(1)?),
            capsule_bytes: 0,
            stride_bytes: 0,
            first_generation,
        };
        table.grow(count, capsule_bytes)?;
        Ok(table)
    }

    /// Makes it at least `count` slots with other capsule memory. No request may be using its data; one that
    /// is being answered without data keeps its slot.
    pub fn grow(&mut self, count: u16, capsule_bytes: u32) -> io::Result<()> {
        self.stride_bytes = (capsule_bytes as usize).next_multiple_of(BUFFER_ALIGNMENT_BYTES);
        let count = usize::from(count).max(self.slots.len());
        let memory = AlignedBuf::new(self.stride_bytes * count)?;
        drop(ManuallyDrop::into_inner(std::mem::replace(
            &mut self.memory,
            ManuallyDrop::new(memory),
        )));
        self.capsule_bytes = capsule_bytes;
        self.free.reserve(count);
        for index in self.slots.len()..count {
            self.slots.push(Slot::new(self.first_generation));
            self.free.push(index as u16);
        }
        Ok(())
    }

    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Longest data that fits into a slot's own memory.
    pub fn capsule_bytes(&self) -> u32 {
        self.capsule_bytes
    }

    pub fn get_mut(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(index))
    }

    /// A slot for this command. None: all are in use.
    pub fn begin(&mut self, sqe: Sqe) -> Option<u16> {
        let index = self.free.pop()?;
        let word = usize::from(sqe.command_id / 64);
        let bit = 1u64 << (sqe.command_id % 64);
        let is_new = self.command_ids[word] & bit == 0;
        self.command_ids[word] |= bit;
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.state = SlotState::Receiving;
        slot.sqe = sqe;
        slot.in_capsule_bytes = 0;
        slot.data = DataPointer::NONE;
        slot.second = DataPointer::NONE;
        slot.received_bytes = 0;
        slot.digest_error = false;
        slot.owns_command_id = is_new;
        Some(index)
    }

    /// The request's command id, if another one has it.
    pub fn conflicting_command_id(&self, index: u16) -> Option<u16> {
        let slot = self.slots.get(usize::from(index))?;
        (!slot.owns_command_id).then_some(slot.sqe.command_id)
    }

    /// Gives the command id of `from`, whose request is to be released, to `to`, which has the same.
    pub fn hand_command_id_over(&mut self, from: u16, to: u16) {
        for (index, owns) in [(from, false), (to, true)] {
            if let Some(slot) = self.slots.get_mut(usize::from(index)) {
                slot.owns_command_id = owns;
            }
        }
    }

    /// The slot's own memory, `length_bytes` of it (at most the capsule size).
    pub fn capsule_data(&self, index: u16, length_bytes: u32) -> DataPointer {
        let length_bytes = length_bytes.min(self.capsule_bytes);
        let offset = usize::from(index) * self.stride_bytes;
        if offset + self.stride_bytes > self.memory.length_bytes() {
            return DataPointer::NONE;
        }
        // SAFETY: inside of the table's memory and of this slot's share; the connection keeps the table
        // until every request has been completed.
        unsafe { DataPointer::new(self.memory.as_ptr().wrapping_add(offset), length_bytes) }
    }

    /// The request is over: its buffers, its command id and its slot are free again.
    pub fn release(&mut self, index: u16, pool: &mut BufferPool) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        if slot.state == SlotState::Free {
            return;
        }
        slot.state = SlotState::Free;
        slot.generation = slot.generation.wrapping_add(1);
        for buffer in &mut slot.buffers {
            if let Some(buffer) = buffer.take() {
                pool.give_back(buffer);
            }
        }
        if slot.owns_command_id {
            let command_id = slot.sqe.command_id;
            self.command_ids[usize::from(command_id / 64)] &= !(1u64 << (command_id % 64));
        }
        self.free.push(index);
    }

    /// Releases everything but what the backend has.
    pub fn release_all_but_backend(&mut self, pool: &mut BufferPool) {
        for index in 0..self.slots.len() {
            let state = self.slots.get(index).map(|slot| slot.state);
            if state != Some(SlotState::Backend) {
                self.release(index as u16, pool);
            }
        }
    }
}

impl Drop for SlotTable {
    fn drop(&mut self) {
        let in_backend = |slot: &Slot| slot.state == SlotState::Backend;
        if !self.slots.iter().any(in_backend) {
            // SAFETY: dropped once, here; only requests of the backend could still point into it.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
