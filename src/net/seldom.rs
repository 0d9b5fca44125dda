//! What is waited for by a task that runs for other reasons most of the time.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use pin_project_lite::pin_project;

/// Polls something once, and again only after its waker was called: a timer or a socket would else register a waker at each poll, which
/// takes locks and counts. All must poll it through the same one of these: a poll past it registers another waker, and this one is never called.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    expected: Option<Expected>,
    /// Nothing was there when it was asked for last.
    waits: bool,
}

#[derive(Debug)]
struct Expected {
    call: Arc<Call>,
    /// Makes it.
    waker: Waker,
}

#[derive(Debug)]
struct Call {
    has_come: AtomicBool,
    task: Waker,
}

impl Expected {
    fn by(task: &Waker) -> Self {
        let call = Arc::new(Call { has_come: AtomicBool::new(false), task: task.clone() });
        Self { waker: call.clone().into(), call }
    }
}

impl Wake for Call {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Before the task is woken: whoever wakes a task, as all do, also if it is about to run anyway, shows it what happened before.
        self.has_come.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

impl Calls {
    /// Polls, if there is anything new to be expected of it: at first, whenever it was ready before, and when it has called. It may have
    /// called for what was found since: then it is polled for nothing.
    pub(crate) fn poll<T>(&mut self, cx: &Context<'_>, poll: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let expected = match &mut self.expected {
            Some(expected) if expected.call.task.will_wake(cx.waker()) => {
                if self.waits {
                    if !expected.call.has_come.load(Ordering::Relaxed) {
                        return Poll::Pending;
                    }
                    // This may clear two calls at once: the poll below sees what either was about.
                    expected.call.has_come.swap(false, Ordering::Acquire);
                }
                expected
            }
            // It learns whom to wake now.
            expected => expected.insert(Expected::by(cx.waker())),
        };
        let polled = poll(&mut Context::from_waker(&expected.waker));
        self.waits = polled.is_pending();
        polled
    }
}

pin_project! {
    /// A future that is polled once in each task, and then only when it has asked for it.
    #[derive(Debug)]
    pub(crate) struct Seldom<F> {
        #[pin]
        future: F,
        calls: Calls,
    }
}

impl<F> Seldom<F> {
    pub(crate) fn new(future: F) -> Self {
        Self { future, calls: Calls::default() }
    }
}

impl<F: Future> Future for Seldom<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        this.calls.poll(cx, |cx| this.future.poll(cx))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
pub(super) mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// Counts how often it was woken.
    #[derive(Default)]
    pub(in super::super) struct Task(AtomicUsize);

    impl Task {
        /// How often since it was asked last.
        pub(in super::super) fn woken(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(in super::super) fn task() -> (Arc<Task>, Waker) {
        let task = Arc::<Task>::default();
        (task.clone(), task.into())
    }

    /// Tells of each poll, by whom to wake; ends with the third.
    fn told(to: Sender<Waker>) -> impl Future<Output = ()> {
        let mut polls = 0;
        poll_fn(move |cx| {
            to.send(cx.waker().clone()).unwrap();
            polls += 1;
            if polls == 3 { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    #[test]
    fn it_is_polled_when_it_asks_for_it_and_not_before() {
        let (to, polls) = channel();
        let mut seldom = pin!(Seldom::new(told(to)));
        let (task, waker) = task();
        let mut cx = Context::from_waker(&waker);

        assert!(seldom.as_mut().poll(&mut cx).is_pending());
        let call = polls.try_recv().unwrap();
        for _ in 0..3 {
            assert!(seldom.as_mut().poll(&mut cx).is_pending());
            assert!(polls.try_recv().is_err(), "nobody has asked for it");
        }
        call.wake_by_ref();
        call.wake();
        assert_eq!(task.woken(), 2, "its task hears of it");
        assert!(seldom.as_mut().poll(&mut cx).is_pending());
        let call = polls.try_recv().unwrap();
        assert!(seldom.as_mut().poll(&mut cx).is_pending());
        assert!(polls.try_recv().is_err(), "once");
        call.wake();
        assert!(seldom.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn in_another_task_it_learns_whom_to_wake() {
        let (to, polls) = channel();
        let mut seldom = pin!(Seldom::new(told(to)));
        let ((before, first), (now, second)) = (task(), task());
        assert!(seldom.as_mut().poll(&mut Context::from_waker(&first)).is_pending());
        assert!(seldom.as_mut().poll(&mut Context::from_waker(&second)).is_pending());
        polls.try_iter().last().unwrap().wake();
        assert_eq!((before.woken(), now.woken()), (0, 1));
        assert!(seldom.as_mut().poll(&mut Context::from_waker(&second)).is_ready());
    }

    #[test]
    fn a_call_amid_its_own_poll_is_heard() {
        let mut polls = 0;
        let mut seldom = pin!(Seldom::new(poll_fn(|cx| {
            polls += 1;
            cx.waker().wake_by_ref();
            if polls == 3 { Poll::Ready(()) } else { Poll::Pending }
        })));
        let (_, waker) = task();
        let mut cx = Context::from_waker(&waker);
        assert!(seldom.as_mut().poll(&mut cx).is_pending());
        assert!(seldom.as_mut().poll(&mut cx).is_pending());
        assert!(seldom.as_mut().poll(&mut cx).is_ready());
    }

    #[test]
    fn what_was_ready_is_asked_again_without_a_call() {
        let (mut calls, mut asked) = (Calls::default(), 0);
        let (_, waker) = task();
        let cx = Context::from_waker(&waker);
        let mut bell = None;
        let mut ask = |answer: Poll<u8>| {
            let polled = calls.poll(&cx, |cx| {
                asked += 1;
                bell = Some(cx.waker().clone());
                answer
            });
            (polled, asked, bell.clone().unwrap())
        };
        assert_eq!(ask(Poll::Ready(1)).0, Poll::Ready(1));
        assert_eq!(ask(Poll::Ready(2)).0, Poll::Ready(2));
        assert!(ask(Poll::Pending).0.is_pending());
        let (polled, asked, bell) = ask(Poll::Ready(4));
        assert_eq!((polled, asked), (Poll::Pending, 3), "nobody has called");
        bell.wake();
        assert_eq!(ask(Poll::Ready(5)).0, Poll::Ready(5));
        assert_eq!(ask(Poll::Pending).1, 5);
        assert_eq!(ask(Poll::Pending).1, 5);
    }
}
