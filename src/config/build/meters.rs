//! Meters, their limits and the plans they speak of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use http::HeaderValue;

use crate::config::problem::{Problem, closest};
use crate::config::raw;
use crate::policy::{Counts, Degrade, Limit, Meter, OnExceed, Plans, Policy, SubjectKind, Whose};

use super::{Problems, costs, windows};

/// `running`: the policy that this one is to take the place of, if there is one. What stays keeps its ids, and counts on.
pub(super) fn policy(all: &raw::Raw, running: Option<&Policy>, problems: &mut Problems) -> Policy {
    let raw = &all.meters;
    // A plan exists if some meter speaks of it.
    let mut names = BTreeSet::new();
    for meter in raw.values() {
        names.extend(meter.limits.keys().chain(&meter.counts.plans).map(String::as_str));
    }
    if names.len() > Plans::MOST {
        problems.add(Problem::at(&["meters"], format!("there are more than {} plans", Plans::MOST)));
    }
    if raw.len() > Plans::MOST {
        problems.add(Problem::at(&["meters"], format!("there are more than {} meters", Plans::MOST)));
    }
    let names: Vec<Arc<str>> = names.into_iter().map(Arc::from).collect();
    let none = Policy::default();
    let running = running.unwrap_or(&none);
    let plans = running.plans.followed_by(names.iter().cloned());
    let mut meters: Vec<Meter> = Vec::new();
    for known in &running.meters {
        let stays = raw.get(&*known.name).map(|raw| meter(&known.name, raw, all, &plans, problems));
        problems.found.extend(stays.as_ref().into_iter().flat_map(|stays| counts_otherwise(known, stays)));
        // Its zone's rules stay as well, until the gate is started anew.
        let stays = stays.map(|stays| Meter { window: known.window.clone(), ..stays });
        meters.push(stays.unwrap_or_else(|| known.gone()));
    }
    for (name, raw) in raw.iter().filter(|(name, _)| running.meters.iter().all(|known| *known.name != ***name)) {
        meters.push(meter(name, raw, all, &plans, problems));
    }
    let is_known = |name: &Arc<str>| plans.find(name).is_some();
    if meters.len() > raw.len().max(Plans::MOST) || names.len() <= Plans::MOST && !names.iter().all(is_known) {
        let problem = Problem::at(&["meters"], "there have been too many meters or plans since the gate was started");
        problems.add(problem.help("restart it"));
    }
    Policy { plans, meters }
}

/// What a meter counted so far would mean something else (counting rules, section 4 rule 8).
fn counts_otherwise(known: &Meter, new: &Meter) -> impl Iterator<Item = Problem> {
    let name = &*known.name;
    let changed = [("window", !known.window.is_like(&new.window)), ("subject", known.subject != new.subject)];
    changed.into_iter().filter(|(_, changed)| *changed).map(move |(what, _)| {
        let message =
            format!("the {what} of `{name}` cannot change while the gate runs: its counts would mean something else");
        Problem::at(&["meters", name, what], message)
            .help("give the meter another name; or restart the gate: it may count from nothing then")
    })
}

fn meter(name: &str, raw: &raw::Meter, all: &raw::Raw, plans: &Plans, problems: &mut Problems) -> Meter {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
        let problem = Problem::at_key(&["meters", name], format!("`{name}` is no name for a meter"));
        problems.add(problem.help("use a-z, 0-9 and -: clients see it in header fields"));
    }
    let counted: Vec<_> = raw.counts.plans.iter().filter_map(|plan| plans.find(plan)).collect();
    let mut limits = vec![None; plans.ids()];
    for (plan, plan_name) in plans.iter() {
        let written = raw.limits.get(plan_name);
        let is_counted = counted.is_empty() || counted.contains(&plan);
        limits[usize::from(plan.0)] = match (written, is_counted) {
            (Some(limit), true) => self::limit(name, plan_name, limit, problems),
            (None, false) => None,
            (Some(_), false) => {
                let message = format!("the meter `{name}` does not count the plan `{plan_name}`");
                let problem = Problem::at_key(&["meters", name, "limits", plan_name], message);
                problems.add(problem.help("remove the limit, or add the plan to counts.plans"));
                None
            }
            (None, true) => {
                problems.found.extend(missing_limit(name, plan_name, raw, &all.meters));
                None
            }
        };
    }
    let on_exceed = raw.on_exceed.unwrap_or(if raw.fair_use { OnExceed::Observe } else { OnExceed::Deny });
    Meter {
        name: name.into(),
        limits,
        counts: Counts {
            ai: raw.counts.ai,
            actions: raw.counts.actions.clone(),
            platforms: raw.counts.platforms.clone(),
            plans: counted,
        },
        subject: subject(name, &raw.subject, problems),
        cost: costs::cost(name, &raw.cost, all, problems),
        reported_by: raw
            .reported_by
            .as_ref()
            .and_then(|header| super::header(header, &["meters", name, "reported_by"], problems)),
        window: windows::window(name, &raw.window, problems),
        sessions: raw.sessions,
        on_exceed,
        degrade: degrade(name, raw.degrade.as_ref(), on_exceed, problems),
        shadow: raw.shadow,
        fair_use: raw.fair_use,
    }
}

fn subject(meter: &str, raw: &raw::Subject, problems: &mut Problems) -> Whose {
    let names = match raw {
        raw::Subject::One(name) => std::slice::from_ref(name),
        raw::Subject::FirstOf(names) => names,
    };
    if names.is_empty() {
        problems.add(Problem::at(&["meters", meter, "subject"], "nobody is counted").help("write e.g. \"user\""));
    }
    if names.iter().rev().skip(1).any(|name| name == "user") {
        let problem =
            Problem::at(&["meters", meter, "subject"], "every token has a user: what comes after it is never taken");
        problems.add(problem.help("put \"user\" last"));
    }
    let kinds = names.iter().filter_map(|name| {
        let kind = SubjectKind::named(name);
        if let Some(SubjectKind::Claim(pointer)) = &kind {
            super::check_pointer(pointer, &["meters", meter, "subject"], problems);
        }
        if kind.is_none() {
            let message = format!("`{name}` is nothing that exports are counted by");
            let problem = Problem::at(&["meters", meter, "subject"], message);
            let help = "write \"user\", \"team\", or a JSON pointer to a claim such as \"/org/id\"";
            problems.add(match closest(name, ["user", "team"]) {
                Some(word) => problem.help(format!("did you mean `{word}`?")),
                None => problem.help(help),
            });
        }
        kind
    });
    Whose(kinds.collect())
}

fn degrade(meter: &str, raw: Option<&raw::Degrade>, on_exceed: OnExceed, problems: &mut Problems) -> Degrade {
    let path = ["meters", meter, "degrade"];
    let Some(raw) = raw else {
        if on_exceed == OnExceed::Degrade {
            let problem = Problem::at(&["meters", meter, "on_exceed"], "it is not said how an export is degraded");
            problems.add(problem.help("add degrade = { set_query = { watermark = \"1\" } }"));
        }
        return Degrade::default();
    };
    if on_exceed != OnExceed::Degrade {
        let problem = Problem::at_key(&path, "nothing is degraded on this meter");
        problems.add(problem.help("write on_exceed = \"degrade\", or remove this"));
    }
    let both_ways = [
        ("set_query", "remove_query", raw.set_query.keys().find(|name| raw.remove_query.contains(name))),
        (
            "set_headers",
            "remove_headers",
            raw.set_headers
                .keys()
                .find(|name| raw.remove_headers.iter().any(|removed| removed.eq_ignore_ascii_case(name))),
        ),
    ];
    for (set, removed, name) in both_ways {
        if let Some(name) = name {
            let message = format!("`{name}` is in {removed} as well");
            let problem = Problem::at_key(&["meters", meter, "degrade", set, name], message);
            problems.add(problem.help("keep it in one of them: what is set replaces whatever the client sent"));
        }
    }
    for (name, _) in raw.set_headers.iter().filter(|(name, _)| is_framing(name)) {
        let message = format!("`{name}` belongs to the connection, or says who is asking");
        problems.add(Problem::at(&["meters", meter, "degrade", "set_headers", name], message));
    }
    let mut name = |name: &String, key: &str| super::header(name, &["meters", meter, "degrade", key], problems);
    let remove_headers = raw.remove_headers.iter().filter_map(|header| name(header, "remove_headers")).collect();
    let set_headers: Vec<_> = raw
        .set_headers
        .iter()
        .filter_map(|(header, value)| Some((name(header, "set_headers")?, HeaderValue::try_from(value).ok()?)))
        .collect();
    if set_headers.len() < raw.set_headers.len() {
        problems.add(Problem::at(&["meters", meter, "degrade", "set_headers"], "not all of these can be headers"));
    }
    let degrade = Degrade {
        set_headers,
        remove_headers,
        set_query: raw.set_query.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        remove_query: raw.remove_query.clone(),
    };
    if degrade == Degrade::default() {
        problems.add(Problem::at(&path, "this changes nothing").help("write e.g. set_query = { watermark = \"1\" }"));
    }
    degrade
}

/// Headers that a proxy makes itself, or that a backend trusts.
fn is_framing(name: &str) -> bool {
    let framing =
        ["connection", "content-length", "host", "te", "trailer", "transfer-encoding", "upgrade", "authorization"];
    framing.iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// A plan that this meter neither limits nor leaves out: most often a slip of the pen, here or elsewhere.
fn missing_limit(name: &str, plan: &str, raw: &raw::Meter, all: &BTreeMap<String, raw::Meter>) -> Option<Problem> {
    // Of two spellings, the one that fewer meters know is the slip; of two that as many know, the shorter.
    let weight = |plan: &str| (all.values().filter(|meter| meter.limits.contains_key(plan)).count(), plan.len());
    let names = || raw.limits.keys().map(String::as_str);
    // How far apart two names may be depends on which of them is taken for the right one: either may be.
    let alike = closest(plan, names()).or_else(|| names().find(|name| closest(name, [plan]).is_some()));
    let alike = alike.filter(|alike| {
        let others = all.iter().filter(|(other, _)| other.as_str() != name);
        others
            .map(|(_, meter)| meter)
            .all(|meter| !(meter.limits.contains_key(plan) && meter.limits.contains_key(*alike)))
    });
    let message = format!("the meter `{name}` has no limit for the plan `{plan}`");
    // There is a meter that has the slip, and lacks what was meant.
    let is_reported_there = |alike: &str| {
        let counts = |meter: &raw::Meter| {
            meter.counts.plans.is_empty() || meter.counts.plans.iter().any(|counted| counted == alike)
        };
        all.iter().any(|(other, meter)| other != name && meter.limits.contains_key(plan) && counts(meter))
    };
    let is_slip = |alike: &&str| weight(plan) < weight(alike);
    match alike {
        Some(alike) if is_slip(&alike) && is_reported_there(alike) => None,
        Some(alike) if !is_slip(&alike) => {
            let problem = Problem::at_key(&["meters", name, "limits", alike], message);
            Some(problem.help(format!("did you mean `{plan}` instead of `{alike}`?")))
        }
        _ => Some(Problem::at(&["meters", name, "limits"], message).help(format!(
            "add {plan} = 10, {plan} = \"unlimited\", or leave the plan out with counts = {{ plans = [...] }}"
        ))),
    }
}

fn limit(meter: &str, plan: &str, raw: &raw::Limit, problems: &mut Problems) -> Option<Limit> {
    let path = ["meters", meter, "limits", plan];
    match raw {
        raw::Limit::Word(word) if word == "unlimited" => Some(Limit::Unlimited),
        raw::Limit::Number(number) if let Ok(most) = u32::try_from(*number) => Some(Limit::AtMost(most)),
        raw::Limit::PerSeat(raw::PerSeat { per_seat }) if let Ok(most) = u32::try_from(*per_seat) => {
            Some(Limit::PerSeat(most))
        }
        raw::Limit::Number(number) | raw::Limit::PerSeat(raw::PerSeat { per_seat: number }) => {
            let problem = Problem::at(&path, format!("{number} is no limit"));
            problems.add(problem.help("write a number from 0 to 4294967295, or \"unlimited\""));
            None
        }
        raw::Limit::Word(word) => {
            let problem = Problem::at(&path, format!("`{word}` is no limit"));
            problems.add(match closest(word, ["unlimited"]) {
                Some(_) => problem.suggest(word, ["unlimited"]),
                None => problem.help("write a number from 0, or \"unlimited\""),
            });
            None
        }
    }
}
