//! The demo's story, from two empty nodes to the comparison, told as it happens.
//! Called by the command. Each step is a few lines on the cluster, the load and the image.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::DemoError;
use super::cluster::{Cluster, ClusterSettings, SUBSYSTEM_NQN, VOLUME, in_sync, peer, state_line};
use super::compare::{self, Replica};
use super::image::{Image, Tools};
use super::launcher::Launcher;
use super::ledger::{BLOCK_BYTES, Ledger};
use super::link::LinkState;
use super::load::{Load, LoadPlan, LoadReport, patient};
use super::node::{LOOK_INTERVAL, PATIENCE};
use crate::hosts::embedded::nvme_tcp::blocking::BlockingClient;

const MIB: u64 = 1 << 20;
/// What the load writes to, behind the file system.
const LOAD_BYTES: u64 = 128 * MIB;
/// What the load writes to at a time: an application is at home somewhere, and so the activity log stays
/// small against the device.
const WINDOW_BYTES: u64 = 16 * MIB;
/// Room for metadata besides the bitmaps.
const METADATA_BYTES: u64 = 32 * MIB;
/// Extents of 4 MiB.
const AL_EXTENTS: u32 = 8;
/// Of the image, at most this much is left to be written while the link is cut.
const IMAGE_TAIL_BYTES_MAX: u64 = 8 * MIB;
/// Pieces of the image that are on their way at the same time.
const PIECES_AT_ONCE: usize = 16;
/// How much is written at least in each step, so that every accident has something to break.
const LOAD_BYTES_STEP: u64 = 12 * MIB;
const SEED: u64 = 0x5eed;
const A: usize = 0;
const B: usize = 1;

/// What the demo is to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// From the system.
    pub tools: Tools,
    /// What to make the file system of.
    pub input: Option<PathBuf>,
    /// Where to work.
    pub directory: PathBuf,
    /// Flip a byte before the comparison.
    pub flip_byte: bool,
}

/// A size to be read: `12.3 MiB`.
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// A resync as it was seen from outside.
struct SeenResync {
    /// The most that a report named; 0 if the resync was over before the first look.
    bytes: u64,
    time: Duration,
}

struct Story {
    started: Instant,
    cluster: Cluster,
    ledger: Arc<Ledger>,
    image: Image,
    load_steps: u64,
    written: LoadReport,
}

/// Runs the whole story. An error is the first thing that is not as it must be.
pub fn tell(plan: &Plan) -> Result<(), DemoError> {
    let started = Instant::now();
    println!("bdev_repl demo: a file system on two nodes, a cut link, a killed node\n");
    let image = Image::prepare(&plan.tools, plan.input.as_deref(), &plan.directory)?;
    let load_offset = image.size_bytes.next_multiple_of(4 * MIB);
    let volume_bytes = load_offset + LOAD_BYTES;
    let executable = std::env::current_exe()
        .map_err(|error| DemoError::io("find", std::path::Path::new("this program"), error))?;
    let launcher = Launcher::Embedded { executable };
    let cluster = Cluster::new(ClusterSettings {
        launchers: [launcher.clone(), launcher],
        directory: plan.directory.clone(),
        addresses: [
            IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
            IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3)),
        ],
        link_address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 4)),
        device_bytes: volume_bytes + METADATA_BYTES + volume_bytes / 1024 / MIB * MIB,
        core_masks: ["0x1".into(), "0x1".into()],
        create: json!({"size_mb": volume_bytes / MIB, "al_extents": AL_EXTENTS}),
    })?;
    let mut story = Story {
        started,
        cluster,
        ledger: Arc::new(Ledger::new(load_offset, LOAD_BYTES, SEED)),
        image,
        load_steps: 0,
        written: LoadReport::default(),
    };
    story.say(&format!(
        "An ext4 file system of {}: {} ({} to write). The volume has {}.",
        size(story.image.size_bytes),
        story.image.made_of,
        size(story.image.written_bytes),
        size(volume_bytes),
    ));
    story.pair()?;
    let tail = story.write_most_of_the_image()?;
    let after_cut = story.cut_and_heal(tail)?;
    story.kill_the_primary()?;
    let after_kill = story.bring_the_dead_one_back()?;
    story.stop_both()?;
    story.compare(plan)?;
    story.sum_up(volume_bytes, &after_cut, &after_kill);
    Ok(())
}

impl Story {
    fn say(&self, text: &str) {
        println!("[{:5.1} s] {text}", self.started.elapsed().as_secs_f64());
    }

    fn say_states(&mut self) {
        println!("          {}", self.cluster.states());
    }

    fn pair(&mut self) -> Result<(), DemoError> {
        // New files are all zeroes on both nodes, so there is nothing to resync first.
        let new = json!({"assume_clean": true});
        for index in [A, B] {
            self.cluster.start(index, &new)?;
            let node = &self.cluster.nodes[index];
            let (settings, pid) = (node.settings(), node.pid().unwrap_or_default());
            self.say(&format!(
                "Node {} runs: pid {pid}, volume exported at {}, peer endpoint at {}.",
                settings.label, settings.export, settings.endpoint
            ));
        }
        self.cluster.wait_until_in_sync(PATIENCE)?;
        self.cluster.call(A, "bdev_repl_promote")?;
        self.say("Paired by bdev_repl_create and bdev_repl_add_peer on both; A is promoted.");
        self.say_states();
        Ok(())
    }

    /// Returns from where on the image has not been written.
    fn write_most_of_the_image(&mut self) -> Result<u64, DemoError> {
        let tail_bytes = (self.image.written_bytes / 10).min(IMAGE_TAIL_BYTES_MAX);
        let mut left = self.image.written_bytes;
        let mut tail = self.image.size_bytes;
        self.image
            .pieces(0..self.image.size_bytes, |offset, piece| {
                if left > tail_bytes {
                    tail = offset + piece.len() as u64;
                }
                left -= piece.len() as u64;
                Ok(())
            })?;
        let started = Instant::now();
        let bytes = self.write_image(0..tail)?;
        self.say(&format!(
            "{} of the file system written through NVMe/TCP, each write to both nodes, {}/s.",
            size(bytes),
            size(rate(bytes, started.elapsed())),
        ));
        self.say_states();
        Ok(tail)
    }

    /// Writes the pieces of the image that are not zero to the Primary A, and flushes.
    fn write_image(&self, range: std::ops::Range<u64>) -> Result<u64, DemoError> {
        let export = self.cluster.nodes[A].settings().export;
        let mut client = BlockingClient::connect(export, SUBSYSTEM_NQN, patient())?;
        let block_size = u64::from(client.block_size()).max(1);
        let bar = bar("writing the image", range.end - range.start);
        let mut batch: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut written = 0;
        let mut write = |batch: &mut Vec<(u64, Vec<u8>)>| -> Result<(), DemoError> {
            let requests: Vec<(u64, &[u8])> = batch
                .iter()
                .map(|(lba, data)| (*lba, data.as_slice()))
                .collect();
            client.write_many(&requests).result?;
            written += batch.iter().map(|(_, data)| data.len() as u64).sum::<u64>();
            batch.clear();
            Ok(())
        };
        let start = range.start;
        self.image.pieces(range, |offset, piece| {
            batch.push((offset / block_size, piece.to_vec()));
            if batch.len() == PIECES_AT_ONCE {
                write(&mut batch)?;
                bar.set_position(offset - start);
            }
            Ok(())
        })?;
        write(&mut batch)?;
        client.flush()?;
        bar.finish_and_clear();
        Ok(written)
    }

    /// The window of the ledger that this step writes to, and how.
    fn load_plan(&mut self, index: usize, pause: Duration) -> LoadPlan {
        let blocks = WINDOW_BYTES / BLOCK_BYTES as u64;
        let windows = self.ledger.blocks() / blocks;
        let first = self.load_steps % windows * blocks;
        self.load_steps += 1;
        LoadPlan {
            address: self.cluster.nodes[index].settings().export,
            subsystem_nqn: SUBSYSTEM_NQN.into(),
            threads: 2,
            writes_at_once: 8,
            write_blocks_max: 16,
            range: first..first + blocks,
            pause,
            seed: SEED + self.load_steps,
        }
    }

    fn start_load(&mut self, index: usize, pause: Duration) -> Result<Load, DemoError> {
        let plan = self.load_plan(index, pause);
        Ok(Load::start(&plan, &self.ledger)?)
    }

    /// Waits until the load has written some more.
    fn let_write(&self, bytes: u64) -> Result<(), DemoError> {
        let wanted = self.ledger.acknowledged_blocks() + bytes / BLOCK_BYTES as u64;
        let started = Instant::now();
        while self.ledger.acknowledged_blocks() < wanted {
            if started.elapsed() > PATIENCE {
                return Err(DemoError::Timeout {
                    what: format!("the load has written {}", size(bytes)),
                    waited_s: PATIENCE.as_secs(),
                    last_seen: format!(
                        "{} blocks to go",
                        wanted.saturating_sub(self.ledger.acknowledged_blocks())
                    ),
                });
            }
            thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    fn count(&mut self, report: LoadReport) -> Result<(), DemoError> {
        self.written.acknowledged_bytes += report.acknowledged_bytes;
        self.written.issued_bytes += report.issued_bytes;
        report.error.map_or(Ok(()), |error| Err(error.into()))
    }

    fn cut_and_heal(&mut self, tail: u64) -> Result<SeenResync, DemoError> {
        self.cluster.link.set(LinkState::Closed);
        let what = "the cut has been noticed";
        self.cluster
            .wait_until(A, what, PATIENCE, |report| !connected(report))?;
        self.say("The link is cut. A goes on alone.");
        let bytes = self.write_image(tail..self.image.size_bytes)?;
        let load = self.start_load(A, Duration::ZERO)?;
        self.let_write(LOAD_BYTES_STEP)?;
        let report = load.stop();
        let alone = bytes + report.acknowledged_bytes;
        self.count(report)?;
        self.say(&format!(
            "{} more written to A: the rest of the file system, and random blocks behind it.",
            size(alone)
        ));
        self.say_states();

        let load = self.start_load(A, Duration::from_millis(2))?;
        self.cluster.link.set(LinkState::Up);
        self.say("The link is healed, and A is written to all the time.");
        let seen = self.watch_resync(B)?;
        self.let_write(MIB)?;
        self.count(load.stop())?;
        self.say_resync(&seen);
        Ok(seen)
    }

    fn kill_the_primary(&mut self) -> Result<(), DemoError> {
        let load = self.start_load(A, Duration::ZERO)?;
        self.let_write(LOAD_BYTES_STEP)?;
        self.cluster.nodes[A].kill()?;
        let report = load.join();
        let (acknowledged, issued) = (report.acknowledged_bytes, report.issued_bytes);
        if report.error.is_none() {
            return Err(DemoError::Answer {
                node: 'A',
                text: "it was killed, and yet its connections go on".into(),
            });
        }
        // That it ended with an error is what was wanted.
        self.count(LoadReport {
            error: None,
            ..report
        })?;
        self.say(&format!(
            "A is killed (SIGKILL) in the middle of writing: {} acknowledged, {} on their way.",
            size(acknowledged),
            size(issued - acknowledged),
        ));
        let what = "the loss has been noticed";
        self.cluster
            .wait_until(B, what, PATIENCE, |report| !connected(report))?;
        self.cluster.call(B, "bdev_repl_promote")?;
        let load = self.start_load(B, Duration::ZERO)?;
        self.let_write(LOAD_BYTES_STEP)?;
        let report = load.stop();
        self.say(&format!(
            "B is promoted, and {} are written to it.",
            size(report.acknowledged_bytes)
        ));
        self.count(report)?;
        self.say_states();
        Ok(())
    }

    fn bring_the_dead_one_back(&mut self) -> Result<SeenResync, DemoError> {
        let load = self.start_load(B, Duration::from_millis(2))?;
        self.cluster.start(A, &Value::Null)?;
        self.say("A is started again and finds its metadata; B is written to all the time.");
        let seen = self.watch_resync(A)?;
        self.let_write(MIB)?;
        self.count(load.stop())?;
        self.say_resync(&seen);
        Ok(seen)
    }

    /// Follows a resync until both nodes are in sync.
    fn watch_resync(&mut self, target: usize) -> Result<SeenResync, DemoError> {
        let started = Instant::now();
        let bar = bar("resync", 0);
        let mut seen_bytes = 0;
        let patience = PATIENCE * 10;
        for index in [target, 1 - target] {
            let what = "the resync has ended";
            self.cluster.wait_until(index, what, patience, |report| {
                if let Some(peer) = peer(report) {
                    if let Some(resync) = &peer.resync {
                        seen_bytes = seen_bytes.max(resync.total_bytes).max(resync.done_bytes);
                        bar.set_length(resync.total_bytes);
                        bar.set_position(resync.done_bytes);
                    }
                    bar.set_message(state_line(report));
                }
                in_sync(report)
            })?;
        }
        bar.finish_and_clear();
        Ok(SeenResync {
            bytes: seen_bytes,
            time: started.elapsed(),
        })
    }

    fn say_resync(&mut self, seen: &SeenResync) {
        self.say(&format!(
            "Resynced {} by bitmap; connected and UpToDate after {:.1} s, writes going on.",
            size(seen.bytes),
            seen.time.as_secs_f64()
        ));
        self.say_states();
    }

    fn stop_both(&mut self) -> Result<(), DemoError> {
        self.cluster.call(B, "bdev_repl_demote")?;
        self.cluster.wait_until_in_sync(PATIENCE)?;
        for index in [A, B] {
            self.cluster.nodes[index].stop()?;
        }
        self.say("B is demoted, both nodes are stopped.");
        Ok(())
    }

    fn compare(&mut self, plan: &Plan) -> Result<(), DemoError> {
        let [a, b] = [A, B].map(|index| {
            let settings = self.cluster.nodes[index].settings();
            Replica::open(&format!("replica {}", settings.label), &settings.backing)
        });
        let (a, b) = (a?, b?);
        if plan.flip_byte {
            b.flip(b.data_size_bytes() / 2)?;
            self.say("One byte of replica B is flipped behind its back.");
        }
        let bytes = compare::replicas(&a, &b)?;
        self.say(&format!(
            "Both replicas are the same, {} byte for byte.",
            size(bytes)
        ));
        for replica in [&a, &b] {
            compare::image(replica, &self.image)?;
            compare::ledger(replica, &self.ledger)?;
        }
        self.say(&format!(
            "Every acknowledged write is there: the file system, and {} blocks of 4 KiB behind it.",
            self.ledger.touched_blocks()
        ));
        let summary = plan.tools.check(b.path(), b.data_offset_bytes())?;
        self.say(&format!("e2fsck -fn on replica B: clean, {summary}."));
        Ok(())
    }

    fn sum_up(&self, volume_bytes: u64, after_cut: &SeenResync, after_kill: &SeenResync) {
        let share = |seen: &SeenResync| {
            format!(
                "{} in {:.1} s, {:.1} % of the device",
                size(seen.bytes),
                seen.time.as_secs_f64(),
                seen.bytes as f64 * 100.0 / volume_bytes.max(1) as f64
            )
        };
        let written = self.image.written_bytes + self.written.acknowledged_bytes;
        println!();
        println!("  volume {VOLUME}               {}", size(volume_bytes));
        println!("  written and acknowledged   {}", size(written));
        println!("  resync after the cut       {}", share(after_cut));
        println!("  resync after the kill      {}", share(after_kill));
        println!(
            "  time                       {:.1} s",
            self.started.elapsed().as_secs_f64()
        );
        println!("\nNothing was lost, and both replicas are the same.");
    }
}

/// There is a session with the peer.
fn connected(report: &crate::rpc::volume::VolumeReport) -> bool {
    peer(report).is_some_and(|peer| peer.connection == "Connected")
}

fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(0.001)) as u64
}

fn bar(prefix: &'static str, length: u64) -> ProgressBar {
    let template = "          {prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes} {msg}";
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    ProgressBar::new(length)
        .with_style(style)
        .with_prefix(prefix)
}
