//! What goes wrong, as a person is told it and as an exit code.

use std::fmt::Display;

/// husk, or what it was asked for, is at fault.
pub const CODE_OWN: u8 = 125;
/// The program is there and cannot be run.
pub const CODE_NOT_EXECUTABLE: u8 = 126;
/// There is no such program.
pub const CODE_NOT_FOUND: u8 = 127;

/// Why there is no process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One line: what was tried, on what, and why it failed.
    pub message: String,
    /// What the machine ends with.
    pub code: u8,
}

impl Failure {
    /// A failure that is not the program's.
    pub fn new(message: impl Display) -> Failure {
        Failure { message: message.to_string(), code: CODE_OWN }
    }
}

/// Says what was tried.
pub trait Context<T> {
    /// Turns an error into `what: error`.
    fn context(self, what: impl Display) -> Result<T, Failure>;
}

impl<T> Context<T> for Result<T, nix::Error> {
    fn context(self, what: impl Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(format_args!("{what}: {}", error.desc())))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, what: impl Display) -> Result<T, Failure> {
        self.map_err(|error| match error.raw_os_error() {
            Some(number) => Failure::new(format_args!("{what}: {}", nix::Error::from_raw(number).desc())),
            None => Failure::new(format_args!("{what}: {error}")),
        })
    }
}
