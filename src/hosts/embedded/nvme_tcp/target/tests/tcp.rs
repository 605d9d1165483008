//! The blocking client against a target behind real sockets.

use super::*;
use crate::hosts::embedded::nvme_tcp::blocking::{
    BlockingClient, ClientError, ClientParameters, Timeouts, discover,
};
use crate::hosts::embedded::nvme_tcp::initiator::InitiatorError;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A target on a thread of its own.
struct Served {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<RamDisk>>,
}

fn serve() -> Served {
    serve_disk(RamDisk::new())
}

fn serve_disk(mut disk: RamDisk) -> Served {
    let target = Lab::new(TargetOptions::default()).target;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        let mut core = TargetCore::<TcpStream>::new(target).unwrap();
        while !stopped.load(Ordering::Acquire) {
            if let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).unwrap();
                core.accept(stream, here()).unwrap();
            }
            let all: Vec<u32> = core.connections().map(|(index, _)| index).collect();
            for index in all {
                core.on_readable(index, &mut disk);
                core.on_writable(index);
                core.remove(index);
            }
            while let Some((namespace, io, request)) = disk.queued.pop_front() {
                let (status, dword0) = disk.run(namespace, &io);
                core.complete(request, status, dword0);
            }
            core.poll(&mut disk);
            std::thread::yield_now();
        }
        disk
    });
    Served {
        address,
        stop,
        thread: Some(thread),
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl Served {
    fn stop(&mut self) -> RamDisk {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap()
    }
}

#[test]
fn the_blocking_client_reads_what_it_wrote_in_any_length() {
    let mut served = serve();
    let mut client = BlockingClient::connect(served.address, NQN, Timeouts::default()).unwrap();
    assert_eq!((client.block_size(), client.blocks()), (512, BLOCKS));
    let bytes = pattern(1 << 20, 3);
    client.write(10, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    client.read(10, &mut back).unwrap();
    assert!(back == bytes);
    let (first, second) = (pattern(512, 8), pattern(4096, 9));
    let outcome = client.write_many(&[(0, &first), (3000, &second)]);
    outcome.result.unwrap();
    let mut acknowledged = outcome.acknowledged;
    acknowledged.sort_unstable();
    assert_eq!(acknowledged, [0, 1]);
    client.write_zeroes(12, 2).unwrap();
    client.flush().unwrap();
    let error = client.write(BLOCKS, &first).unwrap_err();
    assert!(matches!(
        error,
        ClientError::Command {
            lba: BLOCKS,
            status: NvmeStatus::LBA_OUT_OF_RANGE,
            ..
        }
    ));
    assert!(matches!(
        client.write(0, &[1; 100]),
        Err(ClientError::Usage(_))
    ));
    let mut some = [0; 512];
    client.read(0, &mut some).unwrap();
    assert_eq!(some[..], first[..]);
    let found = discover(served.address, HOST, Timeouts::default()).unwrap();
    assert_eq!(found[0].subsystem_nqn, NQN);
    let disk = served.stop();
    assert_eq!(disk.flushes, 1);
    assert!(
        disk.bytes[12 * BLOCK..14 * BLOCK]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(disk.bytes[14 * BLOCK..][..4096] == bytes[4 * BLOCK..][..4096]);
    assert!(disk.bytes[3000 * BLOCK..][..4096] == second[..]);
}

#[test]
fn no_status_but_success_passes_for_an_acknowledgement() {
    for refusal in [
        NvmeStatus::HOST_PATH_ERROR,
        NvmeStatus::LBA_OUT_OF_RANGE,
        NvmeStatus::INTERNAL_ERROR,
    ] {
        let served = serve_disk(RamDisk {
            refusal: Some(refusal),
            ..RamDisk::new()
        });
        let mut client = BlockingClient::connect(served.address, NQN, Timeouts::default()).unwrap();
        let outcome = client.write_many(&[(0, &[1; 512]), (8, &[2; 512])]);
        assert!(outcome.acknowledged.is_empty());
        assert!(
            matches!(outcome.result, Err(ClientError::Command { status, .. }) if status == refusal),
            "{:?}",
            outcome.result
        );
    }
}

#[test]
fn a_client_with_digests_reads_what_it_wrote() {
    for (header_digest, data_digest) in [(true, false), (false, true), (true, true)] {
        let served = serve();
        let wanted = ClientParameters {
            header_digest,
            data_digest,
            ..ClientParameters::default()
        };
        let mut client = BlockingClient::connect_with(served.address, NQN, &wanted).unwrap();
        let agreed = client.digests();
        assert_eq!((agreed.header, agreed.data), (header_digest, data_digest));
        let bytes = pattern(300 << 10, 5);
        client.write(1, &bytes).unwrap();
        let mut back = vec![0; bytes.len()];
        client.read(1, &mut back).unwrap();
        assert!(back == bytes);
    }
}

#[test]
fn a_target_that_goes_away_or_stays_silent_is_an_error_in_time() {
    let timeouts = Timeouts {
        connect: Duration::from_millis(300),
        command: Duration::from_millis(300),
    };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = BlockingClient::connect(silent.local_addr().unwrap(), NQN, timeouts).err();
    assert!(matches!(
        error,
        Some(ClientError::Initiator {
            source: InitiatorError::Timeout { .. },
            ..
        })
    ));
    let mut served = serve();
    let missing = BlockingClient::connect(served.address, "nqn.2016-06.a:b", Timeouts::default());
    assert!(matches!(
        missing.err(),
        Some(ClientError::Initiator {
            source: InitiatorError::Refused { .. },
            ..
        })
    ));
    let mut client = BlockingClient::connect(served.address, NQN, Timeouts::default()).unwrap();
    served.stop();
    let error = client.write(0, &[1; 512]).unwrap_err();
    assert!(matches!(error, ClientError::Initiator { .. }), "{error}");
    assert!(client.read(0, &mut [0; 512]).is_err(), "and stays one");
}
