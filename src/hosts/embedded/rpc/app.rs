//! SPDK's methods of the application itself: versions, methods, start, reactors, log levels, signals.
//! In the table of `mod.rs`.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use super::Takes::{Nothing, Parameters as Named};
use super::When::{Always, Runtime, Startup};
use super::{Method, config, log, method, method_names};
use crate::hosts::embedded::core::Core;
use crate::rpc::parameters::Parameters;
use crate::rpc::{Reply, RpcError};

pub(super) const METHODS: &[Method] = &[
    method("rpc_get_methods", Always, Named, rpc_get_methods),
    method("spdk_get_version", Always, Nothing, spdk_get_version),
    method(
        "framework_start_init",
        Startup,
        Nothing,
        framework_start_init,
    ),
    method("framework_wait_init", Always, Nothing, framework_wait_init),
    method(
        "framework_get_reactors",
        Always,
        Nothing,
        framework_get_reactors,
    ),
    method(
        "framework_get_subsystems",
        Runtime,
        Nothing,
        framework_get_subsystems,
    ),
    method("framework_get_config", Runtime, Named, framework_get_config),
    method("log_set_print_level", Always, Named, log_set_level),
    method("log_get_print_level", Always, Nothing, log_get_level),
    method("log_set_level", Always, Named, log_set_level),
    method("log_get_level", Always, Nothing, log_get_level),
    method("spdk_kill_instance", Always, Named, spdk_kill_instance),
];

fn rpc_get_methods(core: &mut Core, mut all: Parameters, reply: Reply) {
    let names = || {
        let current = all.flag("current")?;
        // There are no deprecated names here.
        all.flag("include_aliases")?;
        Ok(json!(method_names(core, current)))
    };
    reply.answer(call(names));
}

/// Pins the type of a closure that uses `?`.
fn call(f: impl FnOnce() -> Result<Value, RpcError>) -> Result<Value, RpcError> {
    f()
}

fn spdk_get_version(_core: &mut Core, _all: Parameters, reply: Reply) {
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    reply.ok(json!({
        "version": concat!("bdev_repl v", env!("CARGO_PKG_VERSION"), " (embedded host)"),
        "fields": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "patch": number(env!("CARGO_PKG_VERSION_PATCH")),
            "suffix": env!("CARGO_PKG_VERSION_PRE"),
        },
    }));
}

fn framework_start_init(core: &mut Core, _all: Parameters, reply: Reply) {
    match core.control.starter.take() {
        // A starter that is gone drops the reply, which answers so.
        Some(starter) => drop(starter.send(reply)),
        None => reply.fail(RpcError::busy("the framework is being started already")),
    }
}

fn framework_wait_init(core: &mut Core, _all: Parameters, reply: Reply) {
    if core.control.ready {
        reply.ok(true);
    } else {
        core.control.waiting.push(reply);
    }
}

fn framework_get_reactors(core: &mut Core, _all: Parameters, reply: Reply) {
    let reactors: Arc<Mutex<Vec<(usize, Value)>>> = Arc::default();
    let collected = reactors.clone();
    let run = move |core: &mut Core| {
        let (busy, idle) = core.reactor.busy_and_idle_ns();
        // SAFETY: neither call takes memory.
        let (cpu, thread) = unsafe { (libc::sched_getcpu(), libc::gettid()) };
        let cpu = u64::try_from(cpu).unwrap_or(core.index as u64);
        let mut mask = vec!['0'; usize::try_from(cpu / 4 + 1).unwrap_or(1)];
        if let Some(digit) = mask.first_mut() {
            *digit = char::from_digit(1 << (cpu % 4), 16).unwrap_or('0');
        }
        let reactor = json!({
            "lcore": cpu,
            "numa_id": 0,
            "tid": thread,
            "busy": busy,
            "idle": idle,
            "in_interrupt": false,
            "irq": 0,
            "sys": 0,
            "usr": 0,
            "lw_threads": [{
                "name": format!("reactor_{cpu}"),
                "id": core.index + 1,
                "cpumask": mask.into_iter().collect::<String>(),
                "elapsed": busy.saturating_add(idle),
            }],
        });
        reactors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((core.index, reactor));
    };
    core.on_all_cores(run, move |_core| {
        let mut reactors =
            std::mem::take(&mut *collected.lock().unwrap_or_else(PoisonError::into_inner));
        reactors.sort_by_key(|(index, _)| *index);
        let reactors: Vec<Value> = reactors.into_iter().map(|(_, reactor)| reactor).collect();
        reply.ok(
            json!({"tick_rate": 1_000_000_000u64, "pid": std::process::id(), "reactors": reactors}),
        );
    });
}

fn framework_get_subsystems(_core: &mut Core, _all: Parameters, reply: Reply) {
    let subsystem =
        |(name, depends_on): &(&str, &[&str])| json!({"subsystem": name, "depends_on": depends_on});
    reply.ok(config::SUBSYSTEMS
        .iter()
        .map(subsystem)
        .collect::<Vec<Value>>());
}

fn framework_get_config(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(call(|| {
        let name = all.required_string("name")?;
        // There are no batches in what is written here.
        all.flag("with_batches")?;
        config::of_subsystem(core, &name).ok_or_else(|| {
            let text = format!("Subsystem '{name}' not found; framework_get_subsystems lists them");
            RpcError::new(RpcError::INVALID_PARAMETERS, text)
        })
    }));
}

fn log_set_level(_core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(call(|| {
        let level = all.required_string("level")?;
        if log::set_level(&level) {
            Ok(json!(true))
        } else {
            let text = format!(
                "level '{level}' is none of {}",
                log::LEVELS.map(|(name, _)| name).join(", ")
            );
            Err(RpcError::parameters(text))
        }
    }));
}

fn log_get_level(_core: &mut Core, _all: Parameters, reply: Reply) {
    reply.ok(log::level());
}

fn spdk_kill_instance(_core: &mut Core, mut all: Parameters, reply: Reply) {
    const SIGNALS: [(&str, i32); 6] = [
        ("SIGINT", libc::SIGINT),
        ("SIGTERM", libc::SIGTERM),
        ("SIGQUIT", libc::SIGQUIT),
        ("SIGHUP", libc::SIGHUP),
        ("SIGKILL", libc::SIGKILL),
        ("SIGUSR1", libc::SIGUSR1),
    ];
    let signal = match all.take("sig_name") {
        Some(Value::String(name)) => SIGNALS.iter().find(|(known, _)| *known == name),
        Some(Value::Number(number)) => SIGNALS
            .iter()
            .find(|(_, known)| Some(i64::from(*known)) == number.as_i64()),
        Some(_) => None,
        None => return reply.fail(all.missing("sig_name")),
    };
    let Some((_, signal)) = signal else {
        let names = SIGNALS.map(|(name, _)| name).join(", ");
        let text = format!("spdk_kill_instance: sig_name must be one of {names}");
        return reply.fail(RpcError::new(RpcError::INVALID_PARAMETERS, text));
    };
    reply.ok(true);
    // SAFETY: no memory is passed; the process signals itself.
    unsafe { libc::kill(libc::getpid(), *signal) };
}
