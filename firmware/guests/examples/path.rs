//! Prints where a tiny guest is, for scripts: `cargo run -p husk-guests --example path -- exit`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let guest = std::env::args().nth(1).and_then(|name| husk_guests::path(&name));
    match guest {
        Some(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("type the name of a guest: exit, power, io, ...");
            ExitCode::FAILURE
        }
    }
}
