//! A disk in memory, with or without a volatile cache. Power loss keeps, loses or tears what was not flushed.

use std::collections::BTreeMap;
use std::ops::Range;

use super::memory::Bytes;
use super::random::Random;
use crate::host::{DiskIo, DiskOp};

const PAGE: u64 = 4096;

type Page = Box<[u8; PAGE as usize]>;

static ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// Contents of a sector that are not durable, oldest first; the first is what the media has.
type Versions = Vec<(u64, Box<[u8]>)>;

/// One backing device.
#[derive(Clone)]
pub struct Disk {
    size_bytes: u64,
    /// What is written wholly or not at all.
    sector: u64,
    volatile: bool,
    /// A page that is not there reads as zeroes.
    pages: BTreeMap<u64, Page>,
    unflushed: BTreeMap<u64, Versions>,
    /// Counts executed writes; a flush covers those that were executed before it was submitted.
    order: u64,
    /// Flushes that were executed.
    pub flushes: u64,
    /// Writes with FUA that were executed.
    pub fua_writes: u64,
}

/// The parts of a range, each within one page: the page, and the part's bytes in it.
fn parts(bytes: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = bytes.start;
    std::iter::from_fn(move || {
        let start = at;
        at = (start / PAGE * PAGE + PAGE).min(bytes.end);
        let from = (start % PAGE) as usize;
        (start < bytes.end).then(|| (start / PAGE, from..from + (at - start) as usize))
    })
}

impl Disk {
    pub fn new(size_bytes: u64, sector: u32, volatile: bool) -> Disk {
        assert!(u64::from(sector) <= PAGE && sector.is_power_of_two());
        Disk {
            size_bytes,
            sector: u64::from(sector),
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

    fn page(&self, page: u64) -> &[u8; PAGE as usize] {
        self.pages.get(&page).map_or(&ZEROES, |page| page)
    }

    pub fn read(&self, bytes: Range<u64>) -> Vec<u8> {
        let mut out = Vec::with_capacity((bytes.end - bytes.start) as usize);
        for (page, part) in parts(bytes) {
            out.extend_from_slice(&self.page(page)[part]);
        }
        out
    }

    /// What a power loss cannot take away, or the oldest of what it can bring back.
    pub fn durable_content(&self, bytes: Range<u64>) -> Bytes {
        let sectors = bytes.start / self.sector..bytes.end.div_ceil(self.sector);
        let mut unflushed = self.unflushed.range(sectors).peekable();
        if unflushed.peek().is_none() {
            return self.content(bytes);
        }
        let mut out = self.read(bytes.clone());
        for (sector, versions) in unflushed {
            let start = sector * self.sector;
            let from = (start - bytes.start) as usize;
            out[from..from + self.sector as usize].copy_from_slice(&versions[0].1);
        }
        Bytes::Held(out)
    }

    /// Where pages begin that two devices do not have in common.
    pub fn different_pages(&self, other: &Disk, bytes: Range<u64>) -> Vec<u64> {
        let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
        let mut mine = self.pages.range(pages.clone()).peekable();
        let mut theirs = other.pages.range(pages).peekable();
        let mut different = Vec::new();
        loop {
            let next = [mine.peek(), theirs.peek()].into_iter().flatten();
            let Some(page) = next.map(|&(&page, _)| page).min() else {
                return different;
            };
            let of_page = [&mut mine, &mut theirs].map(|pages| {
                let found = pages.next_if(|&(&number, _)| number == page);
                found.map_or(&ZEROES, |(_, content)| content)
            });
            if of_page[0] != of_page[1] {
                different.push(page * PAGE);
            }
        }
    }

    /// What is read now. What was never written takes no room.
    pub fn content(&self, bytes: Range<u64>) -> Bytes {
        let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
        if self.pages.range(pages).next().is_none() {
            Bytes::zeroes((bytes.end - bytes.start) as usize)
        } else {
            Bytes::Held(self.read(bytes))
        }
    }

    /// Changes content without the engine's knowledge, durably.
    pub fn plant(&mut self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for (page, part) in parts(offset..offset + bytes.len() as u64) {
            let (piece, behind) = rest.split_at(part.len());
            rest = behind;
            if piece == &ZEROES[..piece.len()] && !self.pages.contains_key(&page) {
                continue;
            }
            let page = self.pages.entry(page).or_insert_with(|| Box::new(ZEROES));
            page[part].copy_from_slice(piece);
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) {
        self.order += 1;
        if self.volatile {
            let mut rest = bytes;
            for (page, part) in parts(offset..offset + bytes.len() as u64) {
                let (piece, behind) = rest.split_at(part.len());
                rest = behind;
                self.cache(page * PAGE + part.start as u64, piece, durable);
            }
        }
        self.plant(offset, bytes);
    }

    fn write_zeroes(&mut self, bytes: Range<u64>, durable: bool) {
        self.order += 1;
        if !self.is_touched(bytes.clone()) {
            return;
        }
        for (page, part) in parts(bytes) {
            let start = page * PAGE + part.start as u64;
            if !self.is_touched(start..start + part.len() as u64) {
                continue;
            }
            if self.volatile {
                self.cache(start, &ZEROES[..part.len()], durable);
            }
            if part.len() == PAGE as usize {
                self.pages.remove(&page);
            } else if let Some(page) = self.pages.get_mut(&page) {
                page[part].fill(0);
            }
        }
    }

    /// There is something else than zeroes that were there from the start, or was.
    fn is_touched(&self, bytes: Range<u64>) -> bool {
        let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
        let sectors = bytes.start / self.sector..bytes.end.div_ceil(self.sector);
        self.pages.range(pages).next().is_some() || self.unflushed.range(sectors).next().is_some()
    }

    /// The cache gets another content of the sectors of a part of a page, or the media.
    fn cache(&mut self, start: u64, content: &[u8], durable: bool) {
        let page = self.pages.get(&(start / PAGE));
        let from = (start % PAGE) as usize;
        let base = &page.map_or(&ZEROES, |page| page)[from..from + content.len()];
        let first = start / self.sector;
        let end = first + content.len() as u64 / self.sector;
        let is_clean = self.unflushed.range(first..end).next().is_none();
        if is_clean && (durable || base == content) {
            return;
        }
        let size = self.sector as usize;
        for ((sector, base), content) in (first..).zip(base.chunks(size)).zip(content.chunks(size))
        {
            if durable {
                self.unflushed.remove(&sector);
            } else if base != content || self.unflushed.contains_key(&sector) {
                let versions = self.unflushed.entry(sector).or_insert_with(|| {
                    let mut versions = Vec::with_capacity(2);
                    versions.push((0, base.into()));
                    versions
                });
                versions.push((self.order, content.into()));
            }
        }
    }

    /// Executes an I/O; `submitted` is [`Disk::order`] at its submission. Returns what was read.
    pub fn execute(&mut self, io: DiskIo, submitted: u64, data: &Bytes) -> Bytes {
        let bytes = io.offset..io.offset + io.len;
        assert!(
            bytes.end <= self.size_bytes && (io.offset | io.len) % self.sector == 0,
            "[protocol] {io:?} is not on the device"
        );
        match io.op {
            DiskOp::Read => return self.content(bytes),
            DiskOp::Write { fua } => {
                self.fua_writes += u64::from(fua);
                match data {
                    Bytes::Zeroes(_) => self.write_zeroes(bytes, fua),
                    data => self.write(io.offset, &data.bytes()[..io.len as usize], fua),
                }
            }
            DiskOp::WriteZeroes { fua } => {
                self.fua_writes += u64::from(fua);
                self.write_zeroes(bytes, fua);
            }
            DiskOp::Unmap => self.write_zeroes(bytes, false),
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
        Bytes::Zeroes(0)
    }

    /// A write that the device was executing when its host died: done or not; with `torn`, sector by sector.
    pub fn interrupt(&mut self, io: DiskIo, data: &[u8], torn: bool, random: &mut Random) {
        let write = |disk: &mut Disk, bytes: Range<u64>| match io.op {
            DiskOp::Write { .. } => {
                let from = (bytes.start - io.offset) as usize;
                let len = (bytes.end - bytes.start) as usize;
                disk.write(bytes.start, &data[from..from + len], false);
            }
            DiskOp::WriteZeroes { .. } | DiskOp::Unmap => disk.write_zeroes(bytes, false),
            DiskOp::Read | DiskOp::Flush => {}
        };
        if matches!(io.op, DiskOp::Read | DiskOp::Flush) {
            return;
        }
        let end = io.offset + io.len;
        if torn {
            for start in (io.offset..end).step_by(self.sector as usize) {
                if random.chance(50) {
                    write(self, start..start + self.sector);
                }
            }
        } else if random.chance(50) {
            write(self, io.offset..end);
        }
    }

    /// The cache is gone: every sector has one of the contents that it had since it was last durable.
    pub fn power_loss(&mut self, random: &mut Random) {
        for (sector, versions) in std::mem::take(&mut self.unflushed) {
            let kept = random.below(versions.len() as u64) as usize;
            self.plant(sector * self.sector, &versions[kept].1);
        }
    }

    /// The first byte at which two devices differ within a range that both have.
    pub fn first_difference(&self, other: &Disk, bytes: Range<u64>) -> Option<u64> {
        let pages = bytes.start / PAGE..bytes.end.div_ceil(PAGE);
        let touched = self.pages.range(pages.clone()).map(|(&page, _)| page);
        let others = other.pages.range(pages).map(|(&page, _)| page);
        let mut first = None;
        for page in touched.chain(others) {
            let start = (page * PAGE).max(bytes.start);
            let end = (page * PAGE + PAGE).min(bytes.end);
            let part = (start - page * PAGE) as usize..(end - page * PAGE) as usize;
            let (mine, theirs) = (&self.page(page)[part.clone()], &other.page(page)[part]);
            if mine == theirs {
                continue;
            }
            let at = (0..mine.len()).find(|&at| mine[at] != theirs[at]);
            let at = at.map(|at| start + at as u64);
            first = [first, at].into_iter().flatten().min();
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTOR: u64 = 512;

    fn write(disk: &mut Disk, offset: u64, byte: u8) {
        let io = DiskIo {
            op: DiskOp::Write { fua: false },
            offset,
            len: SECTOR,
        };
        disk.execute(io, 0, &Bytes::Held(vec![byte; SECTOR as usize]));
    }

    #[test]
    fn pages_that_differ_are_found_on_either_side_and_zeroes_are_what_was_never_written() {
        let mut disks = [0, 1].map(|_| Disk::new(1 << 20, 512, false));
        for page in [1, 2, 4] {
            write(&mut disks[0], page * PAGE, 1);
        }
        for page in [2, 3, 4, 5] {
            write(&mut disks[1], page * PAGE, 1);
        }
        write(&mut disks[1], 4 * PAGE + SECTOR, 2);
        write(&mut disks[1], 5 * PAGE, 0);
        let [one, other] = &disks;
        assert_eq!(
            one.different_pages(other, 0..1 << 20),
            [PAGE, 3 * PAGE, 4 * PAGE]
        );
        assert_eq!(other.different_pages(one, 2 * PAGE..4 * PAGE), [3 * PAGE]);
    }

    #[test]
    fn zeroes_that_are_written_are_like_any_other_write() {
        for (volatile, fua) in [(false, false), (true, false), (true, true)] {
            let mut disks = [0, 1].map(|_| Disk::new(1 << 20, 512, volatile));
            for (disk, zeroes) in disks.iter_mut().zip([
                Bytes::zeroes(2 * PAGE as usize),
                Bytes::Held(vec![0; 2 * PAGE as usize]),
            ]) {
                write(disk, PAGE, 1);
                let io = DiskIo {
                    op: DiskOp::Write { fua },
                    offset: PAGE - SECTOR,
                    len: 2 * PAGE,
                };
                disk.execute(io, 0, &zeroes);
            }
            let all = 0..4 * PAGE;
            let read = disks.each_ref().map(|disk| disk.read(all.clone()));
            assert!(read[0] == read[1] && read[0] == [0; 4 * PAGE as usize]);
            let durable = disks
                .each_ref()
                .map(|disk| disk.durable_content(all.clone()));
            assert_eq!(durable[0].bytes(), durable[1].bytes());
        }
    }

    #[test]
    fn a_flush_keeps_what_was_written_before_it_was_submitted() {
        for seed in 0..50 {
            let mut disk = Disk::new(1 << 20, 512, true);
            write(&mut disk, 0, 1);
            write(&mut disk, 0, 2);
            let submitted = disk.order();
            write(&mut disk, 0, 3);
            let flush = DiskIo {
                op: DiskOp::Flush,
                offset: 0,
                len: 0,
            };
            disk.execute(flush, submitted, &Bytes::zeroes(0));
            disk.power_loss(&mut Random::new(seed));
            assert!([2, 3].contains(&disk.read(0..1)[0]));
        }
    }

    #[test]
    fn differences_are_found_across_pages_that_only_one_has() {
        let mut disk = Disk::new(1 << 20, 512, false);
        let other = Disk::new(1 << 20, 512, false);
        write(&mut disk, 8192, 0);
        assert_eq!(disk.first_difference(&other, 0..1 << 20), None);
        write(&mut disk, 8192 + 512, 7);
        assert_eq!(disk.first_difference(&other, 0..1 << 20), Some(8704));
        assert_eq!(disk.first_difference(&other, 0..8704), None);
    }

    #[test]
    fn only_a_device_of_small_sectors_tears_a_block() {
        let torn = |sector| {
            (0..20).any(|seed| {
                let mut disk = Disk::new(1 << 20, sector, true);
                let io = DiskIo {
                    op: DiskOp::Write { fua: false },
                    offset: 0,
                    len: 4096,
                };
                if seed % 2 == 0 {
                    disk.execute(io, 0, &Bytes::Held(vec![1; 4096]));
                } else {
                    disk.interrupt(io, &[1; 4096], true, &mut Random::new(seed));
                }
                disk.power_loss(&mut Random::new(seed));
                let bytes = disk.read(0..4096);
                bytes.iter().any(|&byte| byte != bytes[0])
            })
        };
        assert!(torn(512) && !torn(4096));
    }
}
