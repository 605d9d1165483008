//! Opens a backing device before there is a volume: reads its superblock, activity logs and bitmaps, or first makes
//! them. Called by the host on the manager's core; what comes out goes to `Manager::new` and `Manager::attach`.

use std::ops::Range;

use thiserror::Error;

use crate::engine::bitmap::page::{BITS_PER_PAGE, Page};
use crate::engine::meta::activity_log::ring::{self, RingId};
use crate::engine::meta::bitmap_page;
use crate::engine::meta::block::BLOCK_SIZE;
use crate::engine::meta::foreign::{END_BYTES, FRONT_BYTES, recognise};
use crate::engine::meta::format::{FormatError, FormatParams, check_occupied, erase_plan, format};
use crate::engine::meta::layout::{Placement, superblock_places};
use crate::engine::meta::superblock::{PickError, Superblock, SuperblockError, pick};
use crate::engine::mutation::{self, Mutation};
use crate::host::{Completion, Data, DiskIo, DiskOp, Host, IoStatus, Token};

/// Bytes of one read or write of metadata.
const CHUNK_BYTES: u64 = 128 << 10;
const BLOCK: u64 = BLOCK_SIZE as u64;

/// What the device is opened for.
pub enum Goal {
    /// It carries this volume's replica of this node.
    Existing { volume_uuid: [u8; 16], node_id: u8 },
    /// It carries a replica of whatever volume.
    Any,
    /// It may carry this replica; else it is made, over anything else only by `force`.
    Create {
        params: Box<FormatParams>,
        force: bool,
    },
}

/// What a device said.
pub struct Opened {
    pub superblock: Superblock,
    /// The metadata was made just now.
    pub created: bool,
    /// Extents whose writes may have been in flight, over all rings.
    pub active_extents: Vec<u32>,
    /// An activity log is damaged beyond what a crash does: everything may have been in flight.
    pub log_damaged: bool,
    /// The number of each ring's next transaction.
    pub log_numbers: Vec<u64>,
    /// Pages with set bits: slot, page.
    pub pages: Vec<(usize, u32, Box<Page>)>,
    /// Pages that cannot be read: all of their bits count as set.
    pub damaged_pages: Vec<(usize, u32)>,
}

/// Why a device cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error("{0}")]
    Pick(#[from] PickError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(
        "the device belongs to volume '{name}' ({uuid}), node {node_id}; nothing was written (force overrides)"
    )]
    OtherVolume {
        name: String,
        uuid: uuid::Uuid,
        node_id: u8,
    },
    #[error(
        "the device carries this volume already, with {size_bytes} bytes from byte {data_offset} on, not as asked \
         for; leave size and placement out to bring it back, or wipe it first"
    )]
    OtherShape { size_bytes: u64, data_offset: u64 },
    #[error("the device has {0} bytes, too few for a volume")]
    TooSmall(u64),
    #[error("the device failed to {what} {len} bytes at byte {offset}")]
    Io {
        what: &'static str,
        offset: u64,
        len: u64,
    },
}

enum Phase {
    Front,
    End,
    /// Making the metadata: what is still to be done, the next step last.
    Making(Vec<Making>),
    /// Reading the rings from this byte on.
    Rings(u64),
    /// Reading bitmap pages of this slot from this page on.
    Bitmaps(usize, u32),
}

enum Making {
    Zero(Range<u64>),
    Flush,
    Superblock(u64, Box<[u8; BLOCK_SIZE]>),
}

/// A device that is being opened: one I/O at a time.
pub struct Opener<H: Host> {
    goal: Goal,
    token: Token,
    device_bytes: u64,
    phase: Phase,
    busy: bool,
    front: Vec<u8>,
    end: Vec<u8>,
    rings: Vec<u8>,
    superblock: Option<Superblock>,
    created: bool,
    pages: Vec<(usize, u32, Box<Page>)>,
    damaged_pages: Vec<(usize, u32)>,
    host: std::marker::PhantomData<fn(H)>,
}

impl<H: Host> Opener<H> {
    /// All of its I/O carries `token`.
    pub fn new(goal: Goal, token: Token, device_bytes: u64) -> Self {
        Self {
            goal,
            token,
            device_bytes,
            phase: Phase::Front,
            busy: false,
            front: Vec::new(),
            end: Vec::new(),
            rings: Vec::new(),
            superblock: None,
            created: false,
            pages: Vec::new(),
            damaged_pages: Vec::new(),
            host: std::marker::PhantomData,
        }
    }

    /// Starts the next I/O if none is under way; to be called after creation and from the poller until it has ended.
    ///
    /// # Errors
    /// The device is too small to be read.
    pub fn poll(&mut self, cx: &mut H) -> Result<(), OpenError> {
        if self.device_bytes < FRONT_BYTES as u64 + END_BYTES as u64 {
            return Err(OpenError::TooSmall(self.device_bytes));
        }
        if self.busy {
            return Ok(());
        }
        let io = self.next_io();
        let data = match io.op {
            DiskOp::Flush => Data::None,
            _ => {
                let Some(mut buffer) = cx.buffer(io.len as usize) else {
                    return Ok(());
                };
                if io.op != DiskOp::Read {
                    let bytes = &mut buffer.as_mut()[..io.len as usize];
                    bytes.fill(0);
                    if let Phase::Making(plan) = &self.phase
                        && let Some(Making::Superblock(_, block)) = plan.last()
                    {
                        bytes.copy_from_slice(&block[..]);
                    }
                }
                Data::Buffer(buffer)
            }
        };
        self.busy = cx.disk(self.token, io, data).is_ok();
        Ok(())
    }

    /// Whether [`poll`](Self::poll) has something to do.
    pub fn wants_poll(&self) -> bool {
        !self.busy
    }

    fn next_io(&self) -> DiskIo {
        let read = |offset: u64, end: u64| DiskIo {
            op: DiskOp::Read,
            offset,
            len: CHUNK_BYTES.min(end - offset),
        };
        let layout = self
            .superblock
            .as_ref()
            .map(|superblock| &superblock.layout);
        match (&self.phase, layout) {
            (Phase::End, _) => read(self.device_bytes - END_BYTES as u64, self.device_bytes),
            (Phase::Making(plan), _) => match plan.last() {
                Some(Making::Zero(range)) => DiskIo {
                    op: DiskOp::Write { fua: false },
                    ..read(range.start, range.end)
                },
                Some(&Making::Superblock(offset, _)) => DiskIo {
                    op: DiskOp::Write { fua: true },
                    offset,
                    len: BLOCK,
                },
                Some(Making::Flush) | None => DiskIo {
                    op: DiskOp::Flush,
                    offset: 0,
                    len: 0,
                },
            },
            (&Phase::Rings(from), Some(layout)) => read(from, layout.bitmap_offset()),
            (&Phase::Bitmaps(slot, page), Some(layout)) => {
                let from = layout.bitmap_page_offset(slot as u8, page);
                read(from, from + BLOCK * u64::from(layout.bitmap_pages() - page))
            }
            _ => DiskIo {
                op: DiskOp::Read,
                offset: 0,
                len: FRONT_BYTES as u64,
            },
        }
    }

    /// An I/O has ended; the device has been opened when this says so.
    ///
    /// # Errors
    /// The device cannot be used; nothing of it was changed unless it was being made.
    pub fn complete(&mut self, completion: Completion<H>) -> Result<Option<Opened>, OpenError> {
        let io = self.next_io();
        self.busy = false;
        if completion.status != IoStatus::Ok {
            let what = if io.op == DiskOp::Read {
                "read"
            } else {
                "write"
            };
            return Err(OpenError::Io {
                what,
                offset: io.offset,
                len: io.len,
            });
        }
        let len = io.len as usize;
        let bytes = match &completion.data {
            Data::Buffer(buffer) => buffer.as_ref().get(..len).unwrap_or_default(),
            _ => &[],
        };
        match &mut self.phase {
            Phase::Front => {
                self.front = bytes.to_vec();
                self.phase = Phase::End;
            }
            Phase::End => {
                self.end = bytes.to_vec();
                self.decide()?;
            }
            Phase::Making(plan) => {
                if let Some(Making::Zero(range)) = plan.last_mut() {
                    range.start += io.len;
                    if !range.is_empty() {
                        return Ok(None);
                    }
                }
                plan.pop();
                if plan.is_empty() {
                    self.read_on();
                }
            }
            Phase::Rings(from) => {
                *from += io.len;
                self.rings.extend_from_slice(bytes);
                if let Some(superblock) = &self.superblock
                    && *from >= superblock.layout.bitmap_offset()
                {
                    self.phase = Phase::Bitmaps(0, 0);
                }
            }
            &mut Phase::Bitmaps(slot, page) => return Ok(self.take_pages(slot, page, bytes)),
        }
        Ok(None)
    }

    /// What is on the device, and whether it may be used.
    fn decide(&mut self) -> Result<(), OpenError> {
        let Some(places) = superblock_places(self.device_bytes) else {
            return Err(OpenError::TooSmall(self.device_bytes));
        };
        let end_from = self.device_bytes - self.end.len() as u64;
        let blocks = places.map(|offset| {
            let (area, start) = match offset.checked_sub(end_from) {
                Some(start) => (&self.end, start as usize),
                None => (&self.front, offset as usize),
            };
            area.get(start..start + BLOCK_SIZE)
        });
        let found = pick(&blocks, self.device_bytes);
        match &self.goal {
            Goal::Any => self.superblock = Some(found?),
            Goal::Existing {
                volume_uuid,
                node_id,
            } => {
                let found = found?;
                if found.volume_uuid != *volume_uuid || found.node_id != *node_id {
                    return Err(other_volume(&found));
                }
                self.superblock = Some(found);
            }
            Goal::Create { params, force } => {
                let made = format(params)?;
                // A volume that was made has at least two: one alone, damaged, was torn while it was being made.
                let unfinished = matches!(found, Err(PickError::Damaged(_)))
                    && made
                        .layout
                        .superblock_offsets()
                        .filter_map(|offset| places.iter().position(|&place| place == offset))
                        .filter(|&place| blocks[place].is_none_or(|block| block != [0; BLOCK_SIZE]))
                        .count()
                        <= 1;
                let replaced = match found {
                    Ok(found)
                        if found.volume_uuid == made.volume_uuid
                            && found.node_id == made.node_id =>
                    {
                        let wanted = params
                            .layout
                            .data_size_bytes
                            .map(|_| made.layout.data_size());
                        let in_place = made.layout.placement() == Placement::InPlace;
                        if wanted.is_some_and(|size| size != found.layout.data_size())
                            || (in_place && found.layout.placement() != Placement::InPlace)
                        {
                            return Err(OpenError::OtherShape {
                                size_bytes: found.layout.data_size(),
                                data_offset: found.layout.data_offset(),
                            });
                        }
                        self.superblock = Some(found);
                        self.read_on();
                        return Ok(());
                    }
                    Ok(found) if !force => return Err(other_volume(&found)),
                    Ok(found) => Some(found),
                    Err(error)
                        if !force && !unfinished && !matches!(error, PickError::NoSuperblock) =>
                    {
                        return Err(error.into());
                    }
                    Err(_) => None,
                };
                if !force && !unfinished {
                    check_occupied(recognise(&self.front, &self.end).as_ref(), &made.layout)?;
                }
                self.phase = Phase::Making(plan_of(&made, replaced.as_ref())?);
                self.superblock = Some(made);
                self.created = true;
                return Ok(());
            }
        }
        self.read_on();
        Ok(())
    }

    fn read_on(&mut self) {
        if let Some(superblock) = &self.superblock {
            self.phase = Phase::Rings(superblock.layout.al_offset());
        }
    }

    fn take_pages(&mut self, slot: usize, first: u32, bytes: &[u8]) -> Option<Opened> {
        let superblock = self.superblock.as_ref()?;
        let mut page = first;
        for block in bytes.chunks_exact(BLOCK_SIZE) {
            match bitmap_page::parse(block, page) {
                Ok(words) if words.is_empty() => {}
                Ok(words) => self.pages.push((
                    slot,
                    page,
                    clipped(words, superblock.layout.bitmap_bits(), page),
                )),
                Err(_) => self.damaged_pages.push((slot, page)),
            }
            page += 1;
        }
        let next_slot = slot + 1;
        if page < superblock.layout.bitmap_pages() {
            self.phase = Phase::Bitmaps(slot, page);
            return None;
        }
        if next_slot < usize::from(superblock.layout.peer_slots()) {
            self.phase = Phase::Bitmaps(next_slot, 0);
            return None;
        }
        self.opened()
    }

    fn opened(&mut self) -> Option<Opened> {
        let superblock = self.superblock.take()?;
        let layout = &superblock.layout;
        let ring_bytes = layout.al_ring_blocks() as usize * BLOCK_SIZE;
        let mut active_extents = Vec::new();
        let mut log_numbers = Vec::new();
        let mut log_damaged = false;
        for (channel, bytes) in self.rings.chunks_exact(ring_bytes).enumerate() {
            let id = RingId::new(&superblock.volume_uuid, channel as u16);
            let found = ring::recover(bytes, id, layout.al_extent_count());
            let is_last = (channel + 1) * ring_bytes == self.rings.len();
            if !(is_last && mutation::is(Mutation::RingLost)) {
                active_extents.extend(found.extents);
            }
            log_numbers.push(found.next_number);
            log_damaged |= found.damaged;
        }
        active_extents.sort_unstable();
        active_extents.dedup();
        Some(Opened {
            created: self.created,
            active_extents,
            log_damaged,
            log_numbers,
            pages: std::mem::take(&mut self.pages),
            damaged_pages: std::mem::take(&mut self.damaged_pages),
            superblock,
        })
    }
}

/// The steps of making the metadata, the first one last. Whatever superblocks there are go first: a crash leaves the
/// former metadata as they were, or none.
fn plan_of(made: &Superblock, replaced: Option<&Superblock>) -> Result<Vec<Making>, OpenError> {
    let erase = erase_plan(&made.layout, replaced);
    // One after the other: an older one that is left alone would be taken for the newest.
    let superblocks = erase.superblocks.into_iter().map(Making::Zero);
    let mut plan: Vec<Making> = superblocks.flat_map(|zero| [zero, Making::Flush]).collect();
    plan.extend(erase.rest.into_iter().map(Making::Zero));
    plan.push(Making::Flush);
    for (offset, block) in made.write_plan()? {
        plan.push(Making::Superblock(offset, Box::new(block)));
    }
    plan.push(Making::Flush);
    plan.reverse();
    Ok(plan)
}

/// Bits beyond the volume's end have no meaning.
fn clipped(mut page: Box<Page>, bits: u64, index: u32) -> Box<Page> {
    let per_page = u64::from(BITS_PER_PAGE);
    let inside = bits
        .saturating_sub(u64::from(index) * per_page)
        .min(per_page) as u32;
    page.clear_range(inside..BITS_PER_PAGE);
    page
}

fn other_volume(found: &Superblock) -> OpenError {
    OpenError::OtherVolume {
        name: found.name.as_str().to_owned(),
        uuid: uuid::Uuid::from_bytes(found.volume_uuid),
        node_id: found.node_id,
    }
}
