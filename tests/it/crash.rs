//! kill -9 at random instants, over and over: no image has left that is not counted, and nothing is counted that nobody asked for.
//!
//! `CRASHES=1000 cargo test --test it crash` kills more often than CI does.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::support::{Backend, Reply, Setup, Token};

/// The plan of a user whose exports are used up under way.
const SMALL: &str = "pro";
/// How many that plan has.
const FEW: u64 = 60;

/// How many export for each user at once.
const CLIENTS: usize = 3;

/// What the clients have seen; outlives every gate.
#[derive(Default)]
struct Driver {
    attempts: Mutex<BTreeMap<String, u64>>,
    images: Mutex<BTreeMap<String, u64>>,
    refused: AtomicU64,
    designs: AtomicU64,
}

impl Driver {
    /// Exports a design that nobody has exported before; a cover could not hold. Whether the gate is still there.
    fn export(&self, gate: SocketAddr, user: &str, plan: &str) -> bool {
        let design = self.designs.fetch_add(1, Ordering::Relaxed);
        let Ok(mut stream) = TcpStream::connect(gate) else { return false };
        let token = Token::of(user).plan(plan).line();
        let request =
            format!("GET /v1/designs/n{design}/download HTTP/1.1\r\nhost: g\r\nconnection: close\r\n{token}\r\n\r\n");
        *self.attempts.lock().unwrap().entry(user.to_owned()).or_default() += 1;
        if stream.write_all(request.as_bytes()).is_err() {
            return false;
        }
        let mut answer = Vec::new();
        // A gate that is killed resets the connection: what has come until then has come.
        let whole = stream.read_to_end(&mut answer).is_ok();
        let text = String::from_utf8_lossy(&answer);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        if text.starts_with("HTTP/1.1 200") && !body.is_empty() {
            *self.images.lock().unwrap().entry(user.to_owned()).or_default() += 1;
        }
        if text.starts_with("HTTP/1.1 429") && plan != SMALL {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        whole && !answer.is_empty()
    }

    fn of(map: &Mutex<BTreeMap<String, u64>>, user: &str) -> u64 {
        map.lock().unwrap().get(user).copied().unwrap_or(0)
    }
}

/// What is used of a user, or under way, read from the file by another program than the gate.
fn in_the_file(setup: &Setup, what: &str, user: &str) -> u64 {
    let of_user = format!("meter = 'exports' AND subject = '{user}'");
    let sql = format!("SELECT coalesce(sum({what}), 0) FROM counters WHERE {of_user}");
    let output = Command::new("sqlite3").arg("-readonly").arg(setup.folder.path("export-gate.db")).arg(sql).output();
    String::from_utf8(output.unwrap().stdout).unwrap().trim().parse().unwrap()
}

/// A generator of numbers that look random, the same at each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

#[test]
fn no_image_leaves_uncounted_over_many_kills() {
    let crashes: u64 = std::env::var("CRASHES").ok().and_then(|number| number.parse().ok()).unwrap_or(25);
    let backend = Backend::start(Reply::image());
    let setup = Setup::before(backend.address)
        .set("EXPORT_GATE__LEDGER__DURABILITY", "strict")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1000000")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__PRO", &FEW.to_string());
    let driver = Arc::new(Driver::default());
    let mut dice = Dice(7);
    let users = [("u0", "free"), ("u1", "free"), ("u2", "free"), ("few", SMALL)];
    let mut used_before = [0; 4];
    for crash in 0..crashes {
        // Some intervals are never reached, some nearly always.
        let flush_interval = ["1ms", "20ms", "1h"][dice.roll(3) as usize];
        let gate = setup.clone().set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", flush_interval).start();
        backend.will(match dice.roll(4) {
            0 => Reply::json("500 Internal Server Error"),
            _ => Reply::image(),
        });
        let (over, address) = (Arc::new(AtomicBool::new(false)), gate.address);
        let clients: Vec<_> = users
            .iter()
            .flat_map(|user| [user; CLIENTS])
            .map(|&(user, plan)| {
                let (driver, over) = (driver.clone(), over.clone());
                std::thread::spawn(move || while !over.load(Ordering::Relaxed) && driver.export(address, user, plan) {})
            })
            .collect();
        // By what the backend has seen, not by a clock: the same number of exports on any machine.
        let until = backend.seen().len() + dice.roll(120) as usize;
        while backend.seen().len() < until {
            std::thread::yield_now();
        }
        if dice.roll(3) == 0 {
            backend.will(Reply::image());
            let more = backend.seen().len() + dice.roll(40) as usize;
            while backend.seen().len() < more {
                std::thread::yield_now();
            }
        }
        gate.signal("KILL");
        over.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
        drop(gate);

        backend.will(Reply::image());
        let in_file: Vec<u64> = users.iter().map(|(user, _)| in_the_file(&setup, "used + reserved", user)).collect();
        let gate = setup.start();
        for (index, &(user, plan)) in users.iter().enumerate() {
            let used = gate.used(user, "exports");
            let (images, attempts) = (Driver::of(&driver.images, user), Driver::of(&driver.attempts, user));
            let told = format!("crash {crash}, {user}: {images} images, {used} used, {attempts} attempts");
            assert!(images <= used && used <= attempts, "{told}");
            assert_eq!(used, in_file[index], "{told}: the file says otherwise");
            assert!(plan != SMALL || used <= FEW, "{told}: more than the limit");
            assert!(used >= used_before[index], "{told}: {} before", used_before[index]);
            used_before[index] = used;
        }
        // An export after a restart, and one that comes to nothing: at a clean end nothing is under way.
        assert!(driver.export(gate.address, "u0", "free"));
        backend.will(Reply::json("500 Internal Server Error"));
        assert!(driver.export(gate.address, "u1", "free"));
        assert!(gate.stop().success());
        for (index, (user, _)) in users.iter().enumerate() {
            let expected = used_before[index] + u64::from(*user == "u0");
            let text = format!("crash {crash}, {user}: after a clean end");
            // What the crash has left under way stays as it is until it changes.
            assert_eq!(in_the_file(&setup, "used + reserved", user), expected, "{text}");
        }
        used_before[0] += 1;
    }
    let images: u64 = driver.images.lock().unwrap().values().sum();
    assert!(images > crashes * 10, "{images} images are too few to tell");
    assert_eq!(driver.refused.load(Ordering::Relaxed), 0, "nobody was at a limit");
}
