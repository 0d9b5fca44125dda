use std::time::Duration;

use http::HeaderMap;
use jiff::Timestamp;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::*;
use crate::clock::ManualClock;
use crate::design::cache::Times;
use crate::design::{self, Designs, FeatureOptions, Saved, Source, UnknownDesign};
use crate::identity::{Algorithm, Caller, SignedBy};
use crate::net::Trust;
use crate::policy::Who;

/// A metadata service: answers with what was set last, once it may.
struct Fake {
    address: std::net::SocketAddr,
    seen: watch::Sender<usize>,
    reply: watch::Sender<String>,
    permits: Arc<Semaphore>,
}

impl Fake {
    async fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            seen: watch::Sender::new(0),
            reply: watch::Sender::new(String::new()),
            permits: Arc::new(Semaphore::new(1_000)),
        });
        fake.says(r#"{"ai_features":["logo"]}"#);
        let own = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(own.clone().converse(stream));
            }
        });
        fake
    }

    async fn converse(self: Arc<Self>, stream: TcpStream) {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while stream.read_line(&mut line).await.is_ok_and(|count| count > 0) {
            if line == "\r\n" {
                // What is true when it is asked is what it says, however long that takes.
                let reply = self.reply.borrow().clone();
                self.seen.send_modify(|seen| *seen += 1);
                self.permits.acquire().await.unwrap().forget();
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
            line.clear();
        }
    }

    fn answers(&self, status: &str, body: &str) {
        self.reply.send_replace(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    }

    fn says(&self, body: &str) {
        self.answers("200 OK", body);
    }

    fn hold(&self) {
        self.permits.forget_permits(usize::MAX);
    }

    fn release(&self, answers: usize) {
        self.permits.add_permits(answers);
    }

    fn seen(&self) -> usize {
        *self.seen.borrow()
    }

    async fn has_seen(&self, count: usize) {
        let mut seen = self.seen.subscribe();
        let enough = seen.wait_for(|seen| *seen >= count);
        tokio::time::timeout(Duration::from_secs(30), enough).await.unwrap().unwrap();
    }
}

fn options(fake: &Fake) -> Options {
    Options {
        url: format!("http://{}/designs/{{design}}", fake.address).parse().unwrap(),
        trust: Trust::default(),
        pointer: "/ai_features".into(),
        version: Some("/version".into()),
        // Of real time, and long: no test waits for it.
        timeout: Duration::from_secs(60),
        times: Times::default(),
        most_bytes: 65_536,
        at_once: 64,
        cache_bytes: 1 << 20,
        authorization: None,
    }
}

fn lookup(fake: &Fake) -> (Arc<Lookup>, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
    (Arc::new(Lookup::new(options(fake), Arc::default(), clock.clone())), clock)
}

/// Features, age in seconds, and whether stale.
fn brief(answer: &Answer) -> String {
    match answer {
        Answer::Known { described, age, stale } => {
            let stale = if *stale { " stale" } else { "" };
            format!("{} {}s{stale}", described.features.join("+"), age.as_secs())
        }
        Answer::Nothing => "nothing".into(),
        Answer::Failed(_) => "failed".into(),
    }
}

async fn find(lookup: &Lookup, wanted: Option<&str>) -> String {
    brief(&lookup.find("d", wanted.map(Arc::from).as_ref(), Remember::Yes).await)
}

#[tokio::test]
async fn fifty_who_ask_at_once_share_one_fetch_also_when_the_first_hangs_up() {
    let fake = Fake::start().await;
    fake.hold();
    let (lookup, _) = lookup(&fake);
    let ask = || {
        let lookup = lookup.clone();
        tokio::spawn(async move { find(&lookup, None).await })
    };
    let first = ask();
    fake.has_seen(1).await;
    let others: Vec<_> = (0..49).map(|_| ask()).collect();
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    fake.release(1);
    for other in others {
        assert_eq!(other.await.unwrap(), "logo 0s");
    }
    assert_eq!(fake.seen(), 1);
    assert_eq!(find(&lookup, None).await, "logo 0s");
    assert_eq!(fake.seen(), 1, "and so does who comes later");
}

#[tokio::test]
async fn what_is_said_of_a_design_that_is_saved_is_remembered_for_when_nobody_can_be_asked() {
    let fake = Fake::start().await;
    let (lookup, _) = lookup(&fake);
    let saving = async || brief(&lookup.find("d", None, Remember::No).await);
    assert_eq!(saving().await, "logo 0s");
    fake.says(r#"{"ai_features":[]}"#);
    assert_eq!((saving().await, fake.seen()), (" 0s".into(), 2));
    fake.says(r#"{"ai_features":["sticker"]}"#);
    assert_eq!((find(&lookup, None).await, fake.seen()), ("sticker 0s".into(), 3), "the first after it asks as well");
    assert_eq!((find(&lookup, None).await, fake.seen()), ("sticker 0s".into(), 3));
    assert_eq!((saving().await, fake.seen()), ("sticker 0s".into(), 3), "who asks anew says so before");
    lookup.doubt("d");
    assert_eq!(saving().await, "sticker 0s");
    fake.says("no answer");
    assert_eq!(find(&lookup, None).await, "sticker 0s stale");
}

#[tokio::test]
async fn of_those_who_ask_anew_who_has_a_turn_asks_and_others_share_the_last_answer() {
    let fake = Fake::start().await;
    let (lookup, _) = lookup(&fake);
    assert_eq!(find(&lookup, None).await, "logo 0s", "known, and of the past from here on");
    fake.hold();
    fake.says(r#"{"ai_features":["crop"]}"#);
    // Each looks for a turn, and boards, before the next does.
    let ask = async |has_turn: bool| brief(&lookup.find_anew("d", None, || has_turn).await);
    let releases = async {
        fake.has_seen(3).await;
        fake.release(2);
    };
    let (first, second, third, fourth, ()) = tokio::join!(ask(true), ask(true), ask(false), ask(false), releases);
    assert_eq!([first, second, third, fourth], ["crop 0s"; 4]);
    assert_eq!(fake.seen(), 3, "one for each turn");
}

#[tokio::test]
async fn a_save_whose_end_nobody_saw_is_asked_for_also_by_who_comes_much_later() {
    let fake = Fake::start().await;
    let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
    let times = Times { ttl: Duration::from_mins(10), ..Times::default() };
    let designs = Designs::new(
        design::Options {
            sources: vec![Source::Service],
            header: http::HeaderName::from_static("x-design-ai-features"),
            version_header: None,
            trusted_hops: Vec::new(),
            service: Some(Options { times, ..options(&fake) }),
            unknown_design: UnknownDesign::Refuse,
            features: FeatureOptions { ai: vec!["logo".into()], ..FeatureOptions::default() },
        },
        clock.clone(),
    );
    let caller = Caller {
        who: Who::user("u"),
        plan: None,
        platform: None,
        ai_features: None,
        design: None,
        design_version: None,
        signed_by: SignedBy { kid: None, algorithm: Algorithm::Hs256 },
    };
    let is_ai = async || designs.facts("d", &caller, &HeaderMap::new(), None).await.unwrap().ai;
    fake.says(r#"{"ai_features":[]}"#);
    assert!(!is_ai().await);
    for (saved, now_it_is) in [(Saved::Maybe, true), (Saved::Yes, false), (Saved::No, false)] {
        designs.save_begins("d");
        designs.save_ends("d", saved);
        fake.says(if saved == Saved::Yes { r#"{"ai_features":[]}"# } else { r#"{"ai_features":["logo"]}"# });
        clock.advance(Duration::from_mins(3));
        assert_eq!(is_ai().await, now_it_is, "{saved:?}");
    }
}

#[tokio::test]
async fn stale_features_are_served_at_once_while_one_fetch_renews_them() {
    let fake = Fake::start().await;
    let (lookup, clock) = lookup(&fake);
    assert_eq!(find(&lookup, None).await, "logo 0s");
    fake.hold();
    fake.says(r#"{"ai_features":[]}"#);
    clock.advance(Duration::from_secs(65));
    for _ in 0..10 {
        assert_eq!(find(&lookup, None).await, "logo 65s stale");
    }
    fake.has_seen(2).await;
    let under_way = lookup.shared.flights.board(&"d".into(), None, || false, || None::<()>);
    let Boarding::Joins(mut arrivals) = under_way else { panic!("nothing is under way") };
    fake.release(1);
    arrivals.wait_for(Option::is_some).await.unwrap();
    assert_eq!(find(&lookup, None).await, " 0s");
    assert_eq!(fake.seen(), 2);
}

#[tokio::test]
async fn a_failing_service_is_not_asked_by_every_request_and_stale_features_count_for_a_while() {
    let fake = Fake::start().await;
    let (lookup, clock) = lookup(&fake);
    fake.answers("500 Internal Server Error", "");
    for _ in 0..10 {
        assert_eq!(find(&lookup, None).await, "failed");
    }
    assert_eq!(fake.seen(), 1);
    fake.says(r#"{"ai_features":["logo"]}"#);
    clock.advance(Duration::from_secs(1));
    assert_eq!(find(&lookup, None).await, "logo 0s");
    fake.answers("500 Internal Server Error", "");
    clock.advance(Duration::from_secs(3_659));
    assert_eq!(find(&lookup, None).await, "logo 3659s stale");
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("logo 3659s stale", 3), "asked once");
    clock.advance(Duration::from_secs(1));
    assert_eq!(find(&lookup, None).await, "failed");
}

#[tokio::test]
async fn what_a_save_has_overtaken_is_not_remembered() {
    let fake = Fake::start().await;
    fake.hold();
    let (lookup, _) = lookup(&fake);
    let ask = || {
        let lookup = lookup.clone();
        tokio::spawn(async move { find(&lookup, None).await })
    };
    let before = ask();
    fake.has_seen(1).await;
    fake.says(r#"{"ai_features":["crop"]}"#);
    lookup.forget("d");
    let after = ask();
    fake.has_seen(2).await;
    fake.release(2);
    assert_eq!((before.await.unwrap(), after.await.unwrap()), ("logo 0s".into(), "crop 0s".into()));
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("crop 0s", 2));
    // And once more with the fetch that the save has overtaken as the last one.
    fake.hold();
    lookup.forget("d");
    let before = ask();
    fake.has_seen(3).await;
    fake.says(r#"{"ai_features":["crop","logo"]}"#);
    lookup.forget("d");
    fake.release(2);
    assert_eq!(before.await.unwrap(), "crop 0s");
    assert_eq!(find(&lookup, None).await, "crop+logo 0s");
}

#[tokio::test]
async fn what_is_doubted_is_asked_for_again_and_counts_if_that_fails() {
    let fake = Fake::start().await;
    let (lookup, clock) = lookup(&fake);
    assert_eq!(find(&lookup, None).await, "logo 0s");
    lookup.doubt("d");
    fake.answers("500 Internal Server Error", "");
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("logo 0s stale", 2));
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("logo 0s stale", 2), "not by every request");
    clock.advance(Duration::from_secs(1));
    fake.says(r#"{"ai_features":["crop"]}"#);
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("crop 0s", 3));
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("crop 0s", 3), "no doubt any more");
}

#[tokio::test]
async fn another_version_is_asked_for_at_once_and_what_there_is_is_used() {
    let fake = Fake::start().await;
    let (lookup, clock) = lookup(&fake);
    fake.says(r#"{"ai_features":["logo"],"version":1}"#);
    assert_eq!(find(&lookup, None).await, "logo 0s");
    fake.says(r#"{"ai_features":["crop"],"version":2}"#);
    assert_eq!((find(&lookup, Some("1")).await.as_str(), fake.seen()), ("logo 0s", 1));
    assert_eq!((find(&lookup, Some("2")).await.as_str(), fake.seen()), ("crop 0s", 2), "an edit is seen at once");
    assert_eq!((find(&lookup, Some("1")).await.as_str(), fake.seen()), ("crop 0s", 3));
    clock.advance(Duration::from_millis(999));
    assert_eq!((find(&lookup, Some("1")).await.as_str(), fake.seen()), ("crop 0s", 3), "not by every request");
    clock.advance(Duration::from_millis(1));
    assert_eq!((find(&lookup, Some("1")).await.as_str(), fake.seen()), ("crop 0s", 4), "the service may lag behind");
    fake.answers("503 Service Unavailable", "");
    assert_eq!(find(&lookup, Some("3")).await, "failed", "features of another version do not count");
    assert_eq!(find(&lookup, Some("2")).await, "crop 0s");
}

#[tokio::test]
async fn a_fetch_for_another_version_is_not_joined_and_the_later_one_counts() {
    let fake = Fake::start().await;
    fake.hold();
    let (lookup, _) = lookup(&fake);
    fake.says(r#"{"ai_features":["logo"],"version":1}"#);
    let ask = |wanted| {
        let lookup = lookup.clone();
        tokio::spawn(async move { find(&lookup, wanted).await })
    };
    let old = ask(None);
    fake.has_seen(1).await;
    fake.says(r#"{"ai_features":["crop"],"version":2}"#);
    let new = ask(Some("2"));
    fake.has_seen(2).await;
    let either = ask(None);
    fake.release(2);
    assert_eq!((old.await.unwrap(), new.await.unwrap()), ("logo 0s".into(), "crop 0s".into()));
    assert_eq!(either.await.unwrap(), "crop 0s", "of two under way the later one");
    assert_eq!((find(&lookup, None).await.as_str(), fake.seen()), ("crop 0s", 2));
}

#[tokio::test]
async fn a_fetch_that_dies_is_a_failure_for_those_who_wait() {
    let fake = Fake::start().await;
    let (lookup, _) = lookup(&fake);
    let design: Arc<str> = "d".into();
    let Boarding::Starts(_, start) = lookup.shared.flights.board(&design, None, || false, || None::<()>) else {
        panic!("nothing is under way yet")
    };
    let landing = Landing::new(lookup.shared.clone(), design, None, Remember::Yes, start);
    let waiting = {
        let lookup = lookup.clone();
        tokio::spawn(async move { lookup.find("d", None, Remember::Yes).await })
    };
    tokio::task::yield_now().await;
    drop(landing);
    assert_eq!(waiting.await.unwrap(), Answer::Failed(DIED.into()));
    assert_eq!(find(&lookup, None).await, "failed", "remembered like any failure");
    assert_eq!(fake.seen(), 0);
}

#[tokio::test]
async fn fetches_end_with_whom_they_are_for() {
    let fake = Fake::start().await;
    fake.hold();
    let (lookup, clock) = lookup(&fake);
    let shared = Arc::downgrade(&lookup.shared);
    let asking = {
        let lookup = lookup.clone();
        tokio::spawn(async move { find(&lookup, None).await })
    };
    fake.has_seen(1).await;
    asking.abort();
    assert!(asking.await.unwrap_err().is_cancelled());
    assert_eq!(shared.strong_count(), 2, "the fetch goes on");
    drop((lookup, clock));
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(shared.strong_count(), 0);
}

#[tokio::test]
async fn an_id_that_could_lead_elsewhere_is_not_asked_for() {
    let fake = Fake::start().await;
    let (lookup, _) = lookup(&fake);
    for design in [".", "..", "d1/../d2", ""] {
        assert_eq!(lookup.find(design, None, Remember::Yes).await, Answer::Nothing, "{design}");
    }
    assert_eq!(fake.seen(), 0);
}
