//! Delivers events to the engines and does what they ask for.

use super::{Event, MANAGER, OPENER, What, World};
use crate::engine::channel::TOKEN_MANAGER;
use crate::engine::manager::PeerReport;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::{DataDirection, PeerCommand, data_direction, opcode};
use crate::engine::peer::state::ConnState;
use crate::host::{Completion, Data, DiskIo, DiskOp, IoStatus, PeerAddress, Token};
use crate::hosts::sim::link::{LinkState, Outstanding, PeerIo, Transit};
use crate::hosts::sim::memory::{Bytes, Payload};
use crate::hosts::sim::node::{Action, Core, DiskWork};
use crate::hosts::sim::record::Recorded;
use crate::hosts::sim::world::received::received_write;

/// How long an attempt to connect to nobody takes.
const REFUSED_NS: u64 = 1_000_000;
const UNREACHABLE_NS: u64 = 100_000_000;

impl World {
    pub(super) fn deliver(&mut self, event: Event) {
        let Event {
            node,
            incarnation,
            what,
        } = event;
        // A transport that repeats a command does so on whatever connection it has by then.
        let repeated = matches!(&what, What::Arrived(transit) if transit.repeated);
        if self.nodes[node].incarnation != incarnation && !repeated {
            return;
        }
        match what {
            What::Poll { place, at_ns } => self.poll(node, place, at_ns),
            What::DiskDone(id) => self.disk_done(node, id),
            What::DiskThaws => self.disk_thaws(node),
            What::ToManager(message) => {
                self.with_manager(node, |manager, cx| manager.message(cx, *message));
            }
            What::ToChannel(channel, message) => {
                self.with_channel(node, channel, |channel, cx| channel.message(cx, *message));
            }
            What::LinkTried { slot, id } => self.link_tried(node, slot, id),
            What::LinkReset { slot, id } => {
                let link = &self.nodes[node].links[slot];
                if link.id == id && matches!(link.state, LinkState::Up | LinkState::Opening) {
                    self.close_link(node, slot);
                }
            }
            What::LinkGone { slot, command } => {
                let outstanding = self.nodes[node].links[slot].outstanding.remove(command);
                if let Some(outstanding) = outstanding {
                    self.complete_peer(node, outstanding, IoStatus::Gone, PeerAnswer::Ok, None);
                }
            }
            What::LinkDown { slot, id } => {
                let link = &mut self.nodes[node].links[slot];
                assert!(link.id == id && link.outstanding.is_empty());
                link.state = LinkState::Closed;
                self.note(node, || format!("link {slot} is down"));
                self.with_manager(node, |manager, cx| manager.link_down(cx, slot, "reset"));
            }
            What::Arrived(transit) => self.arrived(node, *transit),
            What::Answered {
                slot,
                link,
                command,
                answer,
                data,
            } => {
                let current = &mut self.nodes[node].links[slot];
                if current.id == link
                    && current.state == LinkState::Up
                    && let Some(outstanding) = current.outstanding.remove(command)
                {
                    self.complete_peer(node, outstanding, IoStatus::Ok, answer, data);
                }
            }
            What::Submit(id) => self.offer(id),
        }
    }

    pub(super) fn act(&mut self, node: usize, place: usize, action: Action) {
        self.hash_action(node, place, &action);
        let core = if place == MANAGER { 0 } else { place };
        match action {
            Action::Disk(token, io, data) => self.start_disk(node, core, token, io, data),
            Action::Peer {
                slot,
                token,
                session,
                opcode,
                words,
                data,
                part,
            } => {
                let data_len = part.len();
                let target = self.nodes[node].links[slot].target;
                self.speaks_in(node, target, session);
                self.check_limits(node, slot, core, opcode, data_len);
                let command = self.id();
                let sent = match (&data, data_direction(opcode)) {
                    (_, DataDirection::ControllerToHost) | (Data::None, _) => Vec::new(),
                    (Data::Payload(memory), _) => memory.bytes()[part].to_vec(),
                    (Data::Buffer(buffer), _) => buffer.as_ref()[part].to_vec(),
                };
                self.record_sent(node, core, token, opcode, &words, data_len as u32);
                let incarnation = self.nodes[node].incarnation;
                let resync_read =
                    self.check_resync_read(node, slot, opcode, &words, data_len as u32);
                let outstanding = Outstanding {
                    core,
                    token,
                    data,
                    resync_read,
                };
                let link = &mut self.nodes[node].links[slot];
                link.outstanding.insert(command, outstanding);
                let transit = Transit {
                    from: node,
                    to: target,
                    to_incarnation: self.nodes[target].incarnation,
                    core: core % self.config.cores,
                    opcode,
                    words,
                    data: sent,
                    data_len: data_len as u32,
                    repeated: false,
                    is_let_go: false,
                    io: PeerIo {
                        command,
                        arrival: command,
                        answer_lost: false,
                        from: node,
                        from_incarnation: incarnation,
                        link: self.nodes[node].links[slot].id,
                        slot,
                        response: None,
                    },
                };
                let delay_ns = self.delay_ns() + self.way_lag_ns(node, target);
                let last = &mut self.nodes[node].links[slot].last_arrival_ns[core];
                let at_ns = (self.now_ns + delay_ns).max(*last + 1);
                *last = at_ns;
                self.send(transit, at_ns);
            }
            Action::Finish(id, status) => self.finished(id, status),
            Action::Answer(io, answer) => self.answered(node, io, answer),
            Action::ToManager(message) => {
                self.send_message(node, place, MANAGER, What::ToManager(Box::new(message)));
            }
            Action::ToChannel(channel, message) => {
                self.send_message(
                    node,
                    place,
                    channel,
                    What::ToChannel(channel, Box::new(message)),
                );
            }
            Action::LinkOpen(slot, address) => self.open_link(node, slot, &address),
            Action::LinkClose(slot) => self.close_link(node, slot),
            // A device that is being opened is not the engine's yet.
            Action::DiskClose if self.nodes[node].opener.is_some() => {}
            Action::DiskClose => {
                let work = &self.nodes[node].disk_work;
                assert!(work.is_empty(), "[I11] the disk was let go with I/O on it");
                self.nodes[node].disk_open = false;
            }
            Action::Ordered(id, outcome) => {
                self.note(node, || format!("order {id} ended: {outcome:?}"));
                self.count_order(node, id, &outcome);
                let earlier = self.nodes[node].outcomes.insert(id, outcome);
                assert!(earlier.is_none(), "[I10] order {id} ended twice");
                self.check_one_primary(node);
            }
        }
    }

    /// Of two nodes that both say that they are connected with each other, one is Primary at most.
    fn check_one_primary(&self, node: usize) {
        let is_connected = |one: usize, other: usize| {
            let peers = self.state(one).peers;
            let of_other = |peer: &&PeerReport| usize::from(peer.node_id) == other;
            let found = peers.iter().find(of_other);
            found.is_some_and(|peer| peer.conn == ConnState::Connected)
        };
        for other in (0..self.nodes.len()).filter(|&other| other != node) {
            let both = self.is_primary(node) && self.is_primary(other);
            assert!(
                !both || !is_connected(node, other) || !is_connected(other, node),
                "[I8] nodes {node} and {other} are Primary and connected\n{}",
                self.describe()
            );
        }
    }

    /// Nobody sends more than was agreed: with a command, or at a time on a queue pair.
    fn check_limits(&self, node: usize, slot: usize, core: usize, op: u8, data_len: usize) {
        let link = &self.nodes[node].links[slot];
        let outstanding = link.outstanding.values();
        let outstanding = outstanding.filter(|other| other.core == core).count();
        assert!(outstanding < 96, "[credits] node {node}: no credit is left");
        let taken = [node, link.target].map(|node| self.in_capsule_bytes(node));
        let taken = taken[0].min(taken[1]);
        if data_direction(op) == DataDirection::HostToController {
            let is_write = op == opcode::WRITE;
            let most = if is_write { taken } else { taken.max(512) };
            // What takes no block cannot be helped.
            let splits = !is_write || taken >= self.config.block_size;
            assert!(
                !splits || data_len <= most as usize,
                "[credits] node {node} sends {data_len} bytes with {op:#x}, {most} are taken"
            );
        }
    }

    /// A network or a device is usually quick, and sometimes not.
    fn delay_ns(&mut self) -> u64 {
        match self.random.below(20) {
            0 => self.random.between(200_000, 3_000_000),
            1..5 => self.random.between(50_000, 200_000),
            _ => self.random.between(5_000, 50_000),
        }
    }

    fn send_message(&mut self, node: usize, from: usize, to: usize, what: What) {
        let delay_ns = match self.random.below(20) {
            0 => self.random.between(20_000, 2_000_000),
            _ => self.random.between(200, 20_000),
        };
        let delay_ns = delay_ns + self.message_lag_ns(node, from, to);
        let last = self.nodes[node].message_ns.entry((from, to)).or_default();
        let at_ns = (self.now_ns + delay_ns).max(*last + 1);
        *last = at_ns;
        self.schedule_here(node, at_ns - self.now_ns, what);
    }

    fn start_disk(&mut self, node: usize, core: usize, token: Token, io: DiskIo, data: Data<Core>) {
        assert!(
            self.nodes[node].disk_open,
            "[I11] {io:?} on a disk that was let go"
        );
        if is_write(&io) {
            let end = io.offset + io.len;
            let other = self.nodes[node].disk_work.values().find(|other| {
                is_write(&other.io)
                    && other.io.offset < end
                    && io.offset < other.io.offset + other.io.len
            });
            if let Some(other) = other {
                panic!(
                    "[I4] writes that overlap are in flight on node {node}: {:?} and {io:?}",
                    other.io
                );
            }
        }
        self.check_received(node, &data);
        self.check_overwritten(node, token, &io, &data);
        let id = self.id();
        self.record_submitted(node, id, token, io, &data);
        let submitted = self.nodes[node].disk.order();
        self.nodes[node].disk_work.insert(
            id,
            DiskWork {
                core,
                token,
                io,
                data,
                submitted,
            },
        );
        let delay_ns = self.delay_ns() + self.disk_lag_ns(node) + self.node_lag_ns(node);
        self.schedule_here(node, delay_ns, What::DiskDone(id));
    }

    fn disk_done(&mut self, node: usize, id: u64) {
        if self.disk_keeps(node, id) {
            return;
        }
        let Some(mut work) = self.nodes[node].disk_work.remove(id) else {
            return;
        };
        if self.disk_fails(node, &work) {
            self.record(node, |_| Some(Recorded::Done { id }));
            return self.disk_answers(node, work, IoStatus::Failed);
        }
        let disk = &mut self.nodes[node].disk;
        let read = match (&work.io.op, &work.data) {
            (DiskOp::Write { .. }, Data::Payload(memory)) => {
                disk.execute(work.io, work.submitted, &memory.content())
            }
            (DiskOp::Write { .. }, Data::Buffer(buffer)) => {
                disk.execute(work.io, work.submitted, buffer.content())
            }
            (DiskOp::Write { .. }, Data::None) => panic!("a write without data"),
            _ => disk.execute(work.io, work.submitted, &Bytes::zeroes(0)),
        };
        self.record(node, |_| Some(Recorded::Done { id }));
        if work.io.op == DiskOp::Read {
            match &mut work.data {
                Data::Payload(memory) => memory.put(read),
                Data::Buffer(buffer) => buffer.put(read),
                Data::None => panic!("a read without memory"),
            }
        }
        self.disk_answers(node, work, IoStatus::Ok);
    }

    fn disk_answers(&mut self, node: usize, work: DiskWork, status: IoStatus) {
        let completion = Completion {
            token: work.token,
            status,
            answer: PeerAnswer::Ok,
            data: work.data,
        };
        self.complete(node, work.core, completion);
    }

    fn complete(&mut self, node: usize, core: usize, completion: Completion<Core>) {
        if completion.token == OPENER {
            let opener = self.nodes[node].opener.as_mut().expect("it is at work");
            match opener.complete(completion) {
                Ok(None) => {}
                Ok(Some(opened)) => return self.opened(node, opened),
                Err(error) => return self.not_opened(node, &error),
            }
            return self.call(node, MANAGER, |node, cx| node.poll(MANAGER, cx));
        }
        if completion.token.0 & TOKEN_MANAGER != 0 {
            self.with_manager(node, |manager, cx| manager.complete(cx, completion));
        } else {
            self.with_channel(node, core, |channel, cx| channel.complete(cx, completion));
        }
    }

    fn complete_peer(
        &mut self,
        node: usize,
        outstanding: Outstanding,
        status: IoStatus,
        answer: PeerAnswer,
        data: Option<Bytes>,
    ) {
        let Outstanding {
            core,
            token,
            data: mut own,
            ..
        } = outstanding;
        self.record(node, |_| {
            let ok = status == IoStatus::Ok && answer == PeerAnswer::Ok;
            Some(Recorded::Ended { core, token, ok })
        });
        match (&mut own, data) {
            (Data::Payload(memory), Some(content)) => memory.put(content),
            (Data::Payload(memory), None) => drop(memory.bytes()),
            (Data::Buffer(buffer), Some(content)) => buffer.put(content),
            _ => {}
        }
        let completion = Completion {
            token,
            status,
            answer,
            data: own,
        };
        self.complete(node, core, completion);
    }

    fn arrived(&mut self, node: usize, mut transit: Transit) {
        let incarnation = transit.to_incarnation;
        self.keep(&mut transit);
        if self.catching == Some(transit.opcode) && !transit.is_let_go {
            self.caught.push(Event {
                node,
                incarnation,
                what: What::Arrived(Box::new(transit)),
            });
            return;
        }
        if let Some(waiting) = self.blocked.get_mut(&(transit.from, node)) {
            waiting.push(Event {
                node,
                incarnation,
                what: What::Arrived(Box::new(transit)),
            });
            return;
        }
        if self.nodes[node].engine.is_none() {
            return;
        }
        let op = transit.opcode;
        let command =
            PeerCommand::parse(op, &transit.words, transit.data_len).unwrap_or_else(|error| {
                panic!("[protocol] node {} sent nonsense: {error}", transit.from)
            });
        self.note(node, || {
            format!(
                "from {} as {}: {command:?}",
                transit.from, transit.io.arrival
            )
        });
        let write = received_write(transit.from, &command);
        if data_direction(op) == DataDirection::None {
            self.expect_zeroes(transit.io.arrival, write);
        }
        let count = &self.nodes[node].received_memory;
        let payload = match data_direction(op) {
            DataDirection::HostToController => {
                let content = Bytes::Held(std::mem::take(&mut transit.data));
                Some(Payload::received(content, write, count))
            }
            DataDirection::ControllerToHost => {
                let room = Bytes::zeroes(transit.data_len as usize);
                let room = Payload::received(room, None, count);
                transit.io.response = Some(room.clone());
                Some(room)
            }
            _ => None,
        };
        self.command_comes(node, op);
        if let PeerCommand::Goodbye { outdate: false, .. } = command {
            let from = &mut self.nodes[transit.from];
            from.has_taken_leave |=
                from.is_closing && from.incarnation == transit.io.from_incarnation;
        }
        self.nodes[node].unanswered.insert(transit.io.arrival, op);
        self.with_channel(node, transit.core, |channel, cx| {
            channel.received(cx, command, payload, transit.io);
        });
    }

    fn answered(&mut self, node: usize, io: PeerIo, answer: PeerAnswer) {
        let known = self.nodes[node].unanswered.remove(io.arrival);
        let Some(op) = known else {
            panic!("[I11] command {} was answered twice", io.arrival);
        };
        self.note(node, || format!("answers {}: {answer:?}", io.arrival));
        self.check_answered(node, io.arrival, answer);
        self.fenced += u64::from(answer == PeerAnswer::Fenced);
        self.coverage.answered(answer);
        let answer = PeerAnswer::from_dword0(answer.to_dword0());
        let data = match (&io.response, answer) {
            (Some(memory), PeerAnswer::Ok) => Some(memory.take_back()),
            _ => None,
        };
        if op == opcode::RESYNC_READ {
            self.resynced_bytes += data.as_ref().map_or(0, |data| data.bytes().len() as u64);
        }
        if io.answer_lost {
            return;
        }
        let event = Event {
            node: io.from,
            incarnation: io.from_incarnation,
            what: What::Answered {
                slot: io.slot,
                link: io.link,
                command: io.command,
                answer,
                data,
            },
        };
        if let Some(waiting) = self.blocked.get_mut(&(node, io.from)) {
            waiting.push(event);
        } else {
            let lag_ns = self.way_lag_ns(node, io.from);
            let at_ns = self.now_ns + self.delay_ns() + lag_ns;
            self.schedule(at_ns, event);
        }
    }

    fn open_link(&mut self, node: usize, slot: usize, address: &PeerAddress) {
        let id = self.id();
        let target = address.traddr.trim_start_matches("node-").parse();
        let link = &mut self.nodes[node].links[slot];
        assert_eq!(
            link.state,
            LinkState::Closed,
            "[protocol] a link was opened twice"
        );
        link.state = LinkState::Opening;
        link.id = id;
        link.target = target.expect("an address of this world");
        let delay_ns = self.delay_ns();
        self.schedule_here(node, delay_ns, What::LinkTried { slot, id });
    }

    fn link_tried(&mut self, node: usize, slot: usize, id: u64) {
        let link = &self.nodes[node].links[slot];
        if link.id != id || link.state != LinkState::Opening {
            return;
        }
        let target = link.target;
        let unreachable = self.blocked.contains_key(&(node, target))
            || self.blocked.contains_key(&(target, node));
        if !unreachable && self.nodes[target].engine.is_some() {
            self.nodes[node].links[slot].state = LinkState::Up;
            self.note(node, || format!("link {slot} is up"));
            return self.with_manager(node, |manager, cx| manager.link_up(cx, slot));
        }
        self.nodes[node].links[slot].state = LinkState::Closing;
        let delay_ns = if unreachable {
            UNREACHABLE_NS
        } else {
            REFUSED_NS
        };
        self.schedule_here(node, delay_ns, What::LinkDown { slot, id });
    }

    /// Resets a link: what is outstanding is gone, then the link is down.
    pub(super) fn close_link(&mut self, node: usize, slot: usize) {
        let link = &mut self.nodes[node].links[slot];
        if matches!(link.state, LinkState::Closing | LinkState::Closed) {
            return;
        }
        link.state = LinkState::Closing;
        let id = link.id;
        let commands: Vec<u64> = link.outstanding.numbers().collect();
        for command in commands {
            let delay_ns = self.random.below(100_000);
            self.schedule_here(node, delay_ns, What::LinkGone { slot, command });
        }
        self.schedule_here(node, 100_001, What::LinkDown { slot, id });
    }
}

fn is_write(io: &DiskIo) -> bool {
    !matches!(io.op, DiskOp::Read | DiskOp::Flush)
}
