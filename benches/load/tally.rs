//! What came of a run, and whether it had to be so.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use hyper::StatusCode;

use crate::mix::{Leaves, Mix, Turn};

/// How the requests of a kind must be answered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    Images,
    Refusals,
    /// So many images for each user, neither more nor less, and refusals besides, in whatever order.
    ImagesEach(u64),
    /// The client leaves before there is an answer.
    Nothing,
}

/// What came of one request.
pub(crate) enum Outcome {
    /// So much of the body came.
    Answered { status: StatusCode, body_bytes: usize },
    /// The client left before it was answered.
    Left,
    /// The connection or the server broke it off.
    Broken,
}

/// What came of a run.
pub(crate) struct Tally {
    pub(crate) sent: u64,
    pub(crate) elapsed: Duration,
    /// From the beginning until the last request was sent.
    pub(crate) sending: Duration,
    /// Microseconds, from the sending (open loop: the due time) to the end of the body, of clients that stay for it.
    pub(crate) latency: Histogram<u64>,
    began: Instant,
    kinds: Vec<OfKind>,
    /// 200s whose body was longer or shorter than it had to be.
    wrong_bodies: u64,
    /// Requests that got no complete answer.
    broken: u64,
}

/// What came of the requests of one kind.
struct OfKind {
    statuses: BTreeMap<StatusCode, u64>,
    /// By user.
    images: Vec<u64>,
    left: u64,
}

/// For latencies in microseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("1 µs to 60 s to three digits is a range")
}

impl Tally {
    pub(crate) fn new(mix: &Mix) -> Self {
        let of_kind = |users| OfKind { statuses: BTreeMap::new(), images: vec![0; users], left: 0 };
        let kinds = mix.kinds().iter().map(|kind| of_kind(kind.users())).collect();
        Self {
            sent: 0,
            elapsed: Duration::ZERO,
            sending: Duration::ZERO,
            latency: histogram(),
            began: Instant::now(),
            kinds,
            wrong_bodies: 0,
            broken: 0,
        }
    }

    /// What came of a request that was due and sent then.
    pub(crate) fn record(&mut self, mix: &Mix, turn: Turn, outcome: Outcome, [due, sent]: [Instant; 2]) {
        let took = due.elapsed();
        self.sent += 1;
        self.sending = self.sending.max(sent.duration_since(self.began));
        let of_kind = &mut self.kinds[turn.kind];
        match outcome {
            Outcome::Answered { status, body_bytes } => {
                *of_kind.statuses.entry(status).or_default() += 1;
                let leaves = mix.kinds()[turn.kind].leaves;
                if status == StatusCode::OK {
                    of_kind.images[turn.user] += 1;
                    let is_right = match leaves {
                        Leaves::MidBody => (1..mix.body_bytes).contains(&body_bytes),
                        Leaves::BeforeHead | Leaves::Never => body_bytes == mix.body_bytes,
                    };
                    self.wrong_bodies += u64::from(!is_right);
                }
                if leaves == Leaves::Never {
                    self.latency.saturating_record(took.as_micros().try_into().unwrap_or(u64::MAX));
                }
            }
            Outcome::Left => of_kind.left += 1,
            Outcome::Broken => self.broken += 1,
        }
    }

    /// Fails unless each kind was answered as is expected, with whole images.
    pub(crate) fn check(&self, expected: &[Expected]) -> anyhow::Result<()> {
        for (kind, (of_kind, expected)) in self.kinds.iter().zip(expected).enumerate() {
            of_kind.check(*expected).map_err(|error| error.context(format!("kind {kind}")))?;
        }
        let Self { sent, broken, wrong_bodies, .. } = self;
        anyhow::ensure!(
            *broken == 0 && *wrong_bodies == 0,
            "of {sent} requests {broken} were broken off, and {wrong_bodies} got a body of the wrong length"
        );
        Ok(())
    }

    /// How many images of a kind each user got, whole or begun.
    pub(crate) fn images_by_user(&self, kind: usize) -> &[u64] {
        &self.kinds[kind].images
    }

    /// How many requests of a kind were answered.
    pub(crate) fn answered(&self, kind: usize) -> u64 {
        self.kinds[kind].statuses.values().sum()
    }

    /// How many clients left before they were answered.
    pub(crate) fn left(&self, kind: usize) -> u64 {
        self.kinds[kind].left
    }
}

impl OfKind {
    fn check(&self, expected: Expected) -> anyhow::Result<()> {
        let only = |status| self.statuses.keys().all(|answered| *answered == status);
        let is_right = match expected {
            Expected::Images => only(StatusCode::OK) && self.left == 0,
            Expected::Refusals => only(StatusCode::TOO_MANY_REQUESTS) && self.left == 0,
            Expected::Nothing => self.statuses.is_empty(),
            Expected::ImagesEach(allowed) => {
                let wrong = self.images.iter().enumerate().find(|(_, images)| **images != allowed);
                if let Some((user, images)) = wrong {
                    anyhow::bail!("user {user} got {images} image(s), {allowed} allowed");
                }
                let others = |status: &StatusCode| ![StatusCode::OK, StatusCode::TOO_MANY_REQUESTS].contains(status);
                !self.statuses.keys().any(others) && self.left == 0
            }
        };
        let Self { statuses, left, .. } = self;
        anyhow::ensure!(is_right, "expected {expected:?}, but the answers were {statuses:?}, and {left} clients left");
        Ok(())
    }
}
