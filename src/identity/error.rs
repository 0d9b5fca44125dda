//! Why a token is not accepted.

/// Why a token is not accepted. The text is what the client is told as `error_description` (RFC 6750, section 3).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No `Authorization` field.
    #[error("no access token was sent")]
    Missing,
    /// More than one.
    #[error("more than one Authorization field was sent")]
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
    /// No key for this `kid` and `alg`.
    #[error("the token's key is not known")]
    UnknownKey,
    /// Not signed by the key it names.
    #[error("the token's signature is wrong")]
    Signature,
    /// A required claim is not there.
    #[error("the token has no \"{0}\" claim")]
    ClaimMissing(&'static str),
    /// A claim has a type that it must not have.
    #[error("the token's \"{0}\" claim has the wrong type")]
    ClaimType(&'static str),
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
