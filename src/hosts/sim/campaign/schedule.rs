//! What happens in a run, drawn from its seed before it begins: the shape of the world, and deeds at moments. Every deed
//! carries what it needs, so that a schedule from which some were taken out is a schedule too; that is how a failure is
//! made small. Must not know the engine.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::Config;
use crate::hosts::sim::world::disk_faults::{Failing, MetadataBlock};

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
}

/// One of these.
fn one_of<T: Copy>(random: &mut Random, all: &[T]) -> T {
    all[random.below(all.len() as u64) as usize]
}

impl Shape {
    fn draw(random: &mut Random, scope: &Scope) -> Shape {
        let (fewest, most) = (*scope.nodes.start(), *scope.nodes.end());
        // Small worlds have the most to tell for the time they take.
        let nodes = one_of(random, &[2, 2, 2, 2, 3, 3, 3, 4, 5]).clamp(fewest, most);
        let in_capsule = [0, 512, 1500, 4096, 4096, 8192, 20_000, 128 << 10];
        Shape {
            nodes,
            cores: one_of(random, &[1, 1, 2, 2, 3, 4]),
            volume_mib: one_of(random, &[8, 24, 64]),
            block_size: one_of(random, &[512, 512, 512, 4096]),
            granularity_log2: (0..nodes)
                .map(|_| one_of(random, &[12, 12, 12, 14, 16, 20]))
                .collect(),
            al_extents: one_of(random, &[8, 10, 12, 32]),
            in_capsule_bytes: (0..nodes).map(|_| one_of(random, &in_capsule)).collect(),
            volatile_caches: random.chance(50),
            scarcity_percent: one_of(random, &[0, 0, 0, 5]),
            repeat_percent: one_of(random, &[0, 0, 3, 20]),
            reckless: random.chance(15),
        }
    }

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
    /// The same for the same seed and scope, always.
    pub fn from_seed(seed: u64, scope: &Scope) -> Schedule {
        let mut random = Random::new(seed ^ 0x7363_6865_6475_6c65);
        let shape = Shape::draw(&mut random, scope);
        let mut deeds = Vec::new();
        let mut at_us = 0;
        let count = random.between(20, 120);
        for _ in 0..count {
            // Mostly close together, where races are; the rest spreads over the run.
            at_us += match random.below(10) {
                0..4 => random.below(300),
                4..7 => random.below(5_000),
                7..9 => random.below(300_000),
                _ => random.below(4_000_000),
            };
            if at_us > ACTIVE_US {
                break;
            }
            let deed = Deed::draw(&mut random, &shape);
            deeds.push(Planned { at_us, deed });
        }
        Schedule { seed, shape, deeds }
    }

    /// When the last deed is done.
    pub fn end_us(&self) -> u64 {
        self.deeds.last().map_or(0, |planned| planned.at_us)
    }
}

impl Deed {
    fn draw(random: &mut Random, shape: &Shape) -> Deed {
        let nodes = shape.nodes as u64;
        let node = random.below(nodes) as usize;
        let peer = (node + 1 + random.below(nodes - 1) as usize) % shape.nodes;
        if shape.reckless && random.chance(8) {
            return match random.below(5) {
                0 => Deed::Promote {
                    node,
                    force: random.chance(30),
                },
                1 => Deed::Demote { node },
                // Who is added again starts from data of its own: one side has to give up its own.
                2 => Deed::RemovePeer { node, peer },
                3 => Deed::AddPeer { node, peer },
                _ => Deed::Connect {
                    node,
                    peer,
                    discard_my_data: true,
                },
            };
        }
        match random.below(100) {
            0..6 => Deed::Cut {
                one: node,
                other: peer,
            },
            6..9 => Deed::CutOneWay {
                from: node,
                to: peer,
            },
            9..11 => Deed::Isolate { node },
            11..20 => Deed::Heal {
                one: node,
                other: peer,
            },
            20..23 => Deed::HealAll,
            23..26 => Deed::Reset {
                one: node,
                other: peer,
            },
            26..29 => Deed::Kill { node },
            29..31 => Deed::PowerLoss { node },
            31 => Deed::PowerLossOfAll,
            32..41 => Deed::Start { node },
            41..44 => Deed::FailOver { to: node },
            44..47 => Deed::HandOver { to: node },
            47..49 => Deed::Detach { node },
            49..52 => Deed::Attach { node },
            52..54 => Deed::Disconnect { node, peer },
            54..58 => Deed::Connect {
                node,
                peer,
                discard_my_data: false,
            },
            58 => Deed::Invalidate { node },
            59 => Deed::PauseResync { node },
            60..63 => Deed::ResumeResync { node },
            63 => Deed::Stop { node },
            64..70 => Deed::draw_disk(random, node),
            70..74 => Deed::draw_slowness(random, node, peer, shape),
            74 => Deed::ForcePromote { node },
            75 => Deed::SetOptions {
                node,
                ping_interval_ms: one_of(random, &[50, 1000, 5000]),
                ping_timeout_ms: one_of(random, &[100, 300, 3000]),
                resync_rate_bytes: one_of(random, &[0, 1 << 20, 20 << 20]),
            },
            _ => Deed::Load {
                count: random.between(1, 24) as u32,
                every_us: one_of(random, &[0, 3, 30, 30, 300, 3_000]),
                seed: random.number(),
            },
        }
    }
}

impl Deed {
    fn draw_slowness(random: &mut Random, node: usize, peer: usize, shape: &Shape) -> Deed {
        let for_us = one_of(random, &[30_000, 500_000, 5_000_000]);
        match random.below(6) {
            0 => Deed::SlowCore {
                node,
                core: random.below(shape.cores as u64) as usize,
                most_us: one_of(random, &[5_000, 100_000, 2_000_000]),
                for_us,
            },
            1 => Deed::SlowNode {
                node,
                most_us: one_of(random, &[2_000, 20_000, 200_000]),
                for_us,
            },
            2 => Deed::SlowLink {
                from: node,
                to: peer,
                most_us: one_of(random, &[2_000, 50_000, 500_000]),
                for_us,
            },
            3..5 => Deed::StallLink {
                from: node,
                to: peer,
                for_us: one_of(random, &[1_000, 20_000, 250_000, 3_000_000]),
            },
            _ => Deed::JumpClock {
                node,
                by_us: one_of(random, &[10_000, 400_000, 12_000_000, 3_600_000_000]),
            },
        }
    }

    fn draw_disk(random: &mut Random, node: usize) -> Deed {
        let for_us = one_of(random, &[1_000, 30_000, 500_000, 5_000_000]);
        match random.below(10) {
            0..2 => Deed::SlowDisk {
                node,
                most_us: one_of(random, &[2_000, 50_000, 800_000]),
                for_us,
            },
            2..4 => Deed::FailDisk {
                node,
                failing: Failing {
                    reads: random.chance(30),
                    writes: random.chance(30),
                    flushes: random.chance(30),
                    metadata: random.chance(30),
                },
                percent: one_of(random, &[2, 20, 100]),
                for_us,
            },
            4..6 => Deed::FreezeDisk {
                node,
                // Also until it is mended or the node ends.
                for_us: one_of(random, &[for_us, for_us, 20_000_000, ACTIVE_US * 100]),
            },
            6..8 => Deed::MendDisk { node },
            _ => Deed::Rot {
                node,
                block: match random.below(3) {
                    0 => MetadataBlock::Superblock(random.below(4) as u8),
                    1 => MetadataBlock::Log(random.below(32) as u32),
                    _ => MetadataBlock::Bitmap(random.below(8) as u32),
                },
            },
        }
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
