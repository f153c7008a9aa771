//! Parses `--cpus 1.5` into vCPUs and a limit of host CPU time.

/// The CPUs of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus {
    /// The number of vCPUs, rounded up.
    pub vcpus: u32,
    /// The limit of their CPU time together in thousandths of a CPU, if it is lower.
    pub limit_millicpus: Option<u32>,
}

/// Parses a number of CPUs with up to three decimals.
pub fn cpus(text: &str) -> Result<Cpus, String> {
    parse(text).ok_or_else(|| format!("{text:?} is not a number of CPUs: use 0.01 to 32, such as 2 or 1.5"))
}

fn parse(text: &str) -> Option<Cpus> {
    const DIGITS: usize = 3;
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > DIGITS {
        return None;
    }
    let whole: u32 = whole.parse().ok()?;
    let part_millis: u32 = format!("{part:0<DIGITS$}").parse().ok()?;
    if part_millis == 0 {
        return Some(Cpus { vcpus: whole, limit_millicpus: None });
    }
    let limit = whole.checked_mul(1000)?.checked_add(part_millis)?;
    Some(Cpus { vcpus: whole.checked_add(1)?, limit_millicpus: Some(limit) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_of_cpus_is_a_limit_on_whole_ones() {
        let cpus = |vcpus, limit_millicpus| Ok(Cpus { vcpus, limit_millicpus });
        assert_eq!(super::cpus("2"), cpus(2, None));
        assert_eq!(super::cpus("2.0"), cpus(2, None));
        assert_eq!(super::cpus("1.5"), cpus(2, Some(1500)));
        assert_eq!(super::cpus("0.5"), cpus(1, Some(500)));
        assert_eq!(super::cpus("0.05"), cpus(1, Some(50)));
        assert_eq!(super::cpus("31.125"), cpus(32, Some(31125)));
        // The range is validated later.
        assert_eq!(super::cpus("0"), cpus(0, None));
    }

    #[test]
    fn an_invalid_number_of_cpus_is_rejected() {
        for text in
            ["", ".", ".5", "1.", "-1", "+1", "1.5.0", "1,5", "1e3", "two", "1.0005", "4294967296", "4294967295.5"]
        {
            assert!(cpus(text).unwrap_err().contains("use 0.01 to 32"), "{text}");
        }
    }
}
