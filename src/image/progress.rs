//! Progress bars on standard error, if it is a terminal and the operation takes long enough.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::foreign;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shorter operations show no progress.
const SHOWN_AFTER: Duration = Duration::from_millis(200);

/// Whether and where progress is shown.
#[derive(Debug, Clone)]
pub struct Progress {
    shown: bool,
}

impl Progress {
    /// Shown if standard error is a terminal.
    pub fn on_terminal() -> Progress {
        Progress { shown: std::io::stderr().is_terminal() }
    }

    /// Not shown.
    pub fn hidden() -> Progress {
        Progress { shown: false }
    }

    /// A bar for an operation of `total_bytes`.
    pub(super) fn bar(&self, what: impl Into<Cow<'static, str>>, total_bytes: u64) -> Bar {
        self.shaped(what, Some(total_bytes), "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    }

    /// A byte counter for an operation of unknown size.
    pub fn count(&self, what: impl Into<Cow<'static, str>>) -> Bar {
        self.shaped(what, None, "{msg} {spinner} {bytes} {bytes_per_sec}")
    }

    fn shaped(&self, what: impl Into<Cow<'static, str>>, total_bytes: Option<u64>, template: &str) -> Bar {
        let bar = ProgressBar::with_draw_target(total_bytes, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(foreign::line(&what.into()).into_owned());
        Bar { bar, shown: self.shown, started: Instant::now() }
    }
}

/// A progress bar, removed when dropped.
pub struct Bar {
    bar: ProgressBar,
    shown: bool,
    started: Instant,
}

impl Bar {
    /// Sets the progress.
    pub fn set(&self, done_bytes: u64) {
        if self.shown && self.bar.is_hidden() && self.started.elapsed() > SHOWN_AFTER {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.set_position(done_bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
