//! Signals by their names, as `kill`, images and users have them.

/// Those that have a name on x86-64, in the order of their numbers.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
/// The last of the signals, which are numbered from 1.
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
    // 32 and 33 are the C library's own.
    const RT_MIN: u8 = 34;
    let relative = name.strip_prefix("RTMIN").map(|offset| (RT_MIN, offset));
    let (base, offset) = relative.or_else(|| name.strip_prefix("RTMAX").map(|offset| (LAST, offset)))?;
    let offset: i8 = if offset.is_empty() { 0 } else { offset.parse().ok()? };
    base.checked_add_signed(offset).filter(|number| (RT_MIN..=LAST).contains(number))
}

/// Whether it asks a process for its end, as people and shells do.
pub fn asks_for_end(number: i32) -> bool {
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT].contains(&number)
}

/// Those that end a process which does not care for them, but for faults, limits and what no process can have: by these a
/// process that husk stands for is spoken to. The first real-time signal is husk's own: it kicks vCPUs.
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
    fn a_signal_has_many_names() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(number(text), Some(15), "{text}");
        }
        assert_eq!((number("KILL"), number("SYS"), number("64"), number("1")), (Some(9), Some(31), Some(64), Some(1)));
        // systemd's own.
        assert_eq!((number("SIGRTMIN+3"), number("RTMIN"), number("RTMAX-1")), (Some(37), Some(34), Some(63)));
        for text in ["", "SIG", "0", "65", "-1", "FOO", "RTMIN+99", "RTMIN-1", "RTMAX+1"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
