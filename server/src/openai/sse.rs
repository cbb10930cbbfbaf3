//! Streams: `data: {json}\n\n` for every chunk, `data: [DONE]` at the end.

use crate::openai::errors::ApiError;
use crate::openai::generation::{Event, Generation};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

/// A comment that often, so that nobody between takes a slow stream for a dead one.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Chunks that may wait for a slow client before the generation's tokens wait with them.
const BUFFERED_CHUNKS: usize = 64;

/// Makes an endpoint's chunks from a generation's events, already serialised.
pub trait ChunkWriter: Send + 'static {
    /// What comes before any token.
    fn begin(&mut self, generation: &Generation) -> Vec<String>;

    /// What an event adds.
    fn write(&mut self, generation: &Generation, event: Event) -> Vec<String>;

    /// What comes after the last token.
    fn end(&mut self, generation: &Generation) -> Option<String>;
}

type Sender = mpsc::Sender<Result<sse::Event, Infallible>>;

/// Answers with a stream. The client's leaving ends the generation.
pub fn respond(generation: Generation, writer: impl ChunkWriter) -> Response {
    let (sender, receiver) = mpsc::channel(BUFFERED_CHUNKS);
    let drive = async move {
        // an error of `send` is the client having left
        let _ = drive(generation, writer, &sender).await;
    };
    tokio::spawn(drive.in_current_span());
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")).into_response()
}

/// The client has left.
struct Left;

async fn drive(mut generation: Generation, mut writer: impl ChunkWriter, sender: &Sender) -> Result<(), Left> {
    for chunk in writer.begin(&generation) {
        send_in_time(&mut generation, sender, chunk).await?;
    }
    loop {
        let event = tokio::select! {
            event = generation.next() => event,
            () = sender.closed() => return Err(Left),
        };
        match event {
            None => break,
            Some(Event::Failed(error)) => return fail(sender, &error).await,
            Some(event) => {
                for chunk in writer.write(&generation, event) {
                    send_in_time(&mut generation, sender, chunk).await?;
                }
            }
        }
    }
    if let Some(chunk) = writer.end(&generation) {
        send_in_time(&mut generation, sender, chunk).await?;
    }
    // its end is counted before the client can read of it
    drop(generation);
    send(sender, "[DONE]".into()).await
}

/// An error inside a stream is the stream's last event. There is no `[DONE]` after it: the answer is not done.
async fn fail(sender: &Sender, error: &ApiError) -> Result<(), Left> {
    tracing::warn!(status = error.status().as_u16(), error = %error.to_json(), "stream failed");
    send(sender, error.to_json().to_string()).await
}

/// A client that doesn't read holds a request no longer than its time; it would not read of that either.
async fn send_in_time(generation: &mut Generation, sender: &Sender, data: String) -> Result<(), Left> {
    tokio::select! {
        biased;
        sent = send(sender, data) => sent,
        error = generation.out_of_time() => {
            tracing::warn!(error = %error.to_json(), "the client did not read its answer in time");
            Err(Left)
        }
    }
}

async fn send(sender: &Sender, data: String) -> Result<(), Left> {
    sender.send(Ok(sse::Event::default().data(data))).await.map_err(|_| Left)
}

/// JSON of one of our own types.
pub fn json(chunk: &impl Serialize) -> String {
    // can't fail: the types have string keys and no fallible Serialize
    serde_json::to_string(chunk).unwrap_or_default()
}
