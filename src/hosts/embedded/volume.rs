//! The engine's volumes on one core. The core's loop calls the functions here; until a volume exists
//! they have nothing to do.

use super::admin::ControllerKey;
use super::bdev::{BdevIo, IoError, IoResult, Ticket};
use super::core::Core;
use super::initiator::{QueueChange, QueueKey};
use super::nvme_tcp::controller::ControllerEvent;

/// The volumes of one core.
#[derive(Default)]
pub struct CoreVolumes {}

/// What the engine's cores tell each other.
pub enum VolumeMessage {}

/// Which side of a volume an I/O came in at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Application,
    Peers,
}

/// An I/O for a volume; answered by [`Core::complete`] with the ticket.
pub fn submit(core: &mut Core, _volume: u32, _port: Port, ticket: Ticket, _io: BdevIo) {
    core.complete(ticket, Err(IoError::Errno(libc::ENODEV)), 0);
}

/// An I/O that the volume submitted as `Owner::Volume` was answered.
pub fn complete(_core: &mut Core, _volume: u32, _token: u64, _status: IoResult, _dword0: u32) {}

/// Another core's message.
pub fn message(_core: &mut Core, message: VolumeMessage) {
    match message {}
}

/// A queue pair that the volume opened came up or is gone; `link` is the volume's name for it.
pub fn link_event(
    _core: &mut Core,
    _volume: u32,
    _link: u64,
    _queue: QueueKey,
    _change: QueueChange,
) {
}

/// News of a controller that the volume opened for a link.
pub fn admin_event(
    _core: &mut Core,
    _volume: u32,
    _link: u64,
    _controller: ControllerKey,
    _change: ControllerEvent,
) {
}

/// Once a round of the loop; returns whether there was work.
pub fn poll(_core: &mut Core) -> bool {
    false
}

/// When `poll` wants to be called again though nothing happens, on the reactor's clock.
pub fn next_deadline_ns(_core: &Core) -> Option<u64> {
    None
}

/// The node is going down, called on core 0: `then` when no volume is left.
pub fn shutdown(core: &mut Core, then: impl FnOnce(&mut Core) + 'static) {
    then(core);
}
