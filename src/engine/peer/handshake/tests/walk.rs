//! Two model nodes that write, lose each other, die, resync and are cut off between any two durable steps
//! of a resync. Each block holds the number of the write last applied, and each node knows which writes
//! its data contains, so that what a decision would lose, or leave different, can be seen.

use std::collections::BTreeSet;

use proptest::strategy::ValueTree;

use super::*;
use crate::engine::meta::generation::Generations;
use crate::engine::peer::state::{ConnState, PeerState, PromotePeer, can_promote};

const BLOCKS: usize = 8;
/// Each model node has the other in this slot.
const SLOT: usize = 0;

#[derive(Clone, Debug)]
struct Node {
    role: Role,
    disk: DiskState,
    generations: Generations,
    blocks: [u64; BLOCKS],
    dirty: [bool; BLOCKS],
    activity_log: [bool; BLOCKS],
    /// Writes that completed upward and that this data contains, and generations that it started.
    contains: BTreeSet<u64>,
    crashed_primary: bool,
    unclean: bool,
    had_session: bool,
    discard: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Down,
    Connected,
    /// The index of the source.
    Resync(usize),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write {
        block: usize,
    },
    /// A write that has reached some of the disks when the Primary dies or the link does.
    TornWrite {
        block: usize,
        here: bool,
        there: bool,
        dies: bool,
    },
    RetireActivityLog,
    CutLink,
    Disconnect,
    /// Connects; a resync is cut off after that many of its durable steps.
    Connect {
        steps: usize,
    },
    Pull {
        blocks: usize,
    },
    FinishResync {
        steps: usize,
    },
    Die {
        node: usize,
    },
    Promote {
        node: usize,
    },
    Demote,
    GiveUp {
        node: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let block = || 0..BLOCKS;
    prop_oneof![
        4 => block().prop_map(|block| Step::Write { block }),
        3 => (block(), any::<[bool; 3]>())
            .prop_map(|(block, [here, there, dies])| Step::TornWrite { block, here, there, dies }),
        1 => Just(Step::RetireActivityLog),
        1 => Just(Step::CutLink),
        1 => Just(Step::Disconnect),
        6 => prop_oneof![1 => 0..3usize, 3 => Just(3)].prop_map(|steps| Step::Connect { steps }),
        3 => (1..=BLOCKS).prop_map(|blocks| Step::Pull { blocks }),
        3 => (0..3usize).prop_map(|steps| Step::FinishResync { steps }),
        1 => (0..2usize).prop_map(|node| Step::Die { node }),
        3 => (0..2usize).prop_map(|node| Step::Promote { node }),
        1 => Just(Step::Demote),
        1 => (0..2usize).prop_map(|node| Step::GiveUp { node }),
    ]
}

struct World {
    nodes: [Node; 2],
    link: Link,
    counter: u64,
    reached: BTreeSet<Rule>,
}

impl World {
    /// A volume whose first node was declared the newest by force, and a new second node.
    fn new() -> World {
        let node = Node {
            role: Role::Secondary,
            disk: DiskState::Inconsistent,
            generations: Generations::new(GENERATION_JUST_CREATED),
            blocks: [0; BLOCKS],
            dirty: [false; BLOCKS],
            activity_log: [false; BLOCKS],
            contains: BTreeSet::new(),
            crashed_primary: false,
            unclean: false,
            had_session: false,
            discard: false,
        };
        let mut world = World {
            nodes: [node.clone(), node],
            link: Link::Down,
            counter: 0,
            reached: BTreeSet::new(),
        };
        world.nodes[0].disk = DiskState::UpToDate;
        world.nodes[0].blocks = [u64::MAX; BLOCKS];
        world.start_generation(0);
        world
    }

    fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn start_generation(&mut self, node: usize) {
        let number = self.next();
        self.nodes[node].generations.bump(number * 16, 1 << SLOT);
        self.nodes[node].contains.insert(number);
    }

    fn hello(&self, node: usize) -> Hello {
        let Node {
            generations, dirty, ..
        } = &self.nodes[node];
        Hello {
            role: self.nodes[node].role,
            disk: self.nodes[node].disk,
            crashed_primary: self.nodes[node].crashed_primary,
            unclean: self.nodes[node].unclean,
            discard_my_data: self.nodes[node].discard,
            had_session: self.nodes[node].had_session,
            bitmap_generation: generations.bitmap[SLOT],
            history: generations.history,
            dirty_bits: dirty.iter().filter(|&&dirty| dirty).count() as u64,
            ..hello_of(node as u8, 1 - node as u8, generations.current)
        }
    }

    /// The Primary, if its application can write now.
    fn writer(&self) -> Option<usize> {
        (0..2).find(|&node| {
            let Node { role, disk, .. } = self.nodes[node];
            let through_peer = self.link == Link::Resync(1 - node);
            role == Role::Primary && (disk == DiskState::UpToDate || through_peer)
        })
    }

    fn write(&mut self, block: usize) {
        let Some(primary) = self.writer() else { return };
        if self.link == Link::Down {
            if self.nodes[primary].generations.needs_bump(SLOT) {
                self.start_generation(primary);
            }
            self.nodes[primary].dirty[block] = true;
        }
        let number = self.next();
        self.nodes[primary].activity_log[block] = true;
        for node in 0..2 {
            if node == primary || self.link != Link::Down {
                self.nodes[node].blocks[block] = number;
                // A target that is half a copy contains nothing that counts until it is whole.
                if self.nodes[node].disk > DiskState::Inconsistent {
                    self.nodes[node].contains.insert(number);
                }
            }
        }
    }

    fn torn_write(&mut self, block: usize, here: bool, there: bool, dies: bool) {
        let Some(primary) = self.writer() else { return };
        let number = self.next();
        self.nodes[primary].activity_log[block] = true;
        if here {
            self.nodes[primary].blocks[block] = number;
        }
        if there && self.link != Link::Down {
            self.nodes[1 - primary].blocks[block] = number;
        }
        if dies {
            self.die(primary);
        } else {
            // The write is held: the Primary has set the bit, and not yet started a generation. When it
            // goes on, or connects, it writes the same again.
            self.nodes[primary].blocks[block] = number;
            self.nodes[primary].dirty[block] = true;
            self.link = Link::Down;
        }
    }

    fn die(&mut self, node: usize) {
        self.link = Link::Down;
        let Node {
            role,
            dirty,
            activity_log,
            crashed_primary,
            unclean,
            had_session,
            ..
        } = &mut self.nodes[node];
        for (dirty, active) in dirty.iter_mut().zip(activity_log) {
            *unclean |= *active;
            *dirty |= std::mem::take(active);
        }
        *crashed_primary |= *role == Role::Primary;
        *role = Role::Secondary;
        *had_session = false;
    }

    fn connect(&mut self, steps: usize) -> Result<(), TestCaseError> {
        if self.link != Link::Down {
            return Ok(());
        }
        let (here, there) = (self.hello(0), self.hello(1));
        prop_assert_eq!(Hello::parse(&here.emit()), Ok(here));
        prop_assert_eq!(Hello::parse(&there.emit()), Ok(there));
        let Decision { rule, outcome } = decide(&here, &there);
        self.reached.insert(rule);
        let [first, second] = &self.nodes;
        match outcome {
            Outcome::InSync => {
                prop_assert_eq!(
                    first.blocks,
                    second.blocks,
                    "{} would leave a difference",
                    rule
                );
                prop_assert_eq!(&first.contains, &second.contains);
                for node in &mut self.nodes {
                    node.generations.finish_sync_as_source(SLOT);
                }
                self.settle();
            }
            Outcome::SyncSource { full } => self.start_resync(0, full, rule, steps)?,
            Outcome::SyncTarget { full } => self.start_resync(1, full, rule, steps)?,
            Outcome::SplitBrain => {
                prop_assert!(
                    !first.contains.is_subset(&second.contains),
                    "no split brain: {}",
                    rule
                );
                prop_assert!(
                    !second.contains.is_subset(&first.contains),
                    "no split brain: {}",
                    rule
                );
            }
            Outcome::Refuse(RefuseReason::DualPrimary) => {
                prop_assert_eq!([first.role, second.role], [Role::Primary; 2]);
            }
            Outcome::Refuse(reason) => {
                prop_assert_eq!(reason, RefuseReason::PrimaryWouldBeTarget);
                let primary = usize::from(second.role == Role::Primary);
                let (stays, other) = (&self.nodes[primary], &self.nodes[1 - primary]);
                prop_assert!(
                    !other.contains.is_subset(&stays.contains),
                    "needless: {}",
                    rule
                );
            }
            Outcome::Unrelated | Outcome::ConnectWithoutSync | Outcome::Ahead | Outcome::Behind => {
                prop_assert!(false, "{:?} by {}", outcome, rule);
            }
        }
        Ok(())
    }

    /// Both are the same from here.
    fn settle(&mut self) {
        self.link = Link::Connected;
        for node in &mut self.nodes {
            node.crashed_primary = false;
            node.unclean = false;
            node.had_session = true;
            node.discard = false;
        }
    }

    fn start_resync(
        &mut self,
        source: usize,
        full: bool,
        rule: Rule,
        steps: usize,
    ) -> Result<(), TestCaseError> {
        let target = 1 - source;
        prop_assert!(
            !full || rule == Rule::JustCreated || rule == Rule::MissedStart,
            "full by {}",
            rule
        );
        prop_assert!(
            rule == Rule::SplitBrainResolved
                || self.nodes[target]
                    .contains
                    .is_subset(&self.nodes[source].contains),
            "{} would lose completed writes",
            rule
        );
        let Node { role, disk, .. } = self.nodes[target];
        prop_assert!(
            role != Role::Primary || disk != DiskState::UpToDate,
            "under the application"
        );
        if steps >= 1 {
            for block in 0..BLOCKS {
                let dirty = full || self.nodes.iter().any(|node| node.dirty[block]);
                self.nodes
                    .iter_mut()
                    .for_each(|node| node.dirty[block] = dirty);
            }
        }
        let Generations {
            current, history, ..
        } = self.nodes[source].generations.clone();
        if steps >= 2 {
            let target = &mut self.nodes[target];
            target.disk = DiskState::Inconsistent;
            target.contains.clear();
            target.generations.start_sync_as_target(current, &history);
        }
        if steps >= 3 {
            self.nodes[source].generations.start_sync_as_source(SLOT);
            self.nodes
                .iter_mut()
                .for_each(|node| node.had_session = true);
            self.link = Link::Resync(source);
        }
        Ok(())
    }

    fn pull(&mut self, blocks: usize) {
        let Link::Resync(source) = self.link else {
            return;
        };
        let dirty: Vec<usize> = (0..BLOCKS)
            .filter(|&block| self.nodes[1 - source].dirty[block])
            .take(blocks)
            .collect();
        for block in dirty {
            self.nodes[1 - source].blocks[block] = self.nodes[source].blocks[block];
            self.nodes
                .iter_mut()
                .for_each(|node| node.dirty[block] = false);
        }
    }

    fn finish_resync(&mut self, steps: usize) -> Result<(), TestCaseError> {
        let Link::Resync(source) = self.link else {
            return Ok(());
        };
        self.pull(BLOCKS);
        let target = 1 - source;
        prop_assert_eq!(
            self.nodes[source].blocks,
            self.nodes[target].blocks,
            "bits were missing"
        );
        self.link = Link::Down;
        if steps >= 1 {
            let Node {
                generations,
                contains,
                ..
            } = self.nodes[source].clone();
            let target = &mut self.nodes[target];
            target.disk = DiskState::UpToDate;
            target.generations.finish_sync_as_target(&generations, SLOT);
            target.contains = contains;
        }
        if steps >= 2 {
            self.nodes[source].generations.finish_sync_as_source(SLOT);
            self.settle();
        }
        Ok(())
    }

    fn promote(&mut self, node: usize) {
        let peer = &self.nodes[1 - node];
        let (conn, pdsk) = match self.link {
            Link::Down => (ConnState::Connecting, DiskState::DUnknown),
            Link::Connected => (ConnState::Connected, peer.disk),
            Link::Resync(source) if source == node => (ConnState::SyncSource, peer.disk),
            Link::Resync(_) => (ConnState::SyncTarget, peer.disk),
        };
        let role = if self.link == Link::Down {
            Role::Unknown
        } else {
            peer.role
        };
        let state = PeerState::new(conn, pdsk).expect("the model enters permitted states only");
        if can_promote(
            self.nodes[node].disk,
            [PromotePeer {
                slot: SLOT,
                role,
                state,
            }],
            false,
        )
        .is_ok()
        {
            self.nodes[node].role = Role::Primary;
        }
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Write { block } => self.write(block),
            Step::TornWrite {
                block,
                here,
                there,
                dies,
            } => self.torn_write(block, here, there, dies),
            Step::RetireActivityLog => {
                self.nodes
                    .iter_mut()
                    .for_each(|node| node.activity_log = [false; BLOCKS]);
            }
            Step::CutLink => self.link = Link::Down,
            Step::Disconnect => {
                if self.link == Link::Connected {
                    if let Some(primary) = self.writer() {
                        self.nodes[1 - primary].disk = DiskState::Outdated;
                    }
                    self.link = Link::Down;
                }
            }
            Step::Connect { steps } => self.connect(steps)?,
            Step::Pull { blocks } => self.pull(blocks),
            Step::FinishResync { steps } => self.finish_resync(steps)?,
            Step::Die { node } => self.die(node),
            Step::Promote { node } => self.promote(node),
            Step::Demote => self
                .nodes
                .iter_mut()
                .for_each(|node| node.role = Role::Secondary),
            Step::GiveUp { node } => {
                let split = !decide(&self.hello(0), &self.hello(1)).outcome.connects();
                if split && self.link == Link::Down {
                    self.nodes[node].role = Role::Secondary;
                    self.nodes[node].discard = true;
                    self.nodes[1 - node].discard = false;
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn no_completed_write_is_lost_and_no_difference_is_left(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.take(step)?;
        }
    }
}

#[test]
fn the_walk_comes_by_every_rule_that_two_nodes_with_disks_can_meet() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let walks = prop::collection::vec(step(), 120);
    let mut reached = BTreeSet::new();
    let expected = [
        Rule::JustCreated,
        Rule::MissedStart,
        Rule::SyncInterrupted,
        Rule::Outdated,
        Rule::MissedFinish,
        Rule::Reconnected,
        Rule::BothOff,
        Rule::SameGeneration,
        Rule::ReconcilePrimary,
        Rule::CrashedPrimary,
        Rule::ByBitmap,
        Rule::ByBitmapBoth,
        Rule::SplitBrainResolved,
    ];
    for _ in 0..2000 {
        let mut world = World::new();
        let steps = Strategy::new_tree(&walks, &mut runner).unwrap().current();
        for step in steps {
            world.take(step).unwrap();
        }
        reached.extend(world.reached);
        if expected.iter().all(|rule| reached.contains(rule)) {
            return;
        }
    }
    let missing: Vec<_> = expected
        .iter()
        .filter(|&rule| !reached.contains(rule))
        .collect();
    panic!("never reached: {missing:?}");
}
