//! What must hold of every peer command on the wire.

use super::order::NO_POINT;
use super::*;
use proptest::prelude::*;

const SESSION: u32 = 0x5e55_1011;

fn span() -> impl Strategy<Value = Span> {
    (0..LBA_LIMIT, 1..=256u32).prop_map(|(lba, blocks)| {
        Span::new(lba.min(LBA_LIMIT - u64::from(blocks)), blocks).unwrap()
    })
}

fn order() -> impl Strategy<Value = WriteOrder> {
    let back = || prop::option::of(prop_oneof![0..1000u64, any::<u64>()]);
    (any::<u64>(), back(), back(), any::<u8>()).prop_map(
        |(sequence, applied, dependency, nodes)| {
            let mut order = WriteOrder::new(sequence);
            if let Some(back) = applied {
                order = order.with_all_applied(sequence.saturating_sub(back), nodes);
            }
            if let Some(back) = dependency {
                order = order.with_dependency(sequence.saturating_sub(back));
            }
            order
        },
    )
}

fn command() -> impl Strategy<Value = PeerCommand> {
    let len = || 1..=MAX_TRANSFER_BYTES;
    let session = || 1..=u32::MAX;
    let named = || (session(), any::<u64>(), len());
    prop_oneof![
        len().prop_map(|len| PeerCommand::HelloPut { len }),
        len().prop_map(|len| PeerCommand::HelloGet { len }),
        session().prop_map(|session| PeerCommand::Confirm { session }),
        session().prop_map(|session| PeerCommand::Ping { session }),
        named().prop_map(|(session, sequence, len)| PeerCommand::StatePut {
            session,
            sequence,
            len
        }),
        (session(), span(), any::<bool>(), order()).prop_map(|(session, span, fua, order)| {
            PeerCommand::Write {
                session,
                span,
                fua,
                order,
            }
        }),
        (session(), span(), any::<bool>(), order()).prop_map(|(session, span, fua, order)| {
            PeerCommand::WriteZeroes {
                session,
                span,
                fua,
                order,
            }
        }),
        (session(), span(), order()).prop_map(|(session, span, order)| PeerCommand::Unmap {
            session,
            span,
            order
        }),
        (session(), span(), any::<u64>()).prop_map(|(session, span, must_include)| {
            PeerCommand::Read {
                session,
                span,
                must_include,
            }
        }),
        (session(), any::<u64>())
            .prop_map(|(session, sequence)| PeerCommand::Flush { session, sequence }),
        (session(), span(), any::<u64>(), any::<u64>()).prop_map(
            |(session, span, must_include, sequence)| {
                PeerCommand::ResyncRead {
                    session,
                    span,
                    must_include,
                    sequence,
                }
            }
        ),
        named().prop_map(|(session, sequence, len)| PeerCommand::ResyncDone {
            session,
            sequence,
            len
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::OutOfSync {
            session,
            sequence,
            len
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::BitmapOr {
            session,
            sequence,
            len
        }),
        (session(), any::<u64>(), any::<u64>()).prop_map(|(session, sequence, bits_set)| {
            PeerCommand::BitmapEnd {
                session,
                sequence,
                bits_set,
            }
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::SyncStart {
            session,
            sequence,
            len
        }),
        (named(), any::<bool>()).prop_map(|((session, sequence, len), durable)| {
            let phase = if durable {
                FinishPhase::Durable
            } else {
                FinishPhase::Ask
            };
            PeerCommand::SyncFinish {
                session,
                sequence,
                phase,
                len,
            }
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::NewGeneration {
            session,
            sequence,
            len
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::Prepare {
            session,
            sequence,
            len
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::Commit {
            session,
            sequence,
            len
        }),
        named().prop_map(|(session, sequence, len)| PeerCommand::Abort {
            session,
            sequence,
            len
        }),
        (session(), any::<u64>(), any::<bool>()).prop_map(|(session, sequence, outdate)| {
            PeerCommand::Goodbye {
                session,
                sequence,
                outdate,
            }
        }),
    ]
}

proptest! {
    #[test]
    fn a_command_comes_back_as_it_was_sent(command in command()) {
        let data_len = command.data_len(512).unwrap();
        prop_assert_eq!(PeerCommand::parse(command.opcode(), &command.emit(), data_len), Ok(command));
    }

    #[test]
    fn arbitrary_words_are_an_error_or_exactly_one_command(
        op in prop_oneof![any::<u8>(), prop::sample::select(&opcode::ALL[..])],
        words in any::<[u32; 8]>(),
        kept in any::<u8>(),
        data_len in prop_oneof![Just(0u32), Just(4096u32), any::<u32>()],
    ) {
        let mut words = words;
        for (index, word) in words.iter_mut().enumerate() {
            *word *= u32::from(kept >> index & 1);
        }
        let words = CommandWords(words);
        if let Ok(command) = PeerCommand::parse(op, &words, data_len) {
            prop_assert_eq!(command.opcode(), op);
            prop_assert_eq!(command.emit(), words);
        }
    }

    #[test]
    fn a_wrong_data_length_is_an_error(command in command(), data_len in any::<u32>()) {
        let parsed = PeerCommand::parse(command.opcode(), &command.emit(), data_len);
        let per_block = match command {
            PeerCommand::Write { span, .. }
            | PeerCommand::Read { span, .. }
            | PeerCommand::ResyncRead { span, .. } => Some(data_len / span.blocks()),
            _ => None,
        };
        let right = match per_block {
            Some(block_size_bytes) => command.data_len(block_size_bytes) == Some(data_len),
            None => command.data_len(512) == Some(data_len),
        };
        prop_assert!(right || parsed.is_err());
    }

    #[test]
    fn order_points_are_kept_or_dropped_but_never_moved(order in order()) {
        if let Some((point, _)) = order.all_applied() {
            prop_assert!(point <= order.sequence());
        }
        if let Some(point) = order.dependency() {
            prop_assert!(point <= order.sequence());
        }
    }
}

#[test]
fn an_opcode_carries_its_data_direction_and_is_a_vendor_opcode() {
    for (op, direction) in [
        (opcode::PING, DataDirection::None),
        (opcode::WRITE, DataDirection::HostToController),
        (opcode::HELLO_PUT, DataDirection::HostToController),
        (opcode::READ, DataDirection::ControllerToHost),
        (opcode::RESYNC_READ, DataDirection::ControllerToHost),
        (opcode::WRITE_ZEROES, DataDirection::None),
    ] {
        assert_eq!(data_direction(op), direction, "{op:#x}");
    }
    for (index, op) in opcode::ALL.into_iter().enumerate() {
        assert!(op >= 0x80, "{op:#x} is not in the vendor range");
        assert_ne!(op & 0b11, 0b11, "{op:#x} would go both ways");
        assert!(!opcode::ALL[..index].contains(&op), "{op:#x} stands twice");
    }
}

#[test]
fn opcodes_of_nobody_are_errors() {
    for op in 0..=u8::MAX {
        let parsed = PeerCommand::parse(op, &CommandWords([SESSION, 0, 0, 1, 0, 0, 0, 0]), 0);
        let unknown = parsed == Err(CommandError::UnknownOpcode(op));
        assert_eq!(unknown, !opcode::ALL.contains(&op), "{op:#x}");
    }
}

#[test]
fn the_layout_of_a_write_is_the_documented_one() {
    let write = PeerCommand::Write {
        session: SESSION,
        span: Span::new(0xabcd_1234_5678, 8).unwrap(),
        fua: true,
        order: WriteOrder::new(0x1_0000_0005)
            .with_all_applied(0x1_0000_0002, 0b101)
            .with_dependency(0),
    };
    let words = [SESSION, 0x1234_5678, 0x0501_abcd, 8, 5, 1, 3, NO_POINT];
    assert_eq!(write.emit(), CommandWords(words));
}

#[test]
fn a_point_farther_than_a_distance_reaches_is_not_sent() {
    let order = WriteOrder::new(1 << 40)
        .with_dependency(3)
        .with_all_applied((1 << 40) - 7, 0b11);
    assert_eq!(order.dependency(), None);
    assert_eq!(order.all_applied(), Some(((1 << 40) - 7, 0b11)));
}

#[test]
fn malformed_commands_are_named_errors() {
    let ping = PeerCommand::Ping { session: SESSION }.emit();
    assert_eq!(
        PeerCommand::parse(opcode::PING, &CommandWords([0; 8]), 0),
        Err(CommandError::NoSession(opcode::PING))
    );
    assert_eq!(
        PeerCommand::parse(opcode::PING, &ping, 4),
        Err(CommandError::DataLength {
            opcode: opcode::PING,
            stated: 0,
            data_len: 4
        })
    );
    let mut words = ping;
    words.0[2] = 1 << 16;
    assert_eq!(
        PeerCommand::parse(opcode::PING, &words, 0),
        Err(CommandError::UnknownFlags {
            opcode: opcode::PING,
            flags: 1
        })
    );
    let mut words = ping;
    words.0[7] = 9;
    assert_eq!(
        PeerCommand::parse(opcode::PING, &words, 0),
        Err(CommandError::ReservedNotZero {
            opcode: opcode::PING,
            word: 7,
            value: 9
        })
    );
    let empty = CommandWords([SESSION, 5, 0, 0, 1, 0, NO_POINT, NO_POINT]);
    assert_eq!(
        PeerCommand::parse(opcode::WRITE, &empty, 0),
        Err(CommandError::BadSpan {
            opcode: opcode::WRITE,
            lba: 5,
            blocks: 0
        })
    );
    let past_the_end = CommandWords([SESSION, u32::MAX, 0xffff, 2, 1, 0, NO_POINT, NO_POINT]);
    assert!(matches!(
        PeerCommand::parse(opcode::WRITE_ZEROES, &past_the_end, 0),
        Err(CommandError::BadSpan { blocks: 2, .. })
    ));
    let below_zero = CommandWords([SESSION, 5, 0, 1, 4, 0, 5, NO_POINT]);
    assert_eq!(
        PeerCommand::parse(opcode::UNMAP, &below_zero, 0),
        Err(CommandError::BadDistance {
            opcode: opcode::UNMAP,
            sequence: 4,
            distance: 5
        })
    );
}

#[test]
fn a_length_in_the_command_must_be_the_length_of_the_data() {
    let put = PeerCommand::StatePut {
        session: SESSION,
        sequence: 1,
        len: 64,
    };
    assert_eq!(PeerCommand::parse(put.opcode(), &put.emit(), 64), Ok(put));
    for data_len in [0, 63, 65, MAX_TRANSFER_BYTES + 1] {
        assert!(
            PeerCommand::parse(put.opcode(), &put.emit(), data_len).is_err(),
            "{data_len}"
        );
    }
    let nothing = PeerCommand::BitmapOr {
        session: SESSION,
        sequence: 1,
        len: 0,
    };
    assert!(PeerCommand::parse(nothing.opcode(), &nothing.emit(), 0).is_err());
    let read = PeerCommand::Read {
        session: SESSION,
        span: Span::new(0, 3).unwrap(),
        must_include: 0,
    };
    for (data_len, right) in [
        (1536, true),
        (3 * 4096, true),
        (1535, false),
        (3 * 600, false),
        (3, false),
    ] {
        assert_eq!(
            PeerCommand::parse(read.opcode(), &read.emit(), data_len).is_ok(),
            right,
            "{data_len}"
        );
    }
}

proptest! {
    #[test]
    fn a_command_that_changes_something_is_known_by_a_number(command in command()) {
        let by_its_channel = matches!(
            command,
            PeerCommand::Write { .. }
                | PeerCommand::WriteZeroes { .. }
                | PeerCommand::Unmap { .. }
                | PeerCommand::ResyncRead { .. }
        );
        let changes_nothing = matches!(
            command.opcode(),
            opcode::PING
                | opcode::HELLO_PUT
                | opcode::HELLO_GET
                | opcode::CONFIRM
                | opcode::READ
                | opcode::FLUSH
        );
        let number = command.control_sequence();
        prop_assert_eq!(number.is_none(), by_its_channel || changes_nothing);
        if let Some(number) = number {
            let words = command.emit().0;
            prop_assert_eq!(u64::from(words[4]) | u64::from(words[5]) << 32, number);
        }
    }
}
