//! One path to a peer's endpoint: a call of bdev_nvme's to connect, with all that the operator has asked for.
//! Called by `link`, on core 0, which learns how it went by [`link::connected`].

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

use uuid::Uuid;

use super::core::manager_core;
use super::{access, link, sys};
use crate::host::{PeerAddress, PeerSlot};
use crate::hosts::control::endpoint::{endpoint_nqn, host_id};
use crate::rpc::volume::{Keys, Multipath, PeerTransport};

/// From sending Connect to its answer, for each queue.
const CONNECT_TIMEOUT_US: u64 = 3_000_000;
/// For the TCP connection; SPDK has one setting for the whole process and none by default.
const TCP_CONNECT_TIMEOUT_MS: u32 = 3000;

/// Whose path it is, and to where.
pub struct Path<'a> {
    pub volume: u32,
    pub slot: PeerSlot,
    pub uuid: Uuid,
    /// This node, and the other.
    pub nodes: (u8, u8),
    /// The controller that it belongs to.
    pub controller: &'a str,
    pub address: &'a PeerAddress,
    pub transport: &'a PeerTransport,
}

/// What bdev_nvme calls back with.
struct Ticket {
    volume: u32,
    slot: PeerSlot,
    names: [*const c_char; 4],
    keys: Keys,
    /// What the options refer to while bdev_nvme has them.
    texts: Vec<CString>,
}

impl Ticket {
    /// A text that lives as long as the ticket; null for none.
    fn keep(&mut self, text: Option<&str>) -> *const c_char {
        let Some(text) = text.and_then(|text| CString::new(text).ok()) else {
            return ptr::null();
        };
        // Its bytes stay where they are when the list grows.
        let bytes = text.as_ptr();
        self.texts.push(text);
        bytes
    }
}

/// Starts to connect a path.
///
/// # Errors
/// Nothing was started: the callback will not come.
pub fn connect(path: &Path<'_>) -> Result<(), String> {
    limit_tcp_connect();
    let (own, other) = path.nodes;
    let address = path.address;
    let mut trid = sys::spdk_nvme_transport_id::default();
    let mut driver = sys::nvme_ctrlr_opts();
    let mut bdev = sys::bdev_nvme_ctrlr_opts();
    driver.extended_host_id = host_id(&path.uuid, own);
    trid.trtype = sys::SPDK_NVME_TRANSPORT_TCP;
    trid.adrfam = if address.traddr.contains(':') {
        sys::SPDK_NVMF_ADRFAM_IPV6
    } else {
        sys::SPDK_NVMF_ADRFAM_IPV4
    };
    let fits = sys::set_text(&mut trid.trstring, "TCP")
        && sys::set_text(&mut trid.traddr, &address.traddr)
        && sys::set_text(&mut trid.trsvcid, &address.trsvcid.to_string())
        && sys::set_text(&mut trid.subnqn, &endpoint_nqn(&path.uuid, other))
        && sys::set_text(&mut driver.hostnqn, &endpoint_nqn(&path.uuid, own));
    if !fits {
        return Err(format!("{} is no address", address.traddr));
    }
    driver.header_digest = address.header_digest;
    driver.data_digest = address.data_digest;
    // Refused reads are answers, and a link that goes is told of once.
    driver.disable_error_logging = true;
    driver.fabrics_connect_timeout_us = CONNECT_TIMEOUT_US;
    // The volume's own configuration names the peer: bdev_nvme leaves controllers of a discovery service out of a
    // saved one.
    bdev.from_discovery_service = true;
    // By default no second try of bdev_nvme's own: the session ends, and the manager asks for the next link.
    let patience = path.transport.patience();
    bdev.ctrlr_loss_timeout_sec = patience.ctrlr_loss_timeout_sec;
    bdev.reconnect_delay_sec = patience.reconnect_delay_sec;
    bdev.fast_io_fail_timeout_sec = patience.fast_io_fail_timeout_sec;
    bdev.multipath = match path.transport.multipath {
        Some(mode) => mode == Multipath::Multipath,
        None => !path.transport.alternate_addresses.is_empty(),
    };
    let name =
        CString::new(path.controller).map_err(|_| "the volume's name has a zero".to_owned())?;
    let keys = &path.transport.keys;
    let mut ticket = Box::new(Ticket {
        volume: path.volume,
        slot: path.slot,
        names: [ptr::null(); 4],
        keys: keys.clone(),
        texts: Vec::new(),
    });
    bdev.psk = ticket.keep(keys.psk.as_deref());
    bdev.dhchap_key = ticket.keep(keys.dhchap_key.as_deref());
    bdev.dhchap_ctrlr_key = ticket.keep(keys.dhchap_ctrlr_key.as_deref());
    let names = ticket.names.as_mut_ptr();
    let count = ticket.names.len() as u32;
    let ticket = Box::into_raw(ticket);
    // SAFETY: the ticket, with the names and texts in it, lives until the callback takes it back; the rest is copied.
    let result = unsafe {
        sys::spdk_bdev_nvme_create(
            &raw mut trid,
            name.as_ptr(),
            names,
            count,
            Some(connected),
            ticket.cast(),
            &raw mut driver,
            &raw mut bdev,
        )
    };
    if result == 0 {
        return Ok(());
    }
    // SAFETY: refused, so the callback will not come.
    drop(unsafe { Box::from_raw(ticket) });
    if result == -libc::ENOKEY {
        let names = [&keys.psk, &keys.dhchap_key, &keys.dhchap_ctrlr_key];
        let missing = names
            .into_iter()
            .flatten()
            .find(|name| !is_in_keyring(name));
        return Err(access::missing_key(missing.map_or("", String::as_str)));
    }
    let error = std::io::Error::from_raw_os_error(-result);
    Err(format!("bdev_nvme refuses to connect: {error}"))
}

fn is_in_keyring(name: &str) -> bool {
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: the text lives during the call; putting null is nothing.
    unsafe {
        let key = sys::spdk_keyring_get_key(name.as_ptr());
        sys::spdk_keyring_put_key(key);
        !key.is_null()
    }
}

/// Without a limit an attempt to reach a peer that is not there lasts as long as the kernel's.
fn limit_tcp_connect() {
    let mut options = sys::spdk_nvme_transport_opts::default();
    // SAFETY: fills in, and reads, a structure of ours.
    unsafe {
        sys::spdk_nvme_transport_get_opts(&raw mut options, size_of_val(&options));
        if options.tcp_connect_timeout_ms == 0 {
            options.tcp_connect_timeout_ms = TCP_CONNECT_TIMEOUT_MS;
            sys::spdk_nvme_transport_set_opts(&raw const options, size_of_val(&options));
        }
    }
}

/// What to look at when a peer is not reached.
fn advice(keys: &Keys) -> &'static str {
    if keys.psk.is_some() {
        "; with a psk the peer must listen with secure_channel, and let this node in with the same key"
    } else if keys.dhchap_key.is_some() {
        "; with a dhchap_key the peer must let this node in with the same keys"
    } else {
        ""
    }
}

unsafe extern "C" fn connected(ticket: *mut c_void, bdevs: usize, result: c_int) {
    // SAFETY: made by `connect`, called back once.
    let ticket = unsafe { Box::from_raw(ticket.cast::<Ticket>()) };
    let name = if bdevs > 0 {
        // SAFETY: bdev_nvme has set as many names as it has bdevs.
        unsafe { sys::text(ticket.names[0]) }
    } else {
        String::new()
    };
    let outcome = if result == 0 {
        Ok(name)
    } else {
        let error = std::io::Error::from_raw_os_error(-result);
        let advice = advice(&ticket.keys);
        Err(format!("the peer is not reached: {error}{advice}"))
    };
    if let Some(core) = manager_core() {
        core.send(move |state| link::connected(state, ticket.volume, ticket.slot, outcome));
    }
}
