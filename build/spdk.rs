//! What the feature `spdk` needs at build time: the installed SPDK, bindings to its headers, flags for the linker and
//! `bdev_repl.pc`. Called by `build.rs`. Each error is one sentence that says what to do.

#[path = "bindings.rs"]
mod bindings;
#[path = "differences.rs"]
mod differences;
#[path = "version.rs"]
mod version;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use pkg_config::{Config, Library};

/// Whose functions the library calls.
const LIBRARIES: &[&str] = &[
    "spdk_bdev",
    "spdk_bdev_nvme",
    "spdk_nvmf",
    "spdk_nvme",
    "spdk_accel",
    "spdk_dma",
    "spdk_keyring",
    "spdk_init",
    "spdk_rpc",
    "spdk_jsonrpc",
    "spdk_json",
    "spdk_trace",
    "spdk_thread",
    "spdk_util",
    "spdk_log",
];

/// What SPDK's libraries stand on and do not name: their environment, which is DPDK, and libraries of the system.
const FOUNDATIONS: &[&str] = &["spdk_env_dpdk", SYSTEM_LIBRARIES];

/// SPDK 25.09 has these for linking with archives only, although its shared libraries do not name them either.
const SYSTEM_LIBRARIES: &str = "spdk_syslibs";

/// What makes the command a complete application: the subsystems of spdk_tgt and, through them, all modules.
const APPLICATION: &[&str] = &["spdk_event", "spdk_event_bdev", "spdk_event_nvmf"];

/// What spdk_tgt has besides, where SPDK was configured with it.
const APPLICATION_OPTIONAL: &[&str] = &[
    "spdk_event_accel",
    "spdk_event_fsdev",
    "spdk_event_iobuf",
    "spdk_event_iscsi",
    "spdk_event_keyring",
    "spdk_event_nbd",
    "spdk_event_scheduler",
    "spdk_event_scsi",
    "spdk_event_sock",
    "spdk_event_ublk",
    "spdk_event_vfu_tgt",
    "spdk_event_vhost_blk",
    "spdk_event_vhost_scsi",
    "spdk_event_vmd",
    "spdk_env_dpdk_rpc",
    "spdk_accel_modules",
    "spdk_bdev_modules",
    "spdk_fsdev_aio",
    "spdk_keyring_modules",
    "spdk_scheduler_modules",
    "spdk_sock_modules",
];

pub fn prepare() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build");
    for name in differences::CFGS {
        println!("cargo::rustc-check-cfg=cfg({name})");
    }
    let libraries = find_libraries()?;
    let headers: Vec<PathBuf> = unique(libraries.iter().flat_map(|found| &found.include_paths));
    check_version(&headers)?;
    let folders: Vec<PathBuf> = unique(libraries.iter().flat_map(|found| &found.link_paths));
    check_shared(&folders)?;

    let out = PathBuf::from(env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?);
    bindings::generate(&headers, &out.join("spdk_bindings.rs"))?;
    link_library(&folders)?;
    link_application()?;
    write_pkg_config(&out)
}

fn find_libraries() -> Result<Vec<Library>, String> {
    LIBRARIES.iter().map(|name| probe(name)).collect()
}

/// Asks pkg-config without printing what it says: which target gets which flag is decided here.
fn probe(name: &str) -> Result<Library, String> {
    Config::new()
        .cargo_metadata(false)
        .env_metadata(true)
        .print_system_libs(true)
        .statik(name == SYSTEM_LIBRARIES)
        .probe(name)
        .map_err(|error| match error {
            pkg_config::Error::Command { cause, .. } => format!(
                "the feature `spdk` needs pkg-config, which could not be run ({cause}): install pkg-config"
            ),
            pkg_config::Error::ProbeFailure { .. } | pkg_config::Error::Failure { .. } => format!(
                "pkg-config does not find {name}: install SPDK {} to {} with shared libraries (./configure \
                 --with-shared) and set PKG_CONFIG_PATH to its lib/pkgconfig, or build without the feature `spdk`",
                version::OLDEST,
                version::NEWEST,
            ),
            other => format!(
                "pkg-config cannot be asked for {name} ({}): see that `pkg-config --libs {name}` works",
                one_line(&other.to_string())
            ),
        })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn unique<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Vec<PathBuf> {
    let mut seen = BTreeSet::new();
    paths
        .filter(|path| seen.insert(path.to_path_buf()))
        .cloned()
        .collect()
}

fn check_version(headers: &[PathBuf]) -> Result<(), String> {
    let path = headers
        .iter()
        .map(|folder| folder.join("spdk/version.h"))
        .find(|path| path.exists())
        .ok_or("SPDK's libraries are there but not its headers (spdk/version.h): install SPDK's development files")?;
    println!("cargo::rerun-if-changed={}", path.display());
    let header = fs::read_to_string(&path)
        .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    version::check(&header).map_err(|message| format!("{message} (told by {})", path.display()))
}

/// An installation of SPDK that was not configured with shared libraries has archives only.
fn check_shared(folders: &[PathBuf]) -> Result<(), String> {
    for name in LIBRARIES.iter().chain(APPLICATION) {
        let file = format!("lib{name}.so");
        if !folders.iter().any(|folder| folder.join(&file).exists()) {
            return Err(format!(
                "{file} is missing where pkg-config says that SPDK's libraries are: build SPDK with shared libraries \
                 (./configure --with-shared) and install it again"
            ));
        }
    }
    Ok(())
}

/// For every target. Of SPDK's libraries only those whose symbols are used become a dependency, so that the preloaded
/// library brings no subsystem into an application that has not got it.
fn link_library(folders: &[PathBuf]) -> Result<(), String> {
    for folder in folders {
        println!("cargo::rustc-link-search=native={}", folder.display());
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", folder.display());
    }
    for name in LIBRARIES.iter().chain(APPLICATION) {
        println!("cargo::rustc-link-lib=dylib={name}");
    }

    let mut names = Vec::new();
    for name in FOUNDATIONS {
        names.extend(shared_libraries(&probe(name)?));
    }
    link_whole("rustc-link-arg", &names);
    Ok(())
}

/// For the command alone: everything that spdk_tgt has.
fn link_application() -> Result<(), String> {
    let mut names = Vec::new();
    for name in APPLICATION {
        names.extend(shared_libraries(&probe(name)?));
    }
    for name in APPLICATION_OPTIONAL {
        if let Ok(library) = probe(name) {
            names.extend(shared_libraries(&library));
        }
    }
    link_whole("rustc-link-arg-bins", &names);
    Ok(())
}

/// The libraries of a package that are not archives: a second copy of DPDK in the process would be fatal.
fn shared_libraries(library: &Library) -> Vec<String> {
    let is_archive = |name: &str| {
        let exists = |file: String| {
            library
                .link_paths
                .iter()
                .any(|folder| folder.join(&file).exists())
        };
        exists(format!("lib{name}.a")) && !exists(format!("lib{name}.so"))
    };
    library
        .libs
        .iter()
        .filter(|name| !is_archive(name))
        .cloned()
        .collect()
}

/// Links libraries that nothing refers to: subsystems, modules and DPDK's drivers register themselves when they are
/// loaded, and the linker would leave them out.
fn link_whole(instruction: &str, names: &[String]) {
    println!("cargo::{instruction}=-Wl,--no-as-needed");
    let mut seen = BTreeSet::new();
    for name in names.iter().filter(|name| seen.insert(name.as_str())) {
        println!("cargo::{instruction}=-l{name}");
    }
    println!("cargo::{instruction}=-Wl,--as-needed");
}

/// `bdev_repl.pc`, beside `libbdev_repl.a`: for an application that links the module into itself.
fn write_pkg_config(out: &Path) -> Result<(), String> {
    // target/PROFILE/build/bdev_repl-HASH/out
    let folder = out.ancestors().nth(3).ok_or_else(|| {
        format!(
            "{} is not where Cargo puts the output of a build script",
            out.display()
        )
    })?;
    let path = folder.join("bdev_repl.pc");
    let text = format!(
        "libdir=${{pcfiledir}}\n\
         \n\
         Name: bdev_repl\n\
         Description: Replicating bdev module for SPDK\n\
         Version: {}\n\
         Requires: {} {}\n\
         Libs: -L${{libdir}} -Wl,-u,bdev_repl_register -l:libbdev_repl.a -lgcc_s -lpthread -lm -ldl -lc\n",
        env::var("CARGO_PKG_VERSION").unwrap_or_default(),
        LIBRARIES.join(" "),
        FOUNDATIONS.join(" "),
    );
    fs::write(&path, text).map_err(|error| format!("{} cannot be written: {error}", path.display()))
}
