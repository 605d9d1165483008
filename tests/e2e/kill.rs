//! SIGKILL at random points, again and again: nothing that was acknowledged is lost, and what is resynced is
//! what was written meanwhile and what the activity log covers, never the whole device.

use std::time::{SystemTime, UNIX_EPOCH};

use bdev_repl::cli::demo::ledger::{BLOCK_BYTES, mix};
use serde_json::{Value, json};

use crate::stage::{A, MIB, Stage};

const ROUNDS: u32 = 50;
const SIZE_MB: u64 = 160;
/// 8 extents of 4 MiB: the device is five times as large as the log.
const AL_EXTENTS: u64 = 8;
/// After a crash the last two transactions count: while extents are exchanged, that may be twice the log.
const AL_BYTES: u64 = 2 * AL_EXTENTS * 4 * MIB;
const WINDOW_BYTES: u64 = 16 * MIB;

/// From BDEV_REPL_SEED, else from the clock. Printed; a failed test shows it.
fn seed() -> u64 {
    let given = std::env::var("BDEV_REPL_SEED").ok();
    let seed = given.map_or_else(
        || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.as_nanos() as u64
        },
        |text| text.parse().expect("BDEV_REPL_SEED is a number"),
    );
    println!("to play it again: BDEV_REPL_SEED={seed}");
    seed
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Victim {
    Primary,
    Secondary,
    Both,
}

#[test]
fn fifty_kills_under_load_lose_nothing_and_resync_little() {
    let mut chance = seed();
    let mut stage = Stage::paired(SIZE_MB, json!({"al_extents": AL_EXTENTS}));
    let mut primary = A;
    for round in 0..ROUNDS {
        let victim = match mix(&mut chance) % 8 {
            0..=3 => Victim::Primary,
            4..=6 => Victim::Secondary,
            _ => Victim::Both,
        };
        let mut window = || {
            let start = mix(&mut chance) % (SIZE_MB * MIB / WINDOW_BYTES) * WINDOW_BYTES;
            start..start + WINDOW_BYTES
        };
        let (before, after, during) = (window(), window(), window());
        let blocks_before = mix(&mut chance) % 1500;
        let blocks_after = mix(&mut chance) % 1000;
        let load_in_resync = mix(&mut chance) % 2 == 0;
        println!(
            "round {round}: primary {primary}, kill {victim:?} after {blocks_before} blocks, \
             {blocks_after} alone, load in resync: {load_in_resync}"
        );

        let load = stage.load(primary, before.clone());
        stage.let_write(blocks_before);
        let mut written_alone = 0;
        let dead: &[usize] = match victim {
            Victim::Primary => &[primary],
            Victim::Secondary => &[1 - primary],
            Victim::Both => &[primary, 1 - primary],
        };
        for index in dead {
            stage.cluster.nodes[*index].kill().unwrap();
        }
        if victim == Victim::Secondary {
            // Nobody tells the application: its writes go on.
            stage.let_write(blocks_after);
            let report = load.stop();
            assert!(report.error.is_none(), "{:?}", report.error);
            // The load's writes before the kill count too: it is an upper bound.
            written_alone += report.issued_bytes;
        } else {
            let report = load.join();
            assert!(report.error.is_some(), "the Primary was killed");
        }
        if victim == Victim::Primary {
            primary = 1 - primary;
            stage.wait_until_alone(primary);
            stage.promote(primary);
            written_alone += stage.write(primary, after.clone(), blocks_after);
        }

        let passed = stage.cluster.link.passed_bytes();
        let live =
            (victim != Victim::Both && load_in_resync).then(|| stage.load(primary, during.clone()));
        for index in dead {
            stage.cluster.start(*index, &Value::Null).unwrap();
        }
        stage.in_sync();
        let written_live = live.map_or(0, |load| {
            stage.let_write(50);
            let report = load.stop();
            assert!(report.error.is_none(), "{:?}", report.error);
            report.issued_bytes
        });
        let passed = stage.cluster.link.passed_bytes() - passed;
        if victim == Victim::Both {
            stage.promote(primary);
        }
        // A live write may pass twice: as a write, and with the resync of its block.
        let dirty = (written_alone + AL_BYTES * dead.len() as u64).min(SIZE_MB * MIB * 4 / 5);
        let payload = dirty + 2 * written_live;
        let most = payload + payload / 32 + MIB;
        println!("  {passed} bytes passed the link, at most {most} expected");
        assert!(
            passed <= most,
            "{passed} bytes were resynced, {written_alone} were written alone, {written_live} live"
        );

        for range in [before, after, during] {
            stage.read_back(primary, range);
        }
        stage.compare();
    }
    let all = 0..SIZE_MB * MIB;
    stage.read_back(primary, all);
    println!(
        "{} MiB were acknowledged",
        stage.ledger.acknowledged_blocks() * BLOCK_BYTES as u64 / MIB
    );
    stage.end(primary);
}
