//! `model@auto`: the cluster of the calibration text that a prompt is most like chooses the form.

use crate::app::App;
use crate::openai::errors::ApiError;
use crate::served::Served;
use anyhow::{Context, Result, bail};
use evop_model::device::{bind_thread, not_recording};
use evop_model::{Config, Decoder, Pattern, Tokenizer};
use evop_pruning::HiddenStates;
use evop_pruning::clusters::Clusters;
use evop_pruning::compensate::SkipCompensation;
use evop_pruning::run::CLUSTERS;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinError;

/// What stands after the `@` of a name whose form the prompt chooses.
pub const AUTO: &str = "auto";

/// When it is worth another try after too many prompts waited for their votes: a vote takes far less.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What a run's directory says about the vote, before there are weights.
#[derive(Debug)]
pub struct Voters {
    clusters: Clusters,
    /// The first of its forms, as the engine numbers them.
    first: usize,
    /// Each cluster's form, likewise, in the order of `clusters.patterns`.
    members: Vec<usize>,
    /// Prompts that may wait.
    most: usize,
}

impl Voters {
    /// Reads a run's directory, and the forms that its clusters make, in the engine's order from `first` on: `c0`, `c1`, … by the first cluster of
    /// each distinct pattern. `most` prompts may wait for their votes.
    ///
    /// # Errors
    /// A directory that is none of `evop prune --per-cluster`, is damaged, was made with another embedder, or doesn't fit the model.
    pub fn read(directory: &Path, model: &Config, first: usize, most: usize) -> Result<(Self, Vec<(String, Pattern)>)> {
        let clusters = Clusters::read(directory)?;
        let run = &clusters.run;
        if let Some(embedder) = &run.options.embedder {
            bail!(
                "the run's clusters are by {} (--embedder), which a server doesn't load: search patterns by the model's own hidden states (evop prune --per-cluster without --embedder)",
                embedder.display()
            );
        }
        let own = HiddenStates::name_over(model);
        if clusters.embedder != own {
            bail!("the run's chunks and this model's prompts can't be compared: the chunks' vectors are {}, the prompts' would be {own}", clusters.embedder);
        }
        if clusters.vector_size() != model.hidden_size {
            bail!("the run was of another model: expected vectors of this one's {} numbers, found {}", model.hidden_size, clusters.vector_size());
        }
        let mut forms: Vec<(String, Pattern)> = Vec::new();
        let mut members = Vec::with_capacity(clusters.patterns.len());
        for found in &clusters.patterns {
            let pattern = Pattern::new(found.pattern.clone(), model).with_context(|| format!("{CLUSTERS}, c{}", found.cluster))?;
            let form = forms.iter().position(|(_, other)| *other == pattern).unwrap_or(forms.len());
            if form == forms.len() {
                forms.push((format!("c{}", found.cluster), pattern));
            }
            members.push(first + form);
        }
        if run.options.levels.skips != Some(SkipCompensation::None) && model.pre_norm {
            tracing::warn!(
                run = %directory.display(),
                "the run made up for skipped sub-blocks, and the weights that are served don't: its patterns may lose more than it says (evop prune --preset elastic)"
            );
        }
        tracing::info!(run = %directory.display(), model = run.model, chunks = clusters.chunks(), clusters = members.len(), forms = forms.len(), "prompts choose forms");
        Ok((Self { clusters, first, members, most }, forms))
    }
}

/// The vote of `--auto`.
#[derive(Debug)]
pub struct Auto {
    /// The whole model: prompts are embedded as the run embedded its chunks.
    decoder: Decoder,
    voters: Voters,
    turns: Turns,
}

impl Auto {
    /// By prompts of this model.
    pub fn new(voters: Voters, decoder: Decoder) -> Self {
        Self { turns: Turns::new(voters.most), voters, decoder }
    }

    /// The first of the forms that it chooses among, as the engine numbers them. They are the last ones.
    pub fn first(&self) -> usize {
        self.voters.first
    }

    /// The form for a prompt of these tokens, special ones left out. Blocks for as long as a half pass over its beginning takes.
    fn choose(&self, tokenizer: &Tokenizer, prompt: Vec<u32>) -> evop_pruning::Result<usize> {
        let _not_recording = not_recording();
        let vectors = HiddenStates::new(&self.decoder, tokenizer).vectors(&[prompt], &mut |_| ())?;
        let pattern = vectors.first().map_or(0, |vector| self.voters.clusters.vote(vector));
        Ok(self.voters.members[pattern])
    }
}

impl Drop for Auto {
    fn drop(&mut self) {
        // the weights may go with this
        bind_thread(self.decoder.device());
    }
}

/// The form that a prompt's cluster chooses, as the engine numbers them. The prompt came in the field `param` of a request that arrived at `arrived`.
///
/// # Errors
/// 400 for a token beyond the vocabulary, 429 when too many prompts wait, 503 when the server's patience ends before the vote, 504 when the request's time does.
pub async fn vote(app: &App, served: &Arc<Served>, auto: &Arc<Auto>, prompt: &[u32], param: &'static str, arrived: Instant) -> Result<usize, ApiError> {
    let plain: Vec<u32> = prompt.iter().copied().filter(|id| !served.is_special(*id)).collect();
    let (own, tokenizer) = (Arc::clone(auto), Arc::clone(&served.tokenizer));
    let limit = app.config.request_timeout();
    let deadline = limit.map(|limit| arrived + limit);
    match auto.turns.run(move || own.choose(&tokenizer, plain), deadline, app.shutdown.stopping()).await {
        Ok(Ok(member)) => Ok(member),
        Ok(Err(evop_pruning::Error::Model(evop_model::Error::Input(message)))) => Err(ApiError::invalid(param, format!("{param}: {message}"))),
        Ok(Err(error)) => Err(ApiError::internal(error.to_string())),
        Err(Missed::Full) => {
            app.metrics.rejected("queue_full");
            Err(ApiError::queue_full(RETRY_AFTER))
        }
        Err(Missed::Time) => Err(ApiError::timeout(limit.unwrap_or_default())),
        Err(Missed::Stopping) => Err(ApiError::unavailable("the server is shutting down")),
        Err(Missed::Panicked(error)) => Err(ApiError::internal(error.to_string())),
    }
}

/// Work off the asynchronous threads, one piece at a time: an embedding pass takes all cores, or the GPU.
#[derive(Debug)]
struct Turns {
    /// For work that waits or is done.
    places: Semaphore,
    turn: Arc<Semaphore>,
}

/// Why a piece of work has no result.
#[derive(Debug)]
enum Missed {
    Full,
    Time,
    Stopping,
    Panicked(JoinError),
}

impl Turns {
    fn new(places: usize) -> Self {
        Self { places: Semaphore::new(places), turn: Arc::new(Semaphore::new(1)) }
    }

    /// The result of `work`, unless all places are taken, `deadline` comes, or `stopping` ends.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
        deadline: Option<Instant>,
        stopping: impl Future<Output = ()>,
    ) -> Result<T, Missed> {
        let _place = self.places.try_acquire().map_err(|_| Missed::Full)?;
        let done = async {
            let turn = Arc::clone(&self.turn).acquire_owned().await;
            let task = tokio::task::spawn_blocking(move || {
                // held to the end of the work, even if nobody waits for it any more
                let _turn = turn;
                work()
            });
            task.await.map_err(Missed::Panicked)
        };
        let out_of_time = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = done => result,
            () = out_of_time => Err(Missed::Time),
            () = stopping => Err(Missed::Stopping),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use std::sync::mpsc;

    #[tokio::test]
    async fn work_takes_turns_and_what_finds_no_place_or_no_time_is_told_so() {
        let turns = Arc::new(Turns::new(2));
        let (release, held) = mpsc::channel::<()>();
        let (begun, mut has_begun) = tokio::sync::mpsc::unbounded_channel();
        let work = move || {
            begun.send(()).unwrap();
            held.recv().unwrap();
            1
        };
        let first = tokio::spawn({
            let turns = Arc::clone(&turns);
            async move { turns.run(work, None, pending()).await }
        });
        has_begun.recv().await.unwrap();
        // one place is left, whose turn doesn't come
        let soon = Some(Instant::now() + Duration::from_millis(20));
        assert!(matches!(turns.run(|| 2, soon, pending()).await, Err(Missed::Time)));
        assert!(matches!(turns.run(|| 2, None, ready(())).await, Err(Missed::Stopping)));
        let mut second = Box::pin(turns.run(|| 3, None, pending()));
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut second).await.is_err());
        assert!(matches!(turns.run(|| 2, None, pending()).await, Err(Missed::Full)));
        release.send(()).unwrap();
        assert_eq!((first.await.unwrap().unwrap(), second.await.unwrap()), (1, 3));
        // a place that nobody waits in any more is free
        assert_eq!(turns.run(|| 4, None, pending()).await.unwrap(), 4);
        assert!(matches!(turns.run(|| panic!("broken"), None, pending()).await, Err::<(), _>(Missed::Panicked(_))));
        assert_eq!(turns.run(|| 5, None, pending()).await.unwrap(), 5);
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_keeps_its_turn() {
        let turns = Turns::new(2);
        let (release, held) = mpsc::channel::<()>();
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        assert!(matches!(turns.run(move || held.recv(), soon(), pending()).await, Err(Missed::Time)));
        assert!(matches!(turns.run(|| (), soon(), pending()).await, Err(Missed::Time)));
        release.send(()).unwrap();
        assert!(turns.run(|| (), None, pending()).await.is_ok());
    }
}
