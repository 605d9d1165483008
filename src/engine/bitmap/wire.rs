//! The compressed form in which bitmaps are exchanged (the data of BitmapOr).
//! The manager encodes its master into messages and ORs in what it decodes; commands, sessions and the
//! conversion between granularities are elsewhere.
//!
//! A body is a sequence of records, each of one page, in ascending order of pages; pages without a set
//! bit have none. A body is complete in itself, and the same page may come in several bodies: whatever
//! arrives is ORed.
//!
//! ```text
//! record   gap token* last
//! gap      number: pages skipped since the record before (since page 0 for the first one)
//! token    number n << 2 | 0, n > 0: the next n bits are clear
//!          number n << 2 | 1, n > 0: the next n bits are set
//!          number n << 2 | 2, n > 0: the next n words of 64 bits follow, 8 bytes little-endian each;
//!                                    only where the bits so far are a multiple of 64
//! last     number 0: the rest of the page is clear
//!          number 1: the rest of the page is set
//! number   unsigned LEB128 of a 32-bit value in its shortest form: 7 bits a byte, lowest first, the
//!          highest bit of a byte says that another one follows
//! ```
//!
//! The last page of a bitmap ends where the volume ends: a run that goes further, or a set bit of a
//! literal word there, is an error, and "the rest" ends there too.

use super::master::Master;
use super::page::{BITS_PER_PAGE, Page, WORDS_PER_PAGE};
use super::{page_bits, page_count};

/// The least room that [`encode`] can work with.
pub const MIN_BODY_BYTES: usize = 64;

const CLEAR: u32 = 0;
const SET: u32 = 1;
const LITERAL: u32 = 2;

/// A word with more changes between clear and set than this is shorter as a literal.
const RUN_CHANGES_MAX: u32 = 5;
/// Words of one literal token, so that its number is one byte and can be raised in place.
const LITERAL_WORDS_MAX: u8 = 31;
/// More than one word adds at the worst (its runs, or the run before it and a literal), and the end.
const WORD_RESERVE_BYTES: usize = 24;
/// A gap, and the run up to where the page is resumed.
const RECORD_RESERVE_BYTES: usize = 8 + WORD_RESERVE_BYTES;

/// What is wrong with a body that came in; offsets are bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The body ends within a record.
    #[error("bitmap data ends within a record")]
    Truncated,
    /// A number of more than 32 bits, or not in its shortest form.
    #[error("bitmap data holds a malformed number at byte {offset}")]
    Number {
        /// Where the number starts.
        offset: usize,
    },
    /// A page that the volume does not have.
    #[error("bitmap data names page {index} at byte {offset}, of {page_count} pages")]
    PageIndex {
        /// Where the record starts.
        offset: usize,
        /// The page it names.
        index: u64,
        /// Pages of the bitmap.
        page_count: u32,
    },
    /// An unknown kind of token, an empty literal, or a literal that does not start at a word.
    #[error("bitmap data holds an invalid token at byte {offset}")]
    Token {
        /// Where the token starts.
        offset: usize,
    },
    /// More bits than the page has.
    #[error("bitmap data goes past the end of page {index} at byte {offset}")]
    PastEnd {
        /// Where the token starts.
        offset: usize,
        /// The page.
        index: u32,
    },
}

/// What [`encode`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded {
    /// Bytes written.
    pub len: usize,
    /// Where the next call goes on, or `None` when all has been encoded.
    pub next: Option<u64>,
}

/// Encodes the set bits of `master` from bit `cursor` (0 to begin with) into `out`, as many as fit.
///
/// The master may change between calls. Bits set behind the cursor are not sent by this exchange; they
/// are the ones that an OutOfSync notice tells.
///
/// Panics if `out` is smaller than [`MIN_BODY_BYTES`].
pub fn encode(master: &Master, cursor: u64, out: &mut [u8]) -> Encoded {
    assert!(
        out.len() >= MIN_BODY_BYTES,
        "{} bytes for a bitmap body",
        out.len()
    );
    let per_page = u64::from(BITS_PER_PAGE);
    let mut writer = Writer { out, len: 0 };
    let mut next_index = 0;
    let mut from = cursor;
    while let Some(bit) = master.next_set(from) {
        let index = (bit / per_page) as u32;
        let word = (bit % per_page) as usize / 64;
        let page_start = u64::from(index) * per_page;
        let page = match master.page(index) {
            Some(page) if writer.room() >= RECORD_RESERVE_BYTES => page,
            _ => {
                return Encoded {
                    len: writer.len,
                    next: Some(bit),
                };
            }
        };
        writer.number(index - next_index);
        next_index = index + 1;
        let stopped_at = if word == 0 && master.is_page_full(index) {
            writer.number(SET);
            None
        } else {
            encode_page(page, page_bits(master.bits(), index), word, &mut writer)
        };
        match stopped_at {
            None => from = page_start + per_page,
            Some(word) => {
                return Encoded {
                    len: writer.len,
                    next: Some(page_start + word as u64 * 64),
                };
            }
        }
    }
    Encoded {
        len: writer.len,
        next: None,
    }
}

/// Encodes the `bits` bits of `page` from word `first` on. `Some(word)` if it had to stop before it.
fn encode_page(page: &Page, bits: u32, first: usize, writer: &mut Writer) -> Option<usize> {
    let words = bits.div_ceil(64) as usize;
    let mut run = Run {
        set: false,
        bits: first as u32 * 64,
    };
    let mut literal: Option<usize> = None;
    let mut index = first;
    while index < words {
        let word = page.0[index];
        if word == 0 && !run.set {
            // Most of most pages; the run costs nothing until something follows it.
            let clear = page.0[index..words].iter().take_while(|word| **word == 0);
            let clear = clear.count();
            index += clear;
            run.bits += clear as u32 * 64;
            literal = None;
            continue;
        }
        if writer.room() < WORD_RESERVE_BYTES {
            if run.set {
                run.flush(writer);
            }
            writer.number(CLEAR);
            return Some(index);
        }
        let width = (bits - index as u32 * 64).min(64);
        let changes = (word ^ (word << 1 | u64::from(run.set))) & (u64::MAX >> (64 - width));
        if changes.count_ones() > RUN_CHANGES_MAX {
            run.flush(writer);
            literal = Some(writer.literal(literal, word));
        } else {
            literal = None;
            run.extend(word, width, writer);
        }
        index += 1;
    }
    writer.number(if run.set { SET } else { CLEAR });
    None
}

/// Bits of one kind that have not been written yet.
struct Run {
    set: bool,
    bits: u32,
}

impl Run {
    fn flush(&mut self, writer: &mut Writer) {
        if self.bits > 0 {
            writer.number(self.bits << 2 | u32::from(self.set));
        }
        *self = Run {
            set: false,
            bits: 0,
        };
    }

    /// Goes on with the lowest `width` bits of `word`.
    fn extend(&mut self, word: u64, width: u32, writer: &mut Writer) {
        let mut done = 0;
        while done < width {
            let rest = word >> done;
            let set = rest & 1 == 1;
            let same = if set {
                rest.trailing_ones()
            } else {
                rest.trailing_zeros()
            };
            let same = same.min(width - done);
            if set != self.set {
                self.flush(writer);
                self.set = set;
            }
            self.bits += same;
            done += same;
        }
    }
}

struct Writer<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Writer<'_> {
    fn room(&self) -> usize {
        self.out.len() - self.len
    }

    fn byte(&mut self, byte: u8) {
        self.out[self.len] = byte;
        self.len += 1;
    }

    fn number(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.byte(value as u8 | 0x80);
            value >>= 7;
        }
        self.byte(value as u8);
    }

    /// Adds `word` to the literal token at byte `open`, or to a new one; where the token is.
    fn literal(&mut self, open: Option<usize>, word: u64) -> usize {
        const ONE_MORE: u8 = 1 << 2;
        let full = LITERAL_WORDS_MAX << 2 | LITERAL as u8;
        let at = match open {
            Some(at) if self.out[at] < full => at,
            _ => {
                self.byte(LITERAL as u8);
                self.len - 1
            }
        };
        self.out[at] += ONE_MORE;
        self.out[self.len..self.len + 8].copy_from_slice(&word.to_le_bytes());
        self.len += 8;
        at
    }
}

/// Decodes a body for a bitmap of `bits` bits of the sender's granularity and calls `visit` with each
/// page in it. Pages that come before an error have been visited: a bit too many is harmless.
pub fn decode(body: &[u8], bits: u64, mut visit: impl FnMut(u32, &Page)) -> Result<(), WireError> {
    let page_count = page_count(bits);
    let mut reader = Reader { body, at: 0 };
    let mut next_index = 0u64;
    let mut page = Page([0; WORDS_PER_PAGE]);
    while reader.at < body.len() {
        let offset = reader.at;
        let index = next_index + u64::from(reader.number()?);
        if index >= u64::from(page_count) {
            return Err(WireError::PageIndex {
                offset,
                index,
                page_count,
            });
        }
        next_index = index + 1;
        let index = index as u32;
        page.0.fill(0);
        decode_page(&mut reader, index, page_bits(bits, index), &mut page)?;
        visit(index, &page);
    }
    Ok(())
}

fn decode_page(
    reader: &mut Reader,
    index: u32,
    bits: u32,
    page: &mut Page,
) -> Result<(), WireError> {
    let words = bits.div_ceil(64);
    let mut at = 0u32;
    loop {
        let offset = reader.at;
        let past_end = WireError::PastEnd { offset, index };
        let token = reader.number()?;
        // A 32-bit number has 30 bits left for the length, and `at` is at most a page: no overflow.
        let (kind, length) = (token & 3, token >> 2);
        match (kind, length) {
            (CLEAR, 0) => return Ok(()),
            (SET, 0) if at < bits => {
                page.set_range(at..bits);
                return Ok(());
            }
            (SET, 0) => return Err(past_end),
            (CLEAR | SET, _) => {
                let end = at + length;
                if end > bits {
                    return Err(past_end);
                }
                if kind == SET {
                    page.set_range(at..end);
                }
                at = end;
            }
            (LITERAL, 1..) if at % 64 == 0 => {
                let first = at / 64;
                if length > words.saturating_sub(first) {
                    return Err(past_end);
                }
                for index in first..first + length {
                    let word = reader.word()?;
                    let width = (bits - index * 64).min(64);
                    if word & !(u64::MAX >> (64 - width)) != 0 {
                        return Err(past_end);
                    }
                    page.0[index as usize] = word;
                }
                at = (first + length) * 64;
            }
            _ => return Err(WireError::Token { offset }),
        }
    }
}

struct Reader<'a> {
    body: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn number(&mut self) -> Result<u32, WireError> {
        let offset = self.at;
        let mut value = 0u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte = *self.body.get(self.at).ok_or(WireError::Truncated)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                let shortest = byte != 0 || shift == 0;
                return u32::try_from(value)
                    .ok()
                    .filter(|_| shortest)
                    .ok_or(WireError::Number { offset });
            }
        }
        Err(WireError::Number { offset })
    }

    fn word(&mut self) -> Result<u64, WireError> {
        let (bytes, _) = self
            .body
            .get(self.at..)
            .and_then(|rest| rest.split_first_chunk::<8>())
            .ok_or(WireError::Truncated)?;
        self.at += 8;
        Ok(u64::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ops::Range;
    use proptest::prelude::*;

    const PER_PAGE: u64 = BITS_PER_PAGE as u64;

    /// All bodies of `master`, none longer than `max_len`, and the bitmap they give.
    fn exchange(master: &Master, max_len: usize) -> (Vec<Vec<u8>>, Master) {
        let mut bodies = Vec::new();
        let mut received = Master::new(master.bits());
        let mut cursor = Some(0);
        while let Some(from) = cursor {
            let mut out = vec![0; max_len];
            let encoded = encode(master, from, &mut out);
            assert!(encoded.next.is_none_or(|next| next > from), "no progress");
            out.truncate(encoded.len);
            decode(&out, master.bits(), |index, page| {
                received.or_page(index, page);
            })
            .unwrap();
            bodies.push(out);
            cursor = encoded.next;
        }
        (bodies, received)
    }

    fn assert_equal(left: &Master, right: &Master) {
        assert_eq!(left.count(), right.count());
        for index in 0..left.page_count() {
            assert_eq!(left.page(index), right.page(index), "page {index}");
        }
    }

    #[test]
    fn an_empty_bitmap_costs_nothing_and_a_full_page_two_bytes() {
        let mut master = Master::new(1 << 28);
        let (bodies, _) = exchange(&master, 4096);
        assert_eq!(bodies, [Vec::<u8>::new()]);
        master.set_all();
        let (bodies, received) = exchange(&master, 4096);
        let bytes: usize = bodies.iter().map(Vec::len).sum();
        assert!(bytes <= 2 * 8209 + 3 * bodies.len(), "{bytes} bytes");
        assert_equal(&master, &received);
    }

    #[test]
    fn a_layout_of_bytes_that_peers_agree_on() {
        let mut master = Master::new(3 * PER_PAGE);
        master.or_range(PER_PAGE + 3..PER_PAGE + 5);
        master.or_range(3 * PER_PAGE - 1..3 * PER_PAGE);
        let mut page = Page::boxed();
        page.0[1] = 0x5555_5555_5555_5555;
        master.or_page(1, &page);
        let mut out = [0; 64];
        let encoded = encode(&master, 0, &mut out);
        let mut expected = vec![1, 3 << 2, 2 << 2 | 1, 0xec, 1, 1 << 2 | 2];
        expected.extend([0x55; 8]);
        expected.extend([0, 0, 0xfc, 0xfd, 7, 1]);
        assert_eq!(out[..encoded.len], expected);
        assert_eq!(encoded.next, None);
    }

    #[test]
    fn bodies_that_are_wrong_are_errors() {
        let bits = PER_PAGE + 100;
        let check = |body: &[u8]| decode(body, bits, |_, _| ());
        let past = |offset, index| Err(WireError::PastEnd { offset, index });
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[0, 1, 0, 1]), Ok(()));
        assert_eq!(check(&[0]), Err(WireError::Truncated));
        assert_eq!(check(&[0, 4]), Err(WireError::Truncated));
        assert_eq!(check(&[0, 6, 1, 2, 3]), Err(WireError::Truncated));
        assert_eq!(check(&[0, 0x80]), Err(WireError::Truncated));
        assert_eq!(
            check(&[0x80, 0, 0]),
            Err(WireError::Number { offset: 0 }),
            "not the shortest form"
        );
        assert_eq!(
            check(&[0, 0xff, 0xff, 0xff, 0xff, 0x1f]),
            Err(WireError::Number { offset: 1 })
        );
        assert_eq!(
            check(&[0, 1, 1, 1]),
            Err(WireError::PageIndex {
                offset: 2,
                index: 2,
                page_count: 2
            })
        );
        assert_eq!(check(&[0, 3]), Err(WireError::Token { offset: 1 }));
        assert_eq!(check(&[0, 2]), Err(WireError::Token { offset: 1 }));
        let unaligned = [0, 4, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(check(&unaligned), Err(WireError::Token { offset: 2 }));
        // Page 1 has 100 bits: runs of 101, a second word of which 36 bits count.
        assert_eq!(check(&[1, 0x95, 3, 0]), past(1, 1));
        assert_eq!(check(&[1, 0x94, 3, 0]), past(1, 1));
        assert_eq!(check(&[1, 0x91, 3, 1]), past(3, 1));
        let mut literal = vec![1, 10];
        literal.extend([0xff; 12]);
        literal.extend([0x10, 0, 0, 0, 0]);
        assert_eq!(check(&literal), past(1, 1));
        literal[14] = 0;
        assert_eq!(check(&literal), Ok(()));
        assert_eq!(check(&[1, 14]), past(1, 1), "three words");
    }

    /// Bitmaps of the kinds that occur: runs, single bits, random words, whole pages.
    fn master() -> impl Strategy<Value = Master> {
        let bits = 1..4 * PER_PAGE;
        let runs = proptest::collection::vec((any::<u64>(), 1..3000u64), 0..12);
        let singles = proptest::collection::vec(any::<u64>(), 0..60);
        let noise = proptest::option::of((any::<u64>(), 1..600usize));
        let full = proptest::option::of(0..4u64);
        (bits, runs, singles, noise, full).prop_map(|(bits, runs, singles, noise, full)| {
            let mut master = Master::new(bits);
            let clipped = |start: u64, length: u64| -> Range<u64> {
                let start = start.min(bits);
                start..start.saturating_add(length).min(bits)
            };
            for (start, length) in runs {
                master.or_range(clipped(start % bits, length));
            }
            for bit in singles {
                master.or_range(clipped(bit % bits, 1));
            }
            if let Some((mut random, words)) = noise {
                let mut page = Page::boxed();
                for word in page.0.iter_mut().take(words) {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(99);
                    *word = random ^ random >> 29;
                }
                master.or_page((random % u64::from(master.page_count())) as u32, &page);
            }
            if let Some(page) = full {
                master.or_range(clipped(page * PER_PAGE, PER_PAGE));
            }
            master
        })
    }

    proptest! {
        #[test]
        fn what_is_decoded_is_what_was_encoded(master in master(), max_len in MIN_BODY_BYTES..5000) {
            let (bodies, received) = exchange(&master, max_len);
            assert_equal(&master, &received);
            let bytes: usize = bodies.iter().map(Vec::len).sum();
            let plain = master.page_count() as usize * 4096;
            if max_len >= 1000 {
                prop_assert!(bytes <= plain + plain / 8, "{bytes} bytes");
            }
        }

        #[test]
        fn random_bytes_never_panic_or_leave_the_bitmap(
            body in proptest::collection::vec(any::<u8>(), 0..300), bits in 1..3 * PER_PAGE,
        ) {
            let _ = decode(&body, bits, |index, page| {
                assert!(index < page_count(bits));
                assert!(!page.any(page_bits(bits, index)..BITS_PER_PAGE));
            });
        }

        #[test]
        fn damaged_bodies_never_panic_or_leave_the_bitmap(
            master in master(), at in any::<usize>(), value in any::<u8>(), cut in any::<usize>(),
        ) {
            let bits = master.bits();
            let mut out = vec![0; 20_000];
            let len = encode(&master, 0, &mut out).len;
            if len > 0 {
                out.truncate(len);
                out[at % len] = value;
                out.truncate(cut % (len + 1));
                let _ = decode(&out, bits, |index, page| {
                    assert!(!page.any(page_bits(bits, index)..BITS_PER_PAGE));
                });
            }
        }
    }
}
