//! `bdev-repl status`: asks targets for their volumes and shows them as a table, once or again and again.
//! Called by the command line. Knows of a target only what its RPC answers.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::rpc::client::{Client, ClientError};
use crate::rpc::volume::{ResyncReport, VolumeReport};

use super::DEFAULT_RPC_SOCKET;

const TIMEOUT: Duration = Duration::from_secs(10);
const BAR_WIDTH: usize = 30;

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArguments {
    /// Only the volume of this name
    name: Option<String>,
    /// RPC socket of a target; may be given several times
    #[arg(short = 'r', long = "rpc-socket", value_name = "PATH", default_value = DEFAULT_RPC_SOCKET)]
    rpc_sockets: Vec<PathBuf>,
    /// Go on showing it until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Pause between two looks in milliseconds, with --watch
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(50..))]
    interval_ms: u64,
    /// As JSON
    #[arg(long, conflicts_with = "watch")]
    json: bool,
}

/// What one target answered.
struct Target {
    socket: PathBuf,
    volumes: Result<Vec<VolumeReport>, String>,
}

/// Runs the command. The exit code is 1 if a target could not be asked.
pub fn run(arguments: &StatusArguments) -> ExitCode {
    if arguments.watch {
        return watch(arguments);
    }
    let targets = ask(arguments);
    let failed = targets.iter().any(|target| target.volumes.is_err());
    if arguments.json {
        let all: Vec<Value> = targets
            .iter()
            .map(|target| match &target.volumes {
                Ok(volumes) => {
                    json!({"rpc_socket": target.socket.to_string_lossy(), "volumes": volumes})
                }
                Err(error) => {
                    json!({"rpc_socket": target.socket.to_string_lossy(), "error": error})
                }
            })
            .collect();
        println!("{:#}", Value::Array(all));
    } else {
        for line in table(&targets) {
            println!("{line}");
        }
        for (_, label, resync) in resyncs(&targets) {
            println!(
                "{label} [{}] {}",
                bar(resync.percent),
                progress_text(resync)
            );
        }
    }
    if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn ask(arguments: &StatusArguments) -> Vec<Target> {
    let volumes = |socket: &PathBuf| -> Result<Vec<VolumeReport>, String> {
        let text = |error: ClientError| error.to_string();
        let params = match &arguments.name {
            Some(name) => json!({"name": name}),
            None => Value::Null,
        };
        let answer = Client::connect(socket, TIMEOUT)
            .and_then(|mut client| client.call("bdev_repl_get_volumes", params))
            .map_err(text)?;
        serde_json::from_value(answer)
            .map_err(|error| format!("{}: bdev_repl_get_volumes: {error}", socket.display()))
    };
    let ask_one = |socket: &PathBuf| Target {
        socket: socket.clone(),
        volumes: volumes(socket),
    };
    arguments.rpc_sockets.iter().map(ask_one).collect()
}

/// Draws the table and one bar a resync until interrupted; a target that is gone is shown as such.
fn watch(arguments: &StatusArguments) -> ExitCode {
    let terminal = std::io::stdout().is_terminal();
    let progress = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
    let plain = |template: &str| {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    };
    let text = progress.add(ProgressBar::new_spinner().with_style(plain("{msg}")));
    let mut bars: Vec<(String, ProgressBar)> = Vec::new();
    loop {
        let looked = Instant::now();
        let targets = ask(arguments);
        let lines = table(&targets).join("\n");
        let running = resyncs(&targets);
        if terminal {
            text.set_message(lines);
            bars.retain(|(key, bar)| {
                let stays = running.iter().any(|(other, _, _)| other == key);
                if !stays {
                    bar.finish_and_clear();
                    progress.remove(bar);
                }
                stays
            });
            for (key, label, resync) in running {
                if !bars.iter().any(|(other, _)| *other == key) {
                    let style = plain("{prefix} [{bar:30.green}] {msg}").progress_chars("=> ");
                    bars.push((
                        key.clone(),
                        progress.add(ProgressBar::new(1000).with_style(style)),
                    ));
                }
                if let Some((_, bar)) = bars.iter().find(|(other, _)| *other == key) {
                    bar.set_prefix(label);
                    bar.set_position((resync.percent.clamp(0.0, 100.0) * 10.0) as u64);
                    bar.set_message(progress_text(resync));
                }
            }
        } else {
            let mut all = vec![lines];
            all.extend(running.iter().map(|(_, label, resync)| {
                format!(
                    "{label} [{}] {}",
                    bar(resync.percent),
                    progress_text(resync)
                )
            }));
            // A reader that is gone ends the watch.
            if writeln!(std::io::stdout(), "{}\n", all.join("\n")).is_err() {
                return ExitCode::SUCCESS;
            }
        }
        std::thread::sleep(
            Duration::from_millis(arguments.interval_ms).saturating_sub(looked.elapsed()),
        );
    }
}

/// The resyncs of which a target is the target or source: a key, a label, and how far each is. Shown once
/// where it is pulled; at the source only if its target is not asked.
fn resyncs(targets: &[Target]) -> Vec<(String, String, &ResyncReport)> {
    let mut all = Vec::new();
    for target in targets {
        for volume in target.volumes.iter().flatten() {
            for peer in &volume.peers {
                let Some(resync) = &peer.resync else { continue };
                let to_us = matches!(peer.connection.as_str(), "SyncTarget" | "PausedSyncT");
                let shown_there = !to_us
                    && targets
                        .iter()
                        .flat_map(|other| other.volumes.iter().flatten())
                        .any(|other| {
                            other.uuid == volume.uuid
                                && other.node_id == peer.node_id
                                && other
                                    .peers
                                    .iter()
                                    .any(|p| p.node_id == volume.node_id && p.resync.is_some())
                        });
                if shown_there {
                    continue;
                }
                let (from, to) = if to_us {
                    (peer.node_id, volume.node_id)
                } else {
                    (volume.node_id, peer.node_id)
                };
                let label = format!("{}: resync from node {from} to node {to}", volume.name);
                all.push((
                    format!("{} {label}", target.socket.display()),
                    label,
                    resync,
                ));
            }
        }
    }
    all
}

const HEADINGS: [&str; 10] = [
    "VOLUME",
    "NODE",
    "ROLE",
    "DISK",
    "SIZE",
    "PEER",
    "CONNECTION",
    "PEER ROLE",
    "PEER DISK",
    "OUT OF SYNC",
];

/// The table, line by line, without trailing spaces.
fn table(targets: &[Target]) -> Vec<String> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut notes = Vec::new();
    for target in targets {
        let volumes = match &target.volumes {
            Ok(volumes) => volumes,
            Err(error) => {
                notes.push(error.clone());
                continue;
            }
        };
        for volume in volumes {
            let role = format!(
                "{}{}",
                volume.role,
                if volume.suspended { " (suspended)" } else { "" }
            );
            let size = match volume.num_blocks {
                0 => "-".to_owned(),
                blocks => bytes_text(blocks.saturating_mul(u64::from(volume.block_size))),
            };
            let mut left = vec![
                volume.name.clone(),
                volume.node_id.to_string(),
                role,
                volume.disk.clone(),
                size,
            ];
            if let Some(error) = &volume.last_error {
                notes.push(format!(
                    "{} on node {}: {error}",
                    volume.name, volume.node_id
                ));
            }
            if volume.peers.is_empty() {
                left.extend(["-"; 5].map(str::to_owned));
                rows.push(left.clone());
            }
            for peer in &volume.peers {
                let mut row = left.clone();
                row.extend([
                    peer.node_id.to_string(),
                    peer.connection.clone(),
                    peer.role.clone(),
                    peer.disk.clone(),
                    bytes_text(peer.out_of_sync_bytes),
                ]);
                rows.push(row);
                left = vec![String::new(); 5];
                if let Some(error) = &peer.last_error {
                    notes.push(format!(
                        "{} on node {}: node {} at {}: {error}",
                        volume.name, volume.node_id, peer.node_id, peer.address
                    ));
                }
            }
        }
    }
    let mut lines = Vec::new();
    if rows.is_empty() {
        if notes.is_empty() {
            lines.push("no volumes".to_owned());
        }
    } else {
        rows.insert(0, HEADINGS.map(str::to_owned).to_vec());
        let width = |column: usize| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
        for row in &rows {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            lines.push(cells.join("  ").trim_end().to_owned());
        }
    }
    lines.extend(notes);
    lines
}

fn bar(percent: f64) -> String {
    let filled = ((percent.clamp(0.0, 100.0) / 100.0) * BAR_WIDTH as f64) as usize;
    let head = if filled < BAR_WIDTH { ">" } else { "" };
    format!("{:<BAR_WIDTH$}", format!("{}{head}", "=".repeat(filled)))
}

fn progress_text(resync: &ResyncReport) -> String {
    let mut text = format!(
        "{:.1} %, {} of {}",
        resync.percent,
        bytes_text(resync.done_bytes),
        bytes_text(resync.total_bytes)
    );
    if resync.paused {
        text.push_str(", paused");
        return text;
    }
    text.push_str(&format!(", {}/s", bytes_text(resync.rate_bytes_per_second)));
    if let Some(seconds) = resync.seconds_left {
        text.push_str(&format!(", {} left", duration_text(seconds)));
    }
    text
}

/// Bytes with a binary unit, three digits or so.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        unit = next;
        if value < 1024.0 {
            break;
        }
        if next != "EiB" {
            value /= 1024.0;
        }
    }
    if unit == "B" || value >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

fn duration_text(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::rpc::volume::{GenerationsReport, OptionsReport, PeerReport};

    fn peer(node_id: u8, connection: &str, resync: Option<ResyncReport>) -> PeerReport {
        PeerReport {
            node_id,
            slot: 0,
            address: "10.0.0.2:4420".to_owned(),
            connection: connection.to_owned(),
            role: "Secondary".to_owned(),
            disk: "Inconsistent".to_owned(),
            bitmap_generation: "0".repeat(16),
            out_of_sync_bytes: 3 << 20,
            resync,
            last_error: None,
        }
    }

    fn target(node_id: u8, peers: Vec<PeerReport>) -> Target {
        let volume = VolumeReport {
            name: "vol0".to_owned(),
            uuid: Uuid::nil(),
            node_id,
            role: "Primary".to_owned(),
            disk: "UpToDate".to_owned(),
            suspended: false,
            block_size: 4096,
            num_blocks: 1 << 18,
            granularity: 4096,
            base_bdev: None,
            listen_address: None,
            generations: GenerationsReport::default(),
            activity_log: None,
            options: OptionsReport::default(),
            peers,
            last_error: None,
        };
        Target {
            socket: PathBuf::from(format!("/tmp/{node_id}.sock")),
            volumes: Ok(vec![volume]),
        }
    }

    #[test]
    fn a_volume_has_a_line_for_each_peer_and_columns_line_up() {
        let lines = table(&[target(
            1,
            vec![peer(2, "Connected", None), peer(3, "Connecting", None)],
        )]);
        assert_eq!(lines.len(), 3);
        let column = |line: &str, text: &str| line.find(text).unwrap_or_else(|| panic!("{line}"));
        let connection = column(&lines[0], "CONNECTION");
        assert_eq!(column(&lines[1], "Connected"), connection);
        assert_eq!(column(&lines[2], "Connecting"), connection);
        assert!(
            lines[1].starts_with("vol0")
                && lines[1].contains("1 GiB")
                && lines[1].ends_with("3 MiB")
        );
        assert!(lines[2].starts_with("   "), "the volume is named once");
    }

    #[test]
    fn a_volume_without_peers_and_a_target_without_volumes_are_shown() {
        assert!(table(&[target(1, Vec::new())])[1].starts_with("vol0"));
        let none = Target {
            socket: PathBuf::new(),
            volumes: Ok(Vec::new()),
        };
        assert_eq!(table(&[none]), ["no volumes"]);
        let gone = Target {
            socket: PathBuf::new(),
            volumes: Err("cannot connect".to_owned()),
        };
        assert_eq!(table(&[gone]), ["cannot connect"]);
    }

    #[test]
    fn a_resync_that_both_ends_report_is_shown_once() {
        let resync = Some(ResyncReport {
            percent: 50.0,
            ..ResyncReport::default()
        });
        let source = target(1, vec![peer(2, "SyncSource", resync)]);
        let pulled = target(2, vec![peer(1, "SyncTarget", resync)]);
        let alone = resyncs(std::slice::from_ref(&source));
        assert_eq!(alone.len(), 1);
        assert_eq!(alone[0].1, "vol0: resync from node 1 to node 2");
        let both = [source, pulled];
        let both = resyncs(&both);
        assert_eq!(both.len(), 1);
        assert_eq!(both[0].1, "vol0: resync from node 1 to node 2");
    }

    #[test]
    fn progress_says_rate_and_time_left_unless_it_is_paused() {
        let mut resync = ResyncReport {
            percent: 25.0,
            done_bytes: 1 << 20,
            total_bytes: 4 << 20,
            rate_bytes_per_second: 1536 << 10,
            seconds_left: Some(62),
            paused: false,
        };
        assert_eq!(
            progress_text(&resync),
            "25.0 %, 1 MiB of 4 MiB, 1.5 MiB/s, 1 min 2 s left"
        );
        resync.paused = true;
        assert_eq!(progress_text(&resync), "25.0 %, 1 MiB of 4 MiB, paused");
    }

    #[test]
    fn bars_are_full_at_the_end_and_never_longer() {
        assert_eq!(bar(0.0), format!("{:<BAR_WIDTH$}", ">"));
        assert_eq!(bar(100.0), "=".repeat(BAR_WIDTH));
        assert_eq!(bar(1e9), "=".repeat(BAR_WIDTH));
        assert_eq!(bar(f64::NAN).chars().count(), BAR_WIDTH);
    }

    #[test]
    fn sizes_have_the_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (150 << 20, "150 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
    }
}
