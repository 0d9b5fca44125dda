//! Who is asking: from an access token to a [`Caller`] (counting rules, section 5).
//!
//! Identity comes only from a verified JWT (RFC 7519). The way of a token:
//!
//! 1. `bearer.rs` takes it out of the request: `Authorization`, or a cookie or query parameter that is configured.
//! 2. `cache.rs` knows tokens that were verified before, by half of their SHA-256; until they expire or the keys change.
//! 3. [`Verifier`] (`verifier.rs`) reads header and claims itself, strictly, and checks all that is cheap: structure, algorithm,
//!    issuer, audience, dates. Then it picks **one** key by `kid` and `alg` (`keys.rs`), and `jsonwebtoken` checks the signature
//!    under that key's algorithm and no other.
//! 4. `claims.rs` makes a caller of the claims. Of a token that is refused `verifier/compared.rs` tells operators what it says.
//!
//! Keys are configured, or published by a server (`remote.rs` fetches, `jwks.rs` lets in what is fit). The gate looks at tokens on
//! its own routes only; all others are the backends' business.

mod algorithm;
mod bearer;
mod cache;
mod claims;
mod common;
mod error;
mod jwks;
mod keys;
mod metrics;
mod remote;
mod verifier;

pub use algorithm::Algorithm;
pub use bearer::Places;
pub use claims::{Caller, ClaimPointers, Counted, Reading};
pub use error::TokenError;
pub use keys::{BadKey, Key, SignedBy};
pub use remote::{Location, Options as RemoteOptions};
pub use verifier::{Compared, Options, Verifier, short_type};
