//! `bdev-repl demo`: two nodes on this machine, a file system, and the accidents that replication is for.
//! Called by the command line; its parts serve the end-to-end tests too. Talks to nodes by RPC and NVMe/TCP.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

pub mod cluster;
pub mod compare;
mod error;
pub mod image;
pub mod launcher;
pub mod ledger;
pub mod link;
pub mod load;
pub mod node;
pub mod story;

pub use error::DemoError;

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Make the file system of this file or folder, or take this ext4 image as it is
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where to work; needs about four times the size of the input
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Leave everything there: backing files, configurations, logs
    #[arg(long)]
    keep: bool,
    /// Flip a byte of one replica before the comparison, which must find it
    #[arg(long, hide = true)]
    flip_byte: bool,
}

/// Runs the demo. The exit code is 1 if anything failed or differs.
pub fn run(arguments: &DemoArguments) -> ExitCode {
    let told = image::Tools::find().and_then(|tools| {
        let directory = working_directory(arguments.dir.as_deref())?;
        Ok((tools, directory))
    });
    let (tools, directory) = match told {
        Ok(both) => both,
        Err(error) => {
            eprintln!("bdev-repl demo: {error}");
            return ExitCode::FAILURE;
        }
    };
    let plan = story::Plan {
        tools,
        input: arguments.input.clone(),
        directory: directory.clone(),
        flip_byte: arguments.flip_byte,
    };
    let ended = story::tell(&plan);
    let exit_code = match &ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nbdev-repl demo FAILED: {error}");
            ExitCode::FAILURE
        }
    };
    if arguments.keep || ended.is_err() {
        println!("Everything is left in {}", directory.display());
    } else if let Err(error) = fs::remove_dir_all(&directory) {
        eprintln!(
            "bdev-repl demo: cannot remove {}: {error}",
            directory.display()
        );
    }
    exit_code
}

/// A new folder: below the one given, or where files belong that are too large for memory.
fn working_directory(below: Option<&Path>) -> Result<PathBuf, DemoError> {
    let below = match below {
        Some(below) => below.to_owned(),
        None => std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from),
    };
    fs::create_dir_all(&below).map_err(|error| DemoError::io("create", &below, error))?;
    let mut number = 0;
    loop {
        let name = format!("bdev-repl-demo-{}-{number}", std::process::id());
        let directory = below.join(name);
        match fs::create_dir(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(DemoError::io("create", &directory, error)),
        }
    }
}
