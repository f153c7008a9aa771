//! Registries with TLS, and with token authentication.

use std::fs;
use std::process::{Command, Output};

use crate::server::{AUTH, Asks, IDENTITY, NAME, Registry, certificates, image, push};
use crate::tools::{House, is_root};

const ISSUER_HERE: Asks = Asks::Token { tls: false, issuer: "127.0.0.1" };

fn configure(house: &House, text: &str) {
    house.sh("mkdir -p docker");
    fs::write(house.path("docker/config.json"), text).unwrap();
}

/// The requests to the issuer since the last call.
fn asked(house: &House) -> String {
    let asked = fs::read_to_string(house.path("asked")).unwrap_or_default();
    let _ = fs::remove_file(house.path("asked"));
    asked
}

#[track_caller]
fn expect_pulled(output: &Output) {
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("was pulled: sha256:"), "{output:?}");
}

#[test]
fn a_registry_with_tls_requires_a_trusted_ca() {
    let house = House::new();
    image(&house);
    certificates(&house);
    let registry = Registry::start(&house, Asks::Nothing, true);
    push(&house, &registry, "team/app:1", true);
    let name = registry.name("team/app:1");
    house.refused(&["pull", &name], "invalid peer certificate: UnknownIssuer");
    let pull = |variable: &str, value: &str| {
        house.sh("rm -rf data");
        house.command(&["pull", &name]).env(variable, house.path(value)).output().unwrap()
    };
    expect_pulled(&pull("SSL_CERT_FILE", "ca/ca.crt"));
    // The CA locations of Docker and podman for a registry.
    for place in ["docker", "containers"] {
        let dir = format!("{place}-config/{place}/certs.d/127.0.0.1:{}", registry.port);
        house.sh(&format!("mkdir -p {dir}; cp ca/ca.crt {dir}"));
        expect_pulled(&pull("XDG_CONFIG_HOME", &format!("{place}-config")));
    }
    // Another CA is not accepted.
    house.sh("openssl req -x509 -newkey rsa:2048 -nodes -keyout x.key -out other.crt -days 2 -subj /CN=authority");
    let output = pull("SSL_CERT_FILE", "other.crt");
    assert!(String::from_utf8_lossy(&output.stderr).contains("invalid peer certificate"), "{output:?}");
}

#[test]
fn tokens_are_issued_for_passwords_and_identity_tokens() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, ISSUER_HERE, false);
    push(&house, &registry, "team/app:1", false);
    let name = registry.name("team/app:1");
    let login = |entry: &str| {
        house.sh("rm -rf data");
        configure(&house, &format!(r#"{{"auths": {{"127.0.0.1:{}": {{{entry}}}}}}}"#, registry.port));
        asked(&house);
    };
    asked(&house);
    house.refused(&["pull", &name], "denied access to");
    assert!(asked(&house).starts_with("GET nobody repository:team/app:pull\n"));
    login(r#""auth": "dXNlcjp3cm9uZw==""#);
    house.refused(&["pull", &name], "denied the token (401 Unauthorized): run `husk login 127.0.0.1:");
    login(&format!(r#""auth": "{AUTH}""#));
    expect_pulled(&house.husk(&["pull", &name]));
    assert_eq!(asked(&house), "GET user repository:team/app:pull\n", "one token serves all");
    login(r#""auth": "MDAwOg==", "identitytoken": "wrong""#);
    house.refused(&["pull", &name], "denied the token");
    login(&format!(r#""auth": "MDAwOg==", "identitytoken": "{IDENTITY}""#));
    expect_pulled(&house.husk(&["pull", &name]));
    assert_eq!(asked(&house), "POST identity repository:team/app:pull\n");
}

#[test]
fn credentials_of_podman_and_skopeo_are_used() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Password, false);
    push(&house, &registry, "team/app:1", false);
    let name = registry.name("team/app:1");
    house.refused(&["pull", &name], "requires a username and password");
    let login = |place: &str| {
        house.sh(&format!(
            "rm -rf data; mkdir -p $(dirname {place}); skopeo login --tls-verify=false --authfile {place} -u user -p secret \
             127.0.0.1:{}",
            registry.port
        ));
    };
    login("chosen.json");
    let output = house.command(&["pull", &name]).env("REGISTRY_AUTH_FILE", house.path("chosen.json")).output().unwrap();
    expect_pulled(&output);
    login("run/containers/auth.json");
    expect_pulled(&house.command(&["pull", &name]).env("XDG_RUNTIME_DIR", house.path("run")).output().unwrap());
    login("home/.config/containers/auth.json");
    expect_pulled(&house.husk(&["pull", &name]));
    // For one repository only, in addition to another one.
    let auths = format!(
        r#"{{"auths": {{"127.0.0.1:{0}/team/app": {{"auth": "{AUTH}"}}, "127.0.0.1:{0}": {{"auth": "eDp5"}}}}}}"#,
        registry.port
    );
    fs::write(house.path("home/.config/containers/auth.json"), auths).unwrap();
    house.sh("rm -r data");
    expect_pulled(&house.husk(&["pull", &name]));
}

#[test]
fn remote_registries_and_issuers_require_tls() {
    if !is_root() {
        return;
    }
    let house = House::new();
    image(&house);
    certificates(&house);
    let elsewhere = |issuer_has_tls| {
        let registry = Registry::start(&house, Asks::Token { tls: issuer_has_tls, issuer: NAME }, true);
        let name = format!("{NAME}:{}/app:1", registry.port);
        configure(&house, &format!(r#"{{"auths": {{"{NAME}:{}": {{"auth": "{AUTH}"}}}}}}"#, registry.port));
        (registry, name)
    };
    // Resolves the name to this host within a separate mount namespace.
    fs::write(house.path("hosts"), format!("127.0.0.1 localhost {NAME}\n")).unwrap();
    let there = |line: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-euc", &format!("mount --bind hosts /etc/hosts; {line}")]);
        house.surround(&mut command);
        command.env("SSL_CERT_FILE", house.path("ca/ca.crt")).output().unwrap()
    };
    let husk = env!("CARGO_BIN_EXE_husk");

    let (registry, name) = elsewhere(true);
    let pushed =
        there(&format!("skopeo copy -q --dest-cert-dir ca --dest-creds user:secret oci:layout:app docker://{name}"));
    assert!(pushed.status.success(), "{pushed:?}");
    asked(&house);
    expect_pulled(&there(&format!("{husk} pull {name}")));
    assert_eq!(asked(&house), "GET user repository:app:pull\n");
    drop(registry);

    // A password is never sent unencrypted, whatever the registry requests.
    house.sh("rm -r data");
    let (_registry, name) = elsewhere(false);
    let output = there(&format!("{husk} pull {name}"));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("which is not encrypted"), "{output:?}");
    assert_eq!(asked(&house), "");

    // Nor is a remote registry accessed unencrypted.
    let plain = Registry::start(&house, Asks::Nothing, false);
    let output = there(&format!("{husk} pull {NAME}:{}/app:1", plain.port));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}
