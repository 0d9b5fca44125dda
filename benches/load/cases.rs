//! The cases: what is asked, and how it must be answered.

use std::cell::LazyCell;
use std::time::Duration;

use hyper::{Method, Uri};

use crate::backend::Answers;
use crate::cores::Cores;
use crate::gate::{FREE_LIMIT, MAX_LIMIT, Setup};
use crate::mix::{Leaves, Requests};
use crate::tally::Expected;

/// Prime, so that users and designs meet in ever new pairs.
const DESIGNS: u64 = 997;

/// How much is measured, and on what.
pub(crate) struct Settings {
    pub(crate) rounds: u32,
    pub(crate) lasts: Duration,
    pub(crate) subjects: u64,
    pub(crate) connections: usize,
    pub(crate) answers: Answers,
    pub(crate) rate: Option<u32>,
    pub(crate) gate: Setup,
    pub(crate) cores: Cores,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    Charged,
    Unmatched,
    Refused,
    Mixed,
}

/// Requests of one kind, and what is to come of them.
pub(crate) struct Kind {
    pub(crate) requests: Requests,
    /// How the gate shall answer at first, while users over their limit still have something left.
    pub(crate) at_first: Expected,
    /// And from then on.
    pub(crate) then: Expected,
}

impl Kind {
    /// What everybody gets.
    fn image(requests: Requests) -> Self {
        Self { requests, at_first: Expected::Images, then: Expected::Images }
    }

    /// What the gate charges.
    fn export(limit: u64, requests: Requests) -> Self {
        Self::image(Requests { limit: Some(limit), ..requests })
    }

    /// How a proxy answers that checks nothing.
    pub(crate) fn unchecked(&self) -> Expected {
        if self.requests.leaves == Leaves::BeforeHead { Expected::Nothing } else { Expected::Images }
    }
}

impl Case {
    pub(crate) const ALL: [Self; 4] = [Self::Charged, Self::Unmatched, Self::Refused, Self::Mixed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Charged => "charged",
            Self::Unmatched => "unmatched",
            Self::Refused => "refused",
            Self::Mixed => "mixed",
        }
    }

    /// One of each is asked in turn.
    pub(crate) fn kinds(self, settings: &Settings) -> Vec<Kind> {
        let exports = || (0..DESIGNS).map(|n| uri(&format!("/v1/designs/d-{n}/download"))).collect();
        let users = |plan| settings.gate.signed.authorizations(plan, settings.subjects);
        let max = LazyCell::new(|| users("max"));
        let charged = || Kind::export(MAX_LIMIT, Requests::get(exports(), max.clone()));
        let unmatched = || Kind::image(Requests::get(vec![uri("/assets/logo.png")], Vec::new()));
        let refused = || Kind {
            at_first: Expected::ImagesEach(FREE_LIMIT),
            then: Expected::Refusals,
            ..Kind::export(FREE_LIMIT, Requests::get(exports(), users("free")))
        };
        match self {
            Self::Charged => vec![charged()],
            Self::Unmatched => vec![unmatched()],
            Self::Refused => vec![refused()],
            Self::Mixed => {
                let designs = (0..DESIGNS).map(|n| uri(&format!("/v1/designs/d-{n}"))).collect();
                let save = Requests { method: Method::PUT, ..Requests::get(designs, max.clone()) };
                let leaving = |leaves| Requests { leaves, ..Requests::get(exports(), max.clone()) };
                let before_head = Kind {
                    at_first: Expected::Nothing,
                    then: Expected::Nothing,
                    ..Kind::export(MAX_LIMIT, leaving(Leaves::BeforeHead))
                };
                let mid_body = Kind::export(MAX_LIMIT, leaving(Leaves::MidBody));
                vec![charged(), unmatched(), refused(), Kind::image(save), before_head, mid_body]
            }
        }
    }
}

fn uri(path: &str) -> Uri {
    path.parse().expect("a path is a URI")
}
