//! Why a token is not accepted.

use std::sync::Arc;

/// Why a token is not accepted. The text is what the client is told as `error_description` (RFC 6750, section 3).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// None where one may be.
    #[error("no access token was sent")]
    Missing,
    /// More than one.
    #[error("more than one access token was sent")]
    Repeated,
    /// Another scheme, or no token in it.
    #[error("the Authorization field is not a Bearer token")]
    NotBearer,
    /// Longer than any token should be.
    #[error("the token is longer than 8192 bytes")]
    TooLong,
    /// Not three parts of base64url around JSON objects.
    #[error("the token is malformed")]
    Malformed,
    /// A header parameter that must be understood, and is not (RFC 7515, section 4.1.11).
    #[error("the token has critical header parameters that are not understood")]
    Critical,
    /// A header parameter that is of the wrong type, brings key material along, or changes how the rest is to be read.
    #[error("the token's header parameter \"{0}\" is not accepted")]
    Header(&'static str),
    /// A `typ` for something else (RFC 8725, section 3.11).
    #[error("the token is of another type")]
    Type,
    /// An algorithm that is not known, or not the named key's.
    #[error("the token's algorithm is not accepted")]
    Algorithm,
    /// No key for this `kid` and `alg`.
    #[error("the token's key is not known")]
    UnknownKey,
    /// Not signed by the key it names.
    #[error("the token's signature is wrong")]
    Signature,
    /// No key for this, and the server of the keys cannot be asked: it may be good.
    #[error("the keys that tokens are checked with cannot be had now")]
    KeysUnavailable,
    /// A claim name, or one of the header, is there twice (RFC 7519, section 4).
    #[error("the token has a name twice")]
    NameTwice,
    /// A required claim is not there.
    #[error("the token has no \"{0}\" claim")]
    ClaimMissing(&'static str),
    /// A claim has a type that it must not have.
    #[error("the token's \"{0}\" claim has the wrong type")]
    ClaimType(&'static str),
    /// What is at this JSON pointer, where a meter counts by it, has a type that it must not have.
    #[error("what the token has at {0} has the wrong type")]
    SubjectType(Arc<str>),
    /// Issued by someone else.
    #[error("the token is from another issuer")]
    Issuer,
    /// Issued for someone else.
    #[error("the token is for another audience")]
    Audience,
    /// `exp` is in the past.
    #[error("the token has expired")]
    Expired,
    /// `nbf` is in the future.
    #[error("the token is not valid yet")]
    NotYetValid,
}
