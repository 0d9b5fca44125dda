//! From claims to a caller.

use std::sync::Arc;

use serde_json::Value;

use super::TokenError;
use crate::policy::Platform;

/// Who is asking, as a verified token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The user: whose counters are charged.
    pub user: Arc<str>,
    /// The plan's name, if the token has one.
    pub plan: Option<Arc<str>>,
    /// Where the user is, if the token says so.
    pub platform: Option<Platform>,
    /// The AI features of the design; empty: none; absent: the token does not say.
    pub ai_features: Option<Vec<String>>,
    /// The only design that `ai_features` speaks for, if the token names one.
    pub design: Option<Arc<str>>,
}

/// Where in the claims things are, as JSON pointers (RFC 6901).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimPointers {
    /// The user's id.
    pub user: String,
    /// The plan's name.
    pub plan: String,
    /// The platform's name.
    pub platform: String,
    /// The design's AI features: a list, or names between blanks.
    pub ai_features: String,
    /// The design that `ai_features` speaks for.
    pub design: String,
}

impl Default for ClaimPointers {
    fn default() -> Self {
        Self {
            user: "/sub".into(),
            plan: "/plan".into(),
            platform: "/platform".into(),
            ai_features: "/ai_features".into(),
            design: "/design".into(),
        }
    }
}

impl ClaimPointers {
    /// Reads the caller out of verified claims. A claim of the wrong type is an error, never read as absent.
    pub(super) fn caller(&self, claims: &Value) -> Result<Caller, TokenError> {
        let user = text(claims, &self.user, "user")?.filter(|user| !user.is_empty());
        Ok(Caller {
            user: user.ok_or(TokenError::ClaimMissing("user"))?.into(),
            plan: text(claims, &self.plan, "plan")?.map(Arc::from),
            platform: text(claims, &self.platform, "platform")?.map(Platform::named),
            ai_features: list(claims, &self.ai_features, "ai_features")?,
            design: text(claims, &self.design, "design")?.map(Arc::from),
        })
    }
}

fn text<'c>(claims: &'c Value, pointer: &str, name: &'static str) -> Result<Option<&'c str>, TokenError> {
    match claims.pointer(pointer) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(TokenError::ClaimType(name)),
    }
}

fn list(claims: &Value, pointer: &str, name: &'static str) -> Result<Option<Vec<String>>, TokenError> {
    match claims.pointer(pointer) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(names)) => Ok(Some(names.split_whitespace().map(str::to_owned).collect())),
        Some(Value::Array(items)) => {
            let names = items.iter().map(|item| item.as_str().map(str::to_owned));
            names.collect::<Option<_>>().map(Some).ok_or(TokenError::ClaimType(name))
        }
        Some(_) => Err(TokenError::ClaimType(name)),
    }
}
