//! Configuration: what is shipped is right, and what is wrong is shown with file, line, column and the right spelling.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use export_gate::config;
use export_gate::ledger::{Durability, Options};
use export_gate::policy::{Anchored, Calendar, CalendarUnit, Period, Rolling, Window};
use jiff::civil::Weekday;
use jiff::tz::TimeZone;

use crate::support::{DOWNLOAD, SECRET, Setup, Token, shipped_config};

/// `check` on the shipped configuration with some text replaced: what it says on standard error.
fn complaint(old: &str, new: &str) -> String {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap()).replacing(old, new);
    let mut check = Command::new(env!("CARGO_BIN_EXE_export-gate"));
    check.arg("check").arg("--config").arg(setup.config()).env("EXPORT_GATE_JWT_SECRET", SECRET);
    let output = check.output().unwrap();
    assert!(!output.status.success(), "{new} is accepted");
    let text = String::from_utf8(output.stderr).unwrap();
    // The folder is another at each run.
    text.replace(&setup.config().display().to_string(), "gate.toml")
}

#[test]
fn each_mistake_is_shown_where_it_is_with_what_to_write_instead() {
    // What is replaced, by what, what is underlined, what is wrong, what to write.
    let cases = [
        ("[sessions]\nmax =", "[sessions]\nmaxx =", "maxx", "unknown key `maxx`", "did you mean `max`?"),
        ("[ledger]", "[leger]", "leger", "unknown key `leger`", "did you mean `ledger`?"),
        ("action = \"view\"", "action = \"veiw\"", "\"veiw\"", "cannot be `veiw`", "did you mean `view`?"),
        (
            "flush_interval = \"1s\"",
            "flush_interval = \"1 sec\"",
            "\"1 sec\"",
            "\"1 sec\"",
            "a duration such as \"250ms\"",
        ),
        (
            "default_upstream = \"renderer\"",
            "default_upstream = \"rendrer\"",
            "\"rendrer\"",
            "no upstream `rendrer`",
            "did you mean `renderer`?",
        ),
        (
            "limits = { free = 2,",
            "limits = { fre = 2,",
            "fre = 2",
            "no limit for the plan `free`",
            "did you mean `free` instead of `fre`?",
        ),
        ("methods = [\"DELETE\"]", "methods = []", "[]", "`methods` is an empty list", "leave it out"),
        ("counts = { ai = true }", "counts = { platforms = [] }", "[]", "`platforms` is an empty list", "leave it out"),
        (
            "path = \"/v1/designs/{design}/share\"",
            "path = \"/v1/designs/{design}/sh%61re\"",
            "\"/v1/designs/{design}/sh%61re\"",
            "nothing else is",
            "write \"/v1/designs/{design}/share\"",
        ),
        (
            "path = \"/v1/designs/{design}/share\"",
            "path = \"/v1/{design}/{design}/share\"",
            "\"/v1/{design}/{design}/share\"",
            "two parameters have the same name",
            "",
        ),
        (
            "[meters.exports]",
            "[meters.exports]\ncost = { routes = { preview = 2 } }",
            "preview",
            "`view` is no export",
            "",
        ),
        (
            "[meters.exports]",
            "[meters.exports]\ncost = { features = {}, combine = \"sum\" }",
            "{}",
            "nothing has a price",
            "write cost = 1",
        ),
        (
            "[meters.exports]",
            "[meters.exports]\non_exceed = \"degrade\"\ndegrade = { set_query = { hd = \"0\" }, remove_query = [\"hd\"] }",
            "hd",
            "`hd` is in remove_query as well",
            "keep it in one of them",
        ),
        (
            "[meters.exports]",
            "[meters.exports]\non_exceed = \"degrade\"\ndegrade = { set_headers = { x-hd = \"0\" }, remove_headers = [\"X-HD\"] }",
            "x-hd",
            "`x-hd` is in remove_headers as well",
            "keep it in one of them",
        ),
        (
            "# sync_interval = \"1ms\"",
            "sync_interval = \"5s\"",
            "\"5s\"",
            "groups of charges are further apart (sync_interval) than exports wait",
            "write e.g. sync_interval = \"1ms\"",
        ),
        ("60, pro = \"unlimited\",", "60, pro = -1,", "-1,", "-1 is no limit", "or \"unlimited\""),
        ("60, pro = \"unlimited\",", "60, pro = \"none\",", "\"none\"", "`none` is no limit", "or \"unlimited\""),
        (
            "60, pro = \"unlimited\",",
            "60, pro = true,",
            "true",
            "a whole number from 0, { per_seat = 30 }, or \"unlimited\"",
            "",
        ),
        (
            "# upgrade_url = \"https://example.com/pricing\"",
            "upgrade_url = \"javascript:alert(1)\"",
            "\"javascript:alert(1)\"",
            "`javascript:alert(1)` is no address of a page",
            "https://example.com/pricing",
        ),
        (
            "# access = \"exports\"",
            "access = \"export\" #",
            "\"export\"",
            "cannot be `export`",
            "did you mean `exports`?",
        ),
        (
            "# subjects = \"plain\"",
            "subjects = \"hashed\" #",
            "\"hashed\"",
            "cannot be `hashed`",
            "did you mean `hash`?",
        ),
        (
            "# hash_key_env = \"LOG_HASH_KEY\"",
            "subjects = \"hash\"\nhash_key_env = \"LOG_HASH_KEY\" #",
            "\"LOG_HASH_KEY\"",
            "the environment variable `LOG_HASH_KEY` is not set",
            "name a file with hash_key_file",
        ),
        (
            "# hash_key_env = \"LOG_HASH_KEY\"",
            "hash_key_env = \"EXPORT_GATE_JWT_SECRET\" #",
            "\"EXPORT_GATE_JWT_SECRET\"",
            "nothing is hashed with this key",
            "write subjects = \"hash\"",
        ),
        (
            "{ pro = 1000, max = 3000 }",
            "{ pro = 1000 }",
            "{ pro = 1000 }",
            "no limit for the plan `max`",
            "add max = 10",
        ),
        (
            "{ pro = 1000,",
            "{ free = 1, pro = 1000,",
            "free = 1",
            "does not count the plan `free`",
            "remove the limit, or add the plan",
        ),
        ("time_zone = \"UTC\"", "time_zone = \"Mars/Io\"", "\"Mars/Io\"", "no time zone `Mars/Io`", "\"Europe/Paris\""),
        (
            "secret_env = \"EXPORT_GATE_JWT_SECRET\"",
            "secret_env = \"NOT_SET\"",
            "\"NOT_SET\"",
            "the environment variable `NOT_SET` is not set",
            "name a file with secret_file",
        ),
        ("secret_env = \"EXPORT_GATE_JWT_SECRET\"", "secret_file = \"no\"", "\"no\"", "cannot read", ""),
        ("secret_env = \"EXPORT_GATE_JWT_SECRET\"", "", "{ kid", "neither secret_env nor secret_file", ""),
        ("alg = \"HS256\"", "alg = \"HS255\"", "\"HS255\"", "cannot be `HS255`", "HS256"),
        ("alg = \"HS256\"", "alg = \"HS512\"", "{ kid", "an HS512 secret needs at least 64 bytes, this one has 32", ""),
        ("alg = \"HS256\"", "alg = \"ES256\"", "secret_env", "a key for ES256 has a public key, no secret", ""),
        (
            "{ kid = \"dev\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" },",
            "{ alg = \"EdDSA\", public_key_file = \"no.pem\" },",
            "\"no.pem\"",
            "cannot read",
            "",
        ),
        (
            "{ kid = \"dev\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" },",
            "{ alg = \"EdDSA\" },",
            "{ alg",
            "a key for EdDSA needs a public_key_file",
            "",
        ),
        (
            "{ kid = \"dev\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" },",
            "",
            "[identity]",
            "there is no key",
            "jwks = { url",
        ),
        (
            "keys = [\n",
            "jwks = { url = \"http://keys.example/k\" }\nkeys = [\n",
            "\"http://keys.example/k\"",
            "keys cannot come from",
            "use an https: URL",
        ),
        (
            "keys = [\n",
            "jwks = { url = \"keys.example\" }\nkeys = [\n",
            "\"keys.example\"",
            "keys cannot come from",
            "use an https: URL",
        ),
        (
            "keys = [\n",
            "jwks = { refresh = \"1m\" }\nkeys = [\n",
            "{ refresh",
            "not said where the key set is",
            "discover = true",
        ),
        (
            "keys = [\n",
            "jwks = { url = \"https://a.example/k\", discover = true }\nkeys = [\n",
            "discover",
            "has a url, and is to be discovered as well",
            "leave one of them out",
        ),
        (
            "keys = [\n",
            "jwks = { discover = true, algorithms = [\"HS256\"] }\nkeys = [\n",
            "[\"HS256\"]",
            "HS256 is for secrets",
            "",
        ),
        ("keys = [\n", "jwks = { discover = true, ca_file = \"no.pem\" }\nkeys = [\n", "\"no.pem\"", "cannot read", ""),
        (
            "keys = [\n",
            "jwks = { discover = true, refreshh = \"1m\" }\nkeys = [\n",
            "refreshh",
            "unknown key `refreshh`",
            "refresh",
        ),
        (
            "keys = [\n  { kid = \"dev\",",
            "jwks = { discover = true }\nkeys = [\n  {",
            "{ alg",
            "this key would take the place of all keys of jwks",
            "give it a kid",
        ),
        (
            "keys = [\n",
            "leeway = \"1h\"\nkeys = [\n",
            "\"1h\"",
            "tokens would be good long after they have expired",
            "at most \"5m\"",
        ),
        (
            "[identity.claims]",
            "[identity.plans]\n\"price_1\" = \"prro\"\n[identity.claims]",
            "\"prro\"",
            "no meter has a limit for the plan `prro`",
            "pro",
        ),
        ("keys = [\n", "token_cookie = \"a b\"\nkeys = [\n", "\"a b\"", "`a b` is no plain name", ""),
        ("keys = [\n", "token_types = []\nkeys = [\n", "[]", "no type of token would be accepted", "\"at+jwt\""),
        ("keys = [\n", "leeway = \"500ms\"\nkeys = [\n", "\"500ms\"", "tokens count in whole seconds", ""),
        (
            "keys = [\n",
            "token_types = [\"application/\"]\nkeys = [\n",
            "[\"application/\"]",
            "no type of token would be accepted",
            "",
        ),
        ("keys = [\n", "token_cache_limit = 1\nkeys = [\n", "1", "hardly a token would fit", "write 0"),
        (
            "issuer = \"https://accounts.example.com\"",
            "issuer = \"https://accounts.example.com \"",
            "\"https://accounts.example.com \"",
            "has blanks in it",
            "",
        ),
        ("kid = \"dev\"", "kid = \"\"", "\"\"", "this name is empty", "leave it out"),
        (
            "[upstreams.renderer]\n",
            "[upstreams.renderer]\nhost = \"http://a\"\n",
            "\"http://a\"",
            "`http://a` is no host",
            "renderer.example.com",
        ),
        ("[meters.exports]\n", "[meters.exports]\nsubject = \"/org~2\"\n", "\"/org~2\"", "no JSON pointer", "~0"),
        ("plan = \"/plan\"", "plan = \"/a~2b\"", "\"/a~2b\"", "no JSON pointer", "~0"),
        (
            "keys = [\n",
            "jwks = { discover = true, keep = \"1m\" }\nkeys = [\n",
            "\"1m\"",
            "gone before they are fetched again",
            "some hours",
        ),
        (
            "keys = [\n",
            "jwks = { discover = true, timeout = \"1h\" }\nkeys = [\n",
            "\"1h\"",
            "would wait for as long",
            "\"30s\"",
        ),
        ("keys = [\n", "jwks = { discover = true, size_limit = 0 }\nkeys = [\n", "0", "no size of a key set", ""),
        (
            "keys = [\n",
            "jwks = { url = \"http://127.0.0.1/k\", ca_file = \"gate.toml\" }\nkeys = [\n",
            "ca_file",
            "an http: URL has no certificate",
            "",
        ),
        (
            "keys = [\n",
            "jwks = { discover = true, ca_file = \"gate.toml\" }\nkeys = [\n",
            "\"gate.toml\"",
            "there is no certificate in it",
            "",
        ),
        (
            "keys = [\n",
            "jwks = { url = \"http://keys.localhost/k\" }\nkeys = [\n",
            "\"http://keys.localhost/k\"",
            "keys cannot come from",
            "",
        ),
        (
            "path = \"/v1/designs/{design}/preview\"",
            "path = \"/v1/designs/{id}/download\"",
            "\"/v1/designs/{id}/download\"",
            "route `preview` is never reached: route `download` before it",
            "the more special of the two first",
        ),
        (
            "path = \"/v1/designs/{design}/share\"",
            "path = \"/v1/share\"",
            "\"/v1/share\"",
            "does not say which design",
            "put {design} in the path",
        ),
        (
            "endpoints = [\"http://127.0.0.1:9000\"]",
            "endpoints = [\"127.0.0.1:9000\"]",
            "\"127.0.0.1:9000\"",
            "`127.0.0.1:9000` is no endpoint",
            "http://HOST:PORT",
        ),
        (
            "endpoints = [\"http://127.0.0.1:9000\"]",
            "endpoints = [\"https://127.0.0.1:9000\", \"https://a/b\"]",
            "\"https://a/b\"",
            "`https://a/b` is no endpoint",
            "https://HOST:PORT",
        ),
        (
            "endpoints = [\"http://127.0.0.1:9000\"]",
            "endpoints = [\"http://127.0.0.1:9000\"]\nca_file = \"gate.toml\"",
            "ca_file",
            "none of the endpoints is https:",
            "",
        ),
        (
            "endpoints = [\"http://127.0.0.1:9000\"]",
            "endpoints = [\"https://127.0.0.1:9000\"]\nca_file = \"gate.toml\"",
            "\"gate.toml\"",
            "there is no certificate in it",
            "",
        ),
        (
            "endpoints = [\"http://127.0.0.1:9000\"]",
            "endpoints = [\"https://127.0.0.1:9000\"]\nca_file = \"no.pem\"",
            "\"no.pem\"",
            "cannot read",
            "",
        ),
        (
            "endpoints = [\"http://127.0.0.1:9000\"]",
            "endpoints = [\"http://127.0.0.1:9000\"]\nprotocol = \"htpt2\"",
            "\"htpt2\"",
            "cannot be `htpt2`",
            "did you mean `http2`?",
        ),
        (
            "http://127.0.0.1:9000",
            "http://127.0.0.1:99999",
            "\"http://127.0.0.1:99999\"",
            "is no endpoint",
            "http://HOST:PORT",
        ),
        ("issuer = \"https://accounts.example.com\"", "issuer = \"\"", "\"\"", "the issuer is empty", ""),
        ("# filter = \"info\"", "filter = \"info=x=y\"", "\"info=x=y\"", "is no log filter", "\"info\""),
        (
            "path = \"/v1/designs/{design}/share\"",
            "path = \"/v1/designs/{design}/share.{format}\"",
            "\"/v1/designs",
            "stands for a whole segment",
            "\"/v1/designs/{design}/download\"",
        ),
        ("methods = [\"PUT\"]", "methods = [\"put\"]", "\"put\"", "`put` is no method", "write \"PUT\""),
        (
            "subject = \"user\"",
            "subject = \"tem\"",
            "\"tem\"",
            "`tem` is nothing that exports are counted by",
            "did you mean `team`?",
        ),
        (
            "path = \"/v1/designs/{design}/preview\"",
            "path = \"/v1/entwürfe/{design}/a b\"",
            "\"/v1/entwürfe/{design}/a b\"",
            "a path is written as it is in a URL",
            "write \"/v1/entw%C3%BCrfe/{design}/a%20b\"",
        ),
        (
            "  \"ai-image\",",
            "  \"ai image\",",
            "\"ai image\"",
            "a header cannot name `ai image`",
            "take \"header\" out",
        ),
        ("  \"ai-image\",", "  \"ai-image;\",", "\"ai-image;\"", "names end at commas", "each name by itself"),
        ("# filter = \"info\" ", "filter = \"infoo\" # ", "\"infoo\"", "`infoo` is no level", "did you mean `info`?"),
        (
            "# filter = \"info\" ",
            "filter = \"warn,decison=info\" # ",
            "\"warn,decison=info\"",
            "nothing is logged as `decison`",
            "did you mean `decision`?",
        ),
        (
            "# allow_origins = [\"https://app.example.com\"]",
            "allow_origins = [\"https://app.example.com/\"]",
            "\"https://app.example.com/\"",
            "`https://app.example.com/` is no origin",
            "as browsers send it: \"https://app.example.com\"",
        ),
        (
            "# allow_origins = [\"https://app.example.com\"]",
            "allow_origins = [\"null\", \"http://a:8080\", \"capacitor://localhost\", \"HTTPS://App.example.com:443\"]",
            "\"HTTPS://App.example.com:443\"",
            "`HTTPS://App.example.com:443` is no origin",
            "as browsers send it: \"https://app.example.com\"",
        ),
        (
            "# allow_origins = [\"https://app.example.com\"]",
            "allow_origins = [\"https://*.example.com\"]",
            "\"https://*.example.com\"",
            "`https://*.example.com` is no origin",
            "name each",
        ),
        ("mode = \"off\"", "mode = true", "true", "has to be a text", "known here: `off`, `on`"),
        ("methods = [\"DELETE\"]", "methods = [\"delete\"]", "\"delete\"", "`delete` is no method", "write \"DELETE\""),
        ("methods = [\"DELETE\"]", "methods = [\"DE LETE\"]", "\"DE LETE\"", "is no method", "write e.g. \"GET\""),
        ("name = \"preview\"", "name = \"none\"", "\"none\"", "taken by requests that match no route", ""),
        ("name = \"preview\"", "name = \"\"", "\"\"", "this name is empty", ""),
        (
            "secret_env = \"EXPORT_GATE_JWT_SECRET\"",
            "secret_env = \"c2VjcmV0/IHNlY3JldA==\"",
            "\"c2VjcmV0/IHNlY3JldA==\"",
            "this is no name of an environment variable",
            "not the secret",
        ),
        (
            "60, pro = \"unlimited\",",
            "60, pro = \"Unlimited\",",
            "\"Unlimited\"",
            "is no limit",
            "did you mean `unlimited`?",
        ),
        (
            "listen = \"127.0.0.1:9901\"",
            "listen = \"127.0.0.1:8080\"",
            "\"127.0.0.1:8080\"",
            "clients connect to this address",
            "one of its own",
        ),
        ("subject = \"user\"", "subject = 5", "5", "\"team\", a JSON pointer", ""),
        ("subject = \"user\"", "subject = []", "[]", "nobody is counted", "\"user\""),
        ("subject = \"user\"", "cost = 0", "0", "0 is no cost", "a whole number from 1"),
        ("subject = \"user\"", "cost = { qery = \"n\" }", "qery", "unknown key `qery`", "did you mean `query`?"),
        (
            "subject = \"user\"",
            "cost = { query = \"n\", header = \"x\" }",
            "{ query",
            "one of header, query, body",
            "{ query =",
        ),
        (
            "subject = \"user\"",
            "cost = { query = \"n\", max = 5, default = 6 }",
            "6",
            "the largest number that is accepted is 5",
            "",
        ),
        (
            "subject = \"user\"",
            "cost = { body = \"images\" }",
            "\"images\"",
            "`images` is no JSON pointer",
            "\"/images\"",
        ),
        (
            "subject = \"user\"",
            "cost = { routes = { downlod = 2 } }",
            "downlod",
            "no route `downlod`",
            "did you mean `download`?",
        ),
        (
            "subject = \"user\"",
            "cost = { routes = { download = 2 }, combine = \"sum\" }",
            "combine",
            "only features are combined",
            "",
        ),
        (
            "free = 2, pro = 30",
            "free = { per_seats = 2 }, pro = 30",
            "per_seats",
            "unknown key `per_seats`",
            "did you mean `per_seat`?",
        ),
        ("free = 2, pro = 30", "free = { per_seat = -2 }, pro = 30", "{ per_seat", "-2 is no limit", ""),
        (
            "true\non_exceed = \"deny\"",
            "true\non_exceed = \"degrade\"",
            "\"degrade\"",
            "not said how an export is degraded",
            "degrade = {",
        ),
        (
            "true\non_exceed = \"deny\"",
            "true\ndegrade = { set_query = { w = \"1\" } }",
            "degrade",
            "nothing is degraded",
            "on_exceed = \"degrade\"",
        ),
        (
            "true\non_exceed = \"deny\"",
            "true\non_exceed = \"degrade\"\ndegrade = {}",
            "{}",
            "this changes nothing",
            "set_query",
        ),
        (
            "calendar = \"week\", starts = \"monday\", time_zone = \"UTC\"",
            "rolling = \"24h\", calendar = \"day\"",
            "{ rolling",
            "one of calendar, rolling and anchored",
            "{ rolling = \"24h\" }",
        ),
        (
            "calendar = \"week\", starts = \"monday\", time_zone = \"UTC\"",
            "rolling = \"1500ms\"",
            "\"1500ms\"",
            "a whole number of seconds",
            "",
        ),
        (
            "calendar = \"week\", starts = \"monday\", time_zone = \"UTC\"",
            "anchored = \"fortnight\"",
            "\"fortnight\"",
            "`fortnight` is no period",
            "\"month\", \"year\"",
        ),
        (
            "calendar = \"week\", starts = \"monday\", time_zone = \"UTC\"",
            "rolling = \"24h\", from = \"billing-anchor\"",
            "from",
            "only an anchored window",
            "",
        ),
        ("max_files = 100", "idle = \"of\"", "\"of\"", "\"off\", or a duration", ""),
        ("mode = \"off\"", "mode = \"maybe\"", "\"maybe\"", "cannot be `maybe`", ""),
        ("unclassified_files = \"observe\"", "unclassified_files = \"deny\"", "\"deny\"", "cannot be `deny`", ""),
        (
            "# queue_limit = 100",
            "queue_limit = 100",
            "queue_limit",
            "nothing waits where nothing bounds what goes on",
            "write max_in_flight = 200 as well, or leave `queue_limit` out",
        ),
        (
            "# queue_timeout = \"1s\"",
            "queue_timeout = \"1s\"",
            "queue_timeout",
            "nothing waits where nothing bounds what goes on",
            "write max_in_flight = 200 as well, or leave `queue_timeout` out",
        ),
        (
            "# max_in_flight = 200",
            "queue_timeout = \"0s\"\nmax_in_flight = 200",
            "\"0s\"",
            "nobody can wait for no time",
            "write \"1s\", or queue_limit = 0 if nobody shall wait",
        ),
        (
            "# max_ejection_time = \"5m\"",
            "max_ejection_time = \"9s\"",
            "\"9s\"",
            "this is shorter than `ejection_time`, which is 10s",
            "write \"10s\" or longer",
        ),
        ("plan = \"/plan\"", "plan = \"plan\"", "\"plan\"", "`plan` is no JSON pointer", "write \"/plan\""),
        ("plan = \"/plan\"", "plan = \"org.plan\"", "\"org.plan\"", "no JSON pointer", "write \"/org/plan\""),
        ("plan = \"/plan\"", "plan = \"$.a.b\"", "\"$.a.b\"", "no JSON pointer", "write \"/a/b\""),
        ("plan = \"/plan\"", "plan = \"https://a.b/c\"", "\"https://a.b/c\"", "no JSON", "\"/https:~1~1a.b~1c\""),
        ("plan = \"/plan\"", "plan = \"\"", "\"\"", "no JSON pointer", "the name of the member"),
    ];
    for (old, new, underlined, wrong, instead) in cases {
        let text = complaint(old, new);
        assert!(text.contains(wrong), "{new}: no `{wrong}` in\n{text}");
        assert!(text.contains(instead), "{new}: no `{instead}` in\n{text}");
        let place = text.lines().find_map(|line| line.trim().strip_prefix("--> gate.toml:")).expect("a place is named");
        let (line, column) = place.split_once(':').unwrap();
        let (line, column): (usize, usize) = (line.parse().unwrap(), column.parse().unwrap());
        let config = std::fs::read_to_string(shipped_config()).unwrap().replace(old, new);
        let shown = config.lines().nth(line - 1).unwrap();
        assert!(
            shown.chars().skip(column - 1).collect::<String>().starts_with(underlined),
            "{new}: {place} in\n{text}"
        );
    }
}

#[test]
fn the_query_parameter_of_tokens_is_nobody_elses() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .replacing("path = \"/v1/designs/{design}/preview\"", "path = \"/preview\"\ndesign = { query = \"id\" }")
        .replacing("keys = [\n", "token_query = \"id\"\nkeys = [\n");
    let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("`id` is read by a route or a meter as well"), "{text}");
}

/// Whether `check` is content with an override, and what it says on standard error.
fn check_with(name: &str, value: &str) -> (bool, String) {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap()).set(name, value);
    let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn an_override_that_is_wrong_is_shown_as_one() {
    let (valid, text) = check_with("EXPORT_GATE__LEDGER__DURABLITY", "periodic");
    assert!(!valid && text.contains("--> environment:") && text.contains("did you mean `durability`?"), "{text}");
    for (name, meant) in [("SERVER__MAX_CONECTIONS", "max_connections"), ("DEFALT_UPSTREAM", "default_upstream")] {
        let (valid, text) = check_with(&format!("EXPORT_GATE__{name}"), "5");
        assert!(!valid && text.contains(&format!("did you mean `{meant}`?")), "{text}");
    }
    let (valid, text) = check_with("EXPORT_GATE__LOG__HASH_KEY", "hunter2-hunter2");
    assert!(!valid && text.contains("unknown key `hash_key`") && !text.contains("hunter2"), "{text}");
    let (valid, text) = check_with("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "-5");
    assert!(!valid && text.contains("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE=-5"), "{text}");
    assert!(check_with("EXPORT_GATE__METERS__AI_EXPORTS__LIMITS__FREE", "5").0);
    assert!(check_with("EXPORT_GATE__ROUTES__0__NAME", "first").0, "an element of a list");
    let (valid, text) = check_with("EXPORT_GATE__IDENTITY__KEYS__0__SECRET", "hunter2-hunter2");
    assert!(!valid && text.contains("unknown key `secret`") && !text.contains("hunter2"), "{text}");
    let (valid, text) = check_with("EXPORT_GATE__IDENTITY__KEYS__0__SECRETS", "hunter2-hunter2");
    assert!(!valid && text.contains("unknown key `secrets`") && !text.contains("hunter2"), "{text}");
    for filter in ["inf", "export_gate=blah"] {
        let (valid, text) = check_with("RUST_LOG", filter);
        assert!(!valid && text.contains("--> environment:") && text.contains("RUST_LOG"), "{text}");
    }
    for filter in ["", "debug,hyper=off", "5"] {
        assert!(check_with("RUST_LOG", filter).0, "{filter}");
    }
    for (name, value, wrong) in [
        ("EXPORT_GATE__METERS__AI_EXPORTS__WINDOW", "{ calendar = \"weak\" }", "\"weak\""),
        ("EXPORT_GATE__METERS__AI_EXPORTS__WINDOW", "{ calendar = \"week\", time_zone = \"Nope\" }", "\"Nope\""),
        ("EXPORT_GATE__SERVER__TLS", "{ cert_file = \"a.pem\", key_file = \"b.pem\" }", "\"a.pem\""),
        ("EXPORT_GATE__ROUTES", "[{ nmae = \"download\", path = \"/a\", action = \"view\" }]", "nmae"),
    ] {
        let (valid, text) = check_with(name, value);
        assert!(!valid && text.contains("--> environment:"), "{text}");
        // What is wrong is underlined.
        let mut lines = text.lines().skip_while(|line| !line.contains(name));
        let (line, marks) = (lines.next().unwrap(), lines.next().unwrap());
        let (from, until) = (marks.find('^').unwrap(), marks.rfind('^').unwrap() + 1);
        assert_eq!(line[from..until], *wrong, "{text}");
    }
    for nowhere in ["EXPORT_GATE__ROUTES__99__NAME", "EXPORT_GATE__DEFAULT_UPSTREAM__NAME"] {
        let (valid, text) = check_with(nowhere, "x");
        assert!(!valid && text.contains("this override has no place") && text.contains(nowhere), "{text}");
    }
}

#[test]
fn a_server_that_nobody_can_vouch_for_is_told_at_once() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", "[\"https://localhost\"]")
        .set("SSL_CERT_FILE", "/dev/null")
        .set("SSL_CERT_DIR", "/nonexistent");
    let said = doubts(&setup);
    assert!(said.contains("there are no root certificates, so no endpoint of `renderer` can be trusted"), "{said}");
}

#[test]
fn an_override_means_what_it_says_or_is_refused() {
    // A condition on `x_client` would be met by nobody, and exports leave uncounted.
    let (valid, text) = check_with("EXPORT_GATE__ROUTES__0__HEADERS__X_CLIENT", "web");
    assert!(!valid && text.contains("`x_client`, and another spelling may be meant"), "{text}");
    assert!(check_with("EXPORT_GATE__ROUTES__0__HEADERS", "{ x-client = \"web\" }").0);
    assert!(check_with("EXPORT_GATE__ROUTES__0__HEADERS__x_client", "web").0, "as it is meant");
    // As a shell leaves it of ["logo"].
    let (valid, text) = check_with("EXPORT_GATE__DESIGNS__AI_FEATURES", "[logo]");
    assert!(!valid && text.contains("quotation marks, which a shell keeps in single ones"), "{text}");

    let environment = [
        ("EXPORT_GATE__IDENTITY__PLANS__price_1MoBy", "pro"),
        ("EXPORT_GATE__METERS__AI_EXPORTS__ON_EXCEED", "degrade"),
        ("EXPORT_GATE__METERS__AI_EXPORTS__DEGRADE", "{ set_headers = { x-render-token = \"none\" } }"),
        ("EXPORT_GATE__METERS__AI_EXPORTS__DEGRADE__SET_HEADERS__X_RENDER_TOKEN", "abc"),
        ("EXPORT_GATE_JWT_SECRET", SECRET),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let shipped = std::fs::read_to_string(shipped_config()).unwrap();
    let config = config::parse("gate.toml", &shipped, Path::new("."), &environment).unwrap();
    assert_eq!(config.identity.claims.plans.get("price_1MoBy").map(|plan| &**plan), Some("pro"));
    let mut set = config.policy.meters.iter().flat_map(|meter| &meter.degrade.set_headers);
    assert_eq!(
        set.next().map(|(name, value)| (name.as_str(), value.to_str().unwrap())),
        Some(("x-render-token", "abc"))
    );
}

#[test]
fn check_shows_the_upstreams() {
    let other = r#"
[upstreams.other]
endpoints = ["https://one.example", "https://two.example:8443"]
protocol = "http2"
max_failures = 3
ejection_time = "20m"
max_in_flight = 200
queue_limit = 7
queue_timeout = "250ms"
response_timeout = "3s"
"#;
    let setup = Setup::before("127.0.0.1:9".parse().unwrap());
    let text = std::fs::read_to_string(setup.config()).unwrap();
    std::fs::write(setup.config(), text + other).unwrap();
    let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, table) = text.split_once("Upstreams: where requests go.\n").unwrap_or_else(|| panic!("no table:\n{text}"));
    let (table, _) = table.split_once("\n\n").unwrap();
    for cell in [
        "renderer",
        "http://127.0.0.1:9",
        "HTTP/2 if offered by TLS, else HTTP/1.1",
        "connect 4s",
        "answer 60s",
        // There is to be time to ask another.
        "connect 1.5s",
        "answer 3s",
        "unused 4s",
        "never: there is no other",
        "whatever comes",
        "other",
        "https://one.example",
        "https://two.example:8443",
        "after 3 failures",
        // The longest is no shorter than the first.
        "for 1200s to 1200s",
        "200",
        "7 wait for 250ms",
    ] {
        assert!(table.contains(cell), "no {cell} in\n{table}");
    }
}

#[test]
fn all_mistakes_are_shown_at_once() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .replacing("free = 60", "free = -60")
        .replacing("flush_interval = \"1s\"", "flush_interval = \"0s\"")
        .set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "0s")
        .set("EXPORT_GATE__ADMIN__LISTEN", "0.0.0.0:9901");
    let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.matches("error: ").count(), 3, "{text}");
    assert!(text.contains("has no token") && text.contains("token_env"), "{text}");

    let odd = Setup::before("127.0.0.1:9".parse().unwrap())
        .replacing("[sessions]\nmax =", "[sessions]\nmaxx =")
        .replacing("action = \"view\"", "action = \"veiw\"")
        .replacing("issuer =", "isuer =")
        .replacing("audience =", "# audience =");
    let output = odd.command("check").arg("--config").arg(odd.config()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.matches("error: ").count(), 4, "{text}");
    assert!(text.contains("`audience` is missing in `identity`"), "{text}");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_export-gate")).args(["check", "--config", "/nowhere/gate.toml"]).output();
    let text = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(text.contains("/nowhere/gate.toml") && text.contains("No such file"), "{text}");
}

#[test]
fn check_shows_routes_meters_and_limits_as_tables() {
    let output = Command::new(env!("CARGO_BIN_EXE_export-gate"))
        .arg("check")
        .arg("--config")
        .arg(shipped_config())
        .env("EXPORT_GATE_JWT_SECRET", SECRET)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for row in [
        "│ download            ┆ GET, POST /v1/designs/{design}/download   ┆ download            ┆ yes        ┆ file     ┆ renderer │",
        "│ free ┆ 2          ┆ 60        ┆ -        │",
        "│ pro  ┆ 30         ┆ unlimited ┆ 1000     │",
        "│ max  ┆ 120        ┆ unlimited ┆ 3000     │",
        "each user, per week from Monday (UTC)",
        "counted, not refused",
    ] {
        assert!(text.contains(row), "no `{row}` in\n{text}");
    }
}

#[test]
fn nothing_is_doubted_of_what_is_shipped() {
    let examples = std::fs::read_dir(shipped_config().with_file_name("examples")).unwrap();
    for config in examples.map(|file| file.unwrap().path()).chain([shipped_config()]) {
        let mut check = Command::new(env!("CARGO_BIN_EXE_export-gate"));
        check.args(["check", "--config"]).arg(&config).env("EXPORT_GATE_JWT_SECRET", SECRET);
        let output = check.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && said.is_empty(), "{}: {said}", config.display());
    }
}

/// What `check` says of a configuration that is valid.
fn doubts(setup: &Setup) -> String {
    let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn check_doubts_what_is_valid_and_hardly_meant() {
    let doubted = |old: &str, new: &str| doubts(&Setup::before("127.0.0.1:9".parse().unwrap()).replacing(old, new));
    let sessions = "sessions = true";
    assert_eq!(doubted(sessions, sessions), "");
    for (old, new, told) in [
        ("methods = [\"DELETE\"]", "methods = [\"DELTE\"]", "DELTE"),
        (
            "action = \"open-export-screen\"\ndelivers = \"screen\"",
            "action = \"view\" #",
            "no route is for open-export-screen",
        ),
        ("counts = { ai = true }", "counts = { ai = true, actions = [\"download\", \"save-design\"] }", "save-design"),
        ("[log]", "[log]\nfilter = \"warn\"", ",decision=info"),
        ("# trusted_hops = [\"10.0.0.0/8\"]", "trusted_hops = [\"0.0.0.0/0\"]", "everybody is a trusted hop"),
        (
            "[[routes]]\nname = \"download\"",
            "[[routes]]\nname = \"pages\"\nmethods = [\"PUT\", \"GET\"]\npath = \"/v1/{kind}/{id}/download\"\naction = \"view\"\n\n\
             [[routes]]\nname = \"download\"",
            "`pages`, which counts nothing, takes requests that `download` would count",
        ),
        ("{design}/download\"", "*/download\"\ndesign = { query = \"id\" }", "`*` in the path of the route `download`"),
        ("{design}/download\"", "{design}//download\"", "servers read differently"),
        ("{design}/download\"", "{design}/download;v=2\"", "servers read differently"),
        ("{design}/preview\"", "{design}//preview\"", "two slashes in a row"),
        ("{design}/download\"", "{design}/download/\"", "a request for /v1/designs/{design}/download is refused"),
        (
            "action = \"download\"",
            "action = \"download\"\nheaders = { host = \"https://exports.example.com\" }",
            "the host `https://exports.example.com`",
        ),
        ("path = \"/v1/designs/{design}\"", "path = \"/v1/designs/current\"", "does not say which design is saved"),
        ("sources = [\"claim\", \"header\"]", "sources = []", "refused with 503"),
        (
            "  \"ai-image\", \"logo\", \"sticker\", \"coloring-page\",\n  \"virtual-model\", \"product-beautifier\", \"product-staging\",",
            "",
            "no feature is an AI feature, so the meter `ai-exports` counts nothing",
        ),
        (
            "[meters.exports]",
            "[meters.exports]\nsessions = true",
            "`exports` has sessions, which cover designs with AI",
        ),
        ("[meters.exports]", "[meters.exports]\ncost = 61", "`exports`, of which the plan `free` has 60"),
        ("free = 60,", "free = \"unlimited\",", "`exports` is unlimited for each plan"),
    ] {
        let said = doubted(old, new);
        assert!(said.starts_with("warning: ") && said.contains(told), "{new}: {said}");
    }
    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .set("EXPORT_GATE__ADMIN__LISTEN", "0.0.0.0:9901")
        .set("EXPORT_GATE__ADMIN__TOKEN_ENV", "EXPORT_GATE_ADMIN_TOKEN")
        .set("EXPORT_GATE_ADMIN_TOKEN", "0123456789abcdef")
        .set("EXPORT_GATE__UPSTREAMS__RENDERER__ENDPOINTS", "[\"http://localhost:9901\", \"http://10.0.0.1:9901\"]");
    let said = doubts(&setup);
    assert!(said.contains("`renderer` has the gate itself as an endpoint (localhost:9901)"), "{said}");
    assert!(!said.contains("10.0.0.1"), "{said}");

    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .set("EXPORT_GATE__METERS__AI_EXPORTS__COUNTS", "{ ai = true, platforms = [\"web\"] }")
        .set("EXPORT_GATE__METERS__EXPORTS__COUNTS", "{ ai = false, platforms = [\"ios\", \"android\"] }")
        .set(
            "EXPORT_GATE__METERS__FAIR_USE__COUNTS",
            "{ ai = false, plans = [\"pro\", \"max\"], platforms = [\"web\"] }",
        );
    let said = doubts(&setup);
    assert!(said.contains("no meter counts what comes from the platform other"), "{said}");

    let mut setup = Setup::before("127.0.0.1:9".parse().unwrap());
    for (meter, counts) in [("AI_EXPORTS", ""), ("EXPORTS", ""), ("FAIR_USE", ", plans = [\"pro\", \"max\"]")] {
        let counts = format!("{{ actions = [\"download\", \"autosave\"]{counts} }}");
        setup = setup.set(&format!("EXPORT_GATE__METERS__{meter}__COUNTS"), &counts);
    }
    let said = doubts(&setup);
    assert!(said.contains("no meter counts share-file: what the route `share-file` hands out is free"), "{said}");
    assert_eq!(said.matches("no meter counts").count(), 1, "{said}");
}

#[test]
fn check_shows_who_connects_where_whose_tokens_are_good_and_what_the_environment_says() {
    let plain = Setup::before("127.0.0.1:9".parse().unwrap());
    let other = plain
        .clone()
        .set("EXPORT_GATE__SERVER__LISTEN", "0.0.0.0:8443")
        .set("EXPORT_GATE__SERVER__H2C", "true")
        .set("EXPORT_GATE__ADMIN__LISTEN", "0.0.0.0:9901")
        .set("EXPORT_GATE__ADMIN__TOKEN_ENV", "EXPORT_GATE_ADMIN_TOKEN")
        .set("EXPORT_GATE_ADMIN_TOKEN", "0123456789abcdef")
        .set("EXPORT_GATE__LEDGER__DURABILITY", "periodic")
        .set("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "2s")
        .set("EXPORT_GATE_LOG_FILTER", "debug");
    let jwks = plain.clone().set("EXPORT_GATE__IDENTITY__JWKS", "{ url = \"https://keys.example/set\" }");
    let check = |setup: &Setup| {
        let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    };
    let (shown, warnings) = check(&plain);
    assert!(shown.contains("(HTTP/1.1, without TLS), operators to 127.0.0.1:0 (without a token)."), "{shown}");
    let tokens = "Tokens are https://accounts.example.com's for `exports`, signed with the key `dev` (HS256).";
    assert!(shown.contains(tokens) && shown.contains("on the disk before an image leaves"), "{shown}");
    assert_eq!(warnings, "");
    let (shown, warnings) = check(&other);
    for part in [
        "Clients connect to 0.0.0.0:8443 (HTTP/1.1 or HTTP/2, without TLS), operators to 0.0.0.0:9901 (with a token).",
        "EXPORT_GATE__ADMIN__TOKEN_ENV, ",
        ", written every 2 s.",
    ] {
        assert!(shown.contains(part), "no `{part}` in\n{shown}");
    }
    let expected = "warning: EXPORT_GATE_LOG_FILTER is set, and nothing reads it: two underscores are before each name of an override, as \
                    in EXPORT_GATE__LOG__FILTER\n";
    assert_eq!(warnings, expected);
    let (shown, _) = check(&jwks);
    assert!(shown.contains("(HS256), or those that https://keys.example:443/set publishes."), "{shown}");
}

#[test]
fn a_gate_says_which_variables_it_does_not_read() {
    let gate = Setup::before("127.0.0.1:9".parse().unwrap()).set("EXPORT_GATE_SERVER_LISTEN", "0.0.0.0:80").start();
    gate.logs(&["EXPORT_GATE_SERVER_LISTEN is set, and nothing reads it", "EXPORT_GATE__SERVER__LISTEN"]);
}

#[test]
fn a_token_for_operators_that_can_be_guessed_is_refused() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap()).set("EXPORT_GATE__ADMIN__TOKEN_ENV", "TOKEN");
    let check = |token| {
        let setup = setup.clone().set("TOKEN", token);
        let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let (valid, text) = check("0123456789abcde");
    assert!(
        !valid && text.contains("EXPORT_GATE__ADMIN__TOKEN_ENV=") && text.contains("the secret has 15 bytes"),
        "{text}"
    );
    assert!(text.contains("use 16 random bytes or more") && !text.contains("0123456789"), "{text}");
    assert!(check("0123456789abcdef").0);
    let (_, text) = check("");
    assert!(text.contains("`TOKEN` is not set") && text.matches("error: ").count() == 1, "{text}");
}

#[test]
fn a_plan_that_is_misspelt_is_reported_where_it_is_and_nowhere_else() {
    for (old, new, wrong) in [
        ("{ free = 2, pro = 30,", "{ free = 2, porr = 30,", "porr"),
        ("{ free = 2, pro = 30,", "{ free = 2, po = 30,", "po"),
        ("{ free = 60, pro =", "{ free = 60, porr =", "porr"),
        ("\"unlimited\", max = \"unlimited\"", "\"unlimited\", maxx = \"unlimited\"", "maxx"),
    ] {
        let text = complaint(old, new);
        assert_eq!(text.matches("error: ").count(), 1, "{new}\n{text}");
        assert!(text.contains(&format!("instead of `{wrong}`?")), "{text}");
    }
}

// Nobody would count them.
#[test]
fn a_plan_without_a_limit_is_told_however_much_its_name_is_like_another() {
    let pro = "{ pro = 1000, max = 3000 }";
    let counted = "counts = { ai = false, plans = [\"pro\", \"max\"] }";
    let text = complaint(counted, "counts = { ai = false, plans = [\"pro\", \"prp\", \"max\"] }");
    assert!(
        text.contains("the meter `fair-use` has no limit for the plan `prp`") && text.contains("add prp = 10"),
        "{text}"
    );
    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .replacing(counted, "counts = { ai = false, plans = [\"prp\"] }")
        .replacing(pro, "{ prp = 1000 }");
    let output = setup.command("check").arg("--config").arg(setup.config()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    for meter in ["ai-exports", "exports"] {
        assert!(text.contains(&format!("the meter `{meter}` has no limit for the plan `prp`")), "{text}");
    }
    assert!(!text.contains("did you mean"), "{text}");
}

#[test]
fn explain_tells_each_step_and_the_rule_that_decides() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap());
    let explain = |arguments: &[&str]| {
        let output = setup.command("explain").arg("--config").arg(setup.config()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let token = Token::of("anna").ai().on("ios").signed_by(SECRET);
    let text = explain(&["--token", &token, "POST", "/v1/designs/d1/export-screen"]);
    for part in [
        "`export-screen` matches: action open-export-screen, design `d1`",
        "user `anna`, plan free, platform ios",
        "an AI design: features logo (from claim)",
        "opening the export screen counts as one export",
        "1 x `ai-exports`, and a session opens; user `anna` on free has 2 per week",
        "refused with 429 if the quota is used up",
    ] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
    let pro = Token::of("p").plan("pro").signed_by(SECRET);
    let text = explain(&["--token", &pro, "GET", DOWNLOAD]);
    assert!(text.contains("nothing on `exports`: unlimited for pro"), "{text}");
    assert!(text.contains("=> charged and forwarded to `renderer`"), "{text}");
    assert!(explain(&["GET", "/elsewhere"]).contains("forwarded to `renderer`; nothing is counted"));
    assert!(explain(&["GET", "/.export-gate/usage"]).contains("answered by the gate itself"));
    let keys = ["--header", "idempotency-key: a", "--header", "idempotency-key: b"];
    let twice = [&["--token", &*token], &keys[..], &["GET", DOWNLOAD]].concat();
    assert!(explain(&twice).contains("refused with 400"));
    assert!(explain(&["GET", DOWNLOAD]).contains("refused with 401"));
    let nameless = Token::of("anna").without("plan").signed_by(SECRET);
    let text = explain(&["--token", &nameless, "GET", DOWNLOAD]);
    assert!(text.contains("nothing at `/plan`") && text.contains("refused with 403"), "{text}");
    let text = explain(&["--token", &token, "GET", DOWNLOAD]);
    assert!(text.contains("`export-gate usage anna --plan free --admin 127.0.0.1:0` tells"), "{text}");
    let odd = Token::of("anna").with("ai_features", serde_json::json!(["hologram"])).signed_by(SECRET);
    let text = explain(&["--token", &odd, "GET", DOWNLOAD]);
    assert!(text.contains("neither in ai_features nor in plain_features: hologram"), "{text}");
    let together = Token::of("anna").with("ai_features", serde_json::json!(["logo sticker"])).signed_by(SECRET);
    let text = explain(&["--token", &together, "GET", DOWNLOAD]);
    assert!(text.contains("an AI design") && !text.contains("neither"), "{text}");
    let foreign = Token::of("anna").with("aud", serde_json::json!("saves")).signed_by(SECRET);
    let text = explain(&["--token", &foreign, "GET", DOWNLOAD]);
    assert!(text.contains("\"aud\" is \"saves\", and has to contain \"exports\""), "{text}");
    assert!(explain(&["GET", "/v1/designs/d1/download/"]).contains("refused with 400"));
    assert!(explain(&["PUT", "/v1/designs/d1"]).contains("never counted, never refused"));
    assert!(explain(&["HEAD", DOWNLOAD]).contains("hands no file out"));
    let unknown = Token::of("x").without("ai_features").signed_by(SECRET);
    assert!(explain(&["--token", &unknown, "GET", DOWNLOAD]).contains("refused with 503"));
    let header = ["--token", &unknown, "--header", "x-design-ai-features: logo", "GET", DOWNLOAD];
    assert!(explain(&header).contains("refused with 503"), "nobody is trusted");
}

#[test]
fn explain_knows_hosts_billing_periods_and_meters_that_cannot_tell_how_much() {
    let heading = "# Fair use of the unlimited plans";
    let setup = Setup::before("127.0.0.1:9".parse().unwrap())
        .replacing("action = \"download\"", "action = \"download\"\nheaders = { host = \"exports.example.com\" }")
        .replacing(
            heading,
            &format!(
                "[meters.billed]\nwindow = {{ anchored = \"month\", from = \"billing-anchor\" }}\n\
                 limits = {{ free = 9, pro = 9, max = 9 }}\n\n[meters.watched]\ncost = {{ query = \"n\", max = 9 }}\n\
                 window = {{ calendar = \"day\" }}\non_exceed = \"observe\"\nlimits = {{ free = 9, pro = 9, max = 9 }}\n\n{heading}"
            ),
        );
    let token = Token::of("anna").plan("pro").ai().with("billing_anchor", serde_json::json!("2026-01-31"));
    let token = token.signed_by(SECRET);
    let explain = |url: &str| {
        let mut command = setup.command("explain");
        let output =
            command.arg("--config").arg(setup.config()).args(["--token", &token, "GET", url]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(explain("/v1/designs/d1/download?n=1").contains("it depends on the host: say it by a full URL"));
    assert!(explain("https://other.example.com/v1/designs/d1/download?n=1").contains("none matches"));
    let text = explain("https://exports.example.com/v1/designs/d1/download?n=10");
    for part in [
        "nothing on `watched`: it cannot tell how much, and enforces nothing",
        "1 x `billed`",
        "`export-gate usage anna --plan pro --billing-anchor 2026-01-31",
    ] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

#[test]
fn token_mints_what_the_gate_accepts() {
    let backend = crate::support::Backend::start(crate::support::Reply::image());
    let gate = Setup::before(backend.address).start();
    let mut command = gate.setup.command("token");
    command.arg("--config").arg(gate.setup.config());
    command.args(["--user", "anna", "--plan", "pro", "--platform", "ios", "--ai-features", "logo,crop"]);
    let token = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let line = format!("authorization: Bearer {}", token.trim());
    assert_eq!(crate::support::get(gate.address, DOWNLOAD, &[&line]).status, 200);
    assert_eq!(gate.used("anna", "ai-exports"), 1);
    let expires_in = |text: &str| {
        let mut command = gate.setup.command("token");
        let output = command.arg("--config").arg(gate.setup.config()).args(["--user", "anna", "--expires-in", text]);
        let output = output.output().unwrap();
        let token = String::from_utf8(output.stdout).unwrap();
        let payload = token.split('.').nth(1).map(|payload| URL_SAFE_NO_PAD.decode(payload).unwrap());
        let claims: Option<serde_json::Value> = payload.map(|payload| serde_json::from_slice(&payload).unwrap());
        claims.map(|claims| claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap())
    };
    assert_eq!(["90", "90s", "7d"].map(expires_in), [Some(90), Some(90), Some(604_800)]);
    assert_eq!(["soon", "-1", "1w", "500ms"].map(expires_in), [None; 4]);
}

#[test]
fn secrets_from_a_file_lose_one_newline_at_their_end() {
    let backend = crate::support::Backend::start(crate::support::Reply::image());
    let setup =
        Setup::before(backend.address).replacing("secret_env = \"EXPORT_GATE_JWT_SECRET\"", "secret_file = \"secret\"");
    std::fs::write(setup.folder.path("secret"), format!("{SECRET}\n")).unwrap();
    let gate = setup.start();
    assert_eq!(crate::support::get(gate.address, DOWNLOAD, &[&Token::of("u").line()]).status, 200);
}

#[test]
fn the_schema_in_the_repository_is_the_one_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gate.schema.json");
    let current = format!("{:#}\n", config::schema());
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == current, "run `cargo run -- schema > config/gate.schema.json`");
}

#[test]
fn the_shipped_configuration_names_everything_that_can_be_set() {
    let text = std::fs::read_to_string(shipped_config()).unwrap();
    let schema = std::fs::read(shipped_config().with_file_name("gate.schema.json")).unwrap();
    fn names(schema: &serde_json::Value, found: &mut BTreeSet<String>) {
        let properties = schema["properties"].as_object().into_iter().flatten();
        found.extend(properties.map(|(name, _)| name.clone()));
        let within = schema.as_object().into_iter().flat_map(|object| object.values());
        within.chain(schema.as_array().into_iter().flatten()).for_each(|schema| names(schema, found));
    }
    let mut all = BTreeSet::new();
    names(&serde_json::from_slice(&schema).unwrap(), &mut all);
    let words: BTreeSet<&str> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let missing: Vec<_> = all.iter().filter(|name| !words.contains(name.as_str())).collect();
    assert!(all.len() > 100 && missing.is_empty(), "{missing:?}");
}

/// What a text comes to, with overrides.
fn parsed(text: &str, overrides: &[(&str, &str)]) -> config::Config {
    let environment = overrides.iter().chain(&[("EXPORT_GATE_JWT_SECRET", SECRET)]);
    let environment = environment.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    config::parse("gate.toml", text, Path::new("."), &environment).unwrap()
}

/// The ledger and the model are tested with `Options`: this is how they come about.
#[test]
fn what_an_earlier_charge_covers_and_for_how_long_is_as_configured_and_by_default_as_documented() {
    let shipped = std::fs::read_to_string(shipped_config()).unwrap();
    let documented = Options {
        durability: Durability::Strict,
        sync_interval: Duration::from_millis(1),
        flush_interval: Duration::from_secs(1),
        sync_timeout: Duration::from_secs(5),
        session_max: Duration::from_hours(24),
        session_idle: None,
        session_files: 100,
        retry_window: Duration::from_mins(15),
        retry_deliveries: 2,
        resume_window: Duration::from_mins(15),
    };
    assert_eq!(parsed(&shipped, &[]).ledger, documented);
    let least = r#"
        default_upstream = "a"
        upstreams.a.endpoints = ["https://one.example"]
        identity = { issuer = "i", audience = "a", keys = [{ kid = "dev", alg = "HS256", secret_env = "EXPORT_GATE_JWT_SECRET" }] }
        routes = [{ name = "download", path = "/{design}", action = "download" }]
        meters.exports = { window = { calendar = "week" }, limits = { free = 1 } }
    "#;
    assert_eq!(parsed(least, &[]).ledger, documented, "where nothing is said");
    // Each is another number, so that none is taken for another.
    let others = [
        ("EXPORT_GATE__LEDGER__DURABILITY", "periodic"),
        ("EXPORT_GATE__LEDGER__SYNC_INTERVAL", "2ms"),
        ("EXPORT_GATE__LEDGER__FLUSH_INTERVAL", "3s"),
        ("EXPORT_GATE__LEDGER__SYNC_TIMEOUT", "4s"),
        ("EXPORT_GATE__SESSIONS__MAX", "5h"),
        ("EXPORT_GATE__SESSIONS__IDLE", "6m"),
        ("EXPORT_GATE__SESSIONS__MAX_FILES", "7"),
        ("EXPORT_GATE__RETRIES__WINDOW", "8m"),
        ("EXPORT_GATE__RETRIES__DELIVERIES", "9"),
        ("EXPORT_GATE__RESUMES__WINDOW", "10m"),
        ("EXPORT_GATE__RESPONSES__WARN_AT_PERCENT", "11"),
    ];
    let config = parsed(&shipped, &others);
    let expected = Options {
        durability: Durability::Periodic,
        sync_interval: Duration::from_millis(2),
        flush_interval: Duration::from_secs(3),
        sync_timeout: Duration::from_secs(4),
        session_max: Duration::from_hours(5),
        session_idle: Some(Duration::from_mins(6)),
        session_files: 7,
        retry_window: Duration::from_mins(8),
        retry_deliveries: 9,
        resume_window: Duration::from_mins(10),
    };
    assert_eq!((config.ledger, config.gate.warn_at_percent), (expected, 11));
}

/// Policies B and C stand and fall by this: 250 a month are not 250 a week.
#[test]
fn each_window_is_the_one_that_its_words_say() {
    let shipped = std::fs::read_to_string(shipped_config()).unwrap();
    let written = "window = { calendar = \"day\" }";
    assert_eq!(shipped.matches(written).count(), 1, "that of fair-use");
    let window = |words: &str| {
        let policy = parsed(&shipped.replace(written, &format!("window = {{ {words} }}")), &[]).policy;
        policy.meters.into_iter().find(|meter| &*meter.name == "fair-use").unwrap().window
    };
    let calendar = |unit, zone: &str| Window::Calendar(Calendar { unit, zone: TimeZone::get(zone).unwrap() });
    let in_utc = |unit| Window::Calendar(Calendar { unit, zone: TimeZone::UTC });
    assert_eq!(window("calendar = \"day\""), in_utc(CalendarUnit::Day));
    assert_eq!(window("calendar = \"month\""), in_utc(CalendarUnit::Month));
    assert_eq!(
        window("calendar = \"month\", time_zone = \"Europe/Paris\""),
        calendar(CalendarUnit::Month, "Europe/Paris")
    );
    assert_eq!(window("calendar = \"week\""), in_utc(CalendarUnit::Week { starts: Weekday::Monday }), "by default");
    for (name, starts) in [
        ("monday", Weekday::Monday),
        ("tuesday", Weekday::Tuesday),
        ("wednesday", Weekday::Wednesday),
        ("thursday", Weekday::Thursday),
        ("friday", Weekday::Friday),
        ("saturday", Weekday::Saturday),
        ("sunday", Weekday::Sunday),
    ] {
        let words = format!("calendar = \"week\", starts = \"{name}\"");
        assert_eq!(window(&words), in_utc(CalendarUnit::Week { starts }), "{name}");
    }
    let zone = || TimeZone::UTC;
    assert_eq!(window("rolling = \"24h\""), Window::Rolling(Rolling { lasts: 86_400 }));
    let day = Anchored { period: Period::Seconds(86_400), zone: zone() };
    assert_eq!(window("anchored = \"24h\""), Window::FirstCharge(day));
    for (name, months) in [("month", 1), ("year", 12)] {
        let anchored = || Anchored { period: Period::Months(months), zone: zone() };
        assert_eq!(window(&format!("anchored = \"{name}\"")), Window::FirstCharge(anchored()), "{name}");
        let billed = format!("anchored = \"{name}\", from = \"billing-anchor\"");
        assert_eq!(window(&billed), Window::Billing(anchored()), "{name}");
    }
}

#[test]
fn a_variable_that_is_no_text_is_refused_if_it_is_called_as_ours_are() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap());
    let check = |name: &str| {
        let mut check = setup.command("check");
        check.arg("--config").arg(setup.config()).env(name, OsStr::from_bytes(b"/tmp/\xff.db"));
        let output = check.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for name in ["EXPORT_GATE__LEDGER__PATH", "EXPORT_GATE_JWT_SECRET"] {
        let (code, said) = check(name);
        assert!(code == Some(1) && said.contains(&format!("{name} is no text")), "{said}");
    }
    assert_eq!(check("PATH_OF_OTHERS").0, Some(0));
}

#[test]
fn what_cannot_be_printed_is_an_error_and_a_reader_that_has_enough_is_none() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap());
    let token = ["token", "--user", "anna", "--plan", "free"];
    for words in [&["schema"][..], &["check"], &token] {
        let mut command = setup.command(words[0]);
        command.args(&words[1..]);
        if words[0] != "schema" {
            command.arg("--config").arg(setup.config());
        }
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = command.stdout(full).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(said.contains("error: No space left on device") && !said.contains("panicked"), "{said}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command.stdout(writer).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), &*said), (Some(0), ""), "{words:?}");
    }
}

#[test]
fn a_ledger_that_cannot_be_made_is_doubted() {
    let setup = Setup::before("127.0.0.1:9".parse().unwrap());
    let missing = setup.clone().set("EXPORT_GATE__LEDGER__PATH", "/nonexistent/ledger.db");
    assert!(doubts(&missing).contains("the ledger's folder /nonexistent is not there"));
    let folder = setup.folder.path("").display().to_string();
    assert!(doubts(&setup.set("EXPORT_GATE__LEDGER__PATH", &folder)).contains("is a folder"));
}
