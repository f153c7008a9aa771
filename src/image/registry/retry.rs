//! Retries requests to busy registries.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use ureq::http::{HeaderMap, StatusCode};

use super::Body;

/// The maximum number of attempts, including the first.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The maximum delay: a registry that requests more is an error.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Sends a request until the response is final or the attempts are exhausted; returns the last response. Each delay is
/// that requested by `server` (RFC 9110 §10.2.3) or twice the previous one, and is logged.
pub fn with_backoff(server: &str, mut ask: impl FnMut() -> Result<Body>) -> Result<Body> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..ATTEMPTS {
        let response = ask()?;
        if !is_passing(response.status()) {
            return Ok(response);
        }
        // Jitter, so that simultaneous clients do not retry simultaneously.
        let wanted = after(response.headers()).unwrap_or(pause + pause.mul_f64(fastrand::f64() / 4.0));
        if wanted > LONGEST_PAUSE {
            return Ok(response);
        }
        log::warn!("{server} responded with {}: retrying in {} s", response.status(), wanted.as_secs_f64().ceil());
        std::thread::sleep(wanted);
        pause *= 2;
    }
    ask()
}

fn is_passing(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 500 | 502 | 503 | 504)
}

/// The delay requested in these headers, as seconds or a date.
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
    fn retry_after_is_seconds_or_a_date() {
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
