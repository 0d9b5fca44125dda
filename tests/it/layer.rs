//! The Layer in stacks that are not ours.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Waker};

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use bytes::Bytes;
use export_gate::clock::{Clock, ManualClock};
use export_gate::design::Designs;
use export_gate::gate::{Carrier, ExportGateLayer, Paced, Parts, Refusal, Upload};
use export_gate::identity::Verifier;
use export_gate::ledger::Ledger;
use export_gate::policy::Who;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::{SECRET, Token};

const CONFIG: &str = r#"
    default_upstream = "none"
    upstreams.none.endpoints = ["http://127.0.0.1:1"]
    identity = { issuer = "https://accounts.example.com", audience = "exports", keys = [{ kid = "dev", alg = "HS256", secret_env = "S" }] }
    routes = [{ name = "download", path = "/designs/{design}", action = "download" }]
    meters.exports = { window = { calendar = "week" }, limits = { free = 1 } }
    ledger.durability = "periodic"
"#;

fn gate() -> (ExportGateLayer, Arc<Ledger>) {
    let (layer, ledger, _) = gate_and_clock();
    (layer, ledger)
}

fn gate_and_clock() -> (ExportGateLayer, Arc<Ledger>, Arc<ManualClock>) {
    let environment = [("S".to_owned(), SECRET.to_owned())].into();
    let config = export_gate::config::parse("test", CONFIG, Path::new("."), &environment).unwrap();
    // Tokens are made by the machine's clock.
    let manual = Arc::new(ManualClock::at(export_gate::clock::SystemClock::new().now()));
    let clock: Arc<dyn Clock> = manual.clone();
    let ledger = Ledger::in_memory(&config.policy, config.ledger, clock.clone());
    let layer = ExportGateLayer::new(Parts {
        routes: config.routes,
        policy: config.policy,
        verifier: Verifier::new(config.identity, clock.clone()).unwrap().into(),
        designs: Designs::new(config.designs, clock.clone()).into(),
        ledger: ledger.clone(),
        clock,
        answers: config.answers,
        options: config.gate,
    });
    (layer, ledger, manual)
}

fn download<B>(body: B) -> Request<B> {
    let (name, value) = ("authorization", format!("Bearer {}", Token::of("u").signed_by(SECRET)));
    Request::get("/designs/d1").header("host", "a").header(name, value).body(body).unwrap()
}

fn count(ledger: &Ledger) -> (u32, u32) {
    let environment = [("S".to_owned(), SECRET.to_owned())].into();
    let policy = export_gate::config::parse("test", CONFIG, Path::new("."), &environment).unwrap().policy;
    let count = ledger.usage(&policy, &Who::user("u"))[0].count;
    (count.used, count.reserved)
}

fn used(ledger: &Ledger) -> u32 {
    count(ledger).0
}

#[tokio::test]
async fn an_axum_router_behind_the_gate_hands_out_one_image_and_refuses_the_next() {
    let (layer, ledger) = gate();
    let router = Router::new()
        .route("/designs/{design}", get(async || "an image".to_owned().into_bytes()))
        .route("/about", get(async || "about"))
        .layer(layer);
    let first = router.clone().oneshot(download(Body::empty())).await.unwrap();
    assert_eq!(first.status(), StatusCode::OK);
    assert_eq!(first.into_body().collect().await.unwrap().to_bytes(), "an image");
    assert_eq!(used(&ledger), 1);
    let second = router.clone().oneshot(download(Body::empty())).await.unwrap();
    assert_eq!(second.status(), StatusCode::TOO_MANY_REQUESTS);
    let about = router.oneshot(Request::get("/about").body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(about.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_refusal_is_also_a_value_for_layers_outside() {
    let (layer, _) = gate();
    let service = layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("x")))
    }));
    let bare = Request::get("/designs/d1").body(Empty::<Bytes>::new()).unwrap();
    let answer = service.oneshot(bare).await.unwrap();
    assert!(matches!(answer.extensions().get::<Refusal>(), Some(Refusal::Unauthenticated(_))));
}

/// Once it is charged an export lets others go first: a client that leaves just then has its charge back, and an outcome.
#[tokio::test]
async fn who_leaves_as_others_go_first_is_not_charged_and_counted_once() {
    let (layer, ledger) = gate();
    let mut service = layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("an image")))
    }));
    let mut answer = Box::pin(service.ready().await.unwrap().call(download(Empty::new())));
    assert!(answer.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    assert_eq!(count(&ledger), (0, 1), "it is charged");
    drop(answer);
    assert_eq!(count(&ledger), (0, 0));

    let counted = outcomes(&layer);
    assert!(matches!(&counted[..], [one] if one.contains("client-gone") && one.ends_with(" 1")), "{counted:?}");
}

/// Of requests so far, but those that there are none of.
fn outcomes(layer: &ExportGateLayer) -> Vec<String> {
    let (mut registry, mut text) = (prometheus_client::registry::Registry::default(), String::new());
    layer.register_metrics(&mut registry);
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let counted = text.lines().filter(|line| line.starts_with("exportgate_requests_total") && !line.ends_with(" 0"));
    counted.map(str::to_owned).collect()
}

#[tokio::test]
async fn who_leaves_as_others_go_first_is_counted_once_also_if_it_asks_for_the_rest_of_a_download() {
    let (layer, ledger) = gate();
    let mut service = layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| {
        let whole = Response::builder().header("etag", "\"a\"").body(Full::<Bytes>::from("an image")).unwrap();
        Ok::<_, Infallible>(whole)
    }));
    let whole = service.ready().await.unwrap().call(download(Empty::new())).await.unwrap();
    assert_eq!(whole.into_body().collect().await.unwrap().to_bytes(), "an image");
    let mut rest = download(Empty::new());
    rest.headers_mut().insert("range", "bytes=4-".parse().unwrap());
    let mut answer = Box::pin(service.ready().await.unwrap().call(rest));
    assert!(answer.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(answer);
    assert_eq!(count(&ledger), (1, 0));
    let counted = outcomes(&layer);
    let is_once = |reason: &str| counted.iter().any(|line| line.contains(reason) && line.ends_with(" 1"));
    assert!(counted.len() == 2 && is_once("\"charged\"") && is_once("\"client-gone\""), "{counted:?}");
}

#[tokio::test]
async fn a_body_that_is_dropped_unread_is_not_charged_and_one_that_was_begun_is() {
    let (layer, ledger) = gate();
    let mut service = layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("an image")))
    }));
    let unread = service.ready().await.unwrap().call(download(Empty::new())).await.unwrap();
    drop(unread);
    assert_eq!(used(&ledger), 0);
    let mut begun = service.ready().await.unwrap().call(download(Empty::new())).await.unwrap();
    assert!(begun.frame().await.is_some());
    drop(begun);
    assert_eq!(used(&ledger), 1);
}

#[tokio::test]
async fn a_service_that_fails_or_panics_or_is_cancelled_is_not_charged() {
    let (layer, ledger) = gate();
    type Answer = Result<Response<Full<Bytes>>, &'static str>;
    let failing = layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| -> Answer { Err("broken") }));
    assert!(failing.oneshot(download(Empty::new())).await.is_err());

    let panicking =
        layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| -> Answer { panic!("on purpose") }));
    assert!(tokio::spawn(panicking.oneshot(download(Empty::new()))).await.unwrap_err().is_panic());

    let pending =
        layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| -> Answer { std::future::pending().await }));
    let mut call = Box::pin(pending.oneshot(download(Empty::new())));
    assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(call.as_mut().poll(cx).is_pending())).await);
    assert_eq!(count(&ledger), (0, 1));
    drop(call);
    assert_eq!(count(&ledger), (0, 0));
}

#[tokio::test]
async fn an_export_is_a_send_future_that_any_executor_can_run() {
    let (layer, ledger) = gate();
    let service = layer.layer(service_fn(async |_: Request<Upload<Empty<Bytes>>>| {
        tokio::task::yield_now().await;
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("an image")))
    }));
    let answer = tokio::spawn(service.oneshot(download(Empty::new()))).await.unwrap().unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "an image");
    assert_eq!(used(&ledger), 1);
}

/// A body whose pieces and failures a test sends.
struct Scripted(tokio::sync::mpsc::UnboundedReceiver<Result<Bytes, &'static str>>);

impl http_body::Body for Scripted {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, &'static str>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(http_body::Frame::data)))
    }
}

#[tokio::test]
async fn a_backend_that_breaks_off_is_not_charged_unless_the_client_held_it_up() {
    for stalls in [false, true] {
        let (layer, ledger) = gate();
        // A connection whose client reads nothing: four bytes fit.
        let (connection, _client) = tokio::io::duplex(4);
        let mut connection = Paced::new(connection);
        let layer = layer.for_client([127, 0, 0, 1].into(), Carrier::InTurn(connection.pace()));
        let (pieces, body) = tokio::sync::mpsc::unbounded_channel();
        let body = Arc::new(std::sync::Mutex::new(Some(Scripted(body))));
        let service = layer.layer(service_fn(move |_: Request<Upload<Empty<Bytes>>>| {
            let body = body.lock().unwrap().take().unwrap();
            async move { Ok::<_, Infallible>(Response::new(body)) }
        }));
        let mut answer = service.oneshot(download(Empty::new())).await.unwrap();
        pieces.send(Ok("an image".into())).unwrap();
        assert!(answer.frame().await.unwrap().is_ok());
        let sent = if stalls { &b"an image"[..] } else { b"an i" };
        let written = tokio::io::AsyncWriteExt::write_all(&mut connection, sent);
        let timeout = tokio::time::timeout(std::time::Duration::from_millis(1), written).await;
        assert_eq!(timeout.is_err(), stalls);
        pieces.send(Err("broken off")).unwrap();
        assert!(answer.frame().await.unwrap().is_err());
        assert_eq!(count(&ledger), (u32::from(stalls), 0));
    }
}

#[tokio::test]
async fn where_answers_share_a_connection_a_client_that_asks_for_more_late_has_held_the_answer_up() {
    let milliseconds = std::time::Duration::from_millis;
    let (early, late) = (milliseconds(900), milliseconds(1_000));
    // What was on its way while the client held it up comes at once, if not at the first call.
    let (at_once, in_a_while) = (milliseconds(1), milliseconds(500));
    for (before_more, waited, counted) in
        [(early, None, 0), (late, None, 1), (late, Some(at_once), 1), (late, Some(in_a_while), 0)]
    {
        let (layer, ledger, clock) = gate_and_clock();
        let (pieces, body) = tokio::sync::mpsc::unbounded_channel();
        let body = Arc::new(std::sync::Mutex::new(Some(Scripted(body))));
        let service = layer.layer(service_fn(move |_: Request<Upload<Empty<Bytes>>>| {
            let body = body.lock().unwrap().take().unwrap();
            async move { Ok::<_, Infallible>(Response::new(body)) }
        }));
        let mut answer = service.oneshot(download(Empty::new())).await.unwrap();
        pieces.send(Ok("an image".into())).unwrap();
        assert!(answer.frame().await.unwrap().is_ok());
        clock.advance(before_more);
        if let Some(waited) = waited {
            let nothing_yet = std::future::poll_fn(|cx| {
                std::task::Poll::Ready(http_body::Body::poll_frame(std::pin::Pin::new(&mut answer), cx).is_pending())
            });
            assert!(nothing_yet.await);
            clock.advance(waited);
        }
        pieces.send(Err("broken off")).unwrap();
        assert!(answer.frame().await.unwrap().is_err());
        assert_eq!(count(&ledger), (counted, 0), "{before_more:?} {waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_ledger_is_kept_for_the_rest_of_a_download_that_may_yet_be_charged() {
    let (layer, ledger) = gate();
    let released = Arc::new(tokio::sync::Notify::new());
    let release = released.clone();
    let service = layer.layer(service_fn(move |request: Request<Upload<Empty<Bytes>>>| {
        let released = released.clone();
        async move {
            let answer = Response::builder().header("etag", "\"v1\"");
            if !request.headers().contains_key("range") {
                return Ok::<_, Infallible>(answer.body(Full::<Bytes>::from("an image")).unwrap());
            }
            released.notified().await;
            let part = answer.status(206).header("content-range", "bytes 3-7/8");
            Ok(part.body(Full::from("image")).unwrap())
        }
    }));
    let first = service.clone().oneshot(download(Empty::new())).await.unwrap();
    assert_eq!(first.into_body().collect().await.unwrap().to_bytes(), "an image");
    assert!(ledger.is_at_rest());
    let mut rest = download(Empty::new());
    rest.headers_mut().insert("range", "bytes=3-".parse().unwrap());
    let rest = tokio::spawn(service.oneshot(rest));
    crate::ledger::settled(|| !ledger.is_at_rest()).await;
    ledger.close();
    release.notify_one();
    let rest = rest.await.unwrap().unwrap();
    assert_eq!(rest.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(rest.into_body().collect().await.unwrap().to_bytes(), "image");
    assert_eq!((count(&ledger), ledger.is_at_rest()), ((1, 0), true));
}
