//! Which request is which action (counting rules, section 1).

use std::borrow::Cow;
use std::cell::OnceCell;
use std::sync::Arc;

use http::header::{CONNECTION, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

use super::host;
use super::path::{Unread, decoded, decoded_text, is_canonical, is_read_alike, lenient_readings, may_hold_a_query};
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

/// The lenient readings of a request's path, unless they are too many: made when they are asked for, and once for all methods.
struct Readings<'u> {
    path: &'u str,
    all: OnceCell<Result<Vec<String>, Unread>>,
}

impl<'u> Readings<'u> {
    fn of(uri: &'u Uri) -> Self {
        Self { path: uri.path(), all: OnceCell::new() }
    }

    fn all(&self) -> &Result<Vec<String>, Unread> {
        self.all.get_or_init(|| lenient_readings(self.path).ok_or_else(|| Unread::of(self.path)))
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
        let usual = [Method::GET, Method::HEAD, Method::PUT, Method::PATCH, Method::DELETE];
        let mut export_methods: Vec<Method> =
            usual.into_iter().filter(|method| exports().any(|route| allows(route, method))).collect();
        for method in exports().flat_map(|route| &route.methods) {
            if *method != Method::POST && !export_methods.contains(method) {
                export_methods.push(method.clone());
            }
        }
        let routes = routes.into_iter().map(Arc::new).collect();
        Ok(Self { lenient, has_odd_export, has_encodable_export, export_methods, routes })
    }

    /// All routes with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (RouteId, &Arc<Route>)> {
        (0..).map(RouteId).zip(&self.routes)
    }

    /// Pairs of an earlier route that is no export, and a later export of whose requests it takes some. Hardly as it was meant: the path of the
    /// earlier one is no special case of the later one's.
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
        let readings = Readings::of(uri);
        let found = self.find_by(method, uri, headers, &readings);
        let is_one_by = |other: &Method| self.find_by(other, uri, headers, &readings).may_be_export();
        // A GET is what it says.
        let is_in_doubt = *method != Method::GET && !found.may_be_export();
        if is_in_doubt && self.other_methods(method, uri).any(|other| is_one_by(&other)) {
            return Match::Misread(Misread::Method);
        }
        found
    }

    /// The first export that a misread request may be meant for.
    pub fn nearly(&self, method: &Method, uri: &Uri) -> Option<RouteId> {
        let path = uri.path();
        let readings = lenient_readings(path);
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

    fn find_by(&self, method: &Method, uri: &Uri, headers: &HeaderMap, readings: &Readings<'_>) -> Match {
        let path = uri.path();
        let (id, route) = match self.first_fit(method, uri, headers) {
            Ok(Some(found)) => found,
            Ok(None) if self.is_disguised_export(method, uri, headers, readings) => {
                return Match::Misread(Misread::Path);
            }
            Ok(None) => return Match::Unmatched,
            Err(misread) => return Match::Misread(misread),
        };
        // An export in its plain spelling is one, whatever else it could be read as.
        let ends_alike = path.strip_suffix('/').filter(|_| route.path.ends_in_slash());
        let is_plain_export = route.action.is_export() && is_canonical(ends_alike.unwrap_or(path));
        if !is_plain_export && self.is_disguised_export(method, uri, headers, readings) {
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
    fn is_disguised_export(&self, method: &Method, uri: &Uri, headers: &HeaderMap, readings: &Readings<'_>) -> bool {
        let path = uri.path();
        let is_plain = is_canonical(path)
            && is_read_alike(path)
            && !path.bytes().any(|byte| byte.is_ascii_uppercase())
            && !(self.has_encodable_export && path.contains('%'));
        if is_plain && !self.has_odd_export {
            return false;
        }
        let readings = match readings.all() {
            Ok(readings) => readings,
            Err(unread) => {
                let mut exports = self.routes.iter().zip(&self.lenient).filter(|(route, _)| route.action.is_export());
                return exports.any(|(route, lenient)| allows(route, method) && unread.may_hold(lenient.literals()));
            }
        };
        // Then nobody knows what the query is: it may be all that an export asks for.
        let has_query = may_hold_a_query(path);
        readings.iter().any(|reading| {
            let mut fitting = self.routes.iter().zip(&self.lenient).filter(|(route, pattern)| {
                let is_export = route.action.is_export();
                let may_meet = || is_export && has_query || meets(&route.conditions, uri, headers).unwrap_or(is_export);
                allows(route, method) && pattern.fits(reading) && may_meet()
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
mod tests;
