//! Errors, with a message and an exit code.

use std::fmt::Display;

/// A failure of husk, or an invalid request.
pub const CODE_OWN: u8 = 125;
/// The program cannot be executed.
pub const CODE_NOT_EXECUTABLE: u8 = 126;
/// The program does not exist.
pub const CODE_NOT_FOUND: u8 = 127;

/// Why there is no process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One line: the operation, its object, and the reason.
    pub message: String,
    /// The machine's exit code.
    pub code: u8,
}

impl Failure {
    /// A failure that was not caused by the program.
    pub fn new(message: impl Display) -> Failure {
        Failure { message: message.to_string(), code: CODE_OWN }
    }
}

/// Adds the failed operation to an error.
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
