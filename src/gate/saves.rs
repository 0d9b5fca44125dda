//! Saves on their way: once one has succeeded, what the metadata service said of the design is a thing of the past.

use std::sync::Arc;

use http::{Method, Request, Response};

use super::layer::Gate;
use crate::policy::{Action, Found};

/// A save whose answer is to come. If none comes that tells (the client has hung up), the backend may have saved all the same.
pub(super) struct Save {
    gate: Arc<Gate>,
    /// Until the answer is there.
    design: Option<Arc<str>>,
}

impl Save {
    /// `None` if the request saves nothing, or does not say what.
    pub(super) fn of<B>(gate: &Arc<Gate>, found: &Found, request: &Request<B>) -> Option<Self> {
        // A CORS preflight only asks.
        let saves = found.route.action == Action::SaveDesign && *request.method() != Method::OPTIONS;
        let design = found.design.clone().filter(|_| saves)?;
        Some(Self { gate: gate.clone(), design: Some(design) })
    }

    /// Before the client sees that it has saved: what it exports next is the new design.
    pub(super) fn answered<R>(mut self, answer: &Response<R>) {
        // With a 5xx, e.g. of a proxy behind that lost its patience, nobody knows: that is what dropping says.
        if answer.status().is_server_error() {
            return;
        }
        if let Some(design) = self.design.take().filter(|_| answer.status().is_success()) {
            self.gate.parts.designs.forget(&design);
        }
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        if let Some(design) = self.design.take() {
            self.gate.parts.designs.doubt(&design);
        }
    }
}
