//! What channels, the manager and the host tell each other. Control path only: nothing here is sent per I/O,
//! except for an I/O that has to wait for the manager anyway.

use std::sync::Arc;

use crate::engine::bitmap::Page;
use crate::engine::meta::layout::Layout;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::engine::view::View;
use crate::host::{ChannelId, Host, PeerSlot};

/// Pages of one peer's shard, handed over.
pub type HarvestedPages = Vec<(u32, Box<Page>)>;

/// What a channel needs to use the backing device.
#[derive(Clone, Debug)]
pub struct DiskStart {
    pub layout: Layout,
    /// Identifies the volume in activity log transactions.
    pub volume: uuid::Uuid,
    /// Extents that this channel may have active.
    pub al_extents: usize,
    /// The number of this channel's next transaction.
    pub al_number: u64,
}

/// What a channel is asked to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Received commands of sessions with this peer that are no longer accepted.
    Received(PeerSlot),
    /// Out-of-sync notices to this peer.
    Notices(PeerSlot),
    /// Out-of-sync notices to any peer.
    EveryNotice,
    /// Everything that uses the backing device.
    Disk,
    /// Application I/O that has begun; what is held stays held.
    Application,
    /// The same, but only what was submitted up to this time.
    ApplicationUntil(u64),
}

pub enum ToChannel<H: Host> {
    /// From now on this is the state of the volume. Answered by [`ToManager::Adopted`].
    Adopt(Arc<View>),
    /// The backing device can be used as soon as a view says so.
    Disk(Box<DiskStart>),
    /// Hand over what the shards hold. Answered by [`ToManager::Harvested`].
    Harvest(u64),
    /// Answered by [`ToManager::Drained`] when it is so.
    Drain(u64, Drain),
    /// These extents may leave the activity log.
    Retired(Vec<u32>),
    /// The answer to a command that was handed to the manager.
    Answer(H::PeerIo, PeerAnswer),
}

pub enum ToManager<H: Host> {
    Adopted(ChannelId, u64),
    Harvested(ChannelId, u64, Vec<(PeerSlot, HarvestedPages)>),
    Drained(ChannelId, u64),
    /// These extents are idle: make durable what their writes left behind, so that they can leave the log.
    Retire(ChannelId, Vec<u32>, Vec<(PeerSlot, HarvestedPages)>),
    /// Writes are done but for these peers (a mask of slots), which had the latest data; or, with
    /// [`LOCAL_MASK`](crate::engine::request::LOCAL_MASK), wait because there is no disk here.
    NeedGeneration(u8),
    /// A command of this session ended without an answer, or with one that ends the session.
    PeerLost(PeerSlot, u32),
    /// The backing device failed an I/O.
    DiskFailed,
    /// A received control command with its data.
    Command {
        channel: ChannelId,
        command: PeerCommand,
        body: Vec<u8>,
        io: H::PeerIo,
    },
}

/// The host's number for an order.
pub type OrderId = u64;

/// Where an order stands when it has ended.
pub type OrderOutcome = Result<(), OrderError>;

/// Why an order was not carried out; the host makes a JSON-RPC error of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderError {
    pub kind: OrderErrorKind,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderErrorKind {
    /// Not in this state; something else has to happen first.
    Busy,
    Exists,
    NotFound,
    Invalid,
    /// The device or a peer failed.
    Io,
}

impl OrderError {
    pub fn new(kind: OrderErrorKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }
}
