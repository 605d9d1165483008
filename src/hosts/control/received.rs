//! A vendor command that arrived at an endpoint, as the engine's command, and what a completion says of the engine that
//! answered. Called on the core where it arrived, for each: must not allocate. Must not know where its data is.

use crate::engine::peer::answer::PeerAnswer;
use crate::engine::peer::command::{CommandWords, PeerCommand};

/// Parses a command and holds its data length against the volume's block size. `words` are CDW2, CDW3 and CDW10 to
/// CDW15.
///
/// # Errors
/// The answer for what is no command of ours.
pub fn command(
    opcode: u8,
    words: [u32; 8],
    data_len: u32,
    block_size: u32,
) -> Result<PeerCommand, PeerAnswer> {
    PeerCommand::parse(opcode, &CommandWords(words), data_len)
        .ok()
        .filter(|command| command.data_len(block_size) == Some(data_len))
        .ok_or(PeerAnswer::Malformed)
}

/// Status code type and status code (NVM Express Base Specification, "Command Abort Requested") of an answer to a command
/// that reads, where none of the data that it asks for goes along: a target sends all of it with a success. No host tries
/// a command with this status again by itself.
pub const NO_DATA: (u8, u8) = (0x0, 0x07);

/// Whether a command with this opcode is to be answered with [`NO_DATA`].
pub fn is_without_data(opcode: u8, answer: PeerAnswer) -> bool {
    const CONTROLLER_TO_HOST: u8 = 0b10;
    opcode & 0b11 == CONTROLLER_TO_HOST && answer != PeerAnswer::Ok
}

/// The engine's answer in a completion; `None` if the transport or the target gave it.
pub fn answer(code_type: u8, code: u8, dword0: u32) -> Option<PeerAnswer> {
    let answer = PeerAnswer::from_dword0(dword0);
    match (code_type, code) {
        (0, 0) => Some(answer),
        NO_DATA if answer != PeerAnswer::Malformed => Some(answer),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_is_an_answer_only_with_the_mark_of_an_engine() {
        let not_yet = PeerAnswer::NotYet.to_dword0();
        assert_eq!(answer(0, 0, not_yet), Some(PeerAnswer::NotYet));
        assert_eq!(answer(0, 7, not_yet), Some(PeerAnswer::NotYet));
        assert_eq!(answer(0, 7, 0), None, "an abort by the transport");
        assert_eq!(answer(0, 8, not_yet), None, "the queue was deleted");
        assert_eq!(answer(3, 2, not_yet), None);
    }

    #[test]
    fn what_is_read_goes_along_with_ok_only() {
        assert!(is_without_data(0x82, PeerAnswer::NotYet));
        assert!(!is_without_data(0x82, PeerAnswer::Ok));
        assert!(!is_without_data(0x81, PeerAnswer::NotYet), "it brings data");
        assert!(!is_without_data(0x80, PeerAnswer::NotYet));
    }
    use crate::engine::peer::command::{Span, WriteOrder};

    #[test]
    fn a_write_is_taken_with_as_much_data_as_the_volume_has_for_its_blocks() {
        let write = PeerCommand::Write {
            session: 7,
            span: Span::new(8, 2).unwrap(),
            fua: false,
            order: WriteOrder::new(1),
        };
        let words = write.emit().0;
        let parse = |data_len| command(write.opcode(), words, data_len, 512);
        assert_eq!(parse(1024), Ok(write));
        assert_eq!(
            parse(8192),
            Err(PeerAnswer::Malformed),
            "two blocks of another size"
        );
        assert_eq!(parse(1000), Err(PeerAnswer::Malformed));
        assert_eq!(
            command(0x7f, words, 1024, 512),
            Err(PeerAnswer::Malformed),
            "no such command"
        );
    }
}
