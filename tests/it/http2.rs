//! A hostile client of HTTP/2, frame by frame (RFC 9113): whatever it does, the gate still serves, and an export that was under way on the
//! same connection is charged if it was delivered, and given back if it was not. And a backend of HTTP/2 that goes away.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{
    Backend, DOWNLOAD, Gate, Http2Backend, Http2Reply, Reply, Setup, Token, eventually, get, read_until, request,
};

const EXPORT: &str = DOWNLOAD;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The next frame.
fn read_frame(stream: &mut TcpStream) -> io::Result<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut payload)?;
    let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Ok(Frame { kind: head[3], flags: head[4], stream: id, payload })
}

/// Fields, each as a literal that is not indexed (RFC 7541, section 6.2.2).
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| {
        let length = match text.len() {
            short @ ..127 => vec![short as u8],
            long => {
                let mut rest = long - 127;
                let mut bytes = vec![127];
                while rest >= 128 {
                    bytes.push((rest % 128) as u8 | 128);
                    rest /= 128;
                }
                bytes.push(rest as u8);
                bytes
            }
        };
        [length, text.as_bytes().to_vec()].concat()
    };
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// A request's fields, and more.
fn fields<'f>(method: &'f str, path: &'f str, more: &[(&'f str, &'f str)]) -> Vec<(&'f str, &'f str)> {
    let pseudo = [(":method", method), (":scheme", "http"), (":authority", "gate.test"), (":path", path)];
    [&pseudo, more].concat()
}

fn headers(flags: u8, stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, flags | END_HEADERS, stream, &block(fields))
}

/// GET of a page.
fn page(stream: u32) -> Vec<u8> {
    headers(END_STREAM, stream, &fields("GET", "/page", &[]))
}

/// A POST of an export that says how long its body is, and more.
fn export(stream: u32, token: &str, more: &[(&str, &str)]) -> Vec<u8> {
    headers(0, stream, &fields("POST", EXPORT, &[&[("authorization", token)], more].concat()))
}

/// A request of these fields only.
fn malformed(fields: &[(&str, &str)]) -> Vec<u8> {
    headers(END_STREAM, 3, fields)
}

/// A page with one field more.
fn with(name: &str, value: &str) -> Vec<u8> {
    malformed(&fields("GET", "/page", &[(name, value)]))
}

/// A page whose pseudo-fields are others.
fn without(name: &str, instead: &[(&str, &str)]) -> Vec<u8> {
    let kept: Vec<_> = fields("GET", "/page", &[]).into_iter().filter(|(known, _)| *known != name).collect();
    malformed(&[&kept, instead].concat())
}

/// What becomes of the connection, and of the export that is under way on its stream 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The connection ends, and the export with it.
    Ends,
    /// This stream is reset or answered with 400 or more, and the export goes on.
    Refused(u32),
    /// The export is reset, and nothing else.
    Reset,
    /// Nothing comes of it: the export goes on.
    Nothing,
}

type Fault = (&'static str, Then, fn(&str) -> Vec<u8>);

/// What is wrong, what comes of it, and the frames after those of the export, for the client who has this token. Where the RFC has an error
/// of a stream the connection may end as well (section 5.4.2): so it does for some of them, by the h2 crate.
const FAULTS: &[Fault] = &[
    // Streams (section 5.1).
    ("a stream of a server", Then::Ends, |_| page(2)),
    ("a stream lower than another", Then::Ends, |_| [page(7), page(5)].concat()),
    ("a request on no stream", Then::Ends, |_| page(0)),
    ("data on no stream", Then::Ends, |_| frame(DATA, 0, 0, b"x")),
    ("data on a stream that is idle", Then::Ends, |_| frame(DATA, 0, 9, b"x")),
    ("a reset of a stream that is idle", Then::Ends, |_| frame(RST_STREAM, 0, 9, &[0, 0, 0, 8])),
    ("a window for a stream that is idle", Then::Ends, |_| frame(WINDOW_UPDATE, 0, 9, &[0, 0, 0, 1])),
    ("a head after the end of its stream", Then::Ends, |_| page(1)),
    ("data after the end of its stream", Then::Ends, |_| frame(DATA, 0, 1, b"x")),
    ("a promise", Then::Ends, |_| frame(5, END_HEADERS, 1, &[&[0, 0, 0, 4], &*block(&[])].concat())),
    // Frames (sections 4 and 6).
    ("a frame that is too long", Then::Ends, |_| frame(PING, 0, 0, &[0; 16_385])),
    ("a frame of no known kind", Then::Nothing, |_| frame(0xbe, 0xff, 1, b"what?")),
    ("settings of a length that none has", Then::Ends, |_| frame(SETTINGS, 0, 0, &[0; 5])),
    ("settings of a stream", Then::Ends, |_| frame(SETTINGS, 0, 1, &[])),
    ("settings acknowledged at length", Then::Ends, |_| frame(SETTINGS, ACK, 0, &[0; 6])),
    ("a push that is neither", Then::Ends, |_| frame(SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2])),
    ("an initial window that is too large", Then::Ends, |_| frame(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0])),
    ("frames that may have no length", Then::Ends, |_| frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 0])),
    ("a setting that nobody knows", Then::Nothing, |_| frame(SETTINGS, 0, 0, &[0xbe, 0xef, 0, 0, 0, 1])),
    ("a ping of a length that none has", Then::Ends, |_| frame(PING, 0, 0, &[0; 7])),
    ("a ping of a stream", Then::Ends, |_| frame(PING, 0, 1, &[0; 8])),
    ("a reset of a length that none has", Then::Ends, |_| frame(RST_STREAM, 0, 1, &[0; 3])),
    ("a good-bye of a stream", Then::Ends, |_| frame(GOAWAY, 0, 1, &[0; 8])),
    ("a good-bye that breaks off", Then::Ends, |_| frame(GOAWAY, 0, 0, &[0; 7])),
    ("more padding than frame", Then::Ends, |_| frame(HEADERS, PADDED | END_HEADERS | END_STREAM, 3, &[200, 0, 0])),
    ("more padding than data", Then::Ends, |token| {
        [export(3, token, &[]), frame(DATA, PADDED, 3, &[9, b'x'])].concat()
    }),
    ("a stream that depends on itself", Then::Reset, |_| frame(PRIORITY, 0, 1, &[0, 0, 0, 1, 9])),
    // Windows (section 6.9).
    ("a window that grows by nothing", Then::Ends, |_| frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
    ("a stream's window that grows by nothing", Then::Ends, |_| frame(WINDOW_UPDATE, 0, 1, &[0; 4])),
    ("a window that is too large", Then::Ends, |_| frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff])),
    ("a stream's window that is too large", Then::Reset, |_| frame(WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff])),
    ("a window of a length that none has", Then::Ends, |_| frame(WINDOW_UPDATE, 0, 0, &[0; 3])),
    ("more data than a stream's window holds", Then::Refused(3), |_| {
        let upload = headers(0, 3, &fields("POST", "/up", &[]));
        std::iter::once(upload).chain((0..17).map(|_| frame(DATA, 0, 3, &[b'x'; 16_384]))).collect::<Vec<_>>().concat()
    }),
    // Heads (sections 4.3 and 6.10).
    ("a continuation of nothing", Then::Ends, |_| frame(CONTINUATION, END_HEADERS, 1, &[])),
    ("a continuation of another stream", Then::Ends, |_| {
        [frame(HEADERS, END_STREAM, 3, &[]), frame(CONTINUATION, END_HEADERS, 5, &[])].concat()
    }),
    ("a head that something else comes into", Then::Ends, |_| {
        [frame(HEADERS, END_STREAM, 3, &[]), frame(PING, 0, 0, &[0; 8])].concat()
    }),
    ("a head without an end", Then::Ends, |_| {
        let more = (0..10_000).map(|_| frame(CONTINUATION, 0, 3, &[]));
        std::iter::once(frame(HEADERS, END_STREAM, 3, &[])).chain(more).collect::<Vec<_>>().concat()
    }),
    ("a head that is none", Then::Ends, |_| frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0xff; 9])),
    ("a head that names what is in no table", Then::Ends, |_| frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0xfe])),
    ("a table that is too large", Then::Ends, |_| {
        frame(HEADERS, END_HEADERS | END_STREAM, 3, &[0x3f, 0xff, 0xff, 0x7f])
    }),
    ("a field that is longer than a head may be", Then::Refused(3), |_| {
        let head = block(&fields("GET", "/page", &[("x-long", &"x".repeat(40_000))]));
        let (first, rest) = head.split_at(16_384);
        let (second, third) = rest.split_at(16_384);
        let more = [frame(CONTINUATION, 0, 3, second), frame(CONTINUATION, END_HEADERS, 3, third)].concat();
        [frame(HEADERS, END_STREAM, 3, first), more].concat()
    }),
    ("more fields than a head may have", Then::Refused(3), |_| {
        malformed(&fields("GET", "/page", &[("x-a", "1"); 101]))
    }),
    // Requests (section 8).
    ("no method", Then::Refused(3), |_| without(":method", &[])),
    ("no path", Then::Refused(3), |_| without(":path", &[])),
    ("no scheme", Then::Refused(3), |_| without(":scheme", &[])),
    ("no authority", Then::Refused(3), |_| without(":authority", &[])),
    ("an empty path", Then::Refused(3), |_| without(":path", &[(":path", "")])),
    ("two methods", Then::Refused(3), |_| with(":method", "POST")),
    ("two paths", Then::Refused(3), |_| with(":path", EXPORT)),
    ("a status", Then::Refused(3), |_| with(":status", "200")),
    ("a pseudo-field that nobody knows", Then::Ends, |_| with(":what", "1")),
    ("a pseudo-field after others", Then::Refused(3), |_| without(":path", &[("x-a", "1"), (":path", EXPORT)])),
    ("a name in capitals", Then::Ends, |_| with("X-Name", "1")),
    ("an empty name", Then::Ends, |_| with("", "1")),
    ("a name with a line's end", Then::Ends, |_| with("x-a\r\nx-b", "1")),
    ("a value with a line's end", Then::Ends, |_| with("x-a", "1\r\nx-b: 2")),
    ("a value with NUL", Then::Ends, |_| with("x-a", "1\0")),
    ("a value that begins with a blank", Then::Refused(3), |_| with("x-a", " 1")),
    ("a field of the connection", Then::Refused(3), |_| with("connection", "x-a")),
    ("another field of the connection", Then::Refused(3), |_| with("keep-alive", "1")),
    ("a coding of the transfer", Then::Refused(3), |_| with("transfer-encoding", "chunked")),
    ("an upgrade", Then::Refused(3), |_| with("upgrade", "websocket")),
    ("other codings than trailers", Then::Refused(3), |_| with("te", "gzip")),
    ("another host", Then::Refused(3), |_| with("host", "other.test")),
    ("two hosts", Then::Refused(3), |_| malformed(&fields("GET", "/page", &[("host", "gate.test"); 2]))),
    ("a user in the authority", Then::Refused(3), |_| without(":authority", &[(":authority", "me@gate.test")])),
    ("a tunnel", Then::Refused(3), |_| malformed(&[(":method", "CONNECT"), (":authority", "other.test:443")])),
    ("a tunnel by another name", Then::Refused(3), |_| {
        malformed(&fields("CONNECT", "/page", &[(":protocol", "websocket")]))
    }),
    // Lengths (section 8.1.1): of exports, so that one that is taken for whole is counted.
    ("a body that is shorter than announced", Then::Refused(3), |token| {
        [export(3, token, &[("content-length", "5")]), frame(DATA, END_STREAM, 3, b"abc")].concat()
    }),
    ("a body that is longer than announced", Then::Refused(3), |token| {
        [export(3, token, &[("content-length", "2")]), frame(DATA, END_STREAM, 3, b"abc")].concat()
    }),
    ("a body that is longer than announced, bit by bit", Then::Refused(3), |token| {
        let pieces = [frame(DATA, 0, 3, b"ab"), frame(DATA, END_STREAM, 3, b"c")].concat();
        [export(3, token, &[("content-length", "2")]), pieces].concat()
    }),
    ("a length and no body", Then::Refused(3), |token| {
        let fields = fields("GET", EXPORT, &[("authorization", token), ("content-length", "5")]);
        headers(END_STREAM, 3, &fields)
    }),
    ("two lengths", Then::Refused(3), |token| {
        let lengths = [("content-length", "3"), ("content-length", "4")];
        [export(3, token, &lengths), frame(DATA, END_STREAM, 3, b"abc")].concat()
    }),
    ("a length that is no number", Then::Refused(3), |token| {
        [export(3, token, &[("content-length", "+3")]), frame(DATA, END_STREAM, 3, b"abc")].concat()
    }),
    ("a trailer section that does not end its stream", Then::Refused(3), |token| {
        [export(3, token, &[]), headers(0, 3, &[("x-a", "1")])].concat()
    }),
    // Leaving.
    ("a reset of the export", Then::Reset, |_| frame(RST_STREAM, 0, 1, &[0, 0, 0, 8])),
    ("a good-bye", Then::Nothing, |_| frame(GOAWAY, 0, 0, &[0; 8])),
    ("exports that are reset at once", Then::Ends, |token| {
        let fields = fields("GET", EXPORT, &[("authorization", token)]);
        let reset =
            |stream| [headers(END_STREAM, stream, &fields), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat();
        (1..500).flat_map(|number| reset(2 * number + 1)).collect()
    }),
];

/// A backend that holds the first export of each user until it is told to go on, and answers all else.
fn renderer() -> (SocketAddr, Receiver<Sender<()>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, waiting) = channel();
    std::thread::spawn(move || {
        let seen: Arc<Mutex<BTreeSet<String>>> = Arc::default();
        for stream in listener.incoming().map_while(Result::ok) {
            let (tell, seen) = (tell.clone(), seen.clone());
            std::thread::spawn(move || converse(stream, &tell, &seen));
        }
    });
    (address, waiting)
}

fn converse(mut stream: TcpStream, tell: &Sender<Sender<()>>, seen: &Mutex<BTreeSet<String>>) -> Option<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).ok()?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let field = |name: &str| head.lines().find_map(|line| Some(line.strip_prefix(name)?.to_owned()));
        if let Some(length) = field("content-length: ") {
            stream.read_exact(&mut vec![0; length.parse().ok()?]).ok()?;
        } else if head.contains("transfer-encoding: chunked") {
            read_until(&mut stream, b"0\r\n\r\n").then_some(())?;
        }
        if let Some(token) = field("authorization: ") {
            let is_first = seen.lock().unwrap().insert(token);
            if is_first {
                let (release, released) = channel();
                tell.send(release).ok()?;
                let _ = released.recv();
            }
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 8\r\n\r\nan image").ok()?;
    }
}

/// What came of each stream, until the connection ended or the export did.
#[derive(Debug, Default)]
struct Seen {
    /// Bytes of the export.
    export: Vec<u8>,
    /// Streams that were reset.
    resets: Vec<u32>,
    /// Streams that were answered, and how the head of the answer begins: the status, for those that have it from the static table.
    answers: Vec<(u32, Vec<u8>)>,
    ended: bool,
}

impl Seen {
    /// Reads on until this is so; whether it has come before the connection ended, or fell silent.
    fn until(&mut self, stream: &mut TcpStream, is_so: impl Fn(&Self) -> bool) -> bool {
        while !is_so(self) {
            let frame = match read_frame(stream) {
                Ok(frame) => frame,
                Err(error) => {
                    self.ended = error.kind() != io::ErrorKind::WouldBlock;
                    return is_so(self);
                }
            };
            match frame.kind {
                DATA if frame.stream == 1 => self.export.extend(frame.payload),
                HEADERS => self.answers.push((frame.stream, frame.payload)),
                RST_STREAM => self.resets.push(frame.stream),
                SETTINGS if frame.flags & ACK == 0 => {
                    let _ = stream.write_all(&self::frame(SETTINGS, ACK, 0, &[]));
                }
                _ => {}
            }
        }
        true
    }

    /// Whether a stream was reset, or answered with a status that is no success: those that the static table has are 200, 204, 206.
    fn has_refused(&self, stream: u32) -> bool {
        let is_refusal = |head: &[u8]| !matches!(head.first(), Some(0x88..=0x8a));
        self.resets.contains(&stream)
            || self.answers.iter().any(|(answered, head)| *answered == stream && is_refusal(head))
    }
}

fn meter(gate: &Gate, outcome: &str) -> f64 {
    gate.metric(&format!(r#"exportgate_charges_total{{meter="ai-exports",outcome="{outcome}"}}"#))
}

/// Waits until nothing is under way any more; whether that comes.
fn settles(gate: &Gate) -> bool {
    let is_settled = || meter(gate, "reserved") == meter(gate, "delivered") + meter(gate, "void");
    (0..3_000).any(|_| {
        is_settled() || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }
    })
}

#[test]
fn whatever_a_client_does_the_gate_serves_and_counts_what_it_has_delivered() {
    let (renderer, waiting) = renderer();
    // Nobody ever takes anything of what goes to `/up`: no connection by TLS comes to be.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = mute.local_addr().unwrap();
    let setup = Setup::before(renderer).set("EXPORT_GATE__SERVER__H2C", "true");
    let up = format!(
        "\n[[routes]]\nname = \"up\"\npath = \"/up\"\naction = \"view\"\nupstream = \"mute\"\n\
         [upstreams.mute]\nendpoints = [\"https://{endpoint}\"]\nconnect_timeout = \"1h\"\n"
    );
    let text = std::fs::read_to_string(setup.config()).unwrap() + &up;
    std::fs::write(setup.config(), text).unwrap();
    let gate = setup.start();
    let mut wrong = Vec::new();
    for (number, (name, then, fault)) in FAULTS.iter().enumerate() {
        let user = format!("u{number}");
        let line = Token::of(&user).plan("max").ai().line();
        let token = line.split_once(": ").unwrap().1;
        let mut stream = TcpStream::connect(gate.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let first = headers(END_STREAM, 1, &fields("GET", EXPORT, &[("authorization", token)]));
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &first].concat()).unwrap();
        let release = waiting.recv_timeout(Duration::from_secs(10)).unwrap();
        // It may be cut off while it writes.
        let _ = stream.write_all(&fault(token));

        let mut seen = Seen::default();
        let has_come = match *then {
            Then::Ends => seen.until(&mut stream, |seen| seen.ended),
            Then::Refused(refused) => seen.until(&mut stream, |seen| seen.has_refused(refused)),
            // Of its own resets a client hears nothing.
            Then::Reset => fault(token)[3] == RST_STREAM || seen.until(&mut stream, |seen| seen.resets.contains(&1)),
            Then::Nothing => true,
        };
        if matches!(then, Then::Reset | Then::Ends) && !settles(&gate) {
            wrong.push(format!("{name}: the export is not given up"));
        }
        // From here on the backend goes on: whoever is still there has its image.
        let _ = release.send(());
        let is_whole = matches!(then, Then::Refused(_) | Then::Nothing);
        if is_whole {
            let _ = seen.until(&mut stream, |seen| seen.export.len() >= 8);
        }
        if !settles(&gate) {
            wrong.push(format!("{name}: something is reserved for ever"));
        }
        let delivered = u64::from(seen.export == b"an image");
        let used = gate.used(&user, "ai-exports");
        if !has_come || delivered != u64::from(is_whole) || used != delivered {
            wrong.push(format!("{name}: {then:?} {has_come} {used} {seen:?}"));
        }
        assert_eq!(get(gate.address, "/page", &[]).status, 200, "after {name}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_export_is_due_once_there_is_room_for_a_byte_of_it() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__SERVER__H2C", "true").start();
    for (user, room, due) in [("none", 0, 0), ("one", 1, 1)] {
        let line = Token::of(user).plan("max").ai().line();
        let export = fields("GET", EXPORT, &[("authorization", line.split_once(": ").unwrap().1)]);
        let mut stream = TcpStream::connect(gate.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // SETTINGS_INITIAL_WINDOW_SIZE.
        let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, room]);
        stream.write_all(&[PREFACE, &settings, &headers(END_STREAM, 1, &export)].concat()).unwrap();
        let mut seen = Seen::default();
        let has_come = |seen: &Seen| !seen.answers.is_empty() && seen.export.len() == usize::from(room);
        assert!(seen.until(&mut stream, has_come), "{seen:?}");
        stream.write_all(&[frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), page(3)].concat()).unwrap();
        assert!(seen.until(&mut stream, |seen| seen.answers.len() == 2), "{seen:?}");
        assert!(settles(&gate));
        assert_eq!(gate.used(user, "ai-exports"), due, "room for {room}");
    }
}

#[test]
fn an_upload_that_is_reset_without_an_error_is_broken_off_all_the_same() {
    let backend = Http2Backend::start(10, Http2Reply::Answer);
    let by_http1 = Backend::start(Reply::By(|seen| match seen.body.is_empty() {
        true => Reply::image(),
        false => Reply::json("200 OK"),
    }));
    for (address, protocol) in [(by_http1.address, "http1"), (backend.address, "http2")] {
        let gate = Setup::before(address)
            .set("EXPORT_GATE__SERVER__H2C", "true")
            .set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", protocol)
            .start();
        for length in [None, Some(("content-length", "100"))] {
            let mut stream = TcpStream::connect(gate.address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let save = headers(0, 1, &fields("PUT", "/v1/designs/d1", length.as_slice()));
            let part = frame(DATA, 0, 1, b"the first part");
            stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &save, &part].concat()).unwrap();
            // So that its part is on its way to the backend.
            stream.write_all(&page(3)).unwrap();
            let mut seen = Seen::default();
            assert!(seen.until(&mut stream, |seen| seen.answers.iter().any(|(stream, _)| *stream == 3)), "{seen:?}");
            stream.write_all(&frame(RST_STREAM, 0, 1, &[0; 4])).unwrap();
            stream.write_all(&page(5)).unwrap();
            assert!(seen.until(&mut stream, |seen| seen.answers.iter().any(|(stream, _)| *stream == 5)), "{seen:?}");
            assert!(settles(&gate));
        }
    }
    let saves = backend.seen().into_iter().filter(|seen| seen.head.method() == "PUT").count();
    assert_eq!(saves, 0, "nobody may take a part for the whole");
    let saves = by_http1.seen().into_iter().filter(|seen| seen.line.starts_with("PUT")).count();
    assert_eq!(saves, 0, "nobody may take a part for the whole");
}

/// 25 exports of one user on each of four connections.
fn ask_for_many(gate: &Gate, token: &str) -> Vec<TcpStream> {
    let connections = (0..4).map(|_| {
        let mut stream = TcpStream::connect(gate.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let fields = fields("GET", EXPORT, &[("authorization", token)]);
        let exports: Vec<u8> = (0..25).flat_map(|number| headers(END_STREAM, 2 * number + 1, &fields)).collect();
        let room = frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes());
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &room, &exports].concat()).unwrap();
        stream
    });
    connections.collect()
}

#[test]
fn a_gate_that_ends_before_its_streams_do_counts_what_they_have_delivered_and_nothing_else() {
    let image = [b'x'; 1 << 20];
    for (durability, delivers) in [("strict", false), ("periodic", true)] {
        let (silence, _release) = Reply::held(b"", b"");
        let reply = if delivers { Reply::with("200 OK", &["content-type: image/png"], &image) } else { silence };
        let backend = Backend::start(reply);
        let gate = Setup::before(backend.address)
            .set("EXPORT_GATE__SERVER__H2C", "true")
            .set("EXPORT_GATE__SERVER__DRAIN_TIMEOUT", "50ms")
            .set("EXPORT_GATE__LEDGER__DURABILITY", durability)
            .start();
        let line = Token::of("u").plan("max").ai().line();
        let mut connections = ask_for_many(&gate, line.split_once(": ").unwrap().1);
        eventually("all are at the backend", || backend.seen().len() == 100);
        for stream in connections.iter_mut().filter(|_| delivers) {
            let mut begun = BTreeSet::new();
            while begun.len() < 25 {
                let frame = read_frame(stream).unwrap();
                begun.extend((frame.kind == DATA).then_some(frame.stream));
            }
        }
        let gate = gate.restart();
        assert_eq!(gate.used("u", "ai-exports"), if delivers { 100 } else { 0 }, "{durability}");
    }
}

#[test]
fn a_client_that_does_not_answer_the_good_bye_holds_no_gate_up() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address)
        .set("EXPORT_GATE__SERVER__H2C", "true")
        .set("EXPORT_GATE__SERVER__IDLE_TIMEOUT", "1h")
        .set("EXPORT_GATE__SERVER__DRAIN_TIMEOUT", "1h")
        .start();
    let mut asleep = TcpStream::connect(gate.address).unwrap();
    asleep.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    asleep.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &page(1)].concat()).unwrap();
    while read_frame(&mut asleep).unwrap().kind != DATA {}
    gate.signal("TERM");
    assert_eq!(gate.stop_code(), Some(0));
}

/// What a backend does about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reaction {
    /// Answers it with an image.
    Answers,
    /// Goes away, and says that it has looked at no stream after this one; it stays on the line.
    GoesAway(u32),
    /// Says the same, and hangs up.
    HangsUp(u32),
    /// Sends less than it says, and resets the stream without an error.
    StopsShort,
}

/// A backend of HTTP/2 that does this about each request, by its connection and its stream, and what it has seen.
struct Leaving {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(usize, u32)>>>,
    /// What came of uploads.
    uploads: Arc<Mutex<Uploads>>,
}

type Uploads = BTreeMap<(usize, u32), Vec<u8>>;

impl Leaving {
    fn start(react: fn(usize, u32) -> Reaction) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<(usize, u32)>>> = Arc::default();
        let uploads: Arc<Mutex<Uploads>> = Arc::default();
        let shared = (seen.clone(), uploads.clone());
        std::thread::spawn(move || {
            for (index, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                let (seen, uploads) = shared.clone();
                std::thread::spawn(move || speak(stream, index, react, &seen, &uploads));
            }
        });
        Self { address, seen, uploads }
    }

    fn upload(&self, connection: usize, stream: u32) -> Vec<u8> {
        self.uploads.lock().unwrap().get(&(connection, stream)).cloned().unwrap_or_default()
    }

    fn seen(&self) -> Vec<(usize, u32)> {
        self.seen.lock().unwrap().clone()
    }
}

fn speak(
    mut stream: TcpStream,
    index: usize,
    react: fn(usize, u32) -> Reaction,
    seen: &Mutex<Vec<(usize, u32)>>,
    uploads: &Mutex<Uploads>,
) -> io::Result<()> {
    stream.read_exact(&mut [0; PREFACE.len()])?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[]))?;
    loop {
        let Frame { kind, flags, stream: id, payload } = read_frame(&mut stream)?;
        match kind {
            SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[]))?,
            PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, 0, &payload))?,
            DATA => uploads.lock().unwrap().entry((index, id)).or_default().extend(payload),
            HEADERS => {
                seen.lock().unwrap().push((index, id));
                let good_bye = |last: u32| frame(GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat());
                match react(index, id) {
                    Reaction::Answers => {
                        let head = block(&[(":status", "200"), ("content-type", "image/png")]);
                        let answer = [frame(HEADERS, END_HEADERS, id, &head), frame(DATA, END_STREAM, id, b"an image")];
                        stream.write_all(&answer.concat())?;
                    }
                    Reaction::StopsShort => {
                        let head = [(":status", "200"), ("content-type", "image/png"), ("content-length", "1000")];
                        let part = [frame(HEADERS, END_HEADERS, id, &block(&head)), frame(DATA, 0, id, b"an image")];
                        stream.write_all(&[&*part.concat(), &frame(RST_STREAM, 0, id, &[0; 4])].concat())?;
                    }
                    Reaction::GoesAway(last) => stream.write_all(&good_bye(last))?,
                    Reaction::HangsUp(last) => return stream.write_all(&good_bye(last)),
                }
            }
            _ => {}
        }
    }
}

fn before_leaving(endpoints: &[SocketAddr]) -> Setup {
    let urls: Vec<String> = endpoints.iter().map(|endpoint| format!("\"http://{endpoint}\"")).collect();
    Setup::before(endpoints[0])
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", &format!("[{}]", urls.join(", ")))
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", "http2")
}

/// Two exports by this method and with this body, of which the backend goes away at the second: its status, and how many are charged.
fn second_export(backend: &Leaving, method: &str, body: &[u8]) -> (u16, u64) {
    let gate = before_leaving(&[backend.address]).start();
    let token = Token::of("u").plan("max").ai().line();
    assert_eq!(get(gate.address, EXPORT, &[&token]).status, 200);
    let status = request(gate.address, method, EXPORT, &[&token], body).status;
    assert!(settles(&gate));
    (status, gate.used("u", "ai-exports"))
}

#[test]
fn what_a_backend_has_not_looked_at_before_it_went_away_is_repeated_once() {
    for hangs_up in [false, true] {
        let react: fn(usize, u32) -> Reaction = match hangs_up {
            false => |connection, stream| match (connection, stream) {
                (0, 3) => Reaction::GoesAway(1),
                _ => Reaction::Answers,
            },
            true => |connection, stream| match (connection, stream) {
                (0, 3) => Reaction::HangsUp(1),
                _ => Reaction::Answers,
            },
        };
        for method in ["GET", "POST"] {
            let backend = Leaving::start(react);
            assert_eq!(second_export(&backend, method, b""), (200, 2), "{method} {hangs_up}");
            assert_eq!(backend.seen(), [(0, 1), (0, 3), (1, 1)], "{method} {hangs_up}");
        }
        // With all of a body that is not too long to be kept.
        let backend = Leaving::start(react);
        assert_eq!(second_export(&backend, "POST", b"a save"), (200, 2), "{hangs_up}");
        assert_eq!(backend.seen(), [(0, 1), (0, 3), (1, 1)], "{hangs_up}");
        eventually("the upload is whole", || backend.upload(1, 1) == b"a save");
    }
}

#[test]
fn an_answer_that_is_reset_before_the_end_that_it_named_is_broken_off() {
    let backend = Leaving::start(|_, _| Reaction::StopsShort);
    let gate = before_leaving(&[backend.address]).start();
    let mut client = TcpStream::connect(gate.address).unwrap();
    let token = Token::of("u").plan("max").ai().line();
    write!(client, "GET {EXPORT} HTTP/1.1\r\nhost: a\r\n{token}\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    assert!(answer.len() < 1_000, "{} bytes", answer.len());
    assert!(settles(&gate));
    assert_eq!(gate.used("u", "ai-exports"), 0, "its client had taken all that came");
}

#[test]
fn what_a_backend_may_have_looked_at_before_it_hung_up_is_repeated_once_if_it_is_safe() {
    let react = |connection, stream| match (connection, stream) {
        (0, 3) => Reaction::HangsUp(3),
        _ => Reaction::Answers,
    };
    let backend = Leaving::start(react);
    assert_eq!(second_export(&backend, "POST", b""), (502, 1));
    assert_eq!(backend.seen(), [(0, 1), (0, 3)]);
    let backend = Leaving::start(react);
    assert_eq!(second_export(&backend, "GET", b""), (200, 2));
    assert_eq!(backend.seen(), [(0, 1), (0, 3), (1, 1)]);
}

#[test]
fn what_an_endpoint_never_looks_at_is_sent_to_another_once() {
    let leaving = Leaving::start(|_, _| Reaction::GoesAway(0));
    let staying = Leaving::start(|_, _| Reaction::Answers);
    let gate = before_leaving(&[leaving.address, staying.address]).start();
    let token = Token::of("u").plan("max").ai().line();
    let mut sent = 0;
    while leaving.seen().is_empty() {
        assert_eq!(request(gate.address, "POST", EXPORT, &[&token], b"").status, 200);
        sent += 1;
    }
    assert_eq!(leaving.seen(), [(0, 1), (1, 1), (2, 1)], "not for ever");
    assert_eq!(staying.seen().len(), sent);
    assert!(settles(&gate));
    assert_eq!(gate.used("u", "ai-exports"), sent as u64);
}

#[test]
fn what_an_endpoint_that_never_begins_is_asked_for_goes_to_another_a_body_and_all() {
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let staying = Leaving::start(|_, _| Reaction::Answers);
    let gate = before_leaving(&[mute.local_addr().unwrap(), staying.address])
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__CONNECT_TIMEOUT", "100ms")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "2")
        .start();
    let token = Token::of("u").plan("max").ai().line();
    let left_out = || gate.metric(r#"exportgate_endpoints{upstream="renderer",state="ejected"}"#) == 1.0;
    let mut sent = 0;
    while !left_out() {
        assert_eq!(request(gate.address, "POST", EXPORT, &[&token], b"{}").status, 200);
        sent += 1;
    }
    assert_eq!(staying.seen().len(), sent);
    assert!(settles(&gate));
    assert_eq!(gate.used("u", "ai-exports"), sent as u64);
}
