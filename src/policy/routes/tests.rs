//! What is recognised as what, and what could be mistaken.

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
    let routes = Routes::new(vec![route("download", &[Method::GET], "/v1/designs/{design}/file", Action::Download)]);
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
fn a_long_path_is_read_by_nobody_only_if_it_may_be_an_export() {
    let long = "%2Fa%253b;b".repeat(2_500);
    assert_eq!(found(Method::GET, &format!("/thumbs/{long}")), "-");
    assert_eq!(found(Method::GET, &format!("/thumbs/{long}/v1/designs/x/download")), "400");
    assert_eq!(found(Method::GET, &format!("/thumbs/{long}/V1/%64esigns/x/%2564ownload")), "400");
    assert_eq!(found(Method::GET, &format!("/thumbs/{long}/%u0076")), "400", "nobody knows");
    assert_eq!(found(Method::PUT, &format!("/thumbs/{long}/v1/designs/x/download")), "-");
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
        // The export by query.
        "/render%3Fas=file&id=x",
        "/render%3fas=file",
        "/render%253Fas=file?id=x",
        "/render%u003Fas=file",
        "/render%25u003Fas=file",
        "/render%u00253Fas=file",
        "/render%23",
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
    let by_path = |path: &str| Routes::new(vec![route("download", &[Method::GET], path, Action::Download)]).unwrap();
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
    assert!(Routes::new(vec![route("c", &[], "/y/{design}", Action::View), second.clone()]).is_ok(), "another path");
    second.path = Pattern::parse("/x/static").unwrap();
    assert!(Routes::new(vec![first.clone(), second.clone()]).is_err(), "a pattern takes what is static after it");
    assert!(Routes::new(vec![second.clone(), first.clone()]).is_ok());
    second.methods = vec![Method::HEAD];
    assert!(Routes::new(vec![first, second]).is_err(), "GET includes HEAD");
}

#[test]
fn an_export_is_curtailed_by_what_counts_nothing_and_is_no_exception_within_it() {
    let download = |methods: &[Method]| route("download", methods, "/d/{design}/download", Action::Download);
    let curtails = |earlier: Route, later: Route| Routes::new(vec![earlier, later]).unwrap().curtailed().count() == 1;
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
