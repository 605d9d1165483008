//! JSON-RPC of the embedded host: its socket, and the methods that SPDK has and users need here too,
//! with SPDK's names, parameters, answers and codes. Calls run on core 0. Volume methods are
//! `crate::rpc`'s; the I/O path knows nothing of what is here.

mod app;
mod bdev;
pub mod config;
pub mod log;
mod nvme;
mod nvmf;
pub mod socket;
#[cfg(test)]
mod tests;
mod volumes;

use std::collections::BTreeSet;
use std::sync::mpsc::Sender;

use serde_json::Value;

use super::core::Core;
use super::message::NodeHandle;
use super::registry::BdevError;
use crate::rpc::parameters::Parameters;
use crate::rpc::{Reply, RpcError, volume};

/// What the control path remembers between calls; used on core 0 only.
#[derive(Default)]
pub struct Control {
    /// The framework has been started: methods that need bdevs may be called.
    started: bool,
    /// Its configuration has been loaded.
    ready: bool,
    /// Whoever starts the framework when `framework_start_init` asks for it.
    starter: Option<Sender<Reply>>,
    /// Answered when the configuration has been loaded.
    waiting: Vec<Reply>,
    /// Methods of options without a meaning here that have been warned of.
    warned: BTreeSet<String>,
    /// `nvmf_create_transport` has been called.
    has_transport: bool,
    /// NQNs of the subsystems that `nvmf_create_subsystem` has made; the others are the volumes'.
    subsystems: BTreeSet<String>,
}

/// When a method may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before `framework_start_init` only.
    Startup,
    /// After it only.
    Runtime,
    Always,
}

/// Whether a method takes parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Nothing,
    Parameters,
}

struct Method {
    name: &'static str,
    when: When,
    takes: Takes,
    run: fn(&mut Core, Parameters, Reply),
}

const fn method(
    name: &'static str,
    when: When,
    takes: Takes,
    run: fn(&mut Core, Parameters, Reply),
) -> Method {
    Method {
        name,
        when,
        takes,
        run,
    }
}

/// The tables of SPDK's methods.
const TABLES: &[&[Method]] = &[app::METHODS, bdev::METHODS, nvme::METHODS, nvmf::METHODS];

/// Options of SPDK that a saved configuration holds and that mean nothing here: accepted, with one warning
/// each, so that such a configuration loads.
const OPTIONS_WITHOUT_MEANING: &[&str] = &[
    "accel_set_options",
    "bdev_iscsi_set_options",
    "bdev_nvme_set_hotplug",
    "bdev_nvme_set_options",
    "bdev_raid_set_options",
    "bdev_set_options",
    "framework_set_scheduler",
    "fsdev_set_opts",
    "iobuf_set_options",
    "iscsi_set_options",
    "nvmf_set_config",
    "nvmf_set_crdt",
    "nvmf_set_max_subsystems",
    "scheduler_set_options",
    "sock_impl_set_options",
    "sock_set_default_impl",
    "vhost_controller_set_coalescing",
    "vmd_enable",
];

/// Hands each call to core 0: what the RPC socket and the loader of configurations do with a call.
pub fn handler(node: NodeHandle) -> impl Fn(String, Option<Value>, Reply) + Send + Clone {
    move |method, params, reply| {
        // A node that is gone drops the call, and with it the reply, which answers so.
        let _ = node.call(0, move |core| dispatch(core, &method, params, reply));
    }
}

/// Carries a call out; on core 0.
pub fn dispatch(core: &mut Core, method: &str, params: Option<Value>, reply: Reply) {
    let started = core.control.started;
    if OPTIONS_WITHOUT_MEANING.contains(&method) {
        if core.control.warned.insert(method.to_owned()) {
            tracing::warn!("{method} is accepted and has no effect on the embedded host");
        }
        return reply.ok(true);
    }
    if let Some(found) = TABLES
        .iter()
        .copied()
        .flatten()
        .find(|found| found.name == method)
    {
        if let Err(error) = check_state(found.when, started) {
            return reply.fail(error);
        }
        if found.takes == Takes::Nothing && params.is_some() {
            let text = format!("{method} requires no parameters");
            return reply.fail(RpcError::new(RpcError::INVALID_PARAMETERS, text));
        }
        return match Parameters::new(method, params) {
            Ok(parameters) => (found.run)(core, parameters, reply),
            Err(error) => reply.fail(error),
        };
    }
    if volume::METHODS.contains(&method) {
        if let Err(error) = check_state(When::Runtime, started) {
            return reply.fail(error);
        }
    }
    if let Some(reply) = volume::call(core, method, params, reply) {
        reply.fail(RpcError::method_not_found(method));
    }
}

fn check_state(when: When, started: bool) -> Result<(), RpcError> {
    match (when, started) {
        (When::Runtime, false) => Err(RpcError::new(
            RpcError::INVALID_STATE,
            "the framework is not started yet: call framework_start_init first",
        )),
        (When::Startup, true) => Err(RpcError::new(
            RpcError::INVALID_STATE,
            "the framework is started already: start the target with --wait-for-rpc to call this before",
        )),
        _ => Ok(()),
    }
}

/// Names of the methods, those that may be called now only if `current`.
fn method_names(core: &Core, current: bool) -> Vec<&'static str> {
    let now = |when: When| !current || check_state(when, core.control.started).is_ok();
    let mut names: Vec<&str> = TABLES
        .iter()
        .copied()
        .flatten()
        .filter(|method| now(method.when))
        .map(|method| method.name)
        .collect();
    names.extend(OPTIONS_WITHOUT_MEANING);
    if now(When::Runtime) {
        names.extend(volume::METHODS);
    }
    names.sort_unstable();
    names
}

impl Control {
    /// `framework_start_init` hands its reply to `starter`, which starts the framework and answers.
    pub fn set_starter(&mut self, starter: Sender<Reply>) {
        self.starter = Some(starter);
    }

    /// Every method may be called from now on, by the configuration first of all.
    pub fn start(&mut self) {
        self.started = true;
    }

    /// The configuration has been loaded: who waits for that hears so.
    pub fn set_ready(&mut self) {
        self.ready = true;
        for reply in self.waiting.drain(..) {
            reply.ok(true);
        }
    }
}

/// A bdev error as the call's answer, with the method named.
fn bdev_error(method: &str, error: BdevError) -> RpcError {
    RpcError::new(error.code, format!("{method}: {}", error.message))
}
