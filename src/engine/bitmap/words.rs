//! A range of bits as the 64-bit words that it touches, each with a mask.
//! All bitmaps and the range lock walk their words with it; it holds no bits itself.

use core::ops::Range;

/// Yields `(word index, mask)` for every word that `range` touches, in ascending order. A range whose
/// end is not after its start yields nothing.
#[derive(Debug, Clone)]
pub struct WordMasks {
    next: u64,
    end: u64,
}

/// The words of `range`.
#[inline]
pub fn word_masks(range: Range<u64>) -> WordMasks {
    WordMasks {
        next: range.start,
        end: range.end,
    }
}

impl Iterator for WordMasks {
    type Item = (usize, u64);

    #[inline]
    fn next(&mut self) -> Option<(usize, u64)> {
        if self.next >= self.end {
            return None;
        }
        let word = self.next / 64;
        let low = self.next % 64;
        let width = (64 - low).min(self.end - self.next);
        self.next += width;
        Some((word as usize, (u64::MAX >> (64 - width)) << low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_exactly_the_range() {
        for start in 0..140u64 {
            for end in 0..200u64 {
                let mut seen = Vec::new();
                for (word, mask) in word_masks(start..end) {
                    for bit in 0..64 {
                        if mask >> bit & 1 == 1 {
                            seen.push(word as u64 * 64 + bit);
                        }
                    }
                }
                assert_eq!(seen, (start..end).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_last_word_of_the_number_space_does_not_overflow() {
        let words: Vec<_> = word_masks(u64::MAX - 3..u64::MAX).collect();
        assert_eq!(words, [((u64::MAX / 64) as usize, 0b111 << 60)]);
    }
}
