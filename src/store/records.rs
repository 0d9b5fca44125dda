//! How rows are written to a journal, and what is left of many groups.
//!
//! ```text
//!   group   =  records
//!   record  =  key, 16 bytes | length, 4 bytes | a row, or the name of one that is no more
//! ```
//!
//! The key is a digest of the row's name under a key of the ledger. Of the records with one key the last counts: the others need
//! not even be decoded.

use std::collections::HashMap;
use std::hash::Hash;

use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher13};

use super::rows::{Batch, CounterName, CounterRow, CoverRow, IntentRow};

const KEY: usize = 16;
const LENGTH: usize = 4;

/// What is in a journal that nobody can have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Undecodable;

/// Writes groups.
#[derive(Debug)]
pub(super) struct Records {
    names: SipHasher13,
    group: Vec<u8>,
}

/// One record, as it is written.
#[derive(Serialize)]
pub(super) enum Written<'r> {
    Counter(&'r CounterRow),
    Dropped(&'r CounterName),
    Cover(&'r CoverRow),
    Ended(u64),
    Intent(&'r IntentRow),
    ForgetBefore(i64),
}

/// One record, as it is read: the same as [`Written`].
#[derive(Deserialize)]
enum Read {
    Counter(CounterRow),
    Dropped(CounterName),
    Cover(CoverRow),
    Ended(u64),
    Intent(IntentRow),
    ForgetBefore(i64),
}

impl Written<'_> {
    /// A checksum of all that a row says. SQLite has none: a bit that flips on the disk would be a count like any other.
    pub(super) fn seal(&self) -> u32 {
        // Only a buffer that is too small can fail.
        postcard::to_extend(self, Vec::with_capacity(256)).map_or(0, |written| crc32fast::hash(&written))
    }
}

impl Records {
    pub(super) fn of_ledger(id: u64) -> Self {
        Self { names: SipHasher13::new_with_keys(id, 0), group: Vec::new() }
    }

    /// A batch as a group of records.
    pub(super) fn group(&mut self, batch: &Batch) -> postcard::Result<&[u8]> {
        let Batch { counters, dropped, covers, ended, intents, forget_before } = batch;
        self.group.clear();
        counters.iter().try_for_each(|row| self.put(&("counter", &row.name), &Written::Counter(row)))?;
        dropped.iter().try_for_each(|name| self.put(&("counter", name), &Written::Dropped(name)))?;
        covers.iter().try_for_each(|row| self.put(&("cover", row.number), &Written::Cover(row)))?;
        ended.iter().try_for_each(|number| self.put(&("cover", *number), &Written::Ended(*number)))?;
        intents.iter().try_for_each(|row| self.put(&("open", &row.user, &row.what), &Written::Intent(row)))?;
        forget_before.iter().try_for_each(|before| self.put(&"forget", &Written::ForgetBefore(*before)))?;
        Ok(&self.group)
    }

    fn put(&mut self, name: &impl Hash, record: &Written<'_>) -> postcard::Result<()> {
        let mut key = self.names;
        name.hash(&mut key);
        self.group.extend_from_slice(&key.finish128().as_bytes());
        let at = self.group.len();
        self.group.extend_from_slice(&[0; LENGTH]);
        self.group = postcard::to_extend(record, std::mem::take(&mut self.group))?;
        let length = (self.group.len() - at - LENGTH) as u32;
        self.group[at..at + LENGTH].copy_from_slice(&length.to_le_bytes());
        Ok(())
    }
}

/// The last word about each row, of so many groups.
#[derive(Debug, Default)]
pub(super) struct Changes {
    last: HashMap<[u8; KEY], Vec<u8>>,
    /// How many bytes these are.
    bytes: usize,
}

impl Changes {
    /// Adds a later group.
    pub(super) fn add(&mut self, mut group: &[u8]) -> Result<(), Undecodable> {
        while !group.is_empty() {
            let (key, rest) = group.split_first_chunk::<KEY>().ok_or(Undecodable)?;
            let (length, rest) = rest.split_first_chunk::<LENGTH>().ok_or(Undecodable)?;
            let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(Undecodable)?;
            let last = self.last.entry(*key).or_default();
            self.bytes = self.bytes - last.len() + record.len();
            last.clear();
            last.extend_from_slice(record);
            group = rest;
        }
        Ok(())
    }

    /// How many bytes are to be held, not counting keys.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of it as one batch, in the order of the tables: their trees are walked once, not at random.
    pub(super) fn into_batch(self) -> Result<Batch, Undecodable> {
        let mut batch = Batch::default();
        for record in self.last.into_values() {
            match postcard::from_bytes(&record).map_err(|_| Undecodable)? {
                Read::Counter(row) => batch.counters.push(row),
                Read::Dropped(name) => batch.dropped.push(name),
                Read::Cover(row) => batch.covers.push(row),
                Read::Ended(number) => batch.ended.push(number),
                Read::Intent(row) => batch.intents.push(row),
                Read::ForgetBefore(before) => batch.forget_before = Some(before),
            }
        }
        batch.counters.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        batch.covers.sort_unstable_by_key(|row| row.number);
        batch.ended.sort_unstable();
        batch.intents.sort_unstable_by(|a, b| (&a.user, &a.what).cmp(&(&b.user, &b.what)));
        Ok(batch)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::policy::{Span, Subject};
    use crate::store::{CoverKind, CoverName};

    fn counter(user: &str, used: u32) -> CounterRow {
        let span = Span { start: 0, end: 604_800 };
        let name = CounterName { meter: "exports".into(), subject: Subject::user(user), span };
        CounterRow { name, used, reserved: 1, plan: "free".into() }
    }

    fn cover(number: u64, what: &str) -> CoverRow {
        CoverRow {
            number,
            name: CoverName { kind: CoverKind::Session, user: "u".into(), what: what.into() },
            meters: vec![("exports".into(), 1)],
            degraded: Vec::new(),
            expires_at_ms: 5,
            idle_at_ms: None,
            files_left: 3,
            version: None,
            file: None,
        }
    }

    fn intent(what: &str, charges: u32) -> IntentRow {
        IntentRow { user: "u".into(), what: what.into(), charges, meters: Vec::new() }
    }

    fn merged(batches: &[Batch]) -> Result<Batch, Undecodable> {
        let mut records = Records::of_ledger(1);
        let groups: Vec<Vec<u8>> = batches.iter().map(|batch| records.group(batch).unwrap().to_vec()).collect();
        let mut changes = Changes::default();
        groups.iter().try_for_each(|group| changes.add(group))?;
        changes.into_batch()
    }

    #[test]
    fn the_last_word_about_each_row_counts() {
        let first = Batch {
            counters: vec![counter("b", 1), counter("a", 1), counter("c", 9)],
            covers: vec![cover(1, "x"), cover(2, "y")],
            intents: vec![intent("d", 1)],
            forget_before: Some(1),
            ..Batch::default()
        };
        let second = Batch {
            counters: vec![counter("b", 0)],
            dropped: vec![counter("c", 0).name],
            ended: vec![1],
            intents: vec![intent("d", 0)],
            ..Batch::default()
        };
        let third = Batch { covers: vec![cover(1, "x")], ..Batch::default() };
        let expected = Batch {
            counters: vec![counter("a", 1), counter("b", 0)],
            dropped: vec![counter("c", 0).name],
            covers: vec![cover(2, "y")],
            ended: vec![1],
            intents: vec![intent("d", 0)],
            forget_before: Some(1),
        };
        assert_eq!(merged(&[first.clone(), second.clone()]), Ok(expected));
        assert_eq!(merged(&[first, second, third]).unwrap().covers.len(), 2, "opened anew");
    }

    #[test]
    fn a_group_that_nobody_can_have_written_is_told() {
        let mut records = Records::of_ledger(1);
        let batch = Batch { counters: vec![counter("u", 1)], ..Batch::default() };
        let whole = records.group(&batch).unwrap().to_vec();
        for length in 1..whole.len() {
            assert_eq!(Changes::default().add(&whole[..length]), Err(Undecodable), "{length}");
        }
        let mut twice = Changes::default();
        for _ in 0..2 {
            twice.add(&whole).unwrap();
            assert_eq!(twice.bytes(), whole.len() - KEY - LENGTH, "the last word only");
        }
        let mut odd = whole.clone();
        odd[KEY + LENGTH] = 77;
        let mut changes = Changes::default();
        changes.add(&odd).unwrap();
        assert_eq!(changes.into_batch(), Err(Undecodable));
    }
}
