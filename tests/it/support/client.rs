//! A client that sends what it is given, byte for byte.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// Reads an answer; a body that breaks off is what came of it.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = head.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers: Vec<_> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let mut answer = Self { status, headers, body: bytes[end + 4..].to_vec() };
        if answer.header("transfer-encoding") == Some("chunked") {
            answer.body = unchunked(&answer.body);
        }
        Some(answer)
    }
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(String::from_utf8_lossy(&bytes[..end]).trim(), 16).unwrap_or(0);
        let chunk = bytes.get(end + 2..end + 2 + size).unwrap_or_default();
        body.extend_from_slice(chunk);
        if size == 0 || chunk.len() < size {
            break;
        }
        bytes = bytes.get(end + 4 + size..).unwrap_or_default();
    }
    body
}

/// Sends bytes and returns the answer when the connection has ended; `None` if there was none.
pub(crate) fn send_raw(address: SocketAddr, bytes: &[u8]) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A connection that is reset ends the answer as well.
    let _ = stream.read_to_end(&mut answer);
    Answer::parse(&answer)
}

/// Reads until these bytes have come; whether they did before the connection ended.
pub(crate) fn read_until(stream: &mut TcpStream, end: &[u8]) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut read = Vec::new();
    let mut byte = [0];
    while !read.ends_with(end) {
        if !stream.read(&mut byte).is_ok_and(|count| count == 1) {
            return false;
        }
        read.push(byte[0]);
    }
    true
}

/// Sends a request with these header lines and this body.
pub(crate) fn request(address: SocketAddr, method: &str, target: &str, lines: &[&str], body: &[u8]) -> Answer {
    let mut head = format!("{method} {target} HTTP/1.1\r\nhost: gate.test\r\nconnection: close\r\n");
    for line in lines {
        head.push_str(line);
        head.push_str("\r\n");
    }
    if !body.is_empty() {
        head.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    let bytes = [head.as_bytes(), b"\r\n", body].concat();
    send_raw(address, &bytes).unwrap_or_else(|| panic!("{method} {target}: no answer"))
}

pub(crate) fn get(address: SocketAddr, target: &str, lines: &[&str]) -> Answer {
    request(address, "GET", target, lines, b"")
}

pub(crate) fn post(address: SocketAddr, target: &str, lines: &[&str]) -> Answer {
    request(address, "POST", target, lines, b"")
}
