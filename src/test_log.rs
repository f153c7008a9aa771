//! What tests' code has written to the log, for tests of log lines.

use std::sync::{Mutex, Once};

/// Lines written to the log so far that begin with `prefix`.
pub fn logged(prefix: &str) -> Vec<String> {
    Lines::get().0.lock().unwrap().iter().filter(|line| line.starts_with(prefix)).cloned().collect()
}

/// Has what is written from here on kept. Harmless when repeated.
pub fn start() {
    Lines::get();
}

/// A log that can be read, for all tests at once.
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
