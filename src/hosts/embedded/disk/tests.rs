use super::super::bdev::{BdevId, IoKind, Owner};
use super::super::ring::Completion;
use super::*;

const BLOCK: usize = 4096;

struct Rig {
    ring: Ring,
    queue: DiskQueue,
    disk: FileDisk,
}

#[repr(align(4096))]
struct Page([u8; BLOCK]);

impl Rig {
    fn new(blocks: usize) -> (Self, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((blocks * BLOCK) as u64).unwrap();
        let disk = FileDisk::try_open(&parameters(&file, BLOCK as u32))
            .unwrap()
            .unwrap();
        let rig = Self {
            ring: Ring::new(8).unwrap(),
            queue: DiskQueue::new().unwrap(),
            disk,
        };
        (rig, file)
    }

    fn run(&mut self, op: BdevOp, lba: u64, blocks: u64, page: &mut Page) -> IoResult {
        // SAFETY: the page outlives the run, which waits for the completion.
        let data = unsafe { DataPointer::new(page.0.as_mut_ptr(), BLOCK as u32) };
        self.run_with(op, lba, blocks, data)
    }

    fn run_with(&mut self, op: BdevOp, lba: u64, blocks: u64, data: DataPointer) -> IoResult {
        let ticket = Ticket {
            bdev: BdevId {
                index: 0,
                generation: 1,
            },
            owner: Owner::Volume {
                volume: 0,
                token: lba,
            },
            kind: IoKind::from(op),
            length_bytes: 0,
            submitted_ns: 0,
        };
        let io = BdevIo {
            op,
            lba,
            blocks,
            data,
        };
        self.queue.submit(&mut self.ring, &self.disk, ticket, &io)?;
        let mut completions: Vec<Completion> = Vec::new();
        loop {
            self.ring.wait(std::time::Duration::from_secs(1)).unwrap();
            self.ring.collect(&mut completions);
            for completion in completions.drain(..) {
                if let Some((ticket, status)) =
                    self.queue
                        .complete(&mut self.ring, completion.tag, completion.result)
                {
                    assert_eq!(
                        ticket.owner,
                        Owner::Volume {
                            volume: 0,
                            token: lba
                        }
                    );
                    assert_eq!(self.queue.in_flight(), 0);
                    return status;
                }
            }
        }
    }
}

fn parameters(file: &tempfile::NamedTempFile, block_size: u32) -> FileParameters {
    FileParameters {
        path: file.path().to_owned(),
        block_size,
        read_only: false,
    }
}

#[test]
fn a_file_is_read_written_flushed_zeroed_and_unmapped() {
    let (mut rig, file) = Rig::new(16);
    let mut page = Page([0x5a; BLOCK]);
    for lba in 0..4 {
        let fua = lba % 2 == 0;
        assert_eq!(rig.run(BdevOp::Write { fua }, lba, 1, &mut page), Ok(()));
    }
    assert_eq!(rig.run(BdevOp::Flush, 0, 0, &mut page), Ok(()));
    assert_eq!(rig.run(BdevOp::WriteZeroes, 1, 1, &mut page), Ok(()));
    assert_eq!(rig.run(BdevOp::Unmap, 2, 1, &mut page), Ok(()));
    for (lba, byte) in [(0, 0x5a), (1, 0), (2, 0), (3, 0x5a)] {
        let mut back = Page([0xee; BLOCK]);
        assert_eq!(rig.run(BdevOp::Read, lba, 1, &mut back), Ok(()));
        assert!(back.0.iter().all(|found| *found == byte), "block {lba}");
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 16 * BLOCK as u64);
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    let blocks = 2 * ZeroMemory::LENGTH_BYTES / BLOCK + 3;
    let (mut rig, _file) = Rig::new(blocks);
    let mut page = Page([0x5a; BLOCK]);
    let last = blocks as u64 - 1;
    for lba in [0, 1, last - 1, last] {
        let write = BdevOp::Write { fua: false };
        assert_eq!(rig.run(write, lba, 1, &mut page), Ok(()));
    }
    let ticket = |rig: &Rig| {
        let (_, io) = rig.queue.slots.iter().next().unwrap();
        io.ticket
    };
    let io = BdevIo {
        op: BdevOp::Unmap,
        lba: 1,
        blocks: last - 1,
        data: DataPointer::NONE,
    };
    let owner = Owner::Volume {
        volume: 0,
        token: 0,
    };
    let started = Ticket {
        bdev: BdevId {
            index: 0,
            generation: 1,
        },
        owner,
        kind: IoKind::Unmap,
        length_bytes: 0,
        submitted_ns: 0,
    };
    // Not submitted to the kernel: the two answers are ours.
    let key = rig.queue.slots.insert(DiskIo {
        ticket: started,
        fd: rig.disk.fd(),
        stage: Stage::PunchHole,
        offset_bytes: io.lba * BLOCK as u64,
        remaining_bytes: io.blocks * BLOCK as u64,
        pointer: std::ptr::null_mut(),
        attempts: 0,
        bounce: None,
    });
    assert_eq!(ticket(&rig).owner, owner);
    let slot = rig.queue.slots.get_mut(key).unwrap();
    assert!(matches!(advance(slot, -libc::EOPNOTSUPP), Progress::GoOn));
    assert!(matches!(advance(slot, -libc::EOPNOTSUPP), Progress::GoOn));
    assert_eq!(slot.stage, Stage::WriteZeroes);
    rig.queue.push(&mut rig.ring, key);
    let mut completions = Vec::new();
    let status = 'done: loop {
        rig.ring.wait(std::time::Duration::from_secs(1)).unwrap();
        rig.ring.collect(&mut completions);
        for completion in completions.drain(..) {
            let answer = rig
                .queue
                .complete(&mut rig.ring, completion.tag, completion.result);
            if let Some((_, status)) = answer {
                break 'done status;
            }
        }
    };
    assert_eq!(status, Ok(()));
    for (lba, byte) in [(0, 0x5a), (1, 0), (last - 1, 0), (last, 0x5a)] {
        let mut back = Page([0xee; BLOCK]);
        assert_eq!(rig.run(BdevOp::Read, lba, 1, &mut back), Ok(()));
        assert!(back.0.iter().all(|found| *found == byte), "block {lba}");
    }
}

fn io_in_stage(stage: Stage, remaining_bytes: u64) -> DiskIo {
    DiskIo {
        ticket: Ticket {
            bdev: BdevId {
                index: 0,
                generation: 1,
            },
            owner: Owner::Volume {
                volume: 0,
                token: 0,
            },
            kind: IoKind::Read,
            length_bytes: remaining_bytes,
            submitted_ns: 0,
        },
        fd: -1,
        stage,
        offset_bytes: 0,
        remaining_bytes,
        pointer: std::ptr::null_mut(),
        attempts: 0,
        bounce: None,
    }
}

#[test]
fn a_short_transfer_goes_on_and_an_empty_one_is_an_error() {
    let mut io = io_in_stage(Stage::Read, 8192);
    assert!(matches!(advance(&mut io, 4096), Progress::GoOn));
    assert_eq!((io.offset_bytes, io.remaining_bytes), (4096, 4096));
    assert_eq!(io.pointer as usize, 4096);
    let mut cut = io_in_stage(Stage::Read, 8192);
    assert!(matches!(
        advance(&mut cut, 0),
        Progress::Ended(Err(IoError::Errno(libc::EIO)))
    ));
    assert!(matches!(advance(&mut io, 4096), Progress::Ended(Ok(()))));
}

#[test]
fn an_interrupted_transfer_is_tried_again_but_not_for_ever() {
    let mut io = io_in_stage(Stage::Read, 4096);
    for _ in 0..ATTEMPTS_MAX {
        assert!(matches!(advance(&mut io, -libc::EAGAIN), Progress::GoOn));
    }
    assert!(matches!(
        advance(&mut io, -libc::EAGAIN),
        Progress::Ended(Err(IoError::Errno(libc::EAGAIN)))
    ));
}

#[test]
fn a_file_that_somebody_holds_is_not_opened() {
    let (rig, file) = Rig::new(1);
    let again = parameters(&file, 0);
    assert!(FileDisk::try_open(&again).unwrap().is_none());
    drop(rig);
    assert!(FileDisk::try_open(&again).unwrap().is_some());
}

#[test]
fn what_cannot_be_a_disk_is_refused_with_spdks_codes() {
    let directory = tempfile::tempdir().unwrap();
    let code = |path: PathBuf, block_size| {
        let parameters = FileParameters {
            path,
            block_size,
            read_only: false,
        };
        FileDisk::try_open(&parameters).unwrap_err().code
    };
    let path = directory.path().join("disk");
    assert_eq!(code(path.clone(), 512), -libc::ENOENT);
    assert_eq!(code(directory.path().to_owned(), 512), -libc::EINVAL);
    std::fs::write(&path, []).unwrap();
    assert_eq!(code(path.clone(), 512), -libc::EINVAL);
    std::fs::write(&path, [0; 5000]).unwrap();
    assert_eq!(code(path.clone(), 512), -libc::EINVAL);
    std::fs::write(&path, [0; 8192]).unwrap();
    for block_size in [1, 511, 513, 256, 131_072] {
        assert_eq!(code(path.clone(), block_size), -libc::EINVAL);
    }
}

#[test]
fn memory_that_direct_io_cannot_use_is_gone_around() {
    let (mut rig, _file) = Rig::new(4);
    let mut memory = AlignedBuf::new(2 * BLOCK).unwrap();
    for odd in [4, 24, 511] {
        let page = &mut memory.as_mut_slice()[odd..odd + BLOCK];
        page.fill(odd as u8);
        let data = |page: &mut [u8]| {
            // SAFETY: the memory outlives the run, which waits for the completion.
            unsafe { DataPointer::new(page.as_mut_ptr(), BLOCK as u32) }
        };
        let write = BdevOp::Write { fua: false };
        assert_eq!(rig.run_with(write, 1, 1, data(page)), Ok(()));
        page.fill(0);
        assert_eq!(rig.run_with(BdevOp::Read, 1, 1, data(page)), Ok(()));
        assert!(page.iter().all(|byte| *byte == odd as u8));
    }
}
