//! System call filters (seccomp(2)) of a monitor process, one for each kind of thread. A call that is not in the table of
//! the thread's role ends the process; a handler for SIGSYS reports which.
//!
//! The kernel compiles a filter once for each thread of a machine (see [`super::bpf`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::process;
use std::sync::OnceLock;

use libc::{
    BPF_JEQ, BPF_JSET, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_TRAP, sock_filter,
};

use super::ThreadRole;
use super::bpf::{ARCH, ARCH_X86_64, ARGUMENTS, NUMBER, and, jump, load, ranges, search, stop};
use super::tables::{self, Argument};
use crate::sys::{seccomp, violation};

/// The filters, compiled once each. Unset in a process without filters.
static FILTERS: OnceLock<Filters> = OnceLock::new();

struct Filters {
    fail: fn(&str) -> !,
    programs: [OnceLock<Vec<sock_filter>>; 8],
}

/// Enables the filters of this process. A violation is reported to `report` (see [`violation::install`]). A thread that cannot
/// be confined calls `fail` with the reason. Called once, before other threads exist.
pub fn enable(report: RawFd, fail: fn(&str) -> !) -> io::Result<()> {
    violation::install(report)?;
    let _ = FILTERS.set(Filters { fail, programs: Default::default() });
    Ok(())
}

/// Installs the filter for `role` on this thread, if filters are enabled. A thread that cannot be confined must not run:
/// the process ends.
pub fn confine_this_thread(role: ThreadRole) {
    let Some(filters) = FILTERS.get() else { return };
    let Some(program) = filters.programs.get(role as usize) else {
        (filters.fail)("a thread has no system call filter")
    };
    let program = program.get_or_init(|| compile(role));
    if let Err(error) = seccomp::install(program) {
        (filters.fail)(&format!("confine a thread: {error}"));
    }
}

/// What becomes of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// It is a violation.
    Denied,
    /// It is allowed.
    Allowed,
    /// It is allowed if all conditions of one of these sets hold.
    If(Vec<Vec<Argument>>),
    /// It fails as on a kernel that does not have it (ENOSYS).
    Unsupported,
}

/// Compiles the filter for `role`.
fn compile(role: ThreadRole) -> Vec<sock_filter> {
    let unsupported = tables::unsupported(role).iter().map(|number| (*number as u32, Verdict::Unsupported));
    let mut calls: BTreeMap<u32, Verdict> = unsupported.collect();
    for call in tables::calls(role) {
        match calls.entry(call.number as u32).or_insert_with(|| Verdict::If(Vec::new())) {
            Verdict::If(sets) if call.needs_all => sets.push(call.arguments.to_vec()),
            Verdict::If(sets) if !call.arguments.is_empty() => sets.extend(call.arguments.iter().map(|one| vec![*one])),
            verdict => *verdict = Verdict::Allowed,
        }
    }
    let start = [
        load(ARCH),
        jump(BPF_JEQ, ARCH_X86_64, 1, 0),
        stop(SECCOMP_RET_KILL_PROCESS),
        // Numbers of the x32 ABI are larger than any in the tables.
        load(NUMBER),
    ];
    [start.to_vec(), search(&ranges(calls, Verdict::Denied), &decide)].concat()
}

/// Ends the filter with the verdict on a call.
fn decide(verdict: &Verdict) -> Vec<sock_filter> {
    let conditions = match verdict {
        Verdict::Denied => return vec![stop(SECCOMP_RET_TRAP)],
        Verdict::Allowed => return vec![stop(SECCOMP_RET_ALLOW)],
        Verdict::Unsupported => return vec![stop(SECCOMP_RET_ERRNO | libc::ENOSYS as u32)],
        Verdict::If(conditions) => conditions,
    };
    match one_of(conditions) {
        Some((index, values)) => {
            let over = |before: usize| (values.len() - before) as u8;
            let tests = values.iter().enumerate().map(|(before, value)| jump(BPF_JEQ, *value, over(before), 0));
            let ends = [stop(SECCOMP_RET_TRAP), stop(SECCOMP_RET_ALLOW)];
            [argument(index)].into_iter().chain(tests).chain(ends).collect()
        }
        None => conditions.iter().flat_map(|set| check_all(set)).chain([stop(SECCOMP_RET_TRAP)]).collect(),
    }
}

/// The values of an argument, by its index, if the conditions only say that it has one of a few.
fn one_of(conditions: &[Vec<Argument>]) -> Option<(u8, Vec<u32>)> {
    let value = |set: &Vec<Argument>| match **set {
        [Argument::Is(index, value)] => Some((index, value)),
        _ => None,
    };
    let values: Vec<(u8, u32)> = conditions.iter().map(value).collect::<Option<_>>()?;
    let (index, _) = *values.first()?;
    let is_short = values.len() <= usize::from(u8::MAX) && values.iter().all(|(other, _)| *other == index);
    is_short.then(|| (index, values.into_iter().map(|(_, value)| value).collect()))
}

/// Allows the call if all conditions hold, and otherwise continues behind.
fn check_all(conditions: &[Argument]) -> Vec<sock_filter> {
    let mut rest = vec![stop(SECCOMP_RET_ALLOW)];
    for condition in conditions.iter().rev() {
        // A jump over what follows. A set has few conditions.
        let over = rest.len() as u8;
        let (index, test) = match *condition {
            Argument::Is(index, value) => (index, vec![jump(BPF_JEQ, value, 0, over)]),
            Argument::Lacks(index, bits) => (index, vec![jump(BPF_JSET, bits, over, 0)]),
            Argument::Has(index, bit) => (index, vec![jump(BPF_JSET, bit, 0, over)]),
            Argument::IsBut(index, mask, value) => (index, vec![and(!mask), jump(BPF_JEQ, value, 0, over)]),
            Argument::IsThisProcess(index) => (index, vec![jump(BPF_JEQ, process::id(), 0, over)]),
        };
        rest = [vec![argument(index)], test, rest].concat();
    }
    rest
}

/// Loads the lower half of an argument, which is all that the kernel uses of those in the tables.
fn argument(index: u8) -> sock_filter {
    load(ARGUMENTS + 8 * u32::from(index))
}

#[cfg(test)]
mod tests {
    use super::super::bpf::tests::run;
    use super::super::tables::Call;
    use super::*;

    const ROLES: [(ThreadRole, usize); 8] = [
        // With the limits that Firecracker's tables keep to.
        (ThreadRole::Main, 50),
        (ThreadRole::Loader, 50),
        (ThreadRole::Vcpu, 31),
        (ThreadRole::Worker, 50),
        (ThreadRole::Console, 27),
        (ThreadRole::Unpacker, 50),
        (ThreadRole::Downloader, 60),
        (ThreadRole::Share, 70),
    ];

    /// An argument that meets a condition, by its index.
    fn meeting(condition: &Argument) -> (u8, u32) {
        match *condition {
            Argument::Is(index, value) => (index, value),
            Argument::Lacks(index, bits) => (index, !bits),
            Argument::Has(index, bit) => (index, bit),
            Argument::IsBut(index, mask, value) => (index, value | mask),
            Argument::IsThisProcess(index) => (index, process::id()),
        }
    }

    #[test]
    fn a_filter_allows_what_its_table_has_and_nothing_else() {
        for (role, calls_max) in ROLES {
            let program = compile(role);
            let calls: Vec<_> = tables::calls(role).collect();
            let mut allowed = 0;
            for number in (0..1000).chain(0x4000_0000..0x4000_0200) {
                let of_number = || calls.iter().copied().filter(|call| call.number == i64::from(number));
                let any = of_number().any(|call| call.arguments.is_empty());
                // No condition holds for these arguments, except that bits are set.
                let has_bits = |call: &Call| matches!(call.arguments, [Argument::Has(..)]);
                let none = if of_number().any(has_bits) { [0; 6] } else { [u64::MAX; 6] };
                let (action, steps) = run(&program, ARCH_X86_64, number, none);
                assert_eq!(action == SECCOMP_RET_ALLOW, any, "{role:?}: {number}");
                assert!(steps < 100, "{role:?}: {number} takes {steps}");
                for call in of_number().filter(|call| !call.arguments.is_empty()) {
                    let sets: Vec<&[Argument]> =
                        if call.needs_all { vec![call.arguments] } else { call.arguments.chunks(1).collect() };
                    for set in sets {
                        let mut met = [u64::MAX; 6];
                        for (index, value) in set.iter().map(meeting) {
                            met[usize::from(index)] = value.into();
                        }
                        let action = |arguments| run(&program, ARCH_X86_64, number, arguments).0;
                        assert_eq!(action(met), SECCOMP_RET_ALLOW, "{role:?}: {number}");
                        for (index, _) in set.iter().map(meeting).filter(|_| call.needs_all) {
                            let mut broken = met;
                            broken[usize::from(index)] = 0xffff_ff00;
                            assert_eq!(action(broken), SECCOMP_RET_TRAP, "{role:?}: {number}");
                        }
                    }
                }
                allowed += usize::from(of_number().count() > 0);
            }
            assert!(allowed <= calls_max, "{role:?}: {allowed}");
            assert_eq!(run(&program, 3, libc::SYS_read as u32, [0; 6]).0, SECCOMP_RET_KILL_PROCESS);
        }
    }
}
