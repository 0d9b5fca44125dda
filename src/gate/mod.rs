//! The gate as a tower middleware: [`ExportGateLayer`] works around any `Service<Request<B>>`.
//!
//! [`service`](ExportGate) is the way of a request, top to bottom. A request that matches no route is handed on as it came. An
//! export is identified, looked up, charged, handed on, and settled by the [body](GateBody) of its answer: the charge travels in
//! it, and sticks with the first byte that is taken. A refused export never reaches the inner service; its [`Refusal`] is also in
//! the extensions of the answer. The inner service gets the request's body as an [`Upload`]: the same bytes, and the route that was
//! matched.

mod accept;
mod access;
mod answers;
mod asked;
mod body;
mod delivery;
mod fields;
mod framing;
mod future;
mod html;
mod layer;
mod leaks;
mod log;
mod metrics;
mod own;
mod pace;
mod record;
mod refusal;
mod reports;
mod request_id;
mod resume;
mod saves;
mod service;
mod trace_context;
mod upload;
mod when;
mod witness;

pub use answers::{Answers, Asker, Cors};
pub use body::GateBody;
pub use framing::Malformed;
pub use future::ResponseFuture;
pub use layer::{ExportGateLayer, Options, Parts, UnclassifiedFiles};
pub use log::{Access, HashKey, LogOptions, Subjects};
pub use own::OWN_PATH;
pub use pace::{Carrier, Pace, Paced};
pub use refusal::{Outcome, Refusal};
pub use request_id::REQUEST_ID;
pub use service::ExportGate;
pub use upload::Upload;
pub use witness::Witness;
