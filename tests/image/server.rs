//! A real registry on this host: open, or with a password, TLS, or a token issuer.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::tools::House;

/// `user:secret`.
const HTPASSWD: &str = "user:$2b$04$bdrh7N.rIikEgRnSqAljuuv7BohxqgWKBkLNgpHAcSsWdVI4h72LG";
/// The same in Docker's configuration.
pub const AUTH: &str = "dXNlcjpzZWNyZXQ=";
/// The identity token accepted by the issuer in its place.
pub const IDENTITY: &str = "the-identity";
/// A name for this host that is not recognized as local.
pub const NAME: &str = "registry.test";

/// The authentication of a registry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    Nothing,
    Password,
    /// Tokens, from an issuer with this name, with or without TLS.
    Token {
        tls: bool,
        issuer: &'static str,
    },
}

/// A registry and its token issuer, terminated when dropped.
pub struct Registry {
    children: Vec<Child>,
    pub port: u16,
}

impl Registry {
    pub fn start(house: &House, asks: Asks, tls: bool) -> Registry {
        let port = free_port();
        let mut children = Vec::new();
        let auth = match asks {
            Asks::Nothing => String::new(),
            Asks::Password => "auth: {htpasswd: {realm: r, path: ./htpasswd}}\n".into(),
            Asks::Token { tls, issuer } => {
                let (child, issuer_port) = start_issuer(house, tls);
                children.push(child);
                let scheme = if tls { "https" } else { "http" };
                format!(
                    "auth: {{token: {{realm: '{scheme}://{issuer}:{issuer_port}/token', service: here, issuer: issuer, \
                     rootcertbundle: ./issuer.crt}}}}\n"
                )
            }
        };
        let tls = if tls { ", tls: {certificate: ./server.crt, key: ./server.key}" } else { "" };
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: ./registry}}}}\n\
             http: {{addr: '127.0.0.1:{port}'{tls}}}\n{auth}"
        );
        std::fs::write(house.path("htpasswd"), HTPASSWD).unwrap();
        std::fs::write(house.path("registry.yml"), config).unwrap();
        let mut command = Command::new("docker-registry");
        command.args(["serve", "registry.yml"]).current_dir(house.dir.path());
        children.push(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        await_port(port);
        Registry { children, port }
    }

    /// The name of a repository, with this host's address.
    pub fn name(&self, repository: &str) -> String {
        format!("127.0.0.1:{}/{repository}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start_issuer(house: &House, tls: bool) -> (Child, u16) {
    let port = free_port();
    house.sh("openssl req -x509 -newkey rsa:2048 -nodes -keyout issuer.key -out issuer.crt -days 2 -subj /CN=issuer");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/image/token_server.py");
    let mut command = Command::new("/usr/bin/python3");
    command.arg(script).arg(house.dir.path()).arg(port.to_string()).args(tls.then_some("tls"));
    let child = command.stdout(Stdio::null()).spawn().unwrap();
    await_port(port);
    (child, port)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn await_port(port: u16) {
    for _ in 0..200 {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("nobody listens on port {port}");
}

/// Creates a CA, `ca/ca.crt`, and a server certificate for this host, `server.crt`.
pub fn certificates(house: &House) {
    house.sh(
        "mkdir ca; openssl req -x509 -newkey rsa:2048 -nodes -keyout authority.key -out ca/ca.crt -days 2 -subj /CN=authority",
    );
    house.sh(&format!(
        "openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server; \
         echo subjectAltName=DNS:{NAME},IP:127.0.0.1 >extensions; \
         openssl x509 -req -in server.csr -CA ca/ca.crt -CAkey authority.key -CAcreateserial -days 2 -extfile extensions -out server.crt"
    ));
}

/// Creates an image in `layout` with two layers, the second of a few incompressible MiB.
pub fn image(house: &House) {
    house.sh("umoci init --layout layout; umoci new --image layout:app; mkdir one two; echo 1 >one/1");
    house.sh("head -c 8M /dev/urandom >two/2; for l in one two; do tar --numeric-owner -C $l -cf $l.tar .; umoci raw add-layer --image layout:app $l.tar; done");
    house.sh("umoci unpack --rootless --image layout:app bundle");
}

pub fn push(house: &House, registry: &Registry, repository: &str, has_tls: bool) {
    let tls = if has_tls { "--dest-cert-dir=ca" } else { "--dest-tls-verify=false" };
    house.sh(&format!(
        "skopeo copy -q {tls} --dest-creds user:secret oci:layout:app docker://{}",
        registry.name(repository)
    ));
}
