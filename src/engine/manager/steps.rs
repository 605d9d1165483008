//! Counts the channels in: a change is complete when the last one has adopted it, handed over, or drained.

use std::collections::VecDeque;

use crate::engine::message::{OrderId, OrderOutcome};
use crate::engine::peer::answer::PeerAnswer;
use crate::host::{ChannelId, PeerSlot};

/// What to do next.
#[derive(Clone, Debug)]
pub(super) enum Then {
    Nothing,
    /// These extents of a channel's log may go.
    Retire(ChannelId, Vec<u32>),
    Answer(usize, PeerAnswer),
    /// Publish the state, then answer Ok if what was written is on the disk.
    Publish(usize),
    Order(OrderId, OrderOutcome),
    /// A step of a session; void when its epoch has passed.
    Session(PeerSlot, u64, SessionStep),
    /// A step of giving up a session; never void.
    Fence(PeerSlot, FenceStep),
    /// A superblock with the generation of this round is durable.
    Generation(u64),
    Disk(DiskStep),
    /// A step of a comparison that this node leads; void when it is over.
    Compare(u64, CompareStep),
    OrderStep(OrderId, OrderStep),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum SessionStep {
    /// All bits are in the master: say Hello.
    Hello,
    /// This disk is Outdated, durably; the reply to Goodbye.
    Outdated(usize),
    /// Every channel accepts the session's commands.
    Receivable,
    /// Every channel is in the decided state.
    Entered,
    /// Connected without a resync, and all bits from before are in the master.
    Connected,
    /// The bits that belong to the exchange are in the master.
    ExchangeHarvested,
    /// As target: bitmap and Inconsistent are durable; the reply to SyncStart.
    TargetDurable(usize),
    /// As target: every channel is SyncTarget; the reply to SyncStart.
    TargetEntered(usize),
    /// As target: other nodes' bits for what has come to be fetched are durable.
    SpreadDurable,
    /// As source: the target's bitmap generation is durable.
    SourceDurable,
    /// As source: every channel mirrors writes.
    SourceEntered,
    /// As source: earlier notices are acknowledged.
    SourceNoticed,
    /// As target: the source's present generation is durable.
    GenerationFollowed,
    /// As source, asked whether the resync is finished: from here on the target has this generation; the reply.
    FinishNoted(usize),
    /// The bits that came before; the reply.
    FinishHarvested(usize),
    /// As source: the target's bitmap generation is gone; the reply.
    FinishRecorded(usize),
    /// The other side's finish was missed: put right.
    Reconciled,
    /// All bits up to the mark of a comparison are in the master; the reply, and the comparison.
    MarkHarvested(usize, u64),
    /// All bits are in the master after a comparison; the reply.
    EqualHarvested(usize),
    /// A generation under which the peer may write is not taken back any more, durably; the reply to Prepare.
    GenerationKept(usize),
    /// The peer may be promoted, and all bits are in the master; the reply.
    Agreed(usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum CompareStep {
    /// All bits are in the master.
    Harvested,
    /// What was under way when the marks were set has ended.
    Drained,
    /// And its bits are in the master.
    Settled,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum FenceStep {
    /// Every channel has given up the session.
    Adopted,
    /// Nothing received under it is in flight.
    Drained,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum DiskStep {
    /// The metadata says that the disk is in use.
    AttachDurable,
    /// A Primary's channels hold new I/O.
    AttachHeld,
    /// What a Primary had begun without the disk has ended.
    AttachQuiet,
    Attached,
    /// The failed disk is out of every view.
    FailedAdopted,
    /// Peers know what the failed disk lacks.
    FailedNoticed,
    /// Nothing uses the failed disk any more.
    FailedDrained,
    /// Every channel knows that there is no disk.
    Released,
    /// The manager does not use it either.
    Quiet,
    /// A resync from this peer, of this epoch, has ended durably.
    SyncedDurable(PeerSlot, u64),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum OrderStep {
    /// The new role is durable.
    PromoteDurable,
    /// All bits are in the masters.
    PromoteHarvested,
    /// Whoever lacks the latest data can be told by the generation.
    PromoteAgreed,
    PromoteAdopted,
    /// New application I/O is refused.
    DemoteAdopted,
    DemoteDrained,
    DemoteDurable,
    /// New application I/O is refused, and the volume goes away.
    CloseHeld,
    CloseDrained,
    /// What has not ended by now fails.
    CloseAdopted,
    /// Application I/O is held or refused.
    DetachHeld,
    /// No application I/O is left.
    DetachQuiet,
    /// No channel uses the disk for new I/O.
    DetachOff,
    /// No channel uses the disk.
    DetachDrained,
    /// The manager has nothing in flight on it either.
    DetachQuieted,
    /// Every bit is in a master.
    DetachHarvested,
    /// The metadata says that the disk was let go cleanly.
    DetachWritten,
    /// Every channel and the peers know that there is no disk.
    DetachAdopted,
    /// Nothing of the manager's is in flight on it any more.
    DetachReleased,
    InvalidateDurable,
}

/// Questions to all channels that have not been answered by all.
pub(super) struct Steps<H> {
    next_id: u64,
    adopting: VecDeque<(u64, Vec<ChannelId>, Then)>,
    asked: Vec<(u64, Vec<ChannelId>, Then)>,
    host: std::marker::PhantomData<fn(H)>,
}

impl<H> Steps<H> {
    pub(super) fn new() -> Self {
        Self {
            next_id: 0,
            adopting: VecDeque::new(),
            asked: Vec::new(),
            host: std::marker::PhantomData,
        }
    }

    pub(super) fn adopt(
        &mut self,
        version: u64,
        channels: &[ChannelId],
        then: Then,
        ready: &mut VecDeque<Then>,
    ) {
        if channels.is_empty() {
            ready.push_back(then);
        } else {
            self.adopting.push_back((version, channels.to_vec(), then));
        }
    }

    /// A question to all channels; its number.
    pub(super) fn ask(
        &mut self,
        channels: &[ChannelId],
        then: Then,
        ready: &mut VecDeque<Then>,
    ) -> u64 {
        self.next_id += 1;
        if channels.is_empty() {
            ready.push_back(then);
        } else {
            self.asked.push((self.next_id, channels.to_vec(), then));
        }
        self.next_id
    }

    /// A channel adopts views in order: with one, all before it.
    pub(super) fn adopted(&mut self, channel: ChannelId, version: u64, ready: &mut VecDeque<Then>) {
        for (asked, missing, _) in &mut self.adopting {
            if *asked <= version {
                missing.retain(|&other| other != channel);
            }
        }
        while let Some((_, missing, _)) = self.adopting.front()
            && missing.is_empty()
        {
            if let Some((_, _, then)) = self.adopting.pop_front() {
                ready.push_back(then);
            }
        }
    }

    pub(super) fn answered(&mut self, channel: ChannelId, id: u64, ready: &mut VecDeque<Then>) {
        if let Some(index) = self.asked.iter().position(|(asked, ..)| *asked == id) {
            let missing = &mut self.asked[index].1;
            missing.retain(|&other| other != channel);
            if missing.is_empty() {
                ready.push_back(self.asked.remove(index).2);
            }
        }
    }
}
