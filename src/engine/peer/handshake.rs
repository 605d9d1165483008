//! The decision over two Hellos: whose data is newer, and what is to happen. One pure function.
//! Called by the manager of each of the two nodes, which must come to mirrored ends; must not know
//! sessions, links or bitmaps.
//!
//! What the rules rely on, and the rest of the engine keeps:
//!
//! - A Primary that goes on without a peer makes a new current generation first, and remembers the old one
//!   as that peer's bitmap generation unless it holds an earlier one there already.
//! - A resync starts after both bitmaps were ORed and are durable on both sides: first the target is,
//!   durably, Inconsistent with the source's current generation; then the source's bitmap generation for
//!   the target becomes its current one.
//! - A resync ends with the target durably UpToDate; then the source's bitmap generation becomes 0.

mod started;

use std::fmt;

use thiserror::Error;

use super::hello::{GENERATION_JUST_CREATED, GENERATION_NONE, Hello};
use super::state::{DiskState, Role};
use crate::engine::mutation::{self, Mutation};
use started::{before_start, in_effect};

pub use started::takes_back;

/// Which rule decided. Its documentation says what state of the two nodes leads to it; "one" and "the
/// other" may be either of the two, the outcome says which.
///
/// The rules are tried in this order, but for a split brain that bitmap generations show only if no history
/// settles it, and for `TakenBack` of one that lacks the data, which comes first. Up to `FullSyncWanted` it does not
/// matter whose data is newer; from `BothInconsistent` to `ReconcileByNodeId` both have the same current generation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Rule {
    /// Both Hellos come from the same node id: a node was connected to itself, or configured twice.
    SameNode,
    /// One is a Primary without a disk whose application has seen data; the other has a disk. They go
    /// together if that data is of the generation that the application saw.
    DisklessPrimary,
    /// One or both have no data (Diskless, or attaching or failing): nothing to compare.
    NoDisk,
    /// Both were created and never held data: nobody has anything to give.
    BothJustCreated,
    /// One was created, or its disk replaced, and never held data.
    JustCreated,
    /// One was invalidated by the operator, or was cut off at the start of a full sync before its all-set
    /// bitmap was durable. It fetches nothing from a node that is behind it.
    FullSyncWanted,
    /// Both were resync targets, of a third node or of each other's earlier self, and that was cut off.
    BothInconsistent,
    /// A resync was cut off when the target had made itself Inconsistent, durably, and the source had not
    /// yet noted that the resync began.
    MissedStart,
    /// A resync was cut off in its middle; it goes on from the bits that are left.
    SyncInterrupted,
    /// One was told that a Primary goes on without it, and that Primary then wrote nothing.
    Outdated,
    /// A resync was cut off when the target was UpToDate, durably, and the source had not yet noted that
    /// the resync ended.
    MissedFinish,
    /// The link was cut and came back; nothing was written in between.
    Reconnected,
    /// Both were stopped, or both lost power while nothing was being written.
    BothOff,
    /// Same data, and only one of them remembers the other: it was stopped while idle, and came back.
    SameGeneration,
    /// The link was cut while a Primary was writing, and came back before it went on alone.
    ReconcilePrimary,
    /// Writes were under way when a Primary lost quorum and held them; they are still to complete there.
    LostQuorum,
    /// A Primary died while it wrote, and nobody has taken over. What it had on its way may be on one disk
    /// and not on the other; its applications may have read it, so its disk is followed.
    CrashedPrimary,
    /// One lost power with its activity log not empty (as a Secondary); the other kept running.
    ReconcileUnclean,
    /// Both died in the same way, with bits set: either is as good; the lower node id is followed.
    ReconcileByNodeId,
    /// One went on as Primary without the other.
    ByBitmap,
    /// One went on as Primary, and the other missed that for longer than a bitmap was kept for it.
    ByHistory,
    /// A Primary died while it told a generation to others. One has it, and counts the other in: it holds nothing
    /// that the other lacks. The other went on from the generation before.
    CountedIn,
    /// A Primary was cut short while it started a generation, under which nothing was written, and the other went on from the
    /// one before; or it started that without having the data itself, nobody is known to have taken it, and the other is of
    /// the one before.
    TakenBack,
    /// Both went on as Primary after they lost each other: bitmap generations show the common start.
    ByBitmapBoth,
    /// Both went on as Primary, and the histories show that they once were the same.
    ByHistoryBoth,
    /// As one of the two before, and the operator gave up the changes of exactly one.
    SplitBrainResolved,
    /// As one of the two before, and exactly one is in the middle of a resync from somebody else who is not there. It has
    /// given its data up already; whoever it was fetching from has what it got, and reports the split brain.
    GivenUp,
    /// The two have never held the same data.
    Unrelated,
}

impl Rule {
    /// Every rule, in the order in which they are tried.
    pub const ALL: [Rule; 28] = [
        Rule::SameNode,
        Rule::DisklessPrimary,
        Rule::NoDisk,
        Rule::BothJustCreated,
        Rule::JustCreated,
        Rule::FullSyncWanted,
        Rule::BothInconsistent,
        Rule::MissedStart,
        Rule::SyncInterrupted,
        Rule::Outdated,
        Rule::MissedFinish,
        Rule::Reconnected,
        Rule::BothOff,
        Rule::SameGeneration,
        Rule::ReconcilePrimary,
        Rule::LostQuorum,
        Rule::CrashedPrimary,
        Rule::ReconcileUnclean,
        Rule::ReconcileByNodeId,
        Rule::ByBitmap,
        Rule::ByHistory,
        Rule::CountedIn,
        Rule::TakenBack,
        Rule::ByBitmapBoth,
        Rule::ByHistoryBoth,
        Rule::SplitBrainResolved,
        Rule::GivenUp,
        Rule::Unrelated,
    ];
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why two nodes whose data may well fit do not connect. The same on both.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Error)]
pub enum RefuseReason {
    /// See [`Rule::SameNode`].
    #[error("both ends have the same node id")]
    SameNode,
    /// Both would write.
    #[error("both nodes are Primary; demote one")]
    DualPrimary,
    /// One is Primary, and the other has a session with another Primary: passes when that one is gone.
    #[error("the other node is connected to another Primary")]
    AnotherPrimary,
    /// The application on the Primary would see its data replaced.
    #[error("the Primary's data would be overwritten with the other node's; demote it first")]
    PrimaryWouldBeTarget,
    /// The application on a diskless Primary would see other data than before.
    #[error("the data is not what the application of the diskless Primary has seen")]
    NotWhatPrimarySaw,
}

/// What is to happen, from the view of one of the two.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Both hold the same. Bitmap generations for each other, if any, become 0.
    InSync,
    /// The other pulls: all blocks, or those with a bit set here or there.
    SyncSource {
        /// All blocks.
        full: bool,
    },
    /// We pull from the other.
    SyncTarget {
        /// All blocks.
        full: bool,
    },
    /// Connect; nobody has data that the other could take, or nobody may take it now.
    ConnectWithoutSync,
    /// Connect; our data is newer, but it is a Primary, or the other's present source, from whom the other gets it.
    Ahead,
    /// Connect; our data is older, and we get the newer from somebody else, or later.
    Behind,
    /// Both have changes of their own. Do not connect; the operator resolves it.
    SplitBrain,
    /// Never the same data. Do not connect.
    Unrelated,
    /// Do not connect.
    Refuse(RefuseReason),
}

impl Outcome {
    /// The same outcome from the other node's view.
    pub const fn mirrored(self) -> Outcome {
        match self {
            Outcome::SyncSource { full } => Outcome::SyncTarget { full },
            Outcome::SyncTarget { full } => Outcome::SyncSource { full },
            Outcome::Ahead => Outcome::Behind,
            Outcome::Behind => Outcome::Ahead,
            same => same,
        }
    }

    /// The two nodes get a session.
    pub const fn connects(self) -> bool {
        !matches!(
            self,
            Outcome::SplitBrain | Outcome::Unrelated | Outcome::Refuse(_)
        )
    }
}

/// What was decided, and why.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Decision {
    /// The rule that decided; the same on both nodes.
    pub rule: Rule,
    /// What this node does; mirrored on the other.
    pub outcome: Outcome,
}

/// The decision over two Hellos that [`negotiate`](super::hello::negotiate) has accepted, from the view of
/// the sender of `mine`. It is void as soon as either Hello's nonce is.
///
/// The two nodes are looked at in the order of their ids, whoever asks; so both see the same pair, and the
/// outcomes mirror each other.
pub fn decide(mine: &Hello, theirs: &Hello) -> Decision {
    if mine.node_id == theirs.node_id {
        return Decision {
            rule: Rule::SameNode,
            outcome: Outcome::Refuse(RefuseReason::SameNode),
        };
    }
    let mine_is_first = mine.node_id < theirs.node_id;
    let (first, second) = if mine_is_first {
        (mine, theirs)
    } else {
        (theirs, mine)
    };
    let is_taken_back = takes_back(first, second) || takes_back(second, first);
    let pair = Pair {
        first: &in_effect(first, second),
        second: &in_effect(second, first),
    };
    let Decision { rule, outcome } =
        pair.permitted(pair.by_state().unwrap_or_else(|| pair.by_data()));
    let rule = if is_taken_back { Rule::TakenBack } else { rule };
    Decision {
        rule,
        outcome: if mine_is_first {
            outcome
        } else {
            outcome.mirrored()
        },
    }
}

/// One of the two nodes, in the order of their ids.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    First,
    Second,
}

/// The two Hellos in the order of their node ids. Outcomes are from the view of `first`.
struct Pair<'a> {
    first: &'a Hello,
    second: &'a Hello,
}

impl Pair<'_> {
    /// Rules for which the generations of the data do not count.
    fn by_state(&self) -> Option<Decision> {
        let Pair { first, second } = *self;
        if !first.has_data() || !second.has_data() {
            let exposed = self.only(|one| one.role == Role::Primary && !one.has_data());
            return Some(match exposed.map(|primary| self.with_other(primary)) {
                Some((primary, other))
                    if other.has_data() && primary.current_generation != GENERATION_NONE =>
                {
                    let outcome = if primary.current_generation == other.current_generation {
                        Outcome::ConnectWithoutSync
                    } else {
                        Outcome::Refuse(RefuseReason::NotWhatPrimarySaw)
                    };
                    Decision {
                        rule: Rule::DisklessPrimary,
                        outcome,
                    }
                }
                _ => Decision {
                    rule: Rule::NoDisk,
                    outcome: Outcome::ConnectWithoutSync,
                },
            });
        }
        let just_created = |one: &Hello| one.current_generation == GENERATION_JUST_CREATED;
        if just_created(first) && just_created(second) {
            return Some(Decision {
                rule: Rule::BothJustCreated,
                outcome: Outcome::ConnectWithoutSync,
            });
        }
        if let Some(target) = self.only(just_created) {
            return Some(self.sync_to(Rule::JustCreated, target, true));
        }
        if let Some(target) = self.only(|one| one.wants_full_sync) {
            let (invalidated, source) = self.with_other(target);
            if source.disk > DiskState::Inconsistent {
                // It was told to fetch what the volume has, and that is none of it.
                let decision = self.by_data();
                if decision.rule == Rule::Unrelated {
                    return Some(decision);
                }
                // It was told to fetch what there is, not to go back to what it once had.
                if knows_as_past(invalidated, source) && !knows_as_past(source, invalidated) {
                    return Some(Decision {
                        rule: Rule::FullSyncWanted,
                        outcome: Outcome::ConnectWithoutSync,
                    });
                }
                return Some(self.sync_to(Rule::FullSyncWanted, target, true));
            }
        }
        None
    }

    fn by_data(&self) -> Decision {
        if self.first.current_generation == self.second.current_generation {
            self.by_disk_state()
        } else {
            self.by_generations()
        }
    }

    /// Same current generation: the disk states decide.
    fn by_disk_state(&self) -> Decision {
        let Pair { first, second } = *self;
        let inconsistent = |one: &Hello| one.disk == DiskState::Inconsistent;
        if inconsistent(first) && inconsistent(second) {
            return Decision {
                rule: Rule::BothInconsistent,
                outcome: Outcome::ConnectWithoutSync,
            };
        }
        if let Some(target) = self.only(inconsistent) {
            let (_, source) = self.with_other(target);
            if source.bitmap_generation == source.current_generation {
                return self.sync_to(Rule::SyncInterrupted, target, false);
            }
            // The bits that the resync was for are durable on both sides before it starts. If there are
            // none at all they were lost, and only a full sync is sure to find what differs.
            return self.sync_to(Rule::MissedStart, target, self.no_bits());
        }
        if let Some(target) = self.only(|one| one.disk == DiskState::Outdated) {
            return self.sync_to(Rule::Outdated, target, false);
        }
        if self.no_bits() {
            self.in_sync()
        } else {
            self.reconcile()
        }
    }

    /// Same data and no bits: only the story differs.
    fn in_sync(&self) -> Decision {
        let Pair { first, second } = *self;
        let keeps_generation = |one: &Hello| one.bitmap_generation != GENERATION_NONE;
        let rule = if keeps_generation(first) || keeps_generation(second) {
            Rule::MissedFinish
        } else {
            match (first.had_session, second.had_session) {
                (true, true) => Rule::Reconnected,
                (false, false) => Rule::BothOff,
                _ => Rule::SameGeneration,
            }
        };
        Decision {
            rule,
            outcome: Outcome::InSync,
        }
    }

    /// Same data except where bits are set: either version of those blocks is a legal one, but it must be
    /// the same on both. The first of these that is true of one node only makes it the source.
    fn reconcile(&self) -> Decision {
        if let Some(source) = self.only(|one| one.role == Role::Primary) {
            return self.sync_from(Rule::ReconcilePrimary, source);
        }
        if let Some(source) = self.only(|one| one.lost_quorum) {
            return self.sync_from(Rule::LostQuorum, source);
        }
        if let Some(source) = self.only(|one| one.crashed_primary) {
            return self.sync_from(Rule::CrashedPrimary, source);
        }
        if let Some(source) = self.only(|one| !one.unclean) {
            return self.sync_from(Rule::ReconcileUnclean, source);
        }
        self.sync_from(Rule::ReconcileByNodeId, Side::First)
    }

    /// Different current generations: bitmap generations and histories decide.
    fn by_generations(&self) -> Decision {
        let Pair { first, second } = *self;
        let keeps_bits_since = |one: &Hello, other: &Hello| {
            is_past(one.bitmap_generation) && one.bitmap_generation == other.current_generation
        };
        let remembers =
            |one: &Hello, other: &Hello| one.history.contains(&other.current_generation);

        // A node that kept bits since the other's generation, or that once was at it, is newer. If only one
        // is, that settles it, even where earlier bitmap generations look like a split brain: a split
        // brain's two generations are each unknown to the other side.
        if let Some(source) = self.only_towards(keeps_bits_since) {
            return self.sync_to(Rule::ByBitmap, source.other(), false);
        }
        if keeps_bits_since(first, second) && keeps_bits_since(second, first) {
            return self.split_brain(Rule::ByBitmapBoth, true);
        }
        let counted_in_primary = |one: &Hello, other: &Hello| {
            one.told
                && one.bitmap_generation == GENERATION_NONE
                && other.role == Role::Primary
                // One that lacks the data can only take it.
                && other.disk > DiskState::Inconsistent
                && remembers(one, other)
        };
        if let Some(target) = self.only_towards(counted_in_primary) {
            return self.sync_to(Rule::CountedIn, target, false);
        }
        if let Some(source) = self.only_towards(remembers) {
            return self.sync_to(Rule::ByHistory, source.other(), true);
        }
        let counts_in = |one: &Hello, other: &Hello| {
            one.told
                && one.bitmap_generation == GENERATION_NONE
                && is_past(other.bitmap_generation)
                && one.history.contains(&other.bitmap_generation)
        };
        if let Some(target) = self.only_towards(counts_in) {
            return self.sync_to(Rule::CountedIn, target, false);
        }
        if let Some(decision) = self.taken_back()
            && !mutation::is(Mutation::NeverTakenBack)
        {
            return decision;
        }
        if is_past(first.bitmap_generation) && first.bitmap_generation == second.bitmap_generation {
            return self.split_brain(Rule::ByBitmapBoth, false);
        }
        if past(first).any(|generation| {
            generation == second.current_generation || past(second).any(|other| other == generation)
        }) {
            return self.split_brain(Rule::ByHistoryBoth, true);
        }
        Decision {
            rule: Rule::Unrelated,
            outcome: Outcome::Unrelated,
        }
    }

    /// What it comes to if a generation that was cut short is taken back: nothing, or the other is the newer.
    fn taken_back(&self) -> Option<Decision> {
        [Side::Second, Side::First].into_iter().find_map(|side| {
            let (one, other) = self.with_other(side);
            let before = before_start(one)?;
            if before.current_generation == other.current_generation {
                return None;
            }
            let pair = match side {
                Side::First => Pair {
                    first: &before,
                    second: other,
                },
                Side::Second => Pair {
                    first: other,
                    second: &before,
                },
            };
            match (side, pair.by_generations().outcome) {
                (Side::First, Outcome::SyncTarget { full })
                | (Side::Second, Outcome::SyncSource { full }) => {
                    Some(self.sync_to(Rule::TakenBack, side, full))
                }
                _ => None,
            }
        })
    }

    fn split_brain(&self, rule: Rule, full: bool) -> Decision {
        match self.only(|one| one.discard_my_data) {
            Some(target) => self.sync_to(Rule::SplitBrainResolved, target, full),
            None if mutation::is(Mutation::SplitBrainResolvedUnasked) => {
                self.sync_to(rule, Side::Second, full)
            }
            None => match self.only_towards(has_given_up) {
                Some(target) => self.sync_to(Rule::GivenUp, target, true),
                None => Decision {
                    rule,
                    outcome: Outcome::SplitBrain,
                },
            },
        }
    }

    /// What holds whatever the rule: no two Primaries. A split brain of two Primaries is still reported as
    /// what it is, since demoting one would not mend it.
    fn permitted(&self, decision: Decision) -> Decision {
        let both_primary = self.first.role == Role::Primary && self.second.role == Role::Primary;
        let diverged = matches!(decision.outcome, Outcome::SplitBrain | Outcome::Unrelated);
        if both_primary && !diverged {
            let outcome = Outcome::Refuse(RefuseReason::DualPrimary);
            return Decision {
                outcome,
                ..decision
            };
        }
        if !decision.outcome.connects() {
            return decision;
        }
        let meets_another =
            |one: &Hello, other: &Hello| one.role == Role::Primary && other.sees_primary;
        if meets_another(self.first, self.second) || meets_another(self.second, self.first) {
            let outcome = Outcome::Refuse(RefuseReason::AnotherPrimary);
            return Decision {
                outcome,
                ..decision
            };
        }
        self.deferred(decision)
    }

    /// A node has one source at a time, and beside a Primary no other source: what that has written may be on the
    /// target already and still on its way to the source.
    fn deferred(&self, decision: Decision) -> Decision {
        let Pair { first, second } = *self;
        // A third node may have what an Outdated one lacks, and be the source of both.
        let is_source = |one: &Hello| one.has_others && one.disk == DiskState::Outdated;
        match decision.outcome {
            Outcome::SyncSource { .. } if is_source(first) => {
                return Decision {
                    outcome: Outcome::Ahead,
                    ..decision
                };
            }
            Outcome::SyncTarget { .. } if is_source(second) => {
                return Decision {
                    outcome: Outcome::Behind,
                    ..decision
                };
            }
            _ => {}
        }
        let has_primary = first.role == Role::Primary || second.role == Role::Primary;
        let sees_primary = !has_primary && (first.sees_primary || second.sees_primary);
        if !sees_primary && !first.is_target && !second.is_target {
            return decision;
        }
        // What one lost with its cache the other has.
        let same_data = decision.rule != Rule::ReconcileUnclean
            && first.current_generation == second.current_generation
            && first.disk > DiskState::Outdated
            && second.disk > DiskState::Outdated;
        let outcome = match decision.outcome {
            Outcome::SyncSource { .. } | Outcome::SyncTarget { .. } if same_data => {
                Outcome::ConnectWithoutSync
            }
            Outcome::SyncSource { .. } => Outcome::Ahead,
            Outcome::SyncTarget { .. } => Outcome::Behind,
            outcome => outcome,
        };
        Decision {
            outcome,
            ..decision
        }
    }

    fn sync_from(&self, rule: Rule, source: Side) -> Decision {
        self.sync_to(rule, source.other(), false)
    }

    /// A resync, if the source has data to give and the target's data may be replaced.
    fn sync_to(&self, rule: Rule, target_side: Side, full: bool) -> Decision {
        let (target, source) = self.with_other(target_side);
        let full = full || target.wants_full_sync;
        let outcome = if is_left_behind(rule, source) && !mutation::is(Mutation::OldPeerReadFrom) {
            if target_side == Side::First {
                Outcome::Behind
            } else {
                Outcome::Ahead
            }
        } else if source.disk <= DiskState::Inconsistent {
            Outcome::ConnectWithoutSync
        } else if target.role == Role::Primary && target.disk == DiskState::UpToDate {
            Outcome::Refuse(RefuseReason::PrimaryWouldBeTarget)
        } else if target_side == Side::First {
            Outcome::SyncTarget { full }
        } else {
            Outcome::SyncSource { full }
        };
        Decision { rule, outcome }
    }

    fn no_bits(&self) -> bool {
        self.first.dirty_bits == 0 && self.second.dirty_bits == 0
    }

    /// The one node for which `is` holds; `None` if it holds for both or neither.
    fn only(&self, is: impl Fn(&Hello) -> bool) -> Option<Side> {
        self.only_towards(|one, _| is(one))
    }

    /// The one node for which `is` holds towards the other; `None` if it holds both ways or neither.
    fn only_towards(&self, is: impl Fn(&Hello, &Hello) -> bool) -> Option<Side> {
        match (is(self.first, self.second), is(self.second, self.first)) {
            (true, false) => Some(Side::First),
            (false, true) => Some(Side::Second),
            _ => None,
        }
    }

    /// The Hello of this side, and the other's.
    fn with_other(&self, side: Side) -> (&Hello, &Hello) {
        match side {
            Side::First => (self.first, self.second),
            Side::Second => (self.second, self.first),
        }
    }
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::First => Side::Second,
            Side::Second => Side::First,
        }
    }
}

/// A Primary that fetches from somebody else has nothing to give yet. Whoever lacks what its application was told is written
/// is behind all the same: it must not be read from.
fn is_left_behind(rule: Rule, source: &Hello) -> bool {
    // A generation that counts the other in may be one that nobody else has heard of.
    let is_missing = source.bitmap_generation != GENERATION_NONE;
    matches!(rule, Rule::ByBitmap | Rule::ByHistory)
        && is_missing
        && source.role == Role::Primary
        && source.disk == DiskState::Inconsistent
}

/// It fetches all of its data, from nobody at present, and no application sees it; the other's is whole.
fn has_given_up(one: &Hello, other: &Hello) -> bool {
    one.disk == DiskState::Inconsistent
        && one.role != Role::Primary
        && !one.is_target
        && !one.sees_primary
        && other.disk == DiskState::UpToDate
}

/// The other's data is of a generation that this one's once was.
fn knows_as_past(one: &Hello, other: &Hello) -> bool {
    past(one).any(|generation| generation == other.current_generation)
}

/// A generation that data once had, as opposed to the two special values.
fn is_past(generation: u64) -> bool {
    generation != GENERATION_NONE && generation != GENERATION_JUST_CREATED
}

/// The generations that this node knows to be behind its current one.
fn past(hello: &Hello) -> impl Iterator<Item = u64> + '_ {
    let bitmap = std::iter::once(hello.bitmap_generation);
    bitmap
        .chain(hello.history.iter().copied())
        .filter(|&generation| is_past(generation))
}

#[cfg(test)]
mod tests;
