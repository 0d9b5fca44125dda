//! Answers that the gate makes itself: problem details (RFC 9457) for programs, the same as a page for people, never more than a
//! client should know.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, ORIGIN, REFERRER_POLICY, RETRY_AFTER, VARY, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::Full;
use serde_json::Value;
use smallvec::SmallVec;

use super::accept::Accept;
use super::fields;
use super::html::{self, Page};
use super::refusal::Refusal;
use super::request_id::{self, REQUEST_ID};
use super::when;
use crate::identity::TokenError;
use crate::json::Members;
use crate::ledger::{Denial, Standing};
use crate::policy::Policy;

const ABOUT_BLANK: &str = "about:blank";
const QUOTA_EXCEEDED: &str = "https://iana.org/assignments/http-problem-types#quota-exceeded";
const ABNORMAL_USAGE: &str = "https://iana.org/assignments/http-problem-types#abnormal-usage-detected";
/// What a web app may read of an answer besides what every page may.
const EXPOSED: &str =
    "ratelimit, ratelimit-policy, retry-after, export-warning, export-degraded, www-authenticate, x-request-id";
const RETRY_LEDGER: Duration = Duration::from_secs(5);
const RETRY_OVERLOAD: Duration = Duration::from_secs(1);

/// Which web apps may read the gate's own answers (Fetch standard, CORS protocol).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cors {
    /// Origins, e.g. `https://app.example.com`; `*` for any.
    pub allow_origins: Vec<String>,
    /// Whether they may send cookies along.
    pub allow_credentials: bool,
}

/// Makes the gate's own answers.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// Who may read them.
    pub cors: Cors,
    /// Where a user can get a larger plan.
    pub upgrade_url: Option<String>,
}

/// What an answer must know of its request, kept while the request itself goes on to the backend. That of an export is made once, for all
/// who may have to answer it.
#[derive(Debug, Clone)]
pub struct Asker(Arc<Asking>);

#[derive(Debug, Default)]
struct Asking {
    sent_id: Option<HeaderValue>,
    made_id: OnceLock<HeaderValue>,
    origin: Option<HeaderValue>,
    accept: Accept,
    is_head: bool,
}

impl Asker {
    /// Reads who asks, and for what form of an answer.
    pub fn of(method: &Method, headers: &HeaderMap) -> Self {
        let mut asking = Asking { is_head: *method == Method::HEAD, ..Asking::default() };
        let (mut id, mut is_one) = (None, true);
        // One look at each field costs less than a search for each: this is done for every export.
        for (name, value) in headers {
            // By name, not by text: a known name is compared as one byte.
            if *name == ACCEPT {
                asking.accept.and(value);
            } else if *name == ORIGIN {
                asking.origin.get_or_insert_with(|| value.clone());
            } else if *name == REQUEST_ID {
                is_one = id.replace(value).is_none();
            }
        }
        asking.sent_id = id.filter(|id| is_one && request_id::can_be_logged(id)).cloned();
        Self(Arc::new(asking))
    }

    /// The request's id. One that came without gets its id now: what is forwarded untouched needs none.
    pub fn request_id(&self) -> &HeaderValue {
        let Asking { sent_id, made_id, .. } = &*self.0;
        sent_id.as_ref().unwrap_or_else(|| made_id.get_or_init(request_id::fresh))
    }

    /// Has the request carry its id, in place of what it may have been sent with that is none.
    pub(super) fn mark(&self, headers: &mut HeaderMap) {
        if self.0.sent_id.is_none() {
            headers.insert(REQUEST_ID, self.request_id().clone());
        }
    }
}

impl Answers {
    /// The answer to a refused request. `now` in seconds since the epoch.
    pub fn refusal(&self, refusal: Refusal, asker: &Asker, policy: &Policy, now: i64) -> Response<Full<Bytes>> {
        let (kind, title) = match &refusal {
            Refusal::OverLimit { abuse: true, .. } => (ABNORMAL_USAGE, "Abnormal usage detected"),
            Refusal::OverLimit { .. } => (QUOTA_EXCEEDED, "Quota exceeded"),
            _ => (ABOUT_BLANK, usual_title(refusal.status())),
        };
        let quota = match &refusal {
            Refusal::OverLimit { denial, plan, abuse } => Some(self.quota(denial, plan, policy, *abuse)),
            _ => None,
        };
        let problem = Problem { kind, title, detail: refusal.detail(policy), quota };
        let mut answer = self.problem(refusal.status(), problem, asker);
        let headers = answer.headers_mut();
        let retry_after = match &refusal {
            Refusal::OverLimit { denial, .. } => {
                fields::put_rate_limit(headers, policy, &denial.violated, now);
                denial.retry_after
            }
            Refusal::LedgerUnavailable | Refusal::UnknownDesign | Refusal::KeysUnavailable => Some(RETRY_LEDGER),
            Refusal::Overloaded => Some(RETRY_OVERLOAD),
            Refusal::Unauthenticated(error) => {
                headers.extend(challenge(error).map(|challenge| (WWW_AUTHENTICATE, challenge)));
                None
            }
            Refusal::Malformed(_) => {
                // Where the next request begins is anybody's guess (RFC 9112, section 11.2).
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
                None
            }
            _ => None,
        };
        headers.extend(retry_after.map(|wait| (RETRY_AFTER, HeaderValue::from(wait.as_secs()))));
        // For layers outside to log.
        answer.extensions_mut().insert(refusal);
        answer
    }

    /// The answer in place of a backend that failed.
    pub fn bad_backend(&self, status: StatusCode, detail: &str, asker: &Asker) -> Response<Full<Bytes>> {
        let problem = Problem { kind: ABOUT_BLANK, title: usual_title(status), detail: detail.into(), quota: None };
        self.problem(status, problem, asker)
    }

    /// An answer that is no error.
    pub fn json(&self, body: &Value, asker: &Asker) -> Response<Full<Bytes>> {
        self.finish(StatusCode::OK, "application/json", body.to_string().into(), asker)
    }

    /// The answer to a CORS preflight for one of the gate's own pages.
    pub fn preflight(&self, asker: &Asker) -> Response<Full<Bytes>> {
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        answer.headers_mut().insert(REQUEST_ID, asker.request_id().clone());
        self.allow_origin(answer.headers_mut(), asker);
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET"));
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization"));
        answer
    }

    fn problem(&self, status: StatusCode, problem: Problem<'_>, asker: &Asker) -> Response<Full<Bytes>> {
        let instance = request_id::text(asker.request_id());
        let mut answer = if asker.0.accept.prefers_page() {
            let upgrade_url = problem.quota.as_ref().and_then(|quota| quota.upgrade_url);
            let page = Page { status, detail: &problem.detail, upgrade_url, request_id: instance };
            let mut answer = self.finish(status, html::MEDIA_TYPE, page.render().into(), asker);
            answer.headers_mut().insert(CONTENT_SECURITY_POLICY, html::security_policy());
            // The address that the browser shows may hold a token.
            answer.headers_mut().insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
            answer
        } else {
            self.finish(status, "application/problem+json", problem.json(status, instance).into(), asker)
        };
        answer.headers_mut().append(VARY, HeaderValue::from_static("accept"));
        answer
    }

    fn quota<'a>(&'a self, denial: &'a Denial, plan: &'a str, policy: &'a Policy, abuse: bool) -> Quota<'a> {
        let name = |standing: &Standing| policy.meter(standing.meter).map(|meter| &*meter.name);
        let violated_policies = denial.violated.iter().filter_map(name).collect();
        let gravest = denial.violated.first().map(|standing| Gravest {
            meter: name(standing).unwrap_or_default(),
            limit: standing.limit,
            used: standing.taken(),
            remaining: standing.remaining(),
            resets_at: when::named(standing.resets_at),
        });
        let upgrade_url = self.upgrade_url.as_deref().filter(|_| !abuse);
        Quota { violated_policies, plan, gravest, upgrade_url }
    }

    fn finish(
        &self,
        status: StatusCode,
        media_type: &'static str,
        body: Bytes,
        asker: &Asker,
    ) -> Response<Full<Bytes>> {
        // What is not sent to HEAD is described all the same (RFC 9110, section 9.3.2).
        let length = HeaderValue::from(body.len());
        let mut answer = Response::new(if asker.0.is_head { Full::default() } else { Full::new(body) });
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        // Enough for a refusal, which has most.
        headers.reserve(12);
        headers.insert(CONTENT_LENGTH, length);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        // Parts of a request are in some answers: they are what the media type says, and nothing else.
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(REQUEST_ID, asker.request_id().clone());
        self.allow_origin(headers, asker);
        answer
    }

    /// Lets web apps read what the gate adds to a backend's answer, if the backend lets them read that at all.
    pub(super) fn expose_fields(&self, headers: &mut HeaderMap, asker: &Asker) {
        if self.allowed_origin(asker).is_some() {
            headers.append(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        }
    }

    fn allow_origin(&self, headers: &mut HeaderMap, asker: &Asker) {
        if self.cors.allow_origins.is_empty() {
            return;
        }
        headers.append(VARY, HeaderValue::from_static("origin"));
        let Some(origin) = self.allowed_origin(asker) else { return };
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        if self.cors.allow_credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }

    /// Where the request comes from, if web apps of that origin may read the gate's answers.
    fn allowed_origin<'a>(&self, asker: &'a Asker) -> Option<&'a HeaderValue> {
        let origin = asker.0.origin.as_ref()?;
        let listed = |allowed: &String| allowed == "*" || allowed.as_bytes() == origin.as_bytes();
        self.cors.allow_origins.iter().any(listed).then_some(origin)
    }
}

/// What a problem is about (RFC 9457, section 3.1), but for what each answer says of itself.
struct Problem<'a> {
    kind: &'static str,
    title: &'static str,
    detail: Cow<'a, str>,
    quota: Option<Quota<'a>>,
}

impl Problem<'_> {
    /// Its JSON: members in this order. `instance` is the request's id.
    fn json(&self, status: StatusCode, instance: &str) -> Vec<u8> {
        // Enough for nearly all.
        let mut members = Members::of_object(640);
        members.text("type", self.kind);
        members.text("title", self.title);
        members.number("status", status.as_u16());
        members.text("detail", &self.detail);
        members.text("instance", instance);
        if let Some(quota) = &self.quota {
            members.value("violated-policies", &*quota.violated_policies);
            members.text("plan", quota.plan);
            if let Some(gravest) = &quota.gravest {
                members.text("meter", gravest.meter);
                members.number("limit", gravest.limit);
                members.number("used", gravest.used);
                members.number("remaining", gravest.remaining);
                members.text("resets_at", &gravest.resets_at.timestamp);
            }
            if let Some(url) = quota.upgrade_url {
                members.text("upgrade_url", url);
            }
        }
        members.raw("}");
        members.into_bytes()
    }
}

/// How a user stands who is over a limit.
struct Quota<'a> {
    violated_policies: SmallVec<[&'a str; 2]>,
    plan: &'a str,
    gravest: Option<Gravest<'a>>,
    upgrade_url: Option<&'a str>,
}

/// The meter that stands in the way longest.
struct Gravest<'a> {
    meter: &'a str,
    limit: u32,
    used: u32,
    remaining: u32,
    resets_at: Rc<when::Named>,
}

fn usual_title(status: StatusCode) -> &'static str {
    status.canonical_reason().unwrap_or("Error")
}

/// What to do for a token that is not accepted, or not there (RFC 6750, section 3).
fn challenge(error: &TokenError) -> Option<HeaderValue> {
    if *error == TokenError::Missing {
        // Nothing that was sent is wrong (section 3.1).
        return Some(HeaderValue::from_static("Bearer"));
    }
    // The texts hold no quotes but around claim names.
    let description = error.to_string().replace('"', "'");
    HeaderValue::try_from(format!("Bearer error=\"invalid_token\", error_description=\"{description}\"")).ok()
}
