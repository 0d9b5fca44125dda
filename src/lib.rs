//! export-gate decides whether a design may leave the product as a file, and counts it exactly once.
//!
//! It stands at the edge, in front of render and download backends that stay as they are: recognises requests that produce a file,
//! reads the plan from the JWT and the AI features from token, header or a metadata service, charges counters in memory that are
//! synced to disk before the image leaves, and answers 429 over the limit. What it does not recognise it forwards as any proxy would.
//!
//! # The way of a request
//!
//! ```text
//! accept -> match route -> identify -> know the design -> charge -> forward -> settle
//!          (policy)       (identity)  (design)           (ledger)  (proxy)    (ledger)
//! ```
//!
//! It reads in this order, in one file: `src/gate/service.rs`. A charge is a guard ([`ledger::Charge`]) that travels from the future
//! into the body of the answer and settles exactly once: it sticks with the first byte of a file that the client's connection takes,
//! and is given back in every other case.
//!
//! # The parts, and who may import whom
//!
//! | part | what it is | imports |
//! | --- | --- | --- |
//! | [`policy`] | pure: vocabulary, routes, plans, meters, windows, decisions; time is an argument | nothing of ours |
//! | [`clock`] | system and manual clocks; nobody else asks for the time | nothing of ours |
//! | [`json`] | JSON that can be read in one way only, or is written in a hurry | nothing of ours |
//! | [`net`] | outbound HTTP connections, TLS, small documents | `clock` |
//! | [`identity`] | from token to [`identity::Caller`] | `policy`, `clock`, `json`, `net` |
//! | [`design`] | from design to AI features | `identity`, `policy`, `clock`, `json`, `net` |
//! | `seeded` | bugs that the crash harness must find; a feature that no release has switches them on | nothing of ours |
//! | [`store`] | the [`store::Store`] trait; the journal and the SQLite file | `policy`, `clock`, `seeded` |
//! | [`ledger`] | counters, charges, covers, the flusher | `policy`, `clock`, `store`, `seeded` |
//! | [`gate`] | the tower [`gate::ExportGateLayer`], its body, its refusals | `policy`, `identity`, `design`, `ledger`, `clock`, `json`, `seeded` |
//! | [`proxy`] | forwarding as a plain tower service | `net`, `clock` |
//! | [`admin`] | health, readiness, metrics, usage | `policy`, `identity`, `design`, `ledger` |
//! | [`config`] | the TOML file, and each part's options | all options |
//! | [`server`] | the composition root: listeners, connections and their bounds, TLS, reload, drain, last flush | all |
//! | [`cli`] | the commands | all |
//!
//! `gate` never sees `proxy`: the Layer works around any service. A test keeps this table true (`tests/it/architecture.rs`).
//!
//! # The Layer in a stack of your own
//!
//! A gate around a handler that draws. The free plan has one export a day: the first request is allowed, the next refused.
//!
//! ```
//! use std::{convert::Infallible, path::Path, sync::Arc};
//!
//! use export_gate::clock::{Clock, SystemClock};
//! use export_gate::design::Designs;
//! use export_gate::gate::{ExportGateLayer, Parts, Upload};
//! use export_gate::identity::Verifier;
//! use export_gate::ledger::Ledger;
//! use bytes::Bytes;
//! use http::{Request, Response, StatusCode};
//! use http_body_util::{BodyExt, Empty, Full};
//! use tower::{Layer, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const CONFIG: &str = r#"
//!     default_upstream = "none"
//!     upstreams.none.endpoints = ["http://127.0.0.1:1"]
//!     identity = { issuer = "me", audience = "exports", keys = [{ alg = "HS256", secret_env = "SECRET" }] }
//!     routes = [{ name = "download", path = "/designs/{design}", action = "download" }]
//!     designs.unknown_design = "plain"
//!     meters.exports = { window = { calendar = "day" }, limits = { free = 1 } }
//!     ledger.durability = "periodic"
//! "#;
//! let secret = "a secret of at least thirty-two bytes";
//! let environment = [("SECRET".to_owned(), secret.to_owned())].into();
//! let config = export_gate::config::parse("example", CONFIG, Path::new("."), &environment)?;
//!
//! let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
//! // Forgets all when it is dropped; `ledger::run` keeps a real one in its store.
//! let ledger = Ledger::in_memory(&config.policy, config.ledger, clock.clone());
//! let gate = ExportGateLayer::new(Parts {
//!     routes: config.routes,
//!     policy: config.policy,
//!     verifier: Arc::new(Verifier::new(config.identity, clock.clone()).map_err(|(_, bad)| bad)?),
//!     designs: Arc::new(Designs::new(config.designs, clock.clone())),
//!     ledger,
//!     clock,
//!     answers: config.answers,
//!     options: config.gate,
//! });
//! let draw = service_fn(async |_: Request<Upload<Empty<Bytes>>>| Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("an image"))));
//! let service = gate.layer(draw);
//!
//! let claims = serde_json::json!({ "iss": "me", "aud": "exports", "sub": "anna", "plan": "free", "exp": 9_999_999_999_u64 });
//! let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
//! let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?;
//! let download = || Request::get("/designs/poster").header("authorization", format!("Bearer {token}")).body(Empty::<Bytes>::new());
//!
//! let first = service.clone().oneshot(download()?).await?;
//! assert_eq!(first.status(), StatusCode::OK);
//! assert_eq!(first.into_body().collect().await?.to_bytes(), "an image");
//! let next = service.clone().oneshot(download()?).await?;
//! assert_eq!(next.status(), StatusCode::TOO_MANY_REQUESTS);
//! # Ok(())
//! # }
//! ```

pub mod admin;
pub mod cli;
pub mod clock;
pub mod config;
pub mod design;
pub mod gate;
pub mod identity;
pub mod json;
pub mod ledger;
pub mod net;
pub mod policy;
pub mod proxy;
#[doc(hidden)]
pub mod seeded;
pub mod server;
pub mod store;
