//! What is asked: which requests, in which order, by whom.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, HOST, HeaderMap, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Uri};

use crate::backend::{STALLS, Stalls};

/// Requests of one kind: the n-th of them takes the n-th path and the n-th user, round and round.
#[derive(Clone)]
pub(crate) struct Requests {
    pub(crate) method: Method,
    pub(crate) paths: Vec<Uri>,
    /// Empty: nobody says who they are.
    pub(crate) authorizations: Vec<HeaderValue>,
    pub(crate) leaves: Leaves,
    /// How many a user may have by the gate's configuration; `None`: they are not counted. Whoever has the same limit is the same user.
    pub(crate) limit: Option<u64>,
}

/// When the client leaves, and its connection with it. The backend goes so far and no further, so that where the client leaves does not
/// depend on who is faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaves {
    /// With the whole answer.
    Never,
    /// Without having got anything.
    BeforeHead,
    /// With a part of the image.
    MidBody,
}

impl Requests {
    pub(crate) fn get(paths: Vec<Uri>, authorizations: Vec<HeaderValue>) -> Self {
        Self { method: Method::GET, paths, authorizations, leaves: Leaves::Never, limit: None }
    }

    /// How many users ask; without tokens it is one that nobody knows.
    pub(crate) fn users(&self) -> usize {
        self.authorizations.len().max(1)
    }
}

/// What is asked: one request of each kind in turn, round and round.
#[derive(Clone)]
pub(crate) struct Mix {
    kinds: Arc<[Requests]>,
    headers: HeaderMap,
    /// Length of the body that a 200 has to bring.
    pub(crate) body_bytes: usize,
    /// How many requests of a kind a user sends before it is the next one's turn.
    in_a_row: u64,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    pub(crate) kind: usize,
    pub(crate) user: usize,
    /// The how manieth request of its kind it is.
    nth: u64,
}

impl Mix {
    pub(crate) fn new(kinds: Vec<Requests>, body_bytes: usize) -> Self {
        // About what a client sends at least; header fields cost all proxies the same.
        let headers = HeaderMap::from_iter([
            (HOST, HeaderValue::from_static("exports.example.com")),
            (USER_AGENT, HeaderValue::from_static("load/1.0")),
            (ACCEPT, HeaderValue::from_static("image/png,image/*;q=0.8,*/*;q=0.5")),
            (ACCEPT_ENCODING, HeaderValue::from_static("gzip, br")),
        ]);
        Self { kinds: kinds.into(), headers, body_bytes, in_a_row: 1 }
    }

    /// The same, but each user's requests of a kind come so many in a row: they race each other over the connections.
    pub(crate) fn in_a_row(&self, in_a_row: u64) -> Self {
        Self { in_a_row, ..self.clone() }
    }

    /// The same of requests of one kind.
    pub(crate) fn only(&self, requests: Requests) -> Self {
        Self { kinds: [requests].into(), ..self.clone() }
    }

    pub(crate) fn kinds(&self) -> &[Requests] {
        &self.kinds
    }

    /// Kind and user of a request, by its index.
    pub(crate) fn turn(&self, index: u64) -> Turn {
        let kinds = self.kinds.len() as u64;
        let (kind, nth) = ((index % kinds) as usize, index / kinds);
        let users = self.kinds[kind].users() as u64;
        Turn { kind, nth, user: (nth / self.in_a_row % users) as usize }
    }

    /// A request that a user sends of a kind, in that round of all users: by another round it is of another path, mostly.
    pub(crate) fn index(&self, kind: usize, user: usize, round: u64) -> u64 {
        let requests = &self.kinds[kind];
        let nth = (round * requests.users() as u64 + user as u64) * self.in_a_row;
        nth * self.kinds.len() as u64 + kind as u64
    }

    pub(crate) fn request(&self, turn: Turn) -> Request<Empty<Bytes>> {
        let kind = &self.kinds[turn.kind];
        let mut request = Request::new(Empty::new());
        *request.method_mut() = kind.method.clone();
        *request.uri_mut() = kind.paths[(turn.nth % kind.paths.len() as u64) as usize].clone();
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        if let Some(authorization) = kind.authorizations.get(turn.user) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        match kind.leaves {
            Leaves::Never => {}
            Leaves::BeforeHead => _ = headers.insert(STALLS, Stalls::BeforeHead.into()),
            Leaves::MidBody => _ = headers.insert(STALLS, Stalls::MidBody.into()),
        }
        request
    }
}
