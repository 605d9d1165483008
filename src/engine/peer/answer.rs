//! What a peer's engine answers: a code in dword 0 of an NVMe completion whose status is success.
//! Called by both sides of a link. Must not know which command it answers.

/// The upper half of every answer, so that the success of a device that is not an engine (dword 0 is then
/// usually 0) is never taken for "applied".
const ANSWER_MARK: u32 = 0x5250 << 16;

/// An engine's answer. Any NVMe status other than success is not an answer and ends the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerAnswer {
    /// Done; for a write: applied.
    Ok,
    /// Applied earlier already; as good as `Ok`.
    Duplicate,
    /// The session is unknown or over.
    Fenced,
    /// Not now; the same command may be sent again soon.
    NotYet,
    /// No room for the command; the same command may be sent again later, with fewer in flight.
    Busy,
    /// ResyncRead and Read: every byte is zero, and no data was filled in.
    Zeroes,
    /// SyncFinish: the source found more bits; go on.
    Again,
    /// The receiver's disk failed. For a write: it counts as applied, and the blocks are out of sync.
    DiskError,
    /// Will not be done; the reason is the command's own code, for HelloPut
    /// [`IncompatibleReason::code`](super::hello::IncompatibleReason::code).
    Refused(u8),
    /// The command or its body was not understood.
    Malformed,
}

impl PeerAnswer {
    /// One of each, by their codes.
    pub const ALL: [PeerAnswer; 10] = [
        PeerAnswer::Ok,
        PeerAnswer::Duplicate,
        PeerAnswer::Fenced,
        PeerAnswer::NotYet,
        PeerAnswer::Busy,
        PeerAnswer::Zeroes,
        PeerAnswer::Again,
        PeerAnswer::DiskError,
        PeerAnswer::Refused(0),
        PeerAnswer::Malformed,
    ];

    /// Completion dword 0: the mark in bits 31:16, the reason of `Refused` in 15:8, the code in 7:0.
    pub const fn to_dword0(self) -> u32 {
        let low = match self {
            PeerAnswer::Ok => 1,
            PeerAnswer::Duplicate => 2,
            PeerAnswer::Fenced => 3,
            PeerAnswer::NotYet => 4,
            PeerAnswer::Busy => 5,
            PeerAnswer::Zeroes => 6,
            PeerAnswer::Again => 7,
            PeerAnswer::DiskError => 8,
            PeerAnswer::Refused(reason) => 9 | (reason as u32) << 8,
            PeerAnswer::Malformed => 10,
        };
        ANSWER_MARK | low
    }

    /// The answer in a completion; whatever is no answer of ours is `Malformed`.
    pub const fn from_dword0(dword0: u32) -> PeerAnswer {
        match dword0 ^ ANSWER_MARK {
            1 => PeerAnswer::Ok,
            2 => PeerAnswer::Duplicate,
            3 => PeerAnswer::Fenced,
            4 => PeerAnswer::NotYet,
            5 => PeerAnswer::Busy,
            6 => PeerAnswer::Zeroes,
            7 => PeerAnswer::Again,
            8 => PeerAnswer::DiskError,
            low if low & 0xff == 9 && low < 1 << 16 => PeerAnswer::Refused((low >> 8) as u8),
            _ => PeerAnswer::Malformed,
        }
    }

    /// The command has taken effect.
    pub const fn is_applied(self) -> bool {
        matches!(self, PeerAnswer::Ok | PeerAnswer::Duplicate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_as_they_were_sent() {
        let refused = (0..=255).map(PeerAnswer::Refused);
        for answer in PeerAnswer::ALL.into_iter().chain(refused) {
            assert_eq!(PeerAnswer::from_dword0(answer.to_dword0()), answer);
        }
    }

    #[test]
    fn all_have_every_code_once() {
        let codes = PeerAnswer::ALL.map(|answer| answer.to_dword0() & 0xff);
        assert!(codes.into_iter().eq(1..=10));
        assert_eq!(
            PeerAnswer::from_dword0(ANSWER_MARK | 11),
            PeerAnswer::Malformed
        );
    }

    #[test]
    fn a_success_that_no_engine_gave_is_not_taken_for_applied() {
        for dword0 in [
            0,
            1,
            9,
            u32::MAX,
            ANSWER_MARK,
            ANSWER_MARK | 11,
            ANSWER_MARK | 0x101,
        ] {
            assert_eq!(
                PeerAnswer::from_dword0(dword0),
                PeerAnswer::Malformed,
                "{dword0:#x}"
            );
        }
    }
}
