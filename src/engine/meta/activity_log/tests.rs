//! Tests of the activity log in memory.

use super::*;
use crate::engine::meta::block::BLOCK_SIZE;

fn log(limit: usize) -> ActivityLog {
    ActivityLog::new(limit, RingId::new(&[1; 16], 0), 4, 1)
}

/// Writes the next transaction and says which extents it named, ascending.
fn write(log: &mut ActivityLog) -> (u64, Vec<u32>) {
    let mut block = [0; BLOCK_SIZE];
    let written = log.next_transaction(&mut block).expect("nothing to write");
    let mut found = ring::parse(&block, log.id, 1 << 32).unwrap();
    assert_eq!(found.number, written.number);
    assert_eq!(written.ring_index, (written.number % 4) as u32);
    found.extents.sort_unstable();
    (written.number, found.extents)
}

#[test]
fn misses_join_one_transaction_and_hits_go_on() {
    let mut log = log(8);
    assert_eq!(log.begin(3..=4), Begin::Join(1));
    assert_eq!(log.begin(7..=7), Begin::Join(1));
    assert_eq!(
        log.begin(3..=3),
        Begin::Join(1),
        "present, but not on disk yet"
    );
    assert_eq!(write(&mut log), (1, vec![3, 4, 7]));
    assert!(!log.is_durable(1));
    log.transaction_done(1);
    assert!(log.is_durable(1));
    assert_eq!(log.begin(3..=4), Begin::Ready);
    assert!(
        log.next_transaction(&mut [0; BLOCK_SIZE]).is_none(),
        "everything is on disk"
    );
}

#[test]
fn misses_during_a_write_gather_in_the_next_transaction() {
    let mut log = log(8);
    log.begin(1..=1);
    write(&mut log);
    assert_eq!(log.begin(1..=1), Begin::Join(1));
    assert_eq!(log.begin(1..=2), Begin::Join(2));
    assert!(
        log.next_transaction(&mut [0; BLOCK_SIZE]).is_none(),
        "one at a time"
    );
    log.transaction_done(1);
    assert!(!log.is_durable(2));
    assert_eq!(write(&mut log), (2, vec![1, 2]));
}

#[test]
fn a_request_takes_all_of_its_extents_or_none() {
    let mut log = log(3);
    log.begin(0..=1);
    assert_eq!(log.begin(1..=3), Begin::Full);
    assert_eq!(log.len(), 2);
    log.end(0..=1);
    let candidates = log.retire_candidates(9);
    assert_eq!(
        candidates,
        [0, 1],
        "extent 1 was not referenced by the request that did not fit"
    );
    assert_eq!(log.begin(1..=2), Begin::Join(1));
    assert_eq!(log.begin(3..=4), Begin::Full);
    log.retired(&candidates);
    assert_eq!(log.begin(3..=3), Begin::Join(1));
}

#[test]
fn the_least_recently_used_without_references_retire_first() {
    let mut log = log(4);
    for extent in [5, 6, 7, 8] {
        log.begin(extent..=extent);
    }
    write(&mut log);
    log.transaction_done(1);
    assert!(log.retire_candidates(4).is_empty(), "all are referenced");
    for extent in [7, 5, 6] {
        log.end(extent..=extent);
    }
    log.begin(7..=7);
    log.end(7..=7);
    assert!(log.needs_retire());
    assert_eq!(log.retire_candidates(2), [5, 6]);
    assert!(!log.needs_retire(), "two are on their way out");
    assert_eq!(log.retire_candidates(2), [7]);
}

#[test]
fn a_write_that_comes_meanwhile_keeps_its_extent_on_disk() {
    let mut log = log(4);
    log.begin(1..=2);
    write(&mut log);
    log.transaction_done(1);
    log.end(1..=2);
    let candidates = log.retire_candidates(2);
    assert_eq!(log.begin(2..=2), Begin::Ready, "still on disk");
    log.end(2..=2);
    log.retired(&candidates);
    assert_eq!(log.iter().collect::<Vec<_>>(), [2]);
    assert_eq!(
        log.begin(1..=1),
        Begin::Join(2),
        "gone, so it has to be written again"
    );
    assert_eq!(write(&mut log), (2, vec![1, 2]));
}

#[test]
fn extents_that_cannot_retire_yet_are_candidates_again() {
    let mut log = log(4);
    log.begin(1..=2);
    log.end(1..=2);
    let candidates = log.retire_candidates(1);
    log.retire_later(&candidates);
    log.retired(&candidates);
    assert_eq!(log.len(), 2, "not retiring any more");
    assert_eq!(log.retire_candidates(2), [2, 1]);
}

#[test]
fn an_extent_dropped_while_a_transaction_names_it_is_in_the_next_one_when_it_returns() {
    let mut log = log(4);
    log.begin(1..=1);
    log.end(1..=1);
    write(&mut log);
    let candidates = log.retire_candidates(1);
    log.retired(&candidates);
    assert_eq!(log.begin(1..=1), Begin::Join(2));
    log.transaction_done(1);
    assert!(!log.is_durable(2));
    assert_eq!(write(&mut log), (2, vec![1]));
}

#[test]
fn numbers_go_on_where_the_ring_ended() {
    let mut log = ActivityLog::new(4, RingId::new(&[1; 16], 0), 4, 42);
    assert_eq!(log.begin(0..=0), Begin::Join(42));
    assert_eq!(write(&mut log), (42, vec![0]));
}
