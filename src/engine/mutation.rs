//! Deliberate breaks of the engine, one for each rule that holds an invariant up. `tests/mutations.rs` makes one at a time
//! and shows that the simulator notices. Without the feature `mutations` none of them can be made and nothing is left
//! of them in the code; the engine asks [`is`] at the place that a break changes.

macro_rules! mutations {
    ($($(#[doc = $what:literal])+ $name:ident: $invariant:literal,)+) => {
        /// A break: what is done instead of the right thing.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutation {
            $($(#[doc = $what])+ $name,)+
        }

        impl Mutation {
            /// In the order of the invariants.
            pub const ALL: &[Mutation] = &[$(Mutation::$name),+];

            /// The invariant that no longer holds.
            pub fn invariant(self) -> &'static str {
                match self {
                    $(Mutation::$name => $invariant,)+
                }
            }
        }
    };
}

impl Mutation {
    /// Breaks that nothing notices yet: holes in what is drawn or in what is checked, to be closed.
    pub const HOLES: &[Mutation] = &[];

    /// How many nodes it takes until it can be noticed.
    pub fn nodes(self) -> usize {
        match self {
            // With two, no bit is set beside a resync unless the session ends with it.
            Mutation::ClearUnserved => 3,
            // With two there is nobody else who lacks what is fetched.
            Mutation::SpreadNotDurable => 3,
            Mutation::OldPeerReadFrom | Mutation::SessionDuringPromotion => 3,
            // With two the Primary's only source comes back with what it has told.
            Mutation::StartedGenerationKept => 3,
            _ => 2,
        }
    }
}

mutations! {
    /// A write for a peer that is not there sets no bit.
    AbsentPeerWithoutBit: "I1",
    /// A write that the lost session has not answered sets no bit.
    UnansweredWithoutBit: "I1",
    /// A write starts before its extents are in the activity log.
    WriteBeforeLog: "I1",
    /// Recovery leaves out the last of the activity log's rings.
    RingLost: "I1",
    /// Attach does not look at the bitmaps on disk.
    PagesForgotten: "I1",
    /// Bits that a failing disk did not take are not written again when it is attached.
    BitsNotWrittenAgain: "I1",
    /// A target fetches before its bits for other nodes are on disk.
    SpreadNotDurable: "I1",
    /// An extent leaves the activity log before its bits are on disk.
    RetireWithoutPages: "I1",
    /// An extent leaves the activity log before the device is flushed.
    RetireWithoutFlush: "I1",
    /// A flush does not go to the peers.
    FlushWithoutPeers: "I1",
    /// A flush does not go to the local disk when there are peers.
    FlushWithoutDisk: "I1",
    /// The disks are not told of FUA.
    FuaDropped: "I1",
    /// A read is served by the local disk where that is out of date.
    ReadStale: "I1",
    /// A peer that lacks a generation of a Primary which fetches from another node counts as up to date.
    OldPeerReadFrom: "I1",
    /// What is written here for a Primary without a disk sets no bit for its disk.
    DisklessWithoutBit: "I1",
    /// A write completes without a generation that says which peer missed it.
    CompleteWithoutGeneration: "I2",
    /// A flush completes without a generation that says which peer may have lost its cache.
    FlushWithoutGeneration: "I2",
    /// A volume that is shut down takes leave of its peers while its application's writes still end.
    GoodbyeBeforeClosing: "I2",
    /// A write completes as soon as the new generation is made, on no disk yet.
    GenerationBeforeDurable: "I2",
    /// A session begins while a node is promoted, and it is not asked.
    SessionDuringPromotion: "I2",
    /// The range lock is granted to everybody.
    RangeAlwaysFree: "I4",
    /// A resync writes without the range lock.
    ResyncWriteUnlocked: "I4",
    /// A peer's writes are taken whatever their session is.
    AnySession: "I5",
    /// The next session begins while the last one's writes still wait here.
    SessionBeforeDrained: "I5",
    /// A write that a transport delivers again is carried out again.
    RepeatedWrite: "I5",
    /// Any other command that a transport delivers again is carried out again.
    RepeatedControl: "I5",
    /// A write that meets an outstanding resync read leaves no mark.
    NoMarkForResync: "I6",
    /// A source reads for a resync while a write to the same blocks is under way.
    ResyncReadUnlocked: "I6",
    /// A target asks for data while an earlier write to the same blocks is under way.
    PullUnlocked: "I6",
    /// A target goes on fetching while it asks for the end of the resync.
    PullWhileFinishing: "I6",
    /// A bitmap that a peer sends is not ORed.
    BitmapIgnored: "I6",
    /// A source agrees that a resync is finished without looking for bits of its own.
    FinishUnchecked: "I6",
    /// Nobody looks for bits that were set while a connection without a resync was made.
    ConnectedWithoutHarvest: "I6",
    /// Application I/O goes on while a Primary waits for the bitmap that says what it lacks.
    IoWithoutBitmap: "I6",
    /// A Primary does not record that it is one, and begins no generation where others may not know of it. The former alone
    /// shows nothing: of writes of one generation, those that a crash leaves on one node only were never completed, and
    /// whoever reads them afterwards has become Primary first, with a generation of its own.
    PrimaryUnrecorded: "I6",
    /// A node becomes Primary without a generation where others may not know of it.
    PromotedWithoutGeneration: "I6",
    /// Demote ends while application I/O is still under way.
    DemoteUndrained: "I6",
    /// A report clears bits of blocks that were written after the target was given them, and a resync goes on beside a
    /// Primary. The former alone shows nothing: resyncs end before the writes of a Primary arrive.
    ClearUnserved: "I7",
    /// A target reports blocks before they are flushed.
    ReportUnflushed: "I7",
    /// A target reports blocks that it has fetched and not written.
    ReportUnwritten: "I7",
    /// Blocks that a write has covered in part count as fetched.
    PartialForgotten: "I7",
    /// The node with the lower number takes a resync from it for equal data.
    DecisionUnmirrored: "I8",
    /// A decision stays when what was told before it has changed.
    DecisionNeverVoid: "I8",
    /// A node is promoted whatever its peers are.
    PromoteUnasked: "I8",
    /// The node with the lower number takes a split brain for equal data.
    SplitBrainOverlooked: "I9",
    /// Of two nodes with changes of their own, the one with the higher number gives up its own unasked.
    SplitBrainResolvedUnasked: "I9",
    /// Two nodes with changes of their own do not connect, and do not say why.
    SplitBrainUnreported: "I9",
    /// A volume that is shut down starts a generation for writes that a peer has missed.
    GenerationWhileShutDown: "I9",
    /// A Primary whose disk is attached again takes up no I/O.
    SuspendedForEver: "I10",
    /// A promotion goes on waiting for a peer that is lost.
    PromotionWaitsForLost: "I10",
    /// What waits for an answer of a session that is over gets none.
    NoAnswerWhenFenced: "I10",
    /// Extents never leave the activity log.
    LogStaysFull: "I10",
    /// A Primary without its data keeps a generation that it could tell nobody.
    StartedGenerationKept: "I10",
    /// A link that was lost is not opened again.
    LinkNeverOpenedAgain: "I10",
    /// A generation that was cut short counts as one that something was written under.
    NeverTakenBack: "I10",
    /// A write ends while the local disk still has its memory.
    AnswerBeforeDisk: "I11",
    /// What arrives for a piece of a resync that was given up is never let go.
    LateBufferKept: "memory",
}

/// Whether this break is made on this thread.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub const fn is(_: Mutation) -> bool {
    false
}

#[cfg(feature = "mutations")]
pub use made::{is, set};

#[cfg(feature = "mutations")]
mod made {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        /// The one thread-local of the engine, for tests that run worlds with different breaks side by side.
        static MADE: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// Makes a break on this thread, and only that one; or none.
    pub fn set(mutation: Option<Mutation>) {
        MADE.set(mutation);
    }

    /// Whether this break is made on this thread.
    pub fn is(mutation: Mutation) -> bool {
        MADE.get() == Some(mutation)
    }
}
