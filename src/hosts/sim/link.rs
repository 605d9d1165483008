//! The queue pairs from one node to a peer: commands arrive in order on each, are answered in any order, and may arrive
//! long after the sender has given the link up.

use super::memory::Payload;
use super::node::Core;
use super::numbered::Numbered;
use crate::engine::peer::command::Span;
use crate::host::{Data, Token};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    Closed,
    Opening,
    Up,
    Closing,
}

/// A command that the sender waits for.
pub struct Outstanding {
    pub core: usize,
    pub token: Token,
    pub data: Data<Core>,
    /// If it is a resync read: of which session, and what it reads.
    pub resync_read: Option<(u32, Span)>,
}

/// One node's link to one peer.
pub struct Link {
    pub state: LinkState,
    /// Of the current or the last connection; unique in the world.
    pub id: u64,
    /// The node at the other end.
    pub target: usize,
    pub outstanding: Numbered<Outstanding>,
    /// Per queue pair: when the last command arrives.
    pub last_arrival_ns: Vec<u64>,
}

impl Link {
    pub fn new(cores: usize) -> Link {
        Link {
            state: LinkState::Closed,
            id: 0,
            target: 0,
            outstanding: Numbered::default(),
            last_arrival_ns: vec![0; cores],
        }
    }
}

/// A received command: where its answer goes.
pub struct PeerIo {
    /// The sender's number for it.
    pub command: u64,
    /// The number of this arrival; a command may arrive more than once.
    pub arrival: u64,
    /// Its answer does not get through.
    pub answer_lost: bool,
    pub from: usize,
    pub from_incarnation: u64,
    pub link: u64,
    pub slot: usize,
    /// Where the answer's data is put, if it has any.
    pub response: Option<Payload>,
}

/// A command on its way.
pub struct Transit {
    pub from: usize,
    pub to: usize,
    pub to_incarnation: u64,
    pub core: usize,
    pub opcode: u8,
    pub words: crate::engine::peer::command::CommandWords,
    pub data: Vec<u8>,
    /// Bytes of data, in either direction.
    pub data_len: u32,
    /// It has been delivered before, or got lost before.
    pub repeated: bool,
    /// It was kept on the way, and goes on.
    pub is_let_go: bool,
    pub io: PeerIo,
}

impl Transit {
    /// The same command once more.
    pub fn again(&self, arrival: u64, core: usize) -> Transit {
        Transit {
            data: self.data.clone(),
            repeated: true,
            core,
            io: PeerIo {
                arrival,
                answer_lost: false,
                response: None,
                ..self.io
            },
            ..*self
        }
    }
}
