//! When a charge sticks (counting rules, section 4): which answers hand a file out, and how far one got.

use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, StatusCode, response};

use super::record::Record;
use crate::ledger::{Charge, Settlement};
use crate::policy::Delivers;

/// What an answer's head says about delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Promise {
    /// Nothing is handed out, whatever follows.
    Nothing,
    /// The head hands it out.
    Head,
    /// The first byte of the body does.
    Body,
}

/// Reads an answer's head. `body_is_empty`: no byte will follow.
pub(super) fn promise(delivers: Delivers, head: &response::Parts, body_is_empty: bool) -> Promise {
    let by_head = match delivers {
        Delivers::File if is_file(head.status, &head.headers) && !body_is_empty => return Promise::Body,
        Delivers::File => false,
        Delivers::Redirect => head.status.is_redirection() && head.headers.contains_key(LOCATION),
        Delivers::Success | Delivers::Screen => head.status.is_success(),
    };
    if by_head { Promise::Head } else { Promise::Nothing }
}

/// On an export route everything is a file but what the backend marks as a message to a program or a person.
fn is_file(status: StatusCode, headers: &HeaderMap) -> bool {
    use StatusCode as Code;
    if !matches!(status, Code::OK | Code::NON_AUTHORITATIVE_INFORMATION | Code::PARTIAL_CONTENT) {
        return false;
    }
    let text = |value: Option<&http::HeaderValue>| value.map(|value| value.as_bytes().to_ascii_lowercase());
    if text(headers.get(CONTENT_DISPOSITION)).is_some_and(|sent| sent.trim_ascii().starts_with(b"attachment")) {
        return true;
    }
    let Some(media_type) = text(headers.get(CONTENT_TYPE)) else { return true };
    let essence = media_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    let is_message = matches!(essence, b"application/json" | b"application/problem+json" | b"application/xml")
        || essence.starts_with(b"text/")
        || (essence.ends_with(b"+xml") && essence != b"image/svg+xml");
    !is_message
}

/// An admitted export on its way: carries the charge and the record of the decision, and ends both, once.
#[derive(Debug)]
pub(super) struct Delivery {
    charge: Option<Charge>,
    record: Option<Box<Record>>,
    ended: bool,
    taken: bool,
}

impl Delivery {
    pub(super) fn new(charge: Option<Charge>, record: Option<Box<Record>>) -> Self {
        Self { charge, record, ended: false, taken: false }
    }

    pub(super) fn charge(&self) -> Option<&Charge> {
        self.charge.as_ref()
    }

    /// The backend has answered.
    pub(super) fn answered(&mut self, status: StatusCode) {
        if let Some(record) = &mut self.record {
            record.status = status.as_u16();
        }
    }

    /// The client has begun to receive.
    pub(super) fn due(&mut self) {
        self.taken = true;
        if let Some(charge) = &mut self.charge {
            charge.due();
        }
    }

    /// The body has ended: delivered if anything of it left.
    pub(super) fn complete(&mut self) {
        let settlement = if self.taken { Settlement::Delivered } else { Settlement::Void };
        self.end(settlement, "complete");
    }

    /// The backend broke off. The client had taken all that came until then, and has no file.
    pub(super) fn broken_off(&mut self) {
        self.end(Settlement::Void, "broken-off");
    }

    /// The answer hands nothing out.
    pub(super) fn nothing(&mut self) {
        self.end(Settlement::Void, "not-delivered");
    }

    fn end(&mut self, settlement: Settlement, how: &'static str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        if let Some(charge) = self.charge.take() {
            charge.settle(settlement);
        }
        if let Some(record) = self.record.take() {
            record.settled(settlement, how);
        }
    }
}

impl Drop for Delivery {
    /// The client has hung up, the backend could not be reached, or the server has dropped a body that it has sent to its end.
    fn drop(&mut self) {
        let settlement = if self.taken { Settlement::Delivered } else { Settlement::Void };
        self.end(settlement, "dropped");
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use http::Response;

    use super::*;

    fn promised(delivers: Delivers, status: u16, headers: &[(&str, &str)], body_is_empty: bool) -> Promise {
        let mut response = Response::builder().status(status);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        promise(delivers, &response.body(()).unwrap().into_parts().0, body_is_empty)
    }

    #[test]
    fn a_file_is_delivered_by_its_first_byte() {
        for status in [200, 203, 206] {
            assert_eq!(promised(Delivers::File, status, &[("content-type", "image/png")], false), Promise::Body);
        }
        assert_eq!(promised(Delivers::File, 200, &[("content-type", "image/png")], true), Promise::Nothing);
        for status in [201, 204, 301, 304, 400, 404, 412, 416, 429, 500, 503] {
            assert_eq!(promised(Delivers::File, status, &[("content-type", "image/png")], false), Promise::Nothing);
        }
    }

    #[test]
    fn everything_is_a_file_but_messages() {
        let of_type = |media_type| promised(Delivers::File, 200, &[("content-type", media_type)], false);
        for file in [
            "image/png",
            "image/svg+xml",
            "application/pdf",
            "application/zip",
            "multipart/byteranges; boundary=x",
            "x",
        ] {
            assert_eq!(of_type(file), Promise::Body, "{file}");
        }
        for message in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/problem+json",
            "text/html",
            "text/plain",
            "application/xml",
            "application/xhtml+xml",
            "text/xml",
        ] {
            assert_eq!(of_type(message), Promise::Nothing, "{message}");
        }
        assert_eq!(promised(Delivers::File, 200, &[], false), Promise::Body, "no media type");
        let attached = [("content-type", "text/plain"), ("content-disposition", "Attachment; filename=a.txt")];
        assert_eq!(promised(Delivers::File, 200, &attached, false), Promise::Body);
    }

    #[test]
    fn redirects_successes_and_screens_are_delivered_by_their_head() {
        assert_eq!(promised(Delivers::Redirect, 302, &[("location", "/x")], true), Promise::Head);
        assert_eq!(promised(Delivers::Redirect, 302, &[], true), Promise::Nothing);
        assert_eq!(promised(Delivers::Redirect, 200, &[("location", "/x")], true), Promise::Nothing);
        for delivers in [Delivers::Success, Delivers::Screen] {
            assert_eq!(promised(delivers, 201, &[("content-type", "application/json")], true), Promise::Head);
            assert_eq!(promised(delivers, 404, &[], false), Promise::Nothing);
        }
    }
}
