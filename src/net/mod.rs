//! Outbound HTTP connections, by TLS or not, kept and used again.
//!
//! A [`Pool`] belongs to one endpoint. A connection of HTTP/1.1 is lent to one exchange at a time and comes back when the answer's body
//! has been read to its end; one that was dropped midway is closed. The simplest exchanges, which most are, write and read it by themselves
//! (`direct.rs`); all else is hyper's. One of HTTP/2 carries many exchanges. [`Documents`] fetches small things over such a pool.

mod acknowledging;
mod bell;
mod body;
mod direct;
mod documents;
mod gather;
mod http1;
mod http2;
mod last_words;
mod patience;
mod pool;
mod replay;
mod resolve;
mod seldom;
mod tls;
mod url;

pub use body::{BodyError, PooledBody, RequestBody, Sending};
pub use documents::{Documents, FetchError, Options as DocumentOptions};
pub(crate) use gather::write_pieces;
pub use patience::from_now;
pub use pool::{Late, Options, Pool, Protocol, SendError};
pub(crate) use seldom::{Calls, Seldom};
pub use tls::{BadRoots, Trust};
pub use url::{BadUrl, Origin, Url};
