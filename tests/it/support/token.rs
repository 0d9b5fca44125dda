//! Access tokens.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A token in the making. Starts as one that is accepted: a free user on the web whose design has no AI.
#[derive(Clone)]
pub(crate) struct Token {
    claims: Value,
}

impl Token {
    pub(crate) fn of(user: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        Self {
            claims: json!({
                "iss": "https://accounts.example.com", "aud": "exports", "sub": user, "plan": "free",
                "ai_features": [], "iat": now, "exp": now + 3600,
            }),
        }
    }

    pub(crate) fn plan(self, plan: &str) -> Self {
        self.with("plan", json!(plan))
    }

    pub(crate) fn on(self, platform: &str) -> Self {
        self.with("platform", json!(platform))
    }

    pub(crate) fn ai(self) -> Self {
        self.with("ai_features", json!(["logo"]))
    }

    pub(crate) fn with(mut self, claim: &str, value: Value) -> Self {
        self.claims[claim] = value;
        self
    }

    pub(crate) fn without(mut self, claim: &str) -> Self {
        self.claims.as_object_mut().unwrap().remove(claim);
        self
    }

    /// The whole `Authorization` line.
    pub(crate) fn line(&self) -> String {
        format!("authorization: Bearer {}", self.signed_by(SECRET))
    }

    pub(crate) fn encoded(&self, header: &Header, key: &EncodingKey) -> String {
        jsonwebtoken::encode(header, &self.claims, key).unwrap()
    }

    pub(crate) fn signed_by(&self, secret: &str) -> String {
        let header = Header { kid: Some("dev".into()), ..Header::default() };
        self.encoded(&header, &EncodingKey::from_secret(secret.as_bytes()))
    }
}
