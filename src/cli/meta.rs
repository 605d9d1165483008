//! `bdev-repl meta`: creates, dumps and checks metadata offline, on a file or a block device.
//!
//! Called by the command line; all reading and writing of devices is here, all knowledge of the bytes in
//! `engine::meta`. Damaged content of any kind ends in a message and exit code 1.

mod create;
mod device;
mod inspect;
mod report;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use thiserror::Error;
use uuid::Uuid;

use self::device::Device;
use self::inspect::Inspection;
use crate::engine::meta::format::{self, FormatError};
use crate::engine::meta::layout::FRONT_DATA_OFFSET;
use crate::engine::meta::superblock::PickError;

/// What to do with a device's metadata.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum MetaCommand {
    /// Write the metadata of a fresh volume
    Create(CreateArgs),
    /// Print what the metadata says
    Dump {
        /// File or block device
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read all metadata and report whatever is damaged
    Check {
        /// File or block device
        file: PathBuf,
    },
}

/// The volume to create. Sizes take the suffixes K, M, G and T, powers of 1024.
#[derive(clap::Args, Clone, Debug)]
pub struct CreateArgs {
    /// File or block device; it must exist and have its size
    file: PathBuf,
    /// This node's id, 0 to 7, different on each node of the volume
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=7))]
    node_id: u8,
    /// Name of the volume, the same on all nodes
    #[arg(long)]
    name: String,
    /// UUID of the volume, the same on all nodes [default: made of the name]
    #[arg(long)]
    uuid: Option<Uuid>,
    /// UUID of the backing bdev; the volume is attached to no other
    #[arg(long)]
    backing_uuid: Option<Uuid>,
    /// Size of the volume [default: all the room there is]
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Bytes that one bit of a bitmap stands for, 4K to 1M
    #[arg(long, value_parser = parse_size, default_value = "4K")]
    granularity: u64,
    /// Logical block size of the backing bdev [default: that of the device, 512 for a file]
    #[arg(long, value_parser = parse_size)]
    block_size: Option<u64>,
    /// Peers that the metadata has room for, 1 to 7
    #[arg(long, default_value_t = format::PEER_SLOTS_DEFAULT)]
    peer_slots: u8,
    /// Rings of the activity log, one for each core that uses the volume, 1 to 1024
    #[arg(long, default_value_t = format::CHANNEL_SLOTS_DEFAULT)]
    channel_slots: u16,
    /// Extents of 4 MiB in the activity log of each core, 7 to 1000
    #[arg(long, default_value_t = format::AL_EXTENTS_DEFAULT)]
    al_extents: u32,
    /// Where the data begins: 1M, or 0 to keep the data that the device carries where it is, with all
    /// metadata at the end
    #[arg(long, value_parser = parse_data_offset, default_value = "1M")]
    data_offset: u64,
    /// The replicas are the same already: no first resync between nodes that say so
    #[arg(long, conflicts_with = "has_data")]
    assume_clean: bool,
    /// The device carries the data: the peers get all of it
    #[arg(long)]
    has_data: bool,
    /// Go on although the device carries something else, which is lost
    #[arg(long)]
    force: bool,
}

/// Why a command ended without doing what it was asked for.
#[derive(Debug, Error)]
enum MetaError {
    #[error("cannot {action} {}: {source}", path.display())]
    Device {
        action: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    #[error("{}: {source}", path.display())]
    Pick { path: PathBuf, source: PickError },
    #[error("{}: {source}", path.display())]
    Format { path: PathBuf, source: FormatError },
    #[error("{}: {size_bytes} bytes are too few for a volume", path.display())]
    TooSmall { path: PathBuf, size_bytes: u64 },
    #[error("granularity of {0} bytes: it must be a power of two from 4K to 1M")]
    Granularity(u64),
    #[error("block size of {0} bytes: it must be 512, 1K, 2K or 4K")]
    BlockSize(u64),
    #[error("no random number to be had: {0}")]
    Random(getrandom::Error),
    #[error("{}: {count} problem(s) found", path.display())]
    Problems { path: PathBuf, count: usize },
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

/// Runs the command; what it says goes to standard output, why it failed to standard error.
pub fn run(command: MetaCommand) -> ExitCode {
    match execute(command, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bdev-repl meta: {error}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: MetaCommand, out: &mut impl Write) -> Result<(), MetaError> {
    match command {
        MetaCommand::Create(args) => create::create(&args, out),
        MetaCommand::Dump { file, json } => {
            let inspection = Inspection::read(&Device::open_to_read(&file)?)?;
            if json {
                serde_json::to_writer_pretty(&mut *out, &report::json(&inspection))
                    .map_err(io::Error::from)?;
                writeln!(out)?;
            } else {
                report::text(&inspection, out)?;
            }
            Ok(out.flush()?)
        }
        MetaCommand::Check { file } => {
            let inspection = Inspection::read(&Device::open_to_read(&file)?)?;
            let problems = inspection.problems();
            for problem in &problems {
                writeln!(out, "{problem}")?;
            }
            if !problems.is_empty() {
                return Err(MetaError::Problems {
                    path: file,
                    count: problems.len(),
                });
            }
            writeln!(
                out,
                "{}: the metadata of volume \"{}\" is whole",
                file.display(),
                inspection.superblock.name.as_str()
            )?;
            Ok(out.flush()?)
        }
    }
}

/// Bytes, with an optional suffix K, M, G or T for powers of 1024 ("4K", "1M", "4KiB").
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_uppercase().trim_end_matches("IB") {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("\"{suffix}\" is no unit; known are K, M, G and T")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "not a size in bytes".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

fn parse_data_offset(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        offset @ (0 | FRONT_DATA_OFFSET) => Ok(offset),
        _ => Err("data can begin at 0 or at 1M only".to_owned()),
    }
}
