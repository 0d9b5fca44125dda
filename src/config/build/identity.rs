//! Keys and claims.

use crate::config::problem::Problem;
use crate::config::raw;
use crate::identity::{ClaimPointers, Key, KeyMaterial, Options, Verifier};
use crate::policy::{PlanId, Plans};

use super::{Problems, Surroundings};

pub(super) fn options(raw: &raw::Identity, surroundings: Surroundings<'_>, problems: &mut Problems) -> Options {
    if raw.keys.is_empty() {
        let problem = Problem::at(&["identity", "keys"], "there is no key, so no token could be accepted");
        problems.add(problem.help("add { kid = \"dev\", alg = \"HS256\", secret_env = \"EXPORT_GATE_JWT_SECRET\" }"));
    }
    for (key, value) in [("issuer", &raw.issuer), ("audience", &raw.audience)] {
        if value.is_empty() {
            problems.add(Problem::at(&["identity", key], format!("the {key} is empty")));
        }
    }
    let found = problems.found.len();
    let keys = raw.keys.iter().enumerate().map(|(index, raw)| key(index, raw, surroundings, problems)).collect();
    let options = Options {
        issuer: raw.issuer.clone(),
        audience: raw.audience.clone(),
        leeway: raw.leeway.0,
        claims: claims(&raw.claims, problems),
        keys,
    };
    // Only what could be read can be checked further.
    if problems.found.len() == found
        && let Err((index, bad)) = Verifier::new(options.clone())
    {
        problems.add(Problem::at(&["identity", "keys", &index.to_string()], bad.to_string()));
    }
    options
}

fn key(index: usize, raw: &raw::Key, surroundings: Surroundings<'_>, problems: &mut Problems) -> Key {
    let index = index.to_string();
    let table = ["identity", "keys", &index];
    let (env, file, pem) = (raw.secret_env.as_deref(), raw.secret_file.as_deref(), raw.public_key_file.as_deref());
    let foreign = |key: &str, what: &str, problems: &mut Problems| {
        let problem = Problem::at_key(&["identity", "keys", &index, key], what.to_owned());
        problems.add(problem);
    };
    let material = match raw.alg {
        raw::Alg::HS256 => {
            if pem.is_some() {
                foreign("public_key_file", "an HS256 key has a secret, no public key", problems);
            }
            KeyMaterial::Hs256(surroundings.secret(&table, env, file, "secret", problems))
        }
        raw::Alg::RS256 => {
            for key in [env.map(|_| "secret_env"), file.map(|_| "secret_file")].into_iter().flatten() {
                foreign(key, "an RS256 key has a public key, no secret", problems);
            }
            let path = pem.map(|name| surroundings.folder.join(name));
            let pem = path.map(|path| std::fs::read(&path).map_err(|error| (path, error)));
            KeyMaterial::Rs256(match pem {
                Some(Ok(pem)) => pem,
                Some(Err((path, error))) => {
                    let message = format!("cannot read `{}`: {error}", path.display());
                    problems.add(Problem::at(&["identity", "keys", &index, "public_key_file"], message));
                    Vec::new()
                }
                None => {
                    problems.add(Problem::at(&table, "an RS256 key needs a public_key_file"));
                    Vec::new()
                }
            })
        }
    };
    Key { kid: raw.kid.clone(), material }
}

fn claims(raw: &raw::Claims, problems: &mut Problems) -> ClaimPointers {
    let mut pointer = |key: &str, pointer: &String| {
        if !pointer.starts_with('/') {
            let problem = Problem::at(&["identity", "claims", key], format!("`{pointer}` is no JSON pointer"));
            problems.add(problem.help(format!("write \"/{pointer}\"")));
        }
        pointer.clone()
    };
    ClaimPointers {
        user: pointer("user", &raw.user),
        plan: pointer("plan", &raw.plan),
        team: pointer("team", &raw.team),
        seats: pointer("seats", &raw.seats),
        billing_anchor: pointer("billing_anchor", &raw.billing_anchor),
        platform: pointer("platform", &raw.platform),
        ai_features: pointer("ai_features", &raw.ai_features),
        design: pointer("design", &raw.design),
        design_version: pointer("design_version", &raw.design_version),
        // What meters count by is known once there are meters.
        others: Vec::new(),
    }
}

/// The plan of a token that names none; `None` refuses it.
pub(super) fn unknown_plan(raw: &raw::Identity, plans: &Plans, problems: &mut Problems) -> Option<PlanId> {
    if raw.unknown_plan == "refuse" {
        return None;
    }
    let plan = plans.find(&raw.unknown_plan);
    if plan.is_none() {
        let message = format!("no meter has a limit for the plan `{}`", raw.unknown_plan);
        let known = plans.iter().map(|(_, name)| name).chain(["refuse"]);
        problems.add(Problem::at(&["identity", "unknown_plan"], message).suggest(&raw.unknown_plan, known));
    }
    plan
}
