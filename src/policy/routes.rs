//! Which request is which action (counting rules, section 1).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::path::{decoded, is_canonical, lenient_readings};
use super::{Action, Delivers};

/// A route, as an index into [`Routes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteId(pub u16);

/// A class of requests and what they do.
#[derive(Debug, Clone)]
pub struct Route {
    /// The name in logs and metrics.
    pub name: Arc<str>,
    /// Methods; empty means any. `GET` includes `HEAD` (RFC 9110, section 9.3.2).
    pub methods: Vec<Method>,
    /// The path, with `{name}` for one segment and `{*name}` for the rest.
    pub path: String,
    /// What else a request must carry.
    pub conditions: Conditions,
    /// What such a request does.
    pub action: Action,
    /// How it hands the image out.
    pub delivers: Delivers,
    /// Where the design's id is.
    pub design: DesignFrom,
}

impl Route {
    /// Whether a request of that method is an export: the action is one, and the method hands something out (counting rules,
    /// section 4 rule 4: OPTIONS never does, HEAD where the head is all there is to deliver).
    pub fn counts(&self, method: &Method) -> bool {
        let head_delivers = matches!(self.delivers, Delivers::Redirect | Delivers::Success);
        self.action.is_export() && *method != Method::OPTIONS && (*method != Method::HEAD || head_delivers)
    }
}

/// Query parameters and headers that a request must carry with exactly these values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Query parameters, by name.
    pub query: Vec<(String, String)>,
    /// Headers, by name.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl Conditions {
    fn is_empty(&self) -> bool {
        self.query.is_empty() && self.headers.is_empty()
    }
}

/// Where a request says which design it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DesignFrom {
    /// In the path parameter of this name.
    Path(String),
    /// In a query parameter.
    Query(String),
    /// In a header.
    Header(HeaderName),
    /// Nowhere: the action needs none.
    Nowhere,
}

/// All routes, in the order of the configuration: the first that fits wins.
#[derive(Debug, Default)]
pub struct Routes {
    routes: Vec<Route>,
    by_path: matchit::Router<Vec<RouteId>>,
    /// Export routes only, by lower-case path: where a lenient reading must not lead.
    lenient: matchit::Router<Vec<RouteId>>,
}

/// Two routes that cannot stand together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RouteConflict {
    /// The path is not a pattern.
    #[error("`{path}` is no path pattern: {reason}")]
    Pattern {
        /// Index of the route.
        route: usize,
        /// Its path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Every request of the route is taken by an earlier one.
    #[error("route `{route_name}` is never reached: route `{by}` before it takes the same requests")]
    Shadowed {
        /// Index of the route that is never reached.
        route: usize,
        /// Its name.
        route_name: Arc<str>,
        /// The name of the earlier route.
        by: Arc<str>,
    },
}

impl RouteConflict {
    /// The index of the route to mend.
    pub const fn route(&self) -> usize {
        match self {
            Self::Pattern { route, .. } | Self::Shadowed { route, .. } => *route,
        }
    }
}

/// What a request was recognised as.
#[derive(Debug)]
pub enum Match {
    /// None of the routes: forwarded untouched.
    Unmatched,
    /// One of the routes.
    Route(Found),
    /// It could be read as an export by a backend: refused with 400.
    Misread(Misread),
}

/// A request's route, and the design it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The route, for [`Routes::get`].
    pub id: RouteId,
    /// The design's id, decoded; `None` if the request does not carry it.
    pub design: Option<Arc<str>>,
}

/// Why a request cannot be classified safely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misread {
    /// The path is spelt so that a lenient backend would serve it as an export.
    Path,
    /// A parameter that a route's condition asks for is repeated or percent-encoded.
    Query(String),
}

impl std::fmt::Display for Misread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path => {
                f.write_str("The path is spelt in a way that servers read differently. Send it in its plain form.")
            }
            Self::Query(name) => {
                write!(
                    f,
                    "The query parameter \"{name}\" is repeated or percent-encoded. Send it once, in its plain form."
                )
            }
        }
    }
}

impl Routes {
    /// Compiles routes.
    ///
    /// # Errors
    ///
    /// [`RouteConflict`] for the first route that is no pattern or can never be reached.
    pub fn new(routes: Vec<Route>) -> Result<Self, RouteConflict> {
        let mut same_shape = BTreeMap::<String, Vec<(RouteId, &Route)>>::new();
        for (index, route) in routes.iter().enumerate() {
            let id = RouteId(u16::try_from(index).unwrap_or(u16::MAX));
            let earlier = same_shape.entry(shape(&route.path)).or_default();
            if let Some((_, other)) = earlier.iter().find(|(_, other)| shadows(other, route)) {
                let (route_name, by) = (route.name.clone(), other.name.clone());
                return Err(RouteConflict::Shadowed { route: index, route_name, by });
            }
            earlier.push((id, route));
        }
        let mut by_path = matchit::Router::new();
        let mut lenient = matchit::Router::<Vec<RouteId>>::new();
        for (shape, same) in &same_shape {
            let malformed = |reason: String| {
                let (RouteId(route), path) =
                    same.first().map_or((RouteId(0), ""), |(id, route)| (*id, route.path.as_str()));
                RouteConflict::Pattern { route: usize::from(route), path: path.to_owned(), reason }
            };
            by_path
                .insert(shape, same.iter().map(|(id, _)| *id).collect())
                .map_err(|error| malformed(error.to_string()))?;
            let exports = same.iter().filter(|(_, route)| route.action.is_export()).map(|(id, _)| *id);
            let lower = shape.to_ascii_lowercase();
            match lenient.at_mut(&lower) {
                // Patterns that differ in case only.
                Ok(found) if same_shape.keys().any(|other| other != shape && other.eq_ignore_ascii_case(&lower)) => {
                    found.value.extend(exports);
                }
                _ => lenient.insert(lower, exports.collect()).map_err(|error| malformed(error.to_string()))?,
            }
        }
        Ok(Self { by_path, lenient, routes })
    }

    /// All routes with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (RouteId, &Route)> {
        (0..).map(RouteId).zip(&self.routes)
    }

    /// The route of that id.
    pub fn get(&self, id: RouteId) -> Option<&Route> {
        self.routes.get(usize::from(id.0))
    }

    /// What a request is. Allocates nothing for an ordinary request that matches no route.
    pub fn find(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Match {
        let path = uri.path();
        let mut found = None;
        if let Ok(at) = self.by_path.at(path) {
            for &id in at.value {
                let Some(route) = self.get(id).filter(|route| allows(route, method)) else {
                    continue;
                };
                match meets(&route.conditions, uri, headers) {
                    Ok(true) => {
                        found = Some((id, route));
                        break;
                    }
                    Ok(false) => {}
                    Err(name) => return Match::Misread(Misread::Query(name)),
                }
            }
        }
        let canonical = is_canonical(path);
        let surely_export = canonical && found.is_some_and(|(_, route)| route.action.is_export());
        let plain = canonical && !path.bytes().any(|byte| byte.is_ascii_uppercase());
        if !surely_export && !plain && self.might_be_export(method, path) {
            return Match::Misread(Misread::Path);
        }
        match found {
            None => Match::Unmatched,
            Some((id, route)) => match design(route, uri, headers) {
                Ok(design) => Match::Route(Found { id, design }),
                Err(name) => Match::Misread(Misread::Query(name)),
            },
        }
    }

    fn might_be_export(&self, method: &Method, path: &str) -> bool {
        lenient_readings(path).any(|reading| {
            self.lenient
                .at(&reading)
                .is_ok_and(|at| at.value.iter().any(|&id| self.get(id).is_some_and(|route| allows(route, method))))
        })
    }
}

/// The pattern with parameters named by position, so that `/a/{x}` and `/a/{y}` are one pattern.
fn shape(pattern: &str) -> String {
    let segments = pattern.split('/').enumerate().map(|(index, segment)| match parameter(segment) {
        Some((_, true)) => Cow::Owned(format!("{{*p{index}}}")),
        Some((_, false)) => Cow::Owned(format!("{{p{index}}}")),
        None => Cow::Borrowed(segment),
    });
    segments.collect::<Vec<_>>().join("/")
}

/// The name of a segment that is a parameter, and whether it takes the rest of the path.
fn parameter(segment: &str) -> Option<(&str, bool)> {
    let name = segment.strip_prefix('{')?.strip_suffix('}')?;
    Some(name.strip_prefix('*').map_or((name, false), |rest| (rest, true)))
}

fn shadows(earlier: &Route, later: &Route) -> bool {
    let methods = earlier.methods.is_empty()
        || (!later.methods.is_empty() && later.methods.iter().all(|method| earlier.methods.contains(method)));
    methods && (earlier.conditions.is_empty() || earlier.conditions == later.conditions)
}

fn allows(route: &Route, method: &Method) -> bool {
    let listed = |wanted: &Method| route.methods.contains(wanted);
    route.methods.is_empty()
        || listed(method)
        || (*method == Method::HEAD && listed(&Method::GET))
        || *method == Method::OPTIONS
}

/// Whether a request meets the conditions; `Err` names a query parameter that cannot be read safely.
fn meets(conditions: &Conditions, uri: &Uri, headers: &HeaderMap) -> Result<bool, String> {
    for (name, value) in &conditions.headers {
        let mut sent = headers.get_all(name).iter();
        if sent.next() != Some(value) || sent.next().is_some() {
            return Ok(false);
        }
    }
    let mut all = true;
    for (name, value) in &conditions.query {
        all &= query_parameter(uri, name)? == Some(value.as_str());
    }
    Ok(all)
}

/// A query parameter's raw value; `Err` if it is sent more than once, or in another spelling.
fn query_parameter<'u>(uri: &'u Uri, name: &str) -> Result<Option<&'u str>, String> {
    let mut value = None;
    for pair in uri.query().unwrap_or("").split(['&', ';']) {
        let (key, raw) = pair.split_once('=').unwrap_or((pair, ""));
        let plain = key == name && !raw.contains(['%', '+']);
        if !plain && !decoded(key).trim().eq_ignore_ascii_case(name) {
            continue;
        }
        if !plain || value.is_some() {
            return Err(name.to_owned());
        }
        value = Some(raw);
    }
    Ok(value)
}

fn design(route: &Route, uri: &Uri, headers: &HeaderMap) -> Result<Option<Arc<str>>, String> {
    let text = match &route.design {
        DesignFrom::Path(name) => path_parameter(&route.path, uri.path(), name).map(decoded),
        DesignFrom::Query(name) => query_parameter(uri, name)?.map(Cow::Borrowed),
        DesignFrom::Header(name) => {
            let mut sent = headers.get_all(name).iter();
            let only = sent.next().filter(|_| sent.next().is_none());
            only.and_then(|value| value.to_str().ok()).map(Cow::Borrowed)
        }
        DesignFrom::Nowhere => None,
    };
    Ok(text.filter(|text| !text.is_empty()).map(|text| Arc::from(&*text)))
}

/// The raw value of a pattern's parameter in a path that matches the pattern.
fn path_parameter<'p>(pattern: &str, path: &'p str, name: &str) -> Option<&'p str> {
    let mut rest = path;
    for segment in pattern.split('/') {
        let (first, others) = rest.split_once('/').unwrap_or((rest, ""));
        match parameter(segment) {
            Some((known, true)) if known == name => return Some(rest),
            Some((known, false)) if known == name => return Some(first),
            _ => rest = others,
        }
    }
    None
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

    fn route(name: &str, methods: &[Method], path: &str, action: Action) -> Route {
        Route {
            name: name.into(),
            methods: methods.to_vec(),
            path: path.into(),
            conditions: Conditions::default(),
            action,
            delivers: Delivers::File,
            design: DesignFrom::Path("design".into()),
        }
    }

    fn routes() -> Routes {
        let mut by_query = route("by-query", &[Method::GET], "/render", Action::Download);
        by_query.conditions.query = vec![("as".into(), "file".into())];
        by_query.design = DesignFrom::Query("id".into());
        Routes::new(vec![
            route("download", &[Method::GET, Method::POST], "/v1/designs/{design}/download", Action::Download),
            route("view", &[Method::GET], "/v1/designs/{design}/{what}", Action::View),
            route("save", &[Method::PUT], "/v1/designs/{design}", Action::SaveDesign),
            by_query,
        ])
        .unwrap()
    }

    fn found(method: Method, target: &str) -> String {
        let routes = routes();
        match routes.find(&method, &target.parse().unwrap(), &HeaderMap::new()) {
            Match::Unmatched => "-".into(),
            Match::Misread(_) => "400".into(),
            Match::Route(found) => {
                format!("{} {}", routes.get(found.id).unwrap().name, found.design.as_deref().unwrap_or(""))
            }
        }
    }

    #[test]
    fn a_request_is_recognised_by_method_and_path() {
        assert_eq!(found(Method::GET, "/v1/designs/Ab9/download"), "download Ab9");
        assert_eq!(found(Method::POST, "/v1/designs/Ab9/download?size=2"), "download Ab9");
        assert_eq!(found(Method::HEAD, "/v1/designs/Ab9/download"), "download Ab9");
        assert_eq!(found(Method::PUT, "/v1/designs/Ab9"), "save Ab9");
        assert_eq!(found(Method::GET, "/v1/designs/Ab9/preview"), "view Ab9");
    }

    #[test]
    fn what_no_route_names_is_unmatched() {
        assert_eq!(found(Method::DELETE, "/v1/designs/x/download"), "-");
        assert_eq!(found(Method::GET, "/v1/designs/x"), "-");
        assert_eq!(found(Method::GET, "/assets/Logo.PNG"), "-");
        assert_eq!(found(Method::GET, "/a//b/../c;d/%41"), "-");
    }

    #[test]
    fn a_design_id_is_decoded() {
        assert_eq!(found(Method::GET, "/v1/designs/caf%C3%A9/download"), "download café");
    }

    #[test]
    fn a_path_that_a_lenient_backend_would_serve_as_an_export_is_refused() {
        for path in [
            "/v1//designs/x/download",
            "/v1/designs/x/download/",
            "/v1/designs/x/%64ownload",
            "/v1/designs/x/DOWNLOAD",
            "/v1/designs/x%2Fdownload",
            "/v1/designs/x/preview/../download",
            "/v1/designs/x/download;a=b",
            "/v1/designs/x;a/download",
        ] {
            assert_eq!(found(Method::GET, path), "400", "{path}");
        }
        assert_eq!(found(Method::PUT, "/v1/designs/x/DOWNLOAD"), "-", "not a method of the export");
    }

    #[test]
    fn a_condition_on_the_query_must_be_met_in_plain_spelling_and_once() {
        assert_eq!(found(Method::GET, "/render?as=file&id=d1"), "by-query d1");
        assert_eq!(found(Method::GET, "/render?as=preview&id=d1"), "-");
        assert_eq!(found(Method::GET, "/render?id=d1"), "-");
        for query in
            ["as=preview&as=file", "as=fil%65", "%61s=file", "AS=file", "as=preview;as=file", "as=file&id=a&id=b"]
        {
            assert_eq!(found(Method::GET, &format!("/render?{query}")), "400", "{query}");
        }
    }

    #[test]
    fn a_condition_on_a_header_must_be_met_once() {
        let mut to_app = route("to-app", &[], "/share", Action::ShareFile);
        to_app.conditions.headers = vec![(HeaderName::from_static("x-target"), HeaderValue::from_static("app"))];
        to_app.design = DesignFrom::Header(HeaderName::from_static("x-design"));
        let routes = Routes::new(vec![to_app]).unwrap();
        let uri: Uri = "/share".parse().unwrap();
        let mut headers = HeaderMap::new();
        assert!(matches!(routes.find(&Method::POST, &uri, &headers), Match::Unmatched));
        headers.append("x-target", HeaderValue::from_static("app"));
        headers.append("x-design", HeaderValue::from_static("d1"));
        let Match::Route(found) = routes.find(&Method::POST, &uri, &headers) else { panic!("no match") };
        assert_eq!(found.design.as_deref(), Some("d1"));
    }

    #[test]
    fn a_route_that_can_never_be_reached_is_an_error() {
        let first = route("a", &[Method::GET], "/x/{design}", Action::Download);
        let mut second = route("b", &[Method::GET], "/x/{other}", Action::View);
        let error = Routes::new(vec![first.clone(), second.clone()]).unwrap_err();
        assert_eq!(error, RouteConflict::Shadowed { route: 1, route_name: "b".into(), by: "a".into() });
        second.methods = vec![Method::PUT];
        assert!(Routes::new(vec![first.clone(), second.clone()]).is_ok(), "other methods");
        second.methods = vec![Method::GET];
        assert!(Routes::new(vec![route("c", &[], "/y/{design}", Action::View), second]).is_ok(), "another path");
    }

    #[test]
    fn a_conditional_route_may_stand_before_its_fallback() {
        let mut first = route("a", &[Method::GET], "/x/{design}", Action::Download);
        first.conditions.query = vec![("as".into(), "file".into())];
        let second = route("b", &[Method::GET], "/x/{design}", Action::View);
        assert!(Routes::new(vec![first, second]).is_ok());
    }
}
