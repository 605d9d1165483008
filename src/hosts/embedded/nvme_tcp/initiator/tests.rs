//! The queue against a target made of bytes.

use std::io::IoSlice;

use super::super::command::io_opcode;
use super::super::pdu::{EMIT_BYTES_MAX, data_digest};
use super::super::stream::tests::{Pipe, pipe};
use super::*;

const DIGESTS: Digests = Digests {
    header: false,
    data: true,
};

fn send(far: &mut Pipe, header: &PduHeader, digests: Digests, payload: &[u8]) {
    let mut head = [0; EMIT_BYTES_MAX];
    let length = header.emit(digests, 0, payload.len() as u32, &mut head);
    let slices = [IoSlice::new(&head[..length]), IoSlice::new(payload)];
    far.send_vectored(&slices).unwrap();
}

fn response(command_id: u16, result: u64, status: NvmeStatus) -> PduHeader {
    let cqe = Cqe {
        result,
        queue_head: 0,
        command_id,
        status,
    };
    PduHeader::CapsuleResp(cqe.emit())
}

/// A connected queue with data digests; the socket towards the target holds `room_bytes`.
fn connected(room_bytes: usize) -> (InitiatorQueue<Pipe>, Pipe) {
    let (near, mut far) = pipe(room_bytes);
    let parameters = QueueParameters {
        queue_id: 1,
        entries: 8,
        controller_id: 1,
        subsystem_nqn: "nqn.2016-06.io.spdk:a".into(),
        host_nqn: "nqn.2016-06.io.spdk:b".into(),
        host_id: [1; 16],
        keep_alive_ms: 0,
        header_digest: false,
        data_digest: true,
        in_capsule_bytes: 0,
    };
    let mut queue = InitiatorQueue::new(near, parameters).unwrap();
    let mut none = Vec::new();
    queue.flush(&mut none);
    let ic_resp = PduHeader::IcResp(IcResp {
        version: 0,
        alignment: 0,
        digests: DIGESTS,
        max_h2c_data_bytes: 4096,
    });
    send(&mut far, &ic_resp, Digests::default(), &[]);
    queue.on_readable(&mut none);
    drain(&mut queue, &mut far);
    send(&mut far, &response(0, 1, NvmeStatus::SUCCESS), DIGESTS, &[]);
    queue.on_readable(&mut none);
    assert!(queue.is_ready());
    (queue, far)
}

/// Lets the queue send all it has; returns the completions that this brought.
fn drain(queue: &mut InitiatorQueue<Pipe>, far: &mut Pipe) -> Vec<Completion> {
    let mut completions = Vec::new();
    let mut waste = [0; 65536];
    while far.recv(&mut waste).is_ok_and(|count| count > 0) {
        queue.flush(&mut completions);
    }
    completions
}

#[test]
fn data_that_does_not_match_its_digest_fails_its_read() {
    for (wrong, status) in [
        (0, NvmeStatus::SUCCESS),
        (1, NvmeStatus::TRANSIENT_TRANSPORT_ERROR),
    ] {
        let (mut queue, mut far) = connected(0);
        let memory = AlignedBuf::new(512).unwrap();
        // SAFETY: memory outlives the command.
        let data = unsafe { DataPointer::new(memory.as_ptr(), 512) };
        let sqe = Sqe::block_command(io_opcode::READ, 1, 0, 1, false);
        queue.submit(sqe, data, 5).unwrap();
        queue.flush(&mut Vec::new());
        let header = PduHeader::C2hData(DataHeader {
            command_id: 0,
            transfer_tag: 0,
            offset_bytes: 0,
            length_bytes: 512,
            last: true,
            success: true,
        });
        let payload = [7; 512];
        send(&mut far, &header, DIGESTS, &payload);
        let mut digest = data_digest(&payload);
        digest[0] ^= wrong;
        far.send_vectored(&[IoSlice::new(&digest)]).unwrap();
        let mut completions = Vec::new();
        queue.on_readable(&mut completions);
        let result = 0;
        let token = 5;
        assert_eq!(
            completions,
            [Completion {
                token,
                status,
                result
            }]
        );
    }
}

#[test]
fn a_write_answered_too_early_is_over_only_when_its_data_has_left() {
    let (mut queue, mut far) = connected(2000);
    let memory = AlignedBuf::new(8192).unwrap();
    // SAFETY: memory outlives the command.
    let data = unsafe { DataPointer::new(memory.as_ptr(), 8192) };
    let sqe = Sqe::block_command(io_opcode::WRITE, 1, 0, 16, false);
    queue.submit(sqe, data, 5).unwrap();
    queue.flush(&mut Vec::new());
    drain(&mut queue, &mut far);
    let ready = PduHeader::R2t(R2t {
        command_id: 0,
        transfer_tag: 3,
        offset_bytes: 0,
        length_bytes: 8192,
    });
    send(&mut far, &ready, DIGESTS, &[]);
    let mut completions = Vec::new();
    queue.on_readable(&mut completions);
    send(
        &mut far,
        &response(0, 0, NvmeStatus::WRITE_FAULT),
        DIGESTS,
        &[],
    );
    queue.on_readable(&mut completions);
    assert_eq!(completions, [], "most of the data has not been sent");
    let completions = drain(&mut queue, &mut far);
    assert_eq!(completions.len(), 1);
    assert_eq!(completions[0].status, NvmeStatus::WRITE_FAULT);
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn a_read_that_brings_less_than_asked_for_is_no_success() {
    let (mut queue, mut far) = connected(0);
    let memory = AlignedBuf::new(512).unwrap();
    // SAFETY: memory outlives the command.
    let data = unsafe { DataPointer::new(memory.as_ptr(), 512) };
    let sqe = Sqe::block_command(io_opcode::READ, 1, 0, 1, false);
    queue.submit(sqe, data, 5).unwrap();
    queue.flush(&mut Vec::new());
    send(&mut far, &response(0, 0, NvmeStatus::SUCCESS), DIGESTS, &[]);
    let mut completions = Vec::new();
    queue.on_readable(&mut completions);
    let status = NvmeStatus::TRANSIENT_TRANSPORT_ERROR;
    assert_eq!(completions[0].status, status);
}
