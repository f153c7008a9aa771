//! The guest's first process. What it does stands in the library, where it can be tested.

fn main() {
    if std::process::id() != 1 {
        eprintln!("husk-init: this is the first process of a machine, and of nothing else");
        std::process::exit(2);
    }
    husk_init::run()
}
