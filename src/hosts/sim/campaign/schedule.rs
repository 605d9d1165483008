//! What happens in a run: the shape of the world, and deeds at moments. It is drawn from the seed before the run begins
//! (`drawing`). Every deed carries what it needs, so that a schedule from which some were taken out is a schedule too; that
//! is how a failure is made small. Must not know the engine.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::hosts::sim::world::Config;
use crate::hosts::sim::world::disk_faults::{Failing, MetadataBlock};
use crate::hosts::sim::world::moments::Moment;

/// Virtual time in which deeds are done.
pub const ACTIVE_US: u64 = 50_000_000;

/// What seeds are allowed to draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub nodes: RangeInclusive<usize>,
}

impl Default for Scope {
    fn default() -> Self {
        Self { nodes: 2..=2 }
    }
}

/// A run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// Of the world: delays, orders of events, what a power loss leaves.
    pub seed: u64,
    pub shape: Shape,
    pub deeds: Vec<Planned>,
}

/// What the world is made of, and how its operator is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    pub nodes: usize,
    pub cores: usize,
    pub volume_mib: u64,
    pub block_size: u32,
    pub granularity_log2: Vec<u8>,
    pub al_extents: u32,
    pub in_capsule_bytes: Vec<u32>,
    pub volatile_caches: bool,
    pub scarcity_percent: u64,
    pub repeat_percent: u64,
    /// The operator promotes nodes that may not have everything, and discards data.
    pub reckless: bool,
    #[serde(default)]
    pub contents: Contents,
}

/// A deed and when it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// From the start of the run.
    pub at_us: u64,
    pub deed: Deed,
}

/// Something that the application, the operator or the world does. One that does not apply at its moment does nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Deed {
    /// The application submits I/Os, one every so often, drawn from a seed.
    Load {
        count: u32,
        every_us: u64,
        seed: u64,
        /// Most of them are small writes near this one of the volume's places; else they go everywhere.
        #[serde(default)]
        place: Option<u8>,
    },
    Cut {
        one: usize,
        other: usize,
    },
    CutOneWay {
        from: usize,
        to: usize,
    },
    /// Nothing passes between this node and any other.
    Isolate {
        node: usize,
    },
    Heal {
        one: usize,
        other: usize,
    },
    HealAll,
    Reset {
        one: usize,
        other: usize,
    },
    Kill {
        node: usize,
    },
    PowerLoss {
        node: usize,
    },
    /// All at once, as when a site loses power.
    PowerLossOfAll,
    Start {
        node: usize,
    },
    /// The application goes elsewhere because its node is dead, or is made so first.
    FailOver {
        to: usize,
    },
    /// The application goes elsewhere in order.
    HandOver {
        to: usize,
    },
    Promote {
        node: usize,
        force: bool,
    },
    Demote {
        node: usize,
    },
    Detach {
        node: usize,
    },
    Attach {
        node: usize,
    },
    Disconnect {
        node: usize,
        peer: usize,
    },
    Connect {
        node: usize,
        peer: usize,
        discard_my_data: bool,
    },
    Invalidate {
        node: usize,
    },
    PauseResync {
        node: usize,
    },
    ResumeResync {
        node: usize,
    },
    /// The volume is shut down, and its process ends.
    Stop {
        node: usize,
    },
    /// Each request to the disk takes up to so much longer.
    SlowDisk {
        node: usize,
        most_us: u64,
        for_us: u64,
    },
    /// Some requests to the disk fail.
    FailDisk {
        node: usize,
        failing: Failing,
        percent: u64,
        for_us: u64,
    },
    /// The disk keeps what it is asked for.
    FreezeDisk {
        node: usize,
        for_us: u64,
    },
    MendDisk {
        node: usize,
    },
    /// A block of the metadata of a node that is down.
    Rot {
        node: usize,
        block: MetadataBlock,
    },
    /// Messages to and from a core take up to so much longer.
    SlowCore {
        node: usize,
        core: usize,
        most_us: u64,
        for_us: u64,
    },
    SlowNode {
        node: usize,
        most_us: u64,
        for_us: u64,
    },
    SlowLink {
        from: usize,
        to: usize,
        most_us: u64,
        for_us: u64,
    },
    /// One way of a link stands still.
    StallLink {
        from: usize,
        to: usize,
        for_us: u64,
    },
    JumpClock {
        node: usize,
        by_us: u64,
    },
    /// By force, but of a node that has everything.
    ForcePromote {
        node: usize,
    },
    SetOptions {
        node: usize,
        ping_interval_ms: u64,
        ping_timeout_ms: u64,
        resync_rate_bytes: u64,
    },
    RemovePeer {
        node: usize,
        peer: usize,
    },
    AddPeer {
        node: usize,
        peer: usize,
    },
    /// The node's device is broken or pulled, and it starts with another one.
    Replace {
        node: usize,
        with: Replacement,
    },
    /// This is done a while after a moment has come on a node, and not at all if that never comes.
    Await {
        node: usize,
        moment: Moment,
        /// So many of its kind are let pass.
        skip: u32,
        after_us: u64,
        then: Box<Deed>,
    },
}

/// What is on a device that is put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Replacement {
    Nothing,
    /// Data of its own, by mistake; it is taken out again in the end.
    Foreign,
}

/// What the nodes begin with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Contents {
    /// All nodes have the same.
    #[default]
    Clean,
    /// None of them has anything: the first is declared the newest.
    Nothing,
    /// The first one has data, the others come later and have nothing.
    OneHasAll,
}

impl Shape {
    pub fn config(&self) -> Config {
        Config {
            nodes: self.nodes,
            cores: self.cores,
            volume_bytes: self.volume_mib << 20,
            block_size: self.block_size,
            granularity_log2: self.granularity_log2.clone(),
            al_extents: self.al_extents,
            in_capsule_bytes: self.in_capsule_bytes.clone(),
            volatile_caches: self.volatile_caches,
            scarcity_percent: self.scarcity_percent,
            repeat_percent: self.repeat_percent,
            ping_interval_ms: 1000,
            ping_timeout_ms: 300,
            ..Config::default()
        }
    }
}

impl Schedule {
    /// When the last deed is done.
    pub fn end_us(&self) -> u64 {
        self.deeds.last().map_or(0, |planned| planned.at_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_the_same_every_time_and_others_say_something_else() {
        let scope = Scope::default();
        let one = Schedule::from_seed(1, &scope);
        assert_eq!(one, Schedule::from_seed(1, &scope));
        assert_ne!(one.deeds, Schedule::from_seed(2, &scope).deeds);
    }

    #[test]
    fn a_schedule_survives_being_written_down() {
        for seed in 0..50 {
            let schedule = Schedule::from_seed(seed, &Scope { nodes: 2..=5 });
            let text = serde_json::to_string(&schedule).unwrap();
            assert_eq!(schedule, serde_json::from_str(&text).unwrap());
        }
    }
}
