//! Merges an image's process configuration with the user's flags, by Docker's rules, into the process that init starts.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use husk_protocol::{Limit, Process, Rights, Tmpfs};

use crate::image::ImageProcess;

/// The user's overrides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Replaces the image's entrypoint and discards its command. An empty value removes the entrypoint.
    pub entrypoint: Option<OsString>,
    /// Replaces the image's command.
    pub command: Vec<OsString>,
    /// `NAME=VALUE` each, or `NAME` for the value in husk's own environment, if it is set there. Later entries win.
    pub env: Vec<OsString>,
    /// Replaces the image's working directory.
    pub working_dir: Option<OsString>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Resource limits, as in `--ulimit`.
    pub limits: Vec<Limit>,
    /// What the process may do.
    pub rights: Rights,
}

/// The default soft and hard limits of open files, the same as systemd's.
const OPEN_FILES: Limit = Limit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 524_288 };

impl Overrides {
    /// Applies the overrides to the image's configuration. Streams and terminal are set by the caller.
    pub fn apply(self, image: &ImageProcess) -> Process {
        let env = image.env.iter().map(|variable| variable.as_bytes().to_vec()).collect();
        self.apply_with(image, env)
    }

    /// The same, with `env` in place of the image's variables.
    pub fn apply_with(self, image: &ImageProcess, mut env: Vec<Vec<u8>>) -> Process {
        let bytes = |text: &String| text.as_bytes().to_vec();
        let mut args: Vec<Vec<u8>> = match &self.entrypoint {
            None => image.entrypoint.iter().map(bytes).collect(),
            Some(program) if program.is_empty() => Vec::new(),
            // In podman's words, a JSON array.
            Some(program) => match serde_json::from_slice::<Vec<String>>(program.as_bytes()) {
                Ok(words) => words.into_iter().map(String::into_bytes).collect(),
                Err(_) => vec![program.as_bytes().to_vec()],
            },
        };
        // The image's command is meant for the image's entrypoint.
        if self.command.is_empty() && self.entrypoint.is_none() {
            args.extend(image.cmd.iter().map(bytes));
        }
        args.extend(self.command.into_iter().map(OsString::into_vec));
        self.env.into_iter().for_each(|variable| set(&mut env, variable));
        let mut limits = vec![OPEN_FILES];
        limits.extend(self.limits);
        Process {
            args,
            env,
            working_dir: self.working_dir.map_or_else(|| bytes(&image.working_dir), OsString::into_vec),
            user: self.user.unwrap_or_else(|| image.user.clone()),
            terminal: None,
            stdin: false,
            detached: false,
            limits,
            rights: self.rights,
            credentials: None,
            container: None,
        }
    }
}

/// Sets a variable in place, or appends it. A name without a value that is not set in husk's environment is ignored.
fn set(env: &mut Vec<Vec<u8>>, variable: OsString) {
    let mut bytes = variable.into_vec();
    let name_len = bytes.iter().position(|&byte| byte == b'=').unwrap_or(bytes.len());
    let is_same = |other: &[u8]| {
        other.strip_prefix(bytes.get(..name_len).unwrap_or_default()).is_some_and(|rest| rest.starts_with(b"="))
    };
    let place = env.iter().position(|other| is_same(other));
    if name_len == bytes.len() {
        let Some(value) = std::env::var_os(OsString::from_vec(bytes.clone())) else {
            place.map(|at| env.remove(at));
            return;
        };
        bytes.push(b'=');
        bytes.extend_from_slice(value.as_bytes());
    }
    match place.and_then(|at| env.get_mut(at)) {
        Some(other) => *other = bytes,
        None => env.push(bytes),
    }
}

/// Parses the content of an `--env-file`: one variable per line; empty lines and lines that start with `#` are ignored.
pub fn env_file(content: &str) -> Vec<OsString> {
    let lines = content.lines().map(str::trim_start);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(OsString::from).collect()
}

/// The resources of setrlimit(2), by their `--ulimit` names.
const LIMITS: [(&str, u32); 15] = [
    ("core", libc::RLIMIT_CORE),
    ("cpu", libc::RLIMIT_CPU),
    ("data", libc::RLIMIT_DATA),
    ("fsize", libc::RLIMIT_FSIZE),
    ("locks", libc::RLIMIT_LOCKS),
    ("memlock", libc::RLIMIT_MEMLOCK),
    ("msgqueue", libc::RLIMIT_MSGQUEUE),
    ("nice", libc::RLIMIT_NICE),
    ("nofile", libc::RLIMIT_NOFILE),
    ("nproc", libc::RLIMIT_NPROC),
    ("rss", libc::RLIMIT_RSS),
    ("rtprio", libc::RLIMIT_RTPRIO),
    ("rttime", libc::RLIMIT_RTTIME),
    ("sigpending", libc::RLIMIT_SIGPENDING),
    ("stack", libc::RLIMIT_STACK),
];

/// The resource of setrlimit(2) by its `--ulimit` name.
pub fn resource(name: &str) -> Option<u32> {
    LIMITS.iter().find(|(known, _)| *known == name).map(|(_, resource)| *resource)
}

/// Parses `NAME=SOFT[:HARD]`; -1 means unlimited.
pub fn limit(text: &str) -> Result<Limit, String> {
    let wrong = || format!("{text:?} is not a resource limit: use NAME=SOFT[:HARD], such as nofile=1024:4096");
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let resource = resource(name).ok_or_else(|| {
        let names = LIMITS.map(|(name, _)| name).join(", ");
        format!("unknown resource limit {name:?}: use one of {names}")
    })?;
    let number = |text: &str| if text == "-1" { Ok(u64::MAX) } else { text.parse().map_err(|_| wrong()) };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let limit = Limit { resource, soft: number(soft)?, hard: number(hard)? };
    if limit.soft > limit.hard {
        return Err(format!("{text:?}: the soft limit exceeds the hard limit"));
    }
    Ok(limit)
}

/// Mount options that are flags of mount(2): the bit, and whether the option sets or clears it.
pub const MOUNT_FLAGS: [(&str, u64, bool); 12] = [
    ("rw", libc::MS_RDONLY, false),
    ("ro", libc::MS_RDONLY, true),
    ("exec", libc::MS_NOEXEC, false),
    ("noexec", libc::MS_NOEXEC, true),
    ("suid", libc::MS_NOSUID, false),
    ("nosuid", libc::MS_NOSUID, true),
    ("dev", libc::MS_NODEV, false),
    ("nodev", libc::MS_NODEV, true),
    ("atime", libc::MS_NOATIME, false),
    ("noatime", libc::MS_NOATIME, true),
    ("sync", libc::MS_SYNCHRONOUS, true),
    ("async", libc::MS_SYNCHRONOUS, false),
];

/// Parses `PATH[:OPTION,…]`.
pub fn tmpfs(text: &str) -> Result<Tmpfs, String> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    if !path.starts_with('/') || path == "/" {
        return Err(format!("{path:?} is not a mount point for a tmpfs: use an absolute path, such as /run:size=64m"));
    }
    let mut tmpfs = Tmpfs {
        path: path.as_bytes().to_vec(),
        flags: libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
        options: String::new(),
    };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match MOUNT_FLAGS.iter().find(|(name, ..)| *name == option) {
            Some((_, bit, true)) => tmpfs.flags |= bit,
            Some((_, bit, false)) => tmpfs.flags &= !bit,
            None => {
                let name = option.split('=').next().unwrap_or_default();
                if !["size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "huge", "mpol"].contains(&name) {
                    return Err(format!("unknown tmpfs option {option:?}"));
                }
                tmpfs.options.push_str(if tmpfs.options.is_empty() { "" } else { "," });
                tmpfs.options.push_str(option);
            }
        }
    }
    Ok(tmpfs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageProcess {
        let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        ImageProcess {
            entrypoint: list(&["/entry", "-x"]),
            cmd: list(&["serve"]),
            env: list(&["A=1", "PATH=/p"]),
            working_dir: "/srv".into(),
            user: "web".into(),
            ..ImageProcess::default()
        }
    }

    fn args(overrides: Overrides) -> Vec<String> {
        texts(&overrides.apply(&image()).args)
    }

    fn texts(list: &[Vec<u8>]) -> Vec<String> {
        list.iter().map(|bytes| String::from_utf8(bytes.clone()).unwrap()).collect()
    }

    #[test]
    fn a_command_replaces_the_images_and_an_entrypoint_replaces_both() {
        let command = || vec!["a".into(), "b".into()];
        let entry = |text: &str| Some(text.into());
        assert_eq!(args(Overrides::default()), ["/entry", "-x", "serve"]);
        assert_eq!(args(Overrides { command: command(), ..Overrides::default() }), ["/entry", "-x", "a", "b"]);
        assert_eq!(args(Overrides { entrypoint: entry("sh"), ..Overrides::default() }), ["sh"]);
        assert_eq!(args(Overrides { entrypoint: entry(r#"["sh", "-c"]"#), ..Overrides::default() }), ["sh", "-c"]);
        assert_eq!(args(Overrides { entrypoint: entry("[sh"), ..Overrides::default() }), ["[sh"]);
        assert_eq!(
            args(Overrides { entrypoint: entry("sh"), command: command(), ..Overrides::default() }),
            ["sh", "a", "b"]
        );
        assert_eq!(args(Overrides { entrypoint: entry(""), command: command(), ..Overrides::default() }), ["a", "b"]);
    }

    #[test]
    fn a_variable_is_set_in_place_and_the_last_value_counts() {
        let env =
            ["A=2", "B=x=y", "HUSK_TEST_IS_NOT_SET", "A=3", "PATH=", "CARGO_PKG_NAME"].map(OsString::from).to_vec();
        let process = Overrides { env, ..Overrides::default() }.apply(&image());
        assert_eq!(texts(&process.env), ["A=3", "PATH=", "B=x=y", "CARGO_PKG_NAME=husk"]);
        let env = vec!["A".into()];
        let process = Overrides { env, ..Overrides::default() }.apply(&image());
        assert_eq!(texts(&process.env), ["PATH=/p"], "a name that husk has not is taken away");
    }

    #[test]
    fn an_env_file_may_have_comments() {
        assert_eq!(env_file("# words\nA=1 # 2\n\n  B=x\r\nC\n"), ["A=1 # 2", "B=x", "C"]);
    }

    #[test]
    fn defaults_come_from_the_image() {
        let process = Overrides::default().apply(&image());
        assert_eq!((process.working_dir.as_slice(), process.user.as_str()), (&b"/srv"[..], "web"));
        let overrides = Overrides { working_dir: Some("/x".into()), user: Some("0".into()), ..Overrides::default() };
        let process = overrides.apply(&image());
        assert_eq!((process.working_dir.as_slice(), process.user.as_str()), (&b"/x"[..], "0"));
    }

    #[test]
    fn limits_have_names_and_a_single_value_sets_both() {
        let of = |resource, soft, hard| Ok(Limit { resource, soft, hard });
        assert_eq!(limit("nofile=64"), of(libc::RLIMIT_NOFILE, 64, 64));
        assert_eq!(limit("core=0:-1"), of(libc::RLIMIT_CORE, 0, u64::MAX));
        assert!(limit("files=1").unwrap_err().contains("nofile"));
        for wrong in ["nofile", "nofile=", "nofile=x", "nofile=2:1", "nofile=-1:5", "nofile=-2"] {
            assert!(limit(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_tmpfs_has_safe_default_options() {
        let plain = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let made = |flags, options: &str| Ok(Tmpfs { path: b"/run".to_vec(), flags, options: options.into() });
        assert_eq!(tmpfs("/run"), made(plain, ""));
        assert_eq!(tmpfs("/run:size=64m,exec,mode=1777"), made(plain & !libc::MS_NOEXEC, "size=64m,mode=1777"));
        assert_eq!(tmpfs("/run:ro"), made(plain | libc::MS_RDONLY, ""));
        for wrong in ["run", "/", "", "/run:lowerdir=/x"] {
            assert!(tmpfs(wrong).is_err(), "{wrong}");
        }
    }
}
