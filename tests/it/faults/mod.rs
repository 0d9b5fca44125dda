//! The ledger's folder after kills and power cuts at chosen instants, by strace: not by luck, as in `crash`.
//!
//! * `kills.rs`: the gate is killed as it enters a system call for the Nth time.
//! * `power.rs`: what a gate has written is recorded (`trace.rs`), and a disk (`disk.rs`) says what a power cut would
//!   have left of it at each instant. Each such folder is opened as a gate would.
//!
//! `FAULTS=all cargo test --test it faults` tries all instants; without it a choice that is the same each time.

mod disk;
mod kills;
mod power;
mod record;
mod replay;
mod trace;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;

use crate::support::{Backend, Reply, Seen, Setup, Token};

/// Whether all instants are wanted.
fn all() -> bool {
    std::env::var("FAULTS").is_ok_and(|faults| faults == "all")
}

/// Has two threads do all jobs.
fn shared_out<J: Send>(jobs: Vec<J>, work: impl Fn(J) + Sync) {
    let jobs = Mutex::new(jobs.into_iter());
    let next = || jobs.lock().unwrap().next();
    std::thread::scope(|scope| {
        let workers = [(); 2].map(|()| {
            scope.spawn(|| {
                while let Some(job) = next() {
                    work(job);
                }
            })
        });
        for worker in workers {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

/// A generator of numbers that look random, the same at each run.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn of(seed: u64) -> Self {
        let mut dice = Self(seed);
        // Seeds that lie side by side begin alike.
        (0..4).for_each(|_| _ = dice.roll(2));
        dice
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// A backend whose images say of which design they are. The design's name begins with its user's, and says if it comes
/// to nothing.
fn backend() -> Backend {
    Backend::start(Reply::By(render))
}

fn render(request: &Seen) -> Reply {
    let design = request.line.split('/').nth(3).unwrap_or_default();
    if design.ends_with("-void") {
        return Reply::json("500 Internal Server Error");
    }
    if design.ends_with("-held") {
        return Reply::Silence;
    }
    Reply::with("200 OK", &["content-type: image/png"], format!("image of {design};").as_bytes())
}

/// A gate with limits that nobody reaches.
fn setup(backend: &Backend) -> Setup {
    Setup::before(backend.address)
        .set("EXPORT_GATE__LEDGER__DURABILITY", "strict")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1000000")
}

/// What clients have seen of each user, over all gates.
#[derive(Default)]
struct Tally {
    users: Mutex<BTreeMap<String, Seens>>,
    /// What the names of their designs have that no other tally's have.
    label: &'static str,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seens {
    attempts: u64,
    /// Of which at least one byte has come.
    images: u64,
}

impl Tally {
    fn of(&self, user: &str) -> Seens {
        self.users.lock().unwrap().get(user).copied().unwrap_or_default()
    }

    fn note(&self, user: &str, note: impl FnOnce(&mut Seens)) -> u64 {
        let mut users = self.users.lock().unwrap();
        let seen = users.entry(user.to_owned()).or_default();
        note(seen);
        seen.attempts
    }

    /// Exports a design that nobody has exported before; a cover could not hold. Every fourth comes to nothing. Whether
    /// the gate is still there.
    fn export(&self, gate: SocketAddr, user: &str, token: &Token) -> bool {
        let Ok(stream) = TcpStream::connect(gate) else { return false };
        let attempt = self.note(user, |seen| seen.attempts += 1);
        let end = if attempt % 4 == 3 { "-void" } else { "" };
        self.ask(stream, user, &format!("{user}-{}{attempt}{end}", self.label), token)
    }

    fn ask(&self, mut stream: TcpStream, user: &str, design: &str, token: &Token) -> bool {
        if Self::send(&mut stream, design, token).is_err() {
            return false;
        }
        let mut answer = Vec::new();
        // A gate that is killed resets the connection: what has come until then has come.
        let whole = stream.read_to_end(&mut answer).is_ok();
        let text = String::from_utf8_lossy(&answer);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        if text.starts_with("HTTP/1.1 200") && !body.is_empty() {
            self.note(user, |seen| seen.images += 1);
        }
        whole && !answer.is_empty()
    }

    fn send(stream: &mut TcpStream, design: &str, token: &Token) -> std::io::Result<()> {
        let head = format!("GET /v1/designs/{design}/download HTTP/1.1\r\nhost: g\r\nconnection: close\r\n");
        write!(stream, "{head}{}\r\n\r\n", token.line())
    }
}
