//! The operator's orders. Each ends with one outcome; one that waits for something has a deadline.

use super::Manager;
use super::outbox::Call;
use super::steps::{OrderStep, Then};
use crate::engine::MAX_PEERS;
use crate::engine::message::{Drain, OrderError, OrderErrorKind, OrderId, OrderOutcome};
use crate::engine::mutation::{self, Mutation};
use crate::engine::peer::command::PeerCommand;
use crate::engine::peer::state::{ConnState, DiskState, Role};
use crate::host::{Host, PeerAddress, PeerSlot};

/// How long an order waits for peers and for the end of a handshake.
const ORDER_TIMEOUT_NS: u64 = 10_000_000_000;
/// How long a peer is given to answer Goodbye.
const GOODBYE_NS: u64 = 1_000_000_000;

/// What the operator wants.
#[derive(Clone, Debug)]
pub enum Order {
    /// Makes a slot for a peer, or gives the peer of a slot its address again; and connects.
    AddPeer {
        node_id: u8,
        address: PeerAddress,
        connect: bool,
    },
    RemovePeer {
        node_id: u8,
    },
    Connect {
        node_id: Option<u8>,
        discard_my_data: bool,
    },
    Disconnect {
        node_id: Option<u8>,
    },
    Promote {
        force: bool,
    },
    Demote,
    /// Lets the disk go, cleanly.
    Detach,
    /// Lets everything go: the volume is deleted or the node shuts down.
    Close,
    /// This replica's data is worthless: fetch all of it.
    Invalidate,
    PauseResync,
    ResumeResync,
}

pub(super) enum Work {
    /// Attach has been started by the host.
    Attach,
    /// May it be Primary yet?
    Promote {
        force: bool,
    },
    /// Peers in the mask have not agreed yet.
    Promoting {
        force: bool,
        waiting: u8,
    },
    /// The volume takes no more application I/O; what is under way ends before the peers are told.
    Closing,
    /// Goodbye has been said to the peers in the mask; then this.
    Parting {
        peers: u8,
        after: After,
    },
    /// All peers have agreed; nobody else may be promoted any more. Those that are to have the generation that it starts
    /// with may not have it yet.
    Committing,
    Demoting,
    /// Peers in the mask may still take this node for the Primary.
    Demoted {
        waiting: u8,
    },
    /// The disk is being let go.
    Leaving,
    /// Steps are under way that end by themselves.
    Running,
}

#[derive(Clone, Copy)]
pub(super) enum After {
    Done,
    Remove(PeerSlot),
    /// The volume is shut down.
    Detach,
}

pub(super) struct Running {
    pub(super) id: OrderId,
    pub(super) deadline_ns: u64,
    pub(super) work: Work,
}

pub(super) fn busy(text: impl Into<String>) -> OrderOutcome {
    Err(OrderError::new(OrderErrorKind::Busy, text))
}

fn not_found(node_id: u8) -> OrderError {
    OrderError::new(
        OrderErrorKind::NotFound,
        format!("there is no peer with node id {node_id}; bdev_repl_get_volumes lists them"),
    )
}

impl<H: Host> Manager<H> {
    /// Takes an order; its outcome comes by [`Host::ordered`].
    pub fn order(&mut self, cx: &mut H, id: OrderId, order: Order) {
        let outcome = match order {
            Order::AddPeer {
                node_id,
                address,
                connect,
            } => self.add_peer(cx, id, node_id, address, connect),
            Order::RemovePeer { node_id } => self.remove_peer(cx, id, node_id),
            Order::Connect {
                node_id,
                discard_my_data,
            } => Some(self.connect(node_id, discard_my_data)),
            Order::Disconnect { node_id } => self.disconnect(cx, id, node_id),
            Order::Promote { force } => {
                self.start_order(cx, id, Work::Promote { force });
                self.try_promote(cx, id, force)
            }
            Order::Demote => self.demote(cx, id),
            Order::Detach => self.detach(cx, id),
            Order::Close => self.close(cx, id),
            Order::Invalidate => self.invalidate(cx, id),
            Order::PauseResync => Some(self.pause(cx, true)),
            Order::ResumeResync => Some(self.pause(cx, false)),
        };
        if let Some(outcome) = outcome {
            self.order_ended(cx, id, outcome);
        }
        self.run(cx);
    }

    /// The host has started an attach; its outcome is this order's.
    pub fn expect_attach(&mut self, cx: &mut H, id: OrderId) {
        self.start_order(cx, id, Work::Attach);
    }

    pub(super) fn attach_ended(&mut self, cx: &mut H, outcome: OrderOutcome) {
        let ids: Vec<OrderId> = self
            .orders
            .iter()
            .filter(|order| matches!(order.work, Work::Attach))
            .map(|order| order.id)
            .collect();
        for id in ids {
            self.order_ended(cx, id, outcome.clone());
        }
    }

    pub(super) fn is_under_way(&self, is: impl Fn(&Work) -> bool) -> bool {
        self.orders.iter().any(|order| is(&order.work))
    }

    /// Peers have been asked, or have agreed already.
    pub(super) fn is_promoting(&self) -> bool {
        self.is_under_way(|work| matches!(work, Work::Promoting { .. } | Work::Committing))
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.is_under_way(|work| matches!(work, Work::Leaving))
    }

    pub(super) fn start_order(&mut self, cx: &H, id: OrderId, work: Work) {
        self.orders.push(Running {
            id,
            deadline_ns: cx.now_ns() + ORDER_TIMEOUT_NS,
            work,
        });
    }

    fn slot_of(&self, node_id: u8) -> Option<PeerSlot> {
        (0..MAX_PEERS).find(|&slot| self.peers[slot].node_id == Some(node_id))
    }

    fn slots_of(&self, node_id: Option<u8>) -> Result<Vec<PeerSlot>, OrderError> {
        match node_id {
            Some(node) => Ok(vec![self.slot_of(node).ok_or_else(|| not_found(node))?]),
            None => Ok((0..MAX_PEERS)
                .filter(|&slot| self.peers[slot].node_id.is_some())
                .collect()),
        }
    }

    fn add_peer(
        &mut self,
        cx: &mut H,
        id: OrderId,
        node_id: u8,
        address: PeerAddress,
        connect: bool,
    ) -> Option<OrderOutcome> {
        if node_id == self.superblock.node_id {
            let text = format!("node id {node_id} is this node's own");
            return Some(Err(OrderError::new(OrderErrorKind::Invalid, text)));
        }
        let known = self.slot_of(node_id);
        if let Some(slot) = known {
            let peer = &mut self.peers[slot];
            if peer.address.is_some() {
                let text = format!("a peer with node id {node_id} exists already");
                return Some(Err(OrderError::new(OrderErrorKind::Exists, text)));
            }
            peer.address = Some(address);
            peer.wanted = connect;
            self.view.peers[slot].conn = if connect {
                ConnState::Unconnected
            } else {
                ConnState::StandAlone
            };
            return Some(Ok(()));
        }
        let slots = usize::from(self.superblock.layout.peer_slots());
        let Some(slot) = (0..slots).find(|&slot| self.superblock.peers[slot].is_none()) else {
            let text = format!("all {slots} peer slots are taken; remove a peer first");
            return Some(Err(OrderError::new(OrderErrorKind::Invalid, text)));
        };
        if !self.metadata.enabled {
            return Some(busy(
                "there is no disk to remember the peer on; attach one first",
            ));
        }
        self.name_peer(slot, Some(node_id));
        // What was written before this slot existed has no bits in it. Without a peer that is known to start from the
        // same data, an equal generation must not be taken for equal data.
        if !self.superblock.flags.assume_clean {
            self.masters[slot].set_all();
        }
        let peer = &mut self.peers[slot];
        // Of a peer that was here before the link may not be down yet, and its last session not be over.
        *peer = super::Peer {
            link: peer.link,
            draining: peer.draining,
            epoch: peer.epoch,
            ..super::Peer::new(Some(node_id))
        };
        peer.address = Some(address);
        peer.wanted = connect;
        let view = &mut self.view.peers[slot];
        *view = crate::engine::view::PeerView::NONE;
        view.configured = true;
        view.conn = if connect {
            ConnState::Unconnected
        } else {
            ConnState::StandAlone
        };
        self.commit_pages(cx, Then::Nothing);
        // Channels track the peer's bits from here on, before anybody is told that it is there.
        self.adopt(cx, Then::Nothing);
        self.commit_superblock(cx, Then::Order(id, Ok(())));
        None
    }

    fn remove_peer(&mut self, cx: &mut H, id: OrderId, node_id: u8) -> Option<OrderOutcome> {
        let Some(slot) = self.slot_of(node_id) else {
            return Some(Err(not_found(node_id)));
        };
        if !self.metadata.enabled {
            return Some(busy(
                "there is no disk to remember on that the peer is removed; attach one first",
            ));
        }
        self.part(cx, id, 1 << slot, After::Remove(slot))
    }

    fn forget_peer(&mut self, cx: &mut H, id: OrderId, slot: PeerSlot) {
        if !self.metadata.enabled {
            let text = "the disk was let go before it could remember that; attach it and try again";
            return self.order_ended(cx, id, busy(text));
        }
        self.name_peer(slot, None);
        // From here on nothing remembers what it lacks, or has.
        self.generation_may_be_shared();
        self.peers[slot].node_id = None;
        self.peers[slot].address = None;
        self.view.peers[slot] = crate::engine::view::PeerView::NONE;
        self.adopt(cx, Then::Nothing);
        let is_committing = self.is_under_way(|work| matches!(work, Work::Committing));
        if self.view.role == Role::Primary || is_committing {
            self.start_generation(cx, 0, false);
        }
        self.commit_superblock(cx, Then::Order(id, Ok(())));
    }

    fn connect(&mut self, node_id: Option<u8>, discard_my_data: bool) -> OrderOutcome {
        for slot in self.slots_of(node_id)? {
            let peer = &mut self.peers[slot];
            if peer.address.is_none() {
                return busy("the peer has no address; add it with one");
            }
            if !peer.established {
                peer.discard_my_data = discard_my_data;
                peer.retry_at_ns = 0;
                if !peer.wanted {
                    peer.wanted = true;
                    self.view.peers[slot].conn = ConnState::Unconnected;
                }
            }
        }
        Ok(())
    }

    fn disconnect(&mut self, cx: &mut H, id: OrderId, node_id: Option<u8>) -> Option<OrderOutcome> {
        match self.slots_of(node_id) {
            Ok(slots) => {
                let mask = slots.iter().fold(0u8, |mask, slot| mask | 1 << slot);
                self.part(cx, id, mask, After::Done)
            }
            Err(error) => Some(Err(error)),
        }
    }

    /// Says Goodbye to these peers, and goes on when they have answered or a second has passed.
    pub(super) fn part(
        &mut self,
        cx: &mut H,
        id: OrderId,
        peers: u8,
        after: After,
    ) -> Option<OrderOutcome> {
        // Until a volume that is shut down takes leave of its peers its application may still write.
        let may_write = !self.closing || self.is_under_way(|work| matches!(work, Work::Closing));
        // A Primary that has the data nowhere else leaves them the newest.
        let goes_on = self.view.disk == DiskState::UpToDate
            || (0..MAX_PEERS)
                .any(|slot| peers & (1 << slot) == 0 && self.view.peers[slot].has_latest());
        for slot in 0..MAX_PEERS {
            if peers & (1 << slot) == 0 {
                continue;
            }
            self.peers[slot].wanted = false;
            if self.peers[slot].established {
                let command = PeerCommand::Goodbye {
                    session: self.peers[slot].session,
                    sequence: self.shared.next_control_sequence(slot),
                    outdate: self.told_role() == Role::Primary && may_write && goes_on,
                };
                self.call(slot, command, Vec::new(), Call::Goodbye);
            } else {
                self.lose_session(cx, slot, "disconnected");
            }
        }
        self.orders.push(Running {
            id,
            deadline_ns: cx.now_ns() + GOODBYE_NS,
            work: Work::Parting { peers, after },
        });
        self.check_parting(cx);
        None
    }

    fn check_parting(&mut self, cx: &mut H) {
        let now = cx.now_ns();
        // A session that is lost ends others of them.
        let ids: Vec<OrderId> = self.orders.iter().map(|order| order.id).collect();
        for id in ids {
            let Some(index) = self.orders.iter().position(|order| order.id == id) else {
                continue;
            };
            let Work::Parting { peers, after } = self.orders[index].work else {
                continue;
            };
            let late = now >= self.orders[index].deadline_ns;
            if matches!(after, After::Detach) && self.is_leaving() {
                continue;
            }
            let left = (0..MAX_PEERS)
                .filter(|&slot| peers & (1 << slot) != 0 && self.peers[slot].established)
                .collect::<Vec<_>>();
            if !left.is_empty() && !late {
                continue;
            }
            self.orders[index].work = Work::Running;
            for slot in left {
                self.lose_session(cx, slot, "disconnected");
            }
            match after {
                After::Done => self.ready.push_back(Then::Order(id, Ok(()))),
                After::Remove(slot) => self.forget_peer(cx, id, slot),
                After::Detach => {
                    if let Some(order) = self.orders.iter_mut().find(|order| order.id == id) {
                        order.work = Work::Leaving;
                    }
                    self.begin_detach(cx, id);
                }
            }
        }
    }

    pub(super) fn poll_orders(&mut self, cx: &mut H) {
        if self.orders.is_empty() {
            return;
        }
        self.check_parting(cx);
        let now = cx.now_ns();
        let mut ended = Vec::new();
        let mut retry = Vec::new();
        let mut closing = Vec::new();
        let mut is_late = false;
        for order in &self.orders {
            match order.work {
                Work::Promote { force } => retry.push((order.id, force)),
                Work::Promoting { waiting, .. }
                    if now >= order.deadline_ns
                        && !mutation::is(Mutation::PromotionWaitsForLost) =>
                {
                    let text = format!("the peers in slots {waiting:#b} did not answer; try again");
                    ended.push((order.id, busy(text)));
                }
                Work::Committing => is_late |= now >= order.deadline_ns,
                Work::Closing if now >= order.deadline_ns => closing.push(order.id),
                // It is Secondary, whoever has not taken it in.
                Work::Demoted { .. } if now >= order.deadline_ns => ended.push((order.id, Ok(()))),
                _ => {}
            }
        }
        if is_late {
            self.give_up_on_generation(cx);
        }
        for id in closing {
            self.close_quiet(cx, id);
        }
        for (id, force) in retry {
            if let Some(outcome) = self.try_promote(cx, id, force) {
                ended.push((id, outcome));
            }
        }
        for (id, outcome) in ended {
            self.abort_prepared(id);
            self.order_ended(cx, id, outcome);
        }
    }

    fn detach(&mut self, cx: &mut H, id: OrderId) -> Option<OrderOutcome> {
        if !self.metadata.enabled || self.is_leaving() {
            return Some(busy(format!("the disk is {}", self.view.disk)));
        }
        if self.is_promoting() {
            return Some(busy("the volume is being promoted; try again"));
        }
        let others = self.view.peers.iter().any(|peer| peer.has_latest());
        if self.view.role == Role::Primary && !others {
            return Some(busy(
                "this node is Primary and no connected peer is UpToDate; demote it or connect a peer first",
            ));
        }
        self.start_order(cx, id, Work::Leaving);
        self.begin_detach(cx, id);
        None
    }

    pub(super) fn begin_detach(&mut self, cx: &mut H, id: OrderId) {
        if self.closing {
            self.end_application_io();
        } else {
            // As there.
            self.superblock.flags.primary &= self.view.role != Role::Primary;
            self.view.suspended = true;
        }
        self.adopt(cx, Then::OrderStep(id, OrderStep::DetachHeld));
    }

    fn invalidate(&mut self, cx: &mut H, id: OrderId) -> Option<OrderOutcome> {
        // What it has on its way while it is demoted may be nowhere else.
        let is_demoting = self.is_under_way(|work| matches!(work, Work::Demoting));
        if self.view.role == Role::Primary || is_demoting || self.is_promoting() {
            return Some(busy("this node is Primary; demote it first"));
        }
        if self.metadata.enabled && !self.view.disk_is_usable() {
            // What it says it is would be taken for the end of that.
            let text = format!("the disk is {}; try again", self.view.disk);
            return Some(busy(text));
        }
        if !self.has_another() || !self.metadata.enabled {
            return Some(busy(
                "no connected peer is UpToDate, so there is nothing to fetch the data from",
            ));
        }
        // Whoever it is fetched from in the end.
        for peer in self.superblock.peers.iter_mut().flatten() {
            peer.full_sync = true;
        }
        self.view.disk = DiskState::Inconsistent;
        self.record_disk();
        self.start_order(cx, id, Work::Running);
        self.commit_superblock(cx, Then::OrderStep(id, OrderStep::InvalidateDurable));
        None
    }

    fn pause(&mut self, cx: &mut H, paused: bool) -> OrderOutcome {
        self.puller.paused = paused;
        for slot in 0..MAX_PEERS {
            let view = &mut self.view.peers[slot];
            view.conn = match (view.conn, paused) {
                (ConnState::SyncTarget, true) => ConnState::PausedSyncT,
                (ConnState::PausedSyncT, false) => ConnState::SyncTarget,
                (conn, _) => conn,
            };
        }
        self.adopt(cx, Then::Nothing);
        self.tell_all();
        Ok(())
    }

    pub(super) fn order_step(&mut self, cx: &mut H, id: OrderId, step: OrderStep) {
        match step {
            OrderStep::PromoteDurable | OrderStep::PromoteHarvested if self.closing => {
                self.take_back_promotion(cx, id, "the volume is being deleted");
            }
            OrderStep::PromoteDurable => {
                self.harvest(cx, Then::OrderStep(id, OrderStep::PromoteHarvested));
            }
            OrderStep::PromoteHarvested => {
                self.part_with_others(cx);
                self.agree_again();
                self.generation_for_promotion(cx, id);
            }
            OrderStep::PromoteAgreed if !self.view.has_data() => {
                let text = "the last replica that is UpToDate was lost meanwhile; try again";
                self.take_back_promotion(cx, id, text);
            }
            OrderStep::PromoteAgreed => {
                self.view.role = Role::Primary;
                self.part_with_others(cx);
                self.promotion = id;
                self.hello_changed(cx);
                self.adopt(cx, Then::OrderStep(id, OrderStep::PromoteAdopted));
            }
            OrderStep::PromoteAdopted => {
                self.tell_all();
                self.order_ended(cx, id, Ok(()));
            }
            OrderStep::DemoteAdopted => self.demote_adopted(cx, id),
            OrderStep::DemoteDrained => self.demote_drained(cx, id),
            OrderStep::DemoteDurable => self.demote_durable(cx, id),
            OrderStep::CloseHeld => {
                self.drain(
                    cx,
                    Drain::Application,
                    Then::OrderStep(id, OrderStep::CloseDrained),
                );
            }
            OrderStep::CloseDrained => self.close_quiet(cx, id),
            OrderStep::CloseAdopted => drop(self.close_adopted(cx, id)),
            OrderStep::DetachHeld => {
                self.drain(
                    cx,
                    Drain::Application,
                    Then::OrderStep(id, OrderStep::DetachQuiet),
                );
            }
            OrderStep::DetachQuiet => self.detach_quiet(cx, id),
            OrderStep::DetachOff => {
                self.drain(
                    cx,
                    Drain::Disk,
                    Then::OrderStep(id, OrderStep::DetachDrained),
                );
            }
            OrderStep::DetachDrained => {
                self.when_quiet(Then::OrderStep(id, OrderStep::DetachQuieted));
            }
            OrderStep::DetachQuieted => {
                // What the channels still hold belongs on the disk before it goes.
                self.harvest(cx, Then::OrderStep(id, OrderStep::DetachHarvested));
            }
            OrderStep::DetachHarvested => self.detach_write(cx, id),
            OrderStep::DetachWritten => {
                self.metadata.enabled = false;
                self.view.disk = DiskState::Diskless;
                self.tell_all();
                self.adopt(cx, Then::OrderStep(id, OrderStep::DetachAdopted));
            }
            // A superblock that somebody else had asked for may have started behind the last one of this order.
            OrderStep::DetachAdopted => {
                self.when_quiet(Then::OrderStep(id, OrderStep::DetachReleased));
            }
            OrderStep::DetachReleased => {
                cx.disk_close();
                if self.goes_on_without_disk() {
                    // The disk has kept the old generation: what is written from here on it lacks.
                    self.start_generation(cx, 0, true);
                }
                // A Primary's writes start when its peers know that.
                self.view.suspended = false;
                self.adopt(cx, Then::Order(id, Ok(())));
            }
            OrderStep::InvalidateDurable => {
                for slot in 0..MAX_PEERS {
                    if self.peers[slot].established {
                        self.lose_session(cx, slot, "this replica was invalidated");
                        self.peers[slot].retry_at_ns = 0;
                    }
                }
                self.order_ended(cx, id, Ok(()));
            }
        }
    }

    fn detach_quiet(&mut self, cx: &mut H, id: OrderId) {
        if let Some(slot) = self.source() {
            self.lose_session(cx, slot, "the disk is being detached");
        }
        self.view.disk = DiskState::Failed;
        self.tell_all();
        self.adopt(cx, Then::OrderStep(id, OrderStep::DetachOff));
    }

    fn detach_write(&mut self, cx: &mut H, id: OrderId) {
        let step = Then::OrderStep(id, OrderStep::DetachWritten);
        if self.metadata.enabled {
            self.superblock.flags.attached = false;
            self.commit_pages(cx, Then::Nothing);
            self.commit_superblock(cx, step);
        } else {
            self.ready.push_back(step);
        }
    }
}
