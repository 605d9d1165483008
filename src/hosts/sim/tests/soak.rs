//! Random runs of two nodes and more: one Primary, links that are cut each by itself, nodes that die and come back, disks
//! that are let go, and roles that move, all out of one seed. `BDEV_REPL_SIM_SEED=S` replays one seed,
//! `BDEV_REPL_SIM_SEEDS=N` runs N of them. Campaigns draw more and judge more; these run with the unit tests.

use crate::engine::manager::Order;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::engine::request::RequestKind;
use crate::hosts::sim::random::Random;
use crate::hosts::sim::world::{Config, MS, World};

/// Says which seed it was when a run panics.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with BDEV_REPL_SIM_SEED={}", self.0);
        }
    }
}

/// Runs `run` for each seed that is asked for.
pub fn for_seeds(count: u64, run: impl Fn(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seeds = match number("BDEV_REPL_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BDEV_REPL_SIM_SEEDS").unwrap_or(count),
    };
    for seed in seeds {
        let _printed = Seed(seed);
        run(seed);
    }
}

/// What a node takes with a command: often less than a write, sometimes less than a granule or a block.
pub fn any_in_capsule_bytes(shape: &mut Random) -> u32 {
    let sizes = [0, 512, 1500, 4096, 4096, 8192, 20_000, 128 << 10];
    sizes[shape.below(sizes.len() as u64) as usize]
}

/// A world of this seed's own shape.
fn shaped(seed: u64, nodes: usize, volatile_caches: bool) -> World {
    let mut shape = Random::new(seed ^ 0x5eed);
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
fn random_runs_lose_nothing() {
    for_seeds(100, |seed| run(seed, 2, 120, false));
}

#[test]
fn random_runs_with_power_loss_lose_nothing_that_was_flushed() {
    for_seeds(100, |seed| run(seed, 2, 120, true));
}

#[test]
fn random_runs_of_three_nodes_lose_nothing() {
    for_seeds(30, |seed| run(seed, 3, 120, false));
}

#[test]
fn random_runs_of_three_nodes_with_power_loss_lose_nothing_that_was_flushed() {
    for_seeds(30, |seed| run(seed, 3, 120, true));
}

#[test]
fn random_runs_of_four_and_five_nodes_lose_nothing() {
    for_seeds(10, |seed| {
        run(seed, 4 + (seed % 2) as usize, 100, seed % 4 < 2);
    });
}
