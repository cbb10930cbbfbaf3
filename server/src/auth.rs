//! Keys: read from files or the environment, compared in constant time, never logged.

use crate::config::Secret;
use crate::openai::errors::ApiError;
use anyhow::{Context, Result, bail};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// What is kept of a key.
pub type KeyDigest = [u8; 32];

/// The keys that one listener accepts. Only their digests are kept: equal lengths to compare, and nothing to leak.
#[derive(Debug, Clone)]
pub struct Keys {
    digests: Vec<KeyDigest>,
    /// What the key is called in messages.
    what: &'static str,
}

impl Keys {
    /// Reads keys from a file (one a line; `#` starts a comment) and from a list.
    ///
    /// # Errors
    /// A file that can't be read or has no key in it: an API must not be open by accident.
    pub fn read(what: &'static str, file: Option<&Path>, given: &[Secret]) -> Result<Self> {
        let mut digests: Vec<_> = given.iter().map(|k| k.expose().trim()).filter(|k| !k.is_empty()).map(digest).collect();
        if let Some(file) = file {
            let text = std::fs::read_to_string(file).with_context(|| format!("the file of the {what}, {}", file.display()))?;
            let before = digests.len();
            digests.extend(text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(digest));
            if digests.len() == before {
                bail!("the file of the {what}, {}, has no key in it: put one on a line, or leave the option away for an open API", file.display());
            }
        }
        Ok(Self { digests, what })
    }

    /// No key is needed.
    pub fn is_open(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whose request it is, of one that [`Self::check`] let through; everyone is the same where no key is needed.
    pub fn owner(&self, headers: &HeaderMap) -> KeyDigest {
        if self.is_open() { KeyDigest::default() } else { bearer(headers).unwrap_or_default() }
    }

    /// Looks at the `Authorization: Bearer` header.
    ///
    /// # Errors
    /// 401 when the key is missing or wrong.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_open() {
            return Ok(());
        }
        let Some(found) = bearer(headers) else {
            return Err(ApiError::unauthorized(format!("an {} is needed: send it as \"Authorization: Bearer KEY\"", self.what)));
        };
        // all keys are compared, whichever fits
        let known = self.digests.iter().fold(Choice::from(0), |known, key| known | key.ct_eq(&found));
        if bool::from(known) { Ok(()) } else { Err(ApiError::unauthorized(format!("this {} is not known", self.what))) }
    }
}

/// The key of an `Authorization: Bearer` header.
fn bearer(headers: &HeaderMap) -> Option<KeyDigest> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (_, token) = value.split_first_chunk::<7>().filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))?;
    Some(digest_bytes(token.trim_ascii()))
}

fn digest(key: &str) -> KeyDigest {
    digest_bytes(key.as_bytes())
}

fn digest_bytes(key: &[u8]) -> KeyDigest {
    Sha256::digest(key).into()
}

/// Lets requests with a known key through.
pub async fn require_key(State(keys): State<Arc<Keys>>, request: Request, next: Next) -> Response {
    match keys.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        headers
    }

    #[test]
    fn a_known_key_passes_and_nothing_else_does() {
        let keys = Keys::read("API key", None, &["one".into(), "two".into()]).unwrap();
        assert!(keys.check(&headers("Bearer one")).is_ok());
        assert!(keys.check(&headers("bearer  two ")).is_ok());
        for wrong in ["Bearer three", "Bearer ", "Bearer on", "one", "Basic one", "Bearer one two"] {
            assert!(keys.check(&headers(wrong)).is_err(), "{wrong}");
        }
        assert!(keys.check(&HeaderMap::new()).is_err());
    }

    #[test]
    fn without_keys_everything_passes() {
        let keys = Keys::read("API key", None, &[]).unwrap();
        assert!(keys.is_open() && keys.check(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn a_file_has_a_key_a_line_and_must_have_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("keys");
        std::fs::write(&file, "# ours\n\none\n two \n").unwrap();
        let keys = Keys::read("API key", Some(&file), &[]).unwrap();
        assert!(keys.check(&headers("Bearer two")).is_ok() && keys.check(&headers("Bearer # ours")).is_err());
        std::fs::write(&file, "# none yet\n").unwrap();
        assert!(Keys::read("API key", Some(&file), &[]).is_err());
        assert!(Keys::read("API key", Some(&directory.path().join("missing")), &[]).is_err());
    }

    #[test]
    fn printing_keys_shows_no_key() {
        let keys = Keys::read("API key", None, &["sk-very-secret".into()]).unwrap();
        assert!(!format!("{keys:?}").contains("secret"));
    }
}
