//! The system call filter of a guest's process: a profile of names, as the OCI runtime specification (config-linux.md, "Seccomp")
//! and Docker's files have it, becomes the program that the guest's init installs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::CallFilter;
use libc::{
    BPF_JEQ, BPF_JGE, BPF_JGT, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_KILL_THREAD,
    SECCOMP_RET_LOG, SECCOMP_RET_TRACE, SECCOMP_RET_TRAP, sock_filter,
};
use serde::Deserialize;
use syscalls::{x86, x86_64};

use super::capability;
use crate::sandbox::bpf::{
    ARCH, ARCH_I386, ARCH_X86_64, ARGUMENTS, NUMBER, and, jump, load, ranges, search, skip, stop,
};

/// The longest program that the kernel takes (linux/bpf_common.h).
const BPF_MAXINSNS: usize = 4096;
const TOO_LONG: &str = "seccomp: the profile is too long for a filter of the kernel";
/// The arguments of a call.
const ARGUMENTS_MAX: u32 = 6;
/// The number bit of the x32 ABI.
const X32_BIT: u32 = 0x4000_0000;
/// The flags of seccomp(2) that a profile may have, by their names. Threads of a process that does not exist yet need none.
const FLAGS: [(&str, u64); 3] = [
    ("SECCOMP_FILTER_FLAG_LOG", libc::SECCOMP_FILTER_FLAG_LOG),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
    ("SECCOMP_FILTER_FLAG_TSYNC", 0),
];

/// The architecture of husk's guests, in Docker's words and in libseccomp's.
const GUEST: [&str; 2] = ["amd64", "SCMP_ARCH_X86_64"];

/// A profile: `linux.seccomp` of the runtime specification, with what Docker's files have in addition.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    default_action: Action,
    default_errno_ret: Option<u16>,
    architectures: Option<Vec<String>>,
    arch_map: Option<Vec<Family>>,
    flags: Option<Vec<String>>,
    #[serde(default)]
    listener_path: String,
    syscalls: Option<Vec<Rule>>,
}

/// Architectures whose programs a kernel runs.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Family {
    architecture: String,
    sub_architectures: Option<Vec<String>>,
}

/// What becomes of calls by these names, if the arguments are these.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    names: Option<Vec<String>>,
    /// The only name, in older files.
    name: Option<String>,
    action: Action,
    errno_ret: Option<u16>,
    args: Option<Vec<Condition>>,
    /// When the rule is one of the profile.
    includes: Option<When>,
    /// When it is not.
    excludes: Option<When>,
}

/// Conditions on a container. One on the kernel's version holds: husk's kernels are newer than any that profiles name.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct When {
    caps: Option<Vec<String>>,
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Action {
    #[serde(rename = "SCMP_ACT_KILL", alias = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
}

/// A comparison of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: Operator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Operator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

/// What becomes of a call: the first action whose conditions all hold.
type Verdict = Vec<(Vec<Condition>, u32)>;

impl Profile {
    /// Parses a profile. Fails with a message for the user.
    pub fn parse(json: &[u8]) -> Result<Profile> {
        serde_json::from_slice(json).context("seccomp: this is not a profile")
    }

    /// Compiles the profile for a process that may get `capabilities`, a bit for each. Names that are of no system call are ignored, since profiles name those of all architectures and
    /// versions. Fails if the profile needs what a machine does not have.
    pub fn compile(&self, capabilities: u64) -> Result<CallFilter> {
        ensure!(
            self.listener_path.is_empty(),
            "seccomp: listenerPath: a process of the host cannot answer for a system call in a machine"
        );
        let mut flags = 0;
        for flag in self.flags.iter().flatten() {
            let known = FLAGS.iter().find(|(name, _)| name == flag);
            flags |= known.with_context(|| format!("seccomp: the flag {flag} is not supported"))?.1;
        }
        let mut rules = Vec::new();
        for rule in self.syscalls.iter().flatten() {
            if rule.applies(capabilities)? {
                rules.push(rule);
            }
        }
        let native = self.search(&rules, |name| name.parse::<x86_64::Sysno>().ok().map(|call| call.id() as u32))?;
        let mut program = vec![load(ARCH)];
        if self.has_32_bits() {
            let other = self.search(&rules, |name| name.parse::<x86::Sysno>().ok().map(|call| call.id() as u32))?;
            program.extend([jump(BPF_JEQ, ARCH_I386, 0, 1), skip(native.len() + 3), jump(BPF_JEQ, ARCH_X86_64, 1, 0)]);
            program.extend([stop(SECCOMP_RET_KILL_THREAD), load(NUMBER)]);
            program.extend(native);
            program.push(load(NUMBER));
            program.extend(other);
        } else {
            program.extend([jump(BPF_JEQ, ARCH_X86_64, 1, 0), stop(SECCOMP_RET_KILL_THREAD), load(NUMBER)]);
            program.extend(native);
        }
        ensure!(program.len() <= BPF_MAXINSNS, TOO_LONG);
        Ok(CallFilter { flags, program: program.iter().flat_map(bytes).collect() })
    }

    /// Whether the calls of programs for 32 bits are decided on in the same way. Otherwise they are killed.
    fn has_32_bits(&self) -> bool {
        let own = |family: &&Family| GUEST.contains(&family.architecture.as_str());
        let mapped =
            self.arch_map.iter().flatten().filter(own).flat_map(|family| family.sub_architectures.iter().flatten());
        self.architectures.iter().flatten().chain(mapped).any(|name| name == "SCMP_ARCH_X86")
    }

    /// The part of the program for the architecture whose calls have these numbers.
    fn search(&self, rules: &[&Rule], number: impl Fn(&str) -> Option<u32>) -> Result<Vec<sock_filter>> {
        let default = action(self.default_action, self.default_errno_ret)?;
        let mut calls: BTreeMap<u32, Verdict> = BTreeMap::new();
        let (mut newest, mut count) = (None, 0);
        for rule in rules {
            let names = rule.names.iter().flatten().chain(&rule.name);
            let numbers: Vec<u32> = names.filter_map(|name| number(name)).collect();
            newest = numbers.iter().copied().max().max(newest);
            let verdict = action(rule.action, rule.errno_ret)?;
            // As runc does, since it adds nothing.
            if verdict == default {
                continue;
            }
            let sets = alternatives(rule)?;
            // Each becomes an instruction at least.
            count += sets.len() * numbers.len();
            ensure!(count <= BPF_MAXINSNS, TOO_LONG);
            for number in numbers {
                calls.entry(number).or_default().extend(sets.iter().map(|set| (set.clone(), verdict)));
            }
        }
        for verdict in calls.values_mut() {
            // What always holds would hide the rest.
            verdict.sort_by_key(|(conditions, _)| conditions.is_empty());
            verdict.push((Vec::new(), default));
            let end = verdict.iter().position(|(conditions, _)| conditions.is_empty()).unwrap_or_default();
            verdict.truncate(end + 1);
        }
        let mut found = ranges(calls, vec![(Vec::new(), default)]);
        // Programs try what is newer than the profile, and do without it if the kernel seems not to have it (runc does so, too).
        if let Some(newest) = newest.filter(|_| self.default_action == Action::Errno) {
            let unknown = vec![(Vec::new(), SECCOMP_RET_ERRNO | libc::ENOSYS as u32)];
            found.retain(|(from, _)| *from <= newest);
            found.extend([(newest + 1, unknown), (X32_BIT, vec![(Vec::new(), default)])]);
        }
        Ok(search(&found, &|verdict| {
            verdict.iter().flat_map(|(conditions, action)| check(conditions, *action)).collect()
        }))
    }
}

impl Rule {
    /// Whether the rule is for a process with these capabilities.
    fn applies(&self, capabilities: u64) -> Result<bool> {
        let has =
            |name: &String| capability::mask(name).map(|mask| capabilities & mask == mask).map_err(anyhow::Error::msg);
        let is_guest = |name: &String| GUEST.contains(&name.as_str());
        if let Some(When { caps, arches, min_kernel }) = &self.excludes {
            let held = caps.iter().flatten().map(has).collect::<Result<Vec<_>>>()?;
            if arches.iter().flatten().any(is_guest) || held.contains(&true) || min_kernel.is_some() {
                return Ok(false);
            }
        }
        let Some(When { caps, arches, .. }) = &self.includes else { return Ok(true) };
        let held = caps.iter().flatten().map(has).collect::<Result<Vec<_>>>()?;
        let is_ours = arches.as_ref().is_none_or(|arches| arches.is_empty() || arches.iter().any(is_guest));
        Ok(is_ours && !held.contains(&false))
    }
}

/// The sets of conditions of which one has to hold: as runc has it, conditions on the same argument are alternatives.
fn alternatives(rule: &Rule) -> Result<Vec<Vec<Condition>>> {
    let conditions = rule.args.as_deref().unwrap_or_default();
    for condition in conditions {
        ensure!(condition.index < ARGUMENTS_MAX, "seccomp: {} is no index of an argument", condition.index);
    }
    let repeats = |condition: &Condition| conditions.iter().filter(|other| other.index == condition.index).count() > 1;
    Ok(match conditions.iter().any(repeats) {
        true => conditions.iter().map(|condition| vec![*condition]).collect(),
        false => vec![conditions.to_vec()],
    })
}

/// The action in the kernel's words.
fn action(action: Action, errno: Option<u16>) -> Result<u32> {
    let data = u32::from(errno.unwrap_or(libc::EPERM as u16));
    Ok(match action {
        Action::KillThread => SECCOMP_RET_KILL_THREAD,
        Action::KillProcess => SECCOMP_RET_KILL_PROCESS,
        Action::Trap => SECCOMP_RET_TRAP,
        Action::Errno => SECCOMP_RET_ERRNO | data,
        Action::Trace => SECCOMP_RET_TRACE | data,
        Action::Allow => SECCOMP_RET_ALLOW,
        Action::Log => SECCOMP_RET_LOG,
        Action::Notify => {
            bail!("seccomp: SCMP_ACT_NOTIFY: a process of the host cannot answer for a system call in a machine")
        }
    })
}

/// Ends the program with `action` if all conditions hold, and otherwise continues behind.
fn check(conditions: &[Condition], action: u32) -> Vec<sock_filter> {
    let mut rest = vec![stop(action)];
    for condition in conditions.iter().rev() {
        rest = [compare(condition, rest.len()), rest].concat();
    }
    rest
}

/// Continues if the condition holds, and otherwise skips `over` instructions behind these.
fn compare(condition: &Condition, over: usize) -> Vec<sock_filter> {
    let Condition { index, value, value_two, op } = *condition;
    // Little-endian: the lower half comes first.
    let (low, high) = (load(ARGUMENTS + 8 * index), load(ARGUMENTS + 8 * index + 4));
    let halves = |value: u64| (value as u32, (value >> 32) as u32);
    let (value_low, value_high) = halves(value);
    // Six conditions of at most six instructions each, and an end.
    let over = over as u8;
    let above = |comparison| {
        vec![high, jump(BPF_JGT, value_high, 3, 0), jump(BPF_JEQ, value_high, 0, over + 2), low]
            .into_iter()
            .chain([jump(comparison, value_low, 0, over)])
            .collect()
    };
    let below = |comparison| {
        vec![high, jump(BPF_JGT, value_high, over + 3, 0), jump(BPF_JEQ, value_high, 0, 2), low]
            .into_iter()
            .chain([jump(comparison, value_low, over, 0)])
            .collect()
    };
    match op {
        Operator::Equal => {
            vec![high, jump(BPF_JEQ, value_high, 0, over + 2), low, jump(BPF_JEQ, value_low, 0, over)]
        }
        Operator::NotEqual => vec![high, jump(BPF_JEQ, value_high, 0, 2), low, jump(BPF_JEQ, value_low, over, 0)],
        Operator::Greater => above(BPF_JGT),
        Operator::GreaterOrEqual => above(BPF_JGE),
        Operator::Less => below(BPF_JGE),
        Operator::LessOrEqual => below(BPF_JGT),
        // The value is the mask.
        Operator::MaskedEqual => {
            let (wanted_low, wanted_high) = halves(value_two);
            let upper = [high, and(value_high), jump(BPF_JEQ, wanted_high, 0, over + 3)];
            let lower = [low, and(value_low), jump(BPF_JEQ, wanted_low, 0, over)];
            [upper, lower].concat()
        }
    }
}

fn bytes(instruction: &sock_filter) -> [u8; 8] {
    let sock_filter { code, jt, jf, k } = *instruction;
    let ([c0, c1], [k0, k1, k2, k3]) = (code.to_le_bytes(), k.to_le_bytes());
    [c0, c1, jt, jf, k0, k1, k2, k3]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::bpf::tests::run;

    fn compile(json: serde_json::Value) -> Vec<sock_filter> {
        instructions(&serde_json::from_value::<Profile>(json).unwrap().compile(u64::MAX).unwrap())
    }

    fn instructions(filter: &CallFilter) -> Vec<sock_filter> {
        let instruction = |bytes: &[u8]| {
            let [c0, c1, jt, jf, k0, k1, k2, k3] = *bytes else { panic!("{bytes:?}") };
            let (code, k) = (u16::from_le_bytes([c0, c1]), u32::from_le_bytes([k0, k1, k2, k3]));
            sock_filter { code, jt, jf, k }
        };
        filter.program.chunks(8).map(instruction).collect()
    }

    fn rule(names: &[&str], action: &str, args: serde_json::Value) -> serde_json::Value {
        serde_json::json!({ "names": names, "action": action, "args": args })
    }

    fn decide(program: &[sock_filter], call: i64, arguments: [u64; 6]) -> u32 {
        run(program, ARCH_X86_64, call as u32, arguments).0
    }

    const REFUSED: u32 = SECCOMP_RET_ERRNO | libc::EPERM as u32;

    #[test]
    fn a_profile_allows_what_it_names() {
        let profile = |architectures: &[&str]| {
            compile(serde_json::json!({
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures,
                "syscalls": [
                    rule(&["read", "write", "no_call_of_this_name", "clone"], "SCMP_ACT_ALLOW", serde_json::json!(null)),
                    { "names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
                ],
            }))
        };
        for program in [profile(&[]), profile(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])] {
            for (call, verdict) in [
                (libc::SYS_read, SECCOMP_RET_ALLOW),
                (libc::SYS_clone, SECCOMP_RET_ALLOW),
                (libc::SYS_open, REFUSED),
                (libc::SYS_mount, SECCOMP_RET_ERRNO | 38),
                // Newer than all that the profile names.
                (libc::SYS_openat2, SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
                (0x4000_0000, REFUSED),
            ] {
                assert_eq!(decide(&program, call, [0; 6]), verdict, "{call}");
            }
        }
        // Call 3 is read(2) there, and 1 is exit(2).
        let both = profile(&["SCMP_ARCH_X86"]);
        assert_eq!(
            (run(&both, ARCH_I386, 3, [0; 6]).0, run(&both, ARCH_I386, 1, [0; 6]).0),
            (SECCOMP_RET_ALLOW, REFUSED)
        );
        assert_eq!(run(&profile(&[]), ARCH_I386, 3, [0; 6]).0, SECCOMP_RET_KILL_THREAD);
    }

    #[test]
    fn arguments_are_compared_as_numbers_of_64_bits() {
        const VALUE: u64 = 0x5_0000_0010;
        let near = [0, 0x10, VALUE - 1, VALUE, VALUE + 1, VALUE ^ 1 << 33, VALUE + (1 << 32), u64::MAX];
        let masked = |value: u64| value & 0xf_0000_00ff == VALUE;
        let operators: [(&str, &dyn Fn(u64) -> bool); 7] = [
            ("SCMP_CMP_EQ", &|value| value == VALUE),
            ("SCMP_CMP_NE", &|value| value != VALUE),
            ("SCMP_CMP_LT", &|value| value < VALUE),
            ("SCMP_CMP_LE", &|value| value <= VALUE),
            ("SCMP_CMP_GT", &|value| value > VALUE),
            ("SCMP_CMP_GE", &|value| value >= VALUE),
            ("SCMP_CMP_MASKED_EQ", &masked),
        ];
        for (op, holds) in operators {
            let (value, two) = if op.contains("MASKED") { (0xf_0000_00ff, VALUE) } else { (VALUE, 0) };
            let args = serde_json::json!([{ "index": 2, "value": value, "valueTwo": two, "op": op },
                { "index": 5, "value": 7, "op": "SCMP_CMP_EQ" }]);
            let program = compile(serde_json::json!({ "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [rule(&["ioctl", "exit_group"], "SCMP_ACT_ALLOW", args)] }));
            for value in near {
                let arguments = |last| [0, 0, value, 0, 0, last];
                let expected = if holds(value) { SECCOMP_RET_ALLOW } else { REFUSED };
                assert_eq!(decide(&program, libc::SYS_ioctl, arguments(7)), expected, "{op} {value:#x}");
                assert_eq!(decide(&program, libc::SYS_ioctl, arguments(8)), REFUSED, "{op} {value:#x}");
            }
        }
    }

    #[test]
    fn conditions_on_one_argument_are_alternatives_and_an_unconditional_rule_comes_last() {
        let one = |value: u64| serde_json::json!({ "index": 0, "value": value, "op": "SCMP_CMP_EQ" });
        let program = compile(serde_json::json!({ "defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [
            rule(&["personality"], "SCMP_ACT_LOG", serde_json::json!([])),
            rule(&["personality", "socket"], "SCMP_ACT_ALLOW", serde_json::json!([one(0), one(8)])),
        ] }));
        let of = |call, first| decide(&program, call, [first, 0, 0, 0, 0, 0]);
        assert_eq!(
            [0, 8, 1].map(|first| of(libc::SYS_personality, first)),
            [SECCOMP_RET_ALLOW, SECCOMP_RET_ALLOW, SECCOMP_RET_LOG]
        );
        assert_eq!([8, 1].map(|first| of(libc::SYS_socket, first)), [SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS]);
    }

    #[test]
    fn rules_of_dockers_files_depend_on_capabilities() {
        let profile = serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
            "archMap": [{ "architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"] }],
            "syscalls": [
                { "name": "read", "action": "SCMP_ACT_ALLOW", "args": null, "includes": { "minKernel": "4.8" }, "excludes": {} },
                { "names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": { "caps": ["CAP_SYS_ADMIN"] } },
                { "names": ["mount"], "action": "SCMP_ACT_LOG", "excludes": { "caps": ["CAP_SYS_ADMIN"] } },
                { "names": ["open"], "action": "SCMP_ACT_ALLOW", "includes": { "arches": ["arm", "arm64"] } },
                { "names": ["openat"], "action": "SCMP_ACT_ALLOW", "includes": { "arches": ["amd64"] } },
            ],
        });
        let profile = Profile::parse(profile.to_string().as_bytes()).unwrap();
        for (capabilities, mounting) in [(u64::MAX, SECCOMP_RET_ALLOW), (0, SECCOMP_RET_LOG)] {
            let program = instructions(&profile.compile(capabilities).unwrap());
            let decide = |call| decide(&program, call, [0; 6]);
            assert_eq!((decide(libc::SYS_read), decide(libc::SYS_mount)), (SECCOMP_RET_ALLOW, mounting));
            assert_eq!((decide(libc::SYS_open), decide(libc::SYS_openat)), (REFUSED, SECCOMP_RET_ALLOW));
            assert_eq!(run(&program, ARCH_I386, 3, [0; 6]).0, SECCOMP_RET_ALLOW);
        }
        assert!(Profile::parse(b"{}").is_err());
    }

    #[test]
    fn what_a_machine_does_not_have_is_refused_by_name() {
        let refusal =
            |json| format!("{:#}", serde_json::from_value::<Profile>(json).unwrap().compile(u64::MAX).unwrap_err());
        let notify = serde_json::json!({ "defaultAction": "SCMP_ACT_NOTIFY" });
        assert!(refusal(notify).contains("SCMP_ACT_NOTIFY"));
        let listener = serde_json::json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent" });
        assert!(refusal(listener).contains("listenerPath"));
        let flag = serde_json::json!({ "defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW"] });
        assert!(refusal(flag).contains("SECCOMP_FILTER_FLAG_NEW"));
        let index = serde_json::json!([{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }]);
        let index = serde_json::json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule(&["read"], "SCMP_ACT_LOG", index)] });
        assert!(refusal(index).contains('6'));
        let many: Vec<_> =
            (0..1000_u64).map(|value| serde_json::json!({ "index": 0, "value": value, "op": "SCMP_CMP_EQ" })).collect();
        let long = serde_json::json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule(&["read", "write"], "SCMP_ACT_ALLOW", many.into())] });
        assert!(refusal(long).contains("too long"));
    }
}
