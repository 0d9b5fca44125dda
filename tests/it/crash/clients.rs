//! Who asks for what, until the gate is gone.

use std::sync::{Arc, Mutex};

use super::books::{Coverage, End, Habit, Life, User};
use super::dice::Dice;
use super::world::{Ask, Became, FEW, Gate, Whole, World};

/// How many stories a client comes back to.
const STORIES: usize = 4;

/// Exports designs that nobody has exported before.
pub(super) fn export_much(world: &World, gate: &Gate, user: &Arc<User>) {
    while export_new(world, gate, user, false).is_some() {}
}

/// The same without whims: one image after the other, each as fresh as can be when the gate is killed.
pub(super) fn export_plainly(world: &World, gate: &Gate, user: &Arc<User>) {
    while export_new(world, gate, user, true).is_some() {}
}

/// The user who has a few exports left, for all who use them up.
pub(super) type Few = Mutex<Arc<User>>;

/// Uses up what a user has, and looks whether that is all; then it is the next one's turn.
pub(super) fn use_up(world: &World, gate: &Gate, few: &Few) {
    let mut refusals = 0;
    loop {
        let user = few.lock().unwrap().clone();
        match export_new(world, gate, &user, false) {
            Some((End::Refused, _)) => refusals += 1,
            Some(_) => refusals = 0,
            None => return,
        }
        if refusals == 2 {
            refusals = 0;
            let mut few = few.lock().unwrap();
            if few.name == user.name {
                *few = world.user(Habit::Fresh, Some(FEW));
            }
        }
    }
}

fn export_new(world: &World, gate: &Gate, user: &Arc<User>, is_plain: bool) -> Became {
    let what = format!("n{}/download", world.name());
    world.export(gate, user, &Ask { method: "GET", what: &what, key: None, coverage: Coverage::None, is_plain })
}

/// Follows a few designs through several lives.
pub(super) struct Follower {
    habit: Habit,
    dice: Dice,
    stories: Vec<Story>,
}

/// One user with one design, and what is known of its covers.
struct Story {
    user: Arc<User>,
    known: Known,
    /// When the last answer came; `None` if it did not come to its end.
    last: Whole,
    /// Whether a crash may have left something owed.
    is_owed: bool,
    /// How many gates it has seen.
    lives: u64,
}

/// What an earlier charge covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// A key so many more files, a screen any number.
    Left(u32),
    Unknown,
}

impl Follower {
    pub(super) fn of(habit: Habit, seed: u64, which: u64) -> Self {
        Self { habit, dice: Dice::of(seed, which), stories: Vec::new() }
    }

    /// Asks for the designs of earlier lives, and then for new ones.
    pub(super) fn follow(&mut self, world: &World, gate: &Gate) {
        let Self { habit, dice, stories } = self;
        for story in stories.iter_mut() {
            for _ in 0..=dice.roll(3) {
                if story.go_on(world, gate, dice).is_none() {
                    return;
                }
            }
        }
        loop {
            let user = world.user(*habit, None);
            let mut story = Story { user, known: Known::Left(0), last: Some(0), is_owed: false, lives: 0 };
            let is_there = (0..=dice.roll(8)).all(|_| story.go_on(world, gate, dice).is_some());
            stories.push(story);
            if !is_there {
                return;
            }
        }
    }

    /// What a crash leaves of what is known.
    pub(super) fn life_is_over(&mut self, life: &Life) {
        let written = life.written_until();
        for story in &mut self.stories {
            story.lives += 1;
            if story.last.is_none_or(|last| last >= written) {
                story.known = Known::Unknown;
                story.is_owed = true;
                story.last = Some(0);
            }
        }
        // What a crash has cut short, for some lives; else what came last.
        self.stories.sort_by_key(|story| !(story.is_owed && story.lives < 4));
        let rest = self.stories.split_off(STORIES.min(self.stories.len()));
        self.stories.truncate(STORIES - 1);
        self.stories.extend(rest.into_iter().last());
    }
}

impl Story {
    fn go_on(&mut self, world: &World, gate: &Gate, dice: &mut Dice) -> Option<()> {
        let became = match self.user.habit {
            Habit::Fresh | Habit::Again => self.ask(world, gate, "GET", "download", Coverage::None, false),
            Habit::Key if dice.once_in(8) => self.ask_twice(world, gate),
            Habit::Key => self.ask_with_key(world, gate, dice.once_in(2)),
            Habit::Screen => self.be_on_screen(world, gate, dice),
        };
        self.last = became.and_then(|(_, whole)| whole);
        became.map(|_| ())
    }

    fn ask(&self, world: &World, gate: &Gate, method: &str, page: &str, coverage: Coverage, is_plain: bool) -> Became {
        let what = format!("{}/{page}", self.user.name);
        let key = (self.user.habit == Habit::Key).then_some("k");
        world.export(gate, &self.user, &Ask { method, what: &what, key, coverage, is_plain })
    }

    fn coverage(&self) -> Coverage {
        match self.known {
            Known::Left(0) => Coverage::None,
            Known::Left(_) => Coverage::Sure,
            Known::Unknown => Coverage::Unknown,
        }
    }

    fn ask_with_key(&mut self, world: &World, gate: &Gate, is_plain: bool) -> Became {
        let became = self.ask(world, gate, "GET", "download", self.coverage(), is_plain);
        self.known = match (self.known, became) {
            (Known::Left(0), Some((End::Image, Some(_)))) => Known::Left(2),
            (Known::Left(left), Some((End::Image, Some(_)))) => Known::Left(left - 1),
            // It came to nothing, and so did what it took.
            (known, Some((End::Nothing, _))) => known,
            _ => Known::Unknown,
        };
        became
    }

    /// At once: one charge for both.
    fn ask_twice(&mut self, world: &World, gate: &Gate) -> Became {
        self.known = Known::Unknown;
        let ask = || self.ask(world, gate, "GET", "download", Coverage::Unknown, false);
        let [first, second] =
            std::thread::scope(|scope| [scope.spawn(ask), scope.spawn(ask)].map(|client| client.join().unwrap()));
        let ((end, first), (_, second)) = (first?, second?);
        Some((end, first.zip(second).map(|(first, second)| first.max(second))))
    }

    /// Opens the screen, shares from it, leaves it.
    fn be_on_screen(&mut self, world: &World, gate: &Gate, dice: &mut Dice) -> Became {
        match (dice.roll(8), self.known) {
            (0, _) => {
                let whole = world.leave_screen(gate, &self.user, &self.user.name);
                self.known = whole.map_or(Known::Unknown, |_| Known::Left(0));
                Some((End::Nothing, Some(whole?)))
            }
            (1, _) | (2..=5, Known::Left(0)) => {
                // Opened again, it is another export.
                let became = self.ask(world, gate, "POST", "export-screen", Coverage::None, false);
                self.known = match became {
                    // What a crash has left owed is no charge, and opens nothing.
                    Some((End::Image, _)) if !self.is_owed => Known::Left(1),
                    Some((End::Nothing, _)) => self.known,
                    _ => Known::Unknown,
                };
                became
            }
            _ => self.ask(world, gate, "POST", "share", self.coverage(), false),
        }
    }
}
