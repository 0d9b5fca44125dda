//! The contenders: how each is started.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tempfile::TempDir;

use crate::child::{self, Child};
use crate::contenders::Kind;
use crate::cores::Cores;
use crate::gate::{self, Durability, FREE_LIMIT, Gate, Setup, free_addresses};
use crate::install;
use crate::token::{self, Signed};
use crate::usage::{Memory, Times};

/// Where a contender is started, and in front of what.
#[derive(Clone, Copy)]
pub(crate) struct Place<'p> {
    pub(crate) cores: &'p Cores,
    pub(crate) upstream: SocketAddr,
    pub(crate) signed: Signed,
    /// The gate.
    pub(crate) program: &'p Path,
}

/// A running contender.
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    // Before the folder: fields are dropped in order, and the processes must be gone when their files go.
    serving: Serving,
    /// What it keeps its counts in, if that is a process of its own.
    store: Option<Redis>,
    _folder: Option<TempDir>,
}

enum Serving {
    Gate(Gate),
    Other(Child),
}

impl Peer {
    pub(crate) fn start(kind: Kind, place: Place<'_>) -> anyhow::Result<Self> {
        match kind {
            Kind::Bare => Self::bare(place),
            Kind::GatePeriodic => Self::gate(Durability::Periodic, place),
            Kind::GateByCargo => Self::gate(Durability::Periodic, Place { program: Path::new(gate::PROGRAM), ..place }),
            Kind::GateStrict => Self::gate(Durability::Strict, place),
            Kind::HaproxyPlain => Self::haproxy(include_str!("peers/haproxy-plain.cfg"), place),
            Kind::HaproxyJwt => Self::haproxy(include_str!("peers/haproxy-jwt.cfg"), place),
            Kind::NginxPlain => Self::nginx(include_str!("peers/nginx-plain.conf"), None, place),
            Kind::NginxLua => Self::nginx(include_str!("peers/nginx-lua.conf"), None, place),
            Kind::NginxLuaRedis => Self::nginx(include_str!("peers/nginx-lua.conf"), Some(Redis::start()?), place),
            Kind::EnvoyPlain => Self::envoy(include_str!("peers/envoy-plain.yaml"), place),
            Kind::EnvoyJwt => Self::envoy(include_str!("peers/envoy-jwt.yaml"), place),
        }
    }

    fn bare(place: Place<'_>) -> anyhow::Result<Self> {
        let upstream = place.upstream.to_string();
        let (child, address) =
            place.cores.start_proxy(|| Child::start_part(&["bare-proxy", "--upstream", &upstream]))?;
        Ok(Self { address, serving: Serving::Other(child), store: None, _folder: None })
    }

    fn gate(durability: Durability, place: Place<'_>) -> anyhow::Result<Self> {
        let program = place.program.to_owned();
        let setup = Setup { program, durability, workers: 1, signed: place.signed, records: false };
        let gate = place.cores.start_proxy(|| Gate::start(place.upstream, &setup))?;
        Ok(Self { address: gate.address, serving: Serving::Gate(gate), store: None, _folder: None })
    }

    fn haproxy(template: &str, place: Place<'_>) -> anyhow::Result<Self> {
        let desk = Desk::new(place)?;
        let mut command = child::foreign(install::HAPROXY);
        command.args(["-db", "-f"]).arg(desk.write("haproxy.cfg", template)?);
        desk.start(command, None)
    }

    fn nginx(template: &str, redis: Option<Redis>, place: Place<'_>) -> anyhow::Result<Self> {
        let mut desk = Desk::new(place)?;
        let port = redis.as_ref().map_or("nil".to_owned(), |redis| redis.port.to_string());
        desk.values.extend([("@REDIS@", port), ("@WEEK_STARTS@", half_a_week_ago().to_string())]);
        desk.write("count.lua", include_str!("peers/count.lua"))?;
        let mut command = child::foreign(install::NGINX);
        command.arg("-c").arg(desk.write("nginx.conf", template)?);
        desk.start(command, redis)
    }

    fn envoy(template: &str, place: Place<'_>) -> anyhow::Result<Self> {
        let mut desk = Desk::new(place)?;
        desk.values.push(("@JWKS@", jwks(place.signed)?));
        let mut command = child::foreign(install::envoy().context("Envoy is not installed")?);
        command.args(["--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id", "-c"]);
        command.arg(desk.write("envoy.yaml", template)?);
        desk.start(command, None)
    }

    /// CPU time so far of what serves, with all it has started.
    pub(crate) fn times(&self) -> anyhow::Result<Times> {
        Times::of(self.pid())
    }

    /// The same of what it keeps its counts in.
    pub(crate) fn store_times(&self) -> anyhow::Result<Times> {
        self.store.as_ref().map_or(Ok(Times::default()), |store| Times::of(store.process.pid()))
    }

    pub(crate) fn memory(&self) -> anyhow::Result<Memory> {
        Memory::of(self.pid())
    }

    pub(crate) fn store_memory(&self) -> anyhow::Result<Memory> {
        self.store.as_ref().map_or(Ok(Memory::default()), |store| Memory::of(store.process.pid()))
    }

    /// How many groups of charges the gate has written to its ledger.
    pub(crate) fn groups(&self) -> anyhow::Result<Option<u64>> {
        match &self.serving {
            Serving::Gate(gate) => gate.groups().map(Some),
            Serving::Other(_) => Ok(None),
        }
    }

    /// The gate, if it is one.
    pub(crate) fn into_gate(self) -> Option<Gate> {
        match self.serving {
            Serving::Gate(gate) => Some(gate),
            Serving::Other(_) => None,
        }
    }

    fn pid(&self) -> u32 {
        match &self.serving {
            Serving::Gate(gate) => gate.pid(),
            Serving::Other(child) => child.pid(),
        }
    }
}

/// Redis as those run it who count on its counts: what it forgets at a crash is what the gate may with `periodic`.
struct Redis {
    process: Child,
    port: u16,
    _folder: TempDir,
}

impl Redis {
    /// Not on the proxies' cores.
    fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let [address, _] = free_addresses()?;
        let port = address.port();
        let mut command = child::foreign(install::REDIS);
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"]).arg(folder.path());
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]);
        let process = Child::start(command.stdout(Stdio::null())).context("cannot start Redis")?;
        wait_until_listening(&process, address).context("Redis")?;
        Ok(Self { process, port, _folder: folder })
    }
}

/// A folder for a peer's files, and what their templates are filled with.
struct Desk<'p> {
    place: Place<'p>,
    address: SocketAddr,
    folder: TempDir,
    values: Vec<(&'static str, String)>,
}

impl<'p> Desk<'p> {
    fn new(place: Place<'p>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let [address, _] = free_addresses()?;
        let (upstream, signed) = (place.upstream, place.signed);
        let key_file = public_key_file(signed);
        let key = key_file.as_ref().map_or(Ok(token::SECRET.to_owned()), fs::read_to_string)?;
        let values = vec![
            ("@PORT@", address.port().to_string()),
            ("@UPSTREAM@", upstream.to_string()),
            ("@UPSTREAM_HOST@", upstream.ip().to_string()),
            ("@UPSTREAM_PORT@", upstream.port().to_string()),
            ("@FOLDER@", folder.path().display().to_string()),
            ("@ALG@", signed.name().to_owned()),
            ("@KEY_OR_FILE@", key_file.map_or(key.clone(), |file| file.display().to_string())),
            ("@KEY@", key),
            ("@ISSUER@", token::ISSUER.to_owned()),
            ("@AUDIENCE@", token::AUDIENCE.to_owned()),
            ("@FREE_LIMIT@", FREE_LIMIT.to_string()),
        ];
        Ok(Self { place, address, folder, values })
    }

    fn write(&self, name: &str, template: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.path().join(name);
        let text = self.values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(name, value));
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Starts what was prepared, and waits until it listens.
    fn start(self, mut command: Command, store: Option<Redis>) -> anyhow::Result<Peer> {
        let said = self.folder.path().join("said");
        let output = File::create(&said)?;
        command.stdout(output.try_clone()?).stderr(output);
        let start = || Child::start(&mut command).with_context(|| format!("cannot start {command:?}"));
        let child = self.place.cores.start_proxy(start)?;
        wait_until_listening(&child, self.address)
            .with_context(|| format!("it said: {}", fs::read_to_string(&said).unwrap_or_default()))?;
        Ok(Peer { address: self.address, serving: Serving::Other(child), store, _folder: Some(self.folder) })
    }
}

/// `None` for a secret.
fn public_key_file(signed: Signed) -> Option<PathBuf> {
    let name = match signed {
        Signed::Hs256 => return None,
        Signed::Rs256 => "rsa",
        Signed::Es256 => "p256",
    };
    Some(PathBuf::from(format!("{}/tests/fixtures/keys/{name}.public.pem", env!("CARGO_MANIFEST_DIR"))))
}

/// The key set that Envoy reads.
fn jwks(signed: Signed) -> anyhow::Result<String> {
    const PUBLIC: &str = include_str!("../../tests/fixtures/keys/public.jwk.json");
    let mut key = match signed {
        Signed::Hs256 => serde_json::json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode(token::SECRET) }),
        Signed::Rs256 | Signed::Es256 => serde_json::from_str::<serde_json::Value>(PUBLIC)?[signed.name()].clone(),
    };
    key["kid"] = token::KEY_ID.into();
    key["alg"] = signed.name().into();
    Ok(serde_json::json!({ "keys": [key] }).to_string())
}

/// Where weeks begin, in seconds: so that none ends under way and gives quota back.
fn half_a_week_ago() -> u64 {
    const HALF: u64 = 7 * 24 * 60 * 60 / 2;
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970").as_secs() - HALF
}

fn wait_until_listening(child: &Child, address: SocketAddr) -> anyhow::Result<()> {
    const PAUSE: Duration = Duration::from_millis(20);
    const ATTEMPTS: u32 = 500;
    for _ in 0..ATTEMPTS {
        child.ensure_alive()?;
        if TcpStream::connect(address).is_ok() {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    anyhow::bail!("it does not listen")
}
