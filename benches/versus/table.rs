//! The results as a Markdown table, ready for a document.

use crate::vmms::Vmm;
use crate::{PARTS, Results};

/// Values only, without ratios. If instructions were counted, VM exits stand beside them, with the sum that an exit of
/// 1.5 µs and a billion instructions per second would make.
pub fn table(counted: bool, vmms: &[Vmm], results: &[Results]) -> String {
    let mut lines = if counted {
        "| VMM | version | M instructions to PID 1 | to exit | VM exits | to exit, with 1.5 µs per VM exit, ms | by reason |\n\
         |---|---|---|---|---|---|---|\n"
    } else {
        "| VMM | version | to PID 1, ms | to exit, ms |\n|---|---|---|---|\n"
    }
    .to_owned();
    for (vmm, results) in vmms.iter().zip(results) {
        let [to_pid1, to_exit] = PARTS.map(|(_, part)| results.median(part));
        lines.push_str(&format!("| {} | {} | {to_pid1:.1} | {to_exit:.1} |", vmm.name, vmm.version));
        if let Some(exits) = &results.exits {
            let sum_ms = to_exit + exits.cost_ms();
            lines.push_str(&format!(" {} | {sum_ms:.1} | {} |", exits.total(), exits.by_reason()));
        }
        lines.push('\n');
    }
    lines
}
