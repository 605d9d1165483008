//! The end of the demo: replicas byte for byte, and each against what was written.
//! Called with the nodes stopped. Reads backing files by their metadata; knows no node.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::DemoError;
use super::image::Image;
use super::ledger::{BLOCK_BYTES, Ledger};
use crate::engine::meta::layout::superblock_places;
use crate::engine::meta::superblock;

const PIECE_BYTES: u64 = 1 << 20;
const PAGE_BYTES: u64 = BLOCK_BYTES as u64;

/// The data of a replica, in the backing file of a node that is not running.
#[derive(Debug)]
pub struct Replica {
    /// What it is called in messages.
    pub label: String,
    path: PathBuf,
    file: File,
    data_offset_bytes: u64,
    data_size_bytes: u64,
}

impl Replica {
    /// Opens a backing file and finds its data by its superblock.
    pub fn open(label: &str, path: &Path) -> Result<Replica, DemoError> {
        let failed = |source| DemoError::io("open", path, source);
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        let damaged = |reason: String| DemoError::NoReplica {
            path: path.to_owned(),
            reason,
        };
        let places = superblock_places(size_bytes)
            .ok_or_else(|| damaged(format!("{size_bytes} bytes are too few")))?;
        let blocks = places.map(|place| {
            let mut block = vec![0; BLOCK_BYTES];
            file.read_exact_at(&mut block, place).ok().map(|()| block)
        });
        let blocks = blocks.each_ref().map(Option::as_deref);
        let superblock = superblock::pick(&blocks, size_bytes)
            .map_err(|error| damaged(format!("superblock: {error}")))?;
        Ok(Replica {
            label: label.to_owned(),
            path: path.to_owned(),
            data_offset_bytes: superblock.layout.data_offset(),
            data_size_bytes: superblock.layout.data_size(),
            file,
        })
    }

    /// Where its data begin in the backing file.
    pub fn data_offset_bytes(&self) -> u64 {
        self.data_offset_bytes
    }

    /// Size of the data.
    pub fn data_size_bytes(&self) -> u64 {
        self.data_size_bytes
    }

    /// The backing file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), DemoError> {
        let at = self.data_offset_bytes + offset;
        let read = self.file.read_exact_at(bytes, at);
        read.map_err(|error| DemoError::io("read", &self.path, error))
    }

    /// Flips the lowest bit of a byte of the data, behind the back of everything.
    pub fn flip(&self, offset: u64) -> Result<(), DemoError> {
        let mut byte = [0];
        self.read(offset, &mut byte)?;
        byte[0] ^= 1;
        self.file
            .write_all_at(&byte, self.data_offset_bytes + offset)
            .map_err(|error| DemoError::io("write", &self.path, error))
    }

    /// All data, in pieces with their offsets.
    fn pieces(
        &self,
        range: std::ops::Range<u64>,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), DemoError>,
    ) -> Result<(), DemoError> {
        let mut piece = vec![0; PIECE_BYTES as usize];
        let mut offset = range.start;
        while offset < range.end {
            let wanted = (range.end - offset).min(PIECE_BYTES) as usize;
            let bytes = &mut piece[..wanted];
            self.read(offset, bytes)?;
            take(offset, bytes)?;
            offset += wanted as u64;
        }
        Ok(())
    }
}

fn first_difference(left: &[u8], right: &[u8]) -> Option<usize> {
    // Slices are compared at once; bytes are looked at only where there is something to find.
    if left == right {
        return None;
    }
    left.iter().zip(right).position(|(a, b)| a != b)
}

/// Compares two replicas byte for byte. Returns the bytes compared.
pub fn replicas(left: &Replica, right: &Replica) -> Result<u64, DemoError> {
    let size = left.data_size_bytes;
    if size != right.data_size_bytes {
        let other = right.data_size_bytes;
        return Err(DemoError::Difference {
            block: size.min(other) / PAGE_BYTES,
            byte: size.min(other),
            text: format!(
                "{} has {size} bytes of data, {} has {other}",
                left.label, right.label
            ),
        });
    }
    let mut other = vec![0; PIECE_BYTES as usize];
    left.pieces(0..size, |offset, piece| {
        let other = &mut other[..piece.len()];
        right.read(offset, other)?;
        match first_difference(piece, other) {
            None => Ok(()),
            Some(at) => Err(difference(
                offset + at as u64,
                format!("{} and {} differ", left.label, right.label),
            )),
        }
    })?;
    Ok(size)
}

/// Compares the replica's beginning with the image that was written there.
pub fn image(replica: &Replica, image: &Image) -> Result<(), DemoError> {
    let file =
        File::open(&image.path).map_err(|error| DemoError::io("open", &image.path, error))?;
    let mut expected = vec![0; PIECE_BYTES as usize];
    replica.pieces(0..image.size_bytes, |offset, piece| {
        let expected = &mut expected[..piece.len()];
        file.read_exact_at(expected, offset)
            .map_err(|error| DemoError::io("read", &image.path, error))?;
        match first_difference(piece, expected) {
            None => Ok(()),
            Some(at) => Err(difference(
                offset + at as u64,
                format!("{} is not what was written", replica.label),
            )),
        }
    })
}

/// Checks the replica's part that the ledger knows.
pub fn ledger(replica: &Replica, ledger: &Ledger) -> Result<(), DemoError> {
    let start = ledger.offset_bytes();
    let end = start + ledger.blocks() * PAGE_BYTES;
    replica.pieces(start..end, |offset, piece| {
        for (index, content) in piece.chunks_exact(BLOCK_BYTES).enumerate() {
            let byte = offset + index as u64 * PAGE_BYTES;
            ledger
                .check((byte - start) / PAGE_BYTES, content)
                .map_err(|mismatch| difference(byte, format!("{}: {mismatch}", replica.label)))?;
        }
        Ok(())
    })
}

fn difference(byte: u64, text: String) -> DemoError {
    DemoError::Difference {
        block: byte / PAGE_BYTES,
        byte,
        text,
    }
}
