//! Volumes that wait for their backing bdev, on core 0: made when it appears, and asked then what they were asked
//! meanwhile. Called with each round of the loop, and by `opening` for what is not there.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::super::core::Core;
use super::control::request;
use super::opening::create_awaited;
use crate::hosts::control::awaited::{AwaitedVolumes, logged};
use crate::rpc::volume::CreateVolume;
use crate::rpc::{Reply, RpcError};

/// How the making of a volume has ended: its name, and why it was not made.
type Ended = (String, Result<(), RpcError>);

pub(super) struct Awaited {
    pub(super) volumes: AwaitedVolumes,
    ended: (Sender<Ended>, Receiver<Ended>),
}

impl Default for Awaited {
    fn default() -> Self {
        Self {
            volumes: AwaitedVolumes::default(),
            ended: channel(),
        }
    }
}

/// Accepts a volume whose backing bdev is not there, as SPDK's own layers do.
pub(super) fn defer(core: &mut Core, create: CreateVolume, reply: Reply) {
    let name = create.name.clone();
    let deferred = core.volumes.awaited.volumes.defer(create);
    reply.answer(deferred.map(|()| name.into()));
}

pub(super) fn poll(core: &mut Core) {
    if core.volumes.awaited.volumes.is_empty() {
        return;
    }
    while let Ok((name, outcome)) = core.volumes.awaited.ended.1.try_recv() {
        made(core, &name, outcome);
    }
    while let Some(create) = next(core) {
        let name = create.name.clone();
        let ended = core.volumes.awaited.ended.0.clone();
        let reply = Reply::new(move |outcome| {
            // Nobody asks any more when the node has gone.
            let _ = ended.send((name, outcome.map(|_| ())));
        });
        create_awaited(core, create, reply);
    }
}

fn next(core: &mut Core) -> Option<CreateVolume> {
    let registry = &core.registry;
    let is_there = |base: &str| registry.find(base).is_some();
    core.volumes.awaited.volumes.due(is_there)
}

fn made(core: &mut Core, name: &str, outcome: Result<(), RpcError>) {
    for asked in core.volumes.awaited.volumes.ended(name, outcome) {
        let reply = logged(name);
        request(core, asked, reply);
    }
}

/// Whether a volume whose backing bdev has appeared is still on its way.
pub fn is_making(core: &mut Core) -> bool {
    poll(core);
    core.volumes.awaited.volumes.is_making_on(|_| true)
}
