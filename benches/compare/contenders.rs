//! Who is compared.

/// A contender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bare,
    GatePeriodic,
    /// The same as cargo builds it, where `--program` names another.
    GateByCargo,
    GateStrict,
    HaproxyPlain,
    HaproxyJwt,
    NginxPlain,
    NginxLua,
    NginxLuaRedis,
    EnvoyPlain,
    EnvoyJwt,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare hyper",
            Self::GatePeriodic => "export-gate, periodic",
            Self::GateByCargo => "the same by cargo build --release",
            Self::GateStrict => "export-gate, strict",
            Self::HaproxyPlain => "HAProxy, plain",
            Self::HaproxyJwt => "HAProxy, jwt_verify + stick table",
            Self::NginxPlain => "nginx, plain",
            Self::NginxLua => "nginx + Lua + shared dict",
            Self::NginxLuaRedis => "nginx + Lua + Redis",
            Self::EnvoyPlain => "Envoy, plain",
            Self::EnvoyJwt => "Envoy, jwt_authn + local_ratelimit",
        }
    }

    pub(crate) const fn is_ours(self) -> bool {
        matches!(self, Self::GatePeriodic | Self::GateByCargo | Self::GateStrict)
    }

    pub(crate) const fn is_envoy(self) -> bool {
        matches!(self, Self::EnvoyPlain | Self::EnvoyJwt)
    }

    /// Whether it verifies tokens and counts by user.
    pub(crate) const fn checks(self) -> bool {
        !matches!(self, Self::Bare | Self::HaproxyPlain | Self::NginxPlain | Self::EnvoyPlain)
    }
}
