//! The receiving end of one request.

use crate::output::{FinishReason, OutputKind, StepOutput, Usage};
use crate::sequence::SequenceGroup;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use tokio::sync::mpsc::UnboundedReceiver;

/// The outputs of one request, all choices mixed. Dropping it cancels the request at the next step.
///
/// Every choice ends with exactly one [`OutputKind::Finished`], also when the engine's thread ends first; then the stream ends.
#[derive(Debug)]
pub struct RequestStream {
    receiver: UnboundedReceiver<StepOutput>,
    group: Arc<SequenceGroup>,
    /// One entry a choice.
    progress: Vec<Progress>,
}

/// What has arrived of a choice.
#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    tokens: usize,
    finished: bool,
}

impl RequestStream {
    pub(crate) fn new(receiver: UnboundedReceiver<StepOutput>, group: Arc<SequenceGroup>) -> Self {
        Self { receiver, progress: vec![Progress::default(); group.n], group }
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
                let index = self.progress.iter().position(|p| !p.finished)?;
                let usage = Usage { prompt_tokens: self.group.prompt.len(), cached_tokens: 0, completion_tokens: self.progress[index].tokens };
                let reason = FinishReason::Error("the engine has stopped".into());
                StepOutput::now(index, OutputKind::Finished { reason, usage })
            }
        };
        let progress = &mut self.progress[output.index];
        match output.kind {
            OutputKind::PromptRead { .. } | OutputKind::PromptLogprobs(_) => {}
            OutputKind::Token { .. } => progress.tokens += 1,
            OutputKind::Finished { .. } => progress.finished = true,
        }
        Some(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Request;

    #[test]
    fn an_engine_that_is_gone_still_ends_every_choice_once() {
        let request = Request { prompt: vec![1, 2], n: 2, ..Request::default() };
        let (output, receiver) = tokio::sync::mpsc::unbounded_channel();
        let mut stream = RequestStream::new(receiver, Arc::new(SequenceGroup::new(request)));
        let finished = OutputKind::Finished { reason: FinishReason::Length, usage: Usage::default() };
        output.send(StepOutput::now(0, finished)).unwrap();
        output.send(StepOutput::now(1, OutputKind::Token { id: 3, logprobs: None, is_stop: false })).unwrap();
        drop(output);
        let outputs: Vec<StepOutput> = std::iter::from_fn(|| stream.blocking_next()).collect();
        assert_eq!(outputs.len(), 3);
        let OutputKind::Finished { reason: FinishReason::Error(_), usage, .. } = &outputs[2].kind else { panic!("{outputs:?}") };
        assert_eq!((outputs[2].index, *usage), (1, Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 1 }));
    }
}
