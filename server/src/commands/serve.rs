//! `evop serve`: listens at once, loads the model, and serves until it is told to stop.

use crate::admin::Admin;
use crate::app::App;
use crate::auth::Keys;
use crate::config::ServeConfig;
use crate::data_dir::DataDir;
use crate::listener::Timeouts;
use crate::metrics::Metrics;
use crate::models::ModelSource;
use crate::shutdown::{Shutdown, on_signals};
use crate::{listener, load, logging, router};
use anyhow::{Context, Result, bail};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;

/// What is left of the process after its last answer: connections that don't close, a model that still loads.
const LAST_MOMENTS: Duration = Duration::from_secs(2);

/// Serves until a signal.
///
/// # Errors
/// Anything that keeps the server from serving.
pub fn run(config: ServeConfig, threads: usize) -> Result<()> {
    let traces = logging::init(&config.log, config.otlp_endpoint.as_deref())?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads.clamp(1, 4)).enable_all().build().context("the runtime can't be started")?;
    let result = runtime.block_on(serve(config, threads));
    runtime.shutdown_timeout(LAST_MOMENTS);
    if let Some(traces) = traces {
        traces.end();
    }
    result
}

async fn serve(config: ServeConfig, threads: usize) -> Result<()> {
    let source = ModelSource::parse(config.model.as_deref())?;
    let api_keys = Keys::read("API key", config.api_keys_file.as_deref(), &config.api_keys)?;
    let admin_keys = Keys::read("admin key", config.admin_key_file.as_deref(), config.admin_key.as_slice())?;
    let public = listen(&config.host, config.port).await?;
    let admin = admin_listener(&config.admin_addr, &admin_keys).await?;
    warn_if_open(&public, &api_keys)?;

    let names = if config.served_model_name.is_empty() { vec![source.name()] } else { config.served_model_name.clone() };
    let metrics = Metrics::new(names[0].clone()).context("the metrics can't be registered")?;
    let shutdown = Shutdown::new();
    on_signals(shutdown.clone(), Duration::from_secs(config.shutdown_timeout)).context("signals can't be listened to")?;
    let admin_state = Admin::new(DataDir::new(&config.data_dir()), source, config.revision.clone(), threads);
    let app = Arc::new(App::new(config, names, metrics, shutdown.clone(), api_keys, admin_state));

    announce("evop", &public)?;
    let timeouts = Timeouts::new(&app.config);
    let public = tokio::spawn(listener::serve(public, router::public(&app), shutdown.clone(), timeouts));
    let admin = match admin {
        Some(admin) => {
            announce("evop admin", &admin)?;
            tokio::spawn(listener::serve(admin, router::admin(&app, admin_keys), shutdown.clone(), timeouts))
        }
        None => tokio::spawn(std::future::ready(())),
    };
    let loading = tokio::task::spawn_blocking({
        let app = Arc::clone(&app);
        move || load_first(&app)
    });
    tokio::select! {
        loaded = loading => loaded.context("loading the model")??,
        () = shutdown.draining() => {}
    }
    Admin::start(&app).context("the thread for jobs can't be started")?;
    shutdown.draining().await;
    end(&app, [public, admin]).await
}

/// Loads the model that was current, or else the one that the server was started with; neither if one was activated before that could begin.
fn load_first(app: &App) -> Result<()> {
    let registry = app.admin.registry();
    let _one_at_a_time = app.admin.activating().lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(served) = app.slot.current() {
        tracing::info!(model = served.id, "a model was activated before the first one was loaded, and stays");
        return Ok(());
    }
    let id = registry.initial();
    let loaded = registry.open(&id).and_then(|(checkpoint, identity)| load::load(&checkpoint, identity, &app.config));
    let served = match loaded {
        Err(error) if id != crate::admin::BASE => {
            tracing::error!(model = id, error = format!("{error:#}"), "the model that was current can't be loaded: serving the base model");
            let (checkpoint, identity) = registry.open(crate::admin::BASE)?;
            load::load(&checkpoint, identity, &app.config)?
        }
        loaded => loaded?,
    };
    app.slot.swap(served);
    tracing::info!(names = ?app.names(), "ready");
    Ok(())
}

/// Running requests finish, or are ended when the patience is over; the running job saves its state meanwhile.
async fn end(app: &Arc<App>, servers: [tokio::task::JoinHandle<()>; 2]) -> Result<()> {
    let jobs = tokio::task::spawn_blocking({
        let app = Arc::clone(app);
        move || app.admin.stop()
    });
    let finished = async {
        for server in servers {
            server.await.context("a listener")?;
        }
        anyhow::Ok(())
    };
    let given_up = async {
        app.shutdown.stopping().await;
        // streams end by themselves now; a connection that doesn't read them is not waited for
        tokio::time::sleep(LAST_MOMENTS).await;
    };
    tokio::select! {
        finished = finished => finished?,
        () = given_up => {}
    }
    jobs.await.context("ending the running job")?;
    app.shutdown.stop();
    if let Some(served) = app.slot.current() {
        served.engine.stop();
    }
    tracing::info!("stopped");
    Ok(())
}

async fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    TcpListener::bind((bare, port)).await.with_context(|| format!("can't listen on {host}, port {port} (--host, --port)"))
}

/// The admin API may be open on loopback only.
async fn admin_listener(address: &str, keys: &Keys) -> Result<Option<TcpListener>> {
    if matches!(address, "off" | "none") {
        return Ok(None);
    }
    let listener = TcpListener::bind(address).await.with_context(|| format!("can't listen on {address} (--admin-addr; \"off\" for no admin API)"))?;
    if keys.is_open() && !listener.local_addr()?.ip().is_loopback() {
        bail!("--admin-addr {address} can be reached from other machines, so the admin API needs a key: set EVOP_ADMIN_KEY or --admin-key-file");
    }
    if keys.is_open() {
        tracing::warn!("the admin API has no key: everyone on this machine can use it (EVOP_ADMIN_KEY or --admin-key-file sets one)");
    }
    Ok(Some(listener))
}

fn warn_if_open(listener: &TcpListener, keys: &Keys) -> Result<()> {
    if keys.is_open() && !listener.local_addr()?.ip().is_loopback() {
        tracing::warn!("the API has no key and can be reached from other machines (EVOP_API_KEYS or --api-keys-file sets keys)");
    }
    Ok(())
}

/// One line on stdout, for people and for programs that started the server on a free port.
fn announce(what: &str, listener: &TcpListener) -> Result<()> {
    let address: SocketAddr = listener.local_addr()?;
    let message = format!("{what} listening on http://{address}");
    if std::io::stdout().is_terminal() {
        println!("{message}");
    } else {
        println!("{}", serde_json::json!({"message": message, "address": address.to_string()}));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        config: ServeConfig,
    }

    #[test]
    fn a_model_that_was_activated_before_the_first_was_loaded_stays() {
        let data = tempfile::tempdir().unwrap();
        let config = Arguments::try_parse_from(["serve", "--device", "cpu", "--kv-memory", "64MiB"]).unwrap().config;
        let keys = Keys::read("API key", None, &[]).unwrap();
        let admin = Admin::new(DataDir::new(data.path()), ModelSource::Bundled, None, 1);
        let app = App::new(config, vec!["tiny".into()], Metrics::new("tiny".into()).unwrap(), Shutdown::new(), keys, admin);
        load_first(&app).unwrap();
        let activated = app.slot.current().unwrap();
        load_first(&app).unwrap();
        assert!(Arc::ptr_eq(&activated, &app.slot.current().unwrap()));
        activated.engine.stop();
    }
}
