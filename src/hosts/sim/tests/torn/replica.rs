//! A device as the recording tells it, and what a crash at this moment could leave of its metadata. Also the blocks
//! that this node's metadata must know of then. Knows nothing of the engine.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::rc::Rc;

use crate::engine::volume::GRANULE_BYTES;
use crate::host::{DiskIo, DiskOp, Token};
use crate::hosts::sim::disk::Disk;
use crate::hosts::sim::random::Random;
use crate::hosts::sim::record::{Carried, Origin, digest};

pub const PAGE: u64 = 4096;
pub const SECTOR: usize = 512;
/// Where the volume's data begins.
const DATA: u64 = 1 << 20;

/// A page of metadata; zeroes hash to 0, so that they are the same as nothing.
pub struct Page {
    pub bytes: Vec<u8>,
    hash: u64,
}

impl Page {
    fn new(number: u64, bytes: Vec<u8>) -> Rc<Page> {
        let mut hasher = DefaultHasher::new();
        (number, &bytes).hash(&mut hasher);
        let blank = bytes == [0; PAGE as usize];
        let hash = if blank { 0 } else { hasher.finish() };
        Rc::new(Page { bytes, hash })
    }
}

/// All metadata that a crash could leave.
#[derive(Clone, Default)]
pub struct Image(pub BTreeMap<u64, Rc<Page>>);

impl Image {
    pub fn hash(&self) -> u64 {
        let hashes = self.0.values().map(|page| page.hash);
        hashes.fold(0, u64::wrapping_add)
    }

    /// This image with the first `len` bytes of a write over it.
    fn with(&self, write: &(u64, Vec<u8>), len: usize) -> Image {
        let mut image = self.clone();
        for (index, piece) in write.1[..len].chunks(PAGE as usize).enumerate() {
            let number = write.0 / PAGE + index as u64;
            let mut bytes = image.page(number);
            bytes[..piece.len()].copy_from_slice(piece);
            image.0.insert(number, Page::new(number, bytes));
        }
        image
    }

    fn page(&self, number: u64) -> Vec<u8> {
        let page = self.0.get(&number);
        page.map_or_else(|| vec![0; PAGE as usize], |page| page.bytes.clone())
    }
}

/// Content of a granule, oldest first; the first is durable.
struct Granule {
    versions: Vec<(u64, u64)>,
    /// A write that is not the resync's is not durable.
    unflushed: bool,
}

struct InFlight {
    io: DiskIo,
    carried: Carried,
    submitted: u64,
}

pub struct Replica {
    volatile: bool,
    /// Writes executed.
    order: u64,
    metadata: BTreeMap<u64, Vec<(u64, Rc<Page>)>>,
    granules: BTreeMap<u64, Granule>,
    in_flight: BTreeMap<u64, InFlight>,
    /// Writes that were sent to the peer and have not ended.
    sent: Vec<(usize, Token, Range<u64>)>,
    /// Granules that this node has to tell the peer of when they meet again, after whatever crash.
    pub owed: BTreeSet<u64>,
}

fn durable_from<T>(versions: &mut Vec<(u64, T)>, submitted: u64) {
    let kept = versions.iter().rposition(|&(order, _)| order <= submitted);
    versions.drain(..kept.unwrap_or(0));
}

impl Replica {
    pub fn new(volatile: bool) -> Replica {
        Replica {
            volatile,
            order: 0,
            metadata: BTreeMap::new(),
            granules: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            sent: Vec::new(),
            owed: BTreeSet::new(),
        }
    }

    /// True when the metadata that a crash could leave is no longer the same.
    pub fn submitted(&mut self, id: u64, io: DiskIo, carried: Carried) -> bool {
        if let Carried::Granules {
            origin: Origin::Application,
            ..
        } = carried
        {
            self.owed.extend(range_of(&carried));
        }
        let changed = matches!(carried, Carried::Metadata(_));
        let submitted = self.order;
        let io = InFlight {
            io,
            carried,
            submitted,
        };
        self.in_flight.insert(id, io);
        changed
    }

    /// True as in [`submitted`](Self::submitted); and the granules whose content or durability has changed, `None`
    /// for any.
    pub fn done(&mut self, id: u64) -> (bool, Option<Range<u64>>) {
        let Some(work) = self.in_flight.remove(&id) else {
            return (false, Some(0..0));
        };
        let durable = !self.volatile
            || matches!(
                work.io.op,
                DiskOp::Write { fua: true } | DiskOp::WriteZeroes { fua: true }
            );
        match work.carried {
            Carried::Flush => {
                for versions in self.metadata.values_mut() {
                    durable_from(versions, work.submitted);
                }
                for granule in self.granules.values_mut() {
                    durable_from(&mut granule.versions, work.submitted);
                    granule.unflushed &= granule.versions.len() > 1;
                }
                (self.volatile, None)
            }
            Carried::Metadata(bytes) => {
                self.order += 1;
                for (index, bytes) in bytes.chunks(PAGE as usize).enumerate() {
                    let number = work.io.offset / PAGE + index as u64;
                    let blank = || vec![(0, Page::new(number, vec![0; PAGE as usize]))];
                    let versions = self.metadata.entry(number).or_insert_with(blank);
                    versions.push((self.order, Page::new(number, bytes.to_vec())));
                    if durable {
                        versions.drain(..versions.len() - 1);
                    }
                }
                (true, Some(0..0))
            }
            Carried::Granules {
                first,
                digests,
                origin,
            } => {
                self.order += 1;
                for (granule, digest) in (first..).zip(&digests) {
                    let granule = self.granules.entry(granule).or_insert_with(Granule::blank);
                    granule.versions.push((self.order, *digest));
                    granule.unflushed |= origin != Origin::Resync;
                    if durable {
                        granule.versions.drain(..granule.versions.len() - 1);
                        granule.unflushed = false;
                    }
                }
                (false, Some(first..first + digests.len() as u64))
            }
        }
    }

    pub fn sent(&mut self, core: usize, token: Token, granules: Range<u64>) {
        self.sent.push((core, token, granules));
    }

    /// What the peer has done it need not be told of.
    pub fn ended(&mut self, core: usize, token: Token, ok: bool) -> Range<u64> {
        let ours = |sent: &(usize, Token, _)| sent.0 == core && sent.1 == token;
        let Some(index) = self.sent.iter().position(ours) else {
            return 0..0;
        };
        let granules = self.sent.swap_remove(index).2;
        if ok {
            self.owed.retain(|granule| !granules.contains(granule));
        }
        granules
    }

    /// Power loss, or on a device without a volatile cache the end of the process.
    pub fn crashed(&mut self, disk: &Disk) {
        self.owed.extend(self.unsettled().collect::<Vec<_>>());
        for (_, work) in std::mem::take(&mut self.in_flight) {
            match &work.carried {
                Carried::Metadata(bytes) => {
                    for number in 0..bytes.len() as u64 / PAGE {
                        let number = work.io.offset / PAGE + number;
                        self.metadata.entry(number).or_default();
                    }
                }
                Carried::Granules { .. } => {
                    for granule in range_of(&work.carried) {
                        self.granules.entry(granule).or_insert_with(Granule::blank);
                    }
                }
                Carried::Flush => {}
            }
        }
        for (&number, versions) in &mut self.metadata {
            let bytes = disk.read(number * PAGE..(number + 1) * PAGE);
            *versions = vec![(0, Page::new(number, bytes))];
        }
        for (&number, granule) in &mut self.granules {
            let start = DATA + number * GRANULE_BYTES;
            granule.versions = vec![(0, digest(&disk.read(start..start + GRANULE_BYTES)))];
            granule.unflushed = false;
        }
        self.sent.clear();
    }

    /// Granules with a write, not the resync's, that is under way on this device or not yet durable.
    fn unsettled(&self) -> impl Iterator<Item = u64> + '_ {
        let in_flight = self.in_flight.values().flat_map(|work| match work.carried {
            Carried::Granules { origin, .. } if origin != Origin::Resync => range_of(&work.carried),
            _ => 0..0,
        });
        let unflushed = self.granules.iter().filter(|(_, one)| one.unflushed);
        in_flight.chain(unflushed.map(|(&granule, _)| granule))
    }

    /// Granules that must be found in the metadata after a crash now.
    pub fn required(&self) -> BTreeSet<u64> {
        self.owed.iter().copied().chain(self.unsettled()).collect()
    }

    /// The content of a granule, if it is certain.
    pub fn settled(&self, granule: u64) -> Option<u64> {
        let works = |work: &InFlight| range_of(&work.carried).contains(&granule);
        if self.in_flight.values().any(works)
            || self.sent.iter().any(|sent| sent.2.contains(&granule))
        {
            return None;
        }
        match self.granules.get(&granule) {
            None => Some(Granule::blank().versions[0].1),
            Some(found) if found.versions.len() == 1 => Some(found.versions[0].1),
            Some(_) => None,
        }
    }

    fn image(&self, mut choose: impl FnMut(u64, &[(u64, Rc<Page>)]) -> Rc<Page>) -> Image {
        let pages = self.metadata.iter();
        let pages = pages.map(|(&number, versions)| (number, choose(number, versions)));
        Image(pages.filter(|(_, page)| page.hash != 0).collect())
    }

    /// Metadata writes that the device is executing: offset and bytes.
    pub fn writing(&self) -> Vec<(u64, (u64, Vec<u8>))> {
        let writes = self.in_flight.iter();
        writes
            .filter_map(|(&id, work)| match &work.carried {
                Carried::Metadata(bytes) => Some((id, (work.io.offset, bytes.clone()))),
                _ => None,
            })
            .collect()
    }

    /// With everything that the device has completed, and with what it is executing too.
    pub fn before_and_after(&self) -> (Image, Image) {
        let before = self.image(|_, versions| Rc::clone(&versions[versions.len() - 1].1));
        let after = self
            .writing()
            .iter()
            .fold(before.clone(), |image, (_, write)| {
                image.with(write, write.1.len())
            });
        (before, after)
    }

    /// What a crash could leave: every write that is under way cut off after each of its sectors, with the cache's
    /// content kept, lost, and in mixtures.
    pub fn crash_images(&self, random: &mut Random) -> Vec<Image> {
        let writing = self.writing();
        let (kept, all) = self.before_and_after();
        let mut bases = vec![kept];
        let mut images = vec![all];
        if self.metadata.values().any(|versions| versions.len() > 1) {
            bases.push(self.image(|_, versions| Rc::clone(&versions[0].1)));
            for _ in 0..2 {
                let mixed = self.image(|number, versions| {
                    if let [(_, durable)] = versions {
                        return Rc::clone(durable);
                    }
                    let mut bytes = Vec::with_capacity(PAGE as usize);
                    for from in (0..PAGE as usize).step_by(SECTOR) {
                        let version = &versions[random.below(versions.len() as u64) as usize].1;
                        bytes.extend_from_slice(&version.bytes[from..from + SECTOR]);
                    }
                    Page::new(number, bytes)
                });
                images.push(mixed);
            }
        }
        for base in bases {
            for (_, write) in &writing {
                let pages = write.0 / PAGE..(write.0 + write.1.len() as u64) / PAGE;
                let old: Vec<u8> = pages.flat_map(|page| base.page(page)).collect();
                for len in (SECTOR..=write.1.len()).step_by(SECTOR) {
                    let sector = len - SECTOR..len;
                    if old[sector.clone()] != write.1[sector] {
                        images.push(base.with(write, len));
                    }
                }
            }
            images.push(base);
        }
        let mut seen = HashSet::new();
        images.retain(|image| seen.insert(image.hash()));
        images
    }

    /// Writes of one page each, all under way, cut off after each of their bytes: the last one alone, and all of them
    /// at the same byte.
    pub fn byte_images(&self, writes: &[(u64, Vec<u8>)]) -> Vec<Image> {
        let (before, _) = self.before_and_after();
        let mut images = Vec::new();
        for writes in [writes, &writes[writes.len() - 1..]] {
            let old: Vec<_> = writes.iter().map(|one| before.page(one.0 / PAGE)).collect();
            for len in 1..=PAGE as usize {
                let mut pairs = writes.iter().zip(&old);
                if pairs.any(|(one, old)| old[len - 1] != one.1[len - 1]) {
                    let cut = |image: Image, one| image.with(one, len);
                    images.push(writes.iter().fold(before.clone(), cut));
                }
            }
            if writes.len() == 1 {
                break;
            }
        }
        images
    }
}

impl Granule {
    fn blank() -> Granule {
        thread_local!(static BLANK: u64 = digest(&[0; GRANULE_BYTES as usize]));
        Granule {
            versions: vec![(0, BLANK.with(|&blank| blank))],
            unflushed: false,
        }
    }
}

pub fn range_of(carried: &Carried) -> Range<u64> {
    match carried {
        Carried::Granules { first, digests, .. } => *first..first + digests.len() as u64,
        _ => 0..0,
    }
}
