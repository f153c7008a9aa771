//! From bytes done to a bar on a person's terminal: none where standard error is no terminal, or work is over at once.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::foreign;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What takes less is over before a person would look.
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

    /// A bar for `total_bytes` of work.
    pub(super) fn bar(&self, what: impl Into<Cow<'static, str>>, total_bytes: u64) -> Bar {
        self.shaped(what, Some(total_bytes), "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    }

    /// A count of bytes for work whose end is not known.
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

/// A bar; it goes when it is dropped.
pub struct Bar {
    bar: ProgressBar,
    shown: bool,
    started: Instant,
}

impl Bar {
    /// So much is done.
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
