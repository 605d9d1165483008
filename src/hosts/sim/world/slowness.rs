//! What is slow for a while: a core that takes in messages late, a whole node, one way of a link, which may also stand
//! still; and clocks that jump. Called by tests and campaigns; `deliver` and `polls` ask here how long something takes.

use super::{MANAGER, World};

/// Something takes up to this much longer, until then.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lag {
    most_ns: u64,
    until_ns: u64,
}

/// What is slow in a node.
#[derive(Clone, Debug, Default)]
pub struct Slowness {
    everything: Lag,
    core: usize,
    /// Messages to and from that core.
    messages: Lag,
}

/// One way of a link.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    lag: Lag,
    /// What is sent before arrives after this.
    stalled_until_ns: u64,
}

impl World {
    /// Messages between a core's channel and others take up to this much longer, for a while.
    pub fn slow_core(&mut self, node: usize, core: usize, most_ns: u64, for_ns: u64) {
        let messages = self.lag(most_ns, for_ns);
        let slowness = &mut self.nodes[node].slowness;
        slowness.core = core;
        slowness.messages = messages;
    }

    /// Everything that a node does takes up to this much longer, for a while.
    pub fn slow_node(&mut self, node: usize, most_ns: u64, for_ns: u64) {
        self.nodes[node].slowness.everything = self.lag(most_ns, for_ns);
    }

    /// What one node sends to another takes up to this much longer, for a while.
    pub fn slow_way(&mut self, from: usize, to: usize, most_ns: u64, for_ns: u64) {
        self.ways.entry((from, to)).or_default().lag = self.lag(most_ns, for_ns);
    }

    /// What one node sends to another arrives after this time, in its order on each queue pair.
    pub fn stall(&mut self, from: usize, to: usize, for_ns: u64) {
        let until_ns = self.now_ns + for_ns;
        self.ways.entry((from, to)).or_default().stalled_until_ns = until_ns;
    }

    /// A node's clock goes forward at once.
    pub fn jump_clock(&mut self, node: usize, by_ns: u64) {
        self.note(node, || format!("the clock jumps by {by_ns} ns"));
        self.nodes[node].clock_ahead_ns += by_ns;
        for place in (0..self.config.cores).chain([MANAGER]) {
            self.plan_poll(node, place);
        }
    }

    /// Nothing is slow any more. What is under way arrives when it does.
    pub fn end_slowness(&mut self) {
        self.ways.clear();
        for node in &mut self.nodes {
            node.slowness = Slowness::default();
        }
    }

    fn lag(&self, most_ns: u64, for_ns: u64) -> Lag {
        Lag {
            most_ns,
            until_ns: self.now_ns + for_ns,
        }
    }

    fn draw(&mut self, lag: Lag) -> u64 {
        if self.now_ns < lag.until_ns && lag.most_ns > 0 {
            self.random.below(lag.most_ns)
        } else {
            0
        }
    }

    /// How much longer anything takes on this node.
    pub(super) fn node_lag_ns(&mut self, node: usize) -> u64 {
        self.draw(self.nodes[node].slowness.everything)
    }

    /// How much longer a message between two places of a node takes.
    pub(super) fn message_lag_ns(&mut self, node: usize, from: usize, to: usize) -> u64 {
        let slowness = &self.nodes[node].slowness;
        let is_slow = [from, to].contains(&slowness.core);
        let messages = if is_slow {
            slowness.messages
        } else {
            Lag::default()
        };
        self.draw(messages) + self.node_lag_ns(node)
    }

    /// How much longer it takes from one node to another.
    pub(super) fn way_lag_ns(&mut self, from: usize, to: usize) -> u64 {
        let way = self.ways.get(&(from, to)).copied().unwrap_or_default();
        let stalled_ns = way.stalled_until_ns.saturating_sub(self.now_ns);
        stalled_ns + self.draw(way.lag) + self.node_lag_ns(from)
    }
}
