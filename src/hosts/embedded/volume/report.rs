//! The answer of `bdev_repl_get_volumes`, from the manager's report and what core 0 knows.

use std::sync::atomic::Ordering;

use super::context::Context;
use super::control::Control;
use crate::engine::manager::{self, Manager};
use crate::engine::meta::generation::NONE;
use crate::engine::peer::state::DiskState;
use crate::rpc::volume::{
    ActivityLogReport, GenerationsReport, OptionsReport, PeerReport, ResyncReport, VolumeReport,
};

fn generation(generation: u64) -> String {
    format!("{generation:016x}")
}

pub(super) fn volume(
    control: &Control,
    manager: &Manager<Context>,
    context: &Context,
) -> VolumeReport {
    let state = manager.report(context);
    let options = manager.options();
    let used = control
        .active_extents
        .iter()
        .map(|used| used.load(Ordering::Relaxed))
        .sum();
    let has_disk = state.disk > DiskState::Failed;
    VolumeReport {
        name: state.name,
        uuid: control.uuid,
        node_id: state.node_id,
        role: state.role.name().to_owned(),
        disk: state.disk.name().to_owned(),
        suspended: state.suspended,
        block_size: control.geometry.block_size,
        num_blocks: control.geometry.size_blocks,
        granularity: 1 << control.geometry.granularity_log2,
        base_bdev: control.base.as_ref().map(|(_, name)| name.clone()),
        listen_address: control.listen.map(|address| address.to_string()),
        generations: GenerationsReport {
            current: generation(state.generations.current),
            history: state
                .generations
                .history
                .iter()
                .filter(|&&old| old != NONE)
                .map(|&old| generation(old))
                .collect(),
        },
        activity_log: has_disk.then_some(ActivityLogReport {
            extents: state.al_extents * control.cores as u32,
            used,
        }),
        options: OptionsReport {
            ping_interval_ms: options.ping_interval_ms as u32,
            ping_timeout_ms: options.ping_timeout_ms as u32,
            connect_interval_ms: options.connect_interval_ms as u32,
            resync_rate_mb: (options.resync_rate_bytes >> 20) as u32,
        },
        peers: state.peers.iter().map(peer).collect(),
    }
}

fn peer(peer: &manager::PeerReport) -> PeerReport {
    PeerReport {
        node_id: peer.node_id,
        slot: peer.slot as u8,
        address: peer.address.as_ref().map_or_else(String::new, |address| {
            format!("{}:{}", address.traddr, address.trsvcid)
        }),
        connection: peer.conn.name().to_owned(),
        role: peer.role.name().to_owned(),
        disk: peer.disk.name().to_owned(),
        bitmap_generation: generation(peer.bitmap_generation),
        out_of_sync_bytes: peer.out_of_sync_bytes,
        resync: peer.resync.as_ref().map(resync),
        last_error: peer.last_error.clone(),
    }
}

fn resync(resync: &manager::ResyncReport) -> ResyncReport {
    let elapsed_ms = resync.elapsed_ns / 1_000_000;
    let rate = (resync.done_bytes * 1000)
        .checked_div(elapsed_ms)
        .unwrap_or(0);
    let left = resync.total_bytes - resync.done_bytes;
    ResyncReport {
        percent: if resync.total_bytes == 0 {
            100.0
        } else {
            resync.done_bytes as f64 * 100.0 / resync.total_bytes as f64
        },
        done_bytes: resync.done_bytes,
        total_bytes: resync.total_bytes,
        rate_bytes_per_second: rate,
        seconds_left: left.checked_div(rate),
        paused: resync.paused,
    }
}
