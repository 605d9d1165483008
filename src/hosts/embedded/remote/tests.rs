use std::time::{Duration, Instant};

use super::super::bdev::{BdevIo, BdevOp, IoError, IoResult};
use super::super::message::Answer;
use super::super::node::{CoreMask, Node, NodeOptions};
use super::super::nvme_tcp::buffer::{AlignedBuf, DataPointer};
use super::super::nvme_tcp::target::{ListenerAddress, NamespaceParameters, SubsystemParameters};

use super::*;

const NQN: &str = "nqn.2016-06.io.spdk:remote";
const BLOCK: usize = 4096;
const BLOCKS: u64 = 1024;

fn node(cores: usize) -> Node {
    let options = NodeOptions {
        core_mask: CoreMask::first(cores),
        handle_signals: false,
    };
    Node::start(&options, |_| {}).unwrap()
}

/// A node that exports one disk of memory.
fn serve(port: u16) -> (Node, SocketAddr) {
    serve_disk(port, 7)
}

/// The same with a disk of that UUID.
fn serve_disk(port: u16, uuid: u128) -> (Node, SocketAddr) {
    let node = node(1);
    let address = node
        .handle()
        .ask(0, move |core, answer: Answer<_>| {
            let uuid = Uuid::from_u128(uuid);
            let block_size = BLOCK as u32;
            registry::create_malloc(
                core,
                "Malloc0",
                BLOCKS,
                block_size,
                Some(uuid),
                move |core, id| {
                    let id = id.unwrap();
                    let subsystem = SubsystemParameters {
                        allow_any_host: true,
                        ..SubsystemParameters::new(NQN)
                    };
                    let namespace = NamespaceParameters {
                        nsid: None,
                        handle: target::namespace_handle(id),
                        block_size,
                        size_blocks: BLOCKS,
                        nguid: [7; 16],
                        uuid: uuid.into_bytes(),
                        eui64: [0; 8],
                        vendor_only: false,
                    };
                    core.target.state().create_subsystem(subsystem).unwrap();
                    core.target.state().add_namespace(NQN, namespace).unwrap();
                    let at = ListenerAddress::tcp("127.0.0.1", &port.to_string());
                    target::add_listener(core, NQN, &at, |_, result| answer.send(result));
                },
            );
        })
        .unwrap()
        .unwrap();
    (node, address)
}

fn attach_as(
    node: &Node,
    name: &'static str,
    address: SocketAddr,
    nqn: &str,
) -> Result<Vec<String>, BdevError> {
    let parameters = ControllerParameters {
        connect_timeout_ms: 2_000,
        ..ControllerParameters::new(nqn, "nqn.2014-08.org.nvmexpress:uuid:test", [9; 16])
    };
    node.handle()
        .ask(0, move |core, answer: Answer<_>| {
            attach(core, name, address, parameters, |_, result| {
                answer.send(result)
            });
        })
        .unwrap()
}

fn detach_as(node: &Node, name: &'static str) -> Result<(), BdevError> {
    node.handle()
        .ask(0, move |core, answer: Answer<_>| {
            detach(core, name, |_, result| answer.send(result));
        })
        .unwrap()
}

fn run_io(
    node: &Node,
    core: usize,
    op: BdevOp,
    lba: u64,
    blocks: u64,
    buffer: AlignedBuf,
) -> (IoResult, AlignedBuf) {
    let id = node
        .handle()
        .run(0, |core| {
            core.registry.find("Nvme0n1").map(|entry| entry.id)
        })
        .unwrap()
        .unwrap();
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

fn filled(blocks: usize) -> AlignedBuf {
    let mut buffer = AlignedBuf::new(blocks * BLOCK).unwrap();
    for (index, byte) in buffer.as_mut_slice().iter_mut().enumerate() {
        *byte = (index / 97 + index / BLOCK) as u8 | 1;
    }
    buffer
}

const WRITE: BdevOp = BdevOp::Write { fua: false };

#[test]
fn a_remote_disk_is_used_from_every_core_in_pieces_of_any_size() {
    let (server, address) = serve(0);
    let client = node(2);
    assert_eq!(
        attach_as(&client, "Nvme0", address, NQN),
        Ok(vec!["Nvme0n1".to_owned()])
    );
    for core in 0..2 {
        // Longer than one command may carry, and no multiple of that.
        let (status, written) = run_io(&client, core, WRITE, 10, 300, filled(300));
        assert_eq!(status, Ok(()));
        let none = || AlignedBuf::new(1).unwrap();
        let zeroes = run_io(&client, core, BdevOp::WriteZeroes, 20, 5, none());
        assert_eq!(zeroes.0, Ok(()));
        assert_eq!(
            run_io(&client, core, BdevOp::Unmap, 100, 50, none()).0,
            Ok(())
        );
        assert_eq!(run_io(&client, core, BdevOp::Flush, 0, 0, none()).0, Ok(()));
        let empty = AlignedBuf::new(300 * BLOCK).unwrap();
        let (status, read) = run_io(&client, 1 - core, BdevOp::Read, 10, 300, empty);
        assert_eq!(status, Ok(()));
        for block in 0..300 {
            let part = block * BLOCK..(block + 1) * BLOCK;
            let found = &read.as_slice()[part.clone()];
            let zeroed = matches!(block + 10, 20..25 | 100..150);
            let right = if zeroed {
                found.iter().all(|byte| *byte == 0)
            } else {
                found == &written.as_slice()[part]
            };
            assert!(right, "block {}", block + 10);
        }
    }
    let summary = client
        .handle()
        .run(0, |core| core.remotes.summaries(core).pop().unwrap())
        .unwrap();
    assert_eq!(summary.state, RemoteState::Enabled);
    assert_eq!(detach_as(&client, "Nvme0"), Ok(()));
    assert_eq!(detach_as(&client, "Nvme0").unwrap_err().code, -libc::ENODEV);
    let bdevs = client.handle().run(0, |core| core.registry.iter().count());
    assert_eq!(bdevs, Ok(0));
    // Attached again, it is found again.
    assert!(attach_as(&client, "Nvme0", address, NQN).is_ok());
    client.shutdown().unwrap();
    server.shutdown().unwrap();
}

#[test]
fn an_attach_that_cannot_work_ends_with_an_error_and_leaves_nothing() {
    let (server, address) = serve(0);
    let client = node(2);
    let wrong = attach_as(&client, "Nvme0", address, "nqn.2016-06.io.spdk:nobody");
    assert_eq!(wrong.unwrap_err().code, -libc::EIO);
    server.shutdown().unwrap();
    let refused = attach_as(&client, "Nvme0", address, NQN).unwrap_err();
    assert!(refused.message.contains("refused"), "{refused}");
    let left = client
        .handle()
        .run(0, |core| core.remotes.summaries(core).len());
    assert_eq!(left, Ok(0));
    client.shutdown().unwrap();
}

#[test]
fn a_remote_that_goes_and_returns_is_connected_again() {
    let (server, address) = serve(0);
    let client = node(2);
    attach_as(&client, "Nvme0", address, NQN).unwrap();
    assert_eq!(
        attach_as(&client, "Nvme0", address, NQN).unwrap_err().code,
        -libc::EEXIST
    );
    let claim = |core: &mut Core| core.registry.claim("Nvme0n1", "vol0").map(|entry| entry.id);
    let id = client.handle().run(0, claim).unwrap().unwrap();
    assert_eq!(detach_as(&client, "Nvme0").unwrap_err().code, -libc::EBUSY);
    assert_eq!(run_io(&client, 1, WRITE, 0, 8, filled(8)).0, Ok(()));
    server.shutdown().unwrap();
    for core in 0..2 {
        assert!(run_io(&client, core, WRITE, 0, 8, filled(8)).0.is_err());
    }
    let (server, _) = serve(address.port());
    let begin = Instant::now();
    for core in 0..2 {
        while run_io(&client, core, WRITE, 0, 8, filled(8)).0.is_err() {
            assert!(begin.elapsed() < Duration::from_secs(10));
            std::thread::yield_now();
        }
    }
    client
        .handle()
        .run(0, move |core| core.registry.release(id))
        .unwrap();
    assert_eq!(detach_as(&client, "Nvme0"), Ok(()));
    client.shutdown().unwrap();
    server.shutdown().unwrap();
}

#[test]
fn another_disk_under_the_same_namespace_id_is_not_taken_for_the_one_that_went() {
    let (server, address) = serve_disk(0, 7);
    let client = node(2);
    attach_as(&client, "Nvme0", address, NQN).unwrap();
    let claim = |core: &mut Core| core.registry.claim("Nvme0n1", "vol0").map(|entry| entry.id);
    let id = client.handle().run(0, claim).unwrap().unwrap();
    let until = |what: &str, is_so: fn(&mut Core) -> bool| {
        let begin = Instant::now();
        while !client.handle().run(0, is_so).unwrap() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::yield_now();
        }
    };
    server.shutdown().unwrap();
    until("lost", |core| {
        core.remotes.summaries(core)[0].state == RemoteState::Resetting
    });
    let (server, _) = serve_disk(address.port(), 8);
    until("connected to the other disk", |core| {
        core.remotes.summaries(core)[0].state == RemoteState::Enabled
    });
    for core in 0..2 {
        let status = run_io(&client, core, WRITE, 0, 8, filled(8)).0;
        assert_eq!(status, Err(IoError::Errno(libc::ENXIO)));
    }
    server.shutdown().unwrap();
    let (server, _) = serve_disk(address.port(), 7);
    let begin = Instant::now();
    while run_io(&client, 1, WRITE, 0, 8, filled(8)).0.is_err() {
        assert!(begin.elapsed() < Duration::from_secs(10), "its own disk");
        std::thread::yield_now();
    }
    // Held by nobody, it makes room for the bdev of the other disk.
    client
        .handle()
        .run(0, move |core| core.registry.release(id))
        .unwrap();
    server.shutdown().unwrap();
    let (server, _) = serve_disk(address.port(), 9);
    until("replaced", |core| {
        let found = core.registry.find("Nvme0n1");
        found.is_some_and(|entry| entry.uuid == Uuid::from_u128(9))
    });
    assert_eq!(run_io(&client, 0, WRITE, 0, 8, filled(8)).0, Ok(()));
    client.shutdown().unwrap();
    server.shutdown().unwrap();
}
