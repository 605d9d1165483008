//! Opcodes of the peer commands, all in NVMe's vendor range; bits 1:0 are the data direction.
//! Called by both sides of a link. Must not know what a command carries.

/// NVMe opcode bits 1:0 (NVMe Base 2.0, Submission Queue Entry, Command Dword 0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataDirection {
    /// No data.
    None,
    /// The sender of the command sends data.
    HostToController,
    /// The receiver of the command sends data.
    ControllerToHost,
}

/// The data direction that an opcode's bits 1:0 give. 11b (both ways) is used by no command of ours.
pub const fn data_direction(op: u8) -> DataDirection {
    match op & 0b11 {
        0b01 => DataDirection::HostToController,
        0b10 => DataDirection::ControllerToHost,
        _ => DataDirection::None,
    }
}

/// [`PeerCommand::Ping`](super::PeerCommand::Ping)
pub const PING: u8 = 0x80;
/// [`PeerCommand::HelloPut`](super::PeerCommand::HelloPut)
pub const HELLO_PUT: u8 = 0x81;
/// [`PeerCommand::HelloGet`](super::PeerCommand::HelloGet)
pub const HELLO_GET: u8 = 0x82;
/// [`PeerCommand::Confirm`](super::PeerCommand::Confirm)
pub const CONFIRM: u8 = 0x84;
/// [`PeerCommand::StatePut`](super::PeerCommand::StatePut)
pub const STATE_PUT: u8 = 0x85;
/// [`PeerCommand::Goodbye`](super::PeerCommand::Goodbye)
pub const GOODBYE: u8 = 0x88;
/// [`PeerCommand::WriteZeroes`](super::PeerCommand::WriteZeroes)
pub const WRITE_ZEROES: u8 = 0x90;
/// [`PeerCommand::Write`](super::PeerCommand::Write)
pub const WRITE: u8 = 0x91;
/// [`PeerCommand::Read`](super::PeerCommand::Read)
pub const READ: u8 = 0x92;
/// [`PeerCommand::Unmap`](super::PeerCommand::Unmap)
pub const UNMAP: u8 = 0x94;
/// [`PeerCommand::Flush`](super::PeerCommand::Flush)
pub const FLUSH: u8 = 0x98;
/// [`PeerCommand::BitmapEnd`](super::PeerCommand::BitmapEnd)
pub const BITMAP_END: u8 = 0xa0;
/// [`PeerCommand::BitmapOr`](super::PeerCommand::BitmapOr)
pub const BITMAP_OR: u8 = 0xa1;
/// [`PeerCommand::ResyncRead`](super::PeerCommand::ResyncRead)
pub const RESYNC_READ: u8 = 0xa2;
/// [`PeerCommand::ResyncDone`](super::PeerCommand::ResyncDone)
pub const RESYNC_DONE: u8 = 0xa5;
/// [`PeerCommand::OutOfSync`](super::PeerCommand::OutOfSync)
pub const OUT_OF_SYNC: u8 = 0xa9;
/// [`PeerCommand::SyncStart`](super::PeerCommand::SyncStart)
pub const SYNC_START: u8 = 0xad;
/// [`PeerCommand::SyncFinish`](super::PeerCommand::SyncFinish)
pub const SYNC_FINISH: u8 = 0xb1;
/// [`PeerCommand::NewGeneration`](super::PeerCommand::NewGeneration)
pub const NEW_GENERATION: u8 = 0xc1;
/// [`PeerCommand::Prepare`](super::PeerCommand::Prepare)
pub const PREPARE: u8 = 0xc5;
/// [`PeerCommand::Commit`](super::PeerCommand::Commit)
pub const COMMIT: u8 = 0xc9;
/// [`PeerCommand::Abort`](super::PeerCommand::Abort)
pub const ABORT: u8 = 0xcd;

/// Every opcode.
pub const ALL: [u8; 22] = [
    PING,
    HELLO_PUT,
    HELLO_GET,
    CONFIRM,
    STATE_PUT,
    GOODBYE,
    WRITE_ZEROES,
    WRITE,
    READ,
    UNMAP,
    FLUSH,
    BITMAP_END,
    BITMAP_OR,
    RESYNC_READ,
    RESYNC_DONE,
    OUT_OF_SYNC,
    SYNC_START,
    SYNC_FINISH,
    NEW_GENERATION,
    PREPARE,
    COMMIT,
    ABORT,
];
