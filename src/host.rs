//! What the engine may ask of the world that it runs in. Every host (SPDK, embedded, simulated) implements
//! [`Host`] once; the engine is generic over it and monomorphised, so nothing on the I/O path is `dyn`.
//!
//! A host owns one context per core. Whatever it hands to the engine (`submit`, `complete`, `message`, `poll`) it
//! hands over with that context; completions that arrive while the engine runs are delivered after it has returned.

use std::ops::Range;

use crate::engine::message::{OrderId, OrderOutcome, ToChannel, ToManager};
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;

/// A peer's slot within a volume, 0 to 6.
pub type PeerSlot = usize;

/// The channel of a volume on one core; also the number of its activity log ring.
pub type ChannelId = usize;

/// What the engine wrote on a request that it gave to the host; comes back with the completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u64);

/// The data of a disk I/O or a peer command.
pub enum Data<H: Host> {
    /// No data goes along.
    None,
    /// Memory of the application or of a received peer command, by reference; valid until that is answered.
    Payload(H::Payload),
    /// Memory of the engine; comes back with the completion.
    Buffer(H::Buffer),
}

/// An operation on the backing device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    Read,
    /// With `fua`, on stable media before it completes.
    Write {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
    },
    Unmap,
    /// Everything that completed before is on stable media after it.
    Flush,
}

/// An I/O on the backing device, in bytes from its beginning; both are multiples of its block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskIo {
    pub op: DiskOp,
    pub offset: u64,
    pub len: u64,
}

/// How a disk I/O or a peer command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStatus {
    Ok,
    /// The device said that it failed.
    Failed,
    /// The device or the link went away; whether it was done is not known.
    Gone,
}

/// The end of a disk I/O or of a peer command.
pub struct Completion<H: Host> {
    pub token: Token,
    pub status: IoStatus,
    /// The peer engine's answer; [`PeerAnswer::Ok`] for a disk I/O.
    pub answer: PeerAnswer,
    /// The engine's buffer, if one went along.
    pub data: Data<H>,
}

/// How an application I/O ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppStatus {
    Ok,
    Failed,
    /// This node is not Primary, or has no access to data: another path may.
    Inaccessible,
    /// Outside the volume, or of a form that the volume does not take.
    Invalid,
}

/// Why a peer command was not taken.
pub enum PeerRefusal<H: Host> {
    /// No resources now; try again from the poller.
    Later(Data<H>),
    /// There is no link on this core.
    Down(Data<H>),
}

/// Where a peer's endpoint listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddress {
    /// IPv4 or IPv6 address.
    pub traddr: String,
    /// TCP port.
    pub trsvcid: u16,
    pub header_digest: bool,
    pub data_digest: bool,
}

/// One core's context of one volume.
pub trait Host: Sized {
    /// Data of an application I/O or of a received peer command, by reference: an iovec list or a pointer.
    type Payload: Clone;
    /// Memory for the engine's own I/O, aligned for the backing device; dropping it frees it.
    type Buffer: AsRef<[u8]> + AsMut<[u8]>;
    /// An application I/O, to be ended exactly once.
    type Io;
    /// A received peer command, to be answered exactly once on the core where it arrived.
    type PeerIo;

    /// Nanoseconds since some moment; never goes back.
    fn now_ns(&self) -> u64;
    fn random(&mut self) -> u64;

    /// A buffer of `len` bytes, a multiple of 4096; none now means later.
    fn buffer(&mut self, len: usize) -> Option<Self::Buffer>;
    /// Copies the data of a received control command. Not for the I/O path.
    fn read_payload(&self, payload: &Self::Payload) -> Vec<u8>;

    /// Starts a disk I/O; its data comes back at once when there are no resources now.
    ///
    /// # Errors
    /// The data, when the host is out of resources: try again from the poller.
    fn disk(&mut self, token: Token, io: DiskIo, data: Data<Self>) -> Result<(), Data<Self>>;
    /// This core lets go of the backing device: nothing of the engine's is in flight on it.
    fn disk_release(&mut self);

    /// Data that this node's endpoint takes with a command, in bytes, without waiting for memory that I/O of hosts may hold.
    /// Asked on the manager's core, for each handshake.
    fn in_capsule_bytes(&self) -> u32;

    /// Sends a command to a peer over this core's queue pair. These bytes of `data` go along; for a command that is
    /// answered with data, that is where they are put.
    ///
    /// # Errors
    /// The data and the reason, when it was not taken.
    fn peer(
        &mut self,
        slot: PeerSlot,
        token: Token,
        command: &PeerCommand,
        data: Data<Self>,
        part: Range<usize>,
    ) -> Result<(), PeerRefusal<Self>>;

    /// Ends an application I/O.
    fn finish(&mut self, io: Self::Io, status: AppStatus);
    /// Answers a received peer command.
    fn answer(&mut self, io: Self::PeerIo, answer: PeerAnswer);

    fn to_manager(&mut self, message: ToManager<Self>);
    fn to_channel(&mut self, channel: ChannelId, message: ToChannel<Self>);

    /// Brings up the queue pairs to a peer, one per core. Ends in `Manager::link_up` or `Manager::link_down`.
    fn link_open(&mut self, slot: PeerSlot, address: &PeerAddress);
    /// Resets the queue pairs to a peer: what is outstanding completes as [`IoStatus::Gone`] on its core, and then
    /// `Manager::link_down` is called, once.
    fn link_close(&mut self, slot: PeerSlot);
    /// The volume has let go of the backing device on all cores.
    fn disk_close(&mut self);
    /// An order to the manager has ended.
    fn ordered(&mut self, id: OrderId, outcome: OrderOutcome);
}
