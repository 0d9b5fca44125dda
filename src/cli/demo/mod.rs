//! `export-gate demo`: a renderer, the gate and a guided tour, all in this process.

mod guide;
mod painter;
mod renderer;
mod tour;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::serve::EndSignals;
use super::{Failure, block_on};
use crate::clock::SystemClock;
use crate::config::{self, Config};
use crate::ledger::LastFlushFailed;
use crate::server::Server;
use guide::Guide;

const CONFIG: &str = include_str!("../../../config/demo.toml");

/// Signs the demo's tokens. It guards nothing.
const SECRET: &str = "this secret guards nothing but a demo";

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// End after the tour.
    #[arg(long)]
    once: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let folder = Folder::make()?;
    block_on(async {
        let stage = Stage::set(folder.path.clone(), arguments.once).await?;
        let guide = Guide::new();
        let mut signals = EndSignals::listen()?;
        let (stage, gate) = tokio::select! {
            walked = tour::walk(stage, &guide) => walked?,
            () = signals.next() => return Ok(()),
        };
        if !arguments.once {
            guide.leave_running(&gate, &stage.config()?)?;
            signals.next().await;
        }
        gate.end().await
    })?
}

/// A temporary folder, gone with the demo.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn make() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("export-gate-demo-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            anstream::eprintln!("{} is left behind: {error}", self.path.display());
        }
    }
}

/// What stays while the gate comes and goes: the folder with its ledger, the renderer, the addresses.
struct Stage {
    folder: PathBuf,
    renderer: SocketAddr,
    /// Addresses of the gate; port 0 for any.
    listen: [String; 2],
}

impl Stage {
    /// Starts the renderer, and picks addresses: those of the configuration if they are free, else any.
    async fn set(folder: PathBuf, any_port: bool) -> Result<Self, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let renderer = listener.local_addr()?;
        // Ends with the process; the tour has nothing to wait for in it.
        tokio::spawn(renderer::serve(listener));
        let free = async |address: &str| !any_port && TcpListener::bind(address).await.is_ok();
        let pick = async |address: &str| if free(address).await { address } else { "127.0.0.1:0" }.to_owned();
        let listen = [pick("127.0.0.1:8080").await, pick("127.0.0.1:9901").await];
        Ok(Self { folder, renderer, listen })
    }

    fn config(&self) -> Result<Config, Failure> {
        let [listen, admin] = &self.listen;
        let environment = BTreeMap::from([
            ("EXPORT_GATE_DEMO_SECRET".to_owned(), SECRET.to_owned()),
            ("EXPORT_GATE__SERVER__LISTEN".to_owned(), listen.clone()),
            ("EXPORT_GATE__ADMIN__LISTEN".to_owned(), admin.clone()),
            ("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS".to_owned(), format!("[\"http://{}\"]", self.renderer)),
        ]);
        Ok(config::parse("config/demo.toml", CONFIG, &self.folder, &environment)?)
    }

    async fn start_gate(&self) -> Result<Gate, Failure> {
        let server = Server::bind(self.config()?, Arc::new(SystemClock::new()), Registry::default())?;
        let (address, admin) = (server.address()?, server.admin_address()?);
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone().drop_guard();
        let ended = tokio::spawn(server.run(shutdown, CancellationToken::new(), None));
        Ok(Gate { address, admin, stop, ended })
    }
}

/// A gate that serves, in this process.
struct Gate {
    address: SocketAddr,
    admin: SocketAddr,
    stop: DropGuard,
    ended: JoinHandle<Result<(), LastFlushFailed>>,
}

impl Gate {
    /// Ends it as SIGTERM would: requests under way may end, then the ledger is flushed.
    async fn end(self) -> Result<(), Failure> {
        drop(self.stop);
        let ended = self.ended.await.map_err(|died| Failure::Other(format!("the gate died: {died}")))?;
        Ok(ended?)
    }
}

/// Where a picture of the tour is kept while the demo runs.
fn picture_path(folder: &Path) -> PathBuf {
    folder.join("poster.png")
}
