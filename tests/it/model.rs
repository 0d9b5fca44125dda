//! The ledger against a model of it: random sequences of operations, and after each one both must say the same.
//!
//! The model is naive on purpose: a list of bookings that are summed up again for every question, a list of requests, a list of
//! covers. It shares the windows' arithmetic with the ledger and nothing else. Times are whole seconds.
//!
//! Sequences that failed once are run first (`model.proptest-regressions`). `PROPTEST_CASES` says how many others there are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use export_gate::clock::{Clock, ManualClock};
use export_gate::ledger::{
    Admission, Charge, ChargeRequest, CoverKind, Durability, Ledger, Options, Representation, Settlement,
};
use export_gate::ledger::{Why, run};
use export_gate::policy::{
    Anchor, Anchored, Calendar, CalendarUnit, Demand, Limit, Meter, MeterId, OnExceed, Period, PlanId, Plans, Policy,
    Rolling, SessionUse, Span, Subject, SubjectKind, Who, Whose, Window,
};
use export_gate::store::{CounterName, CoverName, CoverRow};
use jiff::Timestamp;
use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use smallvec::SmallVec;

use super::ledger::Disk;

const PLAN: PlanId = PlanId(0);
const USERS: usize = 3;
const DESIGNS: usize = 2;
const METERS: usize = 6;

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/model.proptest-regressions"),
        ))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_ledger_and_the_model_say_the_same_after_every_operation(
        idle in prop::option::weighted(0.3, Just(Duration::from_mins(10))),
        operations in vec(operation(), 1..=60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(compare(idle, operations))?;
    }
}

/// What can happen to a ledger.
#[derive(Debug, Clone)]
enum Operation {
    Charge(Ask),
    /// One of the requests under way ends.
    End(prop::sample::Index, End),
    /// The backend of one of them says how many images it brings.
    Report(prop::sample::Index, u32),
    /// The answer to one of the requests under way says that this file can be resumed.
    Resumable(prop::sample::Index, u8),
    Leave {
        user: usize,
        design: usize,
    },
    /// Other plans: the limits of all meters from now on.
    Limits([u32; METERS]),
    /// Another policy: other meters are asked for, of other subjects.
    Policy(usize),
    Pass(u64),
    /// The wall clock is set back by an hour.
    StepBack,
    Flush,
    Crash,
}

/// An export, as the policy at that time counts it.
#[derive(Debug, Clone)]
struct Ask {
    user: usize,
    design: usize,
    screen: SessionUse,
    cost: u32,
    key: Option<u8>,
    version: Option<u8>,
    rest_of: Option<u8>,
    shadow: bool,
    /// It was made before it was charged, degraded by these meters, a bit each.
    made: Option<u8>,
}

#[derive(Debug, Clone)]
enum End {
    Deliver,
    /// So many were delivered, says the backend, unless it has said so before.
    Report(u32),
    Void,
    Drop,
}

fn operation() -> impl Strategy<Value = Operation> {
    let seconds =
        [1, 1, 2, 2, 30, 30, 59, 60, 61, 299, 300, 600, 899, 900, 3_600, 39_600, 43_200, 86_399, 86_400, 604_800];
    prop_oneof![
        12 => ask().prop_map(Operation::Charge),
        12 => (any::<prop::sample::Index>(), end()).prop_map(|(which, end)| Operation::End(which, end)),
        3 => (any::<prop::sample::Index>(), 0_u32..=4).prop_map(|(which, images)| Operation::Report(which, images)),
        4 => (any::<prop::sample::Index>(), 0..2_u8).prop_map(|(which, file)| Operation::Resumable(which, file)),
        1 => (user(), design()).prop_map(|(user, design)| Operation::Leave { user, design }),
        1 => prop::array::uniform(0_u32..=4).prop_map(Operation::Limits),
        1 => (0..POLICIES.len()).prop_map(Operation::Policy),
        2 => prop::sample::select(seconds.to_vec()).prop_map(Operation::Pass),
        1 => Just(Operation::StepBack),
        1 => Just(Operation::Flush),
        1 => Just(Operation::Crash),
    ]
}

/// Mostly the same, so that they meet.
fn user() -> impl Strategy<Value = usize> {
    prop_oneof![6 => Just(0), 1 => 1..USERS]
}

fn design() -> impl Strategy<Value = usize> {
    prop_oneof![4 => Just(0), 1 => 1..DESIGNS]
}

fn ask() -> impl Strategy<Value = Ask> {
    let screen = prop_oneof![2 => Just(SessionUse::None), 1 => Just(SessionUse::Opens), 2 => Just(SessionUse::Covered)];
    let maybe = |share: f64, of: std::ops::Range<u8>| prop::option::weighted(share, of);
    let what = (user(), design(), screen, prop_oneof![3 => Just(1_u32), 1 => 2_u32..=3]);
    let how =
        (maybe(0.4, 0..2), maybe(0.2, 0..2), maybe(0.2, 0..2), prop::bool::weighted(0.1), maybe(0.1, 0..1 << METERS));
    (what, how).prop_map(|((user, design, screen, cost), (key, version, rest_of, shadow, made))| Ask {
        user,
        design,
        screen,
        cost,
        key,
        version,
        rest_of,
        shadow,
        made,
    })
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        5 => Just(End::Deliver),
        1 => (0_u32..=4).prop_map(End::Report),
        2 => Just(End::Void),
        1 => Just(End::Drop),
    ]
}

/// What the ledger counts: the windows of its meters.
static WINDOWS: LazyLock<[Window; METERS]> = LazyLock::new(|| {
    let utc = || TimeZone::UTC;
    let week = CalendarUnit::Week { starts: Weekday::Monday };
    [
        Window::Calendar(Calendar { unit: week, zone: utc() }),
        Window::Calendar(Calendar { unit: CalendarUnit::Day, zone: TimeZone::get("Europe/Berlin").unwrap() }),
        Window::Rolling(Rolling { lasts: 60 }),
        Window::Rolling(Rolling { lasts: 86_400 }),
        Window::FirstCharge(Anchored { period: Period::Seconds(300), zone: utc() }),
        Window::Billing(Anchored { period: Period::Months(1), zone: utc() }),
    ]
});

const WEEK: u8 = 0;
const DAY: u8 = 1;
const MINUTE: u8 = 2;
const LAST_DAY: u8 = 3;
const FIRST_USE: u8 = 4;
const BILLING: u8 = 5;

/// Meters on which a charge can open a session.
const WITH_SESSIONS: [u8; 3] = [WEEK, MINUTE, BILLING];

/// One meter of a policy: whose use it counts, what happens over the limit, and whether it only reports that.
type Counts = (u8, SubjectKind, OnExceed, bool);

const POLICIES: [&[Counts]; 7] = {
    use OnExceed::{Degrade, Deny, Observe};
    use SubjectKind::{Team, User};
    [
        &[(WEEK, User, Deny, false)],
        &[(WEEK, Team, Deny, false), (DAY, User, Deny, false)],
        &[(MINUTE, User, Deny, false), (FIRST_USE, User, Deny, false)],
        &[(BILLING, Team, Degrade, false), (WEEK, User, Deny, false), (DAY, User, Observe, false)],
        &[(LAST_DAY, Team, Deny, false), (FIRST_USE, Team, Degrade, false), (BILLING, User, Deny, true)],
        &[(FIRST_USE, User, Observe, false), (WEEK, User, Degrade, false)],
        &[(MINUTE, Team, Deny, true), (LAST_DAY, User, Deny, false), (WEEK, Team, Deny, false)],
    ]
};

/// Two share a team, and the team is named like one of them.
fn who(user: usize) -> Who {
    let (team, anchor) = match user {
        0 | 1 => ("user-0", Anchor::from_number(31)),
        _ => ("others", Anchor::from_text("2026-01-18T12:00:30Z")),
    };
    Who { team: Some(team.into()), billing_anchor: anchor, ..Who::user(format!("user-{user}")) }
}

fn subject(user: usize, kind: &SubjectKind) -> Subject {
    Whose(vec![kind.clone()]).subject(&who(user)).unwrap()
}

fn file(number: u8) -> Representation {
    Representation { validator: format!("etag \"{number}\"").into(), length: 100 }
}

/// All meters, by the kind of subject that they count: for reading the ledger.
static BY_KIND: LazyLock<[(SubjectKind, Policy); 2]> =
    LazyLock::new(|| [SubjectKind::User, SubjectKind::Team].map(|kind| (kind.clone(), policy(&kind))));

fn policy(kind: &SubjectKind) -> Policy {
    let meter = |(index, window): (usize, Window)| Meter {
        subject: Whose(vec![kind.clone()]),
        ..Meter::new(&format!("meter-{index}"), window, [Some(Limit::AtMost(1))])
    };
    Policy { plans: Plans::new(["free".into()]), meters: WINDOWS.iter().cloned().enumerate().map(meter).collect() }
}

fn options(idle: Option<Duration>) -> Options {
    Options { durability: Durability::Periodic, session_idle: idle, session_files: 3, ..Options::default() }
}

const SESSION: i64 = 86_400;
const RETRY: i64 = 15 * 60;
const RESUME: i64 = 15 * 60;
const SESSION_FILES: usize = 3;
const DELIVERIES_OF_A_KEY: usize = 1 + 2;

// ---- The model ----------------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
struct Booking {
    charge: usize,
    meter: u8,
    subject: Subject,
    /// The window it counts in; of a rolling one, the slot and when it is forgotten.
    span: Span,
    cost: u32,
    /// How much was delivered; `None` while it is under way.
    used: Option<u32>,
    /// What is still reserved after that: others that share the charge may bring what was booked.
    kept: u32,
    /// What is reserved beyond its cost, because a backend says so.
    extra: u32,
    /// What backends have said of it, in their order.
    told: Vec<u32>,
}

#[derive(Debug, Clone)]
struct ModelCharge {
    user: usize,
    degraded: Vec<u8>,
    opens: Option<(usize, Option<u8>)>,
    /// What an earlier opening with the same key has booked.
    repeated: Vec<(u8, u32)>,
    key: Option<u8>,
    /// The key whose cover has covered some of the request, and shall cover the rest.
    extends: Option<(u8, usize)>,
    /// The download that can be resumed.
    file: Option<u8>,
    /// What a session covers of that.
    by_session: Vec<(u8, u32)>,
    /// The request whose file that is, until what that has taken of a session is used, or given back.
    file_by: Option<usize>,
    /// How many files that has taken of which session.
    taken: Option<((Name, usize), usize)>,
    /// What its backend brings beyond them.
    beyond: Vec<Beyond>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    UnderWay,
    Delivered,
    Void,
}

#[derive(Debug, Clone)]
struct Request {
    /// The charge that it has booked itself.
    own: Option<usize>,
    /// The covers that it has taken files of, by name and charge.
    by: Vec<(Name, usize, usize)>,
    /// The charges under way that it shares.
    shares: Vec<usize>,
    /// By which of them it is paid for, on which meter.
    paid_by: Vec<(usize, u8)>,
    /// What delivered charges cover of it.
    held: Vec<Held>,
    /// How many images its backend says it brings.
    says: Option<u32>,
    /// What of that is beyond what covers it.
    beyond: Vec<Beyond>,
    degraded: Vec<u8>,
    /// When it was admitted.
    wall: i64,
    state: State,
}

impl Request {
    /// Whether it may deliver a charge.
    fn takes_part(&self, charge: usize) -> bool {
        self.own == Some(charge) || self.shares.contains(&charge)
    }

    /// Whether what a charge has booked on a meter pays for it.
    fn pays(&self, charge: usize, meter: u8) -> bool {
        self.own == Some(charge) || self.paid_by.contains(&(charge, meter))
    }

    fn is_rest_of(&self, charge: usize) -> bool {
        self.by.iter().any(|(name, of, _)| name.0 == CoverKind::Resume && *of == charge)
    }

    /// How many images its backend says it brings of what a charge has booked on a meter.
    fn says_of(&self, charge: usize, meter: u8) -> Option<u32> {
        self.says.filter(|_| self.pays(charge, meter))
    }
}

/// What a backend brings beyond what a delivered charge covers.
#[derive(Debug, Clone, Copy)]
struct Beyond {
    by: (Name, usize),
    /// The charge of its booking.
    charge: usize,
    /// With those that are covered.
    images: u32,
}

/// A demand that a delivered charge covers.
#[derive(Debug, Clone)]
struct Held {
    by: (Name, usize),
    meter: u8,
    subject: Subject,
    anchor: Option<Anchor>,
    /// What it asks for.
    cost: u32,
    /// How many images were paid for; of a session it is files that count.
    paid: u32,
}

/// Kind, user, and which session, key or download.
type Name = (CoverKind, usize, u8);

#[derive(Debug, Clone)]
struct Cover {
    name: Name,
    charge: usize,
    /// Meters, and how much was booked on them.
    meters: Vec<(u8, u32)>,
    /// Meters on which it was not that which was delivered, and how much was.
    delivered: Vec<(u8, u32)>,
    degraded: Vec<u8>,
    /// In monotonic seconds; `None` while its charge is under way.
    until: Option<i64>,
    idle_until: Option<i64>,
    /// How many files in all, as far as files are counted.
    files: usize,
    version: Option<u8>,
    file: Option<u8>,
}

impl Cover {
    /// How many images are used for it.
    fn used(&self, meter: u8) -> u32 {
        let mut all = self.delivered.iter().chain(&self.meters);
        all.find(|(known, _)| *known == meter).map_or(0, |(_, images)| *images)
    }

    /// So much was booked on a meter as well, and so much of it is used.
    fn extend(&mut self, meter: u8, cost: u32, used: u32) {
        let before = self.meters.iter().any(|(known, _)| *known == meter).then(|| self.used(meter));
        match self.meters.iter_mut().find(|(known, _)| *known == meter) {
            Some((_, known)) => *known = (*known).max(cost),
            None => self.meters.push((meter, cost)),
        }
        self.note(meter, before.unwrap_or(0).max(used));
    }

    /// Notes how many are, if that is not what was booked.
    fn note(&mut self, meter: u8, used: u32) {
        self.delivered.retain(|(known, _)| *known != meter);
        if !self.meters.contains(&(meter, used)) {
            self.delivered.push((meter, used));
        }
    }
}

/// What the store has kept of a cover: ends are wall times.
#[derive(Debug, Clone)]
struct Kept {
    cover: Cover,
    until: i64,
    idle_until: Option<i64>,
    files_left: usize,
}

#[derive(Debug, Default)]
struct Model {
    wall: i64,
    monotonic: i64,
    limits: [u32; METERS],
    policy: usize,
    idle: Option<i64>,
    bookings: Vec<Booking>,
    /// Those of charges that delivered nothing so far.
    emptied: Vec<Booking>,
    charges: Vec<ModelCharge>,
    requests: Vec<Request>,
    covers: Vec<Cover>,
    /// Names of covers that have changed since the last group was written.
    marked: Vec<Name>,
    kept_bookings: Vec<Booking>,
    kept_covers: Vec<Kept>,
    /// When the last group was written, in monotonic time.
    flushed: Option<i64>,
}

/// What the ledger's answer must be.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Charged(Admitted),
    Covered(CoverKind, Admitted),
    Refused { why: Why, meters: Vec<u8>, retry_after: Option<u64> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Admitted {
    degraded: Vec<u8>,
    would_deny: Vec<u8>,
    booked: bool,
    /// Used and reserved after it, meter by meter.
    counts: Vec<(u32, u32)>,
}

impl Booking {
    fn under_way(charge: usize, meter: u8, subject: Subject, span: Span, cost: u32) -> Self {
        Self { charge, meter, subject, span, cost, used: None, kept: 0, extra: 0, told: vec![] }
    }

    fn reserved(&self) -> u32 {
        if self.used.is_none() { self.cost + self.extra } else { self.kept }
    }
}

impl ModelCharge {
    fn of_nothing() -> Self {
        Self {
            user: 0,
            degraded: vec![],
            opens: None,
            repeated: vec![],
            key: None,
            extends: None,
            file: None,
            by_session: vec![],
            file_by: None,
            taken: None,
            beyond: vec![],
            state: State::UnderWay,
        }
    }
}

impl Model {
    fn demands(&self, ask: &Ask) -> Vec<Demand> {
        let demand = |(meter, kind, on_exceed, shadow): &Counts| Demand {
            meter: MeterId(*meter),
            subject: subject(ask.user, kind),
            anchor: who(ask.user).billing_anchor,
            cost: ask.cost,
            images: ask.cost,
            limit: self.limits[usize::from(*meter)],
            on_exceed: *on_exceed,
            shadow: *shadow,
            session: if WITH_SESSIONS.contains(meter) { ask.screen } else { SessionUse::None },
        };
        POLICIES[self.policy].iter().map(demand).collect()
    }

    /// The window that a charge now would be booked in.
    fn window(&self, meter: u8, subject: &Subject, anchor: Option<Anchor>) -> Span {
        match &WINDOWS[usize::from(meter)] {
            Window::Rolling(rolling) => rolling.span(self.wall),
            Window::FirstCharge(period) => {
                let open =
                    self.of(meter, subject).map(|booking| booking.span).filter(|span| self.wall < span.end).min();
                open.unwrap_or_else(|| period.from(self.wall))
            }
            window => window.span(Timestamp::from_second(self.wall).unwrap(), anchor).unwrap(),
        }
    }

    /// The bookings that count now.
    fn counting<'m>(&'m self, meter: u8, subject: &'m Subject, anchor: Option<Anchor>) -> Vec<&'m Booking> {
        let window = self.window(meter, subject, anchor);
        let counts = |booking: &&Booking| match WINDOWS[usize::from(meter)] {
            Window::Rolling(_) => self.wall < booking.span.end,
            _ => booking.span == window,
        };
        self.of(meter, subject).filter(counts).collect()
    }

    fn of<'m>(&'m self, meter: u8, subject: &'m Subject) -> impl Iterator<Item = &'m Booking> {
        self.bookings.iter().filter(move |booking| booking.meter == meter && booking.subject == *subject)
    }

    /// Used and reserved.
    fn count(&self, meter: u8, subject: &Subject, anchor: Option<Anchor>) -> (u32, u32) {
        let counting = self.counting(meter, subject, anchor);
        let used = counting.iter().filter_map(|booking| booking.used).sum();
        (used, counting.iter().map(|booking| booking.reserved()).sum())
    }

    /// When the window ends; of a rolling one, when so much of what was delivered is forgotten that `cost` fits under `limit`.
    fn resets_at(&self, meter: u8, subject: &Subject, anchor: Option<Anchor>, (cost, limit): (u32, u32)) -> i64 {
        let Window::Rolling(rolling) = &WINDOWS[usize::from(meter)] else {
            return self.window(meter, subject, anchor).end;
        };
        let counting = self.counting(meter, subject, anchor);
        let used_after = |time: i64| -> u32 {
            counting.iter().filter(|booking| booking.span.end > time).filter_map(|booking| booking.used).sum()
        };
        let delivered = counting.iter().filter(|booking| booking.used.is_some_and(|used| used > 0));
        let ends = delivered.map(|booking| booking.span.end).filter(|end| used_after(*end) + cost <= limit);
        ends.min().unwrap_or(rolling.span(self.wall).end)
    }

    fn why_not(&self, demand: &Demand) -> Option<Why> {
        let (used, reserved) = self.count(demand.meter.0, &demand.subject, demand.anchor);
        match demand.limit {
            limit if used + reserved + demand.cost <= limit => None,
            limit if demand.cost > limit => Some(Why::AboveLimit),
            limit if used + demand.cost <= limit => Some(Why::InFlight),
            _ => Some(Why::Exhausted),
        }
    }

    fn charge(&mut self, ask: &Ask) -> Answer {
        let demands = self.demands(ask);
        let covers = self.covers_for(ask, &demands);
        let held_by = |demand: &Demand| {
            let mut of_it = covers.iter().filter(|(cover, ..)| of_session(cover, demand));
            of_it.find(|(cover, ..)| holds(cover, demand)).map(|(cover, ..)| cover)
        };
        let resets_at = |demand: &Demand| {
            let room = (demand.cost, demand.limit);
            self.resets_at(demand.meter.0, &demand.subject, demand.anchor, room)
        };
        let (mut booked, mut degraded, mut would_deny, mut refusing) = (vec![], vec![], vec![], vec![]);
        for demand in &demands {
            let meter = demand.meter.0;
            let held = held_by(demand);
            let is_degraded = held.is_some_and(|cover| degrades(cover, demand));
            let in_shadow = demand.shadow || ask.shadow;
            match (self.why_not(demand), demand.on_exceed) {
                _ if held.is_some() && !is_degraded => {}
                (_, OnExceed::Degrade) if !in_shadow && ask.made.is_some_and(|made| made & 1 << meter != 0) => {
                    degraded.push(meter);
                }
                // Unless the meter has become one that does not degrade.
                (why, OnExceed::Degrade) if is_degraded && !in_shadow => {
                    if ask.made.is_some() {
                        refusing.push((why, resets_at(demand), meter));
                    } else {
                        degraded.push(meter);
                    }
                }
                (None, _) | (Some(_), OnExceed::Observe) => booked.push(demand),
                _ if in_shadow => would_deny.push(meter),
                (Some(_), OnExceed::Degrade) if ask.made.is_none() => degraded.push(meter),
                (why, _) => refusing.push((why, resets_at(demand), meter)),
            }
        }
        if let Some((why, resets_at, _)) = refusing.iter().max() {
            let why = why.unwrap_or(Why::InFlight);
            let is_of = |demand: &&Demand| refusing.iter().any(|(.., meter)| *meter == demand.meter.0);
            let only_degrade = demands.iter().filter(is_of).all(|demand| demand.on_exceed == OnExceed::Degrade);
            let retry_after = match why {
                Why::AboveLimit => None,
                Why::InFlight => Some(5),
                Why::Exhausted if only_degrade => None,
                Why::Exhausted => Some(u64::try_from(resets_at - self.wall).unwrap()),
            };
            let mut meters: Vec<u8> = refusing.iter().map(|(.., meter)| *meter).collect();
            meters.sort_unstable();
            self.marked.extend(covers.iter().map(|(cover, ..)| cover.name));
            return Answer::Refused { why, meters, retry_after };
        }

        let charge = self.charges.len();
        for demand in &booked {
            let Demand { meter: MeterId(meter), subject, anchor, cost, .. } = (*demand).clone();
            let span = self.window(meter, &subject, anchor);
            self.bookings.push(Booking::under_way(charge, meter, subject, span, cost));
        }
        // Whoever is degraded has left the screen that was open, and opens none; unless it is the same opening once more.
        let retries = covers.iter().any(|(cover, ..)| cover.name.0 == CoverKind::Retry);
        let opening = || demands.iter().filter(|demand| demand.session == SessionUse::Opens);
        let opens = opening().any(|demand| {
            let is_degraded = degraded.contains(&demand.meter.0) && !retries;
            is_degraded || booked.iter().any(|booked| booked.meter == demand.meter)
        });
        let of_key = |demand: &Demand| {
            let cover = held_by(demand).filter(|cover| cover.name.0 == CoverKind::Retry);
            cover.is_some_and(|cover| !degrades(cover, demand))
        };
        let repeated: Vec<_> =
            opening().filter(|demand| of_key(demand)).map(|demand| (demand.meter.0, demand.cost)).collect();
        let has_covers = !booked.is_empty() || !degraded.is_empty() && covers.is_empty();
        let is_new = has_covers || opens;
        if is_new {
            self.charges.push(ModelCharge {
                user: ask.user,
                degraded: degraded.clone(),
                opens: opens.then_some((ask.design, ask.version)),
                repeated,
                key: ask.key.filter(|_| has_covers && !retries),
                extends: ask.key.filter(|_| has_covers).and_then(|key| {
                    let by = covers.iter().find(|(cover, ..)| cover.name.0 == CoverKind::Retry)?;
                    Some((key, by.0.charge))
                }),
                file: None,
                by_session: vec![],
                file_by: None,
                taken: None,
                beyond: vec![],
                state: State::UnderWay,
            });
            if let Some(key) = self.charges[charge].key {
                self.open((CoverKind::Retry, ask.user, key), charge, None);
            }
        }
        let shares: Vec<usize> =
            covers.iter().filter(|(cover, _)| cover.until.is_none()).map(|(cover, _)| cover.charge).collect();
        let shares_bookings = self.bookings.iter().any(|booking| shares.contains(&booking.charge));
        let by = covers.iter().map(|(cover, files)| (cover.name, cover.charge, *files)).collect();
        let paid_by = demands.iter().filter_map(|demand| {
            let cover = held_by(demand).filter(|cover| cover.until.is_none() && !degrades(cover, demand))?;
            Some((cover.charge, demand.meter.0))
        });
        let paid_by = paid_by.collect();
        let held = demands.iter().filter_map(|demand| {
            let cover = held_by(demand).filter(|cover| cover.until.is_some() && cover.name.0 != CoverKind::Resume)?;
            let (meter, booked) = *cover.meters.iter().find(|(meter, _)| *meter == demand.meter.0)?;
            let paid = if cover.name.0 == CoverKind::Retry { cover.used(meter) } else { booked };
            let held = !degrades(cover, demand);
            let Demand { ref subject, anchor, cost, .. } = *demand;
            let (by, subject) = ((cover.name, cover.charge), subject.clone());
            held.then_some(Held { by, meter, subject, anchor, cost, paid })
        });
        let held = held.collect();
        let (own, wall) = (is_new.then_some(charge), self.wall);
        let (says, beyond, state) = (None, vec![], State::UnderWay);
        let request = Request { own, by, shares, paid_by, held, says, beyond, degraded, wall, state };
        let degraded = request.degraded.clone();
        self.requests.push(request);
        let counts = demands.iter().map(|demand| self.count(demand.meter.0, &demand.subject, demand.anchor)).collect();
        let admitted = Admitted { degraded, would_deny, booked: !booked.is_empty() || shares_bookings, counts };
        let decides = demands.iter().any(|demand| held_by(demand).is_some_and(|cover| !degrades(cover, demand)));
        let decides = decides || !admitted.degraded.is_empty();
        match covers.first() {
            Some((cover, _)) if booked.is_empty() && decides => Answer::Covered(cover.name.0, admitted),
            _ => Answer::Charged(admitted),
        }
    }

    /// The rest of a download before a retry before a session, each for what none before it holds; and how many files it takes.
    fn covers_for(&self, ask: &Ask, demands: &[Demand]) -> Vec<(Cover, usize)> {
        let rest = ask.rest_of.map(|file| (CoverKind::Resume, ask.user, file));
        let retry = ask.key.map(|key| (CoverKind::Retry, ask.user, key));
        let session = (CoverKind::Session, ask.user, ask.design as u8);
        let mut found: Vec<(Cover, usize)> = Vec::new();
        for name in rest.into_iter().chain(retry).chain([session]) {
            let held = |cover: &Cover| -> Vec<usize> {
                let held = demands.iter().filter(|demand| {
                    let taken = found.iter().any(|(other, ..)| of_session(other, demand) && holds(other, demand));
                    !taken && of_session(cover, demand) && holds(cover, demand)
                });
                held.map(|demand| demand.cost as usize).collect()
            };
            let files = |cover: &Cover| match name.0 {
                CoverKind::Resume => 0,
                CoverKind::Retry | CoverKind::Redelivery => 1,
                CoverKind::Session => held(cover).into_iter().max().unwrap_or(0),
            };
            let fits = |cover: &&Cover| {
                let same_version = cover.version.is_none() || ask.version.is_none() || cover.version == ask.version;
                let same_file = cover.file == ask.rest_of.filter(|_| name.0 == CoverKind::Resume);
                let is_open = self.is_open(cover) && self.files_left(cover) >= files(cover);
                cover.name == name && is_open && same_version && same_file && !held(cover).is_empty()
            };
            // Of several that which holds for most; what is delivered before what may come to nothing; then the last one.
            let fit = |cover: &&Cover| (held(cover).len(), cover.until.is_some(), cover.charge);
            let best = self.covers.iter().filter(fits).max_by_key(fit);
            let best = best.map(|cover| (cover.clone(), files(cover)));
            found.extend(best);
        }
        found
    }

    fn is_open(&self, cover: &Cover) -> bool {
        [cover.until, cover.idle_until].into_iter().flatten().all(|end| end > self.monotonic)
    }

    fn files_left(&self, cover: &Cover) -> usize {
        let (name, charge) = (cover.name, cover.charge);
        let takes = |request: &Request| {
            // The first delivery under a key is the charge itself, whichever of its requests makes it.
            let is_first = name.0 == CoverKind::Retry && request.own == Some(charge);
            let files =
                request.by.iter().find(|(of, by, _)| (*of, *by) == (name, charge)).map_or(0, |(.., files)| *files);
            if request.state == State::Void { 0 } else { files + usize::from(is_first) }
        };
        let of_charges = self.charges.iter().filter(|charge| charge.state != State::Void);
        let of_charges = of_charges.filter_map(|charge| charge.taken).filter(|(by, _)| *by == (name, cover.charge));
        let of_charges = of_charges.map(|(_, files)| files).sum::<usize>();
        cover.files - self.requests.iter().map(takes).sum::<usize>() - of_charges
    }

    /// A charge's cover. Once it is delivered it is the only one of its name that is.
    fn open(&mut self, name: Name, charge: usize, until: Option<i64>) -> &mut Cover {
        let stays = |cover: &Cover| until.is_none() || (cover.until.is_none() && cover.charge != charge);
        self.covers.retain(|cover| cover.name != name || stays(cover));
        self.marked.extend(until.map(|_| name));
        let opens = |booking: &&Booking| name.0 != CoverKind::Session || booking.used != Some(0);
        let booked = self.bookings.iter().filter(|booking| booking.charge == charge).filter(opens);
        self.covers.push(Cover {
            name,
            charge,
            meters: booked
                .map(|booking| (booking.meter, booking.cost))
                .filter(|(meter, _)| name.0 != CoverKind::Session || WITH_SESSIONS.contains(meter))
                .collect(),
            delivered: Vec::new(),
            degraded: self.charges[charge]
                .degraded
                .iter()
                .copied()
                .filter(|meter| name.0 != CoverKind::Session || WITH_SESSIONS.contains(meter))
                .collect(),
            until,
            idle_until: None,
            files: match name.0 {
                CoverKind::Session => SESSION_FILES,
                CoverKind::Retry | CoverKind::Redelivery => DELIVERIES_OF_A_KEY,
                // It never takes one.
                CoverKind::Resume => 1,
            },
            version: None,
            file: None,
        });
        self.covers.last_mut().unwrap()
    }

    fn forget(&mut self, name: Name) {
        self.covers.retain(|cover| cover.name != name || cover.until.is_none());
        self.marked.push(name);
    }

    fn end(&mut self, request: usize, end: &End) {
        let delivered = !matches!(end, End::Void | End::Drop);
        if let End::Report(images) = end {
            self.report(request, *images);
        }
        self.requests[request].state = if delivered { State::Delivered } else { State::Void };
        let Request { own, shares, by, beyond, .. } = self.requests[request].clone();
        for charge in own.into_iter().chain(shares) {
            let others =
                self.requests.iter().filter(|other| other.state == State::UnderWay && other.takes_part(charge));
            let any = others.count() > 0;
            match self.charges[charge].state {
                State::UnderWay if delivered => self.stick(charge, request),
                State::UnderWay if !any => self.void(charge),
                State::Delivered if delivered => self.add(charge, request),
                State::Delivered if !any => self.release(charge),
                _ => {}
            }
            self.end_session(charge, request, delivered);
        }
        beyond.into_iter().for_each(|beyond| self.end_beyond(beyond, delivered));
        for (name, charge, _) in by {
            self.uses(name, charge, delivered);
        }
        if !delivered && let Some(ModelCharge { user, key: Some(key), .. }) = own.map(|own| &self.charges[own]) {
            self.marked.push((CoverKind::Retry, *user, *key));
        }
    }

    fn has_said(&self, request: usize) -> bool {
        self.requests[request].says.is_some()
    }

    /// The backend of a request says how many images it brings: of the charges that it ends, and beyond what covers it.
    fn report(&mut self, request: usize, images: u32) {
        self.requests[request].says = Some(images);
        let asked = self.requests[request].clone();
        self.beyond(request, images);
        self.bookings.extend(self.emptied.extract_if(.., |booking| asked.pays(booking.charge, booking.meter)));
        for booking in self.bookings.iter_mut().filter(|booking| asked.pays(booking.charge, booking.meter)) {
            booking.told.push(images);
            match booking.used {
                None => booking.extra = booking.extra.max(images.saturating_sub(booking.cost)),
                Some(used) => booking.kept = booking.kept.max(images.saturating_sub(used)),
            }
        }
        self.empty();
    }

    /// What requests under way may bring of a booking, beyond what is used: what was said of it, and what was booked, if one has said nothing.
    fn may_come(&self, booking: &Booking, used: u32) -> u32 {
        let under_way = self.requests.iter().filter(|other| other.state == State::UnderWay);
        let others: Vec<&Request> = under_way.filter(|other| other.takes_part(booking.charge)).collect();
        let is_silent = |other: &&Request| {
            !other.is_rest_of(booking.charge) && (other.says.is_none() || !other.pays(booking.charge, booking.meter))
        };
        let said = booking.told.iter().copied().max().filter(|_| !others.is_empty());
        let silent = others.iter().any(is_silent).then_some(booking.cost);
        said.max(silent).unwrap_or(0).saturating_sub(used).min(booking.reserved())
    }

    /// What was taken of a cover has come to its end.
    fn uses(&mut self, name: Name, charge: usize, delivered: bool) {
        self.marked.push(name);
        let idle = self.idle.map(|idle| self.monotonic + idle);
        let of_it = self.covers.iter_mut().find(|cover| (cover.name, cover.charge) == (name, charge));
        if let Some(cover) = of_it.filter(|_| delivered) {
            cover.idle_until = cover.idle_until.and(idle);
        }
    }

    /// What the backend brings beyond what delivered charges cover: of a session it takes files, as far as there are any.
    fn beyond(&mut self, request: usize, images: u32) {
        let asked = self.requests[request].clone();
        // What is said of a charge that it ends is said of that one.
        let of_charge = |booking: &&Booking| asked.pays(booking.charge, booking.meter);
        let told: Vec<u8> =
            self.bookings.iter().chain(&self.emptied).filter(of_charge).map(|booking| booking.meter).collect();
        let mut held = asked.held.clone();
        held.retain(|held| !told.contains(&held.meter));
        // As the reports come.
        held.sort_by_key(|held| held.meter);
        // In the windows of when it was admitted.
        let now = std::mem::replace(&mut self.wall, asked.wall);
        for Held { by, meter, subject, anchor, paid, .. } in held {
            let covers = match by.0.0 {
                CoverKind::Session => self.take_files(request, by, images),
                _ => self.cover(by).map_or(paid, |cover| cover.used(meter)),
            };
            let Some(cost) = images.checked_sub(covers).filter(|cost| *cost > 0) else { continue };
            let span = self.window(meter, &subject, anchor);
            let charge = self.charges.len();
            self.charges.push(ModelCharge::of_nothing());
            self.bookings.push(Booking::under_way(charge, meter, subject, span, cost));
            self.requests[request].beyond.push(Beyond { by, charge, images });
        }
        self.wall = now;
    }

    fn take_files(&mut self, request: usize, by: (Name, usize), wanted: u32) -> u32 {
        let left =
            self.covers.iter().find(|cover| (cover.name, cover.charge) == by).map(|cover| self.files_left(cover));
        let mut of_it = self.requests[request].by.iter_mut();
        let (.., files) = of_it.find(|(name, charge, _)| (*name, *charge) == by).unwrap();
        if let Some(left) = left {
            *files = (wanted as usize).min(*files + left);
        }
        *files as u32
    }

    fn cover(&self, (name, charge): (Name, usize)) -> Option<&Cover> {
        self.covers.iter().find(|cover| (cover.name, cover.charge) == (name, charge))
    }

    /// Of requests with one key all bring the same: what another has brought meanwhile is counted.
    fn end_beyond(&mut self, Beyond { by: (name, of), charge, images }: Beyond, delivered: bool) {
        if !delivered {
            return self.bookings.retain(|booking| booking.charge != charge);
        }
        let booking = self.bookings.iter_mut().find(|booking| booking.charge == charge).unwrap();
        let mut used = booking.cost;
        let key = self.covers.iter_mut().find(|cover| (cover.name, cover.charge) == (name, of));
        if let Some(key) = key.filter(|_| name.0 == CoverKind::Retry) {
            let before = key.used(booking.meter);
            used = used.min(images.saturating_sub(before));
            key.note(booking.meter, images.max(before));
        }
        booking.used = Some(used);
        self.empty();
    }

    /// From now on the rest of this file may be asked for.
    fn resumable(&mut self, request: usize, number: u8) {
        let Request { own, shares, held, degraded, .. } = &self.requests[request];
        let booked = |charge: &usize| {
            self.charges[*charge].state == State::UnderWay
                && self.bookings.iter().any(|booking| booking.charge == *charge)
        };
        let booked = own.iter().chain(shares).copied().find(booked);
        let by_session = held.iter().filter(|held| held.by.0.0 == CoverKind::Session);
        let user = by_session.clone().map(|held| held.by.0.1).next();
        let by_session: Vec<_> = by_session.map(|held| (held.meter, held.cost)).collect();
        let charge = match (booked.or(*own), user) {
            (Some(charge), Some(_)) => charge,
            (Some(charge), None) if booked.is_some() => charge,
            (_, None) => return,
            (None, Some(user)) => {
                let degraded = degraded.clone();
                self.requests[request].own = Some(self.charges.len());
                self.charges.push(ModelCharge { user, degraded, ..ModelCharge::of_nothing() });
                self.charges.len() - 1
            }
        };
        if self.charges[charge].file.is_none() && self.charges[charge].state == State::UnderWay {
            self.charges[charge].file = Some(number);
            self.charges[charge].by_session.clone_from(&by_session);
            // Whoever delivers the charge uses what was taken of the session.
            let (at, request) = (request, &mut self.requests[request]);
            let mut taken = request.by.extract_if(.., |(name, ..)| name.0 == CoverKind::Session && user.is_some());
            self.charges[charge].taken = taken.next().map(|(name, of, files)| ((name, of), files));
            self.charges[charge].file_by = Some(at);
            drop(taken);
            request.held.retain(|held| held.by.0.0 != CoverKind::Session);
            let beyond = request.beyond.extract_if(.., |beyond| beyond.by.0.0 == CoverKind::Session && user.is_some());
            self.charges[charge].beyond = beyond.collect();
            let name = (CoverKind::Resume, self.charges[charge].user, number);
            let rest = self.open(name, charge, None);
            rest.file = Some(number);
            rest.meters.extend(by_session);
        }
    }

    /// A request has ended that takes part in a charge. What the file whose rest may be asked for has taken of a session is used once that, or
    /// its rest, is delivered; and given back once neither can be any more.
    fn end_session(&mut self, charge: usize, request: usize, delivered: bool) {
        let of = &self.charges[charge];
        let carries = |at: usize| of.file_by == Some(at) || self.requests[at].is_rest_of(charge);
        let may_carry = |at: usize| {
            let other = &self.requests[at];
            other.state == State::UnderWay && other.takes_part(charge) && carries(at)
        };
        let is_used = delivered && carries(request);
        let is_open = of.state == State::UnderWay || (0..self.requests.len()).any(may_carry);
        if of.file_by.is_none() || !is_used && is_open {
            return;
        }
        let of = &mut self.charges[charge];
        of.file_by = None;
        let taken = if is_used { of.taken } else { of.taken.take() };
        let beyond = std::mem::take(&mut of.beyond);
        beyond.into_iter().for_each(|beyond| self.end_beyond(beyond, is_used));
        if let Some(((name, of), _)) = taken {
            self.uses(name, of, is_used);
        }
    }

    /// Nobody is left who could bring more than was delivered.
    fn release(&mut self, charge: usize) {
        self.bookings.iter_mut().filter(|booking| booking.charge == charge).for_each(|booking| booking.kept = 0);
        self.empty();
    }

    fn stick(&mut self, charge: usize, request: usize) {
        self.charges[charge].state = State::Delivered;
        let by = self.requests[request].clone();
        for at in (0..self.bookings.len()).filter(|at| self.bookings[*at].charge == charge).collect::<Vec<_>>() {
            let booking = &self.bookings[at];
            // The rest of a file is as much as was said of the file.
            let of_file = booking.told.last().copied().filter(|_| by.is_rest_of(charge));
            let used = by.says_of(charge, booking.meter).or(of_file).unwrap_or(booking.cost);
            let kept = self.may_come(booking, used);
            (self.bookings[at].used, self.bookings[at].kept) = (Some(used), kept);
        }
        let ModelCharge { user, opens, repeated, key, extends, file, by_session, .. } = self.charges[charge].clone();
        let booked = self.bookings.iter().filter(|booking| booking.charge == charge);
        let booked: Vec<_> = booked.map(|booking| (booking.meter, booking.cost, booking.used.unwrap())).collect();
        if let Some((design, version)) = opens {
            let idle_until = self.idle.map(|idle| self.monotonic + idle);
            let name = (CoverKind::Session, user, design as u8);
            let is_paid = |(meter, _, used): &(u8, u32, u32)| WITH_SESSIONS.contains(meter) && *used > 0;
            if booked.iter().any(is_paid) || !repeated.is_empty() {
                let session = self.open(name, charge, Some(self.monotonic + SESSION));
                session.meters.extend(repeated);
                (session.version, session.idle_until) = (version, idle_until);
            } else if self.covers.iter().any(|cover| cover.name == name && cover.charge < charge) {
                self.forget(name);
            }
        }
        // What is only degraded takes the place of nothing that was paid for.
        let is_paid = |name: &Name| {
            let mut delivered = self.covers.iter().filter(|cover| cover.name == *name && cover.until.is_some());
            delivered.any(|cover| self.is_open(cover) && self.files_left(cover) > 0 && !cover.meters.is_empty())
        };
        let key = key.map(|key| (CoverKind::Retry, user, key));
        if let Some(name) = key.filter(|name| booked.is_empty() && is_paid(name)) {
            self.covers.retain(|cover| cover.name != name || cover.charge != charge);
        } else if let Some(name) = key {
            let before: Vec<Cover> = self.covers.iter().filter(|cover| cover.name == name).cloned().collect();
            let before = before
                .into_iter()
                .filter(|cover| cover.charge == charge || cover.until.is_some_and(|_| self.is_open(cover)));
            let before: Vec<Cover> = before.collect();
            // What has been used goes on no longer.
            let is_whole = |cover: &Cover| self.files_left(cover) >= DELIVERIES_OF_A_KEY - 1;
            let before: Vec<Cover> =
                before.into_iter().filter(|earlier| earlier.charge == charge || is_whole(earlier)).collect();
            let key = self.open(name, charge, Some(self.monotonic + RETRY));
            booked.iter().for_each(|(meter, _, used)| key.note(*meter, *used));
            for earlier in before {
                for (meter, cost) in &earlier.meters {
                    let is_own = booked.iter().any(|(own, own_cost, _)| own == meter && cost <= own_cost);
                    if earlier.charge != charge || !is_own {
                        key.extend(*meter, *cost, earlier.used(*meter));
                    }
                }
            }
        }
        if let Some(number) = file {
            self.open_rest((CoverKind::Resume, user, number), charge, by_session, booked.is_empty());
        }
        if let Some((name, by)) = extends.map(|(key, by)| ((CoverKind::Retry, user, key), by)) {
            self.marked.push(name);
            for cover in self.covers.iter_mut().filter(|cover| (cover.name, cover.charge) == (name, by)) {
                booked.iter().for_each(|(meter, cost, used)| cover.extend(*meter, *cost, *used));
            }
        }
        self.empty();
    }

    /// For what a charge has booked, for what a session has covered, and for what was paid for under the same name before.
    /// What a session covers prolongs nothing that it does not cover.
    fn open_rest(&mut self, name: Name, charge: usize, by_session: Vec<(u8, u32)>, is_free: bool) {
        let before =
            self.covers.iter().find(|cover| cover.name == name && cover.until.is_some() && self.is_open(cover));
        let before = before.cloned();
        let rest = self.open(name, charge, Some(self.monotonic + RESUME));
        rest.file = Some(name.2);
        rest.meters.extend(by_session);
        let is_other = |(meter, _): &(u8, u32)| !rest.meters.iter().any(|(held, _)| held == meter);
        if is_free && let Some(before) = before.as_ref().filter(|before| before.meters.iter().any(is_other)) {
            rest.until = rest.until.min(before.until);
        }
        for (meter, cost) in before.iter().flat_map(|before| &before.meters) {
            rest.extend(*meter, *cost, before.as_ref().map_or(0, |before| before.used(*meter)));
        }
    }

    /// An empty delivery leaves nothing, not even the start of a window.
    fn empty(&mut self) {
        self.emptied.extend(self.bookings.extract_if(.., |booking| booking.used == Some(0) && booking.kept == 0));
    }

    /// Another request of a charge was delivered before: what this one brings more is used as well.
    fn add(&mut self, charge: usize, request: usize) {
        let by = self.requests[request].clone();
        self.bookings.extend(self.emptied.extract_if(.., |booking| booking.charge == charge));
        let mut more = Vec::new();
        for at in (0..self.bookings.len()).filter(|at| self.bookings[*at].charge == charge).collect::<Vec<_>>() {
            let booking = &self.bookings[at];
            let silent = Some(booking.cost).filter(|_| !by.is_rest_of(charge));
            let used = booking.used.max(by.says_of(charge, booking.meter).or(silent));
            more.extend(used.filter(|_| used > booking.used).map(|used| (booking.meter, used)));
            let kept = self.may_come(booking, used.unwrap());
            (self.bookings[at].used, self.bookings[at].kept) = (used, kept);
        }
        self.empty();
        let ModelCharge { user, key, extends, .. } = self.charges[charge];
        for (meter, used) in more {
            for (key, of) in key.map(|key| (key, charge)).into_iter().chain(extends) {
                let name = (CoverKind::Retry, user, key);
                self.marked.push(name);
                for cover in self.covers.iter_mut().filter(|cover| (cover.name, cover.charge) == (name, of)) {
                    cover.note(meter, used.max(cover.used(meter)));
                }
            }
        }
    }

    fn void(&mut self, charge: usize) {
        self.charges[charge].state = State::Void;
        self.bookings.retain(|booking| booking.charge != charge);
        self.covers.retain(|cover| cover.name.0 == CoverKind::Session || cover.charge != charge);
    }

    fn leave(&mut self, user: usize, design: usize) {
        self.forget((CoverKind::Session, user, design as u8));
        for charge in self.charges.iter_mut().filter(|charge| charge.user == user) {
            charge.opens = charge.opens.filter(|(opens, _)| *opens != design);
        }
    }

    /// Whether something has ended so soon after a group was written that the next one need not say so yet: users are not swept constantly.
    fn may_linger(&self) -> bool {
        let just_now = self.flushed.filter(|last| self.monotonic - last < 30);
        just_now.is_some_and(|last| {
            let mut ends = self.covers.iter().flat_map(|cover| [cover.until, cover.idle_until]).flatten();
            ends.any(|end| (last + 1..=self.monotonic).contains(&end))
        })
    }

    fn flush(&mut self) {
        self.flushed = Some(self.monotonic);
        let over = self.covers.iter().filter(|cover| !self.is_open(cover)).map(|cover| cover.name);
        over.collect::<Vec<_>>().into_iter().for_each(|name| self.forget(name));
        let marked = std::mem::take(&mut self.marked);
        self.kept_covers.retain(|kept| !marked.contains(&kept.cover.name));
        let wall = |end: i64| self.wall + end - self.monotonic;
        let settled = self.covers.iter().filter(|cover| marked.contains(&cover.name));
        let kept = settled.filter_map(|cover| {
            let (until, idle_until) = (wall(cover.until?), cover.idle_until.map(wall));
            Some(Kept { cover: cover.clone(), until, idle_until, files_left: self.files_left(cover) })
        });
        self.kept_covers.extend(kept.collect::<Vec<_>>());
        let used = self.bookings.iter().filter(|booking| booking.used.is_some_and(|used| used > 0));
        self.kept_bookings = used.map(|booking| Booking { kept: 0, told: vec![], ..booking.clone() }).collect();
    }

    /// Counters that the store has, and covers.
    fn kept(&self) -> (BTreeMap<CounterName, u32>, BTreeSet<String>) {
        let mut counters = BTreeMap::new();
        for Booking { meter, subject, span, used, .. } in
            self.kept_bookings.iter().filter(|kept| self.is_kept(kept.span.end))
        {
            let name = CounterName { meter: format!("meter-{meter}").into(), subject: subject.clone(), span: *span };
            *counters.entry(name).or_default() += used.unwrap();
        }
        let covers = self.kept_covers.iter().map(|Kept { cover, until, idle_until, files_left }| {
            let Cover { name: (kind, user, what), ref meters, ref degraded, version, file, .. } = *cover;
            let what = match kind {
                CoverKind::Session | CoverKind::Redelivery => format!("design-{what}"),
                CoverKind::Retry => format!("key-{what}"),
                CoverKind::Resume => format!("file-{what}"),
            };
            let named = |meter: &u8| Arc::from(format!("meter-{meter}"));
            let row = CoverRow {
                number: 0,
                name: CoverName { kind, user: who(user).user, what: what.into() },
                meters: meters.iter().chain(&cover.delivered).map(|(meter, cost)| (named(meter), *cost)).collect(),
                degraded: degraded.iter().map(named).collect(),
                expires_at_ms: until * 1_000,
                idle_at_ms: idle_until.map(|idle| idle * 1_000),
                files_left: *files_left as u32,
                version: version.map(|version| format!("v{version}").into()),
                file: file.map(self::file),
            };
            shown(row)
        });
        (counters, covers.collect())
    }

    /// Windows that ended long ago are forgotten.
    fn is_kept(&self, end: i64) -> bool {
        end > self.wall - 35 * 86_400
    }

    /// What was under way is lost, and what the store does not know.
    fn crash(&mut self) {
        self.requests.clear();
        self.charges.iter_mut().for_each(|charge| charge.taken = None);
        self.emptied.clear();
        self.marked.clear();
        self.bookings.clone_from(&self.kept_bookings);
        self.covers.clear();
        let restored = |end: i64, longest: i64| self.monotonic + (end - self.wall).clamp(0, longest);
        for Kept { cover, until, idle_until, files_left } in &self.kept_covers {
            let longest = match cover.name.0 {
                CoverKind::Session => SESSION,
                CoverKind::Retry => RETRY,
                CoverKind::Resume | CoverKind::Redelivery => RESUME,
            };
            let longest_idle = self.idle.unwrap_or(SESSION);
            let until = Some(restored(*until, longest));
            let idle_until = idle_until.map(|idle| restored(idle, longest_idle));
            self.covers.push(Cover { until, idle_until, files: *files_left, ..cover.clone() });
        }
    }

    /// If a meter that is asked for and enforced, or any if none is, was booked by a download of which this would be the rest: what the last
    /// such was degraded by.
    fn may_resume(&self, user: usize, number: u8, demands: &[Demand]) -> Option<Vec<u8>> {
        let limited = demands.iter().any(Demand::is_enforced);
        let asked = |demand: &&Demand| demand.is_enforced() || !limited;
        let holds_some = |cover: &&Cover| demands.iter().filter(asked).any(|demand| holds(cover, demand));
        let of_file = self.covers.iter().filter(|cover| cover.name == (CoverKind::Resume, user, number));
        let last = of_file.filter(|cover| self.is_open(cover)).filter(holds_some).max_by_key(|cover| cover.charge);
        // As far as they still degrade.
        let stays = |meter: &u8| {
            let demand = demands.iter().find(|demand| demand.meter.0 == *meter);
            demand.is_none_or(|demand| demand.on_exceed == OnExceed::Degrade && !demand.shadow)
        };
        last.map(|cover| cover.degraded.iter().copied().filter(stays).collect())
    }
}

/// A cover as the store has it: meters in their own order, but what of a meter comes first does so.
fn shown(mut row: CoverRow) -> String {
    row.number = 0;
    row.meters.sort_by(|(one, _), (other, _)| one.cmp(other));
    format!("{row:?}")
}

/// A session has to do with meters that have sessions.
fn of_session(cover: &Cover, demand: &Demand) -> bool {
    cover.name.0 != CoverKind::Session || demand.session == SessionUse::Covered
}

/// Whether a cover decides about a demand: a retry or the rest of a download may not cost more than what was charged.
fn holds(cover: &Cover, demand: &Demand) -> bool {
    is_paid(cover, demand) || cover.degraded.contains(&demand.meter.0)
}

/// By a key only if any of it is used.
fn is_paid(cover: &Cover, demand: &Demand) -> bool {
    let enough = |cost: u32| cover.name.0 == CoverKind::Session || demand.cost <= cost;
    let is_used = cover.name.0 != CoverKind::Retry || cover.used(demand.meter.0) > 0;
    is_used && cover.meters.iter().any(|(meter, cost)| *meter == demand.meter.0 && enough(*cost))
}

/// Whether what it covers is degraded: not what was paid for.
fn degrades(cover: &Cover, demand: &Demand) -> bool {
    !is_paid(cover, demand) && cover.degraded.contains(&demand.meter.0)
}

// ---- The ledger ---------------------------------------------------------------------------------------------------------------

/// The ledger with its store and clock, and the charges under way.
struct Real {
    ledger: Arc<Ledger>,
    options: Options,
    clock: Arc<ManualClock>,
    disk: Disk,
    flusher: tokio::task::JoinHandle<()>,
    /// As many as the model has requests.
    charges: Vec<Option<Charge>>,
}

impl Real {
    async fn start(options: Options, clock: Arc<ManualClock>, disk: Disk) -> Self {
        let ledger = Ledger::new(&BY_KIND[0].1, options.clone(), clock.clone());
        let flushing = run(ledger.clone(), Box::new(disk.clone()), std::future::pending());
        let flusher = tokio::spawn(async { flushing.await.unwrap() });
        while ledger.availability().is_err() {
            tokio::task::yield_now().await;
        }
        Self { ledger, options, clock, disk, flusher, charges: Vec::new() }
    }

    /// Time of the runtime is paused: this takes none.
    async fn flush(&self) {
        tokio::time::sleep(self.options.flush_interval + Duration::from_millis(1)).await;
    }

    fn kept(&self) -> (BTreeMap<CounterName, u32>, BTreeSet<String>) {
        let (counters, covers) = self.disk.rows();
        let since = self.clock.now().as_second() - 35 * 86_400;
        let counters = counters
            .into_iter()
            .filter(|row| row.name.span.end > since && row.used > 0)
            .map(|row| (row.name, row.used));
        (counters.collect(), covers.into_iter().map(shown).collect())
    }

    async fn crash(self) -> Self {
        let Self { options, clock, disk, flusher, .. } = self;
        flusher.abort();
        assert!(flusher.await.unwrap_err().is_cancelled());
        Self::start(options, clock, disk).await
    }

    /// One of the requests under way.
    fn under_way(&self, which: &prop::sample::Index) -> Option<usize> {
        let under_way: Vec<usize> = (0..self.charges.len()).filter(|at| self.charges[*at].is_some()).collect();
        (!under_way.is_empty()).then(|| *which.get(&under_way))
    }

    async fn charge(&mut self, ask: &Ask, demands: &[Demand]) -> Answer {
        let (user, session) = (who(ask.user).user, Arc::from(format!("design-{}", ask.design)));
        let version = ask.version.map(|version| Arc::from(format!("v{version}")));
        let made = |made: u8| (0..METERS as u8).filter(|meter| made & 1 << meter != 0).map(MeterId).collect::<Vec<_>>();
        let made = ask.made.map(made);
        let request = ChargeRequest {
            version: version.as_ref(),
            retry: ask.key.map(|key| format!("key-{key}").into()),
            resume: ask.rest_of.map(|number| (format!("file-{number}").into(), file(number))),
            shadow: ask.shadow,
            made: made.as_deref(),
            ..ChargeRequest::new(&user, PLAN, &session, demands)
        };
        let numbers = |meters: &[MeterId]| meters.iter().map(|meter| meter.0).collect::<Vec<_>>();
        let admitted = |charge: &Charge| Admitted {
            degraded: numbers(charge.degraded()),
            would_deny: numbers(charge.would_deny()),
            booked: charge.is_paid(),
            counts: charge.standings().iter().map(|standing| (standing.count.used, standing.count.reserved)).collect(),
        };
        match self.ledger.charge(request).await {
            Admission::Charged(charge) => {
                let answer = Answer::Charged(admitted(&charge));
                self.charges.push(Some(*charge));
                answer
            }
            Admission::Covered(kind, charge) => {
                let answer = Answer::Covered(kind, admitted(&charge));
                self.charges.push(Some(*charge));
                answer
            }
            Admission::Refused(denial) => {
                let mut meters: Vec<u8> = denial.violated.iter().map(|standing| standing.meter.0).collect();
                meters.sort_unstable();
                Answer::Refused {
                    why: denial.why,
                    meters,
                    retry_after: denial.retry_after.map(|after| after.as_secs()),
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn report(&mut self, request: usize, images: u32) {
        let charge = self.charges[request].as_mut().unwrap();
        (0..METERS as u8).for_each(|meter| charge.report(MeterId(meter), images));
    }

    fn end(&mut self, request: usize, end: &End) {
        if let End::Report(images) = end {
            self.report(request, *images);
        }
        let charge = self.charges[request].take().unwrap();
        match end {
            End::Deliver | End::Report(_) => charge.settle(Settlement::Delivered),
            End::Void => charge.settle(Settlement::Void),
            End::Drop => drop(charge),
        }
    }

    /// Used, reserved, and when that ends, meter by meter.
    fn usage(&self, user: usize, policy: &Policy) -> Vec<(u32, u32, i64)> {
        let usage = self.ledger.usage(policy, &who(user));
        usage.iter().map(|usage| (usage.count.used, usage.count.reserved, usage.resets_at)).collect()
    }
}

/// Wednesday noon.
const START: &str = "2026-11-18T12:00:00Z";

async fn compare(idle: Option<Duration>, operations: Vec<Operation>) -> Result<(), TestCaseError> {
    let start: Timestamp = START.parse().unwrap();
    let clock = Arc::new(ManualClock::at(start));
    let mut real = Real::start(options(idle), clock.clone(), Disk::default()).await;
    let idle = idle.map(|idle| idle.as_secs() as i64);
    let mut model = Model { wall: start.as_second(), limits: [3, 2, 2, 4, 3, 1], idle, ..Model::default() };
    for operation in operations {
        match &operation {
            Operation::Charge(ask) => {
                let demands = model.demands(ask);
                prop_assert_eq!(real.charge(ask, &demands).await, model.charge(ask), "{:?}", operation);
            }
            Operation::End(which, end) => {
                if let Some(request) = real.under_way(which) {
                    let says_it_again = matches!(end, End::Report(_)) && model.has_said(request);
                    let end = if says_it_again { &End::Deliver } else { end };
                    real.end(request, end);
                    model.end(request, end);
                }
            }
            Operation::Report(which, images) => {
                if let Some(request) = real.under_way(which).filter(|request| !model.has_said(*request)) {
                    real.report(request, *images);
                    model.report(request, *images);
                }
            }
            Operation::Resumable(which, number) => {
                if let Some(request) = real.under_way(which) {
                    let what = || format!("file-{number}").into();
                    real.charges[request].as_mut().unwrap().resumable(&file(*number), what);
                    model.resumable(request, *number);
                }
            }
            Operation::Leave { user, design } => {
                real.ledger.leave(&who(*user).user, &format!("design-{design}").into());
                model.leave(*user, *design);
            }
            Operation::Limits(limits) => model.limits = *limits,
            Operation::Policy(policy) => model.policy = *policy,
            Operation::Pass(seconds) => {
                clock.advance(Duration::from_secs(*seconds));
                model.wall += *seconds as i64;
                model.monotonic += *seconds as i64;
            }
            Operation::StepBack => {
                model.wall -= 3_600;
                clock.set_wall(Timestamp::from_second(model.wall).unwrap());
            }
            Operation::Flush if model.may_linger() => {}
            Operation::Flush => {
                real.flush().await;
                model.flush();
                prop_assert_eq!(real.kept(), model.kept());
            }
            Operation::Crash => {
                real = real.crash().await;
                model.crash();
            }
        }
        prop_assert_eq!(clock.now().as_second(), model.wall);
        for user in 0..USERS {
            let asks = Ask {
                user,
                design: 0,
                screen: SessionUse::None,
                cost: 1,
                key: None,
                version: None,
                rest_of: None,
                shadow: false,
                made: None,
            };
            let demands = model.demands(&asks);
            for number in 0..2 {
                let what = format!("file-{number}").into();
                let (user_name, design) = (who(user).user, Arc::from("design-0"));
                let request = ChargeRequest::new(&user_name, PLAN, &design, &demands);
                let may_resume = real.ledger.may_resume(&request, &what, None);
                let degraded = |meters: SmallVec<[MeterId; 2]>| meters.iter().map(|meter| meter.0).collect::<Vec<_>>();
                prop_assert_eq!(
                    may_resume.map(degraded),
                    model.may_resume(user, number, &demands),
                    "user {}, {:?}",
                    user,
                    operation
                );
            }
            for (kind, policy) in &*BY_KIND {
                let count = |meter| {
                    let (subject, anchor) = (subject(user, kind), who(user).billing_anchor);
                    let (used, reserved) = model.count(meter, &subject, anchor);
                    (used, reserved, model.resets_at(meter, &subject, anchor, (0, u32::MAX)))
                };
                let expected: Vec<_> = (0..METERS as u8).map(count).collect();
                prop_assert_eq!(real.usage(user, policy), expected, "user {}, {:?}, {:?}", user, kind, operation);
            }
        }
    }
    real.flusher.abort();
    Ok(())
}
