//! Files and block devices through io_uring: opening and locking them ([`FileDisk`]), and one core's
//! I/O in flight on them ([`DiskQueue`]). Called by the core's dispatch after its bounds check, and by
//! the control path to open. Knows nothing of who asked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use io_uring::{opcode, types};

use super::bdev::{BdevIo, BdevOp, IoError, IoResult, Ticket};
use super::registry::BdevError;
use super::ring::{Ring, Tag, TagKind};
use super::slab::{Key, Slab};

/// How to open a backing file, as `bdev_aio_create` and `bdev_uring_create` name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileParameters {
    pub path: PathBuf,
    /// 0: the logical block size of a block device, the smallest that direct I/O allows on a file.
    pub block_size: u32,
    pub read_only: bool,
}

/// An open file or block device, locked against other processes.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    pub size_bytes: u64,
    pub block_size: u32,
    pub read_only: bool,
    /// Opened with O_DIRECT; file systems without it are used through the page cache.
    pub direct: bool,
}

const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

impl FileDisk {
    /// Opens and locks; `None` if another process holds the file (one that was killed does so for some
    /// 80 ms more, and its last writes may still be on their way).
    pub fn try_open(parameters: &FileParameters) -> Result<Option<Self>, BdevError> {
        let path = parameters.path.display();
        let failed = |what: &str, error: io::Error| {
            BdevError::from_io(&error, format!("cannot {what} {path}: {error}"))
        };
        let metadata =
            std::fs::metadata(&parameters.path).map_err(|error| failed("open", error))?;
        let block_device = metadata.file_type().is_block_device();
        if !block_device && !metadata.is_file() {
            return Err(BdevError::invalid(format!(
                "{path} is neither a regular file nor a block device"
            )));
        }
        // O_EXCL keeps away from a block device that is mounted or otherwise taken.
        let exclusive = if block_device && !parameters.read_only {
            libc::O_EXCL
        } else {
            0
        };
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!parameters.read_only)
                .custom_flags(flags | exclusive | libc::O_CLOEXEC)
                .open(&parameters.path)
        };
        let (file, direct) = match open(libc::O_DIRECT) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!("{path} has no direct I/O; it is used through the page cache");
                let file = open(0).map_err(|error| failed("open", error))?;
                (file, false)
            }
            Err(error) if block_device && error.raw_os_error() == Some(libc::EBUSY) => {
                return Ok(None);
            }
            Err(error) => return Err(failed("open", error)),
        };
        let lock = if parameters.read_only {
            libc::LOCK_SH
        } else {
            libc::LOCK_EX
        };
        // SAFETY: a plain system call on a descriptor that we own.
        if unsafe { libc::flock(file.as_raw_fd(), lock | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EWOULDBLOCK) {
                return Ok(None);
            }
            return Err(failed("lock", error));
        }
        let size_bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0))
            .map_err(|error| failed("size", error))?;
        if size_bytes == 0 {
            return Err(BdevError::invalid(format!(
                "{path} has a size of 0: give it its size first (truncate -s)"
            )));
        }
        let block_size = choose_block_size(parameters, &file, size_bytes, block_device)?;
        if size_bytes % u64::from(block_size) != 0 {
            return Err(BdevError::invalid(format!(
                "the size of {path}, {size_bytes} bytes, is not a multiple of the block size {block_size}"
            )));
        }
        Ok(Some(Self {
            file,
            size_bytes,
            block_size,
            read_only: parameters.read_only,
            direct,
        }))
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn choose_block_size(
    parameters: &FileParameters,
    file: &File,
    size_bytes: u64,
    block_device: bool,
) -> Result<u32, BdevError> {
    let path = parameters.path.display();
    let asked = parameters.block_size;
    if asked != 0 && !(BLOCK_SIZES.contains(&asked) && asked.is_power_of_two()) {
        return Err(BdevError::invalid(format!(
            "block size {asked} is not a power of two from 512 to 65536"
        )));
    }
    let smallest = if block_device {
        logical_block_size(file).map_err(|error| {
            BdevError::from_io(
                &error,
                format!("cannot read the block size of {path}: {error}"),
            )
        })?
    } else {
        let works = |block_size: &u32| direct_read_works(file, *block_size, size_bytes);
        [512, 1024, 2048, 4096]
            .into_iter()
            .find(works)
            .ok_or_else(|| {
                BdevError::from_errno(libc::EIO, format!("{path} cannot be read directly"))
            })?
    };
    if asked == 0 {
        return Ok(smallest);
    }
    if asked < smallest {
        return Err(BdevError::invalid(format!(
            "block size {asked} is smaller than {smallest}, which {path} needs"
        )));
    }
    Ok(asked)
}

/// What direct I/O on this file system can address is found by trying.
fn direct_read_works(file: &File, block_size: u32, size_bytes: u64) -> bool {
    let block_size = block_size as usize;
    if size_bytes < block_size as u64 {
        return false;
    }
    let mut memory = vec![0u8; block_size + 4096];
    let aligned = memory.as_ptr().align_offset(4096);
    let offset = if size_bytes >= 2 * block_size as u64 {
        block_size as u64
    } else {
        0
    };
    file.read_at(&mut memory[aligned..aligned + block_size], offset)
        .is_ok_and(|length| length == block_size)
}

fn logical_block_size(file: &File) -> io::Result<u32> {
    /// `BLKSSZGET` of <linux/fs.h>.
    const GET_LOGICAL_BLOCK_SIZE: libc::c_ulong = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: the ioctl writes one int to the live local that it is given.
    let result =
        unsafe { libc::ioctl(file.as_raw_fd(), GET_LOGICAL_BLOCK_SIZE as _, &raw mut size) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// What an I/O is doing now. Unmap and write-zeroes go on with a lesser means where the file system
/// does not have the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Read,
    Write { fua: bool },
    Sync,
    PunchHole,
    ZeroRange,
    WriteZeroes,
}

struct DiskIo {
    ticket: Ticket,
    fd: RawFd,
    stage: Stage,
    offset_bytes: u64,
    remaining_bytes: u64,
    pointer: *mut u8,
    attempts: u32,
}

/// One core's disk I/O in flight.
pub struct DiskQueue {
    slots: Slab<DiskIo>,
    zeroes: ZeroMemory,
}

/// An answer of EAGAIN or EINTR this many times in a row is a failure.
const ATTEMPTS_MAX: u32 = 1000;

/// The kernel moves at most this much in one read or write (`MAX_RW_COUNT` is a page less than 2 GiB).
const TRANSFER_MAX_BYTES: u64 = 1 << 30;

impl DiskQueue {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            slots: Slab::default(),
            zeroes: ZeroMemory::new()?,
        })
    }

    pub fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Starts an I/O. The caller has checked its bounds, and keeps `disk` open and the memory lent until
    /// [`complete`](Self::complete) has returned the ticket.
    pub fn submit(
        &mut self,
        ring: &mut Ring,
        disk: &FileDisk,
        ticket: Ticket,
        io: &BdevIo,
    ) -> Result<(), IoError> {
        let stage = match io.op {
            BdevOp::Read => Stage::Read,
            BdevOp::Flush => Stage::Sync,
            BdevOp::Vendor { .. } => return Err(IoError::Errno(libc::EOPNOTSUPP)),
            _ if disk.read_only => return Err(IoError::Errno(libc::EROFS)),
            BdevOp::Write { fua } => Stage::Write { fua },
            BdevOp::WriteZeroes => Stage::ZeroRange,
            BdevOp::Unmap => Stage::PunchHole,
        };
        let block_size = u64::from(disk.block_size);
        let key = self.slots.insert(DiskIo {
            ticket,
            fd: disk.fd(),
            stage,
            offset_bytes: io.lba * block_size,
            remaining_bytes: io.blocks * block_size,
            pointer: io.data.address(),
            attempts: 0,
        });
        self.push(ring, key);
        Ok(())
    }

    fn push(&self, ring: &mut Ring, key: Key) {
        let Some(io) = self.slots.get(key) else {
            return;
        };
        let fd = types::Fd(io.fd);
        let length = io.remaining_bytes.min(TRANSFER_MAX_BYTES) as u32;
        let entry = match io.stage {
            Stage::Read => opcode::Read::new(fd, io.pointer, length)
                .offset(io.offset_bytes)
                .build(),
            Stage::Write { fua } => opcode::Write::new(fd, io.pointer, length)
                .offset(io.offset_bytes)
                .rw_flags(if fua { libc::RWF_DSYNC } else { 0 })
                .build(),
            Stage::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Stage::PunchHole => opcode::Fallocate::new(fd, io.remaining_bytes)
                .offset(io.offset_bytes)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Stage::ZeroRange => opcode::Fallocate::new(fd, io.remaining_bytes)
                .offset(io.offset_bytes)
                .mode(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Stage::WriteZeroes => {
                let length = length.min(ZeroMemory::LENGTH_BYTES as u32);
                opcode::Write::new(fd, self.zeroes.memory, length)
                    .offset(io.offset_bytes)
                    .build()
            }
        };
        let tag = Tag::new(TagKind::Disk, key.index, key.generation);
        // SAFETY: the submitter lends its memory and keeps the disk open until the ticket returns, which
        // is after the completion; the zero memory lives as long as the queue, which the core drops after
        // its ring.
        unsafe { ring.push(entry, tag) };
    }

    /// Takes a completion of the ring; returns the ticket when the I/O has ended.
    pub fn complete(
        &mut self,
        ring: &mut Ring,
        tag: Tag,
        result: i32,
    ) -> Option<(Ticket, IoResult)> {
        let key = Key {
            index: tag.slot,
            generation: tag.generation,
        };
        let io = self.slots.get_mut(key)?;
        let status = match advance(io, result) {
            Progress::GoOn => {
                self.push(ring, key);
                return None;
            }
            Progress::Ended(status) => status,
        };
        self.slots.remove(key).map(|io| (io.ticket, status))
    }
}

enum Progress {
    GoOn,
    Ended(IoResult),
}

fn advance(io: &mut DiskIo, result: i32) -> Progress {
    if result < 0 {
        let errno = -result;
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV);
        match (io.stage, errno) {
            (_, libc::EAGAIN | libc::EINTR) if io.attempts < ATTEMPTS_MAX => io.attempts += 1,
            (Stage::PunchHole, _) if unsupported => io.stage = Stage::ZeroRange,
            (Stage::ZeroRange, _) if unsupported => io.stage = Stage::WriteZeroes,
            _ => return Progress::Ended(Err(IoError::Errno(errno))),
        }
        return Progress::GoOn;
    }
    io.attempts = 0;
    match io.stage {
        Stage::Sync | Stage::PunchHole | Stage::ZeroRange => Progress::Ended(Ok(())),
        Stage::Read | Stage::Write { .. } | Stage::WriteZeroes => {
            let moved = result as u64;
            // The file was cut short behind our back, or the disk is full.
            if moved == 0 || moved > io.remaining_bytes {
                return Progress::Ended(Err(IoError::Errno(libc::EIO)));
            }
            io.offset_bytes += moved;
            io.remaining_bytes -= moved;
            if io.remaining_bytes == 0 {
                return Progress::Ended(Ok(()));
            }
            if io.stage != Stage::WriteZeroes {
                io.pointer = io.pointer.wrapping_add(moved as usize);
            }
            Progress::GoOn
        }
    }
}

/// Read-only zeroes to write from.
struct ZeroMemory {
    memory: *mut u8,
}

impl ZeroMemory {
    const LENGTH_BYTES: usize = 1 << 20;

    fn new() -> io::Result<Self> {
        // SAFETY: a new anonymous mapping, placed by the kernel; the result is checked.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::LENGTH_BYTES,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            memory: memory.cast(),
        })
    }
}

impl Drop for ZeroMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once.
        unsafe { libc::munmap(self.memory.cast(), Self::LENGTH_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::bdev::{BdevId, IoKind, Owner};
    use super::super::nvme_tcp::buffer::DataPointer;
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
                // SAFETY: the page outlives this function, which waits for the completion.
                data: unsafe { DataPointer::new(page.0.as_mut_ptr(), BLOCK as u32) },
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
}
