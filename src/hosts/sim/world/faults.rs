//! What goes wrong: cut and reset links, killed nodes, lost power.

use super::disk_faults::written_bytes;
use super::{Event, What, World};
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::peer::state::DiskState;
use crate::hosts::sim::link::{Link, LinkState};
use crate::hosts::sim::memory::Payload;
use crate::hosts::sim::record::Recorded;

impl World {
    /// Nothing passes between two nodes any more, and nobody is told.
    pub fn cut(&mut self, one: usize, other: usize) {
        self.note(one, || format!("cut from {other}"));
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Nothing passes from one node to another.
    pub fn cut_one_way(&mut self, from: usize, to: usize) {
        self.blocked.entry((from, to)).or_default();
    }

    /// The way is free again. What was stopped on it arrives now, if its connection lives; else it may, late.
    pub fn heal(&mut self, one: usize, other: usize) {
        self.note(one, || format!("healed with {other}"));
        for ends in [(one, other), (other, one)] {
            let Some(stopped) = self.blocked.remove(&ends) else {
                continue;
            };
            let mut at_ns = self.now_ns;
            for event in stopped {
                let is_alive = self.is_alive(&event);
                if is_alive || self.random.chance(50) {
                    at_ns += self.random.below(100_000);
                    if is_alive {
                        self.nothing_overtakes(&event, at_ns);
                    }
                    self.schedule(at_ns, event);
                }
            }
        }
    }

    /// What is sent from here on arrives behind this on its queue pair.
    fn nothing_overtakes(&mut self, event: &Event, at_ns: u64) {
        if let What::Arrived(transit) = &event.what {
            let link = &mut self.nodes[transit.from].links[transit.io.slot];
            let last = &mut link.last_arrival_ns[transit.core];
            *last = at_ns.max(*last);
        }
    }

    pub fn is_cut(&self, one: usize, other: usize) -> bool {
        self.blocked.contains_key(&(one, other)) || self.blocked.contains_key(&(other, one))
    }

    fn is_alive(&self, event: &Event) -> bool {
        let (node, incarnation, slot, id) = match &event.what {
            What::Arrived(transit) => (
                transit.from,
                transit.io.from_incarnation,
                transit.io.slot,
                transit.io.link,
            ),
            What::Answered { slot, link, .. } => (event.node, event.incarnation, *slot, *link),
            _ => return false,
        };
        let link = &self.nodes[node].links[slot];
        self.nodes[node].incarnation == incarnation && link.id == id && link.state == LinkState::Up
    }

    /// Both ends learn at once that their connections are gone.
    pub fn reset(&mut self, one: usize, other: usize) {
        self.note(one, || format!("reset with {other}"));
        for (from, to) in [(one, other), (other, one)] {
            for slot in 0..self.nodes[from].links.len() {
                let link = &self.nodes[from].links[slot];
                if link.target == to && matches!(link.state, LinkState::Up | LinkState::Opening) {
                    let id = link.id;
                    let delay_ns = self.random.below(1_000_000);
                    self.schedule_here(from, delay_ns, What::LinkReset { slot, id });
                }
            }
        }
    }

    /// SIGKILL: the engine is gone at once; its peers are told by their transport.
    pub fn kill(&mut self, node: usize) {
        self.note(node, || "killed".to_owned());
        self.stop(node, false);
        for other in 0..self.nodes.len() {
            if other != node && !self.is_cut(node, other) {
                self.reset(node, other);
            }
        }
    }

    /// The engine is gone, and so is what the disk had not flushed; nobody is told.
    pub fn power_loss(&mut self, node: usize) {
        self.note(node, || "lost power".to_owned());
        self.stop(node, true);
        self.nodes[node].lost_power_at = self.next_id;
        if self.config.volatile_caches {
            // Where a Primary has it all, others may agree with each other on what this one has left, until they follow it.
            self.nothing_counts();
        }
        self.nodes[node].has_lost_cache = self.config.volatile_caches;
        self.lose_unflushed();
    }

    /// What was not flushed may be gone with a cache, unless the Primary has it all, whom everybody follows.
    pub(super) fn lose_unflushed(&mut self) {
        let keeps_all = |other: usize| {
            let engine = self.nodes[other].engine.as_ref();
            engine.is_some_and(|engine| {
                engine.manager.is_primary() && engine.manager.disk() == DiskState::UpToDate
            })
        };
        if self.config.volatile_caches && !(0..self.nodes.len()).any(keeps_all) {
            self.ledger.power_lost();
            for app in self.apps.values_mut() {
                app.cache_lost |= app.status.is_none();
            }
        }
    }

    fn stop(&mut self, node: usize, power: bool) {
        let cores = self.config.cores;
        self.count_end(node, if power { "power lost" } else { "killed" });
        let stopped = &mut self.nodes[node];
        stopped.incarnation += 1;
        stopped.running = false;
        stopped.engine = None;
        stopped.opener = None;
        stopped.disk_open = false;
        stopped.is_closing = false;
        stopped.has_taken_leave = false;
        stopped.unanswered.clear();
        stopped.message_ns.clear();
        stopped.planned_polls_ns.fill(None);
        stopped.vain_polls.fill(0);
        stopped.disk_faults.ends();
        for link in &mut stopped.links {
            *link = Link::new(cores);
        }
        for work in stopped.disk_work.take() {
            let written = written_bytes(work.io, &work.data);
            stopped
                .disk
                .interrupt(work.io, &written, power, &mut self.random);
        }
        if power {
            stopped.disk.power_loss(&mut self.random);
        }
        self.record(node, |world| {
            Some(Recorded::Crashed(world.nodes[node].disk.clone()))
        });
        let lost: Vec<u64> = self
            .apps
            .iter()
            .filter(|(_, app)| app.node == node && app.status.is_none())
            .map(|(&id, _)| id)
            .collect();
        for id in lost {
            if let Some(app) = self.apps.remove(&id) {
                app.memory.as_ref().map(Payload::take_back);
                self.forget(id, app.kind, app.lba, app.blocks);
            }
        }
    }

    /// A node that was killed or lost power starts, and is told of its peers again.
    pub fn restart(&mut self, node: usize) {
        self.start(node);
        for peer in 0..self.nodes.len() {
            if peer != node {
                self.introduce(node, peer);
            }
        }
    }

    /// From here on commands with this opcode are kept on the way.
    pub fn catch(&mut self, opcode: u8) {
        self.catching = Some(opcode);
    }

    pub fn caught(&self) -> usize {
        self.caught.len()
    }

    /// What was kept goes on; nothing more is kept.
    pub fn let_go(&mut self) {
        self.catching = None;
        self.let_go_but(0);
    }

    /// What was kept goes on, but for the last `kept` of it; what comes is kept.
    pub fn let_go_but(&mut self, kept: usize) {
        let going = self.caught.len().saturating_sub(kept);
        for mut event in self.caught.drain(..going).collect::<Vec<_>>() {
            if let What::Arrived(transit) = &mut event.what {
                transit.is_let_go = true;
            }
            let delay_ns = self.random.below(10_000);
            self.schedule(self.now_ns + delay_ns, event);
        }
    }

    /// Commands of a node's first channel that a peer has not answered.
    pub fn outstanding(&self, node: usize, peer: usize) -> usize {
        let links = self.nodes[node].links.iter();
        links
            .filter(|link| link.target == peer)
            .map(|link| {
                link.outstanding
                    .values()
                    .filter(|one| one.core == 0 && one.token.0 & TOKEN_MANAGER == 0)
                    .count()
            })
            .max()
            .unwrap_or(0)
    }
}
