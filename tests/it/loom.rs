//! The packed counter under every interleaving of two or three threads, and every value that the memory model lets them read.
//!
//! The ledger's own source is compiled here a second time, with model-checked atomics in place of the standard library's.

use std::sync::Arc;

use ::loom::model;
use ::loom::thread;
use export_gate::policy::PlanId;

use cell::Cell;
use count::Count;

#[path = "../../src/ledger/cell.rs"]
mod cell;
#[path = "../../src/ledger/count.rs"]
#[expect(unreachable_pub, reason = "in its own crate it is public")]
mod count;

mod atomic {
    pub(super) use ::loom::sync::atomic::{AtomicU64, Ordering};
}

const PLAN: PlanId = PlanId(0);

fn cell(used: u32, reserved: u32) -> Arc<Cell> {
    Arc::new(Cell::new(Count { used, reserved, plan: Some(PLAN) }))
}

/// Used and reserved.
fn count(cell: &Cell) -> (u32, u32) {
    let Count { used, reserved, .. } = cell.count();
    (used, reserved)
}

fn spawn<T: 'static>(cell: &Arc<Cell>, work: impl FnOnce(&Cell) -> T + 'static) -> thread::JoinHandle<T> {
    let cell = cell.clone();
    thread::spawn(move || work(&cell))
}

#[test]
fn of_two_that_reserve_the_last_unit_exactly_one_gets_it() {
    model(|| {
        let cell = cell(2, 0);
        let reserve = |cell: &Cell| cell.reserve(1, Some(3), PLAN).is_ok();
        let other = spawn(&cell, reserve);
        let won = [reserve(&cell), other.join().unwrap()];
        assert_eq!(won.iter().filter(|won| **won).count(), 1);
        assert_eq!(count(&cell), (2, 1));
    });
}

#[test]
fn of_two_costs_that_do_not_fit_together_exactly_one_is_admitted_and_the_other_is_told_why() {
    model(|| {
        let cell = cell(0, 0);
        let other = spawn(&cell, |cell| cell.reserve(2, Some(3), PLAN));
        let three = cell.reserve(3, Some(3), PLAN);
        match (other.join().unwrap(), three) {
            (Ok(after), Err(before)) => assert_eq!((after.reserved, before.reserved), (2, 2)),
            (Err(before), Ok(after)) => assert_eq!((before.reserved, after.reserved), (3, 3)),
            both => panic!("{both:?}"),
        }
    });
}

#[test]
fn what_a_backend_reports_on_top_is_neither_lost_nor_given_back_twice() {
    model(|| {
        let cell = cell(0, 1);
        let other = spawn(&cell, |cell| {
            assert!(cell.reserve_more(4));
            cell.settle(5, 5);
        });
        let admitted = cell.reserve(1, Some(10), PLAN).is_ok();
        other.join().unwrap();
        assert!(admitted);
        assert_eq!(count(&cell), (5, 1));
    });
}

#[test]
fn a_delivery_makes_no_room_while_it_settles() {
    model(|| {
        let cell = cell(0, 1);
        let settling = spawn(&cell, |cell| cell.settle(1, 1));
        assert!(cell.reserve(1, Some(1), PLAN).is_err());
        settling.join().unwrap();
        assert_eq!(count(&cell), (1, 0));
    });
}

#[test]
fn a_void_charge_makes_room_once() {
    model(|| {
        let cell = cell(0, 1);
        let settling = spawn(&cell, |cell| cell.settle(1, 0));
        let other = spawn(&cell, |cell| cell.reserve(1, Some(1), PLAN).is_ok());
        let won = [cell.reserve(1, Some(1), PLAN).is_ok(), other.join().unwrap()];
        settling.join().unwrap();
        let won = won.iter().filter(|won| **won).count();
        assert!(won <= 1);
        assert_eq!(count(&cell), (0, won as u32));
        assert_eq!(cell.reserve(1, Some(1), PLAN).is_ok(), won == 0, "what nobody took is still there");
    });
}

#[test]
fn two_that_settle_at_once_are_both_counted() {
    model(|| {
        let cell = cell(0, 3);
        let other = spawn(&cell, |cell| cell.settle(2, 1));
        cell.settle(1, 1);
        other.join().unwrap();
        assert_eq!(count(&cell), (2, 0));
    });
}

#[test]
fn a_reader_never_sees_more_than_the_limit() {
    model(|| {
        let cell = cell(0, 1);
        let settling = spawn(&cell, |cell| cell.settle(1, 1));
        let reserving = spawn(&cell, |cell| {
            if cell.reserve(1, Some(2), PLAN).is_ok() {
                cell.settle(1, 0);
            }
        });
        let (used, reserved) = count(&cell);
        assert!((1..=2).contains(&(used + reserved)), "{used} used and {reserved} reserved");
        settling.join().unwrap();
        reserving.join().unwrap();
        assert_eq!(count(&cell), (1, 0));
    });
}

#[test]
fn a_reader_sees_a_charge_that_settles_exactly_once_and_never_goes_back_in_time() {
    model(|| {
        let cell = cell(0, 1);
        let settling = spawn(&cell, |cell| cell.settle(1, 1));
        let (first, second) = (count(&cell), count(&cell));
        for seen in [first, second] {
            assert!(seen == (0, 1) || seen == (1, 0), "{seen:?}");
        }
        assert!(first.0 <= second.0);
        settling.join().unwrap();
        assert_eq!(count(&cell), (1, 0));
    });
}
