//! The story, step by step. Every answer is checked: a demo that shows something else than it says fails.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{AUTHORIZATION, HOST};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use serde_json::{Value, json};

use super::guide::Guide;
use super::{Gate, Stage, picture_path};
use crate::cli::{Failure, token, usage};
use crate::clock::{Clock, SystemClock};
use crate::config::Config;
use crate::net::{Options, Pool, RequestBody, Trust, Url};

/// A person of the story.
struct Person {
    name: &'static str,
    plan: &'static str,
    platform: &'static str,
    ai_features: &'static [&'static str],
}

const ANNA: Person = Person { name: "anna", plan: "free", platform: "web", ai_features: &["logo"] };
const BEN: Person = Person { name: "ben", plan: "free", platform: "ios", ai_features: &["sticker"] };
const CLEO: Person = Person { name: "cleo", plan: "pro", platform: "web", ai_features: &[] };

/// Walks through the story; returns with a gate that still serves.
pub(super) async fn walk(stage: Stage, guide: &Guide) -> Result<(Stage, Gate), Failure> {
    let gate = stage.start_gate().await?;
    let config = stage.config()?;
    let walker = Walker { gate: &gate, config: &config, guide };
    walker.until_ready().await?;

    guide.heading("1. Anna is on the free plan. Her design has an AI logo: two exports a week.");
    let picture =
        walker.ask(&ANNA, Method::GET, "poster/download", 200, "The image left: one export is charged.").await?;
    let path = picture_path(&stage.folder);
    std::fs::write(&path, &picture)?;
    guide.say(&format!("(The image: {}, while the demo runs)", path.display()));
    walker
        .ask(&ANNA, Method::GET, "poster/download", 200, "The second one, and a warning that it is the last.")
        .await?;
    walker.ask(&ANNA, Method::GET, "poster/download", 429, "Refused. The renderer never heard of it.").await?;

    guide.heading("2. Saving and sharing a link are no exports: the design stays inside the product.");
    walker.ask(&ANNA, Method::PUT, "poster", 200, "Never counted, never refused.").await?;
    walker.ask(&ANNA, Method::POST, "poster/link", 201, "The same.").await?;

    guide.heading("3. Ben is on a phone. Opening the export screen is one export, and covers what he does there.");
    walker.ask(&BEN, Method::POST, "story/export-screen", 200, "One export is charged; the screen is open.").await?;
    for _ in 0..3 {
        walker.ask(&BEN, Method::POST, "story/share", 200, "Covered by the open screen: nothing is charged.").await?;
    }
    walker.ask(&BEN, Method::DELETE, "story/export-screen", 200, "He leaves; the session ends.").await?;

    guide.heading("4. Cleo is on Pro, and her design has no AI: no limit.");
    for _ in 0..3 {
        walker
            .ask(&CLEO, Method::GET, "menu/download", 200, "Unlimited. Counted for fair use, which only observes.")
            .await?;
    }

    guide.heading("5. What everybody has used, as `export-gate usage` shows it.");
    let before = walker.usage_of_all().await?;

    guide.heading("6. The gate is stopped and started again. The counts are still there.");
    gate.end().await?;
    let gate = stage.start_gate().await?;
    let walker = Walker { gate: &gate, config: &config, guide };
    walker.until_ready().await?;
    let after = walker.usage_of_all().await?;
    if before != after {
        return Err(Failure::Other("the counts changed over the restart".into()));
    }
    walker.ask(&ANNA, Method::GET, "poster/download", 429, "Still refused.").await?;
    Ok((stage, gate))
}

struct Walker<'w> {
    gate: &'w Gate,
    config: &'w Config,
    guide: &'w Guide,
}

impl Walker<'_> {
    /// Sends a request as a person would, shows it with its answer, and returns the body.
    async fn ask(
        &self,
        person: &Person,
        method: Method,
        what: &str,
        expected: u16,
        why: &str,
    ) -> Result<Bytes, Failure> {
        let target = format!("/v1/designs/{what}");
        let shown = format!("{}, {} on {}: {method} {target}", person.name, person.plan, person.platform);
        let token = self.token(person)?;
        let (status, headers, body) = self.send(&self.gate.address.to_string(), method, &target, &token).await?;
        self.guide.exchange(&shown, status, &headers, &body, why);
        if status.as_u16() != expected {
            return Err(Failure::Other(format!("{shown}: the answer is {status}, not {expected}")));
        }
        Ok(body)
    }

    async fn usage_of_all(&self) -> Result<Vec<Value>, Failure> {
        let mut reports = Vec::new();
        for person in [ANNA, BEN, CLEO] {
            let report = usage::ask(&self.gate.admin.to_string(), person.name, &[("plan", person.plan)], None).await?;
            self.guide.say(&usage::show(&report));
            reports.push(report);
        }
        Ok(reports)
    }

    /// The gate answers at once; until its ledger is read it answers exports with 503.
    async fn until_ready(&self) -> Result<(), Failure> {
        for _ in 0..500 {
            let (status, ..) = self.send(&self.gate.admin.to_string(), Method::GET, "/readyz", "").await?;
            if status == StatusCode::OK {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        Err(Failure::Other("the gate does not become ready".into()))
    }

    fn token(&self, person: &Person) -> Result<String, Failure> {
        let claims = [
            ("/plan", json!(person.plan)),
            ("/platform", json!(person.platform)),
            ("/ai_features", json!(person.ai_features)),
        ];
        token::mint(&self.config.identity, person.name, claims, SystemClock::new().now().as_second(), 3600)
    }

    async fn send(
        &self,
        address: &str,
        method: Method,
        target: &str,
        token: &str,
    ) -> Result<(StatusCode, HeaderMap, Bytes), Failure> {
        let request = Request::builder().method(method).uri(target).header(HOST, address);
        let request = request.header(AUTHORIZATION, format!("Bearer {token}")).body(RequestBody::none());
        let request = request.map_err(|error| Failure::Other(error.to_string()))?;
        let url: Url =
            format!("http://{address}").parse().map_err(|_| Failure::Other(format!("{address} is no HOST:PORT")))?;
        let pool =
            Pool::<Empty<Bytes>>::new(url.origin(&Trust::default()), &Options::default(), Arc::new(SystemClock::new()));
        let (head, body) = pool.send(&mut Some(request)).await?.into_parts();
        let body = body.collect().await.map_err(|error| Failure::Other(error.to_string()))?.to_bytes();
        Ok((head.status, head.headers, body))
    }
}
