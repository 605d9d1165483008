//! A part of an I/O's data, as a list of pieces of its own: for a command to a peer that carries a piece of a write.
//! Called by `io`; the lists stay where they are as long as SPDK may read them.

use super::bdev::SEGMENTS_MAX;
use super::context::Payload;
use super::sys::iovec;

type List = [iovec; SEGMENTS_MAX as usize];

/// A list for each I/O that can be in flight, by its place among them. Boxed: SPDK keeps the address.
#[derive(Default)]
#[allow(clippy::vec_box)]
pub struct Lists(Vec<Box<List>>);

impl Lists {
    /// `len` bytes of the data from `start` on, listed at `place` unless that is all of it. A part outside of the data is
    /// cut off where the data ends.
    ///
    /// # Safety
    /// The payload's list is valid, and so is its memory for as long as the part is used.
    pub unsafe fn part(&mut self, place: u32, all: Payload, start: usize, len: usize) -> Payload {
        if all.iovs.is_null() || (start == 0 && len == all.len) {
            return all;
        }
        let place = place as usize;
        if self.0.len() <= place {
            self.0.resize_with(place + 1, || {
                Box::new([iovec::default(); SEGMENTS_MAX as usize])
            });
        }
        let list = &mut self.0[place];
        // SAFETY: the caller's word.
        let pieces = unsafe { std::slice::from_raw_parts(all.iovs, all.iov_count as usize) };
        let (mut skipped, mut left, mut count) = (start, len, 0);
        for piece in pieces {
            let skip = skipped.min(piece.iov_len);
            let taken = (piece.iov_len - skip).min(left);
            skipped -= skip;
            if taken > 0
                && let Some(place) = list.get_mut(count)
            {
                *place = iovec {
                    iov_base: piece.iov_base.wrapping_byte_add(skip),
                    iov_len: taken,
                };
                left -= taken;
                count += 1;
            }
        }
        Payload {
            iovs: list.as_mut_ptr(),
            iov_count: count as i32,
            len: len - left,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets into the data of the parts' pieces.
    fn parts(
        lists: &mut Lists,
        lengths: &[usize],
        start: usize,
        len: usize,
    ) -> Vec<(usize, usize)> {
        let memory = vec![0_u8; lengths.iter().sum()];
        let base = memory.as_ptr() as usize;
        let mut at = base;
        let mut iovs: Vec<iovec> = lengths
            .iter()
            .map(|&iov_len| {
                at += iov_len;
                iovec {
                    iov_base: (at - iov_len) as *mut _,
                    iov_len,
                }
            })
            .collect();
        let all = Payload {
            iovs: iovs.as_mut_ptr(),
            iov_count: iovs.len() as i32,
            len: memory.len(),
        };
        // SAFETY: list and memory live until the end of this function.
        let part = unsafe { lists.part(3, all, start, len) };
        assert_eq!(part.len, len);
        // SAFETY: made above.
        let pieces = unsafe { std::slice::from_raw_parts(part.iovs, part.iov_count as usize) };
        pieces
            .iter()
            .map(|piece| (piece.iov_base as usize - base, piece.iov_len))
            .collect()
    }

    #[test]
    fn a_part_has_the_bytes_that_it_names() {
        let lists = &mut Lists::default();
        assert_eq!(parts(lists, &[8192], 4096, 4096), [(4096, 4096)]);
        assert_eq!(parts(lists, &[4096; 3], 4096, 4096), [(4096, 4096)]);
        assert_eq!(
            parts(lists, &[512, 1024, 512], 256, 1536),
            [(256, 256), (512, 1024), (1536, 256)]
        );
        assert_eq!(parts(lists, &[512; 4], 0, 2048).len(), 4);
        for start in 0..64 {
            for len in 1..=64 - start {
                let found: Vec<usize> = parts(lists, &[7, 1, 20, 36], start, len)
                    .into_iter()
                    .flat_map(|(at, len)| at..at + len)
                    .collect();
                assert!(found.into_iter().eq(start..start + len));
            }
        }
        assert_eq!(parts(lists, &[1; 16], 15, 1), [(15, 1)]);
    }

    #[test]
    fn a_list_stays_where_it_is() {
        let lists = &mut Lists::default();
        let mut own = [iovec::default(); 2];
        let mut all = Payload {
            iovs: own.as_mut_ptr(),
            iov_count: 2,
            len: 8,
        };
        for (index, piece) in own.iter_mut().enumerate() {
            *piece = iovec {
                iov_base: (index * 4 + 4096) as *mut _,
                iov_len: 4,
            };
        }
        all.iovs = own.as_mut_ptr();
        // SAFETY: only addresses are looked at.
        let first = unsafe { lists.part(0, all, 4, 4) };
        for place in 1..1000 {
            // SAFETY: as above.
            unsafe { lists.part(place, all, 2, 4) };
        }
        // SAFETY: the list is there as long as `lists`.
        let piece = unsafe { *first.iovs };
        assert_eq!((piece.iov_base as usize, piece.iov_len), (4100, 4));
    }
}
