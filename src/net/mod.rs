//! Outbound HTTP/1.1 connections, kept and used again.
//!
//! A [`Pool`] belongs to one endpoint. A connection is lent to one exchange at a time and comes back when the answer's body has
//! been read to its end; one that was dropped midway is closed.

mod body;
mod pool;

pub use body::{PooledBody, RequestBody};
pub use pool::{Options, Pool, SendError};
