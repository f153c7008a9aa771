//! The users of a server's user namespace, which its own process cannot map.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// Maps the users of the new user namespace: all of them for root, and otherwise this user as its root, and those that the host
/// has given to this user (subuid(5)).
pub fn map(pid: u32) -> Result<()> {
    let proc = Path::new("/proc").join(pid.to_string());
    let write = |name: &str, text: &str| -> Result<()> {
        let path = proc.join(name);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("write {}", path.display()))
    };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if rustix::process::geteuid().is_root() {
        // As far as this process itself has them.
        let same = |name: &str| -> Result<String> {
            let own = fs::read_to_string(format!("/proc/self/{name}"))?;
            let lines = own.lines().filter_map(|line| {
                let [inside, _, count] = line.split_whitespace().collect::<Vec<_>>()[..] else { return None };
                Some(format!("{inside} {inside} {count}\n"))
            });
            Ok(lines.collect())
        };
        return write("uid_map", &same("uid_map")?).and_then(|()| write("gid_map", &same("gid_map")?));
    }
    if map_subordinate(pid, uid, gid).is_some() {
        return Ok(());
    }
    write("setgroups", "deny")?;
    write("uid_map", &format!("0 {uid} 1\n"))?;
    write("gid_map", &format!("0 {gid} 1\n"))
}

/// Maps this user, and those after it to its subordinate IDs, with the host's programs for that. `None` if it has none.
fn map_subordinate(pid: u32, uid: u32, gid: u32) -> Option<()> {
    let ranges = [("/etc/subuid", "newuidmap", uid), ("/etc/subgid", "newgidmap", gid)].map(|(file, program, own)| {
        let (first, count) = subordinate(&fs::read_to_string(file).ok()?, uid)?;
        Some((program, [0, own, 1, 1, first, count]))
    });
    for range in ranges {
        let (program, numbers) = range?;
        let mut command = Command::new(program);
        command.arg(pid.to_string()).args(numbers.map(|number| number.to_string()));
        command.output().ok()?.status.success().then_some(())?;
    }
    Some(())
}

/// The first range of the user in a file like /etc/subuid: `NAME:FIRST:COUNT` or `UID:FIRST:COUNT`.
fn subordinate(text: &str, uid: u32) -> Option<(u32, u32)> {
    let name = std::env::var("USER").ok();
    text.lines().find_map(|line| {
        let [user, first, count] = line.split(':').collect::<Vec<_>>()[..] else { return None };
        let is_own = user == uid.to_string() || Some(user) == name.as_deref();
        is_own.then_some(())?;
        Some((first.parse().ok()?, count.trim().parse().ok()?))
    })
}
