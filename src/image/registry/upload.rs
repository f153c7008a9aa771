//! Uploads blobs and manifests (OCI distribution specification, "Push").

use std::io::{Cursor, Read};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ureq::SendBody;
use ureq::http::{Method, Request, StatusCode};

use super::{Body, Registry, origin, retry};
use crate::image::bundle::Part;
use crate::image::digest::Digest;
use crate::image::tar::Skip;

/// Larger blobs are sent in chunks of this size, each of which can be repeated.
const CHUNK_BYTES: u64 = 16 << 20;
/// How often a blob is tried, and a chunk without any progress.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// A registry hashes a blob before it answers.
const STORE_TIMEOUT: Duration = Duration::from_secs(300);

/// A blob to be uploaded.
pub struct Upload<'a> {
    /// Its digest.
    pub digest: Digest,
    /// Its content.
    pub content: &'a Part,
    /// A repository of the same registry that may have it.
    pub source: Option<&'a String>,
}

/// The body of a request.
#[derive(Clone, Copy)]
enum Content<'a> {
    Nothing,
    Bytes(&'a [u8]),
    /// So many bytes of a file, from an offset on.
    Range(&'a Part, u64, u64),
}

impl Content<'_> {
    fn len_bytes(self) -> u64 {
        match self {
            Content::Nothing => 0,
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Range(_, _, len_bytes) => len_bytes,
        }
    }

    /// A reader, anew for each attempt.
    fn reader(self) -> Result<Box<dyn Read>> {
        Ok(match self {
            Content::Nothing => Box::new(std::io::empty()),
            Content::Bytes(bytes) => Box::new(Cursor::new(bytes.to_vec())),
            Content::Range(part, from_byte, len_bytes) => {
                let mut part = part.clone();
                part.skip(from_byte)?;
                Box::new(part.take(len_bytes))
            }
        })
    }
}

impl Registry {
    /// Uploads a blob, unless the registry has it. `sent` gets the number of bytes sent so far.
    pub fn upload(&self, upload: &Upload<'_>, sent: &mut dyn FnMut(u64)) -> Result<()> {
        let put = || -> Result<()> {
            if self.has_blob(upload.digest)? {
                log::info!("{}: the registry has it", upload.digest.short());
                return Ok(());
            }
            let Some(session) = self.begin(upload.digest, upload.source)? else {
                log::info!("{}: mounted from another repository", upload.digest.short());
                return Ok(());
            };
            let size_bytes = upload.content.size_bytes;
            if size_bytes <= CHUNK_BYTES {
                return self.finish(&session, upload.digest, Content::Range(upload.content, 0, size_bytes));
            }
            let session = self.send_chunks(session, upload.content, sent)?;
            self.finish(&session, upload.digest, Content::Nothing)
        };
        again(put).with_context(|| format!("upload {}", upload.digest))
    }

    /// Uploads a small blob.
    pub fn upload_bytes(&self, bytes: &[u8]) -> Result<()> {
        let digest = Digest::of(bytes);
        let put = || -> Result<()> {
            if self.has_blob(digest)? {
                return Ok(());
            }
            match self.begin(digest, None)? {
                Some(session) => self.finish(&session, digest, Content::Bytes(bytes)),
                None => Ok(()),
            }
        };
        again(put).with_context(|| format!("upload {digest}"))
    }

    /// Uploads a manifest with this tag.
    pub fn put_manifest(&self, tag: &str, media_type: &str, json: &[u8]) -> Result<()> {
        let url = format!("{}/manifests/{tag}", self.base);
        let headers = [("Content-Type", media_type.to_owned())];
        let response = self.request(&Method::PUT, &url, &headers, Content::Bytes(json))?;
        self.check(response, &format!("manifests/{tag}")).map(drop)
    }

    /// Fails unless the registry accepts the credentials.
    pub fn ping(&self) -> Result<()> {
        let response = self.request(&Method::GET, &self.base, &[], Content::Nothing)?;
        let (registry, status) = (&self.reference.registry, response.status());
        ensure!(status != StatusCode::UNAUTHORIZED, "{registry} does not accept this user name and password");
        ensure!(status.is_success(), "{registry} responded with {status}");
        Ok(())
    }

    fn has_blob(&self, digest: Digest) -> Result<bool> {
        let path = format!("blobs/{digest}");
        let response = self.request(&Method::HEAD, &format!("{}/{path}", self.base), &[], Content::Nothing)?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(false);
        }
        self.check(response, &path).map(|_| true)
    }

    /// Begins an upload and returns its address; `None` if the blob was mounted from `source`.
    fn begin(&self, digest: Digest, source: Option<&String>) -> Result<Option<String>> {
        let mount = source.map(|source| format!("?mount={digest}&from={source}")).unwrap_or_default();
        let url = format!("{}/blobs/uploads/{mount}", self.base);
        let response = self.request(&Method::POST, &url, &[], Content::Nothing)?;
        let response = self.check(response, "blobs/uploads/")?;
        if response.status() == StatusCode::CREATED {
            return Ok(None);
        }
        self.location(&response).map(Some)
    }

    /// Sends a blob in chunks, and returns the address with which to finish it.
    fn send_chunks(&self, mut session: String, content: &Part, sent: &mut dyn FnMut(u64)) -> Result<String> {
        let (mut at, mut attempts) = (0, 0);
        while at < content.size_bytes {
            let len_bytes = CHUNK_BYTES.min(content.size_bytes - at);
            let range = format!("{at}-{}", at + len_bytes - 1);
            let headers = [("Content-Range", range), ("Content-Type", "application/octet-stream".into())];
            let chunk = Content::Range(content, at, len_bytes);
            match self.request(&Method::PATCH, &session, &headers, chunk) {
                Ok(response) if response.status().is_success() => {
                    session = self.location(&response)?;
                    (at, attempts) = (at + len_bytes, 0);
                    sent(at);
                }
                failed => {
                    attempts += 1;
                    if attempts >= ATTEMPTS {
                        return self.check(failed?, "blobs/uploads/").map(|_| session);
                    }
                    std::thread::sleep(PAUSE * attempts);
                    (at, session) = self.received(&session)?;
                }
            }
        }
        Ok(session)
    }

    /// How much of an upload the registry has, and where to go on.
    fn received(&self, session: &str) -> Result<(u64, String)> {
        let response = self.check(self.request(&Method::GET, session, &[], Content::Nothing)?, "blobs/uploads/")?;
        let range = response.headers().get("range").and_then(|range| range.to_str().ok());
        let last = range.and_then(|range| range.trim_start_matches("bytes=").split_once('-')?.1.parse::<u64>().ok());
        Ok((last.map_or(0, |last| if last == 0 { 0 } else { last + 1 }), self.location(&response)?))
    }

    fn finish(&self, session: &str, digest: Digest, content: Content<'_>) -> Result<()> {
        let url = format!("{session}{}digest={digest}", if session.contains('?') { '&' } else { '?' });
        let headers = [("Content-Type", "application/octet-stream".to_owned())];
        let response = self.request(&Method::PUT, &url, &headers, content)?;
        self.check(response, "blobs/uploads/").map(drop)
    }

    /// Where an upload goes on: an absolute address, or a path in this registry.
    fn location(&self, response: &Body) -> Result<String> {
        let location = response.headers().get("location").and_then(|location| location.to_str().ok());
        let location = location.context("the registry does not say where to upload to")?;
        match location {
            path if path.starts_with('/') => Ok(origin(&self.base.parse()?).concat() + path),
            url if url.starts_with("https://") || url.starts_with("http://") => Ok(url.to_owned()),
            other => bail!("the registry wants an upload at {other:?}"),
        }
    }

    /// Sends a request, again if the registry is busy, with credentials if it requires them.
    fn request(&self, method: &Method, url: &str, headers: &[(&str, String)], content: Content<'_>) -> Result<Body> {
        let ask = |url: &str| -> Result<Body> {
            let mut request = Request::builder().method(method).uri(url);
            for (name, value) in headers {
                request = request.header(*name, value);
            }
            // The credentials are for this registry, not for where it stores uploads.
            let is_own = origin(&url.parse()?) == origin(&self.base.parse()?);
            if let Some(authorization) = self.auth.header().filter(|_| is_own) {
                request = request.header("Authorization", authorization);
            }
            let has_body = method != Method::GET && method != Method::HEAD;
            let response = if has_body {
                request = request.header("Content-Length", content.len_bytes());
                let request = request.body(SendBody::from_owned_reader(content.reader()?))?;
                self.agent.run(self.agent.configure_request(request).timeout_recv_response(Some(STORE_TIMEOUT)).build())
            } else {
                self.agent.run(request.body(())?)
            };
            response.with_context(|| format!("request {url}"))
        };
        self.ask_as_user(url.to_owned(), |url| retry::with_backoff(&self.reference.registry, || ask(url)))
    }
}

/// Tries again if the connection failed.
fn again(mut act: impl FnMut() -> Result<()>) -> Result<()> {
    for attempt in 1..ATTEMPTS {
        match act() {
            Err(error) if error.is::<ureq::Error>() => {
                log::info!("{error:#}: trying again");
                std::thread::sleep(PAUSE * attempt);
            }
            result => return result,
        }
    }
    act()
}
