//! kill -9 at random instants, over and over: no image has left that is not counted, and nothing is counted that nobody asked for.
//!
//! ```text
//!   clients  ──> gate ──> backend          the gate is killed, the rest is not
//!      └── attempts ──┐     └── calls
//!                     ├── books: after each restart they, the gate's usage and the store must agree
//!   store, read by others than the gate ──┘
//! ```
//!
//! The clients of some users export new designs; of others the same design again, with one key, or from an export screen, so that
//! earlier charges and redeliveries cover it; of others few exports until they are refused. All the time some save and link. The
//! backend has whims. What ends a gate is what is seen, at a number that dice say: never a clock.
//!
//! `CRASHES=1000 cargo test --test it crash` kills more often than CI does; `CRASH_SEED` throws the same dice again.

mod backend;
mod books;
mod clients;
mod dice;
mod process;
mod store;
mod trigger;
mod world;

use std::fmt::{Display, Formatter};
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use crate::support::{Setup, get};
use books::{Books, End, Habit, Life, User};
use clients::{Few, Follower};
use dice::Dice;
use process::{Process, errors};
use store::{Counts, in_the_store};
use trigger::{Event, How};
use world::{FEW, Gate, World};

#[test]
fn no_image_leaves_uncounted_over_many_kills() {
    let kills = variable("CRASHES").unwrap_or(25);
    let summary = run(seed(), kills, |setup| setup).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{summary:?}");
    assert!(summary.images > kills * 10, "too few images to tell: {summary:?}");
    let covered = [summary.by_session, summary.by_key, summary.redelivered];
    assert!(covered.iter().all(|covered| *covered > kills / 25), "too few are covered to tell: {summary:?}");
    assert!(summary.refused > kills && summary.others > kills * 10, "too few to tell: {summary:?}");
}

#[cfg(feature = "seeded-bugs")]
#[test]
fn the_harness_turns_red_on_each_seeded_bug() {
    use export_gate::seeded::{Bug, VARIABLE};
    const KILLS: u64 = 100;
    let seed = seed();
    let green = Bug::ALL.into_iter().filter(|bug| {
        let found = run(seed, KILLS, |setup| setup.set(VARIABLE, &format!("{bug:?}")));
        match &found {
            Ok(summary) => println!("{bug:?} was not found: {summary:?}"),
            Err(violation) => println!("{bug:?}: {violation}"),
        }
        found.is_ok()
    });
    let green: Vec<Bug> = green.collect();
    assert!(green.is_empty(), "not found with seed {seed}: {green:?}");
}

fn variable<T: FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

fn seed() -> u64 {
    variable("CRASH_SEED").unwrap_or_else(|| RandomState::new().hash_one(()) >> 32)
}

/// Something that must never be.
#[derive(Debug)]
struct Violation {
    seed: u64,
    /// How many gates had been killed.
    kills: u64,
    what: String,
}

impl Display for Violation {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "after {} kills with CRASH_SEED={}: {}", self.kills, self.seed, self.what)
    }
}

/// What has been seen, for those who wonder whether anything was.
#[derive(Debug, Default)]
struct Summary {
    kills: u64,
    clean_ends: u64,
    attempts: u64,
    images: u64,
    refused: u64,
    /// Requests that were no exports.
    others: u64,
    by_session: u64,
    by_key: u64,
    redelivered: u64,
}

/// Kills gates so often, and compares after each.
fn run(seed: u64, kills: u64, with: impl Fn(Setup) -> Setup) -> Result<Summary, Violation> {
    let world = World::new(seed);
    let setup = with(Setup::before(world.backend.address))
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__FREE", "1000000")
        .set("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "1000000")
        .set("EXPORT_GATE__METERS__EXPORTS__LIMITS__PRO", &FEW.to_string());
    let mut driver = Driver::before(&world, setup);
    let ended = std::thread::scope(|scope| {
        // However this ends, by a panic too.
        let _others = world.until_dropped();
        scope.spawn(|| world.ask_for_other_things());
        while driver.summary.kills < kills {
            driver.live_once()?;
        }
        Ok(())
    });
    let kills = driver.summary.kills;
    ended.map_err(|what| Violation { seed, kills, what })?;
    Ok(Summary { others: world.others(), ..driver.summary })
}

/// Starts gates, ends them, and keeps the books.
struct Driver<'w> {
    world: &'w World,
    setup: Setup,
    dice: Dice,
    books: Books,
    /// Users who export much: one from several clients at once, each of the others from one.
    together: Arc<User>,
    alone: [Arc<User>; 4],
    few: Few,
    followers: Vec<Follower>,
    /// Who has exported in the last life.
    exported: Vec<Arc<User>>,
    summary: Summary,
}

impl<'w> Driver<'w> {
    fn before(world: &'w World, setup: Setup) -> Self {
        let habits = [Habit::Again, Habit::Key, Habit::Again, Habit::Key, Habit::Screen];
        let followers = habits.into_iter().zip(1..).map(|(habit, which)| Follower::of(habit, world.seed, which));
        Self {
            world,
            setup,
            dice: Dice::of(world.seed, 0),
            books: Books::default(),
            together: world.user(Habit::Fresh, None),
            alone: [(); 4].map(|()| world.user(Habit::Fresh, None)),
            few: Mutex::new(world.user(Habit::Fresh, Some(FEW))),
            followers: followers.collect(),
            exported: Vec::new(),
            summary: Summary::default(),
        }
    }

    /// A gate's life from its start to its end, and what must be true then. Some never get so far.
    fn live_once(&mut self) -> Result<(), String> {
        // Some intervals are never reached, some nearly always.
        for (name, intervals) in [
            ("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", ["5ms", "50ms", "1h"]),
            ("EXPORT_GATE__LEDGER__SYNC_INTERVAL", ["1ms", "10ms", "30ms"]),
            ("EXPORT_GATE__LEDGER__COMPACT_INTERVAL", ["1ms", "20ms", "1h"]),
        ] {
            self.setup = self.setup.clone().set(name, intervals[self.dice.roll(3) as usize]);
        }
        while self.dice.once_in(5) {
            self.die_at_birth()?;
        }
        let how = if self.dice.once_in(6) { How::Asked } else { How::Killed };
        let events = [(Event::Image, 150), (Event::Image, 40), (Event::Call, 150), (Event::Refusal, 30)];
        // In a crowd all meet; a few are served so fast that the kill comes right after what they have seen.
        let is_crowd = !self.dice.once_in(3);
        let (event, most) = events[self.dice.roll(if is_crowd { 4 } else { 3 }) as usize];
        let number = 1 + self.dice.roll(most);

        let process = Process::spawn(&self.setup);
        let (gate, operators) = process.addresses().ok_or("the gate does not listen")?;
        let gate = Gate { address: gate, life: process.life() };
        self.world.gate_is(Some(gate.clone()));
        if !process.is_ready() {
            return Err("the gate does not become ready".to_owned());
        }
        self.compare_usage(operators)?;
        self.world.trigger.arm(process, how, event, number);
        let process = std::thread::scope(|scope| {
            let (world, gate, few, together) = (self.world, &gate, &self.few, &self.together);
            let of = |crowd: u64, few: u64| if is_crowd { crowd as usize } else { few as usize };
            for user in self.alone.iter().take(of(4, 2)) {
                scope.spawn(move || clients::export_plainly(world, gate, user));
            }
            for _ in 0..of(3, 1) {
                scope.spawn(move || clients::export_much(world, gate, together));
            }
            for _ in 0..of(3 * FEW, 0) {
                scope.spawn(move || clients::use_up(world, gate, few));
            }
            for follower in self.followers.iter_mut().take(of(5, 2)) {
                scope.spawn(move || follower.follow(world, gate));
            }
            let process = world.trigger.wait();
            // Nothing new comes any more that an answer could wait for.
            world.backend.hurry(how == How::Asked);
            process
        });
        let (status, log) = process.wait();
        self.is_gone(&log)?;
        if how == How::Asked && !status.success() {
            return Err(format!("a clean end with {status}"));
        }
        let life = Life { attempts: self.world.take_attempts(), is_clean: how == How::Asked };
        self.followers.iter_mut().for_each(|follower| follower.life_is_over(&life));
        self.add_up(&life, &log);
        let (counts, open) = in_the_store(&self.setup.folder);
        for ((user, meter), booked) in open {
            let count = counts.get(&(user.clone(), meter.clone())).copied().unwrap_or_default();
            if booked > count.reserved {
                return Err(format!("{user}: {booked} {meter} would be owed, and {count:?} counted"));
            }
        }
        self.books.close(&life, &counts)?;
        self.exported = life.users();
        Ok(())
    }

    /// A gate that is killed before it has done much: right after its start, when it listens, when it is ready, or while others
    /// than exports come already.
    fn die_at_birth(&mut self) -> Result<(), String> {
        let (before, _) = in_the_store(&self.setup.folder);
        let mut process = Process::spawn(&self.setup);
        match self.dice.roll(4) {
            0 => {}
            1 => drop(process.addresses()),
            2 => drop(process.is_ready()),
            _ => {
                let (address, _) = process.addresses().ok_or("the gate does not listen")?;
                let gate = Gate { address, life: process.life() };
                self.world.trigger.arm(process, How::Killed, Event::Other, 1 + self.dice.roll(8));
                self.world.gate_is(Some(gate));
                process = self.world.trigger.wait();
            }
        }
        process.end(How::Killed);
        let (_, log) = process.wait();
        self.summary.kills += 1;
        self.is_gone(&log)?;
        let (after, _) = in_the_store(&self.setup.folder);
        let sums = |counts: &Counts| counts.iter().map(|(name, count)| (name.clone(), count.sum())).collect::<Vec<_>>();
        if sums(&before) != sums(&after) {
            return Err(format!("a start that was broken off has changed the store from {before:?} to {after:?}"));
        }
        Ok(())
    }

    fn is_gone(&self, log: &[String]) -> Result<(), String> {
        self.world.gate_is(None);
        self.world.backend.hurry(false);
        self.world.violation()?;
        errors(log).next().map_or(Ok(()), |line| Err(format!("the gate's log has {line}")))
    }

    /// What the gate says that those have used who have exported in the last life.
    fn compare_usage(&self, operators: SocketAddr) -> Result<(), String> {
        for user in &self.exported {
            let answer = get(operators, &format!("/v1/usage/{}?plan=max", user.name), &[]).json();
            let rows = answer["meters"].as_array().unwrap();
            for (meter, used) in user.meters.iter().zip(self.books.used(user)) {
                let row = rows.iter().find(|row| row["meter"] == *meter);
                let told = row.map(|row| (row["used"].as_u64(), row["in_flight"].as_u64()));
                if told != Some((Some(*used), Some(0))) {
                    return Err(format!("{}: the store has {used} {meter}, the gate says {answer}", user.name));
                }
            }
        }
        Ok(())
    }

    fn add_up(&mut self, life: &Life, log: &[String]) {
        let ended = |end| life.attempts.iter().filter(|attempt| attempt.end == end).count() as u64;
        let because = |reason: &str| {
            let reason = format!("\"reason\":\"{reason}\"");
            log.iter().filter(|line| line.contains(&reason)).count() as u64
        };
        let sum = &mut self.summary;
        sum.attempts += life.attempts.len() as u64;
        sum.images += ended(End::Image);
        sum.refused += ended(End::Refused);
        sum.by_session += because("session");
        sum.by_key += because("retry");
        sum.redelivered += because("redelivery");
        *if life.is_clean { &mut sum.clean_ends } else { &mut sum.kills } += 1;
    }
}
