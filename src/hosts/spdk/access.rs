//! Who may connect to an endpoint: the nodes that the operator has named, each with its keys of the application's
//! keyring. Called by `endpoint` while the subsystem is being made.

use std::ffi::{CString, c_void};
use std::ptr;

use uuid::Uuid;

use super::sys;
use crate::hosts::control::endpoint::endpoint_nqn;
use crate::rpc::RpcError;
use crate::rpc::volume::AllowedHost;

/// A key of the keyring, held.
struct Key(*mut sys::spdk_key);

impl Key {
    /// Null where none is asked for.
    fn get(name: Option<&str>) -> Result<Key, RpcError> {
        let Some(name) = name else {
            return Ok(Key(ptr::null_mut()));
        };
        let text = CString::new(name).unwrap_or_default();
        // SAFETY: the text lives during the call.
        let key = unsafe { sys::spdk_keyring_get_key(text.as_ptr()) };
        if key.is_null() {
            return Err(RpcError::invalid(missing_key(name)));
        }
        Ok(Key(key))
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: held, and let go of once; null is nothing.
        unsafe { sys::spdk_keyring_put_key(self.0) };
    }
}

/// The text for a key that is not there.
pub fn missing_key(name: &str) -> String {
    format!(
        "no key in the keyring is named '{name}': add it with keyring_file_add_key; keyring_get_keys lists them"
    )
}

/// Lets these nodes of a volume connect, and nobody else.
///
/// # Errors
/// A key is not there, or the target refuses it. The subsystem is to be destroyed then.
pub fn allow(
    subsystem: *mut sys::spdk_nvmf_subsystem,
    volume: &Uuid,
    hosts: &[AllowedHost],
) -> Result<(), RpcError> {
    // SAFETY: the subsystem is inactive, and nobody else knows it yet.
    unsafe { sys::spdk_nvmf_subsystem_set_allow_any_host(subsystem, hosts.is_empty()) };
    for host in hosts {
        let nqn = CString::new(endpoint_nqn(volume, host.node_id)).unwrap_or_default();
        Key::get(host.keys.psk.as_deref())?;
        let key = Key::get(host.keys.dhchap_key.as_deref())?;
        let controller_key = Key::get(host.keys.dhchap_ctrlr_key.as_deref())?;
        // The transport takes the name of its key as JSON.
        let mut text = serde_json::json!({"psk": host.keys.psk.as_deref().unwrap_or_default()})
            .to_string()
            .into_bytes();
        let mut values = [sys::spdk_json_val::default(); 4];
        let mut end: *mut c_void = ptr::null_mut();
        let mut options = sys::spdk_nvmf_host_opts {
            size: size_of::<sys::spdk_nvmf_host_opts>(),
            dhchap_key: key.0,
            dhchap_ctrlr_key: controller_key.0,
            ..Default::default()
        };
        // SAFETY: text, values and keys live during both calls; the target takes references of its own.
        let result = unsafe {
            if host.keys.psk.is_some() {
                sys::spdk_json_parse(
                    text.as_mut_ptr().cast(),
                    text.len(),
                    values.as_mut_ptr(),
                    values.len(),
                    &raw mut end,
                    sys::SPDK_JSON_PARSE_FLAG_DECODE_IN_PLACE,
                );
                options.params = values.as_ptr();
            }
            sys::spdk_nvmf_subsystem_add_host_ext(subsystem, nqn.as_ptr(), &raw mut options)
        };
        if result != 0 {
            let error = std::io::Error::from_raw_os_error(-result);
            return Err(RpcError::errno(
                result,
                format!(
                    "node {} cannot be let in ({error}): SPDK's log says why; a psk must be in the interchange format \
                     of NVMe/TCP (NVMeTLSkey-1:...), a dhchap_key in that of NVMe (DHHC-1:...)",
                    host.node_id
                ),
            ));
        }
    }
    Ok(())
}
