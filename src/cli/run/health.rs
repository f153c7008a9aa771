//! Flags of `husk run` for health checks.

use std::time::Duration;

use clap::Args;

use crate::cli::time;
use crate::config::HealthCheck;

// They override those of the image.
#[derive(Debug, Default, Args)]
pub(in crate::cli) struct HealthFlags {
    /// Command that checks the health of the machine, for its shell; the status is in `husk ps`
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,

    /// Time between checks [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = time::duration)]
    health_interval: Option<Duration>,

    /// Time after which a check has failed [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = time::duration)]
    health_timeout: Option<Duration>,

    /// Number of failures in a row after which the machine is unhealthy [default: 3]
    #[arg(long, value_name = "N")]
    health_retries: Option<u32>,

    /// Time after the start in which failures do not count [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = time::duration)]
    health_start_period: Option<Duration>,

    /// Time between checks in the start period [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = time::duration)]
    health_start_interval: Option<Duration>,

    /// Disable the health check of the image
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(conflicts_with = "health_cmd")]
    no_healthcheck: Option<bool>,
}

impl HealthFlags {
    /// The check of a machine from an image with the check `image`.
    pub fn check(&self, image: Option<&HealthCheck>) -> Option<HealthCheck> {
        let is_off = self.no_healthcheck == Some(true) || self.health_cmd.as_deref() == Some("none");
        let mut check = image.filter(|_| !is_off).cloned().unwrap_or_default();
        match self.health_cmd.as_deref() {
            _ if is_off => {}
            Some(command) => check.command = words(command),
            None => {}
        }
        let set = |value: &mut u64, flag: Option<Duration>| {
            if let Some(time) = flag.filter(|time| !time.is_zero()) {
                *value = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
            }
        };
        set(&mut check.interval_ms, self.health_interval);
        set(&mut check.timeout_ms, self.health_timeout);
        set(&mut check.start_period_ms, self.health_start_period);
        set(&mut check.start_interval_ms, self.health_start_interval);
        check.retries = self.health_retries.filter(|retries| *retries > 0).unwrap_or(check.retries);
        (!check.command.is_empty()).then_some(check)
    }
}

/// The command of `--health-cmd`: a line for the shell or, as in podman, a list in JSON.
fn words(command: &str) -> Vec<String> {
    match serde_json::from_str::<Vec<String>>(command) {
        Ok(list) => HealthCheck::command_of(&list).unwrap_or(list),
        Err(_) => HealthCheck::shell(command),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        health: HealthFlags,
    }

    fn check(words: &[&str], image: Option<&HealthCheck>) -> Option<HealthCheck> {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.health.check(image)).unwrap()
    }

    #[test]
    fn flags_override_the_check_of_the_image() {
        let command = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        let image = HealthCheck { command: command(&["probe"]), interval_ms: 7, retries: 9, ..HealthCheck::default() };
        assert_eq!((check(&[], None), check(&[], Some(&image))), (None, Some(image.clone())));
        assert_eq!(check(&["--health-interval=1s", "--health-retries=0"], Some(&image)).unwrap().interval_ms, 1000);
        let own = check(&["--health-cmd", "a b", "--health-timeout=500ms"], Some(&image)).unwrap();
        assert_eq!((own.command, own.timeout_ms, own.retries), (command(&["/bin/sh", "-c", "a b"]), 500, 9));
        let listed = check(&["--health-cmd", r#"["CMD", "a", "b c"]"#], None).unwrap();
        assert_eq!((listed.command, listed.interval_ms), (command(&["a", "b c"]), 30_000));
        for off in [&["--no-healthcheck"][..], &["--health-cmd=none"], &["--no-healthcheck", "--health-retries=2"]] {
            assert_eq!(check(off, Some(&image)), None, "{off:?}");
        }
    }
}
