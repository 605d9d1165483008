//! Log lines to standard error, at a level that can be changed while the target runs.
//! Installed by the command line; changed by the `log_*` methods.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

/// SPDK's names, and the level that each lets through.
pub const LEVELS: [(&str, LevelFilter); 6] = [
    ("DISABLED", LevelFilter::OFF),
    ("ERROR", LevelFilter::ERROR),
    ("WARNING", LevelFilter::WARN),
    ("NOTICE", LevelFilter::INFO),
    ("INFO", LevelFilter::DEBUG),
    ("DEBUG", LevelFilter::TRACE),
];

static HANDLE: OnceLock<reload::Handle<LevelFilter, tracing_subscriber::Registry>> =
    OnceLock::new();

/// Sends log lines to standard error from now on, at level NOTICE. A second call does nothing.
pub fn install() {
    let (filter, handle) = reload::Layer::new(LevelFilter::INFO);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false);
    if tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .is_ok()
    {
        // Only the call that installed the subscriber comes here.
        let _ = HANDLE.set(handle);
    }
}

/// Changes the level; false if there is none of that name.
pub fn set_level(name: &str) -> bool {
    let Some((_, level)) = LEVELS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
    else {
        return false;
    };
    if let Some(handle) = HANDLE.get() {
        // Fails only if the subscriber is gone, and with it the lines.
        let _ = handle.reload(*level);
    }
    true
}

/// Name of the present level.
pub fn level() -> &'static str {
    let current = HANDLE
        .get()
        .and_then(|handle| handle.clone_current())
        .unwrap_or(LevelFilter::OFF);
    LEVELS
        .iter()
        .find(|(_, level)| *level == current)
        .map_or("DISABLED", |(name, _)| name)
}
