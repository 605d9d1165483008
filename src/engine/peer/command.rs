//! The peer commands as NVMe vendor I/O commands: opcode, eight command dwords, answer in dword 0.
//! Called by channels and manager on both sides of a link. Must not know sessions' state or the data.

use thiserror::Error;

mod codec;
pub mod opcode;
mod order;

pub use opcode::{DataDirection, data_direction};
pub use order::{LBA_LIMIT, Span, WriteOrder};

/// Largest data transfer of any peer command: what NVMe passthrough carries both ways (SPDK 26.05).
pub const MAX_TRANSFER_BYTES: u32 = 128 * 1024;

/// The command dwords that reach a vendor command intact, in the order CDW2, CDW3, CDW10 to CDW15.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CommandWords(pub [u32; 8]);

/// The two steps by which a sync target ends a resync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishPhase {
    /// The target has no bit left: has the source? Answered `Ok` or `Again`.
    Ask,
    /// The target is UpToDate, durably: the source clears its bitmap generation.
    Durable,
}

/// A command from one node's engine to a peer's.
///
/// `len` is the data length in bytes. `sequence` of a command other than a write or a flush is the sender's
/// count of such commands: with the session it names the command, so that one that the transport delivers
/// twice is carried out once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerCommand {
    /// Puts the sender's [`Hello`](super::hello::Hello).
    HelloPut { len: u32 },
    /// Asks for the receiver's Hello.
    HelloGet { len: u32 },
    /// The sender holds both Hellos and receives commands of this session.
    Confirm { session: u32 },
    /// Liveness.
    Ping { session: u32 },
    /// Puts a [`StateBody`](super::body::StateBody).
    StatePut {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// Application data. Data length is the span's.
    Write {
        session: u32,
        span: Span,
        fua: bool,
        order: WriteOrder,
    },
    /// Zeroes; with `fua` durable before the answer.
    WriteZeroes {
        session: u32,
        span: Span,
        fua: bool,
        order: WriteOrder,
    },
    /// Deallocates; executed only where the volume says that it reads zeroes afterwards.
    Unmap {
        session: u32,
        span: Span,
        order: WriteOrder,
    },
    /// Reads data that includes everything up to sequence `must_include` (0: whatever there is).
    Read {
        session: u32,
        span: Span,
        must_include: u64,
    },
    /// Makes durable what was applied; answered after everything up to write sequence `sequence` is.
    Flush { session: u32, sequence: u64 },
    /// A sync target reads.
    ResyncRead {
        session: u32,
        span: Span,
        must_include: u64,
        sequence: u64,
    },
    /// A [`RangesBody`](super::body::RangesBody) that the target has on its disk.
    ResyncDone {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// A [`RangesBody`](super::body::RangesBody) of writes that the receiver does not get.
    OutOfSync {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// Compressed bitmap pages, to be ORed into the receiver's.
    BitmapOr {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// All of the bitmap was sent; `bits_set` as the sender counts after ORing what it got.
    BitmapEnd {
        session: u32,
        sequence: u64,
        bits_set: u64,
    },
    /// Source to target, a [`SyncStartBody`](super::body::SyncStartBody): be Inconsistent, durably.
    SyncStart {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// Target to source, a [`SyncFinishBody`](super::body::SyncFinishBody).
    SyncFinish {
        session: u32,
        sequence: u64,
        phase: FinishPhase,
        len: u32,
    },
    /// A [`NewGenerationBody`](super::body::NewGenerationBody), answered when durable.
    NewGeneration {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// First phase of a cluster change, a [`PrepareBody`](super::body::PrepareBody).
    Prepare {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// Second phase; the same body.
    Commit {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// Takes a Prepare back; the same body.
    Abort {
        session: u32,
        sequence: u64,
        len: u32,
    },
    /// The sender disconnects by request. `outdate`: it is Primary and goes on, so the receiver's data
    /// is Outdated from here.
    Goodbye {
        session: u32,
        sequence: u64,
        outdate: bool,
    },
}

/// Why a command is not one of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum CommandError {
    /// No command has this opcode.
    #[error("opcode {0:#04x} is not a peer command")]
    UnknownOpcode(u8),
    /// The data length is not what the command says or can have.
    #[error(
        "opcode {opcode:#04x}: data length {data_len} does not fit the command (it says {stated})"
    )]
    DataLength {
        /// The opcode.
        opcode: u8,
        /// Length (bytes) or blocks in the command.
        stated: u32,
        /// Bytes of data that came or are asked for.
        data_len: u32,
    },
    /// Session 0 is nobody's.
    #[error("opcode {0:#04x}: session 0 does not exist")]
    NoSession(u8),
    /// Empty, or past the last LBA that there can be.
    #[error("opcode {opcode:#04x}: {blocks} blocks at LBA {lba} is no range")]
    BadSpan {
        /// The opcode.
        opcode: u8,
        /// First block.
        lba: u64,
        /// Number of blocks.
        blocks: u32,
    },
    /// Flags that no version known here defines.
    #[error("opcode {opcode:#04x}: unknown flags {flags:#06x}")]
    UnknownFlags {
        /// The opcode.
        opcode: u8,
        /// All flags.
        flags: u16,
    },
    /// A word or field that the command does not use is not zero.
    #[error("opcode {opcode:#04x}: command word {word} must be 0, is {value:#010x}")]
    ReservedNotZero {
        /// The opcode.
        opcode: u8,
        /// Index into [`CommandWords`].
        word: u8,
        /// What it holds.
        value: u32,
    },
    /// A distance that reaches below sequence 0.
    #[error("opcode {opcode:#04x}: a distance of {distance} below sequence {sequence}")]
    BadDistance {
        /// The opcode.
        opcode: u8,
        /// The sequence.
        sequence: u64,
        /// The distance.
        distance: u32,
    },
}

impl PeerCommand {
    /// The NVMe opcode.
    pub const fn opcode(&self) -> u8 {
        match self {
            PeerCommand::HelloPut { .. } => opcode::HELLO_PUT,
            PeerCommand::HelloGet { .. } => opcode::HELLO_GET,
            PeerCommand::Confirm { .. } => opcode::CONFIRM,
            PeerCommand::Ping { .. } => opcode::PING,
            PeerCommand::StatePut { .. } => opcode::STATE_PUT,
            PeerCommand::Write { .. } => opcode::WRITE,
            PeerCommand::WriteZeroes { .. } => opcode::WRITE_ZEROES,
            PeerCommand::Unmap { .. } => opcode::UNMAP,
            PeerCommand::Read { .. } => opcode::READ,
            PeerCommand::Flush { .. } => opcode::FLUSH,
            PeerCommand::ResyncRead { .. } => opcode::RESYNC_READ,
            PeerCommand::ResyncDone { .. } => opcode::RESYNC_DONE,
            PeerCommand::OutOfSync { .. } => opcode::OUT_OF_SYNC,
            PeerCommand::BitmapOr { .. } => opcode::BITMAP_OR,
            PeerCommand::BitmapEnd { .. } => opcode::BITMAP_END,
            PeerCommand::SyncStart { .. } => opcode::SYNC_START,
            PeerCommand::SyncFinish { .. } => opcode::SYNC_FINISH,
            PeerCommand::NewGeneration { .. } => opcode::NEW_GENERATION,
            PeerCommand::Prepare { .. } => opcode::PREPARE,
            PeerCommand::Commit { .. } => opcode::COMMIT,
            PeerCommand::Abort { .. } => opcode::ABORT,
            PeerCommand::Goodbye { .. } => opcode::GOODBYE,
        }
    }

    /// The session, 0 for the Hello commands, which come before there is one.
    pub const fn session(&self) -> u32 {
        match *self {
            PeerCommand::HelloPut { .. } | PeerCommand::HelloGet { .. } => 0,
            PeerCommand::Confirm { session }
            | PeerCommand::Ping { session }
            | PeerCommand::StatePut { session, .. }
            | PeerCommand::Write { session, .. }
            | PeerCommand::WriteZeroes { session, .. }
            | PeerCommand::Unmap { session, .. }
            | PeerCommand::Read { session, .. }
            | PeerCommand::Flush { session, .. }
            | PeerCommand::ResyncRead { session, .. }
            | PeerCommand::ResyncDone { session, .. }
            | PeerCommand::OutOfSync { session, .. }
            | PeerCommand::BitmapOr { session, .. }
            | PeerCommand::BitmapEnd { session, .. }
            | PeerCommand::SyncStart { session, .. }
            | PeerCommand::SyncFinish { session, .. }
            | PeerCommand::NewGeneration { session, .. }
            | PeerCommand::Prepare { session, .. }
            | PeerCommand::Commit { session, .. }
            | PeerCommand::Abort { session, .. }
            | PeerCommand::Goodbye { session, .. } => session,
        }
    }

    /// The number by which the receiver's manager knows a command that changes bitmap, metadata or state, and
    /// carries it out once. `None` for what its channels do (they know writes and resync reads by numbers of
    /// their own) and for what is the same however often it arrives. (Hellos are numbered by their nonces.)
    pub const fn control_sequence(&self) -> Option<u64> {
        match *self {
            PeerCommand::StatePut { sequence, .. }
            | PeerCommand::ResyncDone { sequence, .. }
            | PeerCommand::OutOfSync { sequence, .. }
            | PeerCommand::BitmapOr { sequence, .. }
            | PeerCommand::BitmapEnd { sequence, .. }
            | PeerCommand::SyncStart { sequence, .. }
            | PeerCommand::SyncFinish { sequence, .. }
            | PeerCommand::NewGeneration { sequence, .. }
            | PeerCommand::Prepare { sequence, .. }
            | PeerCommand::Commit { sequence, .. }
            | PeerCommand::Abort { sequence, .. }
            | PeerCommand::Goodbye { sequence, .. } => Some(sequence),
            PeerCommand::HelloPut { .. }
            | PeerCommand::HelloGet { .. }
            | PeerCommand::Confirm { .. }
            | PeerCommand::Ping { .. }
            | PeerCommand::Write { .. }
            | PeerCommand::WriteZeroes { .. }
            | PeerCommand::Unmap { .. }
            | PeerCommand::Read { .. }
            | PeerCommand::Flush { .. }
            | PeerCommand::ResyncRead { .. } => None,
        }
    }

    /// Which way its data goes, as opcode bits 1:0 say.
    pub const fn data_direction(&self) -> DataDirection {
        data_direction(self.opcode())
    }

    /// Bytes of data that go with it; `None` if a span's bytes exceed 32 bits.
    pub fn data_len(&self, block_size_bytes: u32) -> Option<u32> {
        match *self {
            PeerCommand::HelloPut { len }
            | PeerCommand::HelloGet { len }
            | PeerCommand::StatePut { len, .. }
            | PeerCommand::ResyncDone { len, .. }
            | PeerCommand::OutOfSync { len, .. }
            | PeerCommand::BitmapOr { len, .. }
            | PeerCommand::SyncStart { len, .. }
            | PeerCommand::SyncFinish { len, .. }
            | PeerCommand::NewGeneration { len, .. }
            | PeerCommand::Prepare { len, .. }
            | PeerCommand::Commit { len, .. }
            | PeerCommand::Abort { len, .. } => Some(len),
            PeerCommand::Write { span, .. }
            | PeerCommand::Read { span, .. }
            | PeerCommand::ResyncRead { span, .. } => span.blocks().checked_mul(block_size_bytes),
            PeerCommand::Confirm { .. }
            | PeerCommand::Ping { .. }
            | PeerCommand::WriteZeroes { .. }
            | PeerCommand::Unmap { .. }
            | PeerCommand::Flush { .. }
            | PeerCommand::BitmapEnd { .. }
            | PeerCommand::Goodbye { .. } => Some(0),
        }
    }
}

#[cfg(test)]
mod tests;
