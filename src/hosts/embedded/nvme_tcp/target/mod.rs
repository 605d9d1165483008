//! The NVMe-oF target. A core owns a [`TargetCore`] with its connections; all cores share one
//! [`TargetState`], used for Connect, admin commands and RPCs only. What lies behind a namespace is the
//! [`Backend`]'s business.

mod admin;
mod association;
mod connection;
mod core;
mod execute;
mod io_command;
mod log_page;
mod slot;
mod state;
mod subsystem;
#[cfg(test)]
mod tests;

pub use self::core::TargetCore;
pub use connection::TargetConnection;
pub use state::{SharedTarget, TargetState};
pub use subsystem::{
    AnaState, ListenerAddress, Namespace, NamespaceParameters, SubsystemParameters,
    SubsystemSummary, TargetError,
};

use super::buffer::DataPointer;
use super::command::DatasetRange;

/// What the target asks of the node.
pub trait Backend {
    /// Starts an I/O on a namespace. The answer is given with [`TargetCore::complete`], never before this
    /// returns. A namespace may have been removed since: that is answered with an error, like any other.
    /// For reads, all of `io.data` is sent to the host when the answer is a success.
    fn submit(&mut self, namespace: NamespaceHandle, io: NvmfIo, request: RequestHandle);
}

/// What the owner of a namespace knows it by; opaque here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NamespaceHandle(pub u64);

/// Names a request until it is completed. A handle that has been used is recognised as stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestHandle {
    /// Index of the connection on its core.
    pub connection: u32,
    pub slot: u16,
    pub generation: u32,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    Read,
    Write {
        fua: bool,
    },
    Flush,
    WriteZeroes {
        fua: bool,
        /// The host would like the blocks deallocated (DEAC).
        may_unmap: bool,
    },
    /// Deallocate: `data` holds this many ranges of 16 bytes, all inside of the namespace; see
    /// [`NvmfIo::unmap_range`].
    Unmap {
        ranges: u16,
    },
    /// A vendor specific command, only on namespaces that are `vendor_only`. Opcode bits 1:0 give the
    /// direction of `data`.
    Vendor {
        opcode: u8,
        cdw2: u32,
        cdw3: u32,
        cdw10_15: [u32; 6],
    },
}

/// One I/O for the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmfIo {
    pub kind: IoKind,
    /// First block; 0 where the kind has none.
    pub lba: u64,
    /// Number of blocks; 0 where the kind has none.
    pub blocks: u32,
    /// The request's buffer, 4096-aligned unless the host placed its data oddly in the capsule. It stays
    /// until the request is completed, even if the connection dies.
    pub data: DataPointer,
}

impl NvmfIo {
    /// Range `index` of an [`IoKind::Unmap`]; None past the last.
    ///
    /// # Safety
    /// The request is still in flight.
    pub unsafe fn unmap_range(&self, index: u16) -> Option<DatasetRange> {
        let IoKind::Unmap { ranges } = self.kind else {
            return None;
        };
        if index >= ranges {
            return None;
        }
        let at = usize::from(index) * DatasetRange::BYTES;
        // SAFETY: the caller vouches for the request, and nobody writes to an Unmap's data.
        let data = unsafe { self.data.as_slice() };
        data.get(at..)?.first_chunk().map(DatasetRange::parse)
    }
}

/// Limits and choices of the transport; the names are those of SPDK's nvmf_create_transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetOptions {
    /// Data that a command capsule of an I/O queue may carry, in bytes.
    pub in_capsule_data_size: u32,
    /// Longest transfer of one command, in bytes: a power of two times 4096.
    pub max_io_size: u32,
    /// Entries of an I/O queue.
    pub max_queue_depth: u16,
    /// Entries of an admin queue.
    pub max_aq_depth: u16,
    /// Queue pairs of a controller, the admin queue included.
    pub max_qpairs_per_ctrlr: u16,
    /// Leave out the response capsule of successful reads, where the host allows it: by the transport
    /// specification, on queues whose flow control it has switched off.
    pub c2h_success: bool,
    /// Large buffers per core for hosts.
    pub buffers_per_core: usize,
    /// Large buffers per core for the commands of peers.
    pub peer_buffers_per_core: usize,
    /// A connection that has not become a queue after this long is closed.
    pub connect_timeout_ms: u64,
}

impl Default for TargetOptions {
    fn default() -> TargetOptions {
        TargetOptions {
            in_capsule_data_size: 4096,
            max_io_size: 131_072,
            max_queue_depth: 128,
            max_aq_depth: 128,
            max_qpairs_per_ctrlr: 128,
            c2h_success: true,
            buffers_per_core: 64,
            peer_buffers_per_core: 32,
            connect_timeout_ms: 10_000,
        }
    }
}

impl TargetOptions {
    /// The options with every value brought into the range that works: sizes in whole pages, a
    /// `max_io_size` that MDTS can express, queues of at least two entries.
    pub fn normalised(mut self) -> TargetOptions {
        self.max_io_size = self.max_io_size.clamp(4096, 1 << 24).next_power_of_two();
        let in_capsule = self.in_capsule_data_size.min(self.max_io_size);
        self.in_capsule_data_size = in_capsule.next_multiple_of(16).max(16);
        self.max_queue_depth = self.max_queue_depth.clamp(2, 4096);
        self.max_aq_depth = self.max_aq_depth.clamp(32, 4096);
        self.max_qpairs_per_ctrlr = self.max_qpairs_per_ctrlr.clamp(2, 1024);
        self.buffers_per_core = self.buffers_per_core.max(2);
        self.peer_buffers_per_core = self.peer_buffers_per_core.max(2);
        self
    }
}
