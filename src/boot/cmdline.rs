//! Validates and writes the kernel's command line.

use anyhow::{Result, ensure};

use crate::layout;
use crate::memory::GuestMemory;

/// Validates `cmdline`: printable ASCII that fits into `max_bytes` with its final NUL.
pub fn check(cmdline: &str, max_bytes: usize) -> Result<()> {
    let longest = max_bytes.saturating_sub(1);
    ensure!(
        cmdline.len() <= longest,
        "the kernel command line of {} bytes is too long: the kernel accepts {longest}",
        cmdline.len()
    );
    if let Some(bad) = cmdline.chars().find(|c| !(c.is_ascii_graphic() || *c == ' ')) {
        anyhow::bail!("the kernel command line contains {bad:?}: only printable ASCII characters are allowed");
    }
    Ok(())
}

/// Writes `cmdline` with its final NUL.
pub fn write(memory: &GuestMemory, cmdline: &str) -> Result<()> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    super::write(memory, layout::CMDLINE_ADDRESS, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maximum_length_is_the_kernels() {
        check(&"a".repeat(2047), layout::CMDLINE_MAX_BYTES).unwrap();
        let error = check(&"a".repeat(2048), layout::CMDLINE_MAX_BYTES).unwrap_err().to_string();
        assert_eq!(error, "the kernel command line of 2048 bytes is too long: the kernel accepts 2047");
    }

    #[test]
    fn unsupported_characters_and_lengths_are_rejected() {
        for bad in ["a\nb", "a\0b", "a\tb", "naïve"] {
            assert!(check(bad, 2048).unwrap_err().to_string().contains("printable ASCII"), "{bad:?}");
        }
    }
}
