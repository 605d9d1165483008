//! What happened to the devices and to mirrored writes, in order, for tests that replay it: every write and flush at
//! its submission and its end, every write that was sent to a peer. The world records; it never looks at it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::disk::Disk;
use super::node::Core;
use super::world::World;
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::peer::command::{CommandWords, PeerCommand};
use crate::engine::volume::GRANULE_BYTES;
use crate::host::{Data, DiskIo, DiskOp, Token};

/// What a disk I/O carries.
#[derive(Clone, Debug)]
pub enum Carried {
    Metadata(Vec<u8>),
    /// A hash of every granule, from this one on.
    Granules {
        first: u64,
        digests: Vec<u64>,
        origin: Origin,
    },
    Flush,
}

/// Whose write it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The application's, on this node.
    Application,
    /// A peer's.
    Received,
    /// A resync's.
    Resync,
}

/// One event on one node.
pub enum Recorded {
    Submitted {
        id: u64,
        io: DiskIo,
        carried: Carried,
    },
    /// The device has executed it.
    Done { id: u64 },
    /// A write was given to the link to a peer.
    Sent {
        core: usize,
        token: Token,
        granules: Range<u64>,
    },
    /// A command to a peer has ended; `ok` when the peer has done it.
    Ended { core: usize, token: Token, ok: bool },
    /// The node is gone; this is left of its device.
    Crashed(Disk),
}

/// A hash of the content of a granule.
pub fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

impl World {
    /// From here on everything is recorded.
    pub fn start_recording(&mut self) {
        self.recording = Some(Vec::new());
    }

    pub fn take_recording(&mut self) -> Vec<(usize, Recorded)> {
        self.recording.take().unwrap_or_default()
    }

    pub(super) fn record(&mut self, node: usize, event: impl FnOnce(&World) -> Option<Recorded>) {
        if self.recording.is_none() {
            return;
        }
        let event = event(self);
        if let (Some(recording), Some(event)) = (&mut self.recording, event) {
            recording.push((node, event));
        }
    }

    pub(super) fn record_submitted(
        &mut self,
        node: usize,
        id: u64,
        token: Token,
        io: DiskIo,
        data: &Data<Core>,
    ) {
        self.record(node, |world| {
            let carried = match io.op {
                DiskOp::Read => return None,
                DiskOp::Flush => Carried::Flush,
                _ => {
                    let bytes = match data {
                        Data::Payload(memory) => memory.bytes()[..io.len as usize].to_vec(),
                        Data::Buffer(buffer) => buffer.as_ref()[..io.len as usize].to_vec(),
                        Data::None => vec![0; io.len as usize],
                    };
                    world.carried(node, token, io.offset, bytes)
                }
            };
            Some(Recorded::Submitted { id, io, carried })
        });
    }

    fn carried(&self, node: usize, token: Token, offset: u64, bytes: Vec<u8>) -> Carried {
        let volume = 1 << 20..(1 << 20) + self.config.volume_bytes;
        if !volume.contains(&offset) {
            return Carried::Metadata(bytes);
        }
        let first = (offset - volume.start) / GRANULE_BYTES;
        let granules = bytes.chunks(GRANULE_BYTES as usize);
        let digests: Vec<u64> = granules.map(digest).collect();
        let origin = if token.0 & TOKEN_MANAGER != 0 {
            Origin::Resync
        } else if self.has_pending_write(node, first, digests.len() as u64) {
            Origin::Application
        } else {
            Origin::Received
        };
        Carried::Granules {
            first,
            digests,
            origin,
        }
    }

    /// The application waits for a write of exactly these granules.
    fn has_pending_write(&self, node: usize, first: u64, granules: u64) -> bool {
        let block = u64::from(self.config.block_size);
        self.apps.values().any(|app| {
            app.node == node
                && app.status.is_none()
                && app.kind.writes()
                && app.lba * block == first * GRANULE_BYTES
                && u64::from(app.blocks) * block == granules * GRANULE_BYTES
        })
    }

    pub(super) fn record_sent(
        &mut self,
        node: usize,
        core: usize,
        token: Token,
        opcode: u8,
        words: &CommandWords,
        data_len: u32,
    ) {
        self.record(node, |world| {
            let span = match PeerCommand::parse(opcode, words, data_len) {
                Ok(PeerCommand::Write { span, .. } | PeerCommand::WriteZeroes { span, .. }) => span,
                _ => return None,
            };
            let block = u64::from(world.config.block_size);
            let start = span.lba() * block / GRANULE_BYTES;
            let end = (span.lba() + u64::from(span.blocks())) * block / GRANULE_BYTES;
            Some(Recorded::Sent {
                core,
                token,
                granules: start..end,
            })
        });
    }
}
