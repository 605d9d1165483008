//! What a node says of itself, and whether all is well: connected, UpToDate, identical. Tests and the campaign ask when
//! nothing disturbs the nodes any more.

use super::{DATA_OFFSET, MS, SECOND, World};
use crate::engine::manager::{PeerReport, VolumeState};
use crate::engine::peer::state::{ConnState, DiskState};
use crate::hosts::sim::disk::Disk;
use crate::hosts::sim::ledger::identify;

/// Bytes that are looked at together.
const LOOK_BYTES: u64 = 64 << 10;

impl World {
    pub fn state(&self, node: usize) -> VolumeState {
        let core = self.core(node);
        let engine = self.nodes[node].engine.as_ref();
        engine.expect("the node runs").manager.report(&core)
    }

    pub fn peer(&self, node: usize, peer: usize) -> PeerReport {
        let peers = self.state(node).peers;
        let found = peers
            .into_iter()
            .find(|one| usize::from(one.node_id) == peer);
        found.expect("they were introduced")
    }

    pub fn is_primary(&self, node: usize) -> bool {
        let engine = self.nodes[node].engine.as_ref();
        engine.is_some_and(|engine| engine.manager.is_primary())
    }

    /// All nodes run, are connected with each other, UpToDate, and nothing is under way.
    pub fn is_settled(&self) -> bool {
        self.apps.values().all(|app| app.status.is_some())
            && (0..self.nodes.len()).all(|node| {
                self.nodes[node].engine.is_some() && self.nodes[node].unanswered.is_empty() && {
                    let state = self.state(node);
                    state.disk == DiskState::UpToDate
                        && !state.suspended
                        && state.peers.iter().all(|peer| {
                            peer.conn == ConnState::Connected
                                && peer.disk == DiskState::UpToDate
                                && (self.nodes.len() == 2 || peer.out_of_sync_bytes == 0)
                        })
                }
            })
    }

    /// Waits until everything is well again, and checks that it is.
    pub fn settle(&mut self) {
        self.run_until("connected and UpToDate", 60 * SECOND, World::is_settled);
        self.run_for(20 * MS);
        if !self.is_settled() {
            return self.settle();
        }
        self.check_replicas();
    }

    /// The replicas are identical, hold what was acknowledged, and no bit is set.
    pub fn check_replicas(&self) {
        let start = DATA_OFFSET;
        let bytes = start..start + self.config.volume_bytes;
        for node in 1..self.nodes.len() {
            let (first, other) = (&self.nodes[0].disk, &self.nodes[node].disk);
            if let Some(at) = first.first_difference(other, bytes.clone()) {
                let block = u64::from(self.config.block_size);
                let at = at / block * block;
                let of = |disk: &Disk| identify(&disk.read(at..at + block), (at - start) / block);
                panic!(
                    "[replicas] nodes 0 and {node} differ in block {}: {:?} and {:?}\n{}",
                    (at - start) / block,
                    of(first),
                    of(other),
                    self.describe()
                );
            }
        }
        for node in 0..self.nodes.len() {
            assert!(self.is_unlocked(node), "[I10] node {node}: a range is kept");
            self.check_nothing_left(node);
            for peer in self.state(node).peers {
                assert!(
                    peer.out_of_sync_bytes == 0,
                    "[replicas] node {node}: bits for {}",
                    peer.node_id
                );
            }
        }
        if self.checks_content {
            self.check_content(0);
        }
    }

    /// Nobody holds a range of the node's volume, or keeps others off one.
    pub fn is_unlocked(&self, node: usize) -> bool {
        let engine = self.nodes[node].engine.as_ref();
        engine.is_none_or(|engine| {
            let all = 0..engine.shared.geometry.granules();
            let free = engine.shared.range_lock.try_lock(all.clone());
            if free {
                engine.shared.range_lock.unlock(all);
            }
            free
        })
    }

    /// What the disk of a node holds is what the application may read.
    pub fn check_content(&self, node: usize) {
        let block = u64::from(self.config.block_size);
        let disk = &self.nodes[node].disk;
        for range in self.ledger.written() {
            for first in range.clone().step_by((LOOK_BYTES / block) as usize) {
                let end = (first + LOOK_BYTES / block).min(range.end);
                let content = disk.content(DATA_OFFSET + first * block..DATA_OFFSET + end * block);
                if let Err(text) = self.ledger.check(first, &content, block as usize) {
                    panic!("[durability] node {node}: {text}\n{}", self.describe());
                }
            }
        }
    }

    /// What a failed test shows.
    pub fn describe(&self) -> String {
        let mut text = format!("at {} ns", self.now_ns);
        for node in 0..self.nodes.len() {
            if self.nodes[node].engine.is_none() {
                text += &format!("\nnode {node}: down");
                continue;
            }
            let state = self.state(node);
            text += &format!(
                "\nnode {node}: {} {} suspended={} current={:x}",
                state.role, state.disk, state.suspended, state.generations.current
            );
            for peer in &state.peers {
                text += &format!(
                    "\n  peer {}: {} {} {} bitmap={:x} oos={} error={:?} link={:?}/{}",
                    peer.node_id,
                    peer.conn,
                    peer.role,
                    peer.disk,
                    peer.bitmap_generation,
                    peer.out_of_sync_bytes,
                    peer.last_error,
                    self.nodes[node].links[peer.slot].state,
                    self.nodes[node].links[peer.slot].outstanding.len(),
                );
            }
            text += &format!(
                "\n  unanswered {:?}, disk work {}",
                self.nodes[node].unanswered,
                self.nodes[node].disk_work.len()
            );
        }
        let stuck = self
            .apps
            .values()
            .filter(|app| app.status.is_none())
            .count();
        text + &format!("\n{stuck} application I/Os under way")
    }
}
