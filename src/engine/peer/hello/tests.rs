//! What must hold of Hellos; also makes the Hellos for the handshake's tests.

use super::*;
use proptest::prelude::*;

/// A Secondary with good data of `current_generation`, nothing dirty, nothing special.
pub(in super::super) fn hello_of(node_id: u8, peer_node_id: u8, current_generation: u64) -> Hello {
    Hello {
        protocol_min: PROTOCOL_VERSIONS.0,
        protocol_max: PROTOCOL_VERSIONS.1,
        features: feature::IO_DURING_BITMAP,
        node_id,
        peer_node_id,
        volume_uuid: *b"volume-uuid-0001",
        block_size_bytes: 4096,
        size_blocks: 1 << 20,
        granularity_log2: 12,
        role: Role::Secondary,
        disk: DiskState::UpToDate,
        crashed_primary: false,
        unclean: false,
        wants_full_sync: false,
        discard_my_data: false,
        lost_quorum: false,
        had_session: false,
        sees_primary: false,
        is_target: false,
        told: false,
        starting: false,
        has_others: false,
        current_generation,
        bitmap_generation: GENERATION_NONE,
        history: [GENERATION_NONE; HISTORY_LEN],
        dirty_bits: 0,
        nonce: u64::from(node_id) + 1000,
        max_transfer_bytes: 128 * 1024,
        in_capsule_bytes: 4096,
        credits: 32,
    }
}

/// Generations from a small pool, so that two Hellos often share some.
fn shared_generation() -> impl Strategy<Value = u64> {
    (1..7u64).prop_map(|n| n * 16)
}

/// A valid Hello of one node for another.
pub(in super::super) fn any_hello(node_id: u8, peer_node_id: u8) -> impl Strategy<Value = Hello> {
    let disk: Vec<DiskState> = DiskState::ALL
        .iter()
        .copied()
        .filter(|&disk| disk != DiskState::DUnknown)
        .collect();
    let disk = prop_oneof![
        1 => prop::sample::select(disk),
        4 => prop::sample::select(&DiskState::ALL[4..6]),
        8 => prop::sample::select(&DiskState::ALL[7..]),
    ];
    let current = prop_oneof![1 => Just(GENERATION_JUST_CREATED), 8 => shared_generation()];
    let bitmap = prop_oneof![
        8 => Just(GENERATION_NONE),
        1 => Just(GENERATION_JUST_CREATED),
        12 => shared_generation(),
    ];
    let history = prop::collection::vec(shared_generation(), 0..4);
    let dirty_bits = prop_oneof![1 => Just(0u64), 1 => 1..1000u64];
    // Rare flags, so that the generations get to speak.
    let flag = || prop::bool::weighted(0.15);
    let flags = (
        flag(),
        flag(),
        flag(),
        flag(),
        flag(),
        any::<bool>(),
        flag(),
        flag(),
        flag(),
        flag(),
        flag(),
    );
    let role = prop::sample::select(&Role::ALL[1..]);
    (
        role,
        disk,
        current,
        bitmap,
        history,
        dirty_bits,
        flags,
        1..u64::MAX,
    )
        .prop_map(
            move |(role, disk, current, bitmap, shared, dirty_bits, flags, nonce)| {
                let mut history = [GENERATION_NONE; HISTORY_LEN];
                history[..shared.len()].copy_from_slice(&shared);
                let just_created = current == GENERATION_JUST_CREATED;
                let disk = if just_created {
                    disk.min(DiskState::Inconsistent)
                } else {
                    disk
                };
                Hello {
                    role,
                    disk,
                    bitmap_generation: bitmap,
                    history,
                    dirty_bits,
                    crashed_primary: flags.0,
                    unclean: flags.1,
                    wants_full_sync: flags.2,
                    discard_my_data: flags.3,
                    lost_quorum: flags.4,
                    had_session: flags.5,
                    sees_primary: flags.6,
                    is_target: flags.7,
                    told: flags.8,
                    starting: flags.9,
                    has_others: flags.10,
                    nonce,
                    ..hello_of(node_id, peer_node_id, current)
                }
            },
        )
}

proptest! {
    #[test]
    fn a_hello_comes_back_as_it_was_sent(hello in any_hello(2, 5)) {
        prop_assert_eq!(Hello::parse(&hello.emit()), Ok(hello));
    }

    #[test]
    fn one_changed_byte_is_an_error_or_a_hello_that_still_says_what_its_bytes_say(
        hello in any_hello(0, 1), at in 0..Hello::BYTES, value: u8,
    ) {
        let mut bytes = hello.emit();
        bytes[at] = value;
        if let Ok(parsed) = Hello::parse(&bytes) {
            prop_assert_eq!(&parsed.emit()[..Hello::FIELD_BYTES], &bytes[..Hello::FIELD_BYTES]);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Hello::parse(&bytes).is_err());
    }

    #[test]
    fn both_nodes_agree_on_the_same_or_on_the_same_refusal(
        a in any_hello(0, 1), b in any_hello(1, 0),
        versions in any::<[u8; 4]>(), features in any::<[u64; 2]>(), granularity in 12..21u8,
    ) {
        let range = |from: u8, to: u8| (u16::from(from.min(to) % 8), u16::from(from.max(to) % 8 + 8));
        let (low, high) = range(versions[0], versions[1]);
        let a = Hello { protocol_min: low, protocol_max: high, features: features[0], ..a };
        let (low, high) = range(versions[2], versions[3]);
        let b = Hello { protocol_min: low, protocol_max: high, features: features[1], ..b };
        let b = Hello { granularity_log2: granularity, ..b };
        match (negotiate(&a, &b), negotiate(&b, &a)) {
            (Ok(here), Ok(there)) => {
                prop_assert_eq!(here, there);
                prop_assert!(here.protocol >= a.protocol_min.max(b.protocol_min));
            }
            (Err(here), Err(there)) => prop_assert_eq!(here.code(), there.code()),
            (here, there) => prop_assert!(false, "{here:?} against {there:?}"),
        }
    }

    #[test]
    fn a_session_id_is_the_same_on_both_sides_and_never_zero(a: u64, b: u64) {
        prop_assert_eq!(session_id(a, b), session_id(b, a));
        prop_assert_ne!(session_id(a, b), 0);
        prop_assert_ne!(session_id(a, b), session_id(a.wrapping_add(1), b));
    }
}

#[test]
fn bytes_behind_the_last_field_are_left_to_later_versions() {
    let hello = hello_of(0, 1, 16);
    let mut bytes = hello.emit();
    bytes[Hello::FIELD_BYTES..].fill(0xaa);
    assert_eq!(Hello::parse(&bytes), Ok(hello));
}

#[test]
fn a_hello_that_contradicts_itself_is_refused_by_field() {
    let good = hello_of(0, 1, 16);
    assert_eq!(Hello::parse(&good.emit()), Ok(good));
    let cases = [
        (
            "protocol_max",
            Hello {
                protocol_min: 2,
                protocol_max: 1,
                ..good
            },
        ),
        ("node_id", Hello { node_id: 8, ..good }),
        (
            "peer_node_id",
            Hello {
                peer_node_id: 200,
                ..good
            },
        ),
        (
            "block_size_bytes",
            Hello {
                block_size_bytes: 520,
                ..good
            },
        ),
        (
            "block_size_bytes",
            Hello {
                block_size_bytes: 0,
                ..good
            },
        ),
        (
            "size_blocks",
            Hello {
                size_blocks: 0,
                ..good
            },
        ),
        (
            "size_blocks",
            Hello {
                size_blocks: u64::MAX,
                ..good
            },
        ),
        (
            "granularity_log2",
            Hello {
                granularity_log2: 11,
                ..good
            },
        ),
        (
            "role",
            Hello {
                role: Role::Unknown,
                ..good
            },
        ),
        (
            "disk",
            Hello {
                disk: DiskState::DUnknown,
                ..good
            },
        ),
        ("nonce", Hello { nonce: 0, ..good }),
        (
            "credits",
            Hello {
                credits: 31,
                ..good
            },
        ),
        (
            "max_transfer_bytes",
            Hello {
                max_transfer_bytes: 512,
                ..good
            },
        ),
        (
            "current_generation",
            Hello {
                current_generation: GENERATION_NONE,
                ..good
            },
        ),
        (
            "current_generation",
            Hello {
                current_generation: GENERATION_JUST_CREATED,
                ..good
            },
        ),
        (
            "history",
            Hello {
                history: [GENERATION_JUST_CREATED; 16],
                ..good
            },
        ),
        (
            "history",
            Hello {
                history: std::array::from_fn(|n| n as u64 % 2 * 16),
                ..good
            },
        ),
    ];
    for (name, hello) in cases {
        match Hello::parse(&hello.emit()) {
            Err(LayoutError::Value {
                structure: "Hello",
                field,
                ..
            }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let diskless = Hello {
        disk: DiskState::Diskless,
        current_generation: GENERATION_NONE,
        size_blocks: 0,
        ..good
    };
    assert_eq!(Hello::parse(&diskless.emit()), Ok(diskless));
}

#[test]
fn nodes_that_do_not_fit_each_other_are_told_why_with_both_values() {
    let mine = hello_of(0, 1, 16);
    let theirs = hello_of(1, 0, 16);
    let reason = |theirs: Hello| negotiate(&mine, &theirs).unwrap_err();
    let text = |theirs: Hello| reason(theirs).to_string();
    assert_eq!(
        text(Hello {
            protocol_min: 3,
            protocol_max: 4,
            ..theirs
        }),
        "no common protocol version: we speak 2 to 2, the peer 3 to 4"
    );
    assert!(
        text(Hello {
            volume_uuid: [7; 16],
            ..theirs
        })
        .contains("07070707-0707")
    );
    assert_eq!(
        text(Hello {
            node_id: 2,
            ..theirs
        }),
        "we are node 0 and expect node 1; the peer is node 2 and expects node 0"
    );
    assert_eq!(
        reason(Hello {
            peer_node_id: 3,
            ..theirs
        })
        .code(),
        3
    );
    assert_eq!(
        text(Hello {
            block_size_bytes: 512,
            ..theirs
        }),
        "our block size is 4096 bytes, the peer's 512 bytes"
    );
    let other_size = text(Hello {
        size_blocks: 5,
        ..theirs
    });
    assert!(
        other_size.contains("1048576 blocks") && other_size.contains("5 blocks"),
        "{other_size}"
    );
    let diskless = Hello {
        disk: DiskState::Diskless,
        size_blocks: 0,
        ..theirs
    };
    assert!(
        negotiate(&mine, &diskless).is_ok(),
        "a diskless node takes the size of its peer"
    );
}

#[test]
fn limits_are_the_smaller_and_bitmaps_the_coarser_of_both() {
    let mine = Hello {
        credits: 40,
        in_capsule_bytes: 8192,
        ..hello_of(0, 1, 16)
    };
    let theirs = Hello {
        max_transfer_bytes: 65536,
        granularity_log2: 16,
        features: 3,
        ..hello_of(1, 0, 16)
    };
    assert_eq!(
        negotiate(&mine, &theirs),
        Ok(Negotiated {
            protocol: 2,
            features: feature::IO_DURING_BITMAP,
            granularity_log2: 16,
            max_transfer_bytes: 65536,
            in_capsule_bytes: 4096,
            credits: 32,
        })
    );
}

#[test]
fn fields_are_where_the_protocol_document_has_them() {
    let hello = Hello {
        disk: DiskState::Consistent,
        lost_quorum: true,
        bitmap_generation: 0x0a0b,
        dirty_bits: 0x0c0d,
        history: std::array::from_fn(|n| 0x100 * (n as u64 + 1)),
        ..hello_of(3, 6, 0x0e0f)
    };
    let bytes = hello.emit();
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(&bytes[..10], b"BDRPHELO\x00\x02");
    assert_eq!((bytes[14], bytes[15], bytes[24]), (3, 6, b'v'));
    assert_eq!((number(40), bytes[49], bytes[52]), (1 << 20, 0x10, 12));
    assert_eq!((bytes[53], bytes[54], bytes[56]), (2, 7, 1 << 4));
    assert_eq!((bytes[62], bytes[65], bytes[68]), (2, 0x10, 32));
    assert_eq!((number(72), number(80)), (1003, 0x0c0d));
    assert_eq!((number(88), number(96)), (0x0e0f, 0x0a0b));
    assert_eq!((number(104), number(224), number(232)), (0x100, 0x1000, 0));
}
