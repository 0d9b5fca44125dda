//! The cases: what is asked, of whom, and how it must be answered.

use std::sync::Arc;

use anyhow::Context;
use hyper::Uri;

use crate::contenders::Kind;
use crate::gate::{FREE_LIMIT, MAX_LIMIT};
use crate::mix::{Mix, Requests};
use crate::strangers::Strangers;
use crate::tally::Expected;
use crate::token::Signed;

/// What is asked, and of whom.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) body_bytes: usize,
    pub(crate) signed: Signed,
    pub(crate) asks: Asks,
    /// The first one is the yardstick.
    pub(crate) contenders: &'static [Kind],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    /// For what nobody checks.
    Page,
    /// Of users far from their limit.
    Exports,
    /// Of users over it.
    TooMany,
}

const CHECKING: &[Kind] = &[
    Kind::Bare,
    Kind::GatePeriodic,
    Kind::GateByCargo,
    Kind::GateStrict,
    Kind::HaproxyJwt,
    Kind::NginxLua,
    Kind::NginxLuaRedis,
    Kind::EnvoyJwt,
];

/// And what two of them take for large images alone.
const WITH_PLAIN: &[Kind] = &[
    Kind::Bare,
    Kind::GatePeriodic,
    Kind::GateByCargo,
    Kind::GateStrict,
    Kind::HaproxyPlain,
    Kind::HaproxyJwt,
    Kind::NginxPlain,
    Kind::NginxLua,
    Kind::NginxLuaRedis,
    Kind::EnvoyJwt,
];

/// Nobody looks at what is only forwarded.
const PLAIN: &[Kind] =
    &[Kind::Bare, Kind::GatePeriodic, Kind::GateByCargo, Kind::HaproxyPlain, Kind::NginxPlain, Kind::EnvoyPlain];

pub(crate) const HS256: &str = "1 KiB HS256";
pub(crate) const RS256: &str = "1 KiB RS256";
pub(crate) const ES256: &str = "1 KiB ES256";
pub(crate) const REFUSED: &str = "429";
pub(crate) const LARGE: &str = "256 KiB HS256";
pub(crate) const FORWARDED: &str = "forwarded only";

pub(crate) const CASES: [Case; 6] = [
    Case::exports(HS256, 1 << 10, Signed::Hs256, CHECKING),
    Case::exports(RS256, 1 << 10, Signed::Rs256, CHECKING),
    Case::exports(ES256, 1 << 10, Signed::Es256, CHECKING),
    Case { asks: Asks::TooMany, ..Case::exports(REFUSED, 1 << 10, Signed::Hs256, CHECKING) },
    Case::exports(LARGE, 256 << 10, Signed::Hs256, WITH_PLAIN),
    Case { asks: Asks::Page, ..Case::exports(FORWARDED, 1 << 10, Signed::Hs256, PLAIN) },
];

/// So many that a user asks for another one the next time: no number of users is a multiple of that.
const DESIGNS: [&str; 3] = ["/v1/designs/d-1/download", "/v1/designs/d-2/download", "/v1/designs/d-3/download"];

impl Case {
    const fn exports(name: &'static str, body_bytes: usize, signed: Signed, contenders: &'static [Kind]) -> Self {
        Self { name, body_bytes, signed, asks: Asks::Exports, contenders }
    }

    /// How a contender must answer while it is measured.
    pub(crate) fn expected(&self, kind: Kind) -> Expected {
        if self.asks == Asks::TooMany && kind.checks() { Expected::Refusals } else { Expected::Images }
    }
}

/// The requests of a case, the same for all contenders: tokens are signed once.
pub(crate) struct Asked {
    pub(crate) measured: Arc<Mix>,
    /// What those who check are asked before.
    pub(crate) proof: Option<Proof>,
}

/// By what one sees who checks.
pub(crate) struct Proof {
    /// Users of the plan `free`, each of whom asks more often in a row than it may.
    pub(crate) racing: Arc<Mix>,
    pub(crate) requests: u64,
    /// Before and after.
    pub(crate) strangers: Strangers,
}

impl Asked {
    /// Each user of the plan `free` asks `in_a_row` times.
    pub(crate) fn prepare(case: &Case, users: u64, in_a_row: u64) -> anyhow::Result<Self> {
        let mix = |requests| Mix::new(vec![requests], case.body_bytes);
        if case.asks == Asks::Page {
            let page = Requests::get(vec![Uri::from_static("/assets/logo.png")], Vec::new());
            return Ok(Self { measured: Arc::new(mix(page)), proof: None });
        }
        let export = |plan, limit| {
            let designs = DESIGNS.map(Uri::from_static).to_vec();
            mix(Requests { limit: Some(limit), ..Requests::get(designs, case.signed.authorizations(plan, users)) })
        };
        let few = export("free", FREE_LIMIT);
        let measured = if case.asks == Asks::TooMany { few.clone() } else { export("max", MAX_LIMIT) };
        let proof = Proof {
            racing: Arc::new(few.in_a_row(in_a_row)),
            requests: users * in_a_row,
            strangers: Strangers::of(&measured).context("there is a user")?,
        };
        Ok(Self { measured: Arc::new(measured), proof: Some(proof) })
    }

    /// What a contender of that kind has to show.
    pub(crate) fn proof_of(&self, kind: Kind) -> Option<&Proof> {
        self.proof.as_ref().filter(|_| kind.checks())
    }
}
