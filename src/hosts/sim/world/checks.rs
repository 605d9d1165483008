//! What must hold whatever happens, written from the design's invariants and not from the engine: looked at when a manager
//! has done something, and at quiet moments. Nothing here changes the run.

use super::World;
use crate::engine::message::{OrderId, OrderOutcome};
use crate::engine::peer::command::{CommandWords, PeerCommand, Span, opcode};
use crate::engine::peer::handshake::Decision;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::host::PeerSlot;
use crate::hosts::sim::coverage::{Kind, Seen};

impl World {
    /// A manager has done something.
    pub(super) fn observe(&mut self, node: usize) {
        let Some(engine) = &self.nodes[node].engine else {
            return;
        };
        let before = self.coverage.observe(&mut self.seen[node], &engine.manager);
        if let Some(before) = before {
            self.check_decisions(node, &before);
            self.check_finish(node, &before);
            self.states_come(node, &before);
        }
        if self.config.trace {
            self.note_state(node);
        }
    }

    /// Tells the trace how a node is, when that is something else than before.
    fn note_state(&mut self, node: usize) {
        let state = self.state(node);
        let generations = &state.generations;
        let past: Vec<String> = generations
            .history
            .iter()
            .take_while(|&&generation| generation != 0)
            .take(5)
            .map(|generation| short(*generation))
            .collect();
        let mut text = format!(
            "is {} {} suspended={} current={} past={}",
            state.role,
            state.disk,
            state.suspended,
            short(generations.current),
            past.join(","),
        );
        for peer in &state.peers {
            text += &format!(
                " | {}: {} {} {} {} {:?}",
                peer.node_id,
                peer.conn,
                peer.role,
                peer.disk,
                short(peer.bitmap_generation),
                peer.last_error.as_deref().unwrap_or_default(),
            );
        }
        if self.told[node] != text {
            self.note(node, || text.clone());
            self.told[node] = text;
        }
    }

    /// I8: who looks at the same two Hellos comes to the mirrored decision.
    fn check_decisions(&mut self, node: usize, before: &Seen) {
        for slot in 0..before.decided.len() {
            let Some(decided) = self.seen[node].decided[slot] else {
                continue;
            };
            if before.decided[slot] == Some(decided) {
                continue;
            }
            self.note(node, || {
                let Decision { rule, outcome } = decided.decision;
                format!("decides of slot {slot}: {rule} {outcome:?}")
            });
            let nonces = (
                decided.mine.min(decided.theirs),
                decided.mine.max(decided.theirs),
            );
            let entry = self.decisions.entry(nonces);
            let &mut (other, decision) = entry.or_insert((node, decided.decision));
            let is_mirrored = decision.rule == decided.decision.rule
                && decision.outcome.mirrored() == decided.decision.outcome;
            assert!(
                other == node || is_mirrored,
                "[I8] node {other} decided {decision:?} and node {node} {:?} over the same Hellos\n{}",
                decided.decision,
                self.describe()
            );
        }
    }

    /// I7: a resync has ended, and no bit is left on either side. With more nodes others may have set some since.
    fn check_finish(&self, node: usize, before: &Seen) {
        if self.nodes.len() > 2 {
            return;
        }
        let now = &self.seen[node];
        let was_resyncing = |conn: ConnState| conn.is_sync_source() || conn.is_sync_target();
        for slot in 0..now.conns.len() {
            // Bits of a source that has lost its disk meanwhile are of what it lacks since.
            let keeps_disks = (0..self.nodes.len()).all(|node| {
                let engine = self.nodes[node].engine.as_ref();
                engine.is_some_and(|engine| engine.manager.disk() > DiskState::Failed)
            });
            let has_ended = was_resyncing(before.conns[slot])
                && now.conns[slot] == ConnState::Connected
                && keeps_disks;
            if has_ended {
                let peers = self.state(node).peers;
                let left = peers.iter().find(|peer| peer.slot == slot);
                let left_bytes = left.map_or(0, |peer| peer.out_of_sync_bytes);
                assert!(
                    left_bytes == 0,
                    "[I7] node {node} ends a resync with bits that are set\n{}",
                    self.describe()
                );
            }
        }
    }

    /// I6: a target asks for nothing that it has asked for already in the session, and has no answer for: of two reads of
    /// one place the older one could be written last.
    pub(super) fn check_resync_read(
        &self,
        node: usize,
        slot: PeerSlot,
        op: u8,
        words: &CommandWords,
        data_len: u32,
    ) -> Option<(u32, Span)> {
        if op != opcode::RESYNC_READ {
            return None;
        }
        let Ok(PeerCommand::ResyncRead { session, span, .. }) =
            PeerCommand::parse(op, words, data_len)
        else {
            return None;
        };
        let end = |span: Span| span.lba() + u64::from(span.blocks());
        let outstanding = self.nodes[node].links[slot].outstanding.values();
        for (_, other) in outstanding
            .filter_map(|command| command.resync_read)
            .filter(|&(of, _)| of == session)
        {
            assert!(
                end(other) <= span.lba() || end(span) <= other.lba(),
                "[I6] node {node} fetches blocks from {} on, for which it has a read under way\n{}",
                span.lba(),
                self.describe()
            );
        }
        Some((session, span))
    }

    pub(super) fn count_order(&mut self, node: usize, id: OrderId, outcome: &OrderOutcome) {
        let mut orders = self.orders.iter().rev();
        let order = orders.find(|(of, _, other, _)| *of == node && *other == id);
        let text = order.map_or("", |(_, _, _, text)| text);
        let name = text.split([' ', '{', '(']).next().unwrap_or_default();
        let name = match outcome {
            Ok(()) => format!("{name}: done"),
            Err(error) => format!("{name}: {:?}", error.kind),
        };
        self.coverage.count(Kind::Order, &name);
        if text.contains("force: true") {
            // Writes may have ended since it was given.
            self.nothing_counts();
        }
    }

    /// A node is about to end without a word.
    pub(super) fn count_end(&mut self, node: usize, how: &str) {
        let seen = std::mem::replace(&mut self.seen[node], Seen::NOTHING);
        if let Some(engine) = &self.nodes[node].engine {
            for slot in 0..seen.conns.len() {
                if engine.manager.peer_node(slot).is_some() {
                    let name = format!("{how} in {}", seen.conns[slot]);
                    self.coverage.count(Kind::End, &name);
                }
            }
        }
    }
}

/// Enough of a generation to know it again.
fn short(generation: u64) -> String {
    format!("{:04x}", generation >> 48)
}
