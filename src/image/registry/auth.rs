//! Authenticates to registries: with a user name and password, or with a token obtained for them (Docker's token
//! authentication, which registries have in common).

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use ureq::Agent;
use ureq::http::Uri;

use super::credentials::Credential;
use super::outside::Outside;
use super::{Body, is_loopback, retry};
use crate::image::reference::Reference;

const TOKEN_MAX_BYTES: u64 = 256 << 10;

/// The credentials for a registry.
pub struct Auth {
    reference: Reference,
    scope: String,
    header: Mutex<Option<String>>,
    outside: Arc<dyn Outside>,
}

impl Auth {
    /// No credentials are sent until the registry requests them.
    pub fn new(reference: &Reference, outside: Arc<dyn Outside>) -> Auth {
        let scope = format!("repository:{}:pull", reference.repository);
        Auth { reference: reference.clone(), scope, header: Mutex::new(None), outside }
    }

    /// The value of the `Authorization` header.
    pub fn header(&self) -> Option<String> {
        self.header.lock().ok()?.clone()
    }

    /// Determines the credentials from a response with status 401.
    pub fn answer(&self, agent: &Agent, response: &Body) -> Result<()> {
        let challenges: Vec<Challenge> = response
            .headers()
            .get_all("www-authenticate")
            .iter()
            .filter_map(|value| Challenge::parse(value.to_str().ok()?))
            .collect();
        let credential = self.outside.credential()?;
        let server = &self.reference.registry;
        let header = if let Some(challenge) = challenges.iter().find(|found| found.scheme == "bearer") {
            format!("Bearer {}", self.token(agent, challenge, credential)?)
        } else if challenges.iter().any(|found| found.scheme == "basic") {
            let login = || format!("{server} requires a username and password: run `husk login {server}`");
            basic(&credential.with_context(login)?)
                .with_context(|| format!("{server} requires a username and password, not a token"))?
        } else {
            bail!("{server} denied access without an authentication challenge");
        };
        *self.header.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(header);
        Ok(())
    }

    /// Requests a token from the issuer specified by a registry.
    fn token(&self, agent: &Agent, challenge: &Challenge, credential: Option<Credential>) -> Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let realm = challenge.get("realm").context("the registry does not name a token server")?;
        ensure!(
            may_ask(realm, &self.reference.registry),
            "the registry's token server is {realm:?}, which is not encrypted"
        );
        let service = challenge.get("service").unwrap_or_default();
        let scope = challenge.get("scope").unwrap_or(&self.scope);
        let ask = || match &credential {
            Some(Credential::IdentityToken(token)) => agent.post(realm).send_form([
                ("grant_type", "refresh_token"),
                ("service", service),
                ("scope", scope),
                ("client_id", "husk"),
                ("refresh_token", token),
            ]),
            _ => {
                let mut request = agent.get(realm).query("service", service);
                // To log in, nothing is asked for.
                if !self.reference.repository.is_empty() {
                    request = request.query("scope", scope);
                }
                if let Some(header) = credential.as_ref().and_then(basic) {
                    request = request.header("Authorization", header);
                }
                request.call()
            }
        };
        let asked = || ask().map_err(super::plain).with_context(|| format!("request a token from {realm}"));
        let mut response = retry::with_backoff(realm, asked)?;
        ensure!(
            response.status().is_success(),
            "{realm} denied the token ({}): run `husk login {}` again",
            response.status(),
            self.reference.registry
        );
        let body = response.body_mut().with_config().limit(TOKEN_MAX_BYTES).read_to_vec()?;
        let answer: Answer = serde_json::from_slice(&body).with_context(|| format!("read the token from {realm}"))?;
        answer.token.or(answer.access_token).with_context(|| format!("{realm} sent no token"))
    }
}

/// A password is not sent unencrypted to an issuer, unless both the issuer and the registry are on this host.
fn may_ask(realm: &str, registry: &str) -> bool {
    let Ok(uri) = realm.parse::<Uri>() else { return false };
    match uri.scheme_str() {
        Some("https") => true,
        Some("http") => is_loopback(registry) && uri.host().is_some_and(is_loopback),
        _ => false,
    }
}

fn basic(credential: &Credential) -> Option<String> {
    match credential {
        Credential::Password { user, password } => {
            Some(format!("Basic {}", base64(format!("{user}:{password}").as_bytes())))
        }
        Credential::IdentityToken(_) => None,
    }
}

/// RFC 4648.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().chain([&0; 2]).take(3).fold(0usize, |word, &byte| word << 8 | usize::from(byte));
        for place in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * place)) & 63];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// A registry's challenge, as in RFC 9110: `Bearer realm="...",service="..."`.
pub struct Challenge {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// Parses the value of `WWW-Authenticate`.
    pub fn parse(text: &str) -> Option<Challenge> {
        let (scheme, mut rest) = text.trim().split_once(' ')?;
        let mut parameters = Vec::new();
        while let Some((key, after)) = rest.split_once('=') {
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_at(after.find(',').unwrap_or(after.len())),
            };
            parameters.push((key.trim().to_ascii_lowercase(), value.to_owned()));
            rest = after.trim_start().strip_prefix(',').unwrap_or_default();
        }
        Some(Challenge { scheme: scheme.to_ascii_lowercase(), parameters })
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.parameters.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_a_scheme_and_parameters() {
        let text = r#"Bearer realm="https://auth.example/token", service=registry,scope="repository:a/b:pull,push""#;
        let challenge = Challenge::parse(text).unwrap();
        assert_eq!(challenge.scheme, "bearer");
        assert_eq!(challenge.get("realm"), Some("https://auth.example/token"));
        assert_eq!(challenge.get("service"), Some("registry"));
        assert_eq!(challenge.get("scope"), Some("repository:a/b:pull,push"));
        assert!(Challenge::parse("Bearer").is_none() && Challenge::parse(r#"Bearer realm="x"#).is_none());
    }

    #[test]
    fn a_password_is_sent_in_the_clear_on_this_host_only() {
        for realm in ["https://auth.example/token", "http://localhost:5001/token", "http://127.0.0.1/token"] {
            assert!(may_ask(realm, "localhost:5000"), "{realm}");
        }
        for realm in
            ["http://auth.example/token", "http://localhost@auth.example/", "ftp://localhost/", "localhost", ""]
        {
            assert!(!may_ask(realm, "localhost:5000"), "{realm}");
        }
        assert!(!may_ask("http://localhost:5001/token", "registry.example"));
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, encoded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
