//! Signal names, as used by `kill`, users and images.

/// The named signals of x86-64, in numerical order.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
/// The highest signal number. Numbers start at 1.
const LAST: u8 = 64;

/// The number of a signal: `TERM`, `SIGTERM`, `term`, `15`, `RTMIN+3`.
pub fn number(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse::<u8>() {
        return Some(number).filter(|number| (1..=LAST).contains(number));
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(place) = NAMES.iter().position(|known| *known == name) {
        return u8::try_from(place + 1).ok();
    }
    // glibc reserves 32 and 33.
    const RT_MIN: u8 = 34;
    let relative = name.strip_prefix("RTMIN").map(|offset| (RT_MIN, offset));
    let (base, offset) = relative.or_else(|| name.strip_prefix("RTMAX").map(|offset| (LAST, offset)))?;
    let offset: i8 = if offset.is_empty() { 0 } else { offset.parse().ok()? };
    base.checked_add_signed(offset).filter(|number| (RT_MIN..=LAST).contains(number))
}

/// The signals with which users and shells ask a process to terminate.
pub const TERMINATION: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Whether the signal is one of [`TERMINATION`].
pub fn is_termination(number: i32) -> bool {
    TERMINATION.contains(&number)
}

/// Signals whose default action terminates a process, except faults, resource limits and SIGKILL. They are forwarded to
/// the process that husk stands in for. The first real-time signal is used by husk to kick vCPUs.
pub fn that_end_a_process() -> Vec<i32> {
    let named = [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
        libc::SIGSTKFLT,
    ];
    named.into_iter().chain(libc::SIGRTMIN() + 1..=libc::SIGRTMAX()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_end_a_process_are_forwarded_but_for_its_faults() {
        let forwarded = that_end_a_process();
        let is_forwarded = |name: &str| forwarded.contains(&number(name).unwrap().into());
        for name in ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR", "40", "64"] {
            assert!(is_forwarded(name), "{name}");
        }
        for name in ["KILL", "STOP", "TSTP", "CHLD", "SEGV", "ILL", "PIPE", "ABRT", "XCPU", "SYS"] {
            assert!(!is_forwarded(name), "{name}");
        }
    }

    #[test]
    fn a_signal_has_many_names() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(number(text), Some(15), "{text}");
        }
        assert_eq!((number("KILL"), number("SYS"), number("64"), number("1")), (Some(9), Some(31), Some(64), Some(1)));
        // As systemd uses.
        assert_eq!((number("SIGRTMIN+3"), number("RTMIN"), number("RTMAX-1")), (Some(37), Some(34), Some(63)));
        for text in ["", "SIG", "0", "65", "-1", "FOO", "RTMIN+99", "RTMIN-1", "RTMAX+1"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
