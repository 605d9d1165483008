//! The command line: `tgt`, `status`, `meta`, `demo`, `sim`.
//! Called by `main`. Commands talk to a target by RPC only, except `tgt`, which is one.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod demo;
pub mod meta;
pub mod sim;
pub mod status;
pub mod tgt;

/// SPDK's default RPC socket.
pub const DEFAULT_RPC_SOCKET: &str = "/var/tmp/spdk.sock";

#[derive(Parser)]
#[command(
    name = "bdev-repl",
    version,
    about = "Block replication for SPDK and for machines without it"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node: disks, volumes, NVMe/TCP target, RPC
    Tgt(Box<tgt::TargetArguments>),
    /// Show the volumes of running targets
    Status(status::StatusArguments),
    /// Create, show and check metadata on a file or device that no target uses
    #[command(subcommand)]
    Meta(meta::MetaCommand),
    /// Replicate a file system between two nodes of this machine, through a cut link and a killed node
    Demo(demo::DemoArguments),
    /// Run the engine in simulated worlds and look for what it does wrong
    Sim(sim::SimArguments),
}

/// Runs the command and returns its exit code.
pub fn main() -> ExitCode {
    // SPDK parses its own flags, many of which are not known here.
    if let Some(arguments) = tgt::arguments_for_spdk(std::env::args_os()) {
        return tgt::run_spdk(&arguments);
    }
    match Cli::parse().command {
        Command::Tgt(arguments) => tgt::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Meta(command) => meta::run(command),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Sim(arguments) => sim::run(&arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
