//! Small documents by GET: key sets, what a service knows.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, HOST, USER_AGENT};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use tokio::sync::Semaphore;

use super::body::RequestBody;
use super::pool::{self, Pool, SendError};
use super::url::Origin;
use crate::clock::Clock;

/// What can be set about fetching documents.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long one may take, from the wish to the last byte.
    pub timeout: Duration,
    /// The longest that is read, in bytes.
    pub most_bytes: usize,
    /// How many are fetched at once; others wait, as long as they may.
    pub at_once: usize,
    /// An `Authorization` field to send.
    pub authorization: Option<HeaderValue>,
}

/// Documents of one server. Redirects are not followed.
#[derive(Debug)]
pub struct Documents {
    pool: Pool<Empty<Bytes>>,
    host: Option<HeaderValue>,
    places: Semaphore,
    options: Options,
}

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It took too long, or nobody else was done in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The server could not be reached, or broke off.
    #[error(transparent)]
    Send(SendError),
    /// The answer broke off.
    #[error("the answer broke off")]
    Broken,
    /// The answer is longer than any should be.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
    /// No path that could be asked for.
    #[error("`{0}` is no path")]
    Path(String),
}

impl Documents {
    /// Documents of `origin`.
    pub fn new(origin: Origin, options: Options, clock: Arc<dyn Clock>) -> Self {
        let connections = pool::Options { connect_timeout: options.timeout, ..pool::Options::default() };
        let host = HeaderValue::try_from(origin.authority()).ok();
        let places = Semaphore::new(options.at_once);
        Self { pool: Pool::new(origin, &connections, clock), host, places, options }
    }

    /// Status and body of the answer to a GET of `target`, a path with or without a query.
    ///
    /// # Errors
    ///
    /// [`FetchError`].
    pub async fn get(&self, target: &str) -> Result<(StatusCode, Bytes), FetchError> {
        let limit = self.options.timeout;
        tokio::time::timeout(limit, self.fetch(target)).await.unwrap_or(Err(FetchError::Timeout(limit)))
    }

    async fn fetch(&self, target: &str) -> Result<(StatusCode, Bytes), FetchError> {
        // Nobody closes the semaphore; without a place nothing is worse than one fetch more.
        let _place = self.places.acquire().await.ok();
        let mut request = Request::new(RequestBody::none());
        *request.uri_mut() = target.parse().map_err(|_| FetchError::Path(target.to_owned()))?;
        let headers = request.headers_mut();
        headers.extend(self.host.clone().map(|host| (HOST, host)));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json, application/*+json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("export-gate/", env!("CARGO_PKG_VERSION"))));
        headers.extend(self.options.authorization.clone().map(|value| (AUTHORIZATION, value)));
        let answer = self.pool.send(&mut Some(request)).await.map_err(FetchError::Send)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), self.options.most_bytes).collect().await;
        let body = body.map_err(|error| match error.is::<LengthLimitError>() {
            true => FetchError::TooLong(self.options.most_bytes),
            false => FetchError::Broken,
        })?;
        Ok((status, body.to_bytes()))
    }
}
