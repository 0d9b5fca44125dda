//! Answers that the gate makes itself: problem details (RFC 9457) for programs, the same as a page for people, never more than a
//! client should know.

use std::sync::OnceLock;
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
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::accept::Accept;
use super::fields;
use super::page::{self, Page};
use super::refusal::Refusal;
use super::request_id::{self, REQUEST_ID};
use crate::ledger::{Denial, Why};
use crate::policy::Policy;

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

/// What an answer must know of its request, kept while the request itself goes on to the backend.
#[derive(Debug, Clone, Default)]
pub struct Asker {
    request_id: OnceLock<HeaderValue>,
    origin: Option<HeaderValue>,
    accept: Accept,
    is_head: bool,
}

impl Asker {
    /// Reads who asks, and for what form of an answer.
    pub fn of(method: &Method, headers: &HeaderMap) -> Self {
        let mut asker = Self { is_head: *method == Method::HEAD, ..Self::default() };
        // One look at each field costs less than a search for each: this is done for every export.
        for (name, value) in headers {
            if *name == ACCEPT {
                asker.accept.and(value);
            } else if *name == ORIGIN {
                asker.origin.get_or_insert_with(|| value.clone());
            } else if *name == REQUEST_ID && asker.request_id.get().is_none() {
                asker.request_id = request_id::sent(headers).cloned().map(OnceLock::from).unwrap_or_default();
            }
        }
        asker
    }

    /// The request's id. One that came without gets its id now: what is forwarded untouched needs none.
    pub fn request_id(&self) -> &HeaderValue {
        self.request_id.get_or_init(request_id::fresh)
    }
}

impl Answers {
    /// The answer to a refused request. `now` in seconds since the epoch.
    pub fn refusal(&self, refusal: &Refusal, asker: &Asker, policy: &Policy, now: i64) -> Response<Full<Bytes>> {
        let mut headers = HeaderMap::new();
        let mut members = Map::new();
        let detail = match refusal {
            Refusal::Misread(misread) => misread.to_string(),
            Refusal::NoDesign => "The request does not say which design is to be exported.".to_owned(),
            Refusal::BadIdempotencyKey => {
                "Send one Idempotency-Key of 1 to 255 visible ASCII characters, or none.".to_owned()
            }
            Refusal::BadCost(bad) => bad.to_string(),
            Refusal::BodyTooLong => "The body is longer than what is read to count its images.".to_owned(),
            Refusal::BodyTooSlow => "The body stood still for too long.".to_owned(),
            Refusal::TargetTooLong => "The address is too long for this export to be degraded.".to_owned(),
            Refusal::BodyBroken => "The body broke off.".to_owned(),
            Refusal::Unauthenticated(error) => {
                // The texts hold no quotes but around claim names.
                let description = error.to_string().replace('"', "'");
                let challenge = format!("Bearer error=\"invalid_token\", error_description=\"{description}\"");
                headers.extend(HeaderValue::try_from(challenge).ok().map(|value| (WWW_AUTHENTICATE, value)));
                format!("Sign in to export: {error}.")
            }
            Refusal::KeysUnavailable => {
                "It cannot be checked right now who is asking. Try again in a moment.".to_owned()
            }
            Refusal::UnknownPlan(Some(plan)) => format!("The plan \"{plan}\" is not known here."),
            Refusal::UnknownPlan(None) => "The access token names no plan.".to_owned(),
            Refusal::MissingClaim(name) => {
                format!("The access token has no \"{name}\" claim, and exports count by it.")
            }
            Refusal::Unclassified => "Files from here may not leave.".to_owned(),
            Refusal::UnknownDesign => "It is not known yet what this design is made of. Try again.".to_owned(),
            Refusal::LedgerUnavailable => "Exports cannot be counted right now. Try again in a moment.".to_owned(),
            Refusal::NotFound => "Nothing is here.".to_owned(),
            Refusal::Malformed(malformed) => malformed.to_string(),
            Refusal::Overloaded => "Too much is going on at once. Try again in a moment.".to_owned(),
            Refusal::OverLimit { denial, plan, abuse } => {
                fields::put_rate_limit(&mut headers, policy, &denial.violated, now);
                members = self.quota_members(denial, plan, policy, *abuse);
                if *abuse { abuse_detail(denial) } else { quota_detail(denial, plan, policy) }
            }
        };
        let retry_after = match refusal {
            Refusal::OverLimit { denial, .. } => denial.retry_after,
            Refusal::LedgerUnavailable | Refusal::UnknownDesign | Refusal::KeysUnavailable => Some(RETRY_LEDGER),
            Refusal::Overloaded => Some(RETRY_OVERLOAD),
            _ => None,
        };
        headers.extend(retry_after.map(|wait| (RETRY_AFTER, HeaderValue::from(wait.as_secs()))));
        if matches!(refusal, Refusal::Malformed(_)) {
            // Where the next request begins is anybody's guess (RFC 9112, section 11.2).
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let kind = match refusal {
            Refusal::OverLimit { abuse: true, .. } => ABNORMAL_USAGE,
            Refusal::OverLimit { .. } => QUOTA_EXCEEDED,
            _ => "about:blank",
        };
        let mut answer = self.problem(refusal.status(), kind, &detail, members, asker);
        answer.headers_mut().extend(headers);
        answer.extensions_mut().insert(refusal.clone());
        answer
    }

    /// The answer in place of a backend that failed.
    pub fn bad_backend(&self, status: StatusCode, detail: &str, asker: &Asker) -> Response<Full<Bytes>> {
        self.problem(status, "about:blank", detail, Map::new(), asker)
    }

    /// An answer that is no error.
    pub fn json(&self, body: &Value, asker: &Asker) -> Response<Full<Bytes>> {
        self.finish(StatusCode::OK, "application/json", body.to_string(), asker)
    }

    /// The answer to a CORS preflight for one of the gate's own pages.
    pub fn preflight(&self, asker: &Asker) -> Response<Full<Bytes>> {
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::NO_CONTENT;
        self.allow_origin(answer.headers_mut(), asker);
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET"));
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization"));
        answer
    }

    fn problem(
        &self,
        status: StatusCode,
        kind: &str,
        detail: &str,
        members: Map<String, Value>,
        asker: &Asker,
    ) -> Response<Full<Bytes>> {
        let title = match kind {
            QUOTA_EXCEEDED => "Quota exceeded",
            ABNORMAL_USAGE => "Abnormal usage detected",
            _ => status.canonical_reason().unwrap_or("Error"),
        };
        let request_id = request_id::text(asker.request_id());
        let mut answer = if asker.accept.prefers_page() {
            let upgrade_url = members.get("upgrade_url").and_then(Value::as_str);
            let page = Page { status, detail, upgrade_url, request_id };
            let mut answer = self.finish(status, page::MEDIA_TYPE, page.render(), asker);
            answer.headers_mut().insert(CONTENT_SECURITY_POLICY, page::security_policy());
            // The address that the browser shows may hold a token.
            answer.headers_mut().insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
            answer
        } else {
            let mut body = Map::new();
            body.insert("type".into(), kind.into());
            body.insert("title".into(), title.into());
            body.insert("status".into(), status.as_u16().into());
            body.insert("detail".into(), detail.into());
            body.insert("instance".into(), request_id.into());
            body.extend(members);
            self.finish(status, "application/problem+json", Value::Object(body).to_string(), asker)
        };
        answer.headers_mut().append(VARY, HeaderValue::from_static("accept"));
        answer
    }

    fn quota_members(&self, denial: &Denial, plan: &str, policy: &Policy, abuse: bool) -> Map<String, Value> {
        let mut members = Map::new();
        let names = denial.violated.iter().filter_map(|standing| policy.meter(standing.meter));
        members.insert("violated-policies".into(), names.map(|meter| &*meter.name).collect());
        members.insert("plan".into(), plan.into());
        if let Some(standing) = denial.violated.first() {
            let meter = policy.meter(standing.meter).map_or("", |meter| &*meter.name);
            members.insert("meter".into(), meter.into());
            members.insert("limit".into(), standing.limit.into());
            members.insert("used".into(), standing.taken().into());
            members.insert("remaining".into(), standing.remaining().into());
            members.insert("resets_at".into(), instant(standing.resets_at).to_string().into());
        }
        members.extend(self.upgrade_url.as_ref().filter(|_| !abuse).map(|url| ("upgrade_url".to_owned(), json!(url))));
        members
    }

    fn finish(
        &self,
        status: StatusCode,
        media_type: &'static str,
        body: String,
        asker: &Asker,
    ) -> Response<Full<Bytes>> {
        // What is not sent to HEAD is described all the same (RFC 9110, section 9.3.2).
        let length = HeaderValue::from(body.len());
        let mut answer = Response::new(if asker.is_head { Full::default() } else { Full::from(body) });
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
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
        let origin = asker.origin.as_ref()?;
        let listed = |allowed: &String| allowed == "*" || allowed.as_bytes() == origin.as_bytes();
        self.cors.allow_origins.iter().any(listed).then_some(origin)
    }
}

fn instant(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
}

fn abuse_detail(denial: &Denial) -> String {
    let until = denial.violated.first().map(|standing| instant(standing.resets_at));
    let until = until.map(|until| until.strftime("%A, %-d %B %Y at %H:%M UTC").to_string()).unwrap_or_default();
    format!("This account exports far more than others do, and is paused until {until}.")
}

fn quota_detail(denial: &Denial, plan: &str, policy: &Policy) -> String {
    let Some(standing) = denial.violated.first() else { return String::new() };
    let meter = policy.meter(standing.meter).map_or("", |meter| &*meter.name);
    let (limit, used) = (standing.limit, standing.count.used);
    match denial.why {
        Why::AboveLimit if limit == 0 => format!("The {plan} plan has no {meter}."),
        Why::AboveLimit => format!("This takes {} {meter} at once, and the {plan} plan has {limit}.", standing.cost),
        Why::InFlight => {
            format!(
                "Another export is under way, and your {plan} plan has {limit} {meter}. Try again when it has ended."
            )
        }
        Why::Exhausted => {
            let resets_at = instant(standing.resets_at).strftime("%A, %-d %B %Y at %H:%M UTC");
            let stand = match standing.cost {
                1 => format!("You have used {used} of the {limit} {meter} of your {plan} plan."),
                cost => {
                    let left = standing.remaining();
                    format!("This takes {cost} {meter}, and of the {limit} of your {plan} plan {left} are left.")
                }
            };
            format!("{stand} More are available from {resets_at}.")
        }
    }
}
