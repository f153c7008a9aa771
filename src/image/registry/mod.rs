//! A registry client for manifests and blobs (OCI distribution specification).
//!
//! Nothing from a registry is trusted: manifests requested by digest, configurations and blobs must match their digests
//! and sizes, and redirect targets and token issuers receive no more than they need.

mod auth;
mod credentials;
mod download;
mod fetch;
pub mod login;
mod outside;
mod pull;
mod push;
mod retry;
mod tags;
mod trust;
mod upload;

pub use self::auth::Challenge;
pub use self::credentials::parse as parse_credentials;
pub use self::outside::Question;
pub use self::pull::{Pulled, find_in};
pub use self::push::Pushed;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ureq::config::{Config, ConfigBuilder, RedirectAuthHeaders};
use ureq::http::{Response, StatusCode, Uri};
use ureq::tls::TlsConfig;
use ureq::typestate::AgentScope;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, ResponseExt};

use self::auth::Auth;
use self::outside::Outside;
use super::config::{ImageConfig, JSON_MAX_BYTES};
use super::digest::Digest;
use super::manifest::{self, Descriptor, MAX_INDEX_DEPTH, Manifest, Platform};
use super::reference::Reference;

const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// The timeout of a stalled response, after which the request is retried or fails. A response that makes progress may
/// take any time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Registries redirect blobs to storage, with few hops.
const REDIRECTIONS_MAX: u32 = 5;
/// The capacity of [`ResolvedSocketAddrs`].
const ADDRESSES_MAX: usize = 16;
/// The timeout for content read into memory, sufficient for the slowest connections.
const SMALL_TIMEOUT: Duration = Duration::from_secs(300);

type Body = Response<ureq::Body>;

/// An error of the HTTP client; one of the system without the client's words around it.
fn plain(error: ureq::Error) -> anyhow::Error {
    match error {
        ureq::Error::Io(error) => error.into(),
        other => other.into(),
    }
}

/// The configuration of a client, read where files and the environment are at hand.
pub struct Client {
    reference: Reference,
    config: Config,
}

/// A repository in a registry.
pub struct Registry {
    agent: Agent,
    reference: Reference,
    base: String,
    auth: Auth,
    outside: Arc<dyn Outside>,
}

/// Resolves names outside, where the files are that say how.
struct Names(Arc<dyn Outside>);

/// The verified description of an image in a registry.
#[derive(Debug, Clone)]
pub struct RemoteImage {
    /// The digest of its configuration.
    pub id: Digest,
    /// The configuration.
    pub config: ImageConfig,
    /// The configuration as it was read.
    pub config_json: Vec<u8>,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// The digest of its manifest or index.
    pub digest: Digest,
}

/// The client configuration, with `stall` as the timeout without any data. Credentials are not sent to redirect
/// targets.
fn config(stall: Duration) -> ConfigBuilder<AgentScope> {
    Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("husk/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(ANSWER_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_per_read(Some(stall))
        .timeout_per_write(Some(stall))
        .max_redirects(REDIRECTIONS_MAX)
        .redirect_auth_headers(RedirectAuthHeaders::Never)
}

impl Client {
    /// The configuration for the registry of an image: proxies and certificates. Only a registry on this host is accessed
    /// without TLS, if it does not support it.
    pub fn new(reference: &Reference) -> Client {
        let registry = reference.registry.as_str();
        let roots = TlsConfig::builder().root_certs(trust::roots(registry)).build();
        let mut config = config(ANSWER_TIMEOUT).https_only(!is_loopback(registry)).tls_config(roots);
        if is_loopback(registry) {
            config = config.proxy(None);
        }
        Client { reference: reference.clone(), config: config.build() }
    }
}

impl RemoteImage {
    /// Finds the image that `reference` names, in documents that `read` gets: an index or a manifest, which leads to further ones
    /// and to a configuration. All but the first are verified by their digests, and it as well if the reference has one.
    pub fn find(
        reference: &Reference,
        platform: &Platform,
        read: &mut dyn FnMut(Document<'_>) -> Result<Vec<u8>>,
    ) -> Result<RemoteImage> {
        let mut version = reference.version();
        let mut expected = version.parse::<Digest>().ok();
        let mut digest = None;
        for _ in 0..=MAX_INDEX_DEPTH {
            let json = read(Document::Manifest(&version))?;
            let found = Digest::of(&json);
            if let Some(expected) = expected {
                ensure!(found == expected, "the registry sent {found} for {expected}");
            }
            let digest = *digest.get_or_insert(found);
            match Manifest::parse(&json)? {
                Manifest::Index(manifests) => {
                    let chosen = manifest::choose(&manifests, platform)?;
                    (version, expected) = (chosen.digest.to_string(), Some(chosen.digest));
                }
                Manifest::Image { config, layers } => return RemoteImage::of_manifest(&config, layers, digest, read),
            }
        }
        bail!("indexes are nested more than {MAX_INDEX_DEPTH} levels deep")
    }

    fn of_manifest(
        descriptor: &Descriptor,
        layers: Vec<Descriptor>,
        digest: Digest,
        read: &mut dyn FnMut(Document<'_>) -> Result<Vec<u8>>,
    ) -> Result<RemoteImage> {
        let (id, size) = (descriptor.digest, descriptor.size);
        ensure!(size <= JSON_MAX_BYTES, "a configuration of {size} bytes is too large");
        let json = read(Document::Config(id))?;
        let found = Digest::of(&json);
        ensure!(found == id && json.len() as u64 == size, "the registry sent the wrong configuration for {id}");
        let config = ImageConfig::parse(&json)?;
        let (count, described) = (config.diff_ids.len(), layers.len());
        ensure!(count == described, "its configuration has {count} layers, its manifest has {described}");
        Ok(RemoteImage { id, config, config_json: json, layers, digest })
    }
}

/// A document that describes an image.
pub enum Document<'a> {
    /// An index or a manifest, by its tag or digest.
    Manifest(&'a str),
    /// The configuration with this digest.
    Config(Digest),
}

impl Registry {
    /// The repository of an image.
    pub fn new(client: Client, outside: Arc<dyn Outside>) -> Result<Registry> {
        let Client { reference, config } = client;
        let registry = reference.registry.as_str();
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let agent = Agent::with_parts(config, DefaultConnector::default(), Names(outside.clone()));
        let scheme = if is_loopback(registry) && !speaks_tls(&agent, host) { "http" } else { "https" };
        Ok(Registry {
            agent,
            // Without a repository it is that of the registry itself.
            base: format!("{scheme}://{host}/v2/{}", reference.repository),
            auth: Auth::new(&reference, outside.clone()),
            reference,
            outside,
        })
    }

    /// Finds the image for a platform. Returns also the documents that describe it, in the order in which they were read.
    pub fn image(&self, platform: &Platform) -> Result<(RemoteImage, Vec<String>)> {
        let mut documents = Vec::new();
        let image = RemoteImage::find(&self.reference, platform, &mut |document| {
            let json = match document {
                Document::Manifest(version) => self.small(&format!("manifests/{version}"), MANIFEST_TYPES)?,
                Document::Config(digest) => self.small(&format!("blobs/{digest}"), "*/*")?,
            };
            documents.push(String::from_utf8(json.clone()).context("the registry sent a document that is not UTF-8")?);
            Ok(json)
        })?;
        Ok((image, documents))
    }

    fn small(&self, path: &str, accept: &str) -> Result<Vec<u8>> {
        let mut response = self.get(path, accept, 0, Some(SMALL_TIMEOUT))?;
        let body = response.body_mut().with_config().limit(JSON_MAX_BYTES).read_to_vec();
        body.with_context(|| format!("read {}/{path}", self.base))
    }

    /// Requests a path of the repository, starting at a byte offset, with credentials; limited to `timeout` if given.
    fn get(&self, path: &str, accept: &str, from_byte: u64, timeout: Option<Duration>) -> Result<Body> {
        let url = format!("{}/{path}", self.base);
        let ask = |url: &str| -> Result<Body> {
            let request = self.agent.get(url).config().timeout_recv_body(timeout).build();
            let mut request = request.header("Accept", accept);
            if let Some(authorization) = self.auth.header() {
                request = request.header("Authorization", authorization);
            }
            if from_byte > 0 {
                request = request.header("Range", format!("bytes={from_byte}-"));
            }
            request.call().map_err(plain).with_context(|| format!("request {url}"))
        };
        let response =
            self.ask_as_user(url.clone(), |url| retry::with_backoff(&self.reference.registry, || ask(url)))?;
        self.check(response, path)
    }

    /// Sends a request, with credentials if the registry requires them. They are also sent to redirect targets within
    /// the same origin, but to no others.
    fn ask_as_user(&self, mut url: String, ask: impl Fn(&str) -> Result<Body>) -> Result<Body> {
        let mut has_answered = false;
        let mut response = ask(&url)?;
        for _ in 0..=REDIRECTIONS_MAX {
            if response.status() != StatusCode::UNAUTHORIZED {
                break;
            }
            let asker = response.get_uri();
            ensure!(
                origin(asker) == origin(&self.base.parse()?),
                "{} redirected to {}, which requires authentication: credentials are sent only to {0}",
                self.reference.registry,
                origin(asker).concat()
            );
            let asker = asker.to_string();
            let was_told = asker == url;
            if was_told && has_answered {
                break;
            }
            if was_told || self.auth.header().is_none() {
                self.auth.answer(&self.agent, &response)?;
                has_answered = true;
            }
            response = ask(&asker)?;
            url = asker;
        }
        Ok(response)
    }

    fn check(&self, mut response: Body, path: &str) -> Result<Body> {
        let status = response.status();
        if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let name = &self.reference;
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => bail!(
                "{} denied access to {}: check the name, or run `husk login {}`",
                name.registry,
                name.familiar(),
                name.registry
            ),
            StatusCode::NOT_FOUND => bail!("{} does not have {}", name.registry, name.familiar()),
            StatusCode::TOO_MANY_REQUESTS => {
                let after = retry::after(response.headers()).filter(|after| !after.is_zero());
                let time = after.map_or(String::new(), |after| format!(" for {} s", after.as_secs()));
                bail!("{} does not accept more requests{time}: log in, or wait", name.registry)
            }
            _ => {
                let body = response.body_mut().with_config().limit(300).lossy_utf8(true).read_to_string();
                let body: String = body.unwrap_or_default().chars().take(200).collect();
                bail!("{} responded to {path} with {status} {body}", name.registry)
            }
        }
    }
}

/// The origin of an address: credentials are valid only for the same origin.
fn origin(uri: &Uri) -> [&str; 3] {
    let scheme = uri.scheme_str().unwrap_or_default();
    [scheme, "://", uri.authority().map_or("", |authority| authority.as_str())]
}

/// Whether a registry is on this host.
fn is_loopback(registry: &str) -> bool {
    let host = registry.split(':').next().unwrap_or_default();
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Names")
    }
}

impl Resolver for Names {
    fn resolve(&self, uri: &Uri, config: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(ureq::Error::HostNotFound);
        };
        let host = DefaultResolver::host_and_port(scheme, authority).ok_or(ureq::Error::HostNotFound)?;
        let found = self.0.addresses(&host).map_err(|error| io::Error::other(format!("{error:#}")))?;
        let mut addresses = self.empty();
        // As many as there is room for.
        let family = config.ip_family();
        family.keep_wanted(found.into_iter()).take(ADDRESSES_MAX).for_each(|address| addresses.push(address));
        if addresses.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(addresses) }
    }
}

/// Whether a registry on this host requires TLS, which shows when it does not understand a plain request.
fn speaks_tls(agent: &Agent, host: &str) -> bool {
    match agent.get(format!("http://{host}/v2/")).call() {
        Ok(response) => response.status() == StatusCode::BAD_REQUEST,
        Err(error) => matches!(error, ureq::Error::Protocol(_)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// Sends ten bytes with a pause before each.
    fn drip(mut stream: TcpStream, pause: Duration) -> io::Result<()> {
        let _request_bytes = stream.read(&mut [0; 4096])?;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")?;
        for _ in 0..10 {
            std::thread::sleep(pause);
            stream.write_all(b"x")?;
        }
        Ok(())
    }

    #[test]
    fn a_slow_body_is_accepted_but_not_a_stalled_one() {
        const STALL: Duration = Duration::from_secs(1);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let agent: Agent = config(STALL).proxy(None).build().into();
        let body = |pause: Duration| {
            std::thread::scope(|scope| {
                scope.spawn(|| drip(listener.accept().unwrap().0, pause));
                agent.get(&url).header("Connection", "close").call().unwrap().body_mut().read_to_vec()
            })
        };
        assert_eq!(body(STALL / 6).unwrap(), [b'x'; 10]);
        let error = body(STALL * 2).unwrap_err().to_string();
        assert!(error.contains("timeout"), "{error}");
    }

    #[test]
    fn only_localhost_is_accessed_without_tls() {
        for (registry, expected) in [
            ("localhost:5000", true),
            ("localhost", true),
            ("127.0.0.1:5000", true),
            ("127.1.2.3", true),
            ("localhost.example.com", false),
            ("128.0.0.1", false),
            ("quay.io", false),
        ] {
            assert_eq!(is_loopback(registry), expected, "{registry}");
        }
    }
}
