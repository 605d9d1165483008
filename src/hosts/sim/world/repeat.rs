//! A transport that delivers commands again: while the first is still being worked on, after its answer, long after its
//! session; and one that loses a command or an answer and sends the command once more, when others have overtaken it.

use super::{Event, MS, SECOND, What, World};
use crate::engine::message::ToManager;
use crate::engine::peer::command::PeerCommand;
use crate::hosts::sim::link::Transit;
use crate::hosts::sim::node::Core;

/// What a test has asked for.
#[derive(Default)]
pub(super) struct Repeats {
    /// Commands with this opcode are copied when they arrive.
    keeping: Option<u8>,
    kept: Vec<Transit>,
    /// Answers to the first arrival of this node's commands with this opcode get lost.
    losing_answers: Option<(usize, u8)>,
}

impl World {
    /// A command leaves and arrives at `at_ns`, or as the seed has it.
    pub(super) fn send(&mut self, mut transit: Transit, at_ns: u64) {
        let percent = self.config.repeat_percent;
        if percent == 0 || !self.random.chance(percent) {
            return self.arrives(transit, at_ns);
        }
        let soon_ns = at_ns + self.random.below(500_000);
        let later_ns = at_ns + self.random.below(20 * MS);
        match self.random.below(5) {
            0 => self.arrives_again(&transit, soon_ns),
            1 => self.arrives_again(&transit, later_ns),
            2 => {
                let much_later_ns = at_ns + self.random.below(2 * SECOND);
                self.arrives_again(&transit, much_later_ns);
            }
            3 => {
                transit.io.answer_lost = true;
                self.arrives_again(&transit, later_ns);
            }
            _ => return self.arrives_again(&transit, later_ns),
        }
        self.arrives(transit, at_ns);
    }

    fn arrives(&mut self, transit: Transit, at_ns: u64) {
        let event = Event {
            node: transit.to,
            incarnation: transit.to_incarnation,
            what: What::Arrived(Box::new(transit)),
        };
        self.schedule(at_ns, event);
    }

    /// Over whatever queue pair there is then.
    fn arrives_again(&mut self, transit: &Transit, at_ns: u64) {
        let core = self.random.below(self.config.cores as u64) as usize;
        let again = transit.again(self.id(), core);
        self.arrives(again, at_ns);
    }

    pub(super) fn keep(&mut self, transit: &mut Transit) {
        if transit.repeated {
            return;
        }
        if self.repeats.keeping == Some(transit.opcode) {
            let again = transit.again(self.id(), transit.core);
            self.repeats.kept.push(again);
        }
        let lost = self.repeats.losing_answers;
        transit.io.answer_lost |= lost == Some((transit.from, transit.opcode));
    }

    /// From here on commands with this opcode are copied when they arrive.
    pub fn keep_copies(&mut self, opcode: Option<u8>) {
        self.repeats.keeping = opcode;
    }

    pub fn kept(&self) -> usize {
        self.repeats.kept.len()
    }

    /// What was copied so far.
    pub fn kept_commands(&self) -> Vec<PeerCommand> {
        let parse = |transit: &Transit| {
            PeerCommand::parse(transit.opcode, &transit.words, transit.data_len).ok()
        };
        self.repeats.kept.iter().filter_map(parse).collect()
    }

    /// What was copied so far arrives again.
    pub fn repeat_kept(&mut self) {
        for transit in std::mem::take(&mut self.repeats.kept) {
            let at_ns = self.now_ns + self.random.below(10_000);
            self.arrives(transit, at_ns);
        }
    }

    /// From here on the answers to this node's commands with this opcode get lost, but to those that are repeated.
    pub fn lose_answers(&mut self, of: Option<(usize, u8)>) {
        self.repeats.losing_answers = of;
    }

    /// The connections between the nodes: they are the same as long as no session was lost.
    pub fn link_ids(&self) -> Vec<u64> {
        let links = self.nodes.iter().flat_map(|node| &node.links);
        links.map(|link| link.id).collect()
    }

    /// Says something to a node's manager, as a channel does.
    pub fn tell_manager(&mut self, node: usize, message: ToManager<Core>) {
        self.with_manager(node, |manager, cx| manager.message(cx, message));
    }
}
