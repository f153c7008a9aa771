//! Parsing and formatting of timestamps and durations.

use std::time::{Duration, SystemTime};

use indicatif::HumanDuration;

/// The time between `then_ms` and `now_ms`, in words.
pub fn ago(now_ms: u64, then_ms: u64) -> String {
    HumanDuration(Duration::from_millis(now_ms.saturating_sub(then_ms))).to_string()
}

/// Parses a relative time (`10m`, `1h30m`) or a timestamp (`2026-01-31T12:00:00Z`, or seconds since 1970). Returns nanoseconds since 1970.
pub fn timestamp_ns(text: &str) -> Result<u64, String> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let time = match (seconds, humantime::parse_duration(text)) {
        (Some(since), _) => SystemTime::UNIX_EPOCH.checked_add(since),
        (None, Ok(duration)) => SystemTime::now().checked_sub(duration),
        (None, Err(_)) => humantime::parse_rfc3339_weak(text).ok(),
    };
    let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.and_then(|since| u64::try_from(since.as_nanos()).ok()).ok_or_else(|| {
        format!("{text:?} is not a time: use a relative time such as 10m, or a timestamp such as 2026-01-31T12:00:00Z")
    })
}

/// Parses a duration in seconds or with a unit: `10`, `1.5`, `2m`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .or_else(|| humantime::parse_duration(text).ok())
        .ok_or_else(|| format!("{text:?} is not a duration: use seconds, or a unit such as 500ms or 2m"))
}

/// Formats milliseconds since 1970 as a date and a time for people, as Docker does.
pub fn date(time_ms: u64) -> String {
    let time = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_millis(time_ms)).to_string();
    time.replace('T', " ").replace('Z', " +0000 UTC")
}

/// Formats nanoseconds since 1970 in RFC 3339.
pub fn rfc3339(time_ns: u64) -> String {
    humantime::format_rfc3339_nanos(SystemTime::UNIX_EPOCH + Duration::from_nanos(time_ns)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_is_absolute_or_relative() {
        assert_eq!(timestamp_ns("1970-01-01T00:00:01Z"), Ok(1_000_000_000));
        assert_eq!(timestamp_ns("1.5"), Ok(1_500_000_000));
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        let hour = now - timestamp_ns("1h").unwrap();
        assert!((3_590_000_000_000..=3_600_000_000_000).contains(&hour), "{hour}");
        for text in ["", "yesterday", "1x", "99999999999999999999y"] {
            assert!(timestamp_ns(text).unwrap_err().contains("is not a time"), "{text}");
        }
    }

    #[test]
    fn a_duration_without_a_unit_is_in_seconds() {
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "-1", "NaN", "inf", "x"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_timestamp_survives_a_round_trip() {
        assert_eq!(rfc3339(1_000_000_001), "1970-01-01T00:00:01.000000001Z");
        assert_eq!(date(1_000), "1970-01-01 00:00:01 +0000 UTC");
    }
}
