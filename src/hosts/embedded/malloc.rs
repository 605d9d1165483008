//! A disk in memory, shared by all cores of the node. Called by the core's dispatch, which has checked
//! bounds in blocks; this checks them again in bytes, because it writes to memory.

use std::io;

use super::bdev::{BdevIo, BdevOp, IoError, IoResult};

/// Anonymous memory of the size of the disk; untouched parts cost nothing.
#[derive(Debug)]
pub struct MallocDisk {
    memory: *mut u8,
    size_bytes: usize,
}

// SAFETY: the mapping lives as long as the value and has no thread affinity. Cores read and write it
// without a lock as they would a disk: what two overlapping transfers leave is up to their submitters.
unsafe impl Send for MallocDisk {}
// SAFETY: as above.
unsafe impl Sync for MallocDisk {}

const PAGE_BYTES: usize = 4096;

impl MallocDisk {
    /// Errors: ENOMEM, EINVAL for a size of 0.
    pub fn new(size_bytes: u64) -> io::Result<Self> {
        let size_bytes =
            usize::try_from(size_bytes).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new anonymous mapping, placed by the kernel; the result is checked.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
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
            size_bytes,
        })
    }

    /// Does the whole I/O at once.
    pub fn submit(&self, io: &BdevIo, block_size: u32) -> IoResult {
        let invalid = Err(IoError::Errno(libc::EINVAL));
        if matches!(io.op, BdevOp::Flush) {
            return Ok(());
        }
        let block_size = u64::from(block_size);
        let (Some(offset), Some(length)) = (
            io.lba.checked_mul(block_size),
            io.blocks.checked_mul(block_size),
        ) else {
            return invalid;
        };
        if offset
            .checked_add(length)
            .is_none_or(|end| end > self.size_bytes as u64)
        {
            return invalid;
        }
        let (offset, length) = (offset as usize, length as usize);
        // SAFETY: offset is within the mapping.
        let place = unsafe { self.memory.add(offset) };
        match io.op {
            BdevOp::Read | BdevOp::Write { .. } if io.data.length_bytes() as usize != length => {
                return invalid;
            }
            BdevOp::Read => {
                // SAFETY: source within the mapping, destination lent by the submitter for this I/O.
                unsafe { std::ptr::copy_nonoverlapping(place, io.data.address(), length) }
            }
            BdevOp::Write { .. } => {
                // SAFETY: as above, the other way.
                unsafe { std::ptr::copy_nonoverlapping(io.data.address(), place, length) }
            }
            BdevOp::WriteZeroes | BdevOp::Unmap => self.zero(offset, length),
            BdevOp::Flush | BdevOp::Vendor { .. } => return Err(IoError::Errno(libc::EOPNOTSUPP)),
        }
        Ok(())
    }

    /// Whole pages are given back to the kernel, which makes them zero.
    fn zero(&self, offset: usize, length: usize) {
        let end = offset + length;
        let first_page = offset.next_multiple_of(PAGE_BYTES).min(end);
        let end_page = (end / PAGE_BYTES * PAGE_BYTES).max(first_page);
        // SAFETY: all ranges are within [offset, end), which the caller checked against the mapping.
        unsafe {
            std::ptr::write_bytes(self.memory.add(offset), 0, first_page - offset);
            std::ptr::write_bytes(self.memory.add(end_page), 0, end - end_page);
            if end_page > first_page {
                let pages = self.memory.add(first_page);
                if libc::madvise(pages.cast(), end_page - first_page, libc::MADV_DONTNEED) != 0 {
                    std::ptr::write_bytes(pages, 0, end_page - first_page);
                }
            }
        }
    }
}

impl Drop for MallocDisk {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once; nobody borrows from it.
        unsafe { libc::munmap(self.memory.cast(), self.size_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::nvme_tcp::buffer::DataPointer;
    use super::*;

    fn io(op: BdevOp, lba: u64, data: &mut [u8]) -> BdevIo {
        BdevIo {
            op,
            lba,
            blocks: data.len() as u64 / 512,
            // SAFETY: used by one submit at a time, which ends before the slice does.
            data: unsafe { DataPointer::new(data.as_mut_ptr(), data.len() as u32) },
        }
    }

    fn zeroes(lba: u64, blocks: u64) -> BdevIo {
        BdevIo {
            op: BdevOp::WriteZeroes,
            lba,
            blocks,
            data: DataPointer::NONE,
        }
    }

    #[test]
    fn what_was_written_is_read_and_only_the_named_blocks_become_zero() {
        let disk = MallocDisk::new(64 * 512).unwrap();
        let mut ones = vec![1u8; 64 * 512];
        let write = io(BdevOp::Write { fua: false }, 0, &mut ones);
        assert_eq!(disk.submit(&write, 512), Ok(()));
        // From the middle of page 0 to the middle of page 3: parts of pages and whole ones.
        assert_eq!(disk.submit(&zeroes(3, 25), 512), Ok(()));
        let mut back = vec![7u8; 64 * 512];
        let read = io(BdevOp::Read, 0, &mut back);
        assert_eq!(disk.submit(&read, 512), Ok(()));
        for (index, byte) in back.iter().enumerate() {
            let block = index / 512;
            assert_eq!(*byte, u8::from(!(3..28).contains(&block)), "block {block}");
        }
        // Within one page.
        assert_eq!(disk.submit(&zeroes(40, 1), 512), Ok(()));
        assert_eq!(disk.submit(&read, 512), Ok(()));
        assert!(back[40 * 512..41 * 512].iter().all(|byte| *byte == 0));
        assert_eq!((back[40 * 512 - 1], back[41 * 512]), (1, 1));
    }

    #[test]
    fn nothing_outside_of_the_memory_is_touched() {
        let disk = MallocDisk::new(4096).unwrap();
        for (lba, blocks) in [(0, 9), (8, 1), (u64::MAX, 1), (u64::MAX / 512, 2)] {
            assert_eq!(
                disk.submit(&zeroes(lba, blocks), 512),
                Err(IoError::Errno(libc::EINVAL))
            );
        }
    }
}
