//! A real registry on this host, with and without a password, and with an unreliable connection.

use std::process::Stdio;
use std::time::Duration;

use crate::line::Line;
use crate::server::{AUTH, Asks, Registry, image, push};
use crate::tools::{House, assert_same, is_root};

#[test]
fn an_image_is_pulled_once_and_its_next_version_in_part() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Nothing, false);
    push(&house, &registry, "team/app:1", false);
    let name = format!("127.0.0.1:{}/team/app", registry.port);
    let pull = |version: &str| {
        let output = house.husk(&["pull", &format!("{name}{version}")]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let printed = pull(":1");
    assert!(printed.contains("was pulled: sha256:"), "{printed}");
    if is_root() {
        assert_same(&house.path("bundle/rootfs"), &house.root(&format!("{name}:1")));
    }
    assert!(pull(":1").contains("is up to date"));
    let digest = printed.trim().rsplit(' ').next().unwrap();
    pull(&format!("@{digest}"));
    assert_eq!(house.files("blobs"), 2);

    // Only the new layer of the next version is downloaded.
    house.sh("mkdir three; echo 3 >three/3; tar --numeric-owner -C three -cf three.tar .; umoci raw add-layer --image layout:app three.tar");
    push(&house, &registry, "team/app:2", false);
    let line = Line::to(registry.port, i64::MAX);
    let through = house.husk(&["pull", &format!("127.0.0.1:{}/team/app:2", line.port)]);
    assert!(through.status.success(), "{through:?}");
    assert!(line.bytes() < 100_000, "{} bytes came", line.bytes());

    // `--pull` decides whether the store's image is run, or the registry's.
    push(&house, &registry, "team/app:1", false);
    let id = || house.inspect(&format!("{name}:1"))["Id"].to_string();
    let (old, run) = (id(), |policy: &str, version: &str| {
        let output = house.husk(&["run", "--kernel", "./none", "--pull", policy, &format!("{name}{version}"), "x"]);
        assert_eq!(output.status.code(), Some(125));
        String::from_utf8(output.stderr).unwrap()
    });
    assert!(run("never", ":3").contains("--pull never keeps it from being pulled"));
    assert!(run("never", ":1").contains("./none") && run("missing", ":1").contains("./none") && id() == old);
    assert!(run("always", ":1").contains("./none") && id() != old);

    // A missing root file system is rebuilt from its layers.
    std::fs::remove_dir_all(house.path("data/roots")).unwrap();
    assert!(house.husk(&["load", "-i", "layout"]).status.success());
    let error = String::from_utf8(house.husk(&["pull", &format!("{name}:9")]).stderr).unwrap();
    assert!(error.contains(" does not have 127.0.0.1:"), "{error}");
}

#[test]
fn the_image_for_this_architecture_is_pulled_from_an_index() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Nothing, false);
    push(&house, &registry, "app:amd64", false);
    let at = format!("127.0.0.1:{}", registry.port);
    // Both manifests must exist before an index can refer to them.
    house.sh(&format!(
        "umoci config --image layout:app --tag arm --architecture arm64
         skopeo copy --quiet --dest-tls-verify=false oci:layout:arm docker://{at}/app:arm64
         for name in arm64 amd64; do
             skopeo inspect --raw --tls-verify=false docker://{at}/app:$name >$name.json
             echo '{{\"mediaType\": \"application/vnd.oci.image.manifest.v1+json\", \"size\": '$(stat -c %s $name.json)',
                 \"digest\": \"sha256:'$(sha256sum <$name.json | cut -d ' ' -f 1)'\",
                 \"platform\": {{\"os\": \"linux\", \"architecture\": \"'$name'\"}}}}' >$name.entry
         done
         echo '{{\"schemaVersion\": 2, \"mediaType\": \"application/vnd.oci.image.index.v1+json\", \"manifests\": [' >index
         cat arm64.entry >>index; echo , >>index; cat amd64.entry >>index; echo ']}}' >>index
         curl -sSf -X PUT -H 'Content-Type: application/vnd.oci.image.index.v1+json' --data-binary @index \
             http://{at}/v2/app/manifests/all"
    ));
    let pulled = house.husk(&["pull", &format!("{at}/app:all")]);
    assert!(pulled.status.success(), "{pulled:?}");
    let inspected = String::from_utf8(house.husk(&["inspect", &format!("{at}/app:all")]).stdout).unwrap();
    assert!(inspected.contains(r#""Architecture": "amd64""#), "{inspected}");
    if is_root() {
        assert_same(&house.path("bundle/rootfs"), &house.root(&format!("{at}/app:all")));
    }

    // An image without a platform and its attestation, in a nested index.
    house.sh(&format!(
        r#"mark='"annotations": {{"vnd.docker.reference.type": "attestation-manifest"}}'
           sed -i "s|.platform.*|$mark, \"platform\": {{\"os\": \"unknown\", \"architecture\": \"unknown\"}}}}|" arm64.entry
           sed -i -z 's|,[^,]*"platform".*|}}|' amd64.entry
           type=application/vnd.oci.image.index.v1+json
           put() {{ curl -sSf -X PUT -H "Content-Type: $type" --data-binary @$1 http://{at}/v2/app/manifests/$1; }}
           index() {{ echo '{{"schemaVersion": 2, "mediaType": "'$type'", "manifests": ['"$1"']}}'; }}
           index "$(cat arm64.entry), $(cat amd64.entry)" >inner; put inner
           index '{{"mediaType": "'$type'", "size": '$(stat -c %s inner)', "digest": "sha256:'$(sha256sum <inner | cut -c1-64)'"}}' >outer
           put outer"#
    ));
    for tag in ["inner", "outer"] {
        let pulled = house.husk(&["pull", &format!("{at}/app:{tag}")]);
        assert!(pulled.status.success(), "{pulled:?}");
        assert_eq!(house.root(&format!("{at}/app:{tag}")), house.root(&format!("{at}/app:all")), "{tag}");
    }
}

#[test]
fn credentials_are_read_from_dockers_configuration() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Password, false);
    push(&house, &registry, "app:1", false);
    let name = format!("127.0.0.1:{}/app:1", registry.port);
    house.refused(&["pull", &name], "requires a username and password: run `husk login 127.0.0.1:");
    let configure = |text: String| {
        house.sh("mkdir -p docker");
        std::fs::write(house.path("docker/config.json"), text).unwrap();
    };
    configure(format!(r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "dXNlcjp3cm9uZw=="}}}}}}"#, registry.port));
    house.refused(&["pull", &name], "denied access to");
    configure(format!(r#"{{"auths": {{"127.0.0.1:{}": {{"auth": "{AUTH}"}}}}}}"#, registry.port));
    assert!(house.husk(&["pull", &name]).status.success());

    // From a credential helper.
    house.sh("rm -r data; mkdir bin");
    let helper = "#!/bin/sh\nread host\necho '{\"Username\":\"user\",\"Secret\":\"secret\"}'\n";
    std::fs::write(house.path("bin/docker-credential-test"), helper).unwrap();
    house.sh("chmod +x bin/*");
    configure(format!(r#"{{"credHelpers": {{"127.0.0.1:{}": "test"}}}}"#, registry.port));
    let path = format!("{}:{}", house.path("bin").display(), std::env::var("PATH").unwrap());
    let output = house.command(&["pull", &name]).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_interrupted_pull_is_resumed() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Nothing, false);
    push(&house, &registry, "app:1", false);
    // The connection breaks repeatedly, after every 3 MiB.
    let line = Line::to(registry.port, 3 << 20);
    let output = house.husk(&["pull", &format!("127.0.0.1:{}/app:1", line.port)]);
    assert!(output.status.success(), "{output:?}");
    assert!(line.bytes() < 10 << 20, "{} bytes came for 8 MiB", line.bytes());
    if is_root() {
        assert_same(&house.path("bundle/rootfs"), &house.root(&format!("127.0.0.1:{}/app:1", line.port)));
    }
}

#[test]
fn a_killed_pull_is_resumed() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Nothing, false);
    push(&house, &registry, "app:1", false);
    let slow = Line::start(registry.port, i64::MAX, Duration::from_millis(20));
    let name = |port: u16| format!("127.0.0.1:{port}/app:1");
    let mut child = house.command(&["pull", &name(slow.port)]).stderr(Stdio::null()).spawn().unwrap();
    while slow.bytes() < 3 << 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let line = Line::to(registry.port, i64::MAX);
    assert!(house.husk(&["pull", &name(line.port)]).status.success());
    assert!(line.bytes() < 6 << 20, "{} bytes came for the rest of 8 MiB", line.bytes());
}

#[test]
fn an_image_is_pushed_without_what_the_registry_has() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Password, false);
    let ok = |words: &[&str]| {
        let output = house.husk(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    house.refused(&["push", &registry.name("no/such:1")], "there is no such image");
    // One layer is sent in several chunks.
    house.sh("mkdir big; head -c 40M /dev/urandom >big/b; tar -C big -cf big.tar .; umoci raw add-layer --image layout:app big.tar");
    ok(&["load", "layout", "--name", &registry.name("team/app:1")]);
    let denied = house.husk(&["push", &registry.name("team/app:1")]);
    assert!(String::from_utf8_lossy(&denied.stderr).contains("run `husk login 127.0.0.1:"), "{denied:?}");

    let server = registry.name("");
    let server = server.trim_end_matches('/');
    let login = |password: &str| {
        let mut command = house.command(&["login", "-u", "user", "--password-stdin", server]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), format!("{password}\n").as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let wrong = login("wrong");
    assert!(!wrong.status.success() && String::from_utf8_lossy(&wrong.stderr).contains("does not accept"), "{wrong:?}");
    house.sh("mkdir -p docker; echo '{\"credHelpers\": {\"x\": \"y\"}}' >docker/config.json");
    let logged_in = login("secret");
    assert!(logged_in.stdout == b"Login Succeeded\n", "{logged_in:?}");
    house.sh("grep -q credHelpers docker/config.json; stat -c %a docker/config.json | grep 600");

    let printed = ok(&["push", &registry.name("team/app:1")]);
    assert!(printed.contains("\n1: digest: sha256:") && printed.contains(" size: "), "{printed}");
    house.sh(&format!(
        "skopeo copy -q --src-creds user:secret --src-tls-verify=false docker://{} oci:copy:x",
        registry.name("team/app:1")
    ));
    // What the registry has is not sent again, neither in the repository nor in another one.
    let line = Line::to(registry.port, i64::MAX);
    let through = |repository: &str| format!("127.0.0.1:{}/{repository}", line.port);
    house.sh(&format!("sed -i 's/127.0.0.1:{}/127.0.0.1:{}/' docker/config.json", registry.port, line.port));
    for name in ["team/app:1", "team/app:2", "other/app:1"] {
        ok(&["tag", &registry.name("team/app:1"), &through(name)]);
    }
    assert_eq!(ok(&["push", "-q", "--all-tags", &through("team/app")]).lines().count(), 2);
    ok(&["push", &through("other/app:1")]);
    let pulled = ok(&["pull", "--all-tags", &through("team/app")]);
    assert!(pulled.contains("team/app:1 is up to date") && pulled.contains("team/app:2 is up to date"), "{pulled}");
    let id = house.inspect(&registry.name("team/app:1"))["Id"].clone();
    ok(&["rmi", &through("other/app:1")]);
    ok(&["pull", &through("other/app:1")]);
    assert_eq!(house.inspect(&through("other/app:1"))["Id"], id);

    let server = format!("127.0.0.1:{}", line.port);
    assert!(ok(&["logout", &server]).starts_with("Removed"));
    assert!(ok(&["logout", &server]).starts_with("Not logged in"));
}

#[test]
fn a_credential_helper_keeps_the_password() {
    let house = House::new();
    let registry = Registry::start(&house, Asks::Password, false);
    house.sh("mkdir -p docker bin; echo '{\"credsStore\": \"test\"}' >docker/config.json
        printf '#!/bin/sh\\necho $1 >>%s/calls; cat >>%s/calls\\n' $PWD $PWD >bin/docker-credential-test; chmod +x bin/*");
    let path = format!("{}:{}", house.path("bin").display(), std::env::var("PATH").unwrap());
    let run = |words: &[&str]| {
        let output = house.command(words).env("PATH", &path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let server = format!("127.0.0.1:{}", registry.port);
    run(&["login", "-u", "user", "-p", "secret", &server]);
    run(&["logout", &server]);
    let calls = std::fs::read_to_string(house.path("calls")).unwrap();
    assert!(calls.contains(r#""Secret":"secret""#) && calls.contains("erase\n127.0.0.1:"), "{calls}");
    assert!(!std::fs::read_to_string(house.path("docker/config.json")).unwrap().contains("secret"));
}
