//! A peer that takes connections and says nothing: what SPDK waits for from it ends early. Called by `link`, on core 0, for
//! links that do not come back.

use super::sys;

/// Whether the controller below a bdev of bdev_nvme's is being connected anew, by whomever. `desc` is open, and this core
/// has a channel of it, by which the controller lives.
pub fn is_connecting(desc: *mut sys::spdk_bdev_desc) -> bool {
    // SAFETY: the caller's promise; on the application's thread.
    unsafe { connecting(desc) }.is_some()
}

/// Fails a controller that is being connected, of a bdev as with [`is_connecting`].
pub fn give_up(desc: *mut sys::spdk_bdev_desc) {
    // SAFETY: the caller's promise; on the application's thread, where controllers are reset.
    unsafe {
        if let Some(controller) = connecting(desc) {
            sys::spdk_nvme_ctrlr_fail(controller);
        }
    }
}

/// # Safety
/// As with [`is_connecting`].
unsafe fn connecting(desc: *mut sys::spdk_bdev_desc) -> Option<*mut sys::spdk_nvme_ctrlr> {
    // SAFETY: the caller's; the context of one of bdev_nvme's bdevs is a namespace, or none where there is no controller.
    unsafe {
        let namespace: *mut sys::spdk_nvme_ns = sys::spdk_bdev_get_module_ctx(desc).cast();
        if namespace.is_null() {
            return None;
        }
        let controller = sys::spdk_nvme_ns_get_ctrlr(namespace);
        let is_settled = sys::spdk_nvme_ctrlr_is_failed(controller) || is_ready(controller);
        (!is_settled).then_some(controller)
    }
}

/// Whether the controller answers commands: only then it gives queue pairs out. It may be that its own queue pairs are
/// being connected, and those of a failed controller would not be looked after any more.
///
/// # Safety
/// The controller is one of SPDK's, and this its thread.
unsafe fn is_ready(controller: *mut sys::spdk_nvme_ctrlr) -> bool {
    // SAFETY: the caller's; what is given out goes back unused.
    unsafe {
        let mut options = sys::spdk_nvme_io_qpair_opts::default();
        let bytes = size_of_val(&options);
        sys::spdk_nvme_ctrlr_get_default_io_qpair_opts(controller, &raw mut options, bytes);
        options.create_only = true;
        let queue = sys::spdk_nvme_ctrlr_alloc_io_qpair(controller, &raw const options, bytes);
        if queue.is_null() {
            return false;
        }
        sys::spdk_nvme_ctrlr_free_io_qpair(queue);
        true
    }
}
