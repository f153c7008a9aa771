//! Captures the log, for tests of log messages.

use std::sync::{Mutex, Once};

/// The lines logged so far that start with `prefix`.
pub fn logged(prefix: &str) -> Vec<String> {
    Lines::get().0.lock().unwrap().iter().filter(|line| line.starts_with(prefix)).cloned().collect()
}

/// Starts capturing. Idempotent.
pub fn start() {
    Lines::get();
}

/// The captured lines, shared by all tests.
struct Lines(Mutex<Vec<String>>);

impl Lines {
    fn get() -> &'static Lines {
        static LINES: Lines = Lines(Mutex::new(Vec::new()));
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            log::set_logger(&LINES).expect("no other test sets a logger");
            log::set_max_level(log::LevelFilter::Warn);
        });
        &LINES
    }
}

impl log::Log for Lines {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}
