//! A change of role as others see it: what is built on the volume comes up on the Primary only, if the user wants that;
//! hosts are told before this node stops serving and after it has begun. Called by `node` with what the operator asks for,
//! and with the outcome of the order.

use std::ffi::c_void;

use super::core::{Job, State, manager_core};
use super::lifecycle::{register_volume, unregister_volume};
use super::node::{Control, Pending, give_order};
use super::{ana, sys};
use crate::engine::manager::Order;
use crate::hosts::control::refusal;
use crate::rpc::volume::Register;
use crate::rpc::{Reply, RpcError};

pub fn promote(state: &mut State, volume: u32, order: Order, reply: Reply) {
    match state.node.control(volume) {
        Some(control) if control.is_demoting => {
            reply.fail(refusal::being_demoted(&control.create.name));
        }
        Some(control) if control.is_unregistering => {
            let again = move |state: &mut State| promote(state, volume, order, reply);
            state.node.deferred.push(Box::new(again));
        }
        Some(_) => give_order(state, volume, order, Pending::Promote(reply)),
        None => reply.fail(refusal::gone()),
    }
}

/// The order to promote has ended: now this node serves, if it was carried out.
pub fn promoted(state: &mut State, volume: u32, outcome: Result<(), RpcError>, reply: Reply) {
    if let Err(error) = outcome {
        return reply.fail(error);
    }
    let Some(control) = state.node.control(volume) else {
        return reply.fail(refusal::gone());
    };
    match register_if_missing(control) {
        Ok(false) => ana::settle(state, volume, |_| reply.ok(true)),
        Ok(true) => examined(Box::new(move |state| {
            ana::settle(state, volume, |_| reply.ok(true));
        })),
        // A Primary that nobody can use keeps another node from being one.
        Err(error) => {
            let refused = Reply::new(move |_| reply.fail(error));
            demote(state, volume, refused);
        }
    }
}

/// Registers the bdev of a volume that has one on the Primary only. Whether that was so.
fn register_if_missing(control: &mut Control) -> Result<bool, RpcError> {
    let is_wanted = control.create.register == Register::OnPromote && !control.deleting;
    if !is_wanted || control.bdev.is_some() {
        return Ok(false);
    }
    register_volume(control).map(|()| true).map_err(|errno| {
        let name = &control.create.name;
        let why = std::io::Error::from_raw_os_error(errno.saturating_abs());
        let text = format!(
            "volume '{name}' cannot be promoted: its bdev cannot be registered: {why}; is there another bdev {name}?"
        );
        RpcError::errno(errno, text)
    })
}

/// Runs `then` when everybody has looked at the bdevs that there are: what is built on them is there by then.
fn examined(then: Job) {
    unsafe extern "C" fn done(then: *mut c_void) {
        // SAFETY: the box of below.
        let then = unsafe { Box::from_raw(then.cast::<Job>()) };
        if let Some(core) = manager_core() {
            core.send(*then);
        }
    }
    let then = Box::into_raw(Box::new(then));
    // SAFETY: on the application's thread; the callback takes the box back.
    let result = unsafe { sys::spdk_bdev_wait_for_examine(Some(done), then.cast()) };
    if result != 0 {
        // No memory to wait with: what is built on the volume comes a moment after the answer.
        // SAFETY: refused, so the callback will not come.
        unsafe { done(then.cast()) };
    }
}

/// Sends hosts away first, so that none meets a node that has stopped serving; then what is built on the volume.
pub fn demote(state: &mut State, volume: u32, reply: Reply) {
    match state.node.control(volume) {
        Some(control) if control.is_demoting => {
            reply.fail(refusal::being_demoted(&control.create.name));
        }
        Some(control) => {
            control.is_demoting = true;
            ana::settle(state, volume, move |state| {
                let order = move |state: &mut State| match state.node.control(volume) {
                    Some(control) if control.deleting => {
                        reply.fail(refusal::being_deleted(&control.create.name));
                    }
                    _ => give_order(state, volume, Order::Demote, Pending::Demote(reply)),
                };
                match state.node.control(volume) {
                    Some(control) if control.create.register == Register::OnPromote => {
                        unregister_volume(state, volume, order);
                    }
                    _ => order(state),
                }
            });
        }
        None => reply.fail(refusal::gone()),
    }
}

/// The order to demote has ended. If it was refused, this node serves as before, and the poller tells.
pub fn demoted(state: &mut State, volume: u32, outcome: Result<(), RpcError>, reply: Reply) {
    let is_primary = state.is_primary(volume);
    if let Some(control) = state.node.control(volume) {
        control.is_demoting = false;
        control.ana.changed();
        if is_primary && let Err(error) = register_if_missing(control) {
            tracing::error!("{}", error.message);
        }
    }
    reply.answer(outcome.map(|()| true.into()));
}
