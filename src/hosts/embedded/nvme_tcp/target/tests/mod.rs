//! The target against the initiator over in-memory pipes, with a RAM disk behind.

mod features;
mod io;
mod malformed;
mod tcp;

use std::collections::VecDeque;

use super::*;
use crate::hosts::embedded::nvme_tcp::buffer::AlignedBuf;
use crate::hosts::embedded::nvme_tcp::command::{NvmeStatus, Sqe, io_opcode};
use crate::hosts::embedded::nvme_tcp::controller::{
    ControllerEvent, ControllerParameters, InitiatorController,
};
use crate::hosts::embedded::nvme_tcp::initiator::{Completion, InitiatorQueue, QueueParameters};
use crate::hosts::embedded::nvme_tcp::stream::tests::{Pipe, pipe};

pub const NQN: &str = "nqn.2016-06.io.spdk:cnode1";
pub const HOST: &str = "nqn.2014-08.org.nvmexpress:host1";
pub const BLOCK: usize = 512;
pub const BLOCKS: u64 = 4096;
pub const DISK: NamespaceHandle = NamespaceHandle(7);
pub const ENDPOINT: NamespaceHandle = NamespaceHandle(8);

/// A disk in memory, and an endpoint that answers vendor commands.
pub struct RamDisk {
    pub bytes: Vec<u8>,
    pub queued: VecDeque<(NamespaceHandle, NvmfIo, RequestHandle)>,
    /// Nothing is completed while set.
    pub frozen: bool,
    /// Nothing succeeds while set.
    pub refusal: Option<NvmeStatus>,
    pub flushes: usize,
    pub fua_writes: usize,
    pub unmapped: Vec<(u64, u32)>,
}

impl Backend for RamDisk {
    fn submit(&mut self, namespace: NamespaceHandle, io: NvmfIo, request: RequestHandle) {
        self.queued.push_back((namespace, io, request));
    }
}

impl RamDisk {
    pub fn new() -> RamDisk {
        RamDisk {
            bytes: vec![0; BLOCK * BLOCKS as usize],
            queued: VecDeque::new(),
            frozen: false,
            refusal: None,
            flushes: 0,
            fua_writes: 0,
            unmapped: Vec::new(),
        }
    }

    /// Carries one request out; returns status and dword 0.
    fn run(&mut self, namespace: NamespaceHandle, io: &NvmfIo) -> (NvmeStatus, u32) {
        let from = io.lba as usize * BLOCK;
        let range = from..from + io.blocks as usize * BLOCK;
        if let IoKind::Vendor {
            opcode,
            cdw2,
            cdw10_15,
            ..
        } = io.kind
        {
            assert_eq!(namespace, ENDPOINT);
            // SAFETY: the request is in progress and ours.
            let data = unsafe { io.data.as_mut_slice() };
            if opcode & 3 == 2 {
                data.fill(cdw2 as u8);
            }
            let sum = data.iter().map(|byte| u32::from(*byte)).sum::<u32>();
            let status = NvmeStatus {
                sct: cdw10_15[5] as u8,
                sc: 0xc1,
                more: false,
                dnr: true,
            };
            return match cdw10_15[5] {
                0 => (NvmeStatus::SUCCESS, sum),
                _ => (status, 0),
            };
        }
        assert_eq!(namespace, DISK);
        if let Some(status) = self.refusal {
            return (status, 0);
        }
        match io.kind {
            // SAFETY: as above.
            IoKind::Read => unsafe { io.data.as_mut_slice() }.copy_from_slice(&self.bytes[range]),
            IoKind::Write { fua } => {
                self.fua_writes += usize::from(fua);
                // SAFETY: as above.
                self.bytes[range].copy_from_slice(unsafe { io.data.as_slice() });
            }
            IoKind::Flush => self.flushes += 1,
            IoKind::WriteZeroes { .. } => self.bytes[range].fill(0),
            IoKind::Unmap { ranges } => {
                for index in 0..ranges {
                    // SAFETY: as above.
                    let range = unsafe { io.unmap_range(index) }.unwrap();
                    self.unmapped.push((range.lba, range.blocks));
                }
            }
            IoKind::Vendor { .. } => unreachable!("handled above"),
        }
        (NvmeStatus::SUCCESS, 0)
    }
}

/// A target on one core with its disk.
pub struct Lab {
    pub target: SharedTarget,
    pub core: TargetCore<Pipe>,
    pub disk: RamDisk,
    pub now_ms: u64,
}

pub fn here() -> ListenerAddress {
    ListenerAddress::tcp("127.0.0.1", "4420")
}

pub fn disk_namespace() -> NamespaceParameters {
    NamespaceParameters {
        nsid: None,
        handle: DISK,
        block_size: BLOCK as u32,
        size_blocks: BLOCKS,
        nguid: [3; 16],
        uuid: [4; 16],
        eui64: [0; 8],
        vendor_only: false,
    }
}

impl Lab {
    pub fn new(options: TargetOptions) -> Lab {
        let target = TargetState::new(options);
        let mut state = target.lock().unwrap();
        let mut parameters = SubsystemParameters::new(NQN);
        parameters.allow_any_host = true;
        state.create_subsystem(parameters).unwrap();
        state.add_listener(NQN, here()).unwrap();
        state.add_namespace(NQN, disk_namespace()).unwrap();
        let mut endpoint = disk_namespace();
        endpoint.handle = ENDPOINT;
        endpoint.vendor_only = true;
        state.add_namespace(NQN, endpoint).unwrap();
        drop(state);
        let core = TargetCore::new(target.clone()).unwrap();
        Lab {
            target,
            core,
            disk: RamDisk::new(),
            now_ms: 0,
        }
    }

    pub fn accept(&mut self) -> (u32, Pipe) {
        let (near, far) = pipe(0);
        (self.core.accept(far, here()).unwrap(), near)
    }

    /// Lets the target do all it can.
    pub fn turn(&mut self) {
        let all: Vec<u32> = self.core.connections().map(|(index, _)| index).collect();
        for index in all {
            self.core.on_readable(index, &mut self.disk);
            self.core.on_writable(index);
        }
        while !self.disk.frozen {
            let Some((namespace, io, request)) = self.disk.queued.pop_front() else {
                break;
            };
            let (status, dword0) = self.disk.run(namespace, &io);
            self.core.complete(request, status, dword0);
        }
        self.core.poll(&mut self.disk);
    }

    pub fn controller(&mut self, parameters: ControllerParameters) -> InitiatorController<Pipe> {
        let (_, near) = self.accept();
        let mut controller = InitiatorController::new(near, parameters).unwrap();
        let mut events = Vec::new();
        for _ in 0..100 {
            controller.on_time(self.now_ms, &mut events);
            self.turn();
            controller.on_readable(&mut events);
            if !events.is_empty() {
                break;
            }
        }
        assert_eq!(events, [ControllerEvent::Ready]);
        controller
    }

    pub fn queue(&mut self, parameters: QueueParameters) -> (u32, InitiatorQueue<Pipe>) {
        let (index, near) = self.accept();
        let mut queue = InitiatorQueue::new(near, parameters).unwrap();
        for _ in 0..10 {
            queue.flush(&mut Vec::new());
            self.turn();
            queue.on_readable(&mut Vec::new());
        }
        (index, queue)
    }

    /// Controller and its first I/O queue.
    pub fn connect(&mut self, header_digest: bool, data_digest: bool) -> Host {
        let parameters = ControllerParameters {
            header_digest,
            data_digest,
            ..parameters()
        };
        let controller = self.controller(parameters);
        let (connection, queue) = self.queue(controller.io_queue_parameters(1));
        assert!(queue.is_ready(), "{:?}", queue.error());
        Host {
            controller,
            queue,
            connection,
            memory: AlignedBuf::new(1 << 20).unwrap(),
        }
    }
}

pub fn parameters() -> ControllerParameters {
    ControllerParameters::new(NQN, HOST, [9; 16])
}

/// A host with one I/O queue and some memory.
pub struct Host {
    pub controller: InitiatorController<Pipe>,
    pub queue: InitiatorQueue<Pipe>,
    /// Index of the I/O queue's connection at the target.
    pub connection: u32,
    pub memory: AlignedBuf,
}

impl Host {
    pub fn data(&self, offset: usize, length: usize) -> DataPointer {
        assert!(offset + length <= self.memory.length_bytes());
        // SAFETY: the memory lives as long as the queue.
        unsafe { DataPointer::new(self.memory.as_ptr().add(offset), length as u32) }
    }

    pub fn turn(&mut self, lab: &mut Lab) -> Vec<Completion> {
        let mut completions = Vec::new();
        for _ in 0..20 {
            self.queue.flush(&mut completions);
            lab.turn();
            self.queue.on_readable(&mut completions);
        }
        completions
    }

    /// Runs one command to its end.
    pub fn run(&mut self, lab: &mut Lab, sqe: Sqe, data: DataPointer) -> Completion {
        self.queue.submit(sqe, data, 77).unwrap();
        let completions = self.turn(lab);
        assert_eq!(completions.len(), 1, "{completions:?}");
        assert_eq!(completions[0].token, 77);
        completions[0]
    }

    pub fn write(&mut self, lab: &mut Lab, lba: u64, bytes: &[u8]) -> NvmeStatus {
        self.memory.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        let blocks = (bytes.len() / BLOCK) as u32;
        let sqe = Sqe::block_command(io_opcode::WRITE, 1, lba, blocks, false);
        self.run(lab, sqe, self.data(0, bytes.len())).status
    }

    pub fn read(&mut self, lab: &mut Lab, lba: u64, length: usize) -> Result<Vec<u8>, NvmeStatus> {
        self.memory.as_mut_slice()[..length].fill(0xee);
        let sqe = Sqe::block_command(io_opcode::READ, 1, lba, (length / BLOCK) as u32, false);
        let status = self.run(lab, sqe, self.data(0, length)).status;
        if status.is_success() {
            Ok(self.memory.as_slice()[..length].to_vec())
        } else {
            Err(status)
        }
    }
}

pub fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index * 31 + index / 256 + seed * 7) as u8)
        .collect()
}
