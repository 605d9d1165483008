//! Two nodes and the cable between them: how they are set up, paired, asked and waited for.
//! Used by the demo and the end-to-end tests. Talks to nodes by RPC only.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::DemoError;
use super::launcher::Launcher;
use super::link::Link;
use super::node::{LOOK_INTERVAL, Node, NodeSettings};
use crate::rpc::volume::{PeerReport, VolumeReport};

/// The two nodes' configurations, as they come with the project.
const CONFIGS: [&str; 2] = [
    include_str!("../../../spdk-config/node-a.json"),
    include_str!("../../../spdk-config/node-b.json"),
];
const LABELS: [char; 2] = ['A', 'B'];
/// The bdev that the configurations make.
pub const BASE_BDEV: &str = "disk0";
/// The subsystem that the configurations make, for the volume to be exported.
pub const SUBSYSTEM_NQN: &str = "nqn.2025-01.io.bdev-repl:repl0";
/// Name of the volume.
pub const VOLUME: &str = "repl0";
/// Longest path of a Unix socket, with its terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 108;

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    /// The host of each node.
    pub launchers: [Launcher; 2],
    /// Where files go. It must exist.
    pub directory: PathBuf,
    /// A loopback address for each node.
    pub addresses: [IpAddr; 2],
    /// The cable's loopback address.
    pub link_address: IpAddr,
    /// Size of each backing file.
    pub device_bytes: u64,
    /// Reactors of each node.
    pub core_masks: [String; 2],
    /// More parameters of `bdev_repl_create`, the same on both nodes.
    pub create: Value,
}

/// Two nodes, of which each reaches the other only through the link.
#[derive(Debug)]
pub struct Cluster {
    /// Node A and node B.
    pub nodes: [Node; 2],
    /// The cable.
    pub link: Link,
    settings: ClusterSettings,
}

/// A port that was free a moment ago.
fn free_port(address: IpAddr) -> Result<SocketAddr, DemoError> {
    TcpListener::bind((address, 0))
        .and_then(|listener| listener.local_addr())
        .map_err(|error| {
            DemoError::io(
                "find a free port of",
                Path::new(&address.to_string()),
                error,
            )
        })
}

/// Puts a node's files and addresses into its configuration.
fn configure(template: &str, backing: &Path, export: SocketAddr) -> Result<Value, String> {
    let mut config: Value = serde_json::from_str(template).map_err(|error| error.to_string())?;
    let subsystems = config["subsystems"].as_array_mut();
    for subsystem in subsystems.into_iter().flatten() {
        for call in subsystem["config"].as_array_mut().into_iter().flatten() {
            let method = call["method"].as_str().unwrap_or_default().to_owned();
            let params = &mut call["params"];
            match method.as_str() {
                "bdev_aio_create" => params["filename"] = json!(backing),
                "nvmf_subsystem_add_listener" => {
                    params["listen_address"]["traddr"] = json!(export.ip().to_string());
                    params["listen_address"]["trsvcid"] = json!(export.port().to_string());
                }
                _ => {}
            }
        }
    }
    Ok(config)
}

impl Cluster {
    /// Makes backing files, configurations and the link. Starts no node.
    pub fn new(settings: ClusterSettings) -> Result<Cluster, DemoError> {
        let mut nodes = Vec::new();
        for (index, template) in CONFIGS.iter().enumerate() {
            let label = LABELS[index];
            let named = |name: &str| {
                settings
                    .directory
                    .join(format!("{}.{name}", label.to_ascii_lowercase()))
            };
            let (backing, path) = (named("img"), named("json"));
            let export = free_port(settings.addresses[index])?;
            File::create_new(&backing)
                .and_then(|file| file.set_len(settings.device_bytes))
                .map_err(|error| DemoError::io("create", &backing, error))?;
            let config = configure(template, &backing, export)
                .map_err(|text| DemoError::Answer { node: label, text })?;
            fs::write(&path, format!("{config:#}"))
                .map_err(|error| DemoError::io("write", &path, error))?;
            let mut rpc_socket = named("sock");
            if rpc_socket.as_os_str().len() >= SOCKET_PATH_BYTES_MAX {
                let name = format!("bdev-repl-{}-{label}.sock", std::process::id());
                rpc_socket = Path::new("/tmp").join(name);
            }
            nodes.push(Node::new(NodeSettings {
                label,
                node_id: index as u8,
                launcher: settings.launchers[index].clone(),
                core_mask: settings.core_masks[index].clone(),
                rpc_socket,
                config: path,
                log: named("log"),
                backing,
                export,
                endpoint: free_port(settings.addresses[index])?,
            }));
        }
        let endpoints: Vec<SocketAddr> =
            nodes.iter().map(|node| node.settings().endpoint).collect();
        let link = Link::new(settings.link_address, &endpoints).map_err(|error| {
            let address = settings.link_address.to_string();
            DemoError::io("listen on", Path::new(&address), error)
        })?;
        let Ok(nodes) = <[Node; 2]>::try_from(nodes) else {
            unreachable!("there are two configurations");
        };
        Ok(Cluster {
            nodes,
            link,
            settings,
        })
    }

    /// What it is made of.
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// Parameters of `bdev_repl_create`, with some that only this call has.
    pub fn create_parameters(&self, index: usize, more: &Value) -> Value {
        let NodeSettings {
            endpoint, export, ..
        } = self.nodes[index].settings();
        let mut params = json!({
            "name": VOLUME,
            "base_bdev": BASE_BDEV,
            "node_id": index,
            "listen_address": {
                "trtype": "TCP",
                "adrfam": "IPv4",
                "traddr": endpoint.ip().to_string(),
                "trsvcid": endpoint.port().to_string(),
            },
            "ana_listeners": [{
                "nqn": SUBSYSTEM_NQN,
                "traddr": export.ip().to_string(),
                "trsvcid": export.port().to_string(),
            }],
        });
        for extra in [&self.settings.create, more] {
            for (name, value) in extra.as_object().into_iter().flatten() {
                params[name] = value.clone();
            }
        }
        params
    }

    /// Parameters of `bdev_repl_add_peer`: the other node, through the cable.
    pub fn peer_parameters(&self, index: usize) -> Value {
        let peer = 1 - index;
        let address = self.link.address(peer);
        json!({
            "name": VOLUME,
            "node_id": peer,
            "traddr": address.ip().to_string(),
            "trsvcid": address.port().to_string(),
        })
    }

    /// `bdev_repl_create`, with parameters that only this call has.
    pub fn create(&mut self, index: usize, more: &Value) -> Result<(), DemoError> {
        let params = self.create_parameters(index, more);
        self.nodes[index]
            .call("bdev_repl_create", params)
            .map(|_| ())
    }

    /// `bdev_repl_add_peer`: the other node, through the cable.
    pub fn add_peer(&mut self, index: usize) -> Result<(), DemoError> {
        let params = self.peer_parameters(index);
        self.nodes[index]
            .call("bdev_repl_add_peer", params)
            .map(|_| ())
    }

    /// Exports the volume through NVMe/TCP.
    pub fn export(&mut self, index: usize) -> Result<(), DemoError> {
        let params = json!({"nqn": SUBSYSTEM_NQN, "namespace": {"bdev_name": VOLUME, "nsid": 1}});
        self.nodes[index]
            .call("nvmf_subsystem_add_ns", params)
            .map(|_| ())
    }

    /// Starts a node and gives it its volume: a new one, or the one whose metadata is there.
    pub fn start(&mut self, index: usize, create: &Value) -> Result<(), DemoError> {
        self.nodes[index].start()?;
        self.create(index, create)?;
        self.add_peer(index)?;
        self.export(index)
    }

    /// Calls one of our methods that takes nothing but the volume's name.
    pub fn call(&mut self, index: usize, method: &str) -> Result<Value, DemoError> {
        self.nodes[index].call(method, json!({"name": VOLUME}))
    }

    /// What the node says of the volume.
    pub fn report(&mut self, index: usize) -> Result<VolumeReport, DemoError> {
        let answer = self.call(index, "bdev_repl_get_volumes")?;
        let node = LABELS[index];
        let mut reports: Vec<VolumeReport> =
            serde_json::from_value(answer).map_err(|error| DemoError::Answer {
                node,
                text: format!("bdev_repl_get_volumes: {error}"),
            })?;
        reports.pop().ok_or_else(|| DemoError::Answer {
            node,
            text: "bdev_repl_get_volumes names no volume".into(),
        })
    }

    /// Looks at the volume again and again until `done`.
    pub fn wait_until(
        &mut self,
        index: usize,
        what: &str,
        patience: Duration,
        mut done: impl FnMut(&VolumeReport) -> bool,
    ) -> Result<VolumeReport, DemoError> {
        let started = Instant::now();
        loop {
            let report = self.report(index)?;
            if done(&report) {
                return Ok(report);
            }
            if started.elapsed() > patience {
                return Err(DemoError::Timeout {
                    what: format!("node {}: {what}", LABELS[index]),
                    waited_s: patience.as_secs(),
                    last_seen: self.states(),
                });
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Waits until both nodes are connected, UpToDate and know of nothing that differs.
    pub fn wait_until_in_sync(&mut self, patience: Duration) -> Result<(), DemoError> {
        for index in [0, 1] {
            self.wait_until(index, "both replicas are in sync", patience, in_sync)?;
        }
        Ok(())
    }

    /// A line on what every node says.
    pub fn states(&mut self) -> String {
        let mut all = Vec::new();
        for index in [0, 1] {
            if self.nodes[index].pid().is_none() {
                all.push(format!("{}: not running", LABELS[index]));
                continue;
            }
            all.push(match self.report(index) {
                Ok(report) => format!("{}: {}", LABELS[index], state_line(&report)),
                Err(error) => format!("{}: {error}", LABELS[index]),
            });
        }
        all.join(" | ")
    }
}

/// The volume's only peer.
pub fn peer(report: &VolumeReport) -> Option<&PeerReport> {
    report.peers.first()
}

/// Connected, both sides UpToDate, nothing out of sync.
pub fn in_sync(report: &VolumeReport) -> bool {
    report.disk == "UpToDate"
        && peer(report).is_some_and(|peer| {
            peer.connection == "Connected" && peer.disk == "UpToDate" && peer.out_of_sync_bytes == 0
        })
}

/// Role, disk, connection: one line.
pub fn state_line(report: &VolumeReport) -> String {
    let mut line = format!("{} {}", report.role, report.disk);
    if let Some(peer) = peer(report) {
        line.push_str(&format!(", {}", peer.connection));
        if peer.out_of_sync_bytes > 0 {
            let bytes = super::story::size(peer.out_of_sync_bytes);
            line.push_str(&format!(", {bytes} out of sync"));
        }
        if let Some(error) = &peer.last_error {
            line.push_str(&format!(" ({error})"));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configurations_that_come_with_the_project_take_files_and_addresses() {
        for template in CONFIGS {
            let export: SocketAddr = "127.9.8.7:654".parse().unwrap();
            let config = configure(template, Path::new("/x/y.img"), export).unwrap();
            let text = config.to_string();
            for part in ["/x/y.img", "127.9.8.7", "654", BASE_BDEV, SUBSYSTEM_NQN] {
                assert!(text.contains(part), "{part} in {text}");
            }
            assert!(!text.contains("/var/tmp") && !text.contains("4420"));
        }
    }
}
