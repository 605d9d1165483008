//! Stories: deeds that belong together, where single ones would meet only by chance. Most are about writes that meet a
//! resync, a handshake or a promotion, and about what ends one of these in the middle. Every part is a deed like any other.

use super::drawing::one_of;
use super::schedule::{Deed, Shape};
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::moments::Moment;

/// Deeds, and how long after the one before each is done.
type Story = Vec<(u64, Deed)>;

/// The nodes that a story is about, and where its writes go.
struct Cast {
    node: usize,
    peer: usize,
    cores: usize,
    place: u8,
}

/// A story.
pub fn draw(random: &mut Random, shape: &Shape) -> Story {
    let nodes = shape.nodes as u64;
    let node = random.below(nodes) as usize;
    let cast = Cast {
        node,
        peer: (node + 1 + random.below(nodes - 1) as usize) % shape.nodes,
        cores: shape.cores,
        place: random.below(8) as u8,
    };
    match random.below(12) {
        0..5 => cast.writes_meet_a_resync(random),
        5 => cast.a_session_ends_in_the_middle(random),
        6..8 => cast.a_session_ends_over_a_slow_disk(random),
        8..10 => cast.a_promotion_is_followed_by_trouble(random),
        10 => cast.a_disk_comes_back_twice(random),
        _ => cast.a_crashed_primary_goes_on_alone(random),
    }
}

impl Cast {
    fn load(&self, random: &mut Random, count: u64, every_us: u64) -> Deed {
        Deed::Load {
            count: random.between(count / 2, count) as u32,
            every_us,
            seed: random.number(),
            place: Some(self.place),
        }
    }

    fn some_node(&self, random: &mut Random) -> usize {
        one_of(random, &[self.node, self.peer])
    }

    fn after(&self, random: &mut Random, node: usize, moment: Moment, then: Deed) -> Deed {
        Deed::Await {
            node,
            moment,
            skip: one_of(random, &[0, 0, 0, 1, 1, 2, 5]),
            after_us: match random.below(4) {
                0 => 0,
                1 => random.below(50),
                2 => random.below(400),
                _ => random.below(4_000),
            },
            then: Box::new(then),
        }
    }

    /// What makes the nodes part, and what brings them together again.
    fn parting(&self, random: &mut Random) -> (Story, Story) {
        let Cast { node, peer, .. } = *self;
        let connect = |node, peer| Deed::Connect {
            node,
            peer,
            discard_my_data: false,
        };
        match random.below(8) {
            0..2 => (
                vec![(0, Deed::Disconnect { node, peer })],
                vec![(0, connect(node, peer)), (0, connect(peer, node))],
            ),
            2 => (
                vec![(
                    0,
                    Deed::Cut {
                        one: node,
                        other: peer,
                    },
                )],
                vec![(
                    random.between(1_500_000, 3_000_000),
                    Deed::Heal {
                        one: node,
                        other: peer,
                    },
                )],
            ),
            3 => (
                vec![(0, Deed::Kill { node })],
                vec![(random.below(100_000), Deed::Start { node })],
            ),
            4 => (
                vec![(0, Deed::PowerLoss { node })],
                vec![(random.below(3_000_000), Deed::Start { node })],
            ),
            5..7 => (
                vec![(0, Deed::Detach { node })],
                vec![(random.below(20_000), Deed::Attach { node })],
            ),
            _ => (
                vec![(
                    0,
                    Deed::Reset {
                        one: node,
                        other: peer,
                    },
                )],
                vec![],
            ),
        }
    }

    /// Something that ends what is under way.
    fn trouble(&self, random: &mut Random) -> Deed {
        let node = self.some_node(random);
        match random.below(12) {
            0..3 => Deed::Reset {
                one: self.node,
                other: self.peer,
            },
            3 => Deed::Kill { node },
            4..7 => Deed::PowerLoss { node },
            7 => Deed::PowerLossOfAll,
            8 => Deed::Detach { node },
            9 => Deed::Disconnect {
                node: self.node,
                peer: self.peer,
            },
            10 => Deed::Cut {
                one: self.node,
                other: self.peer,
            },
            _ => Deed::Stop { node },
        }
    }

    /// Of whatever was the trouble.
    fn recovery(&self, random: &mut Random) -> Story {
        let Cast { node, peer, .. } = *self;
        let connect = Deed::Connect {
            node,
            peer,
            discard_my_data: false,
        };
        let heal = Deed::Heal {
            one: node,
            other: peer,
        };
        vec![
            (random.between(1_000, 400_000), Deed::Start { node }),
            (random.below(30_000), Deed::Start { node: peer }),
            (random.below(2_000_000), heal),
            (0, connect),
            (0, Deed::Attach { node }),
            (0, Deed::Attach { node: peer }),
        ]
    }

    /// Something is slow, so that what follows it lasts.
    fn slowness(&self, random: &mut Random) -> Deed {
        let node = self.some_node(random);
        let other = self.node + self.peer - node;
        let for_us = one_of(random, &[50_000, 500_000]);
        match random.below(4) {
            0..2 => Deed::SlowDisk {
                node,
                most_us: one_of(random, &[500, 5_000, 30_000]),
                for_us,
            },
            2 => Deed::SlowLink {
                from: node,
                to: other,
                most_us: one_of(random, &[500, 5_000, 30_000]),
                for_us,
            },
            _ => Deed::SlowCore {
                node,
                core: random.below(self.cores as u64) as usize,
                most_us: one_of(random, &[1_000, 10_000]),
                for_us,
            },
        }
    }

    /// Blocks are missed and written again while they are fetched.
    fn writes_meet_a_resync(&self, random: &mut Random) -> Story {
        let (part, join) = self.parting(random);
        let mut story = part;
        let every_us = one_of(random, &[10, 100, 500]);
        story.push((random.below(3_000), self.load(random, 24, every_us)));
        let target = self.some_node(random);
        let moment = one_of(
            random,
            &[
                Moment::Target,
                Moment::Target,
                Moment::Source,
                Moment::ResyncRead,
                Moment::WaitsForBitmap,
                Moment::Report,
            ],
        );
        if random.chance(50) {
            let slowness = self.slowness(random);
            story.push((0, slowness));
        }
        let every_us = one_of(random, &[0, 5, 20, 100]);
        let load = self.load(random, 40, every_us);
        story.push((0, self.after(random, target, moment, load)));
        if random.chance(50) {
            let moment = one_of(
                random,
                &[
                    Moment::Report,
                    Moment::Report,
                    Moment::ResyncRead,
                    Moment::Finish,
                    Moment::SyncStart,
                ],
            );
            let (node, trouble) = (self.some_node(random), self.trouble(random));
            story.push((0, self.after(random, node, moment, trouble)));
        }
        let gap_us = random.between(1_000, 60_000);
        story.push((gap_us, self.load(random, 4, 10)));
        story.extend(join);
        story.extend(self.recovery(random));
        story
    }

    /// Between Hello and Connected, or at the start or end of a resync; and there is I/O in that moment.
    fn a_session_ends_in_the_middle(&self, random: &mut Random) -> Story {
        let moments = [
            Moment::Hello,
            Moment::Confirm,
            Moment::Bitmap,
            Moment::SyncStart,
            Moment::Finish,
            Moment::NewGeneration,
            Moment::Notice,
            Moment::Connected,
        ];
        let (mut story, join) = self.parting(random);
        if random.chance(50) {
            story.push((random.below(3_000), self.load(random, 12, 100)));
        }
        for _ in 0..random.between(1, 2) {
            let (moment, node) = (one_of(random, &moments), self.some_node(random));
            let load = self.load(random, 12, 20);
            story.push((0, self.after(random, node, moment, load)));
            let (moment, node) = (one_of(random, &moments), self.some_node(random));
            let trouble = self.trouble(random);
            story.push((0, self.after(random, node, moment, trouble)));
        }
        story.extend(join);
        story.extend(self.recovery(random));
        story
    }

    /// What a peer has received waits there while the session ends and the next one begins.
    fn a_session_ends_over_a_slow_disk(&self, random: &mut Random) -> Story {
        let slow = Deed::SlowDisk {
            node: self.peer,
            most_us: one_of(random, &[20_000, 100_000, 400_000]),
            for_us: one_of(random, &[100_000, 1_000_000]),
        };
        let reset = Deed::Reset {
            one: self.node,
            other: self.peer,
        };
        vec![
            (0, slow),
            (0, self.load(random, 30, 10)),
            (random.between(300, 20_000), reset),
            (random.below(80_000), self.load(random, 30, 1_000)),
            (random.between(50_000, 200_000), self.load(random, 30, 100)),
        ]
    }

    /// Who has become Primary writes or reads, and is gone again.
    fn a_promotion_is_followed_by_trouble(&self, random: &mut Random) -> Story {
        let Cast { node, peer, .. } = *self;
        let mut story = vec![(0, self.load(random, 20, 30))];
        let to = self.some_node(random);
        let go = match random.below(3) {
            0 => Deed::HandOver { to },
            1 => Deed::FailOver { to },
            _ => Deed::Kill {
                node: node + peer - to,
            },
        };
        if random.chance(40) {
            let cut = Deed::Cut {
                one: node,
                other: peer,
            };
            story.push((random.below(1_500), cut));
        }
        let load = self.load(random, 16, 30);
        let trouble = self.trouble(random);
        story.push((0, self.after(random, to, Moment::Primary, load)));
        story.push((0, self.after(random, to, Moment::Primary, trouble)));
        story.push((random.below(1_500), go));
        // Who was the Primary may be it once more, alone.
        let restarted = self.some_node(random);
        story.push((
            random.between(1_000, 50_000),
            Deed::Start { node: restarted },
        ));
        story.push((random.between(1_000, 50_000), self.load(random, 16, 30)));
        if random.chance(60) {
            let node = self.some_node(random);
            story.push((random.below(20_000), Deed::Kill { node }));
        }
        story.extend(self.recovery(random));
        story
    }
    /// The disk goes again while what it has missed is fetched, and has missed more when it comes back: the application
    /// reads that at once.
    fn a_disk_comes_back_twice(&self, random: &mut Random) -> Story {
        let Cast { node, .. } = *self;
        let again = self.after(random, node, Moment::Target, Deed::Detach { node });
        let every_us = one_of(random, &[0, 2, 10]);
        let load = self.load(random, 40, every_us);
        vec![
            (0, Deed::Detach { node }),
            (random.below(3_000), self.load(random, 30, 30)),
            (0, again),
            (random.below(10_000), Deed::Attach { node }),
            (random.between(2_000, 100_000), self.load(random, 30, 30)),
            (
                0,
                Deed::Await {
                    node,
                    moment: Moment::WaitsForBitmap,
                    skip: 0,
                    after_us: random.below(100),
                    then: Box::new(load),
                },
            ),
            (random.between(1_000, 20_000), Deed::Attach { node }),
        ]
    }

    /// What it had written and its peer had not is read there before the two meet again.
    fn a_crashed_primary_goes_on_alone(&self, random: &mut Random) -> Story {
        let Cast { node, peer, .. } = *self;
        let cut = Deed::CutOneWay {
            from: node,
            to: peer,
        };
        let heal = Deed::Heal {
            one: node,
            other: peer,
        };
        vec![
            (0, cut),
            (random.below(50), self.load(random, 20, 10)),
            (random.between(100, 2_000), Deed::Kill { node }),
            (random.between(100, 5_000), Deed::Start { node }),
            (random.between(20_000, 40_000), self.load(random, 20, 100)),
            (random.between(500, 10_000), Deed::Kill { node }),
            (random.below(10_000), heal),
            (0, Deed::Start { node }),
            (random.between(5_000, 100_000), self.load(random, 20, 100)),
        ]
    }
}
