//! Round trips and malformed headers.

use super::*;
use proptest::prelude::*;

fn digests() -> impl Strategy<Value = Digests> {
    (any::<bool>(), any::<bool>()).prop_map(|(header, data)| Digests { header, data })
}

fn data_header(from_host: bool, payload: u32) -> impl Strategy<Value = DataHeader> {
    (any::<u16>(), any::<u16>(), any::<u32>(), any::<bool>()).prop_map(
        move |(command_id, tag, offset_bytes, last)| DataHeader {
            command_id,
            transfer_tag: if from_host { tag } else { 0 },
            offset_bytes,
            length_bytes: payload,
            last,
            success: !from_host && last && tag & 1 == 0,
        },
    )
}

fn any_header() -> impl Strategy<Value = (PduHeader, u32)> {
    prop_oneof![
        (any::<u16>(), any::<u8>(), digests(), any::<u32>()).prop_map(|(v, a, d, r)| {
            let request = IcReq {
                version: v,
                alignment: a,
                digests: d,
                max_r2t: r,
            };
            (PduHeader::IcReq(request), 0)
        }),
        (any::<u16>(), any::<u8>(), digests(), any::<u32>()).prop_map(|(v, a, d, m)| {
            let response = IcResp {
                version: v,
                alignment: a,
                digests: d,
                max_h2c_data_bytes: m,
            };
            (PduHeader::IcResp(response), 0)
        }),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..=128)).prop_map(|(i, h)| {
            let fault = Fault {
                error: FatalError::HeaderDigest,
                information: i,
            };
            (PduHeader::H2cTermReq(TermReq::new(fault, &h)), 0)
        }),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..=128)).prop_map(|(i, h)| {
            let fault = Fault {
                error: FatalError::PduSequence,
                information: i,
            };
            (PduHeader::C2hTermReq(TermReq::new(fault, &h)), 0)
        }),
        (any::<[u8; 32]>(), prop_oneof![Just(0), 1u32..200_000]).prop_map(|(half, payload)| {
            let mut entry = [0; 64];
            entry[..32].copy_from_slice(&half);
            (PduHeader::CapsuleCmd(entry), payload)
        }),
        any::<[u8; 16]>().prop_map(|entry| (PduHeader::CapsuleResp(entry), 0)),
        (1u32..200_000)
            .prop_flat_map(|n| data_header(true, n).prop_map(move |d| (PduHeader::H2cData(d), n))),
        (1u32..200_000)
            .prop_flat_map(|n| data_header(false, n).prop_map(move |d| (PduHeader::C2hData(d), n))),
        (any::<u16>(), any::<u16>(), any::<u32>(), any::<u32>()).prop_map(|(c, t, o, l)| {
            let ready = R2t {
                command_id: c,
                transfer_tag: t,
                offset_bytes: o,
                length_bytes: l,
            };
            (PduHeader::R2t(ready), 0)
        }),
    ]
}

fn parse(
    bytes: &[u8],
    sender: Sender,
    digests: Digests,
) -> Result<(CommonHeader, PduHeader), Fault> {
    let common = CommonHeader::parse(bytes.first_chunk().unwrap(), sender, digests)?;
    Ok((common, PduHeader::parse(&common, bytes)?))
}

proptest! {
    #[test]
    fn what_was_emitted_is_parsed(
        (header, payload) in any_header(),
        digests in digests(),
        alignment in 0u8..32,
    ) {
        let mut out = [0xee; EMIT_BYTES_MAX];
        let written = header.emit(digests, alignment, payload, &mut out);
        let (common, parsed) = parse(&out[..written], header.kind().sender(), digests).unwrap();
        prop_assert_eq!(parsed, header);
        prop_assert_eq!(common.bytes_before_payload(), written);
        prop_assert_eq!(common.payload_bytes(), payload);
        prop_assert_eq!(common.has_payload_digest(), payload > 0 && digests.data);
        if payload > 0 {
            prop_assert_eq!(written % ((usize::from(alignment) + 1) * 4), 0);
        }
    }

    #[test]
    fn random_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 8..300),
        from_host in any::<bool>(),
        digests in digests(),
    ) {
        let sender = if from_host { Sender::Host } else { Sender::Controller };
        let _ = parse(&bytes, sender, digests);
    }

    #[test]
    fn one_flipped_bit_in_a_protected_header_is_found(
        (header, payload) in any_header(),
        bit in 64usize..192,
    ) {
        let digests = Digests { header: true, data: false };
        prop_assume!(header.kind().has_header_digest());
        let mut out = [0; EMIT_BYTES_MAX];
        let written = header.emit(digests, 0, payload, &mut out);
        out[bit / 8] ^= 1 << (bit % 8);
        let fault = parse(&out[..written], header.kind().sender(), digests).unwrap_err();
        prop_assert_eq!(fault.error, FatalError::HeaderDigest);
    }
}

fn fault_of(change: impl Fn(&mut [u8; EMIT_BYTES_MAX])) -> Fault {
    let mut out = [0; EMIT_BYTES_MAX];
    let written = PduHeader::CapsuleCmd([7; 64]).emit(Digests::default(), 0, 512, &mut out);
    change(&mut out);
    parse(&out[..written], Sender::Host, Digests::default()).unwrap_err()
}

#[test]
fn each_wrong_field_of_the_common_header_is_named_by_its_offset() {
    assert_eq!(fault_of(|pdu| pdu[0] = 0x08), Fault::field(0));
    assert_eq!(fault_of(|pdu| pdu[0] = 0x05), Fault::field(0));
    assert_eq!(fault_of(|pdu| pdu[1] = 0x01), Fault::field(1));
    assert_eq!(fault_of(|pdu| pdu[1] = 0x02), Fault::field(1));
    assert_eq!(fault_of(|pdu| pdu[2] = 71), Fault::field(2));
    assert_eq!(fault_of(|pdu| pdu[3] = 68), Fault::field(3));
    assert_eq!(fault_of(|pdu| pdu[3] = 74), Fault::field(3));
    assert_eq!(fault_of(|pdu| pdu[4..8].fill(0)), Fault::field(4));
}

#[test]
fn a_data_pdu_whose_length_disagrees_with_plen_is_refused() {
    let data = DataHeader {
        command_id: 1,
        transfer_tag: 2,
        offset_bytes: 0,
        length_bytes: 4096,
        last: true,
        success: false,
    };
    let mut out = [0; EMIT_BYTES_MAX];
    let written = PduHeader::H2cData(data).emit(Digests::default(), 0, 4092, &mut out);
    let fault = parse(&out[..written], Sender::Host, Digests::default()).unwrap_err();
    assert_eq!(fault, Fault::field(OFFSET_DATA_LENGTH));
    let written = PduHeader::H2cData(data).emit(Digests::default(), 0, 0, &mut out);
    let fault = parse(&out[..written], Sender::Host, Digests::default()).unwrap_err();
    assert_eq!(fault, Fault::field(4), "an empty data PDU is refused");
}
