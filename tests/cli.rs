//! Tests of the built binary: its output and exit codes. No guest runs here.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn husk(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_husk")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = husk(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Asserts that husk exits with `code` and a single line of its own on standard error, and returns the line.
fn refusal(arguments: &[&str], code: i32) -> String {
    let output = husk(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert_eq!(output.stdout, b"", "{arguments:?}");
    let [line] = stderr.lines().collect::<Vec<_>>()[..] else { panic!("{arguments:?}: {stderr}") };
    assert!(line.starts_with("husk: "), "{arguments:?}: {line}");
    assert!(!line.contains("panicked"), "{arguments:?}: {line}");
    line.to_owned()
}

#[test]
fn help_of_every_command_has_examples() {
    let images = [
        "pull", "load", "images", "inspect", "tag", "push", "login", "save", "import", "history", "rmi", "prune",
        "disks",
    ];
    let commands = ["boot", "doctor", "completions", "man"].into_iter().chain(images);
    for command in std::iter::once(vec![]).chain(commands.map(|command| vec![command])) {
        let help = stdout(&[&command[..], &["--help"]].concat());
        assert!(help.contains("Usage: husk") && help.contains("Examples:\n"), "{command:?}: {help}");
    }
    for command in [&["--help"][..], &["boot", "--help"]] {
        assert!(stdout(command).contains("81    the guest kernel panicked"), "{command:?}");
    }
    assert_eq!(stdout(&["--version"]), concat!("husk ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn foreign_text_is_sanitized_for_the_terminal() {
    // A window title, an escape sequence started by a C1 character, and a right-to-left override.
    let word = "x\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}y";
    let no_json = std::env::temp_dir().join(word);
    for (words, code) in [
        (&["rmi", word][..], 1),
        (&["inspect", word], 1),
        (&["stop", word], 1),
        (&["boot", "--config", no_json.to_str().unwrap()], 1),
        (&["run", "--", word], 125),
        (&["exec", word, "x"], 125),
        (&[word], 2),
        (&["boot", word], 2),
    ] {
        let line = refusal(words, code);
        assert!(!line.contains(['\u{1b}', '\u{7}', '\u{9b}', '\u{202e}']), "{words:?}: {line:?}");
    }
    let json = stdout(&["boot", "--kernel", "/k", "--initrd", word, "--print-config"]);
    assert!(json.contains("x\\u001b]0;owned\\u0007\\u009b2J\\u202ey"), "{json}");
}

#[test]
fn no_command_shows_help_and_is_a_usage_error() {
    let output = husk(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: husk"), "{output:?}");
}

#[test]
fn flags_are_printed_as_a_configuration() {
    let json = stdout(&[
        "boot",
        "--kernel",
        "/k",
        "--initrd",
        "/i",
        "--cmdline",
        "quiet x=\"1 2\"",
        "--bare-cmdline",
        "--cpus",
        "3",
        "--memory",
        "1.5G",
        "--disk",
        "/a.img",
        "--disk",
        "/b.img,ro,id=data",
        "--print-config",
    ]);
    let expected = serde_json::json!({
        "kernel": "/k", "initrd": "/i", "cmdline": "quiet x=\"1 2\"", "default_cmdline": false, "cpus": 3,
        "memory_mib": 1536, "balloon": true,
        "disks": [{"path": "/a.img", "readonly": false}, {"path": "/b.img", "readonly": true, "id": "data"}],
    });
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), expected);
}

#[test]
fn limits_are_part_of_the_printed_configuration() {
    let flags = ["--cpus=1.5", "--cpuset=3,0-1", "--cpu-shares=512", "--memory=256M", "--memory-max=1G"];
    let more = ["--host-memory=auto", "--disk=/a.img,bps=10M,iops=500,iops-burst=50", "--print-config"];
    let json = stdout(&[&["boot", "--kernel", "k"], &flags[..], &more].concat());
    let expected = serde_json::json!({
        "kernel": "k", "cmdline": "", "default_cmdline": true, "cpus": 2, "cpu_limit_millicpus": 1500,
        "cpuset": [0, 1, 3], "cpu_shares": 512, "memory_mib": 1024, "memory_target_mib": 256, "host_memory_mib": 1069,
        "balloon": true,
        "disks": [{
            "path": "/a.img", "readonly": false,
            "rate": {"bytes_per_second": 10_485_760, "ops_per_second": 500, "burst_ops": 50},
        }],
    });
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), expected);
}

#[test]
fn defaults_are_one_vcpu_and_512_mib() {
    let json = stdout(&["boot", "--kernel", "k", "--print-config"]);
    let expected = serde_json::json!({
        "kernel": "k", "cmdline": "", "default_cmdline": true, "cpus": 1, "memory_mib": 512, "balloon": true,
        "disks": [],
    });
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap(), expected);
}

#[test]
fn a_printed_configuration_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("machine.json");
    let printed = stdout(&["boot", "--kernel", "/k", "--disk", "/a.img,id=a", "--memory=2g", "--print-config"]);
    fs::write(&file, &printed).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(stdout(&["boot", "--config", file, "--print-config"]), printed);

    let more = stdout(&["boot", "--config", file, "--memory", "4T", "--print-config"]);
    assert_eq!(more, printed.replace("2048", "4194304"));
}

#[test]
fn an_invalid_configuration_file_is_rejected_by_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let write = |text: &str| -> PathBuf {
        let file = dir.path().join("machine.json");
        fs::write(&file, text).unwrap();
        file
    };
    for (text, named) in [
        (r#"{"kernal": "/k"}"#, "`kernal`"),
        (r#"{"kernel": "/k", "disks": [{"path": "/a", "read_only": true}]}"#, "`read_only`"),
        (r#"{"kernel": "/k", "disks": [{"readonly": true}]}"#, "`path`"),
        (r#"{"kernel": "/k", "cpus": -1}"#, "-1"),
        (r#"{"kernel": "/k", "cpus": 2"#, "line 1"),
        (r#"{"kernel": "/k"} x"#, "trailing"),
        (r#"{"kernel": "/k", "kernel": "/l"}"#, "`kernel`"),
        (r#"{"cpus": 2}"#, "--kernel"),
        ("", "line 1"),
    ] {
        let line = refusal(&["boot", "--config", write(text).to_str().unwrap()], 2);
        assert!(line.contains(named), "{text}: {line}");
    }
    let line = refusal(&["boot", "--config", "/nowhere/machine.json"], 1);
    assert_eq!(line, "husk: read /nowhere/machine.json: No such file or directory");
    refusal(&["boot", "--config", dir.path().to_str().unwrap()], 1);
}

#[test]
fn invalid_flags_are_rejected_in_one_line_with_a_remedy() {
    let long_cmdline = "x".repeat(2048);
    let many_disks: Vec<_> = (0..31).map(|n| format!("--disk=/d{n}")).collect();
    let mut many_disks: Vec<_> = many_disks.iter().map(String::as_str).collect();
    many_disks.extend(["boot", "--kernel=/k"]);
    many_disks.rotate_right(2);

    let cases: &[(&[&str], &str)] = &[
        (&["boot"], "--kernel PATH"),
        (&["boot", "--kernel", ""], "--kernel"),
        (&["boot", "--kernel=/k", "--initrd="], "--initrd"),
        (&["boot", "--kernl", "/k"], "--kernel"),
        (&["boot", "--kernel=/k", "extra"], "extra"),
        (&["boot", "--kernel=/k", "--cpus=0"], "1 to 32"),
        (&["boot", "--kernel=/k", "--cpus=1000"], "1 to 32"),
        (&["boot", "--kernel=/k", "--cpus=1.0001"], "0.01 to 32"),
        (&["boot", "--kernel=/k", "--cpus=0.001"], "thousandths of a CPU"),
        (&["boot", "--kernel=/k", "--cpus=-1"], "1 to 32"),
        (&["boot", "--kernel=/k", "--memory=0"], "--memory 32M"),
        (&["boot", "--kernel=/k", "--memory=16M"], "--memory 32M"),
        (&["boot", "--kernel=/k", "--memory=512"], "512M"),
        (&["boot", "--kernel=/k", "--memory=5T"], "--memory 4T"),
        (&["boot", "--kernel=/k", "--memory=99999999999999T"], "too large"),
        (&["boot", "--kernel=/k", "--memory", "-1"], "512M"),
        (&["boot", "--kernel=/k", "--memory=lots"], "512M"),
        (&["boot", "--kernel=/k", "--memory="], "--memory"),
        (&["boot", "--kernel=/k", "--memory=1G", "--memory-max=512M"], "--memory-max"),
        (&["boot", "--kernel=/k", "--memory-max=1G", "--no-balloon"], "--no-balloon"),
        (&["boot", "--kernel=/k", "--host-memory=512M"], "--host-memory auto"),
        (&["boot", "--kernel=/k", "--cpuset=1-0"], "0-2,4"),
        (&["boot", "--kernel=/k", "--cpu-shares=1"], "--cpu-shares with 2 to 262144"),
        (&["boot", "--kernel=/k", "--disk=/d,iops=0"], "1 or more"),
        (&["boot", "--kernel=/k", "--disk=/d,bps-burst=1M"], "needs its limit"),
        (&["boot", "--kernel=/k", "--disk=/d,iops=fast"], "iops=N"),
        (&["boot", "--kernel=/k", "--disk="], "disk"),
        (&["boot", "--kernel=/k", "--disk=,ro"], "--disk PATH"),
        (&["boot", "--kernel=/k", "--disk=/d,rw"], "use ro, id=NAME"),
        (&["boot", "--kernel=/k", "--disk=/d,id="], "disk id"),
        (&["boot", "--kernel=/k", "--disk=/d,id=123456789012345678901"], "20"),
        (&["boot", "--kernel=/k", "--disk=/d,id=a", "--disk=/e,id=a"], "twice"),
        (&many_disks, "at most 31 virtio devices"),
        (&["boot", "--kernel=/k", "--transport=isa"], "use auto, mmio or pci"),
        (&["boot", "--kernel=/k", "--cmdline", &long_cmdline], "2047"),
        (&["boot", "--kernel=/k", "--cmdline", "a\nb"], "'\\n'"),
        (&["update", "web", "--restart=always"], "husk run --restart"),
        (&["rub"], "run"),
        (&["completions", "tcsh"], "bash"),
        (&["doctor", "--jason"], "--json"),
    ];
    for (arguments, named) in cases {
        let line = refusal(arguments, 2);
        assert!(line.contains(named), "{arguments:?}: {line}");
    }
}

#[test]
fn short_options_stand_together_and_have_their_values_as_docker_takes_them() {
    for words in [
        &["run", "-itm512M", "-eA=b", "-e=A", "-uroot", "/nowhere/x", "-x"][..],
        &["run", "-ite", "A=b", "-p80:80", "--net", "none", "/nowhere/x", "--help"],
        &["run", "--cpuset-cpus=0", "/nowhere/x", "--", "-h"],
    ] {
        let line = refusal(words, 125);
        assert!(line.contains("/nowhere/x: No such file"), "{words:?}: {line}");
    }
    for words in [&["exec", "-iuroot", "-eA=b", "nobody", "sh", "-c", "x"][..], &["exec", "nobody", "ls", "-l"]] {
        let line = refusal(words, 125);
        assert!(line.contains("no such machine: \"nobody\""), "{words:?}: {line}");
    }
    for (words, named) in [
        (["run", "-ieX", "-j", "image"], "-j"),
        (["run", "-it", "--memroy=1", "image"], "--memory"),
        (["exec", "--detach-keys=ctrl-x", "web", "sh"], "husk exec -d"),
    ] {
        let line = refusal(&words, 125);
        assert!(line.contains(named), "{words:?}: {line}");
    }
}

#[test]
fn what_does_not_exist_is_reported_once_and_the_rest_is_done() {
    for command in ["stop", "kill", "pause", "rm", "start", "wait", "restart"] {
        let output = husk(&[command, "nobody", "noone"]);
        assert_eq!(output.status.code(), Some(1), "{command}: {output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{command}: {text}");
        assert!(lines.iter().all(|line| line.matches("no").count() == 2), "{command}: {text}");
    }
    for words in [["rm", "-f", "nobody"], ["rmi", "-f", "nobody"]] {
        let output = husk(&words);
        assert!(output.status.success() && !output.stderr.is_empty(), "{words:?}: {output:?}");
    }
    let data = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(words).env("HUSK_DATA", data.path()).stdin(Stdio::null()).output().unwrap()
    };
    fs::create_dir_all(data.path().join("root/bin")).unwrap();
    assert!(run(&["load", data.path().join("root").to_str().unwrap(), "-n", "there"]).status.success());
    let output = run(&["inspect", "nothing", "there"]);
    assert!(output.status.code() == Some(1) && String::from_utf8_lossy(&output.stdout).contains("there"), "{output:?}");
    let output = run(&["rmi", "nothing", "there"]);
    assert!(
        output.status.code() == Some(1) && output.stdout.starts_with(b"Untagged: there:latest\nDeleted: sha256:"),
        "{output:?}"
    );
}

#[test]
fn a_run_without_a_process_has_a_distinct_exit_code() {
    let cases: &[(&[&str], &str)] = &[
        (&["run"], "IMAGE"),
        (&["run", "--cpuss=2", "image"], "--cpuss"),
        (&["run", "--cpus=0", "/nowhere"], "1 to 32"),
        (&["run", "--cpus=1", "/nowhere"], "/nowhere"),
        (&["run", "--memory=512", "image"], "512M"),
        (&["run", "--tmpfs=run", "image"], "absolute path"),
        (&["run", "--read-only", "--scratch=1G", "image"], "--scratch"),
        (&["run", "--ulimit=files=1", "image"], "nofile"),
        (&["run", "/nowhere/image.tar", "sh"], "/nowhere/image.tar"),
        (&["run", "-h"], "--help"),
    ];
    for (arguments, named) in cases {
        let line = refusal(arguments, 125);
        assert!(line.contains(named), "{arguments:?}: {line}");
    }
}

/// Completes WORDS in a zsh on a terminal of its own, and prints that terminal's output.
const ZSH: &str = r#"
zmodload zsh/zpty
zpty shell TERM=dumb zsh -f -i
zpty -w shell "SETUP; complete() { zle complete-word; print -r -- \"=\$BUFFER=\"; exit }; zle -N complete; bindkey '^X' complete"
zpty -w -n shell $'WORDS\x18'
while zpty -r shell output; do print -r -- $output; done
"#;

#[test]
fn shells_complete_names() {
    let data = tempfile::tempdir().unwrap();
    let husk = env!("CARGO_BIN_EXE_husk");
    let bin = std::path::Path::new(husk).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let run = |program: &str, words: &[&str]| {
        let mut command = Command::new(program);
        command.args(words).env("HUSK_DATA", data.path()).env("XDG_RUNTIME_DIR", data.path()).env("PATH", &path);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    fs::create_dir_all(data.path().join("root/bin")).unwrap();
    for name in ["web:1", "worker"] {
        run(husk, &["load", data.path().join("root").to_str().unwrap(), "-n", name]);
    }
    run(husk, &["volume", "create", "data"]);
    assert_eq!(
        (run(husk, &["__complete", "images"]), run(husk, &["__complete", "volumes"])),
        ("web:1\nworker:latest\n".into(), "data\n".into())
    );
    let complete = |words: &str| {
        let script = format!(
            "source <(husk completions bash); COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMP_LINE='{words}'
             _husk_with_names husk \"${{COMP_WORDS[COMP_CWORD]}}\" x; printf '%s ' \"${{COMPREPLY[@]}}\""
        );
        run("bash", &["-c", &script])
    };
    assert!(complete("husk rmi wor").contains("worker:latest "), "{}", complete("husk rmi wor"));
    assert!(complete("husk rmi --fo").contains("--force ") && !complete("husk rmi --fo").contains("web"));
    assert!(complete("husk volume rm da").contains("data "));
    let fish =
        |words: &str| run("fish", &["-N", "-c", &format!("husk completions fish | source; complete -C '{words}'")]);
    assert_eq!((fish("husk rmi wor"), fish("husk volume rm ")), ("worker:latest\n".into(), "data\n".into()));
    // The completion of zsh needs a terminal: the word is completed there, and the line is printed.
    let functions = data.path().join("functions");
    fs::create_dir(&functions).unwrap();
    fs::write(functions.join("_husk"), stdout(&["completions", "zsh"])).unwrap();
    let zsh = |words: &str| {
        let setup = format!("fpath=({} $fpath); autoload -U compinit; compinit -u -D", functions.display());
        run("zsh", &["-f", "-c", &ZSH.replace("SETUP", &setup).replace("WORDS", words)])
    };
    for (words, completed) in [("husk volume rm d", "husk volume rm data "), ("husk rmi wo", "husk rmi worker:latest ")]
    {
        assert!(zsh(words).contains(&format!("={completed}=")), "{words}: {:?}", zsh(words));
    }

    for (words, printed) in [
        (
            &["system", "df", "--format", "{{.Type}} {{.TotalCount}}"][..],
            "Images 1\nLayers 0\nWarm images 0\nMachines 0\nDisks 0\nVolumes 1\n",
        ),
        (&["info", "--format", "{{.Images}} {{.ContainersRunning}}"], "1 0\n"),
        (&["version", "-f", "{{.Server.Version}}"], concat!(env!("CARGO_PKG_VERSION"), "\n")),
        (&["image", "ls", "--format", "{{.Tag}}"], "1\nlatest\n"),
        (&["container", "ls", "-q"], ""),
        (&["image", "inspect", "-f", "{{len .RepoTags}}", "web:1"], "2\n"),
        (&["volume", "inspect", "-f", "{{.Name}} {{.Driver}}", "data"], "data local\n"),
        (&["container", "prune", "-f"], ""),
        (&["rm", "--all", "--force", "--time", "0", "--ignore"], ""),
        (&["stop", "--ignore", "none"], ""),
        (&["pause", "-a"], ""),
        (&["image", "exists", "web:1"], ""),
        (&["volume", "exists", "data"], ""),
        (&["--noout", "images"], ""),
        (&["images", "--sort", "tag", "--format", "{{.Repository}}"], "web\nworker\n"),
        (&["network", "prune", "-f"], ""),
        (&["stats", "--no-stream", "--format", "{{.Name}} {{.CPUPerc}} {{.MemUsage}}"], ""),
        (&["stats", "--no-stream", "--format", "table {{.Name}}\\t{{.MemPerc}}"], "NAME  MEM\n"),
    ] {
        assert_eq!(run(husk, words), printed, "{words:?}");
    }
    for words in [
        ["container", "exists", "none"],
        ["image", "exists", "none"],
        ["volume", "exists", "none"],
        ["network", "exists", "none"],
    ] {
        let output = Command::new(husk)
            .args(words)
            .env("HUSK_DATA", data.path())
            .env("XDG_RUNTIME_DIR", data.path())
            .output()
            .unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(1), &b""[..]), "{words:?}");
    }
    let events = run(husk, &["events", "--since", "1h", "--until", "0s", "--format", "{{.Type}} {{.Action}}"]);
    assert!(events.starts_with("image load\nimage load\n"), "{events}");
    assert!(run(husk, &["system", "df", "-v"]).contains("data"));
    // A machine that does not start leaves no anonymous volume behind.
    let failed = Command::new(husk)
        .args(["run", "-d", "-v", "/data", "--kernel", "/nowhere", "--network", "none", "web:1", "true"])
        .envs([("HUSK_DATA", data.path()), ("XDG_RUNTIME_DIR", data.path())])
        .output()
        .unwrap();
    assert_eq!((failed.status.code(), run(husk, &["volume", "ls", "-q"])), (Some(125), "data\n".into()), "{failed:?}");
    assert!(run(husk, &["system", "prune", "-f"]).starts_with("Removed 0 images"));
    let anonymous = run(husk, &["volume", "create"]);
    assert!(run(husk, &["system", "prune", "-f", "--volumes"]).starts_with(&(anonymous + "Removed 0 images")));
    assert_eq!(run(husk, &["volume", "rm", "-f", "none", "data"]), "data\n");
    assert!(run(husk, &["image", "prune", "-af"]).starts_with("Removed 1 images"));
    assert_eq!(run(husk, &["images", "-q"]), "");
}

#[test]
fn volumes_have_labels() {
    let data = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(words).envs([("HUSK_DATA", data.path()), ("XDG_RUNTIME_DIR", data.path())]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    fs::write(data.path().join("labels"), "# of all\nteam=web\n").unwrap();
    let file = data.path().join("labels");
    assert_eq!(run(&["volume", "create", "--label", "team=db", "--label", "old", "pages"]), "pages\n");
    assert_eq!(run(&["volume", "create", "--label-file", file.to_str().unwrap(), "site"]), "site\n");
    run(&["volume", "create", "plain"]);
    for (filters, found) in [
        (&["label=team"][..], "pages\nsite\n"),
        (&["label=team=db"], "pages\n"),
        (&["label=team=x"], ""),
        (&["label=team", "label=old"], "pages\n"),
    ] {
        let filters = filters.iter().flat_map(|filter| ["--filter", filter]);
        assert_eq!(run(&["volume", "ls", "-q"].into_iter().chain(filters).collect::<Vec<_>>()), found);
    }
    assert_eq!(run(&["volume", "inspect", "-f", "{{json .Labels}}", "pages"]), "{\"old\":\"\",\"team\":\"db\"}\n");
    assert_eq!(run(&["volume", "ls", "--filter", "name=site", "--format", "{{.Labels}}"]), "team=web\n");
    // Another volume of this name has none of them.
    run(&["volume", "rm", "pages"]);
    run(&["volume", "create", "pages"]);
    assert_eq!(run(&["volume", "ls", "-q", "--filter", "label=old"]), "");
}

#[test]
fn a_users_mistake_is_answered_with_what_to_type() {
    let data = tempfile::tempdir().unwrap();
    fs::write(data.path().join("junk"), "junk").unwrap();
    let junk = data.path().join("junk");
    for (words, told) in [
        (&["run", "Debian"][..], "invalid image name \"Debian\": names consist of lowercase letters"),
        (&["run", "debian:"], "; and there is no such file"),
        (&["run", "debian@sha256:123"], "\"sha256:123\" is not a SHA-256 digest"),
        (&["run", "-v", "rel/path:/x", "x"], "a path that starts with / or ./"),
        (&["run", "-v", "data:relative", "x"], "use an absolute path in the machine"),
        (&["run", "--cpus", "0", "x"], "1 to 32"),
        (&["run", "-m", "1M", "x"], "use --memory 32M or more"),
        (&["run", "-m", "4T", "x"], "4194304 MiB of memory: this host has "),
        (&["run", "-m", "512", "x"], "a plain number is bytes"),
        (&["run", "-l", "=x", "x"], "use KEY=VALUE or KEY"),
        (&["run", "-p", "99999:80", "x"], "host ports are 1 to 65535"),
        (&["run", "--network", "host", "x"], "use --network user"),
        (&["run", "--env-file", "/nowhere/env", "x"], "read /nowhere/env: No such file"),
        (&["run", "--ip", "10.0.0.2", "x"], "--ip and --network-alias need --network NAME"),
        (&["exec", "web"], "add one after the machine"),
        (&["exec", "web", "ls"], "see `husk ps -a`"),
        (&["cp", "a", "b"], "use MACHINE:PATH"),
        (&["tag", "debian"], "use husk tag <SOURCE_IMAGE> <TARGET_IMAGE>"),
        (&["load", "-i", junk.to_str().unwrap()], "junk: it is not a tar archive"),
        (&["pull", "localhost:1/x"], "Connection refused"),
        (&["volume", "rm", "none"], "see `husk volume ls`"),
        (&["rmi", "none"], "see `husk images`"),
        (&["stop", "none"], "see `husk ps -a`"),
        (&["compose", "up"], "husk network create"),
        (&["ps", "--format", "{{.Nope}}"], "there is no field .Nope, there are ID, Image, Command"),
        (&["images", "--format", "table {{.ID}}\\t{{.Nope}}"], "there is no field .Nope, there are Repository, Tag"),
        (&["events", "--format", "{{.Nope}}"], "there is no field .Nope, there are Type, Action, Actor"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(words).envs([("HUSK_DATA", data.path()), ("XDG_RUNTIME_DIR", data.path())]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && errors.lines().count() == 1, "{words:?}: {errors}");
        assert!(errors.starts_with("husk: ") && errors.contains(told), "{words:?}: {errors}");
    }
}

#[test]
fn completions_exist_for_every_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = stdout(&["completions", shell]);
        assert_eq!(script, stdout(&["completion", shell]));
        assert!(script.contains("husk") && script.contains("print-config"), "{shell}");
    }
}

#[test]
fn a_manual_page_exists_for_every_command() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(stdout(&["man", dir.path().to_str().unwrap()]), "");
    for page in ["husk", "husk-boot", "husk-run", "husk-doctor", "husk-completions", "husk-man"] {
        let text = fs::read_to_string(dir.path().join(format!("{page}.1"))).unwrap();
        assert!(text.contains(".SH SYNOPSIS") && text.contains("Examples:"), "{page}: {text}");
    }
    assert_eq!(stdout(&["man"]), fs::read_to_string(dir.path().join("husk.1")).unwrap());
    refusal(&["man", "/nowhere/at/all"], 1);
}

#[test]
fn doctors_exit_code_is_zero_if_no_check_fails() {
    let output = husk(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let fails = checks.iter().filter(|check| check["status"] == "fail");
    assert!(fails.clone().all(|check| check["remedy"].is_string()), "{report}");
    assert_eq!(report["stock_guests"], fails.clone().count() == 0);
    assert_eq!(output.status.code(), Some(i32::from(fails.clone().count() > 0)), "{report}");

    let text = String::from_utf8(husk(&["doctor"]).stdout).unwrap();
    for check in checks {
        let name = check["name"].as_str().unwrap();
        assert!(text.lines().any(|line| line.contains(name)), "{name}: {text}");
    }
    assert!(!text.contains('\x1b'), "colour without a terminal: {text}");
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_husk"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
