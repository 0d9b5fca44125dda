//! Header fields about quota: `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10), `Export-Warning`.

use std::fmt::Write;

use http::header::{CACHE_CONTROL, HeaderMap, HeaderName, HeaderValue};

use crate::ledger::Standing;
use crate::policy::{MeterId, Policy};

pub(super) const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
pub(super) const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub(super) const EXPORT_DEGRADED: HeaderName = HeaderName::from_static("export-degraded");
pub(super) const EXPORT_WARNING: HeaderName = HeaderName::from_static("export-warning");

/// Meters that only observe or report are nothing that a client could act on.
fn enforced(standings: &[Standing]) -> impl Iterator<Item = &Standing> {
    standings.iter().filter(|standing| standing.is_enforced())
}

/// Puts the RateLimit fields of all enforced meters on an answer.
pub(super) fn put_rate_limit(headers: &mut HeaderMap, policy: &Policy, standings: &[Standing], now: i64) {
    let (mut limits, mut state) = (String::new(), String::new());
    for standing in enforced(standings) {
        let Some(meter) = policy.meter(standing.meter) else { continue };
        let separator = if limits.is_empty() { "" } else { ", " };
        let (name, resets_in) = (&meter.name, (standing.resets_at - now).max(0));
        // Writing to a string cannot fail.
        let _ = write!(limits, "{separator}\"{name}\";q={};w={}", standing.limit, standing.window);
        let _ = write!(state, "{separator}\"{name}\";r={};t={resets_in}", standing.remaining());
    }
    put(headers, RATE_LIMIT_POLICY, limits);
    put(headers, RATE_LIMIT, state);
}

/// The enforced meters of which at least `percent` is used.
pub(super) fn near_limit(standings: &[Standing], percent: u32) -> impl Iterator<Item = &Standing> {
    enforced(standings)
        .filter(move |standing| u64::from(standing.taken()) * 100 >= u64::from(standing.limit) * u64::from(percent))
}

/// Warns of meters that are nearly used up, as a structured list (RFC 9651).
pub(super) fn put_warning<'s>(
    headers: &mut HeaderMap,
    policy: &Policy,
    near_limit: impl Iterator<Item = &'s Standing>,
) {
    let mut warning = String::new();
    for standing in near_limit {
        let Some(meter) = policy.meter(standing.meter) else { continue };
        let separator = if warning.is_empty() { "" } else { ", " };
        let _ = write!(warning, "{separator}\"{}\";used={};limit={}", meter.name, standing.taken(), standing.limit);
    }
    put(headers, EXPORT_WARNING, warning);
}

/// Says by which meters an export was degraded, as a structured list.
pub(super) fn put_degraded(headers: &mut HeaderMap, policy: &Policy, degraded: &[MeterId]) {
    let names = degraded.iter().filter_map(|id| policy.meter(*id)).map(|meter| format!("\"{}\"", meter.name));
    put(headers, EXPORT_DEGRADED, names.collect::<Vec<_>>().join(", "));
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Some(value) = HeaderValue::try_from(value).ok().filter(|value| !value.is_empty()) {
        headers.insert(name, value);
    }
}

/// Keeps shared caches from handing an export out uncounted (counting rules, section 4 rule 10; RFC 9111, section 5.2.2.7).
pub(super) fn make_private(headers: &mut HeaderMap) {
    let mut directives: Vec<&str> = Vec::new();
    for field in headers.get_all(CACHE_CONTROL) {
        directives
            .extend(field.to_str().unwrap_or("").split(',').map(str::trim).filter(|directive| !directive.is_empty()));
    }
    let name = |directive: &str| directive.split('=').next().unwrap_or("").trim().to_ascii_lowercase();
    if directives.iter().any(|directive| name(directive) == "no-store") {
        return;
    }
    if directives.iter().any(|directive| directive.contains('"')) {
        // A quoted list of field names has commas of its own: it restricts the other directives, so all go.
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
    }
}
