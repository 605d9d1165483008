use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::disk::FileParameters;
use super::super::message::Answer;
use super::super::node::{CoreMask, Node, NodeOptions};
use super::super::nvme_tcp::blocking::{BlockingClient, ClientError, ClientParameters, Timeouts};
use super::super::nvme_tcp::command::{Sqe, io_opcode};
use super::super::nvme_tcp::target::{NamespaceParameters, SubsystemParameters};
use super::super::registry::{self, FileFlavour};
use super::*;

const NQN: &str = "nqn.2016-06.io.spdk:test";
const BLOCK: usize = 4096;

struct Rig {
    node: Node,
    address: SocketAddr,
}

impl Rig {
    fn new(cores: usize) -> Self {
        let options = NodeOptions {
            core_mask: CoreMask::first(cores),
            handle_signals: false,
        };
        let node = Node::start(&options, |_| {}).unwrap();
        let address = node
            .handle()
            .ask(0, |core, answer: Answer<_>| {
                let parameters = SubsystemParameters {
                    allow_any_host: true,
                    ..SubsystemParameters::new(NQN)
                };
                core.target.state().create_subsystem(parameters).unwrap();
                let address = ListenerAddress::tcp("127.0.0.1", "0");
                add_listener(core, NQN, &address, |_, result| answer.send(result));
            })
            .unwrap()
            .unwrap();
        Self { node, address }
    }

    fn export(&self, id: BdevId) -> u32 {
        let add = move |core: &mut Core| {
            let bdev = core.registry.get(id).unwrap();
            let parameters = NamespaceParameters {
                nsid: None,
                handle: namespace_handle(id),
                block_size: bdev.block_size,
                size_blocks: bdev.num_blocks,
                nguid: *bdev.uuid.as_bytes(),
                uuid: *bdev.uuid.as_bytes(),
                eui64: [0; 8],
                vendor_only: false,
            };
            let nsid = core.target.state().add_namespace(NQN, parameters);
            changed(core);
            nsid.unwrap()
        };
        self.node.handle().run(0, add).unwrap()
    }

    fn malloc(&self, name: &'static str, blocks: u64) -> BdevId {
        self.node
            .handle()
            .ask(0, move |core, answer: Answer<_>| {
                let block_size = BLOCK as u32;
                registry::create_malloc(core, name, blocks, block_size, None, |_, result| {
                    answer.send(result);
                });
            })
            .unwrap()
            .unwrap()
    }

    fn file(&self, name: &'static str, path: &Path) -> BdevId {
        let parameters = FileParameters {
            path: path.to_owned(),
            block_size: BLOCK as u32,
            read_only: false,
        };
        self.node
            .handle()
            .ask(0, move |core, answer: Answer<_>| {
                let flavour = FileFlavour::Aio;
                registry::create_file(core, name, flavour, parameters, None, |_, result| {
                    answer.send(result);
                });
            })
            .unwrap()
            .unwrap()
    }

    fn client(&self, nsid: u32) -> BlockingClient {
        self.client_with(nsid, Timeouts::default())
    }

    fn client_with(&self, nsid: u32, timeouts: Timeouts) -> BlockingClient {
        let wanted = ClientParameters {
            nsid,
            timeouts,
            ..ClientParameters::default()
        };
        BlockingClient::connect_with(self.address, NQN, &wanted).unwrap()
    }

    /// Connections and I/O in flight, over all cores.
    fn leftovers(&self, id: BdevId) -> (usize, u32) {
        let mut sum = (0, 0);
        for core in 0..self.node.handle().cores() {
            let count = move |core: &mut Core| {
                let in_flight = core.bdevs.get(id).map_or(0, |bdev| bdev.in_flight);
                (core.target.connections(), in_flight)
            };
            let (connections, in_flight) = self.node.handle().run(core, count).unwrap();
            sum = (sum.0 + connections, sum.1 + in_flight);
        }
        sum
    }

    fn wait_until_nothing_is_left(&self, id: BdevId) {
        let begin = Instant::now();
        while self.leftovers(id) != (0, 0) {
            let left = self.leftovers(id);
            assert!(begin.elapsed() < Duration::from_secs(5), "left: {left:?}");
            std::thread::yield_now();
        }
    }
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (seed * 31 + index * 7 + index / 251) as u8)
        .collect()
}

/// Everything that a host can ask of a namespace.
fn exercise(client: &mut BlockingClient) {
    assert_eq!(client.block_size(), BLOCK as u32);
    for (lba, blocks) in [(0, 1), (1, 2), (8, 32), (40, 100)] {
        let data = pattern(lba, blocks * BLOCK);
        client.write(lba as u64, &data).unwrap();
        let mut back = vec![0; data.len()];
        client.read(lba as u64, &mut back).unwrap();
        assert!(back == data, "blocks from {lba}");
    }
    client.flush().unwrap();
    client.write_zeroes(9, 2).unwrap();
    // Dataset Management: 12, nothing, and 14 to 15.
    let mut ranges = [0; 48];
    for (index, (lba, blocks)) in [(12u64, 1u32), (13, 0), (14, 2)].into_iter().enumerate() {
        ranges[index * 16 + 4..index * 16 + 8].copy_from_slice(&blocks.to_le_bytes());
        ranges[index * 16 + 8..index * 16 + 16].copy_from_slice(&lba.to_le_bytes());
    }
    let deallocate = Sqe {
        opcode: io_opcode::DATASET_MANAGEMENT,
        nsid: client.namespace().nsid,
        cdw10_15: [2, 4, 0, 0, 0, 0],
        ..Sqe::default()
    };
    let answer = client.passthrough(deallocate, &mut ranges).unwrap();
    assert!(answer.status.is_success(), "{}", answer.status);
    let expected = pattern(8, 32 * BLOCK);
    let mut back = vec![0; 32 * BLOCK];
    client.read(8, &mut back).unwrap();
    for block in 0..32 {
        let part = block * BLOCK..(block + 1) * BLOCK;
        let zeroed = matches!(block + 8, 9 | 10 | 12 | 14 | 15);
        let right = if zeroed {
            back[part].iter().all(|byte| *byte == 0)
        } else {
            back[part.clone()] == expected[part]
        };
        assert!(right, "block {}", block + 8);
    }
    // Write Zeroes with FUA takes two steps here.
    let mut zeroes = Sqe::block_command(
        io_opcode::WRITE_ZEROES,
        client.namespace().nsid,
        11,
        1,
        true,
    );
    zeroes.nsid = client.namespace().nsid;
    let answer = client.passthrough(zeroes, &mut []).unwrap();
    assert!(answer.status.is_success(), "{}", answer.status);
    client.read(11, &mut back[..BLOCK]).unwrap();
    assert!(back[..BLOCK].iter().all(|byte| *byte == 0));
}

#[test]
fn hosts_use_memory_and_files_through_two_cores() {
    let rig = Rig::new(2);
    let memory = rig.malloc("Malloc0", 256);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; 256 * BLOCK]).unwrap();
    let file = rig.file("Aio0", &path);
    for id in [memory, file] {
        let nsid = rig.export(id);
        let mut clients: Vec<_> = (0..3).map(|_| rig.client(nsid)).collect();
        for client in &mut clients {
            exercise(client);
        }
        // What one wrote the others read, whatever core they are on.
        let data = pattern(99, BLOCK);
        clients[0].write(200, &data).unwrap();
        for client in &mut clients {
            let mut back = vec![0; BLOCK];
            client.read(200, &mut back).unwrap();
            assert!(back == data);
        }
        assert!(rig.leftovers(id).0 >= 6);
        drop(clients);
        rig.wait_until_nothing_is_left(id);
    }
    let counted = rig
        .node
        .handle()
        .run(1, move |core| core.bdevs.get(file).map(|bdev| bdev.stat));
    assert!(counted.unwrap().unwrap().read.ops > 0);
    rig.node.shutdown().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 256 * BLOCK as u64);
}

#[test]
fn connections_that_are_cut_under_load_leave_nothing_behind() {
    let rig = Rig::new(2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; 1024 * BLOCK]).unwrap();
    let file = rig.file("Aio0", &path);
    let nsid = rig.export(file);
    let data = pattern(1, 32 * BLOCK);
    let requests: Vec<(u64, &[u8])> = (0..32).map(|index| (index * 32, &data[..])).collect();
    for _ in 0..5 {
        // Gives up while its commands are under way.
        let impatient = Timeouts {
            command: Duration::ZERO,
            ..Timeouts::default()
        };
        let mut client = rig.client_with(nsid, impatient);
        assert!(client.write_many(&requests).result.is_err());
        drop(client);
    }
    rig.wait_until_nothing_is_left(file);
    // Whatever they had taken is there again.
    let mut client = rig.client(nsid);
    assert_eq!(client.write_many(&requests).acknowledged.len(), 32);
    drop(client);
    rig.wait_until_nothing_is_left(file);
    rig.node.shutdown().unwrap();
}

#[test]
fn a_subsystem_that_is_deleted_under_load_closes_its_connections_and_port() {
    let rig = Rig::new(2);
    let memory = rig.malloc("Malloc0", 1024);
    let nsid = rig.export(memory);
    let writers: Vec<_> = (0..3)
        .map(|_| {
            let mut client = rig.client(nsid);
            std::thread::spawn(move || {
                let data = pattern(3, 16 * BLOCK);
                loop {
                    if let Err(error) = client.write(64, &data) {
                        return error;
                    }
                }
            })
        })
        .collect();
    rig.node
        .handle()
        .run(0, |core| delete_subsystem(core, NQN))
        .unwrap()
        .unwrap();
    for writer in writers {
        assert!(!matches!(writer.join().unwrap(), ClientError::Usage(_)));
    }
    rig.wait_until_nothing_is_left(memory);
    assert!(TcpStream::connect(rig.address).is_err());
    rig.node.shutdown().unwrap();
}

#[test]
fn a_bdev_that_is_deleted_is_no_namespace_any_more() {
    let rig = Rig::new(1);
    let memory = rig.malloc("Malloc0", 64);
    let nsid = rig.export(memory);
    let mut client = rig.client(nsid);
    client.write(0, &pattern(1, BLOCK)).unwrap();
    rig.node
        .handle()
        .ask(0, |core, answer: Answer<_>| {
            registry::delete(core, "Malloc0", |_, result| answer.send(result));
        })
        .unwrap()
        .unwrap();
    let refused = client.write(0, &pattern(1, BLOCK));
    assert!(
        matches!(refused, Err(ClientError::Command { .. })),
        "{refused:?}"
    );
    rig.node.shutdown().unwrap();
}

#[test]
fn a_port_in_use_is_an_error_after_a_while_and_one_that_becomes_free_is_taken() {
    let rig = Rig::new(1);
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = held.local_addr().unwrap();
    rig.node
        .handle()
        .run(0, move |core| {
            core.after(30, move |_| drop(held));
        })
        .unwrap();
    let listened = rig
        .node
        .handle()
        .ask(0, move |core, answer: Answer<_>| {
            let port = address.port().to_string();
            let wanted = ListenerAddress::tcp("127.0.0.1", &port);
            add_listener(core, NQN, &wanted, |_, result| answer.send(result));
        })
        .unwrap();
    assert_eq!(listened, Ok(address));
    let again = rig
        .node
        .handle()
        .ask(0, move |core, answer: Answer<_>| {
            let port = address.port().to_string();
            let wanted = ListenerAddress::tcp("127.0.0.1", &port);
            add_listener(core, NQN, &wanted, |_, result| answer.send(result));
        })
        .unwrap();
    assert_eq!(again.unwrap_err().code, -libc::EEXIST);
    let foreign = rig
        .node
        .handle()
        .ask(0, move |core, answer: Answer<_>| {
            let wanted = ListenerAddress::tcp("192.0.2.1", "4420");
            add_listener(core, NQN, &wanted, |_, result| answer.send(result));
        })
        .unwrap();
    assert_eq!(foreign.unwrap_err().code, -libc::EADDRNOTAVAIL);
    rig.node.shutdown().unwrap();
}

#[test]
fn a_listener_that_is_removed_lets_nobody_in_from_then_on() {
    let rig = Rig::new(1);
    for _ in 0..20 {
        let begun = rig
            .node
            .handle()
            .ask(0, |core, answer: Answer<_>| {
                let wanted = ListenerAddress::tcp("127.0.0.2", "0");
                add_listener(core, NQN, &wanted, |core, result| {
                    let local = result.unwrap();
                    // A round of the loop later the ring watches it.
                    core.after(1, move |core| {
                        let port = local.port().to_string();
                        let taken = ListenerAddress::tcp("127.0.0.2", &port);
                        let removed = remove_listener(core, NQN, &taken);
                        let refused = TcpStream::connect(local).is_err();
                        answer.send((removed.is_ok(), refused));
                    });
                });
            })
            .unwrap();
        assert_eq!(begun, (true, true));
    }
    rig.node.shutdown().unwrap();
}

#[test]
fn a_namespace_handle_names_its_bdev() {
    let id = BdevId {
        index: 7,
        generation: u32::MAX,
    };
    assert_eq!(bdev_of(namespace_handle(id)), id);
}
