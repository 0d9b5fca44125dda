//! Whether a request is for a host, however it spells it.
//!
//! Hosts differ in neither case nor a dot at their end (RFC 3986, section 3.2.2; RFC 1034, section 3.1), and most backends choose by the
//! name whatever the port: a route that is bound to a host must not be missed by another spelling.

use http::HeaderValue;

/// Whether `sent` names the host that a route is bound to. A port counts only where both name one.
pub(super) fn is_same(sent: &HeaderValue, bound: &HeaderValue) -> bool {
    let (sent, bound) = (parts(sent.as_bytes()), parts(bound.as_bytes()));
    let same_port = match (sent.1, bound.1) {
        (Some(sent), Some(bound)) => sent == bound,
        _ => true,
    };
    sent.0.eq_ignore_ascii_case(bound.0) && same_port
}

/// The name, without the dots at its end, and the port if there is one.
fn parts(host: &[u8]) -> (&[u8], Option<&[u8]>) {
    let colon = host.iter().rposition(|byte| *byte == b':');
    // Colons within brackets belong to an address.
    let colon = colon.filter(|colon| !host[*colon..].contains(&b']'));
    let (name, port) = colon.map_or((host, None), |colon| (&host[..colon], Some(&host[colon + 1..])));
    let dots = name.iter().rev().take_while(|byte| **byte == b'.').count();
    (&name[..name.len() - dots], port.filter(|port| !port.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(sent: &'static str, bound: &'static str) -> bool {
        is_same(&HeaderValue::from_static(sent), &HeaderValue::from_static(bound))
    }

    #[test]
    fn a_host_is_the_same_in_any_spelling() {
        for sent in
            ["a.example", "A.Example", "a.example.", "a.example:80", "a.example:8080", "A.EXAMPLE.:1", "a.example:"]
        {
            assert!(is(sent, "a.example"), "{sent}");
            assert!(is(sent, "A.example"), "{sent}");
        }
        assert!(is("[2001:DB8::1]:80", "[2001:db8::1]"));
        assert!(is("a.example:81", "a.example:81") && is("a.example", "a.example:81"));
    }

    #[test]
    fn another_host_is_another() {
        for sent in ["b.example", "a.example.org", "x.a.example", "", "a", "[::1]"] {
            assert!(!is(sent, "a.example"), "{sent}");
        }
        assert!(!is("a.example:80", "a.example:81"));
        assert!(!is("[::1]", "[::2]"));
    }
}
