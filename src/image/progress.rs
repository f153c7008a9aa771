//! Progress bars on standard error, if it is a terminal and the operation takes long enough.

use std::borrow::Cow;
use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::foreign;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};

/// Shorter operations show no progress.
const SHOWN_AFTER: Duration = Duration::from_millis(200);
/// The interval between the steps that are reported to another process.
const REPORT_INTERVAL: Duration = Duration::from_millis(50);

/// The longest name of an operation of another process.
const NAME_BYTES_MAX: usize = 40;

/// A step of an operation that another process shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// It begins, with its name and total size in bytes.
    Begin(String, u64),
    /// So many bytes are done.
    Done(u64),
    /// It has ended.
    End,
}

/// Whether and where progress is shown.
#[derive(Debug, Clone, Copy)]
pub enum Progress {
    /// Nowhere.
    Hidden,
    /// On standard error.
    Terminal,
    /// By another process, to which this function reports.
    Reported(fn(Step)),
}

impl Progress {
    /// Shown if standard error is a terminal.
    pub fn on_terminal() -> Progress {
        if std::io::stderr().is_terminal() { Progress::Terminal } else { Progress::Hidden }
    }

    /// The same for another process, which reports to this one.
    pub(super) fn reported(self, report: fn(Step)) -> Progress {
        if let Progress::Hidden = self { self } else { Progress::Reported(report) }
    }

    /// A bar for an operation of `total_bytes`.
    pub fn bar(self, what: impl Into<Cow<'static, str>>, total_bytes: u64) -> Bar {
        if let Progress::Reported(report) = self {
            report(Step::Begin(what.into().into_owned(), total_bytes));
            return Bar::Reported { report, last: Cell::new(Instant::now()) };
        }
        self.shaped(what, Some(total_bytes), "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
    }

    /// A byte counter for an operation of unknown size.
    pub fn count(self, what: impl Into<Cow<'static, str>>) -> Bar {
        self.shaped(what, None, "{msg} {spinner} {bytes} {bytes_per_sec}")
    }

    fn shaped(self, what: impl Into<Cow<'static, str>>, total_bytes: Option<u64>, template: &str) -> Bar {
        let bar = ProgressBar::with_draw_target(total_bytes, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(foreign::line(&what.into()).into_owned());
        Bar::Own { bar, is_shown: matches!(self, Progress::Terminal), started: Instant::now() }
    }
}

/// Shows the steps that another process reports.
pub(super) struct Follower {
    progress: Progress,
    bar: Option<Bar>,
}

impl Follower {
    /// Shows them where `progress` is shown.
    pub fn new(progress: Progress) -> Follower {
        Follower { progress, bar: None }
    }

    /// Shows a step.
    pub fn show(&mut self, step: Step) {
        match step {
            Step::Begin(what, total_bytes) => {
                let what = foreign::start_of(&what, NAME_BYTES_MAX).to_owned();
                self.bar = Some(self.progress.bar(what, total_bytes));
            }
            Step::Done(bytes) => self.bar.iter().for_each(|bar| bar.set(bytes)),
            Step::End => self.bar = None,
        }
    }
}

/// A progress bar, removed when dropped.
pub enum Bar {
    /// Shown by this process.
    Own {
        /// The bar.
        bar: ProgressBar,
        /// Whether it is shown at all.
        is_shown: bool,
        /// When the operation began.
        started: Instant,
    },
    /// Shown by another process.
    Reported {
        /// Reports to it.
        report: fn(Step),
        /// The time of the last report.
        last: Cell<Instant>,
    },
}

impl Bar {
    /// Sets the progress.
    pub fn set(&self, done_bytes: u64) {
        match self {
            Bar::Own { bar, is_shown, started } => {
                if *is_shown && bar.is_hidden() && started.elapsed() > SHOWN_AFTER {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                }
                bar.set_position(done_bytes);
            }
            Bar::Reported { report, last } => {
                if last.get().elapsed() > REPORT_INTERVAL {
                    report(Step::Done(done_bytes));
                    last.set(Instant::now());
                }
            }
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        match self {
            Bar::Own { bar, .. } => bar.finish_and_clear(),
            Bar::Reported { report, .. } => report(Step::End),
        }
    }
}
