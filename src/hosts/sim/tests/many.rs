//! Random runs of three nodes and more: one Primary, links that are cut each by itself, nodes that die and come back,
//! disks that are let go, and roles that move. `soak` says how a seed is replayed.

use crate::engine::manager::Order;
use crate::engine::peer::command::opcode;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::hosts::sim::coverage::Kind;
use crate::hosts::sim::random::Random;
use crate::hosts::sim::tests::soak::{any_in_capsule_bytes, for_seeds};
use crate::hosts::sim::world::{Config, MS, SECOND, World};

/// A world of this seed's own shape.
fn shaped(seed: u64, nodes: usize, volatile_caches: bool) -> World {
    let mut shape = Random::new(seed ^ 0x3_5eed);
    let granularities = [12, 12, 14, 16];
    let config = Config {
        nodes,
        cores: 1 + shape.below(2) as usize,
        volatile_caches,
        volume_bytes: 32 << 20,
        al_extents: [8, 10, 12][shape.below(3) as usize],
        in_capsule_bytes: (0..nodes)
            .map(|_| any_in_capsule_bytes(&mut shape))
            .collect(),
        granularity_log2: (0..nodes)
            .map(|_| granularities[shape.below(4) as usize])
            .collect(),
        scarcity_percent: [0, 0, 5][shape.below(3) as usize],
        repeat_percent: [0, 3, 20][shape.below(3) as usize],
        ..Config::default()
    };
    World::clean_cluster(seed, config)
}

/// The operator's and the world's side of a run.
struct Run {
    world: World,
    nodes: usize,
    /// Where the application is.
    primary: usize,
    power: bool,
}

impl Run {
    fn new(seed: u64, nodes: usize, power: bool) -> Run {
        let mut world = shaped(seed, nodes, power);
        world.promote(0);
        Run {
            world,
            nodes,
            primary: 0,
            power,
        }
    }

    fn any_node(&mut self) -> usize {
        self.world.random.below(self.nodes as u64) as usize
    }

    fn any_pair(&mut self) -> (usize, usize) {
        let one = self.any_node();
        let other =
            (one + 1 + self.world.random.below(self.nodes as u64 - 1) as usize) % self.nodes;
        (one, other)
    }

    fn is_up(&self, node: usize) -> bool {
        self.world.nodes[node].engine.is_some()
    }

    /// A node, not this one, that has everything that was acknowledged on this one, as this one sees it.
    fn heir(&mut self, node: usize) -> Option<usize> {
        let start = self.any_node();
        (0..self.nodes)
            .map(|step| (start + step) % self.nodes)
            .find(|&other| {
                other != node && self.is_up(node) && self.is_up(other) && {
                    let (mine, theirs) = (self.world.peer(node, other), self.world.state(other));
                    mine.conn == ConnState::Connected
                        && mine.disk == DiskState::UpToDate
                        && theirs.disk == DiskState::UpToDate
                }
            })
    }

    fn stop(&mut self, node: usize) {
        if self.power && self.world.random.chance(50) {
            self.world.power_loss(node);
        } else {
            self.world.kill(node);
        }
    }

    fn step(&mut self) {
        let (one, other) = self.any_pair();
        match self.world.random.below(44) {
            0..2 => self.world.cut(one, other),
            2 => self.world.cut_one_way(one, other),
            3..8 => self.world.heal(one, other),
            8 => self.world.reset(one, other),
            9 if self.is_up(one) => self.crash(one),
            10..14 if !self.is_up(one) => self.world.restart(one),
            14 if self.is_up(one) => {
                let order = match self.world.random.below(3) {
                    0 => Order::PauseResync,
                    _ => Order::ResumeResync,
                };
                self.world.order(one, order);
            }
            15 => self.hand_over(),
            16 => self.attach_again(one),
            _ => self.work(),
        }
        let time_ns = self.world.random.below(4 * MS);
        self.world.run_for(time_ns);
        if self.world.random.chance(5) {
            self.world.run_for(300 * MS);
        }
    }

    fn crash(&mut self, node: usize) {
        let heir = self.heir(node).filter(|_| self.primary == node);
        self.stop(node);
        if self.primary != node {
            return;
        }
        if let Some(heir) = heir
            && self.world.random.chance(60)
        {
            let time_ns = self.world.random.below(400 * MS);
            self.world.run_for(time_ns);
            let promote = Order::Promote { force: false };
            if self.world.ordered(heir, promote).is_ok() {
                self.primary = heir;
                return;
            }
        }
        // Nobody else may be Primary now: it comes back itself, sooner or later.
        let time_ns = [0, 20, 500][self.world.random.below(3) as usize] * MS;
        self.world.run_for(time_ns);
        self.world.restart(node);
        self.promote(node);
    }

    fn promote(&mut self, node: usize) {
        for _ in 0..20 {
            let promote = Order::Promote { force: false };
            if self.world.ordered(node, promote).is_ok() {
                return;
            }
            self.heal_all();
            self.world.run_for(500 * MS);
        }
        panic!("node {node} cannot be promoted\n{}", self.world.describe());
    }

    fn heal_all(&mut self) {
        for one in 0..self.nodes {
            for other in one + 1..self.nodes {
                self.world.heal(one, other);
            }
        }
        for node in 0..self.nodes {
            if !self.is_up(node) {
                self.world.restart(node);
            }
            self.world.carry_out(node, Order::ResumeResync);
        }
    }

    /// Demotes the Primary and promotes another node, or the same one.
    fn hand_over(&mut self) {
        let node = self.primary;
        let Some(heir) = self.heir(node) else {
            return;
        };
        if self.world.is_cut(node, heir) {
            return;
        }
        self.world.carry_out(node, Order::Demote);
        self.world.wait_for_io();
        let next = if self.heir(node).is_some() && self.world.random.chance(70) {
            heir
        } else {
            node
        };
        if next != node {
            let promote = Order::Promote { force: false };
            let has_all = |run: &Self| {
                run.is_up(node)
                    && run.is_up(next)
                    && run.world.peer(node, next).conn == ConnState::Connected
                    && run.world.peer(node, next).disk == DiskState::UpToDate
            };
            if has_all(self) && self.world.ordered(next, promote).is_ok() {
                self.primary = next;
                return;
            }
        }
        self.promote(node);
    }

    /// A Secondary lets its disk go and takes it back.
    fn attach_again(&mut self, node: usize) {
        if node == self.primary || !self.is_up(node) {
            return;
        }
        if self.world.ordered(node, Order::Detach).is_ok() {
            let time_ns = self.world.random.below(20 * MS);
            self.world.run_for(time_ns);
            self.world.attach(node);
        }
    }

    fn work(&mut self) {
        let node = self.primary;
        if !self.is_up(node) {
            return;
        }
        for _ in 0..self.world.random.below(6) {
            self.world.submit_random_write(node);
        }
        match self.world.random.below(6) {
            0 => {
                self.world.submit(node, 0, RequestKind::Flush, 0, 0);
            }
            1..4 => self.world.submit_random_read(node),
            _ => {}
        }
    }

    fn end(mut self) {
        self.heal_all();
        self.world.settle();
        self.world.wait_for_io();
        self.world.check_orders();
        for lba in (0..128).step_by(8) {
            self.world.read(self.primary, lba, 8);
        }
    }
}

fn run(seed: u64, nodes: usize, steps: u64, power: bool) {
    let mut run = Run::new(seed, nodes, power);
    for _ in 0..steps {
        run.step();
    }
    run.end();
}

#[test]
fn random_runs_of_three_nodes_lose_nothing() {
    for_seeds(30, |seed| run(seed, 3, 120, false));
}

#[test]
fn random_runs_of_three_nodes_with_power_loss_lose_nothing_that_was_flushed() {
    for_seeds(30, |seed| run(seed, 3, 120, true));
}

fn three(seed: u64) -> World {
    let config = Config {
        nodes: 3,
        cores: 1 + (seed % 2) as usize,
        volume_bytes: 16 << 20,
        ..Config::default()
    };
    let mut world = World::clean_cluster(seed, config);
    world.promote(0);
    world
}

#[test]
fn a_write_that_one_survivor_got_is_on_both_or_none_when_the_primary_is_lost() {
    for seed in 0..10 {
        let mut world = three(seed);
        let (has, lacks) = if seed % 4 < 2 { (1, 2) } else { (2, 1) };
        world.cut(0, lacks);
        world.submit(0, 0, RequestKind::Write { fua: false }, 40, 8);
        world.run_for(10 * MS);
        world.kill(0);
        let bytes = 1 << 20..17 << 20;
        let differ = |world: &World| {
            let (one, other) = (&world.nodes[has].disk, &world.nodes[lacks].disk);
            one.first_difference(other, bytes.clone()).is_some()
        };
        assert!(differ(&world), "seed {seed}: the write has reached one");
        world.run_until("the survivors agree", 10 * SECOND, |world| {
            let peer = world.peer(has, lacks);
            peer.conn == ConnState::Connected
                && peer.disk == DiskState::UpToDate
                && peer.out_of_sync_bytes == 0
                && !differ(world)
        });
        world.heal(0, lacks);
        world.restart(0);
        world.settle();
    }
}

#[test]
fn bits_for_nodes_that_got_everything_go_again() {
    for seed in 0..5 {
        let mut world = three(seed);
        for _ in 0..50 {
            world.submit_random_write(0);
            world.run_for(MS);
        }
        world.wait_for_io();
        // Without a resync: both stay what they are.
        for _ in 0..40 {
            world.run_for(10 * MS);
            for node in [1, 2] {
                assert_eq!(world.state(node).disk, DiskState::UpToDate, "seed {seed}");
            }
        }
        // There is nothing left that the survivors would have to agree on.
        world.kill(0);
        world.run_for(2 * SECOND);
        assert_eq!(world.peer(1, 2).conn, ConnState::Connected, "seed {seed}");
        assert_eq!(world.resynced_bytes, 0, "seed {seed}");
        world.restart(0);
        world.settle();
    }
}

#[test]
fn a_node_that_the_primary_goes_on_without_is_outdated_and_not_promoted() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.cut(0, 2);
        world.write(0, 40, 8);
        assert_ne!(world.peer(1, 2).disk, DiskState::UpToDate, "seed {seed}");
        world.run_until("node 2 knows", SECOND, |world| {
            world.state(2).disk == DiskState::Outdated
        });
        let promote = Order::Promote { force: false };
        assert!(world.ordered(2, promote).is_err(), "seed {seed}");
        world.heal(0, 2);
        world.settle();
    }
}

#[test]
fn a_write_is_not_complete_before_all_who_have_it_know_who_lacks_it() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.catch(opcode::NEW_GENERATION);
        world.cut(0, 2);
        let id = world.submit(0, 0, RequestKind::Write { fua: false }, 40, 8);
        world.run_until("node 1 is told", SECOND, |world| world.caught() > 0);
        // A new view for the channels, while the generation is durable here and not there.
        world.run_for(20 * MS);
        world.carry_out(0, Order::PauseResync);
        world.carry_out(0, Order::ResumeResync);
        world.run_for(20 * MS);
        assert_eq!(world.apps[&id].status, None, "seed {seed}");
        world.let_go();
        world.run_until("it completes", SECOND, |world| {
            world.apps.get(&id).is_none_or(|app| app.status.is_some())
        });
        world.heal(0, 2);
        world.settle();
    }
}

#[test]
fn a_second_primary_is_refused_by_who_sees_the_first() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.cut(0, 2);
        world.run_for(500 * MS);
        let promote = Order::Promote { force: false };
        assert!(world.ordered(2, promote).is_err(), "seed {seed}");
        world.heal(0, 2);
        world.settle();
    }
}

/// No campaign meets it: its operator promotes nobody who has not heard of the Primary that there is.
#[test]
fn a_primary_from_apart_is_refused_by_who_sees_another_one() {
    for seed in 0..5 {
        let mut world = three(seed);
        world.cut(0, 2);
        world.cut(1, 2);
        world.run_for(500 * MS);
        world.promote(2);
        world.heal(1, 2);
        world.run_for(500 * MS);
        let outcomes = world.coverage.of(Kind::Outcome);
        let is_it = |&(name, _): &(&str, u64)| name == "AnotherPrimary";
        assert!(outcomes.iter().any(is_it), "seed {seed}: {outcomes:?}");
        assert!(world.peer(1, 2).conn < ConnState::Connected, "seed {seed}");
    }
}

#[test]
fn random_runs_of_four_and_five_nodes_lose_nothing() {
    for_seeds(10, |seed| {
        run(seed, 4 + (seed % 2) as usize, 100, seed % 4 < 2);
    });
}
