//! The contenders: how each is started.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tempfile::TempDir;

use crate::child::Child;
use crate::cpu;
use crate::gate::{Durability, FREE_LIMIT, Gate, Setup, free_addresses};
use crate::install;
use crate::token::{self, Signed};

/// Who is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bare,
    GatePeriodic,
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
            Self::GateStrict => "export-gate, strict",
            Self::HaproxyPlain => "HAProxy, plain",
            Self::HaproxyJwt => "HAProxy, jwt_verify + stick table",
            Self::NginxPlain => "nginx, plain",
            Self::NginxLua => "nginx + Lua + shared dict",
            Self::NginxLuaRedis => "nginx + Lua + Redis",
            Self::EnvoyPlain => "Envoy, plain",
            Self::EnvoyJwt => "Envoy, jwt_authn + local limit",
        }
    }

    pub(crate) const fn is_ours(self) -> bool {
        matches!(self, Self::GatePeriodic | Self::GateStrict)
    }

    /// Whether it verifies tokens.
    pub(crate) const fn checks(self) -> bool {
        !matches!(self, Self::Bare | Self::HaproxyPlain | Self::NginxPlain | Self::EnvoyPlain)
    }

    pub(crate) const fn counts_by_user(self) -> bool {
        self.checks() && !matches!(self, Self::EnvoyJwt)
    }
}

const PUBLIC_KEY: &str = include_str!("../../tests/fixtures/keys/rsa.public.pem");
const PUBLIC_JWKS: &str = include_str!("../../tests/fixtures/keys/public.jwk.json");

/// The key set that Envoy reads.
fn jwks(signed: Signed) -> anyhow::Result<String> {
    let mut key = match signed {
        Signed::Hs256 => serde_json::json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode(token::SECRET) }),
        _ => serde_json::from_str::<serde_json::Value>(PUBLIC_JWKS)?[signed.name()].clone(),
    };
    key["kid"] = token::KEY_ID.into();
    key["alg"] = signed.name().into();
    Ok(serde_json::json!({ "keys": [key] }).to_string())
}

/// A running contender.
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    serving: Serving,
    store: Option<Child>,
    _folder: TempDir,
}

enum Serving {
    Gate(Gate),
    Other(Child),
}

impl Peer {
    pub(crate) fn start(kind: Kind, upstream: SocketAddr, signed: Signed, is_used_up: bool) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let [address, store_address] = free_addresses()?;
        let peer = |serving| Self { address, serving, store: None, _folder: tempfile::tempdir().expect("a folder") };
        let durability = match kind {
            Kind::Bare => {
                let (child, address) = Child::start_part(&["bare-proxy", "--upstream", &upstream.to_string()])?;
                return Ok(Self { address, ..peer(Serving::Other(child)) });
            }
            Kind::GatePeriodic => Some(Durability::Periodic),
            Kind::GateStrict => Some(Durability::Strict),
            _ => None,
        };
        let key_file = folder.path().join("key.pem");
        std::fs::write(&key_file, PUBLIC_KEY)?;
        if let Some(durability) = durability {
            let gate = Gate::start(upstream, &Setup { durability, workers: 1, signed, records: false })?;
            return Ok(Self { address: gate.address, ..peer(Serving::Gate(gate)) });
        }
        let store = match kind {
            Kind::NginxLuaRedis => {
                let port = store_address.port().to_string();
                let mut redis = Command::new("redis-server");
                redis.args(["--port", &port, "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]);
                let redis = Child::start(redis.stdout(Stdio::null()))?;
                wait_for(store_address)?;
                Some(redis)
            }
            _ => None,
        };
        let redis = store.as_ref().map_or("nil".to_owned(), |_| store_address.port().to_string());
        let key = match (kind, signed) {
            (_, Signed::Hs256) => token::SECRET.to_owned(),
            (Kind::HaproxyJwt, _) => key_file.display().to_string(),
            _ => PUBLIC_KEY.to_owned(),
        };
        let fill = |template: &str| {
            let values = [
                ("@PORT@", address.port().to_string()),
                ("@UPSTREAM@", upstream.to_string()),
                ("@UPSTREAM_HOST@", upstream.ip().to_string()),
                ("@UPSTREAM_PORT@", upstream.port().to_string()),
                ("@FOLDER@", folder.path().display().to_string()),
                ("@ALG@", signed.name().to_owned()),
                ("@KEY@", key.clone()),
                ("@JWKS@", jwks(signed).unwrap_or_default()),
                ("@ISSUER@", token::ISSUER.to_owned()),
                ("@AUDIENCE@", token::AUDIENCE.to_owned()),
                ("@FREE_LIMIT@", FREE_LIMIT.to_string()),
                ("@REDIS@", redis.clone()),
                ("@BUCKET@", if is_used_up { "1" } else { "4000000000" }.to_owned()),
            ];
            values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(name, value))
        };
        let written = |name: &str, template: &str| -> anyhow::Result<PathBuf> {
            let path = folder.path().join(name);
            std::fs::write(&path, fill(template))?;
            Ok(path)
        };
        let mut command = match kind {
            Kind::HaproxyPlain => haproxy(&written("haproxy.cfg", include_str!("peers/haproxy-plain.cfg"))?),
            Kind::HaproxyJwt => haproxy(&written("haproxy.cfg", include_str!("peers/haproxy-jwt.cfg"))?),
            Kind::NginxPlain => nginx(&written("nginx.conf", include_str!("peers/nginx-plain.conf"))?),
            Kind::NginxLua | Kind::NginxLuaRedis => {
                written("count.lua", include_str!("peers/count.lua"))?;
                nginx(&written("nginx.conf", include_str!("peers/nginx-lua.conf"))?)
            }
            Kind::EnvoyPlain => envoy(&written("envoy.yaml", include_str!("peers/envoy-plain.yaml"))?)?,
            Kind::EnvoyJwt => envoy(&written("envoy.yaml", include_str!("peers/envoy-jwt.yaml"))?)?,
            Kind::Bare | Kind::GatePeriodic | Kind::GateStrict => unreachable!("started above"),
        };
        let said = std::fs::File::create(folder.path().join("said"))?;
        command.stdout(said.try_clone()?).stderr(said);
        let child = Child::start(&mut command).with_context(|| format!("cannot start {command:?}"))?;
        if wait_for(address).is_err() {
            let said = std::fs::read_to_string(folder.path().join("said")).unwrap_or_default();
            anyhow::bail!("it does not listen: {said}");
        }
        Ok(Self { address, serving: Serving::Other(child), store, _folder: folder })
    }

    fn pid(&self) -> u32 {
        match &self.serving {
            Serving::Gate(gate) => gate.pid(),
            Serving::Other(child) => child.pid(),
        }
    }

    /// What serves, with all it has started, and what it keeps its counts in.
    pub(crate) fn processes(&self) -> anyhow::Result<Processes> {
        Ok(Processes { serving: tree(self.pid())?, store: self.store.iter().map(Child::pid).collect() })
    }

    /// The most memory that any of its processes has taken, in bytes.
    pub(crate) fn peak_memory(&self) -> anyhow::Result<u64> {
        let peaks = tree(self.pid())?.into_iter().map(cpu::peak_memory).collect::<Result<Vec<_>, _>>()?;
        Ok(peaks.into_iter().max().unwrap_or(0))
    }
}

pub(crate) struct Processes {
    serving: Vec<u32>,
    store: Vec<u32>,
}

impl Processes {
    pub(crate) fn map<T>(self, with: impl FnOnce(Vec<u32>, Vec<u32>) -> T) -> T {
        with(self.serving, self.store)
    }
}

/// A process and all that descend from it.
fn tree(root: u32) -> anyhow::Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // It may have ended since.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut tree = vec![root];
    let mut at = 0;
    while at < tree.len() {
        let above = tree[at];
        tree.extend(parents.iter().filter(|(_, parent)| *parent == above).map(|(pid, _)| *pid));
        at += 1;
    }
    Ok(tree)
}

fn haproxy(config: &Path) -> Command {
    let mut command = Command::new(install::HAPROXY);
    command.args(["-db", "-f"]).arg(config);
    command
}

fn nginx(config: &Path) -> Command {
    let mut command = Command::new(install::NGINX);
    command.arg("-c").arg(config);
    command
}

fn envoy(config: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(install::envoy().context("Envoy is not installed")?);
    command.args(["--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id", "-c"]).arg(config);
    Ok(command)
}

fn wait_for(address: SocketAddr) -> anyhow::Result<()> {
    for _ in 0..500 {
        if TcpStream::connect(address).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    anyhow::bail!("nobody listens on {address}")
}
