use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::bdev::{BdevId, BdevIo, BdevOp, IoError, IoResult, IoStat};
use super::super::disk::{FileDisk, FileParameters};
use super::super::message::{Answer, MAILBOX_CAPACITY, Message};
use super::super::nvme_tcp::buffer::{AlignedBuf, DataPointer};
use super::super::registry::{self, FileFlavour};
use super::*;

fn start(cores: usize) -> Node {
    let options = NodeOptions {
        core_mask: CoreMask::first(cores),
        handle_signals: false,
    };
    Node::start(&options, |_| {}).unwrap()
}

#[test]
fn core_masks_are_read_as_spdk_reads_them() {
    let cpus = |text: &str| text.parse::<CoreMask>().map(|mask| mask.0);
    assert_eq!(cpus("0x1"), Ok(vec![0]));
    assert_eq!(cpus("3"), Ok(vec![0, 1]));
    assert_eq!(cpus("0x8001"), Ok(vec![0, 15]));
    assert_eq!(cpus("[0,1]"), Ok(vec![0, 1]));
    assert_eq!(cpus("[4-6,1]"), Ok(vec![1, 4, 5, 6]));
    for wrong in [
        "", "0x", "0", "x", "[", "[]", "[2-1]", "[9999]", "0xfg", "[a]",
    ] {
        assert!(cpus(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn messages_between_cores_arrive_in_order_even_when_the_mailbox_is_full() {
    let node = start(2);
    let count = 3 * MAILBOX_CAPACITY;
    let seen: Vec<usize> = node
        .handle()
        .ask(0, move |core, answer: Answer<Vec<usize>>| {
            let collected = Arc::new(std::sync::Mutex::new((Vec::new(), Some(answer))));
            for number in 0..count {
                let collected = collected.clone();
                let call = move |_: &mut Core| {
                    let mut collected = collected.lock().unwrap();
                    collected.0.push(number);
                    if collected.0.len() == count {
                        let numbers = std::mem::take(&mut collected.0);
                        collected.1.take().unwrap().send(numbers);
                    }
                };
                core.send(1, Message::Call(Box::new(call)));
            }
        })
        .unwrap();
    assert_eq!(seen, (0..count).collect::<Vec<_>>());
    node.shutdown().unwrap();
}

#[test]
fn a_core_that_blocks_is_woken_by_threads_and_by_other_cores() {
    let node = start(2);
    for _ in 0..20 {
        // Long enough for both to block; a lost wake would show as a second each.
        std::thread::sleep(std::time::Duration::from_millis(1));
        let begin = Instant::now();
        let reached = Arc::new(AtomicUsize::new(0));
        let total = reached.clone();
        let found = node
            .handle()
            .ask(0, move |core, answer: Answer<usize>| {
                core.on_all_cores(
                    move |_| {
                        reached.fetch_add(1, Ordering::SeqCst);
                    },
                    move |_| answer.send(total.load(Ordering::SeqCst)),
                );
            })
            .unwrap();
        assert_eq!(found, 2);
        assert!(begin.elapsed() < std::time::Duration::from_millis(900));
    }
    node.shutdown().unwrap();
}

#[test]
fn timers_fire_after_their_delay_in_order() {
    let node = start(1);
    let order = node
        .handle()
        .ask(0, |core, answer: Answer<Vec<u64>>| {
            let fired = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            let begin_ns = core.reactor.now_ns();
            for delay_ms in [9, 3, 6] {
                let fired = fired.clone();
                core.after(delay_ms, move |core| {
                    assert!(core.reactor.now_ns() >= begin_ns + delay_ms * 1_000_000);
                    fired.borrow_mut().push(delay_ms);
                });
            }
            let cancelled = core.after(1, |_| panic!("was cancelled"));
            assert!(core.cancel_timer(cancelled));
            core.after(12, move |_| answer.send(fired.take()));
        })
        .unwrap();
    assert_eq!(order, [3, 6, 9]);
    node.shutdown().unwrap();
}

/// One I/O on a core, waited for. The buffer comes back.
fn run_io(
    node: &Node,
    core: usize,
    id: BdevId,
    op: BdevOp,
    lba: u64,
    blocks: u64,
    buffer: AlignedBuf,
) -> (IoResult, AlignedBuf) {
    let length_bytes = match op {
        BdevOp::Read | BdevOp::Write { .. } => buffer.length_bytes() as u32,
        _ => 0,
    };
    node.handle()
        .ask(core, move |core, answer: Answer<(IoResult, AlignedBuf)>| {
            // SAFETY: the buffer moves into the completion, so it outlives the I/O.
            let data = unsafe { DataPointer::new(buffer.as_ptr(), length_bytes) };
            let io = BdevIo {
                op,
                lba,
                blocks,
                data,
            };
            core.submit_control(id, io, move |_, status, _| answer.send((status, buffer)));
        })
        .unwrap()
}

fn filled(byte: u8) -> AlignedBuf {
    let mut buffer = AlignedBuf::new(4096).unwrap();
    buffer.as_mut_slice().fill(byte);
    buffer
}

fn create_malloc(node: &Node, name: &'static str) -> Result<BdevId, registry::BdevError> {
    node.handle()
        .ask(0, move |core, answer: Answer<_>| {
            registry::create_malloc(core, name, 64, 512, None, |_, result| answer.send(result));
        })
        .unwrap()
}

fn create_file(
    node: &Node,
    name: &'static str,
    path: &std::path::Path,
) -> Result<BdevId, registry::BdevError> {
    let parameters = FileParameters {
        path: path.to_owned(),
        block_size: 512,
        read_only: false,
    };
    node.handle()
        .ask(0, move |core, answer: Answer<_>| {
            let flavour = FileFlavour::Uring;
            registry::create_file(core, name, flavour, parameters, None, |_, result| {
                answer.send(result);
            });
        })
        .unwrap()
}

fn delete(node: &Node, name: &'static str) -> Result<(), registry::BdevError> {
    node.handle()
        .ask(0, move |core, answer: Answer<_>| {
            registry::delete(core, name, |_, result| answer.send(result));
        })
        .unwrap()
}

/// The same steps on any disk of 64 blocks of 512 bytes, from two cores.
fn exercise(node: &Node, id: BdevId) {
    let write = BdevOp::Write { fua: true };
    assert_eq!(run_io(node, 0, id, write, 0, 8, filled(1)).0, Ok(()));
    assert_eq!(run_io(node, 1, id, write, 56, 8, filled(2)).0, Ok(()));
    let none = || AlignedBuf::new(1).unwrap();
    assert_eq!(run_io(node, 0, id, BdevOp::Flush, 0, 0, none()).0, Ok(()));
    assert_eq!(
        run_io(node, 1, id, BdevOp::WriteZeroes, 0, 1, none()).0,
        Ok(())
    );
    assert_eq!(run_io(node, 0, id, BdevOp::Unmap, 63, 1, none()).0, Ok(()));
    let (status, back) = run_io(node, 1, id, BdevOp::Read, 0, 8, filled(9));
    assert_eq!(status, Ok(()));
    assert!(back.as_slice()[..512].iter().all(|byte| *byte == 0));
    assert!(back.as_slice()[512..].iter().all(|byte| *byte == 1));
    let (status, back) = run_io(node, 0, id, BdevOp::Read, 56, 8, filled(9));
    assert_eq!(status, Ok(()));
    assert!(back.as_slice()[..7 * 512].iter().all(|byte| *byte == 2));
    assert!(back.as_slice()[7 * 512..].iter().all(|byte| *byte == 0));
    let invalid = Err(IoError::Errno(libc::EINVAL));
    assert_eq!(run_io(node, 0, id, write, 57, 8, filled(3)).0, invalid);
    assert_eq!(
        run_io(node, 0, id, BdevOp::Unmap, u64::MAX, 2, none()).0,
        invalid
    );
}

#[test]
fn memory_and_files_serve_both_cores_and_keep_their_bounds() {
    let node = start(2);
    let memory = create_malloc(&node, "Malloc0").unwrap();
    exercise(&node, memory);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0xff; 64 * 512]).unwrap();
    let file = create_file(&node, "File0", &path).unwrap();
    exercise(&node, file);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * 512);
    let stat = node
        .handle()
        .ask(0, move |core, answer: Answer<IoStat>| {
            registry::iostat(core, file, |_, stat| answer.send(stat));
        })
        .unwrap();
    assert_eq!((stat.write.ops, stat.write.bytes), (2, 8192));
    assert_eq!((stat.read.ops, stat.read.bytes), (2, 8192));
    assert_eq!((stat.unmap.ops, stat.unmap.bytes), (1, 512));
    let (shortest, longest) = stat.read.latency_range_ticks.unwrap();
    assert!(0 < shortest && shortest <= longest);
    assert_eq!(stat.read.latency_ticks, shortest + longest);
    node.shutdown().unwrap();
}

#[test]
fn names_are_unique_and_codes_are_spdks() {
    let node = start(1);
    create_malloc(&node, "Malloc0").unwrap();
    let again = create_malloc(&node, "Malloc0").unwrap_err();
    assert_eq!(again.code, -libc::EEXIST);
    let absent = delete(&node, "nobody").unwrap_err();
    assert_eq!(absent.code, -libc::ENODEV);
    let missing = create_file(&node, "File0", "/nowhere/disk".as_ref()).unwrap_err();
    assert_eq!(missing.code, -libc::ENOENT);
    assert!(missing.message.contains("/nowhere/disk"), "{missing}");
    node.shutdown().unwrap();
}

#[test]
fn a_claimed_bdev_is_neither_claimed_again_nor_deleted() {
    let node = start(2);
    let id = create_malloc(&node, "Malloc0").unwrap();
    let claim = |who: &'static str| {
        let claimed = node
            .handle()
            .run(0, move |core| core.registry.claim("Malloc0", who));
        claimed.unwrap().map(|entry| entry.id)
    };
    assert_eq!(claim("vol0"), Ok(id));
    assert_eq!(claim("vol1").unwrap_err().code, -libc::EPERM);
    assert_eq!(delete(&node, "Malloc0").unwrap_err().code, -libc::EBUSY);
    node.handle()
        .run(0, move |core| core.registry.release(id))
        .unwrap();
    assert_eq!(delete(&node, "Malloc0"), Ok(()));
    let (status, _) = run_io(&node, 1, id, BdevOp::Read, 0, 8, filled(0));
    assert_eq!(status, Err(IoError::Errno(libc::ENODEV)));
    // The place is taken again, and the old id does not reach the new bdev.
    let new = create_malloc(&node, "Malloc1").unwrap();
    assert_eq!(new.index, id.index);
    let (status, _) = run_io(&node, 0, id, BdevOp::Read, 0, 8, filled(0));
    assert_eq!(status, Err(IoError::Errno(libc::ENODEV)));
    node.shutdown().unwrap();
}

#[test]
fn deleting_waits_for_what_is_in_flight_and_lets_go_of_the_file() {
    let node = start(2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0xff; 64 * 512]).unwrap();
    for _ in 0..10 {
        let id = create_file(&node, "File0", &path).unwrap();
        let answered = Arc::new(AtomicUsize::new(0));
        let counted = answered.clone();
        let seen = node
            .handle()
            .ask(0, move |core, answer: Answer<(usize, bool)>| {
                for lba in 0..32 {
                    let buffer = filled(lba as u8);
                    // SAFETY: the buffer moves into the completion, so it outlives the I/O.
                    let data = unsafe { DataPointer::new(buffer.as_ptr(), 512) };
                    let io = BdevIo {
                        op: BdevOp::Write { fua: true },
                        lba,
                        blocks: 1,
                        data,
                    };
                    let counted = counted.clone();
                    core.submit_control(id, io, move |_, status, _| {
                        assert_eq!(status, Ok(()));
                        drop(buffer);
                        counted.fetch_add(1, Ordering::SeqCst);
                    });
                }
                registry::delete(core, "File0", move |_, result| {
                    answer.send((answered.load(Ordering::SeqCst), result.is_ok()));
                });
            })
            .unwrap();
        assert_eq!(seen, (32, true));
    }
    node.shutdown().unwrap();
}

#[test]
fn a_file_that_another_process_lets_go_of_soon_is_waited_for() {
    let node = start(1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0xff; 64 * 512]).unwrap();
    let parameters = FileParameters {
        path: path.clone(),
        block_size: 0,
        read_only: false,
    };
    let held = FileDisk::try_open(&parameters).unwrap().unwrap();
    node.handle()
        .run(0, |core| {
            core.after(30, move |_| drop(held));
        })
        .unwrap();
    assert!(create_file(&node, "File0", &path).is_ok());
    node.shutdown().unwrap();
}

#[test]
fn a_call_to_a_node_that_is_gone_is_an_error() {
    let node = start(1);
    let handle = node.handle().clone();
    node.shutdown().unwrap();
    assert!(handle.run(0, |_| ()).is_err());
}
