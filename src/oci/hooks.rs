//! Runs hooks (runtime-spec, config.md, "POSIX-platform Hooks"): each gets the container's state on its standard input.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use rustix::fs::{MemfdFlags, memfd_create};

use super::config::Hook;
use crate::sys::process;

/// How often a hook with a timeout is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Runs the hooks of one kind, in order, with `state`. Stops at the first that fails.
pub fn run(kind: &str, hooks: &[Hook], state: &str) -> Result<()> {
    hooks.iter().try_for_each(|hook| {
        run_one(hook, state).with_context(|| format!("run the {kind} hook {}", hook.path.display()))
    })
}

/// The same for those whose failure changes nothing.
pub fn run_all(kind: &str, hooks: &[Hook], state: &str) {
    for hook in hooks {
        if let Err(error) = run_one(hook, state) {
            log::warn!("run the {kind} hook {}: {error:#}", hook.path.display());
        }
    }
}

/// Runs one hook with `state`.
pub fn run_one(hook: &Hook, state: &str) -> Result<()> {
    ensure!(hook.path.is_absolute(), "its path is not absolute");
    let mut command = Command::new(&hook.path);
    if let [name, args @ ..] = &hook.args[..] {
        command.arg0(name).args(args);
    }
    command.env_clear().envs(hook.env.iter().filter_map(|variable| variable.split_once('=')));
    // An engine, its shim or this process may have blocked some.
    process::reset_signals(&mut command);
    // A hook need not read it, and must not make this process wait.
    let mut input = File::from(memfd_create("state", MemfdFlags::CLOEXEC).context("store the state")?);
    input.write_all(state.as_bytes()).and_then(|()| input.rewind()).context("store the state")?;
    let mut child = command.stdin(input).stdout(Stdio::null()).spawn().context("start it")?;
    let until = hook.timeout.and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)));
    let status = loop {
        match (child.try_wait()?, until) {
            (Some(status), _) => break status,
            (None, Some(until)) if Instant::now() >= until => {
                let _ = child.kill().and_then(|()| child.wait());
                bail!("it has not ended after {} s", hook.timeout.unwrap_or_default());
            }
            (None, Some(_)) => std::thread::sleep(POLL),
            (None, None) => break child.wait()?,
        }
    };
    ensure!(status.success(), "{status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::SignalFd;

    fn hook(script: &str) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args, env: vec!["A=b".into()], timeout: Some(5) }
    }

    #[test]
    fn a_hook_gets_all_signals() {
        // In a thread of its own, since this blocks them.
        std::thread::spawn(|| {
            let _blocked = SignalFd::block(&[libc::SIGTERM, libc::SIGCHLD]).unwrap();
            let script = "read name mask <<E\n$(grep SigBlk /proc/self/status)\nE\ntest $mask = 0000000000000000";
            run("prestart", &[hook(script)], "").unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_hook_gets_the_state_and_its_own_environment() {
        run("prestart", &[hook("read state; test \"$state$A$HOME\" = '{}b'")], "{}\n").unwrap();
        let told = |hook: Hook| format!("{:#}", run("prestart", &[hook], "").unwrap_err());
        assert!(told(hook("exit 3")).contains("prestart hook /bin/sh: exit status: 3"));
        assert!(told(Hook { path: "/no/such".into(), ..Hook::default() }).contains("No such file"));
        assert!(told(Hook { timeout: Some(0), ..hook("sleep 9") }).contains("has not ended"));
        run("prestart", &[Hook { timeout: Some(u64::MAX), ..hook("true") }], "").unwrap();
        run("prestart", &[hook("true")], &"x".repeat(1 << 20)).unwrap();
        run_all("poststop", &[hook("exit 1"), hook("true")], "");
    }
}
