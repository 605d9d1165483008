//! Which versions of SPDK the host is made for, read from `spdk/version.h`. Called by the build script.

use std::fmt;

/// A release of SPDK: year and month.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub year: u32,
    pub month: u32,
}

pub const OLDEST: Version = Version { year: 25, month: 9 };
pub const NEWEST: Version = Version { year: 26, month: 5 };

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:02}.{:02}", self.year, self.month)
    }
}

/// Takes the text of the header.
pub fn check(header: &str) -> Result<(), String> {
    let (Some(year), Some(month)) = (
        number(header, "SPDK_VERSION_MAJOR"),
        number(header, "SPDK_VERSION_MINOR"),
    ) else {
        return Err(format!(
            "SPDK's version cannot be told: install SPDK {OLDEST} to {NEWEST}"
        ));
    };
    let found = Version { year, month };
    if found < OLDEST {
        return Err(format!(
            "SPDK {found} is too old: install SPDK {OLDEST} to {NEWEST}"
        ));
    }
    if found > NEWEST {
        return Err(format!(
            "SPDK {found} is newer than what this version of bdev_repl knows: install SPDK {OLDEST} to {NEWEST}"
        ));
    }
    Ok(())
}

/// The number that the header defines under a name.
fn number(header: &str, name: &str) -> Option<u32> {
    header.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("#define") && words.next() == Some(name))
            .then(|| words.next()?.parse().ok())
            .flatten()
    })
}
