//! A change of role as others see it: hosts are told before this node stops serving and after it has begun. Called by
//! `node` with what the operator asks for, and with the outcome of the order.

use super::ana;
use super::core::State;
use super::node::{Pending, give_order};
use crate::engine::manager::Order;
use crate::hosts::control::refusal;
use crate::rpc::{Reply, RpcError};

pub fn promote(state: &mut State, volume: u32, order: Order, reply: Reply) {
    match state.node.control(volume) {
        Some(control) if control.is_demoting => {
            reply.fail(refusal::being_demoted(&control.create.name));
        }
        Some(_) => give_order(state, volume, order, Pending::Promote(reply)),
        None => reply.fail(refusal::gone()),
    }
}

/// The order to promote has ended: now this node serves, if it was carried out.
pub fn promoted(state: &mut State, volume: u32, outcome: Result<(), RpcError>, reply: Reply) {
    match outcome {
        Ok(()) => ana::settle(state, volume, |_| reply.ok(true)),
        Err(error) => reply.fail(error),
    }
}

/// Sends hosts away first, so that none meets a node that has stopped serving.
pub fn demote(state: &mut State, volume: u32, reply: Reply) {
    match state.node.control(volume) {
        Some(control) if control.is_demoting => {
            reply.fail(refusal::being_demoted(&control.create.name));
        }
        Some(control) => {
            control.is_demoting = true;
            ana::settle(state, volume, move |state| {
                give_order(state, volume, Order::Demote, Pending::Demote(reply));
            });
        }
        None => reply.fail(refusal::gone()),
    }
}

/// The order to demote has ended. If it was refused, this node serves as before, and the poller tells.
pub fn demoted(state: &mut State, volume: u32, outcome: Result<(), RpcError>, reply: Reply) {
    if let Some(control) = state.node.control(volume) {
        control.is_demoting = false;
        control.ana.changed();
    }
    reply.answer(outcome.map(|()| true.into()));
}
