//! The manager's commands to a peer, in order, as many at a time as the host takes.

use std::collections::VecDeque;

use super::{Manager, ManagerIo};
use crate::engine::message::OrderId;
use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::PeerCommand;
use crate::host::{Data, Host, IoStatus, PeerRefusal, PeerSlot};

/// Commands of the manager in flight to one peer.
pub(super) const IN_FLIGHT: u32 = 8;

/// Before a question that was answered "not yet" is put again.
pub(super) const CALL_AGAIN_NS: u64 = 5_000_000;

/// What an answered command was for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Call {
    Hello(u64),
    Confirm(u32),
    Ping,
    State,
    /// The state of a node that this order has made Secondary.
    Demoted(OrderId),
    Bitmap,
    BitmapEnd,
    SyncStart,
    FinishAsk,
    FinishDurable,
    ResyncDone,
    /// A generation of this round.
    Generation(u64),
    Prepare(OrderId),
    Abort,
    /// A mark of this comparison.
    Mark(u64),
    Equal,
    Goodbye,
    /// More bits were found when the target asked whether it is finished; then answer this reply.
    MoreBits(Option<usize>),
}

#[derive(Default)]
pub(super) struct Outbox {
    queue: VecDeque<(PeerCommand, Vec<u8>, Call)>,
    pub(super) in_flight: u32,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.in_flight = 0;
    }
}

impl<H: Host> Manager<H> {
    /// Queues a command; it is sent when the current step is done.
    pub(super) fn call(&mut self, slot: PeerSlot, command: PeerCommand, body: Vec<u8>, call: Call) {
        self.peers[slot]
            .outbox
            .queue
            .push_back((command, body, call));
    }

    pub(super) fn pump_outbox(&mut self, cx: &mut H, slot: PeerSlot) {
        while self.peers[slot].outbox.in_flight < IN_FLIGHT {
            let Some((command, body, call)) = self.peers[slot].outbox.queue.pop_front() else {
                return;
            };
            let data = if body.is_empty() {
                Data::None
            } else {
                let Some(mut buffer) = cx.buffer(body.len().next_multiple_of(4096)) else {
                    self.peers[slot]
                        .outbox
                        .queue
                        .push_front((command, body, call));
                    return;
                };
                buffer.as_mut()[..body.len()].copy_from_slice(&body);
                Data::Buffer(buffer)
            };
            let token = self.token(ManagerIo::Call(slot, self.peers[slot].epoch, call));
            match cx.peer(slot, token, &command, data, 0..body.len()) {
                Ok(()) => self.peers[slot].outbox.in_flight += 1,
                Err(refusal) => {
                    self.take_io(token);
                    match refusal {
                        PeerRefusal::Later(_) => {
                            self.peers[slot]
                                .outbox
                                .queue
                                .push_front((command, body, call));
                        }
                        PeerRefusal::Down(_) => self.lose_session(cx, slot, "the link is down"),
                    }
                    return;
                }
            }
        }
    }

    /// A command of the current epoch was answered, or not.
    pub(super) fn called(
        &mut self,
        cx: &mut H,
        slot: PeerSlot,
        call: Call,
        status: IoStatus,
        answer: PeerAnswer,
    ) {
        if status != IoStatus::Ok {
            return self.lose_session(cx, slot, "a command was not answered");
        }
        match call {
            Call::Hello(nonce) => return self.hello_answered(cx, slot, nonce, answer),
            Call::Confirm(session) => return self.confirm_answered(cx, slot, session, answer),
            Call::Goodbye => return self.lose_session(cx, slot, "disconnected"),
            Call::Prepare(order) => return self.prepared(cx, slot, order, answer),
            Call::Equal if answer != PeerAnswer::Fenced => return self.compare_told(answer),
            Call::Mark(id) if answer != PeerAnswer::Fenced => {
                return self.compare_marked(cx, slot, id, answer);
            }
            _ => {}
        }
        match (call, answer) {
            (_, PeerAnswer::Fenced) => {
                self.lose_session(cx, slot, "the peer has given up the session")
            }
            (
                Call::SyncStart | Call::FinishAsk | Call::FinishDurable,
                PeerAnswer::NotYet | PeerAnswer::Busy,
            ) => {
                self.peers[slot].again = Some((call, cx.now_ns() + CALL_AGAIN_NS));
            }
            (Call::FinishAsk, PeerAnswer::Again) => self.pull_again(slot),
            (_, PeerAnswer::Ok | PeerAnswer::Duplicate) => self.call_done(cx, slot, call),
            (_, answer) => {
                self.lose_session(cx, slot, &format!("the peer answered {answer:?}"));
            }
        }
    }

    /// Puts a question again whose time has come.
    pub(super) fn poll_again(&mut self, cx: &mut H, slot: PeerSlot) {
        let Some((call, not_before_ns)) = self.peers[slot].again else {
            return;
        };
        if cx.now_ns() < not_before_ns {
            return;
        }
        self.peers[slot].again = None;
        match call {
            Call::SyncStart => self.send_sync_start(cx, slot),
            Call::FinishAsk => self.ask_to_finish(cx, slot),
            call => self.ask_finish(slot, call),
        }
    }

    fn call_done(&mut self, cx: &mut H, slot: PeerSlot, call: Call) {
        match call {
            Call::Ping => {
                self.peers[slot].ping_in_flight = false;
            }
            Call::Demoted(order) => self.peer_knows_demotion(cx, slot, Some(order)),
            Call::Bitmap => self.send_bitmap(cx, slot),
            Call::BitmapEnd => self.bitmap_sent(cx, slot),
            Call::SyncStart => self.target_started(cx, slot),
            Call::FinishAsk => self.finish_agreed(cx, slot),
            Call::FinishDurable => self.finish_ended(cx, slot),
            Call::ResyncDone => self.reported(slot),
            Call::Generation(round) => self.generation_taken(cx, slot, round),
            Call::MoreBits(Some(reply)) => self.answer(cx, reply, PeerAnswer::Again),
            _ => {}
        }
    }
}
