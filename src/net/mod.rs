//! Outbound HTTP/1.1 connections, by TLS or not, kept and used again.
//!
//! A [`Pool`] belongs to one endpoint. A connection is lent to one exchange at a time and comes back when the answer's body has
//! been read to its end; one that was dropped midway is closed. [`Documents`] fetches small things over such a pool.

mod body;
mod documents;
mod pool;
mod resolve;
mod tls;
mod url;

pub use body::{PooledBody, RequestBody};
pub use documents::{Documents, FetchError, Options as DocumentOptions};
pub use pool::{Options, Pool, SendError};
pub use tls::{BadRoots, Trust};
pub use url::{BadUrl, Origin, Url};
