//! Log lines of this crate, in SPDK's log: errors, warnings and notices as such, the rest under the flag `bdev_repl`
//! (`log_set_flag`). Registered by the constructor.

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString};
use std::fmt::Write;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::sys;

/// SPDK's flag, which it links into its list.
struct Flag(UnsafeCell<sys::spdk_log_flag>);

// SAFETY: SPDK sets `enabled`, a byte that is only read here.
unsafe impl Sync for Flag {}

static FLAG: Flag = Flag(UnsafeCell::new(
    // SAFETY: a flag that is off and in no list.
    unsafe { std::mem::zeroed() },
));

/// Makes the flag known, and has what this crate says go to SPDK's log.
pub fn register() {
    // SAFETY: called once, before anything of SPDK runs; the flag lives for ever.
    unsafe {
        (*FLAG.0.get()).name = NAME.as_ptr();
        sys::spdk_log_register_flag(NAME.as_ptr(), FLAG.0.get());
    }
    // A program that has a subscriber of its own keeps it.
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(ToSpdk));
}

fn flag_is_set() -> bool {
    // SAFETY: as above.
    unsafe { (*FLAG.0.get()).enabled }
}

const NAME: &CStr = c"bdev_repl";

struct ToSpdk;

impl<S: Subscriber> Layer<S> for ToSpdk {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if !metadata.target().starts_with("bdev_repl") {
            return;
        }
        let level = match *metadata.level() {
            Level::ERROR => sys::SPDK_LOG_ERROR,
            Level::WARN => sys::SPDK_LOG_WARN,
            Level::INFO => sys::SPDK_LOG_NOTICE,
            Level::DEBUG if flag_is_set() => sys::SPDK_LOG_INFO,
            _ if flag_is_set() => sys::SPDK_LOG_DEBUG,
            _ => return,
        };
        let mut line = Line(String::new());
        event.record(&mut line);
        let text = CString::new(line.0.replace('\0', " ")).unwrap_or_default();
        let file = CString::new(metadata.file().unwrap_or_default()).unwrap_or_default();
        let function = CString::new(metadata.target()).unwrap_or_default();
        // SAFETY: the format takes one text; all of them live during the call.
        unsafe {
            sys::spdk_log(
                level,
                file.as_ptr(),
                metadata.line().unwrap_or_default() as i32,
                function.as_ptr(),
                c"%s\n".as_ptr(),
                text.as_ptr(),
            );
        }
    }
}

/// The message, then fields as name=value.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            write!(self.0, "{}={value:?}", field.name())
        };
    }
}
