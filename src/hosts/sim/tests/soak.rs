//! Random runs: everything at once, out of one seed. `BDEV_REPL_SIM_SEED=S` replays one seed, `BDEV_REPL_SIM_SEEDS=N`
//! runs N of them.

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
pub fn shaped(seed: u64, volatile_caches: bool) -> World {
    let mut shape = Random::new(seed ^ 0x5eed);
    let granularities = [12, 12, 14, 16];
    let config = Config {
        cores: 1 + shape.below(2) as usize,
        block_size: 512,
        volatile_caches,
        volume_bytes: 64 << 20,
        al_extents: [8, 10, 12][shape.below(3) as usize],
        in_capsule_bytes: (0..2).map(|_| any_in_capsule_bytes(&mut shape)).collect(),
        granularity_log2: (0..2)
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
    /// Where the application is.
    primary: Option<usize>,
    power: bool,
}

impl Run {
    fn new(seed: u64, power: bool) -> Run {
        let mut world = shaped(seed, power);
        world.promote(0);
        Run {
            world,
            primary: Some(0),
            power,
        }
    }

    fn is_up(&self, node: usize) -> bool {
        self.world.nodes[node].engine.is_some()
    }

    /// Connected, both UpToDate as the node sees it: the other has everything that was acknowledged.
    fn has_everything_elsewhere(&self, node: usize) -> bool {
        let other = 1 - node;
        self.is_up(node) && self.is_up(other) && {
            let (mine, theirs) = (self.world.peer(node, other), self.world.state(other));
            mine.conn == ConnState::Connected
                && mine.disk == DiskState::UpToDate
                && theirs.disk == DiskState::UpToDate
        }
    }

    fn stop(&mut self, node: usize) {
        if self.power && self.world.random.chance(50) {
            self.world.power_loss(node);
        } else {
            self.world.kill(node);
        }
    }

    fn step(&mut self) {
        let node = self.world.random.below(2) as usize;
        match self.world.random.below(40) {
            0 => self.world.cut(0, 1),
            1 => {
                let from = self.world.random.below(2) as usize;
                self.world.cut_one_way(from, 1 - from);
            }
            2..6 => self.world.heal(0, 1),
            6 => self.world.reset(0, 1),
            7 if self.is_up(node) => self.crash(node),
            8..11 if !self.is_up(node) => self.come_back(node),
            11 if self.is_up(node) => {
                let order = match self.world.random.below(3) {
                    0 => Order::PauseResync,
                    _ => Order::ResumeResync,
                };
                self.world.order(node, order);
            }
            12 => self.hand_over(),
            _ => self.work(),
        }
        let time_ns = self.world.random.below(4 * MS);
        self.world.run_for(time_ns);
    }

    fn crash(&mut self, node: usize) {
        let takes_over = self.primary == Some(node)
            && self.has_everything_elsewhere(node)
            && !self.world.is_cut(0, 1);
        self.stop(node);
        if self.primary != Some(node) {
            return;
        }
        if takes_over && self.world.random.chance(60) {
            let other = 1 - node;
            self.world.run_for(5 * MS);
            if self
                .world
                .ordered(other, Order::Promote { force: false })
                .is_ok()
            {
                self.primary = Some(other);
                return;
            }
        }
        // Nobody else may be Primary now: it comes back itself.
        self.come_back(node);
        self.promote(node);
    }

    fn promote(&mut self, node: usize) {
        for _ in 0..20 {
            if self
                .world
                .ordered(node, Order::Promote { force: false })
                .is_ok()
            {
                return;
            }
            self.world.heal(0, 1);
            if !self.is_up(1 - node) {
                self.come_back(1 - node);
            }
            self.world.run_for(200 * MS);
        }
        panic!("node {node} cannot be promoted\n{}", self.world.describe());
    }

    fn come_back(&mut self, node: usize) {
        self.world.restart(node);
    }

    /// Demotes the Primary and promotes the other, when both have everything.
    fn hand_over(&mut self) {
        let Some(node) = self.primary else {
            return;
        };
        if !self.has_everything_elsewhere(node) || self.world.is_cut(0, 1) {
            return;
        }
        self.world.carry_out(node, Order::Demote);
        self.world.wait_for_io();
        let next = if self.has_everything_elsewhere(node) && self.world.random.chance(70) {
            1 - node
        } else {
            node
        };
        self.promote(next);
        self.primary = Some(next);
    }

    fn work(&mut self) {
        let Some(node) = self.primary.filter(|&node| self.is_up(node)) else {
            return;
        };
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
        self.world.heal(0, 1);
        for node in 0..2 {
            if !self.is_up(node) {
                self.come_back(node);
            }
            self.world.carry_out(node, Order::ResumeResync);
        }
        self.world.settle();
        self.world.wait_for_io();
        self.world.check_orders();
        if let Some(node) = self.primary {
            for lba in (0..128).step_by(8) {
                self.world.read(node, lba, 8);
            }
        }
    }
}

fn run(seed: u64, steps: u64, power: bool) {
    let mut run = Run::new(seed, power);
    for _ in 0..steps {
        run.step();
    }
    run.end();
}

#[test]
fn random_runs_lose_nothing() {
    for_seeds(100, |seed| run(seed, 120, false));
}

#[test]
fn random_runs_with_power_loss_lose_nothing_that_was_flushed() {
    for_seeds(100, |seed| run(seed, 120, true));
}
