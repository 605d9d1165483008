//! The answer of `bdev_repl_get_volumes`, from the manager's report and what its host knows besides.
//! Called by a host for each of its volumes. Must not know any host.

use std::net::SocketAddr;

use serde_json::Value;

use crate::engine::manager::{self, Manager, Options};
use crate::engine::meta::generation::NONE;
use crate::engine::peer::state::DiskState;
use crate::engine::volume::VolumeGeometry;
use crate::host::Host;
use crate::rpc::RpcError;
use crate::rpc::volume::{
    ActivityLogReport, GenerationsReport, OptionsReport, PeerReport, ResyncReport, VolumeReport,
    no_volume,
};

/// What a host knows of a volume and the manager does not.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The backing bdev while it is claimed.
    pub base_bdev: Option<&'a str>,
    /// Where the peer endpoint listens.
    pub listen: Option<SocketAddr>,
    pub geometry: VolumeGeometry,
    /// Cores that have a channel.
    pub cores: usize,
    /// Extents in the activity logs of all cores.
    pub active_extents: u32,
}

/// One volume, for the operator.
pub fn volume<H: Host>(facts: Facts<'_>, manager: &Manager<H>, cx: &H) -> VolumeReport {
    let state = manager.report(cx);
    let options = manager.options();
    let has_disk = state.disk > DiskState::Failed;
    VolumeReport {
        name: state.name,
        uuid: uuid::Uuid::from_bytes(state.uuid),
        node_id: state.node_id,
        role: state.role.name().to_owned(),
        disk: state.disk.name().to_owned(),
        suspended: state.suspended,
        block_size: facts.geometry.block_size,
        num_blocks: facts.geometry.size_blocks,
        granularity: 1 << facts.geometry.granularity_log2,
        base_bdev: facts.base_bdev.map(str::to_owned),
        listen_address: facts.listen.map(|address| address.to_string()),
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
            extents: state.al_extents * facts.cores as u32,
            used: facts.active_extents,
        }),
        options: options_report(options),
        peers: state.peers.iter().map(peer).collect(),
        last_error: None,
    }
}

/// The answer: the reports of all volumes, or of the one that was asked for by name.
///
/// # Errors
/// There is no volume of that name.
pub fn answer(reports: &[VolumeReport], name: Option<&str>) -> Result<Value, RpcError> {
    match name {
        Some(name) if reports.is_empty() => Err(no_volume(name)),
        _ => serde_json::to_value(reports).map_err(|error| RpcError::io(error.to_string())),
    }
}

/// Options as set.
pub fn options_report(options: Options) -> OptionsReport {
    OptionsReport {
        ping_interval_ms: options.ping_interval_ms as u32,
        ping_timeout_ms: options.ping_timeout_ms as u32,
        connect_interval_ms: options.connect_interval_ms as u32,
        resync_rate_mb: (options.resync_rate_bytes >> 20) as u32,
    }
}

/// As 16 hexadecimal digits.
pub fn generation(generation: u64) -> String {
    format!("{generation:016x}")
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(done_bytes: u64, total_bytes: u64, elapsed_ms: u64) -> ResyncReport {
        resync(&manager::ResyncReport {
            done_bytes,
            total_bytes,
            elapsed_ns: elapsed_ms * 1_000_000,
            paused: false,
        })
    }

    #[test]
    fn a_resync_says_how_far_and_how_fast_it_is_and_when_it_ends() {
        let half = of(3000, 6000, 1500);
        assert_eq!(
            (half.percent, half.rate_bytes_per_second, half.seconds_left),
            (50.0, 2000, Some(1))
        );
        let nothing_yet = of(0, 6000, 1500);
        assert_eq!(
            (nothing_yet.percent, nothing_yet.seconds_left),
            (0.0, None),
            "no rate, no end"
        );
        let just_begun = of(3000, 6000, 0);
        assert_eq!(just_begun.rate_bytes_per_second, 0);
        assert_eq!(of(0, 0, 1).percent, 100.0, "nothing to do is all done");
    }

    #[test]
    fn no_volume_is_an_answer_and_no_volume_of_a_name_an_error() {
        assert_eq!(answer(&[], None).unwrap(), json!([]));
        assert_eq!(answer(&[], Some("v")).unwrap_err(), no_volume("v"));
    }
}
