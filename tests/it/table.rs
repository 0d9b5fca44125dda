//! The table of the counting rules (section 2), row by row, through the binary with the shipped configuration.

use crate::support::{Backend, DOWNLOAD, Gate, Reply, Setup, Token, get, post, request, stage};

const AI: &str = "ai-exports";
const PLAIN: &str = "exports";
const FAIR: &str = "fair-use";

/// A gate before a backend that answers images, and screen data where the app asks for its screen.
struct Stage {
    backend: Backend,
    gate: Gate,
}

impl Stage {
    fn set() -> Self {
        let (backend, gate) = stage(Reply::image());
        Self { backend, gate }
    }

    fn expect(&self, token: &Token, method: &str, what: &str, status: u16) {
        let answer = request(self.gate.address, method, &format!("/v1/designs/{what}"), &[&token.line()], b"");
        assert_eq!(answer.status, status, "{method} {what}: {}", String::from_utf8_lossy(&answer.body));
    }

    fn download(&self, token: &Token, status: u16) {
        self.expect(token, "GET", "d1/download", status);
    }

    fn used(&self, user: &str) -> [u64; 3] {
        [AI, PLAIN, FAIR].map(|meter| self.gate.used(user, meter))
    }
}

#[test]
fn web_each_ai_download_share_or_autosave_costs_one_ai_export() {
    let stage = Stage::set();
    let token = Token::of("u").plan("pro").ai();
    stage.download(&token, 200);
    stage.expect(&token, "POST", "d1/share", 200);
    stage.expect(&token, "POST", "d1/autosave", 200);
    assert_eq!(stage.used("u"), [3, 0, 0]);
}

#[test]
fn mobile_opening_the_export_screen_of_an_ai_design_costs_one_and_covers_what_is_exported_from_it() {
    for platform in ["ios", "android"] {
        let stage = Stage::set();
        let token = Token::of("u").ai().on(platform);
        stage.backend.will(Reply::json("200 OK"));
        stage.expect(&token, "POST", "d1/export-screen", 200);
        assert_eq!(stage.used("u"), [1, 0, 0]);
        stage.backend.will(Reply::image());
        stage.download(&token, 200);
        stage.expect(&token, "POST", "d1/share", 200);
        stage.expect(&token, "POST", "d1/autosave", 200);
        assert_eq!(stage.used("u"), [1, 0, 0], "{platform}");
    }
}

#[test]
fn mobile_ai_exports_without_an_open_session_cost_one_each() {
    let stage = Stage::set();
    let token = Token::of("u").ai().on("ios");
    stage.download(&token, 200);
    stage.expect(&token, "POST", "d1/share", 200);
    assert_eq!(stage.used("u"), [2, 0, 0]);
    stage.expect(&token, "POST", "d1/autosave", 429);
}

#[test]
fn mobile_opening_the_export_screen_again_is_a_new_export() {
    let stage = Stage::set();
    let token = Token::of("u").ai().on("ios");
    stage.backend.will(Reply::json("200 OK"));
    stage.expect(&token, "POST", "d1/export-screen", 200);
    stage.expect(&token, "POST", "d1/export-screen", 200);
    assert_eq!(stage.used("u"), [2, 0, 0]);
    stage.expect(&token, "POST", "d1/export-screen", 429);
}

#[test]
fn mobile_opening_the_export_screen_again_with_the_same_idempotency_key_is_a_retry() {
    let stage = Stage::set();
    let token = Token::of("u").ai().on("ios");
    stage.backend.will(Reply::json("200 OK"));
    for _ in 0..3 {
        let lines = [token.line(), "idempotency-key: k1".into()];
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        assert_eq!(post(stage.gate.address, "/v1/designs/d1/export-screen", &lines).status, 200);
    }
    assert_eq!(stage.used("u"), [1, 0, 0]);
}

#[test]
fn free_each_plain_download_share_or_autosave_costs_one_export_on_every_platform() {
    for platform in ["web", "ios", "android", "other"] {
        let stage = Stage::set();
        let token = Token::of("u").on(platform);
        stage.download(&token, 200);
        stage.expect(&token, "POST", "d1/share", 200);
        stage.expect(&token, "POST", "d1/autosave", 200);
        assert_eq!(stage.used("u"), [0, 3, 0], "{platform}");
    }
}

#[test]
fn free_mobile_opening_a_screen_of_a_plain_design_costs_nothing_and_the_autosave_that_follows_counts() {
    let stage = Stage::set();
    let token = Token::of("u").on("ios");
    stage.backend.will(Reply::json("200 OK"));
    stage.expect(&token, "POST", "d1/export-screen", 200);
    assert_eq!(stage.used("u"), [0, 0, 0]);
    stage.backend.will(Reply::image());
    stage.expect(&token, "POST", "d1/autosave", 200);
    assert_eq!(stage.used("u"), [0, 1, 0]);
}

#[test]
fn free_mobile_opening_a_screen_that_delivers_the_plain_file_is_the_autosave_and_costs_one_export() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).replacing("delivers = \"screen\"", "delivers = \"file\"").start();
    let stage = Stage { backend, gate };
    stage.expect(&Token::of("u").on("ios"), "POST", "d1/export-screen", 200);
    assert_eq!(stage.used("u"), [0, 1, 0]);
}

#[test]
fn web_opening_an_export_screen_costs_nothing_unless_it_delivers_a_file_and_opens_no_session() {
    let stage = Stage::set();
    let token = Token::of("u").ai();
    stage.backend.will(Reply::json("200 OK"));
    stage.expect(&token, "POST", "d1/export-screen", 200);
    assert_eq!(stage.used("u"), [0, 0, 0]);
    stage.backend.will(Reply::image());
    stage.download(&token, 200);
    assert_eq!(stage.used("u"), [1, 0, 0]);
}

#[test]
fn pro_and_max_plain_exports_are_unlimited_and_observed_for_fair_use() {
    for plan in ["pro", "max"] {
        let stage = Stage::set();
        let token = Token::of("u").plan(plan);
        for _ in 0..3 {
            stage.download(&token, 200);
        }
        assert_eq!(stage.used("u"), [0, 0, 3], "{plan}");
    }
}

#[test]
fn fair_use_observes_beyond_its_limit_and_refuses_nobody() {
    let backend = Backend::start(Reply::image());
    let gate = Setup::before(backend.address).set("EXPORT_GATE__METERS__FAIR_USE__LIMITS__PRO", "2").start();
    let stage = Stage { backend, gate };
    for _ in 0..4 {
        stage.download(&Token::of("u").plan("pro"), 200);
    }
    assert_eq!(stage.used("u"), [0, 0, 4]);
}

#[test]
fn saving_sharing_a_link_and_viewing_cost_nothing_and_need_no_token() {
    let stage = Stage::set();
    stage.backend.will(Reply::json("200 OK"));
    let token = Token::of("u").ai();
    for (method, what) in [("PUT", "d1"), ("POST", "d1/link"), ("GET", "d1/preview"), ("DELETE", "d1/export-screen")] {
        stage.expect(&token, method, what, 200);
        let bare = request(stage.gate.address, method, &format!("/v1/designs/{what}"), &[], b"");
        assert_eq!(bare.status, 200, "{method} {what} without a token");
    }
    assert_eq!(stage.used("u"), [0, 0, 0]);
    assert_eq!(stage.backend.seen().len(), 8);
}

#[test]
fn ai_exports_count_on_their_own_meter_and_plain_ones_on_theirs() {
    let stage = Stage::set();
    let (ai, plain) = (Token::of("u").ai(), Token::of("u"));
    stage.download(&ai, 200);
    stage.download(&ai, 200);
    stage.download(&ai, 429);
    stage.download(&plain, 200);
    assert_eq!(stage.used("u"), [2, 1, 0]);
}

#[test]
fn changing_plan_changes_the_limit_not_the_count() {
    let stage = Stage::set();
    stage.download(&Token::of("u").ai(), 200);
    stage.download(&Token::of("u").ai(), 200);
    stage.download(&Token::of("u").ai(), 429);
    stage.download(&Token::of("u").ai().plan("pro"), 200);
    assert_eq!(stage.used("u"), [3, 0, 0]);
    let refused = get(stage.gate.address, DOWNLOAD, &[&Token::of("u").ai().line()]);
    assert_eq!(refused.json()["remaining"], 0, "never negative");
}
