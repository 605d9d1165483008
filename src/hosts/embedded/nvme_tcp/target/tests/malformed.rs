//! Hosts that break the protocol: told what they did, by TermReq or status, and nothing else happens.

use super::*;
use crate::hosts::embedded::nvme_tcp::command::{
    CONTROLLER_ID_DYNAMIC, ConnectCommand, ConnectData, Cqe, Sgl, admin_opcode, fabrics_type,
    property,
};
use crate::hosts::embedded::nvme_tcp::pdu::{
    COMMON_HEADER_BYTES, DataHeader, Digests, EMIT_BYTES_MAX, Fault, IcReq, PduHeader, Sender,
    TermReq, data_digest,
};
use crate::hosts::embedded::nvme_tcp::stream::{Received, Receiver, Socket};
use proptest::prelude::*;
use std::io::IoSlice;

/// A host made of bytes.
struct Raw {
    pipe: Pipe,
    receiver: Receiver,
    digests: Digests,
    connection: u32,
    memory: AlignedBuf,
}

fn header(pdu: &PduHeader, digests: Digests, payload_bytes: u32) -> Vec<u8> {
    let mut out = [0; EMIT_BYTES_MAX];
    let length = pdu.emit(digests, 0, payload_bytes, &mut out);
    out[..length].to_vec()
}

impl Raw {
    fn new(lab: &mut Lab) -> Raw {
        let (connection, pipe) = lab.accept();
        Raw {
            pipe,
            receiver: Receiver::new(Sender::Controller),
            digests: Digests::default(),
            connection,
            memory: AlignedBuf::new(1 << 20).unwrap(),
        }
    }

    fn send(&mut self, lab: &mut Lab, bytes: &[u8]) {
        // The target may have closed already.
        let _ = self.pipe.send_vectored(&[IoSlice::new(bytes)]);
        lab.turn();
    }

    /// The next PDU and its payload's length; None if there is none.
    fn receive(&mut self) -> Option<(PduHeader, u32)> {
        match self.receiver.next(&mut self.pipe).ok()? {
            Received::Header {
                header,
                payload_bytes,
            } => {
                if payload_bytes > 0 {
                    // SAFETY: memory lives as long as the receiver.
                    let data = unsafe { DataPointer::new(self.memory.as_ptr(), payload_bytes) };
                    self.receiver.receive_into(data);
                    let payload = self.receiver.next(&mut self.pipe).unwrap();
                    assert!(matches!(
                        payload,
                        Received::Payload {
                            digest_matches: true
                        }
                    ));
                }
                Some((header, payload_bytes))
            }
            _ => None,
        }
    }

    fn handshake(&mut self, lab: &mut Lab, digests: Digests) {
        let request = IcReq {
            version: 0,
            alignment: 0,
            digests,
            max_r2t: 0,
        };
        self.send(
            lab,
            &header(&PduHeader::IcReq(request), Digests::default(), 0),
        );
        assert!(matches!(self.receive(), Some((PduHeader::IcResp(_), 0))));
        self.digests = digests;
        self.receiver.set_digests(digests);
    }

    fn command(&mut self, lab: &mut Lab, sqe: Sqe, payload: &[u8]) {
        let pdu = PduHeader::CapsuleCmd(sqe.emit());
        let mut bytes = header(&pdu, self.digests, payload.len() as u32);
        bytes.extend(payload);
        if !payload.is_empty() && self.digests.data {
            bytes.extend(data_digest(payload));
        }
        self.send(lab, &bytes);
    }

    fn completion(&mut self) -> Option<Cqe> {
        match self.receive() {
            Some((PduHeader::CapsuleResp(entry), 0)) => Some(Cqe::parse(&entry)),
            Some((PduHeader::C2hData(_), _)) => self.completion(),
            _ => None,
        }
    }

    /// A queue with this id, with flow control.
    fn connect(&mut self, lab: &mut Lab, queue_id: u16, controller_id: u16) {
        let data = ConnectData {
            host_id: [9; 16],
            controller_id,
            subsystem_nqn: NQN.into(),
            host_nqn: HOST.into(),
        };
        let command = ConnectCommand {
            record_format: 0,
            queue_id,
            queue_size: 7,
            disable_flow_control: false,
            keep_alive_ms: 0,
        };
        let mut sqe = Sqe {
            flags: Sqe::FLAGS_SGL,
            ..command.emit()
        };
        sqe.sgl = Sgl::in_capsule(1024);
        self.command(lab, sqe, &data.emit());
        let cqe = self.completion().unwrap();
        assert!(cqe.status.is_success());
        assert_eq!(cqe.queue_head, 1);
    }
}

/// A raw I/O queue of a proper controller.
fn io_queue(lab: &mut Lab, digests: Digests) -> (InitiatorController<Pipe>, Raw) {
    let controller = lab.controller(parameters());
    let mut raw = Raw::new(lab);
    raw.handshake(lab, digests);
    raw.connect(lab, 1, controller.controller_id());
    (controller, raw)
}

fn write(command_id: u16, blocks: u32) -> Sqe {
    Sqe {
        command_id,
        flags: Sqe::FLAGS_SGL,
        sgl: Sgl::transport(blocks * BLOCK as u32),
        ..Sqe::block_command(io_opcode::WRITE, 1, 0, blocks, false)
    }
}

fn data_pdu(
    command_id: u16,
    transfer_tag: u16,
    offset_bytes: u32,
    length_bytes: u32,
    last: bool,
) -> PduHeader {
    PduHeader::H2cData(DataHeader {
        command_id,
        transfer_tag,
        offset_bytes,
        length_bytes,
        last,
        success: false,
    })
}

/// The TermReq that has come, as error and information; the connection listens no more and closes.
fn termination(lab: &mut Lab, raw: &mut Raw) -> (u16, u32) {
    while let Some((pdu, _)) = raw.receive() {
        if let PduHeader::C2hTermReq(term) = pdu {
            raw.send(lab, &[0x55; 300]);
            lab.core.poll_timeouts(0);
            lab.core.poll_timeouts(3_000);
            assert!(lab.core.is_closed(raw.connection));
            return (term.error, term.information);
        }
    }
    panic!("no TermReq");
}

#[test]
fn a_wrong_first_pdu_is_answered_with_its_error() {
    let good = header(
        &PduHeader::IcReq(IcReq {
            version: 0,
            alignment: 0,
            digests: Digests::default(),
            max_r2t: 0,
        }),
        Digests::default(),
        0,
    );
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let command = header(&PduHeader::CapsuleCmd([0; 64]), Digests::default(), 0);
    let cases = [
        (changed(0, 0x08), (1, 0)),
        (changed(0, 0x01), (1, 0)),
        (changed(2, 127), (1, 2)),
        (changed(4, 127), (1, 4)),
        (changed(7, 1), (1, 4)),
        (changed(8, 1), (6, 8)),
        (changed(10, 32), (1, 10)),
        (command, (2, 0)),
    ];
    for (bytes, expected) in cases {
        let mut lab = Lab::new(TargetOptions::default());
        let mut raw = Raw::new(&mut lab);
        raw.send(&mut lab, &bytes);
        assert_eq!(
            termination(&mut lab, &mut raw),
            expected,
            "{:02x?}",
            &bytes[..12]
        );
    }
}

#[test]
fn a_term_req_carries_the_header_that_it_is_about() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut raw = Raw::new(&mut lab);
    raw.handshake(&mut lab, Digests::default());
    let request = IcReq {
        version: 0,
        alignment: 0,
        digests: Digests::default(),
        max_r2t: 0,
    };
    let again = header(&PduHeader::IcReq(request), Digests::default(), 0);
    raw.send(&mut lab, &again);
    let Some((PduHeader::C2hTermReq(term), _)) = raw.receive() else {
        panic!("no TermReq")
    };
    assert_eq!(term.error, 2);
    assert_eq!(term.header[..usize::from(term.header_bytes)], again[..]);
}

#[test]
fn wrong_pdus_on_a_queue_are_answered_with_their_errors() {
    let none = Digests::default();
    let mut short = header(&data_pdu(1, 0, 0, 512, true), none, 512);
    short[4] = 24;
    short[5] = 0;
    let mut odd = header(&PduHeader::CapsuleCmd([0; 64]), none, 512);
    odd[3] = 73;
    let too_long = header(&PduHeader::CapsuleCmd(write(2, 1).emit()), none, 8192);
    let cases = [
        (header(&data_pdu(1, 3, 0, 512, true), none, 512), (1, 10)),
        (header(&data_pdu(1, 999, 0, 512, true), none, 512), (1, 10)),
        (header(&data_pdu(2, 0, 0, 512, true), none, 512), (1, 8)),
        (header(&data_pdu(1, 0, 512, 512, false), none, 512), (4, 0)),
        (header(&data_pdu(1, 0, 0, 16384, true), none, 16384), (4, 0)),
        (header(&data_pdu(1, 0, 0, 512, true), none, 512), (4, 0)),
        (
            header(&data_pdu(1, 0, 0, 200_000, true), none, 200_000),
            (5, 0),
        ),
        (header(&data_pdu(1, 0, 0, 1024, true), none, 512), (1, 16)),
        (short, (1, 4)),
        (odd, (1, 3)),
        (too_long, (5, 0)),
        (header(&PduHeader::CapsuleResp([0; 16]), none, 0), (1, 0)),
        (
            header(
                &PduHeader::CapsuleCmd([0; 64]),
                Digests {
                    header: true,
                    data: false,
                },
                0,
            ),
            (1, 1),
        ),
    ];
    for (bytes, expected) in cases {
        let mut lab = Lab::new(TargetOptions::default());
        let (_controller, mut raw) = io_queue(&mut lab, none);
        raw.command(&mut lab, write(1, 16), &[]);
        let Some((PduHeader::R2t(ready), _)) = raw.receive() else {
            panic!("no R2T")
        };
        assert_eq!(
            (ready.command_id, ready.offset_bytes, ready.length_bytes),
            (1, 0, 8192)
        );
        // The cases speak of tag 0; slots are handed out in an order that nobody promises.
        let mut bytes = bytes;
        if bytes[0] == 6 && bytes[10..12] == [0, 0] {
            bytes[10..12].copy_from_slice(&ready.transfer_tag.to_le_bytes());
        }
        raw.send(&mut lab, &bytes);
        assert_eq!(
            termination(&mut lab, &mut raw),
            expected,
            "{:02x?}",
            &bytes[..24]
        );
        assert!(lab.disk.queued.is_empty());
    }
}

#[test]
fn a_broken_header_digest_ends_the_connection_and_a_broken_data_digest_the_command() {
    let mut lab = Lab::new(TargetOptions::default());
    let digests = Digests {
        header: true,
        data: true,
    };
    let (_controller, mut raw) = io_queue(&mut lab, digests);
    let mut sqe = write(1, 1);
    sqe.sgl = Sgl::in_capsule(512);
    let mut bytes = header(&PduHeader::CapsuleCmd(sqe.emit()), digests, 512);
    bytes.extend([1; 512]);
    bytes.extend([0; 4]);
    raw.send(&mut lab, &bytes);
    let cqe = raw.completion().unwrap();
    assert_eq!(cqe.status, NvmeStatus::TRANSIENT_TRANSPORT_ERROR);
    assert!(lab.disk.bytes.iter().all(|byte| *byte == 0));
    let mut bytes = header(&PduHeader::CapsuleCmd(sqe.emit()), digests, 0);
    bytes[72..76].copy_from_slice(&[1, 2, 3, 4]);
    raw.send(&mut lab, &bytes);
    assert_eq!(termination(&mut lab, &mut raw), (3, 0x0403_0201));
}

#[test]
fn wrong_sgls_are_answered_with_their_status() {
    let mut lab = Lab::new(TargetOptions::default());
    let (_controller, mut raw) = io_queue(&mut lab, Digests::default());
    let in_capsule = |address, length_bytes| Sgl {
        address,
        length_bytes,
        kind: Sgl::KIND_IN_CAPSULE,
    };
    let cases = [
        (in_capsule(0, 512), 0x40, 512, NvmeStatus::SUCCESS),
        (in_capsule(512, 512), 0x40, 1024, NvmeStatus::SUCCESS),
        (
            in_capsule(513, 512),
            0x40,
            1024,
            NvmeStatus::DATA_SGL_LENGTH_INVALID,
        ),
        (
            in_capsule(1025, 512),
            0x40,
            1024,
            NvmeStatus::SGL_OFFSET_INVALID,
        ),
        (
            in_capsule(u64::MAX, 512),
            0x40,
            1024,
            NvmeStatus::SGL_OFFSET_INVALID,
        ),
        (
            in_capsule(0, 512),
            0x40,
            0,
            NvmeStatus::DATA_SGL_LENGTH_INVALID,
        ),
        (
            in_capsule(0, 1024),
            0x40,
            1024,
            NvmeStatus::DATA_SGL_LENGTH_INVALID,
        ),
        (
            Sgl::transport(1024),
            0x40,
            0,
            NvmeStatus::DATA_SGL_LENGTH_INVALID,
        ),
        (
            Sgl::transport(512),
            0x40,
            512,
            NvmeStatus::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            Sgl {
                kind: 0x40,
                ..Sgl::transport(512)
            },
            0x40,
            0,
            NvmeStatus::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (in_capsule(0, 512), 0x00, 512, NvmeStatus::INVALID_FIELD),
    ];
    for (command_id, (sgl, flags, payload, status)) in cases.into_iter().enumerate() {
        let sqe = Sqe {
            sgl,
            flags,
            ..write(command_id as u16, 1)
        };
        let mut bytes = vec![1; payload];
        bytes.iter_mut().skip(512).for_each(|byte| *byte = 2);
        raw.command(&mut lab, sqe, &bytes);
        let cqe = raw.completion().unwrap();
        assert_eq!(
            (cqe.command_id, cqe.status),
            (command_id as u16, status),
            "{sgl:?}"
        );
    }
    assert!(
        lab.disk.bytes[..512].iter().all(|byte| *byte == 2),
        "the offset was honoured"
    );
    let read = Sqe {
        opcode: io_opcode::READ,
        sgl: Sgl::in_capsule(512),
        ..write(50, 1)
    };
    raw.command(&mut lab, read, &[]);
    let status = raw.completion().unwrap().status;
    assert_eq!(status, NvmeStatus::SGL_DESCRIPTOR_TYPE_INVALID);
}

#[test]
fn a_command_takes_its_id_from_an_event_request_that_the_host_has_given_up() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut raw = Raw::new(&mut lab);
    raw.handshake(&mut lab, Digests::default());
    raw.connect(&mut lab, 0, CONTROLLER_ID_DYNAMIC);
    let fabrics = |kind, words| Sqe {
        command_id: 3,
        ..Sqe::fabrics(kind, words)
    };
    let enable = fabrics(fabrics_type::PROPERTY_SET, [0, property::CC, 1, 0, 0, 0]);
    raw.command(&mut lab, enable, &[]);
    assert!(raw.completion().unwrap().status.is_success());
    let event_request = Sqe {
        opcode: admin_opcode::ASYNC_EVENT_REQUEST,
        command_id: 3,
        ..Sqe::default()
    };
    raw.command(&mut lab, event_request, &[]);
    assert_eq!(raw.completion(), None);
    let get = fabrics(fabrics_type::PROPERTY_GET, [0, property::CC, 0, 0, 0, 0]);
    for _ in 0..2 {
        raw.command(&mut lab, get, &[]);
        let cqe = raw.completion().unwrap();
        assert_eq!((cqe.command_id, cqe.result), (3, 1));
        assert!(cqe.status.is_success());
    }
    let mut state = lab.target.lock().unwrap();
    state.remove_namespace(NQN, 1).unwrap();
    drop(state);
    lab.turn();
    assert_eq!(raw.completion(), None, "nobody asks for events any more");
}

#[test]
fn a_command_id_in_use_is_refused_and_the_first_command_goes_on() {
    let mut lab = Lab::new(TargetOptions::default());
    let (_controller, mut raw) = io_queue(&mut lab, Digests::default());
    lab.disk.frozen = true;
    let read = Sqe {
        opcode: io_opcode::READ,
        ..write(5, 1)
    };
    raw.command(&mut lab, read, &[]);
    raw.command(&mut lab, read, &[]);
    assert_eq!(
        raw.completion().unwrap().status,
        NvmeStatus::COMMAND_ID_CONFLICT
    );
    raw.command(&mut lab, read, &[]);
    assert_eq!(
        raw.completion().unwrap().status,
        NvmeStatus::COMMAND_ID_CONFLICT
    );
    lab.disk.frozen = false;
    lab.turn();
    assert!(raw.completion().unwrap().status.is_success());
    raw.command(&mut lab, read, &[]);
    assert!(raw.completion().unwrap().status.is_success());
}

#[test]
fn more_commands_than_the_queue_has_entries_end_the_connection() {
    let mut lab = Lab::new(TargetOptions::default());
    let (_controller, mut raw) = io_queue(&mut lab, Digests::default());
    lab.disk.frozen = true;
    for command_id in 0..9 {
        let read = Sqe {
            opcode: io_opcode::READ,
            ..write(command_id, 1)
        };
        raw.command(&mut lab, read, &[]);
    }
    let Some((PduHeader::C2hTermReq(term), _)) = raw.receive() else {
        panic!("no TermReq")
    };
    assert_eq!((term.error, term.information), (2, 0));
    assert_eq!(lab.disk.queued.len(), 8);
    lab.disk.frozen = false;
    lab.turn();
    assert!(raw.receive().is_none(), "nothing follows a TermReq");
}

#[test]
fn with_flow_control_the_head_moves_and_every_read_has_a_response() {
    let mut lab = Lab::new(TargetOptions::default());
    let (_controller, mut raw) = io_queue(&mut lab, Digests::default());
    for round in 0..20u16 {
        let read = Sqe {
            opcode: io_opcode::READ,
            ..write(round, 1)
        };
        raw.command(&mut lab, read, &[]);
        let Some((PduHeader::C2hData(data), 512)) = raw.receive() else {
            panic!("no data")
        };
        assert!(data.last && !data.success);
        // Eight entries, Connect was the first command.
        assert_eq!(raw.completion().unwrap().queue_head, (round + 2) % 8);
    }
}

#[test]
fn commands_before_connect_are_out_of_sequence() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut raw = Raw::new(&mut lab);
    raw.handshake(&mut lab, Digests::default());
    raw.command(&mut lab, write(1, 1), &[]);
    let status = raw.completion().unwrap().status;
    assert_eq!(status, NvmeStatus::COMMAND_SEQUENCE_ERROR);
    raw.connect(&mut lab, 0, CONTROLLER_ID_DYNAMIC);
}

#[test]
fn a_host_that_terminates_is_let_go() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut raw = Raw::new(&mut lab);
    raw.handshake(&mut lab, Digests::default());
    let term = PduHeader::H2cTermReq(TermReq::new(Fault::sequence(), &[1, 2, 3]));
    raw.send(&mut lab, &header(&term, Digests::default(), 0));
    assert!(lab.core.is_closed(raw.connection));
}

#[test]
fn a_host_may_leave_an_io_queue_by_disconnect() {
    let mut lab = Lab::new(TargetOptions::default());
    let (_controller, mut raw) = io_queue(&mut lab, Digests::default());
    let leave = Sqe {
        command_id: 3,
        ..Sqe::fabrics(8, [0; 6])
    };
    raw.command(&mut lab, leave, &[]);
    assert!(raw.completion().unwrap().status.is_success());
    assert!(lab.core.is_closed(raw.connection));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_bytes_hurt_a_target_in_any_phase(
        phase in 0usize..4, digests in any::<(bool, bool)>(),
        pdus in prop::collection::vec(
            (0u8..10, any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)), 1..12),
    ) {
        let mut lab = Lab::new(TargetOptions::default());
        let controller = lab.controller(parameters());
        let mut raw = Raw::new(&mut lab);
        let digests = Digests { header: digests.0, data: digests.1 };
        if phase > 0 {
            raw.handshake(&mut lab, digests);
        }
        match phase {
            2 => raw.connect(&mut lab, 0, CONTROLLER_ID_DYNAMIC),
            3 => raw.connect(&mut lab, 1, controller.controller_id()),
            _ => {}
        }
        for (kind, well_formed, mut bytes) in pdus {
            if well_formed && bytes.len() >= 64 {
                let mut entry = [0; 64];
                entry.copy_from_slice(&bytes[..64]);
                // Often enough something that exists.
                entry[1] = 0x40;
                entry[0] %= 12;
                entry[4..8].copy_from_slice(&[1 + kind % 2, 0, 0, 0]);
                bytes = header(&PduHeader::CapsuleCmd(entry), raw.digests, 0);
            } else if bytes.len() >= COMMON_HEADER_BYTES {
                bytes[0] = kind;
                bytes[2] = [128, 128, 24, 24, 72, 24, 24, 24, 24, 24][usize::from(kind)];
                bytes[5..8].fill(0);
            }
            raw.send(&mut lab, &bytes);
        }
        lab.core.close(raw.connection);
        lab.turn();
        prop_assert!(lab.core.is_closed(raw.connection));
    }

    #[test]
    fn no_bytes_hurt_an_initiator(
        phase in 0usize..3,
        pdus in prop::collection::vec((0u8..10, prop::collection::vec(any::<u8>(), 0..200)), 1..12),
    ) {
        let (near, mut far) = pipe(0);
        let mut lab = Lab::new(TargetOptions::default());
        let parameters = lab.controller(parameters()).io_queue_parameters(1);
        let mut queue = InitiatorQueue::new(near, parameters).unwrap();
        let memory = AlignedBuf::new(8192).unwrap();
        let mut completions = Vec::new();
        let mut script = Vec::new();
        if phase > 0 {
            let response = crate::hosts::embedded::nvme_tcp::pdu::IcResp {
                version: 0, alignment: 0, digests: Digests::default(), max_h2c_data_bytes: 4096,
            };
            script.push(header(&PduHeader::IcResp(response), Digests::default(), 0));
        }
        if phase > 1 {
            let cqe = Cqe { result: 1, queue_head: 0, command_id: 0, status: NvmeStatus::SUCCESS };
            script.push(header(&PduHeader::CapsuleResp(cqe.emit()), Digests::default(), 0));
        }
        queue.flush(&mut completions);
        for bytes in script {
            far.send_vectored(&[IoSlice::new(&bytes)]).unwrap();
            queue.on_readable(&mut completions);
        }
        prop_assert_eq!(queue.is_ready(), phase == 2);
        let mut submitted = 0;
        for opcode in [io_opcode::READ, io_opcode::WRITE] {
            let sqe = Sqe::block_command(opcode, 1, 0, 16, false);
            // SAFETY: memory outlives the queue's use of it.
            let data = unsafe { DataPointer::new(memory.as_ptr(), 8192) };
            submitted += usize::from(queue.submit(sqe, data, 1).is_ok());
        }
        queue.flush(&mut completions);
        for (kind, mut bytes) in pdus {
            if bytes.len() >= 24 {
                bytes[0] = kind;
                bytes[2] = [128, 128, 24, 24, 72, 24, 24, 24, 24, 24][usize::from(kind)];
                bytes[1] &= 0xfc;
                bytes[4..8].copy_from_slice(&[24, 0, 0, 0]);
                bytes[8] %= 3;
                bytes[9] = 0;
                bytes.truncate(24);
            }
            let _ = far.send_vectored(&[IoSlice::new(&bytes)]);
            queue.on_readable(&mut completions);
        }
        drop(far);
        queue.on_readable(&mut completions);
        prop_assert_eq!(completions.len(), submitted, "each command ends, once");
        drop(memory);
    }
}
