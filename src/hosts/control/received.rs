//! A vendor command that arrived at an endpoint, as the engine's command. Called on the core where it arrived, for
//! each: must not allocate. Must not know where its data is.

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

#[cfg(test)]
mod tests {
    use super::*;
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
