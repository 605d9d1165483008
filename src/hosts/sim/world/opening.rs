//! Nodes are made and started: on an empty device, after their end, or with their disk given back. Tests and the campaign's
//! operator ask for it.

use std::sync::Arc;

use super::disk_faults::DiskFaults;
use super::{Config, MANAGER, OPENER, SECOND, VOLUME, World};
use crate::engine::channel::Channel;
use crate::engine::manager::{Manager, Options};
use crate::engine::meta::format::{Content, FormatParams};
use crate::engine::meta::layout::{LayoutParams, Placement};
use crate::engine::open::{Goal, OpenError, Opened, Opener};
use crate::engine::peer::state::DiskState;
use crate::engine::volume::{Shared, VolumeGeometry};
use crate::hosts::sim::disk::Disk;
use crate::hosts::sim::node::Engine;

impl World {
    fn granularity_log2(&self, node: usize) -> u8 {
        let all = &self.config.granularity_log2;
        *all.get(node).or(all.last()).unwrap_or(&12)
    }

    pub(super) fn in_capsule_bytes(&self, node: usize) -> u32 {
        let all = &self.config.in_capsule_bytes;
        *all.get(node).or(all.last()).unwrap_or(&4096)
    }

    /// The device of a node that is down is another one from now on, with nothing on it.
    pub fn replace_disk(&mut self, node: usize) {
        assert!(!self.nodes[node].running, "node {node} uses its disk");
        self.note(node, || "its device is replaced".to_owned());
        let size_bytes = self.nodes[node].disk.size_bytes();
        let Config {
            block_size,
            volatile_caches,
            ..
        } = self.config;
        self.nodes[node].disk = Disk::new(size_bytes, block_size, volatile_caches);
        self.nodes[node].disk_faults = DiskFaults::default();
    }

    fn format_params(&self, node: usize, content: Content) -> FormatParams {
        FormatParams {
            name: VOLUME.to_owned(),
            volume_uuid: None,
            node_id: node as u8,
            backing_uuid: [0; 16],
            layout: self.layout_params(node),
            al_extents: self.config.al_extents,
            content,
        }
    }

    pub(super) fn layout_params(&self, node: usize) -> LayoutParams {
        LayoutParams {
            device_size_bytes: self.nodes[node].disk.size_bytes(),
            block_size_bytes: self.config.block_size,
            placement: Placement::Front,
            data_size_bytes: Some(self.config.volume_bytes),
            granularity_log2: self.granularity_log2(node),
            peer_slots: 3.max(self.config.nodes as u8 - 1),
            channel_slots: self.config.cores as u16,
            al_ring_blocks: 8,
        }
    }

    /// What a node's device is made for.
    pub fn creation(&self, node: usize, content: Content) -> Goal {
        Goal::Create {
            params: Box::new(self.format_params(node, content)),
            force: false,
        }
    }

    /// Starts a node on an empty device.
    pub fn create(&mut self, node: usize, content: Content) {
        self.open(node, self.creation(node, content));
        self.wait_attached(node);
    }

    /// Starts a node that was killed.
    pub fn start(&mut self, node: usize) {
        self.open(node, Goal::Any);
        self.wait_attached(node);
    }

    /// Gives a detached node its disk again.
    pub fn attach(&mut self, node: usize) {
        self.open(node, Goal::Any);
        self.wait_attached(node);
    }

    /// Begins to open the device; what follows happens by itself.
    pub fn open(&mut self, node: usize, goal: Goal) {
        let size_bytes = self.nodes[node].disk.size_bytes();
        if std::mem::take(&mut self.nodes[node].has_lost_cache) {
            // Until now others may have read what only it had, and has no more.
            self.lose_unflushed();
        }
        self.nodes[node].running = true;
        self.nodes[node].disk_open = true;
        self.nodes[node].opener = Some(Opener::new(goal, OPENER, size_bytes));
        self.plan_poll(node, MANAGER);
    }

    fn wait_attached(&mut self, node: usize) {
        self.run_until("the disk is attached", 5 * SECOND, |world| {
            world.nodes[node]
                .engine
                .as_ref()
                .is_some_and(|engine| engine.manager.disk() >= DiskState::Inconsistent)
        });
    }

    /// A device that fails cannot be used for now; any other one can.
    pub(super) fn not_opened(&mut self, node: usize, error: &OpenError) {
        let is_failing = self.nodes[node].disk_faults.has_failed;
        assert!(
            is_failing && matches!(error, OpenError::Io { .. }),
            "node {node} cannot be opened: {error}"
        );
        self.note(node, || format!("cannot be opened: {error}"));
        let node = &mut self.nodes[node];
        node.opener = None;
        node.disk_open = false;
        if node.engine.is_none() {
            node.running = false;
        }
    }

    pub(super) fn opened(&mut self, node: usize, opened: Opened) {
        if self.nodes[node].is_closing {
            self.note(node, || {
                "opened for a volume that is being deleted".to_owned()
            });
            self.nodes[node].opener = None;
            self.nodes[node].disk_open = false;
            return;
        }
        let Config {
            cores,
            command_window,
            ..
        } = self.config;
        let options = self.options();
        let order = self.id();
        let incarnation = self.nodes[node].incarnation;
        self.orders
            .push((node, incarnation, order, "attach".to_owned()));
        self.call(node, MANAGER, |node, core| {
            node.opener = None;
            let engine = node.engine.get_or_insert_with(|| {
                let layout = &opened.superblock.layout;
                let geometry = VolumeGeometry {
                    block_size: layout.block_size(),
                    size_blocks: layout.data_size() / u64::from(layout.block_size()),
                    data_offset: layout.data_offset(),
                    granularity_log2: layout.granularity_log2(),
                };
                let shared = Arc::new(Shared::with_window(geometry, command_window));
                let mut manager = Manager::new(
                    Arc::clone(&shared),
                    opened.superblock.clone(),
                    (0..cores).collect(),
                );
                manager.set_options(options);
                Engine {
                    channels: (0..cores)
                        .map(|id| Channel::new(id, Arc::clone(&shared)))
                        .collect(),
                    manager,
                    shared,
                }
            });
            engine.manager.expect_attach(core, order);
            engine.manager.attach(core, opened);
        });
    }

    /// What every node starts with.
    pub fn options(&self) -> Options {
        Options {
            ping_interval_ms: self.config.ping_interval_ms,
            ping_timeout_ms: self.config.ping_timeout_ms,
            connect_interval_ms: 50,
            resync_rate_bytes: 0,
        }
    }

    /// Changes a node's options, if it runs.
    pub fn set_options(&mut self, node: usize, options: Options) {
        self.with_manager(node, |manager, _| manager.set_options(options));
    }
}
