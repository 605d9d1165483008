//! How a peer is reached and let in beyond addresses: names of keys, further paths, patience. With SPDK's names of each.
//! Parsed and written by `parse`; carried out by a host that has TLS, DH-HMAC-CHAP and multipath, refused by one that
//! has not.

use serde_json::{Map, Value, json};

use super::Address;
use super::parse::{address, required_node_id};
use crate::rpc::RpcError;
use crate::rpc::parameters::Parameters;

/// Paths to a peer besides the first; SPDK has no limit, a mistake should have one.
const ALTERNATE_ADDRESSES_MAX: usize = 7;
/// What SPDK's decoder of a signed 32-bit number takes.
const SECONDS_MAX: u64 = i32::MAX as u64;
/// Between two attempts at a path that is down, unless the operator says otherwise.
const RECONNECT_DELAY_SEC_DEFAULT: u32 = 1;

/// What becomes of the addresses of a peer, as in `bdev_nvme_attach_controller`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Multipath {
    /// `disable`: there is one path.
    Disable,
    /// `failover`: one path is connected, the others take over.
    Failover,
    /// `multipath`: all are connected.
    Multipath,
}

impl Multipath {
    const ALL: [Multipath; 3] = [
        Multipath::Disable,
        Multipath::Failover,
        Multipath::Multipath,
    ];

    /// SPDK's spelling.
    pub const fn name(self) -> &'static str {
        match self {
            Multipath::Disable => "disable",
            Multipath::Failover => "failover",
            Multipath::Multipath => "multipath",
        }
    }
}

/// Names of keys in the node's keyring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// TLS.
    pub psk: Option<String>,
    /// DH-HMAC-CHAP, of the side that connects.
    pub dhchap_key: Option<String>,
    /// DH-HMAC-CHAP, of the side that is connected to; only together with `dhchap_key`.
    pub dhchap_ctrlr_key: Option<String>,
}

/// How a peer is reached, besides its first address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerTransport {
    /// Further paths to the same endpoint.
    pub alternate_addresses: Vec<Address>,
    pub multipath: Option<Multipath>,
    pub keys: Keys,
    /// How long a path may be down before it is given up; -1 is for ever, 0 not at all.
    pub ctrlr_loss_timeout_sec: Option<i32>,
    /// Between two attempts to bring a path back.
    pub reconnect_delay_sec: Option<u32>,
    /// How long commands wait for a path; 0 is until it is given up.
    pub fast_io_fail_timeout_sec: Option<u32>,
}

/// The three settings of bdev_nvme for a path that is down, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    pub ctrlr_loss_timeout_sec: i32,
    pub reconnect_delay_sec: u32,
    pub fast_io_fail_timeout_sec: u32,
}

/// A node that may connect to this one's endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedHost {
    /// 0 to 7.
    pub node_id: u8,
    pub keys: Keys,
}

/// Where and for whom an endpoint listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub address: Address,
    /// TLS, and nothing but TLS.
    pub secure_channel: bool,
    /// Empty is every host.
    pub allowed_hosts: Vec<AllowedHost>,
}

impl Listen {
    /// Listens for every host, in the clear.
    pub fn open(address: Address) -> Listen {
        Listen {
            address,
            secure_channel: false,
            allowed_hosts: Vec::new(),
        }
    }
}

impl Keys {
    fn is_none(&self) -> bool {
        *self == Keys::default()
    }

    fn take(all: &mut Parameters) -> Result<Keys, RpcError> {
        let mut key = |name| {
            let key = all.string(name)?;
            if key
                .as_ref()
                .is_some_and(|key| key.is_empty() || key.contains('\0'))
            {
                return Err(RpcError::invalid(format!(
                    "{}: {name} must be the name of a key in the keyring; keyring_get_keys lists them",
                    all.method()
                )));
            }
            Ok(key)
        };
        let keys = Keys {
            psk: key("psk")?,
            dhchap_key: key("dhchap_key")?,
            dhchap_ctrlr_key: key("dhchap_ctrlr_key")?,
        };
        if keys.dhchap_ctrlr_key.is_some() && keys.dhchap_key.is_none() {
            return Err(RpcError::invalid(format!(
                "{}: dhchap_ctrlr_key needs a dhchap_key too: the side that connects proves itself first",
                all.method()
            )));
        }
        Ok(keys)
    }

    fn put(&self, to: &mut Map<String, Value>) {
        put(to, "psk", self.psk.as_ref());
        put(to, "dhchap_key", self.dhchap_key.as_ref());
        put(to, "dhchap_ctrlr_key", self.dhchap_ctrlr_key.as_ref());
    }
}

impl PeerTransport {
    /// What bdev_nvme is told. By default a lost connection ends the link at once, since the volume makes the next
    /// one. With several paths, one that is lost is tried again as long as the link lives.
    pub fn patience(&self) -> Patience {
        let is_asked_for = !self.alternate_addresses.is_empty()
            || self.reconnect_delay_sec.is_some()
            || self.fast_io_fail_timeout_sec.is_some();
        let loss = self
            .ctrlr_loss_timeout_sec
            .unwrap_or(if is_asked_for { -1 } else { 0 });
        let default = if loss == 0 {
            0
        } else {
            RECONNECT_DELAY_SEC_DEFAULT
        };
        let delay = self.reconnect_delay_sec.unwrap_or(default);
        Patience {
            ctrlr_loss_timeout_sec: loss,
            reconnect_delay_sec: delay,
            fast_io_fail_timeout_sec: self.fast_io_fail_timeout_sec.unwrap_or(delay),
        }
    }

    /// Why a host without SPDK's initiator cannot do what is asked for.
    ///
    /// # Errors
    /// Something is asked for.
    pub fn refuse_on_embedded(&self) -> Result<(), RpcError> {
        self.keys.refuse_on_embedded("bdev_repl_add_peer")?;
        let what = if !self.alternate_addresses.is_empty()
            || self
                .multipath
                .is_some_and(|mode| mode != Multipath::Disable)
        {
            "multipath"
        } else if self.patience() != PeerTransport::default().patience() {
            "bdev_nvme's ctrlr_loss_timeout_sec, reconnect_delay_sec and fast_io_fail_timeout_sec"
        } else {
            return Ok(());
        };
        Err(RpcError::not_supported(format!(
            "bdev_repl_add_peer: the embedded host does not have {what}: it has one path to a peer, and connects again \
             every connect_interval_ms (bdev_repl_set_options); run this node in SPDK for more"
        )))
    }

    pub(super) fn take(all: &mut Parameters) -> Result<PeerTransport, RpcError> {
        let method = all.method().to_owned();
        let multipath = match all.string("multipath")? {
            None => None,
            Some(text) => Some(
                Multipath::ALL
                    .into_iter()
                    .find(|mode| mode.name() == text)
                    .ok_or_else(|| {
                        RpcError::invalid(format!(
                            "{method}: multipath '{text}' is none of disable, failover, multipath"
                        ))
                    })?,
            ),
        };
        let transport = PeerTransport {
            alternate_addresses: list(all, "alternate_addresses", address)?.unwrap_or_default(),
            multipath,
            keys: Keys::take(all)?,
            ctrlr_loss_timeout_sec: all.number_i32("ctrlr_loss_timeout_sec", -1)?,
            reconnect_delay_sec: seconds(all, "reconnect_delay_sec")?,
            fast_io_fail_timeout_sec: seconds(all, "fast_io_fail_timeout_sec")?,
        };
        transport.check(&method)?;
        Ok(transport)
    }

    /// The rules of bdev_nvme, which would answer with a number only, and when it connects.
    fn check(&self, method: &str) -> Result<(), RpcError> {
        let refuse = |text: &str| Err(RpcError::invalid(format!("{method}: {text}")));
        let paths = self.alternate_addresses.len();
        if paths > ALTERNATE_ADDRESSES_MAX {
            return refuse(&format!(
                "alternate_addresses has {paths} addresses, at most {ALTERNATE_ADDRESSES_MAX} are possible"
            ));
        }
        if paths > 0 && self.multipath == Some(Multipath::Disable) {
            return refuse(
                "alternate_addresses are further paths, which multipath 'disable' excludes",
            );
        }
        let Patience {
            ctrlr_loss_timeout_sec: loss,
            reconnect_delay_sec: delay,
            fast_io_fail_timeout_sec: fast,
        } = self.patience();
        if loss == 0 {
            if delay != 0 || fast != 0 {
                return refuse(
                    "with ctrlr_loss_timeout_sec 0 there is no second attempt: reconnect_delay_sec and \
                     fast_io_fail_timeout_sec must be 0 or left out",
                );
            }
            return Ok(());
        }
        let limit = u32::try_from(loss).unwrap_or(u32::MAX);
        if delay == 0 {
            return refuse(
                "reconnect_delay_sec must be at least 1 unless ctrlr_loss_timeout_sec is 0",
            );
        }
        if delay > limit {
            return refuse("reconnect_delay_sec must not be longer than ctrlr_loss_timeout_sec");
        }
        if fast != 0 && (fast < delay || fast > limit) {
            return refuse(
                "fast_io_fail_timeout_sec must be 0 or from reconnect_delay_sec to ctrlr_loss_timeout_sec",
            );
        }
        Ok(())
    }

    pub(super) fn put(&self, to: &mut Map<String, Value>) {
        if !self.alternate_addresses.is_empty() {
            let all: Vec<Value> = self
                .alternate_addresses
                .iter()
                .map(|address| Value::Object(address_object(address)))
                .collect();
            to.insert("alternate_addresses".to_owned(), Value::Array(all));
        }
        put(to, "multipath", self.multipath.map(Multipath::name));
        self.keys.put(to);
        put(to, "ctrlr_loss_timeout_sec", self.ctrlr_loss_timeout_sec);
        put(to, "reconnect_delay_sec", self.reconnect_delay_sec);
        put(
            to,
            "fast_io_fail_timeout_sec",
            self.fast_io_fail_timeout_sec,
        );
    }
}

impl Keys {
    fn refuse_on_embedded(&self, method: &str) -> Result<(), RpcError> {
        if self.is_none() {
            return Ok(());
        }
        let what = if self.psk.is_some() {
            "TLS (psk)"
        } else {
            "DH-HMAC-CHAP (dhchap_key)"
        };
        Err(RpcError::not_supported(format!(
            "{method}: the embedded host does not have {what}: run this node in SPDK, or protect the network between \
             the nodes by other means"
        )))
    }
}

impl Listen {
    /// Why a host without SPDK's target cannot do what is asked for.
    ///
    /// # Errors
    /// Something is asked for.
    pub fn refuse_on_embedded(&self) -> Result<(), RpcError> {
        if self.secure_channel {
            return Err(RpcError::not_supported(
                "bdev_repl_create: the embedded host does not have TLS (secure_channel): run this node in SPDK, or \
                 protect the network between the nodes by other means"
                    .to_owned(),
            ));
        }
        for host in &self.allowed_hosts {
            host.keys.refuse_on_embedded("bdev_repl_create")?;
        }
        if !self.allowed_hosts.is_empty() {
            return Err(RpcError::not_supported(
                "bdev_repl_create: the embedded host lets every host connect to its endpoint: leave allowed_hosts \
                 out, or run this node in SPDK"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// `listen_address`, `secure_channel` and `allowed_hosts` of this node.
    pub(super) fn take(all: &mut Parameters, node_id: u8) -> Result<Option<Listen>, RpcError> {
        let method = all.method().to_owned();
        let address = match all.object("listen_address")? {
            None => None,
            Some(mut nested) => {
                let address = address(&mut nested)?;
                nested.finish()?;
                Some(address)
            }
        };
        let secure_channel = all.flag("secure_channel")?;
        let allowed_hosts = list(all, "allowed_hosts", |host| {
            Ok(AllowedHost {
                node_id: required_node_id(host)?,
                keys: Keys::take(host)?,
            })
        })?;
        let refuse = |text: String| Err(RpcError::invalid(format!("{method}: {text}")));
        let Some(address) = address else {
            if secure_channel || allowed_hosts.is_some() {
                return refuse(
                    "secure_channel and allowed_hosts are about the endpoint that listen_address makes; without it, \
                     give them to nvmf_subsystem_add_listener and nvmf_subsystem_add_host"
                        .to_owned(),
                );
            }
            return Ok(None);
        };
        if allowed_hosts.as_ref().is_some_and(Vec::is_empty) {
            return refuse(
                "allowed_hosts is empty: no peer could connect; leave it out to let all".to_owned(),
            );
        }
        let allowed_hosts = allowed_hosts.unwrap_or_default();
        for (index, host) in allowed_hosts.iter().enumerate() {
            let id = host.node_id;
            if id == node_id {
                return refuse(format!(
                    "allowed_hosts names node {id}, which is this node itself"
                ));
            }
            if allowed_hosts[..index]
                .iter()
                .any(|other| other.node_id == id)
            {
                return refuse(format!("allowed_hosts names node {id} twice"));
            }
            if secure_channel != host.keys.psk.is_some() {
                return refuse(format!(
                    "allowed_hosts, node {id}: TLS needs both secure_channel and a psk for each host, which are \
                     given together or not at all"
                ));
            }
        }
        if secure_channel && allowed_hosts.is_empty() {
            return refuse(
                "secure_channel needs allowed_hosts: each node that may connect has a psk of its own".to_owned(),
            );
        }
        Ok(Some(Listen {
            address,
            secure_channel,
            allowed_hosts,
        }))
    }

    pub(super) fn put(&self, to: &mut Map<String, Value>) {
        let mut address = address_object(&self.address);
        address.insert("trtype".to_owned(), json!("TCP"));
        to.insert("listen_address".to_owned(), Value::Object(address));
        if self.secure_channel {
            to.insert("secure_channel".to_owned(), json!(true));
        }
        if !self.allowed_hosts.is_empty() {
            let hosts = self.allowed_hosts.iter().map(|host| {
                let mut object = Map::new();
                object.insert("node_id".to_owned(), json!(host.node_id));
                host.keys.put(&mut object);
                Value::Object(object)
            });
            to.insert("allowed_hosts".to_owned(), Value::Array(hosts.collect()));
        }
    }
}

/// A list of objects, each of which `take` takes apart completely.
fn list<T>(
    all: &mut Parameters,
    name: &'static str,
    take: impl Fn(&mut Parameters) -> Result<T, RpcError>,
) -> Result<Option<Vec<T>>, RpcError> {
    let Some(objects) = all.objects(name)? else {
        return Ok(None);
    };
    objects
        .into_iter()
        .map(|mut nested| {
            let item = take(&mut nested)?;
            nested.finish()?;
            Ok(item)
        })
        .collect::<Result<Vec<T>, RpcError>>()
        .map(Some)
}

fn seconds(all: &mut Parameters, name: &'static str) -> Result<Option<u32>, RpcError> {
    all.number_u32(name, 0..=SECONDS_MAX as u32)
}

fn address_object(address: &Address) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("adrfam".to_owned(), json!(address.adrfam().name()));
    object.insert("traddr".to_owned(), json!(address.traddr.to_string()));
    object.insert("trsvcid".to_owned(), json!(address.trsvcid.to_string()));
    object
}

fn put<T: serde::Serialize>(to: &mut Map<String, Value>, key: &str, value: Option<T>) {
    if let Some(value) = value {
        to.insert(key.to_owned(), json!(value));
    }
}
