//! The application of the demo and the end-to-end tests: threads that write blocks of the ledger through
//! NVMe/TCP until they are told to stop or the Primary is gone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::ledger::{BLOCK_BYTES, Ledger, mix};
use crate::hosts::embedded::nvme_tcp::blocking::{BlockingClient, ClientError, Timeouts};

/// Blocks that belong to one thread: chunks of the ledger are dealt out in turn.
const CHUNK_BLOCKS: u64 = 64;

/// What to write, and where.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The Primary's NVMe/TCP listener.
    pub address: SocketAddr,
    /// The exported subsystem; the volume is its namespace 1.
    pub subsystem_nqn: String,
    /// Threads, each with a connection of its own.
    pub threads: u64,
    /// Writes that a thread has on the way at the same time.
    pub writes_at_once: usize,
    /// Blocks of the longest write, at most 64; each is from 1 to this many long.
    pub write_blocks_max: u64,
    /// Range of the ledger, in blocks, that is written to.
    pub range: std::ops::Range<u64>,
    /// Pause of a thread between two rounds.
    pub pause: Duration,
    /// Where the chance of this load starts.
    pub seed: u64,
}

/// What a load has done.
#[derive(Debug, Default)]
pub struct LoadReport {
    /// Bytes that were acknowledged.
    pub acknowledged_bytes: u64,
    /// Bytes that were sent, acknowledged or not.
    pub issued_bytes: u64,
    /// Why a thread ended before it was told to, the first one.
    pub error: Option<ClientError>,
}

/// A load that is running.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<LoadReport>>,
}

/// Waits of clients that write while links are cut and peers are lost.
pub fn patient() -> Timeouts {
    Timeouts {
        connect: Duration::from_secs(20),
        command: Duration::from_secs(60),
    }
}

impl Load {
    /// Connects all threads, then starts them.
    pub fn start(plan: &LoadPlan, ledger: &Arc<Ledger>) -> Result<Load, ClientError> {
        let mut clients = Vec::new();
        for _ in 0..plan.threads {
            clients.push(BlockingClient::connect(
                plan.address,
                &plan.subsystem_nqn,
                patient(),
            )?);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let threads = clients
            .into_iter()
            .enumerate()
            .map(|(index, client)| {
                let mut writer = Writer {
                    client,
                    ledger: ledger.clone(),
                    plan: plan.clone(),
                    index: index as u64,
                    chance: plan.seed.wrapping_add(index as u64),
                    report: LoadReport::default(),
                };
                let stop = stop.clone();
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) && writer.report.error.is_none() {
                        writer.write_round();
                        thread::sleep(writer.plan.pause);
                    }
                    writer.report
                })
            })
            .collect();
        Ok(Load { stop, threads })
    }

    /// Lets every thread end its round and waits for that.
    pub fn stop(self) -> LoadReport {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits until the threads have ended by themselves: their connections are lost.
    pub fn join(self) -> LoadReport {
        let mut all = LoadReport::default();
        for thread in self.threads {
            match thread.join() {
                Ok(report) => {
                    all.acknowledged_bytes += report.acknowledged_bytes;
                    all.issued_bytes += report.issued_bytes;
                    all.error = all.error.or(report.error);
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    }
}

struct Writer {
    client: BlockingClient,
    ledger: Arc<Ledger>,
    plan: LoadPlan,
    index: u64,
    chance: u64,
    report: LoadReport,
}

impl Writer {
    fn write_round(&mut self) {
        let writes = self.choose();
        let mut contents: Vec<Vec<u8>> = Vec::new();
        for (first, blocks) in &writes {
            let mut content = vec![0; *blocks as usize * BLOCK_BYTES];
            for (block, bytes) in (*first..).zip(content.chunks_exact_mut(BLOCK_BYTES)) {
                self.ledger.issue(block, bytes);
            }
            self.report.issued_bytes += content.len() as u64;
            contents.push(content);
        }
        let block_size = u64::from(self.client.block_size()).max(1);
        let requests: Vec<(u64, &[u8])> = writes
            .iter()
            .zip(&contents)
            .map(|((first, _), content)| {
                let byte = self.ledger.offset_bytes() + first * BLOCK_BYTES as u64;
                (byte / block_size, content.as_slice())
            })
            .collect();
        let outcome = self.client.write_many(&requests);
        for index in outcome.acknowledged {
            let (first, blocks) = writes[index];
            for block in first..first + blocks {
                self.ledger.acknowledge(block);
            }
            self.report.acknowledged_bytes += blocks * BLOCK_BYTES as u64;
        }
        self.report.error = outcome.result.err();
    }

    /// Writes of this round: (first block, blocks), none overlapping another or a chunk of another thread.
    fn choose(&mut self) -> Vec<(u64, u64)> {
        let range = self.plan.range.start..self.plan.range.end.min(self.ledger.blocks());
        let chunks = (range.end.saturating_sub(range.start)) / CHUNK_BLOCKS;
        let mine = (chunks + self.plan.threads - 1 - self.index) / self.plan.threads;
        let mut taken = Vec::new();
        let mut writes = Vec::new();
        for _ in 0..self.plan.writes_at_once {
            if mine == 0 {
                break;
            }
            let chunk = mix(&mut self.chance) % mine * self.plan.threads + self.index;
            if taken.contains(&chunk) {
                continue;
            }
            taken.push(chunk);
            let longest = self.plan.write_blocks_max.clamp(1, CHUNK_BLOCKS);
            let blocks = mix(&mut self.chance) % longest + 1;
            let first = mix(&mut self.chance) % (CHUNK_BLOCKS - blocks + 1);
            writes.push((range.start + chunk * CHUNK_BLOCKS + first, blocks));
        }
        writes
    }
}
