//! Targets and volumes that end while their peer takes connections and says nothing: nobody waits for the answer to an
//! attempt to connect once more, for which SPDK has ten seconds.

use std::time::{Duration, Instant};

use bdev_repl::cli::demo::cluster::peer;
use bdev_repl::cli::demo::link::LinkState;
use serde_json::Value;

use crate::stage::{A, B, MIB, Stage};
use crate::targets::{ONE_CORE_EACH, TWO_CORES_EACH, delete, log, stop, targets, wait};
use crate::tools::alone;

const SIZE_MB: u64 = 32;
const WHOLE: std::ops::Range<u64> = 0..SIZE_MB * MIB;
/// Three seconds for hosts to let go, five until the peer is given up, one for the reset.
const SOON: Duration = Duration::from_secs(25);
/// What SPDK says when it has waited for a first answer to the end.
const WAITED: &str = "Failed to construct qpair via correct icresp";

fn paired(core_masks: [&str; 2]) -> Stage {
    targets(core_masks, SIZE_MB, Value::Null).pair()
}

/// Ends a node's target or its volume.
fn end_soon(stage: &mut Stage, index: usize, end: fn(&mut Stage, usize)) {
    let began = Instant::now();
    end(stage, index);
    assert!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
    assert!(!log(stage, index).contains(WAITED));
}

#[test]
fn a_target_ends_whose_peer_falls_silent() {
    let _alone = alone();
    for (core_masks, first) in [(ONE_CORE_EACH, A), (ONE_CORE_EACH, B), (TWO_CORES_EACH, A)] {
        let mut stage = paired(core_masks);
        let load = stage.load(A, WHOLE);
        stage.let_write(200);
        stage.cluster.link.set(LinkState::Silent);
        end_soon(&mut stage, first, stop);
        stop(&mut stage, 1 - first);
        assert!(load.join().error.is_some());
    }
}

#[test]
fn a_volume_and_a_target_end_while_the_link_to_a_silent_peer_is_being_reset() {
    let _alone = alone();
    for is_deleted in [false, true] {
        let mut stage = paired(ONE_CORE_EACH);
        let load = stage.load(A, WHOLE);
        stage.let_write(200);
        stage.cluster.link.set(LinkState::Silent);
        wait(&mut stage, A, "the peer is given up", |report| {
            peer(report).is_some_and(|peer| peer.connection != "Connected")
        });
        stage.let_write(200);
        if is_deleted {
            end_soon(&mut stage, A, delete);
        }
        end_soon(&mut stage, A, stop);
        stop(&mut stage, B);
        assert!(load.join().error.is_some());
    }
}
