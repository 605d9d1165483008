//! Role, disk and connection states, and the tables that say what a pair of them permits.
//! Called by volume and channels on every write, by the handshake and by the RPC for names.
//! Must not know sessions, commands or how a state is reached.

use std::fmt;

use thiserror::Error;

/// Declares a state enum whose variants are listed in the order that comparisons mean, with the wire
/// value (the position), the name shown to users, and `ALL`.
macro_rules! ordered_states {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum $name { $($(#[$inner])* $variant),+ }

        impl $name {
            /// Every state, in order.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The state with this wire value; `None` for a value that stands for no state.
            pub fn from_u8(value: u8) -> Option<$name> {
                Self::ALL.get(usize::from(value)).copied()
            }

            /// The wire value.
            pub const fn as_u8(self) -> u8 {
                self as u8
            }

            /// The name that users see, DRBD's spelling.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => stringify!($variant)),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

ordered_states! {
    /// What a node does with a volume.
    Role {
        /// A peer that has not said.
        Unknown,
        /// Takes application I/O.
        Primary,
        /// Takes the writes of a Primary only.
        Secondary,
    }
}

ordered_states! {
    /// What a replica is worth, from nothing to everything. `disk` is ours, `pdsk` a peer's.
    DiskState {
        /// No backing bdev.
        Diskless,
        /// Metadata is being read.
        Attaching,
        /// Failed; being detached.
        Failed,
        /// Attached, and waiting for a handshake to say what it is worth.
        Negotiating,
        /// Holds a mixture of old and new blocks.
        Inconsistent,
        /// Holds one moment of the past.
        Outdated,
        /// Not known (a peer that is not connected).
        DUnknown,
        /// Holds one moment; whether it is the newest is not known yet.
        Consistent,
        /// Holds the newest data.
        UpToDate,
    }
}

ordered_states! {
    /// Connection and replication state towards one peer. Below `Connected` there is no session.
    ConnState {
        /// Not connected and not trying.
        StandAlone,
        /// Being disconnected by request.
        Disconnecting,
        /// Between two attempts.
        Unconnected,
        /// The peer did not answer in time.
        Timeout,
        /// The transport broke.
        BrokenPipe,
        /// The link failed in another way.
        NetworkFailure,
        /// The peer said what it must not say.
        ProtocolError,
        /// The peer is taking the connection down.
        TearDown,
        /// Trying to reach the peer.
        Connecting,
        /// Hellos are being exchanged.
        WFReportParams,
        /// Replicating.
        Connected,
        /// Full sync towards the peer is being prepared.
        StartingSyncS,
        /// Full sync from the peer is being prepared.
        StartingSyncT,
        /// Bitmaps are being exchanged; we shall be the source.
        WFBitMapS,
        /// Bitmaps are being exchanged; we shall be the target.
        WFBitMapT,
        /// Target: waiting for the source's generation.
        WFSyncUUID,
        /// The peer pulls blocks from us.
        SyncSource,
        /// We pull blocks from the peer.
        SyncTarget,
        /// Online verify, source of the digests.
        VerifyS,
        /// Online verify, compares the digests.
        VerifyT,
        /// As SyncSource, held.
        PausedSyncS,
        /// As SyncTarget, held.
        PausedSyncT,
        /// We run ahead of a congested link; the peer is told ranges only.
        Ahead,
        /// The peer runs ahead of us.
        Behind,
    }
}

impl ConnState {
    /// A session with the peer exists.
    pub fn is_connected(self) -> bool {
        self >= ConnState::Connected
    }

    /// A resync from us is running or held.
    pub fn is_sync_source(self) -> bool {
        matches!(self, ConnState::SyncSource | ConnState::PausedSyncS)
    }

    /// A resync to us is running or held.
    pub fn is_sync_target(self) -> bool {
        matches!(self, ConnState::SyncTarget | ConnState::PausedSyncT)
    }
}

/// Whether a write of ours is sent to a peer whose disk is `pdsk`.
///
/// DRBD protocol 96, and its version 9 for `Connected` with an Inconsistent peer (it syncs from a third
/// node). Meaningful for pairs that [`permitted_pdsk`] allows.
pub const fn should_do_remote(pdsk: DiskState, conn: ConnState) -> bool {
    use DiskState::{Inconsistent, UpToDate};
    let disk = pdsk as u8;
    let connection = conn as u8;
    disk == UpToDate as u8
        || (disk >= Inconsistent as u8
            && connection >= ConnState::WFBitMapT as u8
            && connection < ConnState::Ahead as u8)
        || (disk == Inconsistent as u8 && connection == ConnState::Connected as u8)
}

/// Whether a peer is told the range of a write of ours (and its bit set here) instead of the data.
///
/// DRBD protocol 96, and its version 9 for an Outdated peer. Meaningful for pairs that
/// [`permitted_pdsk`] allows.
pub const fn should_send_oos(pdsk: DiskState, conn: ConnState) -> bool {
    use DiskState::{Inconsistent, Outdated};
    let disk = pdsk as u8;
    let connection = conn as u8;
    (disk >= Inconsistent as u8 && matches!(conn, ConnState::Ahead | ConnState::WFBitMapS))
        || (disk == Outdated as u8 && connection >= ConnState::Connected as u8)
}

/// The peer disk states that may stand beside a connection state.
///
/// This is what makes [`should_do_remote`] and [`should_send_oos`] exclude each other: where ranges are
/// sent instead of data the peer is at most Consistent, and where data is sent it is not Outdated.
pub const fn permitted_pdsk(conn: ConnState) -> &'static [DiskState] {
    use ConnState as C;
    use DiskState as D;
    match conn {
        // What is known of a peer that is not connected is never better than "unknown"; a peer that was
        // fenced or that left Diskless, Inconsistent or Outdated is remembered as that.
        C::StandAlone
        | C::Disconnecting
        | C::Unconnected
        | C::Timeout
        | C::BrokenPipe
        | C::NetworkFailure
        | C::ProtocolError
        | C::TearDown
        | C::Connecting
        | C::WFReportParams => &[
            D::Diskless,
            D::Attaching,
            D::Failed,
            D::Negotiating,
            D::Inconsistent,
            D::Outdated,
            D::DUnknown,
        ],
        // A connected peer says what its disk is.
        C::Connected => &[
            D::Diskless,
            D::Attaching,
            D::Failed,
            D::Negotiating,
            D::Inconsistent,
            D::Outdated,
            D::Consistent,
            D::UpToDate,
        ],
        // The target to be: whatever it claimed, the decision says that it is behind.
        C::StartingSyncS | C::WFBitMapS | C::Ahead => {
            &[D::Inconsistent, D::Outdated, D::Consistent]
        }
        // The target of a resync is Inconsistent from its start to its finish.
        C::SyncSource | C::PausedSyncS => &[D::Inconsistent],
        // The source has what we lack.
        C::StartingSyncT
        | C::WFBitMapT
        | C::WFSyncUUID
        | C::SyncTarget
        | C::PausedSyncT
        | C::Behind
        | C::VerifyS
        | C::VerifyT => &[D::UpToDate],
    }
}

/// A pair of connection and peer disk state that must not be entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("peer disk {pdsk} is not permitted while the connection is {conn}")]
pub struct IllegalPair {
    /// The connection state asked for.
    pub conn: ConnState,
    /// The peer disk state asked for.
    pub pdsk: DiskState,
}

/// Connection state and peer disk state together; only permitted pairs can be made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PeerState {
    conn: ConnState,
    pdsk: DiskState,
}

impl PeerState {
    /// Not connected, and nothing known.
    pub const STAND_ALONE: PeerState = PeerState {
        conn: ConnState::StandAlone,
        pdsk: DiskState::DUnknown,
    };

    /// The pair, if [`permitted_pdsk`] has it.
    pub fn new(conn: ConnState, pdsk: DiskState) -> Result<PeerState, IllegalPair> {
        if permitted_pdsk(conn).contains(&pdsk) {
            Ok(PeerState { conn, pdsk })
        } else {
            Err(IllegalPair { conn, pdsk })
        }
    }

    /// The pair for a peer that reported `reported`: the best permitted state that is not better than
    /// that. An UpToDate peer that becomes our sync target is thus held as Consistent until it starts.
    pub fn lowered(conn: ConnState, reported: DiskState) -> Result<PeerState, IllegalPair> {
        permitted_pdsk(conn)
            .iter()
            .rev()
            .find(|&&permitted| permitted <= reported)
            .map(|&pdsk| PeerState { conn, pdsk })
            .ok_or(IllegalPair {
                conn,
                pdsk: reported,
            })
    }

    /// The connection state.
    pub const fn conn(self) -> ConnState {
        self.conn
    }

    /// The peer's disk state.
    pub const fn pdsk(self) -> DiskState {
        self.pdsk
    }

    /// See [`should_do_remote`].
    pub const fn should_do_remote(self) -> bool {
        should_do_remote(self.pdsk, self.conn)
    }

    /// See [`should_send_oos`].
    pub const fn should_send_oos(self) -> bool {
        should_send_oos(self.pdsk, self.conn)
    }
}

/// Whether a connection state lets application I/O go on. With `io_during_bitmap` (a negotiated feature)
/// the source of a bitmap exchange goes on too.
pub const fn connection_permits_io(conn: ConnState, io_during_bitmap: bool) -> bool {
    match conn {
        ConnState::WFBitMapT | ConnState::WFSyncUUID => false,
        ConnState::WFBitMapS => io_during_bitmap,
        _ => true,
    }
}

/// Whether a disk state lets application I/O go on (on this disk or, below Inconsistent, on peers).
pub const fn disk_permits_io(disk: DiskState) -> bool {
    !matches!(
        disk,
        DiskState::Attaching | DiskState::Negotiating | DiskState::DUnknown
    )
}

/// Whether application I/O may start now; if not, it is held, not failed. `peers` gives for each
/// configured peer its connection state and whether `io_during_bitmap` was negotiated with it.
pub fn may_do_io(disk: DiskState, peers: impl IntoIterator<Item = (ConnState, bool)>) -> bool {
    disk_permits_io(disk)
        && peers
            .into_iter()
            .all(|(conn, io_during_bitmap)| connection_permits_io(conn, io_during_bitmap))
}

/// What [`can_promote`] looks at in one peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PromotePeer {
    /// Its slot, 0 to 6, for the refusal's text.
    pub slot: usize,
    /// Its role, `Unknown` when not connected.
    pub role: Role,
    /// Connection and disk state.
    pub state: PeerState,
}

/// Why a node may not become Primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum PromoteRefusal {
    /// Two Primaries would write past each other.
    #[error("the peer in slot {slot} is Primary already; demote it first")]
    PeerIsPrimary {
        /// The peer's slot.
        slot: usize,
    },
    /// A decision about this disk is being taken at this moment.
    #[error("the connection to the peer in slot {slot} is {conn}; try again when it is settled")]
    HandshakeInProgress {
        /// The peer's slot.
        slot: usize,
        /// Its connection state.
        conn: ConnState,
    },
    /// The disk is in a passing state.
    #[error("the disk is {disk}; try again when it is settled")]
    DiskInTransition {
        /// The disk state.
        disk: DiskState,
    },
    /// Neither this disk nor a connected peer has the newest data.
    #[error(
        "the disk is {disk} and no connected peer is UpToDate; connect a peer that is, or use force if \
         this replica is to be taken as the newest"
    )]
    NoUpToDateData {
        /// The disk state.
        disk: DiskState,
    },
    /// There is no local data that force could declare good.
    #[error(
        "the disk is {disk}: there is no data to promote with; attach a disk or connect a peer"
    )]
    NoData {
        /// The disk state.
        disk: DiskState,
    },
}

/// Whether this node may become Primary: UpToDate data here or on a connected peer, no other Primary,
/// nothing being decided. `force` declares an Inconsistent, Outdated or Consistent disk the newest; it
/// overrides neither another Primary nor a decision in progress.
pub fn can_promote(
    disk: DiskState,
    peers: impl IntoIterator<Item = PromotePeer>,
    force: bool,
) -> Result<(), PromoteRefusal> {
    if matches!(disk, DiskState::Attaching | DiskState::Negotiating) {
        return Err(PromoteRefusal::DiskInTransition { disk });
    }
    let mut up_to_date = disk == DiskState::UpToDate;
    for PromotePeer { slot, role, state } in peers {
        if role == Role::Primary {
            return Err(PromoteRefusal::PeerIsPrimary { slot });
        }
        let conn = state.conn();
        if matches!(
            conn,
            ConnState::WFReportParams
                | ConnState::StartingSyncT
                | ConnState::WFBitMapT
                | ConnState::WFSyncUUID
        ) {
            return Err(PromoteRefusal::HandshakeInProgress { slot, conn });
        }
        up_to_date |= conn.is_connected() && state.pdsk() == DiskState::UpToDate;
    }
    if up_to_date {
        return Ok(());
    }
    match (disk, force) {
        (DiskState::Inconsistent | DiskState::Outdated | DiskState::Consistent, true) => Ok(()),
        (DiskState::Inconsistent | DiskState::Outdated | DiskState::Consistent, false) => {
            Err(PromoteRefusal::NoUpToDateData { disk })
        }
        _ => Err(PromoteRefusal::NoData { disk }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legal_pairs() -> impl Iterator<Item = PeerState> {
        ConnState::ALL.iter().flat_map(|&conn| {
            DiskState::ALL
                .iter()
                .filter_map(move |&pdsk| PeerState::new(conn, pdsk).ok())
        })
    }

    #[test]
    fn wire_values_are_positions_in_the_order_and_others_are_nobody() {
        assert_eq!(
            (Role::ALL.len(), DiskState::ALL.len(), ConnState::ALL.len()),
            (3, 9, 24)
        );
        for (value, &conn) in ConnState::ALL.iter().enumerate() {
            assert_eq!(usize::from(conn.as_u8()), value);
            assert_eq!(ConnState::from_u8(conn.as_u8()), Some(conn));
        }
        assert_eq!(ConnState::from_u8(24), None);
        assert_eq!(DiskState::from_u8(9), None);
        assert_eq!(Role::from_u8(3), None);
        assert_eq!(DiskState::from_u8(6), Some(DiskState::DUnknown));
        assert_eq!(ConnState::WFBitMapS.to_string(), "WFBitMapS");
        assert_eq!(format!("{:<10}|", Role::Primary), "Primary   |");
    }

    #[test]
    fn the_order_of_states_is_the_one_that_the_rules_compare_by() {
        use DiskState::*;
        assert!(Failed < Negotiating && Negotiating < Inconsistent && Inconsistent < Outdated);
        assert!(Outdated < DUnknown && DUnknown < Consistent && Consistent < UpToDate);
        assert!(ConnState::WFReportParams < ConnState::Connected);
        assert!(ConnState::WFBitMapS < ConnState::WFBitMapT);
        assert!(ConnState::PausedSyncT < ConnState::Ahead);
    }

    #[test]
    fn no_legal_pair_sends_both_data_and_range() {
        let mut seen = 0;
        for pair in legal_pairs() {
            assert!(
                !(pair.should_do_remote() && pair.should_send_oos()),
                "{pair:?}"
            );
            seen += 1;
        }
        assert_eq!(seen, 10 * 7 + 8 + 3 * 3 + 2 + 8);
    }

    #[test]
    fn every_pair_that_would_send_both_cannot_be_entered() {
        let mut refused = 0;
        for &conn in ConnState::ALL {
            for &pdsk in DiskState::ALL {
                if should_do_remote(pdsk, conn) && should_send_oos(pdsk, conn) {
                    assert_eq!(PeerState::new(conn, pdsk), Err(IllegalPair { conn, pdsk }));
                    refused += 1;
                }
            }
        }
        assert!(refused > 0, "the second table would be pointless");
    }

    #[test]
    fn nothing_is_sent_to_a_peer_that_is_not_connected() {
        for pair in legal_pairs().filter(|pair| !pair.conn().is_connected()) {
            assert!(
                !pair.should_do_remote() && !pair.should_send_oos(),
                "{pair:?}"
            );
        }
    }

    #[test]
    fn a_resync_target_gets_data_and_a_bitmap_target_gets_ranges() {
        let pair = |conn, pdsk| PeerState::new(conn, pdsk).unwrap();
        assert!(pair(ConnState::SyncSource, DiskState::Inconsistent).should_do_remote());
        assert!(pair(ConnState::PausedSyncS, DiskState::Inconsistent).should_do_remote());
        assert!(pair(ConnState::WFBitMapT, DiskState::UpToDate).should_do_remote());
        assert!(pair(ConnState::Connected, DiskState::Inconsistent).should_do_remote());
        assert!(pair(ConnState::WFBitMapS, DiskState::Consistent).should_send_oos());
        assert!(pair(ConnState::Ahead, DiskState::Inconsistent).should_send_oos());
        assert!(pair(ConnState::Connected, DiskState::Outdated).should_send_oos());
        let diskless = pair(ConnState::Connected, DiskState::Diskless);
        assert!(!diskless.should_do_remote() && !diskless.should_send_oos());
    }

    #[test]
    fn an_up_to_date_peer_that_will_be_target_is_held_as_consistent() {
        let lowered = PeerState::lowered(ConnState::WFBitMapS, DiskState::UpToDate).unwrap();
        assert_eq!(lowered.pdsk(), DiskState::Consistent);
        let lost = PeerState::lowered(ConnState::NetworkFailure, DiskState::UpToDate).unwrap();
        assert_eq!(lost.pdsk(), DiskState::DUnknown);
        assert!(PeerState::lowered(ConnState::SyncTarget, DiskState::Outdated).is_err());
        assert!(PeerState::lowered(ConnState::SyncSource, DiskState::Diskless).is_err());
    }

    #[test]
    fn io_waits_only_where_the_newest_data_is_not_settled() {
        for &conn in ConnState::ALL {
            let held = matches!(conn, ConnState::WFBitMapT | ConnState::WFSyncUUID);
            assert_eq!(connection_permits_io(conn, true), !held, "{conn}");
            let held = held || conn == ConnState::WFBitMapS;
            assert_eq!(connection_permits_io(conn, false), !held, "{conn}");
        }
        for &disk in DiskState::ALL {
            use DiskState::*;
            let held = matches!(disk, Attaching | Negotiating | DUnknown);
            assert_eq!(may_do_io(disk, []), !held, "{disk}");
        }
        let peers = [(ConnState::Connected, true), (ConnState::WFBitMapT, true)];
        assert!(
            !may_do_io(DiskState::UpToDate, peers),
            "one peer is enough to hold"
        );
    }

    fn peer(role: Role, conn: ConnState, pdsk: DiskState) -> PromotePeer {
        PromotePeer {
            slot: 2,
            role,
            state: PeerState::new(conn, pdsk).unwrap(),
        }
    }

    #[test]
    fn promotion_needs_up_to_date_data_here_or_at_a_connected_peer() {
        use DiskState::*;
        let lone = [peer(Role::Unknown, ConnState::Connecting, DUnknown)];
        let good = [peer(Role::Secondary, ConnState::SyncTarget, UpToDate)];
        for &disk in DiskState::ALL {
            let alone = can_promote(disk, lone, false);
            assert_eq!(alone.is_ok(), disk == UpToDate, "{disk}");
            let with_peer = can_promote(disk, good, false);
            assert_eq!(
                with_peer.is_ok(),
                !matches!(disk, Attaching | Negotiating),
                "{disk}"
            );
            let forced = can_promote(disk, lone, true);
            let has_data = matches!(disk, Inconsistent | Outdated | Consistent | UpToDate);
            assert_eq!(forced.is_ok(), has_data, "{disk}");
        }
        assert_eq!(
            can_promote(Outdated, lone, false),
            Err(PromoteRefusal::NoUpToDateData { disk: Outdated })
        );
        assert_eq!(
            can_promote(Diskless, lone, true),
            Err(PromoteRefusal::NoData { disk: Diskless })
        );
    }

    #[test]
    fn promotion_is_refused_beside_a_primary_or_in_a_handshake_even_with_force() {
        let primary = [peer(
            Role::Primary,
            ConnState::Connected,
            DiskState::UpToDate,
        )];
        assert_eq!(
            can_promote(DiskState::UpToDate, primary, true),
            Err(PromoteRefusal::PeerIsPrimary { slot: 2 })
        );
        let deciding = [peer(
            Role::Secondary,
            ConnState::WFBitMapT,
            DiskState::UpToDate,
        )];
        assert_eq!(
            can_promote(DiskState::UpToDate, deciding, true),
            Err(PromoteRefusal::HandshakeInProgress {
                slot: 2,
                conn: ConnState::WFBitMapT
            })
        );
    }
}
