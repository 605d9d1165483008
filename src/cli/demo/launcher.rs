//! What a node is a process of: the program, how it is started, and what it leaves behind when it is killed.
//! Used by nodes and by whoever sets a cluster up. Knows no RPC and no volume.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The host of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `bdev-repl tgt`.
    Embedded {
        /// This program.
        executable: PathBuf,
    },
    /// A stock `spdk_tgt` with the module preloaded. It takes its cores whole.
    Spdk {
        /// `spdk_tgt`, a path or a name to be found on PATH.
        target: PathBuf,
        /// `libbdev_repl.so`, or nothing: then it is a target without volumes.
        module: Option<PathBuf>,
        /// Memory of DPDK, which is not taken from huge pages.
        memory_mb: u32,
    },
}

impl Launcher {
    /// The program to run.
    pub fn program(&self) -> &Path {
        match self {
            Launcher::Embedded { executable } => executable,
            Launcher::Spdk { target, .. } => target,
        }
    }

    /// Whether it runs its cores at full speed even when there is nothing to do, so that nobody else gets far there.
    pub fn takes_cores_whole(&self) -> bool {
        matches!(self, Launcher::Spdk { .. })
    }

    /// The process, ready to be spawned.
    pub fn command(&self, core_mask: &str, rpc_socket: &Path, config: &Path) -> Command {
        let mut command = Command::new(self.program());
        match self {
            Launcher::Embedded { .. } => {
                command.arg("tgt");
            }
            Launcher::Spdk {
                module, memory_mb, ..
            } => {
                if let Some(module) = module {
                    command.env("LD_PRELOAD", preloaded(module));
                }
                command.args(["--no-huge", "--no-pci", "--disable-cpumask-locks"]);
                // A core dump is as large as the memory.
                command.args(["--limit-coredump", "-s", &memory_mb.to_string()]);
            }
        }
        command.args(["-m", core_mask, "-r"]).arg(rpc_socket);
        command.arg("-c").arg(config);
        command
    }

    /// Removes what a process that was killed could not remove itself.
    pub fn sweep(&self, pid: u32) {
        if let Launcher::Spdk { target, .. } = self {
            let name = target.file_name().unwrap_or_default().to_string_lossy();
            // Whatever is not there need not be removed.
            let _ = fs::remove_file(format!("/dev/shm/{name}_trace.pid{pid}"));
            let _ = fs::remove_dir_all(format!("/var/run/dpdk/spdk_pid{pid}"));
        }
    }
}

/// The module behind whatever is preloaded already: a sanitizer insists on being the first.
fn preloaded(module: &Path) -> OsString {
    match env::var_os("LD_PRELOAD").filter(|before| !before.is_empty()) {
        Some(mut before) => {
            before.push(":");
            before.push(module);
            before
        }
        None => module.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(command: &Command) -> Vec<String> {
        let all = command.get_args();
        all.map(|one| one.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn both_hosts_take_cores_socket_and_configuration_by_the_same_flags() {
        let common = ["-m", "0x2", "-r", "/x/a.sock", "-c", "/x/a.json"];
        let embedded = Launcher::Embedded {
            executable: "/bin/bdev-repl".into(),
        };
        let spdk = Launcher::Spdk {
            target: "spdk_tgt".into(),
            module: Some("/lib/libbdev_repl.so".into()),
            memory_mb: 768,
        };
        for (launcher, program) in [(&embedded, "/bin/bdev-repl"), (&spdk, "spdk_tgt")] {
            let command = launcher.command("0x2", Path::new("/x/a.sock"), Path::new("/x/a.json"));
            assert_eq!(command.get_program(), program);
            assert!(arguments(&command).ends_with(&common.map(String::from)));
        }
    }

    #[test]
    fn the_module_is_preloaded_into_a_target_that_needs_no_huge_pages() {
        let with = |module: Option<PathBuf>| {
            let launcher = Launcher::Spdk {
                target: "spdk_tgt".into(),
                module,
                memory_mb: 768,
            };
            launcher.command("0x1", Path::new("/x/a.sock"), Path::new("/x/a.json"))
        };
        let command = with(Some("/lib/libbdev_repl.so".into()));
        let preload = command.get_envs().find(|(name, _)| *name == "LD_PRELOAD");
        let value = preload.and_then(|(_, value)| value).unwrap();
        assert!(value.to_string_lossy().ends_with("/lib/libbdev_repl.so"));
        let all = arguments(&command);
        assert!(all.contains(&"--no-huge".into()));
        assert!(all.windows(2).any(|pair| pair == ["-s", "768"]));
        assert_eq!(with(None).get_envs().count(), 0);
    }
}
