//! x
#![allow(missing_docs)]
pub mod admin;
pub mod cli;
pub mod clock;
pub mod config;
pub mod design;
pub mod gate;
pub mod identity;
pub mod ledger;
pub mod net;
pub mod policy;
pub mod proxy;
pub mod server;
pub mod store;
