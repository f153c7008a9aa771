//! The guest's first process. What it does stands in the library, where it can be tested.

fn main() {
    if std::process::id() != 1 {
        std::process::exit(husk_init::copy::run(std::env::args_os().skip(1)));
    }
    husk_init::run()
}
