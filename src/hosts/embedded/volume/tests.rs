//! Requests that meet while one of them is under way: whatever comes first, all are answered, and a backing bdev is claimed
//! only by a volume that there is.

use std::fs::File;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::disk::FileParameters;
use super::super::message::{Answer, Message};
use super::super::node::{CoreMask, Node, NodeOptions};
use super::super::registry::{self, FileFlavour};
use super::*;
use crate::hosts::control::refusal;
use crate::rpc::volume::VolumeRequest;
use crate::rpc::{Reply, RpcError};

type Outcome = Result<Value, RpcError>;

/// Between a moment and the second request are so many trips to another core and back.
const TRIPS_MAX: u32 = 16;

/// What the second request waits for.
type Moment = fn(&CoreVolumes) -> bool;

struct Host {
    node: Option<Node>,
    folder: tempfile::TempDir,
}

impl Host {
    /// A node with two files as bdevs.
    fn new() -> Host {
        let options = NodeOptions {
            core_mask: CoreMask::first(2),
            handle_signals: false,
        };
        let node = Node::start(&options, |_| {}).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for name in ["first", "second"] {
            let path = folder.path().join(name);
            File::create(&path).unwrap().set_len(16 << 20).unwrap();
            let parameters = FileParameters {
                path,
                block_size: 512,
                read_only: false,
            };
            node.handle()
                .ask(0, move |core, answer: Answer<_>| {
                    let made = move |_: &mut Core, id: Result<_, _>| answer.send(id.is_ok());
                    registry::create_file(core, name, FileFlavour::Uring, parameters, None, made);
                })
                .unwrap();
        }
        Host {
            node: Some(node),
            folder,
        }
    }

    fn node(&self) -> &Node {
        self.node.as_ref().unwrap()
    }

    /// Asks this, and that so many trips after the moment.
    fn ask(
        &self,
        first: (&str, Value),
        moment: Moment,
        trips: u32,
        second: (&str, Value),
    ) -> [Outcome; 2] {
        let (second, outcome) = prepared(second);
        [
            self.ask_and(first, moment, trips, second),
            answered(outcome),
        ]
    }

    /// Asks this, and calls that so many trips after the moment.
    fn ask_and(&self, asked: (&str, Value), moment: Moment, trips: u32, then: Call) -> Outcome {
        let (asked, outcome) = prepared(asked);
        let ask = move |core: &mut Core| {
            asked(core);
            at(core, moment, trips, then);
        };
        self.node().handle().call(0, ask).unwrap();
        answered(outcome)
    }

    fn call(&self, method: &str, params: Value) -> Outcome {
        let (call, outcome) = prepared((method, params));
        self.node().handle().call(0, call).unwrap();
        answered(outcome)
    }

    /// As a snapshot of the one is.
    fn copy_first_to_second(&self) {
        let path = |name: &str| self.folder.path().join(name);
        std::fs::copy(path("first"), path("second")).unwrap();
    }

    fn is_claimed(&self, name: &'static str) -> bool {
        let look = move |core: &mut Core| {
            let entry = core.registry.find(name);
            entry.is_some_and(|entry| entry.claimed_by.is_some())
        };
        self.node().handle().run(0, look).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            let ended = node.shutdown();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

type Call = Box<dyn FnOnce(&mut Core) + Send>;

/// A request to be made on core 0, and where its outcome arrives.
fn prepared((method, params): (&str, Value)) -> (Call, Receiver<Outcome>) {
    let asked = VolumeRequest::parse(method, Some(params)).unwrap();
    let (sender, receiver) = channel();
    let reply = Reply::new(move |outcome| {
        // The test may have given up.
        let _ = sender.send(outcome);
    });
    (Box::new(move |core| request(core, asked, reply)), receiver)
}

fn answered(outcome: Receiver<Outcome>) -> Outcome {
    outcome
        .recv_timeout(Duration::from_secs(20))
        .expect("an answer")
}

fn at(core: &mut Core, moment: Moment, trips: u32, call: Call) {
    if !moment(&core.volumes) {
        let again = move |core: &mut Core| at(core, moment, trips, call);
        return core.send(0, Message::Call(Box::new(again)));
    }
    if trips == 0 {
        return call(core);
    }
    let back = move |core: &mut Core| {
        let again = move |core: &mut Core| at(core, |_| true, trips - 1, call);
        core.send(0, Message::Call(Box::new(again)));
    };
    core.send(1, Message::Call(Box::new(back)));
}

fn create() -> Value {
    json!({"name": "v", "base_bdev": "first", "node_id": 0})
}

fn volume() -> Value {
    json!({"name": "v"})
}

const AT_ONCE: Moment = |_| true;
const IS_THERE: Moment = |volumes| !volumes.controls.is_empty();
const HAS_BASE: Moment = |volumes| volumes.controls.iter().any(|own| own.base.is_some());

#[test]
fn a_device_is_free_when_its_volume_is_deleted_while_it_is_attached() {
    let host = Host::new();
    for moment in [AT_ONCE, HAS_BASE] {
        for trips in 0..TRIPS_MAX {
            host.call("bdev_repl_create", create()).unwrap();
            host.call("bdev_repl_detach", volume()).unwrap();
            let attach = json!({"name": "v", "base_bdev": "first"});
            let attach = ("bdev_repl_attach", attach);
            let delete = ("bdev_repl_delete", volume());
            let outcomes = host.ask(attach, moment, trips, delete);
            assert_eq!(outcomes[1], Ok(json!(true)), "{trips} trips");
            assert!(!host.is_claimed("first"), "{trips} trips: {outcomes:?}");
            if let Err(error) = &outcomes[0] {
                assert!(
                    !error.message.contains("target"),
                    "{trips} trips: {error:?}"
                );
            }
        }
    }
}

#[test]
fn a_volume_is_deleted_whole_or_not_while_it_is_made() {
    let host = Host::new();
    for moment in [AT_ONCE, IS_THERE, HAS_BASE] {
        for trips in 0..TRIPS_MAX {
            let delete = ("bdev_repl_delete", volume());
            let made = ("bdev_repl_create", create());
            let outcomes = host.ask(made, moment, trips, delete);
            let is_there = outcomes[1].is_err();
            // One that was made may be deleted then.
            assert!(outcomes[0].is_ok() || !is_there, "{outcomes:?}");
            assert_eq!(host.is_claimed("first"), is_there, "{outcomes:?}");
            if is_there {
                host.call("bdev_repl_delete", volume()).unwrap();
            }
            assert!(!host.is_claimed("first"), "{outcomes:?}");
        }
    }
}

#[test]
fn a_device_that_comes_when_its_volume_is_going_is_let_go() {
    let host = Host::new();
    host.call("bdev_repl_create", create()).unwrap();
    host.call("bdev_repl_detach", volume()).unwrap();
    let mark = |deleting: bool| -> Call {
        Box::new(move |core| core.volumes.controls[0].deleting = deleting)
    };
    // While the device is opened; and when it has been, before all cores and the manager have it.
    for moment in [AT_ONCE, HAS_BASE] {
        let attach = || {
            let params = json!({"name": "v", "base_bdev": "first"});
            ("bdev_repl_attach", params)
        };
        let outcome = host.ask_and(attach(), moment, 0, mark(true));
        assert_eq!(outcome, Err(refusal::being_deleted("v")));
        assert!(!host.is_claimed("first"));
        host.node().handle().call(0, mark(false)).unwrap();
        host.call("bdev_repl_attach", attach().1).unwrap();
        host.call("bdev_repl_detach", volume()).unwrap();
    }
}

#[test]
fn an_order_waits_for_a_volume_that_is_being_made() {
    let host = Host::new();
    for trips in 0..4 {
        let pause = ("bdev_repl_pause_resync", volume());
        let made = ("bdev_repl_create", create());
        let outcomes = host.ask(made, IS_THERE, trips, pause);
        assert_eq!(outcomes, [Ok("v".into()), Ok(true.into())]);
        host.call("bdev_repl_delete", volume()).unwrap();
    }
}

#[test]
fn of_two_devices_that_are_attached_at_once_a_volume_gets_one() {
    let host = Host::new();
    host.call("bdev_repl_create", create()).unwrap();
    host.call("bdev_repl_detach", volume()).unwrap();
    host.copy_first_to_second();
    for trips in 0..4 {
        let attach = |base: &str| ("bdev_repl_attach", json!({"name": "v", "base_bdev": base}));
        let outcomes = host.ask(attach("first"), AT_ONCE, trips, attach("second"));
        let attached = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(attached, 1, "{outcomes:?}");
        assert_ne!(host.is_claimed("first"), host.is_claimed("second"));
        host.call("bdev_repl_detach", volume()).unwrap();
    }
}
