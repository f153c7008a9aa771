//! `husk top`: lists the processes in a machine.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::{INIT_PROGRAM, LIST_PROCESSES, Process, ToHost};

use super::exit::Exit;
use super::{exec, images, time};
use crate::guest::capture::{self, Captured};
use crate::state_dir::record::now_ms;
use crate::state_dir::{self, MachineEntry, StateDir};

const EXAMPLES: &str = "\
Examples:
  husk top web
  husk top web -o pid,rss,args      (options of the ps in the machine)";

/// The maximum size of the list.
const MAX_BYTES: usize = 4 << 20;
const TIMEOUT: Duration = Duration::from_secs(30);
const NOT_FOUND: u8 = 127;
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "husk top MACHINE [PS OPTION]...")]
pub(super) struct Top {
    /// Name or ID of the machine, followed by options of ps, if it is to be the one in the machine
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true)]
    #[arg(value_names = ["MACHINE", "PS OPTION"])]
    words: Vec<OsString>,
}

impl Top {
    /// Prints the processes, except for husk's init and the kernel's threads.
    pub fn run(self) -> Result<Exit> {
        let mut words = self.words.into_iter();
        let machine = words.next().unwrap_or_default();
        let entry = StateDir::open()?.find(&machine.to_string_lossy())?;
        let inherited = exec::inherited(&entry)?;
        let options: Vec<Vec<u8>> = words.map(OsString::into_vec).collect();
        let by_init = options.is_empty();
        let args = match by_init {
            true => vec![INIT_PROGRAM.into(), LIST_PROCESSES.into()],
            false => [vec![b"ps".to_vec()], options].concat(),
        };
        let env = inherited.env.into_iter().map(Vec::from).collect();
        let text = list(&entry, args, env)?;
        let shown = match by_init {
            true => table(&text, now_ms() / 1000)?,
            false => only(&text, &pids(&own(&entry)?)),
        };
        super::print(&shown)?;
        Ok(Exit::Success)
    }
}

/// The processes of the machine as init lists them: without itself and the kernel's threads.
fn own(entry: &MachineEntry) -> Result<String> {
    list(entry, vec![INIT_PROGRAM.into(), LIST_PROCESSES.into()], Vec::new())
}

/// The PIDs in a list of init's.
fn pids(text: &str) -> Vec<u32> {
    text.lines().filter_map(|line| line.split('\t').nth(1)?.parse().ok()).collect()
}

/// What ps has printed, without the lines of other processes than these. As with Docker, that takes a column with their PIDs.
fn only(text: &str, pids: &[u32]) -> String {
    let titles = text.lines().next().unwrap_or_default();
    let Some(column) = titles.split_whitespace().position(|title| title == "PID") else { return text.to_owned() };
    let is_other = |line: &str| {
        let pid = line.split_whitespace().nth(column).and_then(|field| field.parse().ok());
        pid.is_some_and(|pid: u32| !pids.contains(&pid))
    };
    text.split_inclusive('\n').filter(|line| !is_other(line)).collect()
}

/// What a program of a machine that lists processes prints.
fn list(entry: &MachineEntry, args: Vec<Vec<u8>>, env: Vec<Vec<u8>>) -> Result<String> {
    let process = Process { args, env, user: "0:0".into(), ..Process::default() };
    let Captured { end, output, errors } = capture::run(&entry.file(state_dir::VSOCK), &process, MAX_BYTES, TIMEOUT)?;
    match end.context("the machine does not respond")? {
        ToHost::Exited(0) => Ok(String::from_utf8_lossy(&output).into_owned()),
        ToHost::Failed { code: NOT_FOUND, .. } => bail!("the image has no ps: leave its options out"),
        ToHost::Failed { message, .. } => bail!(message),
        _ => bail!("list the processes: {}", String::from_utf8_lossy(&errors).trim()),
    }
}

/// The processes of the container `id` of a machine: their PIDs, and a list in the form of `ps -ef`.
pub fn processes(entry: &MachineEntry, id: &str) -> Result<(Vec<u32>, String)> {
    let text = list(entry, vec![INIT_PROGRAM.into(), LIST_PROCESSES.into(), id.into()], Vec::new())?;
    Ok((pids(&text), table(&text, now_ms() / 1000)?))
}

/// The list in the form of `ps -ef`.
fn table(text: &str, now_s: u64) -> Result<String> {
    let mut rows = vec![["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"].map(str::to_owned)];
    for line in text.lines() {
        let mut fields = line.splitn(7, '\t').map(str::to_owned);
        let [user, pid, parent, ticks, start, terminal, command] =
            std::array::from_fn(|_| fields.next().unwrap_or_default());
        let (ticks, start_s): (u64, u64) = match (ticks.parse(), start.parse()) {
            (Ok(ticks), Ok(start_s)) => (ticks, start_s),
            _ => bail!("the machine sent an invalid list"),
        };
        // Ticks are hundredths of a second.
        let percent = ticks / now_s.saturating_sub(start_s).max(1);
        let seconds = ticks / 100;
        let spent = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        rows.push([user, pid, parent, percent.to_string(), started(start_s, now_s), terminal, spent, command]);
    }
    ensure!(rows.len() > 1 || text.is_empty(), "the machine sent an invalid list");
    Ok(images::table(&rows))
}

/// The time of day, or the day if that is not today, in UTC.
fn started(start_s: u64, now_s: u64) -> String {
    let stamp = time::rfc3339(start_s.saturating_mul(1_000_000_000));
    let part = |range: std::ops::Range<usize>| stamp.get(range).unwrap_or_default();
    if now_s.saturating_sub(start_s) < 24 * 3600 {
        return part(11..16).to_owned();
    }
    let month = part(5..7).parse::<usize>().ok().and_then(|month| MONTHS.get(month.checked_sub(1)?));
    format!("{}{}", month.unwrap_or(&"?"), part(8..10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_like_that_of_ps() {
        let now_s = 1_700_000_000;
        let text = format!("root\t7\t1\t25000\t{}\t?\tsleep 1\nweb\t9\t7\t5\t86400\tpts/0\tx y\n", now_s - 1000);
        let table = table(&text, now_s).unwrap();
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
        assert_eq!(rows[1], ["root", "7", "1", "25", "21:56", "?", "00:04:10", "sleep", "1"]);
        assert_eq!(rows[2], ["web", "9", "7", "0", "Jan02", "pts/0", "00:00:00", "x", "y"]);
    }

    #[test]
    fn a_list_of_ps_has_the_machines_processes_only() {
        let text = "USER   PID COMMAND\nroot     1 husk\nroot     2 [kthreadd]\nweb     34 httpd -p 1\nroot    40 ps\n";
        assert_eq!(only(text, &[34, 41]), "USER   PID COMMAND\nweb     34 httpd -p 1\n");
        assert_eq!(only("RSS COMMAND\n1 husk\n", &[34]), "RSS COMMAND\n1 husk\n", "without a column of PIDs");
        assert_eq!(pids("root\t7\t1\t2\t3\t?\tsleep 1\nx\n"), [7]);
    }

    #[test]
    fn a_hostile_list_is_refused_or_shown() {
        for text in ["x", "root\t7\t1\tx\t1\t?\ta", "\n\n"] {
            assert!(super::table(text, 0).unwrap_err().to_string().contains("invalid list"), "{text:?}");
        }
        let far = format!("\t\t\t{0}\t{0}\t\t", u64::MAX);
        assert!(super::table(&far, 0).unwrap().contains("23:34"));
    }
}
