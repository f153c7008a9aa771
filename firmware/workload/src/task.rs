//! Tasks by name: prepared, executed between two marker lines, and cleaned up.

use husk_init::errors::Failure;

use crate::command::Place;
use crate::{cpu, disk, memory, process, say};

/// A prepared task, to be executed once. Dropping it cleans up.
pub type Task = Box<dyn FnMut() -> Result<(), Failure>>;

type Prepare = fn(u64, &Place) -> Result<Task, Failure>;

/// All tasks. The amount is the number of operations, or of bytes if throughput is measured.
const TASKS: &[(&str, Prepare)] = &[
    ("cpu-integer", |amount, _| cpu::one(cpu::integer, amount)),
    ("cpu-float", |amount, _| cpu::one(cpu::float, amount)),
    ("cpu-integer-all", |amount, place| cpu::all(cpu::integer, amount, place.cpus)),
    ("cpu-float-all", |amount, place| cpu::all(cpu::float, amount, place.cpus)),
    ("memory-copy", |amount, _| memory::copy(amount)),
    ("page-faults", |amount, _| memory::touch(amount)),
    ("syscall", |amount, _| process::system_calls(amount)),
    ("fork", |amount, _| process::forks(amount)),
    ("exec", |amount, _| process::execs(amount)),
    ("context-switch", |amount, _| process::switches(amount)),
    ("root-read", |amount, place| disk::read_root(amount, &place.root_data)),
    ("root-read-random", |amount, place| disk::read_root_anywhere(amount, &place.root_data)),
    ("root-write", |amount, place| disk::write_root(amount, place.root.as_deref())),
    ("scratch-write", |amount, place| disk::write(amount, &place.scratch)),
    ("scratch-read", |amount, place| disk::read_direct(amount, &place.scratch)),
    ("scratch-write-random", |amount, place| disk::write_anywhere(amount, &place.scratch)),
    ("scratch-read-random", |amount, place| disk::read_anywhere(amount, &place.scratch)),
    ("scratch-fsync", |amount, place| disk::append(amount, &place.scratch)),
];

pub fn is_known(name: &str) -> bool {
    TASKS.iter().any(|(known, _)| *known == name)
}

/// The names, for the help text.
pub fn names() -> String {
    TASKS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Executes all tasks, continuing after failures. Returns the exit code.
pub fn run_all(tasks: &[(String, u64)], place: &Place) -> u8 {
    let mut code = 0;
    for (name, amount) in tasks {
        if let Err(failure) = run(name, *amount, place) {
            say::line(format_args!("fail {name} {}", failure.message));
            code = 1;
        }
    }
    code
}

fn run(name: &str, amount: u64, place: &Place) -> Result<(), Failure> {
    let (_, prepare) = TASKS.iter().find(|(known, _)| *known == name).ok_or_else(|| Failure::new("no such work"))?;
    let mut task = prepare(amount, place)?;
    say::line(format_args!("begin {name}"));
    task()?;
    say::line(format_args!("end {name} {amount}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (name, _) in TASKS {
            assert_eq!(TASKS.iter().filter(|(other, _)| other == name).count(), 1, "{name}");
        }
    }
}
