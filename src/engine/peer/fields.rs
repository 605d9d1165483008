//! Reading and writing fixed little-endian layouts field by field, with every length checked.
//! Called by the peer protocol's bodies and Hello. Must not know what any field means.

use thiserror::Error;

/// Why bytes are not the structure that they should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum LayoutError {
    /// Fewer or more bytes than the structure has.
    #[error("{structure} has {expected_bytes} bytes, got {got_bytes}")]
    Length {
        /// The structure's name.
        structure: &'static str,
        /// What it takes.
        expected_bytes: usize,
        /// What there was.
        got_bytes: usize,
    },
    /// A field holds a value that means nothing.
    #[error("{structure}: field {field} cannot be {value:#x}")]
    Value {
        /// The structure's name.
        structure: &'static str,
        /// The field's name.
        field: &'static str,
        /// The value found.
        value: u64,
    },
}

/// Takes fields off the front of a byte slice.
pub struct FieldReader<'a> {
    structure: &'static str,
    total_bytes: usize,
    rest: &'a [u8],
}

impl<'a> FieldReader<'a> {
    /// Starts at the first byte; `structure` is the name used in errors.
    pub fn new(structure: &'static str, bytes: &'a [u8]) -> FieldReader<'a> {
        FieldReader {
            structure,
            total_bytes: bytes.len(),
            rest: bytes,
        }
    }

    /// As `new`, for a structure of exactly `expected_bytes`.
    pub fn exact(
        structure: &'static str,
        bytes: &'a [u8],
        expected_bytes: usize,
    ) -> Result<FieldReader<'a>, LayoutError> {
        if bytes.len() != expected_bytes {
            return Err(LayoutError::Length {
                structure,
                expected_bytes,
                got_bytes: bytes.len(),
            });
        }
        Ok(FieldReader::new(structure, bytes))
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], LayoutError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            let read_bytes = self.total_bytes - self.rest.len();
            return Err(LayoutError::Length {
                structure: self.structure,
                expected_bytes: read_bytes + N,
                got_bytes: self.total_bytes,
            });
        };
        self.rest = rest;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, LayoutError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, LayoutError> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, LayoutError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, LayoutError> {
        self.array().map(u64::from_le_bytes)
    }

    /// `N` reserved bytes, which must be zero.
    pub fn zeroes<const N: usize>(&mut self, field: &'static str) -> Result<(), LayoutError> {
        match self.array::<N>()?.iter().find(|&&byte| byte != 0) {
            None => Ok(()),
            Some(&byte) => Err(self.bad_value(field, u64::from(byte))),
        }
    }

    /// One byte that stands for one of a few states.
    pub fn state<T>(
        &mut self,
        field: &'static str,
        from_u8: impl FnOnce(u8) -> Option<T>,
    ) -> Result<T, LayoutError> {
        let value = self.u8()?;
        from_u8(value).ok_or_else(|| self.bad_value(field, u64::from(value)))
    }

    /// The error for a field of this structure that holds a meaningless value.
    pub fn bad_value(&self, field: &'static str, value: u64) -> LayoutError {
        LayoutError::Value {
            structure: self.structure,
            field,
            value,
        }
    }

    /// What has not been read.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }
}

/// Puts fields one after the other into an array of a structure's size. What is not written stays zero.
pub struct FieldWriter<const BYTES: usize> {
    bytes: [u8; BYTES],
    at: usize,
}

impl<const BYTES: usize> Default for FieldWriter<BYTES> {
    fn default() -> Self {
        FieldWriter {
            bytes: [0; BYTES],
            at: 0,
        }
    }
}

impl<const BYTES: usize> FieldWriter<BYTES> {
    /// Appends bytes. Structures have constant layouts, so running over the end is a programming error.
    pub fn bytes(mut self, field: &[u8]) -> Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    /// One byte.
    pub fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    /// Two bytes.
    pub fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Four bytes.
    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Eight bytes.
    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// The structure; `at_bytes` is how far its fields must have come, which is checked in debug builds.
    pub fn finish(self, at_bytes: usize) -> [u8; BYTES] {
        debug_assert_eq!(
            self.at, at_bytes,
            "the fields do not add up to the documented layout"
        );
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_slice_is_an_error_that_names_the_structure() {
        let mut reader = FieldReader::new("Thing", &[1, 2, 3]);
        assert_eq!(reader.u16(), Ok(0x0201));
        let error = reader.u32().unwrap_err();
        assert_eq!(
            error,
            LayoutError::Length {
                structure: "Thing",
                expected_bytes: 6,
                got_bytes: 3
            }
        );
        assert_eq!(error.to_string(), "Thing has 6 bytes, got 3");
    }

    #[test]
    fn reserved_bytes_must_be_zero() {
        assert!(
            FieldReader::new("Thing", &[0, 0])
                .zeroes::<2>("reserved")
                .is_ok()
        );
        assert!(
            FieldReader::new("Thing", &[0, 9])
                .zeroes::<2>("reserved")
                .is_err()
        );
    }

    #[test]
    fn written_fields_are_read_back() {
        let bytes: [u8; 16] = FieldWriter::default()
            .u8(7)
            .u16(8)
            .u32(9)
            .u64(10)
            .finish(15);
        let mut reader = FieldReader::exact("Thing", &bytes, 16).unwrap();
        assert_eq!((reader.u8(), reader.u16()), (Ok(7), Ok(8)));
        assert_eq!((reader.u32(), reader.u64()), (Ok(9), Ok(10)));
        assert_eq!(reader.rest(), &[0]);
    }
}
