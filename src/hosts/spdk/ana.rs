//! What hosts learn of a change of role.

use super::core::State;
use super::node::{Pending, give_order};
use crate::engine::manager::Order;
use crate::rpc::{Reply, RpcError};

pub fn before_demote(state: &mut State, volume: u32, reply: Reply) {
    give_order(state, volume, Order::Demote, Pending::Role(reply, false));
}

pub fn role_changed(
    _: &mut State,
    _: u32,
    _primary: bool,
    outcome: Result<(), RpcError>,
    reply: Reply,
) {
    reply.answer(outcome.map(|()| true.into()));
}
