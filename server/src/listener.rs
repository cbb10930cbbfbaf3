//! Accepts connections and serves them until the server drains. What `axum::serve` does, with limits on how long a request's head may
//! take and a client may go without reading: otherwise anyone could hold connections by doing nothing.

use crate::config::ServeConfig;
use crate::shutdown::Shutdown;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_io_timeout::TimeoutStream;

/// After an accept that failed for want of file descriptors or memory.
const BREATHER: Duration = Duration::from_millis(200);

/// How long a connection may do nothing.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For a request's head to arrive, and so for a connection to be idle between two requests. More than the idle timeout of the usual
    /// proxies, which would else send a request into a connection that closes.
    head: Duration,
    /// For the client to take at least one byte of what waits for it.
    write: Duration,
}

impl Timeouts {
    /// As the server was told.
    pub fn new(config: &ServeConfig) -> Self {
        Self { head: Duration::from_secs(config.head_timeout), write: Duration::from_secs(config.write_timeout) }
    }
}

/// Serves `router` until the server drains, then waits for the connections that still have a request to finish.
pub async fn serve(listener: TcpListener, router: Router, shutdown: Shutdown, timeouts: Timeouts) {
    let connections = GracefulShutdown::new();
    let service = TowerToHyperService::new(router);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(timeouts.head);
    loop {
        let stream = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = shutdown.draining() => break,
        };
        // small chunks of a stream should leave at once; a connection that can't be told so still works
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(timeouts.write));
        let connection = connections.watch(builder.serve_connection(TokioIo::new(Box::pin(stream)), service.clone()));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                // mostly clients that left
                tracing::debug!(%error, "connection ended");
            }
        });
    }
    // whoever connects from now on is refused
    drop(listener);
    connections.shutdown().await;
}

/// A failed accept concerns one client, or passes.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused) => {}
            Err(error) => {
                tracing::error!(%error, "a connection can't be accepted");
                tokio::time::sleep(BREATHER).await;
            }
        }
    }
}
