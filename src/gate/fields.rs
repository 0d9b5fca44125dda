//! Header fields about quota: `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10), `Export-Warning`.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, HeaderMap, HeaderName, HeaderValue};

use super::layer::Gate;
use crate::ledger::{Charge, Standing};
use crate::policy::{MeterId, Policy};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const EXPORT_DEGRADED: HeaderName = HeaderName::from_static("export-degraded");
const EXPORT_WARNING: HeaderName = HeaderName::from_static("export-warning");

impl Gate {
    /// Says on an admitted export what is left.
    pub(super) fn put_fields(&self, charge: &Charge, headers: &mut HeaderMap) {
        let (standings, policy) = (charge.standings(), &self.parts.policy);
        put_rate_limit(headers, policy, standings, self.parts.clock.now().as_second());
        let near_limit = || near_limit(standings, self.parts.options.warn_at_percent);
        near_limit().for_each(|standing| self.metrics.near_limit.count(standing.meter));
        put_warning(headers, policy, near_limit());
        put_degraded(headers, policy, charge.degraded());
    }
}

/// Meters that only observe or report are nothing that a client could act on.
fn enforced(standings: &[Standing]) -> impl Iterator<Item = &Standing> {
    standings.iter().filter(|standing| standing.is_enforced())
}

/// Puts the RateLimit fields of all enforced meters on an answer.
pub(super) fn put_rate_limit(headers: &mut HeaderMap, policy: &Policy, standings: &[Standing], now: i64) {
    let (mut limits, mut state) = (List::default(), List::default());
    for standing in enforced(standings) {
        let Some(meter) = policy.meter(standing.meter) else { continue };
        limits.item(&meter.name).number(";q=", standing.limit).number(";w=", standing.window);
        let resets_in = (standing.resets_at - now).max(0);
        state.item(&meter.name).number(";r=", standing.remaining()).number(";t=", resets_in);
    }
    limits.put(headers, RATE_LIMIT_POLICY);
    state.put(headers, RATE_LIMIT);
}

/// A structured list (RFC 9651) of strings with numbers as parameters, written without the formatting machinery: each export has two.
#[derive(Default)]
struct List(Vec<u8>);

impl List {
    /// One more item. The names of meters need no escapes.
    fn item(&mut self, name: &str) -> &mut Self {
        // Enough for most: it grows once, if at all.
        self.0.reserve(64);
        self.0.extend_from_slice(if self.0.is_empty() { b"\"" } else { b", \"" });
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\"");
        self
    }

    /// A parameter of the last item.
    fn number(&mut self, name: &'static str, value: impl itoa::Integer) -> &mut Self {
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
        self
    }

    fn put(self, headers: &mut HeaderMap, name: HeaderName) {
        if let Some(value) = HeaderValue::from_maybe_shared(Bytes::from(self.0)).ok().filter(|value| !value.is_empty())
        {
            headers.insert(name, value);
        }
    }
}

/// The enforced meters of which at least `percent` is used.
fn near_limit(standings: &[Standing], percent: u32) -> impl Iterator<Item = &Standing> {
    enforced(standings)
        .filter(move |standing| u64::from(standing.taken()) * 100 >= u64::from(standing.limit) * u64::from(percent))
}

/// Warns of meters that are nearly used up, as a structured list (RFC 9651).
fn put_warning<'s>(headers: &mut HeaderMap, policy: &Policy, near_limit: impl Iterator<Item = &'s Standing>) {
    let mut warning = List::default();
    for standing in near_limit {
        let Some(meter) = policy.meter(standing.meter) else { continue };
        warning.item(&meter.name).number(";used=", standing.taken()).number(";limit=", standing.limit);
    }
    warning.put(headers, EXPORT_WARNING);
}

/// Says by which meters an export was degraded, as a structured list.
fn put_degraded(headers: &mut HeaderMap, policy: &Policy, degraded: &[MeterId]) {
    let mut names = List::default();
    degraded.iter().filter_map(|id| policy.meter(*id)).for_each(|meter| {
        names.item(&meter.name);
    });
    names.put(headers, EXPORT_DEGRADED);
}

/// Keeps shared caches from handing an export out uncounted (counting rules, section 4 rule 10; RFC 9111, section 5.2.2.7).
pub(super) fn make_private(headers: &mut HeaderMap) {
    if headers.keys().any(is_for_some_caches) {
        let names: Vec<HeaderName> = headers.keys().filter(|name| is_for_some_caches(name)).cloned().collect();
        names.iter().for_each(|name| _ = headers.remove(name));
    }
    if !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("private"));
        return;
    }
    let mut directives: Vec<&str> = Vec::new();
    for field in headers.get_all(CACHE_CONTROL) {
        directives.extend(parts(field.to_str().unwrap_or("")).map(str::trim).filter(|directive| !directive.is_empty()));
    }
    let name = |directive: &str| directive.split('=').next().unwrap_or("").trim().to_ascii_lowercase();
    // With anything behind it, it is another one.
    if directives.iter().any(|directive| directive.eq_ignore_ascii_case("no-store")) {
        return;
    }
    if directives.iter().any(|directive| directive.contains('"')) {
        // A quoted list of field names restricts the other directives, so all go.
        directives.clear();
    }
    // What shared caches are allowed goes; what the client's own cache is told stays.
    directives.retain(|directive| !matches!(name(directive).as_str(), "public" | "s-maxage" | "private"));
    let value = match directives.is_empty() {
        true => Ok(HeaderValue::from_static("private")),
        false => HeaderValue::try_from(format!("private, {}", directives.join(", "))),
    };
    headers.insert(CACHE_CONTROL, value.unwrap_or(HeaderValue::from_static("private")));
}

/// What stands between the commas of a list, but for those in quotation marks (RFC 9110, section 5.6.4).
fn parts(list: &str) -> impl Iterator<Item = &str> {
    let (mut is_quoted, mut is_escaped) = (false, false);
    list.split(move |c| {
        let is_literal = std::mem::take(&mut is_escaped);
        match c {
            '\\' if is_quoted && !is_literal => is_escaped = true,
            '"' if !is_literal => is_quoted = !is_quoted,
            _ => {}
        }
        c == ',' && !is_quoted
    })
}

/// Whether caches of some kind go by this field and not by `Cache-Control` (RFC 9213, section 2.1, and what was there before it).
fn is_for_some_caches(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.ends_with("-cache-control") || matches!(name, "surrogate-control" | "edge-control" | "x-accel-expires")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_private(sent: &[&'static str]) -> String {
        let mut headers = HeaderMap::new();
        for value in sent {
            headers.append(CACHE_CONTROL, HeaderValue::from_static(value));
        }
        make_private(&mut headers);
        let values = headers.get_all(CACHE_CONTROL).iter().map(|value| value.to_str().unwrap_or("?"));
        values.collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn no_shared_cache_may_keep_an_export() {
        assert_eq!(made_private(&[]), "private");
        assert_eq!(made_private(&["public, max-age=60, s-maxage=600"]), "private, max-age=60");
        assert_eq!(made_private(&["PUBLIC", "max-age=60"]), "private, max-age=60");
        assert_eq!(made_private(&["private=\"set-cookie, x\", max-age=5"]), "private");
        assert_eq!(made_private(&["no-store"]), "no-store");
        assert_eq!(made_private(&["private=\"a, b\", No-Store"]), "private=\"a, b\", No-Store");
        for not_bare in ["public, no-store=x", "public, ext=\"a, no-store, b\"", "public, ext=\"\\\", no-store, \""] {
            assert!(made_private(&[not_bare]).starts_with("private"), "{not_bare}");
        }
    }
}
