//! The workload of `husk bench` for machines, containers and the bare host: one static program, the same file
//! everywhere.
//!
//! ```text
//! words ─ command ─> do ─ task::prepare ─> begin, the work, end        (cpu, memory, process, disk)
//!                 ├> hello, idle, tick, serve, crash ─> instances without tasks
//!                 └> guest ─> PID 1 of a machine: mounts, network, one of the above as its child, the machine's end
//! ```
//!
//! It measures nothing, because guests' clocks are unreliable. It prints a line when a task starts and when it ends,
//! and the reader measures the time. Tasks are prepared before their start, and cleaned up after their end.

mod command;
mod cpu;
mod crash;
mod disk;
mod guest;
mod life;
mod memory;
mod process;
mod say;
mod serve;
mod sys;
mod task;

use command::Command;

/// Executes the command line (see `--help`). Returns the exit code: 0, 1 if a task failed, 2 for a usage error.
pub fn run(words: &[String]) -> u8 {
    match Command::parse(words) {
        Ok(Command::Help) => {
            print!("{}", command::HELP);
            0
        }
        Ok(Command::Nothing) => 0,
        Ok(Command::Do { tasks, place }) => task::run_all(&tasks, &place),
        Ok(Command::Hello { code }) => life::hello(code),
        Ok(Command::Idle { touch_mib }) => life::idle(touch_mib),
        Ok(Command::Tick { interval_ms }) => life::tick(interval_ms),
        Ok(Command::Serve { port }) => serve::run(port),
        Ok(Command::CrashMemory { at_most_mib }) => crash::memory(at_most_mib),
        Ok(Command::CrashKernel) => crash::kernel(),
        Ok(Command::Guest(guest)) => guest::run(&guest),
        Err(why) => {
            eprintln!("husk-workload: {why}");
            2
        }
    }
}
