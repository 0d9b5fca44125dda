//! The words of the counting rules.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

/// What a request does (counting rules, section 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// An export: the user downloads the image.
    Download,
    /// An export: the image file goes to another app.
    ShareFile,
    /// An export: the app saves the image to the device by itself.
    Autosave,
    /// An export: the user enters the export screen of the iOS or Android app.
    OpenExportScreen,
    /// No export: the user leaves that screen. Ends its session, and is always forwarded.
    LeaveExportScreen,
    /// No export: the design is saved inside the product.
    SaveDesign,
    /// No export: a link is shared, and the image stays inside the product.
    ShareLink,
    /// No export: the design is shown inside the product.
    View,
}

impl Action {
    /// The name used in configuration, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::ShareFile => "share-file",
            Self::Autosave => "autosave",
            Self::OpenExportScreen => "open-export-screen",
            Self::LeaveExportScreen => "leave-export-screen",
            Self::SaveDesign => "save-design",
            Self::ShareLink => "share-link",
            Self::View => "view",
        }
    }

    /// Whether a design leaves the product as a file by this action.
    pub const fn is_export(self) -> bool {
        matches!(self, Self::Download | Self::ShareFile | Self::Autosave | Self::OpenExportScreen)
    }
}

/// What is between two names of features, in any text.
pub const FEATURES_END_AT: [char; 2] = [',', ';'];

/// Names of features in a text: between blanks, commas or semicolons.
pub fn feature_names(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || FEATURES_END_AT.contains(&c)).filter(|name| !name.is_empty())
}

/// Names of features in a text, or in a list of texts, where blanks are parts of names, as in `Virtual model`. `None` if it is neither.
pub fn features_in(value: &Value) -> Option<Arc<[String]>> {
    match value {
        Value::String(text) => Some(feature_names(text).map(str::to_owned).collect()),
        Value::Array(texts) => {
            let texts: Vec<&str> = texts.iter().map(Value::as_str).collect::<Option<_>>()?;
            let names = texts.into_iter().flat_map(|text| text.split(FEATURES_END_AT)).map(str::trim);
            Some(names.filter(|name| !name.is_empty()).map(str::to_owned).collect())
        }
        _ => None,
    }
}

/// Where the user is (counting rules, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Platform {
    /// The web app, and whoever does not say.
    Web,
    /// The app on iOS.
    Ios,
    /// The app on Android.
    Android,
    /// Anything else that names itself.
    Other,
}

impl Platform {
    /// Every platform.
    pub const ALL: [Self; 4] = [Self::Web, Self::Ios, Self::Android, Self::Other];

    /// The name used in configuration, tokens, logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Ios => "ios",
            Self::Android => "android",
            Self::Other => "other",
        }
    }

    /// Reads a platform's name; one that nobody knows is [`Platform::Other`].
    pub fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|platform| platform.as_str().eq_ignore_ascii_case(name)).unwrap_or(Self::Other)
    }

    /// The platform that was sent; nothing says nothing.
    pub fn sent(name: &str) -> Option<Self> {
        Some(name.trim()).filter(|name| !name.is_empty()).map(Self::named)
    }

    /// Whether the platform has an export screen, and with it sessions.
    pub const fn has_export_screen(self) -> bool {
        matches!(self, Self::Ios | Self::Android)
    }
}

/// How a route hands the image out, and so which answer makes a charge due (counting rules, section 4 rule 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Delivers {
    /// The answer's body is the image: 200, 203 or 206 with a body.
    File,
    /// A 3xx with `Location`, e.g. to a signed URL.
    Redirect,
    /// Any 2xx that hands the image out another way, e.g. JSON with a signed URL.
    Success,
    /// 2xx screen data of `open-export-screen`: no file, counts on meters with sessions only.
    Screen,
}

impl Delivers {
    /// The name used in configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Redirect => "redirect",
            Self::Success => "success",
            Self::Screen => "screen",
        }
    }
}

/// A plan, as an index into [`Plans`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlanId(pub u8);

/// The names of all plans that the configuration speaks of.
#[derive(Debug, Clone, Default)]
pub struct Plans {
    names: Vec<Arc<str>>,
    /// Those that were there before, and are no more: they keep their ids, for what was charged with them.
    gone: Vec<PlanId>,
}

impl Plans {
    /// How many plans there may be: an id is a byte, and one value of it means "not known".
    pub const MOST: usize = 254;

    /// Plans in the order given.
    pub fn new(names: impl IntoIterator<Item = Arc<str>>) -> Self {
        Self { names: names.into_iter().take(Self::MOST).collect(), gone: Vec::new() }
    }

    /// Plans that take the place of these: whoever stays keeps its id.
    #[must_use]
    pub fn followed_by(&self, names: impl IntoIterator<Item = Arc<str>>) -> Self {
        let names: Vec<Arc<str>> = names.into_iter().collect();
        let mut all = self.names.clone();
        all.extend(names.iter().filter(|name| !self.names.contains(name)).cloned());
        all.truncate(Self::MOST);
        let gone = (0..).map(PlanId).zip(&all).filter(|(_, name)| !names.contains(name)).map(|(plan, _)| plan);
        Self { gone: gone.collect(), names: all }
    }

    /// How many ids there are, of all plans there ever were.
    pub const fn ids(&self) -> usize {
        self.names.len()
    }

    /// The plan of that name.
    pub fn find(&self, name: &str) -> Option<PlanId> {
        self.iter().find(|(_, known)| *known == name).map(|(plan, _)| plan)
    }

    /// The name of a plan; empty if it is none of these.
    pub fn name(&self, plan: PlanId) -> &str {
        self.shared_name(plan).map_or("", |name| name)
    }

    /// The same, for whoever keeps it.
    pub fn shared_name(&self, plan: PlanId) -> Option<&Arc<str>> {
        self.names.get(usize::from(plan.0))
    }

    /// All plans.
    pub fn iter(&self) -> impl Iterator<Item = (PlanId, &str)> {
        let all = (0..).map(PlanId).zip(&self.names).map(|(plan, name)| (plan, &**name));
        all.filter(|(plan, _)| !self.gone.contains(plan))
    }
}
