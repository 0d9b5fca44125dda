//! What operators ask, on a listener of its own: health, readiness, metrics, usage by user; and that a design's facts be forgotten.

use std::borrow::Cow;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use crate::design::Designs;
use crate::identity::Verifier;
use crate::ledger::Ledger;
use crate::policy::path::decoded;
use crate::policy::{Anchor, Policy, Who};

/// What can be set about the admin listener.
#[derive(Clone, PartialEq, Eq)]
pub struct Options {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The bearer token that all but health and readiness ask for.
    pub token: Option<Vec<u8>>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("listen", &self.listen).field("token", &self.token.is_some()).finish()
    }
}

/// Answers operators.
#[derive(Debug)]
pub struct Admin {
    token: Option<Vec<u8>>,
    ledger: Arc<Ledger>,
    registry: Registry,
    shown: ArcSwap<Shown>,
    /// Why the configuration that was last to be taken over was not.
    refused: ArcSwapOption<String>,
    /// The gate takes no more connections.
    is_ending: AtomicBool,
}

/// What a configuration says that pages are about.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Plans and meters.
    pub policy: Policy,
    /// No limit is enforced.
    pub shadow: bool,
    /// Who is asking.
    pub verifier: Arc<Verifier>,
    /// What is in a design.
    pub designs: Arc<Designs>,
}

impl Admin {
    /// Pages about a ledger, and the metrics of `registry`.
    pub fn new(options: &Options, ledger: Arc<Ledger>, registry: Registry, shown: Shown) -> Self {
        let (shown, refused) = (ArcSwap::from_pointee(shown), ArcSwapOption::empty());
        Self { token: options.token.clone(), ledger, registry, shown, refused, is_ending: AtomicBool::new(false) }
    }

    /// The gate is to end: nobody shall be sent to it any more.
    pub fn ends(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Another configuration counts from now on.
    pub fn show(&self, shown: Shown) {
        self.shown.store(Arc::new(shown));
        self.refused.store(None);
    }

    /// A configuration was to be taken over, and was not.
    pub fn refused(&self, why: String) {
        self.refused.store(Some(Arc::new(why)));
    }

    /// Answers one request.
    ///
    /// # Errors
    ///
    /// None.
    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
        let path = request.uri().path();
        let facts = facts_of(path);
        let is_right = match *request.method() {
            Method::GET | Method::HEAD => facts.is_none(),
            Method::DELETE => facts.is_some(),
            _ => false,
        };
        if !is_right {
            let (said, allowed) = if facts.is_some() { ("DELETE", "DELETE") } else { ("GET", "GET, HEAD") };
            let error = format!("this is for {said}");
            let mut page = json_page(StatusCode::METHOD_NOT_ALLOWED, &json!({ "error": error }));
            page.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
            return Ok(page);
        }
        Ok(match path {
            // Load balancers and probes carry no token.
            "/healthz" if !self.is_ending() => json_page(StatusCode::OK, &json!({ "healthy": true })),
            "/healthz" => json_page(StatusCode::SERVICE_UNAVAILABLE, &json!({ "healthy": false, "ending": true })),
            "/readyz" if self.is_ending() => {
                json_page(StatusCode::SERVICE_UNAVAILABLE, &json!({ "ready": false, "ending": true }))
            }
            "/readyz" => self.readiness(self.is_allowed(&request)),
            _ if !self.is_allowed(&request) => {
                let mut page = json_page(
                    StatusCode::UNAUTHORIZED,
                    &json!({ "error": "send the admin token: `Authorization: Bearer …`, or --token-env NAME" }),
                );
                page.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                page
            }
            "/metrics" => self.metrics(),
            _ if let Some(design) = facts => self.forget(&design),
            _ => match path.strip_prefix("/v1/usage/").map(decoded).filter(|user| !user.is_empty()) {
                Some(user) => self.usage(&user, request.uri().query()),
                None => json_page(StatusCode::NOT_FOUND, &json!({ "error": "there is no such page" })),
            },
        })
    }

    /// What the metadata service said of a design is asked for again.
    fn forget(&self, design: &str) -> Response<Full<Bytes>> {
        self.shown.load().designs.forget(design);
        let mut page = Response::default();
        *page.status_mut() = StatusCode::NO_CONTENT;
        page
    }

    fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Whether exports can be charged, and if not why. What is wrong with a changed configuration is told to operators only: a line of it may
    /// hold what others may not see.
    fn readiness(&self, is_operator: bool) -> Response<Full<Bytes>> {
        let (ledger, keys) = (self.ledger.availability(), self.shown.load().verifier.availability());
        let is_ready = ledger.is_ok() && keys.is_ok();
        let mut page = json!({ "ready": is_ready });
        // The gate goes on with the one before it.
        if let Some(why) = &*self.refused.load() {
            let hidden = "a changed configuration was refused: the log says why, and so does this page to who sends the admin token";
            page["configuration"] = if is_operator { why.as_str().into() } else { hidden.into() };
        }
        if let Err(why) = ledger {
            page["ledger"] = (*why).into();
        }
        if let Err(why) = keys {
            page["keys"] = why.into();
        }
        json_page(if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &page)
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        self.ledger.refresh_metrics();
        let shown = self.shown.load();
        shown.verifier.refresh_metrics();
        shown.designs.refresh_metrics();
        let mut text = String::new();
        if prometheus_client::encoding::text::encode(&mut text, &self.registry).is_err() {
            return json_page(StatusCode::INTERNAL_SERVER_ERROR, &json!({ "error": "metrics cannot be encoded" }));
        }
        let mut page = Response::new(Full::from(text));
        let media_type = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        page.headers_mut().insert(CONTENT_TYPE, media_type);
        page
    }

    /// `?plan=pro` tells the limits of that plan; without it, those of the plan at the user's last charge. What a token would say
    /// of the user can be said by `team`, `seats` and `billing_anchor`, and any other claim by its JSON pointer.
    fn usage(&self, user: &str, query: Option<&str>) -> Response<Full<Bytes>> {
        if let Err(why) = self.ledger.availability() {
            return json_page(StatusCode::SERVICE_UNAVAILABLE, &json!({ "error": &*why }));
        }
        let shown = self.shown.load();
        let policy = &shown.policy;
        let (mut who, mut plan) = (Who::user(user), None);
        let mut claims = Vec::new();
        for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decoded(name), decoded(value));
            let understood = match &*name {
                "plan" => {
                    plan = policy.plans.find(&value);
                    plan.is_some()
                }
                "team" => {
                    who.team = Some((*value).into());
                    true
                }
                "seats" => {
                    who.seats = value.parse().ok();
                    who.seats.is_some()
                }
                "billing_anchor" => {
                    who.billing_anchor = billing_anchor(&value);
                    who.billing_anchor.is_some()
                }
                pointer => {
                    claims.push((pointer.into(), (*value).into()));
                    pointer.starts_with('/')
                }
            };
            if !understood {
                let plans = || policy.plans.iter().map(|(_, name)| name.to_string()).collect::<Vec<_>>().join(", ");
                let error = match &*name {
                    "plan" => format!("there is no plan `{value}`: there are {}", plans()),
                    "billing_anchor" => {
                        format!(
                            "`{value}` is no time: write a day of the month, 2026-11-30, 2026-11-30T12:00:00Z, or seconds since 1970"
                        )
                    }
                    _ => format!("`{name}={value}` is not understood"),
                };
                return json_page(StatusCode::BAD_REQUEST, &json!({ "error": error }));
            }
        }
        who.claims = claims.into();
        json_page(StatusCode::OK, &self.ledger.usage_report(policy, &who, plan, shown.shadow))
    }

    fn is_allowed<B>(&self, request: &Request<B>) -> bool {
        let Some(token) = &self.token else { return true };
        let sent = request.headers().get(AUTHORIZATION).and_then(|field| field.as_bytes().split_at_checked(7));
        let sent = sent.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer ")).map(|(_, sent)| sent);
        sent.is_some_and(|sent| aws_lc_rs::constant_time::verify_slices_are_equal(sent, token).is_ok())
    }
}

/// The design of `/v1/designs/{design}/facts`.
fn facts_of(path: &str) -> Option<Cow<'_, str>> {
    let design = path.strip_prefix("/v1/designs/")?.strip_suffix("/facts")?;
    Some(decoded(design)).filter(|design| !design.is_empty())
}

/// As the claim may have it.
fn billing_anchor(text: &str) -> Option<Anchor> {
    text.parse().ok().and_then(Anchor::from_number).or_else(|| Anchor::from_text(text))
}

fn json_page(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut page = Response::new(Full::from(format!("{body}\n")));
    *page.status_mut() = status;
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    page
}
