//! Draws schedules: the shape of a world, single deeds, and now and then a story of several that belong together. What is
//! drawn differently here makes another run of every seed. Must not know the engine.

use super::schedule::{ACTIVE_US, Contents, Deed, Planned, Replacement, Schedule, Scope, Shape};
use super::stories;
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::disk_faults::{Failing, MetadataBlock};

/// So many of the deeds begin a story.
const STORIES_PERCENT: u64 = 4;

/// One of these.
pub fn one_of<T: Copy>(random: &mut Random, all: &[T]) -> T {
    all[random.below(all.len() as u64) as usize]
}

impl Shape {
    fn draw(random: &mut Random, scope: &Scope) -> Shape {
        let (fewest, most) = (*scope.nodes.start(), *scope.nodes.end());
        // Small worlds have the most to tell for the time they take.
        let nodes = one_of(random, &[2, 2, 2, 2, 3, 3, 3, 4, 5]).clamp(fewest, most);
        let in_capsule = [0, 512, 1500, 4096, 4096, 8192, 20_000, 128 << 10];
        let mut shape = Shape {
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
            contents: Contents::Clean,
        };
        shape.contents = match random.below(20) {
            0 => Contents::Nothing,
            1 => Contents::OneHasAll,
            _ => Contents::Clean,
        };
        if shape.contents != Contents::Clean {
            // All of it is copied.
            shape.volume_mib = 8;
        }
        shape
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
            if random.chance(STORIES_PERCENT) {
                for (gap_us, deed) in stories::draw(&mut random, &shape) {
                    at_us += gap_us;
                    deeds.push(Planned { at_us, deed });
                }
            } else {
                let deed = Deed::draw(&mut random, &shape);
                deeds.push(Planned { at_us, deed });
            }
            if at_us > ACTIVE_US {
                break;
            }
        }
        deeds.retain(|planned| planned.at_us <= ACTIVE_US);
        Schedule { seed, shape, deeds }
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
            75 if random.chance(15) => Deed::Replace {
                node,
                with: if random.chance(30) {
                    Replacement::Foreign
                } else {
                    Replacement::Nothing
                },
            },
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
                place: None,
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
