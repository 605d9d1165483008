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
use super::nvme_tcp::buffer::{AlignedBuf, DataPointer};
use super::registry::BdevError;
use super::ring::{Ring, Tag, TagKind};
use crate::hosts::slab::{Key, Slab};

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
    bounce: Option<Bounce>,
}

/// Aligned memory in place of the submitter's, which direct I/O cannot use. Rare: a host placed its data
/// oddly in a command capsule.
struct Bounce {
    memory: AlignedBuf,
    data: DataPointer,
}

impl Bounce {
    fn new(io: &BdevIo) -> io::Result<Self> {
        let mut memory = AlignedBuf::new(io.data.length_bytes() as usize)?;
        if matches!(io.op, BdevOp::Write { .. }) {
            // SAFETY: lent by the submitter until the I/O completes, which it has not yet.
            let source = unsafe { io.data.as_slice() };
            memory.as_mut_slice()[..source.len()].copy_from_slice(source);
        }
        Ok(Self {
            memory,
            data: io.data,
        })
    }

    /// A read has arrived: hands it on.
    fn copy_back(&self) {
        // SAFETY: lent by the submitter until the I/O completes, which it has not yet.
        let place = unsafe { self.data.as_mut_slice() };
        place.copy_from_slice(&self.memory.as_slice()[..place.len()]);
    }
}

/// One core's disk I/O in flight.
pub struct DiskQueue {
    slots: Slab<DiskIo>,
    zeroes: ZeroMemory,
}

/// Memory for direct I/O starts at a multiple of this.
const DIRECT_ALIGNMENT_BYTES: usize = 512;

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
        let mut pointer = io.data.address();
        let moves_data = matches!(stage, Stage::Read | Stage::Write { .. });
        let mut bounce = None;
        if moves_data && disk.direct && pointer as usize % DIRECT_ALIGNMENT_BYTES != 0 {
            let memory = Bounce::new(io).map_err(|_| IoError::Errno(libc::ENOMEM))?;
            pointer = memory.memory.as_ptr();
            bounce = Some(memory);
        }
        let key = self.slots.insert(DiskIo {
            ticket,
            fd: disk.fd(),
            stage,
            offset_bytes: io.lba * block_size,
            remaining_bytes: io.blocks * block_size,
            pointer,
            attempts: 0,
            bounce,
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
        let registered = ring.registered_number(io.pointer, length as usize);
        let entry = match io.stage {
            Stage::Read => match registered {
                Some(number) => opcode::ReadFixed::new(fd, io.pointer, length, number)
                    .offset(io.offset_bytes)
                    .build(),
                None => opcode::Read::new(fd, io.pointer, length)
                    .offset(io.offset_bytes)
                    .build(),
            },
            Stage::Write { fua } => {
                let flags = if fua { libc::RWF_DSYNC } else { 0 };
                match registered {
                    Some(number) => opcode::WriteFixed::new(fd, io.pointer, length, number)
                        .offset(io.offset_bytes)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Write::new(fd, io.pointer, length)
                        .offset(io.offset_bytes)
                        .rw_flags(flags)
                        .build(),
                }
            }
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
        let io = self.slots.remove(key)?;
        if let (Some(bounce), Stage::Read, Ok(())) = (&io.bounce, io.stage, status) {
            bounce.copy_back();
        }
        Some((io.ticket, status))
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
mod tests;
