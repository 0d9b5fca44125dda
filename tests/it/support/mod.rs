//! What the tests stand on: a gate process, a backend that does as it is told, a client that sends what it is given.

mod backend;
mod client;
mod gate;
mod http2;
mod nobody;
mod token;
mod web;

pub(crate) use backend::{Backend, Reply, Seen};
pub(crate) use client::{Answer, get, post, read_until, request, send_raw};
pub(crate) use gate::{Folder, Gate, Setup, listening, shipped_config};
pub(crate) use http2::{Http2Backend, Http2Reply, by_http2, fields};
pub(crate) use nobody::Nobody;
pub(crate) use token::{SECRET, Token};
pub(crate) use web::{WebServer, certify, nginx};

use std::time::{Duration, Instant};

/// An export of the shipped configuration.
pub(crate) const DOWNLOAD: &str = "/v1/designs/d1/download";

/// A backend that answers everything so, and a gate with the shipped configuration in front of it.
pub(crate) fn stage(reply: Reply) -> (Backend, Gate) {
    let backend = Backend::start(reply);
    let gate = Setup::before(backend.address).start();
    (backend, gate)
}

/// Waits until something is true. How long it takes is not asserted; that it never comes is a failure.
pub(crate) fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_true() {
        assert!(Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
