//! Ids that correlate a request across client, gate and backend.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderMap, HeaderName, HeaderValue};

/// Where a request's id is.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest id that is taken over from a client.
const LONGEST: usize = 128;

/// The client's id, if it is the only one, and of 1 to 128 visible ASCII characters.
pub(super) fn sent(headers: &HeaderMap) -> Option<&HeaderValue> {
    let mut fields = headers.get_all(REQUEST_ID).iter();
    let (Some(id), None) = (fields.next(), fields.next()) else { return None };
    can_be_logged(id).then_some(id)
}

/// Whether an id is of 1 to 128 visible ASCII characters.
pub(super) fn can_be_logged(id: &HeaderValue) -> bool {
    (1..=LONGEST).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
}

/// An id that no other request has: this process, and a number.
pub(super) fn fresh() -> HeaderValue {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(()));
    // Of fixed length, and without the formatting machinery: each export gets one.
    let mut id = [b'-'; 33];
    put_hex(&mut id[..16], *PROCESS);
    put_hex(&mut id[17..], NEXT.fetch_add(1, Ordering::Relaxed));
    HeaderValue::from_bytes(&id).unwrap_or(HeaderValue::from_static("none"))
}

fn put_hex(digits: &mut [u8], mut number: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 0xf) as usize];
        number >>= 4;
    }
}

/// An id as text. It is visible ASCII, whoever made it.
pub(super) fn text(id: &HeaderValue) -> &str {
    id.to_str().unwrap_or_default()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::Method;

    use super::*;
    use crate::gate::answers::Asker;

    #[test]
    fn an_id_is_taken_over_if_it_is_one_and_can_be_logged() {
        let taken = |fields: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for field in fields {
                headers.append(REQUEST_ID, HeaderValue::from_bytes(field).unwrap());
            }
            let before = headers.get(REQUEST_ID).cloned();
            let asker = Asker::of(&Method::GET, &headers);
            asker.mark(&mut headers);
            let id = asker.request_id();
            assert_eq!(headers.get_all(REQUEST_ID).iter().collect::<Vec<_>>(), [id]);
            before.is_some_and(|before| before == id)
        };
        for good in ["1", "a-B_c.9", "Root=1-67891233-abcdef012345678912345678", "a+b/c==", &"x".repeat(128)] {
            assert!(taken(&[good.as_bytes()]), "{good}");
        }
        for bad in [&b""[..], b"a b", b"a\tb", b"caf\xc3\xa9", &[b'x'; 129]] {
            assert!(!taken(&[bad]), "{bad:?}");
        }
        assert!(!taken(&[]));
        assert!(!taken(&[b"one", b"two"]), "nobody knows which is meant");
    }

    #[test]
    fn no_two_are_the_same() {
        assert_ne!(fresh(), fresh());
    }
}
