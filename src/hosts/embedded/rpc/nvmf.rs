//! SPDK's methods of the NVMe-oF target: transport, subsystems, namespaces, listeners, hosts.
//! In the table of `mod.rs`; carried out by the target. Subsystems that volumes make for their peers are
//! shown here, and changed by the volumes only.

use serde_json::{Value, json};
use uuid::Uuid;

use super::Takes::Parameters as Named;
use super::When::Runtime;
use super::{Method, method};
use crate::hosts::embedded::core::Core;
use crate::hosts::embedded::nvme_tcp::command::DISCOVERY_NQN;
use crate::hosts::embedded::nvme_tcp::target::{
    ListenerAddress, Namespace, NamespaceParameters, SubsystemParameters, SubsystemSummary,
    TargetError, TargetOptions,
};
use crate::hosts::embedded::registry::BdevError;
use crate::hosts::embedded::target;
use crate::rpc::parameters::Parameters;
use crate::rpc::volume::AddressFamily;
use crate::rpc::{Reply, RpcError};

pub(super) const METHODS: &[Method] = &[
    method(
        "nvmf_create_transport",
        Runtime,
        Named,
        nvmf_create_transport,
    ),
    method("nvmf_get_transports", Runtime, Named, nvmf_get_transports),
    method(
        "nvmf_create_subsystem",
        Runtime,
        Named,
        nvmf_create_subsystem,
    ),
    method(
        "nvmf_delete_subsystem",
        Runtime,
        Named,
        nvmf_delete_subsystem,
    ),
    method("nvmf_get_subsystems", Runtime, Named, nvmf_get_subsystems),
    method(
        "nvmf_subsystem_add_ns",
        Runtime,
        Named,
        nvmf_subsystem_add_ns,
    ),
    method(
        "nvmf_subsystem_remove_ns",
        Runtime,
        Named,
        nvmf_subsystem_remove_ns,
    ),
    method(
        "nvmf_subsystem_add_listener",
        Runtime,
        Named,
        nvmf_subsystem_add_listener,
    ),
    method(
        "nvmf_subsystem_remove_listener",
        Runtime,
        Named,
        nvmf_subsystem_remove_listener,
    ),
    method(
        "nvmf_subsystem_get_listeners",
        Runtime,
        Named,
        nvmf_subsystem_get_listeners,
    ),
    method(
        "nvmf_subsystem_add_host",
        Runtime,
        Named,
        nvmf_subsystem_add_host,
    ),
    method(
        "nvmf_subsystem_remove_host",
        Runtime,
        Named,
        nvmf_subsystem_remove_host,
    ),
    method(
        "nvmf_subsystem_allow_any_host",
        Runtime,
        Named,
        nvmf_subsystem_allow_any_host,
    ),
];

type Answer = Result<Value, RpcError>;

/// SPDK's answer to whatever a method of the target cannot do with its parameters.
fn refused(method: &str, text: impl std::fmt::Display) -> RpcError {
    RpcError::new(RpcError::INVALID_PARAMETERS, format!("{method}: {text}"))
}

fn refused_by_target<'a>(all: &'a Parameters) -> impl Fn(TargetError) -> RpcError + 'a {
    |error| refused(all.method(), error)
}

fn transport_type(all: &mut Parameters) -> Result<(), RpcError> {
    let trtype = all.required_string("trtype")?;
    if trtype.eq_ignore_ascii_case("tcp") {
        Ok(())
    } else {
        Err(refused(
            all.method(),
            format_args!("trtype '{trtype}' is not supported, only TCP is"),
        ))
    }
}

/// The subsystem must be one that was made by `nvmf_create_subsystem`.
fn subsystem_of(core: &Core, all: &mut Parameters) -> Result<SubsystemSummary, RpcError> {
    let nqn = all.required_string("nqn")?;
    let summary = find(core, &nqn).ok_or_else(|| {
        refused(
            all.method(),
            format_args!("Subsystem with NQN '{nqn}' not found"),
        )
    })?;
    if core.control.subsystems.contains(&nqn) {
        Ok(summary)
    } else {
        let text =
            format!("subsystem {nqn} belongs to a replicated volume: use the bdev_repl methods");
        Err(refused(all.method(), text))
    }
}

fn find(core: &Core, nqn: &str) -> Option<SubsystemSummary> {
    let subsystems = core.target.state().subsystems();
    subsystems
        .into_iter()
        .find(|subsystem| subsystem.parameters.nqn == nqn)
}

fn nvmf_create_transport(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(create_transport(core, &mut all));
}

fn create_transport(core: &mut Core, all: &mut Parameters) -> Answer {
    transport_type(all)?;
    let mut options = core.target.state().options();
    if let Some(depth) = all.number("max_queue_depth", 2..=u64::from(u16::MAX))? {
        options.max_queue_depth = depth as u16;
    }
    if let Some(depth) = all.number("max_aq_depth", 2..=u64::from(u16::MAX))? {
        options.max_aq_depth = depth as u16;
    }
    if let Some(queues) = all.number("max_io_qpairs_per_ctrlr", 1..=u64::from(u16::MAX - 1))? {
        options.max_qpairs_per_ctrlr = queues as u16 + 1;
    }
    if let Some(bytes) = all.number_u32("in_capsule_data_size", 0..=u32::MAX)? {
        options.in_capsule_data_size = bytes;
    }
    if let Some(bytes) = all.number_u32("max_io_size", 4096..=u32::MAX)? {
        options.max_io_size = bytes;
    }
    if let Some(success) = all.boolean("c2h_success")? {
        options.c2h_success = success;
    }
    if all.flag("dif_insert_or_strip")? {
        return Err(refused(
            all.method(),
            "dif_insert_or_strip is not supported",
        ));
    }
    if core.control.has_transport {
        let text = "Transport type 'TCP' already exists";
        return Err(RpcError::new(RpcError::INTERNAL_ERROR, text));
    }
    core.target.state().set_options(options);
    core.control.has_transport = true;
    Ok(json!(true))
}

fn nvmf_get_transports(core: &mut Core, mut all: Parameters, reply: Reply) {
    let trtype = match all.string("trtype") {
        Ok(trtype) => trtype,
        Err(error) => return reply.fail(error),
    };
    let transport = core
        .control
        .has_transport
        .then(|| transport(core.target.state().options()));
    match (trtype, transport) {
        (None, transport) => reply.ok(Vec::from_iter(transport)),
        (Some(trtype), Some(transport)) if trtype.eq_ignore_ascii_case("tcp") => {
            reply.ok(vec![transport])
        }
        (Some(trtype), _) => {
            reply.fail(RpcError::no_device(format!(
                "nvmf_get_transports: there is no transport '{trtype}'"
            )));
        }
    }
}

/// A transport with the parameters that would make it again.
fn transport(options: TargetOptions) -> Value {
    json!({
        "trtype": "TCP",
        "max_queue_depth": options.max_queue_depth,
        "max_io_qpairs_per_ctrlr": options.max_qpairs_per_ctrlr.saturating_sub(1),
        "in_capsule_data_size": options.in_capsule_data_size,
        "max_io_size": options.max_io_size,
        "max_aq_depth": options.max_aq_depth,
        "c2h_success": options.c2h_success,
        "dif_insert_or_strip": false,
        "zcopy": false,
    })
}

fn nvmf_create_subsystem(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(create_subsystem(core, &mut all));
}

fn create_subsystem(core: &mut Core, all: &mut Parameters) -> Answer {
    let nqn = all.required_string("nqn")?;
    let mut parameters = SubsystemParameters::new(&nqn);
    if let Some(serial_number) = all.string("serial_number")? {
        parameters.serial_number = serial_number;
    }
    if let Some(model_number) = all.string("model_number")? {
        parameters.model_number = model_number;
    }
    if let Some(max_namespaces) = all.number_u32("max_namespaces", 0..=u32::MAX)? {
        parameters.max_namespaces = max_namespaces;
    }
    parameters.allow_any_host = all.flag("allow_any_host")?;
    parameters.ana_reporting = all.flag("ana_reporting")?;
    let u16_of = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
    if let Some(low) = all.number("min_cntlid", 0..=u64::from(u16::MAX))? {
        parameters.min_cntlid = u16_of(low);
    }
    if let Some(high) = all.number("max_cntlid", 0..=u64::from(u16::MAX))? {
        parameters.max_cntlid = u16_of(high);
    }
    if all.flag("passthrough")? {
        return Err(refused(all.method(), "passthrough is not supported"));
    }
    let created = core.target.state().create_subsystem(parameters);
    created.map_err(|error| match error {
        TargetError::Exists { .. } => {
            let text = format!("Unable to create subsystem {nqn}: it exists already");
            RpcError::new(RpcError::INTERNAL_ERROR, text)
        }
        other => refused(all.method(), other),
    })?;
    core.control.subsystems.insert(nqn);
    Ok(json!(true))
}

fn nvmf_delete_subsystem(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(delete_subsystem(core, &mut all));
}

fn delete_subsystem(core: &mut Core, all: &mut Parameters) -> Answer {
    let subsystem = subsystem_of(core, all)?;
    let nqn = &subsystem.parameters.nqn;
    target::delete_subsystem(core, nqn).map_err(|error| refused(all.method(), error))?;
    core.control.subsystems.remove(nqn);
    for namespace in &subsystem.namespaces {
        release(core, namespace);
    }
    Ok(json!(true))
}

/// Gives the bdev of a namespace that is gone back.
fn release(core: &mut Core, namespace: &Namespace) {
    let id = target::bdev_of(namespace.handle);
    let ours = core
        .registry
        .get(id)
        .is_some_and(|entry| entry.claimed_by.as_deref() == Some(target::CLAIMANT));
    if ours {
        core.registry.release(id);
    }
}

fn nvmf_get_subsystems(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(get_subsystems(core, &mut all));
}

fn get_subsystems(core: &mut Core, all: &mut Parameters) -> Answer {
    let nqn = all.string("nqn")?;
    let mut subsystems = vec![json!({
        "nqn": DISCOVERY_NQN,
        "subtype": "Discovery",
        "listen_addresses": [],
        "allow_any_host": true,
        "hosts": [],
    })];
    subsystems.extend(
        core.target
            .state()
            .subsystems()
            .iter()
            .map(|subsystem| description(core, subsystem)),
    );
    if let Some(nqn) = nqn {
        subsystems.retain(|subsystem| subsystem["nqn"] == nqn.as_str());
        if subsystems.is_empty() {
            // Where the others answer "invalid parameters", SPDK answers ENODEV here.
            let text = format!("{}: Subsystem with NQN '{nqn}' not found", all.method());
            return Err(RpcError::no_device(text));
        }
    }
    Ok(subsystems.into())
}

/// A subsystem as SPDK's `nvmf_get_subsystems` describes it.
fn description(core: &Core, subsystem: &SubsystemSummary) -> Value {
    let parameters = &subsystem.parameters;
    let namespace = |namespace: &Namespace| {
        let mut described = namespace_parameters(core, namespace);
        described["name"] = described["bdev_name"].clone();
        if parameters.ana_reporting {
            described["anagrpid"] = json!(namespace.nsid);
        }
        described
    };
    json!({
        "nqn": parameters.nqn,
        "subtype": "NVMe",
        "listen_addresses": subsystem.listeners.iter().map(address).collect::<Vec<Value>>(),
        "allow_any_host": parameters.allow_any_host,
        "hosts": subsystem.hosts.iter().map(|host| json!({"nqn": host})).collect::<Vec<Value>>(),
        "serial_number": parameters.serial_number,
        "model_number": parameters.model_number,
        "max_namespaces": parameters.max_namespaces,
        "passthrough": false,
        "min_cntlid": parameters.min_cntlid,
        "max_cntlid": parameters.max_cntlid,
        // No limits of Dataset Management and Write Zeroes but those of any transfer.
        "dmrsl": 0,
        "wzsl": 0,
        "namespaces": subsystem.namespaces.iter().map(namespace).collect::<Vec<Value>>(),
    })
}

fn address(listener: &ListenerAddress) -> Value {
    json!({
        "trtype": listener.trtype,
        "adrfam": listener.adrfam,
        "traddr": listener.traddr,
        "trsvcid": listener.trsvcid,
    })
}

/// A namespace with the parameters that would make it again.
fn namespace_parameters(core: &Core, namespace: &Namespace) -> Value {
    let bdev = core.registry.get(target::bdev_of(namespace.handle));
    let mut parameters = json!({
        "nsid": namespace.nsid,
        "bdev_name": bdev.map(|entry| entry.name.as_str()),
        "uuid": Uuid::from_bytes(namespace.uuid),
    });
    if namespace.nguid != [0; 16] {
        parameters["nguid"] = json!(hexadecimal(&namespace.nguid));
    }
    if namespace.eui64 != [0; 8] {
        parameters["eui64"] = json!(hexadecimal(&namespace.eui64));
    }
    parameters
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// `2 * N` hexadecimal digits.
fn parse_hexadecimal<const N: usize>(
    all: &mut Parameters,
    name: &'static str,
) -> Result<Option<[u8; N]>, RpcError> {
    let Some(text) = all.string(name)? else {
        return Ok(None);
    };
    let wrong = || {
        refused(
            all.method(),
            format_args!("Invalid {name}: {} hexadecimal digits are needed", 2 * N),
        )
    };
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
    }
    Ok(Some(bytes))
}

fn nvmf_subsystem_add_ns(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(add_namespace(core, &mut all));
}

fn add_namespace(core: &mut Core, all: &mut Parameters) -> Answer {
    let subsystem = subsystem_of(core, all)?;
    let mut nested = all
        .object("namespace")?
        .ok_or_else(|| all.missing("namespace"))?;
    let bdev_name = nested.required_string("bdev_name")?;
    let nsid = nested
        .number_u32("nsid", 0..=u32::MAX)?
        .filter(|nsid| *nsid != 0);
    let nguid = parse_hexadecimal::<16>(&mut nested, "nguid")?;
    let eui64 = parse_hexadecimal::<8>(&mut nested, "eui64")?;
    let uuid = nested.uuid("uuid")?;
    if nested.string("ptpl_file")?.is_some() {
        return Err(refused(
            all.method(),
            "ptpl_file is not supported: there are no reservations",
        ));
    }
    // As SPDK: a bdev is exported once, and not while something else writes to it.
    let entry = core
        .registry
        .claim(&bdev_name, target::CLAIMANT)
        .map_err(|error| refused(all.method(), error))?;
    let uuid = uuid.unwrap_or(entry.uuid).into_bytes();
    let added = core.target.state().add_namespace(
        &subsystem.parameters.nqn,
        NamespaceParameters {
            nsid,
            handle: target::namespace_handle(entry.id),
            block_size: entry.block_size,
            size_blocks: entry.num_blocks,
            nguid: nguid.unwrap_or(uuid),
            uuid,
            eui64: eui64.unwrap_or_default(),
            vendor_only: false,
        },
    );
    match added {
        Ok(nsid) => {
            target::changed(core);
            Ok(json!(nsid))
        }
        Err(error) => {
            core.registry.release(entry.id);
            Err(refused(all.method(), error))
        }
    }
}

fn nvmf_subsystem_remove_ns(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(remove_namespace(core, &mut all));
}

fn remove_namespace(core: &mut Core, all: &mut Parameters) -> Answer {
    let subsystem = subsystem_of(core, all)?;
    let nsid = all
        .number_u32("nsid", 0..=u32::MAX)?
        .ok_or_else(|| all.missing("nsid"))?;
    let nqn = &subsystem.parameters.nqn;
    core.target
        .state()
        .remove_namespace(nqn, nsid)
        .map_err(refused_by_target(all))?;
    target::changed(core);
    for namespace in subsystem
        .namespaces
        .iter()
        .filter(|namespace| namespace.nsid == nsid)
    {
        release(core, namespace);
    }
    Ok(json!(true))
}

/// The nested `listen_address`.
fn listen_address(all: &mut Parameters) -> Result<ListenerAddress, RpcError> {
    let mut nested = all
        .object("listen_address")?
        .ok_or_else(|| all.missing("listen_address"))?;
    transport_type(&mut nested)?;
    let family = match nested.string("adrfam")? {
        None => None,
        Some(text) => Some(AddressFamily::from_name(&text).ok_or_else(|| {
            refused(
                all.method(),
                format_args!("adrfam '{text}' is neither IPv4 nor IPv6"),
            )
        })?),
    };
    let traddr = nested.required_string("traddr")?;
    let trsvcid = nested.required_string("trsvcid")?;
    let address = ListenerAddress::tcp(&traddr, &trsvcid);
    match family {
        Some(family) if family.name() != address.adrfam => Err(refused(
            all.method(),
            format_args!("traddr '{traddr}' is not an {} address", family.name()),
        )),
        _ => Ok(address),
    }
}

fn nvmf_subsystem_add_listener(core: &mut Core, mut all: Parameters, reply: Reply) {
    let parsed = (|| {
        let subsystem = subsystem_of(core, &mut all)?;
        let address = listen_address(&mut all)?;
        if all.flag("secure_channel")? {
            return Err(refused(
                all.method(),
                "secure_channel is not supported: there is no TLS here",
            ));
        }
        if all
            .string("ana_state")?
            .is_some_and(|state| state != "optimized")
        {
            return Err(refused(
                all.method(),
                "ana_state is not supported, only optimized is",
            ));
        }
        if !core.control.has_transport {
            return Err(refused(
                all.method(),
                "there is no transport TCP yet: call nvmf_create_transport first",
            ));
        }
        Ok((subsystem.parameters.nqn, address))
    })();
    match parsed {
        Ok((nqn, address)) => target::add_listener(core, &nqn, &address, move |_core, result| {
            let result = result.map_err(|error| refused("nvmf_subsystem_add_listener", error));
            reply.answer(result.map(|_| json!(true)));
        }),
        Err(error) => reply.fail(error),
    }
}

fn nvmf_subsystem_remove_listener(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer(remove_listener(core, &mut all));
}

fn remove_listener(core: &mut Core, all: &mut Parameters) -> Answer {
    let subsystem = subsystem_of(core, all)?;
    let address = listen_address(all)?;
    let removed = target::remove_listener(core, &subsystem.parameters.nqn, &address);
    removed.map_err(|error: BdevError| refused(all.method(), error))?;
    Ok(json!(true))
}

fn nvmf_subsystem_get_listeners(core: &mut Core, mut all: Parameters, reply: Reply) {
    let nqn = match all.required_string("nqn") {
        Ok(nqn) => nqn,
        Err(error) => return reply.fail(error),
    };
    match find(core, &nqn) {
        Some(subsystem) => {
            let listener = |at: &ListenerAddress| {
                let mut listener = json!({"address": address(at)});
                if subsystem.parameters.ana_reporting {
                    let states = subsystem.namespaces.iter().map(|namespace| {
                        let state = format!("{:?}", namespace.ana_state).to_lowercase();
                        json!({"ana_group": namespace.nsid, "ana_state": state})
                    });
                    listener["ana_states"] = states.collect();
                }
                listener
            };
            reply.ok(subsystem
                .listeners
                .iter()
                .map(listener)
                .collect::<Vec<Value>>());
        }
        None => reply.fail(refused(
            all.method(),
            format_args!("Subsystem with NQN '{nqn}' not found"),
        )),
    }
}

fn nvmf_subsystem_add_host(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer((|| {
        let subsystem = subsystem_of(core, &mut all)?;
        let host = all.required_string("host")?;
        for name in ["psk", "dhchap_key", "dhchap_ctrlr_key"] {
            // Ignored, it would leave a door open that the caller believes to be locked.
            if all.string(name)?.is_some() {
                return Err(refused(
                    all.method(),
                    format_args!("{name} is not supported"),
                ));
            }
        }
        let added = core
            .target
            .state()
            .add_host(&subsystem.parameters.nqn, &host);
        // A host that is allowed already is an error of SPDK's too.
        added.map_err(|error| {
            let text = format!("nvmf_subsystem_add_host: {error}");
            RpcError::new(RpcError::INTERNAL_ERROR, text)
        })?;
        Ok(json!(true))
    })());
}

fn nvmf_subsystem_remove_host(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer((|| {
        let subsystem = subsystem_of(core, &mut all)?;
        let host = all.required_string("host")?;
        let removed = core
            .target
            .state()
            .remove_host(&subsystem.parameters.nqn, &host);
        removed.map_err(|error| {
            let text = format!("nvmf_subsystem_remove_host: {error}");
            RpcError::new(RpcError::INTERNAL_ERROR, text)
        })?;
        target::changed(core);
        Ok(json!(true))
    })());
}

fn nvmf_subsystem_allow_any_host(core: &mut Core, mut all: Parameters, reply: Reply) {
    reply.answer((|| {
        let subsystem = subsystem_of(core, &mut all)?;
        let allow = all
            .boolean("allow_any_host")?
            .ok_or_else(|| all.missing("allow_any_host"))?;
        let changed = core
            .target
            .state()
            .allow_any_host(&subsystem.parameters.nqn, allow);
        changed.map_err(refused_by_target(&all))?;
        target::changed(core);
        Ok(json!(true))
    })());
}

/// The calls that make transport and subsystems again, in order.
pub(super) fn configuration(core: &Core) -> Vec<Value> {
    let call = |method: &str, params: Value| json!({"method": method, "params": params});
    let mut calls = Vec::new();
    if core.control.has_transport {
        calls.push(call(
            "nvmf_create_transport",
            transport(core.target.state().options()),
        ));
    }
    let subsystems = core.target.state().subsystems();
    for subsystem in subsystems
        .iter()
        .filter(|one| core.control.subsystems.contains(&one.parameters.nqn))
    {
        let parameters = &subsystem.parameters;
        let nqn = &parameters.nqn;
        calls.push(call(
            "nvmf_create_subsystem",
            json!({
                "nqn": nqn,
                "allow_any_host": parameters.allow_any_host,
                "serial_number": parameters.serial_number,
                "model_number": parameters.model_number,
                "max_namespaces": parameters.max_namespaces,
                "min_cntlid": parameters.min_cntlid,
                "max_cntlid": parameters.max_cntlid,
                "ana_reporting": parameters.ana_reporting,
            }),
        ));
        for host in &subsystem.hosts {
            calls.push(call(
                "nvmf_subsystem_add_host",
                json!({"nqn": nqn, "host": host}),
            ));
        }
        for namespace in &subsystem.namespaces {
            let namespace = namespace_parameters(core, namespace);
            calls.push(call(
                "nvmf_subsystem_add_ns",
                json!({"nqn": nqn, "namespace": namespace}),
            ));
        }
        for listener in &subsystem.listeners {
            let listen_address = address(listener);
            let params =
                json!({"nqn": nqn, "listen_address": listen_address, "secure_channel": false});
            calls.push(call("nvmf_subsystem_add_listener", params));
        }
    }
    calls
}
