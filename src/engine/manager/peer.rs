//! What the manager knows of one peer.

use super::known::{KnownCommands, KnownHellos};
use super::outbox::{Call, Outbox};
use crate::engine::peer::body::StateBody;
use crate::engine::peer::handshake::Decision;
use crate::engine::peer::hello::{HISTORY_LEN, Hello};
use crate::engine::peer::state::Role;
use crate::host::PeerAddress;

/// The queue pairs from here to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Closed,
    Opening,
    Open,
    Closing,
}

/// A decision, and the nonces of the two Hellos that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decided {
    pub mine: u64,
    pub theirs: u64,
    pub decision: Decision,
}

/// How far a question of the handshake has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    No,
    InFlight,
    Yes,
    /// Answered "not yet".
    Again,
}

/// The exchange of bitmaps, per side.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Exchange {
    /// Ours is being sent, from this bit on.
    pub(super) cursor: Option<u64>,
    pub(super) sent: bool,
    pub(super) received: bool,
}

pub(super) struct Peer {
    pub(super) node_id: Option<u8>,
    pub(super) address: Option<PeerAddress>,
    /// The operator wants a connection.
    pub(super) wanted: bool,
    pub(super) discard_my_data: bool,
    pub(super) link: Link,
    pub(super) retry_at_ns: u64,
    /// Counts sessions; what was begun under an older one is void.
    pub(super) epoch: u64,
    /// Received commands of the last session may still be in flight here.
    pub(super) draining: bool,
    pub(super) nonce: u64,
    pub(super) my_hello: Option<Hello>,
    pub(super) hello: Asked,
    pub(super) their_hello: Option<Hello>,
    /// Which Hellos it has put so far, in whatever session.
    pub(super) hellos: KnownHellos,
    pub(super) session: u32,
    /// Every channel accepts the session.
    pub(super) receivable: bool,
    pub(super) confirm: Asked,
    /// We have told the peer that it may enter: our Hello must not change any more.
    pub(super) confirmed_theirs: bool,
    pub(super) decision: Option<Decision>,
    /// The last decision, whatever became of it.
    pub(super) decided: Option<Decided>,
    pub(super) established: bool,
    pub(super) role: Role,
    /// The peer's current generation as it last told.
    pub(super) current_generation: u64,
    /// That is not durable there yet, as far as it has told.
    pub(super) starts_generation: bool,
    /// The generations of its bitmaps, by node id, as it last told.
    pub(super) bitmap_generations: [u64; 8],
    /// The peer's earlier generations, as it last told.
    pub(super) history: [u64; HISTORY_LEN],
    pub(super) state_revision: u64,
    /// The transaction by which it is being promoted.
    pub(super) promoting: Option<u64>,
    pub(super) exchange: Option<Exchange>,
    pub(super) resync_total_bits: u64,
    pub(super) resync_started_ns: u64,
    pub(super) paused_by_peer: bool,
    pub(super) outbox: Outbox,
    /// What the session has brought so far.
    pub(super) known: KnownCommands,
    /// To be asked again at this time.
    pub(super) again: Option<(Call, u64)>,
    /// The peer's state, if it told it before we had entered the session's.
    pub(super) early_state: Option<StateBody>,
    /// Since when a new decision is due.
    pub(super) differs_since_ns: Option<u64>,
    /// It has agreed to the promotion of this node, and has bits for it.
    pub(super) may_differ: bool,
    pub(super) ping_sent_ns: u64,
    pub(super) ping_in_flight: bool,
    pub(super) heard_ns: u64,
    pub(super) next_try_ns: u64,
    pub(super) last_error: Option<String>,
}

impl Peer {
    pub(super) fn new(node_id: Option<u8>) -> Self {
        Self {
            node_id,
            address: None,
            wanted: false,
            discard_my_data: false,
            link: Link::Closed,
            retry_at_ns: 0,
            epoch: 0,
            draining: false,
            nonce: 0,
            my_hello: None,
            hello: Asked::No,
            their_hello: None,
            hellos: KnownHellos::default(),
            session: 0,
            receivable: false,
            confirm: Asked::No,
            confirmed_theirs: false,
            decision: None,
            decided: None,
            established: false,
            role: Role::Unknown,
            current_generation: 0,
            starts_generation: false,
            bitmap_generations: [0; 8],
            history: [0; HISTORY_LEN],
            state_revision: 0,
            promoting: None,
            exchange: None,
            resync_total_bits: 0,
            resync_started_ns: 0,
            paused_by_peer: false,
            outbox: Outbox::default(),
            known: KnownCommands::default(),
            again: None,
            early_state: None,
            differs_since_ns: None,
            may_differ: false,
            ping_sent_ns: 0,
            ping_in_flight: false,
            heard_ns: 0,
            next_try_ns: 0,
            last_error: None,
        }
    }
}
