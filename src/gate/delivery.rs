//! When a charge sticks (counting rules, section 4): which answers hand a file out, and how far one got.

use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, response};

use super::pace::Taking;
use super::record::Record;
use super::upload::UploadBroken;
use crate::ledger::{Charge, Settlement};
use crate::policy::{Delivers, Policy};

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

/// By these a backend names a file that a hop in front of the gate is to send in place of the answer (nginx, Apache, lighttpd, Perlbal).
const HAND_OVER: [&str; 7] = [
    "x-accel-redirect",
    "x-sendfile",
    "x-sendfile2",
    "x-lighttpd-send-file",
    "x-litespeed-location",
    "x-reproxy-file",
    "x-reproxy-url",
];

/// Reads the head of an answer to a request by `method`. `body_is_empty`: no byte will follow.
pub(super) fn promise(delivers: Delivers, method: &Method, head: &response::Parts, body_is_empty: bool) -> Promise {
    let by_head = match delivers {
        // Whatever its body is: who is to send the file does not pass that on, and sends none for a HEAD.
        Delivers::File | Delivers::Redirect if hands_over(head) => *method != Method::HEAD,
        // A backend that redirects hands the file out itself at times, e.g. because its storage is not there.
        Delivers::File | Delivers::Redirect if is_file(head.status, &head.headers) && !body_is_empty => {
            return Promise::Body;
        }
        Delivers::File => false,
        Delivers::Redirect => redirects(head.status) && head.headers.contains_key(LOCATION),
        Delivers::Success | Delivers::Screen => head.status.is_success(),
    };
    if by_head { Promise::Head } else { Promise::Nothing }
}

/// Whether somebody in front of the gate is to send a file in place of the answer.
pub(super) fn hands_over(head: &response::Parts) -> bool {
    // Nearly all answers have few fields, and none of these.
    let is_one = |name: &HeaderName| name.as_str().starts_with("x-") && HAND_OVER.contains(&name.as_str());
    head.status.is_success() && head.headers.keys().any(is_one)
}

/// Whether an answer to OPTIONS tells where a file is, as its route does when it counts. JSON and text are answers to
/// OPTIONS, and no files.
pub(super) fn tells_where(delivers: Delivers, head: &response::Parts) -> bool {
    delivers == Delivers::Redirect && redirects(head.status) && head.headers.contains_key(LOCATION)
}

/// Whether an answer may hand a file out in a way that its route does not count: it sends the client to another place for it.
pub(super) fn leads_elsewhere(delivers: Delivers, head: &response::Parts) -> bool {
    matches!(delivers, Delivers::File | Delivers::Success)
        && redirects(head.status)
        && head.headers.contains_key(LOCATION)
}

/// 304 is a 3xx that says nothing of another place.
fn redirects(status: StatusCode) -> bool {
    status.is_redirection() && status != StatusCode::NOT_MODIFIED
}

/// On an export route everything is a file but what the backend marks as a message to a program or a person.
fn is_file(status: StatusCode, headers: &HeaderMap) -> bool {
    // Of several media types nobody knows which one a client believes.
    let mut types = media_types(headers).peekable();
    let is_marked = types.peek().is_some() && types.all(is_message);
    may_hand_out(status) && (is_attachment(headers) || !is_marked)
}

/// Whether an answer on a path that no route knows carries what an export would: an image, a film, a document to print, an archive of
/// them, or anything that is to be saved. What has no media type, or one that says nothing, may be anything.
pub(super) fn looks_like_an_export(head: &response::Parts, body_is_empty: bool) -> bool {
    let kinds: [&[u8]; 7] = [
        b"image/",
        b"video/",
        b"multipart/byteranges",
        b"application/pdf",
        b"application/zip",
        b"application/x-zip",
        b"application/postscript",
    ];
    let is_one = |sent: &[u8]| kinds.iter().any(|kind| starts_with(sent, kind)) && !is_message(sent);
    let carries_one = (!body_is_empty || hands_over(head))
        && (media_types(&head.headers).any(is_one) || is_attachment(&head.headers));
    carries_one && head.status.is_success()
}

/// Whether an answer carries a file by a success that the rule does not count: that it was made (RFC 9110, section 15.3.2), as some frameworks
/// answer each POST, or will be.
pub(super) fn is_uncounted_success(head: &response::Parts, body_is_empty: bool) -> bool {
    !may_hand_out(head.status) && looks_like_an_export(head, body_is_empty)
}

fn may_hand_out(status: StatusCode) -> bool {
    use StatusCode as Code;
    matches!(status, Code::OK | Code::NON_AUTHORITATIVE_INFORMATION | Code::PARTIAL_CONTENT)
}

fn is_message(media_type: &[u8]) -> bool {
    let is = |known: &[u8]| media_type.eq_ignore_ascii_case(known);
    is(b"application/json")
        || is(b"application/problem+json")
        || is(b"application/xml")
        || starts_with(media_type, b"text/")
        || (ends_with(media_type, b"+xml") && !is(b"image/svg+xml"))
}

fn is_attachment(headers: &HeaderMap) -> bool {
    let is_one = |sent: &HeaderValue| starts_with(sent.as_bytes().trim_ascii(), b"attachment");
    headers.get_all(CONTENT_DISPOSITION).iter().any(is_one)
}

/// The media types that are said, one nearly always, without their parameters. Of several lines some hops make one. What a `,` inside a
/// parameter leaves is none, and so no message.
fn media_types(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let said = headers.get_all(CONTENT_TYPE).iter().flat_map(|sent| sent.as_bytes().split(|byte| *byte == b','));
    said.map(|sent| sent.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii())
}

fn starts_with(text: &[u8], start: &[u8]) -> bool {
    text.get(..start.len()).is_some_and(|text| text.eq_ignore_ascii_case(start))
}

fn ends_with(text: &[u8], end: &[u8]) -> bool {
    text.len() >= end.len() && text[text.len() - end.len()..].eq_ignore_ascii_case(end)
}

/// How far a delivery got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// The client has nothing yet.
    Nothing,
    /// The server has the first byte at hand, and waits for room on the client's connection.
    Offered,
    /// The server has taken what makes the charge due: the first byte, or the head where that is what counts.
    Due,
}

/// How an admitted export ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The answer was handed over to its end.
    Complete,
    /// It was dropped before: the client hung up, or broke its own upload off; a panic; a shutdown.
    Dropped,
    /// The backend broke off.
    BrokenOff,
    /// The answer hands nothing out.
    NotDelivered,
}

impl Ending {
    /// What becomes of the charge (counting rules, section 4 rules 2 and 3). After the first byte a client that hangs up keeps what
    /// it has, and the charge, else aborting at 99 % were a free export; a backend that breaks off leaves it without a file.
    const fn settlement(self, progress: Progress) -> Settlement {
        match (self, progress) {
            (Self::Complete | Self::Dropped, Progress::Due) => Settlement::Delivered,
            (Self::BrokenOff | Self::NotDelivered, _) | (_, Progress::Nothing | Progress::Offered) => Settlement::Void,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Dropped => "dropped",
            Self::BrokenOff => "broken-off",
            Self::NotDelivered => "not-delivered",
        }
    }
}

/// An admitted export on its way: carries the charge and the record of the decision, and ends both, once, however it goes.
#[derive(Debug)]
pub(super) struct Delivery {
    charge: Option<Box<Charge>>,
    record: Record,
    client: Client,
    progress: Progress,
    head_is_all: bool,
    ended: bool,
}

/// What can be seen of the client while its answer is on the way.
#[derive(Debug)]
pub(super) struct Client {
    /// Whether it has broken its own upload off.
    pub(super) upload: Option<UploadBroken>,
    /// Whether it takes what it is sent.
    pub(super) taking: Taking,
}

impl Delivery {
    /// In a box: it goes through many hands.
    pub(super) fn new(charge: Option<Box<Charge>>, record: Record, client: Client) -> Box<Self> {
        Box::new(Self { charge, record, client, progress: Progress::Nothing, head_is_all: false, ended: false })
    }

    pub(super) fn charge(&mut self) -> Option<&mut Charge> {
        self.charge.as_deref_mut()
    }

    /// It was charged only now that the backend has answered.
    pub(super) fn charged(&mut self, charge: Option<Box<Charge>>) {
        self.charge = charge;
    }

    /// It goes on without the charge, which cannot be made safe.
    pub(super) fn uncharged(&mut self) {
        self.charge = None;
        self.record.uncharged();
    }

    /// The backend has said how many images it brings.
    pub(super) fn reported(&mut self, policy: &Policy) {
        if let Some(charge) = &self.charge {
            self.record.counted(policy, charge.standings());
        }
    }

    pub(super) fn record(&mut self) -> &mut Record {
        &mut self.record
    }

    /// The answer is not handed out after all: the gate refuses it.
    pub(super) fn refused(mut self, status: StatusCode) {
        self.ended = true;
        self.record.refused(status);
    }

    /// The backend has answered.
    pub(super) fn answered(&mut self, status: StatusCode) {
        self.record.answered(status);
    }

    /// The client is given the head to receive, which hands the file out. `is_all`: whatever comes behind it is of no use to the client.
    pub(super) fn due_by_head(&mut self, is_all: bool) {
        self.progress = Progress::Due;
        self.head_is_all = is_all;
        self.client.taking.handed();
    }

    /// The client is given so many bytes to receive.
    pub(super) fn handed(&mut self, bytes: usize) {
        if self.progress != Progress::Due {
            self.progress = if self.client.taking.is_behind() { Progress::Offered } else { Progress::Due };
        }
        self.record.sent(bytes);
        self.client.taking.handed();
    }

    /// Whether what was handed over may not be with the client's connection yet: it is once more is asked for.
    pub(super) fn is_offered(&self) -> bool {
        self.progress == Progress::Offered
    }

    /// The client can take more, and there may be more or not: see [`Taking`].
    pub(super) fn asked(&mut self) {
        if self.is_offered() {
            self.progress = Progress::Due;
        }
        self.client.taking.asked();
    }

    /// There is nothing for it yet: what there was is sent meanwhile.
    pub(super) fn waits(&mut self) {
        self.client.taking.waits();
        if self.head_is_all {
            self.complete();
        }
    }

    /// The answer was handed over to its end.
    pub(super) fn complete(&mut self) {
        self.end(Ending::Complete);
    }

    /// The answer broke off: by the backend, unless it was the client that broke the exchange, or has not taken what it was given.
    pub(super) fn broken_off(&mut self) {
        let by_client = self.client.upload.as_ref().is_some_and(UploadBroken::is_set) || self.client.taking.held_up();
        self.end(if by_client { Ending::Dropped } else { Ending::BrokenOff });
    }

    /// The answer hands nothing out.
    pub(super) fn nothing(&mut self) {
        self.end(Ending::NotDelivered);
    }

    fn end(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let settlement = ending.settlement(self.progress);
        if let Some(charge) = self.charge.take() {
            match (ending, settlement) {
                // Who holds it up until the gate ends gets nothing for that.
                (Ending::Dropped, Settlement::Delivered) if !self.client.taking.held_up() => charge.break_off(),
                _ => charge.settle(settlement),
            }
        }
        self.record.settled(settlement, ending.as_str());
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.end(Ending::Dropped);
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
        promise(delivers, &Method::GET, &response.body(()).unwrap().into_parts().0, body_is_empty)
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
        assert_eq!(promised(Delivers::Redirect, 304, &[("location", "/x")], true), Promise::Nothing);
        assert_eq!(promised(Delivers::Redirect, 200, &[("location", "/x")], true), Promise::Nothing);
        assert_eq!(promised(Delivers::Redirect, 200, &[], false), Promise::Body, "a file");
        assert_eq!(promised(Delivers::Redirect, 200, &[("content-type", "image/png")], false), Promise::Body);
        assert_eq!(promised(Delivers::Redirect, 200, &[("content-type", "image/png")], true), Promise::Nothing);
        assert_eq!(promised(Delivers::Redirect, 200, &[("content-type", "text/html")], false), Promise::Nothing);
        assert_eq!(promised(Delivers::Redirect, 404, &[("content-type", "image/png")], false), Promise::Nothing);
        for delivers in [Delivers::Success, Delivers::Screen] {
            assert_eq!(promised(delivers, 201, &[("content-type", "application/json")], true), Promise::Head);
            assert_eq!(promised(delivers, 404, &[], false), Promise::Nothing);
        }
    }

    #[test]
    fn an_export_sticks_when_the_client_has_begun_and_the_backend_did_not_fail() {
        use Settlement::{Delivered, Void};
        let cases = [
            (Ending::Complete, Progress::Due, Delivered),
            (Ending::Dropped, Progress::Due, Delivered),
            (Ending::BrokenOff, Progress::Due, Void),
            (Ending::NotDelivered, Progress::Due, Void),
            (Ending::Dropped, Progress::Offered, Void),
            (Ending::BrokenOff, Progress::Offered, Void),
            (Ending::Complete, Progress::Nothing, Void),
            (Ending::Dropped, Progress::Nothing, Void),
            (Ending::BrokenOff, Progress::Nothing, Void),
            (Ending::NotDelivered, Progress::Nothing, Void),
        ];
        for (ending, progress, settlement) in cases {
            assert_eq!(ending.settlement(progress), settlement, "{ending:?} {progress:?}");
        }
    }
}
