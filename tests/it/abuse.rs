//! Clients that mean no good: whatever they do, memory stays bounded, and others are served meanwhile.
//!
//! `cargo test --test it abuse -- --nocapture` prints what each abuse takes; `ABUSE=10` does ten times as much of what has no end.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::support::{DOWNLOAD, Gate, Setup, Token, eventually, get};

/// How much more memory than at rest the gate may take under any of them, in KiB. Most take those who leave many answers lying: for each
/// of a thousand as much as may be ahead of its client (see `server/connection.rs`), once read and once on its way, and what HTTP/2 sends
/// ahead.
const MOST: u64 = 1_000 * (2 * 132 + 64);

/// What a connection may take that does nothing, in KiB: no room for what it does not speak.
const MOST_OF_A_CONNECTION: u64 = 8;

/// More than what sockets on the way can hold.
const LARGE: usize = 32 << 20;

/// A backend that reads no body, and sends large answers for as long as they are taken.
fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || converse(stream));
        }
    });
    address
}

fn converse(mut stream: TcpStream) -> std::io::Result<()> {
    let piece = vec![b'x'; 64 << 10];
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut line, mut asked) = (String::new(), String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match (asked.as_str(), line.trim_end()) {
            ("", request) => asked = request.to_owned(),
            (request, "") if request.contains("/up") => {
                return std::io::copy(&mut reader, &mut std::io::sink()).map(drop);
            }
            (request, "") => {
                let length = if request.contains("/large") { LARGE } else { 2 };
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: font/x\r\ncontent-length: {length}\r\n\r\n")?;
                for sent in (0..length).step_by(piece.len()) {
                    stream.write_all(&piece[..piece.len().min(length - sent)])?;
                }
                asked.clear();
            }
            _ => {}
        }
    }
}

fn times(number: usize) -> usize {
    number * std::env::var("ABUSE").ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// A line of `/proc/PID/status` in KiB.
fn memory(gate: &Gate, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gate.pid())).unwrap();
    let found = status.lines().find_map(|known| known.strip_prefix(line)?.split_whitespace().next()?.parse().ok());
    found.unwrap_or_else(|| panic!("no {line} in {status}"))
}

/// Waits until it takes no more than a moment ago.
fn rest(gate: &Gate) {
    let mut last = 0;
    eventually("memory has settled", || {
        let now = memory(gate, "VmRSS:");
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut last, now) == now
    });
}

/// From here on the peak is measured anew.
fn forget_peak(gate: &Gate) {
    std::fs::write(format!("/proc/{}/clear_refs", gate.pid()), "5").unwrap();
}

fn connect(gate: &Gate) -> TcpStream {
    let stream = TcpStream::connect(gate.address).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    stream
}

/// So many connections on which this is sent, as far as the gate takes it.
fn flood(gate: &Gate, connections: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let send = |_| {
        let mut stream = connect(gate);
        // A gate that takes no more is what is wanted.
        let _ = stream.write_all(bytes);
        stream
    };
    (0..connections).map(send).collect()
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// GET of a path (RFC 7541: indexed fields of the static table, and literals that are not indexed).
fn get_block(path: &str) -> Vec<u8> {
    let mut block = vec![0x82, 0x86, 0x01, 9];
    block.extend_from_slice(b"gate.test");
    block.extend_from_slice(&[0x04, path.len() as u8]);
    block.extend_from_slice(path.as_bytes());
    block
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn http2(frames: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    std::iter::once(PREFACE.to_vec()).chain(frames).collect::<Vec<_>>().concat()
}

fn streams() -> impl Iterator<Item = u32> {
    (0..).map(|index| 2 * index + 1)
}

type Act = fn(&Gate) -> Vec<TcpStream>;

/// Each abuse by name.
const ABUSES: [(&str, Act); 17] = [
    ("2,000 connections that say nothing", |gate| flood(gate, 2_000, b"")),
    ("500 heads of 20 KiB that do not end", |gate| {
        let head = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}", "y".repeat(20 << 10));
        flood(gate, 500, head.as_bytes())
    }),
    ("20 pipelines of 5,000 requests, no answer taken", |gate| {
        flood(gate, 20, "GET /p HTTP/1.1\r\nhost: a\r\n\r\n".repeat(times(5_000)).as_bytes())
    }),
    ("200 uploads of a gigabyte that stand still after 1 MiB", |gate| {
        let head = b"POST /up HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000\r\n\r\n".to_vec();
        flood(gate, 200, &[head, vec![b'z'; 1 << 20]].concat())
    }),
    ("50 chunked uploads with extensions of 15 KiB", |gate| {
        let chunk = format!("1;{}\r\nz\r\n", "e".repeat(15 << 10));
        let head = "POST /up HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        flood(gate, 50, format!("{head}{}", chunk.repeat(times(20))).as_bytes())
    }),
    ("100 answers of 32 MiB that nobody takes", |gate| flood(gate, 100, b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")),
    ("200 heads of 90 fields, 100 times each", |gate| {
        let fields: String = (0..90).fold(String::new(), |mut all, number| {
            let _ = write!(all, "x-{number}: {}\r\n", "v".repeat(200));
            all
        });
        flood(gate, 200, format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n").repeat(times(20)).as_bytes())
    }),
    ("h2: 10 connections of 100 answers of 32 MiB that nobody takes", |gate| {
        let requests = streams().take(100).map(|id| frame(HEADERS, END_STREAM | END_HEADERS, id, &get_block("/large")));
        let window = frame(WINDOW_UPDATE, 0, 0, &0x7000_0000u32.to_be_bytes());
        flood(gate, 10, &http2(std::iter::once(window).chain(requests)))
    }),
    ("h2: streams that are opened and reset (CVE-2023-44487)", |gate| {
        let both = |id| {
            let open = frame(HEADERS, END_STREAM | END_HEADERS, id, &get_block("/p"));
            [open, frame(RST_STREAM, 0, id, &8u32.to_be_bytes())].concat()
        };
        flood(gate, 10, &http2(streams().take(times(5_000)).map(both)))
    }),
    ("h2: streams that the gate is made to reset (CVE-2025-8671)", |gate| {
        // A window that grows by nothing is an error of the stream.
        let both = |id| {
            let open = frame(HEADERS, END_HEADERS, id, &get_block("/p"));
            [open, frame(WINDOW_UPDATE, 0, id, &0u32.to_be_bytes())].concat()
        };
        flood(gate, 10, &http2(streams().take(times(5_000)).map(both)))
    }),
    ("h2: heads that do not end (CVE-2024-27316)", |gate| {
        let first = frame(HEADERS, END_STREAM, 1, &get_block("/p"));
        // A literal that is not indexed, over and over.
        let piece = [&[0x00, 1, b'x', 100][..], &[b'v'; 100]].concat().repeat(150);
        let rest = std::iter::repeat_n(frame(CONTINUATION, 0, 1, &piece), times(500));
        flood(gate, 10, &http2(std::iter::once(first).chain(rest)))
    }),
    ("h2: a field of 4 KiB named 3,000 times by a byte each", |gate| {
        let add = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'v'; 4_000]].concat();
        let bomb = |id| frame(HEADERS, END_STREAM | END_HEADERS, id, &[get_block("/p"), vec![0xbe; 3_000]].concat());
        let first = frame(HEADERS, END_STREAM | END_HEADERS, 1, &[get_block("/p"), add].concat());
        flood(gate, 10, &http2(std::iter::once(first).chain(streams().skip(1).take(times(50)).map(bomb))))
    }),
    ("h2: pings whose answers nobody takes", |gate| {
        flood(gate, 10, &http2(std::iter::repeat_n(frame(PING, 0, 0, &[7; 8]), times(20_000))))
    }),
    ("h2: settings whose acknowledgements nobody takes", |gate| {
        flood(gate, 10, &http2(std::iter::repeat_n(frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]), times(20_000))))
    }),
    ("h2: data frames without data on an open stream", |gate| {
        let open = frame(HEADERS, END_HEADERS, 1, &get_block("/up"));
        flood(gate, 10, &http2(std::iter::once(open).chain(std::iter::repeat_n(frame(0, 0, 1, &[]), times(20_000)))))
    }),
    ("made-up tokens, each another", |gate| {
        let export = |number| {
            format!(
                "GET /v1/designs/d{number}/download HTTP/1.1\r\nhost: a\r\nauthorization: Bearer e30.e30.{number}\r\n\r\n"
            )
        };
        talk(gate, (0..times(1_000)).map(export));
        Vec::new()
    }),
    ("paths and methods, each another", |gate| {
        let page = |number| format!("M{number} /p{number}/x/{number} HTTP/1.1\r\nhost: a{number}\r\n\r\n");
        talk(gate, (0..times(1_000)).map(page));
        Vec::new()
    }),
];

/// Requests on one connection, one after the other.
fn talk(gate: &Gate, requests: impl Iterator<Item = String>) {
    let mut stream = connect(gate);
    let mut bytes = [0; 4096];
    for request in requests {
        if stream.write_all(request.as_bytes()).is_err() || !stream.read(&mut bytes).is_ok_and(|count| count > 0) {
            stream = connect(gate);
        }
    }
}

#[test]
fn memory_stays_bounded_and_others_are_served_whatever_clients_do() {
    let backend = backend();
    let mut too_much = Vec::new();
    println!("{:>9} {:>9} {:>9}  KiB at rest, at most, after", "rest", "peak", "after");
    for (name, abuse) in ABUSES {
        // Each on a gate of its own: what one has left behind could hide what the next takes.
        let gate = Setup::before(backend).set("EXPORT_GATE__SERVER__H2C", "true").start();
        let is_served = || {
            let page = get(gate.address, "/page", &[]);
            let export = get(gate.address, DOWNLOAD, &[&Token::of("u").plan("max").ai().line()]);
            let log = gate.log();
            let last = &log[log.len().saturating_sub(5)..];
            assert_eq!((page.status, export.status), (200, 200), "{name}: {last:#?}");
        };
        is_served();
        forget_peak(&gate);
        let before = memory(&gate, "VmRSS:");
        let held = abuse(&gate);
        is_served();
        rest(&gate);
        let connections = held.len() as u64;
        let peak = memory(&gate, "VmHWM:");
        drop(held);
        is_served();
        eventually("nothing is left but kept connections to the backend, of which there are 256 at most", || {
            std::fs::read_dir(format!("/proc/{}/fd", gate.pid())).unwrap().count() < 300
        });
        println!("{before:>9} {peak:>9} {:>9}  {name}", memory(&gate, "VmRSS:"));
        let grown = peak.saturating_sub(before);
        if grown > MOST || (name.contains("say nothing") && grown > connections * MOST_OF_A_CONNECTION) {
            too_much.push(format!("{name}: {grown} KiB"));
        }
    }
    assert!(too_much.is_empty(), "{too_much:?}");
}
