//! Who is asking: from an access token to a [`Caller`] (counting rules, section 5).
//!
//! Identity comes only from a verified JWT (RFC 7519). The [`Verifier`] reads the header itself and picks **one** key by `kid` and
//! `alg`; `jsonwebtoken` checks the signature under that key's algorithm and no other; then the claims are checked against the
//! caller's clock, all of them required. The gate looks at tokens on its own routes only; all others are the backends' business.

mod claims;
mod error;
mod verifier;

pub use claims::{Caller, ClaimPointers};
pub use error::TokenError;
pub use verifier::{Algorithm, BadKey, Key, KeyMaterial, Options, Verifier, bearer_token};
