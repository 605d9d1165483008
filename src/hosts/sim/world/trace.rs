//! A hash over everything that happens: each event that is delivered, and each thing that the engine asks for. The same
//! seed gives the same hash, in whatever build; where it does not, a run cannot be replayed.

use super::{Event, MANAGER, What, World};
use crate::engine::message::{ToChannel, ToManager};
use crate::host::{AppStatus, Data, DiskOp};
use crate::hosts::sim::node::{Action, Core};

/// A running hash of words of 64 bits.
#[derive(Clone, Copy, Default)]
pub(super) struct TraceHash(u64);

impl TraceHash {
    fn add(&mut self, word: u64) {
        let mixed = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

impl World {
    /// What has happened so far, as a number.
    pub fn trace_hash(&self) -> u64 {
        self.trace_hash.0
    }

    pub(super) fn hash_event(&mut self, event: &Event) {
        self.trace_hash.add(self.now_ns);
        self.trace_hash.add(event.node as u64);
        for word in event_words(&event.what) {
            self.trace_hash.add(word);
        }
    }

    pub(super) fn hash_action(&mut self, node: usize, place: usize, action: &Action) {
        self.trace_hash.add(node as u64);
        self.trace_hash.add(place_number(place));
        for word in action_words(action) {
            self.trace_hash.add(word);
        }
        if let Action::Peer { words, .. } = action {
            for word in words.0 {
                self.trace_hash.add(u64::from(word));
            }
        }
    }
}

fn place_number(place: usize) -> u64 {
    if place == MANAGER {
        u64::from(u32::MAX)
    } else {
        place as u64
    }
}

/// The kind, and what tells one event of it from another.
fn event_words(what: &What) -> [u64; 4] {
    match what {
        What::Poll { place, at_ns } => [1, place_number(*place), *at_ns, 0],
        What::DiskDone(id) => [2, *id, 0, 0],
        What::ToManager(message) => to_manager_words(3, message),
        What::ToChannel(channel, message) => to_channel_words(4, *channel, message),
        What::LinkTried { slot, id } => [5, *slot as u64, *id, 0],
        What::LinkReset { slot, id } => [6, *slot as u64, *id, 0],
        What::LinkGone { slot, command } => [7, *slot as u64, *command, 0],
        What::LinkDown { slot, id } => [8, *slot as u64, *id, 0],
        What::Arrived(transit) => {
            let from = transit.from as u64;
            [9, from, u64::from(transit.opcode), transit.io.arrival]
        }
        What::Answered {
            slot,
            command,
            answer,
            ..
        } => [10, *slot as u64, *command, u64::from(answer.to_dword0())],
        What::Submit(id) => [11, *id, 0, 0],
        What::DiskThaws => [12, 0, 0, 0],
    }
}

fn action_words(action: &Action) -> [u64; 4] {
    match action {
        Action::Disk(token, io, data) => {
            let (op, fua) = match io.op {
                DiskOp::Read => (0, false),
                DiskOp::Write { fua } => (1, fua),
                DiskOp::WriteZeroes { fua } => (2, fua),
                DiskOp::Unmap => (3, false),
                DiskOp::Flush => (4, false),
            };
            let kind = 21 | op << 8 | u64::from(fua) << 16 | data_number(data) << 24;
            [kind, token.0, io.offset, io.len]
        }
        Action::Peer {
            slot,
            token,
            opcode,
            data,
            part,
            ..
        } => {
            let kind = 22 | u64::from(*opcode) << 8 | data_number(data) << 24;
            [kind, *slot as u64, token.0, part.len() as u64]
        }
        Action::Finish(io, status) => {
            let status = match status {
                AppStatus::Ok => 0,
                AppStatus::Failed => 1,
                AppStatus::Inaccessible => 2,
                AppStatus::Invalid => 3,
            };
            [23, *io, status, 0]
        }
        Action::Answer(io, answer) => [24, io.arrival, u64::from(answer.to_dword0()), 0],
        Action::ToManager(message) => to_manager_words(25, message),
        Action::ToChannel(channel, message) => to_channel_words(26, *channel, message),
        Action::LinkOpen(slot, _) => [27, *slot as u64, 0, 0],
        Action::LinkClose(slot) => [28, *slot as u64, 0, 0],
        Action::DiskClose => [29, 0, 0, 0],
        Action::Ordered(id, outcome) => [30, *id, u64::from(outcome.is_ok()), 0],
    }
}

fn data_number(data: &Data<Core>) -> u64 {
    match data {
        Data::None => 0,
        Data::Payload(_) => 1,
        Data::Buffer(_) => 2,
    }
}

fn to_manager_words(kind: u64, message: &ToManager<Core>) -> [u64; 4] {
    match message {
        ToManager::Adopted(channel, version) => [kind, 1, *channel as u64, *version],
        ToManager::Harvested(channel, id, _) => [kind, 2, *channel as u64, *id],
        ToManager::Drained(channel, id) => [kind, 3, *channel as u64, *id],
        ToManager::Retire(channel, extents, _) => [kind, 4, *channel as u64, extents.len() as u64],
        ToManager::NeedGeneration(slots) => [kind, 5, u64::from(*slots), 0],
        ToManager::PeerLost(slot, session) => [kind, 6, *slot as u64, u64::from(*session)],
        ToManager::DiskFailed => [kind, 7, 0, 0],
        ToManager::Command { channel, io, .. } => [kind, 8, *channel as u64, io.arrival],
    }
}

fn to_channel_words(kind: u64, channel: usize, message: &ToChannel<Core>) -> [u64; 4] {
    let channel = channel as u64;
    match message {
        ToChannel::Adopt(view) => [kind, channel, 1, view.version],
        ToChannel::Disk(start) => [kind, channel, 2, start.al_number],
        ToChannel::Harvest(id) => [kind, channel, 3, *id],
        ToChannel::Drain(id, _) => [kind, channel, 4, *id],
        ToChannel::Retired(extents) => [kind, channel, 5, extents.len() as u64],
        ToChannel::Answer(io, answer) => [
            kind,
            channel,
            6 | u64::from(answer.to_dword0()) << 8,
            io.arrival,
        ],
    }
}
