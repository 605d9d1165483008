//! A file or block device, opened to read metadata or to format it.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::MetaError;
use crate::engine::meta::block::{BLOCK_SIZE, Block};

/// Zeroes are written in pieces of this many bytes.
const ZERO_BYTES: usize = 1 << 20;

pub(super) struct Device {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    logical_block_size: u64,
}

impl Device {
    pub(super) fn open_to_read(path: &Path) -> Result<Device, MetaError> {
        Device::open(path, OpenOptions::new().read(true))
    }

    /// Opens the device to be formatted; a block device that is mounted or otherwise in use is refused.
    pub(super) fn open_to_write(path: &Path) -> Result<Device, MetaError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if path
            .metadata()
            .is_ok_and(|metadata| metadata.file_type().is_block_device())
        {
            options.custom_flags(libc::O_EXCL);
        }
        Device::open(path, &options)
    }

    fn open(path: &Path, options: &OpenOptions) -> Result<Device, MetaError> {
        let failed = |source| MetaError::Device {
            action: "open".into(),
            path: path.to_owned(),
            source,
        };
        // Looked at first: opening a FIFO would wait for its other end.
        let metadata = path.metadata().map_err(failed)?;
        let is_block_device = metadata.file_type().is_block_device();
        if !is_block_device && !metadata.is_file() {
            return Err(MetaError::Kind(path.to_owned()));
        }
        let mut file = options.open(path).map_err(failed)?;
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let logical_block_size = if is_block_device {
            block_size_of(metadata.rdev())
        } else {
            512
        };
        Ok(Device {
            path: path.to_owned(),
            file,
            size_bytes,
            logical_block_size,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn logical_block_size(&self) -> u64 {
        self.logical_block_size
    }

    pub(super) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, MetaError> {
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| self.failed(format!("read {length} bytes at {offset} of"), source))?;
        Ok(bytes)
    }

    pub(super) fn write_zeroes(&self, range: Range<u64>) -> Result<(), MetaError> {
        let zeroes = vec![0; ZERO_BYTES];
        let mut offset = range.start;
        while offset < range.end {
            let length = (range.end - offset).min(ZERO_BYTES as u64);
            self.write(offset, &zeroes[..length as usize])?;
            offset += length;
        }
        Ok(())
    }

    pub(super) fn write_block(&self, offset: u64, block: &Block) -> Result<(), MetaError> {
        self.write(offset, block)
    }

    pub(super) fn flush(&self) -> Result<(), MetaError> {
        self.file
            .sync_all()
            .map_err(|source| self.failed("flush".into(), source))
    }

    /// The block at `offset`, or `None` when it cannot be read.
    pub(super) fn try_read_block(&self, offset: u64) -> Option<Vec<u8>> {
        self.read(offset, BLOCK_SIZE).ok()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MetaError> {
        self.file.write_all_at(bytes, offset).map_err(|source| {
            self.failed(
                format!("write {} bytes at {offset} of", bytes.len()),
                source,
            )
        })
    }

    fn failed(&self, action: String, source: std::io::Error) -> MetaError {
        MetaError::Device {
            action,
            path: self.path.clone(),
            source,
        }
    }
}

/// What sysfs says of the device, or of the one whose partition it is.
fn block_size_of(device_number: u64) -> u64 {
    let (major, minor) = (libc::major(device_number), libc::minor(device_number));
    let device = format!("/sys/dev/block/{major}:{minor}");
    [
        format!("{device}/queue/logical_block_size"),
        format!("{device}/../queue/logical_block_size"),
    ]
    .iter()
    .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
    .unwrap_or(512)
}
