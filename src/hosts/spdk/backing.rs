//! Backing bdevs: opened and claimed on core 0, one channel on each core, and what SPDK lets us know of them.
//! Used by `examine` before there is a volume, by `lifecycle` afterwards.

use std::ffi::{CString, c_int, c_void};
use std::ptr;

use uuid::Uuid;

use super::core::{State, manager_core};
use super::{lifecycle, link, module, sys};
use crate::rpc::RpcError;

/// How what a device has acknowledged becomes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// It has no volatile cache.
    None,
    /// SPDK's flush.
    Bdev,
    /// The NVMe command, passed through.
    Nvme,
}

/// A backing bdev on one core.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    pub desc: *mut sys::spdk_bdev_desc,
    pub channel: *mut sys::spdk_io_channel,
    pub block_size: u32,
    pub blocks: u64,
    pub flush: Flush,
}

/// A backing bdev that is open and claimed, on core 0.
#[derive(Clone, Debug)]
pub struct Backing {
    pub name: String,
    pub desc: *mut sys::spdk_bdev_desc,
    pub uuid: Uuid,
    pub block_size: u32,
    pub blocks: u64,
    /// As a power of two.
    pub alignment: u8,
    pub flush: Flush,
}

/// Modules whose bdevs have nothing below them that could keep a flush back.
const LEAVES: [&str; 9] = [
    "aio", "malloc", "null", "uring", "rbd", "iscsi", "daos", "xnvme", "virtio",
];

unsafe extern "C" fn event(
    kind: sys::spdk_bdev_event_type,
    bdev: *mut sys::spdk_bdev,
    _: *mut c_void,
) {
    // SAFETY: the bdev lives during the call.
    let name = unsafe { sys::text(sys::spdk_bdev_get_name(bdev)) };
    match kind {
        sys::SPDK_BDEV_EVENT_REMOVE => {
            if let Some(core) = manager_core() {
                core.send(move |state| lifecycle::backing_removed(state, &name));
            }
        }
        sys::SPDK_BDEV_EVENT_RESIZE => {
            // SPDK makes no bdev smaller that is open.
            // SAFETY: as above.
            let blocks = unsafe { sys::spdk_bdev_get_num_blocks(bdev) };
            if let Some(core) = manager_core() {
                core.send(move |state| lifecycle::backing_grew(state, &name, blocks));
            }
        }
        _ => {}
    }
}

/// What is wrong with a bdev that is to carry a volume.
fn unfit(name: &str, bdev: *mut sys::spdk_bdev) -> Option<RpcError> {
    // SAFETY: the bdev is open.
    let (metadata, is_zoned) = unsafe {
        (
            sys::spdk_bdev_get_md_size(bdev),
            sys::spdk_bdev_is_zoned(bdev),
        )
    };
    if metadata != 0 {
        return Some(RpcError::not_supported(format!(
            "bdev {name} has {metadata} bytes of metadata a block, which is not replicated: format it without"
        )));
    }
    is_zoned
        .then(|| RpcError::not_supported(format!("bdev {name} is zoned, which a volume cannot be")))
}

/// How flushes reach the device, or why it is not known that they do.
fn flush_of(name: &str, bdev: *mut sys::spdk_bdev) -> Result<Flush, RpcError> {
    // SAFETY: the bdev is open.
    let (module, has_cache, flushes, passes) = unsafe {
        (
            sys::text(sys::spdk_bdev_get_module_name(bdev)),
            sys::spdk_bdev_has_write_cache(bdev),
            sys::spdk_bdev_io_type_supported(bdev, sys::SPDK_BDEV_IO_TYPE_FLUSH),
            sys::spdk_bdev_io_type_supported(bdev, sys::SPDK_BDEV_IO_TYPE_NVME_IO),
        )
    };
    if module == "nvme" && passes {
        // Without a volatile cache there is nothing to flush.
        return Ok(if has_cache { Flush::Nvme } else { Flush::None });
    }
    if !LEAVES.contains(&module.as_str()) && has_cache_below() && !nvme_flushes() {
        return Err(RpcError::not_supported(format!(
            "bdev {name} is layered by module {module} over other bdevs, and this process does not send flushes to \
             NVMe devices with a volatile cache: call bdev_nvme_set_options with enable_flush before they are attached, \
             or replicate the NVMe bdev itself"
        )));
    }
    if flushes {
        return Ok(Flush::Bdev);
    }
    if has_cache {
        return Err(RpcError::not_supported(format!(
            "bdev {name} has a volatile write cache and takes no flush: what it acknowledges could be lost"
        )));
    }
    Ok(Flush::None)
}

/// Whether bdev_nvme sends flushes.
fn nvme_flushes() -> bool {
    let mut options = sys::spdk_bdev_nvme_opts::default();
    // SAFETY: fills in our own structure.
    unsafe {
        sys::spdk_bdev_nvme_get_opts(&raw mut options, size_of::<sys::spdk_bdev_nvme_opts>())
    };
    options.enable_flush
}

/// Whether an NVMe bdev of this process has a volatile cache. What is below a layer is claimed: SPDK does not count it
/// among its leaves.
fn has_cache_below() -> bool {
    // SAFETY: on the application's thread, where bdevs come and go.
    unsafe {
        let mut bdev = sys::spdk_bdev_first();
        while !bdev.is_null() {
            let module = sys::text(sys::spdk_bdev_get_module_name(bdev));
            let is_disk = || !link::is_endpoint_of_peer(&sys::text(sys::spdk_bdev_get_name(bdev)));
            if module == "nvme" && sys::spdk_bdev_has_write_cache(bdev) && is_disk() {
                return true;
            }
            bdev = sys::spdk_bdev_next(bdev);
        }
    }
    false
}

fn claimed(name: &str) -> RpcError {
    let holder = CString::new(name)
        .ok()
        .and_then(|text| {
            // SAFETY: the text lives during the call, on the application's thread, where bdevs come and go.
            unsafe {
                let bdev = sys::spdk_bdev_get_by_name(text.as_ptr());
                if bdev.is_null() {
                    return None;
                }
                let module = sys::claiming_module(bdev);
                if module.is_null() {
                    return None;
                }
                Some(if std::ptr::eq(module, module::get()) {
                    "bdev_repl".to_owned()
                } else {
                    sys::text((*module).name)
                })
            }
        })
        .unwrap_or_else(|| "another module".to_owned());
    RpcError::not_permitted(format!("bdev {name} is claimed by {holder}"))
}

/// Opens a bdev and claims it.
///
/// # Errors
/// It is not there, not fit, or somebody else's.
pub fn open(name: &str) -> Result<Backing, RpcError> {
    let backing = look(name)?;
    // SAFETY: the descriptor is open; the module lives for ever.
    let result = unsafe {
        let bdev = sys::spdk_bdev_desc_get_bdev(backing.desc);
        sys::spdk_bdev_module_claim_bdev(bdev, backing.desc, module::get())
    };
    if result != 0 {
        close_only(&backing);
        return Err(claimed(name));
    }
    Ok(backing)
}

/// Opens a bdev for reading, without a claim.
///
/// # Errors
/// It is not there, or not fit.
pub fn look(name: &str) -> Result<Backing, RpcError> {
    let text = CString::new(name)
        .map_err(|_| RpcError::invalid("the name of a bdev has no zero byte".to_owned()))?;
    let mut desc = ptr::null_mut();
    // SAFETY: the text lives during the call.
    let opened: c_int = unsafe {
        sys::spdk_bdev_open_ext(
            text.as_ptr(),
            // A claim makes it writable.
            false,
            Some(event),
            ptr::null_mut(),
            &raw mut desc,
        )
    };
    match opened {
        0 => {}
        errno if errno == -libc::ENODEV => {
            return Err(RpcError::no_device(format!(
                "no bdev is named {name}; bdev_get_bdevs lists them"
            )));
        }
        errno if errno == -libc::EPERM => {
            return Err(claimed(name));
        }
        errno => {
            return Err(RpcError::errno(
                errno,
                format!("bdev {name} cannot be opened"),
            ));
        }
    }
    // SAFETY: open.
    let bdev = unsafe { sys::spdk_bdev_desc_get_bdev(desc) };
    let checked = match unfit(name, bdev) {
        Some(error) => Err(error),
        None => flush_of(name, bdev),
    };
    let flush = match checked {
        Ok(how) => how,
        Err(error) => {
            // SAFETY: opened above.
            unsafe { sys::spdk_bdev_close(desc) };
            return Err(error);
        }
    };
    // SAFETY: open.
    unsafe {
        Ok(Backing {
            name: sys::text(sys::spdk_bdev_get_name(bdev)),
            desc,
            uuid: sys::uuid_of(&*sys::spdk_bdev_get_uuid(bdev)),
            block_size: sys::spdk_bdev_get_block_size(bdev),
            blocks: sys::spdk_bdev_get_num_blocks(bdev),
            alignment: (*bdev).required_alignment,
            flush,
        })
    }
}

impl Backing {
    /// A channel for the current core.
    pub fn disk(&self) -> Option<Disk> {
        // SAFETY: the descriptor stays open until every core has put its channel.
        let channel = unsafe { sys::spdk_bdev_get_io_channel(self.desc) };
        (!channel.is_null()).then_some(Disk {
            desc: self.desc,
            channel,
            block_size: self.block_size,
            blocks: self.blocks,
            flush: self.flush,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_size)
    }
}

impl Disk {
    /// Gives the channel back, on its core, when nothing is in flight on it.
    pub fn put(self) {
        // SAFETY: from `Backing::disk` on this thread, put once.
        unsafe { sys::spdk_put_io_channel(self.channel) };
    }
}

fn close_only(backing: &Backing) {
    // SAFETY: opened on this thread, closed once.
    unsafe { sys::spdk_bdev_close(backing.desc) };
}

/// Lets go of a bdev, on core 0: as soon as it is not being reset.
pub fn close(state: &mut State, backing: &Backing, claimed: bool) {
    if state.node.frozen.is_resetting(Some(backing.desc)) {
        let backing = backing.clone();
        let again = move |state: &mut State| close(state, &backing, claimed);
        return state.node.deferred.push(Box::new(again));
    }
    state.node.frozen.forget(backing.desc);
    if claimed {
        // SAFETY: claimed by us, and open.
        unsafe {
            let bdev = sys::spdk_bdev_desc_get_bdev(backing.desc);
            sys::spdk_bdev_module_release_bdev(bdev);
        }
    }
    close_only(backing);
}
