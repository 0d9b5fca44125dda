//! What a refused token says, next to what is asked of it: for operators, who else had to find the token and take it apart. Nothing of it
//! has been verified, and clients are not told.

use std::fmt::{self, Display, Formatter};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Map, Value};

use super::{Jws, TokenError, Verifier};
use crate::identity::keys::CheckedKey;

/// How much of a value is shown, in bytes.
const LONGEST: usize = 100;
/// How many keys are named.
const MOST_KEYS: usize = 8;

/// Why a token is refused, with the values that were compared.
#[derive(Debug)]
pub struct Compared<'v> {
    pub(super) verifier: &'v Verifier,
    pub(super) token: &'v str,
    pub(super) error: &'v TokenError,
}

impl Compared<'_> {
    /// The values, if the token can be read and there are some.
    fn values(&self) -> Option<String> {
        let verifier = self.verifier;
        let token = Jws::read(self.token).ok()?;
        let of_header = |name| member(&token.header, name);
        let of_claims = |name| token.claims().ok().map(|claims| member(&claims, name));
        let date = |name| {
            let claims = token.claims().ok()?;
            let seconds = claims.get(name)?.as_f64()? as i64;
            Some(format!(
                "\"{name}\" is {}, now it is {:.0}",
                Timestamp::from_second(seconds).ok()?,
                verifier.clock.now()
            ))
        };
        match self.error {
            TokenError::Issuer => Some(format!("{}, and has to be \"{}\"", of_claims("iss")?, verifier.issuer)),
            TokenError::Audience => {
                Some(format!("{}, and has to contain \"{}\"", of_claims("aud")?, verifier.audience))
            }
            TokenError::Expired => date("exp"),
            TokenError::NotYetValid => date("nbf"),
            // What is in it may be somebody's name.
            TokenError::ClaimType(claim) => Some(format!("\"{claim}\" is {}", kind(token.claims().ok()?.get(*claim)?))),
            TokenError::Type => {
                Some(format!("{}, accepted are \"{}\"", of_header("typ"), verifier.types.join("\", \"")))
            }
            TokenError::Algorithm | TokenError::UnknownKey | TokenError::KeysUnavailable | TokenError::Signature => {
                Some(format!("{}, {}; {}", of_header("kid"), of_header("alg"), known(verifier.keys.set().keys())))
            }
            _ => None,
        }
    }
}

impl Display for Compared<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)?;
        if let (TokenError::KeysUnavailable, Err(why)) = (self.error, self.verifier.availability()) {
            write!(f, ": {why}")?;
        }
        self.values().map_or(Ok(()), |values| write!(f, ": {values}"))
    }
}

/// `"iss" is "https://accounts.example.com"`
fn member(object: &Map<String, Value>, name: &str) -> String {
    let Some(value) = object.get(name) else { return format!("\"{name}\" is not there") };
    let mut value = value.to_string();
    if value.len() > LONGEST {
        value.truncate(value.floor_char_boundary(LONGEST));
        value.push('…');
    }
    format!("\"{name}\" is {value}")
}

const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn known(keys: &[Arc<CheckedKey>]) -> String {
    let named: Vec<_> = keys.iter().take(MOST_KEYS).map(|key| key.id.to_string()).collect();
    match keys.len().saturating_sub(MOST_KEYS) {
        _ if keys.is_empty() => "no key is known".to_owned(),
        0 => format!("the keys are {}", named.join(", ")),
        more => format!("the keys are {}, and {more} more", named.join(", ")),
    }
}
