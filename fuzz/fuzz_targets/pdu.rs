//! Bytes of a network, whatever they are, through the PDU parser and into a target in every phase of a
//! connection. Run it with `cargo +nightly fuzz run pdu`.
//!
//! The first byte chooses digests and phase. The others are sent raw, or, since random bytes seldom make a
//! PDU, cut into pieces that become commands and data PDUs with right lengths and digests.

#![no_main]

use std::io::{self, IoSlice};

use bdev_repl::hosts::embedded::nvme_tcp::buffer::DataPointer;
use bdev_repl::hosts::embedded::nvme_tcp::command::{
    CONTROLLER_ID_DYNAMIC, ConnectCommand, ConnectData, NvmeStatus, Sgl, Sqe,
};
use bdev_repl::hosts::embedded::nvme_tcp::pdu::{
    COMMON_HEADER_BYTES, CommonHeader, DataHeader, Digests, EMIT_BYTES_MAX, IcReq, PduHeader,
    Sender, data_digest,
};
use bdev_repl::hosts::embedded::nvme_tcp::stream::{NO_OWNER, Outgoing, SendQueue, Socket};
use bdev_repl::hosts::embedded::nvme_tcp::target::{
    Backend, ListenerAddress, NamespaceHandle, NamespaceParameters, NvmfIo, RequestHandle,
    SubsystemParameters, TargetCore, TargetOptions, TargetState,
};
use libfuzzer_sys::fuzz_target;

const NQN: &str = "nqn.2016-06.io.spdk:fuzz";

/// Gives what it holds, takes everything.
struct Script {
    bytes: Vec<u8>,
    at: usize,
}

impl Socket for Script {
    fn recv(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.bytes[self.at..];
        if rest.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at += count;
        Ok(count)
    }

    fn send_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }
}

/// Collects what a SendQueue sends.
struct Sink(Vec<u8>);

impl Socket for Sink {
    fn recv(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        for slice in slices {
            self.0.extend_from_slice(slice);
        }
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }
}

/// Touches every byte that it is lent, so that a wrong pointer shows.
#[derive(Default)]
struct Toucher {
    queued: Vec<RequestHandle>,
}

impl Backend for Toucher {
    fn submit(&mut self, _namespace: NamespaceHandle, io: NvmfIo, request: RequestHandle) {
        // SAFETY: the request is in progress and ours.
        for byte in unsafe { io.data.as_mut_slice() } {
            *byte = byte.wrapping_add(1);
        }
        self.queued.push(request);
    }
}

fn append(out: &mut Vec<u8>, header: &PduHeader, digests: Digests, payload: &[u8]) {
    let mut head = [0; EMIT_BYTES_MAX];
    let length = header.emit(digests, 0, payload.len() as u32, &mut head);
    out.extend_from_slice(&head[..length]);
    out.extend_from_slice(payload);
    if digests.data && !payload.is_empty() {
        out.extend_from_slice(&data_digest(payload));
    }
}

fn connect(out: &mut Vec<u8>, digests: Digests, queue_id: u16, controller_id: u16) {
    let data = ConnectData {
        host_id: [1; 16],
        controller_id,
        subsystem_nqn: NQN.into(),
        host_nqn: "nqn.2016-06.io.spdk:host".into(),
    };
    let command = ConnectCommand {
        record_format: 0,
        queue_id,
        queue_size: 15,
        disable_flow_control: queue_id == 1,
        keep_alive_ms: 0,
    };
    let mut sqe = command.emit();
    sqe.flags = Sqe::FLAGS_SGL;
    sqe.sgl = Sgl::in_capsule(1024);
    append(
        out,
        &PduHeader::CapsuleCmd(sqe.emit()),
        digests,
        &data.emit(),
    );
}

fn handshake(out: &mut Vec<u8>, digests: Digests) {
    let request = IcReq {
        version: 0,
        alignment: 0,
        digests,
        max_r2t: 0,
    };
    append(out, &PduHeader::IcReq(request), Digests::default(), &[]);
}

/// Pieces of 40 bytes become commands, or data for tags that may exist.
fn shaped(out: &mut Vec<u8>, digests: Digests, bytes: &[u8]) {
    for piece in bytes.chunks(40) {
        let mut entry = [0; 64];
        entry[..piece.len()].copy_from_slice(piece);
        let payload_bytes = usize::from(entry[5]) * 32;
        let payload = vec![entry[6]; payload_bytes];
        if entry[0] & 0x40 != 0 && payload_bytes > 0 {
            let data = PduHeader::H2cData(DataHeader {
                command_id: u16::from(entry[2]),
                transfer_tag: u16::from(entry[3] % 20),
                offset_bytes: u32::from(entry[4]) * 32,
                length_bytes: payload_bytes as u32,
                last: entry[7] & 1 != 0,
                success: false,
            });
            append(out, &data, digests, &payload);
            continue;
        }
        let mut sqe = Sqe::parse(&entry);
        sqe.flags = Sqe::FLAGS_SGL;
        sqe.nsid %= 4;
        sqe.cdw10_15 = [0; 6];
        for (word, bytes) in sqe.cdw10_15.iter_mut().zip(entry[16..40].chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        sqe.sgl = if payload_bytes > 0 {
            Sgl::in_capsule(payload_bytes as u32)
        } else {
            Sgl::transport(u32::from(entry[8]) * 512)
        };
        append(out, &PduHeader::CapsuleCmd(sqe.emit()), digests, &payload);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let digests = Digests {
        header: choice & 1 != 0,
        data: choice & 2 != 0,
    };
    for sender in [Sender::Host, Sender::Controller] {
        let Some(first) = bytes.first_chunk::<COMMON_HEADER_BYTES>() else {
            continue;
        };
        let Ok(common) = CommonHeader::parse(first, sender, digests) else {
            continue;
        };
        if let Ok(header) = PduHeader::parse(&common, bytes) {
            // What is parsed can be sent.
            let mut queue = SendQueue::new(1);
            queue.push(Outgoing::new(
                &header,
                digests,
                0,
                DataPointer::NONE,
                NO_OWNER,
            ));
            queue.flush(&mut Sink(Vec::new()), &mut Vec::new()).unwrap();
        }
    }

    let target = TargetState::new(TargetOptions {
        buffers_per_core: 2,
        peer_buffers_per_core: 2,
        ..TargetOptions::default()
    });
    let place = ListenerAddress::tcp("127.0.0.1", "4420");
    let mut state = target.lock().unwrap();
    let mut parameters = SubsystemParameters::new(NQN);
    parameters.allow_any_host = true;
    state.create_subsystem(parameters).unwrap();
    state.add_listener(NQN, place.clone()).unwrap();
    for vendor_only in [false, true] {
        let namespace = NamespaceParameters {
            nsid: None,
            handle: NamespaceHandle(u64::from(vendor_only)),
            block_size: 512,
            size_blocks: 1 << 20,
            nguid: [1; 16],
            uuid: [1; 16],
            eui64: [0; 8],
            vendor_only,
        };
        state.add_namespace(NQN, namespace).unwrap();
    }
    drop(state);
    let mut core = TargetCore::new(target).unwrap();
    let mut backend = Toucher::default();

    let mut admin = Vec::new();
    handshake(&mut admin, digests);
    connect(&mut admin, digests, 0, CONTROLLER_ID_DYNAMIC);
    let enable = Sqe::fabrics(0, [0, 0x14, 1, 0, 0, 0]);
    append(
        &mut admin,
        &PduHeader::CapsuleCmd(enable.emit()),
        digests,
        &[],
    );
    let phase = choice >> 2 & 3;
    if phase == 2 {
        shaped(&mut admin, digests, bytes);
    }
    let mut other = Vec::new();
    if phase > 0 {
        handshake(&mut other, digests);
    }
    if phase == 3 {
        connect(&mut other, digests, 1, 1);
    }
    if choice & 16 != 0 {
        shaped(&mut other, digests, bytes);
    } else {
        other.extend_from_slice(bytes);
    }
    for bytes in [admin, other] {
        let script = Script { bytes, at: 0 };
        let index = core.accept(script, place.clone()).unwrap();
        for _ in 0..4 {
            core.on_readable(index, &mut backend);
            if choice & 32 == 0 {
                for request in backend.queued.drain(..) {
                    core.complete(request, NvmeStatus::SUCCESS, 0);
                }
            }
            core.poll(&mut backend);
        }
    }
    for (index, _) in core
        .connections()
        .map(|(index, _)| (index, ()))
        .collect::<Vec<_>>()
    {
        core.close(index);
    }
    for request in backend.queued.drain(..) {
        core.complete(request, NvmeStatus::SUCCESS, 0);
    }
    assert!(
        core.connections()
            .all(|(_, connection)| connection.is_closed())
    );
});
