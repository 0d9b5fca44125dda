//! Behaviour tests: the built binary and the Layer, through real sockets, a real store and hostile backends.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic is how a test fails")]
#![expect(
    clippy::disallowed_methods,
    reason = "the driver of a real process lives in real time; nothing asserts on it"
)]

mod answers;
mod architecture;
mod clocks;
mod configuration;
mod contention;
mod crash;
mod damage;
mod delivery;
mod demo;
mod deploy;
mod designs;
mod disks;
mod durability;
mod exceed;
mod faults;
mod forwarding;
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
mod policies;
mod resumes;
mod sessions;
mod support;
mod table;
mod windows;
