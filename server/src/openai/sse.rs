//! Streams: `data: {json}\n\n` for every chunk, with an event's name before it where the API has names.

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

/// One chunk of a stream, already serialised.
#[derive(Debug)]
pub struct Chunk(sse::Event);

impl Chunk {
    /// JSON of one of our own types.
    pub fn data(value: &impl Serialize) -> Self {
        Self(sse::Event::default().data(json(value)))
    }

    /// The same, with the event's name before it.
    pub fn named(name: &'static str, value: &impl Serialize) -> Self {
        Self(sse::Event::default().event(name).data(json(value)))
    }

    /// What ends a stream of completions.
    pub fn done() -> Self {
        Self(sse::Event::default().data("[DONE]"))
    }
}

fn json(value: &impl Serialize) -> String {
    // can't fail: the types have string keys and no fallible Serialize
    serde_json::to_string(value).unwrap_or_default()
}

/// Makes an endpoint's chunks from a generation's events.
pub trait ChunkWriter: Send + 'static {
    /// What comes before any token.
    fn begin(&mut self, generation: &Generation) -> Vec<Chunk>;

    /// What an event adds.
    fn write(&mut self, generation: &Generation, event: Event) -> Vec<Chunk>;

    /// What comes after the last token. The last chunk says that the answer is done.
    fn end(&mut self, generation: &Generation) -> Vec<Chunk>;

    /// An error inside a stream is the stream's last event: nothing says that the answer is done.
    fn fail(&mut self, error: &ApiError) -> Vec<Chunk> {
        vec![Chunk::data(&error.body())]
    }

    /// What is sent while there is nothing to say.
    fn keep_alive(&self) -> sse::Event {
        sse::Event::default().comment("keep-alive")
    }
}

type Sender = mpsc::Sender<Result<sse::Event, Infallible>>;

/// Answers with a stream. The client's leaving ends the generation.
pub fn respond(generation: Generation, writer: impl ChunkWriter) -> Response {
    let (sender, receiver) = mpsc::channel(BUFFERED_CHUNKS);
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).event(writer.keep_alive());
    let drive = async move {
        // an error of `send` is the client having left
        let _ = drive(generation, writer, &sender).await;
    };
    tokio::spawn(drive.in_current_span());
    Sse::new(ReceiverStream::new(receiver)).keep_alive(keep_alive).into_response()
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
            Some(Event::Failed(error)) => {
                tracing::warn!(status = error.status().as_u16(), error = %error.to_json(), "stream failed");
                for chunk in writer.fail(&error) {
                    send(sender, chunk).await?;
                }
                return Ok(());
            }
            Some(event) => {
                for chunk in writer.write(&generation, event) {
                    send_in_time(&mut generation, sender, chunk).await?;
                }
            }
        }
    }
    let mut chunks = writer.end(&generation);
    let last = chunks.pop();
    for chunk in chunks {
        send_in_time(&mut generation, sender, chunk).await?;
    }
    // its end is counted before the client can read of it
    drop(generation);
    match last {
        Some(chunk) => send(sender, chunk).await,
        None => Ok(()),
    }
}

/// A client that doesn't read holds a request no longer than its time; it would not read of that either.
async fn send_in_time(generation: &mut Generation, sender: &Sender, chunk: Chunk) -> Result<(), Left> {
    tokio::select! {
        biased;
        sent = send(sender, chunk) => sent,
        error = generation.out_of_time() => {
            tracing::warn!(error = %error.to_json(), "the client did not read its answer in time");
            Err(Left)
        }
    }
}

async fn send(sender: &Sender, chunk: Chunk) -> Result<(), Left> {
    sender.send(Ok(chunk.0)).await.map_err(|_| Left)
}
