//! The methods of replicated volumes: what a call asks for, parsed and checked, and what a report says.
//! Hosts hand calls to [`VolumeRequest::parse`] and the result to their [`VolumeService`].
//! Must not know how a host carries a request out.

mod parse;
mod report;
#[cfg(test)]
mod tests;
mod transport;

use std::net::IpAddr;

use uuid::Uuid;

pub use parse::{METHODS, NAME_BYTES_MAX};
pub use report::{
    ActivityLogReport, GenerationsReport, OptionsReport, PeerReport, ResyncReport, VolumeReport,
};
pub use transport::{AllowedHost, Keys, Listen, Multipath, Patience, PeerTransport};

use super::{Reply, RpcError};

/// Address family of a transport address, with SPDK's spelling in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressFamily {
    /// `IPv4`
    Ipv4,
    /// `IPv6`
    Ipv6,
}

impl AddressFamily {
    /// SPDK's spelling.
    pub const fn name(self) -> &'static str {
        match self {
            AddressFamily::Ipv4 => "IPv4",
            AddressFamily::Ipv6 => "IPv6",
        }
    }

    /// Parses any capitalisation of SPDK's spelling.
    pub fn from_name(name: &str) -> Option<AddressFamily> {
        if name.eq_ignore_ascii_case("ipv4") {
            Some(AddressFamily::Ipv4)
        } else if name.eq_ignore_ascii_case("ipv6") {
            Some(AddressFamily::Ipv6)
        } else {
            None
        }
    }

    /// The family of an address.
    pub fn of(address: IpAddr) -> AddressFamily {
        if address.is_ipv4() {
            AddressFamily::Ipv4
        } else {
            AddressFamily::Ipv6
        }
    }
}

/// An NVMe/TCP transport address: a numeric IP address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// `traddr`
    pub traddr: IpAddr,
    /// `trsvcid`; never 0 for a peer.
    pub trsvcid: u16,
}

impl Address {
    /// `adrfam`
    pub fn adrfam(&self) -> AddressFamily {
        AddressFamily::of(self.traddr)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::net::SocketAddr::new(self.traddr, self.trsvcid).fmt(f)
    }
}

/// What a listener of the NVMe-oF target speaks, with SPDK's spelling in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `TCP`
    Tcp,
    /// `RDMA`
    Rdma,
}

impl Transport {
    /// SPDK's spelling.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "TCP",
            Transport::Rdma => "RDMA",
        }
    }

    /// Parses any capitalisation of SPDK's spelling.
    pub fn from_name(name: &str) -> Option<Transport> {
        [Transport::Tcp, Transport::Rdma]
            .into_iter()
            .find(|transport| name.eq_ignore_ascii_case(transport.name()))
    }
}

/// A listener through which hosts reach the volume: its ANA state follows the role of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaListener {
    /// The subsystem.
    pub nqn: String,
    /// `trtype`
    pub transport: Transport,
    /// Where it listens.
    pub address: Address,
    /// The ANA group; `None` is that of the volume's namespace.
    pub anagrpid: Option<u32>,
}

/// When the volume is a bdev for what is built on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Register {
    /// `always`: as long as there is the volume.
    #[default]
    Always,
    /// `on_promote`: as long as this node is Primary, so that logical volumes, partitions and encryption on it come up there.
    OnPromote,
}

impl Register {
    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Register::Always => "always",
            Register::OnPromote => "on_promote",
        }
    }

    /// Parses what [`Register::name`] gives.
    pub fn from_name(name: &str) -> Option<Register> {
        [Register::Always, Register::OnPromote]
            .into_iter()
            .find(|register| name == register.name())
    }
}

/// `bdev_repl_create`: makes a volume over a backing bdev, or brings back the one whose metadata is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateVolume {
    /// Name of the volume, 1 to [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// The backing bdev; `None` makes the node diskless.
    pub base_bdev: Option<String>,
    /// The same on all nodes; `None` derives it from the name.
    pub uuid: Option<Uuid>,
    /// 0 to 7; different on each node of the volume.
    pub node_id: u8,
    /// What one bit of the bitmap stands for, 4 to 1024 KiB, a power of two.
    pub granularity_kb: u32,
    /// Peers that the metadata has room for, 1 to 7.
    pub peer_slots: u8,
    /// Activity log rings that the metadata has room for: cores that may write, 1 to 64.
    pub channel_slots: u8,
    /// Extents of 4 MiB that one core may keep active, 7 to 1000.
    pub al_extents: u32,
    /// Size of the volume; `None` takes what the backing bdev has room for.
    pub size_mb: Option<u64>,
    /// Only 0 can be given: the device is taken over in place, its data staying where they are and the
    /// metadata going to its end.
    pub data_offset: Option<u64>,
    /// Both replicas are declared to hold the same data: no first resync.
    pub assume_clean: bool,
    /// The backing bdev already carries the data: UpToDate here, full resync to the peers.
    pub has_data: bool,
    /// Go on although the device carries something else.
    pub force: bool,
    /// Where this node's peer endpoint listens; `None` leaves it to listeners made otherwise.
    pub listen: Option<Listen>,
    /// Listeners whose ANA state follows the role.
    pub ana_listeners: Vec<AnaListener>,
    /// When the volume is a bdev.
    pub register: Register,
}

/// `bdev_repl_add_peer`: makes a peer known, and by default starts connecting to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddPeer {
    /// Name of the volume.
    pub name: String,
    /// The peer's node id, 0 to 7.
    pub node_id: u8,
    /// Where the peer's endpoint listens.
    pub address: Address,
    /// NVMe/TCP header digest.
    pub hdgst: bool,
    /// NVMe/TCP data digest.
    pub ddgst: bool,
    /// Keys, further paths, patience.
    pub transport: PeerTransport,
    /// Start connecting at once.
    pub connect: bool,
}

/// `bdev_repl_set_options`: what is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetOptions {
    /// Name of the volume.
    pub name: String,
    /// A Ping is sent after this much silence, 50 to 120,000.
    pub ping_interval_ms: Option<u32>,
    /// A Ping (or any command) without an answer for this long ends the session, 50 to 120,000.
    pub ping_timeout_ms: Option<u32>,
    /// Pause between two attempts to connect, 50 to 120,000.
    pub connect_interval_ms: Option<u32>,
    /// Upper limit of a resync to this node in MiB a second; 0 is no limit.
    pub resync_rate_mb: Option<u32>,
    /// Listeners whose ANA state follows the role, instead of those before.
    pub ana_listeners: Option<Vec<AnaListener>>,
}

/// One call of a volume method, checked as far as that needs no knowledge of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeRequest {
    /// `bdev_repl_create`
    Create(CreateVolume),
    /// `bdev_repl_delete`: the volume goes, its metadata stays.
    Delete { name: String },
    /// `bdev_repl_wipe`: overwrites the metadata of a volume that is gone, on the bdev named.
    Wipe {
        /// The backing bdev.
        base_bdev: String,
    },
    /// `bdev_repl_get_volumes`: all, or the one named.
    GetVolumes { name: Option<String> },
    /// `bdev_repl_attach`: gives a diskless volume its backing bdev back.
    Attach { name: String, base_bdev: String },
    /// `bdev_repl_detach`: the volume goes on diskless.
    Detach { name: String },
    /// `bdev_repl_add_peer`
    AddPeer(AddPeer),
    /// `bdev_repl_remove_peer`
    RemovePeer { name: String, node_id: u8 },
    /// `bdev_repl_connect`: to all peers, or the one named.
    Connect {
        name: String,
        node_id: Option<u8>,
        /// Gives this node's changes up if the connection finds a split brain.
        discard_my_data: bool,
    },
    /// `bdev_repl_disconnect`: from all peers, or the one named; stays StandAlone.
    Disconnect { name: String, node_id: Option<u8> },
    /// `bdev_repl_promote`
    Promote {
        name: String,
        /// Even if the data here may not be the newest.
        force: bool,
    },
    /// `bdev_repl_demote`
    Demote { name: String },
    /// `bdev_repl_invalidate`: this replica counts as worth nothing; full resync from a peer.
    Invalidate { name: String },
    /// `bdev_repl_pause_resync`
    PauseResync { name: String },
    /// `bdev_repl_resume_resync`
    ResumeResync { name: String },
    /// `bdev_repl_set_options`
    SetOptions(SetOptions),
}

/// What carries volume requests out, on the core that owns the volumes.
pub trait VolumeService {
    /// Starts a request. `reply` may be kept and answered later from the same core.
    fn volume_request(&mut self, request: VolumeRequest, reply: Reply);
}

/// Parses `params` of one of [`METHODS`] and hands the request to `service`; a parse error is answered
/// at once. Gives `reply` back if the method is not one of ours.
pub fn call(
    service: &mut impl VolumeService,
    method: &str,
    params: Option<serde_json::Value>,
    reply: Reply,
) -> Option<Reply> {
    if !METHODS.contains(&method) {
        return Some(reply);
    }
    match VolumeRequest::parse(method, params) {
        Ok(request) => service.volume_request(request, reply),
        Err(error) => reply.fail(error),
    }
    None
}

/// The error for a volume name that does not exist here.
pub fn no_volume(name: &str) -> RpcError {
    RpcError::no_device(format!(
        "no volume is named '{name}'; bdev_repl_get_volumes lists them"
    ))
}
