//! What the configuration does not know of, and may be uncounted, or counted as something else, for it: files that no route counts, or
//! that leave in another way than their route says; plans. Each is logged once.

use std::collections::BTreeSet;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode};
use http_body::Body;

use super::answers::Asker;
use super::body::GateBody;
use super::delivery::{looks_like_an_export, tells_where};
use super::layer::{Gate, UnclassifiedFiles};
use super::refusal::Refusal;
use crate::policy::Delivers;

/// How many of a kind are remembered; what comes after them is only counted.
const MOST_OF_A_KIND: usize = 256;
/// How much of a plan's name is written, in bytes.
const LONGEST_NAME: usize = 64;

/// What was reported of each kind of thing.
#[derive(Debug, Default)]
pub(super) struct Leaks {
    paths: Reported,
    redirects: Reported,
    statuses: Reported,
    screens: Reported,
    plans: Reported,
}

impl Leaks {
    /// Logs that a file has left, or was kept back, and what to add to the configuration, once for each pattern.
    pub(super) fn report(&self, method: &Method, path: &str, has_left: bool) {
        if self.paths.is_news(digest(path)) {
            let pattern = pattern(path);
            let add = advice(method, &pattern);
            if has_left {
                tracing::warn!(%method, pattern, add, "a file has left by a request that no route counts");
            } else {
                tracing::warn!(%method, pattern, add, "a file was kept back: no route counts such a request");
            }
        }
    }

    /// Logs that an export was answered by a redirect, where that is not counted, once for each route.
    pub(super) fn report_redirect(&self, route: &str) {
        if self.redirects.is_news(with(OFFSET_BASIS, route.as_bytes())) {
            tracing::warn!(
                route,
                "an export was answered by a redirect, and not counted: if that leads to the file, the route needs `delivers = \"redirect\"`"
            );
        }
    }

    /// Logs that an export was answered by a file with a status that is not counted, once for each route.
    pub(super) fn report_status(&self, route: &str, status: StatusCode) {
        if self.statuses.is_news(with(OFFSET_BASIS, route.as_bytes())) {
            let status = status.as_u16();
            tracing::warn!(
                route,
                status,
                "a file that a route of exports brings is not counted: files are answers of 200, 203 and 206; have the backend send it as 200"
            );
        }
    }

    /// Logs that the data of an export screen are a file, and nothing has charged it, once for each route.
    pub(super) fn report_screen(&self, route: &str) {
        if self.screens.is_news(with(OFFSET_BASIS, route.as_bytes())) {
            tracing::warn!(
                route,
                "an export screen was answered by a file, and not counted: if that is the export, the route needs `delivers = \"file\"`"
            );
        }
    }

    /// Logs that nobody knows a plan, and what its exports count as, once for each name.
    pub(super) fn report_plan(&self, name: &str, counts_as: &str) {
        let name = &name[..name.floor_char_boundary(LONGEST_NAME)];
        if self.plans.is_news(with(OFFSET_BASIS, name.as_bytes())) {
            tracing::warn!(
                plan = name,
                counts_as,
                "a token names a plan that is none of this gate's, nor in [identity.plans]"
            );
        }
    }
}

/// Digests of what was reported: most of it is known, and costs a look.
#[derive(Debug, Default)]
struct Reported(ArcSwap<BTreeSet<u64>>);

impl Reported {
    /// Whether it is reported for the first time.
    fn is_news(&self, digest: u64) -> bool {
        let is_known = |reported: &BTreeSet<u64>| reported.len() >= MOST_OF_A_KIND || reported.contains(&digest);
        if is_known(&self.0.load()) {
            return false;
        }
        // Of two that come at once, one sees that the other was before it.
        let before = self.0.rcu(|reported| {
            let mut reported = BTreeSet::clone(reported);
            reported.insert(digest);
            reported
        });
        !is_known(&before)
    }
}

impl Gate {
    /// Whether a file that nothing counts may not leave.
    pub(super) fn keeps_back_files(&self) -> bool {
        let options = &self.parts.options;
        options.unclassified_files == UnclassifiedFiles::Refuse && !options.shadow
    }
}

/// A request that matches no route, or is none that its export's route counts, until its answer says whether it carries a file.
pub(super) struct Unclassified {
    gate: Arc<Gate>,
    method: Method,
    target: Option<PathAndQuery>,
    /// How its route hands files out, if it has one.
    delivers: Option<Delivers>,
    /// Who would be refused a file; nobody is where it may leave.
    refused: Option<Asker>,
}

impl Unclassified {
    pub(super) fn of<B>(gate: &Arc<Gate>, request: &Request<B>, delivers: Option<Delivers>) -> Self {
        let refused = gate.keeps_back_files().then(|| Asker::of(request.method(), request.headers()));
        Self {
            gate: gate.clone(),
            method: request.method().clone(),
            target: request.uri().path_and_query().cloned(),
            delivers,
            refused,
        }
    }

    /// Reports a file, and keeps it back if that is wanted.
    pub(super) fn look_at<R: Body>(self, answer: Response<R>) -> Response<GateBody<R>> {
        let (head, body) = answer.into_parts();
        let hands_out =
            looks_like_an_export(&head, body.is_end_stream()) || self.delivers.is_some_and(|by| tells_where(by, &head));
        if self.method == Method::HEAD || !hands_out {
            return Response::from_parts(head, GateBody::forwarded(body));
        }
        self.gate.metrics.unclassified_files.inc();
        let path = self.target.as_ref().map_or("/", PathAndQuery::path);
        self.gate.leaks.report(&self.method, path, self.refused.is_none());
        match self.refused {
            Some(asker) => self.gate.refuse(Refusal::Unclassified, &asker).map(GateBody::own),
            None => Response::from_parts(head, GateBody::forwarded(body)),
        }
    }
}

/// What to write into the configuration.
fn advice(method: &Method, pattern: &str) -> String {
    if *method == Method::OPTIONS {
        return "have the backend answer OPTIONS without a file: nothing can count it".to_owned();
    }
    let words = pattern.split('/').filter(|segment| !segment.is_empty() && !segment.starts_with('{'));
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name = words.map(|word| word.chars().map(plain).collect::<String>()).collect::<Vec<_>>().join("-");
    let name = if name.is_empty() { "files".to_owned() } else { name };
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let (name, method, path) = (quoted(&name), quoted(method.as_str()), quoted(pattern));
    let design = match pattern.contains("{design}") {
        true => "",
        false => "design = { query = \"design\" } # or { header = ... }: what says which design it is\n",
    };
    format!(
        "[[routes]]\nname = {name}\nmethods = [{method}]\npath = {path}\n\
         action = \"download\" # or \"view\" if it stays inside the product\n{design}"
    )
}

/// What the digest of nothing is (FNV-1a).
const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// The digest of more.
fn with(digest: u64, bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(digest, |digest, byte| (digest ^ u64::from(*byte)).wrapping_mul(PRIME))
}

/// The digest of a path's pattern: each file on such a path is looked up by it.
fn digest(path: &str) -> u64 {
    parts(path).fold(OFFSET_BASIS, |digest, part| {
        let part: &[u8] = match part {
            Part::Word(word) => word,
            // No word has it.
            Part::Id => b"{",
        };
        with(with(digest, part), b"/")
    })
}

/// A piece of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'p> {
    Word(&'p [u8]),
    /// What looks like an id.
    Id,
}

/// By bytes: they are short, and a search for a character takes longer.
fn parts(path: &str) -> impl Iterator<Item = Part<'_>> {
    let looks_like_id = |segment: &[u8]| {
        segment.len() > 24 || segment.iter().any(|byte| matches!(byte, b'0'..=b'9' | b'{' | b'}' | b'%'))
    };
    // `v1` is a version.
    let is_version = |segment: &[u8]| {
        segment.strip_prefix(b"v").is_some_and(|rest| rest.len() <= 2 && rest.iter().all(u8::is_ascii_digit))
    };
    let part =
        move |segment| if looks_like_id(segment) && !is_version(segment) { Part::Id } else { Part::Word(segment) };
    path.as_bytes().split(|byte| *byte == b'/').map(part)
}

/// A path with parameters in place of what looks like an id; the last of them stands for the design.
fn pattern(path: &str) -> String {
    let last = parts(path).filter(|part| *part == Part::Id).count();
    let mut count = 0;
    let named = parts(path).map(|part| match part {
        Part::Word(word) => String::from_utf8_lossy(word).into_owned(),
        Part::Id => {
            count += 1;
            if count == last { "{design}".to_owned() } else { format!("{{id{count}}}") }
        }
    });
    named.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Pattern;

    #[test]
    fn ids_in_a_path_become_parameters() {
        let cases = [
            ("/v1/designs/d1/thumb.png", "/v1/designs/{design}/thumb.png"),
            ("/teams/42/files/9f8e7d", "/teams/{id1}/files/{design}"),
            ("/about", "/about"),
            ("/f/a%20b", "/f/{design}"),
            ("/", "/"),
        ];
        for (path, expected) in cases {
            assert_eq!(pattern(path), expected);
            assert!(Pattern::parse(expected).is_ok());
        }
    }

    #[test]
    fn paths_of_one_pattern_have_one_digest_and_others_another() {
        assert_eq!(digest("/v1/designs/d1/thumb.png"), digest("/v1/designs/0f8e%20/thumb.png"));
        let patterns =
            ["/", "/a", "/a/", "/a/b", "/ab", "/a/1", "/1/a", "/v1/a", "/v2/a", "/a/1/b", "/a/b/1", "/\u{e9}"];
        let digests: BTreeSet<u64> = patterns.into_iter().map(digest).collect();
        assert_eq!(digests.len(), patterns.len());
    }

    #[test]
    fn the_advice_is_what_the_configuration_takes() {
        for (pattern, names_design) in [("/files/{design}", true), ("/poster.png", false)] {
            let advice: toml::Table = advice(&Method::GET, pattern).parse().unwrap_or_default();
            let route = &advice["routes"][0];
            assert_eq!(route["path"].as_str(), Some(pattern));
            assert_eq!(route.get("design").is_none(), names_design, "{route}");
        }
    }

    #[test]
    fn a_pattern_is_reported_once_and_so_many_are_remembered() {
        let leaks = Leaks::default();
        for index in 0..2 * MOST_OF_A_KIND {
            leaks.report(&Method::GET, &format!("/{}/1", "a".repeat(1 + index % 20)), true);
            leaks.report(
                &Method::GET,
                &format!("/{}/1", char::from(b'a' + (index % 26) as u8).to_string().repeat(index % 24)),
                true,
            );
        }
        assert!(leaks.paths.0.load().len() <= MOST_OF_A_KIND);
    }
}
