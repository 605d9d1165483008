//! The ANA state of the subsystems that the user has named follows the role, so that a host's multipath follows the
//! Primary. Called on core 0 around changes of role, and by the poller: listeners appear later than their volume. This
//! target keeps one state a namespace, whose number is also that of its group: all listeners of a subsystem tell the same.

use super::super::core::Core;
use super::super::nvme_tcp::target::{AnaState, ListenerAddress};
use super::super::target;
use super::control::Control;
use crate::rpc::volume::{AnaListener, Transport};

/// Between two looks at the listeners of a volume.
const LOOK_NS: u64 = 50_000_000;

/// What is known of the listeners of a volume.
#[derive(Default)]
pub(super) struct Listeners {
    next_look_ns: u64,
    /// Those of which it was said that they cannot be told.
    refused: Vec<AnaListener>,
}

/// With each call of the manager's poller.
pub(super) fn poll(core: &mut Core, volume: u32) {
    let now_ns = core.reactor.now_ns();
    let control = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume);
    if let Some(control) = control
        && !control.create.ana_listeners.is_empty()
        && now_ns >= control.ana.next_look_ns
    {
        control.ana.next_look_ns = now_ns + LOOK_NS;
        tell(core, volume);
    }
}

/// Has the listeners that are there tell the role.
pub(super) fn tell(core: &mut Core, volume: u32) {
    let manager = core
        .volumes
        .get_mut(volume)
        .and_then(|this| this.manager.as_ref());
    let is_primary = manager.is_some_and(|manager| manager.is_primary());
    let Some(control) = core
        .volumes
        .controls
        .iter_mut()
        .find(|control| control.volume == volume)
    else {
        return;
    };
    let wanted = if is_primary && !control.deleting && !control.is_demoting {
        AnaState::Optimized
    } else {
        AnaState::Inaccessible
    };
    let volume_bdev = core.registry.find(&control.create.name);
    let handle = volume_bdev.map(|entry| target::namespace_handle(entry.id));
    let mut is_changed = false;
    let mut state = core.target.state();
    let Control { create, ana, .. } = control;
    for listener in &create.ana_listeners {
        let AnaListener { nqn, address, .. } = listener;
        if listener.transport != Transport::Tcp {
            refuse(ana, listener, "this target speaks TCP only");
            continue;
        }
        let at = ListenerAddress::tcp(&address.traddr.to_string(), &address.trsvcid.to_string());
        let found = state.namespace_at(nqn, &at, |namespace| match listener.anagrpid {
            Some(group) => namespace.nsid == group,
            None => Some(namespace.handle) == handle,
        });
        match found {
            Some((_, false)) => {
                refuse(
                    ana,
                    listener,
                    "the subsystem must be created with ana_reporting",
                );
            }
            Some((namespace, true)) if namespace.ana_state != wanted => {
                is_changed |= state.set_ana_state(nqn, namespace.nsid, wanted).is_ok();
                tracing::info!("hosts at {address} of {nqn} are told: {wanted:?}");
            }
            _ => {}
        }
    }
    drop(state);
    if is_changed {
        target::changed(core);
    }
}

fn refuse(ana: &mut Listeners, listener: &AnaListener, why: &str) {
    if !ana.refused.contains(listener) {
        let AnaListener { nqn, address, .. } = listener;
        tracing::error!("hosts at {address} of {nqn} are not told the role: {why}");
        ana.refused.push(listener.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};

    use super::super::super::message::Answer;
    use super::super::super::node::{CoreMask, Node, NodeOptions};
    use super::super::super::nvme_tcp::target::{NamespaceParameters, SubsystemParameters};
    use super::super::super::registry;
    use super::*;
    use crate::rpc::Reply;
    use crate::rpc::volume::VolumeRequest;

    const NQN: &str = "nqn.2025-01.io.bdev-repl:test";

    fn on_core_0(node: &Node, work: impl FnOnce(&mut Core) + Send + 'static) {
        let done = |core: &mut Core, answer: Answer<()>| {
            work(core);
            answer.send(());
        };
        node.handle().ask(0, done).unwrap();
    }

    /// Calls a volume method of the volume `v` and waits for its answer.
    fn call(node: &Node, method: &'static str, mut params: Value) {
        params["name"] = json!("v");
        let request = VolumeRequest::parse(method, Some(params)).unwrap();
        let (sender, receiver) = mpsc::channel();
        let reply = Reply::new(move |outcome| sender.send(outcome).unwrap());
        on_core_0(node, |core| super::super::request(core, request, reply));
        receiver.recv().unwrap().unwrap();
    }

    fn listener(more: Value) -> Value {
        let mut listener = json!({"nqn": NQN, "traddr": "127.0.0.1", "trsvcid": 4420});
        for (name, value) in more.as_object().unwrap() {
            listener[name] = value.clone();
        }
        listener
    }

    fn states(node: &Node) -> Vec<(u32, AnaState)> {
        node.handle()
            .ask(0, |core, answer: Answer<_>| {
                let all = core.target.state().subsystems();
                let namespaces = all.iter().find(|one| one.parameters.nqn == NQN);
                let states = namespaces.unwrap().namespaces.iter();
                answer.send(states.map(|one| (one.nsid, one.ana_state)).collect());
            })
            .unwrap()
    }

    fn wait_for(node: &Node, wanted: &[(u32, AnaState)]) {
        let started = Instant::now();
        while states(node) != wanted {
            assert!(
                started.elapsed() < Duration::from_secs(30),
                "{:?}",
                states(node)
            );
            std::thread::yield_now();
        }
    }

    fn namespace(core: &mut Core, nsid: u32, bdev: &str) {
        let id = core.registry.find(bdev).unwrap().id;
        let parameters = NamespaceParameters {
            nsid: Some(nsid),
            handle: target::namespace_handle(id),
            block_size: 4096,
            size_blocks: 8,
            nguid: [0; 16],
            uuid: [0; 16],
            eui64: [0; 8],
            vendor_only: false,
        };
        core.target.state().add_namespace(NQN, parameters).unwrap();
    }

    #[test]
    fn a_listener_tells_the_role_of_its_volume_and_of_no_other_namespace() {
        let options = NodeOptions {
            core_mask: CoreMask::first(1),
            handle_signals: false,
        };
        let node = Node::start(&options, |_| {}).unwrap();
        for name in ["disk", "other"] {
            node.handle()
                .ask(0, move |core, answer: Answer<_>| {
                    registry::create_malloc(core, name, 8192, 4096, None, |_, result| {
                        answer.send(result.map(|_| ()));
                    });
                })
                .unwrap()
                .unwrap();
        }
        let create = json!({
            "node_id": 0, "base_bdev": "disk", "assume_clean": true,
            "ana_listeners": [listener(json!({}))],
        });
        call(&node, "bdev_repl_create", create);
        on_core_0(&node, |core| {
            let mut state = core.target.state();
            let mut parameters = SubsystemParameters::new(NQN);
            parameters.ana_reporting = true;
            state.create_subsystem(parameters).unwrap();
            drop(state);
            namespace(core, 1, "other");
            namespace(core, 2, "v");
        });
        use AnaState::{Inaccessible, Optimized};
        assert_eq!(states(&node), [(1, Optimized), (2, Optimized)]);
        on_core_0(&node, |core| {
            let at = ListenerAddress::tcp("127.0.0.1", "4420");
            core.target.state().add_listener(NQN, at).unwrap();
        });
        wait_for(&node, &[(1, Optimized), (2, Inaccessible)]);
        call(&node, "bdev_repl_promote", json!({}));
        assert_eq!(states(&node), [(1, Optimized), (2, Optimized)]);
        call(&node, "bdev_repl_demote", json!({}));
        assert_eq!(states(&node), [(1, Optimized), (2, Inaccessible)]);
        let named = json!({"ana_listeners": [listener(json!({"anagrpid": 1}))]});
        call(&node, "bdev_repl_set_options", named);
        wait_for(&node, &[(1, Inaccessible), (2, Inaccessible)]);
        node.shutdown().unwrap();
    }
}
