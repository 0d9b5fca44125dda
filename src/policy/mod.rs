//! What counts, when, and against which limit. Pure: no I/O, no runtime, no clock; time is an argument.
//!
//! * [`Action`], [`Platform`], [`Delivers`], [`PlanId`]: the vocabulary of the counting rules.
//! * [`Routes`]: which request is which action ([`path`] is why a strange spelling of a path cannot slip by).
//! * [`Meter`]: what is counted, for how long, and how much of it a plan allows.
//! * [`Who`], [`Subject`]: whose use is counted together. [`Cost`]: how much one export is. [`Degrade`]: what it becomes over a limit.
//! * [`Policy::decide`]: an [`Export`] becomes a [`Verdict`]: what to charge on which meter, and the [`Rule`] that says so.

pub mod cost;
mod decision;
mod degrade;
mod host;
mod meter;
pub mod path;
mod pattern;
mod query;
mod routes;
mod vocabulary;
mod who;
mod window;

pub use cost::{BadCost, Cost};
pub use decision::{Demand, Export, NeedsBody, Policy, Rule, SessionUse, Undecided, Verdict};
pub use degrade::{Degrade, TooLong};
pub use meter::{Counts, Limit, Meter, MeterId, NoSeats, OnExceed};
pub use path::percent_encoded;
pub use pattern::Pattern;
pub use routes::{Conditions, DesignFrom, Found, Match, Misread, Route, RouteId, Routes, Shadowed};
pub use vocabulary::{Action, Delivers, FEATURES_END_AT, PlanId, Plans, Platform, feature_names, features_in};
pub use who::{Anchor, Subject, SubjectKind, Who, Whose};
pub use window::{Anchored, Calendar, CalendarUnit, Period, Rolling, Span, Window};
