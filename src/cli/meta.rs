//! `bdev-repl meta`: creates, dumps and checks metadata offline.
