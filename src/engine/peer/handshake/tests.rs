//! One row per state that a rule is for, properties over all pairs of valid Hellos, and a walk of two
//! nodes through losses, crashes and resyncs that checks what the decisions promise.

use super::*;
use crate::engine::peer::hello::tests::{any_hello, hello_of};
use proptest::prelude::*;

mod table;
mod walk;

use table::{Case, NOW, SOURCE, TARGET, table};

#[test]
fn each_state_is_decided_by_its_rule_and_mirrored_by_the_other_node() {
    for Case {
        state,
        first,
        second,
        rule,
        outcome,
    } in table()
    {
        assert_eq!(
            Hello::parse(&first.emit()),
            Ok(first),
            "{state}: not a valid Hello"
        );
        assert_eq!(
            Hello::parse(&second.emit()),
            Ok(second),
            "{state}: not a valid Hello"
        );
        assert_eq!(
            decide(&first, &second),
            Decision { rule, outcome },
            "{state}"
        );
        let mirrored = Decision {
            rule,
            outcome: outcome.mirrored(),
        };
        assert_eq!(decide(&second, &first), mirrored, "{state}, the other node");
    }
}

#[test]
fn each_rule_has_a_state_in_the_table() {
    let table = table();
    for rule in Rule::ALL {
        assert!(
            table.iter().any(|case| case.rule == rule),
            "{rule} has no state"
        );
    }
    assert!(
        Rule::ALL.is_sorted(),
        "the list is in the order of the enum"
    );
    assert_eq!(
        Rule::ALL.len(),
        Rule::Unrelated as usize + 1,
        "the list is complete"
    );
}

#[test]
fn which_node_is_followed_in_a_tie_does_not_depend_on_who_asks() {
    let low = Hello {
        dirty_bits: 1,
        ..hello_of(3, 6, NOW)
    };
    let high = hello_of(6, 3, NOW);
    assert_eq!(decide(&low, &high).outcome, SOURCE);
    assert_eq!(decide(&high, &low).outcome, TARGET);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn both_nodes_decide_the_same_and_mirror_each_other(a in any_hello(0, 1), b in any_hello(1, 0)) {
        let here = decide(&a, &b);
        let there = decide(&b, &a);
        prop_assert_eq!(here.rule, there.rule);
        prop_assert_eq!(here.outcome, there.outcome.mirrored());
        prop_assert_eq!(decide(&a, &b), here);
    }

    #[test]
    fn whoever_cannot_be_source_or_target_is_not(a in any_hello(0, 1), b in any_hello(1, 0)) {
        let outcome = decide(&a, &b).outcome;
        let (source, target, full) = match outcome {
            Outcome::SyncSource { full } => (a, b, full),
            Outcome::SyncTarget { full } => (b, a, full),
            _ => return Ok(()),
        };
        prop_assert!(source.disk > DiskState::Inconsistent && source.has_data() && target.has_data());
        prop_assert_ne!(source.current_generation, GENERATION_JUST_CREATED);
        prop_assert!(target.role != Role::Primary || target.disk != DiskState::UpToDate);
        prop_assert!(source.role != Role::Primary || target.role != Role::Primary);
        prop_assert!(full || !target.wants_full_sync);
        prop_assert!(full || target.current_generation != GENERATION_JUST_CREATED);
    }

    #[test]
    fn two_primaries_never_connect(a in any_hello(0, 1), b in any_hello(1, 0)) {
        let a = Hello { role: Role::Primary, ..a };
        let b = Hello { role: Role::Primary, ..b };
        let outcome = decide(&a, &b).outcome;
        let diverged = matches!(outcome, Outcome::SplitBrain | Outcome::Unrelated);
        prop_assert!(diverged || outcome == Outcome::Refuse(RefuseReason::DualPrimary));
    }

    #[test]
    fn in_sync_is_said_only_of_the_same_generation_without_bits(a in any_hello(0, 1), b in any_hello(1, 0)) {
        if decide(&a, &b).outcome == Outcome::InSync {
            prop_assert_eq!(a.current_generation, b.current_generation);
            prop_assert_eq!((a.dirty_bits, b.dirty_bits), (0, 0));
            prop_assert_eq!(a.disk.min(b.disk) == DiskState::Outdated, a.disk.max(b.disk) == DiskState::Outdated);
            prop_assert!(a.disk.min(b.disk) >= DiskState::Outdated);
        }
    }

    #[test]
    fn what_the_nonce_is_does_not_matter(a in any_hello(0, 1), b in any_hello(1, 0), nonce in 1..u64::MAX) {
        prop_assert_eq!(decide(&Hello { nonce, ..a }, &b), decide(&a, &b));
    }
}

#[test]
fn random_pairs_reach_every_rule_but_the_one_for_equal_node_ids() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let pairs = (any_hello(0, 1), any_hello(1, 0));
    let mut missing: Vec<Rule> = Rule::ALL
        .into_iter()
        .filter(|&rule| rule != Rule::SameNode)
        .collect();
    for _ in 0..20_000 {
        let pair = proptest::strategy::Strategy::new_tree(&pairs, &mut runner).unwrap();
        let (a, b) = proptest::strategy::ValueTree::current(&pair);
        let rule = decide(&a, &b).rule;
        missing.retain(|&other| other != rule);
        if missing.is_empty() {
            return;
        }
    }
    panic!("never reached: {missing:?}");
}
