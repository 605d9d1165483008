//! Commands to words and back. Called through [`PeerCommand::emit`] and [`PeerCommand::parse`] only.
//! Must not know what a command does.

use super::opcode;
use super::order::NO_POINT;
use super::{
    CommandError, CommandWords, DataDirection, FinishPhase, MAX_TRANSFER_BYTES, PeerCommand, Span,
    WriteOrder,
};

const FLAG_FUA: u16 = 1 << 0;
const FLAG_FINISH_DURABLE: u16 = 1 << 1;
const FLAG_OUTDATE: u16 = 1 << 2;
const APPLIED_NODES_SHIFT: u32 = 8;

/// The eight words as fields. Which of them a command uses, `emit` and `parse` say.
///
/// | word | NVMe | field |
/// |---|---|---|
/// | 0 | CDW2 | session |
/// | 1 | CDW3 | LBA bits 31:0 |
/// | 2 | CDW10 | LBA bits 47:32 in bits 15:0, flags in bits 31:16 |
/// | 3 | CDW11 | blocks, or data length in bytes |
/// | 4, 5 | CDW12, CDW13 | sequence bits 31:0, 63:32 |
/// | 6, 7 | CDW14, CDW15 | distances (all-applied, dependency), or a count, or a read's own sequence |
#[derive(Clone, Copy, Default)]
struct Fields {
    session: u32,
    lba: u64,
    flags: u16,
    extent: u32,
    sequence: u64,
    last: [u32; 2],
}

impl Fields {
    fn pack(self) -> CommandWords {
        CommandWords([
            self.session,
            self.lba as u32,
            (self.lba >> 32) as u32 & 0xffff | u32::from(self.flags) << 16,
            self.extent,
            self.sequence as u32,
            (self.sequence >> 32) as u32,
            self.last[0],
            self.last[1],
        ])
    }

    fn unpack(&CommandWords(words): &CommandWords) -> Fields {
        Fields {
            session: words[0],
            lba: u64::from(words[1]) | u64::from(words[2] & 0xffff) << 32,
            flags: (words[2] >> 16) as u16,
            extent: words[3],
            sequence: u64::from(words[4]) | u64::from(words[5]) << 32,
            last: [words[6], words[7]],
        }
    }

    fn with_span(self, span: Span) -> Fields {
        Fields {
            lba: span.lba(),
            extent: span.blocks(),
            ..self
        }
    }

    fn with_order(self, order: WriteOrder) -> Fields {
        Fields {
            sequence: order.sequence,
            flags: self.flags | u16::from(order.applied_nodes) << APPLIED_NODES_SHIFT,
            last: [order.applied_distance, order.dependency_distance],
            ..self
        }
    }

    fn span(&self, opcode: u8) -> Result<Span, CommandError> {
        Span::new(self.lba, self.extent).ok_or(CommandError::BadSpan {
            opcode,
            lba: self.lba,
            blocks: self.extent,
        })
    }

    fn order(&self, opcode: u8) -> Result<WriteOrder, CommandError> {
        for distance in self.last {
            if distance != NO_POINT && u64::from(distance) > self.sequence {
                return Err(CommandError::BadDistance {
                    opcode,
                    sequence: self.sequence,
                    distance,
                });
            }
        }
        Ok(WriteOrder {
            sequence: self.sequence,
            applied_distance: self.last[0],
            dependency_distance: self.last[1],
            applied_nodes: (self.flags >> APPLIED_NODES_SHIFT) as u8,
        })
    }

    fn last_as_one(&self) -> u64 {
        u64::from(self.last[0]) | u64::from(self.last[1]) << 32
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

fn flag(set: bool, flag: u16) -> u16 {
    if set { flag } else { 0 }
}

impl PeerCommand {
    /// The command dwords.
    pub fn emit(&self) -> CommandWords {
        let body = |session, sequence, len| Fields {
            session,
            sequence,
            extent: len,
            ..Fields::default()
        };
        let only = |session| Fields {
            session,
            ..Fields::default()
        };
        let fields = match *self {
            PeerCommand::HelloPut { len } | PeerCommand::HelloGet { len } => body(0, 0, len),
            PeerCommand::Confirm { session } | PeerCommand::Ping { session } => only(session),
            PeerCommand::StatePut {
                session,
                sequence,
                len,
            }
            | PeerCommand::ResyncDone {
                session,
                sequence,
                len,
            }
            | PeerCommand::OutOfSync {
                session,
                sequence,
                len,
            }
            | PeerCommand::BitmapOr {
                session,
                sequence,
                len,
            }
            | PeerCommand::SyncStart {
                session,
                sequence,
                len,
            }
            | PeerCommand::NewGeneration {
                session,
                sequence,
                len,
            }
            | PeerCommand::Prepare {
                session,
                sequence,
                len,
            }
            | PeerCommand::Commit {
                session,
                sequence,
                len,
            }
            | PeerCommand::Abort {
                session,
                sequence,
                len,
            } => body(session, sequence, len),
            PeerCommand::SyncFinish {
                session,
                sequence,
                phase,
                len,
            } => Fields {
                flags: flag(phase == FinishPhase::Durable, FLAG_FINISH_DURABLE),
                ..body(session, sequence, len)
            },
            PeerCommand::Write {
                session,
                span,
                fua,
                order,
            }
            | PeerCommand::WriteZeroes {
                session,
                span,
                fua,
                order,
            } => Fields {
                flags: flag(fua, FLAG_FUA),
                ..only(session)
            }
            .with_span(span)
            .with_order(order),
            PeerCommand::Unmap {
                session,
                span,
                order,
            } => only(session).with_span(span).with_order(order),
            PeerCommand::Read {
                session,
                span,
                must_include,
            } => Fields {
                sequence: must_include,
                ..only(session)
            }
            .with_span(span),
            PeerCommand::ResyncRead {
                session,
                span,
                must_include,
                sequence,
            } => Fields {
                sequence: must_include,
                last: halves(sequence),
                ..only(session)
            }
            .with_span(span),
            PeerCommand::Flush { session, sequence } => Fields {
                sequence,
                ..only(session)
            },
            PeerCommand::BitmapEnd {
                session,
                sequence,
                bits_set,
            } => Fields {
                sequence,
                last: halves(bits_set),
                ..only(session)
            },
            PeerCommand::Goodbye {
                session,
                sequence,
                outdate,
            } => Fields {
                flags: flag(outdate, FLAG_OUTDATE),
                sequence,
                ..only(session)
            },
        };
        fields.pack()
    }

    /// The command in `words`, if it is one and `data_len` bytes of data fit it.
    ///
    /// For commands with a span and data the block size is not known here: the length is checked to be a
    /// power of two per block, 512 or more; the receiver compares it with [`PeerCommand::data_len`].
    pub fn parse(op: u8, words: &CommandWords, data_len: u32) -> Result<PeerCommand, CommandError> {
        let fields = Fields::unpack(words);
        let command = Self::parse_fields(op, &fields)?;
        let session = fields.session;
        if session == 0 && !matches!(op, opcode::HELLO_PUT | opcode::HELLO_GET) {
            return Err(CommandError::NoSession(op));
        }
        // Emitting again shows every bit that the command does not use, whichever command it is.
        let emitted = command.emit();
        for (index, (&got, &meant)) in words.0.iter().zip(&emitted.0).enumerate() {
            if got != meant {
                return Err(match index {
                    2 if (got ^ meant) >> 16 != 0 => CommandError::UnknownFlags {
                        opcode: op,
                        flags: fields.flags,
                    },
                    _ => CommandError::ReservedNotZero {
                        opcode: op,
                        word: index as u8,
                        value: got,
                    },
                });
            }
        }
        if !command.data_len_fits(data_len) {
            return Err(CommandError::DataLength {
                opcode: op,
                stated: fields.extent,
                data_len,
            });
        }
        Ok(command)
    }

    fn data_len_fits(&self, data_len: u32) -> bool {
        if data_len > MAX_TRANSFER_BYTES {
            return false;
        }
        match *self {
            PeerCommand::Write { span, .. }
            | PeerCommand::Read { span, .. }
            | PeerCommand::ResyncRead { span, .. } => {
                let block_size_bytes = data_len / span.blocks();
                data_len % span.blocks() == 0
                    && block_size_bytes >= 512
                    && block_size_bytes.is_power_of_two()
            }
            _ if self.data_direction() == DataDirection::None => data_len == 0,
            // A body is never empty, so a length that got lost on the way does not pass for one.
            _ => data_len > 0 && self.data_len(0) == Some(data_len),
        }
    }

    fn parse_fields(op: u8, fields: &Fields) -> Result<PeerCommand, CommandError> {
        let &Fields {
            session,
            sequence,
            extent: len,
            ..
        } = fields;
        let fua = fields.has(FLAG_FUA);
        Ok(match op {
            opcode::HELLO_PUT => PeerCommand::HelloPut { len },
            opcode::HELLO_GET => PeerCommand::HelloGet { len },
            opcode::CONFIRM => PeerCommand::Confirm { session },
            opcode::PING => PeerCommand::Ping { session },
            opcode::STATE_PUT => PeerCommand::StatePut {
                session,
                sequence,
                len,
            },
            opcode::WRITE => PeerCommand::Write {
                session,
                span: fields.span(op)?,
                fua,
                order: fields.order(op)?,
            },
            opcode::WRITE_ZEROES => PeerCommand::WriteZeroes {
                session,
                span: fields.span(op)?,
                fua,
                order: fields.order(op)?,
            },
            opcode::UNMAP => PeerCommand::Unmap {
                session,
                span: fields.span(op)?,
                order: fields.order(op)?,
            },
            opcode::READ => PeerCommand::Read {
                session,
                span: fields.span(op)?,
                must_include: sequence,
            },
            opcode::FLUSH => PeerCommand::Flush { session, sequence },
            opcode::RESYNC_READ => PeerCommand::ResyncRead {
                session,
                span: fields.span(op)?,
                must_include: sequence,
                sequence: fields.last_as_one(),
            },
            opcode::RESYNC_DONE => PeerCommand::ResyncDone {
                session,
                sequence,
                len,
            },
            opcode::OUT_OF_SYNC => PeerCommand::OutOfSync {
                session,
                sequence,
                len,
            },
            opcode::BITMAP_OR => PeerCommand::BitmapOr {
                session,
                sequence,
                len,
            },
            opcode::BITMAP_END => PeerCommand::BitmapEnd {
                session,
                sequence,
                bits_set: fields.last_as_one(),
            },
            opcode::SYNC_START => PeerCommand::SyncStart {
                session,
                sequence,
                len,
            },
            opcode::SYNC_FINISH => {
                let durable = fields.has(FLAG_FINISH_DURABLE);
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
            }
            opcode::NEW_GENERATION => PeerCommand::NewGeneration {
                session,
                sequence,
                len,
            },
            opcode::PREPARE => PeerCommand::Prepare {
                session,
                sequence,
                len,
            },
            opcode::COMMIT => PeerCommand::Commit {
                session,
                sequence,
                len,
            },
            opcode::ABORT => PeerCommand::Abort {
                session,
                sequence,
                len,
            },
            opcode::GOODBYE => PeerCommand::Goodbye {
                session,
                sequence,
                outdate: fields.has(FLAG_OUTDATE),
            },
            unknown => return Err(CommandError::UnknownOpcode(unknown)),
        })
    }
}
