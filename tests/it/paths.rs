//! No spelling of an export's path, method or parameters is a way around the gate.
//!
//! Backends of many kinds are imitated here by code of their own: what one of them would serve as an export, the gate has to take for
//! one, or refuse. `PROPTEST_CASES=1000000` tries more than each run does.

use std::sync::Arc;

use export_gate::policy::{Action, Conditions, Delivers, DesignFrom, Match, Pattern, Route, Routes};
use http::{HeaderMap, Method, Uri};
use proptest::prelude::*;

fn route(name: &str, methods: &[Method], path: &str, action: Action) -> Route {
    Route {
        name: name.into(),
        methods: methods.to_vec(),
        path: Pattern::parse(path).unwrap(),
        conditions: Conditions::default(),
        action,
        delivers: Delivers::File,
        design: DesignFrom::Path("design".into()),
    }
}

fn routes() -> Routes {
    Routes::new(vec![
        route("download", &[Method::GET, Method::POST], "/v1/designs/{design}/download", Action::Download),
        route("preview", &[Method::GET], "/v1/designs/{design}/preview", Action::View),
        route("save", &[Method::PUT], "/v1/designs/{design}", Action::SaveDesign),
    ])
    .unwrap()
}

/// Something that a client does to a path at some place of it.
#[derive(Debug, Clone)]
enum Mangling {
    Encode { lower: bool },
    EncodeTwice,
    Insert(&'static str),
    Case,
    Append(&'static str),
    Prepend(&'static str),
}

fn mangling() -> impl Strategy<Value = (usize, Mangling)> {
    let inserted = [
        "/", "//", "/./", "/x/../", "/../", "\\", "%2f", "%5C", ";a=b", ";", "%2e%2e/", "/.;/", "%00", "%20", ".",
        "%2e", "/%2e/", "%252f", "/..;/",
    ];
    let appended = [
        "/",
        "//",
        ".",
        "%20",
        "%00",
        "%00.png",
        ";jsessionid=1",
        "/.",
        "%2f",
        "?",
        "?x=1",
        "%3b",
        "\\",
        "%09",
        "..",
        "%23",
        "%3f",
    ];
    let prepended = [
        "//x", "/\\x", "///u@x:1", "//x%2fy", "/%5Cx", "/%2fx", "/", "//", "/.", "/x/..", "/;", "\\", "/%2e", "/v1/..",
        "/x/../..", "/%2e%2e",
    ];
    let what = prop_oneof![
        4 => any::<bool>().prop_map(|lower| Mangling::Encode { lower }),
        2 => Just(Mangling::EncodeTwice),
        4 => proptest::sample::select(inserted.to_vec()).prop_map(Mangling::Insert),
        2 => Just(Mangling::Case),
        3 => proptest::sample::select(appended.to_vec()).prop_map(Mangling::Append),
        2 => proptest::sample::select(prepended.to_vec()).prop_map(Mangling::Prepend),
    ];
    (any::<proptest::sample::Index>().prop_map(|index| index.index(1000)), what)
}

fn mangled(path: &str, manglings: &[(usize, Mangling)]) -> String {
    manglings.iter().fold(path.to_owned(), |mut path, (at, mangling)| {
        let at = at % path.len().max(1);
        match mangling {
            Mangling::Encode { lower } => {
                let byte = path.as_bytes()[at];
                let encoded = if *lower { format!("%{byte:02x}") } else { format!("%{byte:02X}") };
                path.replace_range(at..=at, &encoded);
            }
            Mangling::EncodeTwice => {
                let byte = path.as_bytes()[at];
                path.replace_range(at..=at, &format!("%25{byte:02x}"));
            }
            Mangling::Insert(text) => path.insert_str(at, text),
            Mangling::Case => {
                let changed: String = path[at..=at]
                    .chars()
                    .map(|c| if c.is_ascii_uppercase() { c.to_ascii_lowercase() } else { c.to_ascii_uppercase() })
                    .collect();
                path.replace_range(at..=at, &changed);
            }
            Mangling::Append(text) => path.push_str(text),
            Mangling::Prepend(text) => path.insert_str(0, text),
        }
        path
    })
}

/// How a backend reads paths.
#[derive(Debug, Clone, Copy)]
struct Reader {
    /// How often it decodes.
    decodes: u32,
    merges_slashes: bool,
    resolves_dots: bool,
    /// Cuts `;params` of each segment: before decoding, or after.
    cuts_params: Option<bool>,
    backslash_is_slash: bool,
    ignores_case: bool,
    /// Drops dots and blanks at the end, and one slash.
    trims_end: bool,
    /// A NUL ends it.
    ends_at_nul: bool,
    /// Takes it for a reference, which may begin with a host: as RFC 3986 has it, or as browsers do.
    host: Option<Host>,
    /// Does so once it has decoded it.
    decodes_host: bool,
}

#[derive(Debug, Clone, Copy)]
enum Host {
    ByRfc,
    ByBrowsers,
}

fn reader() -> impl Strategy<Value = Reader> {
    let host = prop_oneof![Just(None), Just(Some(Host::ByRfc)), Just(Some(Host::ByBrowsers))];
    let all = (0..=2u32, any::<[bool; 7]>(), proptest::option::of(any::<bool>()), host);
    all.prop_map(|(decodes, is, cuts_params, host)| Reader {
        decodes,
        merges_slashes: is[0],
        resolves_dots: is[1],
        cuts_params,
        backslash_is_slash: is[2],
        ignores_case: is[3],
        trims_end: is[4],
        ends_at_nul: is[5],
        host,
        decodes_host: is[6],
    })
}

impl Reader {
    fn behind_host(self, path: Vec<u8>) -> Vec<u8> {
        let slash = |byte: u8| if byte == b'\\' { b'/' } else { byte };
        let (path, begins) = match self.host {
            None => return path,
            Some(Host::ByRfc) => (path, 2),
            Some(Host::ByBrowsers) => {
                let path: Vec<u8> = path.into_iter().map(slash).collect();
                let slashes = path.iter().take_while(|byte| **byte == b'/').count();
                (path, slashes)
            }
        };
        if !path.starts_with(b"//") {
            return path;
        }
        let host = &path[begins..];
        host.iter().position(|byte| *byte == b'/').map_or(b"/".to_vec(), |end| host[end..].to_vec())
    }

    /// Whether it would serve this target as a download of some design.
    fn serves_download(self, target: &str) -> bool {
        let path = target.split(['?', '#']).next().unwrap().as_bytes().to_vec();
        let mut path = if self.decodes_host { path } else { self.behind_host(path) };
        if self.cuts_params == Some(true) {
            path = without_params(&path);
        }
        for _ in 0..self.decodes {
            path = decoded(&path);
        }
        if self.decodes_host {
            path = self.behind_host(path);
        }
        if self.cuts_params == Some(false) {
            path = without_params(&path);
        }
        let mut text = String::from_utf8_lossy(&path).into_owned();
        if self.ends_at_nul {
            text = text.split('\0').next().unwrap().to_owned();
        }
        if self.backslash_is_slash {
            text = text.replace('\\', "/");
        }
        if self.ignores_case {
            text = text.to_ascii_lowercase();
        }
        let Some(rest) = text.strip_prefix('/') else { return false };
        let mut segments: Vec<&str> = Vec::new();
        for segment in rest.split('/') {
            match segment {
                "" if self.merges_slashes => {}
                "." if self.resolves_dots => {}
                ".." if self.resolves_dots => drop(segments.pop()),
                segment => segments.push(segment),
            }
        }
        let mut joined = segments.join("/");
        if self.trims_end {
            // A segment of dots only is a step, not a name.
            let trimmed = joined.trim_end_matches(['.', ' ', '\t']);
            if !trimmed.ends_with('/') {
                joined = trimmed.to_owned();
            }
            joined = joined.strip_suffix('/').map(str::to_owned).unwrap_or(joined);
        }
        let parts: Vec<&str> = joined.split('/').collect();
        // Nobody has a design of blanks and dots.
        let is_id = |text: &str| text.chars().any(|c| !c.is_control() && !matches!(c, ' ' | '.' | ';'));
        matches!(&parts[..], ["v1", "designs", design, "download"] if is_id(design))
    }
}

fn without_params(path: &[u8]) -> Vec<u8> {
    let segments = path.split(|byte| *byte == b'/');
    let cut: Vec<&[u8]> = segments.map(|segment| segment.split(|byte| *byte == b';').next().unwrap()).collect();
    cut.join(&b'/')
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let (mut read, mut at) = (Vec::new(), 0);
    while at < path.len() {
        let pair = path.get(at + 1..at + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).filter(|_| path[at] == b'%') {
            Some(byte) => {
                read.push(byte);
                at += 3;
            }
            None => {
                read.push(path[at]);
                at += 1;
            }
        }
    }
    read
}

/// Whether the gate lets a request by as something that is no export.
fn slips_by(routes: &Routes, method: &Method, uri: &Uri) -> bool {
    match routes.find(method, uri, &HeaderMap::new()) {
        Match::Unmatched => true,
        Match::Misread(_) => false,
        Match::Route(found) => !found.route.action.is_export(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn what_some_backend_would_serve_as_an_export_is_one_or_is_refused(
        manglings in proptest::collection::vec(mangling(), 1..5),
        reader in reader(),
        method in proptest::sample::select(vec!["GET", "POST", "HEAD", "get", "Post"]),
    ) {
        let target = mangled("/v1/designs/Ab9/download", &manglings);
        // What is no target is refused before anybody reads it.
        let Ok(uri) = target.parse::<Uri>() else { return Ok(()) };
        prop_assume!(uri.authority().is_none());
        if reader.serves_download(uri.path()) {
            let routes: Arc<Routes> = Arc::new(routes());
            prop_assert!(!slips_by(&routes, &method.parse().unwrap(), &uri), "{target} is an export for {reader:?}");
        }
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000)
}

#[test]
fn the_backends_here_serve_what_they_should() {
    let plain = Reader {
        decodes: 1,
        merges_slashes: false,
        resolves_dots: false,
        cuts_params: None,
        backslash_is_slash: false,
        ignores_case: false,
        trims_end: false,
        ends_at_nul: false,
        host: None,
        decodes_host: false,
    };
    assert!(plain.serves_download("/v1/designs/x/download?a=b") && plain.serves_download("/v1/designs/x/%64ownload"));
    assert!(!plain.serves_download("/v1//designs/x/download") && !plain.serves_download("/v1/designs/x/preview"));
    let lenient = Reader {
        decodes: 2,
        merges_slashes: true,
        resolves_dots: true,
        cuts_params: Some(false),
        backslash_is_slash: true,
        ignores_case: true,
        trims_end: true,
        ends_at_nul: true,
        host: None,
        decodes_host: false,
    };
    for host in [Host::ByRfc, Host::ByBrowsers] {
        assert!(Reader { host: Some(host), ..plain }.serves_download("//x/v1/designs/x/download"));
    }
    for target in
        ["/V1\\designs//x/y/../download;a=b/", "/v1/designs/x/%2564ownload%00.png", "/v1/designs/x/download.%20"]
    {
        assert!(lenient.serves_download(target), "{target}");
    }
}
