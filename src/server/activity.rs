//! What a client does with its connection, and when that is too little.
//!
//! Reads, writes and bodies note what they do here, a few relaxed stores each; one timer a connection asks from time to time what
//! to make of it. So no read, write or body needs a timer of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;

use crate::clock::{Clock, milliseconds};

/// How long a client may take for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// For the head of a request, from its first byte on; for the first request, from the connection's begin on.
    pub head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// How long an upload may stand still, and how long nothing may be taken of an answer.
    pub body: Duration,
}

/// What to make of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing can be wrong with it for this long.
    Fine(Duration),
    /// It is not used: to be closed as soon as nothing is under way.
    Idle,
    /// The client does not do its part: to be cut off.
    Stuck(&'static str),
}

/// How many requests are under way on all connections: each connection adds its own.
#[derive(Debug, Clone, Default)]
pub(super) struct InFlight(pub(super) Gauge);

/// What happens on one connection. Times are milliseconds of the monotonic clock.
#[derive(Debug)]
pub(super) struct Activity {
    clock: Arc<dyn Clock>,
    /// Those of all connections.
    everywhere: InFlight,
    /// Whether a request has come.
    has_begun: AtomicBool,
    /// Requests whose answers have not ended.
    in_flight: AtomicUsize,
    /// When the last one ended; before the first, when the connection began.
    ended: AtomicU64,
    /// When the head that is being read began, plus one; 0 between requests.
    head: AtomicU64,
    /// When something was last read and written.
    read: AtomicU64,
    written: AtomicU64,
    /// Whether the operating system has no room for what is to be written.
    is_full: AtomicBool,
    /// Uploads that have not ended: one may last longer than its request's answer.
    uploads: AtomicUsize,
    /// Uploads that wait for the client, and answers that it has yet to take.
    uploads_waiting: AtomicUsize,
    answers_waiting: AtomicUsize,
    /// Whether an upload was not read to its end: nobody wanted more of it.
    left_an_upload: AtomicBool,
    /// Whether what there still is of an upload is more than would be read if nobody wants it.
    upload_is_long: AtomicBool,
    /// Whether frames are read that are no request: then a read begins no head.
    multiplexed: AtomicBool,
    /// Whether a request has asked to leave HTTP.
    may_leave_http: AtomicBool,
}

impl Activity {
    pub(super) fn new(clock: Arc<dyn Clock>, everywhere: InFlight) -> Self {
        let now = milliseconds(clock.coarse());
        Self {
            clock,
            everywhere,
            has_begun: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            ended: AtomicU64::new(now),
            head: AtomicU64::new(now + 1),
            read: AtomicU64::new(now),
            written: AtomicU64::new(now),
            is_full: AtomicBool::new(false),
            uploads: AtomicUsize::new(0),
            uploads_waiting: AtomicUsize::new(0),
            answers_waiting: AtomicUsize::new(0),
            left_an_upload: AtomicBool::new(false),
            upload_is_long: AtomicBool::new(false),
            multiplexed: AtomicBool::new(false),
            may_leave_http: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        milliseconds(self.clock.coarse())
    }

    /// Whether no request has come yet.
    pub(super) fn is_new(&self) -> bool {
        !self.has_begun.load(Relaxed)
    }

    /// HTTP/2 is spoken.
    pub(super) fn multiplexed(&self) {
        self.multiplexed.store(true, Relaxed);
    }

    /// A request asks to leave HTTP. From then on hyper does not say good-bye to a client that is still sending when its answer has ended.
    pub(super) fn may_leave_http(&self) {
        self.may_leave_http.store(true, Relaxed);
    }

    /// The connection is a tunnel from now on: what the client sends is for the backend.
    pub(super) fn left_http(&self) {
        self.left_an_upload.store(false, Relaxed);
    }

    /// Whether the client may still be sending what nobody reads. By HTTP/2 it is told, and the connection goes on.
    pub(super) fn may_be_sending(&self) -> bool {
        self.left_an_upload.load(Relaxed) && !self.multiplexed.load(Relaxed)
    }

    pub(super) fn has_read(&self) {
        let now = self.now();
        self.read.store(now, Relaxed);
        let begins_a_head = self.is_between_requests()
            // What is read may be the rest of it.
            && !self.left_an_upload.load(Relaxed)
            && !self.multiplexed.load(Relaxed);
        if begins_a_head && self.head.load(Relaxed) == 0 {
            self.head.store(now + 1, Relaxed);
        }
    }

    pub(super) fn has_written(&self) {
        self.written.store(self.now(), Relaxed);
        self.is_full.store(false, Relaxed);
    }

    pub(super) fn has_no_room(&self) {
        self.is_full.store(true, Relaxed);
    }

    fn request_begins(&self) {
        self.has_begun.store(true, Relaxed);
        self.in_flight.fetch_add(1, Relaxed);
        self.head.store(0, Relaxed);
        if !self.multiplexed.load(Relaxed) {
            // What was before it has been read after all.
            self.left_an_upload.store(false, Relaxed);
        }
    }

    fn is_between_requests(&self) -> bool {
        self.in_flight.load(Relaxed) == 0 && self.uploads.load(Relaxed) == 0
    }

    /// Whether nothing has begun that is to end, and nothing has moved for so long: by HTTP/2 an answer whose body has ended may still be
    /// on its way.
    pub(super) fn rests_for(&self, time: Duration) -> bool {
        let reads_a_head = self.head.load(Relaxed) > 0 && !self.multiplexed.load(Relaxed);
        let moved = self.written.load(Relaxed).max(self.ended.load(Relaxed));
        let is_at_rest = self.is_between_requests() && !self.is_full.load(Relaxed) && !reads_a_head;
        is_at_rest && Duration::from_millis(self.now().saturating_sub(moved)) >= time
    }

    fn request_ends(&self) {
        self.ended.store(self.now(), Relaxed);
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// For how long nothing was read or written.
    pub(super) fn quiet_for(&self) -> Duration {
        let last = self.read.load(Relaxed).max(self.written.load(Relaxed));
        Duration::from_millis(self.now().saturating_sub(last))
    }

    /// What to make of the connection now.
    pub(super) fn verdict(&self, patience: &Patience) -> Verdict {
        let now = self.now();
        let left =
            |since: u64, patience: Duration| patience.saturating_sub(Duration::from_millis(now.saturating_sub(since)));
        // What begins right after this look is seen by the next.
        let mut fine = patience.head.min(patience.body).min(patience.idle);
        let mut stuck = None;
        let mut within = |left: Duration, why| {
            if left.is_zero() {
                stuck = stuck.or(Some(why));
            }
            fine = fine.min(left);
        };
        if self.is_full.load(Relaxed) || self.answers_waiting.load(Relaxed) > 0 {
            within(left(self.written.load(Relaxed), patience.body), "the client takes nothing of its answer");
        }
        if self.uploads_waiting.load(Relaxed) > 0 {
            within(left(self.read.load(Relaxed), patience.body), "an upload stands still");
        }
        if self.uploads.load(Relaxed) > 0 && self.in_flight.load(Relaxed) == 0 {
            // Its answer has ended, and it may never: who answers at once need not read it, nor say so.
            let moved = self.read.load(Relaxed).max(self.ended.load(Relaxed));
            within(left(moved, patience.idle), "nobody takes the rest of an upload");
        }
        let between_requests = self.is_between_requests() && !self.is_full.load(Relaxed);
        if let Some(began) = self.head.load(Relaxed).checked_sub(1).filter(|_| between_requests) {
            within(left(began, patience.head), "no whole head of a request came");
        } else if between_requests {
            let left = left(self.ended.load(Relaxed), patience.idle);
            if left.is_zero() && stuck.is_none() {
                return Verdict::Idle;
            }
            fine = fine.min(left);
        }
        stuck.map_or(Verdict::Fine(fine), Verdict::Stuck)
    }
}

/// A request that is under way, until it is dropped.
#[derive(Debug)]
pub(super) struct UnderWay {
    activity: Arc<Activity>,
    has_place: bool,
    answer_waits: bool,
}

impl UnderWay {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        activity.request_begins();
        Self { activity, has_place: false, answer_waits: false }
    }

    /// Takes one of so many places that requests have on all connections, unless none is free.
    pub(super) fn take_place(&mut self, most: usize) -> bool {
        let others = self.activity.everywhere.0.inc();
        self.has_place = usize::try_from(others).is_ok_and(|others| others < most);
        if !self.has_place {
            self.activity.everywhere.0.dec();
        }
        self.has_place
    }

    /// Whether the connection may have to end with the answer, because too much of the request comes behind it.
    pub(super) fn closes_early(&self) -> bool {
        let Activity { uploads, upload_is_long, .. } = &*self.activity;
        let is_unread = self.activity.may_be_sending() || uploads.load(Relaxed) > 0 && upload_is_long.load(Relaxed);
        is_unread && !self.activity.multiplexed.load(Relaxed)
    }

    /// Whether the client has yet to take what it was handed.
    pub(super) fn answer_waits(&mut self, waits: bool) {
        if waits && !self.answer_waits {
            // The client's time starts now.
            self.activity.written.store(self.activity.now(), Relaxed);
        }
        toggle(&self.activity.answers_waiting, &mut self.answer_waits, waits);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        toggle(&self.activity.answers_waiting, &mut self.answer_waits, false);
        if self.has_place {
            self.activity.everywhere.0.dec();
        }
        self.activity.request_ends();
    }
}

/// The upload of a request, until it is dropped.
#[derive(Debug)]
pub(super) struct UploadUnderWay {
    activity: Arc<Activity>,
    waits: bool,
    has_ended: bool,
}

impl UploadUnderWay {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        activity.uploads.fetch_add(1, Relaxed);
        Self { activity, waits: false, has_ended: false }
    }

    /// All of it has been read.
    pub(super) const fn ended(&mut self) {
        self.has_ended = true;
    }

    pub(super) const fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether what there still is of it is more than would be read if nobody wants it.
    pub(super) fn is_long(&self, is_long: bool) {
        self.activity.upload_is_long.store(is_long, Relaxed);
    }

    /// Whether it is, and the client can be told good-bye instead.
    pub(super) fn is_too_long(&self) -> bool {
        self.activity.upload_is_long.load(Relaxed) && !self.activity.may_leave_http.load(Relaxed)
    }

    /// Whether the client is waited for.
    pub(super) fn waits(&mut self, waits: bool) {
        if waits && !self.waits {
            self.activity.read.store(self.activity.now(), Relaxed);
        }
        toggle(&self.activity.uploads_waiting, &mut self.waits, waits);
    }
}

impl Drop for UploadUnderWay {
    fn drop(&mut self) {
        toggle(&self.activity.uploads_waiting, &mut self.waits, false);
        if !self.has_ended {
            self.activity.left_an_upload.store(true, Relaxed);
        }
        self.activity.ended.store(self.activity.now(), Relaxed);
        self.activity.uploads.fetch_sub(1, Relaxed);
    }
}

fn toggle(count: &AtomicUsize, is_in: &mut bool, shall: bool) {
    match (*is_in, shall) {
        (false, true) => drop(count.fetch_add(1, Relaxed)),
        (true, false) => drop(count.fetch_sub(1, Relaxed)),
        _ => {}
    }
    *is_in = shall;
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;

    const SECOND: Duration = Duration::from_secs(1);
    const PATIENCE: Patience =
        Patience { head: Duration::from_secs(10), idle: Duration::from_secs(75), body: Duration::from_secs(30) };

    fn connection() -> (Arc<ManualClock>, Arc<Activity>) {
        let clock = Arc::new(ManualClock::at(Timestamp::UNIX_EPOCH));
        let activity = Arc::new(Activity::new(clock.clone(), InFlight::default()));
        (clock, activity)
    }

    fn stuck(activity: &Activity) -> bool {
        matches!(activity.verdict(&PATIENCE), Verdict::Stuck(_))
    }

    #[test]
    fn the_first_head_has_to_be_there_in_time() {
        let (clock, activity) = connection();
        clock.advance(6 * SECOND);
        activity.has_read();
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(4 * SECOND));
        clock.advance(4 * SECOND);
        assert!(stuck(&activity), "a byte now and then does not help");
    }

    #[test]
    fn a_connection_may_rest_between_requests_but_a_head_that_has_begun_must_end() {
        let (clock, activity) = connection();
        drop(UnderWay::new(activity.clone()));
        clock.advance(70 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(5 * SECOND));
        activity.has_read();
        clock.advance(9 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(SECOND));
        clock.advance(SECOND);
        assert!(stuck(&activity));
        drop(UnderWay::new(activity.clone()));
        clock.advance(75 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Idle);
    }

    #[test]
    fn the_rest_of_an_upload_is_no_head_though_its_answer_has_ended() {
        let (clock, activity) = connection();
        let request = UnderWay::new(activity.clone());
        let mut upload = UploadUnderWay::new(activity.clone());
        drop(request);
        assert!(!activity.rests_for(Duration::ZERO));
        for _ in 0..20 {
            upload.waits(true);
            clock.advance(9 * SECOND);
            activity.has_read();
            upload.waits(false);
            assert!(matches!(activity.verdict(&PATIENCE), Verdict::Fine(_)));
        }
        drop(upload);
        activity.has_read();
        clock.advance(11 * SECOND);
        assert!(!stuck(&activity), "nobody wanted more of it, and the client goes on sending");
        assert!(activity.may_be_sending() && activity.rests_for(11 * SECOND) && !activity.rests_for(12 * SECOND));
        activity.has_written();
        assert!(!activity.rests_for(SECOND), "it still takes something");
        drop(UnderWay::new(activity.clone()));
        assert!(!activity.may_be_sending(), "another request has begun: it had ended");
        activity.has_read();
        assert!(!activity.rests_for(Duration::ZERO));
        clock.advance(10 * SECOND);
        assert!(stuck(&activity), "a head of one more");
    }

    #[test]
    fn an_upload_that_nobody_takes_keeps_no_connection_once_its_answer_has_ended() {
        let (clock, activity) = connection();
        let request = UnderWay::new(activity.clone());
        let _upload = UploadUnderWay::new(activity.clone());
        clock.advance(500 * SECOND);
        assert!(!stuck(&activity), "the backend may take its time");
        drop(request);
        clock.advance(74 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(SECOND));
        clock.advance(SECOND);
        assert!(stuck(&activity));
    }

    #[test]
    fn pings_neither_begin_a_head_nor_keep_a_connection() {
        let (clock, activity) = connection();
        activity.multiplexed();
        drop(UnderWay::new(activity.clone()));
        for _ in 0..15 {
            activity.has_read();
            activity.has_written();
            assert!(matches!(activity.verdict(&PATIENCE), Verdict::Fine(_)));
            clock.advance(5 * SECOND);
        }
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Idle);
    }

    #[test]
    fn a_backend_may_take_its_time() {
        let (clock, activity) = connection();
        let _request = UnderWay::new(activity.clone());
        clock.advance(500 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(10 * SECOND));
    }

    #[test]
    fn who_takes_nothing_of_an_answer_is_cut_off() {
        let (clock, activity) = connection();
        let mut request = UnderWay::new(activity.clone());
        clock.advance(100 * SECOND);
        request.answer_waits(true);
        clock.advance(29 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(SECOND));
        activity.has_written();
        clock.advance(29 * SECOND);
        assert_eq!(activity.verdict(&PATIENCE), Verdict::Fine(SECOND), "slow is not stuck");
        clock.advance(SECOND);
        assert!(stuck(&activity));
        request.answer_waits(false);
        assert!(!stuck(&activity));
    }

    #[test]
    fn the_rest_of_an_answer_may_take_its_time_after_its_body_has_ended() {
        let (clock, activity) = connection();
        drop(UnderWay::new(activity.clone()));
        for _ in 0..10 {
            activity.has_written();
            activity.has_no_room();
            clock.advance(20 * SECOND);
            assert!(matches!(activity.verdict(&PATIENCE), Verdict::Fine(_)));
        }
        clock.advance(10 * SECOND);
        assert!(stuck(&activity));
    }

    #[test]
    fn an_upload_that_stands_still_is_cut_off_and_one_that_nobody_reads_is_not() {
        let (clock, activity) = connection();
        let _request = UnderWay::new(activity.clone());
        let mut upload = UploadUnderWay::new(activity.clone());
        clock.advance(100 * SECOND);
        assert!(!stuck(&activity), "the backend does not ask for more");
        upload.waits(true);
        clock.advance(30 * SECOND);
        assert!(stuck(&activity));
        activity.has_read();
        assert!(!stuck(&activity));
        upload.waits(false);
        clock.advance(30 * SECOND);
        assert!(!stuck(&activity));
    }
}
