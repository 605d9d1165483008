//! Backing bdevs that do not answer. Whoever lets go of one waits for what is under way on it; where that takes too long
//! the bdev is reset, which has it give back what it holds. Looked after by core 0's poller; `lifecycle` and `opening` are
//! asked what is being let go of, and `backing` asks before it closes.

use std::ffi::c_void;

use super::core::{State, manager_core};
use super::sys;
use crate::engine::peer::state::DiskState;

/// What has been under way for longer, while its bdev is let go of, does not come back by itself.
const OVERDUE_S: u64 = 3;
/// Between two looks for what is being let go of, and between two resets of the same bdev.
const LOOK_NS: u64 = 250_000_000;
const AGAIN_NS: u64 = OVERDUE_S * 1_000_000_000;
/// Resets after which the operator is told that they do not help.
const RESETS_IN_VAIN: u32 = 2;

/// A backing bdev that is being let go of.
struct Watch {
    desc: *mut sys::spdk_bdev_desc,
    name: String,
    /// The channel of the reset that is under way.
    resetting: Option<*mut sys::spdk_io_channel>,
    resets: u32,
    next_reset_ns: u64,
    /// The operator knows that it takes no reset either.
    is_told: bool,
}

/// All of them, on core 0.
#[derive(Default)]
pub struct Frozen {
    watches: Vec<Watch>,
    next_look_ns: u64,
    /// The application is going down: whatever a backing bdev holds keeps others from ending.
    pub is_ending: bool,
}

impl Frozen {
    fn watch(&mut self, desc: *mut sys::spdk_bdev_desc) -> Option<&mut Watch> {
        let mut watches = self.watches.iter_mut();
        watches.find(|watch| std::ptr::eq(watch.desc, desc))
    }

    /// Whether a bdev, or any, is being reset: it stays open meanwhile.
    pub fn is_resetting(&self, desc: Option<*mut sys::spdk_bdev_desc>) -> bool {
        let is_meant = |watch: &Watch| desc.is_none_or(|desc| std::ptr::eq(watch.desc, desc));
        let mut watches = self.watches.iter();
        watches.any(|watch| watch.resetting.is_some() && is_meant(watch))
    }

    /// A bdev is about to be closed, and its timeout goes with it.
    pub fn forget(&mut self, desc: *mut sys::spdk_bdev_desc) {
        self.watches.retain(|watch| !std::ptr::eq(watch.desc, desc));
    }
}

/// With each round of the poller.
pub fn poll(state: &mut State) {
    let now_ns = super::context::now_ns();
    if now_ns < state.node.frozen.next_look_ns {
        return;
    }
    state.node.frozen.next_look_ns = now_ns + LOOK_NS;
    let wanted = let_go(state);
    let frozen = &mut state.node.frozen;
    let is_wanted = |desc| wanted.iter().any(|(wanted, _)| std::ptr::eq(*wanted, desc));
    frozen.watches.retain(|watch| {
        let stays = watch.resetting.is_some() || is_wanted(watch.desc);
        if !stays {
            // SAFETY: open, since closing forgets the watch; on the thread that opened it.
            unsafe { sys::spdk_bdev_set_timeout(watch.desc, 0, None, std::ptr::null_mut()) };
        }
        stays
    });
    for (desc, name) in wanted {
        if frozen.watch(desc).is_some() {
            continue;
        }
        // SAFETY: open, on the thread that opened it.
        let set =
            unsafe { sys::spdk_bdev_set_timeout(desc, OVERDUE_S, Some(overdue_cb), desc.cast()) };
        if set == 0 {
            frozen.watches.push(Watch {
                desc,
                name,
                resetting: None,
                resets: 0,
                next_reset_ns: 0,
                is_told: false,
            });
        }
    }
}

/// The backing bdevs that somebody waits for to be let go of.
fn let_go(state: &mut State) -> Vec<(*mut sys::spdk_bdev_desc, String)> {
    let is_ending = state.node.frozen.is_ending;
    let mut found = Vec::new();
    for opening in &state.node.openings {
        if is_ending || opening.is_removed {
            found.push((opening.backing.desc, opening.backing.name.clone()));
        }
    }
    for control in &state.node.controls {
        let Some(backing) = &control.backing else {
            continue;
        };
        let this = state.volumes.get(control.volume as usize);
        let manager = this.and_then(|this| this.as_ref()?.manager.as_ref());
        let has_failed = manager.is_some_and(|manager| {
            let disk = manager.disk();
            disk <= DiskState::Failed && disk != DiskState::Attaching
        });
        if is_ending || control.deleting || control.is_detaching() || has_failed {
            found.push((backing.desc, backing.name.clone()));
        }
    }
    found
}

/// SPDK, on the thread of the channel that it came from: an I/O of ours is overdue. Called again as long as it is.
unsafe extern "C" fn overdue_cb(desc: *mut c_void, io: *mut sys::spdk_bdev_io) {
    // SAFETY: an I/O that is not complete.
    let is_reset = u32::from(unsafe { (*io).type_ }) == sys::SPDK_BDEV_IO_TYPE_RESET;
    let desc: *mut sys::spdk_bdev_desc = desc.cast();
    if let Some(core) = manager_core() {
        core.send(move |state| overdue(state, desc, is_reset));
    }
}

fn overdue(state: &mut State, desc: *mut sys::spdk_bdev_desc, is_reset: bool) {
    let now_ns = super::context::now_ns();
    let Some(watch) = state.node.frozen.watch(desc) else {
        return;
    };
    let in_vain = is_reset || (watch.resetting.is_none() && watch.resets >= RESETS_IN_VAIN);
    if in_vain && !watch.is_told {
        watch.is_told = true;
        tracing::error!(
            "backing bdev {} still holds I/O after a reset: its volume is not let go of, and the application does not \
             end, until the device gives it back, since it may still write to that memory; see to the device, or end \
             the process by SIGKILL",
            watch.name
        );
    }
    if watch.resetting.is_some() || is_reset || now_ns < watch.next_reset_ns {
        return;
    }
    // SAFETY: open, since closing forgets the watch; the channel is put when the reset has ended. Without room for it, it
    // is tried again with the next call.
    let resetting = unsafe {
        let channel = sys::spdk_bdev_get_io_channel(desc);
        if channel.is_null() {
            return;
        }
        let result = sys::spdk_bdev_reset(desc, channel, Some(was_reset), desc.cast());
        if result != 0 {
            sys::spdk_put_io_channel(channel);
        }
        (result == 0).then_some(channel)
    };
    if resetting.is_some() {
        watch.resetting = resetting;
        watch.resets += 1;
        if watch.resets == 1 {
            tracing::warn!(
                "backing bdev {} has held I/O for {OVERDUE_S} s while it is let go of: it is reset, and the I/O fails",
                watch.name
            );
        }
    }
}

unsafe extern "C" fn was_reset(io: *mut sys::spdk_bdev_io, success: bool, desc: *mut c_void) {
    // SAFETY: complete, freed once.
    unsafe { sys::spdk_bdev_free_io(io) };
    let desc: *mut sys::spdk_bdev_desc = desc.cast();
    if let Some(core) = manager_core() {
        core.send(move |state| {
            if let Some(watch) = state.node.frozen.watch(desc) {
                if let Some(channel) = watch.resetting.take() {
                    // SAFETY: from `overdue`, on this thread.
                    unsafe { sys::spdk_put_io_channel(channel) };
                }
                watch.next_reset_ns = super::context::now_ns() + AGAIN_NS;
                if !success {
                    tracing::error!("backing bdev {} failed its reset", watch.name);
                }
            }
        });
    }
}
