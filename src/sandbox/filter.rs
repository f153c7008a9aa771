//! System call filters (seccomp(2)) of a monitor process, one for each kind of thread. A call that is not in the table of
//! the thread's role ends the process; a handler for SIGSYS reports which.

use std::collections::BTreeMap;
use std::process;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::ThreadRole;
use super::tables::{self, Argument};
use crate::sys::violation;

/// The filters, compiled once each. Unset in a process without filters.
static FILTERS: OnceLock<Filters> = OnceLock::new();

#[derive(Default)]
struct Filters {
    allows_rings: bool,
    programs: [OnceLock<BpfProgram>; 5],
}

/// Enables the filters of this process. A violation is reported to `report` (see [`violation::install`]). Called once,
/// before other threads exist.
///
/// Without `allows_rings` no thread may use io_uring, whose operations no filter sees.
pub fn enable(report: std::os::fd::RawFd, allows_rings: bool) -> std::io::Result<()> {
    violation::install(report)?;
    let _ = FILTERS.set(Filters { allows_rings, ..Filters::default() });
    Ok(())
}

/// Installs the filter for `role` on this thread, if filters are enabled. A thread that cannot be confined must not run:
/// the process ends.
pub fn confine_this_thread(role: ThreadRole) {
    let Some(filters) = FILTERS.get() else { return };
    let program =
        filters.programs.get(role as usize).map(|program| program.get_or_init(|| compile(role, filters.allows_rings)));
    let installed = program.map(|program| seccompiler::apply_filter(program));
    if !matches!(installed, Some(Ok(()))) {
        log::error!("the system call filter of a thread cannot be installed: {installed:?}");
        process::abort();
    }
}

/// Compiles the filter for `role`. The tables are constant, so it cannot fail (a test compiles all of them).
fn compile(role: ThreadRole, allows_rings: bool) -> BpfProgram {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let calls = || tables::calls(role).filter(|call| allows_rings || !tables::RINGS.contains(&call.number));
    for call in calls() {
        let rule = |argument| SeccompRule::new(vec![condition(argument)?]).ok();
        rules.entry(call.number).or_default().extend(call.arguments.iter().filter_map(rule));
    }
    // A call without rules is allowed with any arguments.
    for call in calls().filter(|call| call.arguments.is_empty()) {
        rules.insert(call.number, Vec::new());
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64);
    filter.and_then(BpfProgram::try_from).unwrap_or_default()
}

fn condition(argument: &Argument) -> Option<SeccompCondition> {
    let (index, width, operator, value) = match *argument {
        Argument::Is(index, value) => (index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value),
        Argument::Lacks(index, bits) => (index, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bits), 0),
        Argument::IsThisProcess(index) => (index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(process::id())),
    };
    SeccompCondition::new(index, width, operator, value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_compiles_and_is_no_longer_than_firecrackers() {
        let roles =
            [(ThreadRole::Main, 50), (ThreadRole::Loader, 50), (ThreadRole::Vcpu, 31), (ThreadRole::Worker, 50)];
        for (role, calls_max) in roles.into_iter().chain([(ThreadRole::Console, 27)]) {
            assert!(!compile(role, true).is_empty() && !compile(role, false).is_empty(), "{role:?}");
            let mut numbers: Vec<i64> = tables::calls(role).map(|call| call.number).collect();
            numbers.sort_unstable();
            numbers.dedup();
            assert!(numbers.len() <= calls_max, "{role:?}: {}", numbers.len());
        }
    }
}
