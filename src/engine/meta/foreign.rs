//! What a device already carries: volumes of ours, file systems, partition tables, volume managers.
//!
//! Asked before a device is formatted, offline and by RPC, so that nobody loses data by a wrong name. Looks
//! at bytes only; what it does not know it does not see.

use super::superblock;

/// How much of the front of a device [`recognise`] wants to see, in bytes.
pub const FRONT_BYTES: usize = 128 << 10;
/// How much of the end of a device [`recognise`] wants to see, in bytes.
pub const END_BYTES: usize = 64 << 10;

/// Something that was recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// In words for a message: "an ext2/3/4 file system".
    pub what: &'static str,
    /// Whether it is metadata of a bdev_repl volume, whole or not.
    pub is_ours: bool,
    /// How many bytes from the front of the device it takes, if it says so.
    pub extent_bytes: Option<u64>,
}

struct Signature {
    offset: usize,
    bytes: &'static [u8],
    what: &'static str,
}

const fn at(offset: usize, bytes: &'static [u8], what: &'static str) -> Signature {
    Signature {
        offset,
        bytes,
        what,
    }
}

const EXT: &str = "an ext2/3/4 file system";
const XFS: &str = "an XFS file system";
const BTRFS: &str = "a Btrfs file system";
const GPT: &str = "a GPT partition table";
const LVM: &str = "an LVM physical volume";
const SWAP: &str = "a swap area";
const MD: &str = "a member of a Linux software RAID";

/// From the formats' own documentation; the more telling ones first, since a boot sector's signature also
/// ends many file systems.
const FRONT: &[Signature] = &[
    at(512, b"EFI PART", GPT),
    at(4096, b"EFI PART", GPT),
    at(0, b"SPDKBLOB", "an SPDK blobstore (a logical volume store)"),
    at(0, b"LABELONE", LVM),
    at(512, b"LABELONE", LVM),
    at(1024, b"LABELONE", LVM),
    at(1536, b"LABELONE", LVM),
    at(0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
    at(0, b"\xfc\x4e\x2b\xa9", MD),
    at(4096, b"\xfc\x4e\x2b\xa9", MD),
    at(
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca",
        "a bcache device",
    ),
    at(
        4096 + 24,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9",
        "a bcachefs file system",
    ),
    at(0, b"bluestore block device", "a Ceph BlueStore device"),
    at(0, b"dmvdo001", "a VDO volume"),
    at(0, b"integrt\0", "a dm-integrity device"),
    at(0, b"verity\0\0", "a dm-verity hash device"),
    at(0, b"QFI\xfb", "a qcow2 image"),
    at(0, b"XFSB", XFS),
    at(0, b"hsqs", "a SquashFS file system"),
    at(32, b"NXSB", "an APFS container"),
    at(1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    at(1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system"),
    at(1024, b"H+\0\x04", "an HFS+ file system"),
    at(1024, b"HX\0\x05", "an HFS+ file system"),
    at(1024 + 56, b"\x53\xef", EXT),
    at(4096 - 10, b"SWAPSPACE2", SWAP),
    at(4096 - 10, b"SWAP-SPACE", SWAP),
    at(8192 - 10, b"SWAPSPACE2", SWAP),
    at(16384 - 10, b"SWAPSPACE2", SWAP),
    at(65536 - 10, b"SWAPSPACE2", SWAP),
    at(8192, b"OCFSV2", "an OCFS2 file system"),
    at(0x8000, b"JFS1", "a JFS file system"),
    at(0x8001, b"CD001", "an ISO 9660 file system"),
    at(0x8001, b"BEA01", "a UDF file system"),
    at(0x10000, b"\x01\x16\x19\x70", "a GFS2 file system"),
    at(0x10034, b"ReIsErFs", "a ReiserFS file system"),
    at(0x10034, b"ReIsEr2Fs", "a ReiserFS file system"),
    at(0x10034, b"ReIsEr3Fs", "a ReiserFS file system"),
    at(0x10040, b"_BHRfS_M", BTRFS),
    at(3, b"NTFS    ", "an NTFS file system"),
    at(3, b"EXFAT   ", "an exFAT file system"),
    at(3, b"-FVE-FS-", "a BitLocker volume"),
    at(54, b"FAT12   ", "a FAT file system"),
    at(54, b"FAT16   ", "a FAT file system"),
    at(82, b"FAT32   ", "a FAT file system"),
];

/// Tells what a device carries, from its first [`FRONT_BYTES`] and its last [`END_BYTES`] (all of it where
/// it is smaller). What lies at the end comes before what lies at the front, and our own metadata first:
/// that is what is lost even when the data stays in place.
pub fn recognise(front: &[u8], end: &[u8]) -> Option<Foreign> {
    let ours = holds(front, 0, &superblock::MAGIC)
        || holds(front, 4096, &superblock::MAGIC)
        || before_end(end, 512, 12 << 10).any(|bytes| bytes.starts_with(&superblock::MAGIC));
    if ours {
        return Some(Foreign {
            what: "metadata of a bdev_repl volume",
            is_ours: true,
            extent_bytes: None,
        });
    }
    if let Some(what) = at_end(end) {
        return Some(Foreign {
            what,
            is_ours: false,
            extent_bytes: None,
        });
    }
    let found = FRONT
        .iter()
        .find(|signature| holds(front, signature.offset, signature.bytes));
    let what = match found {
        Some(signature) => signature.what,
        None => boot_sector(front)?,
    };
    Some(Foreign {
        what,
        is_ours: false,
        extent_bytes: extent_bytes(what, front),
    })
}

fn holds(bytes: &[u8], offset: usize, signature: &[u8]) -> bool {
    bytes
        .get(offset..)
        .is_some_and(|rest| rest.starts_with(signature))
}

/// What begins at each multiple of `step` bytes before the end, up to `reach` bytes before it.
fn before_end(end: &[u8], step: usize, reach: usize) -> impl Iterator<Item = &[u8]> {
    (1..=reach / step).filter_map(move |count| end.get(end.len().checked_sub(count * step)?..))
}

fn at_end(end: &[u8]) -> Option<&'static str> {
    // The backup GPT is the last logical block.
    if [512, 4096]
        .iter()
        .any(|&block| before_end(end, block, block).any(|bytes| bytes.starts_with(b"EFI PART")))
    {
        return Some(GPT);
    }
    if before_end(end, 4096, END_BYTES).any(|bytes| bytes.starts_with(b"\xfc\x4e\x2b\xa9")) {
        return Some(MD);
    }
    // DRBD's internal metadata: the last 4 KiB, big-endian, a magic of several versions at byte 60.
    let drbd = before_end(end, 4096, 4096)
        .next()
        .and_then(|bytes| bytes.get(60..64));
    if drbd
        .is_some_and(|magic| magic[..3] == [0x83, 0x74, 0x02] && (0x67..=0x6f).contains(&magic[3]))
    {
        return Some("internal metadata of DRBD");
    }
    // Labels of ZFS end with uberblocks of at least 1 KiB, in the byte order of the machine.
    let zfs = |bytes: &[u8]| {
        bytes.starts_with(b"\x0c\xb1\xba\0\0\0\0\0") || bytes.starts_with(b"\0\0\0\0\0\xba\xb1\x0c")
    };
    if before_end(end, 1024, END_BYTES).any(zfs) {
        return Some("a member of a ZFS pool");
    }
    None
}

fn boot_sector(front: &[u8]) -> Option<&'static str> {
    if !holds(front, 510, b"\x55\xaa") {
        return None;
    }
    // Four entries of 16 bytes: byte 0 is 0 or 80h, byte 4 the partition's type.
    let entries = front.get(446..510)?.chunks(16);
    let plausible = entries.clone().all(|entry| entry[0] & 0x7f == 0);
    if plausible && entries.clone().any(|entry| entry[4] != 0) {
        return Some("an MBR partition table");
    }
    Some("a boot sector")
}

/// How far a file system reaches, where its superblock says so.
fn extent_bytes(what: &'static str, front: &[u8]) -> Option<u64> {
    let le32 = |offset: usize| {
        Some(u64::from(u32::from_le_bytes(
            front.get(offset..offset + 4)?.try_into().ok()?,
        )))
    };
    let be32 = |offset: usize| {
        Some(u64::from(u32::from_be_bytes(
            front.get(offset..offset + 4)?.try_into().ok()?,
        )))
    };
    match what {
        EXT => {
            let block_bytes = 1024u64.checked_shl(le32(1024 + 24)?.try_into().ok()?)?;
            let is_64bit = le32(1024 + 96)? & 0x80 != 0;
            let high = if is_64bit { le32(1024 + 336)? } else { 0 };
            block_bytes.checked_mul(high << 32 | le32(1024 + 4)?)
        }
        XFS => be32(4)?.checked_mul(be32(8)? << 32 | be32(12)?),
        BTRFS => Some(le32(0x10074)? << 32 | le32(0x10070)?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(changes: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        for (offset, content) in changes {
            bytes[*offset..][..content.len()].copy_from_slice(content);
        }
        bytes
    }

    fn found(bytes: &[u8]) -> Option<Foreign> {
        recognise(
            &bytes[..FRONT_BYTES.min(bytes.len())],
            &bytes[bytes.len().saturating_sub(END_BYTES)..],
        )
    }

    #[test]
    fn an_empty_device_carries_nothing() {
        assert_eq!(found(&device(&[])), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn every_signature_is_found_where_it_belongs() {
        for signature in FRONT {
            let bytes = device(&[(signature.offset, signature.bytes)]);
            assert_eq!(found(&bytes).map(|found| found.what), Some(signature.what));
        }
    }

    #[test]
    fn things_at_the_end_are_found() {
        let end = 1 << 20;
        for (offset, content, what) in [
            (end - 512, &b"EFI PART"[..], GPT),
            (end - 4096, b"EFI PART", GPT),
            (end - 8192, b"\xfc\x4e\x2b\xa9", MD),
            (
                end - 4096 + 60,
                b"\x83\x74\x02\x6d",
                "internal metadata of DRBD",
            ),
            (
                end - 3072,
                b"\x0c\xb1\xba\0\0\0\0\0",
                "a member of a ZFS pool",
            ),
        ] {
            assert_eq!(
                found(&device(&[(offset, content)])).map(|found| found.what),
                Some(what)
            );
        }
    }

    #[test]
    fn our_own_metadata_comes_first_even_when_damaged() {
        for offset in [0, 4096, (1 << 20) - 8192, (1 << 20) - 4096] {
            let bytes = device(&[
                (offset, b"bdevrepl"),
                (1024 + 56, b"\x53\xef"),
                ((1 << 20) - 512, b"EFI PART"),
            ]);
            assert!(found(&bytes).unwrap().is_ours, "at {offset}");
        }
    }

    #[test]
    fn a_partition_table_is_told_from_another_boot_sector() {
        let table = device(&[(446, b"\x80"), (450, b"\x83"), (510, b"\x55\xaa")]);
        assert_eq!(found(&table).unwrap().what, "an MBR partition table");
        let code = device(&[(446, b"\x33"), (450, b"\x83"), (510, b"\x55\xaa")]);
        assert_eq!(found(&code).unwrap().what, "a boot sector");
        let fat = device(&[(82, b"FAT32   "), (510, b"\x55\xaa")]);
        assert_eq!(found(&fat).unwrap().what, "a FAT file system");
    }

    #[test]
    fn a_file_system_says_how_far_it_reaches() {
        let ext = device(&[
            (1024 + 56, b"\x53\xef"),
            (1024 + 24, b"\x02"),
            (1024 + 4, b"\0\x01"),
        ]);
        assert_eq!(found(&ext).unwrap().extent_bytes, Some(4096 * 256));
        let xfs = device(&[(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\0\x07")]);
        assert_eq!(found(&xfs).unwrap().extent_bytes, Some(4096 * 7));
        let btrfs = device(&[(0x10040, b"_BHRfS_M"), (0x10070, b"\0\0\0\x40")]);
        assert_eq!(found(&btrfs).unwrap().extent_bytes, Some(1 << 30));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(
            changes in proptest::collection::vec((0usize..70_000, any::<[u8; 8]>()), 0..20), size in 0usize..70_008, which: usize,
        ) {
            let mut bytes = vec![0; 70_008];
            let signature = &FRONT[which % FRONT.len()];
            bytes[signature.offset..][..signature.bytes.len()].copy_from_slice(signature.bytes);
            for (offset, content) in changes {
                bytes[offset..offset + 8].copy_from_slice(&content);
            }
            found(&bytes[..size]);
        }
    }
}
