//! Data goes where it should, in every way that the transport has.

use super::*;
use crate::hosts::embedded::nvme_tcp::command::{DatasetRange, fabrics_type};

#[test]
fn data_written_is_read_back_with_every_choice_of_digests_and_every_way_of_transfer() {
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut lab = Lab::new(TargetOptions::default());
        let mut host = lab.connect(header, data);
        // In the capsule, in R2T transfers that fit a small buffer and not, up to MDTS.
        for (seed, length) in [512, 4096, 4608, 65536, 131_072].into_iter().enumerate() {
            let bytes = pattern(length, seed);
            assert!(host.write(&mut lab, 8, &bytes).is_success());
            assert_eq!(lab.disk.bytes[8 * BLOCK..8 * BLOCK + length], bytes[..]);
            assert_eq!(host.read(&mut lab, 8, length).unwrap(), bytes);
        }
    }
}

#[test]
fn many_commands_at_once_all_end_and_with_their_own_data() {
    let mut lab = Lab::new(TargetOptions {
        buffers_per_core: 2,
        ..TargetOptions::default()
    });
    let mut host = lab.connect(false, true);
    for index in 0..64 {
        let length = if index % 2 == 0 { 512 } else { 8192 };
        let bytes = pattern(length, index);
        let at = index * 8192;
        host.memory.as_mut_slice()[at..at + length].copy_from_slice(&bytes);
        let blocks = (length / BLOCK) as u32;
        let sqe = Sqe::block_command(io_opcode::WRITE, 1, index as u64 * 16, blocks, false);
        let data = host.data(at, length);
        host.queue.submit(sqe, data, index as u64).unwrap();
    }
    let mut done: Vec<u64> = Vec::new();
    for _ in 0..10 {
        for completion in host.turn(&mut lab) {
            assert!(completion.status.is_success());
            done.push(completion.token);
        }
    }
    done.sort_unstable();
    assert_eq!(done, (0..64).collect::<Vec<_>>());
    for index in 0..64 {
        let length = if index % 2 == 0 { 512 } else { 8192 };
        let at = index * 8192;
        assert_eq!(lab.disk.bytes[at..at + length], pattern(length, index)[..]);
    }
}

#[test]
fn hosts_that_hold_all_large_buffers_keep_out_neither_small_writes_nor_peers() {
    let options = TargetOptions {
        buffers_per_core: 2,
        peer_buffers_per_core: 2,
        ..TargetOptions::default()
    };
    let mut lab = Lab::new(options);
    let mut greedy = lab.connect(false, false);
    lab.disk.frozen = true;
    for index in 0..5 {
        let sqe = Sqe::block_command(io_opcode::READ, 1, 0, 64, false);
        let data = greedy.data(index * 32768, 32768);
        greedy.queue.submit(sqe, data, index as u64).unwrap();
    }
    assert!(greedy.turn(&mut lab).is_empty());
    assert_eq!(lab.disk.queued.len(), 2, "two buffers, two reads");
    let held: Vec<_> = lab.disk.queued.drain(..).collect();
    lab.disk.frozen = false;
    let mut other = lab.connect(false, false);
    assert!(other.write(&mut lab, 0, &pattern(4096, 1)).is_success());
    let sqe = Sqe {
        opcode: 0x82,
        nsid: 2,
        cdw2: 5,
        ..Sqe::default()
    };
    let peer = other.run(&mut lab, sqe, other.data(0, 131_072));
    assert!(peer.status.is_success());
    assert_eq!(other.memory.as_slice()[131_071], 5);
    lab.disk.queued.extend(held);
    let done = greedy.turn(&mut lab);
    assert_eq!(done.len(), 5, "the waiting reads went on");
    assert!(done.iter().all(|completion| completion.status.is_success()));
}

#[test]
fn flush_write_zeroes_deallocate_and_fua_reach_the_disk() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    host.write(&mut lab, 0, &pattern(4096, 3));
    let flush = Sqe {
        opcode: io_opcode::FLUSH,
        nsid: 1,
        ..Sqe::default()
    };
    assert!(
        host.run(&mut lab, flush, DataPointer::NONE)
            .status
            .is_success()
    );
    assert_eq!(lab.disk.flushes, 1);
    let zeroes = Sqe::block_command(io_opcode::WRITE_ZEROES, 1, 2, 4, false);
    assert!(
        host.run(&mut lab, zeroes, DataPointer::NONE)
            .status
            .is_success()
    );
    assert!(lab.disk.bytes[1024..3072].iter().all(|byte| *byte == 0));
    assert_eq!(lab.disk.bytes[3072..4096], pattern(4096, 3)[3072..]);
    let ranges = [(1, 2), (100, 3996)];
    for (index, (lba, blocks)) in ranges.into_iter().enumerate() {
        let range = DatasetRange { lba, blocks }.emit();
        host.memory.as_mut_slice()[index * 16..][..16].copy_from_slice(&range);
    }
    let mut unmap = Sqe {
        opcode: io_opcode::DATASET_MANAGEMENT,
        nsid: 1,
        ..Sqe::default()
    };
    unmap.cdw10_15[0] = 1;
    unmap.cdw10_15[1] = 1 << 2;
    assert!(
        host.run(&mut lab, unmap, host.data(0, 32))
            .status
            .is_success()
    );
    assert_eq!(lab.disk.unmapped, ranges);
    let beyond = DatasetRange {
        lba: 4096,
        blocks: 1,
    }
    .emit();
    host.memory.as_mut_slice()[..16].copy_from_slice(&beyond);
    let status = host.run(&mut lab, unmap, host.data(0, 32)).status;
    assert_eq!(status, NvmeStatus::LBA_OUT_OF_RANGE);
    unmap.cdw10_15[1] = 0;
    let range = DatasetRange { lba: 0, blocks: 1 }.emit();
    host.memory.as_mut_slice()[..16].copy_from_slice(&range);
    host.memory.as_mut_slice()[16..32].copy_from_slice(&range);
    assert!(
        host.run(&mut lab, unmap, host.data(0, 32))
            .status
            .is_success()
    );
    assert_eq!(lab.disk.unmapped.len(), 2, "hints only");
    assert_eq!(lab.disk.fua_writes, 0);
    let write = Sqe::block_command(io_opcode::WRITE, 1, 0, 1, true);
    assert!(
        host.run(&mut lab, write, host.data(0, 512))
            .status
            .is_success()
    );
    assert_eq!(lab.disk.fua_writes, 1);
}

#[test]
fn compare_tells_same_from_different_in_small_and_large() {
    let mut lab = Lab::new(TargetOptions {
        buffers_per_core: 2,
        ..TargetOptions::default()
    });
    let mut host = lab.connect(true, true);
    for length in [512, 131_072] {
        let bytes = pattern(length, 5);
        host.write(&mut lab, 0, &bytes);
        let blocks = (length / BLOCK) as u32;
        let compare = Sqe::block_command(io_opcode::COMPARE, 1, 0, blocks, false);
        assert!(
            host.run(&mut lab, compare, host.data(0, length))
                .status
                .is_success()
        );
        lab.disk.bytes[length - 1] ^= 1;
        let status = host.run(&mut lab, compare, host.data(0, length)).status;
        assert_eq!(status, NvmeStatus::COMPARE_FAILURE);
    }
}

#[test]
fn vendor_commands_carry_their_words_data_and_results_on_their_namespaces_only() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    host.memory.as_mut_slice()[..8192].fill(1);
    let put = Sqe {
        opcode: 0x81,
        nsid: 2,
        ..Sqe::default()
    };
    for length in [0, 512, 4096, 8192] {
        let completion = host.run(&mut lab, put, host.data(0, length));
        assert!(completion.status.is_success());
        assert_eq!(completion.dword0(), length as u32);
    }
    let get = Sqe {
        opcode: 0xc2,
        nsid: 2,
        cdw2: 3,
        ..Sqe::default()
    };
    let completion = host.run(&mut lab, get, host.data(0, 8192));
    assert_eq!(
        (completion.status, completion.dword0()),
        (NvmeStatus::SUCCESS, 3 * 8192)
    );
    assert!(host.memory.as_slice()[..8192].iter().all(|byte| *byte == 3));
    let none = Sqe {
        opcode: 0x80,
        nsid: 2,
        cdw10_15: [0, 0, 0, 0, 0, 7],
        ..Sqe::default()
    };
    let status = host.run(&mut lab, none, DataPointer::NONE).status;
    assert_eq!((status.sct, status.sc, status.dnr), (7, 0xc1, true));
    let on_disk = Sqe {
        opcode: 0x80,
        nsid: 1,
        ..Sqe::default()
    };
    let status = host.run(&mut lab, on_disk, DataPointer::NONE).status;
    assert_eq!(status, NvmeStatus::INVALID_OPCODE);
    let write = Sqe::block_command(io_opcode::WRITE, 2, 0, 1, false);
    let status = host.run(&mut lab, write, host.data(0, 512)).status;
    assert_eq!(status, NvmeStatus::ACCESS_DENIED);
}

#[test]
fn commands_that_cannot_be_are_refused_with_the_status_that_says_why() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    let read = |lba, blocks| Sqe::block_command(io_opcode::READ, 1, lba, blocks, false);
    let cases = [
        (read(BLOCKS, 1), 512, NvmeStatus::LBA_OUT_OF_RANGE),
        (read(BLOCKS - 1, 2), 1024, NvmeStatus::LBA_OUT_OF_RANGE),
        (read(u64::MAX, 1), 512, NvmeStatus::LBA_OUT_OF_RANGE),
        (read(0, 257), 257 * 512, NvmeStatus::INVALID_FIELD),
        (read(0, 2), 512, NvmeStatus::DATA_SGL_LENGTH_INVALID),
        (
            Sqe {
                nsid: 3,
                ..read(0, 1)
            },
            512,
            NvmeStatus::INVALID_NAMESPACE,
        ),
        (
            Sqe {
                nsid: 0,
                ..read(0, 1)
            },
            512,
            NvmeStatus::INVALID_NAMESPACE,
        ),
        (
            Sqe {
                nsid: u32::MAX,
                ..read(0, 1)
            },
            512,
            NvmeStatus::INVALID_NAMESPACE,
        ),
        (
            Sqe {
                flags: 1,
                ..read(0, 1)
            },
            512,
            NvmeStatus::INVALID_FIELD,
        ),
        (
            Sqe {
                opcode: 0x0d,
                ..read(0, 1)
            },
            512,
            NvmeStatus::INVALID_OPCODE,
        ),
        (
            Sqe::fabrics(fabrics_type::CONNECT, [0; 6]),
            0,
            NvmeStatus::INVALID_OPCODE,
        ),
        (
            Sqe::fabrics(fabrics_type::PROPERTY_GET, [0; 6]),
            0,
            NvmeStatus::INVALID_OPCODE,
        ),
    ];
    for (sqe, length, status) in cases {
        assert_eq!(
            host.run(&mut lab, sqe, host.data(0, length)).status,
            status,
            "{sqe:?}"
        );
    }
    assert!(host.read(&mut lab, BLOCKS - 1, 512).is_ok());
}

#[test]
fn memory_stays_until_the_disk_has_answered_though_the_host_is_gone() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    lab.disk.frozen = true;
    for (token, length) in [(1, 4096), (2, 131_072)] {
        let sqe = Sqe::block_command(io_opcode::READ, 1, 0, (length / BLOCK) as u32, false);
        let data = host.data(0, length);
        host.queue.submit(sqe, data, token).unwrap();
    }
    assert!(host.turn(&mut lab).is_empty());
    let mut completions = Vec::new();
    host.queue.fail_all(&mut completions);
    assert_eq!(completions.len(), 2);
    assert!(
        completions
            .iter()
            .all(|done| done.status == NvmeStatus::HOST_PATH_ERROR)
    );
    lab.turn();
    assert!(
        lab.core
            .connection(host.connection)
            .unwrap()
            .socket()
            .is_none()
    );
    assert!(!lab.core.is_closed(host.connection));
    assert!(!lab.core.remove(host.connection));
    let (_, _, request) = lab.disk.queued[0];
    lab.disk.frozen = false;
    lab.turn();
    assert!(lab.core.is_closed(host.connection));
    lab.core.complete(request, NvmeStatus::SUCCESS, 0);
    assert!(lab.core.remove(host.connection));
    let mut again = lab.connect(false, false);
    lab.core.complete(request, NvmeStatus::SUCCESS, 0);
    assert!(again.read(&mut lab, 0, 131_072).is_ok());
}

#[test]
fn an_answer_given_twice_does_not_answer_the_next_request_in_its_place() {
    let mut lab = Lab::new(TargetOptions::default());
    let mut host = lab.connect(false, false);
    lab.disk.frozen = true;
    let flush = Sqe {
        opcode: io_opcode::FLUSH,
        nsid: 1,
        ..Sqe::default()
    };
    host.queue.submit(flush, DataPointer::NONE, 1).unwrap();
    assert!(host.turn(&mut lab).is_empty());
    let (_, _, first) = lab.disk.queued.pop_front().unwrap();
    lab.core.complete(first, NvmeStatus::SUCCESS, 0);
    assert_eq!(host.turn(&mut lab).len(), 1);
    host.queue.submit(flush, DataPointer::NONE, 2).unwrap();
    assert!(host.turn(&mut lab).is_empty());
    let (_, _, second) = lab.disk.queued[0];
    assert_eq!(first.slot, second.slot, "or this shows nothing");
    lab.core.complete(first, NvmeStatus::SUCCESS, 0);
    assert!(host.turn(&mut lab).is_empty());
    lab.core.complete(second, NvmeStatus::SUCCESS, 0);
    assert_eq!(host.turn(&mut lab).len(), 1);
}
