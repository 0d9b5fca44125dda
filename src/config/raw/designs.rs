//! How to know what is in a design, as it is written.

use schemars::JsonSchema;
use serde::Deserialize;

use super::{DurationText, seconds};
use crate::design::{UnknownDesign, UnknownFeature};

/// How to know whether a design uses AI features.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::config) struct Designs {
    /// Whom to ask, in order; the first that knows decides.
    pub(in crate::config) sources: Vec<DesignSource>,
    /// The header that a trusted hop sets: feature names between commas; empty means none.
    pub(in crate::config) header: String,
    /// The header by which a trusted hop says which version of the design it is: a session covers one version.
    pub(in crate::config) version_header: Option<String>,
    /// Networks whose headers are believed, e.g. `10.0.0.0/8`.
    pub(in crate::config) trusted_hops: Vec<String>,
    /// The metadata service.
    pub(in crate::config) service: Option<DesignService>,
    /// What to do when no source knows.
    pub(in crate::config) unknown_design: UnknownDesign,
    /// Features that make a design an AI design.
    pub(in crate::config) ai_features: Vec<String>,
    /// Features that do not.
    pub(in crate::config) plain_features: Vec<String>,
    /// What a feature is taken for that is in neither list; it is reported once.
    pub(in crate::config) unknown_feature: UnknownFeature,
}

impl Default for Designs {
    fn default() -> Self {
        let features =
            ["ai-image", "logo", "sticker", "coloring-page", "virtual-model", "product-beautifier", "product-staging"];
        Self {
            sources: vec![DesignSource::Claim, DesignSource::Header],
            header: "x-design-ai-features".into(),
            version_header: None,
            trusted_hops: Vec::new(),
            service: None,
            unknown_design: UnknownDesign::Refuse,
            ai_features: features.map(str::to_owned).to_vec(),
            plain_features: Vec::new(),
            unknown_feature: UnknownFeature::Plain,
        }
    }
}

/// Who knows about a design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(in crate::config) enum DesignSource {
    /// A claim of the token.
    Claim,
    /// A header of a trusted hop.
    Header,
    /// The metadata service.
    Service,
}

/// The metadata service: answers a GET of a design's URL with JSON. Plain `http:` is for a network that can be trusted: who is in
/// between could say that a design has no AI features.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct DesignService {
    /// Where a design is asked for; `{design}` stands for its id.
    pub(in crate::config) url: String,
    /// JSON pointer to the AI features: a list, or names between blanks; empty means none, absent means unknown.
    #[serde(default = "ai_features")]
    pub(in crate::config) pointer: String,
    /// JSON pointer to the design's version: text or a whole number. A request that names another one is not answered from memory.
    pub(in crate::config) version: Option<String>,
    /// How long a fetch may take, and an export may wait for one.
    #[serde(default = "fetch_timeout")]
    pub(in crate::config) timeout: DurationText,
    /// For how long an answer is fresh.
    #[serde(default = "ttl")]
    pub(in crate::config) ttl: DurationText,
    /// For how long it is remembered that the service does not know a design.
    #[serde(default = "negative_ttl")]
    pub(in crate::config) negative_ttl: DurationText,
    /// For how long after a failure a design is not asked for again.
    #[serde(default = "error_ttl")]
    pub(in crate::config) error_ttl: DurationText,
    /// For how long after `ttl` an answer is used while it is fetched anew.
    #[serde(default = "stale_while_revalidate")]
    pub(in crate::config) stale_while_revalidate: DurationText,
    /// For how long after `ttl` an answer is used if it cannot be fetched anew.
    #[serde(default = "stale_if_error")]
    pub(in crate::config) stale_if_error: DurationText,
    /// The longest answer that is read, in bytes.
    #[serde(default = "size_limit")]
    pub(in crate::config) size_limit: u32,
    /// How many designs are asked for at once.
    #[serde(default = "at_once")]
    pub(in crate::config) at_once: u32,
    /// How much memory answers may take, in bytes.
    #[serde(default = "cache_limit")]
    pub(in crate::config) cache_limit: u32,
    /// Environment variable that holds a bearer token for the service.
    pub(in crate::config) token_env: Option<String>,
    /// File that holds it; one newline at its end is dropped.
    pub(in crate::config) token_file: Option<String>,
    /// Root certificates in PEM that are trusted besides the system's.
    pub(in crate::config) ca_file: Option<String>,
}

fn ai_features() -> String {
    "/ai_features".to_owned()
}

const fn fetch_timeout() -> DurationText {
    DurationText(std::time::Duration::from_millis(300))
}

const fn ttl() -> DurationText {
    seconds(60)
}

const fn negative_ttl() -> DurationText {
    seconds(5)
}

const fn error_ttl() -> DurationText {
    seconds(1)
}

const fn stale_while_revalidate() -> DurationText {
    seconds(10)
}

const fn stale_if_error() -> DurationText {
    seconds(3_600)
}

const fn size_limit() -> u32 {
    65_536
}

const fn at_once() -> u32 {
    64
}

const fn cache_limit() -> u32 {
    32 << 20
}
