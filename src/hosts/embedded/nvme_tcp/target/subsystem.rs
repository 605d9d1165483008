//! What a subsystem is made of, as RPCs give it and as they show it. Plain data; knows no connections.

use thiserror::Error;

use super::NamespaceHandle;

/// Why a change was refused; nothing has been changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TargetError {
    #[error("{what} {name} already exists")]
    Exists { what: &'static str, name: String },
    #[error("{what} {name} does not exist")]
    NotFound { what: &'static str, name: String },
    #[error("{what} {name}: {reason}")]
    Invalid {
        what: &'static str,
        name: String,
        reason: String,
    },
}

/// Asymmetric namespace access state, as on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AnaState {
    Optimized = 0x01,
    NonOptimized = 0x02,
    Inaccessible = 0x03,
}

/// Where a subsystem can be reached; SPDK's words.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListenerAddress {
    /// "TCP".
    pub trtype: String,
    /// "IPv4" or "IPv6".
    pub adrfam: String,
    pub traddr: String,
    pub trsvcid: String,
}

impl ListenerAddress {
    /// A TCP listener at this address; the family is read off the address.
    pub fn tcp(traddr: &str, trsvcid: &str) -> ListenerAddress {
        ListenerAddress {
            trtype: "TCP".into(),
            adrfam: if traddr.contains(':') { "IPv6" } else { "IPv4" }.into(),
            traddr: traddr.into(),
            trsvcid: trsvcid.into(),
        }
    }

    pub(super) fn is_same_place(&self, other: &ListenerAddress) -> bool {
        self.traddr == other.traddr && self.trsvcid == other.trsvcid
    }
}

/// What a subsystem is created with; the names are those of SPDK's nvmf_create_subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemParameters {
    pub nqn: String,
    pub serial_number: String,
    pub model_number: String,
    /// 0 means SPDK's default of 32.
    pub max_namespaces: u32,
    pub allow_any_host: bool,
    pub min_cntlid: u16,
    pub max_cntlid: u16,
    pub ana_reporting: bool,
}

impl SubsystemParameters {
    /// SPDK's defaults.
    pub fn new(nqn: &str) -> SubsystemParameters {
        SubsystemParameters {
            nqn: nqn.into(),
            serial_number: "00000000000000000000".into(),
            model_number: "SPDK bdev Controller".into(),
            max_namespaces: 32,
            allow_any_host: false,
            min_cntlid: 1,
            max_cntlid: 0xffef,
            ana_reporting: false,
        }
    }
}

/// What a namespace is added with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceParameters {
    /// The lowest free one if not given.
    pub nsid: Option<u32>,
    pub handle: NamespaceHandle,
    /// Bytes: a power of two from 512 to 65536.
    pub block_size: u32,
    pub size_blocks: u64,
    pub nguid: [u8; 16],
    pub uuid: [u8; 16],
    pub eui64: [u8; 8],
    /// Refuses everything but vendor specific commands (the endpoint of a peer).
    pub vendor_only: bool,
}

/// A namespace as connections see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    pub nsid: u32,
    pub handle: NamespaceHandle,
    pub block_size: u32,
    pub size_blocks: u64,
    pub nguid: [u8; 16],
    pub uuid: [u8; 16],
    pub eui64: [u8; 8],
    pub vendor_only: bool,
    pub ana_state: AnaState,
}

/// A subsystem as nvmf_get_subsystems shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemSummary {
    pub parameters: SubsystemParameters,
    pub listeners: Vec<ListenerAddress>,
    pub hosts: Vec<String>,
    pub namespaces: Vec<Namespace>,
    /// CNTLID and host NQN of every controller.
    pub controllers: Vec<(u16, String)>,
}
