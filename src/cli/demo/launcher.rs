//! What a node is a process of: the program, how it is started, and what it leaves behind when it is killed.
//! Used by nodes and by whoever sets a cluster up. Knows no RPC and no volume.

use std::env;
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
    /// SPDK. It takes its cores whole.
    Spdk(SpdkApplication),
}

/// A stock application of SPDK, `spdk_tgt` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpdkApplication {
    /// A path, or a name to be found on PATH.
    pub program: PathBuf,
    /// Libraries of SPDK that are preloaded: subsystems that the application is not linked with.
    pub libraries: Vec<PathBuf>,
    /// `libbdev_repl.so`, preloaded; without it there are no volumes.
    pub module: Option<PathBuf>,
    /// The application's own arguments.
    pub arguments: Vec<String>,
    /// Memory of DPDK, which is not taken from huge pages.
    pub memory_mb: u32,
}

impl SpdkApplication {
    /// 512 are too few for a target with an NVMe-oF transport.
    const MEMORY_MB: u32 = 1024;

    /// Without module, libraries and arguments of its own.
    pub fn new(program: impl Into<PathBuf>) -> SpdkApplication {
        SpdkApplication {
            program: program.into(),
            libraries: Vec::new(),
            module: None,
            arguments: Vec::new(),
            memory_mb: SpdkApplication::MEMORY_MB,
        }
    }

    /// The process with what is preloaded and with what makes any application of SPDK run on any machine.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        // A sanitizer, which may be there already, insists on being the first.
        let mut preloaded = env::var_os("LD_PRELOAD").unwrap_or_default();
        for library in self.libraries.iter().chain(&self.module) {
            if !preloaded.is_empty() {
                preloaded.push(":");
            }
            preloaded.push(library);
        }
        if !preloaded.is_empty() {
            command.env("LD_PRELOAD", preloaded);
        }
        command.args(["--no-huge", "--no-pci", "--disable-cpumask-locks"]);
        // A core dump is as large as the memory.
        command.args(["--limit-coredump", "-s", &self.memory_mb.to_string()]);
        command.args(&self.arguments);
        command
    }
}

impl Launcher {
    /// The program to run.
    pub fn program(&self) -> &Path {
        match self {
            Launcher::Embedded { executable } => executable,
            Launcher::Spdk(application) => &application.program,
        }
    }

    /// `libbdev_repl.so`, where the host is a program that has to be given it.
    pub fn module(&self) -> Option<&Path> {
        match self {
            Launcher::Embedded { .. } => None,
            Launcher::Spdk(application) => application.module.as_deref(),
        }
    }

    /// Whether it runs its cores at full speed even when there is nothing to do, so that nobody else gets far there.
    pub fn takes_cores_whole(&self) -> bool {
        matches!(self, Launcher::Spdk(_))
    }

    /// The process, ready to be spawned.
    pub fn command(&self, core_mask: &str, rpc_socket: &Path, config: &Path) -> Command {
        let mut command = match self {
            Launcher::Embedded { executable } => {
                let mut command = Command::new(executable);
                command.arg("tgt");
                command
            }
            Launcher::Spdk(application) => application.command(),
        };
        command.args(["-m", core_mask, "-r"]).arg(rpc_socket);
        command.arg("-c").arg(config);
        command
    }

    /// Removes what a process that was killed could not remove itself.
    pub fn sweep(&self, pid: u32) {
        if let Launcher::Spdk(SpdkApplication { program, .. }) = self {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            // Whatever is not there need not be removed.
            let _ = fs::remove_file(format!("/dev/shm/{name}_trace.pid{pid}"));
            let _ = fs::remove_dir_all(format!("/var/run/dpdk/spdk_pid{pid}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(command: &Command) -> Vec<String> {
        let all = command.get_args();
        all.map(|one| one.to_string_lossy().into_owned()).collect()
    }

    fn target(module: Option<&str>) -> SpdkApplication {
        SpdkApplication {
            module: module.map(PathBuf::from),
            arguments: vec!["-z".into()],
            ..SpdkApplication::new("spdk_tgt")
        }
    }

    #[test]
    fn both_hosts_take_cores_socket_and_configuration_by_the_same_flags() {
        let common = ["-m", "0x2", "-r", "/x/a.sock", "-c", "/x/a.json"];
        let embedded = Launcher::Embedded {
            executable: "/bin/bdev-repl".into(),
        };
        let spdk = Launcher::Spdk(target(Some("/lib/libbdev_repl.so")));
        for (launcher, program) in [(&embedded, "/bin/bdev-repl"), (&spdk, "spdk_tgt")] {
            let command = launcher.command("0x2", Path::new("/x/a.sock"), Path::new("/x/a.json"));
            assert_eq!(command.get_program(), program);
            assert!(arguments(&command).ends_with(&common.map(String::from)));
        }
    }

    #[test]
    fn libraries_and_then_the_module_are_preloaded_into_an_application_without_huge_pages() {
        let application = SpdkApplication {
            libraries: vec!["libspdk_event_nvmf.so".into()],
            ..target(Some("/lib/libbdev_repl.so"))
        };
        let command = application.command();
        let preload = command.get_envs().find(|(name, _)| *name == "LD_PRELOAD");
        let value = preload.and_then(|(_, value)| value).unwrap();
        let value = value.to_string_lossy();
        assert!(value.ends_with("libspdk_event_nvmf.so:/lib/libbdev_repl.so"));
        let all = arguments(&command);
        assert!(all.contains(&"--no-huge".into()) && all.contains(&"-z".into()));
        assert!(all.windows(2).any(|pair| pair == ["-s", "1024"]));
        assert_eq!(target(None).command().get_envs().count(), 0);
    }
}
