//! Parameters of the volume methods, from JSON and back.
//! Called by [`super::call`] and by whoever writes a configuration. Strict: what is not known is refused.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::{
    AddPeer, Address, AddressFamily, AnaListener, CreateVolume, Listen, PeerTransport, Register,
    SetOptions, Transport, VolumeRequest,
};
use crate::engine::meta::format::AL_EXTENTS_DEFAULT;
use crate::engine::meta::superblock::{AL_EXTENTS_MAX, AL_EXTENTS_MIN};
use crate::rpc::RpcError;
use crate::rpc::parameters::Parameters;

/// Longest name of a volume, in bytes: what the superblock has room for.
pub const NAME_BYTES_MAX: usize = 63;
const NODE_ID_MAX: u8 = 7;
const PEER_SLOTS_MAX: u8 = 7;
const PEER_SLOTS_DEFAULT: u8 = 3;
const CHANNEL_SLOTS_MAX: u8 = 64;
const CHANNEL_SLOTS_DEFAULT: u8 = 8;
const GRANULARITY_KB_MIN: u32 = 4;
const GRANULARITY_KB_MAX: u32 = 1024;
/// Longest name of a subsystem, in bytes (NVM Express Base Specification, NVMe Qualified Names).
const NQN_BYTES_MAX: usize = 223;
const INTERVAL_MS_MIN: u32 = 50;
const INTERVAL_MS_MAX: u32 = 120_000;
/// 8 EiB in MiB, less one: sizes in bytes fit an i64 (file offsets).
const SIZE_MB_MAX: u64 = (1 << 43) - 1;

/// The volume methods, in the order in which a user meets them.
pub const METHODS: &[&str] = &[
    "bdev_repl_create",
    "bdev_repl_delete",
    "bdev_repl_wipe",
    "bdev_repl_get_volumes",
    "bdev_repl_attach",
    "bdev_repl_detach",
    "bdev_repl_add_peer",
    "bdev_repl_remove_peer",
    "bdev_repl_connect",
    "bdev_repl_disconnect",
    "bdev_repl_promote",
    "bdev_repl_demote",
    "bdev_repl_invalidate",
    "bdev_repl_pause_resync",
    "bdev_repl_resume_resync",
    "bdev_repl_set_options",
];

impl VolumeRequest {
    /// Checks the parameters of `method`, which must be one of [`METHODS`].
    ///
    /// Errors: -32601 for another method; -32603 for a wrong, unknown or missing parameter; -22 for values
    /// that are well-formed but cannot be, or not together.
    pub fn parse(method: &str, params: Option<Value>) -> Result<VolumeRequest, RpcError> {
        let mut all = Parameters::new(method, params)?;
        let request = match method {
            "bdev_repl_create" => create(&mut all)?,
            "bdev_repl_delete" => VolumeRequest::Delete {
                name: name(&mut all)?,
            },
            "bdev_repl_wipe" => VolumeRequest::Wipe {
                base_bdev: all.required_string("base_bdev")?,
            },
            "bdev_repl_get_volumes" => VolumeRequest::GetVolumes {
                name: all.string("name")?,
            },
            "bdev_repl_attach" => VolumeRequest::Attach {
                name: name(&mut all)?,
                base_bdev: all.required_string("base_bdev")?,
            },
            "bdev_repl_detach" => VolumeRequest::Detach {
                name: name(&mut all)?,
            },
            "bdev_repl_add_peer" => VolumeRequest::AddPeer(AddPeer {
                name: name(&mut all)?,
                node_id: required_node_id(&mut all)?,
                address: address(&mut all)?,
                hdgst: all.flag("hdgst")?,
                ddgst: all.flag("ddgst")?,
                transport: PeerTransport::take(&mut all)?,
                connect: all.boolean("connect")?.unwrap_or(true),
            }),
            "bdev_repl_remove_peer" => VolumeRequest::RemovePeer {
                name: name(&mut all)?,
                node_id: required_node_id(&mut all)?,
            },
            "bdev_repl_connect" => VolumeRequest::Connect {
                name: name(&mut all)?,
                node_id: node_id(&mut all)?,
                discard_my_data: all.flag("discard_my_data")?,
            },
            "bdev_repl_disconnect" => VolumeRequest::Disconnect {
                name: name(&mut all)?,
                node_id: node_id(&mut all)?,
            },
            "bdev_repl_promote" => VolumeRequest::Promote {
                name: name(&mut all)?,
                force: all.flag("force")?,
            },
            "bdev_repl_demote" => VolumeRequest::Demote {
                name: name(&mut all)?,
            },
            "bdev_repl_invalidate" => VolumeRequest::Invalidate {
                name: name(&mut all)?,
            },
            "bdev_repl_pause_resync" => VolumeRequest::PauseResync {
                name: name(&mut all)?,
            },
            "bdev_repl_resume_resync" => VolumeRequest::ResumeResync {
                name: name(&mut all)?,
            },
            "bdev_repl_set_options" => VolumeRequest::SetOptions(SetOptions {
                name: name(&mut all)?,
                ping_interval_ms: interval(&mut all, "ping_interval_ms")?,
                ping_timeout_ms: interval(&mut all, "ping_timeout_ms")?,
                connect_interval_ms: interval(&mut all, "connect_interval_ms")?,
                resync_rate_mb: all.number_u32("resync_rate_mb", 0..=u32::MAX)?,
                ana_listeners: ana_listeners(&mut all)?,
            }),
            other => return Err(RpcError::method_not_found(other)),
        };
        all.finish()?;
        Ok(request)
    }

    /// The call that asks for this: method and parameters, with what equals its default left out.
    /// [`VolumeRequest::parse`] of it gives the same request.
    pub fn to_call(&self) -> (&'static str, Value) {
        let mut params = Map::new();
        let mut set = |key: &str, value: Value| {
            params.insert(key.to_owned(), value);
        };
        let method = match self {
            VolumeRequest::Create(create) => {
                set("name", json!(create.name));
                optional(&mut set, "base_bdev", &create.base_bdev);
                optional(&mut set, "uuid", &create.uuid);
                set("node_id", json!(create.node_id));
                set("granularity_kb", json!(create.granularity_kb));
                set("peer_slots", json!(create.peer_slots));
                set("channel_slots", json!(create.channel_slots));
                set("al_extents", json!(create.al_extents));
                optional(&mut set, "size_mb", &create.size_mb);
                optional(&mut set, "data_offset", &create.data_offset);
                flag(&mut set, "assume_clean", create.assume_clean);
                flag(&mut set, "has_data", create.has_data);
                flag(&mut set, "force", create.force);
                if !create.ana_listeners.is_empty() {
                    set("ana_listeners", listeners_to_json(&create.ana_listeners));
                }
                if create.register != Register::default() {
                    set("register", json!(create.register.name()));
                }
                if let Some(listen) = &create.listen {
                    listen.put(&mut params);
                }
                "bdev_repl_create"
            }
            VolumeRequest::Delete { name } => {
                set("name", json!(name));
                "bdev_repl_delete"
            }
            VolumeRequest::Wipe { base_bdev } => {
                set("base_bdev", json!(base_bdev));
                "bdev_repl_wipe"
            }
            VolumeRequest::GetVolumes { name } => {
                optional(&mut set, "name", name);
                "bdev_repl_get_volumes"
            }
            VolumeRequest::Attach { name, base_bdev } => {
                set("name", json!(name));
                set("base_bdev", json!(base_bdev));
                "bdev_repl_attach"
            }
            VolumeRequest::Detach { name } => {
                set("name", json!(name));
                "bdev_repl_detach"
            }
            VolumeRequest::AddPeer(peer) => {
                set("name", json!(peer.name));
                set("node_id", json!(peer.node_id));
                set("adrfam", json!(peer.address.adrfam().name()));
                set("traddr", json!(peer.address.traddr.to_string()));
                set("trsvcid", json!(peer.address.trsvcid.to_string()));
                flag(&mut set, "hdgst", peer.hdgst);
                flag(&mut set, "ddgst", peer.ddgst);
                if !peer.connect {
                    set("connect", json!(false));
                }
                peer.transport.put(&mut params);
                "bdev_repl_add_peer"
            }
            VolumeRequest::RemovePeer { name, node_id } => {
                set("name", json!(name));
                set("node_id", json!(node_id));
                "bdev_repl_remove_peer"
            }
            VolumeRequest::Connect {
                name,
                node_id,
                discard_my_data,
            } => {
                set("name", json!(name));
                optional(&mut set, "node_id", node_id);
                flag(&mut set, "discard_my_data", *discard_my_data);
                "bdev_repl_connect"
            }
            VolumeRequest::Disconnect { name, node_id } => {
                set("name", json!(name));
                optional(&mut set, "node_id", node_id);
                "bdev_repl_disconnect"
            }
            VolumeRequest::Promote { name, force } => {
                set("name", json!(name));
                flag(&mut set, "force", *force);
                "bdev_repl_promote"
            }
            VolumeRequest::Demote { name } => {
                set("name", json!(name));
                "bdev_repl_demote"
            }
            VolumeRequest::Invalidate { name } => {
                set("name", json!(name));
                "bdev_repl_invalidate"
            }
            VolumeRequest::PauseResync { name } => {
                set("name", json!(name));
                "bdev_repl_pause_resync"
            }
            VolumeRequest::ResumeResync { name } => {
                set("name", json!(name));
                "bdev_repl_resume_resync"
            }
            VolumeRequest::SetOptions(options) => {
                set("name", json!(options.name));
                optional(&mut set, "ping_interval_ms", &options.ping_interval_ms);
                optional(&mut set, "ping_timeout_ms", &options.ping_timeout_ms);
                optional(
                    &mut set,
                    "connect_interval_ms",
                    &options.connect_interval_ms,
                );
                optional(&mut set, "resync_rate_mb", &options.resync_rate_mb);
                if let Some(listeners) = &options.ana_listeners {
                    set("ana_listeners", listeners_to_json(listeners));
                }
                "bdev_repl_set_options"
            }
        };
        (method, Value::Object(params))
    }
}

fn optional<T: serde::Serialize>(set: &mut impl FnMut(&str, Value), key: &str, value: &Option<T>) {
    if let Some(value) = value {
        set(key, json!(value));
    }
}

fn flag(set: &mut impl FnMut(&str, Value), key: &str, value: bool) {
    if value {
        set(key, json!(true));
    }
}

fn create(all: &mut Parameters) -> Result<VolumeRequest, RpcError> {
    let mut create = CreateVolume {
        name: name(all)?,
        base_bdev: all.string("base_bdev")?,
        uuid: all.uuid("uuid")?,
        node_id: required_node_id(all)?,
        granularity_kb: all
            .number_u32("granularity_kb", GRANULARITY_KB_MIN..=GRANULARITY_KB_MAX)?
            .unwrap_or(GRANULARITY_KB_MIN),
        peer_slots: all
            .number_u8("peer_slots", 1..=PEER_SLOTS_MAX)?
            .unwrap_or(PEER_SLOTS_DEFAULT),
        channel_slots: all
            .number_u8("channel_slots", 1..=CHANNEL_SLOTS_MAX)?
            .unwrap_or(CHANNEL_SLOTS_DEFAULT),
        al_extents: all
            .number_u32("al_extents", AL_EXTENTS_MIN..=AL_EXTENTS_MAX)?
            .unwrap_or(AL_EXTENTS_DEFAULT),
        size_mb: all.number("size_mb", 1..=SIZE_MB_MAX)?,
        data_offset: all.number("data_offset", 0..=u64::MAX)?,
        assume_clean: all.flag("assume_clean")?,
        has_data: all.flag("has_data")?,
        force: all.flag("force")?,
        listen: None,
        ana_listeners: ana_listeners(all)?.unwrap_or_default(),
        register: match all.string("register")? {
            None => Register::default(),
            Some(text) => Register::from_name(&text).ok_or_else(|| {
                RpcError::invalid(format!(
                    "bdev_repl_create: register '{text}' is neither always nor on_promote"
                ))
            })?,
        },
    };
    create.listen = Listen::take(all, create.node_id)?;
    let refuse = |text: &str| Err(RpcError::invalid(format!("bdev_repl_create: {text}")));
    if !create.granularity_kb.is_power_of_two() {
        return refuse(&format!(
            "granularity_kb {} is not a power of two from {GRANULARITY_KB_MIN} to {GRANULARITY_KB_MAX}",
            create.granularity_kb
        ));
    }
    if let Some(offset) = create.data_offset.filter(|offset| *offset != 0) {
        return refuse(&format!(
            "data_offset {offset} cannot be chosen: leave it out (data start at 1 MiB), \
             or give 0 to take the device over in place"
        ));
    }
    if create.assume_clean && create.has_data {
        return refuse(
            "assume_clean (the replicas are already the same) and has_data (full resync from this node) \
             exclude each other",
        );
    }
    if create.base_bdev.is_none()
        && (create.assume_clean || create.has_data || create.force || create.data_offset.is_some())
    {
        return refuse("assume_clean, has_data, force and data_offset need a base_bdev");
    }
    Ok(VolumeRequest::Create(create))
}

fn name(all: &mut Parameters) -> Result<String, RpcError> {
    let name = all.required_string("name")?;
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(RpcError::invalid(format!(
            "{}: name must have 1 to {NAME_BYTES_MAX} bytes, it has {}",
            all.method(),
            name.len()
        )));
    }
    // The name becomes part of the endpoint's NQN and of log lines.
    if let Some(bad) = name
        .chars()
        .find(|c| !c.is_ascii_graphic() || *c == '/' || *c == '\\' || *c == '"')
    {
        return Err(RpcError::invalid(format!(
            "{}: name must be printable ASCII without spaces, slashes and quotes, it has {bad:?}",
            all.method()
        )));
    }
    Ok(name)
}

fn node_id(all: &mut Parameters) -> Result<Option<u8>, RpcError> {
    all.number_u8("node_id", 0..=NODE_ID_MAX)
}

pub(super) fn required_node_id(all: &mut Parameters) -> Result<u8, RpcError> {
    node_id(all)?.ok_or_else(|| all.missing("node_id"))
}

fn interval(all: &mut Parameters, name: &'static str) -> Result<Option<u32>, RpcError> {
    all.number_u32(name, INTERVAL_MS_MIN..=INTERVAL_MS_MAX)
}

/// Listeners of the NVMe-oF target; the same one twice could be told two states.
fn ana_listeners(all: &mut Parameters) -> Result<Option<Vec<AnaListener>>, RpcError> {
    let Some(objects) = all.objects("ana_listeners")? else {
        return Ok(None);
    };
    let mut listeners: Vec<AnaListener> = Vec::new();
    for mut nested in objects {
        let method = nested.method().to_owned();
        let nqn = nested.required_string("nqn")?;
        if nqn.is_empty() || nqn.len() > NQN_BYTES_MAX || nqn.contains('\0') {
            return Err(RpcError::invalid(format!(
                "{method}: ana_listeners: nqn must have 1 to {NQN_BYTES_MAX} bytes and no zero byte"
            )));
        }
        let transport = match nested.string("trtype")? {
            None => Transport::Tcp,
            Some(text) => Transport::from_name(&text).ok_or_else(|| {
                RpcError::invalid(format!(
                    "{method}: ana_listeners: trtype '{text}' is neither TCP nor RDMA"
                ))
            })?,
        };
        let listener = AnaListener {
            nqn,
            transport,
            address: address(&mut nested)?,
            anagrpid: nested.number_u32("anagrpid", 1..=u32::MAX)?,
        };
        nested.finish()?;
        if listeners.contains(&listener) {
            return Err(RpcError::invalid(format!(
                "{method}: ana_listeners: {} at {} is named twice",
                listener.nqn, listener.address
            )));
        }
        listeners.push(listener);
    }
    Ok(Some(listeners))
}

fn listeners_to_json(listeners: &[AnaListener]) -> Value {
    let to_json = |listener: &AnaListener| {
        let mut object = json!({
            "nqn": listener.nqn,
            "trtype": listener.transport.name(),
            "adrfam": listener.address.adrfam().name(),
            "traddr": listener.address.traddr.to_string(),
            "trsvcid": listener.address.trsvcid.to_string(),
        });
        if let Some(anagrpid) = listener.anagrpid {
            object["anagrpid"] = json!(anagrpid);
        }
        object
    };
    listeners.iter().map(to_json).collect()
}

/// trtype (only TCP), adrfam, traddr, trsvcid; the service may be a number or, as SPDK has it, a string.
pub(super) fn address(all: &mut Parameters) -> Result<Address, RpcError> {
    let method = all.method().to_owned();
    if let Some(trtype) = all
        .string("trtype")?
        .filter(|trtype| !trtype.eq_ignore_ascii_case("tcp"))
    {
        return Err(RpcError::invalid(format!(
            "{method}: trtype '{trtype}' is not supported, only TCP is"
        )));
    }
    let family = match all.string("adrfam")? {
        None => None,
        Some(text) => Some(AddressFamily::from_name(&text).ok_or_else(|| {
            RpcError::invalid(format!(
                "{method}: adrfam '{text}' is neither IPv4 nor IPv6"
            ))
        })?),
    };
    let text = all.required_string("traddr")?;
    let traddr: IpAddr = text.parse().map_err(|_| {
        RpcError::invalid(format!(
            "{method}: traddr '{text}' is not a numeric IPv4 or IPv6 address"
        ))
    })?;
    if let Some(family) = family.filter(|family| *family != AddressFamily::of(traddr)) {
        return Err(RpcError::invalid(format!(
            "{method}: traddr {traddr} is not an {} address",
            family.name()
        )));
    }
    let trsvcid = match all.take("trsvcid") {
        None => return Err(all.missing("trsvcid")),
        Some(Value::String(text)) => text.parse::<u16>().ok(),
        Some(Value::Number(number)) => number.as_u64().and_then(|port| u16::try_from(port).ok()),
        Some(_) => None,
    };
    match trsvcid {
        Some(trsvcid) if trsvcid != 0 => Ok(Address { traddr, trsvcid }),
        _ => Err(RpcError::parameters(format!(
            "{method}: parameter 'trsvcid' must be a port from 1 to 65535"
        ))),
    }
}
