//! Upstreams of several endpoints: which of them takes a request, what becomes of one that fails, and how much is asked for at once.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use bytes::Bytes;
use export_gate::clock::{Clock, ManualClock};
use export_gate::net::{self, Trust, Url};
use export_gate::proxy::{BoundMetrics, Ejection, EndpointMetrics, Metrics, Options, Passage, Proxy};
use http::{Request, StatusCode};
use http_body_util::Empty;
use prometheus_client::metrics::histogram::Histogram;
use tower::ServiceExt;

use crate::support::{
    Backend, DOWNLOAD, Gate, Http2Backend, Http2Reply, Nobody, Reply, Setup, Token, eventually, get, read_until,
    request,
};

const EXPORT: &str = DOWNLOAD;

/// A gate whose only upstream has these endpoints.
fn before(endpoints: &[SocketAddr]) -> Setup {
    let urls: Vec<String> = endpoints.iter().map(|endpoint| format!("\"http://{endpoint}\"")).collect();
    Setup::before(endpoints[0]).set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", &format!("[{}]", urls.join(", ")))
}

fn bounded(backend: &Backend, queue_limit: &str, queue_timeout: &str) -> Setup {
    before(&[backend.address])
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_IN_FLIGHT", "1")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__QUEUE_LIMIT", queue_limit)
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__QUEUE_TIMEOUT", queue_timeout)
}

fn ejected(gate: &Gate) -> f64 {
    gate.metric(r#"exportgate_endpoints{upstream="renderer",state="ejected"}"#)
}

/// A backend that holds all it is asked for, and who lets it go on.
fn holding() -> (Backend, Sender<()>) {
    let (reply, release) =
        Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 5\r\n\r\nimage");
    (Backend::start(reply), release)
}

/// A request that is under way.
fn ask(gate: &Gate, target: &str, lines: &str) -> TcpStream {
    let mut stream = TcpStream::connect(gate.address).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nhost: gate.test\r\nconnection: close\r\n{lines}\r\n").unwrap();
    stream
}

#[test]
fn the_endpoint_that_is_slow_gets_no_more_than_what_it_is_slow_about() {
    let (slow, release) = holding();
    let fast = Backend::start(Reply::image());
    let gate = before(&[slow.address, fast.address]).start();
    let mut held: Vec<TcpStream> = Vec::new();
    while slow.seen().is_empty() {
        held.push(ask(&gate, "/page", ""));
        let sent = held.len();
        eventually("one of them has it", || slow.seen().len() + fast.seen().len() == sent);
    }
    for _ in 0..50 {
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
    }
    assert_eq!(slow.seen().len(), 1, "one is under way there, and none at the other");
    release.send(()).unwrap();
}

#[test]
fn nothing_is_lost_by_an_endpoint_that_is_not_there_and_it_is_left_out_until_it_answers() {
    let there = Backend::start(Reply::image());
    let gone = Nobody::bind();
    let gate =
        before(&[gone.address, there.address]).set("EXPORT_GATE__UPSTREAMS__RENDERER__EJECTION_TIME", "200ms").start();
    let token = Token::of("u").plan("max").ai().line();
    let mut exports = 0;
    while ejected(&gate) < 1.0 {
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
        assert_eq!(
            request(gate.address, "POST", "/v1/designs/d1", &[], b"a save").status,
            200,
            "nobody has seen any of it"
        );
        assert_eq!(get(gate.address, EXPORT, &[&token]).status, 200);
        exports += 1;
    }
    assert_eq!(gate.used("u", "ai-exports"), exports, "however often it was tried, it is one export");
    assert_eq!(gate.metric(r#"exportgate_ejections_total{upstream="renderer"}"#), 1.0);
    gate.logs(&["left out", &gone.address.to_string()]);
    // Somebody listens there now.
    let listener = gone.listen();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            read_until(&mut stream, b"\r\n\r\n");
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    eventually("it takes requests again", || {
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
        ejected(&gate) == 0.0
    });
}

#[test]
fn what_nobody_has_seen_goes_to_each_endpoint_in_turn() {
    let there = Backend::start(Reply::image());
    let gone = [(); 4].map(|()| Nobody::bind());
    let [first, second, third, last] = gone.each_ref().map(|gone| gone.address);
    let gate = before(&[first, second, third, there.address, last])
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1000")
        .start();
    for sent in 1..=20 {
        assert_eq!(request(gate.address, "POST", "/v1/designs/d1", &[], b"a save").status, 200);
        assert_eq!((there.seen().len(), there.last().body.as_slice()), (sent, &b"a save"[..]));
    }
}

/// An endpoint with which no connection by TLS comes to be, and how many have tried.
fn mute() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("\"https://{}\"", listener.local_addr().unwrap());
    let tried = Arc::new(AtomicUsize::new(0));
    let count = tried.clone();
    std::thread::spawn(move || {
        let mut streams = Vec::new();
        for stream in listener.incoming().map_while(Result::ok) {
            streams.push(stream);
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    (url, tried)
}

#[test]
fn nobody_waits_for_more_than_two_connections_that_do_not_come_to_be() {
    let endpoints = [mute(), mute(), mute(), mute()];
    let urls = endpoints.each_ref().map(|(url, _)| url.as_str()).join(", ");
    let gone = Nobody::bind();
    let gate = before(&[gone.address])
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", &format!("[{urls}]"))
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__CONNECT_TIMEOUT", "100ms")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__EJECTION_TIME", "1h")
        .start();
    assert_eq!(get(gate.address, "/page", &[]).status, 502);
    assert_eq!(ejected(&gate), 2.0);
    let tried = || endpoints.iter().map(|(_, tried)| tried.load(Ordering::SeqCst)).sum::<usize>();
    eventually("both have seen it", || tried() == 2);
    assert_eq!(get(gate.address, "/page", &[]).status, 502);
    assert_eq!(ejected(&gate), 4.0);
    eventually("the others have as well", || tried() == 4);
}

/// A listener whose queue is full, with the one connection that fills it: what asks for another is not heard until that is accepted.
fn full_up() -> (TcpListener, TcpStream) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let listener = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        socket.listen(0).unwrap().into_std().unwrap()
    });
    listener.set_nonblocking(false).unwrap();
    let filling = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, filling)
}

/// Whether somebody has asked for a connection to this port, and has not heard of it since.
fn is_being_connected_to(port: u16) -> bool {
    let (remote, syn_sent) = (format!(":{port:04X}"), "02");
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    connections
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|columns| matches!(columns[..], [_, _, to, state, ..] if to.ends_with(&remote) && state == syn_sent))
}

// TCP asks again after a second (RFC 6298, section 2.1): a connection may not be given up by then.
#[test]
fn a_connection_that_a_busy_backend_has_not_heard_of_is_asked_for_again() {
    let (listener, _filling) = full_up();
    let address = listener.local_addr().unwrap();
    let gate = before(&[address]).start();
    let mut client = ask(&gate, EXPORT, &format!("{}\r\n", Token::of("u").line()));
    eventually("it has been asked for", || is_being_connected_to(address.port()));
    let (_filled, _) = listener.accept().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut asked = None;
    eventually("it has come to be", || {
        asked = listener.accept().ok();
        asked.is_some()
    });
    let (mut asked, _) = asked.unwrap();
    asked.set_nonblocking(false).unwrap();
    assert!(read_until(&mut asked, b"\r\n\r\n"));
    asked.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 5\r\n\r\nimage").unwrap();
    assert!(read_until(&mut client, b"image"));
    assert_eq!(gate.used("u", "exports"), 1);
}

#[test]
fn a_host_from_which_nothing_comes_leaves_time_for_another() {
    let (deaf, _filling) = full_up();
    let good = Backend::start(Reply::image());
    let gate = before(&[deaf.local_addr().unwrap(), good.address])
        // For the head in all: half of it for a connection.
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "4s")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__EJECTION_TIME", "1h")
        .start();
    while ejected(&gate) < 1.0 {
        assert_eq!(request(gate.address, "POST", "/v1/designs/d1", &[], b"a save").status, 200);
    }
}

/// A proxy to these endpoints that leaves one out for an hour at its first failure, and the clock that says when.
fn left_out_for_an_hour(endpoints: [&Backend; 2]) -> (Proxy<Empty<Bytes>>, EndpointMetrics, Arc<ManualClock>) {
    let origin =
        |backend: &Backend| format!("http://{}", backend.address).parse::<Url>().unwrap().origin(&Trust::default());
    let ejection = Ejection { max_failures: 1, time: HOUR, max_time: 5 * HOUR };
    let options = Options {
        host: None,
        endpoints: endpoints.map(origin).to_vec(),
        response_timeout: Duration::from_secs(60),
        connections: net::Options::default(),
        ejection,
        bound: None,
    };
    let clock = Arc::new(ManualClock::at("2026-11-02T12:00:00Z".parse().unwrap()));
    let shown = EndpointMetrics::default();
    let metrics = Metrics { duration: Histogram::new([1.0]), bound: BoundMetrics::default(), endpoints: shown.clone() };
    let passage = Arc::new(Passage::new(Vec::new(), Vec::new(), &[]));
    (Proxy::new(options, passage, clock.clone() as Arc<dyn Clock>, metrics), shown, clock)
}

const HOUR: Duration = Duration::from_secs(3_600);

async fn pass(proxy: &Proxy<Empty<Bytes>>) -> Option<StatusCode> {
    let request = Request::get("/page").header("host", "gate.test").body(Empty::new()).unwrap();
    proxy.clone().oneshot(request).await.ok().map(|answer| answer.status())
}

/// Lets requests pass until this endpoint has one more, which is returned as it goes on.
async fn pass_to(backend: &Backend, proxy: &Proxy<Empty<Bytes>>) -> tokio::task::JoinHandle<Option<StatusCode>> {
    let before = backend.seen().len();
    loop {
        let proxy = proxy.clone();
        let mut passing = tokio::spawn(async move { pass(&proxy).await });
        while backend.seen().len() == before && !passing.is_finished() {
            tokio::task::yield_now().await;
        }
        if backend.seen().len() > before {
            return passing;
        }
        assert_eq!((&mut passing).await.unwrap(), Some(StatusCode::OK), "by the other");
    }
}

#[tokio::test]
async fn a_trial_whose_client_leaves_is_the_next_requests() {
    let [failing, good] = [Reply::RawThenClose(Vec::new()), Reply::image()].map(Backend::start);
    let (proxy, shown, clock) = left_out_for_an_hour([&failing, &good]);
    assert_eq!(pass_to(&failing, &proxy).await.await.unwrap(), None);
    assert_eq!(shown.ejected.get(), 1);
    failing.will(Reply::Silence);
    clock.advance(HOUR);
    for tried in 2..5 {
        let trial = pass_to(&failing, &proxy).await;
        assert_eq!((failing.seen().len(), pass(&proxy).await), (tried, Some(StatusCode::OK)), "no other tries");
        trial.abort();
        assert!(trial.await.is_err());
    }
    failing.will(Reply::image());
    assert_eq!(pass(&proxy).await, Some(StatusCode::OK));
    assert_eq!((failing.seen().len(), shown.ejected.get()), (5, 0), "it took this one, and all to come");
}

#[tokio::test]
async fn what_began_before_an_endpoint_was_left_out_says_nothing_about_it_later() {
    let (reply, release) = Reply::held(b"", b"nonsense\r\n\r\n");
    let [flapping, good] = [reply, Reply::image()].map(Backend::start);
    let (proxy, shown, clock) = left_out_for_an_hour([&flapping, &good]);
    let slow = pass_to(&flapping, &proxy).await;
    flapping.will(Reply::RawThenClose(Vec::new()));
    // While the slow one is under way the other is less loaded, unless it is as loaded as well.
    let (reply, release_good) = Reply::held(b"", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    good.will(reply);
    let held = pass_to(&good, &proxy).await;
    good.will(Reply::image());
    assert_eq!(pass_to(&flapping, &proxy).await.await.unwrap(), None);
    assert_eq!((shown.ejected.get(), shown.ejections.get()), (1, 1));
    flapping.will(Reply::image());
    clock.advance(HOUR);
    assert_eq!(pass(&proxy).await, Some(StatusCode::OK));
    assert_eq!(shown.ejected.get(), 0, "it was tried, and is well");
    release.send(()).unwrap();
    assert_eq!(slow.await.unwrap(), None);
    assert_eq!((shown.ejected.get(), shown.ejections.get()), (0, 1), "that was long ago");
    release_good.send(()).unwrap();
    assert_eq!(held.await.unwrap(), Some(StatusCode::OK));
}

#[test]
fn what_an_endpoint_may_have_seen_is_not_sent_to_another() {
    let breaking = Backend::start(Reply::RawThenClose(Vec::new()));
    let good = Backend::start(Reply::image());
    let gate = before(&[breaking.address, good.address]).start();
    let token = Token::of("u").plan("max").ai().line();
    let (mut broken, mut delivered) = (0, 0);
    while broken < 5 {
        let answer = request(gate.address, "POST", EXPORT, &[&token], b"{}");
        match answer.status {
            200 => delivered += 1,
            502 => broken += 1,
            other => panic!("{other}"),
        }
        assert_eq!((breaking.seen().len(), good.seen().len()), (broken, delivered));
    }
    assert_eq!(gate.used("u", "ai-exports"), delivered as u64, "what broke is not charged");
    eventually("it is left out", || ejected(&gate) == 1.0);
    for _ in 0..20 {
        assert_eq!(request(gate.address, "POST", EXPORT, &[&token], b"{}").status, 200);
    }
}

#[test]
fn an_endpoint_that_says_nothing_is_left_out() {
    let silent = Backend::start(Reply::Silence);
    let good = Backend::start(Reply::image());
    let gate = before(&[silent.address, good.address])
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "100ms")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "2")
        .start();
    eventually("it is left out", || {
        assert!(matches!(get(gate.address, "/page", &[]).status, 200 | 504));
        ejected(&gate) == 1.0
    });
    for _ in 0..20 {
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
    }
}

#[test]
fn a_client_that_stops_sending_does_not_have_an_endpoint_left_out() {
    let backends = [Backend::start(Reply::image()), Backend::start(Reply::image())];
    let gate = before(&backends.each_ref().map(|backend| backend.address))
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "100ms")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1")
        .start();
    for _ in 0..4 {
        let mut stream = TcpStream::connect(gate.address).unwrap();
        stream.write_all(b"POST /save HTTP/1.1\r\nhost: gate.test\r\ncontent-length: 10\r\n\r\nabc").unwrap();
        assert!(read_until(&mut stream, b"HTTP/1.1 408"), "it has waited for long enough");
        assert!(body(stream).contains("connection: close"));
    }
    assert_eq!(ejected(&gate), 0.0);
    assert_eq!(get(gate.address, "/page", &[]).status, 200);
}

/// Two endpoints that do this with a connection, of which one failure is too many.
fn two_that(converse: fn(TcpStream)) -> Setup {
    let endpoints = [0, 1].map(|_| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || converse(stream));
            }
        });
        address
    });
    before(&endpoints)
        .set("EXPORT_GATE__SERVER__H2C", "true")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__EJECTION_TIME", "1h")
}

/// Begins an upload that has no end, for as long as somebody takes it.
fn upload(gate: &Gate) -> TcpStream {
    let mut stream = TcpStream::connect(gate.address).unwrap();
    stream.write_all(b"POST /save HTTP/1.1\r\nhost: gate.test\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let mut sender = stream.try_clone().unwrap();
    let piece = [b"10000\r\n".to_vec(), vec![b'x'; 0x10000], b"\r\n".to_vec()].concat();
    std::thread::spawn(move || while sender.write_all(&piece).is_ok() {});
    stream
}

#[test]
fn an_endpoint_that_takes_nothing_of_an_upload_is_left_out() {
    let gate = two_that(|mut stream| {
        read_until(&mut stream, b"\r\n\r\n");
        std::thread::park();
    })
    .set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "200ms")
    .start();
    assert!(read_until(&mut upload(&gate), b"HTTP/1.1 504"), "the client has more to give");
    assert_eq!(ejected(&gate), 1.0);
}

#[test]
fn an_endpoint_that_breaks_off_in_the_middle_of_an_upload_is_left_out() {
    // What it has not read makes its end a reset.
    let gate = two_that(|mut stream| {
        read_until(&mut stream, b"\r\n\r\n");
    })
    .start();
    assert!(read_until(&mut upload(&gate), b"HTTP/1.1 502"));
    assert_eq!(ejected(&gate), 1.0);
}

#[test]
fn a_client_that_breaks_its_upload_off_does_not_have_an_endpoint_left_out() {
    let setup = two_that(|mut stream| drop(stream.read_to_end(&mut Vec::new())));
    let gate = setup.set("EXPORT_GATE__LOG__FILTER", "export_gate=debug").start();
    let mut broken = 0.0;
    let mut is_noticed = || {
        broken += 1.0;
        let not_forwarded = || gate.log().iter().filter(|line| line.contains("not forwarded")).count();
        eventually("it is noticed", || not_forwarded() as f64 >= broken);
        assert_eq!(ejected(&gate), 0.0);
    };
    let begin = |framing: &str| {
        let mut stream = TcpStream::connect(gate.address).unwrap();
        write!(stream, "POST /save HTTP/1.1\r\nhost: gate.test\r\n{framing}\r\n\r\nxyz").unwrap();
        stream
    };
    let mut stream = begin("content-length: 10");
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(read_until(&mut stream, b"HTTP/1.1 400"));
    is_noticed();
    drop(begin("content-length: 10"));
    let mut no_chunk = begin("transfer-encoding: chunked");
    no_chunk.write_all(b"\r\n").unwrap();
    assert!(read_until(&mut no_chunk, b"HTTP/1.1 400"));
    is_noticed();
}

#[tokio::test]
async fn a_client_that_stops_sending_by_http2_does_not_have_an_endpoint_left_out() {
    let backends = [0, 1].map(|_| Http2Backend::start(100, Http2Reply::Answer));
    let gate = before(&backends.each_ref().map(|backend| backend.address))
        .set("EXPORT_GATE__SERVER__H2C", "true")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__PROTOCOL", "http2")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__RESPONSE_TIMEOUT", "100ms")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1")
        .start();
    let stream = tokio::net::TcpStream::connect(gate.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://gate.test/save").body(()).unwrap();
    let (answer, mut sending) = client.ready().await.unwrap().send_request(request, false).unwrap();
    sending.send_data(Bytes::from("abc"), false).unwrap();
    assert_eq!(answer.await.unwrap().status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(ejected(&gate), 0.0);
}

#[test]
fn when_none_is_there_it_is_said_and_the_first_that_comes_back_is_found() {
    let (one, other) = (Nobody::bind(), Nobody::bind());
    let gate =
        before(&[one.address, other.address]).set("EXPORT_GATE__UPSTREAMS__RENDERER__EJECTION_TIME", "1h").start();
    eventually("both are left out", || {
        assert_eq!(get(gate.address, "/page", &[]).status, 502);
        ejected(&gate) == 2.0
    });
    let listener = other.listen();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            read_until(&mut stream, b"\r\n\r\n");
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    // Nobody waits an hour for it: where all are left out, none is.
    assert_eq!(get(gate.address, "/page", &[]).status, 200);
}

#[test]
fn a_reload_that_does_not_touch_the_upstream_keeps_who_is_left_out() {
    let there = Backend::start(Reply::image());
    let gone = Nobody::bind();
    let gate =
        before(&[gone.address, there.address]).set("EXPORT_GATE__UPSTREAMS__RENDERER__EJECTION_TIME", "1h").start();
    eventually("one is left out", || {
        assert_eq!(get(gate.address, "/page", &[]).status, 200);
        ejected(&gate) == 1.0
    });
    reload(&gate, &std::fs::read_to_string(gate.setup.config()).unwrap().replace("pro = 30", "pro = 31"));
    assert_eq!((get(gate.address, "/page", &[]).status, ejected(&gate)), (200, 1.0));
}

fn reload(gate: &Gate, text: &str) {
    std::fs::write(gate.setup.config(), text).unwrap();
    let generation = gate.metric("exportgate_config_generation");
    gate.signal("HUP");
    eventually("it is taken over", || gate.metric("exportgate_config_generation") > generation);
}

#[test]
fn the_endpoints_of_an_upstream_that_goes_away_are_shown_no_more() {
    let there = Backend::start(Reply::image());
    let setup = before(&[there.address]);
    let without = std::fs::read_to_string(setup.config()).unwrap();
    let with = format!("{without}\n[upstreams.other]\nendpoints = [\"http://{}\"]\n", there.address);
    std::fs::write(setup.config(), with).unwrap();
    let gate = setup.start();
    assert_eq!(gate.metric(r#"exportgate_endpoints{upstream="other",state="available"}"#), 1.0);
    reload(&gate, &without);
    let (_, shown) = gate.admin("/metrics");
    assert!(!shown.lines().any(|line| line.starts_with(r#"exportgate_endpoints{upstream="other""#)), "{shown}");
    assert_eq!(gate.metric(r#"exportgate_endpoints{upstream="renderer",state="available"}"#), 1.0);
}

#[test]
fn what_is_under_way_as_an_upstream_changes_says_nothing_about_its_successor() {
    let (reply, release) = Reply::held(b"", b"nonsense\r\n\r\n");
    let (breaking, there) = (Backend::start(reply), Backend::start(Reply::image()));
    let setup = before(&[breaking.address, there.address]).set("EXPORT_GATE__UPSTREAMS__RENDERER__MAX_FAILURES", "1");
    let text = std::fs::read_to_string(setup.config()).unwrap();
    let gate = setup.start();
    let mut held = Vec::new();
    while breaking.seen().is_empty() {
        held.push(ask(&gate, "/page", ""));
        let sent = held.len();
        eventually("one of them has it", || breaking.seen().len() + there.seen().len() == sent);
    }
    reload(&gate, &text.replace("# response_timeout = \"60s\"", "response_timeout = \"59s\""));
    release.send(()).unwrap();
    assert!(body(held.pop().unwrap()).contains("502"));
    assert_eq!(gate.metric(r#"exportgate_ejections_total{upstream="renderer"}"#), 1.0, "of the one before");
    assert_eq!(ejected(&gate), 0.0);
}

#[test]
fn one_too_many_for_an_upstream_is_told_to_come_back_and_is_not_charged() {
    let (backend, release) = holding();
    let gate = bounded(&backend, "0", "1s").start();
    let token = Token::of("u").ai().line();
    let first = ask(&gate, EXPORT, &format!("{token}\r\n"));
    eventually("it is under way", || backend.seen().len() == 1);
    let refused = get(gate.address, EXPORT, &[&token]);
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    let save = get(gate.address, "/page", &[]);
    assert_eq!(save.status, 503, "it is the upstream that has no room, whatever is asked of it");
    assert_eq!(gate.metric(r#"exportgate_shed_total{upstream="renderer"}"#), 2.0);
    release.send(()).unwrap();
    assert!(body(first).ends_with("image"));
    eventually("one is counted", || gate.used("u", "ai-exports") == 1);
    backend.will(Reply::image());
    assert_eq!(get(gate.address, EXPORT, &[&token]).status, 200, "the place is free, and one export is left");
}

#[test]
fn a_flood_of_requests_that_are_too_many_is_no_flood_of_lines() {
    let (backend, release) = holding();
    let gate = bounded(&backend, "0", "1s").start();
    let first = ask(&gate, "/first", "");
    eventually("it is under way", || backend.seen().len() == 1);
    for _ in 0..20 {
        assert_eq!(get(gate.address, "/page", &[]).status, 503);
    }
    release.send(()).unwrap();
    assert!(body(first).ends_with("image"));
    assert_eq!(gate.metric(r#"exportgate_shed_total{upstream="renderer"}"#), 20.0);
    backend.will(Reply::RawThenClose(Vec::new()));
    assert_eq!(get(gate.address, "/page", &[]).status, 502);
    eventually("what is no flood is said", || gate.log().iter().any(|line| line.contains("not forwarded")));
    let lines = gate.log().iter().filter(|line| line.contains("too much is under way")).count();
    assert_eq!(lines, 0);
}

#[test]
fn so_many_may_wait_and_who_leaves_frees_its_place() {
    let (backend, release) = holding();
    let gate = bounded(&backend, "1", "1h").start();
    let first = ask(&gate, "/first", "");
    eventually("it is under way", || backend.seen().len() == 1);
    let second = ask(&gate, "/second", "");
    eventually("it waits", || queued(&gate) == 1.0);
    assert_eq!(get(gate.address, "/one-too-many", &[]).status, 503);
    drop(second);
    eventually("it has left", || queued(&gate) == 0.0);
    let third = ask(&gate, "/third", "");
    eventually("another waits", || queued(&gate) == 1.0);
    backend.will(Reply::image());
    release.send(()).unwrap();
    assert!(body(first).ends_with("image"));
    assert!(body(third).ends_with("an image"));
    assert!(!backend.seen().iter().any(|seen| seen.line.contains("/second")));
}

fn queued(gate: &Gate) -> f64 {
    gate.metric(r#"exportgate_queued{upstream="renderer"}"#)
}

fn body(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn who_has_waited_for_too_long_is_told_so() {
    let (backend, release) = holding();
    let gate = bounded(&backend, "10", "50ms").start();
    let first = ask(&gate, "/first", "");
    eventually("it is under way", || backend.seen().len() == 1);
    assert_eq!(get(gate.address, "/second", &[]).status, 503);
    release.send(()).unwrap();
    assert!(body(first).ends_with("image"));
    assert_eq!(backend.seen().len(), 1);
}
