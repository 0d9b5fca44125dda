//! What one export costs (counting rules, section 3).

use std::sync::Arc;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, Uri};
use schemars::JsonSchema;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::Misread;
use super::feature_names;
use super::path::decoded;
use super::routes::is_in_doubt;

/// What one export costs on a meter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cost {
    /// Always the same.
    Fixed(u32),
    /// As much as the request says: N images in one request cost N.
    Said(Number),
    /// By route.
    Routes {
        /// Names of routes, and what an export on them costs.
        prices: Vec<(Arc<str>, u32)>,
        /// What an export on another route costs.
        other: u32,
    },
    /// By the design's features.
    Features {
        /// Names of features, and what they cost. A feature that is not named costs nothing.
        prices: Vec<(String, u32)>,
        /// How several are put together.
        combine: Combine,
        /// What a design with none of these costs.
        other: u32,
    },
}

impl Default for Cost {
    fn default() -> Self {
        Self::Fixed(1)
    }
}

/// How the prices of several features make one cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// The highest price.
    Dearest,
    /// All prices together.
    Sum,
}

/// A number that the request carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Number {
    /// Where.
    pub from: NumberIn,
    /// The cost of a request that does not say; `None` refuses it.
    pub default: Option<u32>,
    /// The largest number that is accepted.
    pub max: u32,
}

/// Where a request says how many images it wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NumberIn {
    /// In a header.
    Header(HeaderName),
    /// In a query parameter.
    Query(String),
    /// In a JSON body: a number, or a list whose items are counted.
    Body(Pointer),
}

/// A JSON pointer (RFC 6901).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pointer {
    text: String,
    tokens: Vec<String>,
}

impl Pointer {
    /// Reads a pointer; `None` if it is none, or points at the whole document.
    pub fn parse(text: &str) -> Option<Self> {
        let tokens = text.strip_prefix('/')?.split('/').map(|token| token.replace("~1", "/").replace("~0", "~"));
        Some(Self { text: text.to_owned(), tokens: tokens.collect() })
    }

    /// The pointer as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// A request, as far as costs depend on it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'r> {
    /// The name of its route.
    pub route: &'r str,
    /// Its target.
    pub uri: &'r Uri,
    /// Its headers.
    pub headers: &'r HeaderMap,
    /// Its body, if a cost depends on it.
    pub body: Option<&'r [u8]>,
}

/// Why a request's cost cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCost {
    /// The number can be read in more than one way.
    #[error("{0}")]
    Misread(Misread),
    /// It is missing, or no number from 1 to the largest allowed.
    #[error("{place} must say how many images are wanted: a whole number from 1 to {max}.")]
    NoNumber {
        /// Where it was looked for.
        place: String,
        /// The largest allowed.
        max: u32,
    },
    /// It would be in a body that is not sent as JSON: a backend could read another number in it.
    #[error("Send the body as application/json, in UTF-8: it says how many images are wanted.")]
    NotJson,
}

impl Cost {
    /// Whether it is the number of images that the request says.
    pub const fn is_said(&self) -> bool {
        matches!(self, Self::Said(_))
    }

    /// Whether the request's body must be read to know it.
    pub const fn needs_body(&self) -> bool {
        matches!(self, Self::Said(Number { from: NumberIn::Body(_), .. }))
    }

    /// What an export costs.
    ///
    /// # Errors
    ///
    /// [`BadCost`] if the request does not say it clearly.
    pub fn of(&self, request: Request<'_>, features: &[String]) -> Result<u32, BadCost> {
        match self {
            Self::Fixed(cost) => Ok(*cost),
            Self::Said(asked) => asked.read(request),
            Self::Routes { prices, other } => {
                Ok(prices.iter().find(|(route, _)| &**route == request.route).map_or(*other, |(_, price)| *price))
            }
            Self::Features { prices, combine, other } => {
                // Whoever sends a list of texts may have put several names into one.
                let is = |feature: &str, name: &str| {
                    let mut names = feature_names(feature).filter(|_| feature.contains(char::is_whitespace));
                    feature.eq_ignore_ascii_case(name) || names.any(|one| one.eq_ignore_ascii_case(name))
                };
                let has = |name: &str| features.iter().any(|feature| is(feature, name));
                let found = prices.iter().filter(|(name, _)| has(name)).map(|(_, price)| *price);
                let cost = match combine {
                    Combine::Dearest => found.max(),
                    Combine::Sum => found.reduce(u32::saturating_add),
                };
                Ok(cost.unwrap_or(*other))
            }
        }
    }
}

impl Number {
    fn read(&self, request: Request<'_>) -> Result<u32, BadCost> {
        let found = match &self.from {
            NumberIn::Header(name) => header(name, request.headers).map_err(BadCost::Misread)?,
            NumberIn::Query(name) => query(name, request.uri).map_err(BadCost::Misread)?,
            // One that could not be read says nothing, not even that nothing is said.
            NumberIn::Body(pointer) => match request.body {
                None => Found::Other,
                Some([]) => Found::Absent,
                Some(text) if is_sent_as_json(request.headers) => seek(pointer, text),
                Some(_) => return Err(BadCost::NotJson),
            },
        };
        let number = match found {
            Found::Absent => self.default,
            Found::Number(number) => u32::try_from(number).ok(),
            Found::Other => None,
        };
        number.filter(|number| (1..=self.max).contains(number)).ok_or_else(|| {
            let place = match &self.from {
                NumberIn::Header(name) => format!("The header \"{name}\""),
                NumberIn::Query(name) => format!("The query parameter \"{name}\""),
                NumberIn::Body(pointer) => format!("The JSON body, once, at \"{}\",", pointer.text),
            };
            BadCost::NoNumber { place, max: self.max }
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Absent,
    Number(u64),
    Other,
}

impl Found {
    /// Digits and nothing else: signs, blanks and fractions are read differently by different backends.
    fn digits(text: &str) -> Self {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !(text.len() > 1 && text.starts_with('0'));
        text.parse().ok().filter(|_| plain).map_or(Self::Other, Self::Number)
    }
}

fn header(name: &HeaderName, headers: &HeaderMap) -> Result<Found, Misread> {
    let mut sent = headers.get_all(name).iter();
    let first = sent.next();
    if sent.next().is_some() || is_in_doubt(name, headers) {
        return Err(Misread::Header(name.clone()));
    }
    Ok(first.map_or(Found::Absent, |value| Found::digits(value.to_str().unwrap_or("?").trim())))
}

/// Whether a body is said to be JSON, and nothing else: a text can be JSON that says one number and a form that says another, and a backend
/// that takes both goes by this.
fn is_sent_as_json(headers: &HeaderMap) -> bool {
    let mut sent = headers.get_all(CONTENT_TYPE).iter();
    let (Some(sent), None) = (sent.next(), sent.next()) else { return false };
    let mut parts = sent.to_str().unwrap_or("").split(';').map(|part| part.trim().to_ascii_lowercase());
    let media_type = parts.next().unwrap_or_default();
    // One type, and nothing that somebody could take for the end of another.
    let is_of_a_name = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&byte);
    let is_json = media_type == "application/json"
        || media_type
            .strip_prefix("application/")
            .is_some_and(|name| name.ends_with("+json") && name.bytes().all(is_of_a_name));
    let is_utf_8 = |charset: &str| charset.trim_matches('"') == "utf-8";
    is_json
        && parts.all(|part| part.strip_prefix("charset=").is_none_or(is_utf_8))
        && !is_in_doubt(&CONTENT_TYPE, headers)
}

fn query(name: &str, uri: &Uri) -> Result<Found, Misread> {
    match super::query::parameter(uri, name)? {
        None => Ok(Found::Absent),
        Some(sent) if !sent.plain => Err(Misread::Query(name.to_owned())),
        Some(sent) => Ok(Found::digits(&decoded(sent.value))),
    }
}

/// Looks at one place of a JSON text. A name on the way that is there twice, also in another case, can be read in two ways: it counts
/// as found and not understood, as does a text that is no JSON, or not all in UTF-8 (RFC 8259, section 8.1).
fn seek(pointer: &Pointer, text: &[u8]) -> Found {
    let Ok(text) = str::from_utf8(text) else { return Found::Other };
    let mut json = serde_json::Deserializer::from_str(text);
    let found = Seek(&pointer.tokens).deserialize(&mut json);
    found.and_then(|found| json.end().map(|()| found)).unwrap_or(Found::Other)
}

/// Whether some backend may take one name for the other: some ignore case, and two letters outside ASCII are the other case of one
/// inside it.
fn alike(key: &str, wanted: &str) -> bool {
    let plain = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        _ => c.to_ascii_lowercase(),
    };
    key.chars().map(plain).eq(wanted.chars().map(plain))
}

struct Seek<'p>(&'p [String]);

impl Seek<'_> {
    /// A value that is neither an object nor a list.
    const fn scalar(&self, value: Found) -> Found {
        if self.0.is_empty() { value } else { Found::Absent }
    }
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Found, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let Some((wanted, rest)) = self.0.split_first() else {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(Found::Other);
        };
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            if !alike(&key, wanted) {
                map.next_value::<IgnoredAny>()?;
            } else if key == *wanted && found.is_none() {
                found = Some(map.next_value_seed(Seek(rest))?);
            } else {
                return Err(A::Error::custom("there twice"));
            }
        }
        Ok(found.unwrap_or(Found::Absent))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Found, A::Error> {
        let wanted = self.0.first().map(|token| token.parse::<u64>());
        let (mut length, mut found) = (0, Found::Absent);
        loop {
            if wanted == Some(Ok(length)) {
                let Some(item) = list.next_element_seed(Seek(&self.0[1..]))? else { break };
                found = item;
            } else if list.next_element::<IgnoredAny>()?.is_none() {
                break;
            }
            length += 1;
        }
        Ok(if self.0.is_empty() { Found::Number(length) } else { found })
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Found, E> {
        Ok(self.scalar(Found::Number(number)))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Found, E> {
        Ok(self.scalar(Found::Other))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Found, E> {
        Ok(self.scalar(Found::Other))
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Found, E> {
        Ok(self.scalar(Found::Other))
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Found, E> {
        Ok(self.scalar(Found::Other))
    }

    fn visit_unit<E: Error>(self) -> Result<Found, E> {
        Ok(Found::Absent)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn asked(from: NumberIn, default: Option<u32>) -> Cost {
        Cost::Said(Number { from, default, max: 50 })
    }

    fn of(cost: &Cost, target: &str, headers: &HeaderMap, body: &str) -> Option<u32> {
        let uri = target.parse().unwrap();
        cost.of(Request { route: "r", uri: &uri, headers, body: Some(body.as_bytes()) }, &[]).ok()
    }

    #[test]
    fn a_query_parameter_says_how_many() {
        let cost = asked(NumberIn::Query("n".into()), None);
        let of = |target: &str| of(&cost, target, &HeaderMap::new(), "");
        assert_eq!(of("/?n=1"), Some(1));
        assert_eq!(of("/?n=50&x=2"), Some(50));
        for wrong in ["/", "/?n", "/?n=", "/?n=0", "/?n=51", "/?n=-1", "/?n=+1", "/?n=1.0", "/?n=01", "/?n=1e1"] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
        for two_ways in ["/?n=1&n=2", "/?n=1&%6e=2", "/?%6e=2", "/?N=2", "/?n=1;n=3"] {
            assert_eq!(of(two_ways), None, "{two_ways}");
        }
    }

    #[test]
    fn a_header_says_how_many() {
        let name = HeaderName::from_static("x-images");
        let cost = asked(NumberIn::Header(name.clone()), Some(3));
        let mut headers = HeaderMap::new();
        assert_eq!(of(&cost, "/", &headers, ""), Some(3), "the default");
        headers.insert(&name, HeaderValue::from_static("7"));
        assert_eq!(of(&cost, "/", &headers, ""), Some(7));
        headers.insert("x_images", HeaderValue::from_static("9"));
        assert_eq!(of(&cost, "/", &headers, ""), None, "another spelling that a backend might read");
        headers.remove("x_images");
        headers.append(&name, HeaderValue::from_static("1"));
        assert_eq!(of(&cost, "/", &headers, ""), None, "twice");
    }

    #[test]
    fn a_json_body_says_how_many_by_number_or_by_list() {
        let cost = asked(NumberIn::Body(Pointer::parse("/batch/images").unwrap()), None);
        let json: HeaderMap = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))].into_iter().collect();
        let read = |body: &str| of(&cost, "/", &json, body);
        assert_eq!(read(r#"{"batch":{"images":4}}"#), Some(4));
        assert_eq!(read(r#" {"x":[{"batch":1}],"batch":{"a":null,"images":["a","b",{"c":[]}]}} "#), Some(3));
        for wrong in [
            "",
            "{",
            "{}",
            r#"{"batch":{"images":"4"}}"#,
            r#"{"batch":{"images":4.0}}"#,
            r#"{"batch":{"images":-4}}"#,
            r#"{"batch":{"images":[]}}"#,
            r#"{"batch":{"images":{"a":1}}}"#,
            r#"{"batch":{"images":1},"batch":{"images":40}}"#,
            r#"{"batch":{"images":1,"images":40}}"#,
            r#"{"batch":{"images":1,"Images":40}}"#,
            r#"{"batch":{"images":1,"imageſ":40}}"#,
            r#"{"batch":{"images":1}} {"batch":{"images":40}}"#,
            r#"{"batch":5}"#,
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        let in_value = b"{\"x\":\"\xff\",\"batch\":{\"images\":4}}";
        assert!(matches!(seek(&Pointer::parse("/batch/images").unwrap(), in_value), Found::Other), "no UTF-8");
        let in_list = asked(NumberIn::Body(Pointer::parse("/jobs/1/n").unwrap()), None);
        assert_eq!(of(&in_list, "/", &json, r#"{"jobs":[{"n":1},{"n":2}]}"#), Some(2));
    }

    #[test]
    fn features_cost_by_the_dearest_or_together() {
        let prices = vec![("virtual-model".to_owned(), 5), ("logo".to_owned(), 2)];
        let of = |combine, features: &[&str]| {
            let features: Vec<String> = features.iter().map(ToString::to_string).collect();
            let uri = Uri::from_static("/");
            let request = Request { route: "r", uri: &uri, headers: &HeaderMap::new(), body: None };
            Cost::Features { prices: prices.clone(), combine, other: 1 }.of(request, &features).unwrap()
        };
        assert_eq!(of(Combine::Dearest, &["logo", "virtual-model", "crop"]), 5);
        assert_eq!(of(Combine::Sum, &["logo", "virtual-model", "crop"]), 7);
        assert_eq!(of(Combine::Sum, &["logo", "logo"]), 2, "a feature costs once");
        assert_eq!(of(Combine::Sum, &["ai-image"]), 1);
        assert_eq!(of(Combine::Sum, &["virtual-model logo"]), of(Combine::Sum, &["virtual-model", "logo"]));
        assert_eq!(of(Combine::Sum, &["Virtual-Model"]), 5, "as it is an AI feature in any case");
    }

    #[test]
    fn routes_have_their_own_price() {
        let cost = Cost::Routes { prices: vec![("hd".into(), 4)], other: 1 };
        let uri = Uri::from_static("/");
        let of = |route| cost.of(Request { route, uri: &uri, headers: &HeaderMap::new(), body: None }, &[]).unwrap();
        assert_eq!((of("hd"), of("download")), (4, 1));
    }
}
