//! Histories that must be accepted and refused, and every small one against a search through all orders.

use super::*;
use crate::hosts::sim::random::Random;

/// A register with what has happened to it, each in its turn.
struct Story(Register, u64);

impl Story {
    fn new() -> Story {
        Story(Register::zeroes(), 0)
    }

    fn now(&mut self) -> u64 {
        self.1 += 1;
        self.1
    }

    fn begin_write(&mut self, io: u64) {
        let now = self.now();
        self.0.write_begins(io, io, now);
    }

    fn end_write(&mut self, io: u64) {
        let now = self.now();
        self.0.write_succeeds(io, now, now, false);
    }

    fn lose_write(&mut self, io: u64) {
        let now = self.now();
        self.0.write_ends_unknown(io, now, now);
    }

    fn begin_read(&mut self, io: u64) {
        let now = self.now();
        self.0.read_begins(io, now);
    }

    fn end_read(&mut self, io: u64, content: WriteId) -> bool {
        let now = self.now();
        self.0.read_ends(io, content, now)
    }

    fn read(&mut self, content: WriteId) -> bool {
        let io = 1000 + self.now();
        self.begin_read(io);
        self.end_read(io, content)
    }

    fn write(&mut self, io: u64) {
        self.begin_write(io);
        self.end_write(io);
    }
}

#[test]
fn once_a_write_of_unknown_fate_was_read_it_stays() {
    let mut story = Story::new();
    story.write(1);
    story.begin_write(2);
    story.lose_write(2);
    assert!(story.read(2));
    assert!(story.read(2));
    assert!(!story.read(1));
}

#[test]
fn once_a_write_of_unknown_fate_was_not_read_it_never_is() {
    let mut story = Story::new();
    story.write(1);
    story.begin_write(2);
    story.lose_write(2);
    assert!(story.read(1));
    assert!(!story.read(2));
}

#[test]
fn a_write_under_way_is_read_or_not_and_once_it_has_ended_it_is() {
    let mut story = Story::new();
    story.write(1);
    story.begin_write(2);
    assert!(story.read(1));
    assert!(story.read(2));
    assert!(story.read(1));
    story.end_write(2);
    assert!(!story.read(1));
}

#[test]
fn a_write_that_was_read_while_it_was_cut_short_may_be_gone_and_then_is() {
    let mut story = Story::new();
    story.write(1);
    story.begin_write(2);
    assert!(story.read(2));
    story.lose_write(2);
    let mut other = Story(story.0.clone(), story.1);
    assert!(story.read(1));
    assert!(!story.read(2));
    assert!(other.read(2));
    assert!(!other.read(1));
}

#[test]
fn what_was_replaced_does_not_come_back() {
    let mut story = Story::new();
    story.begin_write(1);
    story.begin_write(2);
    story.begin_read(10);
    story.end_write(1);
    story.end_write(2);
    assert!(story.read(1));
    assert!(story.end_read(10, 2), "before the first");
    assert!(story.read(1));
    assert!(!story.read(2), "each write takes effect once");
}

#[test]
fn a_read_may_return_what_was_there_at_any_time_of_it() {
    for (content, is_right) in [(0, false), (1, true), (2, true), (3, true), (4, false)] {
        let mut story = Story::new();
        story.write(1);
        story.begin_read(10);
        story.write(2);
        story.begin_write(3);
        assert_eq!(story.end_read(10, content), is_right, "{content}");
    }
}

#[test]
fn zeroes_are_of_any_write_of_zeroes_that_nothing_has_replaced() {
    let mut story = Story::new();
    story.write(1);
    let now = story.now();
    story.0.write_begins(50, 0, now);
    let now = story.now();
    story.0.write_ends_unknown(50, now, now);
    let mut other = Story(story.0.clone(), story.1);
    assert!(story.read(0));
    assert!(!story.read(1));
    assert!(other.read(1));
    assert!(!other.read(0));
}

#[test]
fn a_read_without_an_end_binds_nobody() {
    let mut story = Story::new();
    story.begin_read(10);
    story.write(1);
    story.0.read_is_void(10);
    assert!(story.read(1));
    assert!(story.0.operations.is_empty(), "it is settled");
}

/// Looks through all orders.
fn is_possible(register: &Register) -> bool {
    let initial = register.initial.iter();
    let mut contents = initial.copied();
    contents.any(|content| goes_on(&register.operations, content))
}

fn goes_on(left: &[Operation], content: WriteId) -> bool {
    if left.iter().all(|one| !one.is_certain) {
        return true;
    }
    (0..left.len()).any(|index| {
        let one = &left[index];
        let rest: Vec<Operation> = left
            .iter()
            .filter(|other| other.io != one.io)
            .cloned()
            .collect();
        // Whatever had to be before it is past; what is uncertain, and would have to be, never was.
        if rest
            .iter()
            .any(|other| other.is_certain && other.end < one.start)
        {
            return false;
        }
        let rest: Vec<Operation> = rest
            .into_iter()
            .filter(|other| other.end > one.start)
            .collect();
        match one.kind {
            Kind::Write => goes_on(&rest, one.content),
            Kind::Read if one.is_certain => one.content == content && goes_on(&rest, content),
            Kind::Read => false,
        }
    })
}

#[test]
fn every_small_history_is_judged_as_a_search_through_all_orders_does() {
    let (mut right, mut wrong, mut lenient) = (0, 0, 0);
    for seed in 0..30_000 {
        let mut random = Random::new(seed);
        let has_zeroes = random.chance(30);
        let mut story = Story::new();
        // Never at rest, so that all of the history is kept.
        story.begin_read(999);
        let mut running: Vec<(u64, Kind)> = Vec::new();
        let mut verdict = true;
        for io in 1..=random.between(2, 8) {
            let now = story.now();
            if random.chance(50) {
                let content = if has_zeroes && random.chance(50) {
                    0
                } else {
                    io
                };
                story.0.write_begins(io, content, now);
                running.push((io, Kind::Write));
            } else {
                story.begin_read(io);
                running.push((io, Kind::Read));
            }
            while verdict && !running.is_empty() && random.chance(60) {
                let (io, kind) = running.swap_remove(random.below(running.len() as u64) as usize);
                match kind {
                    Kind::Read => {
                        let content = match story.0.written().collect::<Vec<_>>().as_slice() {
                            [] => 0,
                            written => written[random.below(written.len() as u64) as usize],
                        };
                        verdict = story.end_read(io, content);
                    }
                    Kind::Write if random.chance(25) => story.lose_write(io),
                    Kind::Write => story.end_write(io),
                }
            }
            if !verdict {
                break;
            }
        }
        story.0.operations.retain(|one| one.io != 999);
        let expected = is_possible(&story.0);
        if expected {
            assert!(verdict, "seed {seed}: {:?}", story.0);
            right += 1;
        } else if verdict {
            assert!(has_zeroes, "seed {seed}: {:?}", story.0);
            lenient += 1;
        } else {
            wrong += 1;
        }
    }
    assert!(
        right > 1000 && wrong > 1000 && lenient * 100 < wrong,
        "{right} {wrong} {lenient}"
    );
}
