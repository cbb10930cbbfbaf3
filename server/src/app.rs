//! What all handlers share.

use crate::admin::Admin;
use crate::auth::Keys;
use crate::config::ServeConfig;
use crate::metrics::Metrics;
use crate::pressure::Pressure;
use crate::rate_limit::RateLimits;
use crate::served::{Served, Wanted};
use crate::serving_slot::ServingSlot;
use crate::shutdown::Shutdown;
use std::sync::Arc;
use std::time::Duration;

/// An engine whose loop has not gone round for so long is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// The server's state.
#[derive(Debug)]
pub struct App {
    /// As it was started.
    pub config: ServeConfig,
    /// What is served.
    pub slot: ServingSlot,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether it is ending.
    pub shutdown: Shutdown,
    /// Keys of the public API.
    pub api_keys: Arc<Keys>,
    /// What each of them may use.
    pub rate_limits: RateLimits,
    /// What `--elastic` follows.
    pub pressure: Option<Arc<Pressure>>,
    /// Jobs and models.
    pub admin: Admin,
    names: Vec<String>,
}

impl App {
    /// A server without a model yet. `names` has at least one.
    pub fn new(config: ServeConfig, names: Vec<String>, metrics: Metrics, shutdown: Shutdown, api_keys: Keys, admin: Admin) -> Self {
        let rate_limits = RateLimits::new(config.rate_limit, config.token_rate_limit);
        let pressure = config.elastic.map(|goal| Arc::new(Pressure::new(goal)));
        Self { rate_limits, pressure, config, slot: ServingSlot::default(), metrics, shutdown, api_keys: Arc::new(api_keys), admin, names }
    }

    /// The names that clients ask for; they always mean the model that is served.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether a request for `name` is one for the model that is served: by a served name, or by the id of what is served now.
    pub fn answers_to(&self, served: &Served, name: &str) -> bool {
        self.names.iter().any(|n| n == name) || served.id == name
    }

    /// The form of the served model that a name asks for: `NAME`, `NAME@FORM` or `NAME@auto`. `None` if it isn't served.
    pub fn asked(&self, served: &Served, name: &str) -> Option<Wanted> {
        if self.answers_to(served, name) {
            return served.asked(None);
        }
        let (model, form) = name.rsplit_once('@')?;
        if self.answers_to(served, model) { served.asked(Some(form)) } else { None }
    }

    /// Why the server is not ready to take requests.
    pub fn unready(&self) -> Option<&'static str> {
        if self.shutdown.is_draining() {
            return Some("the server is shutting down");
        }
        match self.slot.current() {
            None => Some("the model is still loading"),
            Some(served) if !served.engine.is_alive() => Some("the engine has stopped"),
            Some(served) if served.engine.stats().last_step.elapsed() > STUCK_AFTER => Some("the engine does not move"),
            Some(_) => None,
        }
    }
}
