//! How often what happened in a run, by name, and what has never happened. The world counts while it observes the managers
//! and the commands' answers; campaigns add runs up. Whatever is counted must not change the run.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use crate::engine::MAX_PEERS;
use crate::engine::manager::{Decided, Manager};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::handshake::{Outcome, RefuseReason, Rule};
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::hosts::sim::node::Core;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A connection's change from state to state.
    Connection,
    /// A disk's.
    Disk,
    /// A peer's disk's, as a node knows it.
    PeerDisk,
    Role,
    /// A rule of the handshake that has decided.
    Rule,
    /// What it has decided.
    Outcome,
    /// An answer to a peer's command.
    Answer,
    /// An order and how it ended.
    Order,
    /// A node that ended, and the state of a connection that it had.
    End,
}

impl Kind {
    pub const ALL: [Kind; 9] = [
        Kind::Connection,
        Kind::Disk,
        Kind::PeerDisk,
        Kind::Role,
        Kind::Rule,
        Kind::Outcome,
        Kind::Answer,
        Kind::Order,
        Kind::End,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Kind::Connection => "connections",
            Kind::Disk => "disks",
            Kind::PeerDisk => "disks of peers",
            Kind::Role => "roles",
            Kind::Rule => "rules",
            Kind::Outcome => "outcomes",
            Kind::Answer => "answers",
            Kind::Order => "orders",
            Kind::End => "ends",
        }
    }
}

/// What no run of this version can reach, and why.
const UNREACHABLE: [(Kind, &str, &str); 20] = [
    (
        Kind::Rule,
        "SameNode",
        "no two nodes of a world have the same id",
    ),
    (Kind::Rule, "LostQuorum", "there is no quorum"),
    (
        Kind::Connection,
        "Disconnecting",
        "a link is given up at once",
    ),
    (Kind::Connection, "Timeout", "is told as the last error"),
    (Kind::Connection, "BrokenPipe", "is told as the last error"),
    (
        Kind::Connection,
        "NetworkFailure",
        "is told as the last error",
    ),
    (
        Kind::Connection,
        "ProtocolError",
        "is told as the last error",
    ),
    (Kind::Connection, "TearDown", "is told as the last error"),
    (
        Kind::Connection,
        "StartingSyncS",
        "a full sync starts with a handshake",
    ),
    (
        Kind::Connection,
        "StartingSyncT",
        "a full sync starts with a handshake",
    ),
    (
        Kind::Connection,
        "WFSyncUUID",
        "the source's generation comes with its Hello",
    ),
    (Kind::Connection, "VerifyS", "there is no online verify"),
    (Kind::Connection, "VerifyT", "there is no online verify"),
    (Kind::Connection, "Ahead", "there is no protocol A"),
    (Kind::Connection, "Behind", "there is no protocol A"),
    (
        Kind::Outcome,
        "SameNode",
        "no two nodes of a world have the same id",
    ),
    (
        Kind::Answer,
        "Malformed",
        "nobody in a world sends nonsense",
    ),
    (
        Kind::Disk,
        "Negotiating",
        "a disk is Consistent until a handshake says more",
    ),
    (
        Kind::PeerDisk,
        "Negotiating",
        "a disk is Consistent until a handshake says more",
    ),
    (Kind::Answer, "Zeroes", "no source looks for zeroes"),
];

/// A name on the stack, long enough for two states.
struct Name {
    bytes: [u8; 64],
    len: usize,
}

impl Name {
    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl fmt::Write for Name {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len + text.len();
        let room = self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// What no operator of a campaign brings about, and the test in `src/hosts/sim/tests/many.rs` that does.
const DIRECTED: [(Kind, &str, &str); 1] = [(
    Kind::Outcome,
    "AnotherPrimary",
    "a_primary_from_apart_is_refused_by_who_sees_another_one",
)];

/// What takes a third node.
const TAKES_THREE: [(Kind, &str); 4] = [
    (Kind::Rule, "CountedIn"),
    (Kind::Outcome, "Ahead"),
    (Kind::Outcome, "Behind"),
    (Kind::Answer, "Again"),
];

/// Where to look for what has not happened in worlds of up to so many nodes.
pub fn met_by(kind: Kind, name: &str, nodes: usize) -> Option<&'static str> {
    let mut directed = DIRECTED.iter();
    match directed.find(|&&(of, directed, _)| of == kind && directed == name) {
        Some(&(_, _, test)) => Some(test),
        None if nodes < 3 && TAKES_THREE.contains(&(kind, name)) => Some("three nodes"),
        None => None,
    }
}

/// Counters by kind and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<Kind, BTreeMap<String, u64>>);

impl Coverage {
    pub fn count(&mut self, kind: Kind, name: &str) {
        let counters = self.0.entry(kind).or_default();
        match counters.get_mut(name) {
            Some(counter) => *counter += 1,
            None => {
                counters.insert(name.to_owned(), 1);
            }
        }
    }

    fn count_change<T: PartialEq + fmt::Display>(&mut self, kind: Kind, from: T, to: T) {
        if from != to {
            // Nearly all have been counted before: then nothing is allocated.
            let mut name = Name {
                bytes: [0; 64],
                len: 0,
            };
            match write!(name, "{from} → {to}") {
                Ok(()) => self.count(kind, name.as_str()),
                Err(_) => self.count(kind, &format!("{from} → {to}")),
            }
        }
    }

    pub fn add(&mut self, other: &Coverage) {
        for (&kind, counters) in &other.0 {
            let sums = self.0.entry(kind).or_default();
            for (name, count) in counters {
                *sums.entry(name.clone()).or_default() += count;
            }
        }
    }

    /// Names and how often, most first.
    pub fn of(&self, kind: Kind) -> Vec<(&str, u64)> {
        let counters = self.0.get(&kind).into_iter().flatten();
        let mut counters: Vec<(&str, u64)> = counters
            .map(|(name, &count)| (name.as_str(), count))
            .collect();
        counters.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        counters
    }

    /// It has happened; a state: it was entered.
    fn has(&self, kind: Kind, name: &str) -> bool {
        let is_it = |counted: &String| {
            let entered = counted.rsplit(" → ").next();
            entered == Some(name)
        };
        let mut counters = self.0.get(&kind).into_iter().flatten();
        counters.any(|(counted, _)| is_it(counted))
    }

    /// What could have happened and did not.
    pub fn missing(&self) -> Vec<(Kind, String)> {
        let is_unreachable = |kind: Kind, name: &str| {
            let mut known = UNREACHABLE.iter();
            known.any(|&(of, unreachable, _)| of == kind && unreachable == name)
        };
        let mut missing = all();
        missing.retain(|(kind, name)| !self.has(*kind, name) && !is_unreachable(*kind, name));
        missing
    }

    /// What was said to be unreachable and has happened.
    pub fn surprises(&self) -> Vec<(Kind, &'static str)> {
        let known = UNREACHABLE.iter();
        let reached = known.filter(|&&(kind, name, _)| self.has(kind, name));
        reached.map(|&(kind, name, _)| (kind, name)).collect()
    }

    /// For `--coverage`.
    pub fn json(&self) -> serde_json::Value {
        let kinds = self.0.iter();
        let mut value: serde_json::Map<String, serde_json::Value> = kinds
            .map(|(kind, counters)| (kind.name().to_owned(), serde_json::json!(counters)))
            .collect();
        let missing = self.missing().into_iter();
        let missing: Vec<String> = missing
            .map(|(kind, name)| format!("{}: {name}", kind.name()))
            .collect();
        value.insert("never".to_owned(), serde_json::json!(missing));
        let unreachable: BTreeMap<String, &str> = UNREACHABLE
            .iter()
            .map(|&(kind, name, why)| (format!("{}: {name}", kind.name()), why))
            .collect();
        value.insert("unreachable".to_owned(), serde_json::json!(unreachable));
        value.into()
    }

    /// Counts what a manager has become, and returns what it was, if that is something else.
    pub fn observe(&mut self, seen: &mut Seen, manager: &Manager<Core>) -> Option<Seen> {
        let now = Seen::of(manager);
        if now == *seen {
            return None;
        }
        self.count_change(Kind::Role, seen.role, now.role);
        self.count_change(Kind::Disk, seen.disk, now.disk);
        for slot in 0..MAX_PEERS {
            self.count_change(Kind::Connection, seen.conns[slot], now.conns[slot]);
            self.count_change(Kind::PeerDisk, seen.peer_disks[slot], now.peer_disks[slot]);
            if let Some(decided) = now.decided[slot]
                && now.decided[slot] != seen.decided[slot]
            {
                self.count(Kind::Rule, &decided.decision.rule.to_string());
                self.count(Kind::Outcome, outcome_name(decided.decision.outcome));
            }
        }
        Some(std::mem::replace(seen, now))
    }

    pub fn answered(&mut self, answer: PeerAnswer) {
        self.count(Kind::Answer, answer_name(answer));
    }
}

/// How a manager was when it was last looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub role: Role,
    pub disk: DiskState,
    pub conns: [ConnState; MAX_PEERS],
    peer_disks: [DiskState; MAX_PEERS],
    pub decided: [Option<Decided>; MAX_PEERS],
}

impl Seen {
    /// A node that has not started.
    pub const NOTHING: Seen = Seen {
        role: Role::Secondary,
        disk: DiskState::Diskless,
        conns: [ConnState::StandAlone; MAX_PEERS],
        peer_disks: [DiskState::DUnknown; MAX_PEERS],
        decided: [None; MAX_PEERS],
    };

    fn of(manager: &Manager<Core>) -> Seen {
        let view = manager.view();
        Seen {
            role: view.role,
            disk: view.disk,
            conns: std::array::from_fn(|slot| view.peers[slot].conn),
            peer_disks: std::array::from_fn(|slot| view.peers[slot].pdsk),
            decided: std::array::from_fn(|slot| manager.decided(slot)),
        }
    }
}

/// Everything that has a name of its own.
fn all() -> Vec<(Kind, String)> {
    let mut names: Vec<(Kind, String)> = Vec::new();
    let conns = ConnState::ALL.iter();
    names.extend(conns.map(|conn| (Kind::Connection, conn.to_string())));
    names.extend([Role::Primary, Role::Secondary].map(|role| (Kind::Role, role.to_string())));
    for kind in [Kind::Disk, Kind::PeerDisk] {
        names.extend(DiskState::ALL.iter().map(|disk| (kind, disk.to_string())));
    }
    // Nobody doubts its own disk.
    names.retain(|(kind, name)| *kind != Kind::Disk || name != DiskState::DUnknown.name());
    names.extend(Rule::ALL.map(|rule| (Kind::Rule, rule.to_string())));
    let outcomes = [
        Outcome::InSync,
        Outcome::SyncSource { full: false },
        Outcome::SyncSource { full: true },
        Outcome::SyncTarget { full: false },
        Outcome::SyncTarget { full: true },
        Outcome::ConnectWithoutSync,
        Outcome::Ahead,
        Outcome::Behind,
        Outcome::SplitBrain,
        Outcome::Unrelated,
        Outcome::Refuse(RefuseReason::SameNode),
        Outcome::Refuse(RefuseReason::DualPrimary),
        Outcome::Refuse(RefuseReason::PrimaryWouldBeTarget),
        Outcome::Refuse(RefuseReason::NotWhatPrimarySaw),
        Outcome::Refuse(RefuseReason::AnotherPrimary),
    ];
    names.extend(outcomes.map(|outcome| (Kind::Outcome, outcome_name(outcome).to_owned())));
    names.extend(PeerAnswer::ALL.map(|answer| (Kind::Answer, answer_name(answer).to_owned())));
    names
}

const fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::InSync => "InSync",
        Outcome::SyncSource { full: false } => "SyncSource",
        Outcome::SyncSource { full: true } => "SyncSource, full",
        Outcome::SyncTarget { full: false } => "SyncTarget",
        Outcome::SyncTarget { full: true } => "SyncTarget, full",
        Outcome::ConnectWithoutSync => "ConnectWithoutSync",
        Outcome::Ahead => "Ahead",
        Outcome::Behind => "Behind",
        Outcome::SplitBrain => "SplitBrain",
        Outcome::Unrelated => "Unrelated",
        Outcome::Refuse(RefuseReason::SameNode) => "SameNode",
        Outcome::Refuse(RefuseReason::DualPrimary) => "DualPrimary",
        Outcome::Refuse(RefuseReason::PrimaryWouldBeTarget) => "PrimaryWouldBeTarget",
        Outcome::Refuse(RefuseReason::AnotherPrimary) => "AnotherPrimary",
        Outcome::Refuse(RefuseReason::NotWhatPrimarySaw) => "NotWhatPrimarySaw",
    }
}

const fn answer_name(answer: PeerAnswer) -> &'static str {
    match answer {
        PeerAnswer::Ok => "Ok",
        PeerAnswer::Duplicate => "Duplicate",
        PeerAnswer::Fenced => "Fenced",
        PeerAnswer::NotYet => "NotYet",
        PeerAnswer::Busy => "Busy",
        PeerAnswer::Zeroes => "Zeroes",
        PeerAnswer::Again => "Again",
        PeerAnswer::DiskError => "DiskError",
        PeerAnswer::Refused(_) => "Refused",
        PeerAnswer::Malformed => "Malformed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_entered_has_happened_and_the_rest_is_named() {
        let mut one = Coverage::default();
        one.count_change(
            Kind::Connection,
            ConnState::Connecting,
            ConnState::Connected,
        );
        one.count_change(Kind::Connection, ConnState::Connected, ConnState::Connected);
        let mut sum = one.clone();
        sum.add(&one);
        assert_eq!(sum.of(Kind::Connection), [("Connecting → Connected", 2)]);
        let missing = sum.missing();
        let is_missing = |name: &str| missing.contains(&(Kind::Connection, name.to_owned()));
        assert!(!is_missing("Connected") && is_missing("Connecting") && is_missing("SyncSource"));
        assert!(!is_missing("Ahead"), "it cannot be reached");
        sum.count(Kind::Connection, "Connected → Ahead");
        assert_eq!(sum.surprises(), [(Kind::Connection, "Ahead")]);
    }

    #[test]
    fn what_cannot_be_reached_has_the_name_of_something() {
        let all = all();
        let takes_three = TAKES_THREE.map(|(kind, name)| (kind, name, ""));
        let others = DIRECTED.into_iter().chain(takes_three);
        for (kind, name, _) in UNREACHABLE.into_iter().chain(others) {
            assert!(all.contains(&(kind, name.to_owned())), "{name}");
        }
    }
}
