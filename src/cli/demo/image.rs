//! The ext4 image that the demo writes: made by mke2fs from real files, checked by e2fsck.
//! Called by the demo's story. Knows files and these two tools, no node.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::DemoError;

/// Files of the default image are taken until they are this many bytes.
const DEFAULT_CONTENT_BYTES: u64 = 96 << 20;
const DEFAULT_FILE_BYTES_MAX: u64 = 32 << 20;
/// Smallest file system, and what the file system itself may need.
const IMAGE_BYTES_MIN: u64 = 128 << 20;
const IMAGE_BYTES_SPARE: u64 = 24 << 20;
const IMAGE_BYTES_MULTIPLE: u64 = 8 << 20;
const FILE_SYSTEM_BLOCK_BYTES: u64 = 4096;
/// What a file or folder may take besides its content.
const ENTRY_BYTES: u64 = 1024;
/// Magic number of ext2, 3 and 4: offset 56 of the superblock, which begins at 1024.
const EXT_MAGIC_OFFSET: u64 = 1024 + 56;
const EXT_MAGIC: [u8; 2] = [0x53, 0xef];
/// Steps in which an image is written and compared.
pub const PIECE_BYTES: usize = 128 << 10;

/// The tools that the demo needs from the system.
#[derive(Clone, Debug)]
pub struct Tools {
    mke2fs: PathBuf,
    e2fsck: PathBuf,
}

impl Tools {
    /// Looks in PATH and where administrators' tools are.
    pub fn find() -> Result<Tools, DemoError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
        folders.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
        Tools::find_in(&folders)
    }

    fn find_in(folders: &[PathBuf]) -> Result<Tools, DemoError> {
        let find = |tool: &'static str| {
            let mut places = folders.iter().map(|folder| folder.join(tool));
            places
                .find(|place| place.is_file())
                .ok_or(DemoError::ToolMissing { tool })
        };
        Ok(Tools {
            mke2fs: find("mke2fs")?,
            e2fsck: find("e2fsck")?,
        })
    }

    /// Makes an ext4 image of the files below `content`.
    fn make(&self, content: &Path, image: &Path, size_bytes: u64) -> Result<(), DemoError> {
        let size_kb = format!("{}k", size_bytes >> 10);
        let output = Command::new(&self.mke2fs)
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"])
            .args(["-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"])
            .args([content, image])
            .arg(&size_kb)
            .output();
        self.succeeded(&self.mke2fs, output).map(|_| ())
    }

    /// Checks the file system that lies in `file` from `offset_bytes` on, changing nothing. Returns the
    /// tool's last line.
    pub fn check(&self, file: &Path, offset_bytes: u64) -> Result<String, DemoError> {
        let mut device = file.as_os_str().to_owned();
        device.push(format!("?offset={offset_bytes}"));
        let output = Command::new(&self.e2fsck).arg("-fn").arg(&device).output();
        let output = self.succeeded(&self.e2fsck, output)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        let last = last.unwrap_or_default();
        // The tool begins with the device's name, which says nothing here.
        let summary = last.rsplit_once(": ").map_or(last, |(_, summary)| summary);
        Ok(summary.to_owned())
    }

    fn succeeded(&self, tool: &Path, output: io::Result<Output>) -> Result<Output, DemoError> {
        let output = output.map_err(|source| DemoError::io("run", tool, source))?;
        if output.status.success() {
            return Ok(output);
        }
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Err(DemoError::ToolFailed {
            tool: tool.to_owned(),
            status: output.status.to_string(),
            output: text.trim().to_owned(),
        })
    }
}

/// An image, ready to be written to a volume.
#[derive(Clone, Debug)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
    /// Its size, a multiple of 4096.
    pub size_bytes: u64,
    /// Bytes of its pieces that are not all zero: what has to be written.
    pub written_bytes: u64,
    /// What it was made of, to be told.
    pub made_of: String,
}

impl Image {
    /// Makes the image in `directory`: of `input` (a file, a folder, or an ext image which is taken as it
    /// is), else of files that are on every machine.
    pub fn prepare(
        tools: &Tools,
        input: Option<&Path>,
        directory: &Path,
    ) -> Result<Image, DemoError> {
        let image = directory.join("image.ext4");
        let content = directory.join("files");
        let made_of = match input {
            Some(input) if is_ext_image(input)? => {
                copy(input, &image)?;
                let size = length(&image)?.next_multiple_of(FILE_SYSTEM_BLOCK_BYTES);
                resize(&image, size)?;
                format!("the file system {} as it is", input.display())
            }
            _ => {
                let mut gathered = Gathered::new(&content)?;
                match input {
                    Some(input) => gathered.take_input(input)?,
                    None => gathered.take_default()?,
                }
                let Gathered { files, bytes, .. } = gathered;
                let size = image_size_bytes(files, bytes);
                resize(&image, size)?;
                tools.make(&content, &image, size)?;
                remove(&content)?;
                format!("{files} files of {}", super::story::size(bytes))
            }
        };
        let size_bytes = length(&image)?;
        let mut image = Image {
            path: image,
            size_bytes,
            written_bytes: 0,
            made_of,
        };
        let mut written_bytes = 0;
        image.pieces(0..size_bytes, |_, piece| {
            written_bytes += piece.len() as u64;
            Ok(())
        })?;
        image.written_bytes = written_bytes;
        Ok(image)
    }

    /// Hands over the pieces of a range that are not all zero, in order, with their offsets.
    pub fn pieces(
        &self,
        range: std::ops::Range<u64>,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), DemoError>,
    ) -> Result<(), DemoError> {
        let file =
            File::open(&self.path).map_err(|error| DemoError::io("open", &self.path, error))?;
        let (mut piece, zeroes) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        let mut offset = range.start;
        while offset < range.end {
            let wanted = (range.end - offset).min(PIECE_BYTES as u64) as usize;
            let bytes = &mut piece[..wanted];
            file.read_exact_at(bytes, offset)
                .map_err(|error| DemoError::io("read", &self.path, error))?;
            if bytes != &zeroes[..wanted] {
                take(offset, bytes)?;
            }
            offset += wanted as u64;
        }
        Ok(())
    }
}

fn image_size_bytes(files: u64, bytes: u64) -> u64 {
    // Content, block maps and a share for directories, inode tables and the journal.
    let needed = bytes + bytes / 16 + files * ENTRY_BYTES + IMAGE_BYTES_SPARE;
    needed
        .max(IMAGE_BYTES_MIN)
        .next_multiple_of(IMAGE_BYTES_MULTIPLE)
}

fn is_ext_image(input: &Path) -> Result<bool, DemoError> {
    let failed = |error| DemoError::io("read", input, error);
    if !input.metadata().map_err(failed)?.is_file() {
        return Ok(false);
    }
    let file = File::open(input).map_err(failed)?;
    let mut magic = [0; 2];
    match file.read_exact_at(&mut magic, EXT_MAGIC_OFFSET) {
        Ok(()) => Ok(magic == EXT_MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

fn length(path: &Path) -> Result<u64, DemoError> {
    let metadata = path.metadata();
    metadata
        .map(|metadata| metadata.len())
        .map_err(|error| DemoError::io("look at", path, error))
}

fn resize(path: &Path, size_bytes: u64) -> Result<(), DemoError> {
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .and_then(|file| file.set_len(size_bytes))
        .map_err(|error| DemoError::io("set the size of", path, error))
}

fn copy(from: &Path, to: &Path) -> Result<u64, DemoError> {
    fs::copy(from, to).map_err(|error| DemoError::io("copy", from, error))
}

fn remove(folder: &Path) -> Result<(), DemoError> {
    fs::remove_dir_all(folder).map_err(|error| DemoError::io("remove", folder, error))
}

/// Files copied into a folder of their own, for mke2fs.
struct Gathered {
    folder: PathBuf,
    files: u64,
    bytes: u64,
}

impl Gathered {
    fn new(folder: &Path) -> Result<Gathered, DemoError> {
        fs::create_dir_all(folder).map_err(|error| DemoError::io("create", folder, error))?;
        Ok(Gathered {
            folder: folder.to_owned(),
            files: 0,
            bytes: 0,
        })
    }

    fn take_input(&mut self, input: &Path) -> Result<(), DemoError> {
        let metadata = input
            .metadata()
            .map_err(|error| DemoError::io("look at", input, error))?;
        if metadata.is_dir() {
            self.take_folder(input, Path::new("input"), u64::MAX, u64::MAX);
            Ok(())
        } else if metadata.is_file() {
            let name = input.file_name().unwrap_or("input".as_ref());
            self.take_file(input, Path::new(name))
        } else {
            let source = io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a file nor a folder",
            );
            Err(DemoError::io("take", input, source))
        }
    }

    /// This program, its sources where they are, and what the system has to read.
    fn take_default(&mut self) -> Result<(), DemoError> {
        let program = std::env::current_exe()
            .map_err(|error| DemoError::io("find", Path::new("this program"), error))?;
        self.take_file(&program, Path::new("bdev-repl"))?;
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folders = ["src", "docs", "python", "tests"].map(|name| sources.join(name));
        let system = ["/usr/share/doc", "/usr/bin", "/usr/lib", "/etc"].map(PathBuf::from);
        for folder in folders.iter().chain(&system) {
            let to = folder.strip_prefix("/").unwrap_or(folder);
            self.take_folder(folder, to, DEFAULT_FILE_BYTES_MAX, DEFAULT_CONTENT_BYTES);
        }
        Ok(())
    }

    /// Regular files below a folder, by name, as long as they can be read and the whole stays below `limit`.
    fn take_folder(&mut self, from: &Path, to: &Path, file_bytes_max: u64, limit: u64) {
        let Ok(entries) = fs::read_dir(from) else {
            return;
        };
        let mut entries: Vec<fs::DirEntry> = entries.flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            // Of the entry itself: links are not followed.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            if metadata.is_dir() {
                self.take_folder(&from, &to, file_bytes_max, limit);
            } else if metadata.is_file()
                && metadata.len() <= file_bytes_max
                && self.bytes.saturating_add(metadata.len()) <= limit
            {
                // What may not be read is left out.
                let _ = self.take_file(&from, &to);
            }
        }
    }

    fn take_file(&mut self, from: &Path, to: &Path) -> Result<(), DemoError> {
        // Opened first, so that nothing is left of what may not be read.
        let mut one = [0; 1];
        File::open(from)
            .and_then(|mut file| file.read(&mut one))
            .map_err(|error| DemoError::io("read", from, error))?;
        let to = self.folder.join(to);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).map_err(|error| DemoError::io("create", folder, error))?;
        }
        let bytes = copy(from, &to)?;
        self.files += 1;
        self.bytes += bytes.next_multiple_of(FILE_SYSTEM_BLOCK_BYTES);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Tools {
        Tools::find().expect("the tests of the demo need e2fsprogs: apt-get install e2fsprogs")
    }

    #[test]
    fn a_missing_tool_is_named_with_the_way_to_get_it() {
        let error = Tools::find_in(&[PathBuf::from("/nonexistent")]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("mke2fs") && text.contains("apt-get install e2fsprogs"));
    }

    #[test]
    fn an_image_of_any_file_passes_the_check_at_any_offset() {
        let directory = tempfile::tempdir().unwrap();
        for size in [0, 5000] {
            let input = directory.path().join("input");
            fs::write(&input, vec![7; size]).unwrap();
            let image = Image::prepare(&tools(), Some(&input), directory.path()).unwrap();
            assert!(image.size_bytes % 4096 == 0 && image.written_bytes < image.size_bytes);
            let bytes = fs::read(&image.path).unwrap();
            let shifted = directory.path().join("shifted");
            fs::write(&shifted, [vec![0; 1 << 20], bytes].concat()).unwrap();
            let summary = tools().check(&shifted, 1 << 20).unwrap();
            assert!(summary.contains("files"), "{summary}");
            // A byte of the superblock's free block count, which the tool counts again.
            let file = File::options().write(true).open(&shifted).unwrap();
            file.write_all_at(&[0xff; 3], (1 << 20) + 1024 + 12)
                .unwrap();
            let error = tools().check(&shifted, 1 << 20).unwrap_err();
            assert!(matches!(error, DemoError::ToolFailed { .. }), "{error}");
            // An image is taken as it is.
            let as_it_is = Image::prepare(&tools(), Some(&image.path.clone()), &{
                let other = directory.path().join("other");
                fs::create_dir_all(&other).unwrap();
                other
            })
            .unwrap();
            assert_eq!(as_it_is.written_bytes, image.written_bytes);
            fs::remove_file(&image.path).unwrap();
        }
    }

    #[test]
    fn pieces_leave_zeroes_out_and_keep_everything_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let mut bytes = vec![0; 3 * PIECE_BYTES + 4096];
        bytes[PIECE_BYTES + 17] = 1;
        bytes[3 * PIECE_BYTES + 4095] = 2;
        fs::write(&path, &bytes).unwrap();
        let image = Image {
            path,
            size_bytes: bytes.len() as u64,
            written_bytes: 0,
            made_of: String::new(),
        };
        let mut seen = Vec::new();
        let all = 0..image.size_bytes;
        image
            .pieces(all, |offset, piece| {
                let offset = offset as usize;
                assert_eq!(piece, &bytes[offset..offset + piece.len()]);
                seen.push((offset, piece.len()));
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, [(PIECE_BYTES, PIECE_BYTES), (3 * PIECE_BYTES, 4096)]);
    }

    #[test]
    fn an_input_that_is_not_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let input = Path::new("/nonexistent/input");
        let error = Image::prepare(&tools(), Some(input), directory.path()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/input"));
    }
}
