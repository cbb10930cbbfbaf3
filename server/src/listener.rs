//! Accepts connections and serves them until the server drains. What `axum::serve` does, with a limit on how long a request's head may
//! take: otherwise anyone could hold connections by sending nothing.

use crate::shutdown::Shutdown;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// For a request's head to arrive, and so for a connection to be idle between two requests. More than the idle timeout of the usual
/// proxies, which would else send a request into a connection that closes.
const HEAD_TIMEOUT: Duration = Duration::from_secs(90);
/// After an accept that failed for want of file descriptors or memory.
const BREATHER: Duration = Duration::from_millis(200);

/// Serves `router` until the server drains, then waits for the connections that still have a request to finish.
pub async fn serve(listener: TcpListener, router: Router, shutdown: Shutdown) {
    let connections = GracefulShutdown::new();
    let service = TowerToHyperService::new(router);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    loop {
        let stream = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = shutdown.draining() => break,
        };
        // small chunks of a stream should leave at once; a connection that can't be told so still works
        let _ = stream.set_nodelay(true);
        let connection = connections.watch(builder.serve_connection(TokioIo::new(stream), service.clone()));
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
