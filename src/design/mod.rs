//! What is in the design: whether it uses AI features (counting rules, section 5).
//!
//! Sources are asked in the configured order; the first that knows decides. A claim speaks only for the design that the token
//! names, if it names one; a header only if a trusted hop sent it. The metadata service will be a third source here.

use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

use crate::identity::Caller;

/// What can be set about design facts.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whom to ask, in order.
    pub sources: Vec<Source>,
    /// The header that a trusted hop sets: feature names between commas; empty means none.
    pub header: HeaderName,
    /// The header by which a trusted hop says which version of the design it is.
    pub version_header: Option<HeaderName>,
    /// Who may set these.
    pub trusted_hops: Vec<IpNet>,
    /// What to do when no source knows.
    pub unknown_design: UnknownDesign,
    /// The names of features that make a design an AI design. Others do not.
    pub ai_features: Vec<String>,
}

/// Who knows about a design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// A claim of the caller's token.
    Claim,
    /// A request header of a trusted hop.
    Header,
    /// Nobody: `unknown_design` decided.
    Default,
}

impl Source {
    /// The name in configuration and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Header => "header",
            Self::Default => "unknown_design",
        }
    }
}

/// What to do with a design that no source knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub features: Vec<String>,
    /// Who said so.
    pub source: Source,
    /// The version of the design, if somebody says so.
    pub version: Option<Arc<str>>,
}

/// No source knows the design, and `unknown_design` is `refuse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no source knows which AI features the design uses")]
pub struct Unknown;

/// Finds out what is in a design.
#[derive(Debug)]
pub struct Designs {
    options: Options,
}

impl Designs {
    /// Facts from the sources of `options`.
    pub fn new(options: Options) -> Self {
        Self { options }
    }

    /// What is known of a design.
    ///
    /// # Errors
    ///
    /// [`Unknown`] if no source knows and unknown designs are to be refused.
    pub fn facts(
        &self,
        design: &str,
        caller: &Caller,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Facts, Unknown> {
        let version = self.version(design, caller, headers, peer);
        let known = self.options.sources.iter().find_map(|&source| {
            let features = match source {
                Source::Claim => claimed(design, caller),
                Source::Header => self.sent_by_trusted_hop(headers, peer),
                Source::Default => None,
            };
            Some((features?, source))
        });
        if let Some((features, source)) = known {
            let ai = features.iter().any(|feature| self.options.ai_features.contains(feature));
            return Ok(Facts { ai, features, source, version });
        }
        let ai = match self.options.unknown_design {
            UnknownDesign::Ai => true,
            UnknownDesign::Plain => false,
            UnknownDesign::Refuse => return Err(Unknown),
        };
        Ok(Facts { ai, features: Vec::new(), source: Source::Default, version })
    }

    /// Whether `peer` is a trusted hop.
    fn trusts(&self, peer: IpAddr) -> bool {
        self.options.trusted_hops.iter().any(|net| net.contains(&peer.to_canonical()))
    }

    /// By claim, else by the header of a trusted hop.
    fn version(&self, design: &str, caller: &Caller, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<Arc<str>> {
        let claimed = caller.design_version.clone().filter(|_| speaks_for(caller, design));
        claimed.or_else(|| {
            let field = headers.get(self.options.version_header.as_ref()?)?;
            let trusted = peer.is_some_and(|peer| self.trusts(peer));
            field.to_str().ok().filter(|version| trusted && !version.is_empty()).map(Arc::from)
        })
    }

    fn sent_by_trusted_hop(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<Vec<String>> {
        let mut fields = headers.get_all(&self.options.header).iter().peekable();
        fields.peek().filter(|_| peer.is_some_and(|peer| self.trusts(peer)))?;
        // A field that is not text cannot be understood, and so nothing is known.
        let fields: Vec<&str> = fields.map(|field| field.to_str().ok()).collect::<Option<_>>()?;
        let names = fields.iter().flat_map(|field| field.split(',')).map(str::trim).filter(|name| !name.is_empty());
        Some(names.map(str::to_owned).collect())
    }
}

fn claimed(design: &str, caller: &Caller) -> Option<Vec<String>> {
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
    use crate::identity::{Algorithm, SignedBy};
    use crate::policy::Who;

    const HEADER: HeaderName = HeaderName::from_static("x-design-ai-features");
    const VERSION: HeaderName = HeaderName::from_static("x-design-version");

    fn designs(sources: &[Source], unknown_design: UnknownDesign) -> Designs {
        Designs::new(Options {
            sources: sources.to_vec(),
            header: HEADER,
            version_header: Some(VERSION),
            trusted_hops: vec!["10.0.0.0/8".parse().unwrap()],
            unknown_design,
            ai_features: vec!["logo".into(), "virtual-model".into()],
        })
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

    const HOP: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 2, 3)));
    const STRANGER: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)));
    const BOTH: [Source; 2] = [Source::Claim, Source::Header];

    #[test]
    fn a_design_is_ai_if_one_of_its_features_is() {
        let designs = designs(&BOTH, UnknownDesign::Refuse);
        let ai =
            |features: &[&str]| designs.facts("d", &caller(Some(features), None), &HeaderMap::new(), None).unwrap().ai;
        assert!(ai(&["crop", "logo"]));
        assert!(!ai(&["crop"]), "not a feature that counts as AI");
        assert!(!ai(&[]), "an empty list means plain");
    }

    #[test]
    fn a_claim_speaks_only_for_the_design_that_the_token_names() {
        let designs = designs(&BOTH, UnknownDesign::Refuse);
        let facts = |named| designs.facts("d1", &caller(Some(&[]), named), &HeaderMap::new(), None);
        assert!(facts(Some("d1")).is_ok());
        assert!(facts(None).is_ok());
        assert_eq!(facts(Some("d2")), Err(Unknown));
    }

    #[test]
    fn a_header_is_believed_from_a_trusted_hop_only() {
        let designs = designs(&BOTH, UnknownDesign::Refuse);
        let facts = |peer| designs.facts("d", &caller(None, None), &header("crop, logo"), peer);
        assert_eq!(facts(HOP).unwrap().source, Source::Header);
        assert!(facts(HOP).unwrap().ai);
        assert_eq!(facts(STRANGER), Err(Unknown));
        assert_eq!(facts(None), Err(Unknown));
        let empty = designs.facts("d", &caller(None, None), &header(""), HOP).unwrap();
        assert_eq!((empty.ai, empty.source), (false, Source::Header));
    }

    #[test]
    fn the_first_source_that_knows_decides() {
        let both = caller(Some(&["logo"]), None);
        let facts = |sources: [Source; 2]| {
            designs(&sources, UnknownDesign::Refuse).facts("d", &both, &header(""), HOP).unwrap()
        };
        assert_eq!(facts([Source::Claim, Source::Header]).source, Source::Claim);
        assert_eq!(facts([Source::Header, Source::Claim]).source, Source::Header);
    }

    #[test]
    fn a_design_that_nobody_knows_is_treated_as_configured() {
        let facts = |unknown| designs(&BOTH, unknown).facts("d", &caller(None, None), &HeaderMap::new(), None);
        assert!(facts(UnknownDesign::Ai).unwrap().ai);
        assert!(!facts(UnknownDesign::Plain).unwrap().ai);
        assert_eq!(facts(UnknownDesign::Refuse), Err(Unknown));
    }

    #[test]
    fn a_version_is_known_by_claim_for_its_design_or_by_header_from_a_trusted_hop() {
        let designs = designs(&BOTH, UnknownDesign::Plain);
        let sent = HeaderMap::from_iter([(VERSION, HeaderValue::from_static("7"))]);
        let version = |caller: &Caller, peer| designs.facts("d1", caller, &sent, peer).unwrap().version;
        let plain = caller(None, None);
        assert_eq!(version(&plain, HOP).as_deref(), Some("7"));
        assert_eq!(version(&plain, STRANGER), None);
        let claimed = |design| Caller { design_version: Some("8".into()), ..caller(None, design) };
        assert_eq!(version(&claimed(Some("d1")), STRANGER).as_deref(), Some("8"));
        assert_eq!(version(&claimed(Some("d2")), STRANGER), None);
    }
}
