//! The guest's first process. The implementation is in the library, where it can be tested.

fn main() {
    if std::process::id() != 1 {
        let mut words = std::env::args_os().skip(1).peekable();
        if words.peek().is_some_and(|word| word == husk_protocol::LIST_PROCESSES) {
            std::process::exit(husk_init::processes::list());
        }
        std::process::exit(husk_init::copy::run(words));
    }
    husk_init::run()
}
