//! What `bdev_repl_get_volumes` answers.
//! Filled by a host's volume service; read by `status`, the demo and the tests. Plain data.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One volume as this node sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Name of the volume.
    pub name: String,
    /// The same on all nodes.
    pub uuid: Uuid,
    /// This node's id.
    pub node_id: u8,
    /// `Primary` or `Secondary`.
    pub role: String,
    /// Disk state here, such as `UpToDate`.
    pub disk: String,
    /// Application I/O is held back.
    pub suspended: bool,
    /// Bytes.
    pub block_size: u32,
    /// Size in blocks; 0 while it is not known (diskless and never connected).
    pub num_blocks: u64,
    /// What one bit of the bitmap stands for, in bytes.
    pub granularity: u32,
    /// The backing bdev; null when diskless, unless the volume waits for it.
    pub base_bdev: Option<String>,
    /// Where the peer endpoint listens, `address:port`; null if nowhere.
    pub listen_address: Option<String>,
    /// Data generations.
    pub generations: GenerationsReport,
    /// Activity log; null when diskless.
    pub activity_log: Option<ActivityLogReport>,
    /// Options as set.
    pub options: OptionsReport,
    /// One entry a peer.
    pub peers: Vec<PeerReport>,
    /// Why the volume is not made yet; null when it is.
    pub last_error: Option<String>,
}

/// Generations, each as 16 hexadecimal digits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerationsReport {
    /// The current one.
    pub current: String,
    /// Earlier ones, newest first.
    pub history: Vec<String>,
}

/// The activity log over all channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ActivityLogReport {
    /// Extents of 4 MiB that may be active.
    pub extents: u32,
    /// Extents that are.
    pub used: u32,
}

/// Options of `bdev_repl_set_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OptionsReport {
    /// A Ping is sent after this much silence.
    pub ping_interval_ms: u32,
    /// A command without an answer for this long ends the session.
    pub ping_timeout_ms: u32,
    /// Pause between two attempts to connect.
    pub connect_interval_ms: u32,
    /// Limit of a resync to this node in MiB a second; 0 is none.
    pub resync_rate_mb: u32,
}

/// One peer of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerReport {
    /// The peer's node id.
    pub node_id: u8,
    /// Its slot in the metadata.
    pub slot: u8,
    /// Where its endpoint listens, `address:port`.
    pub address: String,
    /// Connection and replication state, such as `Connected` or `SyncTarget`.
    pub connection: String,
    /// The peer's role.
    pub role: String,
    /// The peer's disk state as far as we know.
    pub disk: String,
    /// The generation that the bitmap of this peer counts from, 16 hexadecimal digits.
    pub bitmap_generation: String,
    /// What the two replicas may differ in.
    pub out_of_sync_bytes: u64,
    /// The resync with this peer; null if there is none.
    pub resync: Option<ResyncReport>,
    /// Why the connection was lost or cannot be made; null if all is well.
    pub last_error: Option<String>,
}

/// A running or paused resync.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResyncReport {
    /// 0 to 100.
    pub percent: f64,
    /// Resynced since it began.
    pub done_bytes: u64,
    /// What it had to resync when it began.
    pub total_bytes: u64,
    /// Over the last seconds.
    pub rate_bytes_per_second: u64,
    /// At that rate; null while there is none.
    pub seconds_left: Option<u64>,
    /// Held by `bdev_repl_pause_resync`, here or there.
    pub paused: bool,
}
