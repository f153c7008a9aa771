//! From an answer that says "not now" to the time when a registry is asked again.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use ureq::http::{HeaderMap, StatusCode};

use super::Body;

/// So often something is asked for, the first time included.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Nobody waits longer for one answer: a registry that wants that is given up.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Asks until there is an answer that another try would not change, or patience ends; returns the last answer. Each pause is as
/// long as `who` says (RFC 9110 §10.2.3) or twice the one before, and is told in the log.
pub fn patiently(who: &str, mut ask: impl FnMut() -> Result<Body>) -> Result<Body> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        let response = ask()?;
        if !is_passing(response.status()) {
            return Ok(response);
        }
        // Not all that came at once are to come back at once.
        let wanted = after(response.headers()).unwrap_or(pause + pause.mul_f64(fastrand::f64() / 4.0));
        if wanted > LONGEST_PAUSE {
            return Ok(response);
        }
        log::warn!("{who} responded with {}: retrying in {} s", response.status(), wanted.as_secs_f64().ceil());
        std::thread::sleep(wanted);
        pause *= 2;
    }
    ask()
}

fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 500 | 502 | 503 | 504)
}

/// How long the sender of these headers wants to be left alone, by a number of seconds or by a date.
pub fn after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("retry-after")?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_of(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert("retry-after", value.parse().unwrap());
        after(&headers)
    }

    #[test]
    fn a_registry_says_in_seconds_or_by_a_date_when_to_come_again() {
        assert_eq!(after_of("7"), Some(Duration::from_secs(7)));
        assert_eq!(after_of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(after_of(&later).unwrap() > Duration::from_secs(90));
        for odd in ["", "-1", "soon", "99999999999999999999999"] {
            assert_eq!(after_of(odd), None, "{odd}");
        }
        assert_eq!(after(&HeaderMap::new()), None);
    }
}
