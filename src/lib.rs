//! x
#![allow(missing_docs)]
pub mod clock;
pub mod design;
pub mod gate;
pub mod identity;
pub mod ledger;
pub mod policy;
pub mod store;
