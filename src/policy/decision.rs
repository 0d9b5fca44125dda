//! The table of the counting rules (section 2) as one pure function.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::cost::Request;
use super::{
    Action, Anchor, BadCost, Cost, Delivers, Limit, Meter, MeterId, NoSeats, OnExceed, PlanId, Plans, Platform,
    Subject, SubjectKind, Who,
};

/// All plans and meters. Decides what an export costs; knows nothing of what has been used.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The plans that tokens may name.
    pub plans: Plans,
    /// The meters, by [`MeterId`].
    pub meters: Vec<Meter>,
}

/// All that the table asks about an export.
#[derive(Debug, Clone, Copy)]
pub struct Export<'e> {
    /// What the request does. Actions that are not exports cost nothing.
    pub action: Action,
    /// Where the user is.
    pub platform: Platform,
    /// Whether the design uses an AI feature.
    pub ai: bool,
    /// The design's features.
    pub features: &'e [String],
    /// Who is asking.
    pub who: &'e Who,
    /// The user's plan.
    pub plan: PlanId,
    /// How the route hands the image out.
    pub delivers: Delivers,
}

/// What the table says about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Charges to be made together, all or nothing. Empty: nothing counts this export.
    pub demands: SmallVec<[Demand; 2]>,
    /// The sentence of the table that decided.
    pub rule: Rule,
    /// Meters that enforce nothing, and could not tell what to count.
    pub untold: SmallVec<[MeterId; 2]>,
}

impl Verdict {
    /// Whether a limit may refuse or degrade this export. If not, it is forwarded even when nothing can be charged.
    pub fn is_limited(&self) -> bool {
        self.demands.iter().any(Demand::is_enforced)
    }
}

/// Why the table cannot be read for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undecided {
    /// The token lacks a claim that a meter counts by; its name.
    NoClaim(String),
    /// The request does not say clearly what it costs.
    Cost(BadCost),
}

/// Whether a request's body must be read to know what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeedsBody {
    /// No meter asks for it.
    No,
    /// Only meters do that enforce nothing: what cannot be read is not counted by them.
    IfItCan,
    /// One does that may stop the export.
    Yes,
}

/// A charge on one meter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// The meter to charge.
    pub meter: MeterId,
    /// Whom to charge.
    pub subject: Subject,
    /// When billing periods begin, if the meter's window asks for it.
    pub anchor: Option<Anchor>,
    /// How much; at least 1.
    pub cost: u32,
    /// How many images that is, as far as the request says: a price is no number of files.
    pub images: u32,
    /// What the plan allows in a window.
    pub limit: u32,
    /// What happens over the limit.
    pub on_exceed: OnExceed,
    /// Whether it only reports what would happen.
    pub shadow: bool,
    /// What sessions of the export screen have to do with it.
    pub session: SessionUse,
}

impl Demand {
    /// Whether its limit may stop or change an export.
    pub fn is_enforced(&self) -> bool {
        self.on_exceed.is_enforced(self.shadow)
    }
}

/// What a session of the export screen means to a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionUse {
    /// Nothing.
    None,
    /// An open session of the same user and design covers it.
    Covered,
    /// It opens a session, in place of any that is open.
    Opens,
}

/// The sentence of the table that decided about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Each download, share or autosave counts.
    EachExportCounts,
    /// Opening the export screen counts once and opens a session.
    OpeningStartsSession,
    /// An open session covers it, else it counts.
    CoveredBySession,
    /// The opening delivers the file: it is the autosave, and counts.
    OpeningIsAutosave,
    /// The opening delivers screen data only: no file left.
    ScreenDataIsNoFile,
    /// No limit of this plan counts this export.
    Unlimited,
    /// The action is not an export.
    NotAnExport,
}

impl Rule {
    /// Short name for logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EachExportCounts => "each-export-counts",
            Self::OpeningStartsSession => "opening-starts-session",
            Self::CoveredBySession => "covered-by-session",
            Self::OpeningIsAutosave => "opening-is-autosave",
            Self::ScreenDataIsNoFile => "screen-data-is-no-file",
            Self::Unlimited => "unlimited",
            Self::NotAnExport => "not-an-export",
        }
    }

    /// The sentence itself.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::EachExportCounts => "each download, share of a file or autosave counts as one export",
            Self::OpeningStartsSession => {
                "opening the export screen counts as one export, and covers what is exported from that screen"
            }
            Self::CoveredBySession => {
                "an open export screen of this user and design covers it; without one it counts as one export"
            }
            Self::OpeningIsAutosave => "this export screen delivers the file, so opening it is the autosave and counts",
            Self::ScreenDataIsNoFile => "the export screen delivers only screen data: no file leaves, nothing counts",
            Self::Unlimited => "no limit of this plan counts this export",
            Self::NotAnExport => "the design stays inside the product: never counted, never refused",
        }
    }
}

impl Policy {
    /// Reads the table: which meters an export is charged on, how much, and which sentence says so.
    ///
    /// # Errors
    ///
    /// [`Undecided`] if a meter that counts the export, and may stop it, asks for what neither token nor request says.
    pub fn decide(&self, export: Export<'_>, request: Request<'_>) -> Result<Verdict, Undecided> {
        if !export.action.is_export() {
            return Ok(Verdict { demands: SmallVec::new(), rule: Rule::NotAnExport, untold: SmallVec::new() });
        }
        let no_file = export.action == Action::OpenExportScreen && export.delivers == Delivers::Screen;
        let mut rule = if no_file { Rule::ScreenDataIsNoFile } else { Rule::Unlimited };
        let (mut demands, mut untold) = (SmallVec::new(), SmallVec::new());
        for (id, meter, session, sentence) in self.counting(export) {
            match demand(id, meter, session, export, request) {
                Ok(Some(demand)) => {
                    if demand.is_enforced() {
                        rule = sentence;
                    }
                    demands.push(demand);
                }
                Ok(None) => {}
                Err(undecided) if meter.is_enforced() => return Err(undecided),
                // To watch is no reason to refuse.
                Err(_) => untold.push(id),
            }
        }
        Ok(Verdict { demands, rule, untold })
    }

    /// Whether the request's body must be read before the table can be.
    pub fn needs_body(&self, export: Export<'_>) -> NeedsBody {
        let asks = |meter: &Meter| meter.cost.needs_body() && meter.limits_plan(export.plan);
        let asking = self.counting(export).filter(|(_, meter, ..)| asks(meter));
        asking.fold(NeedsBody::No, |needs, (_, meter, ..)| {
            if meter.is_enforced() || needs == NeedsBody::Yes { NeedsBody::Yes } else { NeedsBody::IfItCan }
        })
    }

    /// The meters that count an export, what sessions mean to it, and the sentence that says so.
    fn counting(&self, export: Export<'_>) -> impl Iterator<Item = (MeterId, &Meter, SessionUse, Rule)> {
        let opening = export.action == Action::OpenExportScreen;
        let counted = self
            .meters()
            .filter(move |(_, meter)| meter.counts.include(export.action, export.platform, export.ai, export.plan));
        counted.filter_map(move |(id, meter)| {
            // Of designs without AI each file counts, from the export screen as well (counting rules, section 2).
            let has_sessions = meter.sessions && export.ai && export.platform.has_export_screen();
            let (session, sentence) = match (opening, has_sessions) {
                (true, true) => (SessionUse::Opens, Rule::OpeningStartsSession),
                (true, false) if export.delivers == Delivers::Screen => return None,
                (true, false) => (SessionUse::None, Rule::OpeningIsAutosave),
                (false, true) => (SessionUse::Covered, Rule::CoveredBySession),
                (false, false) => (SessionUse::None, Rule::EachExportCounts),
            };
            Some((id, meter, session, sentence))
        })
    }

    /// Whom meters count by, and whether one does whose limits may stop or change an export.
    pub fn subjects(&self) -> BTreeMap<SubjectKind, bool> {
        let mut subjects = BTreeMap::new();
        for meter in self.in_use() {
            for kind in &meter.subject.0 {
                *subjects.entry(kind.clone()).or_default() |= meter.is_enforced();
            }
        }
        subjects
    }

    /// The meters that are not [gone](Meter::gone).
    fn in_use(&self) -> impl Iterator<Item = &Meter> {
        self.meters.iter().filter(|meter| !meter.limits.is_empty())
    }

    /// Whether it matters which AI features the design of an export has: with some it would be counted otherwise than without, or for
    /// another price.
    pub fn asks_for_features(&self, export: Export<'_>) -> bool {
        let counting = |ai| {
            let counting = self.counting(Export { ai, ..export });
            counting.filter(|(_, meter, ..)| meter.limits_plan(export.plan))
        };
        let is_priced = |ai| counting(ai).any(|(_, meter, ..)| matches!(meter.cost, Cost::Features { .. }));
        let sessions = |ai| counting(ai).map(|(id, _, session, _)| (id, session));
        is_priced(true) || is_priced(false) || !sessions(true).eq(sessions(false))
    }

    /// Whether a limit is one per seat.
    pub fn counts_by_seat(&self) -> bool {
        let mut limits = self.in_use().flat_map(|meter| &meter.limits);
        limits.any(|limit| matches!(limit, Some(Limit::PerSeat(_))))
    }

    /// Whether a window is a billing period.
    pub fn counts_by_billing_period(&self) -> bool {
        self.in_use().any(|meter| meter.window.needs_anchor())
    }

    /// The meters with their ids.
    pub fn meters(&self) -> impl Iterator<Item = (MeterId, &Meter)> {
        (0..).map(MeterId).zip(&self.meters)
    }

    /// The meter of that id.
    pub fn meter(&self, id: MeterId) -> Option<&Meter> {
        self.meters.get(usize::from(id.0))
    }
}

/// What a meter that counts an export asks for; `None` if it does not limit the plan.
fn demand(
    id: MeterId,
    meter: &Meter,
    session: SessionUse,
    export: Export<'_>,
    request: Request<'_>,
) -> Result<Option<Demand>, Undecided> {
    let no_claim = |name: &str| Undecided::NoClaim(name.to_owned());
    let Some(limit) = meter.limit(export.plan) else { return Ok(None) };
    let Some(limit) = limit.number(export.who).map_err(|NoSeats| no_claim("seats"))? else { return Ok(None) };
    let subject = meter.subject.subject(export.who).ok_or_else(|| {
        let first = meter.subject.0.first().map_or("", |kind| kind.as_str());
        no_claim(first.trim_start_matches('/'))
    })?;
    let anchor = export.who.billing_anchor.filter(|_| meter.window.needs_anchor());
    if meter.window.needs_anchor() && anchor.is_none() {
        return Err(no_claim("billing_anchor"));
    }
    let cost = meter.cost.of(request, export.features).map_err(Undecided::Cost)?;
    let (on_exceed, shadow) = (meter.on_exceed, meter.shadow);
    let images = if meter.cost.is_said() { cost } else { 1 };
    Ok(Some(Demand { meter: id, subject, anchor, cost, images, limit, on_exceed, shadow, session }))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::sync::{Arc, LazyLock};

    use http::{HeaderMap, Uri};
    use jiff::civil::Weekday;
    use jiff::tz::TimeZone;

    use super::super::Cost;
    use super::super::cost;
    use super::super::{Anchored, Calendar, CalendarUnit, Counts, Period, Whose, Window};
    use super::*;

    const FREE: PlanId = PlanId(0);
    const PRO: PlanId = PlanId(1);
    const MAX: PlanId = PlanId(2);

    const AI_EXPORTS: MeterId = MeterId(0);
    const EXPORTS: MeterId = MeterId(1);
    const FAIR_USE: MeterId = MeterId(2);

    /// The shipped defaults. That `config/gate.toml` says the same is tested with the configuration.
    fn shipped() -> Policy {
        use Limit::{AtMost, Unlimited};
        let window = |unit| Window::Calendar(Calendar { unit, zone: TimeZone::UTC });
        let week = window(CalendarUnit::Week { starts: Weekday::Monday });
        Policy {
            plans: Plans::new(["free", "pro", "max"].map(Arc::from)),
            meters: vec![
                Meter {
                    counts: Counts { ai: Some(true), ..Counts::default() },
                    sessions: true,
                    ..Meter::new("ai-exports", week.clone(), [AtMost(2), AtMost(30), AtMost(120)].map(Some))
                },
                Meter {
                    counts: Counts { ai: Some(false), ..Counts::default() },
                    ..Meter::new("exports", week, [AtMost(60), Unlimited, Unlimited].map(Some))
                },
                Meter {
                    counts: Counts { ai: Some(false), plans: vec![PRO, MAX], ..Counts::default() },
                    on_exceed: OnExceed::Observe,
                    fair_use: true,
                    ..Meter::new("fair-use", window(CalendarUnit::Day), [None, Some(AtMost(1000)), Some(AtMost(3000))])
                },
            ],
        }
    }

    static ANNA: LazyLock<Who> = LazyLock::new(|| Who::user("anna"));

    fn of_anna() -> Export<'static> {
        Export {
            action: Action::Download,
            platform: Platform::Web,
            ai: AI,
            features: &[],
            who: &ANNA,
            plan: FREE,
            delivers: Delivers::File,
        }
    }

    fn decide(policy: &Policy, export: Export<'_>) -> Verdict {
        let (uri, headers) = (Uri::from_static("/"), HeaderMap::new());
        policy.decide(export, Request { route: "r", uri: &uri, headers: &headers, body: None }).unwrap()
    }

    const LEAVING: [Action; 3] = [Action::Download, Action::ShareFile, Action::Autosave];
    const MOBILE: [Platform; 2] = [Platform::Ios, Platform::Android];
    const ANY_PLAN: [PlanId; 3] = [FREE, PRO, MAX];
    const FILE_LIKE: [Delivers; 3] = [Delivers::File, Delivers::Redirect, Delivers::Success];
    const AI: bool = true;
    const PLAIN: bool = false;

    /// Every combination of a row gets the same charges: (meter, cost, what sessions mean to it).
    fn row(
        actions: &[Action],
        platforms: &[Platform],
        ai: bool,
        plans: &[PlanId],
        delivers: &[Delivers],
        expected: &[(MeterId, SessionUse)],
        rule: Rule,
    ) {
        let policy = shipped();
        for &action in actions {
            for &platform in platforms {
                for &plan in plans {
                    for &delivers in delivers {
                        let export = Export { action, platform, ai, plan, delivers, ..of_anna() };
                        let verdict = decide(&policy, export);
                        let charged: Vec<_> = verdict.demands.iter().map(|d| (d.meter, d.session)).collect();
                        assert_eq!(charged, expected, "{export:?}");
                        assert!(verdict.demands.iter().all(|d| d.cost == 1), "{export:?}");
                        assert_eq!(verdict.rule, rule, "{export:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn web_each_ai_download_share_or_autosave_costs_one_ai_export() {
        let platforms = [Platform::Web, Platform::Other];
        let charge = [(AI_EXPORTS, SessionUse::None)];
        row(&LEAVING, &platforms, AI, &ANY_PLAN, &FILE_LIKE, &charge, Rule::EachExportCounts);
    }

    #[test]
    fn mobile_opening_the_export_screen_of_an_ai_design_costs_one_ai_export_and_opens_a_session() {
        let delivers = [Delivers::File, Delivers::Redirect, Delivers::Success, Delivers::Screen];
        let charge = [(AI_EXPORTS, SessionUse::Opens)];
        row(&[Action::OpenExportScreen], &MOBILE, AI, &ANY_PLAN, &delivers, &charge, Rule::OpeningStartsSession);
    }

    #[test]
    fn a_meter_of_all_designs_has_sessions_for_those_with_ai_features_only() {
        let all = Counts::default();
        let meter = Meter { counts: all, sessions: true, ..shipped().meters[0].clone() };
        let policy = Policy { meters: vec![meter], ..shipped() };
        let session = |action, ai, delivers| {
            let export = Export { action, ai, delivers, platform: Platform::Ios, ..of_anna() };
            decide(&policy, export).demands.first().map(|demand| demand.session)
        };
        let opening = Action::OpenExportScreen;
        assert_eq!(session(opening, AI, Delivers::Screen), Some(SessionUse::Opens));
        assert_eq!(session(opening, PLAIN, Delivers::Screen), None, "no file has left");
        assert_eq!(session(opening, PLAIN, Delivers::File), Some(SessionUse::None));
        assert_eq!(session(Action::Download, AI, Delivers::File), Some(SessionUse::Covered));
        assert_eq!(session(Action::Download, PLAIN, Delivers::File), Some(SessionUse::None));
        let asks = |platform| policy.asks_for_features(Export { platform, ..of_anna() });
        assert!(asks(Platform::Ios) && !asks(Platform::Web));
    }

    #[test]
    fn features_matter_where_an_export_would_be_counted_otherwise() {
        let policy = shipped();
        let asks = |export| policy.asks_for_features(export);
        let screen = Export { action: Action::OpenExportScreen, delivers: Delivers::Screen, ..of_anna() };
        assert!(asks(of_anna()) && asks(Export { platform: Platform::Ios, ..screen }));
        assert!(!asks(screen), "by the web, screen data is nothing that counts");
        let unlimited = Meter { limits: vec![Some(Limit::Unlimited); 3], ..policy.meters[0].clone() };
        let plain = Meter { counts: Counts::default(), ..policy.meters[1].clone() };
        let both = Policy { meters: vec![unlimited.clone(), plain.clone()], ..shipped() };
        assert!(!both.asks_for_features(of_anna()), "it is counted all the same");
        let cost = Cost::Features { prices: [("logo".to_owned(), 3)].into(), combine: cost::Combine::Sum, other: 1 };
        let priced = Policy { meters: vec![unlimited, Meter { cost, ..plain }], ..shipped() };
        assert!(priced.asks_for_features(of_anna()));
    }

    #[test]
    fn mobile_ai_exports_are_covered_by_an_open_session_and_cost_one_ai_export_without() {
        let charge = [(AI_EXPORTS, SessionUse::Covered)];
        row(&LEAVING, &MOBILE, AI, &ANY_PLAN, &FILE_LIKE, &charge, Rule::CoveredBySession);
    }

    #[test]
    fn free_each_plain_download_share_or_autosave_costs_one_export_on_any_platform_whatever_session_is_open() {
        let charge = [(EXPORTS, SessionUse::None)];
        row(&LEAVING, &Platform::ALL, PLAIN, &[FREE], &FILE_LIKE, &charge, Rule::EachExportCounts);
    }

    #[test]
    fn free_mobile_opening_a_screen_that_delivers_the_plain_file_costs_one_export() {
        let charge = [(EXPORTS, SessionUse::None)];
        row(&[Action::OpenExportScreen], &MOBILE, PLAIN, &[FREE], &FILE_LIKE, &charge, Rule::OpeningIsAutosave);
    }

    #[test]
    fn free_mobile_opening_a_screen_of_a_plain_design_that_delivers_only_screen_data_costs_nothing() {
        let opening = [Action::OpenExportScreen];
        row(&opening, &MOBILE, PLAIN, &[FREE], &[Delivers::Screen], &[], Rule::ScreenDataIsNoFile);
    }

    #[test]
    fn web_opening_an_export_screen_counts_as_a_download_if_it_delivers_a_file_and_opens_no_session() {
        let opening = [Action::OpenExportScreen];
        let platforms = [Platform::Web, Platform::Other];
        let ai_charge = [(AI_EXPORTS, SessionUse::None)];
        row(&opening, &platforms, AI, &ANY_PLAN, &FILE_LIKE, &ai_charge, Rule::OpeningIsAutosave);
        let plain_charge = [(EXPORTS, SessionUse::None)];
        row(&opening, &platforms, PLAIN, &[FREE], &FILE_LIKE, &plain_charge, Rule::OpeningIsAutosave);
    }

    #[test]
    fn web_opening_an_export_screen_that_delivers_only_screen_data_costs_nothing() {
        let opening = [Action::OpenExportScreen];
        let platforms = [Platform::Web, Platform::Other];
        row(&opening, &platforms, AI, &ANY_PLAN, &[Delivers::Screen], &[], Rule::ScreenDataIsNoFile);
        row(&opening, &platforms, PLAIN, &ANY_PLAN, &[Delivers::Screen], &[], Rule::ScreenDataIsNoFile);
    }

    #[test]
    fn pro_and_max_plain_exports_are_unlimited_and_only_observed_for_fair_use() {
        let charge = [(FAIR_USE, SessionUse::None)];
        let paid = [PRO, MAX];
        row(&LEAVING, &Platform::ALL, PLAIN, &paid, &FILE_LIKE, &charge, Rule::Unlimited);
        let opening = [Action::OpenExportScreen];
        row(&opening, &Platform::ALL, PLAIN, &paid, &FILE_LIKE, &charge, Rule::Unlimited);
        row(&opening, &MOBILE, PLAIN, &paid, &[Delivers::Screen], &[], Rule::ScreenDataIsNoFile);
        for plan in paid {
            let export = Export { ai: PLAIN, plan, ..of_anna() };
            assert!(!decide(&shipped(), export).is_limited());
        }
    }

    #[test]
    fn saving_sharing_a_link_viewing_and_leaving_the_screen_cost_nothing_for_anyone() {
        let actions = [Action::SaveDesign, Action::ShareLink, Action::View, Action::LeaveExportScreen];
        let delivers = [Delivers::File, Delivers::Redirect, Delivers::Success, Delivers::Screen];
        for ai in [AI, PLAIN] {
            row(&actions, &Platform::ALL, ai, &ANY_PLAN, &delivers, &[], Rule::NotAnExport);
        }
    }

    #[test]
    fn the_limit_demanded_is_the_one_of_the_plan() {
        let limits = ANY_PLAN.map(|plan| {
            let export = Export { plan, ..of_anna() };
            decide(&shipped(), export).demands.first().unwrap().limit
        });
        assert_eq!(limits, [2, 30, 120]);
    }

    #[test]
    fn a_meter_counts_only_the_actions_and_platforms_it_names() {
        let mut policy = shipped();
        policy.meters[0].counts.actions = vec![Action::ShareFile];
        policy.meters[0].counts.platforms = vec![Platform::Web];
        let costs = |action, platform| {
            let export = Export { action, platform, ..of_anna() };
            decide(&policy, export).demands.len()
        };
        assert_eq!(costs(Action::ShareFile, Platform::Web), 1);
        assert_eq!(costs(Action::Download, Platform::Web), 0);
        assert_eq!(costs(Action::ShareFile, Platform::Ios), 0);
    }

    #[test]
    fn several_meters_that_count_one_export_are_charged_together() {
        let mut policy = shipped();
        policy.meters[1].counts.ai = None;
        let meters: Vec<_> = decide(&policy, of_anna()).demands.iter().map(|d| d.meter).collect();
        assert_eq!(meters, [AI_EXPORTS, EXPORTS]);
    }

    #[test]
    fn limits_per_seat_are_multiplied_by_the_seats_claim() {
        let mut policy = shipped();
        policy.meters[0].limits[0] = Some(Limit::PerSeat(30));
        policy.meters[0].subject = Whose(vec![SubjectKind::Team]);
        let of_team = |seats| Who { team: Some("acme".into()), seats, ..Who::user("anna") };
        let demand = |who: &Who| decide(&policy, Export { who, ..of_anna() }).demands.remove(0);
        assert_eq!(demand(&of_team(Some(5))).limit, 150);
        assert_eq!(demand(&of_team(Some(0))).limit, 0);
        assert_eq!(&*demand(&of_team(Some(5))).subject.id, "acme");
    }

    #[test]
    fn a_claim_that_a_meter_counts_by_must_be_there_unless_the_plan_is_unlimited() {
        let month = Anchored { period: Period::Months(1), zone: TimeZone::UTC };
        type Change = fn(&mut Meter);
        let breaks: [(&str, Change); 3] = [
            ("team", |meter| meter.subject = Whose(vec![SubjectKind::Team])),
            ("org", |meter| meter.subject = Whose(vec![SubjectKind::Claim("/org".into())])),
            ("seats", |meter| meter.limits[0] = Some(Limit::PerSeat(2))),
        ];
        let (uri, headers) = (Uri::from_static("/"), HeaderMap::new());
        let request = Request { route: "r", uri: &uri, headers: &headers, body: None };
        let mut anchored = shipped();
        anchored.meters[0].window = Window::Billing(month);
        let missing = |policy: &Policy| policy.decide(of_anna(), request).unwrap_err();
        assert_eq!(missing(&anchored), Undecided::NoClaim("billing_anchor".into()));
        for (claim, change) in breaks {
            let mut policy = shipped();
            change(&mut policy.meters[0]);
            assert_eq!(missing(&policy), Undecided::NoClaim(claim.into()));
            policy.meters[0].shadow = true;
            let watching = decide(&policy, of_anna());
            assert_eq!(
                (watching.demands.len(), &watching.untold[..]),
                (0, &[AI_EXPORTS][..]),
                "to watch is no reason to refuse"
            );
            policy.meters[0].limits[0] = Some(Limit::Unlimited);
            assert_eq!(decide(&policy, of_anna()).demands.len(), 0);
            assert_eq!(decide(&policy, Export { ai: PLAIN, ..of_anna() }).demands.len(), 1, "{claim}: not its export");
        }
    }

    #[test]
    fn a_body_is_asked_for_only_by_a_meter_that_counts_the_export() {
        let mut policy = shipped();
        let pointer = cost::Pointer::parse("/images").unwrap();
        policy.meters[0].cost =
            Cost::Said(cost::Number { from: cost::NumberIn::Body(pointer), default: None, max: 10 });
        assert_eq!(policy.needs_body(of_anna()), NeedsBody::Yes);
        assert_eq!(policy.needs_body(Export { ai: PLAIN, ..of_anna() }), NeedsBody::No);
        policy.meters[0].shadow = true;
        assert_eq!(policy.needs_body(of_anna()), NeedsBody::IfItCan);
        policy.meters[0].limits[0] = Some(Limit::Unlimited);
        assert_eq!(policy.needs_body(of_anna()), NeedsBody::No);
    }

    #[test]
    fn a_meter_in_shadow_or_one_that_observes_limits_nobody() {
        for change in [|meter: &mut Meter| meter.shadow = true, |meter: &mut Meter| meter.on_exceed = OnExceed::Observe]
        {
            let mut policy = shipped();
            change(&mut policy.meters[0]);
            assert!(!decide(&policy, of_anna()).is_limited());
        }
    }
}
