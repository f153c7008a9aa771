//! The guest's first process. The implementation is in the library, where it can be tested.

use husk_init::{cgroup, copy, processes};
use husk_protocol::{LIST_PROCESSES, READ_CGROUP, WRITE_CGROUP};

fn main() {
    if std::process::id() == 1 {
        husk_init::run();
    }
    let mut words = std::env::args_os().skip(1).peekable();
    let word = words.peek().and_then(|word| word.to_str()).unwrap_or_default().to_owned();
    std::process::exit(match word.as_str() {
        LIST_PROCESSES => processes::list(words.nth(1).and_then(|id| id.into_string().ok())),
        READ_CGROUP => cgroup::print(words.skip(1)),
        WRITE_CGROUP => cgroup::change(words.skip(1)),
        _ => copy::run(words),
    })
}
