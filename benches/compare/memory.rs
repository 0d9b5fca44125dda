//! What a user costs in memory.
//!
//! Each contender first serves so many users that what it keeps of connections and tokens is as large as it gets. Then others come, and the
//! growth is divided by them. Each of these comes again until it is refused, when all others have been there: so all of them are held, or it
//! fails.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use comfy_table::CellAlignment;
use comfy_table::presets::ASCII_MARKDOWN;
use hyper::Uri;

use crate::backend::Answers;
use crate::contenders::Kind;
use crate::driver::{Driver, Load};
use crate::gate::FREE_LIMIT;
use crate::mix::{Mix, Requests};
use crate::peers::{Peer, Place};
use crate::report::mib;
use crate::tally::Expected;
use crate::token::Signed;
use crate::turns::Settings;

const IMAGE_BYTES: usize = 1 << 10;

const CONTENDERS: [Kind; 6] =
    [Kind::GatePeriodic, Kind::GateStrict, Kind::HaproxyJwt, Kind::NginxLua, Kind::NginxLuaRedis, Kind::EnvoyJwt];

/// How many users come.
pub(crate) struct Crowd {
    /// More than anybody keeps tokens of.
    pub(crate) before: u64,
    pub(crate) counted: u64,
    /// For so long everybody puts things away before it is looked at what they have.
    pub(crate) patience: Duration,
    pub(crate) connections: usize,
}

/// The table, of those that are not `left_out`.
pub(crate) fn table(crowd: &Crowd, settings: &Settings, left_out: impl Fn(Kind) -> bool) -> anyhow::Result<String> {
    let (_backend, upstream) = Answers { body_bytes: IMAGE_BYTES, delay_ms: 0, etag: false }.start()?;
    let Settings { cores, program, .. } = settings;
    let place = Place { cores, upstream, signed: Signed::Hs256, program };
    let (before, counted) = (asked("max", crowd.before), asked("free", crowd.counted));
    let mut table = comfy_table::Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(["contender", "bytes a user", "of Redis", "MiB in all"]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for kind in CONTENDERS.into_iter().filter(|kind| !left_out(*kind)) {
        eprintln!("memory: {} ...", kind.name());
        let row = runtime.block_on(row(kind, place, crowd, &before, &counted)).with_context(|| kind.name())?;
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let Crowd { before, counted, .. } = crowd;
    Ok(format!("Resident memory by user, of {counted} users who came after {before} others:\n\n{table}"))
}

fn asked(plan: &str, users: u64) -> Arc<Mix> {
    let path = Uri::from_static("/v1/designs/d-1/download");
    Arc::new(Mix::new(vec![Requests::get(vec![path], Signed::Hs256.authorizations(plan, users))], IMAGE_BYTES))
}

async fn row(
    kind: Kind,
    place: Place<'_>,
    crowd: &Crowd,
    before: &Arc<Mix>,
    counted: &Arc<Mix>,
) -> anyhow::Result<[String; 4]> {
    let peer = Peer::start(kind, place)?;
    let mut driver = Driver::connect(peer.address, crowd.connections).await?;
    driver.run(before, Load::Requests(crowd.before)).await?.check(&[Expected::Images])?;
    let (empty, empty_store) = settled(&peer, crowd.patience).await?;
    let tally = driver.run(counted, Load::Requests(crowd.counted * (FREE_LIMIT + 1))).await?;
    tally.check(&[Expected::ImagesEach(FREE_LIMIT)]).context("it does not hold all users")?;
    let (full, full_store) = settled(&peer, crowd.patience).await?;
    let a_user = |empty: u64, full: u64| format!("{:.0}", (full as f64 - empty as f64) / crowd.counted as f64);
    let store = if full_store > 0 { a_user(empty_store, full_store) } else { String::new() };
    Ok([kind.name().to_owned(), a_user(empty, full), store, format!("{:.0}", mib(full + full_store))])
}

/// What it has, and what it keeps its counts in, when it has put its things away.
async fn settled(peer: &Peer, patience: Duration) -> anyhow::Result<(u64, u64)> {
    tokio::time::sleep(patience).await;
    Ok((peer.memory()?.now, peer.store_memory()?.now))
}
