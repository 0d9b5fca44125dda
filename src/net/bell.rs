//! A connection's task is not woken for nothing.
//!
//! Whoever takes a piece of an answer makes room for the next one, and hyper wakes the connection's task to fill it: also after the last
//! piece, when there is nothing left to be done. Each answer has a last piece, most have no other.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};

/// What a connection is woken by.
#[derive(Debug, Default)]
pub(super) struct Bell(OnceLock<Waker>);

thread_local! {
    static HELD: Cell<Held> = const { Cell::new(Held::No) };
}

/// Whether bells are held that would ring on this thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    No,
    Silent,
    /// One would have rung.
    Struck,
}

impl Bell {
    pub(super) fn ring(&self) {
        if let Some(task) = self.0.get() {
            task.wake_by_ref();
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if HELD.get() == Held::No {
            self.ring();
        } else {
            HELD.set(Held::Struck);
        }
    }
}

/// Does something with all bells held that it would ring by itself; what others ring meanwhile, on other threads, is heard. Whether one has to
/// be rung for it.
pub(super) fn hold<T>(act: impl FnOnce() -> T) -> (T, bool) {
    /// Also if it panics.
    struct Release;
    impl Drop for Release {
        fn drop(&mut self) {
            HELD.set(Held::No);
        }
    }
    let _release = Release;
    HELD.set(Held::Silent);
    let done = act();
    (done, HELD.get() == Held::Struck)
}

/// A connection that is woken by a bell. To be polled by one task only.
pub(super) struct Belled<C> {
    connection: C,
    bell: Arc<Bell>,
    waker: Waker,
}

impl<C> Belled<C> {
    pub(super) fn new(connection: C) -> (Self, Arc<Bell>) {
        let bell = Arc::<Bell>::default();
        (Self { connection, bell: bell.clone(), waker: bell.clone().into() }, bell)
    }
}

impl<C: Future + Unpin> Future for Belled<C> {
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let Self { connection, bell, waker } = &mut *self;
        bell.0.get_or_init(|| cx.waker().clone());
        Pin::new(connection).poll(&mut Context::from_waker(waker))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod tests {
    use std::future::poll_fn;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A connection that waits, its task, the bell, and the waker that it was given.
    fn connection() -> (Arc<Task>, Arc<Bell>, Waker) {
        let task = Arc::<Task>::default();
        let given = Cell::new(None);
        let (connection, bell) = Belled::new(Box::pin(poll_fn(|cx| {
            given.set(Some(cx.waker().clone()));
            Poll::<()>::Pending
        })));
        let mut connection = pin!(connection);
        for _ in 0..2 {
            assert!(connection.as_mut().poll(&mut Context::from_waker(&task.clone().into())).is_pending());
        }
        (task, bell, given.take().unwrap())
    }

    fn woken(task: &Task) -> usize {
        task.0.swap(0, Ordering::Relaxed)
    }

    #[test]
    fn whoever_has_something_for_a_connection_wakes_it() {
        let (task, bell, waker) = connection();
        waker.wake_by_ref();
        assert_eq!(woken(&task), 1);
        bell.ring();
        waker.wake();
        assert_eq!(woken(&task), 2);
    }

    #[test]
    fn a_bell_that_is_held_does_not_ring_but_it_is_known_whether_it_would_have() {
        let (task, _, waker) = connection();
        assert_eq!(hold(|| 7), (7, false));
        assert_eq!(hold(|| waker.wake_by_ref()), ((), true));
        assert_eq!(woken(&task), 0);
        assert_eq!(hold(|| ()), ((), false), "that was another time");
        waker.wake_by_ref();
        assert_eq!(woken(&task), 1);
    }

    #[test]
    fn what_others_ring_meanwhile_is_heard() {
        let (task, _, waker) = connection();
        let elsewhere = || std::thread::spawn(move || waker.wake()).join().unwrap();
        assert_eq!(hold(elsewhere), ((), false));
        assert_eq!(woken(&task), 1);
    }

    #[test]
    fn a_panic_lets_go() {
        let (task, _, waker) = connection();
        catch_unwind(AssertUnwindSafe(|| hold(|| panic!("on purpose")))).unwrap_err();
        waker.wake();
        assert_eq!(woken(&task), 1);
    }
}
