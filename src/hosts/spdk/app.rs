//! `bdev-repl tgt --host spdk`: an SPDK application with the subsystems, modules and flags of spdk_tgt. Called by the
//! command line. The bdev module registers itself, here as in any other application.

use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_void};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::ptr;
use std::sync::OnceLock;

use super::sys;

/// What SPDK calls the program in its usage and in messages about flags.
const PROGRAM: &CStr = c"bdev-repl tgt --host spdk";
/// The name of the application, for traces too.
const NAME: &CStr = c"bdev-repl";

/// The directory of vhost and vfio-user sockets, where SPDK was configured with them.
const WITH_SOCKETS: bool = cfg!(any(spdk_with_vhost, spdk_with_vfio_user));
/// The flags that spdk_tgt has besides those of all applications.
const FLAGS: &CStr = if WITH_SOCKETS { c"f:S:" } else { c"f:" };

/// SPDK's parser takes no context.
static PID_FILE: OnceLock<PathBuf> = OnceLock::new();

#[cfg(spdk_with_vhost)]
unsafe extern "C" {
    fn spdk_vhost_set_socket_path(folder: *const c_char) -> c_int;
}

#[cfg(spdk_with_vfio_user)]
unsafe extern "C" {
    fn spdk_vfu_set_socket_path(folder: *const c_char) -> c_int;
}

/// Runs the application until it is told to stop. `arguments` are for SPDK's parser. The exit code is SPDK's.
pub fn run(arguments: &[OsString]) -> ExitCode {
    let mut owned = vec![PROGRAM.to_owned()];
    for argument in arguments {
        // The system hands over no argument with a zero in it.
        let Ok(argument) = CString::new(argument.as_bytes()) else {
            eprintln!("bdev-repl tgt: an argument with a zero byte: leave it out");
            return ExitCode::from(2);
        };
        owned.push(argument);
    }
    let Ok(count) = c_int::try_from(owned.len()) else {
        eprintln!("bdev-repl tgt: too many arguments: put them into a file and give it with -c");
        return ExitCode::from(2);
    };
    let mut pointers: Vec<*mut c_char> = owned
        .iter()
        .map(|argument| argument.as_ptr().cast_mut())
        .collect();
    pointers.push(ptr::null_mut());

    let mut options = sys::app_opts();
    options.name = NAME.as_ptr();
    // SAFETY: the arguments live until the application has ended (SPDK keeps pointers to them), and are closed by null.
    let parsed = unsafe {
        sys::spdk_app_parse_args(
            count,
            pointers.as_mut_ptr(),
            &mut options,
            FLAGS.as_ptr(),
            ptr::null(),
            Some(parse_flag),
            Some(print_usage),
        )
    };
    if parsed != sys::SPDK_APP_PARSE_ARGS_SUCCESS {
        return exit_code(parsed);
    }
    // SAFETY: this is the main thread, and SPDK is started once.
    let status = unsafe {
        let status = sys::spdk_app_start(&mut options, Some(started), ptr::null_mut());
        sys::spdk_app_fini();
        status
    };
    drop(pointers);
    drop(owned);
    exit_code(status)
}

fn exit_code(status: impl TryInto<u8>) -> ExitCode {
    ExitCode::from(status.try_into().unwrap_or(1))
}

/// Called by SPDK's parser for each flag of [`FLAGS`].
unsafe extern "C" fn parse_flag(flag: c_int, value: *mut c_char) -> c_int {
    if value.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: one of the arguments.
    let text = unsafe { CStr::from_ptr(value) };
    match u8::try_from(flag) {
        Ok(b'f') => {
            let path = PathBuf::from(OsStr::from_bytes(text.to_bytes()));
            if PID_FILE.set(path).is_err() {
                eprintln!("bdev-repl tgt: -f is there twice: give one file");
                return -libc::EINVAL;
            }
            0
        }
        #[cfg(any(spdk_with_vhost, spdk_with_vfio_user))]
        Ok(b'S') => {
            // SAFETY: SPDK copies the text.
            unsafe { set_socket_folder(value) }
            0
        }
        _ => -libc::EINVAL,
    }
}

/// # Safety
///
/// `folder` is a text.
#[cfg(any(spdk_with_vhost, spdk_with_vfio_user))]
unsafe fn set_socket_folder(folder: *const c_char) {
    // SAFETY: as the caller promises.
    #[cfg(spdk_with_vhost)]
    unsafe {
        spdk_vhost_set_socket_path(folder);
    }
    // SAFETY: as the caller promises.
    #[cfg(spdk_with_vfio_user)]
    unsafe {
        spdk_vfu_set_socket_path(folder);
    }
}

/// Called by SPDK at the end of its own usage, which it prints with C's buffered output: so is this.
unsafe extern "C" fn print_usage() {
    // SAFETY: texts without a format.
    unsafe {
        libc::puts(c" -f <file>                 write the process id to this file".as_ptr());
        if WITH_SOCKETS {
            libc::puts(
                c" -S <path>                 directory of vhost and vfio-user sockets".as_ptr(),
            );
        }
    }
}

/// Called on the first thread when all subsystems run.
unsafe extern "C" fn started(_context: *mut c_void) {
    let Some(path) = PID_FILE.get() else { return };
    if let Err(error) = fs::write(path, format!("{}\n", process::id())) {
        eprintln!(
            "bdev-repl tgt: the process id cannot be written to {}: {error}",
            path.display()
        );
        // SAFETY: the application runs.
        unsafe { sys::spdk_app_stop(1) }
    }
}
