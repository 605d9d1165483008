//! What the tests play on: two nodes in a temporary folder, a ledger over the whole volume, a load.
//! The hosts of the nodes come from the environment; a scenario does not know them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use bdev_repl::cli::demo::cluster::{Cluster, ClusterSettings, SUBSYSTEM_NQN, peer};
use bdev_repl::cli::demo::compare::{self, Replica};
use bdev_repl::cli::demo::launcher::Launcher;
use bdev_repl::cli::demo::ledger::{BLOCK_BYTES, Ledger};
use bdev_repl::cli::demo::load::{Load, LoadPlan, patient};
use bdev_repl::hosts::embedded::nvme_tcp::blocking::BlockingClient;
use serde_json::{Value, json};

use crate::hosts;

pub const A: usize = 0;
pub const B: usize = 1;
pub const MIB: u64 = 1 << 20;
/// Nothing is measured by it: it only ends a test that would never end.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub struct Stage {
    pub cluster: Cluster,
    pub ledger: Arc<Ledger>,
    loads: u64,
    // Dropped after the nodes.
    _directory: tempfile::TempDir,
    _turn: Option<MutexGuard<'static, ()>>,
}

/// A loopback network of its own for each stage, so that ports of other tests cannot get into the way.
fn network() -> [Ipv4Addr; 3] {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = (std::process::id() % 240) as u8 + 10;
    let stage = NEXT.fetch_add(1, Ordering::Relaxed);
    [2, 3, 4].map(|host| Ipv4Addr::new(127, process, stage, host))
}

impl Stage {
    /// Two nodes that have not been started, for a volume of this size.
    pub fn new(size_mb: u64, create: Value) -> Stage {
        let launchers = hosts::launchers();
        // Nodes that sleep when idle share a core; one that does not leaves nothing of its own to the other.
        let whole = launchers.iter().any(Launcher::takes_cores_whole);
        let core_masks = ["0x1", if whole { "0x2" } else { "0x1" }];
        Stage::on(launchers, core_masks, size_mb, create)
    }

    /// The same on hosts and cores that the test chooses.
    pub fn on(
        launchers: [Launcher; 2],
        core_masks: [&str; 2],
        size_mb: u64,
        create: Value,
    ) -> Stage {
        let turn = hosts::turn(&launchers);
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let [a, b, link] = network().map(IpAddr::V4);
        let mut all = json!({"size_mb": size_mb});
        for (name, value) in create.as_object().into_iter().flatten() {
            all[name] = value.clone();
        }
        let cluster = Cluster::new(ClusterSettings {
            launchers,
            directory: directory.path().to_owned(),
            addresses: [a, b],
            link_address: link,
            device_bytes: (size_mb + 32) * MIB,
            core_masks: core_masks.map(String::from),
            create: all,
        })
        .unwrap();
        Stage {
            cluster,
            ledger: Arc::new(Ledger::new(0, size_mb * MIB, u64::from(std::process::id()))),
            loads: 0,
            _directory: directory,
            _turn: turn,
        }
    }

    /// Two nodes with a volume declared clean, connected; A is Primary.
    pub fn paired(size_mb: u64, create: Value) -> Stage {
        Stage::new(size_mb, create).pair()
    }

    /// Starts both nodes, with a volume declared clean, and promotes A.
    pub fn pair(mut self) -> Stage {
        for index in [A, B] {
            let clean = json!({"assume_clean": true});
            self.cluster.start(index, &clean).unwrap();
        }
        self.in_sync();
        self.promote(A);
        self
    }

    pub fn in_sync(&mut self) {
        self.cluster.wait_until_in_sync(PATIENCE).unwrap();
    }

    pub fn promote(&mut self, index: usize) {
        self.cluster.call(index, "bdev_repl_promote").unwrap();
    }

    pub fn demote(&mut self, index: usize) {
        self.cluster.call(index, "bdev_repl_demote").unwrap();
    }

    /// The connection state that this node sees.
    pub fn connection(&mut self, index: usize) -> String {
        let report = self.cluster.report(index).unwrap();
        peer(&report).unwrap().connection.clone()
    }

    /// Waits until the node has noticed that its peer is gone.
    pub fn wait_until_alone(&mut self, index: usize) {
        let alone =
            |connection: &str| !["Connected", "SyncSource", "SyncTarget"].contains(&connection);
        self.cluster
            .wait_until(
                index,
                "the peer's loss has been noticed",
                PATIENCE,
                |report| peer(report).is_some_and(|peer| alone(&peer.connection)),
            )
            .unwrap();
    }

    pub fn client(&self, index: usize) -> BlockingClient {
        let export = self.cluster.nodes[index].settings().export;
        BlockingClient::connect(export, SUBSYSTEM_NQN, patient()).unwrap()
    }

    /// Starts to write random blocks of this range (in bytes) of the volume.
    pub fn load(&mut self, index: usize, range: std::ops::Range<u64>) -> Load {
        self.loads += 1;
        let plan = LoadPlan {
            address: self.cluster.nodes[index].settings().export,
            subsystem_nqn: SUBSYSTEM_NQN.into(),
            threads: 2,
            writes_at_once: 4,
            write_blocks_max: 8,
            range: range.start / BLOCK_BYTES as u64..range.end / BLOCK_BYTES as u64,
            pause: Duration::ZERO,
            seed: self.loads,
        };
        Load::start(&plan, &self.ledger).unwrap()
    }

    /// Waits until this many more blocks have been acknowledged.
    pub fn let_write(&self, blocks: u64) {
        let wanted = self.ledger.acknowledged_blocks() + blocks;
        let started = Instant::now();
        while self.ledger.acknowledged_blocks() < wanted {
            assert!(started.elapsed() < PATIENCE, "the load does not go on");
            thread::yield_now();
        }
    }

    /// Writes some blocks of the range and waits until all are acknowledged. Returns the bytes written.
    pub fn write(&mut self, index: usize, range: std::ops::Range<u64>, blocks: u64) -> u64 {
        let load = self.load(index, range);
        self.let_write(blocks);
        let report = load.stop();
        assert!(report.error.is_none(), "{:?}", report.error);
        report.acknowledged_bytes
    }

    /// Reads a range of the volume through NVMe/TCP and checks that what was acknowledged is there.
    pub fn read_back(&self, index: usize, range: std::ops::Range<u64>) {
        let mut client = self.client(index);
        let block_size = u64::from(client.block_size());
        let mut piece = vec![0; MIB as usize];
        for offset in range.step_by(MIB as usize) {
            client.read(offset / block_size, &mut piece).unwrap();
            for (at, content) in piece.chunks_exact(BLOCK_BYTES).enumerate() {
                let block = offset / BLOCK_BYTES as u64 + at as u64;
                let checked = self.ledger.check(block, content);
                assert!(checked.is_ok(), "block {block}: {}", checked.unwrap_err());
            }
        }
    }

    /// Compares the data of both backing files with each other and with the ledger. Nothing may be written
    /// meanwhile.
    pub fn compare(&self) {
        let replica = self.compare_replicas();
        compare::ledger(&replica, &self.ledger).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Compares them with each other only: somebody else has written. Returns A's.
    pub fn compare_replicas(&self) -> Replica {
        let replicas = [A, B].map(|index| {
            let settings = self.cluster.nodes[index].settings();
            Replica::open(&settings.label.to_string(), &settings.backing).unwrap()
        });
        compare::replicas(&replicas[A], &replicas[B]).unwrap_or_else(|error| panic!("{error}"));
        let [replica, _] = replicas;
        replica
    }

    /// Ends the load's work: demotes whoever is Primary, stops both nodes, compares.
    pub fn end(mut self, primary: usize) {
        self.stop_both(primary);
        self.compare();
    }

    /// Demotes whoever is Primary and stops both nodes.
    pub fn stop_both(&mut self, primary: usize) {
        self.demote(primary);
        self.in_sync();
        for index in [A, B] {
            self.cluster.nodes[index].stop().unwrap();
        }
    }
}
