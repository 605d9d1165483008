//! Memory that the application, a received command or the engine owns. The application's is watched: nobody may touch
//! it after its I/O has ended. What is all zeroes, as most of a resync is, takes no room and is never copied.

use std::cell::{Cell, Ref, RefCell};
use std::rc::Rc;

/// The longest content that takes no room.
const LONGEST: usize = 128 << 10;
static ZEROES: [u8; LONGEST] = [0; LONGEST];
/// What fresh memory holds: no write of the application, and no zeroes.
const FRESH: u8 = 0xaa;
static FRESH_BYTES: [u8; LONGEST] = [FRESH; LONGEST];

/// The content of memory.
#[derive(Clone)]
pub enum Bytes {
    Zeroes(usize),
    Fresh(usize),
    Held(Vec<u8>),
}

impl Bytes {
    pub fn zeroes(len: usize) -> Bytes {
        if len <= LONGEST {
            Bytes::Zeroes(len)
        } else {
            Bytes::Held(vec![0; len])
        }
    }

    /// Memory that nobody has written to.
    pub fn fresh(len: usize) -> Bytes {
        if len <= LONGEST {
            Bytes::Fresh(len)
        } else {
            Bytes::Held(vec![FRESH; len])
        }
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Bytes::Zeroes(len) => &ZEROES[..*len],
            Bytes::Fresh(len) => &FRESH_BYTES[..*len],
            Bytes::Held(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        if !matches!(self, Bytes::Held(_)) {
            *self = Bytes::Held(self.bytes().to_vec());
        }
        match self {
            Bytes::Held(bytes) => bytes,
            _ => &mut [],
        }
    }

    /// Takes the place of the first bytes.
    pub fn put(&mut self, content: Bytes) {
        let len = content.bytes().len();
        if len == self.bytes().len() {
            *self = content;
        } else {
            self.bytes_mut()[..len].copy_from_slice(content.bytes());
        }
    }
}

/// A write that a peer has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceivedWrite {
    pub from: usize,
    pub session: u32,
    pub sequence: u64,
}

/// Counts memory that is alive. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Count(Rc<Cell<usize>>);

impl Count {
    pub fn get(&self) -> usize {
        self.0.get()
    }

    fn one(&self) -> Counted {
        self.0.set(self.0.get() + 1);
        Counted(self.clone())
    }
}

struct Counted(Count);

impl Drop for Counted {
    fn drop(&mut self) {
        let Counted(Count(count)) = self;
        count.set(count.get() - 1);
    }
}

struct Memory {
    content: RefCell<Bytes>,
    returned: Cell<bool>,
    write: Option<ReceivedWrite>,
    _counted: Option<Counted>,
}

/// Data of an application I/O or of a received command, by reference.
#[derive(Clone)]
pub struct Payload(Rc<Memory>);

impl Payload {
    pub fn new(content: Bytes) -> Payload {
        Payload(Rc::new(Memory {
            content: RefCell::new(content),
            returned: Cell::new(false),
            write: None,
            _counted: None,
        }))
    }

    /// Of a received command; `write` if it is one.
    pub fn received(content: Bytes, write: Option<ReceivedWrite>, count: &Count) -> Payload {
        Payload(Rc::new(Memory {
            content: RefCell::new(content),
            returned: Cell::new(false),
            write,
            _counted: Some(count.one()),
        }))
    }

    /// The received write that carried it.
    pub fn write(&self) -> Option<ReceivedWrite> {
        self.0.write
    }

    /// Nobody else refers to it.
    pub fn is_only_one(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }

    /// Panics when the owner has it back.
    pub fn bytes(&self) -> Ref<'_, [u8]> {
        Ref::map(self.content(), Bytes::bytes)
    }

    /// Panics when the owner has it back.
    pub fn content(&self) -> Ref<'_, Bytes> {
        assert!(
            !self.0.returned.get(),
            "[I11] read from memory that was returned"
        );
        self.0.content.borrow()
    }

    /// Panics when the owner has it back.
    pub fn put(&self, content: Bytes) {
        assert!(
            !self.0.returned.get(),
            "[I11] write into memory that was returned"
        );
        self.0.content.borrow_mut().put(content);
    }

    /// The owner takes it back, with what is in it.
    pub fn take_back(&self) -> Bytes {
        assert!(
            !self.0.returned.replace(true),
            "[I11] memory was returned twice"
        );
        self.0.content.replace(Bytes::Zeroes(0))
    }
}

/// Memory of the engine.
pub struct Buffer {
    content: Bytes,
    _counted: Counted,
}

impl Buffer {
    pub fn new(content: Bytes, count: &Count) -> Buffer {
        Buffer {
            content,
            _counted: count.one(),
        }
    }

    pub fn content(&self) -> &Bytes {
        &self.content
    }

    /// Takes the place of the first bytes.
    pub fn put(&mut self, content: Bytes) {
        self.content.put(content);
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.content.bytes()
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.content.bytes_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_takes_the_place_of_the_first_bytes_and_of_no_others() {
        let mut content = Bytes::fresh(8);
        content.put(Bytes::zeroes(3));
        assert_eq!(
            content.bytes(),
            [0, 0, 0, FRESH, FRESH, FRESH, FRESH, FRESH]
        );
        content.put(Bytes::Held(vec![7; 8]));
        assert_eq!(content.bytes(), [7; 8]);
        content.put(Bytes::zeroes(8));
        assert_eq!(content.bytes(), [0; 8]);
    }

    #[test]
    #[should_panic(expected = "write into memory that was returned")]
    fn nobody_writes_into_memory_that_was_returned() {
        let payload = Payload::new(Bytes::fresh(8));
        payload.take_back();
        payload.put(Bytes::zeroes(8));
    }
}
