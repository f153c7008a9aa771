//! The command: hand the arguments to the library, exit with its code.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
