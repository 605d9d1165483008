//! The operator, as a cluster manager with fencing is: one node is the application's; another takes over only when it has
//! everything that was acknowledged and the first is dead. Sees reports only.

use crate::engine::manager::Order;
use crate::engine::message::OrderId;
use crate::engine::peer::state::{ConnState, DiskState};
use crate::hosts::sim::world::World;

/// A set of nodes.
pub type Nodes = u8;

/// Where the application is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lead {
    /// Nowhere. These have everything that was acknowledged.
    Nobody {
        holders: Nodes,
    },
    Promoting {
        node: usize,
        incarnation: u64,
        order: OrderId,
        holders: Nodes,
        /// The node, if it has everything on its own disk.
        on_disk: Nodes,
    },
    Active {
        node: usize,
    },
    Demoting {
        node: usize,
        order: OrderId,
        next: usize,
        /// As it was known before.
        holders: Nodes,
    },
}

/// The nodes that have what this one's application was told is written: itself if its disk is UpToDate, and the peers
/// that it knows, rightly, to be so.
pub fn holders(world: &World, node: usize) -> Nodes {
    let state = world.state(node);
    let mut holders = u8::from(state.disk == DiskState::UpToDate) << node;
    for peer in &state.peers {
        let other = usize::from(peer.node_id);
        let knows = peer.conn == ConnState::Connected && peer.disk == DiskState::UpToDate;
        if knows && is_up_to_date(world, other) && is_connected(world, other, node) {
            holders |= 1 << other;
        }
    }
    holders
}

pub fn is_up(world: &World, node: usize) -> bool {
    world.nodes[node].engine.is_some()
}

/// It says so itself: one that has lost power is no longer what others still take it for.
fn is_connected(world: &World, node: usize, with: usize) -> bool {
    let peers = world.state(node).peers;
    peers
        .iter()
        .any(|peer| usize::from(peer.node_id) == with && peer.conn == ConnState::Connected)
}

fn is_up_to_date(world: &World, node: usize) -> bool {
    is_up(world, node) && world.state(node).disk == DiskState::UpToDate
}

/// What this node's application would read is what one of those has: its own disk is, or is the same as, one of theirs;
/// or it has none, and is connected with one of them.
fn holds(world: &World, node: usize, among: Nodes) -> bool {
    let is_holder = |node: usize| among & (1 << node) != 0 && is_up_to_date(world, node);
    is_holder(node)
        || (0..world.nodes.len()).any(|other| {
            if !is_up(world, node) || !is_holder(other) {
                return false;
            }
            // Either may not have heard yet that the other fell behind.
            let current = |node: usize| world.state(node).generations.current;
            if current(node) != current(other) {
                return false;
            }
            let knows = holders(world, node) & (1 << other) != 0;
            let is_known = holders(world, other) & (1 << node) != 0;
            knows && (is_known || world.state(node).disk == DiskState::Diskless)
        })
}

/// All nodes are there and say of each other that they are UpToDate.
fn agree(world: &World) -> bool {
    let nodes = world.nodes.len();
    let all = (1u8 << nodes) - 1;
    (0..nodes).all(|node| is_up(world, node) && holders(world, node) == all)
}

/// Who has everything when this node may have begun to be Primary: it alone, or, when it did so without a disk, the others.
fn has_begun(node: usize, on_disk: Nodes, holders: Nodes) -> Nodes {
    match (on_disk, holders & !(1 << node)) {
        (0, 0) => holders,
        (0, others) => others,
        (alone, _) => alone,
    }
}

impl Lead {
    /// The node that the application uses now.
    pub fn active(&self) -> Option<usize> {
        match *self {
            Lead::Active { node } => Some(node),
            _ => None,
        }
    }

    /// The application's node, or those that one of is to become it.
    pub fn nodes(&self) -> Nodes {
        match *self {
            Lead::Nobody { holders } => holders,
            Lead::Promoting { node, .. } | Lead::Active { node } | Lead::Demoting { node, .. } => {
                1 << node
            }
        }
    }

    /// Takes in how orders have ended.
    pub fn look(&mut self, world: &mut World) {
        match *self {
            Lead::Promoting {
                node,
                incarnation,
                order,
                holders,
                on_disk,
            } => {
                if world.nodes[node].incarnation != incarnation {
                    // It may have begun to be Primary on its disk, and nobody else has heard of that.
                    let holders = has_begun(node, on_disk, holders);
                    *self = Lead::Nobody { holders };
                    return;
                }
                match world.outcome(node, order) {
                    Some(Ok(())) => *self = Lead::Active { node },
                    Some(Err(error)) => {
                        // As when it died: it may have begun.
                        let holders = if error.text.contains("lost meanwhile") {
                            has_begun(node, on_disk, holders)
                        } else {
                            holders
                        };
                        *self = Lead::Nobody { holders };
                    }
                    None => {}
                }
            }
            Lead::Demoting {
                node,
                order,
                next,
                holders: before,
            } => match world.outcome(node, order) {
                Some(Ok(())) => {
                    // Whoever has come since may lack what was written without it.
                    *self = Lead::Nobody {
                        holders: holders(world, node) & before,
                    };
                    self.promote(world, next, false);
                }
                Some(Err(_)) => *self = Lead::Active { node },
                None => {}
            },
            Lead::Nobody { .. } | Lead::Active { .. } => {}
        }
    }

    /// To be called before a node is shut down: what is acknowledged until the end may be there only.
    pub fn closes(&mut self, world: &World, closing: usize) {
        let led = *self;
        self.stops(world, closing);
        if led != *self {
            let holders = holders(world, closing) & (1 << closing);
            *self = Lead::Nobody { holders };
        }
    }

    /// This node is about to be promoted.
    pub fn is_promoting(&self, promoted: usize) -> bool {
        matches!(*self, Lead::Promoting { node, .. } if node == promoted)
    }

    /// To be called before a node is stopped.
    pub fn stops(&mut self, world: &World, stopping: usize) {
        match *self {
            Lead::Active { node } | Lead::Demoting { node, .. } if node == stopping => {
                *self = Lead::Nobody {
                    holders: holders(world, node),
                };
            }
            _ => {}
        }
    }

    /// Promotes a node that has everything.
    pub fn promote(&mut self, world: &mut World, node: usize, force: bool) {
        let Lead::Nobody { holders } = *self else {
            return;
        };
        let is_safe = match holders {
            // The last one was diskless and on its own: what it was told is written is somewhere among all the others.
            0 => agree(world),
            holders => is_up(world, node) && holds(world, node, holders),
        };
        if !is_safe {
            return;
        }
        let incarnation = world.nodes[node].incarnation;
        let on_disk = u8::from(is_up_to_date(world, node)) << node;
        let order = world.order(node, Order::Promote { force });
        *self = Lead::Promoting {
            node,
            incarnation,
            order,
            holders,
            on_disk,
        };
    }

    /// Declares the best of what is there the newest, as an operator does who has all nodes and no UpToDate one.
    pub fn promote_best(&mut self, world: &mut World) {
        let nodes = 0..world.nodes.len();
        let best = nodes.max_by_key(|&node| world.state(node).disk);
        let (Lead::Nobody { holders }, Some(node)) = (*self, best) else {
            return;
        };
        let order = world.order(node, Order::Promote { force: true });
        *self = Lead::Promoting {
            node,
            incarnation: world.nodes[node].incarnation,
            order,
            holders,
            on_disk: 1 << node,
        };
    }

    /// Ends the application's use of its node, to go to another.
    pub fn demote(&mut self, world: &mut World, next: usize) {
        if let Lead::Active { node } = *self {
            let before = holders(world, node);
            let order = world.order(node, Order::Demote);
            *self = Lead::Demoting {
                node,
                order,
                next,
                holders: before,
            };
        }
    }
}
