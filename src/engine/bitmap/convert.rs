//! Between bitmaps of different granularity: whatever a source bit stands for is dirty in the target.
//! The manager uses it when a peer's volume has another granularity; it knows nothing of the wire.

use super::geometry::Granularity;
use super::master::Master;
use super::page::{BITS_PER_PAGE, Page};

/// Sets in `target`, whose bits stand for `to` bytes each, every bit that touches what is set in page
/// `index` of a bitmap of granularity `from`. What lies past the end of `target` is left out (the last
/// bit of a coarser bitmap can reach past the end of the volume). How many bits were clear before.
pub fn or_converted(
    target: &mut Master,
    to: Granularity,
    from: Granularity,
    index: u32,
    page: &Page,
) -> u64 {
    if from == to && index < target.page_count() {
        return u64::from(target.or_page(index, page));
    }
    let page_start = u64::from(index) * u64::from(BITS_PER_PAGE);
    let mut added = 0;
    for run in page.runs() {
        let first = page_start + u64::from(run.start);
        let end = page_start + u64::from(run.end);
        // 32 bits of page, 15 within it, 20 of granularity: no more than 2^68, so wider numbers.
        let first_byte = u128::from(first) << from.log2();
        let end_byte = u128::from(end) << from.log2();
        let bits = u128::from(target.bits());
        let start = (first_byte >> to.log2()).min(bits) as u64;
        let end = end_byte.div_ceil(1 << to.log2()).min(bits) as u64;
        added += target.or_range(start..end);
    }
    added
}

/// The whole of `source`, of granularity `from`, as a bitmap of granularity `to` of the same volume of
/// `size_bytes`: to send the coarser view of a pair.
pub fn converted(source: &Master, from: Granularity, to: Granularity, size_bytes: u64) -> Master {
    let mut target = Master::new(to.bits_for(size_bytes));
    for index in 0..source.page_count() {
        if let Some(page) = source.page(index) {
            or_converted(&mut target, to, from, index, page);
        }
    }
    target
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::bitmap::Geometry;
    use proptest::prelude::*;

    fn granularity(log2: u8) -> Granularity {
        Granularity::from_log2(log2).unwrap()
    }

    #[test]
    fn a_coarse_bit_is_all_its_fine_bits_and_a_fine_bit_the_coarse_one_around_it() {
        let size_bytes = 10 << 20;
        let mut coarse = Master::new(granularity(20).bits_for(size_bytes));
        coarse.or_range(3..4);
        let fine = converted(&coarse, granularity(20), granularity(12), size_bytes);
        assert_eq!(fine.next_run(0, u64::MAX), Some(768..1024));
        assert_eq!(fine.count(), 256);
        let mut fine = Master::new(granularity(12).bits_for(size_bytes));
        fine.or_range(255..257);
        let coarse = converted(&fine, granularity(12), granularity(20), size_bytes);
        assert_eq!(coarse.next_run(0, u64::MAX), Some(0..2));
        assert_eq!(coarse.count(), 2);
    }

    #[test]
    fn a_page_past_the_end_is_left_out() {
        let mut target = Master::new(100);
        let mut page = Page::boxed();
        page.set_range(0..BITS_PER_PAGE);
        let fine = granularity(12);
        assert_eq!(
            or_converted(&mut target, fine, granularity(20), u32::MAX, &page),
            0
        );
        assert_eq!(or_converted(&mut target, fine, fine, 1, &page), 0);
        assert_eq!(or_converted(&mut target, fine, fine, 0, &page), 100);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn no_dirty_byte_is_lost_and_none_invented_beyond_the_coarser_bit(
            from in 12u8..=20, to in 12u8..=20, blocks in 1u64..600_000,
            writes in proptest::collection::vec((any::<u64>(), 1u64..3000), 1..10),
        ) {
            let source_geometry = Geometry::new(granularity(from), 512, blocks).unwrap();
            let target_geometry = Geometry::new(granularity(to), 512, blocks).unwrap();
            let mut source = Master::new(source_geometry.bits());
            let mut written = Vec::new();
            for (start, length) in writes {
                let start = start % blocks;
                let range = start..(start + length).min(blocks);
                source.or_range(source_geometry.outer_blocks(range.clone()));
                written.push(range);
            }
            let target = converted(
                &source, granularity(from), granularity(to), source_geometry.size_bytes(),
            );
            for range in written {
                for bit in target_geometry.outer_blocks(range) {
                    prop_assert!(target.test(bit));
                }
            }
            let mut next = 0;
            while let Some(bit) = target.next_set(next) {
                let bytes = target_geometry.bytes_of_bits(bit..bit + 1);
                prop_assert!(source_geometry.outer(bytes).any(|bit| source.test(bit)));
                next = bit + 1;
            }
        }
    }
}
