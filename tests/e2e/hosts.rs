//! Which host each node runs on, from the environment: BDEV_REPL_HOSTS="embedded,spdk" puts node A on the embedded
//! host and node B on SPDK. Used by the stage; says what is missing before anything is started.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bdev_repl::cli::demo::launcher::{Launcher, SpdkApplication};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    Embedded,
    Spdk,
}

/// Node A's host, a comma, node B's host.
fn parse(text: &str) -> Result<[Host; 2], String> {
    let named = |name: &str| match name.trim() {
        "embedded" => Ok(Host::Embedded),
        "spdk" => Ok(Host::Spdk),
        other => Err(format!(
            "BDEV_REPL_HOSTS={text}: '{other}' is no host; there are embedded and spdk"
        )),
    };
    match text.split(',').collect::<Vec<_>>()[..] {
        [a, b] => Ok([named(a)?, named(b)?]),
        _ => Err(format!(
            "BDEV_REPL_HOSTS={text}: give the hosts of node A and node B, as in embedded,spdk"
        )),
    }
}

/// A program by its path, or by its name in one of these folders.
fn find(program: &Path, folders: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let mut all = folders.into_iter().map(|folder| folder.join(program));
    all.find(|path| path.is_file())
}

/// `spdk_tgt`: BDEV_REPL_SPDK_TGT, else the one on PATH.
pub fn spdk_target() -> PathBuf {
    let named = env::var_os("BDEV_REPL_SPDK_TGT").map_or_else(|| "spdk_tgt".into(), PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    find(&named, env::split_paths(&path)).unwrap_or_else(|| {
        panic!(
            "{} is not there: install SPDK, or name its spdk_tgt in BDEV_REPL_SPDK_TGT",
            named.display()
        )
    })
}

/// `libbdev_repl.so`: BDEV_REPL_MODULE, else the one that was built along with this test.
pub fn module() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_bdev-repl")).with_file_name("libbdev_repl.so");
    let module = env::var_os("BDEV_REPL_MODULE").map_or(built, PathBuf::from);
    assert!(
        module.is_file(),
        "{} is not there: cargo build --features spdk makes it, or name it in BDEV_REPL_MODULE",
        module.display()
    );
    module
}

/// The embedded host.
pub fn embedded() -> Launcher {
    Launcher::Embedded {
        executable: env!("CARGO_BIN_EXE_bdev-repl").into(),
    }
}

fn launcher(host: Host) -> Launcher {
    match host {
        Host::Embedded => embedded(),
        Host::Spdk => Launcher::Spdk(SpdkApplication {
            module: Some(module()),
            ..SpdkApplication::new(spdk_target())
        }),
    }
}

/// The hosts of node A and node B. A wrong environment is a panic that says what is wrong.
pub fn launchers() -> [Launcher; 2] {
    let text = env::var("BDEV_REPL_HOSTS").unwrap_or_else(|_| "embedded,embedded".into());
    parse(&text)
        .unwrap_or_else(|error| panic!("{error}"))
        .map(launcher)
}

/// Where a node takes its cores whole, what runs nodes does so one at a time: hold this meanwhile.
pub fn turn(launchers: &[Launcher; 2]) -> Option<MutexGuard<'static, ()>> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let wanted = launchers.iter().any(Launcher::takes_cores_whole);
    // Only a test that has failed leaves it poisoned; the others go on.
    wanted.then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn the_hosts_of_both_nodes_are_named_or_it_is_said_what_is_wrong() {
    use Host::{Embedded, Spdk};
    assert_eq!(parse("embedded,embedded"), Ok([Embedded, Embedded]));
    assert_eq!(parse("embedded, spdk"), Ok([Embedded, Spdk]));
    assert_eq!(parse("spdk,embedded"), Ok([Spdk, Embedded]));
    for (text, part) in [
        ("", "node A and node B"),
        ("spdk", "node A and node B"),
        ("spdk,spdk,spdk", "node A and node B"),
        ("spdk,SPDK", "'SPDK' is no host"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn a_program_is_found_by_its_path_or_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spdk_tgt");
    let folders = || [PathBuf::from("/nonexistent"), folder.path().to_owned()];
    assert_eq!(find(Path::new("spdk_tgt"), folders()), None);
    std::fs::write(&path, "").unwrap();
    assert_eq!(find(Path::new("spdk_tgt"), folders()), Some(path.clone()));
    assert_eq!(find(&path, []), Some(path.clone()));
    assert_eq!(find(&path.join("none"), folders()), None);
}
