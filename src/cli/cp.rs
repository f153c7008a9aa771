//! `husk cp`: copies files into and out of a machine.

use std::ffi::OsString;
use std::io::{self, BufReader, BufWriter, IsTerminal};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::tree::{self, Copied, Terms};
use husk_protocol::{COPY_FROM, COPY_FROM_BEHIND_LINK, COPY_TO, COPY_TO_KEEPING_OWNERS, Role};
use indicatif::HumanBytes;

use super::exit::Exit;
use super::reach::Reached;
use super::transfer;
use crate::decompress;
use crate::image::tar_stream::{self, Content};
use crate::image::{Progress, tar_copy};
use crate::state_dir;

const EXAMPLES: &str = "\
Examples:
  husk cp web:/var/log/nginx .
  husk cp site web:/srv             (the directory itself)
  husk cp site/. web:/srv           (the contents of the directory)
  husk cp --archive web:/home backup
  husk cp -L web:/var/run app       (the target of a symbolic link)
  husk cp web:/var/log - | tar t    (write a tar archive)
  tar c . | husk cp - web:/srv      (extract a tar archive, which may be compressed)

A stopped machine is copied from and to without starting its command, and what it mounts from the host is
reached as well.
Exactly one of the two paths must be in a machine. In a directory, devices, pipes, sockets and what cannot be read are
skipped with a warning. Files copied from a machine are named after the requested path, and modes and owners of existing
directories are not changed.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Cp {
    /// Source path, or - to read a tar archive from standard input
    #[arg(value_name = "[MACHINE:]PATH")]
    from: String,

    /// Destination path, or - to write a tar archive to standard output
    #[arg(value_name = "[MACHINE:]PATH")]
    to: String,

    /// Archive mode (copy all UID/GID information, and setuid and setgid bits)
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "true|false")]
    archive: Option<bool>,

    /// The machine is not paused: for compatibility with `podman cp`
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pause: Option<bool>,

    /// Follow a symbolic link in the source path
    #[arg(short = 'L', long)]
    follow_link: bool,
}

impl Cp {
    /// Copies, and prints a summary if standard error is a terminal.
    pub fn run(self) -> Result<Exit> {
        let copied = match (split_machine(&self.from), split_machine(&self.to)) {
            (Some(_), None) if self.to == "/dev/stdout" => bail!("use - to write a tar archive to standard output"),
            (Some((name, path)), None) if self.to == "-" => self.copy_from_as_tar(name, path)?,
            (Some((name, path)), None) => self.copy_from(name, path)?,
            (None, Some((name, path))) => self.copy_to(name, path)?,
            (None, None) => bail!("neither path is in a machine: use MACHINE:PATH for one of them"),
            (Some(_), Some(_)) => bail!("copying between machines is not supported: copy to a local directory first"),
        };
        copied.skipped.iter().for_each(|what| log::warn!("skipped {what}"));
        log::info!("copied {} files, links and directories, {}", copied.entries, HumanBytes(copied.bytes));
        Ok(Exit::Success)
    }

    fn copy_from(&self, name: &str, path: &str) -> Result<Copied> {
        let bar = Progress::on_terminal().count("copy");
        let (called, must_be_dir) = base_name(path);
        let owners = self.archive == Some(true);
        let terms = Terms { name: Some(called), must_be_dir, owners, ..Terms::default() };
        let copied = self.receive(name, path, |stream| {
            Ok(tree::receive(stream, Path::new(&self.to), terms, &mut |bytes| bar.set(bytes))?)
        })?;
        drop(bar);
        if let Some(target) = &copied.link {
            log::warn!("{path} in {name} is a symbolic link to {target:?} and was copied as one: use -L to follow it");
        }
        Ok(copied)
    }

    /// Writes `path` to standard output as an archive.
    fn copy_from_as_tar(&self, name: &str, path: &str) -> Result<Copied> {
        ensure!(
            !io::stdout().is_terminal(),
            "refusing to write a tar archive to a terminal: redirect standard output to a file or a pipe"
        );
        let mut out = BufWriter::new(io::stdout().lock());
        let (called, _) = base_name(path);
        let copied =
            self.receive(name, path, |stream| tar_stream::receive(stream, called.as_bytes(), Content::Files, &mut out));
        // The reader has closed the pipe because it needs no more.
        let is_enough = |error: &anyhow::Error| {
            error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        };
        if copied.as_ref().is_err_and(is_enough) {
            // The same applies to buffered data.
            let _ = out.into_parts();
            return Ok(Copied::default());
        }
        copied
    }

    /// Calls `take` with the data that the guest sends for `path`.
    fn receive(
        &self,
        name: &str,
        path: &str,
        take: impl FnOnce(&mut BufReader<UnixStream>) -> Result<Copied>,
    ) -> Result<Copied> {
        let word = if self.follow_link { COPY_FROM_BEHIND_LINK } else { COPY_FROM };
        let machine = Reached::with_mounts(name)?;
        let process = transfer::start(machine.entry(), word, path, false)?;
        transfer::receive_from(process, take).with_context(|| format!("copy {path} from {name}"))
    }

    fn copy_to(&self, name: &str, path: &str) -> Result<Copied> {
        let from = PathBuf::from(&self.from);
        let as_tar = self.from == "-";
        ensure!(
            !as_tar || !io::stdin().is_terminal(),
            "refusing to read a tar archive from a terminal: redirect standard input from a file or a pipe"
        );
        ensure!(as_tar || from.symlink_metadata().is_ok(), "{}: No such file or directory", from.display());
        let word = if self.archive == Some(true) { COPY_TO_KEEPING_OWNERS } else { COPY_TO };
        let machine = Reached::with_mounts(name)?;
        let mut process = transfer::start(machine.entry(), word, path, true)?;
        let stream = process.take(Role::Stdin)?;
        // Other output is discarded.
        let _output = process.take(Role::Stdout)?;
        let errors = transfer::collect_stderr(&mut process)?;
        let bar = Progress::on_terminal().count("copy");
        let mut out = BufWriter::new(&stream);
        let sent = match as_tar {
            true => decompress::unpacked(BufReader::new(io::stdin().lock()))
                .and_then(|archive| tar_copy::send(archive, &mut out, &mut |bytes| bar.set(bytes))),
            false => {
                tree::send(&from, self.follow_link, &mut out, &mut |bytes| bar.set(bytes)).map_err(anyhow::Error::from)
            }
        };
        drop(out);
        let _ = stream.shutdown(Shutdown::Write);
        drop(bar);
        // If the other side has failed, it reports the reason.
        let ended = transfer::finish(process, errors).with_context(|| format!("copy to {path} in {name}"));
        let written = machine.release();
        ended.and(written).and_then(|()| sent.with_context(|| format!("copy {}", from.display())))
    }
}

/// The user's name for `path` in a machine, `.` for the contents of a directory, and whether it must be a directory.
/// The guest is not asked, because it could return another file's name.
fn base_name(path: &str) -> (OsString, bool) {
    let is_contents = path == "." || path.ends_with("/.");
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
        match name {
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    let name = names.last().filter(|_| !is_contents).unwrap_or(&".");
    (name.into(), is_contents || *name == "." || matches!(path.rsplit('/').next(), Some("" | "..")))
}

/// Splits `MACHINE:PATH`. An argument that starts like a path is a local one.
fn split_machine(text: &str) -> Option<(&str, &str)> {
    let (name, path) = text.split_once(':')?;
    state_dir::names::check(name).is_ok().then_some((name, path))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use husk_protocol::tree::{About, Entry};
    use husk_protocol::{HELLO_BYTES, Hello, Process, ToHost, frame};

    use super::*;
    use crate::guest::exec as guest;

    const ABOUT: About = About { mode: 0o644, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };

    /// What `husk cp` makes of a guest that sends these bytes, this error output and this end, and copies to a directory
    /// `to` in `place`.
    fn copied_from(place: &Path, output: Vec<u8>, errors: Vec<u8>, end: ToHost) -> Result<Copied> {
        let path = place.join("vsock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let guest = thread::spawn(move || {
            let accept = || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.read_exact(&mut [0; "CONNECT 1024\n".len()]).unwrap();
                stream.write_all(b"OK 1\n").unwrap();
                let mut hello = [0; HELLO_BYTES];
                stream.read_exact(&mut hello).unwrap();
                (Hello::from_bytes(hello).unwrap().role, stream)
            };
            let say = |mut stream: &UnixStream, message: &ToHost| {
                let mut bytes = Vec::new();
                frame::write(message, &mut bytes).unwrap();
                let _ = stream.write_all(&bytes);
            };
            let (_, control) = accept();
            say(&control, &ToHost::Admitted);
            let streams = [accept(), accept()];
            say(&control, &end);
            // Fails once husk has had enough.
            for (role, mut stream) in streams {
                let _ = stream.write_all(if role == Role::Stdout { &output } else { &errors });
            }
        });
        let connections = guest::request_start(&path, &Process::default())?.connect()?;
        let to = place.join("to");
        fs::create_dir_all(&to)?;
        let terms = Terms { name: Some("asked".into()), ..Terms::default() };
        let copied = transfer::receive_from(connections, |stream| Ok(tree::receive(stream, &to, terms, &mut |_| {})?));
        guest.join().unwrap();
        copied
    }

    fn stream(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = Vec::new();
        entries.iter().for_each(|entry| frame::write(entry, &mut bytes).unwrap());
        bytes
    }

    fn file(name: &[u8]) -> Vec<Entry> {
        vec![Entry::File(name.to_vec(), ABOUT, 0), Entry::Piece(0)]
    }

    #[test]
    fn a_guest_cannot_leave_the_place_that_the_user_chose() {
        let place = tempfile::tempdir().unwrap();
        let dir = || vec![Entry::Directory(b"d".to_vec(), ABOUT)];
        let link = vec![Entry::Link(b"up".to_vec(), b"../..".to_vec(), ABOUT)];
        let through_link = vec![Entry::Directory(b"up".to_vec(), ABOUT)];
        let good = [file(b"../../name"), vec![Entry::End]].concat();
        copied_from(place.path(), stream(&good), Vec::new(), ToHost::Exited(0)).unwrap();
        assert!(place.path().join("to/asked").is_file(), "whatever the guest calls it");
        fs::remove_file(place.path().join("to/asked")).unwrap();
        for (inside, why) in [
            (file(b"../out"), "an invalid name"),
            (file(b"/tmp/out"), "an invalid name"),
            (file(b".."), "an invalid name"),
            ([link.clone(), through_link].concat(), "out of order"),
            ([link, file(b"up")].concat(), "out of order"),
            (vec![Entry::Same(b"x".to_vec(), vec![b"..".to_vec(), b"vsock".to_vec()])], "which it must not"),
        ] {
            let bytes = stream(&[dir(), inside.clone(), vec![Entry::Leave, Entry::End]].concat());
            let error = copied_from(place.path(), bytes, Vec::new(), ToHost::Exited(0)).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(why) && !error.contains('\n'), "{inside:?}: {error}");
            let mut names: Vec<_> =
                fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names, ["to", "vsock"], "{inside:?}");
        }
    }

    #[test]
    fn a_copy_that_is_not_whole_is_an_error_whatever_its_sender_says() {
        let place = tempfile::tempdir().unwrap();
        let whole = stream(&[file(b"f"), vec![Entry::End]].concat());
        let lie = stream(&[Entry::File(b"f".to_vec(), ABOUT, u64::MAX), Entry::Piece(u32::MAX)]);
        let short = [stream(&[Entry::File(b"f".to_vec(), ABOUT, 9), Entry::Piece(9)]), b"four".to_vec()].concat();
        let fine = || ToHost::Exited(0);
        let no = || ToHost::Failed { message: "no".into(), code: 127 };
        for (output, end, why) in [
            (Vec::new(), fine(), "closed the connection"),
            (whole[..whole.len() - 1].to_vec(), fine(), "closed the connection"),
            (lie, fine(), "too much data at once"),
            (short, fine(), "closed the connection"),
            (vec![0xff; 64], fine(), "too long"),
            (whole.clone(), ToHost::Exited(1), "the copy failed in the guest"),
            (whole.clone(), ToHost::Signaled(9), "the copy failed in the guest"),
            (whole.clone(), no(), "no"),
        ] {
            let error = copied_from(place.path(), output, Vec::new(), end).unwrap_err();
            assert!(format!("{error:#}").contains(why), "{error:#}");
        }
        copied_from(place.path(), whole, Vec::new(), fine()).unwrap();
    }

    #[test]
    fn a_flood_of_errors_is_cut() {
        let place = tempfile::tempdir().unwrap();
        let output = stream(&[file(b"f"), vec![Entry::End]].concat());
        let error = copied_from(place.path(), output, vec![b'x'; 4 << 20], ToHost::Exited(1)).unwrap_err();
        assert_eq!(format!("{error:#}").len(), 64 << 10);
    }

    #[test]
    fn a_copy_is_named_after_the_requested_path() {
        for (path, name, must_be_dir) in [
            ("/var/log/app.log", "app.log", false),
            ("app.log", "app.log", false),
            ("/srv/", "srv", true),
            ("/srv/.", ".", true),
            ("/srv//./sub", "sub", false),
            ("/srv/sub/..", "srv", true),
            (".", ".", true),
            ("/", ".", true),
            ("/..", ".", true),
            ("/srv/..a", "..a", false),
            ("/srv/a..", "a..", false),
        ] {
            assert_eq!(base_name(path), (name.into(), must_be_dir), "{path}");
        }
    }

    #[test]
    fn a_machine_precedes_a_colon() {
        assert_eq!(split_machine("web:/etc"), Some(("web", "/etc")));
        assert_eq!(split_machine("web:a:b"), Some(("web", "a:b")));
        for text in ["/etc", "./a:b", "../a:b", "/a:b", ":x", "file"] {
            assert_eq!(split_machine(text), None, "{text}");
        }
    }
}
