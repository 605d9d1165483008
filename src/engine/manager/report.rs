//! The state of a volume as its operator sees it.

use super::{Decided, Manager};
use crate::engine::MAX_PEERS;
use crate::engine::meta::generation::Generations;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::engine::view::View;
use crate::host::{Host, PeerAddress, PeerSlot};

/// A volume.
#[derive(Clone, Debug)]
pub struct VolumeState {
    pub name: String,
    pub uuid: [u8; 16],
    pub node_id: u8,
    pub role: Role,
    pub disk: DiskState,
    pub suspended: bool,
    pub generations: Generations,
    /// Extents that each channel may have in its activity log.
    pub al_extents: u32,
    pub peers: Vec<PeerReport>,
}

/// A peer of a volume.
#[derive(Clone, Debug)]
pub struct PeerReport {
    pub slot: PeerSlot,
    pub node_id: u8,
    pub address: Option<PeerAddress>,
    /// The operator wants a connection.
    pub wanted: bool,
    pub conn: ConnState,
    pub role: Role,
    pub disk: DiskState,
    pub bitmap_generation: u64,
    /// What is known to be out of sync with this peer. Bits that channels hold and have not handed over are missing.
    pub out_of_sync_bytes: u64,
    pub resync: Option<ResyncReport>,
    pub last_error: Option<String>,
}

/// A resync on its way.
#[derive(Clone, Copy, Debug)]
pub struct ResyncReport {
    pub done_bytes: u64,
    pub total_bytes: u64,
    pub elapsed_ns: u64,
    pub paused: bool,
}

impl<H: Host> Manager<H> {
    pub fn report(&self, cx: &H) -> VolumeState {
        VolumeState {
            name: self.superblock.name.as_str().to_owned(),
            uuid: self.superblock.volume_uuid,
            node_id: self.superblock.node_id,
            role: self.view.role,
            disk: self.view.disk,
            suspended: self.view.suspended,
            generations: self.superblock.generations.clone(),
            al_extents: self.superblock.al_extents,
            peers: (0..MAX_PEERS)
                .filter_map(|slot| self.report_peer(cx, slot))
                .collect(),
        }
    }

    /// The state, as the channels see it or are about to.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// What the last two Hellos with this peer came to.
    pub fn decided(&self, slot: PeerSlot) -> Option<Decided> {
        self.peers[slot].decided
    }

    /// The merged bitmap says that this block and the peer's may differ. Bits that channels hold are missing.
    pub fn is_out_of_sync(&self, slot: PeerSlot, lba: u64) -> bool {
        let mut bits = self.shared.geometry.bits_of(lba, 1);
        bits.any(|bit| self.masters[slot].test(bit))
    }

    /// The node id of the peer in a slot.
    pub fn peer_node(&self, slot: PeerSlot) -> Option<u8> {
        self.peers[slot].node_id
    }

    fn report_peer(&self, cx: &H, slot: PeerSlot) -> Option<PeerReport> {
        let peer = &self.peers[slot];
        let view = &self.view.peers[slot];
        let geometry = &self.shared.geometry;
        let bytes = |bits: u64| (bits << geometry.granularity_log2).min(geometry.size_bytes());
        let left = bytes(self.masters[slot].count());
        let in_resync = view.conn.is_sync_source() || view.conn.is_sync_target();
        let resync = in_resync.then(|| {
            let total_bytes = bytes(peer.resync_total_bits).max(left);
            ResyncReport {
                done_bytes: total_bytes - left,
                total_bytes,
                elapsed_ns: cx.now_ns().saturating_sub(peer.resync_started_ns),
                paused: matches!(view.conn, ConnState::PausedSyncS | ConnState::PausedSyncT),
            }
        });
        Some(PeerReport {
            slot,
            node_id: peer.node_id?,
            address: peer.address.clone(),
            wanted: peer.wanted,
            conn: view.conn,
            role: peer.role,
            disk: view.pdsk,
            bitmap_generation: self.superblock.generations.bitmap[slot],
            out_of_sync_bytes: left,
            resync,
            last_error: peer.last_error.clone(),
        })
    }
}
