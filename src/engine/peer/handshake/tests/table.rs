//! The states that the rules are for: two Hellos each, and what the first of the two nodes decides.

use super::*;

const OLD: u64 = 0x10;
pub(super) const NOW: u64 = 0x20;
const NEXT: u64 = 0x30;
const OTHER: u64 = 0x40;

/// A row of the table: the state, the two nodes in it, and what the first of them decides.
pub(super) struct Case {
    pub(super) state: &'static str,
    pub(super) first: Hello,
    pub(super) second: Hello,
    pub(super) rule: Rule,
    pub(super) outcome: Outcome,
}

fn case(state: &'static str, first: Hello, second: Hello, rule: Rule, outcome: Outcome) -> Case {
    Case {
        state,
        first,
        second,
        rule,
        outcome,
    }
}

fn first() -> Hello {
    hello_of(0, 1, NOW)
}

fn second() -> Hello {
    hello_of(1, 0, NOW)
}

fn history(generations: &[u64]) -> [u64; 16] {
    std::array::from_fn(|n| generations.get(n).copied().unwrap_or(GENERATION_NONE))
}

fn just_created(hello: Hello) -> Hello {
    let disk = DiskState::Inconsistent;
    Hello {
        current_generation: GENERATION_JUST_CREATED,
        disk,
        ..hello
    }
}

/// `hello` after it went on alone from `common` as Primary.
fn went_on(hello: Hello, common: u64, current: u64) -> Hello {
    Hello {
        current_generation: current,
        bitmap_generation: common,
        history: history(&[common]),
        dirty_bits: 9,
        ..hello
    }
}

pub(super) const SOURCE: Outcome = Outcome::SyncSource { full: false };
pub(super) const TARGET: Outcome = Outcome::SyncTarget { full: false };
const FULL_SOURCE: Outcome = Outcome::SyncSource { full: true };
const FULL_TARGET: Outcome = Outcome::SyncTarget { full: true };
const NO_SYNC: Outcome = Outcome::ConnectWithoutSync;

fn by_state_and_disk() -> Vec<Case> {
    let primary = |hello: Hello| Hello {
        role: Role::Primary,
        ..hello
    };
    let inconsistent = |hello: Hello| Hello {
        disk: DiskState::Inconsistent,
        ..hello
    };
    let diskless = |hello: Hello| Hello {
        disk: DiskState::Diskless,
        ..hello
    };
    let dirty = |hello: Hello| Hello {
        dirty_bits: 7,
        ..hello
    };
    let outdated = |hello: Hello| Hello {
        disk: DiskState::Outdated,
        ..hello
    };
    let wants_full = |hello: Hello| Hello {
        wants_full_sync: true,
        ..inconsistent(hello)
    };
    let keeps = |hello: Hello, generation| Hello {
        bitmap_generation: generation,
        ..hello
    };
    let had_session = |hello: Hello| Hello {
        had_session: true,
        ..hello
    };
    let empty = Hello {
        current_generation: GENERATION_NONE,
        ..diskless(primary(first()))
    };
    vec![
        case(
            "a Primary without disk meets the data it had",
            diskless(primary(first())),
            second(),
            Rule::DisklessPrimary,
            NO_SYNC,
        ),
        case(
            "a Primary without disk meets other data",
            diskless(primary(first())),
            hello_of(1, 0, OLD),
            Rule::DisklessPrimary,
            Outcome::Refuse(RefuseReason::NotWhatPrimarySaw),
        ),
        case(
            "a Primary without disk that has served nothing",
            empty,
            second(),
            Rule::NoDisk,
            NO_SYNC,
        ),
        case(
            "a Secondary without disk",
            first(),
            diskless(second()),
            Rule::NoDisk,
            NO_SYNC,
        ),
        case(
            "two disks that are attaching",
            Hello {
                disk: DiskState::Attaching,
                ..first()
            },
            diskless(second()),
            Rule::NoDisk,
            NO_SYNC,
        ),
        case(
            "two new volumes",
            just_created(first()),
            just_created(second()),
            Rule::BothJustCreated,
            NO_SYNC,
        ),
        case(
            "a new volume here",
            just_created(first()),
            second(),
            Rule::JustCreated,
            FULL_TARGET,
        ),
        case(
            "a new volume there",
            primary(first()),
            just_created(second()),
            Rule::JustCreated,
            FULL_SOURCE,
        ),
        case(
            "a new disk under a Primary",
            primary(just_created(first())),
            second(),
            Rule::JustCreated,
            FULL_TARGET,
        ),
        case(
            "a new volume meets half a copy",
            just_created(first()),
            inconsistent(second()),
            Rule::JustCreated,
            NO_SYNC,
        ),
        case(
            "invalidated here",
            wants_full(first()),
            second(),
            Rule::FullSyncWanted,
            FULL_TARGET,
        ),
        case(
            "invalidated there, of data with changes of its own",
            Hello {
                history: history(&[OLD]),
                ..first()
            },
            wants_full(Hello {
                history: history(&[OLD]),
                ..hello_of(1, 0, OTHER)
            }),
            Rule::FullSyncWanted,
            FULL_SOURCE,
        ),
        case(
            "invalidated there, and never the same",
            first(),
            wants_full(hello_of(1, 0, OTHER)),
            Rule::Unrelated,
            Outcome::Unrelated,
        ),
        case(
            "invalidated here, and the other is behind",
            wants_full(went_on(first(), OLD, NOW)),
            hello_of(1, 0, OLD),
            Rule::FullSyncWanted,
            NO_SYNC,
        ),
        case(
            "both invalidated",
            wants_full(first()),
            wants_full(second()),
            Rule::BothInconsistent,
            NO_SYNC,
        ),
        case(
            "two halves of a copy",
            inconsistent(dirty(first())),
            inconsistent(second()),
            Rule::BothInconsistent,
            NO_SYNC,
        ),
        case(
            "the source missed the start",
            dirty(keeps(first(), OLD)),
            inconsistent(second()),
            Rule::MissedStart,
            SOURCE,
        ),
        case(
            "the source there missed the start",
            inconsistent(dirty(first())),
            second(),
            Rule::MissedStart,
            TARGET,
        ),
        case(
            "the source missed the start and lost the bits",
            first(),
            inconsistent(second()),
            Rule::MissedStart,
            FULL_SOURCE,
        ),
        case(
            "a resync from here was cut off",
            keeps(primary(first()), NOW),
            inconsistent(dirty(second())),
            Rule::SyncInterrupted,
            SOURCE,
        ),
        case(
            "a resync to here was cut off",
            inconsistent(primary(first())),
            keeps(second(), NOW),
            Rule::SyncInterrupted,
            TARGET,
        ),
        case(
            "the Primary went on and wrote nothing",
            primary(first()),
            outdated(second()),
            Rule::Outdated,
            SOURCE,
        ),
        case(
            "outdated here",
            outdated(first()),
            second(),
            Rule::Outdated,
            TARGET,
        ),
        case(
            "the source here missed the end",
            keeps(first(), NOW),
            second(),
            Rule::MissedFinish,
            Outcome::InSync,
        ),
        case(
            "the source there missed the end",
            primary(first()),
            keeps(second(), NOW),
            Rule::MissedFinish,
            Outcome::InSync,
        ),
        case(
            "the link flapped",
            had_session(primary(first())),
            had_session(second()),
            Rule::Reconnected,
            Outcome::InSync,
        ),
        case(
            "both were off",
            first(),
            second(),
            Rule::BothOff,
            Outcome::InSync,
        ),
        case(
            "one was off",
            had_session(primary(first())),
            second(),
            Rule::SameGeneration,
            Outcome::InSync,
        ),
    ]
}

fn reconciled() -> Vec<Case> {
    let dirty = |hello: Hello| Hello {
        dirty_bits: 7,
        ..hello
    };
    let unclean = |hello: Hello| Hello {
        unclean: true,
        ..dirty(hello)
    };
    let crashed = |hello: Hello| Hello {
        crashed_primary: true,
        ..unclean(hello)
    };
    let lost_quorum = |hello: Hello| Hello {
        lost_quorum: true,
        ..dirty(hello)
    };
    let primary = |hello: Hello| Hello {
        role: Role::Primary,
        ..hello
    };
    let finish_missed = Hello {
        bitmap_generation: NOW,
        ..dirty(first())
    };
    vec![
        case(
            "the link flapped under writes",
            dirty(primary(first())),
            second(),
            Rule::ReconcilePrimary,
            SOURCE,
        ),
        case(
            "the survivor was promoted and wrote nothing",
            crashed(first()),
            primary(second()),
            Rule::ReconcilePrimary,
            TARGET,
        ),
        case(
            "the end was missed, under writes",
            finish_missed,
            primary(second()),
            Rule::ReconcilePrimary,
            TARGET,
        ),
        case(
            "a Primary lost quorum",
            lost_quorum(first()),
            second(),
            Rule::LostQuorum,
            SOURCE,
        ),
        case(
            "a Primary lost quorum, the other crashed",
            crashed(first()),
            lost_quorum(second()),
            Rule::LostQuorum,
            TARGET,
        ),
        case(
            "the Primary died",
            crashed(first()),
            second(),
            Rule::CrashedPrimary,
            SOURCE,
        ),
        case(
            "both lost power, one was Primary",
            unclean(first()),
            crashed(second()),
            Rule::CrashedPrimary,
            TARGET,
        ),
        case(
            "the Secondary died",
            unclean(first()),
            second(),
            Rule::ReconcileUnclean,
            TARGET,
        ),
        case(
            "the other Secondary died",
            first(),
            unclean(second()),
            Rule::ReconcileUnclean,
            SOURCE,
        ),
        case(
            "both died as Primary, in turn",
            crashed(first()),
            crashed(second()),
            Rule::ReconcileByNodeId,
            SOURCE,
        ),
        case(
            "bits of unknown origin",
            first(),
            dirty(second()),
            Rule::ReconcileByNodeId,
            SOURCE,
        ),
    ]
}

fn by_generations() -> Vec<Case> {
    let starting = |hello: Hello| Hello {
        role: Role::Primary,
        disk: DiskState::Inconsistent,
        starting: true,
        ..hello
    };
    let primary = |hello: Hello| Hello {
        role: Role::Primary,
        ..hello
    };
    let discard = |hello: Hello| Hello {
        discard_my_data: true,
        ..hello
    };
    let inconsistent = |hello: Hello| Hello {
        disk: DiskState::Inconsistent,
        ..hello
    };
    let ahead = |hello: Hello| went_on(hello, NOW, NEXT);
    let apart = |hello: Hello| went_on(hello, NOW, OTHER);
    let knows = |hello: Hello, generations: &[u64]| Hello {
        history: history(generations),
        ..hello
    };
    let refuse = Outcome::Refuse(RefuseReason::PrimaryWouldBeTarget);
    let resolved = Rule::SplitBrainResolved;
    let far_ahead = knows(hello_of(0, 1, NEXT), &[OTHER, NOW]);
    let far_apart = knows(hello_of(1, 0, OTHER), &[NOW, OLD]);
    let far = knows(hello_of(0, 1, NEXT), &[0x50, OLD]);
    let served_elsewhere = Hello {
        disk: DiskState::Consistent,
        ..primary(first())
    };
    // The peer took over our generation while we still kept bits since an older one; then a third node
    // made us bump. Both keep bits since OLD, and yet it is no split brain.
    let bumped = Hello {
        history: history(&[NOW, OLD]),
        ..went_on(first(), OLD, NEXT)
    };
    let behind = Hello {
        bitmap_generation: OLD,
        ..inconsistent(second())
    };
    vec![
        case(
            "went on here",
            primary(ahead(first())),
            second(),
            Rule::ByBitmap,
            SOURCE,
        ),
        case(
            "went on there, crashed here",
            first(),
            primary(ahead(second())),
            Rule::ByBitmap,
            TARGET,
        ),
        case(
            "went on there, Primary here",
            primary(first()),
            ahead(second()),
            Rule::ByBitmap,
            refuse,
        ),
        case(
            "a Primary attaches its disk again",
            served_elsewhere,
            ahead(second()),
            Rule::ByBitmap,
            TARGET,
        ),
        case(
            "newer, but half a copy",
            inconsistent(ahead(first())),
            second(),
            Rule::ByBitmap,
            NO_SYNC,
        ),
        case(
            "newer, but half a copy, of a Primary that fetches the rest",
            primary(inconsistent(ahead(first()))),
            second(),
            Rule::ByBitmap,
            Outcome::Ahead,
        ),
        case(
            "missed long ago there",
            far_ahead,
            second(),
            Rule::ByHistory,
            FULL_SOURCE,
        ),
        case(
            "missed long ago here",
            first(),
            knows(hello_of(1, 0, NEXT), &[NOW]),
            Rule::ByHistory,
            FULL_TARGET,
        ),
        case(
            "same old bits, but one remembers the other",
            bumped,
            behind,
            Rule::ByHistory,
            FULL_SOURCE,
        ),
        case(
            "both went on",
            ahead(first()),
            apart(second()),
            Rule::ByBitmapBoth,
            Outcome::SplitBrain,
        ),
        case(
            "both went on and are Primary",
            primary(ahead(first())),
            primary(apart(second())),
            Rule::ByBitmapBoth,
            Outcome::SplitBrain,
        ),
        case(
            "each keeps bits since the other",
            went_on(first(), NOW, NEXT),
            Hello {
                bitmap_generation: NEXT,
                ..second()
            },
            Rule::ByBitmapBoth,
            Outcome::SplitBrain,
        ),
        case(
            "one was told a generation that counts the other in, the other went on without it",
            Hello {
                bitmap_generation: GENERATION_NONE,
                told: true,
                ..went_on(first(), NOW, NEXT)
            },
            went_on(second(), NOW, OTHER),
            Rule::CountedIn,
            TARGET,
        ),
        case(
            "the same, but all were said to have it: an old copy has come back and went on",
            Hello {
                bitmap_generation: GENERATION_NONE,
                ..went_on(first(), NOW, NEXT)
            },
            went_on(second(), NOW, OTHER),
            Rule::ByHistoryBoth,
            Outcome::SplitBrain,
        ),
        case(
            "one was cut short while it started a generation, the other went on from the one before",
            Hello {
                starting: true,
                ..went_on(first(), NOW, NEXT)
            },
            primary(went_on(second(), NOW, OTHER)),
            Rule::TakenBack,
            TARGET,
        ),
        case(
            "the same, and neither keeps bits",
            Hello {
                starting: true,
                bitmap_generation: GENERATION_NONE,
                ..went_on(first(), NOW, NEXT)
            },
            Hello {
                bitmap_generation: GENERATION_NONE,
                ..went_on(second(), NOW, OTHER)
            },
            Rule::TakenBack,
            FULL_TARGET,
        ),
        case(
            "both were cut short: one of them goes back",
            Hello {
                starting: true,
                ..went_on(first(), NOW, NEXT)
            },
            Hello {
                starting: true,
                ..went_on(second(), NOW, OTHER)
            },
            Rule::TakenBack,
            SOURCE,
        ),
        case(
            "one was cut short, and nobody has gone on: it is the newer",
            Hello {
                starting: true,
                ..went_on(first(), NOW, NEXT)
            },
            second(),
            Rule::ByBitmap,
            SOURCE,
        ),
        case(
            "one was told a generation that counts the other in, and the other is Primary again and has not gone on",
            Hello {
                bitmap_generation: GENERATION_NONE,
                told: true,
                ..went_on(first(), NOW, NEXT)
            },
            Hello {
                role: Role::Primary,
                ..second()
            },
            Rule::CountedIn,
            TARGET,
        ),
        case(
            "a Primary without its data has told nobody of its generation",
            starting(went_on(first(), NOW, NEXT)),
            second(),
            Rule::TakenBack,
            TARGET,
        ),
        case(
            "the same, and the other went on from the one before",
            starting(went_on(first(), NOW, NEXT)),
            went_on(second(), NOW, OTHER),
            Rule::TakenBack,
            TARGET,
        ),
        case(
            "the same, but the other has taken it",
            starting(went_on(first(), NOW, NEXT)),
            Hello {
                bitmap_generation: GENERATION_NONE,
                ..went_on(second(), NOW, NEXT)
            },
            Rule::MissedStart,
            TARGET,
        ),
        case(
            "the same, and the other is older still",
            Hello {
                history: history(&[NOW, OLD]),
                ..starting(went_on(first(), NOW, NEXT))
            },
            hello_of(1, 0, OLD),
            Rule::ByHistory,
            Outcome::Ahead,
        ),
        case(
            "one is newer, and Outdated, and a third node may have what it lacks",
            Hello {
                disk: DiskState::Outdated,
                has_others: true,
                ..went_on(first(), NOW, NEXT)
            },
            second(),
            Rule::ByBitmap,
            Outcome::Ahead,
        ),
        case(
            "a Primary without disk has told nobody of its generation",
            Hello {
                disk: DiskState::Diskless,
                ..starting(went_on(first(), NOW, NEXT))
            },
            second(),
            Rule::TakenBack,
            NO_SYNC,
        ),
        case(
            "both went on long ago",
            far,
            far_apart,
            Rule::ByHistoryBoth,
            Outcome::SplitBrain,
        ),
        case(
            "each remembers the other",
            knows(first(), &[OTHER]),
            knows(hello_of(1, 0, OTHER), &[NOW]),
            Rule::ByHistoryBoth,
            Outcome::SplitBrain,
        ),
        case(
            "both give up",
            discard(ahead(first())),
            discard(apart(second())),
            Rule::ByBitmapBoth,
            Outcome::SplitBrain,
        ),
        case(
            "one is in the middle of a resync from somebody else who went on",
            Hello {
                disk: DiskState::Inconsistent,
                ..ahead(first())
            },
            primary(apart(second())),
            Rule::GivenUp,
            FULL_TARGET,
        ),
        case(
            "the same, and is connected to whom it fetches from",
            Hello {
                disk: DiskState::Inconsistent,
                is_target: true,
                ..ahead(first())
            },
            apart(second()),
            Rule::ByBitmapBoth,
            Outcome::SplitBrain,
        ),
        case(
            "the same, and its application reads from whom it fetches from",
            Hello {
                disk: DiskState::Inconsistent,
                ..primary(ahead(first()))
            },
            apart(second()),
            Rule::ByBitmapBoth,
            Outcome::SplitBrain,
        ),
        case(
            "one has started a generation as a target, which nobody took, and the other is what it was the target of",
            Hello {
                disk: DiskState::Inconsistent,
                starting: true,
                ..ahead(first())
            },
            Hello {
                bitmap_generation: NOW,
                dirty_bits: 3,
                ..second()
            },
            Rule::TakenBack,
            TARGET,
        ),
        case(
            "the same, and the other has gone on",
            Hello {
                disk: DiskState::Inconsistent,
                starting: true,
                ..ahead(first())
            },
            apart(second()),
            Rule::TakenBack,
            TARGET,
        ),
        case(
            "resolved, here gives up",
            discard(ahead(first())),
            primary(apart(second())),
            resolved,
            TARGET,
        ),
        case(
            "resolved, there gives up",
            ahead(first()),
            discard(apart(second())),
            resolved,
            SOURCE,
        ),
        case(
            "resolved without bits",
            far,
            discard(far_apart),
            resolved,
            FULL_SOURCE,
        ),
        case(
            "a Primary cannot give up",
            discard(primary(ahead(first()))),
            apart(second()),
            resolved,
            refuse,
        ),
        case(
            "never the same",
            first(),
            hello_of(1, 0, OTHER),
            Rule::Unrelated,
            Outcome::Unrelated,
        ),
        case(
            "never the same, giving up does not help",
            discard(first()),
            hello_of(1, 0, OTHER),
            Rule::Unrelated,
            Outcome::Unrelated,
        ),
        case(
            "no bits is no common generation",
            ahead(first()),
            hello_of(1, 0, OTHER),
            Rule::Unrelated,
            Outcome::Unrelated,
        ),
    ]
}

fn refused() -> Vec<Case> {
    let primary = |hello: Hello| Hello {
        role: Role::Primary,
        ..hello
    };
    let dual = Outcome::Refuse(RefuseReason::DualPrimary);
    vec![
        case(
            "two Primaries of the same data",
            primary(first()),
            primary(second()),
            Rule::BothOff,
            dual,
        ),
        case(
            "two Primaries, one new",
            primary(first()),
            primary(just_created(second())),
            Rule::JustCreated,
            dual,
        ),
        case(
            "two Primaries, one behind",
            primary(went_on(first(), NOW, NEXT)),
            primary(second()),
            Rule::ByBitmap,
            dual,
        ),
        case(
            "one node id twice",
            first(),
            hello_of(0, 1, NOW),
            Rule::SameNode,
            Outcome::Refuse(RefuseReason::SameNode),
        ),
    ]
}

pub(super) fn table() -> Vec<Case> {
    [
        by_state_and_disk(),
        reconciled(),
        by_generations(),
        refused(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
