//! Programs that decide on system calls by their numbers (seccomp(2)), and the instructions that they consist of.
//!
//! A program finds the number of a call by binary search among ranges of numbers. When it is installed, the kernel compiles it
//! and runs it for each of some 450 numbers: it must be short, and its paths as well.

use std::collections::BTreeMap;

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

/// AUDIT_ARCH_X86_64 (linux/audit.h).
pub const ARCH_X86_64: u32 = 0xc000_003e;
/// AUDIT_ARCH_I386.
pub const ARCH_I386: u32 = 0x4000_0003;
/// The offset of a call's number in `struct seccomp_data` (linux/seccomp.h).
pub const NUMBER: u32 = 0;
/// That of its architecture.
pub const ARCH: u32 = 4;
/// That of its arguments, of 8 bytes each.
pub const ARGUMENTS: u32 = 16;

/// The verdicts on all numbers: each holds from its number on, up to that of the next one. Numbers without one get `default`.
pub fn ranges<V: Clone + PartialEq>(calls: BTreeMap<u32, V>, default: V) -> Vec<(u32, V)> {
    let mut ranges = vec![(0, default.clone())];
    let mut push = |from: u32, verdict: V| match ranges.last_mut() {
        Some((last, replaced)) if *last == from => *replaced = verdict,
        Some((_, before)) if *before == verdict => {}
        _ => ranges.push((from, verdict)),
    };
    for (number, verdict) in calls {
        push(number, verdict);
        push(number + 1, default.clone());
    }
    // What was replaced may have left neighbors with the same verdict.
    ranges.dedup_by(|next, before| next.1 == before.1);
    ranges
}

/// Finds the range of the number that was loaded, of `ranges` as [`ranges`] returns them, and goes on with what `decide` makes of
/// its verdict, which ends the program.
pub fn search<V>(ranges: &[(u32, V)], decide: &dyn Fn(&V) -> Vec<sock_filter>) -> Vec<sock_filter> {
    let (lower, upper) = match ranges {
        [] => return Vec::new(),
        [(_, verdict)] => return decide(verdict),
        _ => ranges.split_at(ranges.len() / 2),
    };
    let first = upper.first().map_or(0, |(from, _)| *from);
    let (lower, upper) = (search(lower, decide), search(upper, decide));
    let skip = match u8::try_from(lower.len()) {
        Ok(over) => vec![jump(BPF_JGE, first, over, 0)],
        // A conditional jump reaches only 255 instructions.
        Err(_) => vec![jump(BPF_JGE, first, 0, 1), skip(lower.len())],
    };
    [skip, lower, upper].concat()
}

/// Skips `count` instructions.
pub fn skip(count: usize) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JA) as u16, jt: 0, jf: 0, k: count as u32 }
}

/// Clears the bits of what was loaded that are not in `mask`.
pub fn and(mask: u32) -> sock_filter {
    sock_filter { code: (BPF_ALU | BPF_AND | BPF_K) as u16, jt: 0, jf: 0, k: mask }
}

/// Loads the word at an offset in `struct seccomp_data`.
pub fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

/// Compares what was loaded with `k`, and skips `jt` instructions if it is true, or `jf` if not.
pub fn jump(comparison: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | comparison | BPF_K) as u16, jt, jf, k }
}

/// Ends the program with an action (SECCOMP_RET_…).
pub fn stop(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

#[cfg(test)]
pub(crate) mod tests {
    use libc::{BPF_JEQ, BPF_JGT, BPF_JSET};

    use super::*;

    /// Runs a filter as the kernel does. Returns its action and the number of instructions.
    pub fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
        let (mut at, mut loaded, mut steps) = (0, 0_u32, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            steps += 1;
            let is = |operation| u32::from(code) == operation;
            let branch = |holds| usize::from(if holds { jt } else { jf });
            at += 1 + match k {
                _ if is(BPF_RET | BPF_K) => return (k, steps),
                _ if is(BPF_LD | BPF_W | BPF_ABS) => {
                    loaded = match k {
                        NUMBER => number,
                        ARCH => arch,
                        offset => (arguments[(offset - ARGUMENTS) as usize / 8] >> (offset % 8 * 8)) as u32,
                    };
                    0
                }
                _ if is(BPF_ALU | BPF_AND | BPF_K) => {
                    loaded &= k;
                    0
                }
                _ if is(BPF_JMP | BPF_JA) => k as usize,
                _ if is(BPF_JMP | BPF_JEQ | BPF_K) => branch(loaded == k),
                _ if is(BPF_JMP | BPF_JGE | BPF_K) => branch(loaded >= k),
                _ if is(BPF_JMP | BPF_JGT | BPF_K) => branch(loaded > k),
                _ if is(BPF_JMP | BPF_JSET | BPF_K) => branch(loaded & k != 0),
                _ => panic!("{code:#x}"),
            };
        }
    }
}
