//! The names of the node's bdevs, on core 0: create, claim, delete, describe. Called by the control path
//! (RPC, volumes); every change reaches the other cores' tables by message before it is reported done.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::bdev::{BdevId, BdevKind, CoreBdev, IoStat};
use super::core::Core;
use super::disk::{FileDisk, FileParameters};
use super::malloc::MallocDisk;
use super::target;

/// What went wrong, with the code that SPDK answers with (a negative errno).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BdevError {
    pub code: i32,
    pub message: String,
}

impl BdevError {
    /// `errno` is positive.
    pub fn from_errno(errno: i32, message: impl Into<String>) -> Self {
        Self {
            code: -errno,
            message: message.into(),
        }
    }

    pub fn from_io(error: &io::Error, message: impl Into<String>) -> Self {
        Self::from_errno(error.raw_os_error().unwrap_or(libc::EIO), message)
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::from_errno(libc::EINVAL, message)
    }

    fn absent(name: &str) -> Self {
        Self::from_errno(libc::ENODEV, format!("there is no bdev {name}"))
    }
}

/// How a bdev came about: what `bdev_get_bdevs` shows and a saved configuration repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BdevOrigin {
    Malloc,
    Aio(FileParameters),
    Uring(FileParameters),
    Nvme {
        controller: String,
        namespace_id: u32,
    },
    Volume,
    Endpoint,
}

impl BdevOrigin {
    /// As SPDK's modules call their products.
    pub fn product_name(&self) -> &'static str {
        match self {
            Self::Malloc => "Malloc disk",
            Self::Aio(_) => "AIO disk",
            Self::Uring(_) => "URING bdev",
            Self::Nvme { .. } => "NVMe disk",
            Self::Volume => "Replicated volume",
            Self::Endpoint => "Replication endpoint",
        }
    }
}

/// What a new bdev is to be.
#[derive(Clone, Debug)]
pub struct Registration {
    pub name: String,
    pub aliases: Vec<String>,
    pub uuid: Uuid,
    pub block_size: u32,
    pub num_blocks: u64,
    pub kind: BdevKind,
    pub origin: BdevOrigin,
}

/// A bdev as the control path knows it.
#[derive(Clone, Debug)]
pub struct BdevEntry {
    pub id: BdevId,
    pub name: String,
    pub aliases: Vec<String>,
    pub uuid: Uuid,
    pub block_size: u32,
    pub num_blocks: u64,
    pub origin: BdevOrigin,
    /// Who holds it for itself; nobody else may write to it or delete it.
    pub claimed_by: Option<String>,
    state: EntryState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EntryState {
    /// Not yet on all cores: the name is taken, nobody finds it.
    Coming,
    Ready,
    /// Waiting for its last I/O.
    Going,
}

/// Filled on core 0 only.
#[derive(Default)]
pub struct Registry {
    entries: BTreeMap<BdevId, BdevEntry>,
    next_generation: u32,
}

impl Registry {
    /// By name, alias or UUID.
    pub fn find(&self, name: &str) -> Option<&BdevEntry> {
        self.iter().find(|entry| entry.answers_to(name))
    }

    pub fn get(&self, id: BdevId) -> Option<&BdevEntry> {
        self.entries
            .get(&id)
            .filter(|entry| entry.state == EntryState::Ready)
    }

    /// In order of their making.
    pub fn iter(&self) -> impl Iterator<Item = &BdevEntry> {
        let mut entries: Vec<_> = self
            .entries
            .values()
            .filter(|entry| entry.state == EntryState::Ready)
            .collect();
        entries.sort_by_key(|entry| entry.id.generation);
        entries.into_iter()
    }

    /// Takes a bdev for `owner`. Errors: ENODEV; EPERM when somebody else has it, as SPDK answers.
    pub fn claim(&mut self, name: &str, owner: &str) -> Result<BdevEntry, BdevError> {
        let id = self
            .find(name)
            .map(|entry| entry.id)
            .ok_or_else(|| BdevError::absent(name))?;
        let entry = self
            .entries
            .get_mut(&id)
            .ok_or_else(|| BdevError::absent(name))?;
        if let Some(holder) = &entry.claimed_by {
            return Err(BdevError::from_errno(
                libc::EPERM,
                format!("bdev {name} is claimed by {holder}"),
            ));
        }
        entry.claimed_by = Some(owner.to_owned());
        Ok(entry.clone())
    }

    pub fn release(&mut self, id: BdevId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.claimed_by = None;
        }
    }

    fn reserve(&mut self, registration: &Registration) -> Result<BdevId, BdevError> {
        let name = &registration.name;
        if name.is_empty() {
            return Err(BdevError::invalid("a bdev needs a name"));
        }
        let uuid = registration.uuid.to_string();
        for wanted in registration.aliases.iter().chain([name, &uuid]) {
            if self.entries.values().any(|entry| entry.answers_to(wanted)) {
                return Err(BdevError::from_errno(
                    libc::EEXIST,
                    format!("a bdev {wanted} exists already"),
                ));
            }
        }
        let index = (0..)
            .find(|index| self.entries.keys().all(|id| id.index != *index))
            .unwrap_or(u32::MAX);
        self.next_generation += 1;
        let id = BdevId {
            index,
            generation: self.next_generation,
        };
        self.entries.insert(
            id,
            BdevEntry {
                id,
                name: name.clone(),
                aliases: registration.aliases.clone(),
                uuid: registration.uuid,
                block_size: registration.block_size,
                num_blocks: registration.num_blocks,
                origin: registration.origin.clone(),
                claimed_by: None,
                state: EntryState::Coming,
            },
        );
        Ok(id)
    }
}

impl BdevEntry {
    fn answers_to(&self, name: &str) -> bool {
        self.name == name
            || self.aliases.iter().any(|alias| alias == name)
            || Uuid::parse_str(name).is_ok_and(|uuid| uuid == self.uuid)
    }
}

/// Makes a bdev known on all cores. To be called on core 0; `then` runs there.
pub fn register(
    core: &mut Core,
    registration: Registration,
    then: impl FnOnce(&mut Core, Result<BdevId, BdevError>) + 'static,
) {
    let id = match core.registry.reserve(&registration) {
        Ok(id) => id,
        Err(error) => return then(core, Err(error)),
    };
    let Registration {
        block_size,
        num_blocks,
        kind,
        ..
    } = registration;
    core.on_all_cores(
        move |core| {
            core.bdevs.insert(
                id,
                CoreBdev {
                    kind: kind.clone(),
                    block_size,
                    num_blocks,
                    in_flight: 0,
                    stat: IoStat::default(),
                    closing: false,
                },
            );
        },
        move |core| {
            if let Some(entry) = core.registry.entries.get_mut(&id) {
                entry.state = EntryState::Ready;
            }
            then(core, Ok(id));
        },
    );
}

/// Deletes a bdev: takes it out of the subsystems that export it, lets its I/O end, and forgets it.
/// `then` runs on core 0 when nothing of it is left on any core. Errors: ENODEV; EBUSY when somebody else than the
/// target has it.
pub fn delete(
    core: &mut Core,
    name: &str,
    then: impl FnOnce(&mut Core, Result<(), BdevError>) + 'static,
) {
    let Some(entry) = core.registry.find(name) else {
        let error = BdevError::absent(name);
        return then(core, Err(error));
    };
    if let Some(holder) = &entry.claimed_by
        && holder != target::CLAIMANT
    {
        let message = format!("bdev {name} is claimed by {holder}: delete that first");
        return then(core, Err(BdevError::from_errno(libc::EBUSY, message)));
    }
    let id = entry.id;
    if let Some(entry) = core.registry.entries.get_mut(&id) {
        entry.state = EntryState::Going;
    }
    target::remove_bdev(core, id);
    core.on_all_cores_later(
        move |core, acknowledgement| core.close_bdev(id, acknowledgement),
        move |core| {
            core.on_all_cores(
                move |core| {
                    core.bdevs.remove(id);
                },
                move |core| {
                    core.registry.entries.remove(&id);
                    then(core, Ok(()));
                },
            );
        },
    );
}

/// A bdev in memory. `block_size` 512 or 4096; a missing UUID is made up.
pub fn create_malloc(
    core: &mut Core,
    name: &str,
    num_blocks: u64,
    block_size: u32,
    uuid: Option<Uuid>,
    then: impl FnOnce(&mut Core, Result<BdevId, BdevError>) + 'static,
) {
    match malloc_registration(name, num_blocks, block_size, uuid) {
        Ok(registration) => register(core, registration, then),
        Err(error) => then(core, Err(error)),
    }
}

fn malloc_registration(
    name: &str,
    num_blocks: u64,
    block_size: u32,
    uuid: Option<Uuid>,
) -> Result<Registration, BdevError> {
    if !(512..=65536).contains(&block_size) || !block_size.is_power_of_two() {
        return Err(BdevError::invalid(format!(
            "block size {block_size} is not a power of two from 512 to 65536"
        )));
    }
    let size_bytes = num_blocks
        .checked_mul(u64::from(block_size))
        .filter(|size| *size > 0)
        .ok_or_else(|| {
            BdevError::invalid("a disk needs at least one block, and fewer than 2^64 bytes")
        })?;
    let disk = MallocDisk::new(size_bytes).map_err(|error| {
        BdevError::from_io(&error, format!("no memory for {size_bytes} bytes: {error}"))
    })?;
    Ok(Registration {
        name: name.to_owned(),
        aliases: Vec::new(),
        uuid: uuid.unwrap_or_else(Uuid::new_v4),
        block_size,
        num_blocks,
        kind: BdevKind::Malloc(Arc::new(disk)),
        origin: BdevOrigin::Malloc,
    })
}

/// The two RPCs that make a bdev of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFlavour {
    Aio,
    Uring,
}

/// How long to wait for a file that another process holds, and how often to look.
const LOCK_WAIT_MS: u64 = 5_000;
const LOCK_RETRY_MS: u64 = 10;

/// A bdev on a file or block device, waiting for its lock for some seconds. A missing UUID is derived
/// from the path, so that it is the same after a restart. Errors: see [`FileDisk::try_open`]; EBUSY when
/// another process holds the file; EEXIST.
pub fn create_file(
    core: &mut Core,
    name: &str,
    flavour: FileFlavour,
    parameters: FileParameters,
    uuid: Option<Uuid>,
    then: impl FnOnce(&mut Core, Result<BdevId, BdevError>) + 'static,
) {
    let attempt = FileAttempt {
        name: name.to_owned(),
        flavour,
        parameters,
        uuid,
        give_up_ns: core.reactor.now_ns() + LOCK_WAIT_MS * 1_000_000,
    };
    attempt.run(core, then);
}

struct FileAttempt {
    name: String,
    flavour: FileFlavour,
    parameters: FileParameters,
    uuid: Option<Uuid>,
    give_up_ns: u64,
}

impl FileAttempt {
    fn run(
        self,
        core: &mut Core,
        then: impl FnOnce(&mut Core, Result<BdevId, BdevError>) + 'static,
    ) {
        // Before the file is touched: the name may have been taken while we waited.
        if core
            .registry
            .entries
            .values()
            .any(|entry| entry.answers_to(&self.name))
        {
            let message = format!("a bdev {} exists already", self.name);
            return then(core, Err(BdevError::from_errno(libc::EEXIST, message)));
        }
        let disk = match FileDisk::try_open(&self.parameters) {
            Err(error) => return then(core, Err(error)),
            Ok(Some(disk)) => disk,
            Ok(None) if core.reactor.now_ns() >= self.give_up_ns => {
                let path = self.parameters.path.display();
                let message = format!("{path} is in use by another process or mounted");
                return then(core, Err(BdevError::from_errno(libc::EBUSY, message)));
            }
            Ok(None) => {
                core.after(LOCK_RETRY_MS, move |core| self.run(core, then));
                return;
            }
        };
        let path = self.parameters.path.to_string_lossy();
        let uuid = self
            .uuid
            .unwrap_or_else(|| Uuid::new_v5(&Uuid::NAMESPACE_URL, path.as_bytes()));
        let registration = Registration {
            name: self.name,
            aliases: Vec::new(),
            uuid,
            block_size: disk.block_size,
            num_blocks: disk.size_bytes / u64::from(disk.block_size),
            kind: BdevKind::File(Arc::new(disk)),
            origin: match self.flavour {
                FileFlavour::Aio => BdevOrigin::Aio(self.parameters),
                FileFlavour::Uring => BdevOrigin::Uring(self.parameters),
            },
        };
        register(core, registration, then);
    }
}

/// The counters of a bdev, summed over all cores.
pub fn iostat(core: &mut Core, id: BdevId, then: impl FnOnce(&mut Core, IoStat) + 'static) {
    let sum = Arc::new(std::sync::Mutex::new(IoStat::default()));
    let total = sum.clone();
    core.on_all_cores(
        move |core| {
            if let (Some(bdev), Ok(mut sum)) = (core.bdevs.get(id), sum.lock()) {
                sum.add(&bdev.stat);
            }
        },
        move |core| {
            let total = total.lock().map(|total| *total).unwrap_or_default();
            then(core, total);
        },
    );
}
