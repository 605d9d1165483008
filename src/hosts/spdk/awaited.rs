//! Volumes that wait for their backing bdev, on core 0: made when it appears, and asked then what they were asked
//! meanwhile. Called by the examination of bdevs, by the poller, and by `opening` for what is not there.

use std::ffi::CString;

use super::core::{State, manager_core};
use super::{node, opening, sys};
use crate::hosts::control::awaited::{AwaitedVolumes, logged};
use crate::rpc::volume::CreateVolume;
use crate::rpc::{Reply, RpcError};

/// Between two looks for what SPDK does not let us examine, such as a bdev that gets an alias later.
const LOOK_NS: u64 = 50_000_000;

#[derive(Default)]
pub struct Awaited {
    pub volumes: AwaitedVolumes,
    next_look_ns: u64,
}

/// The name of the bdev that has this name, alias or UUID.
pub fn bdev_named(name: &str) -> Option<String> {
    let text = CString::new(name).ok()?;
    // SAFETY: the text lives during the call, on the application's thread, where bdevs come and go.
    unsafe {
        let bdev = sys::spdk_bdev_get_by_name(text.as_ptr());
        (!bdev.is_null()).then(|| sys::text(sys::spdk_bdev_get_name(bdev)))
    }
}

/// Accepts a volume whose backing bdev is not there, as SPDK's own layers do.
pub fn defer(state: &mut State, create: CreateVolume, reply: Reply) {
    let name = create.name.clone();
    reply.answer(
        state
            .node
            .awaited
            .volumes
            .defer(create)
            .map(|()| name.into()),
    );
}

/// With each round of the poller.
pub fn poll(state: &mut State) {
    let awaited = &mut state.node.awaited;
    let now_ns = super::context::now_ns();
    if awaited.volumes.is_empty() || now_ns < awaited.next_look_ns {
        return;
    }
    awaited.next_look_ns = now_ns + LOOK_NS;
    appeared(state);
}

/// Takes for their volumes what has appeared.
pub fn appeared(state: &mut State) {
    let is_there = |base: &str| bdev_named(base).is_some();
    while let Some(create) = state.node.awaited.volumes.due(is_there) {
        let name = create.name.clone();
        let reply = Reply::new(move |outcome| {
            if let Some(core) = manager_core() {
                core.send(move |state| made(state, &name, outcome.map(|_| ())));
            }
        });
        opening::create_awaited(state, create, reply);
    }
}

fn made(state: &mut State, name: &str, outcome: Result<(), RpcError>) {
    for request in state.node.awaited.volumes.ended(name, outcome) {
        let reply = logged(name);
        node::request(state, request, reply);
    }
}

/// Answers when no volume is being made on this bdev any more.
pub fn when_made(state: &mut State, bdev: String, reply: Reply) {
    let is_it = |base: &str| bdev_named(base).is_some_and(|name| name == bdev);
    if state.node.awaited.volumes.is_making_on(is_it) {
        let again = move |state: &mut State| when_made(state, bdev, reply);
        return state.node.deferred.push(Box::new(again));
    }
    reply.ok(true);
}
