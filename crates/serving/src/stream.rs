//! The receiving end of one request.

use crate::output::{FinishReason, OutputKind, StepOutput, Usage};
use crate::sequence::SequenceGroup;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;

/// The outputs of one request, all choices mixed. Dropping it cancels the request at the next step.
///
/// Every choice ends with exactly one [`OutputKind::Finished`], also when the engine's thread ends first; then the stream ends.
#[derive(Debug)]
pub struct RequestStream {
    receiver: UnboundedReceiver<StepOutput>,
    group: Arc<SequenceGroup>,
    finished: Vec<bool>,
}

impl RequestStream {
    pub(crate) fn new(receiver: UnboundedReceiver<StepOutput>, group: Arc<SequenceGroup>) -> Self {
        Self { receiver, finished: vec![false; group.n], group }
    }

    /// The next output, or `None` after every choice has finished.
    pub async fn next(&mut self) -> Option<StepOutput> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// [`Self::next`] for implementers of streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<StepOutput>> {
        self.receiver.poll_recv(context).map(|received| self.or_lost(received))
    }

    /// [`Self::next`] for threads outside an async runtime.
    pub fn blocking_next(&mut self) -> Option<StepOutput> {
        let received = self.receiver.blocking_recv();
        self.or_lost(received)
    }

    /// Ends one choice at the next step with [`FinishReason::Stop`]: its caller has found a stop string in its text.
    /// Tokens that were already on their way still arrive.
    pub fn stop_choice(&self, index: usize) {
        if let Some(flag) = self.group.stopped.get(index) {
            flag.store(true, Relaxed);
        }
    }

    /// Notes the ends; makes up those that an engine that is gone can't send any more.
    fn or_lost(&mut self, received: Option<StepOutput>) -> Option<StepOutput> {
        let output = match received {
            Some(output) => output,
            None => {
                let index = self.finished.iter().position(|f| !f)?;
                let usage = Usage { prompt_tokens: self.group.prompt.len(), ..Usage::default() };
                let reason = FinishReason::Error("the engine has stopped".into());
                StepOutput { index, kind: OutputKind::Finished { reason, usage, queued: Duration::ZERO } }
            }
        };
        if matches!(output.kind, OutputKind::Finished { .. }) {
            self.finished[output.index] = true;
        }
        Some(output)
    }
}
