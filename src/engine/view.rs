//! The copy of the volume's state that every channel holds for its I/O path. The manager makes a new one for
//! each change; channels adopt it at their own time.

use crate::engine::MAX_PEERS;
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::hello::Hello;
use crate::engine::peer::state::{
    ConnState, DiskState, Role, connection_permits_io, disk_permits_io, should_do_remote,
    should_send_oos,
};
use crate::engine::volume::{GRANULE_BYTES, VolumeGeometry};
use crate::host::PeerSlot;

/// What a peer takes, as agreed in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerLimits {
    /// The longest write with data of one command.
    pub write_blocks: u32,
    /// The longest body of any other command, in bytes.
    pub body_bytes: u32,
    /// Commands that a channel may have outstanding.
    pub commands: u16,
}

impl PeerLimits {
    const NONE: PeerLimits = PeerLimits {
        write_blocks: u32::MAX,
        body_bytes: 0,
        commands: 0,
    };

    /// `in_capsule_bytes`: the data that either node takes without waiting for memory that its hosts may hold. `commands`:
    /// those of the peer's credits that are the channel's.
    pub fn new(geometry: &VolumeGeometry, in_capsule_bytes: u32, commands: u16) -> Self {
        let granule = GRANULE_BYTES as u32;
        let bytes = if in_capsule_bytes < granule {
            in_capsule_bytes
        } else {
            in_capsule_bytes / granule * granule
        };
        Self {
            write_blocks: match bytes / geometry.block_size {
                // Not even a block fits: in pieces a write would wait for more memory, not for less.
                0 => u32::MAX,
                blocks => blocks,
            },
            body_bytes: in_capsule_bytes.max(Hello::BYTES as u32),
            commands,
        }
    }
}

/// One peer, as a channel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerView {
    pub configured: bool,
    pub conn: ConnState,
    pub pdsk: DiskState,
    /// The session that our commands carry; 0: send nothing.
    pub send_session: u32,
    /// The session whose commands are accepted; 0: none.
    pub recv_session: u32,
    /// A durable generation says that this peer lacks writes: one may complete without it.
    pub may_miss: bool,
    /// As its sync source, answer its resync reads.
    pub serve: bool,
    /// What it sends is on no disk of its own: its bits are set here.
    pub diskless: bool,
    /// It agreed to the feature that lets I/O go on while bitmaps are exchanged.
    pub io_during_bitmap: bool,
    pub limits: PeerLimits,
}

impl PeerView {
    pub const NONE: PeerView = PeerView {
        configured: false,
        conn: ConnState::StandAlone,
        pdsk: DiskState::DUnknown,
        send_session: 0,
        recv_session: 0,
        may_miss: false,
        serve: false,
        diskless: false,
        io_during_bitmap: true,
        limits: PeerLimits::NONE,
    };

    /// Writes go to this peer.
    pub fn is_remote(&self) -> bool {
        self.send_session != 0 && should_do_remote(self.pdsk, self.conn)
    }

    /// Writes are announced to this peer as out of sync.
    pub fn is_noticed(&self) -> bool {
        self.send_session != 0 && should_send_oos(self.pdsk, self.conn)
    }

    /// This peer can be read from.
    pub fn has_latest(&self) -> bool {
        self.send_session != 0 && self.conn.is_connected() && self.pdsk == DiskState::UpToDate
    }
}

/// The state of the volume for the I/O path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub version: u64,
    pub role: Role,
    pub disk: DiskState,
    /// Application I/O is held.
    pub suspended: bool,
    /// The volume goes away: new application I/O is failed.
    pub closing: bool,
    /// The peers record what this node's own disk lacks: a write may complete without it.
    pub own_disk_may_miss: bool,
    pub peers: [PeerView; MAX_PEERS],
}

impl View {
    pub fn new() -> Self {
        Self {
            version: 0,
            role: Role::Secondary,
            disk: DiskState::Diskless,
            suspended: false,
            closing: false,
            own_disk_may_miss: true,
            peers: [PeerView::NONE; MAX_PEERS],
        }
    }

    /// The backing device takes I/O.
    pub fn disk_is_usable(&self) -> bool {
        self.disk >= DiskState::Inconsistent && self.disk != DiskState::DUnknown
    }

    /// The volume is gone for its application: what has not ended fails.
    pub fn fails_io(&self) -> bool {
        self.closing && self.role != Role::Primary
    }

    /// Application I/O may start now; else it is held.
    pub fn permits_io(&self) -> bool {
        let any_connection = mutation::is(Mutation::IoWithoutBitmap);
        !self.suspended
            && disk_permits_io(self.disk)
            && self
                .peers
                .iter()
                .filter(|peer| peer.configured)
                .all(|peer| {
                    any_connection || connection_permits_io(peer.conn, peer.io_during_bitmap)
                })
    }

    /// The longest write of one command that every peer takes that gets writes: all get the same ones, so none has a gap in
    /// their sequences.
    pub fn write_unit_blocks(&self) -> u32 {
        let remote = self.peers.iter().filter(|peer| peer.is_remote());
        let blocks = remote.map(|peer| peer.limits.write_blocks).min();
        blocks.unwrap_or(u32::MAX)
    }

    /// A peer that can be read from, other than those in `except`.
    pub fn read_source(&self, except: u8) -> Option<PeerSlot> {
        (0..MAX_PEERS).find(|&slot| except & (1 << slot) == 0 && self.peers[slot].has_latest())
    }

    /// The latest data can be reached.
    pub fn has_data(&self) -> bool {
        self.disk == DiskState::UpToDate || self.read_source(0).is_some()
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_command_is_whole_granules_or_whole_blocks_or_not_limited() {
        for (block_size, in_capsule_bytes, blocks) in [
            (512, 4096, 8),
            (512, 131_072, 256),
            (512, 20_479, 32),
            (512, 4095, 7),
            (512, 512, 1),
            (512, 511, u32::MAX),
            (512, 0, u32::MAX),
            (4096, 4096, 1),
            (4096, 4095, u32::MAX),
            (65_536, 100_000, 1),
        ] {
            let geometry = VolumeGeometry {
                block_size,
                size_blocks: 1 << 20,
                data_offset: 0,
                granularity_log2: 12,
            };
            let limits = PeerLimits::new(&geometry, in_capsule_bytes, 8);
            assert_eq!(
                limits.write_blocks, blocks,
                "{in_capsule_bytes} of {block_size}"
            );
        }
    }
}
