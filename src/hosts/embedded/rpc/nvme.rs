//! SPDK's methods of NVMe controllers that this node is a host of.
//! In the table of `mod.rs`; carried out by `remote`.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};
use uuid::Uuid;

use super::Takes::Parameters as Named;
use super::When::Runtime;
use super::{Method, bdev_error, method};
use crate::hosts::embedded::core::Core;
use crate::hosts::embedded::nvme_tcp::controller::ControllerParameters;
use crate::hosts::embedded::remote::{self, RemoteState, RemoteSummary};
use crate::rpc::parameters::Parameters;
use crate::rpc::volume::AddressFamily;
use crate::rpc::{Reply, RpcError};

pub(super) const METHODS: &[Method] = &[
    method(
        "bdev_nvme_attach_controller",
        Runtime,
        Named,
        bdev_nvme_attach_controller,
    ),
    method(
        "bdev_nvme_detach_controller",
        Runtime,
        Named,
        bdev_nvme_detach_controller,
    ),
    method(
        "bdev_nvme_get_controllers",
        Runtime,
        Named,
        bdev_nvme_get_controllers,
    ),
];

/// What host NQNs that hold a UUID begin with (NVMe Base 2.0 §4.7).
const UUID_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:";

fn bdev_nvme_attach_controller(core: &mut Core, mut all: Parameters, reply: Reply) {
    match attach_parameters(&mut all) {
        Ok((name, address, parameters)) => {
            remote::attach(core, &name, address, parameters, |_core, result| {
                let result =
                    result.map_err(|error| bdev_error("bdev_nvme_attach_controller", error));
                reply.answer(result.map(|names| json!(names)));
            })
        }
        Err(error) => reply.fail(error),
    }
}

fn attach_parameters(
    all: &mut Parameters,
) -> Result<(String, SocketAddr, ControllerParameters), RpcError> {
    let method = all.method().to_owned();
    let invalid = |text: String| RpcError::invalid(format!("{method}: {text}"));
    let name = all.required_string("name")?;
    let trtype = all.required_string("trtype")?;
    if !trtype.eq_ignore_ascii_case("tcp") {
        return Err(invalid(format!(
            "trtype '{trtype}' is not supported, only TCP is"
        )));
    }
    let traddr = all.required_string("traddr")?;
    let ip: IpAddr = traddr
        .parse()
        .map_err(|_| invalid(format!("traddr '{traddr}' is not a numeric IP address")))?;
    if let Some(adrfam) = all.string("adrfam")? {
        if AddressFamily::from_name(&adrfam) != Some(AddressFamily::of(ip)) {
            return Err(invalid(format!(
                "traddr {ip} is not an address of adrfam '{adrfam}'"
            )));
        }
    }
    let trsvcid = all.required_string("trsvcid")?;
    let port = trsvcid.parse::<u16>().ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| invalid(format!("trsvcid '{trsvcid}' is not a port")))?;
    let subnqn = all.required_string("subnqn")?;
    for key in ["psk", "dhchap_key", "dhchap_ctrlr_key"] {
        // Ignored, the connection would be less protected than the caller believes.
        if all.string(key)?.is_some() {
            return Err(invalid(format!("{key} is not supported")));
        }
    }
    let hostnqn = all
        .string("hostnqn")?
        .unwrap_or_else(|| format!("{UUID_NQN}{}", Uuid::new_v4()));
    let mut parameters =
        ControllerParameters::new(&subnqn, &hostnqn, host_id(&hostnqn).into_bytes());
    parameters.header_digest = all.flag("hdgst")?;
    parameters.data_digest = all.flag("ddgst")?;
    Ok((name, SocketAddr::new(ip, port), parameters))
}

/// The same host has the same id whenever it connects: the UUID that its NQN holds, or one made of it.
fn host_id(hostnqn: &str) -> Uuid {
    let held = hostnqn
        .strip_prefix(UUID_NQN)
        .and_then(|text| Uuid::try_parse(text).ok());
    held.unwrap_or_else(|| Uuid::new_v5(&Uuid::NAMESPACE_URL, hostnqn.as_bytes()))
}

fn bdev_nvme_detach_controller(core: &mut Core, mut all: Parameters, reply: Reply) {
    match all.required_string("name") {
        Ok(name) => remote::detach(core, &name, |_core, result| {
            let result = result.map_err(|error| bdev_error("bdev_nvme_detach_controller", error));
            reply.answer(result.map(|()| json!(true)));
        }),
        Err(error) => reply.fail(error),
    }
}

fn bdev_nvme_get_controllers(core: &mut Core, mut all: Parameters, reply: Reply) {
    let name = match all.string("name") {
        Ok(name) => name,
        Err(error) => return reply.fail(error),
    };
    let mut controllers = core.remotes.summaries(core);
    if let Some(name) = name {
        controllers.retain(|controller| controller.name == name);
        if controllers.is_empty() {
            let text = format!("bdev_nvme_get_controllers: there is no controller named '{name}'");
            // Where bdev_nvme_detach_controller answers ENODEV, SPDK answers EINVAL here.
            return reply.fail(RpcError::invalid(text));
        }
    }
    reply.ok(controllers.iter().map(description).collect::<Vec<Value>>());
}

/// A controller as SPDK describes it: there is one path here.
fn description(controller: &RemoteSummary) -> Value {
    let state = match controller.state {
        RemoteState::Connecting => "connecting",
        RemoteState::Enabled => "enabled",
        RemoteState::Resetting => "resetting",
    };
    json!({
        "name": controller.name,
        "ctrlrs": [{
            "state": state,
            "trid": {
                "trtype": "TCP",
                "adrfam": AddressFamily::of(controller.address.ip()).name(),
                "traddr": controller.address.ip().to_string(),
                "trsvcid": controller.address.port().to_string(),
                "subnqn": controller.parameters.subsystem_nqn,
            },
            "cntlid": controller.controller_id,
            "host": {"nqn": controller.parameters.host_nqn, "addr": "", "svcid": ""},
        }],
    })
}

/// The calls that attach the controllers again.
pub(super) fn configuration(core: &Core) -> Vec<Value> {
    let call = |controller: &RemoteSummary| {
        json!({
            "method": "bdev_nvme_attach_controller",
            "params": {
                "name": controller.name,
                "trtype": "TCP",
                "adrfam": AddressFamily::of(controller.address.ip()).name(),
                "traddr": controller.address.ip().to_string(),
                "trsvcid": controller.address.port().to_string(),
                "subnqn": controller.parameters.subsystem_nqn,
                "hostnqn": controller.parameters.host_nqn,
                "hdgst": controller.parameters.header_digest,
                "ddgst": controller.parameters.data_digest,
            },
        })
    };
    core.remotes.summaries(core).iter().map(call).collect()
}
