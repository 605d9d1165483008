//! Memory that the application, a received command or the engine owns. The application's is watched: nobody may touch
//! it after its I/O has ended.

use std::cell::{Cell, Ref, RefCell};
use std::rc::Rc;

struct Memory {
    bytes: RefCell<Vec<u8>>,
    returned: Cell<bool>,
}

/// Data of an application I/O or of a received command, by reference.
#[derive(Clone)]
pub struct Payload(Rc<Memory>);

impl Payload {
    pub fn new(bytes: Vec<u8>) -> Payload {
        Payload(Rc::new(Memory {
            bytes: RefCell::new(bytes),
            returned: Cell::new(false),
        }))
    }

    /// Panics when the owner has it back.
    pub fn bytes(&self) -> Ref<'_, Vec<u8>> {
        assert!(!self.0.returned.get(), "read from memory that was returned");
        self.0.bytes.borrow()
    }

    /// Panics when the owner has it back.
    pub fn write(&self, bytes: &[u8]) {
        assert!(
            !self.0.returned.get(),
            "write into memory that was returned"
        );
        self.0.bytes.borrow_mut()[..bytes.len()].copy_from_slice(bytes);
    }

    /// The owner takes it back, with what is in it.
    pub fn take_back(&self) -> Vec<u8> {
        assert!(!self.0.returned.replace(true), "memory was returned twice");
        self.0.bytes.borrow().clone()
    }
}

/// Memory of the engine.
pub struct Buffer(pub Vec<u8>);

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
