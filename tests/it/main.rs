//! Behaviour tests: the built binary and the Layer, through real sockets, a real store and hostile backends.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]
#![expect(
    clippy::disallowed_methods,
    reason = "the driver of a real process lives in real time; nothing asserts on it"
)]

mod abuse;
mod answers;
mod architecture;
mod clocks;
mod configuration;
mod conformance;
mod connections;
mod contention;
mod crash;
mod cut_short;
mod damage;
mod delivery;
mod demo;
mod deploy;
mod designs;
mod disks;
mod durability;
mod endpoints;
mod exceed;
mod expectations;
mod faults;
mod files;
mod forwarding;
mod http2;
mod identity;
mod keys;
mod layer;
mod leaks;
mod ledger;
mod limits;
mod logs;
mod loom;
mod model;
mod nginx;
mod operators;
mod outcomes;
mod paths;
mod policies;
mod raw;
mod reload;
mod resumes;
mod sessions;
mod slow;
mod support;
mod table;
mod trailers;
mod upgrades;
mod upstreams;
mod windows;
