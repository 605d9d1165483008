//! The PDU headers of NVMe/TCP: checked parse and emit, header and data digests (CRC32C).
//! Called by the receiving and sending sides of target and initiator. Knows nothing of sockets, queues
//! or commands; what a capsule carries is opaque bytes here.

use thiserror::Error;

/// Bytes of the common header that every PDU begins with.
pub const COMMON_HEADER_BYTES: usize = 8;
/// Bytes of a header or data digest.
pub const DIGEST_BYTES: usize = 4;
/// The longest header that this implementation sends, padding before the data included: a TermReq with
/// the longest offending header (NVMe/TCP Transport: PLEN of a TermReq is at most 152), rounded up.
pub const EMIT_BYTES_MAX: usize = 160;
/// The offset of data is one byte wide, so no header with its padding is longer than this.
pub const HEADER_BYTES_MAX: usize = 256;
/// A TermReq carries at most this much of the header that it complains about.
pub const TERM_HEADER_BYTES_MAX: usize = 128;

const TERM_PDU_BYTES_MAX: u32 = 24 + TERM_HEADER_BYTES_MAX as u32;

const FLAG_HEADER_DIGEST: u8 = 1 << 0;
const FLAG_DATA_DIGEST: u8 = 1 << 1;
const FLAG_LAST: u8 = 1 << 2;
const FLAG_SUCCESS: u8 = 1 << 3;

const OFFSET_KIND: u32 = 0;
const OFFSET_FLAGS: u32 = 1;
const OFFSET_HEADER_LENGTH: u32 = 2;
const OFFSET_DATA_OFFSET: u32 = 3;
const OFFSET_PDU_LENGTH: u32 = 4;

/// Offset of PFV in ICReq and ICResp.
pub const OFFSET_VERSION: u32 = 8;
/// Offset of HPDA in ICReq and CPDA in ICResp.
pub const OFFSET_ALIGNMENT: u32 = 10;
/// Offset of MAXH2CDATA in ICResp.
pub const OFFSET_MAX_H2C_DATA: u32 = 12;
/// Offset of CCCID in data PDUs and R2T.
pub const OFFSET_COMMAND_ID: u32 = 8;
/// Offset of TTAG in H2CData and R2T.
pub const OFFSET_TRANSFER_TAG: u32 = 10;
/// Offset of DATAL in data PDUs.
pub const OFFSET_DATA_LENGTH: u32 = 16;

/// Type of a PDU (NVMe/TCP Transport, "PDU-Type").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PduKind {
    IcReq = 0x00,
    IcResp = 0x01,
    H2cTermReq = 0x02,
    C2hTermReq = 0x03,
    CapsuleCmd = 0x04,
    CapsuleResp = 0x05,
    H2cData = 0x06,
    C2hData = 0x07,
    R2t = 0x09,
}

impl PduKind {
    fn from_wire(value: u8) -> Option<PduKind> {
        Some(match value {
            0x00 => PduKind::IcReq,
            0x01 => PduKind::IcResp,
            0x02 => PduKind::H2cTermReq,
            0x03 => PduKind::C2hTermReq,
            0x04 => PduKind::CapsuleCmd,
            0x05 => PduKind::CapsuleResp,
            0x06 => PduKind::H2cData,
            0x07 => PduKind::C2hData,
            0x09 => PduKind::R2t,
            _ => return None,
        })
    }

    /// Fixed length of the header, HLEN.
    fn header_bytes(self) -> u8 {
        match self {
            PduKind::IcReq | PduKind::IcResp => 128,
            PduKind::CapsuleCmd => 72,
            _ => 24,
        }
    }

    fn sender(self) -> Sender {
        match self {
            PduKind::IcReq | PduKind::H2cTermReq | PduKind::CapsuleCmd | PduKind::H2cData => {
                Sender::Host
            }
            _ => Sender::Controller,
        }
    }

    fn may_carry_data(self) -> bool {
        matches!(
            self,
            PduKind::CapsuleCmd | PduKind::H2cData | PduKind::C2hData
        )
    }

    fn has_header_digest(self) -> bool {
        !matches!(
            self,
            PduKind::IcReq | PduKind::IcResp | PduKind::H2cTermReq | PduKind::C2hTermReq
        )
    }
}

/// Which side of the connection sent a PDU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    Host,
    Controller,
}

/// Which digests the two sides agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digests {
    pub header: bool,
    pub data: bool,
}

impl Digests {
    fn from_wire(value: u8) -> Digests {
        Digests {
            header: value & 1 != 0,
            data: value & 2 != 0,
        }
    }

    fn to_wire(self) -> u8 {
        u8::from(self.header) | u8::from(self.data) << 1
    }
}

/// Fatal Error Status of a TermReq (NVMe/TCP Transport, H2CTermReq and C2HTermReq).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FatalError {
    InvalidHeaderField = 0x01,
    PduSequence = 0x02,
    HeaderDigest = 0x03,
    DataTransferOutOfRange = 0x04,
    /// "R2T limit exceeded" when the host says it, "data transfer limit exceeded" when the controller does.
    LimitExceeded = 0x05,
    UnsupportedParameter = 0x06,
}

/// Why a PDU ends the connection: what the TermReq says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("NVMe/TCP protocol error {error:?}, information {information:#x}")]
pub struct Fault {
    pub error: FatalError,
    /// FEI: the offset of the wrong field, or the digest that was received.
    pub information: u32,
}

impl Fault {
    pub fn field(offset: u32) -> Fault {
        Fault {
            error: FatalError::InvalidHeaderField,
            information: offset,
        }
    }

    pub fn sequence() -> Fault {
        Fault {
            error: FatalError::PduSequence,
            information: 0,
        }
    }

    pub fn out_of_range() -> Fault {
        Fault {
            error: FatalError::DataTransferOutOfRange,
            information: 0,
        }
    }

    pub fn limit() -> Fault {
        Fault {
            error: FatalError::LimitExceeded,
            information: 0,
        }
    }

    pub fn unsupported(offset: u32) -> Fault {
        Fault {
            error: FatalError::UnsupportedParameter,
            information: offset,
        }
    }
}

/// The first eight bytes of a PDU, checked against what the two sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommonHeader {
    pub kind: PduKind,
    flags: u8,
    data_offset: u8,
    pdu_bytes: u32,
    header_digest: bool,
}

impl CommonHeader {
    /// Checks type, flags, HLEN, PDO and PLEN as far as these bytes allow.
    pub fn parse(
        bytes: &[u8; COMMON_HEADER_BYTES],
        sender: Sender,
        digests: Digests,
    ) -> Result<CommonHeader, Fault> {
        let [kind, flags, header_length, data_offset, a, b, c, d] = *bytes;
        let pdu_bytes = u32::from_le_bytes([a, b, c, d]);
        let kind = PduKind::from_wire(kind)
            .filter(|kind| kind.sender() == sender)
            .ok_or(Fault::field(OFFSET_KIND))?;
        if header_length != kind.header_bytes() {
            return Err(Fault::field(OFFSET_HEADER_LENGTH));
        }
        let header_digest = kind.has_header_digest() && digests.header;
        if kind.has_header_digest() && (flags & FLAG_HEADER_DIGEST != 0) != digests.header {
            return Err(Fault::field(OFFSET_FLAGS));
        }
        let header = CommonHeader {
            kind,
            flags,
            data_offset,
            pdu_bytes,
            header_digest,
        };
        let bare_bytes = u32::from(header.bare_bytes());
        match kind {
            PduKind::H2cTermReq | PduKind::C2hTermReq => {
                if !(bare_bytes..=TERM_PDU_BYTES_MAX).contains(&pdu_bytes) {
                    return Err(Fault::field(OFFSET_PDU_LENGTH));
                }
            }
            _ if !kind.may_carry_data() => {
                if pdu_bytes != bare_bytes {
                    return Err(Fault::field(OFFSET_PDU_LENGTH));
                }
            }
            _ => {
                if pdu_bytes < bare_bytes {
                    return Err(Fault::field(OFFSET_PDU_LENGTH));
                }
                if pdu_bytes > bare_bytes {
                    let offset = u32::from(data_offset);
                    if offset < bare_bytes || offset % 4 != 0 {
                        return Err(Fault::field(OFFSET_DATA_OFFSET));
                    }
                    if (flags & FLAG_DATA_DIGEST != 0) != digests.data {
                        return Err(Fault::field(OFFSET_FLAGS));
                    }
                    let trailer = if digests.data { DIGEST_BYTES as u32 } else { 0 };
                    if pdu_bytes <= offset + trailer {
                        return Err(Fault::field(OFFSET_PDU_LENGTH));
                    }
                } else if kind != PduKind::CapsuleCmd {
                    // A data PDU without data moves nothing and would let a peer keep us busy for free.
                    return Err(Fault::field(OFFSET_PDU_LENGTH));
                }
            }
        }
        Ok(header)
    }

    /// Header and its digest, without padding.
    fn bare_bytes(&self) -> u8 {
        self.kind.header_bytes()
            + if self.header_digest {
                DIGEST_BYTES as u8
            } else {
                0
            }
    }

    /// Bytes from the start of the PDU to its data (or to its end, if it carries none): what must have
    /// arrived before [`PduHeader::parse`]. At most [`HEADER_BYTES_MAX`].
    pub fn bytes_before_payload(&self) -> usize {
        match self.kind {
            PduKind::H2cTermReq | PduKind::C2hTermReq => self.pdu_bytes as usize,
            _ if self.pdu_bytes > u32::from(self.bare_bytes()) => usize::from(self.data_offset),
            _ => usize::from(self.bare_bytes()),
        }
    }

    /// Bytes of data in this PDU, its digest not counted.
    pub fn payload_bytes(&self) -> u32 {
        let before = self.bytes_before_payload() as u32;
        let rest = self.pdu_bytes.saturating_sub(before);
        if self.has_payload_digest() {
            rest.saturating_sub(DIGEST_BYTES as u32)
        } else {
            rest
        }
    }

    /// Whether a data digest follows the data.
    pub fn has_payload_digest(&self) -> bool {
        self.kind.may_carry_data()
            && self.pdu_bytes > u32::from(self.bare_bytes())
            && self.flags & FLAG_DATA_DIGEST != 0
    }
}

/// Initialize Connection Request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcReq {
    /// PFV: 0 is the only version there is.
    pub version: u16,
    /// HPDA as on the wire: data of C2HData is aligned to (this + 1) * 4 bytes; 0 to 31.
    pub alignment: u8,
    pub digests: Digests,
    /// MAXR2T as on the wire: outstanding R2T per command, less one.
    pub max_r2t: u32,
}

/// Initialize Connection Response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcResp {
    pub version: u16,
    /// CPDA as on the wire: alignment of data that the host sends; 0 to 31.
    pub alignment: u8,
    pub digests: Digests,
    /// MAXH2CDATA: the longest data of one H2CData PDU, in bytes; at least 4096.
    pub max_h2c_data_bytes: u32,
}

/// H2CTermReq or C2HTermReq.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermReq {
    /// FES, as on the wire: a peer may say what we do not know.
    pub error: u16,
    /// FEI.
    pub information: u32,
    /// The header complained about; `header_bytes` of it count.
    pub header: [u8; TERM_HEADER_BYTES_MAX],
    pub header_bytes: u8,
}

impl TermReq {
    /// The answer to a fault in the PDU that begins with `header` (cut to what a TermReq carries).
    pub fn new(fault: Fault, header: &[u8]) -> TermReq {
        let mut term = TermReq {
            error: fault.error as u16,
            information: fault.information,
            header: [0; TERM_HEADER_BYTES_MAX],
            header_bytes: header.len().min(TERM_HEADER_BYTES_MAX) as u8,
        };
        for (to, from) in term.header.iter_mut().zip(header) {
            *to = *from;
        }
        term
    }
}

/// H2CData or C2HData.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    /// CCCID: the command that the data belongs to.
    pub command_id: u16,
    /// TTAG of the R2T (H2CData only; 0 in C2HData).
    pub transfer_tag: u16,
    /// DATAO: offset in the command's data, in bytes.
    pub offset_bytes: u32,
    /// DATAL.
    pub length_bytes: u32,
    pub last: bool,
    /// C2HData only: no response capsule follows, the command succeeded.
    pub success: bool,
}

/// Ready to Transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct R2t {
    pub command_id: u16,
    pub transfer_tag: u16,
    pub offset_bytes: u32,
    pub length_bytes: u32,
}

/// A PDU's header, in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // lives on the stack for the length of one call
pub enum PduHeader {
    IcReq(IcReq),
    IcResp(IcResp),
    H2cTermReq(TermReq),
    C2hTermReq(TermReq),
    /// The submission queue entry.
    CapsuleCmd([u8; 64]),
    /// The completion queue entry.
    CapsuleResp([u8; 16]),
    H2cData(DataHeader),
    C2hData(DataHeader),
    R2t(R2t),
}

/// Cursor over a header whose length has been checked; reading past the end gives zeroes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0
            .get(offset..)
            .and_then(|rest| rest.first_chunk::<N>())
            .copied()
            .unwrap_or([0; N])
    }

    fn u8(&self, offset: usize) -> u8 {
        self.array::<1>(offset)[0]
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }
}

impl PduHeader {
    /// Parses the rest of a header whose first bytes gave `common`. `bytes` is the PDU from its start, at
    /// least [`CommonHeader::bytes_before_payload`] long. Checks the header digest and every length that
    /// the header repeats.
    pub fn parse(common: &CommonHeader, bytes: &[u8]) -> Result<PduHeader, Fault> {
        let header_bytes = usize::from(common.kind.header_bytes());
        let (Some(header), Some(whole)) = (
            bytes.get(..header_bytes),
            bytes.get(..common.bytes_before_payload()),
        ) else {
            return Err(Fault::field(OFFSET_PDU_LENGTH));
        };
        if common.header_digest {
            let received = Fields(whole).u32(header_bytes);
            if received != crc32c::crc32c(header) {
                return Err(Fault {
                    error: FatalError::HeaderDigest,
                    information: received,
                });
            }
        }
        let fields = Fields(header);
        Ok(match common.kind {
            PduKind::IcReq => PduHeader::IcReq(IcReq {
                version: fields.u16(8),
                alignment: fields.u8(10),
                digests: Digests::from_wire(fields.u8(11)),
                max_r2t: fields.u32(12),
            }),
            PduKind::IcResp => PduHeader::IcResp(IcResp {
                version: fields.u16(8),
                alignment: fields.u8(10),
                digests: Digests::from_wire(fields.u8(11)),
                max_h2c_data_bytes: fields.u32(12),
            }),
            PduKind::H2cTermReq | PduKind::C2hTermReq => {
                let carried = whole.get(24..).unwrap_or(&[]);
                let mut term = TermReq {
                    error: fields.u16(8),
                    information: fields.u32(10),
                    header: [0; TERM_HEADER_BYTES_MAX],
                    header_bytes: carried.len() as u8,
                };
                for (to, from) in term.header.iter_mut().zip(carried) {
                    *to = *from;
                }
                if common.kind == PduKind::H2cTermReq {
                    PduHeader::H2cTermReq(term)
                } else {
                    PduHeader::C2hTermReq(term)
                }
            }
            PduKind::CapsuleCmd => PduHeader::CapsuleCmd(fields.array(8)),
            PduKind::CapsuleResp => PduHeader::CapsuleResp(fields.array(8)),
            PduKind::H2cData | PduKind::C2hData => {
                let from_host = common.kind == PduKind::H2cData;
                let data = DataHeader {
                    command_id: fields.u16(8),
                    transfer_tag: if from_host { fields.u16(10) } else { 0 },
                    offset_bytes: fields.u32(12),
                    length_bytes: fields.u32(16),
                    last: common.flags & FLAG_LAST != 0,
                    success: !from_host && common.flags & FLAG_SUCCESS != 0,
                };
                if data.length_bytes != common.payload_bytes() {
                    return Err(Fault::field(OFFSET_DATA_LENGTH));
                }
                if data.success && !data.last {
                    return Err(Fault::field(OFFSET_FLAGS));
                }
                if from_host {
                    PduHeader::H2cData(data)
                } else {
                    PduHeader::C2hData(data)
                }
            }
            PduKind::R2t => PduHeader::R2t(R2t {
                command_id: fields.u16(8),
                transfer_tag: fields.u16(10),
                offset_bytes: fields.u32(12),
                length_bytes: fields.u32(16),
            }),
        })
    }

    fn kind(&self) -> PduKind {
        match self {
            PduHeader::IcReq(_) => PduKind::IcReq,
            PduHeader::IcResp(_) => PduKind::IcResp,
            PduHeader::H2cTermReq(_) => PduKind::H2cTermReq,
            PduHeader::C2hTermReq(_) => PduKind::C2hTermReq,
            PduHeader::CapsuleCmd(_) => PduKind::CapsuleCmd,
            PduHeader::CapsuleResp(_) => PduKind::CapsuleResp,
            PduHeader::H2cData(_) => PduKind::H2cData,
            PduHeader::C2hData(_) => PduKind::C2hData,
            PduHeader::R2t(_) => PduKind::R2t,
        }
    }

    /// Writes the header, its digest and the padding before `payload_bytes` of data, aligned to
    /// `(alignment + 1) * 4` bytes; returns how many bytes that is. The data digest is the sender's to
    /// append: see [`data_digest`].
    pub fn emit(
        &self,
        digests: Digests,
        alignment: u8,
        payload_bytes: u32,
        out: &mut [u8; EMIT_BYTES_MAX],
    ) -> usize {
        let kind = self.kind();
        let header_bytes = usize::from(kind.header_bytes());
        let header_digest = kind.has_header_digest() && digests.header;
        let bare_bytes = header_bytes + if header_digest { DIGEST_BYTES } else { 0 };
        let mut flags = if header_digest { FLAG_HEADER_DIGEST } else { 0 };
        let mut before_payload = bare_bytes;
        let mut pdu_bytes = bare_bytes as u32;
        out.fill(0);
        if kind.may_carry_data() && payload_bytes > 0 {
            let unit = (usize::from(alignment.min(31)) + 1) * 4;
            before_payload = bare_bytes.next_multiple_of(unit);
            pdu_bytes = before_payload as u32 + payload_bytes;
            if digests.data {
                flags |= FLAG_DATA_DIGEST;
                pdu_bytes += DIGEST_BYTES as u32;
            }
            out[3] = before_payload as u8;
        }
        let mut put = |offset: usize, bytes: &[u8]| {
            out[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        match self {
            PduHeader::IcReq(request) => {
                put(8, &request.version.to_le_bytes());
                put(10, &[request.alignment, request.digests.to_wire()]);
                put(12, &request.max_r2t.to_le_bytes());
            }
            PduHeader::IcResp(response) => {
                put(8, &response.version.to_le_bytes());
                put(10, &[response.alignment, response.digests.to_wire()]);
                put(12, &response.max_h2c_data_bytes.to_le_bytes());
            }
            PduHeader::H2cTermReq(term) | PduHeader::C2hTermReq(term) => {
                let carried = usize::from(term.header_bytes).min(TERM_HEADER_BYTES_MAX);
                put(8, &term.error.to_le_bytes());
                put(10, &term.information.to_le_bytes());
                put(24, &term.header[..carried]);
                before_payload = 24 + carried;
                pdu_bytes = before_payload as u32;
            }
            PduHeader::CapsuleCmd(entry) => put(8, entry),
            PduHeader::CapsuleResp(entry) => put(8, entry),
            PduHeader::H2cData(data) | PduHeader::C2hData(data) => {
                put(8, &data.command_id.to_le_bytes());
                put(10, &data.transfer_tag.to_le_bytes());
                put(12, &data.offset_bytes.to_le_bytes());
                put(16, &data.length_bytes.to_le_bytes());
                flags |= if data.last { FLAG_LAST } else { 0 };
                flags |= if data.success { FLAG_SUCCESS } else { 0 };
            }
            PduHeader::R2t(ready) => {
                put(8, &ready.command_id.to_le_bytes());
                put(10, &ready.transfer_tag.to_le_bytes());
                put(12, &ready.offset_bytes.to_le_bytes());
                put(16, &ready.length_bytes.to_le_bytes());
            }
        }
        put(0, &[kind as u8, flags, header_bytes as u8]);
        put(4, &pdu_bytes.to_le_bytes());
        if header_digest {
            let digest = crc32c::crc32c(&out[..header_bytes]);
            out[header_bytes..bare_bytes].copy_from_slice(&digest.to_le_bytes());
        }
        before_payload
    }
}

/// The digest that follows a PDU's data (CRC32C, NVMe/TCP Transport "Data Digest").
pub fn data_digest(payload: &[u8]) -> [u8; DIGEST_BYTES] {
    crc32c::crc32c(payload).to_le_bytes()
}

#[cfg(test)]
mod tests;
