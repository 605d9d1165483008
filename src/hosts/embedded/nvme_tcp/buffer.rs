//! Page-aligned memory for payloads: single buffers, a pool per core, and the raw pointer under which a
//! payload travels to a disk. Used by target and initiator; knows nothing of NVMe.

use std::io;
use std::ptr::NonNull;

/// Alignment of every buffer here, in bytes: what O_DIRECT asks for at most.
pub const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Zeroed memory of its own, aligned to 4096 bytes. Pages that are never touched cost nothing.
pub struct AlignedBuf {
    address: NonNull<u8>,
    length_bytes: usize,
}

// SAFETY: the memory belongs to this value alone, like a Box<[u8]>.
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// Maps `length_bytes` (rounded up to whole pages, at least one) of zeroes.
    pub fn new(length_bytes: usize) -> io::Result<AlignedBuf> {
        let length_bytes = length_bytes
            .max(1)
            .checked_next_multiple_of(BUFFER_ALIGNMENT_BYTES)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(AlignedBuf {
            address,
            length_bytes,
        })
    }

    /// Length in bytes, a multiple of 4096.
    pub fn length_bytes(&self) -> usize {
        self.length_bytes
    }

    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is this long, initialised (zeroes) and ours.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.length_bytes) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.length_bytes) }
    }

    /// Start of the memory, for those who hand it to a device.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that new() made; nobody borrows it any more.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.length_bytes) };
    }
}

/// A payload by address: read from or written to by a disk or a socket while its request is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataPointer {
    address: *mut u8,
    length_bytes: u32,
}

// SAFETY: only an address; whoever dereferences it takes on the contract of DataPointer::new.
unsafe impl Send for DataPointer {}

impl DataPointer {
    /// No data.
    pub const NONE: DataPointer = DataPointer {
        address: std::ptr::null_mut(),
        length_bytes: 0,
    };

    /// # Safety
    /// `address` must be valid for reads and (where the request reads data) writes of `length_bytes`, and
    /// used by nobody else, until the request that it is given to has completed or has been failed.
    pub unsafe fn new(address: *mut u8, length_bytes: u32) -> DataPointer {
        DataPointer {
            address,
            length_bytes,
        }
    }

    pub fn address(&self) -> *mut u8 {
        self.address
    }

    pub fn length_bytes(&self) -> u32 {
        self.length_bytes
    }

    pub fn is_empty(&self) -> bool {
        self.length_bytes == 0
    }

    /// # Safety
    /// The request is still in flight, nobody writes to the data meanwhile, and `'a` ends before the
    /// request completes.
    pub unsafe fn as_slice<'a>(&self) -> &'a [u8] {
        if self.length_bytes == 0 {
            return &[];
        }
        // SAFETY: the contract of new() and of this function.
        unsafe { std::slice::from_raw_parts(self.address, self.length_bytes as usize) }
    }

    /// # Safety
    /// The request is still in flight, nobody else uses the data meanwhile, and `'a` ends before the
    /// request completes.
    pub unsafe fn as_mut_slice<'a>(&self) -> &'a mut [u8] {
        if self.length_bytes == 0 {
            return &mut [];
        }
        // SAFETY: the contract of new() and of this function.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length_bytes as usize) }
    }

    /// The part from `offset_bytes` on, `length_bytes` long; None if that is not inside.
    pub fn part(&self, offset_bytes: u32, length_bytes: u32) -> Option<DataPointer> {
        let end = offset_bytes.checked_add(length_bytes)?;
        if end > self.length_bytes {
            return None;
        }
        Some(DataPointer {
            address: self.address.wrapping_add(offset_bytes as usize),
            length_bytes,
        })
    }
}

/// Who asks the pool. Peers have buffers of their own, so that hosts that take all of theirs and wait
/// for the other node cannot keep the other node's commands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferUser {
    Host,
    Peer,
}

/// One buffer out of a [`BufferPool`]. Given back with [`BufferPool::give_back`]; one that is dropped
/// instead is lost to the pool, and the pool's memory then stays mapped for ever.
#[derive(Debug)]
pub struct PoolBuffer {
    address: NonNull<u8>,
    length_bytes: u32,
    user: BufferUser,
}

// SAFETY: the range belongs to this value alone until it is given back.
unsafe impl Send for PoolBuffer {}

impl PoolBuffer {
    pub fn data(&self, length_bytes: u32) -> DataPointer {
        DataPointer {
            address: self.address.as_ptr(),
            length_bytes: length_bytes.min(self.length_bytes),
        }
    }
}

/// Buffers of one size for the large transfers of one core.
pub struct BufferPool {
    /// `ManuallyDrop` because it must outlive buffers that a request still holds when the pool goes.
    memory: std::mem::ManuallyDrop<AlignedBuf>,
    buffer_bytes: u32,
    host: Vec<NonNull<u8>>,
    peer: Vec<NonNull<u8>>,
    outstanding: usize,
}

// SAFETY: owner of its memory; the free lists point into it.
unsafe impl Send for BufferPool {}

impl BufferPool {
    /// A pool of `host_count` + `peer_count` buffers of `buffer_bytes` (rounded up to whole pages).
    pub fn new(buffer_bytes: u32, host_count: usize, peer_count: usize) -> io::Result<BufferPool> {
        let buffer_bytes = buffer_bytes
            .max(1)
            .checked_next_multiple_of(BUFFER_ALIGNMENT_BYTES as u32)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let total = (host_count + peer_count)
            .checked_mul(buffer_bytes as usize)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let memory = AlignedBuf::new(total)?;
        let nth = |index: usize| {
            // SAFETY: index < host_count + peer_count, so this stays inside the mapping.
            unsafe { memory.address.add(index * buffer_bytes as usize) }
        };
        let host = (0..host_count).map(nth).collect();
        let peer = (host_count..host_count + peer_count).map(nth).collect();
        Ok(BufferPool {
            buffer_bytes,
            host,
            peer,
            outstanding: 0,
            memory: std::mem::ManuallyDrop::new(memory),
        })
    }

    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// All of the pool's memory, for registration with a device.
    pub fn memory(&self) -> (*mut u8, usize) {
        (self.memory.as_ptr(), self.memory.length_bytes())
    }

    /// Free buffers for this user.
    pub fn available(&self, user: BufferUser) -> usize {
        match user {
            BufferUser::Host => self.host.len(),
            BufferUser::Peer => self.peer.len(),
        }
    }

    pub fn take(&mut self, user: BufferUser) -> Option<PoolBuffer> {
        let address = match user {
            BufferUser::Host => self.host.pop(),
            BufferUser::Peer => self.peer.pop(),
        }?;
        self.outstanding += 1;
        Some(PoolBuffer {
            address,
            length_bytes: self.buffer_bytes,
            user,
        })
    }

    pub fn give_back(&mut self, buffer: PoolBuffer) {
        self.outstanding = self.outstanding.saturating_sub(1);
        match buffer.user {
            BufferUser::Host => self.host.push(buffer.address),
            BufferUser::Peer => self.peer.push(buffer.address),
        }
    }
}

impl Drop for BufferPool {
    fn drop(&mut self) {
        if self.outstanding == 0 {
            // SAFETY: dropped once, here; no buffer of it is out.
            unsafe { std::mem::ManuallyDrop::drop(&mut self.memory) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_apart() {
        let mut pool = BufferPool::new(131_072, 2, 1).unwrap();
        let first = pool.take(BufferUser::Host).unwrap();
        let second = pool.take(BufferUser::Host).unwrap();
        for buffer in [&first, &second] {
            let data = buffer.data(131_072);
            assert_eq!(data.address() as usize % BUFFER_ALIGNMENT_BYTES, 0);
            // SAFETY: the buffer is ours and nobody writes to it.
            assert!(unsafe { data.as_slice() }.iter().all(|byte| *byte == 0));
        }
        let apart = (first.data(1).address() as usize).abs_diff(second.data(1).address() as usize);
        assert!(apart >= 131_072);
        pool.give_back(first);
        pool.give_back(second);
    }

    #[test]
    fn hosts_that_take_everything_leave_the_buffers_of_peers() {
        let mut pool = BufferPool::new(4096, 1, 1).unwrap();
        let host = pool.take(BufferUser::Host).unwrap();
        assert!(pool.take(BufferUser::Host).is_none());
        let peer = pool.take(BufferUser::Peer).unwrap();
        assert!(pool.take(BufferUser::Peer).is_none());
        pool.give_back(peer);
        assert!(pool.take(BufferUser::Host).is_none());
        pool.give_back(host);
        assert_eq!(pool.available(BufferUser::Host), 1);
    }

    #[test]
    fn a_part_outside_of_the_data_is_refused() {
        let mut memory = AlignedBuf::new(4096).unwrap();
        // SAFETY: memory outlives the pointer.
        let data = unsafe { DataPointer::new(memory.as_mut_slice().as_mut_ptr(), 4096) };
        assert_eq!(data.part(4000, 96).unwrap().length_bytes(), 96);
        assert!(data.part(4000, 97).is_none());
        assert!(data.part(u32::MAX, 2).is_none());
    }
}
