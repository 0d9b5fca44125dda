//! Exchanges of the simplest form, without a task for their connection: a request without a body, and an answer that says how long it is.
//!
//! Most images travel like this. hyper's client has a task for each connection, and channels to and from it, for all that may happen
//! besides: bodies both ways at once, chunks, interim answers, other protocols. None of that is dealt with here. As soon as the head of
//! an answer is of any other form, hyper takes the connection over ([`HandedOver`]) as if it had written the request itself, and reads
//! everything once more; from then on the connection is hyper's.

use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body;
use httparse::{Header, ParserConfig, Status};
use smallvec::SmallVec;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::last_words::{LastWords, is_end};

/// How much is read at once at first, in bytes: a head and a small image.
const SMALL: usize = 8 << 10;

/// How many fields an answer may have: as many as hyper takes.
const MOST_FIELDS: usize = 100;

/// A connection that whoever is lent it reads and writes.
#[derive(Debug)]
pub(super) struct Direct {
    stream: TcpStream,
    /// The head of a request.
    request: Vec<u8>,
    /// How much of it was written.
    written: usize,
    /// Whether it is a HEAD, the answer to which has no body.
    is_head: bool,
    /// Nothing more will come.
    has_ended: bool,
    /// Of the answer, what nobody was given yet.
    read: BytesMut,
    /// Whether that is part of something large: its own length does not tell.
    is_large: bool,
    /// How much is read at once.
    piece: usize,
    /// And at most. A head that is longer is for hyper.
    most: usize,
}

/// The head of an answer.
#[derive(Debug)]
pub(super) enum Head {
    /// And how long its body is, in bytes.
    Simple(Response<u64>),
    /// It is for hyper.
    Other,
}

impl Direct {
    /// Reads no more than `most` bytes at once.
    pub(super) fn new(stream: TcpStream, most: usize) -> Self {
        Self {
            stream,
            request: Vec::new(),
            written: 0,
            is_head: false,
            has_ended: false,
            read: BytesMut::new(),
            is_large: false,
            piece: SMALL,
            most,
        }
    }

    /// Whether a request may be sent like this.
    pub(super) fn serves<B: Body>(request: &Request<B>) -> bool {
        let fields = request.headers();
        // A body that is said to come and has ended is hyper's to set right.
        request.body().is_end_stream() && !fields.contains_key(TRANSFER_ENCODING) && !fields.contains_key(UPGRADE)
    }

    /// Whether its server is there, and has said nothing that it was not asked for.
    pub(super) fn is_quiet(&self) -> bool {
        matches!(self.stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The same, by what the system knows this moment, and not when it was heard last. For what is not sent twice.
    pub(super) fn is_still_quiet(&self) -> bool {
        let next = SockRef::from(&self.stream).peek(&mut [MaybeUninit::uninit()]);
        matches!(next, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether any of the last request was written.
    pub(super) const fn was_seen(&self) -> bool {
        self.written > 0
    }

    /// Whether some of it was not.
    pub(super) const fn is_ahead(&self) -> bool {
        self.written < self.request.len()
    }

    /// Begins an exchange. Its request has the origin form (RFC 9112, section 3.2.1).
    pub(super) fn begin<B>(&mut self, request: &Request<B>) {
        self.written = 0;
        self.is_head = *request.method() == Method::HEAD;
        let head = &mut self.request;
        head.clear();
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
        for part in [request.method().as_str(), " ", target, " HTTP/1.1\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
        for (name, value) in request.headers() {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
    }

    /// Writes the request, and waits for the head of its answer. A server may answer before it has all of a request, and leave: what it
    /// said is heard (see [`LastWords`]).
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Head>> {
        loop {
            self.write(cx)?;
            if ready!(self.poll_read(cx, self.piece))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            match simple(&mut self.read, self.is_head) {
                Some(head) => return Poll::Ready(Ok(head)),
                None if self.read.len() >= self.most => return Poll::Ready(Ok(Head::Other)),
                None => {}
            }
        }
    }

    /// Writes what can be.
    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while let rest @ [_, ..] = &self.request[self.written..] {
            match Pin::new(&mut self.stream).poll_write(cx, rest) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => self.written += count,
                Poll::Ready(Err(error)) if is_end(&error) => break,
                Poll::Ready(Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next piece of a body of which so much is `left`; `None` if there is no more of it, though it is not all there.
    pub(super) fn poll_piece(&mut self, cx: &mut Context<'_>, left: &mut u64) -> Poll<io::Result<Option<Bytes>>> {
        let most = usize::try_from(*left).unwrap_or(usize::MAX);
        if self.read.is_empty() {
            let read = ready!(self.poll_read(cx, self.piece.min(most)));
            if !matches!(read, Ok(1..)) && !std::mem::replace(&mut self.has_ended, true) {
                // First of all what came before is sent on: it is when nothing more is there.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if read? == 0 {
                return Poll::Ready(Ok(None));
            }
        }
        let piece = self.read.split_to(self.read.len().min(most)).freeze();
        *left -= piece.len() as u64;
        Poll::Ready(Ok(Some(piece)))
    }

    /// Reads up to so many bytes behind what was read. Many may wait, and for long: unless something is in it, who does has no large buffer.
    fn poll_read(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        let Poll::Ready(count) = self.poll_fill(cx, most) else {
            self.shed();
            return Poll::Pending;
        };
        let count = count?;
        if count == self.piece {
            self.piece = (2 * count).min(self.most);
        } else if most == self.piece && count < most / 2 {
            self.piece = (most / 2).max(SMALL);
        }
        Poll::Ready(Ok(count))
    }

    /// Makes room only for what is there: else each wait would take a buffer, and give it back.
    fn poll_fill(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        ready!(self.stream.poll_read_ready(cx))?;
        self.read.reserve(most);
        // It may have grown by many small pieces as well.
        self.is_large |= most > SMALL || self.read.capacity() > 2 * SMALL;
        let mut room = (&mut self.read).limit(most);
        pin!(self.stream.read_buf(&mut room)).poll(cx)
    }

    /// Lets go of a large buffer that nothing is in.
    fn shed(&mut self) {
        if self.read.is_empty() && std::mem::take(&mut self.is_large) {
            self.read = BytesMut::new();
        }
    }

    /// Whether no more came than an answer, now that it has been read to its end.
    pub(super) fn rest(&mut self) -> bool {
        self.shed();
        self.read.is_empty()
    }

    /// For hyper; `has_begun` if it is to write the request that was written last.
    pub(super) fn hand_over(self, has_begun: bool) -> HandedOver {
        let unwritten = if has_begun { self.request[self.written..].to_vec().into() } else { Bytes::new() };
        HandedOver { stream: LastWords::new(self.stream), swallows: has_begun, unwritten, read: self.read.freeze() }
    }
}

/// Takes a head out of what was read, if it is all there, and simple; one that is not is left. `None` if some of it is missing.
fn simple(read: &mut BytesMut, is_head: bool) -> Option<Head> {
    let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
    let mut head = httparse::Response::new(&mut []);
    let parsed = ParserConfig::default().parse_response_with_uninit_headers(&mut head, read, &mut fields);
    let end = match parsed {
        Ok(Status::Complete(end)) => end,
        Ok(Status::Partial) => return None,
        Err(_) => return Some(Head::Other),
    };
    let Some((status, length)) = framing(&head, is_head) else { return Some(Head::Other) };
    // By their places in what was read: values share it.
    let begin = read.as_ptr().addr();
    let place = |part: &[u8]| part.as_ptr().addr() - begin..part.as_ptr().addr() - begin + part.len();
    let places: SmallVec<[_; 16]> =
        head.headers.iter().map(|field| (place(field.name.as_bytes()), place(field.value))).collect();
    let head = read.split_to(end).freeze();
    let mut answer = Response::new(length);
    *answer.status_mut() = status;
    // Some are added on the way.
    answer.headers_mut().reserve(places.len() + 8);
    for (name, value) in places {
        let name = HeaderName::from_bytes(&head[name]);
        let value = HeaderValue::from_maybe_shared(head.slice(value));
        // What is a field for the parser is one for all.
        let (Ok(name), Ok(value)) = (name, value) else { unreachable!("no field") };
        answer.headers_mut().append(name, value);
    }
    Some(Head::Simple(answer))
}

/// The status of an answer of the simplest form, and how long its body is (RFC 9112, section 6.3).
fn framing(head: &httparse::Response<'_, '_>, is_head: bool) -> Option<(StatusCode, u64)> {
    let status = StatusCode::from_u16(head.code?).ok()?;
    // hyper keeps other words than the usual ones.
    if head.version != Some(1) || status.is_informational() || head.reason != status.canonical_reason() {
        return None;
    }
    let mut length = None;
    for Header { name, value } in head.headers.iter() {
        let is = |other: &HeaderName| name.eq_ignore_ascii_case(other.as_str());
        if is(&CONTENT_LENGTH) {
            length = Some(number(value).filter(|_| length.is_none())?);
        } else if name.len() > LONGEST_NAME
            || is(&TRANSFER_ENCODING)
            || is(&UPGRADE)
            || is(&CONNECTION) && !value.eq_ignore_ascii_case(b"keep-alive")
        {
            return None;
        }
    }
    let has_none = is_head || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    Some((status, if has_none { 0 } else { length? }))
}

/// Names that are longer are none for [`HeaderName`].
const LONGEST_NAME: usize = u16::MAX as usize;

/// A length in digits only, and not more of them than any body has.
fn number(text: &[u8]) -> Option<u64> {
    let digits = str::from_utf8(text).ok()?;
    (matches!(digits.len(), 1..=18) && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// A connection for hyper. What was read of it is read first; and if a request has been begun that hyper is going to write, with no body
/// behind it, that goes nowhere: only what is missing of it is written.
#[derive(Debug)]
pub(super) struct HandedOver {
    stream: LastWords<TcpStream>,
    swallows: bool,
    unwritten: Bytes,
    read: Bytes,
}

impl HandedOver {
    /// Takes a head that has been begun before: a buffer that takes all is given all of a head at once.
    fn swallow(&mut self, cx: &Context<'_>) {
        self.swallows = false;
        // Now there may be something to be read.
        cx.waker().wake_by_ref();
    }

    /// Writes what is missing of a head: some servers speak before they have heard all of it.
    fn poll_complete(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unwritten.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unwritten))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unwritten.advance(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for HandedOver {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.swallows {
            // No answer comes before its request.
            return Poll::Pending;
        }
        if self.read.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.read.len().min(buffer.remaining());
        buffer.put_slice(&self.read[..count]);
        self.read.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HandedOver {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.swallows {
            self.swallow(cx);
            return Poll::Ready(Ok(bytes.len()));
        }
        ready!(self.poll_complete(cx))?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.swallows {
            self.swallow(cx);
            return Poll::Ready(Ok(pieces.iter().map(|piece| piece.len()).sum()));
        }
        ready!(self.poll_complete(cx))?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_complete(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests;
