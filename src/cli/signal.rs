//! Parses signal names.

use crate::guest::signal;

/// Parses a signal's name or number.
pub fn signal(text: &str) -> Result<u8, String> {
    signal::number(text)
        .ok_or_else(|| format!("{text:?} is not a signal: use a name such as TERM, or a number from 1 to 64"))
}
