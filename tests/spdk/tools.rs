//! SPDK's programs: where they are, and how one is run to its end.
//! Used by all tests here.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use bdev_repl::cli::demo::launcher::{Launcher, SpdkApplication};
use bdev_repl::cli::demo::node::LOOK_INTERVAL;
use serde_json::Value;

use crate::hosts;
use crate::stage::{PATIENCE, Stage};

/// A library of SPDK: the subsystem that the programs without a target are not linked with.
const NVMF_SUBSYSTEM: &str = "libspdk_event_nvmf.so";
/// Where a program runs while nodes that share a core run on the first.
pub const SECOND_CORE: &str = "0x2";
/// bdevio insists on three cores; these are two CPUs.
pub const THREE_CORES_ON_TWO: &str = "--lcores=0@0,1@1,2@1";

/// SPDK's programs poll, so one test at a time. Held from the first line of a test to its end.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `spdk_tgt` as it comes, without the module.
pub fn stock_target() -> Launcher {
    Launcher::Spdk(SpdkApplication::new(hosts::spdk_target()))
}

/// A program of this SPDK, by its name: beside `spdk_tgt`, where it is installed.
pub fn installed(name: &str) -> PathBuf {
    let program = hosts::spdk_target().with_file_name(name);
    assert!(
        program.is_file(),
        "{} is not there, although spdk_tgt is: SPDK is not installed completely",
        program.display()
    );
    program
}

/// A program that is built but not installed. Without a tree, a plain line says that the test is skipped.
pub fn built(path: &str) -> Option<PathBuf> {
    let tree = env::var_os("BDEV_REPL_SPDK_TREE").map(PathBuf::from);
    let program = tree.as_ref().map(|tree| tree.join(path));
    if let Some(program) = program.filter(|program| program.is_file()) {
        return Some(program);
    }
    let name = Path::new(path).file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let why = match tree {
        None => "BDEV_REPL_SPDK_TREE is not set".into(),
        Some(tree) => format!("there is no {path} in {}", tree.display()),
    };
    // Not by a macro: what those print is only shown of tests that fail.
    let _ = writeln!(io::stderr(), "{test} skipped: no {name}, for {why}");
    None
}

/// A program with these arguments, without the module.
pub fn stock(program: PathBuf, arguments: &[&str]) -> SpdkApplication {
    SpdkApplication {
        arguments: arguments.iter().copied().map(String::from).collect(),
        ..SpdkApplication::new(program)
    }
}

/// The same with the module and the target that it needs: this can be a node.
pub fn with_module(program: PathBuf, arguments: &[&str]) -> SpdkApplication {
    SpdkApplication {
        libraries: vec![NVMF_SUBSYSTEM.into()],
        module: Some(hosts::module()),
        ..stock(program, arguments)
    }
}

/// Runs an application with this configuration to its end and returns what it has printed.
pub fn run_application(
    stage: &Stage,
    application: &SpdkApplication,
    core_mask: &str,
    config: &Value,
) -> String {
    let path = stage.cluster.settings().directory.join("tool.json");
    fs::write(&path, config.to_string()).unwrap();
    let mut command = application.command();
    command.args(["-m", core_mask, "-c"]).arg(path);
    run(stage, &mut command)
}

/// Runs a program to its end and returns what it has printed. It must end well, and in time.
pub fn run(stage: &Stage, command: &mut Command) -> String {
    run_in(&stage.cluster.settings().directory, command)
}

/// The same, with its output in this folder meanwhile.
pub fn run_in(directory: &Path, command: &mut Command) -> String {
    let path = directory.join("tool.log");
    let log = File::create(&path).unwrap();
    command.stdin(std::process::Stdio::null());
    command.stdout(log.try_clone().unwrap()).stderr(log);
    let mut process = command
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break Some(status);
        }
        if started.elapsed() > PATIENCE {
            process.kill().and_then(|()| process.wait()).unwrap();
            break None;
        }
        thread::sleep(LOOK_INTERVAL);
    };
    let output = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
    assert!(
        status.is_some_and(|status| status.success()),
        "{command:?}: {}\n{output}",
        status.map_or("it has not ended in time".into(), |status| status
            .to_string())
    );
    output
}
