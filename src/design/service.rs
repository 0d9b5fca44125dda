//! The metadata service: what it is asked, and how its answer is read.
//!
//! A design is asked for by a GET of its own URL. The answer is JSON; a pointer leads to the features, and another one, if the
//! service has such a thing, to the design's version. What can be read in two ways is not read at all: it is a failure, like no
//! answer.

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderValue, StatusCode};
use serde_json::Value;

use super::cache::Times;
use crate::clock::Clock;
use crate::json;
use crate::net::{BadUrl, DocumentOptions, Documents, FetchError, Trust, Url};
use crate::policy::{features_in, percent_encoded};

/// What stands for the design's id in a URL.
const PLACE: &str = "{design}";
/// The longest id that is asked for, in bytes.
const LONGEST_ID: usize = 1_024;
/// How long the service must not have failed to be said to work again. A service that answers for some designs only would be
/// reported with each of them otherwise.
const CALM: Duration = Duration::from_secs(10);

/// What can be set about the metadata service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where a design is asked for.
    pub url: Template,
    /// Whose certificates are good.
    pub trust: Trust,
    /// JSON pointer to the features: a list, or names between blanks; empty means none, absent means unknown.
    pub pointer: String,
    /// JSON pointer to the design's version: text or a whole number.
    pub version: Option<String>,
    /// How long a fetch may take, and a request may wait for one.
    pub timeout: Duration,
    /// For how long answers count.
    pub times: Times,
    /// How many designs are asked for at once.
    pub at_once: usize,
    /// The longest answer that is read, in bytes.
    pub most_bytes: usize,
    /// How much memory answers may take, in bytes.
    pub cache_bytes: u64,
    /// An `Authorization` field to send.
    pub authorization: Option<HeaderValue>,
}

/// A URL with `{design}` in its path or query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    url: Url,
    /// What is between the places of the id.
    pieces: Vec<String>,
}

/// Why a text is no [`Template`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadTemplate {
    /// It is no URL.
    #[error(transparent)]
    Url(#[from] BadUrl),
    /// Every design would have the same URL.
    #[error("it does not say where the design's id goes")]
    NoPlace,
    /// Something else in braces.
    #[error("only the design's id can be put in")]
    Braces,
}

impl FromStr for Template {
    type Err = BadTemplate;

    fn from_str(text: &str) -> Result<Self, BadTemplate> {
        let url: Url = text.parse()?;
        let pieces: Vec<String> = url.target().split(PLACE).map(str::to_owned).collect();
        if pieces.iter().any(|piece| piece.contains(['{', '}'])) {
            return Err(BadTemplate::Braces);
        }
        if pieces.len() < 2 {
            return Err(BadTemplate::NoPlace);
        }
        Ok(Self { url, pieces })
    }
}

impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.url.without_query())
    }
}

impl Template {
    /// The URL, with the place of the id in it.
    pub const fn url(&self) -> &Url {
        &self.url
    }

    /// Path and query of a design. `None` if its id could lead elsewhere: a server may take `.` and `..` for steps in a path however
    /// they are encoded, and `/` and `\` for what is between them.
    fn target(&self, design: &str) -> Option<String> {
        let is_step = |piece: &str| matches!(piece, "." | "..");
        if !(1..=LONGEST_ID).contains(&design.len()) || design.split(['/', '\\']).any(is_step) {
            return None;
        }
        Some(self.pieces.join(&percent_encoded(design)))
    }
}

/// What the service says of a design.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// What is in it.
    Known(Described),
    /// That it does not know the design.
    Nothing,
}

/// A design as the service describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) features: Arc<[String]>,
    /// If the service says so.
    pub(super) version: Option<Arc<str>>,
}

/// Why the service said nothing that counts.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskFailed {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the answer is {0}")]
    Status(StatusCode),
    #[error("the answer is no JSON that can be read in one way: {0}")]
    Json(#[from] serde_json::Error),
    #[error("what is at `{0}` is neither a list of names nor names between blanks")]
    Features(String),
    #[error("what is at `{0}` is neither text nor a whole number")]
    Version(String),
}

/// The metadata service.
#[derive(Debug)]
pub(super) struct Service {
    documents: Documents,
    url: Template,
    pointer: String,
    version: Option<String>,
    health: Health,
}

impl Service {
    pub(super) fn new(options: Options, clock: Arc<dyn Clock>) -> Self {
        let documents = DocumentOptions {
            timeout: options.timeout,
            most_bytes: options.most_bytes,
            at_once: options.at_once,
            authorization: options.authorization,
        };
        let documents = Documents::new(options.url.url.origin(&options.trust), documents, clock);
        let Options { url, pointer, version, .. } = options;
        Self { documents, url, pointer, version, health: Health::default() }
    }

    /// Whether it can be asked for a design of this id.
    pub(super) fn takes(&self, design: &str) -> bool {
        self.url.target(design).is_some()
    }

    /// Asks.
    pub(super) async fn ask(&self, design: &str) -> Result<Said, AskFailed> {
        let Some(target) = self.url.target(design) else { return Ok(Said::Nothing) };
        let (status, body) = self.documents.get(&target).await?;
        match status {
            StatusCode::OK => self.read(&json::parse(&body)?),
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(Said::Nothing),
            other => Err(AskFailed::Status(other)),
        }
    }

    fn read(&self, document: &Value) -> Result<Said, AskFailed> {
        let wrong = || AskFailed::Features(self.pointer.clone());
        let Some(listed) = json::find(document, &self.pointer).map_err(|_| wrong())? else { return Ok(Said::Nothing) };
        let features = features_in(listed).ok_or_else(wrong)?;
        Ok(Said::Known(Described { features, version: self.read_version(document)? }))
    }

    fn read_version(&self, document: &Value) -> Result<Option<Arc<str>>, AskFailed> {
        let Some(pointer) = &self.version else { return Ok(None) };
        let called = json::find(document, pointer).and_then(|found| found.map(json::name).transpose());
        let called = called.map_err(|_| AskFailed::Version(pointer.clone()))?;
        Ok(called.filter(|called| !called.is_empty()).map(Arc::from))
    }

    /// Logs when the service begins to fail, and when it works again.
    pub(super) fn went(&self, why_not: Option<&str>, now: Duration) {
        match self.health.went(why_not.is_none(), now) {
            Some(News::Fails) => {
                let why = why_not.unwrap_or_default();
                tracing::warn!(
                    service = self.url.url.without_query(),
                    why,
                    "the metadata service does not say what is in a design"
                );
            }
            Some(News::WorksAgain) => {
                tracing::info!(service = self.url.url.without_query(), "the metadata service works again");
            }
            None => {}
        }
    }
}

/// Whether the service works, as it was last reported.
#[derive(Debug, Default)]
struct Health {
    /// The last failure, if it is reported to fail.
    fails: Mutex<Option<Duration>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    Fails,
    WorksAgain,
}

impl Health {
    fn went(&self, well: bool, now: Duration) -> Option<News> {
        let mut fails = self.fails.lock().unwrap_or_else(PoisonError::into_inner);
        if !well {
            return fails.replace(now).is_none().then_some(News::Fails);
        }
        let is_calm = fails.is_some_and(|last| now.saturating_sub(last) >= CALM);
        is_calm.then(|| {
            *fails = None;
            News::WorksAgain
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::clock::SystemClock;

    fn service(version: Option<&str>) -> Service {
        let options = Options {
            url: "http://127.0.0.1:1/designs/{design}".parse().unwrap(),
            trust: Trust::default(),
            pointer: "/ai/features".into(),
            version: version.map(str::to_owned),
            timeout: Duration::from_secs(1),
            times: Times::default(),
            most_bytes: 65_536,
            at_once: 1,
            cache_bytes: 1 << 20,
            authorization: None,
        };
        Service::new(options, Arc::new(SystemClock::new()))
    }

    #[test]
    fn the_id_goes_into_the_url_encoded_and_can_lead_nowhere_else() {
        let target = |template: &str, design: &str| template.parse::<Template>().unwrap().target(design);
        let designs = |design: &str| target("http://s/designs/{design}", design);
        let cases = [
            ("Ab9-._~", "/designs/Ab9-._~"),
            ("a b/c?d=e&f#g", "/designs/a%20b%2Fc%3Fd%3De%26f%23g"),
            ("café", "/designs/caf%C3%A9"),
            ("{design}%2e", "/designs/%7Bdesign%7D%252e"),
            ("a\r\nx: y", "/designs/a%0D%0Ax%3A%20y"),
            ("...", "/designs/..."),
            ("a..b", "/designs/a..b"),
        ];
        for (design, expected) in cases {
            assert_eq!(designs(design).as_deref(), Some(expected));
        }
        for step in ["", ".", "..", "../d2", "d1/../d2", "d1\\..\\d2", "./d1", &"x".repeat(LONGEST_ID + 1)] {
            assert_eq!(designs(step), None, "{step}");
        }
        assert_eq!(target("https://s/a?id={design}&again={design}", "x y").as_deref(), Some("/a?id=x%20y&again=x%20y"));
    }

    #[test]
    fn a_template_says_where_the_id_goes_and_nothing_else() {
        let bad = |text: &str| text.parse::<Template>().unwrap_err();
        assert_eq!(bad("http://s/designs"), BadTemplate::NoPlace);
        assert_eq!(bad("http://s/designs/{id}"), BadTemplate::Braces);
        assert_eq!(bad("http://s/{design}/{version}"), BadTemplate::Braces);
        for text in ["{design}", "http://{design}/x", "http://s:{design}/x", "ftp://s/{design}", "http://s/x#{design}"]
        {
            assert_eq!(bad(text), BadTemplate::Url(BadUrl), "{text}");
        }
    }

    #[test]
    fn features_are_a_list_or_names_between_blanks() {
        let service = service(None);
        let read = |features: Value| service.read(&json!({ "ai": { "features": features }, "version": 7 }));
        let known = |names: &[&str]| {
            Said::Known(Described { features: names.iter().map(ToString::to_string).collect(), version: None })
        };
        assert_eq!(read(json!(["logo", "crop"])).unwrap(), known(&["logo", "crop"]));
        assert_eq!(read(json!(" logo\tcrop ")).unwrap(), known(&["logo", "crop"]));
        assert_eq!(read(json!([])).unwrap(), known(&[]));
        assert_eq!(read(json!("")).unwrap(), known(&[]));
        assert_eq!(read(Value::Null).unwrap(), Said::Nothing);
        assert_eq!(service.read(&json!({ "ai": {} })).unwrap(), Said::Nothing);
        for wrong in [json!(true), json!({}), json!(3), json!(["logo", 3]), json!([["logo"]]), json!([null])] {
            assert!(matches!(read(wrong.clone()), Err(AskFailed::Features(_))), "{wrong}");
        }
    }

    #[test]
    fn a_version_is_text_or_a_whole_number() {
        let service = service(Some("/version"));
        let version = |version: Value| match service.read(&json!({ "ai": { "features": [] }, "version": version })) {
            Ok(Said::Known(described)) => Ok(described.version),
            Ok(Said::Nothing) => panic!("the features are known"),
            Err(failed) => Err(failed),
        };
        assert_eq!(version(json!("v7")).unwrap().as_deref(), Some("v7"));
        assert_eq!(version(json!(7)).unwrap().as_deref(), Some("7"));
        assert_eq!(version(json!("")).unwrap(), None);
        assert_eq!(version(Value::Null).unwrap(), None);
        for wrong in [json!(1.5), json!(-1), json!(true), json!(["v7"])] {
            assert!(matches!(version(wrong.clone()), Err(AskFailed::Version(_))), "{wrong}");
        }
    }

    #[test]
    fn a_service_that_fails_now_and_then_is_reported_once_until_it_is_calm() {
        let health = Health::default();
        let at = Duration::from_secs;
        assert_eq!(health.went(true, at(1)), None);
        assert_eq!(health.went(false, at(2)), Some(News::Fails));
        assert_eq!((health.went(false, at(3)), health.went(true, at(4))), (None, None));
        assert_eq!((health.went(false, at(12)), health.went(true, at(21))), (None, None));
        assert_eq!(health.went(true, at(22)), Some(News::WorksAgain));
        assert_eq!(health.went(true, at(23)), None);
        assert_eq!(health.went(false, at(24)), Some(News::Fails));
    }
}
