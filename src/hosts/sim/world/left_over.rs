//! What must be gone when nothing is under way: requests, buffers, memory of received commands and of the application's I/O.
//! Looked at when a cluster has settled and when a volume has been closed. Nothing here changes the run.

use super::World;
use crate::host::Data;
use crate::hosts::sim::node::Core;

impl World {
    /// The engine of this node, which has nothing to do, has kept nothing.
    pub fn check_nothing_left(&self, node: usize) {
        let Some(engine) = &self.nodes[node].engine else {
            return;
        };
        let requests: usize = engine.channels.iter().map(|one| one.under_way()).sum();
        assert!(
            requests == 0,
            "[memory] node {node}: {requests} requests are left\n{}",
            self.describe()
        );
        self.check_buffers_left(node, engine.channels.len());
        let ended = self
            .apps
            .iter()
            .filter(|(_, app)| app.node == node && app.status.is_some());
        for (id, app) in ended {
            assert!(
                app.memory
                    .as_ref()
                    .is_none_or(|memory| memory.is_only_one()),
                "[memory] node {node} refers to the memory of I/O {id}, which has ended\n{}",
                self.describe()
            );
        }
    }

    /// A channel keeps a buffer for its activity log; all others have a use.
    fn check_buffers_left(&self, node: usize, channels: usize) {
        let of = &self.nodes[node];
        if of.opener.is_some() {
            return;
        }
        let is_buffer = |data: &Data<Core>| matches!(data, Data::Buffer(_));
        let on_disk = of.disk_work.values().filter(|work| is_buffer(&work.data));
        let links = of.links.iter().flat_map(|link| link.outstanding.values());
        let sent = links.filter(|command| is_buffer(&command.data));
        let used = on_disk.count() + sent.count();
        let left = of.buffers.get() - used;
        assert!(
            left <= channels,
            "[memory] node {node}: {left} buffers are left\n{}",
            self.describe()
        );
        let unanswered = of.unanswered.len();
        let received = of.received_memory.get();
        assert!(
            received <= unanswered,
            "[memory] node {node}: memory of {received} received commands is left, and {unanswered} are unanswered\n{}",
            self.describe()
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::engine::request::RequestKind;
    use crate::hosts::sim::memory::{Buffer, Bytes, Payload};
    use crate::hosts::sim::world::{Config, World};

    fn pair() -> World {
        let mut world = World::clean_cluster(1, Config::default());
        world.promote(0);
        world.submit(0, 0, RequestKind::Write { fua: false }, 8, 8);
        world.settle();
        world
    }

    #[test]
    #[should_panic(expected = "buffers are left")]
    fn a_buffer_that_nobody_gives_back_is_found() {
        let world = pair();
        let lost = [(); 2].map(|()| Buffer::new(Bytes::fresh(4096), &world.nodes[1].buffers));
        world.check_nothing_left(1);
        drop(lost);
    }

    #[test]
    #[should_panic(expected = "received commands is left")]
    fn memory_of_a_received_command_that_is_kept_is_found() {
        let world = pair();
        let count = &world.nodes[1].received_memory;
        let lost = Payload::received(Bytes::fresh(4096), None, count);
        world.check_nothing_left(1);
        drop(lost);
    }

    #[test]
    #[should_panic(expected = "which has ended")]
    fn memory_of_an_io_that_is_kept_is_found() {
        let world = pair();
        let kept = world.apps.values().find_map(|app| app.memory.clone());
        world.check_nothing_left(0);
        drop(kept);
    }
}
