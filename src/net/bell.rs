//! A connection's task is not woken for nothing.
//!
//! Whoever takes a piece of an answer makes room for the next one, and hyper wakes the connection's task to fill it: also after the last
//! piece, when there is nothing left to be done. Each answer has a last piece, most have no other.
//!
//! That there is nothing left to be done is so because hyper reads an answer whose length it knows to its end before it hands the last piece
//! over, and is then ready for the next request. Were it not, a connection would not be used again.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};

/// What a connection is woken by.
#[derive(Debug, Default)]
pub(super) struct Bell(OnceLock<Waker>);

thread_local! {
    /// The bell that is held on this thread, and whether it would have rung.
    static HELD: Cell<(*const Bell, bool)> = const { Cell::new((std::ptr::null(), false)) };
}

impl Bell {
    pub(super) fn ring(&self) {
        if let Some(task) = self.0.get() {
            task.wake_by_ref();
        }
    }

    /// Does something that may ring the bell, and holds it meanwhile; what others ring it for, on other threads, is heard. Whether it would
    /// have rung: if that was not for nothing, it is to be rung.
    pub(super) fn hold<T>(&self, act: impl FnOnce() -> T) -> (T, bool) {
        /// Also if it panics.
        struct Release;
        impl Drop for Release {
            fn drop(&mut self) {
                HELD.set((std::ptr::null(), false));
            }
        }
        let _release = Release;
        HELD.set((self, false));
        let done = act();
        (done, HELD.get().1)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let this = Arc::as_ptr(self);
        if HELD.get().0 == this {
            HELD.set((this, true));
        } else {
            self.ring();
        }
    }
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

    use super::super::seldom::tests::{Task, task};
    use super::*;

    /// A connection that waits, its task, the bell, and the waker that it was given.
    fn connection() -> (Arc<Task>, Arc<Bell>, Waker) {
        let (task, of_task) = task();
        let given = Cell::new(None);
        let (connection, bell) = Belled::new(Box::pin(poll_fn(|cx| {
            given.set(Some(cx.waker().clone()));
            Poll::<()>::Pending
        })));
        let mut connection = pin!(connection);
        for _ in 0..2 {
            assert!(connection.as_mut().poll(&mut Context::from_waker(&of_task)).is_pending());
        }
        (task, bell, given.take().unwrap())
    }

    #[test]
    fn whoever_has_something_for_a_connection_wakes_it() {
        let (task, bell, waker) = connection();
        waker.wake_by_ref();
        assert_eq!(task.woken(), 1);
        bell.ring();
        waker.wake();
        assert_eq!(task.woken(), 2);
    }

    #[test]
    fn a_bell_that_is_held_does_not_ring_but_it_is_known_whether_it_would_have() {
        let (task, bell, waker) = connection();
        assert_eq!(bell.hold(|| 7), (7, false));
        assert_eq!(bell.hold(|| waker.wake_by_ref()), ((), true));
        assert_eq!(task.woken(), 0);
        assert_eq!(bell.hold(|| ()), ((), false), "that was another time");
        waker.wake_by_ref();
        assert_eq!(task.woken(), 1);
    }

    #[test]
    fn what_others_ring_meanwhile_is_heard_and_so_are_other_bells() {
        let (task, bell, waker) = connection();
        let elsewhere = || std::thread::spawn(move || waker.wake()).join().unwrap();
        assert_eq!(bell.hold(elsewhere), ((), false));
        assert_eq!(task.woken(), 1);
        let (other, _, waker) = connection();
        assert_eq!(bell.hold(|| waker.wake()), ((), false));
        assert_eq!(other.woken(), 1);
    }

    #[test]
    fn a_panic_lets_go() {
        let (task, bell, waker) = connection();
        catch_unwind(AssertUnwindSafe(|| bell.hold(|| panic!("on purpose")))).unwrap_err();
        waker.wake();
        assert_eq!(task.woken(), 1);
    }
}
