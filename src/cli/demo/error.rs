//! Why the demo, or a step of an end-to-end test, failed.
//! Made by every part of the demo; printed by its story.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::hosts::embedded::nvme_tcp::blocking;
use crate::rpc::client;

/// What went wrong.
#[derive(Debug, Error)]
pub enum DemoError {
    /// Something that the system must have.
    #[error("the demo needs {tool}, which is not here: apt-get install e2fsprogs")]
    ToolMissing {
        /// Its name.
        tool: &'static str,
    },
    /// A tool ended with an error.
    #[error("{}: {status}\n{output}", tool.display())]
    ToolFailed {
        /// The tool.
        tool: PathBuf,
        /// How it ended.
        status: String,
        /// What it printed.
        output: String,
    },
    /// Files, folders, sockets, processes.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A call to a node failed.
    #[error("node {node}: {source}")]
    Rpc {
        /// The node.
        node: char,
        /// Why.
        source: client::ClientError,
    },
    /// A node answered something unexpected.
    #[error("node {node}: {text}")]
    Answer {
        /// The node.
        node: char,
        /// What.
        text: String,
    },
    /// A node ended by itself, or not as it should.
    #[error("node {node} ended: {status}; the end of its log, {}:\n{end_of_log}", log.display())]
    NodeEnded {
        /// The node.
        node: char,
        /// How.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        end_of_log: String,
    },
    /// Something did not happen in time.
    #[error("waited {waited_s} s in vain until {what}; last seen: {last_seen}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited_s: u64,
        /// What there was instead.
        last_seen: String,
    },
    /// The initiator.
    #[error("NVMe/TCP: {0}")]
    Nvme(#[from] blocking::ClientError),
    /// A backing file that is none.
    #[error("{}: {reason}", path.display())]
    NoReplica {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What must be the same is not.
    #[error("first differing block: {block} (4 KiB each), at byte {byte} of the volume: {text}")]
    Difference {
        /// The block.
        block: u64,
        /// The byte.
        byte: u64,
        /// Between what.
        text: String,
    },
}

impl DemoError {
    /// An operation on a path.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> DemoError {
        DemoError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
