//! What is in the design: whether it uses AI features (counting rules, section 5).
//!
//! Sources are asked in the configured order; the first that knows decides. A claim speaks only for the design that the token
//! names, if it names one; a header only if a trusted hop sent it; the metadata service is asked over HTTP:
//!
//! 1. `cache.rs` knows what the service said before: fresh, stale, that it does not know the design, or that it failed.
//! 2. `flights.rs` lets all who want to know the same wait for one fetch, in a task of its own.
//! 3. `service.rs` says what is asked, and reads the answer strictly.
//! 4. `lookup.rs` puts the three together: that is the way of a request.
//!
//! A save of a design makes what is known of it a thing of the past: while it is under way and for a while after, each export asks anew
//! (`edits.rs`). Only exports wait for the service, and none for longer than a fetch may take.

mod cache;
mod edits;
mod features;
mod flights;
mod lookup;
mod metrics;
mod service;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use prometheus_client::registry::Registry;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::clock::Clock;
use crate::identity::Caller;
use crate::policy::feature_names;

pub use cache::Times;
pub use edits::Saved;
pub use features::{Options as FeatureOptions, UnknownFeature};
pub use service::{BadTemplate, Options as ServiceOptions, Template};

use cache::Answer;
use edits::Edits;
use features::Features;
use lookup::{Lookup, Remember};
use metrics::Metrics;

/// What can be set about design facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whom to ask, in order.
    pub sources: Vec<Source>,
    /// The header that a trusted hop sets: feature names between commas; empty means none.
    pub header: HeaderName,
    /// The header by which a trusted hop says which version of the design it is.
    pub version_header: Option<HeaderName>,
    /// Who may set these.
    pub trusted_hops: Vec<IpNet>,
    /// The metadata service, if it is one of the sources.
    pub service: Option<ServiceOptions>,
    /// What to do when no source knows.
    pub unknown_design: UnknownDesign,
    /// Which features make a design an AI design.
    pub features: FeatureOptions,
}

/// Who knows about a design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// A claim of the caller's token.
    Claim,
    /// A request header of a trusted hop.
    Header,
    /// The metadata service.
    Service,
    /// Nobody: `unknown_design` decided.
    Default,
}

impl Source {
    /// The name in configuration and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Header => "header",
            Self::Service => "service",
            Self::Default => "unknown_design",
        }
    }
}

/// What to do with a design that no source knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UnknownDesign {
    /// Count it as an AI design.
    Ai,
    /// Count it as one without AI.
    Plain,
    /// Answer 503 and charge nothing.
    Refuse,
}

/// What is known of a design.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Whether it uses an AI feature.
    pub ai: bool,
    /// The features, as the source names them.
    pub features: Arc<[String]>,
    /// Who said so.
    pub source: Source,
    /// How old that is, if the metadata service said so.
    pub age: Option<Duration>,
    /// Whether it is older than it should be: the service is being asked again, or could not be.
    pub stale: bool,
    /// The version of the design, if somebody says so.
    pub version: Option<Arc<str>>,
    /// Why the metadata service could not be asked, if that is so.
    pub trouble: Option<Arc<str>>,
}

impl Facts {
    /// Of a design that no source knows, for exports whose charge does not depend on them.
    pub fn unknown() -> Self {
        let source = Source::Default;
        Self { ai: false, features: Arc::default(), source, age: None, stale: false, version: None, trouble: None }
    }
}

/// No source knows the design, and `unknown_design` is `refuse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    /// The header that was sent, and not believed: by whom, if that is known.
    pub disbelieved: Option<(HeaderName, Option<IpAddr>)>,
    /// The only design that the token speaks for, if it is another one.
    pub claims_are_of: Option<Arc<str>>,
    /// Why the metadata service could not be asked, if that is so.
    pub trouble: Option<Arc<str>>,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no source knows which AI features the design uses")?;
        if let Some(other) = &self.claims_are_of {
            write!(f, "; the token speaks only for the design `{other}`")?;
        }
        match &self.disbelieved {
            Some((header, Some(peer))) => {
                write!(f, "; `{header}` is not believed: `designs.trusted_hops` has no {peer}")?;
            }
            Some((header, None)) => write!(f, "; `{header}` is not believed: nobody knows who sent it")?,
            None => {}
        }
        match &self.trouble {
            Some(why) => write!(f, "; the metadata service: {why}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Unknown {}

/// Finds out what is in a design. What it fetches ends when it is dropped.
#[derive(Debug)]
pub struct Designs {
    sources: Vec<Source>,
    header: HeaderName,
    version_header: Option<HeaderName>,
    trusted_hops: Vec<IpNet>,
    unknown_design: UnknownDesign,
    features: Features,
    service: Option<Arc<Lookup>>,
    edits: Arc<Edits>,
    metrics: Arc<Metrics>,
}

impl Designs {
    /// Facts from the sources of `options`.
    pub fn new(options: Options, clock: Arc<dyn Clock>) -> Self {
        Self::after(None, options, clock)
    }

    /// Others in place of these, which go on with their metrics; and with what the metadata service said, if it is asked for the same.
    #[must_use]
    pub fn succeed(&self, options: Options, clock: Arc<dyn Clock>) -> Self {
        Self::after(Some(self), options, clock)
    }

    fn after(before: Option<&Self>, options: Options, clock: Arc<dyn Clock>) -> Self {
        let metrics = before.map(|before| before.metrics.clone()).unwrap_or_default();
        let edits = before.map_or_else(|| Arc::new(Edits::new(clock.clone())), |before| before.edits.clone());
        let known = before.and_then(|before| before.service.clone());
        let service = options.service.map(|options| match known {
            Some(known) => known.succeed(options),
            None => Arc::new(Lookup::new(options, metrics.clone(), clock)),
        });
        Self {
            sources: options.sources,
            header: options.header,
            version_header: options.version_header,
            trusted_hops: options.trusted_hops,
            unknown_design: options.unknown_design,
            features: Features::new(options.features, metrics.clone()),
            service,
            edits,
            metrics,
        }
    }

    /// What is known of a design. Takes no longer than a fetch from the metadata service may. To be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Unknown`] if no source knows and unknown designs are to be refused.
    pub async fn facts(
        &self,
        design: &str,
        caller: &Caller,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Facts, Unknown> {
        let version = self.version(design, caller, headers, peer);
        let mut trouble = None;
        for &source in &self.sources {
            let known = match (source, &self.service) {
                (Source::Claim, _) => claimed(design, caller),
                (Source::Header, _) => self.sent_by_trusted_hop(headers, peer),
                (Source::Service, Some(service)) => match self.ask(service, design, version.as_ref()).await {
                    Answer::Known { described, age, stale } => {
                        let ai = self.features.are_ai(&described.features);
                        let version = version.or(described.version);
                        let features = described.features;
                        return Ok(Facts { ai, features, source, age: Some(age), stale, version, trouble });
                    }
                    Answer::Nothing => None,
                    Answer::Failed(why) => {
                        trouble = Some(why);
                        None
                    }
                },
                (Source::Service | Source::Default, _) => None,
            };
            if let Some(features) = known {
                let ai = self.features.are_ai(&features);
                return Ok(Facts { ai, features, source, age: None, stale: false, version, trouble });
            }
        }
        let ai = match self.unknown_design {
            UnknownDesign::Ai => true,
            UnknownDesign::Plain => false,
            UnknownDesign::Refuse => return Err(self.unknown(design, caller, headers, peer, trouble)),
        };
        let source = Source::Default;
        Ok(Facts { ai, features: Arc::default(), source, age: None, stale: false, version, trouble })
    }

    /// Asks the metadata service, or what it said before.
    async fn ask(&self, service: &Lookup, design: &str, version: Option<&Arc<str>>) -> Answer {
        if !self.edits.is_unsettled(design) {
            return service.find(design, version, Remember::Yes).await;
        }
        let mut turn = None;
        let takes_turn = || {
            turn = self.edits.turn(design);
            turn.is_some()
        };
        // Held until it is told.
        service.find_anew(design, version, takes_turn).await
    }

    fn unknown(
        &self,
        design: &str,
        caller: &Caller,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        trouble: Option<Arc<str>>,
    ) -> Unknown {
        let is_asked = |source| self.sources.contains(&source);
        let is_sent = is_asked(Source::Header) && headers.contains_key(&self.header);
        let disbelieved = is_sent && !peer.is_some_and(|peer| self.trusts(peer));
        let of_other = is_asked(Source::Claim) && caller.ai_features.is_some() && !speaks_for(caller, design);
        Unknown {
            disbelieved: disbelieved.then(|| (self.header.clone(), peer)),
            claims_are_of: caller.design.as_deref().filter(|_| of_other).map(Arc::from),
            trouble,
        }
    }

    /// Forgets what the metadata service said of a design: it is another one now.
    pub fn forget(&self, design: &str) {
        if let Some(service) = &self.service {
            service.forget(design);
        }
    }

    /// A save of a design is on its way to its backend.
    pub fn save_begins(&self, design: &str) {
        if let Some(service) = &self.service {
            self.edits.begins(design);
            service.call_off(design);
        }
    }

    /// A save has ended. Before its client hears of it: what it exports next is the new design.
    pub fn save_ends(&self, design: &str, saved: Saved) {
        match (saved, &self.service) {
            (Saved::Yes, _) => self.forget(design),
            // What was known before counts if nobody can be asked, and else no more: also for who comes when it is settled again.
            (Saved::Maybe, Some(service)) => service.doubt(design),
            (Saved::Maybe, None) | (Saved::No, _) => {}
        }
        self.edits.ends(design, saved);
    }

    /// Adds what is counted to a registry.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// Brings those metrics up to date that are not counted as things happen.
    pub fn refresh_metrics(&self) {
        self.metrics.observe(self.service.as_ref().map_or(0, |service| service.cache_bytes()));
    }

    /// Whether `peer` is a trusted hop.
    fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted_hops.iter().any(|net| net.contains(&peer.to_canonical()))
    }

    /// By claim, else by the header of a trusted hop.
    fn version(&self, design: &str, caller: &Caller, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<Arc<str>> {
        let claimed = caller.design_version.clone().filter(|_| speaks_for(caller, design));
        claimed.or_else(|| {
            let mut fields = headers.get_all(self.version_header.as_ref()?).iter();
            let field = fields.next()?;
            // Of several, a client may have sent the first.
            if fields.next().is_some() {
                return None;
            }
            let trusted = peer.is_some_and(|peer| self.trusts(peer));
            field.to_str().ok().filter(|version| trusted && !version.is_empty()).map(Arc::from)
        })
    }

    fn sent_by_trusted_hop(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<Arc<[String]>> {
        let mut fields = headers.get_all(&self.header).iter().peekable();
        fields.peek().filter(|_| peer.is_some_and(|peer| self.trusts(peer)))?;
        // A field that is not text cannot be understood, and so nothing is known.
        let fields: Vec<&str> = fields.map(|field| field.to_str().ok()).collect::<Option<_>>()?;
        Some(fields.into_iter().flat_map(feature_names).map(str::to_owned).collect())
    }
}

fn claimed(design: &str, caller: &Caller) -> Option<Arc<[String]>> {
    caller.ai_features.clone().filter(|_| speaks_for(caller, design))
}

/// A token that names a design speaks of no other.
fn speaks_for(caller: &Caller, design: &str) -> bool {
    caller.design.as_deref().is_none_or(|named| named == design)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::clock::SystemClock;
    use crate::identity::{Algorithm, SignedBy};
    use crate::policy::Who;

    const HEADER: HeaderName = HeaderName::from_static("x-design-ai-features");
    const VERSION: HeaderName = HeaderName::from_static("x-design-version");

    fn designs(sources: &[Source], unknown_design: UnknownDesign) -> Designs {
        let options = Options {
            sources: sources.to_vec(),
            header: HEADER,
            version_header: Some(VERSION),
            trusted_hops: vec!["10.0.0.0/8".parse().unwrap()],
            service: None,
            unknown_design,
            features: FeatureOptions { ai: vec!["logo".into(), "virtual-model".into()], ..FeatureOptions::default() },
        };
        Designs::new(options, Arc::new(SystemClock::new()))
    }

    fn caller(features: Option<&[&str]>, design: Option<&str>) -> Caller {
        Caller {
            who: Who::user("u"),
            plan: None,
            platform: None,
            ai_features: features.map(|names| names.iter().map(ToString::to_string).collect()),
            design: design.map(Into::into),
            design_version: None,
            signed_by: SignedBy { kid: None, algorithm: Algorithm::Hs256 },
        }
    }

    fn header(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HEADER, HeaderValue::from_static(value))])
    }

    fn facts(
        designs: &Designs,
        design: &str,
        caller: &Caller,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Facts, Unknown> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(designs.facts(design, caller, headers, peer))
    }

    const NOBODY: Unknown = Unknown { disbelieved: None, claims_are_of: None, trouble: None };
    const HOP: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 2, 3)));
    const STRANGER: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)));
    const BOTH: [Source; 2] = [Source::Claim, Source::Header];

    #[test]
    fn a_claim_speaks_only_for_the_design_that_the_token_names() {
        let designs = designs(&BOTH, UnknownDesign::Refuse);
        let known = |named| facts(&designs, "d1", &caller(Some(&[]), named), &HeaderMap::new(), None);
        assert!(known(Some("d1")).is_ok());
        assert!(known(None).is_ok());
        assert_eq!(known(Some("d2")), Err(Unknown { claims_are_of: Some("d2".into()), ..NOBODY }));
    }

    #[test]
    fn a_header_is_believed_from_a_trusted_hop_only() {
        let designs = designs(&BOTH, UnknownDesign::Refuse);
        let known = |peer| facts(&designs, "d", &caller(None, None), &header("crop, logo"), peer);
        assert_eq!(known(HOP).unwrap().source, Source::Header);
        assert!(known(HOP).unwrap().ai);
        for peer in [STRANGER, None] {
            assert_eq!(known(peer), Err(Unknown { disbelieved: Some((HEADER, peer)), ..NOBODY }));
        }
        let told = known(STRANGER).unwrap_err().to_string();
        assert!(told.ends_with("`designs.trusted_hops` has no 192.0.2.1"), "{told}");
        let empty = facts(&designs, "d", &caller(None, None), &header(""), HOP).unwrap();
        assert_eq!((empty.ai, empty.source), (false, Source::Header));
    }

    #[test]
    fn the_first_source_that_knows_decides() {
        let both = caller(Some(&["logo"]), None);
        let known = |sources: [Source; 2]| {
            facts(&designs(&sources, UnknownDesign::Refuse), "d", &both, &header(""), HOP).unwrap()
        };
        assert_eq!(known([Source::Claim, Source::Header]).source, Source::Claim);
        assert_eq!(known([Source::Header, Source::Claim]).source, Source::Header);
    }

    #[test]
    fn a_design_that_nobody_knows_is_treated_as_configured() {
        let known = |unknown| facts(&designs(&BOTH, unknown), "d", &caller(None, None), &HeaderMap::new(), None);
        assert!(known(UnknownDesign::Ai).unwrap().ai);
        assert!(!known(UnknownDesign::Plain).unwrap().ai);
        assert_eq!(known(UnknownDesign::Refuse), Err(NOBODY));
    }

    #[test]
    fn a_version_is_known_by_claim_for_its_design_or_by_header_from_a_trusted_hop() {
        let designs = designs(&BOTH, UnknownDesign::Plain);
        let sent = HeaderMap::from_iter([(VERSION, HeaderValue::from_static("7"))]);
        let version = |caller: &Caller, peer| facts(&designs, "d1", caller, &sent, peer).unwrap().version;
        let plain = caller(None, None);
        assert_eq!(version(&plain, HOP).as_deref(), Some("7"));
        assert_eq!(version(&plain, STRANGER), None);
        let claimed = |design| Caller { design_version: Some("8".into()), ..caller(None, design) };
        assert_eq!(version(&claimed(Some("d1")), STRANGER).as_deref(), Some("8"));
        assert_eq!(version(&claimed(Some("d2")), STRANGER), None);
    }
}
