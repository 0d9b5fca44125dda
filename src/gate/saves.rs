//! Saves on their way: what the metadata service said of the design may be a thing of the past.

use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};

use super::layer::Gate;
use crate::design::Saved;
use crate::policy::{Action, Found};

/// A save, until its answer is there. If none comes (the client has hung up), the backend may have saved all the same.
pub(super) struct Save {
    gate: Arc<Gate>,
    design: Arc<str>,
    saved: Saved,
}

impl Save {
    /// `None` if the request saves nothing, or does not say what.
    pub(super) fn of<B>(gate: &Arc<Gate>, found: &Found, request: &Request<B>) -> Option<Self> {
        // A CORS preflight only asks.
        let saves = found.route.action == Action::SaveDesign && *request.method() != Method::OPTIONS;
        let design = found.design.clone().filter(|_| saves)?;
        gate.parts.designs.save_begins(&design);
        Some(Self { gate: gate.clone(), design, saved: Saved::Maybe })
    }

    /// Before the client sees it.
    pub(super) fn answered<R>(mut self, answer: &Response<R>) {
        let status = answer.status();
        self.saved = match status {
            status if status.is_success() => Saved::Yes,
            StatusCode::NOT_MODIFIED => Saved::No,
            status if status.is_client_error() && !is_of_a_lost_client(status) => Saved::No,
            // Some send whoever has saved elsewhere; and a proxy behind may have lost its patience.
            _ => Saved::Maybe,
        };
    }
}

/// By 408 and 499 proxies say that they have lost the client, whatever has become of its request.
const fn is_of_a_lost_client(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 499)
}

impl Drop for Save {
    fn drop(&mut self) {
        self.gate.parts.designs.save_ends(&self.design, self.saved);
    }
}
