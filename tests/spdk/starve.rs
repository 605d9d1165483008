//! Two nodes, each Primary of a volume, whose targets have few buffers: the hosts' I/O holds them while it waits for the
//! other node, and what the nodes ask of each other must not wait for those. Without disks it does: then there must be
//! more buffers (docs/exporting.md).

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bdev_repl::cli::demo::cluster::{BASE_BDEV, SUBSYSTEM_NQN, VOLUME, in_sync};
use bdev_repl::cli::demo::compare::{self, Replica};
use bdev_repl::cli::demo::ledger::{BLOCK_BYTES, Ledger};
use bdev_repl::cli::demo::load::{Load, LoadPlan, patient};
use bdev_repl::hosts::embedded::nvme_tcp::blocking::{BlockingClient, ClientError};
use bdev_repl::rpc::volume::VolumeReport;
use serde_json::{Value, json};

use crate::stage::{A, B, MIB, PATIENCE, Stage};
use crate::targets::{ONE_CORE_EACH, call, stop, targets};
use crate::tools::alone;

const SIZE_MB: u64 = 64;
/// The volume of which node B is Primary.
const OTHER: &str = "repl1";
const OTHER_DISK: &str = "disk1";
const OTHER_NQN: &str = "nqn.2025-01.io.bdev-repl:repl1";
/// Buffers of 8 KiB and of 132 KiB: as few as SPDK takes.
const FEWEST: [u32; 2] = [64, 8];
/// More of each than the three hosts of a node have commands on their way.
const ONE_FOR_EACH: [u32; 2] = [128, 128];
/// Commands of each host, of up to 128 KiB.
const AT_ONCE: usize = 32;
const BLOCKS_AT_ONCE: u64 = 32;

/// Has a node start with few buffers, none of which is set aside for anybody.
fn starve(stage: &Stage, index: usize, [small, large]: [u32; 2]) {
    let path = &stage.cluster.nodes[index].settings().config;
    let text = std::fs::read_to_string(path).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let pools = json!({"small_pool_count": small, "large_pool_count": large});
    let of_accel = json!({"small_cache_size": 0, "large_cache_size": 0});
    let of_bdevs = json!({"iobuf_small_cache_size": 0, "iobuf_large_cache_size": 0});
    let subsystems = config["subsystems"].as_array_mut().unwrap();
    for (place, subsystem, method, params) in [
        (0, "iobuf", "iobuf_set_options", pools),
        (1, "accel", "accel_set_options", of_accel),
        (2, "bdev", "bdev_set_options", of_bdevs),
    ] {
        let calls = json!([{"method": method, "params": params}]);
        subsystems.insert(place, json!({"subsystem": subsystem, "config": calls}));
    }
    std::fs::write(path, config.to_string()).unwrap();
}

/// Both nodes with both volumes: A is Primary of the one, B of the other.
struct Crossed {
    stage: Stage,
    other: Arc<Ledger>,
}

impl Crossed {
    fn new(buffers: [u32; 2]) -> Crossed {
        let mut stage = targets(ONE_CORE_EACH, SIZE_MB, Value::Null);
        for index in [A, B] {
            starve(&stage, index, buffers);
        }
        stage = stage.pair();
        let endpoints = [A, B].map(|index| {
            let ip = stage.cluster.nodes[index].settings().endpoint.ip();
            let listener = TcpListener::bind((ip, 0)).unwrap();
            listener.local_addr().unwrap()
        });
        for index in [A, B] {
            make_other(&mut stage, index, endpoints);
        }
        let other = Arc::new(Ledger::new(0, SIZE_MB * MIB, 7));
        let mut crossed = Crossed { stage, other };
        crossed.in_sync();
        call(
            &mut crossed.stage,
            B,
            "bdev_repl_promote",
            json!({"name": OTHER}),
        );
        crossed
    }

    fn report(&mut self, index: usize, name: &str) -> VolumeReport {
        let name = json!({"name": name});
        let answer = call(&mut self.stage, index, "bdev_repl_get_volumes", name);
        let mut reports: Vec<VolumeReport> = serde_json::from_value(answer).unwrap();
        reports.pop().unwrap()
    }

    fn in_sync(&mut self) {
        let began = Instant::now();
        for (index, name) in [(A, VOLUME), (B, VOLUME), (A, OTHER), (B, OTHER)] {
            while !in_sync(&self.report(index, name)) {
                assert!(began.elapsed() < PATIENCE, "{:?}", self.report(index, name));
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// The volumes, their Primaries, and what has been written to them.
    fn volumes(&self) -> [(usize, &'static str, &'static str, Arc<Ledger>); 2] {
        [
            (A, VOLUME, SUBSYSTEM_NQN, Arc::clone(&self.stage.ledger)),
            (B, OTHER, OTHER_NQN, Arc::clone(&self.other)),
        ]
    }

    fn address(&self, index: usize) -> SocketAddr {
        self.stage.cluster.nodes[index].settings().export
    }

    fn write(&self) -> [Load; 2] {
        self.volumes().map(|(primary, _, nqn, ledger)| {
            let plan = LoadPlan {
                address: self.address(primary),
                subsystem_nqn: nqn.into(),
                threads: 2,
                writes_at_once: AT_ONCE,
                write_blocks_max: BLOCKS_AT_ONCE,
                range: 0..SIZE_MB * MIB / BLOCK_BYTES as u64,
                pause: Duration::ZERO,
                seed: primary as u64,
            };
            Load::start(&plan, &ledger).unwrap()
        })
    }

    fn read(&self) -> [Reader; 2] {
        let volumes = self.volumes();
        volumes.map(|(primary, _, nqn, _)| Reader::start(self.address(primary), nqn))
    }

    /// Everybody gets on: hosts that write, hosts that read.
    fn go_on(&self, readers: &[Reader; 2]) {
        let count = || {
            let written = self
                .volumes()
                .map(|(.., ledger)| ledger.acknowledged_blocks());
            let read = [0, 1].map(|index| readers[index].rounds.load(Ordering::Relaxed));
            [written, read].concat()
        };
        let before = count();
        let began = Instant::now();
        while count()
            .iter()
            .zip(&before)
            .any(|(now, before)| *now < before + 3)
        {
            assert!(began.elapsed() < PATIENCE, "{before:?}, {:?}", count());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends hosts, then nodes; the replicas of both volumes are the same.
    fn end(mut self, loads: [Load; 2], readers: [Reader; 2]) {
        for reader in readers {
            reader.stop();
        }
        for load in loads {
            let report = load.stop();
            assert!(report.error.is_none(), "{:?}", report.error);
        }
        self.in_sync();
        for (primary, name, ..) in self.volumes() {
            call(
                &mut self.stage,
                primary,
                "bdev_repl_demote",
                json!({"name": name}),
            );
        }
        self.in_sync();
        for index in [A, B] {
            stop(&mut self.stage, index);
        }
        self.stage.compare();
        let [left, right] = [A, B].map(|index| {
            let path = other_disk(&self.stage, index);
            Replica::open(&index.to_string(), &path).unwrap()
        });
        compare::replicas(&left, &right).unwrap();
        compare::ledger(&left, &self.other).unwrap();
    }
}

fn other_disk(stage: &Stage, index: usize) -> std::path::PathBuf {
    let folder = &stage.cluster.settings().directory;
    folder.join(format!("other{index}.img"))
}

/// The other volume, its export and its way to the peer, on one node.
fn make_other(stage: &mut Stage, index: usize, endpoints: [SocketAddr; 2]) {
    let path = other_disk(stage, index);
    let file = std::fs::File::create_new(&path).unwrap();
    file.set_len((SIZE_MB + 32) * MIB).unwrap();
    let listener = |address: SocketAddr| {
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": ip, "trsvcid": port})
    };
    let mut create = stage.cluster.create_parameters(index, &Value::Null);
    create["name"] = json!(OTHER);
    create["base_bdev"] = json!(OTHER_DISK);
    create["assume_clean"] = json!(true);
    create["listen_address"] = listener(endpoints[index]);
    create["ana_listeners"] = json!([]);
    let peer = endpoints[1 - index];
    let peer = json!({
        "name": OTHER,
        "node_id": 1 - index,
        "traddr": peer.ip().to_string(),
        "trsvcid": peer.port().to_string(),
    });
    let disk = json!({"name": OTHER_DISK, "filename": path, "block_size": BLOCK_BYTES});
    let subsystem = json!({"nqn": OTHER_NQN, "allow_any_host": true});
    let export = stage.cluster.nodes[index].settings().export;
    let listen = json!({"nqn": OTHER_NQN, "listen_address": listener(export)});
    let namespace = json!({"nqn": OTHER_NQN, "namespace": {"bdev_name": OTHER, "nsid": 1}});
    for (method, params) in [
        ("bdev_aio_create", disk),
        ("bdev_repl_create", create),
        ("bdev_repl_add_peer", peer),
        ("nvmf_create_subsystem", subsystem),
        ("nvmf_subsystem_add_listener", listen),
        ("nvmf_subsystem_add_ns", namespace),
    ] {
        call(stage, index, method, params);
    }
}

/// A host that reads all the time, as much at once as the writers.
struct Reader {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Option<ClientError>>,
}

impl Reader {
    fn start(address: SocketAddr, nqn: &str) -> Reader {
        let mut client = BlockingClient::connect(address, nqn, patient()).unwrap();
        let (stop, rounds) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = thread::spawn(move || {
            let bytes = BLOCKS_AT_ONCE as usize * BLOCK_BYTES;
            let mut memory = vec![0; AT_ONCE * bytes];
            while !stopped.load(Ordering::Relaxed) {
                let pieces = memory.chunks_exact_mut(bytes).enumerate();
                let mut requests: Vec<_> = pieces
                    .map(|(at, piece)| (at as u64 * BLOCKS_AT_ONCE, piece))
                    .collect();
                let outcome = client.read_many(&mut requests);
                if outcome.result.is_err() {
                    return outcome.result.err();
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            None
        });
        Reader {
            stop,
            rounds,
            thread,
        }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        let error = self.thread.join().unwrap();
        assert!(error.is_none(), "{error:?}");
    }
}

#[test]
fn two_primaries_with_few_buffers_write_read_and_resync_at_the_same_time() {
    let _alone = alone();
    let mut crossed = Crossed::new(FEWEST);
    let (loads, readers) = (crossed.write(), crossed.read());
    crossed.go_on(&readers);
    for (target, name) in [(B, VOLUME), (A, OTHER)] {
        let name = json!({"name": name});
        call(
            &mut crossed.stage,
            target,
            "bdev_repl_disconnect",
            name.clone(),
        );
        crossed.go_on(&readers);
        call(&mut crossed.stage, target, "bdev_repl_connect", name);
        crossed.go_on(&readers);
    }
    crossed.in_sync();
    crossed.go_on(&readers);
    crossed.end(loads, readers);
}

#[test]
fn two_diskless_primaries_with_a_buffer_for_each_command_of_their_hosts_read_from_each_other() {
    let _alone = alone();
    let mut crossed = Crossed::new(ONE_FOR_EACH);
    let (loads, readers) = (crossed.write(), crossed.read());
    crossed.go_on(&readers);
    for (primary, name, ..) in crossed.volumes() {
        call(
            &mut crossed.stage,
            primary,
            "bdev_repl_detach",
            json!({"name": name}),
        );
    }
    crossed.go_on(&readers);
    for (primary, name, ..) in crossed.volumes() {
        let disk = if name == OTHER { OTHER_DISK } else { BASE_BDEV };
        let attach = json!({"name": name, "base_bdev": disk});
        call(&mut crossed.stage, primary, "bdev_repl_attach", attach);
    }
    crossed.in_sync();
    crossed.end(loads, readers);
}
