//! What outlives every gate: the driver's clock, its list of attempts, and where the gate of the moment is.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::backend::{ATTEMPT, Backend, Whim};
use super::books::{Attempt, Coverage, End, Habit, User};
use super::process::Life;
use super::trigger::{Event, Trigger};
use crate::support::Token;

/// How many exports a user has who uses them up.
pub(super) const FEW: u64 = 2;

/// A gate that clients speak to.
#[derive(Clone)]
pub(super) struct Gate {
    pub(super) address: SocketAddr,
    pub(super) life: Arc<Life>,
}

/// Shared by all clients.
pub(super) struct World {
    pub(super) seed: u64,
    pub(super) trigger: Arc<Trigger>,
    pub(super) backend: Backend,
    /// The driver's time.
    clock: AtomicU64,
    /// Names for attempts, designs and users.
    names: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    violation: Mutex<Option<String>>,
    now: Mutex<Now>,
    changed: Condvar,
    others: AtomicU64,
}

#[derive(Default)]
struct Now {
    gate: Option<Gate>,
    is_over: bool,
}

/// What a client wants.
pub(super) struct Ask<'a> {
    pub(super) method: &'a str,
    /// After `/v1/designs/`.
    pub(super) what: &'a str,
    pub(super) key: Option<&'a str>,
    pub(super) coverage: Coverage,
    /// Whether the backend is to have no whims about it.
    pub(super) is_plain: bool,
}

/// What has become of it. `None` if the gate was not there any more.
pub(super) type Became = Option<(End, Whole)>;

/// Whether an answer has come to its end, and when.
pub(super) type Whole = Option<u64>;

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let trigger = Arc::<Trigger>::default();
        Self {
            seed,
            backend: Backend::start(seed, trigger.clone()),
            trigger,
            clock: AtomicU64::new(1),
            names: AtomicU64::new(1),
            attempts: Mutex::default(),
            violation: Mutex::default(),
            now: Mutex::default(),
            changed: Condvar::new(),
            others: AtomicU64::new(0),
        }
    }

    /// A name that nobody has had.
    pub(super) fn name(&self) -> u64 {
        self.names.fetch_add(1, Ordering::SeqCst)
    }

    fn name_of_plain_attempt(&self) -> u64 {
        loop {
            let name = self.name();
            if Whim::about(self.seed, name) == Whim::Image {
                return name;
            }
        }
    }

    /// A user who has not exported anything.
    pub(super) fn user(&self, habit: Habit, limit: Option<u64>) -> Arc<User> {
        let name = format!("{habit:?}-{}", self.name());
        let token = Token::of(&name);
        let (token, meters): (_, &[&str]) = match (habit, limit) {
            (Habit::Screen, _) => (token.ai().on("ios"), &["ai-exports"]),
            (_, Some(_)) => (token.plan("pro"), &["exports", "fair-use"]),
            (_, None) => (token, &["exports"]),
        };
        Arc::new(User { token: token.line(), name, meters, limit, habit })
    }

    /// Exports, and takes down what has come of it.
    pub(super) fn export(&self, gate: &Gate, user: &Arc<User>, ask: &Ask<'_>) -> Became {
        let Ask { method, what, key, coverage, is_plain } = *ask;
        let id = if is_plain { self.name_of_plain_attempt() } else { self.name() };
        let key = key.map(|key| format!("idempotency-key: {key}\r\n")).unwrap_or_default();
        let fields = format!("{}\r\n{key}{ATTEMPT}: {id}\r\n", user.token);
        let sent = self.tick();
        let answer = exchange(gate.address, &request(method, &format!("/v1/designs/{what}"), &fields), |answer| {
            if answer.is_image && answer.body > 0 {
                self.trigger.saw(Event::Image);
            }
        });
        let is_ending = gate.life.is_ending();
        let Some(answer) = answer else {
            if !is_ending {
                self.violated(format!("{}: no connection for {method} {what}", user.name));
            }
            return None;
        };
        let whim = Whim::about(self.seed, id);
        let is_refused = answer.status == 429 && user.limit.is_some();
        let is_screen = what.ends_with("export-screen");
        let end = match answer.status {
            _ if is_refused => End::Refused,
            200..300 if is_screen && whim == Whim::HalfABody => End::Broken,
            200..300 if is_screen => End::Image,
            200 if answer.is_image && answer.body > 0 && whim == Whim::HalfABody => End::Broken,
            200 if answer.is_image && answer.body > 0 => End::Image,
            _ if answer.is_whole => End::Nothing,
            _ => End::Unknown,
        };
        let is_expected = is_refused || answer.status == whim.status();
        let may_break = whim == Whim::HalfABody || is_ending;
        if (answer.status > 0 && !is_expected) || (!answer.is_whole && !may_break) {
            self.violated(format!("{}: {method} {what}, the backend's whim was {whim:?}: {answer:?}", user.name));
        }
        if is_refused {
            self.trigger.saw(Event::Refusal);
        }
        if is_refused == self.backend.was_called(id) && end != End::Unknown {
            self.violated(format!("{}: {end:?}, and the backend was called: {}", user.name, !is_refused));
        }
        let over = self.tick();
        let attempt = Attempt { user: user.clone(), sent, over, end, is_whole: answer.is_whole, coverage };
        self.attempts.lock().unwrap().push(attempt);
        (!is_ending).then_some((end, answer.is_whole.then_some(over)))
    }

    /// When the answer came, if it did.
    pub(super) fn leave_screen(&self, gate: &Gate, user: &User, design: &str) -> Whole {
        let request = request("DELETE", &format!("/v1/designs/{design}/export-screen"), &format!("{}\r\n", user.token));
        let answer = exchange(gate.address, &request, |_| {});
        self.is_other(gate, "leave", answer).then(|| self.tick())
    }

    /// Asks for what is no export, for as long as there are gates: an answer, or a reset by a gate that ends.
    pub(super) fn ask_for_other_things(&self) {
        let things = [("PUT", "/v1/designs/d"), ("POST", "/v1/designs/d/link"), ("GET", "/v1/designs/d/preview")];
        for (method, target) in things.iter().chain(&[("GET", "/any/thing")]).cycle() {
            let Some(gate) = self.wait_for_gate() else { return };
            self.is_other(&gate, target, exchange(gate.address, &request(method, target, ""), |_| {}));
        }
    }

    /// Whether what is no export was answered. If not, the gate is ending.
    fn is_other(&self, gate: &Gate, target: &str, answer: Option<Answer>) -> bool {
        let is_ending = gate.life.is_ending();
        match answer {
            Some(Answer { status: 200, is_whole: true, .. }) => {
                self.others.fetch_add(1, Ordering::Relaxed);
                self.trigger.saw(Event::Other);
                return true;
            }
            // What has come of it is right.
            Some(Answer { status: 200 | 0, .. }) | None if is_ending => {}
            answer => self.violated(format!("{target}: {answer:?}")),
        }
        false
    }

    /// Something that must not be. The gate ends; what is said first is kept.
    pub(super) fn violated(&self, what: String) {
        self.violation.lock().unwrap().get_or_insert(what);
        self.trigger.pull();
    }

    pub(super) fn violation(&self) -> Result<(), String> {
        self.violation.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    /// Where clients find the gate from now on.
    pub(super) fn gate_is(&self, gate: Option<Gate>) {
        self.now.lock().unwrap().gate = gate;
        self.changed.notify_all();
    }

    /// When what is returned is dropped, there will be no other gate.
    pub(super) fn until_dropped(&self) -> impl Drop {
        struct Ends<'w>(&'w World);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.now.lock().unwrap().is_over = true;
                self.0.changed.notify_all();
            }
        }
        Ends(self)
    }

    /// A gate that is not ending; `None` when there will be none.
    fn wait_for_gate(&self) -> Option<Gate> {
        let is_gone = |now: &mut Now| !now.is_over && now.gate.as_ref().is_none_or(|gate| gate.life.is_ending());
        let now = self.changed.wait_while(self.now.lock().unwrap(), is_gone).unwrap();
        now.gate.clone().filter(|_| !now.is_over)
    }

    /// All attempts since the last time.
    pub(super) fn take_attempts(&self) -> Vec<Attempt> {
        std::mem::take(&mut self.attempts.lock().unwrap())
    }

    /// How many requests were answered that are no exports.
    pub(super) fn others(&self) -> u64 {
        self.others.load(Ordering::Relaxed)
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

fn request(method: &str, target: &str, fields: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nhost: gate.test\r\nconnection: close\r\n{fields}\r\n")
}

/// As much of an answer as has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Answer {
    /// 0 before there is a head.
    status: u16,
    is_image: bool,
    /// Bytes of the body.
    body: usize,
    is_whole: bool,
}

/// Sends a request and reads until the connection ends; `began` is told once, as soon as a byte of a body has come. `None` if there
/// is no connection.
fn exchange(address: SocketAddr, request: &str, began: impl FnOnce(Answer)) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (mut began, mut answer) = (Some(began), Answer::default());
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    if stream.write_all(request.as_bytes()).is_ok() {
        while let Ok(length @ 1..) = stream.read(&mut piece) {
            bytes.extend_from_slice(&piece[..length]);
            answer = Answer::of(&bytes).unwrap_or_default();
            if let Some(began) = began.take_if(|_| answer.body > 0) {
                began(answer);
            }
        }
    }
    Some(answer)
}

impl Answer {
    /// `None` before the head is there.
    fn of(bytes: &[u8]) -> Option<Self> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let body = &bytes[end + 4..];
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let length = head.split("\r\ncontent-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let (body, is_whole) = if head.contains("\r\ntransfer-encoding: chunked") {
            unchunked(body)
        } else {
            (body.len(), length.map_or(status == 204, |length: usize| body.len() == length))
        };
        Some(Self { status, is_image: head.contains("\r\ncontent-type: image/"), body, is_whole })
    }
}

/// How many bytes have come in chunks, and whether it was all.
fn unchunked(mut bytes: &[u8]) -> (usize, bool) {
    let mut sum = 0;
    while let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") {
        let size = usize::from_str_radix(String::from_utf8_lossy(&bytes[..end]).trim(), 16).unwrap();
        if size == 0 {
            return (sum, bytes.len() >= end + 4);
        }
        sum += size.min(bytes.len() - end - 2);
        bytes = bytes.get(end + 2 + size + 2..).unwrap_or_default();
    }
    (sum, false)
}
