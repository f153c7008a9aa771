//! The guest's first process. The implementation is in the library, where it can be tested.

fn main() {
    if std::process::id() != 1 {
        std::process::exit(husk_init::copy::run(std::env::args_os().skip(1)));
    }
    husk_init::run()
}
