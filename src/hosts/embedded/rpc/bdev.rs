//! SPDK's methods of bdevs: memory, files, and what is asked of all of them.
//! In the table of `mod.rs`; carried out by the registry.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};

use super::Takes::{Nothing, Parameters as Named};
use super::When::Runtime;
use super::{Method, bdev_error, method};
use crate::hosts::embedded::bdev::{BdevId, IoStat, OperationStat};
use crate::hosts::embedded::core::Core;
use crate::hosts::embedded::disk::FileParameters;
use crate::hosts::embedded::registry::{self, BdevEntry, BdevError, BdevOrigin, FileFlavour};
use crate::hosts::embedded::volume;
use crate::rpc::parameters::Parameters;
use crate::rpc::{Reply, RpcError};

pub(super) const METHODS: &[Method] = &[
    method("bdev_malloc_create", Runtime, Named, bdev_malloc_create),
    method("bdev_malloc_delete", Runtime, Named, bdev_malloc_delete),
    method("bdev_aio_create", Runtime, Named, bdev_aio_create),
    method("bdev_aio_delete", Runtime, Named, bdev_aio_delete),
    method("bdev_uring_create", Runtime, Named, bdev_uring_create),
    method("bdev_uring_delete", Runtime, Named, bdev_uring_delete),
    method("bdev_get_bdevs", Runtime, Named, bdev_get_bdevs),
    method("bdev_get_iostat", Runtime, Named, bdev_get_iostat),
    method(
        "bdev_wait_for_examine",
        Runtime,
        Nothing,
        bdev_wait_for_examine,
    ),
];

/// How often `bdev_get_bdevs` with a timeout looks for the bdev.
const LOOK_INTERVAL_MS: u64 = 10;

/// Answers with the name that the bdev has got.
fn answer_name(
    reply: Reply,
    method: &'static str,
    name: String,
) -> impl FnOnce(&mut Core, Result<BdevId, BdevError>) + 'static {
    move |_core, result| {
        reply.answer(
            result
                .map(|_| json!(name))
                .map_err(|error| bdev_error(method, error)),
        )
    }
}

fn bdev_malloc_create(core: &mut Core, mut all: Parameters, reply: Reply) {
    let parsed = (|| {
        for name in ["md_size", "dif_type"] {
            if all.number(name, 0..=u64::MAX)?.unwrap_or(0) != 0 {
                return Err(RpcError::invalid(format!(
                    "bdev_malloc_create: {name} is not supported, only 0 is"
                )));
            }
        }
        let num_blocks = all.required_number("num_blocks", 0..=u64::MAX)?;
        let block_size = all.required_number("block_size", 0..=u64::from(u32::MAX))?;
        Ok((
            all.string("name")?,
            num_blocks,
            block_size,
            all.uuid("uuid")?,
        ))
    })();
    let (name, num_blocks, block_size, uuid) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return reply.fail(error),
    };
    let name = name.unwrap_or_else(|| free_name(core, "Malloc"));
    let block_size = u32::try_from(block_size).unwrap_or(u32::MAX);
    let then = answer_name(reply, "bdev_malloc_create", name.clone());
    registry::create_malloc(core, &name, num_blocks, block_size, uuid, then);
}

/// As SPDK names bdevs that were given no name: the lowest number that is free.
fn free_name(core: &Core, prefix: &str) -> String {
    (0u64..)
        .map(|number| format!("{prefix}{number}"))
        .find(|name| core.registry.find(name).is_none())
        .unwrap_or_else(|| prefix.to_owned())
}

fn bdev_aio_create(core: &mut Core, all: Parameters, reply: Reply) {
    create_file(core, all, reply, "bdev_aio_create", FileFlavour::Aio);
}

fn bdev_uring_create(core: &mut Core, all: Parameters, reply: Reply) {
    create_file(core, all, reply, "bdev_uring_create", FileFlavour::Uring);
}

fn create_file(
    core: &mut Core,
    mut all: Parameters,
    reply: Reply,
    method: &'static str,
    flavour: FileFlavour,
) {
    let parsed = (|| {
        let name = all.required_string("name")?;
        let parameters = FileParameters {
            path: PathBuf::from(all.required_string("filename")?),
            block_size: all.number_u32("block_size", 0..=u32::MAX)?.unwrap_or(0),
            read_only: all.flag("readonly")?,
        };
        Ok((name, parameters, all.uuid("uuid")?))
    })();
    match parsed {
        Ok((name, parameters, uuid)) => {
            let then = answer_name(reply, method, name.clone());
            registry::create_file(core, &name, flavour, parameters, uuid, then);
        }
        Err(error) => reply.fail(error),
    }
}

fn bdev_malloc_delete(core: &mut Core, all: Parameters, reply: Reply) {
    delete(core, all, reply, "bdev_malloc_delete", |origin| {
        matches!(origin, BdevOrigin::Malloc)
    });
}

fn bdev_aio_delete(core: &mut Core, all: Parameters, reply: Reply) {
    delete(core, all, reply, "bdev_aio_delete", |origin| {
        matches!(origin, BdevOrigin::Aio(_))
    });
}

fn bdev_uring_delete(core: &mut Core, all: Parameters, reply: Reply) {
    delete(core, all, reply, "bdev_uring_delete", |origin| {
        matches!(origin, BdevOrigin::Uring(_))
    });
}

/// Only a bdev of the method's own kind, as each SPDK module deletes only its own.
fn delete(
    core: &mut Core,
    mut all: Parameters,
    reply: Reply,
    method: &'static str,
    ours: fn(&BdevOrigin) -> bool,
) {
    let name = match all.required_string("name") {
        Ok(name) => name,
        Err(error) => return reply.fail(error),
    };
    let entry = core.registry.find(&name);
    if !entry.is_some_and(|entry| ours(&entry.origin)) {
        return reply.fail(RpcError::no_device(format!(
            "{method}: there is no such bdev '{name}'"
        )));
    }
    registry::delete(core, &name, move |_core, result| {
        reply.answer(
            result
                .map(|()| json!(true))
                .map_err(|error| bdev_error(method, error)),
        );
    });
}

fn bdev_get_bdevs(core: &mut Core, mut all: Parameters, reply: Reply) {
    let parsed = (|| {
        Ok((
            all.string("name")?,
            all.number("timeout", 0..=u64::from(u32::MAX))?.unwrap_or(0),
        ))
    })();
    match parsed {
        // There is nothing to wait for without a name.
        Ok((None, _)) => {
            let bdevs: Vec<Value> = core.registry.iter().map(description).collect();
            reply.ok(bdevs);
        }
        Ok((Some(name), timeout_ms)) => {
            let give_up_ns = core
                .reactor
                .now_ns()
                .saturating_add(timeout_ms.saturating_mul(1_000_000));
            look_for(core, name, (timeout_ms, give_up_ns), reply);
        }
        Err(error) => reply.fail(error),
    }
}

/// `patience` is how long in ms, and until when in ns.
fn look_for(core: &mut Core, name: String, patience: (u64, u64), reply: Reply) {
    if let Some(entry) = core.registry.find(&name) {
        return reply.ok(vec![description(entry)]);
    }
    let (timeout_ms, give_up_ns) = patience;
    if core.reactor.now_ns() >= give_up_ns {
        let error = match timeout_ms {
            0 => RpcError::no_device(format!("bdev_get_bdevs: there is no bdev '{name}'")),
            _ => RpcError::errno(
                libc::ETIMEDOUT,
                format!("bdev_get_bdevs: no bdev '{name}' has come in {timeout_ms} ms"),
            ),
        };
        return reply.fail(error);
    }
    core.after(LOOK_INTERVAL_MS, move |core| {
        look_for(core, name, patience, reply)
    });
}

/// A bdev as SPDK's `bdev_get_bdevs` describes it.
fn description(entry: &BdevEntry) -> Value {
    // SPDK gives every bdev its UUID as a second name.
    let mut aliases = entry.aliases.clone();
    let uuid = entry.uuid.to_string();
    if !aliases.contains(&uuid) {
        aliases.push(uuid);
    }
    let mut described = json!({
        "name": entry.name,
        "aliases": aliases,
        "product_name": entry.origin.product_name(),
        "block_size": entry.block_size,
        "num_blocks": entry.num_blocks,
        "preferred_write_alignment": 0,
        "preferred_write_granularity": 0,
        "optimal_write_size": 0,
        "preferred_unmap_alignment": 0,
        "preferred_unmap_granularity": 0,
        "uuid": entry.uuid,
        "assigned_rate_limits": {
            "rw_ios_per_sec": 0,
            "rw_mbytes_per_sec": 0,
            "r_mbytes_per_sec": 0,
            "w_mbytes_per_sec": 0,
        },
        "claimed": entry.claimed_by.is_some(),
        "zoned": false,
        "supported_io_types": supported_io_types(&entry.origin),
        "driver_specific": driver_specific(&entry.origin),
    });
    if entry.claimed_by.is_some() {
        described["claim_type"] = json!("exclusive_write");
    }
    described
}

fn supported_io_types(origin: &BdevOrigin) -> Value {
    const ALL: [&str; 22] = [
        "read",
        "write",
        "unmap",
        "flush",
        "reset",
        "nvme_admin",
        "nvme_io",
        "nvme_io_md",
        "write_zeroes",
        "zcopy",
        "get_zone_info",
        "zone_management",
        "zone_append",
        "compare",
        "compare_and_write",
        "abort",
        "seek_hole",
        "seek_data",
        "copy",
        "nvme_iov_md",
        "nvme_nssr",
        "write_uncorrectable",
    ];
    let supported = |name: &str| match origin {
        BdevOrigin::Aio(FileParameters {
            read_only: true, ..
        })
        | BdevOrigin::Uring(FileParameters {
            read_only: true, ..
        }) => matches!(name, "read" | "flush"),
        BdevOrigin::Endpoint => name == "nvme_io",
        _ => matches!(name, "read" | "write" | "unmap" | "flush" | "write_zeroes"),
    };
    ALL.iter()
        .map(|name| ((*name).to_owned(), json!(supported(name))))
        .collect::<Map<String, Value>>()
        .into()
}

fn driver_specific(origin: &BdevOrigin) -> Value {
    match origin {
        BdevOrigin::Malloc => json!({}),
        BdevOrigin::Aio(file) => json!({"aio": {
            "filename": file.path,
            "block_size_override": file.block_size != 0,
            "readonly": file.read_only,
            "fallocate": true,
        }}),
        BdevOrigin::Uring(file) => json!({"uring": {"filename": file.path}}),
        BdevOrigin::Nvme {
            controller,
            namespace_id,
        } => {
            json!({"nvme": [{"ctrlr_name": controller, "ns_data": {"id": namespace_id}}]})
        }
        BdevOrigin::Volume => json!({"bdev_repl": {"port": "application"}}),
        BdevOrigin::Endpoint => json!({"bdev_repl": {"port": "peers"}}),
    }
}

/// What `bdev_get_iostat` sets back after it has looked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reset {
    Nothing,
    Everything,
    Latencies,
    Errors,
}

/// Counters of one core: its index, and one entry a bdev asked for.
type CoreCounters = (usize, Vec<IoStat>);

fn bdev_get_iostat(core: &mut Core, mut all: Parameters, reply: Reply) {
    let parsed = (|| {
        let mut names = all.strings("names")?.unwrap_or_default();
        names.extend(all.string("name")?);
        let reset = match all.string("reset_mode")?.as_deref() {
            None | Some("none") => Reset::Nothing,
            Some("all") => Reset::Everything,
            Some("maxmin") => Reset::Latencies,
            Some("error") => Reset::Errors,
            Some(other) => {
                let text = format!(
                    "bdev_get_iostat: reset_mode '{other}' is none of all, maxmin, error, none"
                );
                return Err(RpcError::parameters(text));
            }
        };
        let per_channel = all.flag("per_channel")?;
        if per_channel && names.len() != 1 {
            return Err(RpcError::invalid(
                "bdev_get_iostat: per_channel needs the name of one bdev",
            ));
        }
        Ok((names, per_channel, reset))
    })();
    let (names, per_channel, reset) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return reply.fail(error),
    };
    let mut bdevs: Vec<(BdevId, String)> = Vec::new();
    if names.is_empty() {
        bdevs.extend(
            core.registry
                .iter()
                .map(|entry| (entry.id, entry.name.clone())),
        );
    }
    for name in names {
        let Some(entry) = core.registry.find(&name) else {
            return reply.fail(RpcError::no_device(format!(
                "bdev_get_iostat: there is no bdev '{name}'"
            )));
        };
        bdevs.push((entry.id, entry.name.clone()));
    }
    let counters: Arc<Mutex<Vec<CoreCounters>>> = Arc::default();
    let collected = counters.clone();
    let ids: Vec<BdevId> = bdevs.iter().map(|(id, _)| *id).collect();
    let run = move |core: &mut Core| {
        let mut of_core = Vec::with_capacity(ids.len());
        for id in &ids {
            let Some(bdev) = core.bdevs.get_mut(*id) else {
                of_core.push(IoStat::default());
                continue;
            };
            of_core.push(bdev.stat);
            match reset {
                Reset::Nothing => {}
                Reset::Everything => bdev.stat = IoStat::default(),
                Reset::Latencies => bdev.stat.reset_latency_ranges(),
                Reset::Errors => bdev.stat.num_failed_ops = 0,
            }
        }
        counters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((core.index, of_core));
    };
    core.on_all_cores(run, move |core| {
        let mut counters =
            std::mem::take(&mut *collected.lock().unwrap_or_else(PoisonError::into_inner));
        counters.sort_by_key(|(index, _)| *index);
        let head = json!({"tick_rate": IoStat::TICK_RATE, "ticks": core.reactor.now_ns()});
        reply.ok(iostat_answer(head, &bdevs, &counters, per_channel));
    });
}

fn iostat_answer(
    mut answer: Value,
    bdevs: &[(BdevId, String)],
    counters: &[CoreCounters],
    per_channel: bool,
) -> Value {
    if per_channel {
        answer["name"] = json!(bdevs.first().map(|(_, name)| name));
        let channel = |(index, stats): &CoreCounters| {
            let mut entry = json!({"thread_id": index + 1});
            merge(
                &mut entry,
                iostat(&stats.first().copied().unwrap_or_default()),
            );
            entry
        };
        answer["channels"] = counters.iter().map(channel).collect();
        return answer;
    }
    let entry = |(position, (_, name)): (usize, &(BdevId, String))| {
        let mut sum = IoStat::default();
        for stat in counters.iter().filter_map(|(_, stats)| stats.get(position)) {
            sum.add(stat);
        }
        let mut entry = json!({"name": name});
        merge(&mut entry, iostat(&sum));
        entry
    };
    answer["bdevs"] = bdevs.iter().enumerate().map(entry).collect();
    answer
}

fn merge(into: &mut Value, other: Value) {
    if let (Value::Object(into), Value::Object(other)) = (into, other) {
        into.extend(other);
    }
}

/// Counters with SPDK's names; copies do not happen here.
fn iostat(stat: &IoStat) -> Value {
    let mut entry = Map::new();
    let operations = [
        ("read", "read", stat.read),
        ("write", "written", stat.write),
        ("unmap", "unmapped", stat.unmap),
        ("copy", "copied", OperationStat::default()),
    ];
    for (name, done, operation) in operations {
        entry.insert(format!("bytes_{done}"), json!(operation.bytes));
        entry.insert(format!("num_{name}_ops"), json!(operation.ops));
    }
    for (name, _, operation) in operations {
        let (shortest, longest) = operation.latency_range_ticks.unwrap_or_default();
        let ticks = [
            ("", operation.latency_ticks),
            ("max_", longest),
            ("min_", shortest),
        ];
        for (prefix, ticks) in ticks {
            entry.insert(format!("{prefix}{name}_latency_ticks"), json!(ticks));
        }
    }
    let mut errors = Map::new();
    if stat.num_failed_ops > 0 {
        errors.insert("failed".into(), json!(stat.num_failed_ops));
    }
    entry.insert("io_error".into(), errors.into());
    entry.into()
}

/// A bdev is ready when its creation is answered; a volume that has waited for it takes a moment more.
fn bdev_wait_for_examine(core: &mut Core, _all: Parameters, reply: Reply) {
    answer_when_made(core, reply);
}

fn answer_when_made(core: &mut Core, reply: Reply) {
    if volume::is_making(core) {
        core.after(LOOK_INTERVAL_MS, |core| answer_when_made(core, reply));
    } else {
        reply.ok(true);
    }
}
