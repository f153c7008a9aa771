//! Parses sizes in Docker's syntax (`512M`, `1.5g`, `2GiB`).

const MIB: u64 = 1 << 20;

/// Parses a memory size, in MiB, rounded up.
///
/// The units are Docker's: `b`, `k`, `m`, `g`, `t` in either case, optionally followed by `b` or `ib`, all of them
/// powers of 1024; a plain number is bytes. A plain number below one MiB was most likely meant as MiB: it is rejected,
/// and the error shows how to write that.
pub fn memory_mib(text: &str) -> Result<u64, String> {
    let size_bytes = size_bytes(text)?;
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    if plain && (1..MIB).contains(&size_bytes) {
        return Err(format!("a plain number is bytes: use {text}M for {text} MiB"));
    }
    Ok(size_bytes.div_ceil(MIB))
}

/// Parses a size with Docker's suffixes, in bytes.
pub fn bytes(text: &str) -> Result<u64, String> {
    size_bytes(text)
}

/// Formats a memory size: in GiB if that is a whole number.
pub fn mib(memory_mib: u64) -> String {
    if memory_mib.is_multiple_of(1 << 10) { format!("{}G", memory_mib >> 10) } else { format!("{memory_mib}M") }
}

fn size_bytes(text: &str) -> Result<u64, String> {
    let malformed = || "not a size: use a number and a unit, such as 512M, 1.5G or 2GiB".to_owned();
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_len);
    let unit_bytes = unit_bytes(suffix.trim_start()).ok_or_else(malformed)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if !is_digits(whole) || !is_digits(fraction) {
        return Err(malformed());
    }
    let too_large = || "the size is too large".to_owned();
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let whole_bytes = whole.checked_mul(unit_bytes).ok_or_else(too_large)?;
    whole_bytes.checked_add(fraction_bytes(fraction, unit_bytes)).ok_or_else(too_large)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The value of `0.fraction` units, rounded down to a byte. Twelve digits are sufficient to distinguish every byte of a
/// TiB.
fn fraction_bytes(fraction: &str, unit_bytes: u64) -> u64 {
    let (sum, scale) = fraction
        .bytes()
        .take(13)
        .fold((0u128, 1u128), |(sum, scale), digit| (sum * 10 + u128::from(digit - b'0'), scale * 10));
    (sum * u128::from(unit_bytes) / scale) as u64
}

fn unit_bytes(suffix: &str) -> Option<u64> {
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    Some(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_suffixes_are_powers_of_1024() {
        for (text, mib) in [
            ("512M", 512),
            ("512m", 512),
            ("512MB", 512),
            ("512MiB", 512),
            ("512 mib", 512),
            ("2g", 2048),
            ("1.5G", 1536),
            ("0.25g", 256),
            ("2097152k", 2048),
            ("1T", 1 << 20),
            ("0.000000000001T", 1),
            ("536870912", 512),
            ("536870912b", 512),
            ("0", 0),
        ] {
            assert_eq!(memory_mib(text), Ok(mib), "{text}");
        }
    }

    #[test]
    fn sizes_are_rounded_up_to_a_mib() {
        assert_eq!(memory_mib("33554433"), Ok(33));
        assert_eq!(memory_mib("32769k"), Ok(33));
    }

    #[test]
    fn an_invalid_size_is_rejected() {
        for text in
            ["", "M", "-1", "-1M", "512X", "512MM", "1.2.3G", ".5G", "5.G", "1e3", "0x10", "５G", "G5", "1,5G", " 5G"]
        {
            assert!(memory_mib(text).is_err(), "{text:?}");
        }
        for text in ["18446744073709551616", "99999999999999999999T", "16777216T"] {
            assert_eq!(memory_mib(text), Err("the size is too large".into()), "{text}");
        }
    }

    #[test]
    fn a_small_number_without_a_unit_is_rejected() {
        let error = memory_mib("512").unwrap_err();
        assert!(error.contains("512M"), "{error}");
    }
}
