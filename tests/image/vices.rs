//! Registries that are busy or slow, or that redirect.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::server::{AUTH, image};
use crate::tools::House;

/// A response: status line, headers and body.
type Answer = (&'static str, Vec<String>, Vec<u8>);

/// A request: the path, and the `Authorization` header.
struct ReceivedRequest {
    path: String,
    authorization: Option<String>,
}

/// Serves requests on a local port, each on a separate connection.
fn serve(answer: impl Fn(&ReceivedRequest) -> Answer + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, answer) = (stream.unwrap(), answer.clone());
            std::thread::spawn(move || answer_one(stream, &*answer));
        }
    });
    port
}

fn answer_one(mut stream: TcpStream, answer: &(impl Fn(&ReceivedRequest) -> Answer + ?Sized)) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let field = |line: &String| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("authorization").then(|| value.to_owned())
    };
    let (status, headers, body) = answer(&ReceivedRequest { path, authorization: head.iter().find_map(field) });
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{headers}Connection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(&body).ok()
}

fn ok(body: Vec<u8>) -> Answer {
    ("200 OK", Vec::new(), body)
}

/// The registry's content at `path`: the image in `layout`, under every name.
fn content(layout: &Path, path: &str) -> Answer {
    let read = |name: &str| fs::read(layout.join(name)).map_or_else(|_| ("404 Not Found", Vec::new(), Vec::new()), ok);
    match path.rsplit('/').next().unwrap().strip_prefix("sha256:") {
        Some(hex) => read(&format!("blobs/sha256/{hex}")),
        None if path.contains("/manifests/") => read("index.json"),
        None => ok(b"{}".to_vec()),
    }
}

/// The number of requests for each path.
#[derive(Default)]
struct Counts(Mutex<HashMap<String, u32>>);

impl Counts {
    fn one_more(&self, path: &str) -> u32 {
        let mut counts = self.0.lock().unwrap();
        let count = counts.entry(path.to_owned()).or_default();
        *count += 1;
        *count
    }
}

fn named(port: u16) -> String {
    format!("127.0.0.1:{port}/app:1")
}

#[test]
fn a_busy_registry_is_retried() {
    let house = House::new();
    image(&house);
    let (layout, counts) = (house.path("layout"), Counts::default());
    let port = serve(move |asked| {
        let count = counts.one_more(&asked.path);
        match &asked.path {
            path if path.contains("/manifests/1") && count <= 2 => {
                ("429 Too Many Requests", vec!["Retry-After: 1".into()], b"slow".to_vec())
            }
            path if path.contains("/blobs/") && count == 1 => ("503 Service Unavailable", Vec::new(), b"busy".to_vec()),
            path => content(&layout, path),
        }
    });
    let output = house.husk(&["pull", &named(port)]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}");
    assert!(printed.contains("responded with 429 Too Many Requests: retrying in 1 s"), "{printed}");
    assert!(printed.contains("responded with 503 Service Unavailable: retrying in 2 s"), "{printed}");
}

#[test]
fn a_permanently_busy_registry_is_an_error() {
    let house = House::new();
    let asked_for = Arc::new(Counts::default());
    let busy = |status: &'static str, after: &'static str| {
        let counts = asked_for.clone();
        serve(move |asked| {
            if asked.path == "/v2/" {
                return ok(b"{}".to_vec());
            }
            counts.one_more(status);
            (status, vec![format!("Retry-After: {after}")], b"\x1b]0;owned\x07no".to_vec())
        })
    };
    let pull = |port: u16| {
        let output = house.husk(&["pull", &named(port)]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let printed = pull(busy("503 Service Unavailable", "0"));
    assert!(printed.ends_with("with 503 Service Unavailable \u{fffd}]0;owned\u{fffd}no\n"), "{printed:?}");
    let printed = pull(busy("429 Too Many Requests", "3600"));
    assert!(
        printed.ends_with("does not accept more requests for 3600 s: log in, or wait\n")
            && printed.lines().count() == 1,
        "{printed}"
    );
    let printed = pull(busy("501 Not Implemented", "0"));
    assert!(printed.contains("501") && printed.lines().count() == 1, "{printed}");
    let counts = asked_for.0.lock().unwrap();
    let times = |status: &str| counts[status];
    assert_eq!(
        [times("503 Service Unavailable"), times("429 Too Many Requests"), times("501 Not Implemented")],
        [5, 1, 1]
    );
}

#[test]
fn a_password_is_not_sent_to_redirect_targets() {
    let house = House::new();
    image(&house);
    let asks = || vec!["WWW-Authenticate: Basic realm=\"r\"".to_owned()];
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    // It requires authentication, like the registry.
    let elsewhere = serve(move |asked| {
        heard.lock().unwrap().extend(asked.authorization.clone());
        ("401 Unauthorized", asks(), Vec::new())
    });
    let at = move |port: u16, path: &str| vec![format!("Location: http://127.0.0.1:{port}{path}")];
    let layout = house.path("layout");
    let registry = serve(move |asked| {
        let path = &asked.path;
        match asked.authorization.as_deref() {
            _ if path == "/v2/" => ok(b"{}".to_vec()),
            // Redirects within the registry keep the credentials.
            Some(given) if given == format!("Basic {AUTH}") => match path.strip_prefix("/v2/app/") {
                Some(rest) => ("307 Temporary Redirect", vec![format!("Location: /v2/moved/{rest}")], Vec::new()),
                None if path.contains("/manifests/2") => ("307 Temporary Redirect", at(elsewhere, path), Vec::new()),
                None => content(&layout, path),
            },
            _ => ("401 Unauthorized", asks(), Vec::new()),
        }
    });
    house.sh("mkdir docker");
    let logins = format!(
        r#"{{"auths": {{"127.0.0.1:{registry}": {{"auth": "{AUTH}"}}, "127.0.0.1:{elsewhere}": {{"auth": "{AUTH}"}}}}}}"#
    );
    fs::write(house.path("docker/config.json"), logins).unwrap();
    house.refused(
        &["pull", &format!("127.0.0.1:{registry}/app:2")],
        &format!("redirected to http://127.0.0.1:{elsewhere}, which requires authentication"),
    );
    assert_eq!(*told.lock().unwrap(), Vec::<String>::new());
    let output = house.husk(&["pull", &format!("127.0.0.1:{registry}/app:1")]);
    assert!(output.status.success(), "{output:?}");
}
