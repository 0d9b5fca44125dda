//! A backend with whims: for each export it does what its dice say, and remembers who called.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use super::dice::Dice;
use super::trigger::{Event, Trigger};

/// The field that names an attempt.
pub(super) const ATTEMPT: &str = "x-attempt";

/// What becomes of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whim {
    /// An image in one piece.
    Image,
    /// Its pieces come after others have been served.
    Slow,
    /// The same, and nobody knows how many there will be.
    SlowChunks,
    /// Its head comes after others have been served.
    LateHead,
    /// 500.
    Failure,
    /// JSON.
    Message,
    /// 204.
    Nothing,
    /// The connection is closed.
    NoAnswer,
    /// The connection is closed within the head.
    HalfAHead,
    /// The connection is closed within the body.
    HalfABody,
}

impl Whim {
    /// The same attempt meets the same whim, however often it is sent.
    pub(super) fn about(seed: u64, attempt: u64) -> Self {
        match Dice::of(seed, attempt).roll(40) {
            0..=15 => Self::Image,
            16..=19 => Self::Slow,
            20..=22 => Self::SlowChunks,
            23..=26 => Self::LateHead,
            27..=31 => Self::Failure,
            32..=33 => Self::Message,
            34 => Self::Nothing,
            35..=36 => Self::NoAnswer,
            37 => Self::HalfAHead,
            _ => Self::HalfABody,
        }
    }

    /// The status that a client sees.
    pub(super) const fn status(self) -> u16 {
        match self {
            Self::Image | Self::Slow | Self::SlowChunks | Self::LateHead | Self::Message | Self::HalfABody => 200,
            Self::Nothing => 204,
            Self::Failure => 500,
            Self::NoAnswer | Self::HalfAHead => 502,
        }
    }
}

/// The backend. Ends its answers at once, and for good, when it is dropped.
pub(super) struct Backend {
    pub(super) address: SocketAddr,
    memory: Arc<Memory>,
}

struct Memory {
    seed: u64,
    trigger: Arc<Trigger>,
    seen: Mutex<Seen>,
    more: Condvar,
}

#[derive(Default)]
struct Seen {
    /// Requests of any kind.
    requests: u64,
    /// Attempts.
    calls: BTreeSet<u64>,
    /// Nothing is held back any more.
    hurries: bool,
}

impl Backend {
    pub(super) fn start(seed: u64, trigger: Arc<Trigger>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let memory = Arc::new(Memory { seed, trigger, seen: Mutex::default(), more: Condvar::new() });
        let shared = memory.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let memory = shared.clone();
                std::thread::spawn(move || converse(stream, &memory));
            }
        });
        Self { address, memory }
    }

    /// Whether an attempt has come this far.
    pub(super) fn was_called(&self, attempt: u64) -> bool {
        self.memory.seen.lock().unwrap().calls.contains(&attempt)
    }

    /// Whether answers are held back from now on.
    pub(super) fn hurry(&self, hurries: bool) {
        self.memory.seen.lock().unwrap().hurries = hurries;
        self.memory.more.notify_all();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.hurry(true);
    }
}

impl Memory {
    fn saw(&self, attempt: Option<u64>) {
        let mut seen = self.seen.lock().unwrap();
        seen.requests += 1;
        seen.calls.extend(attempt);
        drop(seen);
        self.more.notify_all();
        if attempt.is_some() {
            self.trigger.saw(Event::Call);
        }
    }

    /// Waits until so many others have come, whoever they are: there are always some while a gate is there.
    fn wait_for_others(&self, number: u64) {
        let seen = self.seen.lock().unwrap();
        let until = seen.requests + number;
        drop(self.more.wait_while(seen, |seen| seen.requests < until && !seen.hurries).unwrap());
    }
}

/// Serves one connection; `None` when it has ended.
fn converse(stream: TcpStream, memory: &Memory) -> Option<()> {
    const IMAGE: &str = "HTTP/1.1 200 OK\r\ncontent-type: image/png\r\netag: \"v1\"\r\n";
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    // A piece leaves when it is written, and not some time after the one before.
    stream.set_nodelay(true).ok()?;
    let send = |text: &str| (&stream).write_all(text.as_bytes()).ok();
    loop {
        let attempt = read_request(&mut reader)?;
        memory.saw(attempt);
        let Some(attempt) = attempt else {
            send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            continue;
        };
        let mut dice = Dice::of(!memory.seed, attempt);
        match Whim::about(memory.seed, attempt) {
            Whim::Image => send(&format!("{IMAGE}content-length: 8\r\n\r\nan image"))?,
            Whim::Slow => {
                send(&format!("{IMAGE}content-length: 8\r\n\r\nan"))?;
                for piece in [" i", "ma", "ge"] {
                    memory.wait_for_others(dice.roll(6));
                    send(piece)?;
                }
            }
            Whim::SlowChunks => {
                send(&format!("{IMAGE}transfer-encoding: chunked\r\n\r\n4\r\nan i\r\n"))?;
                memory.wait_for_others(dice.roll(6));
                send("4\r\nmage\r\n")?;
                memory.wait_for_others(dice.roll(6));
                send("0\r\n\r\n")?;
            }
            Whim::LateHead => {
                memory.wait_for_others(dice.roll(10));
                send(&format!("{IMAGE}content-length: 8\r\n\r\nan image"))?;
            }
            Whim::Failure => {
                send("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 5\r\n\r\nsorry")?;
            }
            Whim::Message => {
                send("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")?;
            }
            Whim::Nothing => send("HTTP/1.1 204 No Content\r\n\r\n")?,
            Whim::NoAnswer => return stream.shutdown(Shutdown::Both).ok(),
            Whim::HalfAHead => {
                send("HTTP/1.1 200 OK\r\ncontent-le")?;
                return stream.shutdown(Shutdown::Both).ok();
            }
            Whim::HalfABody => {
                send(&format!("{IMAGE}content-length: 8\r\n\r\nan"))?;
                memory.wait_for_others(dice.roll(3));
                return stream.shutdown(Shutdown::Both).ok();
            }
        }
    }
}

/// The attempt that a request is, if it is one. `None` at the end of the connection.
#[expect(clippy::option_option, reason = "no request, and a request that is no attempt")]
fn read_request(reader: &mut impl BufRead) -> Option<Option<u64>> {
    let mut attempt = None;
    for first in std::iter::once(true).chain(std::iter::repeat(false)) {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        if line.trim_end().is_empty() && !first {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case(ATTEMPT)
        {
            attempt = value.trim().parse().ok();
        }
    }
    Some(attempt)
}
