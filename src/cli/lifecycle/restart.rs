//! Whether a machine is started again when it has ended.

use std::str::FromStr;

/// The value of `--restart`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RestartPolicy {
    /// How many times a machine is restarted that fails.
    pub max_retries: u32,
    /// Whether it is restarted however it ends, unless it was stopped. Without a daemon, `always` and `unless-stopped` are the
    /// same: what starts machines with the host is the host's service manager (`husk generate systemd`).
    pub always: bool,
}

impl RestartPolicy {
    /// Whether a machine may be started a second time by the same process.
    pub fn may_restart(self) -> bool {
        self.always || self.max_retries > 0
    }

    /// Whether a machine is started again that has ended with `code`, and was restarted that many times before.
    pub fn restarts_after(self, code: u8, restarts: u32) -> bool {
        self.always || code != 0 && restarts < self.max_retries
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    /// Parses `no`, `on-failure`, `on-failure:TIMES`, `always` and `unless-stopped`.
    fn from_str(text: &str) -> Result<RestartPolicy, String> {
        let max_retries = match text.split_once(':') {
            None if matches!(text, "no" | "always" | "unless-stopped") => Some(0),
            None if text == "on-failure" => Some(u32::MAX),
            Some(("on-failure", times)) => times.parse().ok(),
            _ => None,
        };
        let always = matches!(text, "always" | "unless-stopped");
        let policy = max_retries.map(|max_retries| RestartPolicy { max_retries, always });
        policy.ok_or_else(|| {
            "not a restart policy: use no, on-failure, on-failure:MAX_RETRIES, always or unless-stopped".to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_policy_is_parsed() {
        let times = |text: &str| text.parse().map(|policy: RestartPolicy| policy.max_retries);
        assert_eq!((times("no"), times("on-failure"), times("on-failure:3")), (Ok(0), Ok(u32::MAX), Ok(3)));
        for text in ["", "Always", "always:3", "on-failure:", "on-failure:-1", "no:1"] {
            assert!(text.parse::<RestartPolicy>().unwrap_err().contains("on-failure:MAX_RETRIES"), "{text}");
        }
    }

    #[test]
    fn a_machine_is_restarted_as_its_policy_says() {
        let policy = |text: &str| text.parse::<RestartPolicy>().unwrap();
        for (text, code, restarts, again) in [
            ("no", 1, 0, false),
            ("on-failure", 1, 99, true),
            ("on-failure", 0, 0, false),
            ("on-failure:2", 1, 1, true),
            ("on-failure:2", 1, 2, false),
            ("always", 0, 99, true),
            ("unless-stopped", 1, 99, true),
        ] {
            assert_eq!(policy(text).restarts_after(code, restarts), again, "{text} {code} {restarts}");
        }
    }
}
