//! The admin API: prune jobs and the models that they make, on a listener of its own.

mod activation;
mod child;
mod handlers;
mod job;
mod job_store;
mod prune_options;
mod registry;

mod runner;

use crate::app::App;
use crate::data_dir::DataDir;
use crate::models::ModelSource;
use crate::openai::errors::ApiError;
use axum::Router;
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use job_store::JobStore;
pub use registry::BASE;
use registry::Registry;
use runner::{Runner, Surroundings};
use std::sync::{Arc, Mutex};

/// What the admin API holds.
#[derive(Debug)]
pub struct Admin {
    store: Arc<JobStore>,
    runner: Arc<Runner>,
    registry: Registry,
    activating: Mutex<()>,
    threads: usize,
}

impl Admin {
    /// Reads the data directory. Nothing runs until [`Self::start`].
    pub fn new(data: DataDir, source: ModelSource, revision: Option<String>, threads: usize) -> Self {
        let store = Arc::new(JobStore::open(data));
        let runner = Arc::new(Runner::new(Arc::clone(&store)));
        let registry = Registry::new(source, revision, Arc::clone(&store));
        Self { store, runner, registry, activating: Mutex::new(()), threads }
    }

    /// Begins to run jobs: those that were interrupted, those that wait, and those to come.
    ///
    /// # Errors
    /// There can't be a thread.
    pub fn start(app: &Arc<App>) -> std::io::Result<()> {
        app.admin.runner.start(Arc::clone(app))
    }

    /// Interrupts the running job and waits until it has saved its state. Blocks.
    pub fn stop(&self) {
        self.runner.stop();
    }

    /// The jobs as they are, also if another server runs them.
    fn jobs(&self) -> &JobStore {
        if self.runner.may_run().is_err() {
            self.store.refresh();
        }
        &self.store
    }

    /// The models.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Held by who puts a model into service, from its choice to the swap.
    pub fn activating(&self) -> &Mutex<()> {
        &self.activating
    }
}

impl Surroundings for App {
    fn model_arguments(&self, model: &str) -> Result<Vec<String>, String> {
        self.admin.registry.arguments(model)
    }

    fn device_arguments(&self) -> Vec<String> {
        // (a search changes weights: quantised ones can only be run)
        let dtype = self.config.dtype.weights().and_then(|w| w.plain().ok()).map_or("auto", |dtype| dtype.as_str());
        let arguments = ["--threads", &self.admin.threads.to_string(), "--device", &self.config.device.to_string(), "--dtype", dtype];
        arguments.map(str::to_string).to_vec()
    }

    fn activate(&self, id: &str) -> Result<(), String> {
        activation::activate(self, id).map_err(|e| e.to_string())
    }
}

/// The paths.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/admin/v1/prune", post(handlers::prune))
        .route("/admin/v1/jobs", get(handlers::jobs))
        .route("/admin/v1/jobs/{id}", get(handlers::job).delete(handlers::cancel))
        .route("/admin/v1/jobs/{id}/events", get(handlers::events))
        .route("/admin/v1/models", get(handlers::models))
        .route("/admin/v1/models/{id}/activate", post(handlers::activate))
        .route("/admin/v1/engine", get(handlers::engine))
}

/// Without a key, anyone on this machine may use the admin API, and that must not include web pages in its browsers.
pub async fn refuse_browsers(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        return ApiError::forbidden("the admin API has no key, so it does not answer browsers; set EVOP_ADMIN_KEY").into_response();
    }
    next.run(request).await
}
