//! A disk in memory, with or without a volatile cache. Power loss keeps, loses or tears what was not flushed.

use std::collections::BTreeMap;
use std::ops::Range;

use super::random::Random;
use crate::host::{DiskIo, DiskOp};

const PAGE: u64 = 4096;
const SECTOR: u64 = 512;

/// Contents of a sector that are not durable, oldest first; the first is what the media has.
type Versions = Vec<(u64, Vec<u8>)>;

/// One backing device. Pages that were never written read as zeroes.
#[derive(Clone)]
pub struct Disk {
    size_bytes: u64,
    volatile: bool,
    pages: BTreeMap<u64, Box<[u8]>>,
    unflushed: BTreeMap<u64, Versions>,
    /// Counts executed writes; a flush covers those that were executed before it was submitted.
    order: u64,
    /// Flushes that were executed.
    pub flushes: u64,
    /// Writes with FUA that were executed.
    pub fua_writes: u64,
}

impl Disk {
    pub fn new(size_bytes: u64, volatile: bool) -> Disk {
        Disk {
            size_bytes,
            volatile,
            pages: BTreeMap::new(),
            unflushed: BTreeMap::new(),
            order: 0,
            flushes: 0,
            fua_writes: 0,
        }
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The moment up to which a flush that is submitted now counts.
    pub fn order(&self) -> u64 {
        self.order
    }

    pub fn read(&self, bytes: Range<u64>) -> Vec<u8> {
        let mut out = vec![0; (bytes.end - bytes.start) as usize];
        let mut at = bytes.start;
        while at < bytes.end {
            let end = (at / PAGE * PAGE + PAGE).min(bytes.end);
            if let Some(page) = self.pages.get(&(at / PAGE)) {
                let from = (at % PAGE) as usize;
                let len = (end - at) as usize;
                let to = (at - bytes.start) as usize;
                out[to..to + len].copy_from_slice(&page[from..from + len]);
            }
            at = end;
        }
        out
    }

    /// Changes content without the engine's knowledge, durably.
    pub fn plant(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        for piece in bytes.chunks(SECTOR as usize) {
            let page = self
                .pages
                .entry(at / PAGE)
                .or_insert_with(|| vec![0; PAGE as usize].into());
            let from = (at % PAGE) as usize;
            page[from..from + piece.len()].copy_from_slice(piece);
            at += piece.len() as u64;
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) {
        self.order += 1;
        if self.volatile {
            for (index, piece) in bytes.chunks(SECTOR as usize).enumerate() {
                let sector = offset / SECTOR + index as u64;
                if durable {
                    self.unflushed.remove(&sector);
                    continue;
                }
                let start = sector * SECTOR;
                let base = self.read(start..start + SECTOR);
                let versions = self
                    .unflushed
                    .entry(sector)
                    .or_insert_with(|| vec![(0, base)]);
                versions.push((self.order, piece.to_vec()));
            }
        }
        self.plant(offset, bytes);
    }

    /// Executes an I/O; `submitted` is [`Disk::order`] at its submission. Returns what was read.
    pub fn execute(&mut self, io: DiskIo, submitted: u64, data: &[u8]) -> Vec<u8> {
        let bytes = io.offset..io.offset + io.len;
        assert!(
            bytes.end <= self.size_bytes && (io.offset | io.len) % SECTOR == 0,
            "{io:?} is not on the device"
        );
        match io.op {
            DiskOp::Read => return self.read(bytes),
            DiskOp::Write { fua } => {
                self.fua_writes += u64::from(fua);
                self.write(io.offset, data, fua);
            }
            DiskOp::WriteZeroes { fua } => {
                self.fua_writes += u64::from(fua);
                self.write(io.offset, &vec![0; io.len as usize], fua);
            }
            DiskOp::Unmap => self.write(io.offset, &vec![0; io.len as usize], false),
            DiskOp::Flush => {
                self.flushes += 1;
                self.unflushed.retain(|_, versions| {
                    let kept = versions
                        .iter()
                        .rposition(|&(order, _)| order <= submitted)
                        .unwrap_or(0);
                    versions.drain(..kept);
                    versions.len() > 1
                });
            }
        }
        Vec::new()
    }

    /// A write that the device was executing when its host died: done or not; with `torn`, sector by sector.
    pub fn interrupt(&mut self, io: DiskIo, data: &[u8], torn: bool, random: &mut Random) {
        let data = match io.op {
            DiskOp::Write { .. } => data.to_vec(),
            DiskOp::WriteZeroes { .. } | DiskOp::Unmap => vec![0; io.len as usize],
            DiskOp::Read | DiskOp::Flush => return,
        };
        if torn {
            for (index, piece) in data.chunks(SECTOR as usize).enumerate() {
                if random.chance(50) {
                    self.write(io.offset + index as u64 * SECTOR, piece, false);
                }
            }
        } else if random.chance(50) {
            self.write(io.offset, &data, false);
        }
    }

    /// The cache is gone: every sector has one of the contents that it had since it was last durable.
    pub fn power_loss(&mut self, random: &mut Random) {
        for (sector, versions) in std::mem::take(&mut self.unflushed) {
            let kept = random.below(versions.len() as u64) as usize;
            self.plant(sector * SECTOR, &versions[kept].1);
        }
    }

    /// The first byte at which two devices differ within a range that both have.
    pub fn first_difference(&self, other: &Disk, bytes: Range<u64>) -> Option<u64> {
        let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
        let touched = self
            .pages
            .range(pages.clone())
            .chain(other.pages.range(pages));
        let mut numbers: Vec<u64> = touched.map(|(&page, _)| page).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for page in numbers {
            let range = (page * PAGE).max(bytes.start)..((page + 1) * PAGE).min(bytes.end);
            let (mine, theirs) = (self.read(range.clone()), other.read(range.clone()));
            if mine == theirs {
                continue;
            }
            if let Some(at) = (0..mine.len()).find(|&at| mine[at] != theirs[at]) {
                return Some(range.start + at as u64);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut Disk, offset: u64, byte: u8) {
        let io = DiskIo {
            op: DiskOp::Write { fua: false },
            offset,
            len: SECTOR,
        };
        disk.execute(io, 0, &[byte; SECTOR as usize]);
    }

    #[test]
    fn a_flush_keeps_what_was_written_before_it_was_submitted() {
        for seed in 0..50 {
            let mut disk = Disk::new(1 << 20, true);
            write(&mut disk, 0, 1);
            write(&mut disk, 0, 2);
            let submitted = disk.order();
            write(&mut disk, 0, 3);
            let flush = DiskIo {
                op: DiskOp::Flush,
                offset: 0,
                len: 0,
            };
            disk.execute(flush, submitted, &[]);
            disk.power_loss(&mut Random::new(seed));
            assert!([2, 3].contains(&disk.read(0..1)[0]));
        }
    }

    #[test]
    fn differences_are_found_across_pages_that_only_one_has() {
        let mut disk = Disk::new(1 << 20, false);
        let other = Disk::new(1 << 20, false);
        write(&mut disk, 8192, 0);
        assert_eq!(disk.first_difference(&other, 0..1 << 20), None);
        write(&mut disk, 8192 + 512, 7);
        assert_eq!(disk.first_difference(&other, 0..1 << 20), Some(8704));
        assert_eq!(disk.first_difference(&other, 0..8704), None);
    }
}
