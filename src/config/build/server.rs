//! The listener for clients.

use super::{Problems, Surroundings, address, positive};
use crate::config::problem::Problem;
use crate::config::raw;
use crate::server::{BadCertificate, Certificate, ConnectionOptions, Options, Patience};

/// hyper needs this much for the head of any request.
const LEAST_HEADER_BYTES: u32 = 8_192;

pub(super) fn options(raw: &raw::Server, surroundings: Surroundings<'_>, problems: &mut Problems) -> Options {
    if raw.worker_threads.is_some_and(|threads| !(1..=1024).contains(&threads)) {
        let problem = Problem::at(&["server", "worker_threads"], "this is no number of threads");
        problems.add(problem.help("write 1 to 1024, or leave it out to have one thread a core"));
    }
    let bounds = [
        ("max_connections", raw.max_connections),
        ("max_connections_per_address", raw.max_connections_per_address.unwrap_or(1)),
        ("max_in_flight", raw.max_in_flight),
        ("max_streams", raw.max_streams),
    ];
    for (key, _) in bounds.into_iter().filter(|(_, bound)| *bound == 0) {
        problems.add(Problem::at(&["server", key], "nobody could be served").help("write 1 or more"));
    }
    if raw.max_header_bytes < LEAST_HEADER_BYTES {
        let problem = Problem::at(&["server", "max_header_bytes"], "this is too little for ordinary requests");
        problems.add(problem.help(format!("write {LEAST_HEADER_BYTES} or more")));
    }
    let mut patience = |key, duration| positive(duration, &["server", key], problems);
    let patience = Patience {
        head: patience("header_read_timeout", raw.header_read_timeout),
        idle: patience("idle_timeout", raw.idle_timeout),
        body: patience("body_timeout", raw.body_timeout),
    };
    let tunnel_idle_timeout = positive(raw.tunnel_idle_timeout, &["server", "tunnel_idle_timeout"], problems);
    Options {
        listen: address(&raw.listen, &["server", "listen"], problems),
        worker_threads: raw.worker_threads,
        certificate: raw.tls.as_ref().and_then(|tls| certificate(tls, surroundings, problems)),
        connections: ConnectionOptions {
            patience,
            h2c: raw.h2c,
            max_header_bytes: raw.max_header_bytes as usize,
            max_streams: raw.max_streams,
            tunnel_idle_timeout,
        },
        max_connections: raw.max_connections as usize,
        max_connections_per_address: raw.max_connections_per_address,
        max_in_flight: raw.max_in_flight as usize,
        drain_timeout: raw.drain_timeout.0,
        shutdown_delay: raw.shutdown_delay.0,
    }
}

fn certificate(raw: &raw::ServerTls, surroundings: Surroundings<'_>, problems: &mut Problems) -> Option<Certificate> {
    let chain = surroundings.file(&raw.cert_file, &["server", "tls", "cert_file"], problems);
    let key = surroundings.file(&raw.key_file, &["server", "tls", "key_file"], problems);
    let certificate = Certificate::from_pem(&chain?, &key?);
    let problem = |bad: BadCertificate| {
        let (key, help) = match &bad {
            BadCertificate::Chain(_) | BadCertificate::Empty => {
                ("cert_file", "write the certificate in PEM, and after it those that it hangs from")
            }
            BadCertificate::Key(_) => ("key_file", "write the certificate's private key in PEM, without a passphrase"),
            BadCertificate::Mismatch(_) => ("key_file", "name the key that the first certificate was made for"),
        };
        Problem::at(&["server", "tls", key], bad.to_string()).help(help)
    };
    certificate.map_err(|bad| problems.add(problem(bad))).ok()
}
