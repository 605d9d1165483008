//! One node: a process of either host with its configuration, its backing file and its RPC socket.
//! Used by the cluster. Knows how a process is started, asked, stopped and killed, not what volumes do.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::DemoError;
use super::launcher::Launcher;
use crate::rpc::client::{Client, ClientError};

/// How long a node may take to start, to answer and to end. Generous: a test machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether something has happened.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(10);
const LOG_LINES_SHOWN: usize = 20;

/// What a node is made of.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// A, B, …: its name in messages.
    pub label: char,
    /// 0 to 7.
    pub node_id: u8,
    /// The host that it runs on.
    pub launcher: Launcher,
    /// Reactors.
    pub core_mask: String,
    /// RPC socket.
    pub rpc_socket: PathBuf,
    /// Configuration file.
    pub config: PathBuf,
    /// Where its output goes.
    pub log: PathBuf,
    /// The file below the volume.
    pub backing: PathBuf,
    /// Where the volume is exported.
    pub export: SocketAddr,
    /// Where the peer endpoint listens.
    pub endpoint: SocketAddr,
}

/// A node, running or not. Dropped, its process is killed.
#[derive(Debug)]
pub struct Node {
    settings: NodeSettings,
    process: Option<Child>,
    client: Option<Client>,
}

impl Node {
    /// A node that has not been started.
    pub fn new(settings: NodeSettings) -> Node {
        Node {
            settings,
            process: None,
            client: None,
        }
    }

    /// What it is made of.
    pub fn settings(&self) -> &NodeSettings {
        &self.settings
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// Starts the process and waits until it answers: its configuration is loaded then.
    pub fn start(&mut self) -> Result<(), DemoError> {
        let settings = &self.settings;
        let log = File::options()
            .create(true)
            .append(true)
            .open(&settings.log)
            .map_err(|error| DemoError::io("open", &settings.log, error))?;
        let twice = log
            .try_clone()
            .map_err(|error| DemoError::io("open", &settings.log, error))?;
        // The socket of a process that was killed is still there.
        match fs::remove_file(&settings.rpc_socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(DemoError::io("remove", &settings.rpc_socket, error));
            }
            _ => {}
        }
        let process = settings
            .launcher
            .command(&settings.core_mask, &settings.rpc_socket, &settings.config)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(twice)
            .spawn()
            .map_err(|error| DemoError::io("start", settings.launcher.program(), error))?;
        self.process = Some(process);
        self.client = None;
        let started = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                self.process = None;
                return Err(self.report_end(status));
            }
            match self.call("spdk_get_version", Value::Null) {
                Ok(_) => return self.look_for_the_module(),
                // Nobody listens yet, or nobody does any more: the process ends. The next look says which.
                Err(DemoError::Rpc {
                    source: ClientError::Connect { .. } | ClientError::Io { .. },
                    ..
                }) if started.elapsed() < PATIENCE => thread::sleep(LOOK_INTERVAL),
                Err(error) => return Err(error),
            }
        }
    }

    /// A library that cannot be preloaded is left out by the dynamic linker with no more than a line of output.
    fn look_for_the_module(&mut self) -> Result<(), DemoError> {
        let Some(module) = self.settings.launcher.module().map(Path::to_owned) else {
            return Ok(());
        };
        let methods = self.call("rpc_get_methods", Value::Null)?;
        let methods = methods.as_array().map_or(&[][..], Vec::as_slice);
        if methods.contains(&json!("bdev_repl_create")) {
            return Ok(());
        }
        Err(DemoError::Answer {
            node: self.settings.label,
            text: format!(
                "it runs without bdev_repl_create: is {} a module for this SPDK, built with the feature spdk? \
                 The end of its log:\n{}",
                module.display(),
                end_of(&self.settings.log)
            ),
        })
    }

    /// Calls a method and waits for its answer.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, DemoError> {
        let node = self.settings.label;
        let rpc = |source| DemoError::Rpc { node, source };
        if self.client.is_none() {
            self.client = Some(Client::connect(&self.settings.rpc_socket, PATIENCE).map_err(rpc)?);
        }
        let Some(client) = self.client.as_mut() else {
            unreachable!("connected above");
        };
        let answer = client.call(method, params);
        if matches!(answer, Err(ref error) if error.code().is_none()) {
            // The connection is of no use any more.
            self.client = None;
            if let Some(status) = self.ended()? {
                return Err(self.report_end(status));
            }
        }
        answer.map_err(rpc)
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) -> Result<(), DemoError> {
        self.client = None;
        if let Some(mut process) = self.process.take() {
            let launcher = &self.settings.launcher;
            // Reaped, its requests to the kernel's AIO have ended and its files are closed. What an io_uring still
            // holds, the next process of the embedded host waits for: it locks its backing file.
            process
                .kill()
                .and_then(|()| process.wait())
                .map_err(|error| DemoError::io("kill", launcher.program(), error))?;
            launcher.sweep(process.id());
        }
        Ok(())
    }

    /// SIGTERM (the node sends it to itself), and waits until it has ended with exit code 0.
    pub fn stop(&mut self) -> Result<(), DemoError> {
        // The answer is lost where the node is faster.
        let called = self.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"}));
        self.client = None;
        if self.process.is_none() {
            return called.map(|_| ());
        }
        self.wait_for_end()
    }

    /// Waits until the process has ended with exit code 0.
    pub fn wait_for_end(&mut self) -> Result<(), DemoError> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(status) = self.ended()? {
                self.process = None;
                if status.success() {
                    return Ok(());
                }
                return Err(self.report_end(status));
            }
            thread::sleep(LOOK_INTERVAL);
        }
        Err(DemoError::Timeout {
            what: format!("node {} has ended", self.settings.label),
            waited_s: PATIENCE.as_secs(),
            last_seen: format!(
                "it is running; the end of its log:\n{}",
                end_of(&self.settings.log)
            ),
        })
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>, DemoError> {
        match self.process.as_mut() {
            None => Ok(None),
            Some(process) => process.try_wait().map_err(|error| {
                DemoError::io("wait for", self.settings.launcher.program(), error)
            }),
        }
    }

    fn report_end(&self, status: ExitStatus) -> DemoError {
        DemoError::NodeEnded {
            node: self.settings.label,
            status: status.to_string(),
            log: self.settings.log.clone(),
            end_of_log: end_of(&self.settings.log),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = self.kill();
    }
}

fn end_of(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_ends_instead_of_answering_is_told_with_the_end_of_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut node = Node::new(NodeSettings {
            label: 'A',
            node_id: 0,
            // A shell takes "tgt" for a script that is not there.
            launcher: Launcher::Embedded {
                executable: "/bin/sh".into(),
            },
            core_mask: "0x1".into(),
            rpc_socket: path("sock"),
            config: path("json"),
            log: path("log"),
            backing: path("img"),
            export: ([127, 0, 0, 1], 1).into(),
            endpoint: ([127, 0, 0, 1], 2).into(),
        });
        let error = node.start().unwrap_err();
        assert!(matches!(error, DemoError::NodeEnded { .. }), "{error}");
        assert!(error.to_string().contains("tgt"), "{error}");
        assert_eq!(node.pid(), None);
    }
}
