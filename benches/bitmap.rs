//! What the engine's bitmaps and its range lock cost, beside the obvious alternatives: one dense bitmap
//! of atomics shared by all cores, and `roaring`. `cargo bench --bench bitmap` ends with the ratios of
//! that same run; each compares the best sample of either side, which a busy machine disturbs least.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bdev_repl::engine::bitmap::{Master, Shard, wire};
use bdev_repl::engine::range_lock::RangeLock;
use criterion::Criterion;
use roaring::RoaringBitmap;

/// 1 TiB at 4 KiB a bit.
const BITS: u64 = 1 << 28;
/// Writes of a busy moment and of a quiet one.
const BUSY_WRITES: usize = 65536;
const QUIET_WRITES: usize = 1000;
/// The size of one message of the exchange.
const BODY_BYTES: usize = 128 * 1024;

const OURS: &str = "bdev_repl";
const ATOMIC: &str = "shared atomic bitmap";
const ROARING: &str = "roaring";

/// Runs benches and remembers the best time of each.
struct Bench {
    criterion: RefCell<Criterion>,
    best_ns: RefCell<BTreeMap<(&'static str, &'static str), f64>>,
}

impl Bench {
    /// Measures `run`, which does its work as often as it is told and says how long that took.
    fn measure(&self, what: &'static str, who: &'static str, mut run: impl FnMut(u64) -> Duration) {
        let mut criterion = self.criterion.borrow_mut();
        criterion.bench_function(&format!("{what}/{who}"), |bencher| {
            bencher.iter_custom(|times| {
                let took = run(times);
                let each_ns = took.as_nanos() as f64 / times as f64;
                let mut best = self.best_ns.borrow_mut();
                let best = best.entry((what, who)).or_insert(f64::MAX);
                *best = best.min(each_ns);
                took
            });
        });
    }

    /// One operation per write of `writes`, over and over.
    fn each(
        &self,
        what: &'static str,
        who: &'static str,
        writes: &[Range<u64>],
        mut operation: impl FnMut(Range<u64>),
    ) {
        let mut next = 0;
        self.measure(what, who, |times| {
            let start = Instant::now();
            for _ in 0..times {
                operation(writes[next].clone());
                next = (next + 1) % writes.len();
            }
            start.elapsed()
        });
    }

    fn print_ratios(&self) {
        let best = self.best_ns.borrow();
        for ((what, who), other_ns) in best.iter() {
            let Some(our_ns) = best.get(&(*what, OURS)).filter(|_| *who != OURS) else {
                continue;
            };
            let (ratio, word) = if other_ns >= our_ns {
                (other_ns / our_ns, "faster")
            } else {
                (our_ns / other_ns, "slower")
            };
            println!(
                "{what}: {ratio:.1} times {word} than {who} ({our_ns:.0} ns, {other_ns:.0} ns)"
            );
        }
    }
}

/// Times `work` alone, on what `prepare` has made anew each time.
fn prepared<T, R>(
    times: u64,
    mut prepare: impl FnMut() -> T,
    mut work: impl FnMut(&mut T) -> R,
) -> Duration {
    let mut took = Duration::ZERO;
    for _ in 0..times {
        let mut state = prepare();
        let start = Instant::now();
        black_box(work(&mut state));
        took += start.elapsed();
    }
    took
}

/// `count` ranges of 1 to 16 bits, the same ones in every run.
fn random_writes(count: usize, bits: u64) -> Vec<Range<u64>> {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    (0..count)
        .map(|_| {
            let start = next() % bits;
            start..(start + 1 + next() % 16).min(bits)
        })
        .collect()
}

fn narrow(range: Range<u64>) -> Range<u32> {
    range.start as u32..range.end as u32
}

/// The dense bitmap that every core would set bits in.
struct AtomicBitmap(Vec<AtomicU64>);

impl AtomicBitmap {
    fn new(bits: u64) -> AtomicBitmap {
        AtomicBitmap((0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn words(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let mut next = range.start;
        std::iter::from_fn(move || {
            (next < range.end).then(|| {
                let width = (64 - next % 64).min(range.end - next);
                let word = (next / 64) as usize;
                let mask = (u64::MAX >> (64 - width)) << (next % 64);
                next += width;
                (word, mask)
            })
        })
    }

    fn set(&self, range: Range<u64>) -> bool {
        let mut before = 0;
        for (word, mask) in Self::words(range) {
            before |= self.0[word].fetch_or(mask, Ordering::SeqCst) & mask;
        }
        before == 0
    }

    fn clear(&self, range: Range<u64>) {
        for (word, mask) in Self::words(range) {
            self.0[word].fetch_and(!mask, Ordering::SeqCst);
        }
    }
}

fn range_lock(bench: &Bench) {
    const WHAT: &str = "range lock, lock and unlock";
    let writes = random_writes(4096, BITS);
    let lock = RangeLock::new(BITS);
    bench.each(WHAT, OURS, &writes, |range| {
        assert!(lock.try_lock(range.clone()));
        lock.unlock(range);
    });
    let atomic = AtomicBitmap::new(BITS);
    bench.each(WHAT, ATOMIC, &writes, |range| {
        assert!(atomic.set(range.clone()));
        atomic.clear(range);
    });
    let roaring = Mutex::new(RoaringBitmap::new());
    bench.each(WHAT, ROARING, &writes, |range| {
        let range = narrow(range);
        let mut locked = roaring.lock().expect("nobody panics with it");
        assert_eq!(locked.range_cardinality(range.clone()), 0);
        locked.insert_range(range.clone());
        drop(locked);
        let mut locked = roaring.lock().expect("nobody panics with it");
        locked.remove_range(range);
    });
}

fn shard_set(bench: &Bench, what: &'static str, writes: &[Range<u64>]) {
    let mut shard = Shard::new(BITS);
    bench.each(what, OURS, writes, |range| shard.set_range(range));
    let atomic = AtomicBitmap::new(BITS);
    bench.each(what, ATOMIC, writes, |range| {
        black_box(atomic.set(range));
    });
    let mut roaring = RoaringBitmap::new();
    bench.each(what, ROARING, writes, |range| {
        roaring.insert_range(narrow(range));
    });
}

/// Another core sets bits of the same volume all the while: in its own shard, or in the shared bitmap.
fn shard_set_beside_another_core(bench: &Bench, writes: &[Range<u64>]) {
    const WHAT: &str = "shard set, within 1 GiB, another core too";
    let stop = AtomicBool::new(false);
    let beside = |mut set: Box<dyn FnMut(Range<u64>) + Send>, measured: &mut dyn FnMut()| {
        stop.store(false, Ordering::SeqCst);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for range in writes.iter().rev().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    set(range.clone());
                }
            });
            measured();
            stop.store(true, Ordering::SeqCst);
        });
    };
    let mut others = Shard::new(BITS);
    let mut shard = Shard::new(BITS);
    beside(Box::new(move |range| others.set_range(range)), &mut || {
        bench.each(WHAT, OURS, writes, |range| shard.set_range(range));
    });
    let atomic = Arc::new(AtomicBitmap::new(BITS));
    let others = atomic.clone();
    let set_shared = move |range| {
        black_box(others.set(range));
    };
    beside(Box::new(set_shared), &mut || {
        bench.each(WHAT, ATOMIC, writes, |range| {
            black_box(atomic.set(range));
        });
    });
}

fn harvest_and_merge(bench: &Bench, what: &'static str, writes: &[Range<u64>]) {
    // Every merge meets what an earlier one has left, from the first sample on.
    let mut master = Master::new(BITS);
    for range in writes {
        master.or_range(range.clone());
    }
    bench.measure(what, OURS, |times| {
        prepared(
            times,
            || {
                let mut shard = Shard::new(BITS);
                for range in writes {
                    shard.set_range(range.clone());
                }
                shard
            },
            |shard| {
                for (index, page) in shard.harvest() {
                    master.adopt_page(index, page);
                }
                master.count()
            },
        )
    });
    let atomic = AtomicBitmap::new(BITS);
    let mut merged = vec![0u64; atomic.0.len()];
    bench.measure(what, ATOMIC, |times| {
        prepared(
            times,
            || {
                for range in writes {
                    atomic.set(range.clone());
                }
            },
            |()| {
                for (word, merged) in atomic.0.iter().zip(&mut merged) {
                    if word.load(Ordering::SeqCst) != 0 {
                        *merged |= word.swap(0, Ordering::SeqCst);
                    }
                }
            },
        )
    });
    let mut merged = RoaringBitmap::new();
    for range in writes {
        merged.insert_range(narrow(range.clone()));
    }
    bench.measure(what, ROARING, |times| {
        prepared(
            times,
            || {
                let mut shard = RoaringBitmap::new();
                for range in writes {
                    shard.insert_range(narrow(range.clone()));
                }
                shard
            },
            |shard| {
                merged |= std::mem::take(shard);
                merged.len()
            },
        )
    });
}

fn encode_all(master: &Master, bodies: &mut Vec<Vec<u8>>) {
    bodies.clear();
    let mut cursor = Some(0);
    while let Some(from) = cursor {
        let mut body = vec![0; BODY_BYTES];
        let encoded = wire::encode(master, from, &mut body);
        body.truncate(encoded.len);
        bodies.push(body);
        cursor = encoded.next;
    }
}

/// The bitmap after `writes` is sent to a peer and ORed there. Says how large each form is.
fn wire_form(bench: &Bench, writes: &[Range<u64>]) -> [usize; 3] {
    const ENCODE: &str = "wire encode";
    const DECODE: &str = "wire decode";
    let mut master = Master::new(BITS);
    let atomic = AtomicBitmap::new(BITS);
    let mut roaring = RoaringBitmap::new();
    for range in writes {
        master.or_range(range.clone());
        atomic.set(range.clone());
        roaring.insert_range(narrow(range.clone()));
    }

    let mut bodies = Vec::new();
    bench.measure(ENCODE, OURS, |times| {
        prepared(times, || (), |()| encode_all(&master, &mut bodies))
    });
    encode_all(&master, &mut bodies);
    // The receiver has bits of its own already.
    let mut received = master.clone();
    bench.measure(DECODE, OURS, |times| {
        prepared(
            times,
            || (),
            |()| {
                for body in &bodies {
                    wire::decode(body, BITS, |index, page| {
                        received.or_page(index, page);
                    })
                    .expect("encoded above");
                }
                received.count()
            },
        )
    });

    let mut plain = vec![0u8; (BITS / 8) as usize];
    bench.measure(ENCODE, ATOMIC, |times| {
        prepared(
            times,
            || (),
            |()| {
                for (word, bytes) in atomic.0.iter().zip(plain.chunks_exact_mut(8)) {
                    bytes.copy_from_slice(&word.load(Ordering::SeqCst).to_le_bytes());
                }
            },
        )
    });
    let received = AtomicBitmap::new(BITS);
    bench.measure(DECODE, ATOMIC, |times| {
        prepared(
            times,
            || (),
            |()| {
                for (word, bytes) in received.0.iter().zip(plain.chunks_exact(8)) {
                    let value = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
                    if value != 0 {
                        word.fetch_or(value, Ordering::SeqCst);
                    }
                }
            },
        )
    });

    let mut bytes = Vec::new();
    bench.measure(ENCODE, ROARING, |times| {
        prepared(
            times,
            || (),
            |()| {
                bytes.clear();
                roaring.serialize_into(&mut bytes).expect("into memory");
            },
        )
    });
    let mut received = roaring.clone();
    bench.measure(DECODE, ROARING, |times| {
        prepared(
            times,
            || (),
            |()| {
                received |= RoaringBitmap::deserialize_from(&bytes[..]).expect("encoded above");
                received.len()
            },
        )
    });
    [bodies.iter().map(Vec::len).sum(), plain.len(), bytes.len()]
}

fn main() {
    let bench = Bench {
        criterion: RefCell::new(
            Criterion::default()
                .sample_size(10)
                .warm_up_time(Duration::from_millis(300))
                .measurement_time(Duration::from_millis(800))
                .configure_from_args(),
        ),
        best_ns: RefCell::new(BTreeMap::new()),
    };
    let busy = random_writes(BUSY_WRITES, BITS);
    range_lock(&bench);
    shard_set(&bench, "shard set, all over 1 TiB", &busy);
    let near = random_writes(BUSY_WRITES, 1 << 18);
    shard_set(&bench, "shard set, within 1 GiB", &near);
    shard_set_beside_another_core(&bench, &near);
    harvest_and_merge(&bench, "harvest and merge of 1 TiB, 65536 writes", &busy);
    harvest_and_merge(
        &bench,
        "harvest and merge of 1 TiB, 1000 writes",
        &busy[..QUIET_WRITES],
    );
    let [ours, atomic, roaring] = wire_form(&bench, &busy);
    bench.criterion.borrow().final_summary();

    let arguments: Vec<String> = std::env::args().collect();
    let measuring = arguments.iter().any(|argument| argument == "--bench");
    if measuring && !arguments.iter().any(|argument| argument == "--test") {
        println!();
        bench.print_ratios();
        println!(
            "wire form of 1 TiB, {BUSY_WRITES} writes: {ours} bytes; {ATOMIC}: {atomic}; {ROARING}: {roaring}"
        );
    }
}
