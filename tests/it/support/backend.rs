//! A backend that does as it is told, also what no backend should do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// What to do with a request.
#[derive(Clone)]
pub(crate) enum Reply {
    /// Send these bytes as they are, and keep the connection.
    Raw(Vec<u8>),
    /// Send these bytes and close the connection.
    RawThenClose(Vec<u8>),
    /// Send nothing until the gate gives up.
    Silence,
    /// Send the first bytes, wait to be released, send the rest.
    Held(Vec<u8>, Arc<Mutex<Receiver<()>>>, Vec<u8>),
    /// What the request calls for.
    By(fn(&Seen) -> Reply),
}

impl Reply {
    /// An answer with a body of known length.
    pub(crate) fn with(status: &str, headers: &[&str], body: &[u8]) -> Self {
        let mut head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n", body.len());
        for line in headers {
            head.push_str(line);
            head.push_str("\r\n");
        }
        Self::Raw([head.as_bytes(), b"\r\n", body].concat())
    }

    pub(crate) fn image() -> Self {
        Self::with("200 OK", &["content-type: image/png", "etag: \"v1\""], b"\x89PNG an image")
    }

    pub(crate) fn json(status: &str) -> Self {
        Self::with(status, &["content-type: application/json"], b"{}")
    }

    /// As much of the answer as `first`, the rest when the sender speaks.
    pub(crate) fn held(first: &[u8], rest: &[u8]) -> (Self, Sender<()>) {
        let (release, released) = channel();
        (Self::Held(first.to_vec(), Arc::new(Mutex::new(released)), rest.to_vec()), release)
    }
}

/// A request as it arrived.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) line: String,
    /// Names in lower case, in order.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    reply: Arc<Mutex<Reply>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<Mutex<usize>>,
}

impl Backend {
    pub(crate) fn start(reply: Reply) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (reply, seen, connections) = (Arc::new(Mutex::new(reply)), Arc::default(), Arc::default());
        let backend =
            Self { address, reply: Arc::clone(&reply), seen: Arc::clone(&seen), connections: Arc::clone(&connections) };
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                *connections.lock().unwrap() += 1;
                let (reply, seen) = (Arc::clone(&reply), Arc::clone(&seen));
                std::thread::spawn(move || converse(stream, &reply, &seen));
            }
        });
        backend
    }

    pub(crate) fn will(&self, reply: Reply) {
        *self.reply.lock().unwrap() = reply;
    }

    /// All requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn last(&self) -> Seen {
        self.seen().last().cloned().expect("the backend has seen a request")
    }

    /// How many connections were made to it.
    pub(crate) fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }
}

/// Serves one connection; `None` when it has ended.
fn converse(mut stream: TcpStream, reply: &Mutex<Reply>, seen: &Mutex<Vec<Seen>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut request = read_head(&mut reader)?;
        let reply = match reply.lock().unwrap().clone() {
            Reply::By(choose) => choose(&request),
            reply => reply,
        };
        // A held answer begins before the request has ended.
        if !matches!(reply, Reply::Held(..)) {
            request.body = read_body(&mut reader, &request)?;
        }
        seen.lock().unwrap().push(request);
        match reply {
            Reply::Raw(bytes) => stream.write_all(&bytes).ok()?,
            Reply::RawThenClose(bytes) => {
                stream.write_all(&bytes).ok()?;
                return stream.shutdown(Shutdown::Both).ok();
            }
            Reply::Silence => {
                let mut ignored = Vec::new();
                reader.read_to_end(&mut ignored).ok()?;
            }
            Reply::Held(first, released, rest) => {
                stream.write_all(&first).ok()?;
                released.lock().unwrap().recv().ok()?;
                stream.write_all(&rest).ok()?;
            }
            Reply::By(_) => panic!("a choice of a choice"),
        }
    }
}

fn read_head(reader: &mut impl BufRead) -> Option<Seen> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let mut request = Seen { line: line.trim_end().to_owned(), ..Seen::default() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        request.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Some(request)
}

fn read_body(reader: &mut impl BufRead, request: &Seen) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    if let Some(length) = request.header("content-length").and_then(|length| length.parse().ok()) {
        body.resize(length, 0);
        reader.read_exact(&mut body).ok()?;
    } else if request.header("transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let mut chunk = vec![0; usize::from_str_radix(size.trim(), 16).ok()? + 2];
            reader.read_exact(&mut chunk).ok()?;
            if chunk.len() == 2 {
                break;
            }
            body.extend_from_slice(&chunk[..chunk.len() - 2]);
        }
    }
    Some(body)
}
