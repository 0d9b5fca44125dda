//! Which request is which action (counting rules, section 1).

use std::borrow::Cow;
use std::sync::Arc;

use http::header::{CONNECTION, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::host;
use super::path::{decoded, decoded_text, is_canonical, is_read_alike, lenient_readings};
use super::pattern::Pattern;
use super::{Action, Delivers, query};

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
    /// The path.
    pub path: Pattern,
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
#[derive(Debug, Clone, Default)]
pub struct Routes {
    routes: Vec<Arc<Route>>,
    /// The routes' paths as [`lenient_readings`] spells them.
    lenient: Vec<Pattern>,
    /// Whether an export's own path is spelt otherwise: then a plain path may be a disguise of it.
    has_odd_export: bool,
    /// Whether an export's own path has what may be percent-encoded, and need not be.
    has_encodable_export: bool,
    /// The methods of exports that a POST may be taken for.
    export_methods: Vec<Method>,
}

/// A route that is never reached: every request of it is taken by an earlier one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("route `{name}` is never reached: route `{by}` before it takes the same requests")]
pub struct Shadowed {
    /// Index of the route that is never reached.
    pub route: usize,
    /// Its name.
    pub name: Arc<str>,
    /// The name of the earlier route.
    pub by: Arc<str>,
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
#[derive(Debug, Clone)]
pub struct Found {
    /// The route's index.
    pub id: RouteId,
    /// The route.
    pub route: Arc<Route>,
    /// The design's id, decoded; `None` if the request does not carry it.
    pub design: Option<Arc<str>>,
}

/// Why a request cannot be classified safely.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misread {
    /// The path is spelt so that a lenient backend would serve it as an export.
    Path,
    /// A parameter that an export route asks for is repeated, spelt in another way, or percent-encoded where it must have a certain value.
    Query(String),
    /// There are more parameters than all backends read, on a route that asks for one.
    TooManyParameters,
    /// The method is one of an export route's, in another case (methods are case-sensitive, RFC 9110, section 9.1; not all backends are), or
    /// said by a parameter.
    Method,
    /// A header that an export route asks for is repeated, named on a `Connection` line, or spelt with `_` or `.` for `-`.
    Header(HeaderName),
}

impl std::fmt::Display for Misread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path => {
                f.write_str("The path is spelt in a way that servers read differently. Send it in its plain form.")
            }
            Self::Method => f.write_str(
                "The method can be read in more than one way. Send it in capitals, and no other in the query.",
            ),
            Self::Query(name) => write!(
                f,
                "The query parameter \"{name}\" can be read in more than one way. Send it once, in its plain form."
            ),
            Self::TooManyParameters => write!(f, "The query has more than {} parameters. Send fewer.", query::MOST),
            Self::Header(name) => {
                write!(f, "The header \"{name}\" can be read in more than one way. Send it once, in its plain form.")
            }
        }
    }
}

impl Routes {
    /// Routes in this order.
    ///
    /// # Errors
    ///
    /// [`Shadowed`] for the first route that can never be reached.
    pub fn new(routes: Vec<Route>) -> Result<Self, Shadowed> {
        for (index, later) in routes.iter().enumerate() {
            if let Some(earlier) = routes[..index].iter().find(|earlier| shadows(earlier, later)) {
                return Err(Shadowed { route: index, name: later.name.clone(), by: earlier.name.clone() });
            }
        }
        let lenient: Vec<Pattern> = routes.iter().map(|route| route.path.lenient()).collect();
        let has_odd_export =
            routes.iter().zip(&lenient).any(|(route, lenient)| route.action.is_export() && route.path != *lenient);
        let has_encodable_export = routes.iter().any(|route| route.action.is_export() && route.path.may_be_encoded());
        let exports = || routes.iter().filter(|route| route.action.is_export());
        let takes_any = exports().any(|route| route.methods.is_empty());
        let usual = [Method::GET, Method::HEAD, Method::PUT, Method::PATCH, Method::DELETE];
        let listed = exports().flat_map(|route| &route.methods).filter(|method| !usual.contains(method)).cloned();
        let mut export_methods: Vec<Method> = listed.collect();
        export_methods
            .extend(usual.into_iter().filter(|method| takes_any || exports().any(|route| allows(route, method))));
        export_methods.retain(|method| *method != Method::POST);
        export_methods.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
        export_methods.dedup();
        let routes = routes.into_iter().map(Arc::new).collect();
        Ok(Self { lenient, has_odd_export, has_encodable_export, export_methods, routes })
    }

    /// All routes with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (RouteId, &Arc<Route>)> {
        (0..).map(RouteId).zip(&self.routes)
    }

    /// Exports of which an earlier route that is none takes a part, and hardly as it was meant: it is no exception within their paths. The
    /// earlier one first.
    pub fn curtailed(&self) -> impl Iterator<Item = (&Route, &Route)> {
        let pairs = self.routes.iter().enumerate().flat_map(|(index, later)| {
            self.routes[..index].iter().map(move |earlier| (earlier.as_ref(), later.as_ref()))
        });
        pairs.filter(|(earlier, later)| {
            !earlier.action.is_export() && later.action.is_export() && curtails(earlier, later)
        })
    }

    /// What a request is. Allocates nothing for an ordinary request that matches no route.
    pub fn find(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Match {
        let found = self.find_by(method, uri, headers);
        let is_one_by = |other: &Method| self.find_by(other, uri, headers).may_be_export();
        if !found.may_be_export() && self.other_methods(method, uri).any(|other| is_one_by(&other)) {
            return Match::Misread(Misread::Method);
        }
        found
    }

    /// The first export that a misread request may be meant for.
    pub fn nearly(&self, method: &Method, uri: &Uri) -> Option<RouteId> {
        let path = uri.path();
        let readings: Option<Vec<String>> = lenient_readings(path).map(Iterator::collect);
        let methods: Vec<Cow<'_, Method>> = self.other_methods(method, uri).chain([Cow::Borrowed(method)]).collect();
        let fits = |route: &Route, lenient: &Pattern| {
            route.path.fits(path) || readings.as_ref().is_none_or(|all| all.iter().any(|reading| lenient.fits(reading)))
        };
        let mut exports = self.iter().zip(&self.lenient).filter(|((_, route), _)| route.action.is_export());
        let allowed = |route: &Route| methods.iter().any(|method| allows(route, method));
        let nearly = exports.find(|((_, route), lenient)| allowed(route) && fits(route, lenient));
        nearly.map(|((id, _), _)| id)
    }

    /// What else some backends take the method for: the same in capitals, and with POST what a parameter `_method` says (Laravel, Symfony,
    /// Express with method-override), if exports have it. However many parameters there are, each once.
    fn other_methods<'r>(&'r self, method: &Method, uri: &Uri) -> impl Iterator<Item = Cow<'r, Method>> {
        let is_plain = !method.as_str().bytes().any(|byte| byte.is_ascii_lowercase());
        let capitals = || method.as_str().to_ascii_uppercase().parse().ok();
        let itself = if is_plain { None } else { capitals() };
        let query = uri.query().filter(|_| method.as_str().eq_ignore_ascii_case("POST")).unwrap_or_default();
        let parameters = query::pairs(query).filter_map(|pair| pair.split_once('='));
        let said: Vec<_> = parameters.filter(|(key, _)| query::is_named(key, "_method")).collect();
        let is_said = move |method: &&Method| {
            said.iter().any(|(_, value)| decoded(value).trim().eq_ignore_ascii_case(method.as_str()))
        };
        let by_parameter = self.export_methods.iter().filter(|method| is_said(method)).map(Cow::Borrowed);
        itself.map(Cow::Owned).into_iter().chain(by_parameter.collect::<Vec<_>>())
    }

    fn find_by(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Match {
        let path = uri.path();
        let (id, route) = match self.first_fit(method, uri, headers) {
            Ok(Some(found)) => found,
            Ok(None) if self.is_disguised_export(method, uri, headers) => return Match::Misread(Misread::Path),
            Ok(None) => return Match::Unmatched,
            Err(misread) => return Match::Misread(misread),
        };
        // An export in its plain spelling is one, whatever else it could be read as.
        let ends_alike = path.strip_suffix('/').filter(|_| route.path.ends_in_slash());
        let is_plain_export = route.action.is_export() && is_canonical(ends_alike.unwrap_or(path));
        if !is_plain_export && self.is_disguised_export(method, uri, headers) {
            return Match::Misread(Misread::Path);
        }
        match design(route, uri, headers) {
            Err(misread) if route.action.is_export() => Match::Misread(misread),
            design => Match::Route(Found { id, route: route.clone(), design: design.unwrap_or_default() }),
        }
    }

    fn first_fit(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Option<(RouteId, &Arc<Route>)>, Misread> {
        for (id, route) in self.iter() {
            if !allows(route, method) || !route.path.fits(uri.path()) {
                continue;
            }
            match meets(&route.conditions, uri, headers) {
                Ok(true) => return Ok(Some((id, route))),
                // What is no export takes only what it surely is; what is left of it may still be an export.
                Err(misread) if route.action.is_export() => return Err(misread),
                Ok(false) | Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Whether a lenient backend might serve this as an export, though its path is not spelt as one.
    fn is_disguised_export(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> bool {
        let path = uri.path();
        let is_plain = is_canonical(path)
            && is_read_alike(path)
            && !path.bytes().any(|byte| byte.is_ascii_uppercase())
            && !(self.has_encodable_export && path.contains('%'));
        if is_plain && !self.has_odd_export {
            return false;
        }
        let Some(mut readings) = lenient_readings(path) else {
            return self.routes.iter().any(|route| route.action.is_export() && allows(route, method));
        };
        readings.any(|reading| {
            let mut fitting = self.routes.iter().zip(&self.lenient).filter(|(route, pattern)| {
                let may_meet = || meets(&route.conditions, uri, headers).unwrap_or(route.action.is_export());
                allows(route, method) && pattern.fits(&reading) && may_meet()
            });
            fitting.next().is_some_and(|(route, _)| route.action.is_export())
        })
    }
}

impl Match {
    fn may_be_export(&self) -> bool {
        match self {
            Self::Unmatched => false,
            Self::Route(found) => found.route.action.is_export(),
            Self::Misread(_) => true,
        }
    }
}

/// Whether the earlier route takes every request of the later one.
fn shadows(earlier: &Route, later: &Route) -> bool {
    let methods = match later.methods.as_slice() {
        [] => earlier.methods.is_empty(),
        methods => methods.iter().all(|method| allows(earlier, method)),
    };
    methods && earlier.path.includes(&later.path) && asks_no_more(earlier, later)
}

/// Whether the earlier route takes some requests of the later one that count, though it asks for nothing that the later one does not ask
/// for, and is no exception within its paths.
fn curtails(earlier: &Route, later: &Route) -> bool {
    let methods = [&earlier.methods, &later.methods].into_iter().flatten().chain([&Method::HEAD, &Method::GET]);
    let mut both = methods.filter(|method| allows(earlier, method) && allows(later, method) && later.counts(method));
    both.next().is_some()
        && earlier.path.meets(&later.path)
        && !earlier.path.is_exception_within(&later.path)
        && asks_no_more(earlier, later)
}

/// Whether whatever meets the later route's conditions meets the earlier one's.
fn asks_no_more(earlier: &Route, later: &Route) -> bool {
    let Conditions { query, headers } = &earlier.conditions;
    query.iter().all(|condition| later.conditions.query.contains(condition))
        && headers.iter().all(|condition| later.conditions.headers.contains(condition))
}

fn allows(route: &Route, method: &Method) -> bool {
    let listed = |wanted: &Method| route.methods.contains(wanted);
    route.methods.is_empty()
        || listed(method)
        || (*method == Method::HEAD && listed(&Method::GET))
        || *method == Method::OPTIONS
}

/// Whether a request meets the conditions; `Err` if it could be read either way.
fn meets(conditions: &Conditions, uri: &Uri, headers: &HeaderMap) -> Result<bool, Misread> {
    for (name, value) in &conditions.headers {
        if *name == HOST {
            match headers.get(HOST) {
                Some(sent) if host::is_same(sent, value) => continue,
                Some(_) => return Ok(false),
                // As HTTP/1.0 allows: whose it is then is the backend's guess.
                None => return Err(Misread::Header(HOST)),
            }
        }
        if is_in_doubt(name, headers) {
            return Err(Misread::Header(name.clone()));
        }
        let mut sent = headers.get_all(name).iter();
        match (sent.next(), sent.next()) {
            (Some(only), None) if only == value => {}
            (Some(first), Some(_)) if first == value || headers.get_all(name).iter().any(|other| other == value) => {
                return Err(Misread::Header(name.clone()));
            }
            _ => return Ok(false),
        }
    }
    let mut all = true;
    for (name, value) in &conditions.query {
        let sent = query::parameter(uri, name)?;
        if sent.is_some_and(|sent| !sent.plain || sent.value.contains(['%', '+'])) {
            return Err(Misread::Query(name.clone()));
        }
        all &= sent.is_some_and(|sent| sent.value == value);
    }
    Ok(all)
}

/// The design's id; `Err` if the request names it in a way that could be read as another.
fn design(route: &Route, uri: &Uri, headers: &HeaderMap) -> Result<Option<Arc<str>>, Misread> {
    let text = match &route.design {
        // Two ids that are no text would be one, were they read as a log does.
        DesignFrom::Path(name) => match route.path.parameter(name, uri.path()).map(decoded_text) {
            Some(None) => return Err(Misread::Path),
            text => text.flatten(),
        },
        DesignFrom::Query(name) => match query::parameter(uri, name)? {
            // A form means a blank by `+`.
            Some(sent) if !sent.plain || sent.value.contains('+') => return Err(Misread::Query(name.clone())),
            sent => match sent.map(|sent| decoded_text(sent.value)) {
                Some(None) => return Err(Misread::Query(name.clone())),
                text => text.flatten(),
            },
        },
        DesignFrom::Header(name) => {
            let mut sent = headers.get_all(name).iter();
            let first = sent.next();
            if sent.next().is_some() || is_in_doubt(name, headers) {
                return Err(Misread::Header(name.clone()));
            }
            first.and_then(|value| value.to_str().ok()).map(Cow::Borrowed)
        }
        DesignFrom::Nowhere => None,
    };
    Ok(text.filter(|text| !text.is_empty()).map(|text| Arc::from(&*text)))
}

/// Whether a header could be seen by the backend and not by the gate, or the other way round: named on a `Connection` line it is
/// dropped on the way, and some backends read `_` or `.` in a name as `-`.
pub(super) fn is_in_doubt(name: &HeaderName, headers: &HeaderMap) -> bool {
    let named_on = |line: &HeaderValue| {
        let line = line.to_str().unwrap_or("");
        line.split(',').any(|named| named.trim().eq_ignore_ascii_case(name.as_str()))
    };
    let alike = |other: &HeaderName| {
        other != name && other.as_str().contains(['_', '.']) && other.as_str().replace(['_', '.'], "-") == name.as_str()
    };
    headers.get_all(CONNECTION).iter().any(named_on) || headers.keys().any(alike)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use super::*;

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
                format!("{} {}", found.route.name, found.design.as_deref().unwrap_or(""))
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
    fn a_method_in_another_case_is_no_way_around() {
        for method in ["get", "Get", "pOST", "head"] {
            assert_eq!(found(method.parse().unwrap(), "/v1/designs/x/download"), "400", "{method}");
            assert_eq!(found(method.parse().unwrap(), "/v1/designs//x/download"), "400", "{method}");
            assert_eq!(found(method.parse().unwrap(), "/elsewhere"), "-", "{method}");
        }
        assert_eq!(found("put".parse().unwrap(), "/v1/designs/x"), "-", "no export");
    }

    #[test]
    fn a_method_that_a_parameter_says_is_no_way_around() {
        let routes =
            Routes::new(vec![route("download", &[Method::GET], "/v1/designs/{design}/file", Action::Download)]);
        let routes = routes.unwrap();
        let find = |method: Method, target: &str| routes.find(&method, &target.parse().unwrap(), &HeaderMap::new());
        for query in [
            "_method=GET",
            "a=1&_method=get",
            "%5fmethod=G%45T",
            "_METHOD=PUT;_method=GET",
            "_method[]=GET",
            "_method=Head",
        ] {
            let found = find(Method::POST, &format!("/v1/designs/x/file?{query}"));
            assert!(matches!(found, Match::Misread(Misread::Method)), "{query}");
        }
        for (method, target) in [
            (Method::POST, "/v1/designs/x/file?_method=DELETE"),
            (Method::POST, "/v1/designs/x/other?_method=GET"),
            (Method::POST, "/v1/designs/x/file?method=GET"),
            (Method::PUT, "/v1/designs/x/file?_method=GET"),
            (Method::POST, "/v1/designs/x/file?_method=OPTIONS"),
        ] {
            assert!(matches!(find(method, target), Match::Unmatched), "{target}");
        }
        let save = route("save", &[Method::POST], "/d/{design}", Action::SaveDesign);
        let routes = Routes::new(vec![save, route("download", &[], "/d/{design}", Action::Download)]).unwrap();
        let target = "/d/x?_method=GET".parse().unwrap();
        assert!(matches!(routes.find(&Method::POST, &target, &HeaderMap::new()), Match::Misread(Misread::Method)));
    }

    #[test]
    fn a_path_that_could_be_read_in_very_many_ways_is_read_in_none() {
        let odd = "/.php/a%u0025u003b%253b%25u005c;x%5c%u003f%3f%23%00%2500b\\c%u0023;y%u002fd%252f";
        assert_eq!(found(Method::GET, odd), "400");
        assert_eq!(found(Method::DELETE, odd), "-", "no export has that method");
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
            "/v1/designs/x/download%3Fa=b",
            "/v1/designs/x/download%23a",
            "/v1/designs/x/%u0064ownload",
            "/index.php/v1/designs/x/download",
            "/App.PHP/v1/designs/x/download",
        ] {
            assert_eq!(found(Method::GET, path), "400", "{path}");
        }
        assert_eq!(found(Method::PUT, "/v1/designs/x/DOWNLOAD"), "-", "not a method of the export");
    }

    #[test]
    fn what_needs_no_encoding_is_no_way_around_if_it_is_encoded() {
        let by_path =
            |path: &str| Routes::new(vec![route("download", &[Method::GET], path, Action::Download)]).unwrap();
        let found = |path: &str, target: &str| match by_path(path).find(
            &Method::GET,
            &target.parse().unwrap(),
            &HeaderMap::new(),
        ) {
            Match::Unmatched => "-",
            Match::Misread(_) => "400",
            Match::Route(_) => "export",
        };
        let cases = [
            ("/d/{design}/image@2x", "/d/x/image@2x", "export"),
            ("/d/{design}/image@2x", "/d/%40x/image@2x", "export"),
            ("/d/{design}/image@2x", "/d/x/image%402x", "400"),
            ("/d/{design}/image@2x", "/d/x/image%2540", "-"),
            ("/d/{design}/image@2x", "/d/x/other%40", "-"),
            ("/export:png/{design}", "/export%3apng/x", "400"),
            ("/export:png/{design}", "/export%3Apng/x", "400"),
            ("/t%C3%A9l/{design}", "/t%C3%A9l/x", "export"),
            ("/t%C3%A9l/{design}", "/t%c3%a9l/x", "400"),
            ("/my%20files/{design}", "/my%20files/x", "export"),
            ("/my%20files/{design}", "/my+files/x", "-"),
        ];
        for (path, target, expected) in cases {
            assert_eq!(found(path, target), expected, "{target} on {path}");
        }
    }

    #[test]
    fn a_condition_on_the_query_must_be_met_in_plain_spelling_and_once() {
        assert_eq!(found(Method::GET, "/render?as=file&id=d1"), "by-query d1");
        assert_eq!(found(Method::GET, "/render?as=preview&id=d1"), "-");
        assert_eq!(found(Method::GET, "/render?id=d1"), "-");
        let very_many = format!("{}as=file", "a&".repeat(query::MOST));
        for query in [
            "as=preview&as=file",
            "as=fil%65",
            "%61s=file",
            "AS=file",
            "as[]=file",
            "as=preview;as=file",
            "as=file&id=a&id=b",
            "as=file&id=a&id[]=b",
            &very_many,
        ] {
            assert_eq!(found(Method::GET, &format!("/render?{query}")), "400", "{query}");
        }
    }

    #[test]
    fn what_is_no_export_for_a_parameter_is_one_if_a_backend_may_not_see_that() {
        let mut preview = route("preview", &[], "/d/{design}", Action::View);
        preview.conditions.query = vec![("preview".into(), "1".into())];
        let routes = Routes::new(vec![preview, route("download", &[], "/d/{design}", Action::Download)]).unwrap();
        let is_export = |query: &str| {
            let target = format!("/d/x?{query}").parse().unwrap();
            routes.find(&Method::GET, &target, &HeaderMap::new()).may_be_export()
        };
        let before = |others: usize| format!("{}preview=1", "a&".repeat(others));
        assert!(!is_export("preview=1") && !is_export(&before(query::MOST - 1)));
        for query in ["preview=1&preview[]=0", "preview[]=1", "preview=1&Preview=0", &before(query::MOST)] {
            assert!(is_export(query), "{query}");
        }
    }

    #[test]
    fn a_route_that_is_bound_to_a_host_is_not_missed_by_another_spelling_of_it() {
        let mut bound = route("download", &[Method::GET], "/d/{design}", Action::Download);
        bound.conditions.headers = vec![(HOST, HeaderValue::from_static("exports.example"))];
        let routes = Routes::new(vec![bound]).unwrap();
        let find = |host: Option<&'static str>| {
            let headers = host.map(|host| (HOST, HeaderValue::from_static(host))).into_iter().collect();
            routes.find(&Method::GET, &"/d/d1".parse().unwrap(), &headers)
        };
        for host in ["exports.example", "EXPORTS.example", "exports.example:443", "exports.example."] {
            assert!(matches!(find(Some(host)), Match::Route(_)), "{host}");
        }
        assert!(matches!(find(Some("www.example")), Match::Unmatched));
        assert!(matches!(find(None), Match::Misread(Misread::Header(_))), "a backend may take it for its own");
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
        for (name, value) in
            [("x-target", "link"), ("x_target", "app"), ("connection", "close, X-Target"), ("x.design", "d2")]
        {
            let mut doubtful = headers.clone();
            doubtful.append(name, HeaderValue::from_static(value));
            let found = routes.find(&Method::POST, &uri, &doubtful);
            assert!(matches!(found, Match::Misread(Misread::Header(_))), "{name}: {found:?}");
        }
    }

    #[test]
    fn a_route_that_can_never_be_reached_is_an_error() {
        let first = route("a", &[Method::GET], "/x/{design}", Action::Download);
        let mut second = route("b", &[Method::GET], "/x/{other}", Action::View);
        let error = Routes::new(vec![first.clone(), second.clone()]).unwrap_err();
        assert_eq!(error, Shadowed { route: 1, name: "b".into(), by: "a".into() });
        second.methods = vec![Method::PUT];
        assert!(Routes::new(vec![first.clone(), second.clone()]).is_ok(), "other methods");
        second.methods = vec![Method::GET];
        assert!(
            Routes::new(vec![route("c", &[], "/y/{design}", Action::View), second.clone()]).is_ok(),
            "another path"
        );
        second.path = Pattern::parse("/x/static").unwrap();
        assert!(Routes::new(vec![first.clone(), second.clone()]).is_err(), "a pattern takes what is static after it");
        assert!(Routes::new(vec![second.clone(), first.clone()]).is_ok());
        second.methods = vec![Method::HEAD];
        assert!(Routes::new(vec![first, second]).is_err(), "GET includes HEAD");
    }

    #[test]
    fn an_export_is_curtailed_by_what_counts_nothing_and_is_no_exception_within_it() {
        let download = |methods: &[Method]| route("download", methods, "/d/{design}/download", Action::Download);
        let curtails =
            |earlier: Route, later: Route| Routes::new(vec![earlier, later]).unwrap().curtailed().count() == 1;
        let view = |methods: &[Method], path| route("view", methods, path, Action::View);
        let (get, both) = ([Method::GET], [Method::GET, Method::POST]);
        assert!(curtails(view(&get, "/d/{design}/{what}"), download(&both)));
        assert!(curtails(view(&get, "/d/{design}/download"), download(&both)), "the same paths");
        assert!(curtails(view(&get, "/{*all}"), download(&[])), "of any method");
        assert!(curtails(view(&get, "/{all}/1/{what}"), download(&get)), "some of its paths, and others");
        assert!(!curtails(view(&get, "/d/thumbnails/download"), download(&get)), "an exception");
        assert!(!curtails(view(&[Method::DELETE], "/d/{design}/{what}"), download(&both)), "other methods");
        assert!(!curtails(view(&[Method::HEAD], "/d/{design}/{what}"), download(&both)), "which hands nothing out");
        assert!(!curtails(view(&[Method::OPTIONS], "/{*all}"), download(&[])), "nor does that");
        let redirects = Route { delivers: Delivers::Redirect, ..download(&get) };
        assert!(curtails(view(&[Method::HEAD], "/d/{design}/{what}"), redirects), "its head hands the file out");
        let of_tenants = route("download", &get, "/{tenant}/{design}/download", Action::Download);
        assert!(!curtails(view(&get, "/static/{*path}"), of_tenants), "an exception as well");
        let share = route("share", &get, "/d/{design}/{what}", Action::ShareFile);
        assert!(!curtails(share, download(&both)), "which counts as well");
        let mut previews = view(&get, "/d/{design}/{what}");
        previews.conditions.query = vec![("preview".into(), "1".into())];
        assert!(!curtails(previews.clone(), download(&both)), "it says which");
        let mut asking = download(&both);
        asking.conditions = previews.conditions.clone();
        assert!(curtails(previews, asking), "which the other asks for as well");
    }

    #[test]
    fn the_first_route_that_fits_wins_however_specific_the_others_are() {
        let mut special = route("special", &[Method::GET], "/d/{design}/preview", Action::View);
        special.conditions.query = vec![("small".into(), "1".into())];
        let all = route("all", &[], "/d/{design}/{what}", Action::Download);
        let deep = route("deep", &[Method::GET], "/d/{design}/preview/{*rest}", Action::View);
        let routes = Routes::new(vec![special, all, deep]).unwrap();
        let name = |method, target: &str| match routes.find(&method, &target.parse().unwrap(), &HeaderMap::new()) {
            Match::Route(found) => found.route.name.to_string(),
            other => format!("{other:?}"),
        };
        assert_eq!(name(Method::GET, "/d/x/preview?small=1"), "special");
        assert_eq!(name(Method::GET, "/d/x/preview?small=0"), "all", "a condition that is not met ends no search");
        assert_eq!(name(Method::POST, "/d/x/preview?small=1"), "all", "nor does a method");
        assert_eq!(name(Method::GET, "/d/x/preview/a/b"), "deep");
        assert_eq!(name(Method::GET, "/d/x"), "Unmatched");
    }

    #[test]
    fn an_export_route_that_ends_in_a_slash_has_disguises_as_well() {
        let routes = Routes::new(vec![route("d", &[Method::GET], "/V1/{design}/Download/", Action::Download)]).unwrap();
        let found = |path: &str| routes.find(&Method::GET, &path.parse().unwrap(), &HeaderMap::new());
        assert!(matches!(found("/V1/x/Download/"), Match::Route(_)));
        for path in [
            "/V1/x/Download",
            "/v1/x/download",
            "/V1/x/Download//",
            "/v1/x/download/",
            "/V1//x/Download/",
            "/V1/x/%44ownload/",
        ] {
            assert!(matches!(found(path), Match::Misread(_)), "{path}");
        }
    }

    #[test]
    fn a_header_that_is_dropped_on_the_way_does_not_turn_an_export_into_a_view() {
        let mut view = route("view", &[], "/image/{design}", Action::View);
        view.conditions.headers = vec![(HeaderName::from_static("x-purpose"), HeaderValue::from_static("preview"))];
        let routes = Routes::new(vec![view, route("export", &[], "/image/{design}", Action::Download)]).unwrap();
        let uri: Uri = "/image/d1".parse().unwrap();
        let mut headers =
            HeaderMap::from_iter([(HeaderName::from_static("x-purpose"), HeaderValue::from_static("preview"))]);
        let name = |headers: &HeaderMap| match routes.find(&Method::GET, &uri, headers) {
            Match::Route(found) => found.route.name.to_string(),
            other => format!("{other:?}"),
        };
        assert_eq!(name(&headers), "view");
        headers.insert(CONNECTION, HeaderValue::from_static("x-purpose"));
        assert_eq!(name(&headers), "export");
    }

    #[test]
    fn an_export_with_a_condition_does_not_make_other_paths_suspicious() {
        let mut export = route("export", &[], "/d/{design}/image", Action::Download);
        export.conditions.query = vec![("as".into(), "file".into())];
        for routes in [vec![export.clone()], vec![export, route("view", &[], "/d/{design}/image", Action::View)]] {
            let routes = Routes::new(routes).unwrap();
            let find = |target: &str| routes.find(&Method::GET, &target.parse().unwrap(), &HeaderMap::new());
            for target in ["/d/AbC/image", "/d/AbC/image?as=preview", "/d/abc/image"] {
                assert!(!matches!(find(target), Match::Misread(_)), "{target}");
            }
            assert!(matches!(find("/d/AbC/image?as=file"), Match::Route(_)));
            assert!(matches!(find("/d/AbC/IMAGE?as=file"), Match::Misread(_)));
        }
    }

    #[test]
    fn a_route_that_is_no_export_is_never_refused_for_its_design() {
        let mut view = route("view", &[], "/view", Action::View);
        view.design = DesignFrom::Query("id".into());
        let mut export = route("export", &[], "/export", Action::Download);
        export.design = DesignFrom::Query("id".into());
        let routes = Routes::new(vec![view, export]).unwrap();
        let found = |target: &str| routes.find(&Method::GET, &target.parse().unwrap(), &HeaderMap::new());
        assert!(matches!(found("/view?id=a&id=b"), Match::Route(Found { design: None, .. })));
        assert!(matches!(found("/export?id=a&id=b"), Match::Misread(_)));
        assert!(matches!(found("/export?%69d=a"), Match::Misread(_)));
        let Match::Route(encoded) = found("/export?id=YQ%3D%3D") else { panic!("an id may need encoding") };
        assert_eq!(encoded.design.as_deref(), Some("YQ=="));
    }

    #[test]
    fn a_conditional_route_may_stand_before_its_fallback() {
        let mut first = route("a", &[Method::GET], "/x/{design}", Action::Download);
        first.conditions.query = vec![("as".into(), "file".into())];
        let second = route("b", &[Method::GET], "/x/{design}", Action::View);
        assert!(Routes::new(vec![first, second]).is_ok());
    }
}
