//! `bdev-repl tgt`: a node of the embedded host, with the flags of SPDK's applications, or an SPDK application.
//! Called by the command line. Starts the reactors, loads the configuration, serves RPC, waits for the end.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};

use clap::{Args, ValueEnum};

use crate::hosts::embedded::message::NodeHandle;
use crate::hosts::embedded::node::{CoreMask, Node, NodeOptions};
use crate::hosts::embedded::rpc::config::Config;
use crate::hosts::embedded::rpc::socket::RpcSocket;
use crate::hosts::embedded::rpc::{self, log};
use crate::rpc::{Reply, RpcError};

use super::DEFAULT_RPC_SOCKET;

/// Arguments of `tgt`. What concerns huge pages, PCI and DPDK is accepted and has no meaning here, so that
/// a command line for spdk_tgt works.
#[derive(Debug, Args)]
pub struct TargetArguments {
    /// What the node runs on: the runtime of this program, or SPDK (with all flags of spdk_tgt: --host spdk --help)
    #[arg(long, value_enum, default_value_t = HostName::Embedded)]
    host: HostName,
    /// Cores to run reactors on: a mask (0x3) or a list ([0,1])
    #[arg(
        short = 'm',
        long = "cpumask",
        value_name = "MASK",
        default_value = "0x1"
    )]
    core_mask: CoreMask,
    /// RPC socket
    #[arg(short = 'r', long = "rpc-socket", value_name = "PATH", default_value = DEFAULT_RPC_SOCKET)]
    rpc_socket: PathBuf,
    /// JSON configuration to load at start, as save_config writes it
    #[arg(
        short = 'c',
        long = "config",
        visible_alias = "json",
        value_name = "FILE"
    )]
    config: Option<PathBuf>,
    /// Go on when a call of the configuration fails
    #[arg(long)]
    json_ignore_init_errors: bool,
    /// Wait for framework_start_init before anything is set up
    #[arg(long)]
    wait_for_rpc: bool,
    /// Log warnings and errors only
    #[arg(long)]
    silence_noticelog: bool,
    /// Log more (the flag's name is not looked at)
    #[arg(short = 'L', long = "logflag", value_name = "FLAG")]
    log_flags: Vec<String>,
    #[command(flatten)]
    without_meaning: WithoutMeaning,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HostName {
    Embedded,
    Spdk,
}

/// Flags of spdk_tgt that have no meaning here.
#[derive(Debug, Args)]
struct WithoutMeaning {
    #[arg(short = 's', long, hide = true, value_name = "MB")]
    mem_size: Option<String>,
    #[arg(long, hide = true)]
    no_huge: bool,
    #[arg(short = 'u', long, hide = true)]
    no_pci: bool,
    #[arg(short = 'g', long, hide = true)]
    single_file_segments: bool,
    #[arg(short = 'd', long, hide = true)]
    limit_coredump: bool,
    #[arg(short = 'R', long, hide = true)]
    huge_unlink: bool,
    #[arg(short = 'i', long, hide = true, value_name = "ID")]
    shm_id: Option<String>,
    #[arg(short = 'n', long, hide = true, value_name = "NUM")]
    mem_channels: Option<String>,
    #[arg(short = 'p', long, hide = true, value_name = "CORE")]
    main_core: Option<String>,
    #[arg(short = 'e', long, hide = true, value_name = "GROUP")]
    tpoint_group: Option<String>,
    #[arg(short = 'A', long, hide = true, value_name = "BDF")]
    pci_allowed: Vec<String>,
    #[arg(short = 'B', long, hide = true, value_name = "BDF")]
    pci_blocked: Vec<String>,
    #[arg(long, hide = true, value_name = "PATH")]
    huge_dir: Option<String>,
    #[arg(long, hide = true, value_name = "MODE")]
    iova_mode: Option<String>,
    #[arg(long, hide = true, value_name = "ADDRESS")]
    base_virtaddr: Option<String>,
    #[arg(long, hide = true, value_name = "NUM")]
    num_trace_entries: Option<String>,
    #[arg(long, hide = true, value_name = "OPTIONS")]
    env_context: Option<String>,
    #[arg(long, hide = true, value_name = "NUM")]
    msg_mempool_size: Option<String>,
    #[arg(long, hide = true)]
    disable_cpumask_locks: bool,
    #[arg(long, hide = true)]
    interrupt_mode: bool,
}

/// For `tgt --host spdk`: the other arguments, as they are. `None` for every other command line.
pub fn arguments_for_spdk(all: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut all = all.into_iter().skip(1);
    if all.next()? != "tgt" {
        return None;
    }
    let mut found = false;
    let mut others: Vec<OsString> = Vec::new();
    for argument in all {
        if argument == "--host=spdk" {
            found = true;
        } else if argument == "spdk" && others.last().is_some_and(|last| last == "--host") {
            others.pop();
            found = true;
        } else {
            others.push(argument);
        }
    }
    found.then_some(others)
}

/// Runs an SPDK application until it is told to stop.
#[cfg(feature = "spdk")]
pub fn run_spdk(arguments: &[OsString]) -> ExitCode {
    crate::hosts::spdk::app::run(arguments)
}

/// Says what is missing.
#[cfg(not(feature = "spdk"))]
pub fn run_spdk(_arguments: &[OsString]) -> ExitCode {
    eprintln!(
        "bdev-repl tgt --host spdk: this program was built without SPDK: install SPDK 25.09 to 26.05 with shared \
         libraries and build it by `cargo build --release --features spdk`"
    );
    ExitCode::FAILURE
}

/// Runs a node until it is told to stop. The exit code is 1 if it could not be started or broke down.
pub fn run(arguments: &TargetArguments) -> ExitCode {
    if arguments.host == HostName::Spdk {
        return run_spdk(&[]);
    }
    log::install();
    if arguments.silence_noticelog {
        log::set_level("WARNING");
    } else if !arguments.log_flags.is_empty() {
        log::set_level("DEBUG");
    }
    match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bdev-repl tgt: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &TargetArguments) -> Result<(), String> {
    // Read first: a file that is none is told before anything has been started.
    let config = match &arguments.config {
        Some(path) => Some(Config::read(path).map_err(|error| error.to_string())?),
        None => None,
    };
    let options = NodeOptions {
        core_mask: arguments.core_mask.clone(),
        handle_signals: true,
    };
    let (starter, starts) = channel();
    let node = Node::start(&options, move |core| core.control.set_starter(starter))
        .map_err(|error| format!("the reactors cannot be started: {error}"))?;
    let handle = node.handle().clone();
    let served = start(arguments, &handle, config, &starts);
    match served {
        Ok(socket) => {
            let ended = node.join();
            drop(socket);
            ended.map_err(|error| format!("a reactor broke down: {error}"))
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = node.shutdown();
            Err(error)
        }
    }
}

/// As SPDK: without `--wait-for-rpc` the socket appears when everything is set up; with it, at once.
fn start(
    arguments: &TargetArguments,
    node: &NodeHandle,
    config: Option<Config>,
    starts: &Receiver<Reply>,
) -> Result<RpcSocket, String> {
    let listen = || {
        RpcSocket::start(&arguments.rpc_socket, Box::new(rpc::handler(node.clone())))
            .map_err(|error| format!("RPC socket {}: {error}", arguments.rpc_socket.display()))
    };
    let mut socket = None;
    let mut reply = None;
    if arguments.wait_for_rpc {
        socket = Some(listen()?);
        match starts.recv() {
            Ok(asked) => reply = Some(asked),
            // The node has been told to stop meanwhile.
            Err(_) => return socket.ok_or_else(|| "stopped before it was started".to_owned()),
        }
    }
    // A node that has been told to stop meanwhile refuses these calls; its end is waited for by the caller.
    let _ = node.run(0, |core| core.control.start());
    if let Some(config) = config {
        let loaded = config.load(
            rpc::handler(node.clone()),
            arguments.json_ignore_init_errors,
        );
        if let Err(error) = loaded.map_err(|error| error.to_string()) {
            if let Some(reply) = reply {
                reply.fail(RpcError::invalid(error.clone()));
            }
            return Err(error);
        }
    }
    let _ = node.run(0, |core| core.control.set_ready());
    if let Some(reply) = reply {
        reply.ok(true);
    }
    socket.map_or_else(listen, Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn for_spdk(line: &str) -> Option<Vec<OsString>> {
        arguments_for_spdk(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn everything_but_the_host_goes_to_spdk() {
        let rest: Vec<OsString> = ["-m", "0x3", "--help"].map(OsString::from).into();
        for line in [
            "bdev-repl tgt --host spdk -m 0x3 --help",
            "bdev-repl tgt -m 0x3 --host=spdk --help",
            "bdev-repl tgt -m 0x3 --help --host spdk",
        ] {
            assert_eq!(for_spdk(line), Some(rest.clone()), "{line}");
        }
        assert_eq!(for_spdk("bdev-repl tgt --host spdk"), Some(Vec::new()));
    }

    #[test]
    fn other_command_lines_are_not_for_spdk() {
        for line in [
            "bdev-repl",
            "bdev-repl tgt -m 0x3",
            "bdev-repl tgt --host embedded",
            "bdev-repl tgt --host",
            "bdev-repl tgt spdk",
            "bdev-repl status --host spdk",
        ] {
            assert_eq!(for_spdk(line), None, "{line}");
        }
    }
}
