//! Attacks on tokens: each is refused, for the right reason, and none panics.

use jsonwebtoken::EncodingKey;
use jsonwebtoken::crypto::sign;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::clock::ManualClock;
use crate::policy::Platform;

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const NOW: i64 = 1_800_000_000;
const LEEWAY: i64 = 30;

macro_rules! pem {
    ($name:literal) => {
        include_bytes!(concat!("../../../tests/fixtures/keys/", $name, ".pem"))
    };
}

pub(super) fn options(keys: Vec<Key>) -> Options {
    Options {
        issuer: "https://accounts.example.com".into(),
        audience: "exports".into(),
        leeway: Duration::from_secs(LEEWAY as u64),
        types: vec!["JWT".into(), "at+jwt".into()],
        places: Places::default(),
        claims: ClaimPointers::default(),
        keys,
        remote: None,
        cache_bytes: 0,
    }
}

fn key(kid: &str, algorithm: Algorithm, material: &[u8]) -> Key {
    Key { kid: Some(kid.into()), algorithm, material: material.to_vec() }
}

/// A key for each algorithm, named after it, and one without a name.
fn all_keys() -> Vec<Key> {
    let material = |algorithm: Algorithm| -> &[u8] {
        match algorithm {
            Algorithm::Hs256 | Algorithm::Hs384 | Algorithm::Hs512 => SECRET,
            Algorithm::Es256 => pem!("p256.public"),
            Algorithm::Es384 => pem!("p384.public"),
            Algorithm::EdDsa => pem!("ed25519.public"),
            _ => pem!("rsa.public"),
        }
    };
    let mut keys: Vec<Key> = Algorithm::ALL.map(|alg| key(alg.as_str(), alg, material(alg))).into();
    keys.push(Key { kid: None, ..key("", Algorithm::Rs256, pem!("rsa.public")) });
    keys
}

fn signing_key(algorithm: Algorithm) -> EncodingKey {
    match algorithm {
        Algorithm::Hs256 | Algorithm::Hs384 | Algorithm::Hs512 => EncodingKey::from_secret(SECRET),
        Algorithm::Es256 => EncodingKey::from_ec_pem(pem!("p256.private")).unwrap(),
        Algorithm::Es384 => EncodingKey::from_ec_pem(pem!("p384.private")).unwrap(),
        Algorithm::EdDsa => EncodingKey::from_ed_pem(pem!("ed25519.private")).unwrap(),
        _ => EncodingKey::from_rsa_pem(pem!("rsa.private")).unwrap(),
    }
}

fn verifier() -> Verifier {
    Verifier::new(options(all_keys()), clock()).unwrap()
}

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(Timestamp::from_second(NOW).unwrap()))
}

fn verify(token: &str) -> Result<Caller, TokenError> {
    verifier().verify(token, Timestamp::from_second(NOW).unwrap()).map(|caller| (*caller).clone())
}

fn b64(text: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

/// A token of these texts, signed by the key of the algorithm.
fn token_of(header: &str, payload: &str, algorithm: Algorithm) -> String {
    let message = format!("{}.{}", b64(header), b64(payload));
    let signature = sign(message.as_bytes(), &signing_key(algorithm), algorithm.jsonwebtoken()).unwrap();
    format!("{message}.{signature}")
}

fn header(algorithm: Algorithm) -> String {
    json!({ "alg": algorithm.as_str(), "kid": algorithm.as_str() }).to_string()
}

fn claims() -> Value {
    json!({
        "iss": "https://accounts.example.com", "aud": "exports", "sub": "u1", "exp": NOW + 600, "nbf": NOW - 600,
        "plan": "pro", "platform": "ios", "ai_features": ["logo"], "design": "d1",
    })
}

fn good(algorithm: Algorithm) -> String {
    token_of(&header(algorithm), &claims().to_string(), algorithm)
}

fn with_claims(payload: &str) -> Result<Caller, TokenError> {
    verify(&token_of(&header(Algorithm::Hs256), payload, Algorithm::Hs256))
}

fn with(claim: &str, value: Value) -> Result<Caller, TokenError> {
    let mut claims = claims();
    claims[claim] = value;
    with_claims(&claims.to_string())
}

fn with_header(header: &str) -> Result<Caller, TokenError> {
    verify(&token_of(header, &claims().to_string(), Algorithm::Hs256))
}

#[test]
fn operators_are_told_what_a_refused_token_says_and_what_it_should_say() {
    let mut keys = all_keys();
    keys.truncate(2);
    let verifier = Verifier::new(options(keys), clock()).unwrap();
    let told = |token: &str| {
        let error = verifier.verify(token, Timestamp::from_second(NOW).unwrap()).unwrap_err();
        let told = verifier.compared(token, &error).to_string();
        told.strip_prefix(&error.to_string()).unwrap().to_owned()
    };
    let with = |claim: &str, value: Value| {
        let mut claims = claims();
        claims[claim] = value;
        told(&token_of(&header(Algorithm::Hs256), &claims.to_string(), Algorithm::Hs256))
    };
    let with_header = |header: Value| told(&token_of(&header.to_string(), &claims().to_string(), Algorithm::Hs256));
    assert_eq!(with("iss", json!("x\ny")), r#": "iss" is "x\ny", and has to be "https://accounts.example.com""#);
    assert_eq!(with("aud", json!(["a", "b"])), r#": "aud" is ["a","b"], and has to contain "exports""#);
    assert_eq!(with("exp", json!(NOW - 60)), r#": "exp" is 2027-01-15T07:59:00Z, now it is 2027-01-15T08:00:00Z"#);
    assert_eq!(with("nbf", json!(NOW + 60)), r#": "nbf" is 2027-01-15T08:01:00Z, now it is 2027-01-15T08:00:00Z"#);
    assert_eq!(with("sub", json!(7)), r#": "sub" is a number"#, "no name of a user");
    assert_eq!(with("sub", json!("")), "");
    let long = with("iss", json!("é".repeat(1_000)));
    assert!(long.len() < 200 && long.contains("éé…"), "{long}");
    let known = "; the keys are HS256 HS256, HS384 HS384";
    assert_eq!(with_header(json!({ "alg": "HS256" })), format!(r#": "kid" is not there, "alg" is "HS256"{known}"#));
    let other = json!({ "alg": "RS256", "kid": "HS256" });
    assert_eq!(with_header(other), format!(r#": "kid" is "HS256", "alg" is "RS256"{known}"#));
    let other = json!({ "alg": "HS256", "kid": "HS256", "typ": "id+jwt" });
    assert_eq!(with_header(other), r#": "typ" is "id+jwt", accepted are "JWT", "at+jwt""#);
    assert_eq!((told("a.b.c"), told("")), (String::new(), String::new()));
}

#[test]
fn a_good_token_names_its_caller_and_its_key() {
    let caller = verify(&good(Algorithm::Hs256)).unwrap();
    assert_eq!(&*caller.who.user, "u1");
    assert_eq!(caller.plan.as_deref(), Some("pro"));
    assert_eq!(caller.platform, Some(Platform::Ios));
    assert_eq!(caller.ai_features.as_deref(), Some(&["logo".to_owned()][..]));
    assert_eq!(caller.design.as_deref(), Some("d1"));
    assert_eq!(caller.signed_by.to_string(), "HS256 HS256");
}

#[test]
fn tokens_of_every_algorithm_are_verified_by_their_own_key_only() {
    for algorithm in Algorithm::ALL {
        let token = good(algorithm);
        assert!(verify(&token).is_ok(), "{algorithm:?}");
        // The same signature under the name of each other algorithm and key.
        let (_, rest) = token.split_once('.').unwrap();
        for (alg, kid) in Algorithm::ALL.into_iter().flat_map(|alg| Algorithm::ALL.map(|kid| (alg, kid))) {
            let header = json!({ "alg": alg.as_str(), "kid": kid.as_str() }).to_string();
            let accepted = verify(&format!("{}.{rest}", b64(&header)));
            // The text of the header is signed as well, so only the very same one is good.
            assert_eq!(accepted.is_ok(), alg == algorithm && kid == algorithm, "{algorithm:?} as {alg:?} {kid:?}");
        }
    }
}

#[test]
fn each_required_claim_must_be_there() {
    let without = |claim: &str| {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(claim);
        with_claims(&claims.to_string())
    };
    for claim in ["iss", "aud", "sub", "exp"] {
        assert_eq!(without(claim), Err(TokenError::ClaimMissing(claim)));
    }
    assert_eq!(with("sub", json!("")), Err(TokenError::ClaimMissing("sub")));
    assert!(without("nbf").is_ok(), "nbf is honoured when there, not required");
}

#[test]
fn foreign_expired_and_early_tokens_are_refused() {
    assert_eq!(with("iss", json!("https://evil.example")), Err(TokenError::Issuer));
    assert_eq!(with("iss", json!("https://accounts.example.com/")), Err(TokenError::Issuer));
    assert_eq!(with("aud", json!("other")), Err(TokenError::Audience));
    assert_eq!(with("aud", json!(["other"])), Err(TokenError::Audience));
    assert_eq!(with("aud", json!([])), Err(TokenError::Audience));
    assert!(with("aud", json!(["other", "exports"])).is_ok());
    assert_eq!(with("exp", json!(NOW - LEEWAY)), Err(TokenError::Expired));
    assert!(with("exp", json!(NOW - LEEWAY + 1)).is_ok(), "within the leeway");
    assert_eq!(with("nbf", json!(NOW + LEEWAY + 1)), Err(TokenError::NotYetValid));
    assert!(with("nbf", json!(NOW + LEEWAY)).is_ok(), "within the leeway");
}

#[test]
fn dates_of_any_kind_neither_panic_nor_last_for_ever() {
    for (exp, outcome) in [
        (json!("1900000000"), Err(TokenError::ClaimType("exp"))),
        (json!(null), Err(TokenError::ClaimType("exp"))),
        (json!([NOW + 600]), Err(TokenError::ClaimType("exp"))),
        (json!(true), Err(TokenError::ClaimType("exp"))),
        (json!(1e300), Err(TokenError::ClaimType("exp"))),
        (json!(-1e300), Err(TokenError::ClaimType("exp"))),
        (json!(u64::MAX), Err(TokenError::ClaimType("exp"))),
        (json!(i64::MAX), Err(TokenError::ClaimType("exp"))),
        (json!(i64::MIN), Err(TokenError::ClaimType("exp"))),
        (json!(253_402_300_800_i64), Err(TokenError::ClaimType("exp"))),
        (json!(-1), Err(TokenError::Expired)),
        (json!(0), Err(TokenError::Expired)),
        (json!(-0.5), Err(TokenError::Expired)),
        (json!(253_402_300_799_i64), Ok(())),
        (json!(NOW as f64 + 0.5), Ok(())),
        (json!(1.9e9), Ok(())),
    ] {
        assert_eq!(with("exp", exp.clone()).map(drop), outcome, "{exp}");
    }
    for (nbf, outcome) in [
        (json!("0"), Err(TokenError::ClaimType("nbf"))),
        (json!(null), Err(TokenError::ClaimType("nbf"))),
        (json!(i64::MIN), Err(TokenError::ClaimType("nbf"))),
        (json!(1e12), Err(TokenError::ClaimType("nbf"))),
        (json!(2e9), Err(TokenError::NotYetValid)),
        (json!(-1), Ok(())),
    ] {
        assert_eq!(with("nbf", nbf.clone()).map(drop), outcome, "{nbf}");
    }
    // What is no number in JSON is no JSON.
    for number in ["1e999", "NaN", "Infinity", "0x7fffffff", "01900000000", "+1900000000"] {
        let payload = claims().to_string().replace(&format!("\"exp\":{}", NOW + 600), &format!("\"exp\":{number}"));
        assert_eq!(with_claims(&payload), Err(TokenError::Malformed), "{number}");
    }
}

#[test]
fn claims_of_the_wrong_type_are_refused_never_read_as_absent() {
    for claim in ["iss", "aud", "sub", "exp", "nbf", "plan", "platform", "ai_features", "design", "team"] {
        assert_eq!(with(claim, json!({ "x": 1 })), Err(TokenError::ClaimType(claim)));
    }
    assert_eq!(with("ai_features", json!(["logo", 1])), Err(TokenError::ClaimType("ai_features")));
    assert_eq!(with("aud", json!(["exports", 1])), Err(TokenError::ClaimType("aud")));
    assert_eq!(with("aud", json!(["exports", ["exports"]])), Err(TokenError::ClaimType("aud")));
}

#[test]
fn a_name_twice_is_refused_in_claims_and_header() {
    let payload = claims().to_string();
    for twice in [r#","sub":"admin"}"#, r#","\u0073ub":"admin"}"#, r#","x":{"a":1,"a":2}}"#, r#","plan":"max"}"#] {
        let payload = format!("{}{twice}", &payload[..payload.len() - 1]);
        assert_eq!(with_claims(&payload), Err(TokenError::NameTwice), "{payload}");
    }
    for header in [
        r#"{"alg":"HS256","alg":"none","kid":"HS256"}"#,
        r#"{"alg":"none","alg":"HS256","kid":"HS256"}"#,
        r#"{"alg":"HS256","kid":"a","kid":"HS256"}"#,
        r#"{"alg":"HS256","kid":"HS256","x":1,"x":1}"#,
        r#"{"alg":"HS256","\u0061lg":"HS256","kid":"HS256"}"#,
    ] {
        assert_eq!(with_header(header), Err(TokenError::NameTwice), "{header}");
    }
}

#[test]
fn unsecured_tokens_are_refused_however_none_is_spelled() {
    let payload = b64(claims().to_string());
    for alg in [
        "none",
        "None",
        "NONE",
        "nOnE",
        "",
        " none",
        "none ",
        "HS256 ",
        "hs256",
        "HS257",
        "HS256\u{0}",
        "ES512",
        "null",
    ] {
        for kid in ["HS256", "RS256", "none"] {
            let header = b64(json!({ "alg": alg, "kid": kid }).to_string());
            for signature in ["", "AAAA", "none"] {
                let token = format!("{header}.{payload}.{signature}");
                assert_eq!(verify(&token), Err(TokenError::Algorithm), "{alg:?} {kid}");
            }
        }
    }
    for header in
        [r#"{"kid":"HS256"}"#, r#"{"alg":null}"#, r#"{"alg":["HS256"]}"#, r#"{"ALG":"HS256"}"#, r#"{"alg":{}}"#]
    {
        let outcome = with_header(header);
        assert!(matches!(outcome, Err(TokenError::Algorithm | TokenError::Header("alg"))), "{header}: {outcome:?}");
    }
}

#[test]
fn a_public_key_never_serves_as_an_hmac_secret() {
    let payload = claims().to_string();
    let der = |pem: &[u8]| {
        let text: String = std::str::from_utf8(pem).unwrap().lines().filter(|line| !line.starts_with('-')).collect();
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    };
    for (kid, pem) in
        [("RS256", &pem!("rsa.public")[..]), ("ES256", pem!("p256.public")), ("EdDSA", pem!("ed25519.public"))]
    {
        for secret in [pem.to_vec(), pem.trim_ascii().to_vec(), der(pem)] {
            for alg in ["HS256", "HS384", "HS512"] {
                for kid in [Some(kid), Some(alg), None] {
                    let mut header = json!({ "alg": alg });
                    header.as_object_mut().unwrap().extend(kid.map(|kid| ("kid".into(), kid.into())));
                    let message = format!("{}.{}", b64(header.to_string()), b64(&payload));
                    let key = EncodingKey::from_secret(&secret);
                    let algorithm = Algorithm::named(alg).unwrap().jsonwebtoken();
                    let signature = sign(message.as_bytes(), &key, algorithm).unwrap();
                    assert!(verify(&format!("{message}.{signature}")).is_err(), "{alg} {kid:?}");
                }
            }
        }
    }
}

#[test]
fn signatures_of_nothing_are_refused() {
    // "Psychic" signatures, r = s = 0, and others that a careless check lets pass.
    for (algorithm, lengths) in [
        (Algorithm::Es256, [0, 32, 63, 64, 65]),
        (Algorithm::Es384, [0, 48, 95, 96, 97]),
        (Algorithm::EdDsa, [0, 32, 63, 64, 65]),
    ] {
        let token = good(algorithm);
        let (message, genuine) = token.rsplit_once('.').unwrap();
        for length in lengths {
            for byte in [0, 1, 0xff] {
                let token = format!("{message}.{}", b64(vec![byte; length]));
                assert_eq!(verify(&token), Err(TokenError::Signature), "{algorithm:?} {length} x {byte}");
            }
        }
        let genuine = URL_SAFE_NO_PAD.decode(genuine).unwrap();
        let more = [&genuine[..], b"\0"].concat();
        assert_eq!(verify(&format!("{message}.{}", b64(more))), Err(TokenError::Signature));
        assert_eq!(verify(&format!("{message}.{}", b64(&genuine[1..]))), Err(TokenError::Signature));
    }
}

#[test]
fn the_key_is_chosen_by_kid_and_alg_and_never_tried_out() {
    let hs = |kid: Value| with_header(&json!({ "alg": "HS256", "kid": kid }).to_string());
    assert_eq!(hs(json!("other")), Err(TokenError::UnknownKey));
    assert_eq!(hs(json!("HS384")), Err(TokenError::Algorithm), "that key is for another algorithm");
    assert_eq!(hs(json!("RS256")), Err(TokenError::Algorithm));
    for kid in [
        "",
        "../../../dev/null",
        "/dev/null",
        "HS256' OR '1'='1",
        "HS256\u{0}",
        "hs256",
        "HS256;id",
        "%2e%2e/HS256",
        "*",
    ] {
        assert_eq!(hs(json!(kid)), Err(TokenError::UnknownKey), "{kid:?}");
    }
    for kid in [json!(null), json!(1), json!(["HS256"]), json!({ "kid": "HS256" })] {
        assert_eq!(hs(kid.clone()), Err(TokenError::Header("kid")), "{kid}");
    }
    assert_eq!(with_header(r#"{"alg":"HS256"}"#), Err(TokenError::UnknownKey), "no HS256 key is nameless");
    // The nameless key takes tokens that name no known key, of its own algorithm only.
    let rs = |header: &str| verify(&token_of(header, &claims().to_string(), Algorithm::Rs256));
    assert!(rs(r#"{"alg":"RS256"}"#).is_ok());
    assert!(rs(r#"{"alg":"RS256","kid":"another"}"#).is_ok());
    assert_eq!(rs(r#"{"alg":"RS512","kid":"another"}"#), Err(TokenError::UnknownKey));
    assert_eq!(
        rs(r#"{"alg":"RS256","kid":"ES256"}"#),
        Err(TokenError::Algorithm),
        "a known key's name is no nameless one's"
    );
}

#[test]
fn header_parameters_that_change_the_reading_are_refused() {
    let with_parameter = |name: &str, value: Value| {
        let mut header = json!({ "alg": "HS256", "kid": "HS256" });
        header[name] = value;
        with_header(&header.to_string())
    };
    for crit in [
        json!(["b64"]),
        json!(["exp"]),
        json!([]),
        json!(null),
        json!("x"),
        json!(["http://example.invalid/UNDEFINED"]),
    ] {
        assert_eq!(with_parameter("crit", crit.clone()), Err(TokenError::Critical), "{crit}");
    }
    let jwk = json!({ "kty": "oct", "k": b64(SECRET) });
    for (name, value) in [
        ("jwk", jwk.clone()),
        ("jwk", json!(null)),
        ("b64", json!(false)),
        ("b64", json!(true)),
        ("cty", json!("JWT")),
        ("zip", json!("DEF")),
        ("enc", json!("A128GCM")),
    ] {
        let outcome = with_parameter(name, value).unwrap_err();
        assert_eq!(outcome, TokenError::Header(name.to_owned().leak()));
    }
    for name in ["jku", "x5u"] {
        let elsewhere = json!("https://evil.example/keys");
        assert!(with_parameter(name, elsewhere).is_ok(), "{name}: signed with a key of ours, which is all that counts");
    }
    for typ in ["JWT", "jwt", "at+jwt", "application/at+jwt", "APPLICATION/AT+JWT"] {
        assert!(with_parameter("typ", json!(typ)).is_ok(), "{typ}");
    }
    for typ in
        ["", "JWE", "id_token", "logout+jwt", "dpop+jwt", "secevent+jwt", "application/", "application/application/jwt"]
    {
        assert_eq!(with_parameter("typ", json!(typ)), Err(TokenError::Type), "{typ}");
    }
    assert_eq!(with_parameter("typ", json!(["JWT"])), Err(TokenError::Header("typ")));
    assert!(with_parameter("x5t", json!("abc")).is_ok(), "what may be ignored is ignored (RFC 7515, section 4)");
}

#[test]
fn only_access_tokens_pass_where_only_they_are_wanted() {
    let options = Options { types: vec!["at+jwt".into()], ..options(all_keys()) };
    let verifier = Verifier::new(options, clock()).unwrap();
    let of = |header: &str| {
        let token = token_of(header, &claims().to_string(), Algorithm::Hs256);
        verifier.verify(&token, Timestamp::from_second(NOW).unwrap()).map(drop)
    };
    assert_eq!(of(r#"{"alg":"HS256","kid":"HS256","typ":"at+jwt"}"#), Ok(()));
    assert_eq!(of(r#"{"alg":"HS256","kid":"HS256","typ":"JWT"}"#), Err(TokenError::Type));
    assert_eq!(of(r#"{"alg":"HS256","kid":"HS256"}"#), Err(TokenError::Type), "without a type it is a JWT");
}

#[test]
fn other_spellings_of_base64_are_refused() {
    let token = good(Algorithm::Hs256);
    let parts: Vec<&str> = token.split('.').collect();
    let [header, payload, signature] = parts[..] else { panic!("{token}") };
    let mut spellings = vec![
        format!("{token}="),
        format!("{header}=.{payload}.{signature}"),
        format!("{header}.{payload}==.{signature}"),
        format!("{token}\n"),
        format!("\n{token}"),
        format!(" {token}"),
        format!("{header} .{payload}.{signature}"),
        format!("{header}.{payload}.\t{signature}"),
        format!("{token}\u{0}"),
        format!("{token}."),
        format!(".{token}"),
        format!("{token}.{signature}"),
        format!("{header}..{signature}"),
        format!("{header}.{payload}"),
        format!("{header}.{payload}.{signature}%3D"),
        token.replace('.', "%2E"),
        token.replace('.', "\u{ff0e}"),
    ];
    // The last letter carries bits that mean nothing: only zeros are canonical (RFC 4648, section 3.5).
    let last = signature.chars().last().unwrap();
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/";
    let others = alphabet.chars().filter(|letter| *letter != last);
    spellings.extend(others.map(|letter| format!("{}{letter}", &token[..token.len() - 1])));
    for spelling in spellings {
        assert!(verify(&spelling).is_err(), "{spelling:?}");
    }
    // The alphabet of plain base64, where it differs.
    let payload = json!({ "sub": "???>>>~~~\u{fc}\u{ff}" }).to_string();
    let plain = base64::engine::general_purpose::STANDARD_NO_PAD.encode(payload);
    assert!(plain.contains(['+', '/']));
    assert_eq!(verify(&format!("{header}.{plain}.{signature}")), Err(TokenError::Malformed));
}

#[test]
fn what_is_no_token_is_malformed() {
    for token in [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "a.b",
        "ey.ey.ey.ey.ey",
        "\u{0}.\u{0}.\u{0}",
        "bnVsbA.bnVsbA.bnVsbA",
        "\u{1f511}",
    ] {
        assert_eq!(verify(token), Err(TokenError::Malformed), "{token:?}");
    }
    for no_object in ["null", "1", "\"x\"", "[]", "[{}]", "", "{", "{}{}", "{\"a\":1,}", "\u{feff}{}"] {
        assert_eq!(with_claims(no_object), Err(TokenError::Malformed), "{no_object:?}");
        assert_eq!(with_header(no_object), Err(TokenError::Malformed), "{no_object:?}");
    }
    // A token in a token, and one that is encrypted.
    assert_eq!(with_claims(&good(Algorithm::Hs256)), Err(TokenError::Malformed));
    let jwe = format!("{}.a.b.c.d", b64(r#"{"alg":"RSA-OAEP","enc":"A128GCM"}"#));
    assert!(verify(&jwe).is_err());
    let not_text =
        format!("{}.{}.AAAA", b64(header(Algorithm::Hs256)), b64([b'{', b'"', 0xff, b'"', b':', b'1', b'}']));
    assert_eq!(verify(&not_text), Err(TokenError::Malformed));
}

#[test]
fn size_and_depth_are_bounded() {
    assert_eq!(verify(&"a".repeat(MOST_BYTES + 1)), Err(TokenError::TooLong));
    assert_eq!(verify(&"a".repeat(MOST_BYTES)), Err(TokenError::Malformed));
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = |depth: usize| format!("{}1{}", open.repeat(depth), close.repeat(depth));
        let payload = |depth| {
            let claims = claims().to_string();
            format!("{},\"x\":{}}}", &claims[..claims.len() - 1], deep(depth))
        };
        assert!(with_claims(&payload(50)).is_ok());
        assert_eq!(with_claims(&payload(600)), Err(TokenError::Malformed));
    }
}

#[test]
fn forged_tokens_are_refused_and_cheap_doubts_come_before_the_signature() {
    let token = good(Algorithm::Rs256);
    let (message, signature) = token.rsplit_once('.').unwrap();
    assert_eq!(verify(&format!("{message}.AAAA")), Err(TokenError::Signature));
    assert_eq!(verify(&format!("{message}.")), Err(TokenError::Signature));
    assert_eq!(verify(&format!("{message}.!!!!")), Err(TokenError::Malformed));
    let (head, _) = message.split_once('.').unwrap();
    let forged = |claim: &str, value: Value| {
        let mut claims = claims();
        claims[claim] = value;
        verify(&format!("{head}.{}.{signature}", b64(claims.to_string())))
    };
    assert_eq!(forged("sub", json!("admin")), Err(TokenError::Signature));
    assert_eq!(forged("exp", json!(0)), Err(TokenError::Expired));
    assert_eq!(forged("iss", json!("x")), Err(TokenError::Issuer));
    // What a forged token claims of its caller is never looked at.
    assert_eq!(forged("plan", json!(1)), Err(TokenError::Signature));
}

#[test]
fn unusable_keys_are_refused_at_start() {
    let refused = |keys| Verifier::new(options(keys), clock()).unwrap_err();
    let short = |algorithm, length| refused(vec![key("a", algorithm, &SECRET[..length])]);
    for (algorithm, needed) in [(Algorithm::Hs256, 32), (Algorithm::Hs384, 48), (Algorithm::Hs512, 64)] {
        let found = needed - 1;
        assert_eq!(short(algorithm, found), (0, BadKey::ShortSecret { algorithm, needed, found }));
    }
    let hs = || key("a", Algorithm::Hs256, SECRET);
    assert_eq!(refused(vec![hs(), hs()]), (1, BadKey::Twice));
    let wrong = [
        (Algorithm::Rs256, &b"nonsense"[..]),
        (Algorithm::Rs256, pem!("rsa-1024.public")),
        (Algorithm::Rs256, pem!("rsa.private")),
        (Algorithm::Ps512, pem!("p256.public")),
        (Algorithm::Es256, pem!("p384.public")),
        (Algorithm::Es256, pem!("p521.public")),
        (Algorithm::Es256, pem!("p256.private")),
        (Algorithm::Es384, pem!("p256.public")),
        (Algorithm::Es384, pem!("ed25519.public")),
        (Algorithm::EdDsa, pem!("p256.public")),
        (Algorithm::EdDsa, pem!("ed25519.private")),
    ];
    for (algorithm, pem) in wrong {
        let outcome = refused(vec![key("a", algorithm, pem)]);
        assert!(matches!(outcome, (0, BadKey::NotPem { .. })), "{algorithm:?} {outcome:?}");
    }
    for known_to_all in [&pem!("rsa.public")[..], pem!("p256.public")] {
        assert_eq!(refused(vec![key("a", Algorithm::Hs256, known_to_all)]), (0, BadKey::PublicSecret));
    }
}

#[test]
fn who_shows_a_wrong_key_is_told_what_it_is() {
    let told = |algorithm, material: &[u8]| match Verifier::check_keys(&[key("a", algorithm, material)]) {
        Err((0, BadKey::NotPem { why, .. })) => why,
        other => panic!("{other:?}"),
    };
    let two = [&pem!("rsa.public")[..], pem!("rsa.public")].concat();
    for (algorithm, material, part) in [
        (Algorithm::Rs256, &pem!("rsa.private")[..], "private key"),
        (Algorithm::Es256, pem!("p256.private"), "private key"),
        (Algorithm::EdDsa, pem!("ed25519.private"), "private key"),
        (Algorithm::Rs256, pem!("p256.public"), "ES256 or ES384"),
        (Algorithm::Es256, pem!("ed25519.public"), "EdDSA"),
        (Algorithm::EdDsa, pem!("rsa.public"), "RS256, PS256"),
        (Algorithm::Es256, pem!("p384.public"), "needs a key on"),
        (Algorithm::Rs256, pem!("rsa-1024.public"), "2048 to 8192 bits"),
        (Algorithm::Rs256, b"0\x82\x01", "DER"),
        (Algorithm::Rs256, b"ssh-rsa AAAA", "OpenSSH"),
        (Algorithm::Rs256, b" \n", "nothing in it"),
        (Algorithm::Rs256, b"MIIB", "no `-----BEGIN"),
        (Algorithm::Rs256, &two, "several"),
    ] {
        let why = told(algorithm, material);
        assert!(why.contains(part), "{why}, not {part}");
    }
}

fn caching() -> Verifier {
    Verifier::new(Options { cache_bytes: 1 << 20, ..options(all_keys()) }, clock()).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

#[test]
fn a_cached_token_is_good_neither_after_it_has_expired_nor_before_it_begins() {
    let (verifier, token) = (caching(), good(Algorithm::Hs256));
    let first = verifier.verify(&token, at(NOW)).unwrap();
    assert!(Arc::ptr_eq(&first, &verifier.verify(&token, at(NOW)).unwrap()), "it comes from the cache");
    assert!(Arc::ptr_eq(&first, &verifier.verify(&token, at(NOW + 600 + LEEWAY - 1)).unwrap()));
    assert_eq!(verifier.verify(&token, at(NOW + 600 + LEEWAY)), Err(TokenError::Expired));
    assert_eq!(verifier.verify(&token, at(NOW - 600 - LEEWAY - 1)), Err(TokenError::NotYetValid));
    assert!(Arc::ptr_eq(&first, &verifier.verify(&token, at(NOW - 600 - LEEWAY)).unwrap()));
}

#[test]
fn a_cached_token_is_verified_anew_when_the_keys_change() {
    let (verifier, token) = (caching(), good(Algorithm::Hs256));
    let first = verifier.verify(&token, at(NOW)).unwrap();
    let keys = verifier.keys.set();
    let without_it = keys.keys().iter().filter(|key| key.id.algorithm != Algorithm::Hs256).cloned().collect();
    verifier.keys.replace(KeySet::new(keys.generation + 1, without_it));
    assert_eq!(verifier.verify(&token, at(NOW)), Err(TokenError::UnknownKey));
    verifier.keys.replace(KeySet::new(keys.generation + 2, keys.keys().to_vec()));
    assert!(!Arc::ptr_eq(&first, &verifier.verify(&token, at(NOW)).unwrap()));
}

#[test]
fn nothing_that_fails_is_cached_and_what_is_cached_is_bounded() {
    let verifier = caching();
    let cache = verifier.cache.as_ref().unwrap();
    let token = good(Algorithm::Hs256);
    for index in 0..1000 {
        let forged = format!("{}{index:04}", &token[..token.len() - 4]);
        assert!(verifier.verify(&forged, at(NOW)).is_err());
    }
    assert_eq!(cache.bytes(), 0);
    for index in 0..5000 {
        let mut claims = claims();
        claims["sub"] = json!(format!("user {index}"));
        claims["ai_features"] = json!(vec!["a long name of a feature"; index % 100]);
        verifier.verify(&token_of(&header(Algorithm::Hs256), &claims.to_string(), Algorithm::Hs256), at(NOW)).unwrap();
    }
    assert!(cache.bytes() > 1 << 19 && cache.bytes() <= 1 << 20, "{}", cache.bytes());
}

/// Texts that are nearly tokens: parts that are nearly base64 of nearly JSON.
fn nearly_a_token() -> impl Strategy<Value = String> {
    let json_part = prop_oneof![
        Just(header(Algorithm::Hs256)),
        Just(claims().to_string()),
        "[ -~]{0,40}",
        r#"\{("(alg|kid|typ|crit|exp|aud|sub|iss|jwk)":("[ -!#-~]{0,12}"|-?[0-9]{1,22}|null|true|\[\]|\{\}),?){0,6}\}"#,
    ];
    let part = prop_oneof![json_part.prop_map(b64), "[A-Za-z0-9_=+/-]{0,60}", any::<Vec<u8>>().prop_map(b64)];
    prop_oneof![
        4 => proptest::collection::vec(part, 0..5).prop_map(|parts| parts.join(".")),
        1 => any::<String>(),
        1 => "[a-zA-Z0-9._-]{0,200}",
    ]
}

proptest! {
    #[test]
    fn no_text_panics_and_none_is_accepted(token in nearly_a_token()) {
        prop_assert!(verify(&token).is_err());
    }

    #[test]
    fn no_change_of_a_good_token_is_accepted(
        algorithm in proptest::sample::select(&[Algorithm::Hs256, Algorithm::Rs256, Algorithm::Ps256, Algorithm::Es256, Algorithm::EdDsa][..]),
        place in any::<proptest::sample::Index>(),
        letter in "[A-Za-z0-9_.=~\u{0}\u{e9}-]",
        how in 0..3,
    ) {
        let token = good(algorithm);
        let at = place.index(token.len());
        let changed = match how {
            0 => format!("{}{letter}{}", &token[..at], &token[at + 1..]),
            1 => format!("{}{letter}{}", &token[..at], &token[at..]),
            _ => format!("{}{}", &token[..at], &token[at + 1..]),
        };
        prop_assert!(changed == token || verify(&changed).is_err(), "{}", changed);
    }
}
