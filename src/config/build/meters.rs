//! Meters, their limits and the plans they speak of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::civil::Weekday;
use jiff::tz::TimeZone;

use crate::config::problem::{Problem, closest};
use crate::config::raw;
use crate::policy::{Action, Calendar, CalendarUnit, Counts, Limit, Meter, OnExceed, Plans, Platform, Policy, Window};

use super::Problems;

pub(super) fn policy(raw: &BTreeMap<String, raw::Meter>, problems: &mut Problems) -> Policy {
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
    let plans = Plans::new(names.into_iter().map(Arc::from));
    let meters = raw.iter().map(|(name, meter)| self::meter(name, meter, raw, &plans, problems)).collect();
    Policy { plans, meters }
}

fn meter(
    name: &str,
    raw: &raw::Meter,
    all: &BTreeMap<String, raw::Meter>,
    plans: &Plans,
    problems: &mut Problems,
) -> Meter {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
        let problem = Problem::at_key(&["meters", name], format!("`{name}` is no name for a meter"));
        problems.add(problem.help("use a-z, 0-9 and -: clients see it in header fields"));
    }
    let raw::Subject::User = raw.subject;
    let counted: Vec<_> = raw.counts.plans.iter().filter_map(|plan| plans.find(plan)).collect();
    let limits = plans.iter().map(|(plan, plan_name)| {
        let written = raw.limits.get(plan_name);
        let is_counted = counted.is_empty() || counted.contains(&plan);
        match (written, is_counted) {
            (Some(limit), true) => self::limit(name, plan_name, limit, problems),
            (None, false) => None,
            (Some(_), false) => {
                let message = format!("the meter `{name}` does not count the plan `{plan_name}`");
                let problem = Problem::at_key(&["meters", name, "limits", plan_name], message);
                problems.add(problem.help("remove the limit, or add the plan to counts.plans"));
                None
            }
            (None, true) => {
                problems.found.extend(missing_limit(name, plan_name, raw, all));
                None
            }
        }
    });
    Meter {
        name: name.into(),
        limits: limits.collect(),
        counts: Counts {
            ai: raw.counts.ai,
            actions: raw.counts.actions.iter().copied().map(action).collect(),
            platforms: raw.counts.platforms.iter().copied().map(platform).collect(),
            plans: counted,
        },
        window: window(name, &raw.window, problems),
        sessions: raw.sessions,
        on_exceed: match raw.on_exceed {
            raw::OnExceed::Deny => OnExceed::Deny,
            raw::OnExceed::Observe => OnExceed::Observe,
        },
    }
}

/// A plan that this meter neither limits nor leaves out: most often a slip of the pen, here or elsewhere.
fn missing_limit(name: &str, plan: &str, raw: &raw::Meter, all: &BTreeMap<String, raw::Meter>) -> Option<Problem> {
    // Of two spellings, the one that fewer meters know is the slip.
    let weight = |plan: &str| (all.values().filter(|meter| meter.limits.contains_key(plan)).count(), plan.len());
    let alike = closest(plan, raw.limits.keys().map(String::as_str)).filter(|alike| {
        let others = all.iter().filter(|(other, _)| other.as_str() != name);
        others
            .map(|(_, meter)| meter)
            .all(|meter| !(meter.limits.contains_key(plan) && meter.limits.contains_key(*alike)))
    });
    let message = format!("the meter `{name}` has no limit for the plan `{plan}`");
    match alike {
        // Reported where the slip is.
        Some(alike) if weight(plan) < weight(alike) => None,
        Some(alike) => {
            let problem = Problem::at_key(&["meters", name, "limits", alike], message);
            Some(problem.help(format!("did you mean `{plan}` instead of `{alike}`?")))
        }
        None => Some(Problem::at(&["meters", name, "limits"], message).help(format!(
            "add {plan} = 10, {plan} = \"unlimited\", or leave the plan out with counts = {{ plans = [...] }}"
        ))),
    }
}

fn limit(meter: &str, plan: &str, raw: &raw::Limit, problems: &mut Problems) -> Option<Limit> {
    let path = ["meters", meter, "limits", plan];
    match raw {
        raw::Limit::Word(word) if word == "unlimited" => Some(Limit::Unlimited),
        raw::Limit::Number(number) if u32::try_from(*number).is_ok() => u32::try_from(*number).ok().map(Limit::AtMost),
        raw::Limit::Number(number) => {
            let problem = Problem::at(&path, format!("{number} is no limit"));
            problems.add(problem.help("write a number from 0 to 4294967295, or \"unlimited\""));
            None
        }
        raw::Limit::Word(word) => {
            let problem = Problem::at(&path, format!("`{word}` is no limit"));
            problems.add(problem.help("write a number from 0, or \"unlimited\""));
            None
        }
    }
}

fn window(meter: &str, raw: &raw::Window, problems: &mut Problems) -> Window {
    let path = |key| ["meters", meter, "window", key];
    if raw.starts.is_some() && raw.calendar != raw::CalendarUnit::Week {
        problems.add(Problem::at_key(&path("starts"), "only a week has a day that it starts on"));
    }
    let zone = match raw.time_zone.as_deref() {
        None | Some("UTC") => TimeZone::UTC,
        Some(name) => TimeZone::get(name).unwrap_or_else(|_| {
            let problem = Problem::at(&path("time_zone"), format!("there is no time zone `{name}`"));
            problems.add(problem.help("write an IANA name, e.g. \"Europe/Paris\""));
            TimeZone::UTC
        }),
    };
    let unit = match raw.calendar {
        raw::CalendarUnit::Day => CalendarUnit::Day,
        raw::CalendarUnit::Week => CalendarUnit::Week { starts: weekday(raw.starts.unwrap_or(raw::Weekday::Monday)) },
        raw::CalendarUnit::Month => CalendarUnit::Month,
    };
    Window::Calendar(Calendar { unit, zone })
}

const fn weekday(raw: raw::Weekday) -> Weekday {
    match raw {
        raw::Weekday::Monday => Weekday::Monday,
        raw::Weekday::Tuesday => Weekday::Tuesday,
        raw::Weekday::Wednesday => Weekday::Wednesday,
        raw::Weekday::Thursday => Weekday::Thursday,
        raw::Weekday::Friday => Weekday::Friday,
        raw::Weekday::Saturday => Weekday::Saturday,
        raw::Weekday::Sunday => Weekday::Sunday,
    }
}

pub(super) const fn action(raw: raw::Action) -> Action {
    match raw {
        raw::Action::Download => Action::Download,
        raw::Action::ShareFile => Action::ShareFile,
        raw::Action::Autosave => Action::Autosave,
        raw::Action::OpenExportScreen => Action::OpenExportScreen,
        raw::Action::LeaveExportScreen => Action::LeaveExportScreen,
        raw::Action::SaveDesign => Action::SaveDesign,
        raw::Action::ShareLink => Action::ShareLink,
        raw::Action::View => Action::View,
    }
}

const fn platform(raw: raw::Platform) -> Platform {
    match raw {
        raw::Platform::Web => Platform::Web,
        raw::Platform::Ios => Platform::Ios,
        raw::Platform::Android => Platform::Android,
        raw::Platform::Other => Platform::Other,
    }
}
