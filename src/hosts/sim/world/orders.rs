//! Orders are given to nodes, and their ends are kept. Tests and the campaign's operator give them.

use super::{Config, SECOND, World};
use crate::engine::manager::Order;
use crate::engine::message::{OrderId, OrderOutcome};
use crate::engine::meta::format::Content;
use crate::host::PeerAddress;

impl World {
    /// Gives an order and returns its number.
    pub fn order(&mut self, node: usize, order: Order) -> OrderId {
        let id = self.id();
        self.note(node, || format!("order {id}: {order:?}"));
        self.given_up_by(node, &order);
        self.nodes[node].is_closing |= matches!(order, Order::Close);
        let incarnation = self.nodes[node].incarnation;
        self.orders
            .push((node, incarnation, id, format!("{order:?}")));
        self.with_manager(node, |manager, core| manager.order(core, id, order));
        id
    }

    /// How an order ended, if it has.
    pub fn outcome(&self, node: usize, id: OrderId) -> Option<&OrderOutcome> {
        self.nodes[node].outcomes.get(&id)
    }

    pub fn orders_have_ended(&self) -> bool {
        self.orders.iter().all(|(node, incarnation, id, _)| {
            self.nodes[*node].incarnation != *incarnation || self.outcome(*node, *id).is_some()
        })
    }

    /// Every order to an engine that still runs has ended.
    pub fn check_orders(&self) {
        for (node, incarnation, id, text) in &self.orders {
            assert!(
                self.nodes[*node].incarnation != *incarnation || self.outcome(*node, *id).is_some(),
                "[I10] {text} on node {node} is stuck\n{}",
                self.describe()
            );
        }
    }

    /// Gives an order and waits for its end.
    pub fn ordered(&mut self, node: usize, order: Order) -> OrderOutcome {
        let text = format!("{order:?} has ended");
        let id = self.order(node, order);
        self.run_until(&text, 15 * SECOND, |world| {
            world.outcome(node, id).is_some()
        });
        self.outcome(node, id).cloned().unwrap_or(Ok(()))
    }

    /// Gives an order that must be carried out.
    pub fn carry_out(&mut self, node: usize, order: Order) {
        let text = format!("{order:?} on node {node}");
        if let Err(error) = self.ordered(node, order) {
            panic!("{text}: {}\n{}", error.text, self.describe());
        }
    }

    /// Tells a node where another one is.
    pub fn introduce(&mut self, node: usize, peer: usize) {
        let order = Order::AddPeer {
            node_id: peer as u8,
            address: address(peer),
            connect: true,
        };
        self.carry_out(node, order);
    }

    /// Every node is told of every other.
    pub fn introduce_all(&mut self) {
        for node in 0..self.config.nodes {
            for peer in 0..self.config.nodes {
                if node != peer {
                    self.introduce(node, peer);
                }
            }
        }
    }

    pub fn promote(&mut self, node: usize) {
        self.carry_out(node, Order::Promote { force: false });
    }

    /// All nodes on empty devices, paired each with each; `assume_clean`, so nothing is to resync.
    pub fn clean_cluster(seed: u64, config: Config) -> World {
        let mut world = World::new(seed, config);
        for node in 0..world.config.nodes {
            world.create(node, Content::AssumeClean);
        }
        world.introduce_all();
        world.settle();
        world
    }
}

/// Where a node's endpoint listens.
pub fn address(node: usize) -> PeerAddress {
    PeerAddress {
        traddr: format!("node-{node}"),
        trsvcid: 4420,
        header_digest: false,
        data_digest: false,
    }
}
