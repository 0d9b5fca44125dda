//! What many tokens say.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// How many values are known at a time.
const MOST: usize = 1_024;

/// Values that many callers have in common, each kept once: the same few are in the processor's caches then, whoever asks.
#[derive(Debug)]
pub(super) struct Common<T: ?Sized>(Mutex<HashSet<Arc<T>>>);

impl<T: ?Sized> Default for Common<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: ?Sized + Hash + Eq> Common<T> {
    /// The one that is equal and known already; else this one, from now on.
    pub(super) fn one(&self, value: Arc<T>) -> Arc<T> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(&value) {
            return known.clone();
        }
        if known.len() >= MOST {
            // Nothing is common that comes in so many forms; what is will be back in a moment.
            known.clear();
        }
        known.insert(value.clone());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_one_and_no_more_than_so_many_are_kept() {
        let common = Common::<str>::default();
        let pro = common.one("pro".into());
        assert!(Arc::ptr_eq(&pro, &common.one("pro".into())));
        assert_eq!(&*common.one("free".into()), "free");
        for number in 0..10 * MOST {
            assert_eq!(*common.one(number.to_string().into()), *number.to_string());
            assert!(common.0.lock().unwrap_or_else(PoisonError::into_inner).len() <= MOST);
        }
        assert_eq!(&*common.one("pro".into()), "pro");
    }
}
