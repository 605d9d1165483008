//! One core of the node: all that a reactor thread owns, how an I/O reaches its bdev and its answer its
//! owner, calls between cores, and the loop. The one place where reactor, disks, sockets and volumes
//! meet; none of them is ever entered from within another, answers wait for the loop.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::admin::{self, AdminEvent, CoreAdmins};
use super::bdev::{
    BdevId, BdevIo, BdevKind, BdevTable, Done, IoError, IoKind, IoResult, Owner, Ticket,
};
use super::disk::DiskQueue;
use super::initiator::{self, CoreInitiators, QueueEvent, QueueOwner};
use super::listener::{self, Listeners};
use super::message::{Message, NodeHandle};
use super::nvme_tcp::target::SharedTarget;
use super::reactor::Reactor;
use super::registry::Registry;
use super::remote::{self, CoreRemotes};
use super::ring::{Completion, Tag, TagKind};
use super::rpc::Control;
use super::target::{self, CoreTarget};
use super::timer::{TimerId, Timers};
use super::volume::{self, CoreVolumes, Port, VolumeMessage};
use crate::hosts::slab::{Key, Slab};

type Task = Box<dyn FnOnce(&mut Core)>;
type CompletionTask = Box<dyn FnOnce(&mut Core, IoResult, u32)>;

pub struct Core {
    pub index: usize,
    /// How many there are.
    pub cores: usize,
    pub reactor: Reactor,
    pub bdevs: BdevTable,
    pub disks: DiskQueue,
    /// Names and claims; filled on core 0 only.
    pub registry: Registry,
    /// What RPCs remember; used on core 0 only.
    pub control: Control,
    /// The listening sockets; filled on core 0 only.
    pub listeners: Listeners,
    pub target: CoreTarget,
    pub initiators: CoreInitiators,
    pub admins: CoreAdmins,
    pub remotes: CoreRemotes,
    pub volumes: CoreVolumes,
    timers: Timers<Task>,
    /// Answers to deliver.
    done: VecDeque<Done>,
    /// I/O for volumes, to be taken up by the loop.
    volume_io: VecDeque<(u32, Port, Ticket, BdevIo)>,
    controls: Slab<CompletionTask>,
    broadcasts: Slab<Broadcast>,
    /// Who waits for the last I/O of a bdev on this core.
    closing: Vec<(BdevId, Acknowledgement)>,
    completions: Vec<Completion>,
    stopping: bool,
}

/// A call that runs on all cores, as the core that made it keeps it.
struct Broadcast {
    waiting_for: usize,
    then: Task,
}

/// One core's debt to a broadcast: it is over when all cores have paid. Losing one makes the broadcast
/// wait for ever, so it has to be used.
#[must_use]
#[derive(Debug)]
pub struct Acknowledgement {
    origin: usize,
    broadcast: Key,
}

impl Acknowledgement {
    pub fn send(self, core: &mut Core) {
        let Self { origin, broadcast } = self;
        let message = Message::Call(Box::new(move |core| core.acknowledged(broadcast)));
        core.send(origin, message);
    }
}

/// Messages taken from the mailbox, and answers delivered, before the loop looks at other things.
const MESSAGES_PER_ROUND: usize = 256;
const ANSWERS_PER_ROUND: usize = 1024;

impl Core {
    /// To be made on its own thread.
    pub fn new(
        index: usize,
        node: NodeHandle,
        clock: Instant,
        target: SharedTarget,
    ) -> io::Result<Self> {
        Ok(Self {
            index,
            cores: node.cores(),
            reactor: Reactor::new(index, node, clock)?,
            bdevs: BdevTable::default(),
            disks: DiskQueue::new()?,
            registry: Registry::default(),
            control: Control::default(),
            listeners: Listeners::default(),
            target: CoreTarget::new(target),
            initiators: CoreInitiators::default(),
            admins: CoreAdmins::default(),
            remotes: CoreRemotes::default(),
            volumes: CoreVolumes::default(),
            timers: Timers::default(),
            done: VecDeque::new(),
            volume_io: VecDeque::new(),
            controls: Slab::default(),
            broadcasts: Slab::default(),
            closing: Vec::new(),
            completions: Vec::new(),
            stopping: false,
        })
    }

    /// Starts an I/O. Its answer always comes later, through the loop, errors too.
    pub fn submit(&mut self, id: BdevId, io: BdevIo, owner: Owner) {
        let refused = |status| Done {
            owner,
            status,
            dword0: 0,
        };
        let Some(bdev) = self.bdevs.get_mut(id) else {
            self.done
                .push_back(refused(Err(IoError::Errno(libc::ENODEV))));
            return;
        };
        if let Err(error) = bdev.check(&io) {
            bdev.stat.num_failed_ops += 1;
            self.done.push_back(refused(Err(error)));
            return;
        }
        bdev.in_flight += 1;
        let ticket = Ticket {
            bdev: id,
            owner,
            kind: IoKind::from(io.op),
            length_bytes: io.blocks.saturating_mul(u64::from(bdev.block_size)),
            submitted_ns: self.reactor.now_ns(),
        };
        match &bdev.kind {
            BdevKind::Malloc(disk) => {
                let status = disk.submit(&io, bdev.block_size);
                self.complete(ticket, status, 0);
            }
            BdevKind::File(disk) => {
                let ring = &mut self.reactor.ring;
                if let Err(error) = self.disks.submit(ring, disk, ticket, &io) {
                    self.complete(ticket, Err(error), 0);
                }
            }
            BdevKind::Nvme(place) => {
                let place = *place;
                remote::submit(self, place, ticket, io);
            }
            BdevKind::Volume(volume) => {
                let entry = (*volume, Port::Application, ticket, io);
                self.volume_io.push_back(entry);
            }
            BdevKind::Endpoint(volume) => {
                let entry = (*volume, Port::Peers, ticket, io);
                self.volume_io.push_back(entry);
            }
        }
    }

    /// Starts an I/O of the control path; `then` gets status and dword 0.
    pub fn submit_control(
        &mut self,
        id: BdevId,
        io: BdevIo,
        then: impl FnOnce(&mut Core, IoResult, u32) + 'static,
    ) {
        let slot = self.controls.insert(Box::new(then));
        self.submit(id, io, Owner::Control(slot));
    }

    /// Answers an I/O that a bdev has taken; the owner hears of it through the loop.
    pub fn complete(&mut self, ticket: Ticket, status: IoResult, dword0: u32) {
        self.bdevs.count(&ticket, status, self.reactor.now_ns());
        self.done.push_back(Done {
            owner: ticket.owner,
            status,
            dword0,
        });
        if !self.closing.is_empty() {
            self.acknowledge_closed(ticket.bdev);
        }
    }

    /// An answer that no bdev gives; delivered as those are.
    pub fn answer(&mut self, done: Done) {
        self.done.push_back(done);
    }

    /// Refuses new I/O for a bdev, and acknowledges when the last is answered.
    pub fn close_bdev(&mut self, id: BdevId, acknowledgement: Acknowledgement) {
        if let Some(bdev) = self.bdevs.get_mut(id) {
            bdev.closing = true;
        }
        self.closing.push((id, acknowledgement));
        self.acknowledge_closed(id);
    }

    fn acknowledge_closed(&mut self, id: BdevId) {
        if self.bdevs.get(id).is_some_and(|bdev| bdev.in_flight > 0) {
            return;
        }
        if let Some(position) = self.closing.iter().position(|(other, _)| *other == id) {
            let (_, acknowledgement) = self.closing.swap_remove(position);
            acknowledgement.send(self);
        }
    }

    /// Sends a message to a core (this one too); never waits, never drops.
    pub fn send(&mut self, core: usize, message: Message) {
        self.reactor.send(core, message);
    }

    /// The engine's messages.
    pub fn send_volume(&mut self, core: usize, message: VolumeMessage) {
        self.send(core, Message::Volume(Box::new(message)));
    }

    /// Control path: runs `f` on every core, this one too; `then` runs here when all have run it.
    pub fn on_all_cores(
        &mut self,
        f: impl Fn(&mut Core) + Send + Sync + 'static,
        then: impl FnOnce(&mut Core) + 'static,
    ) {
        let run = move |core: &mut Core, acknowledgement: Acknowledgement| {
            f(core);
            acknowledgement.send(core);
        };
        self.on_all_cores_later(run, then);
    }

    /// As [`on_all_cores`](Self::on_all_cores), for calls that are not over when they return: a core is
    /// done when it has sent its acknowledgement.
    pub fn on_all_cores_later(
        &mut self,
        f: impl Fn(&mut Core, Acknowledgement) + Send + Sync + 'static,
        then: impl FnOnce(&mut Core) + 'static,
    ) {
        let broadcast = self.broadcasts.insert(Broadcast {
            waiting_for: self.cores,
            then: Box::new(then),
        });
        let f = Arc::new(f);
        let origin = self.index;
        for core in 0..self.cores {
            let f = f.clone();
            let acknowledgement = Acknowledgement { origin, broadcast };
            let call = Message::Call(Box::new(move |core| f(core, acknowledgement)));
            self.send(core, call);
        }
    }

    fn acknowledged(&mut self, key: Key) {
        let Some(broadcast) = self.broadcasts.get_mut(key) else {
            return;
        };
        broadcast.waiting_for -= 1;
        if broadcast.waiting_for == 0 {
            if let Some(broadcast) = self.broadcasts.remove(key) {
                (broadcast.then)(self);
            }
        }
    }

    /// Control path: runs `f` on this core, not before `delay_ms` from now.
    pub fn after(&mut self, delay_ms: u64, f: impl FnOnce(&mut Core) + 'static) -> TimerId {
        self.reactor.tick();
        let deadline_ns = self
            .reactor
            .now_ns()
            .saturating_add(delay_ms.saturating_mul(1_000_000));
        self.timers.add(deadline_ns, Box::new(f))
    }

    /// Whether the timer was still to fire.
    pub fn cancel_timer(&mut self, timer: TimerId) -> bool {
        self.timers.cancel(timer)
    }

    /// Leaves the loop once what is in flight on the disks has come back.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// The loop of the reactor thread, until [`stop`](Self::stop). Errors: the ring no longer works.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.stopping || self.disks.in_flight() > 0 {
            self.round()?;
        }
        // What was sent last has to leave, and its wakes too.
        self.reactor.flush_outboxes();
        self.reactor.ring.enter()
    }

    /// One round: whatever is there, once; then yields or blocks if there was nothing.
    fn round(&mut self) -> io::Result<()> {
        let mut worked = self.take_completions()?;
        worked |= self.take_messages();
        worked |= self.fire_timers();
        worked |= target::poll(self);
        worked |= initiator::poll(self);
        worked |= admin::poll(self);
        worked |= volume::poll(self);
        worked |= self.deliver();
        worked |= remote::poll(self);
        // Answers and commands leave in the round in which they came up.
        worked |= target::poll(self);
        worked |= initiator::poll(self);
        let waiting = self.reactor.flush_outboxes();
        self.reactor.ring.enter()?;
        if worked || waiting {
            self.reactor.worked();
            return Ok(());
        }
        let deadline_ns = [
            self.timers.next_deadline_ns(),
            volume::next_deadline_ns(self),
        ]
        .into_iter()
        .flatten()
        .min();
        self.reactor.idle(deadline_ns)
    }

    fn take_completions(&mut self) -> io::Result<bool> {
        let mut completions = std::mem::take(&mut self.completions);
        self.reactor.collect(&mut completions)?;
        let worked = !completions.is_empty();
        for completion in completions.drain(..) {
            self.dispatch(completion.tag, completion.result, completion.more);
        }
        self.completions = completions;
        Ok(worked)
    }

    fn dispatch(&mut self, tag: Tag, result: i32, more: bool) {
        match tag.kind {
            TagKind::Disk => {
                let answer = self.disks.complete(&mut self.reactor.ring, tag, result);
                if let Some((ticket, status)) = answer {
                    self.complete(ticket, status, 0);
                }
            }
            TagKind::Event => self.reactor.event_rang(),
            TagKind::WakeFailed => self.reactor.wake_failed(tag.slot),
            TagKind::TargetSocket => target::event(self, tag, result, more),
            TagKind::Listener => listener::ready(self, tag, more),
            TagKind::InitiatorSocket => initiator::event(self, tag, result, more),
            TagKind::AdminSocket => admin::event(self, tag, result, more),
            TagKind::None => {}
        }
    }

    fn take_messages(&mut self) -> bool {
        for taken in 0..MESSAGES_PER_ROUND {
            match self.reactor.receive() {
                None => return taken > 0,
                Some(Message::Call(call)) => call(self),
                Some(Message::Volume(message)) => volume::message(self, *message),
            }
        }
        true
    }

    fn fire_timers(&mut self) -> bool {
        let now_ns = self.reactor.now_ns();
        let mut fired = false;
        while let Some(task) = self.timers.pop_due(now_ns) {
            task(self);
            fired = true;
        }
        fired
    }

    /// Hands volumes their I/O and owners their answers, also those that come up meanwhile.
    fn deliver(&mut self) -> bool {
        for delivered in 0..ANSWERS_PER_ROUND {
            if let Some((volume, port, ticket, io)) = self.volume_io.pop_front() {
                volume::submit(self, volume, port, ticket, io);
            } else if let Some(done) = self.done.pop_front() {
                self.hand_over(done);
            } else if let Some(event) = self.initiators.take_event() {
                // After the answers: what a queue pair had is answered before its owner hears of its end.
                self.tell_queue(event);
            } else if let Some(event) = self.admins.take_event() {
                self.tell_admin(event);
            } else {
                return delivered > 0;
            }
        }
        true
    }

    fn tell_queue(&mut self, event: QueueEvent) {
        match event.owner {
            QueueOwner::Volume { volume, link } => {
                volume::link_event(self, volume, link, event.queue, event.change);
            }
            QueueOwner::Remote(controller) => {
                remote::queue_event(self, controller, event.queue, &event.change);
            }
        }
    }

    fn tell_admin(&mut self, event: AdminEvent) {
        match event.owner {
            QueueOwner::Volume { volume, link } => {
                volume::admin_event(self, volume, link, event.controller, event.change);
            }
            QueueOwner::Remote(controller) => {
                remote::admin_event(self, controller, event.controller, &event.change);
            }
        }
    }

    fn hand_over(&mut self, done: Done) {
        match done.owner {
            Owner::Nvmf(request) => self.target.complete(request, done.status, done.dword0),
            Owner::Combined(key) => target::go_on(self, key, done.status),
            Owner::Remote(key) => remote::go_on(self, key, done.status, done.dword0),
            Owner::Volume { volume, token } => {
                volume::complete(self, volume, token, done.status, done.dword0);
            }
            Owner::Control(slot) => {
                if let Some(task) = self.controls.remove(slot) {
                    task(self, done.status, done.dword0);
                }
            }
        }
    }
}
