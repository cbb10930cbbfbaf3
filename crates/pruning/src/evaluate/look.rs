//! What some strategies look at beside losses: activations, and models whose weights they have changed.

use super::{Evaluator, Work};
use crate::Result;
use crate::prefix_cache::PrefixCache;
use crate::stream::Passage;
use crate::supernet::Supernet;
use evop_model::Pattern;
use std::collections::HashMap;

impl Evaluator<'_> {
    /// Runs a pattern over all sequences for strategies that look at activations: calls `visit` for every sub-block that it keeps, a pack at a time.
    ///
    /// # Errors
    /// As [`Evaluator::evaluate`], and whatever `visit` returns.
    pub(crate) fn visit(&mut self, pattern: &Pattern, mut visit: impl FnMut(usize, &Passage<'_>) -> Result<()>) -> Result<()> {
        let decoder = self.supernet.decoder();
        for pack in &self.packs {
            let batch = &pack.batch;
            let mut hidden = decoder.embed(&pack.tokens, batch)?;
            let mut forwards = 0;
            for s in 0..decoder.last_boundary() {
                let Some(block) = self.supernet.sub_block(s, self.supernet.level(pattern, s))? else {
                    hidden = self.supernet.skip(s, &hidden)?;
                    continue;
                };
                hidden = Passage::through(decoder, &block, s, &hidden, batch, |passage| visit(s, passage))?;
                forwards += batch.spans().len();
            }
            let work = Work { block_forwards: forwards, naive_block_forwards: forwards, memo_block_forwards: forwards, ..Work::default() };
            (self.record)(&[], work)?;
            self.work.add(work);
        }
        Ok(())
    }

    /// Runs `with` over another model of as many layers: on the same sequences, scored against the same dense reference. What it computes counts as
    /// this evaluator's work, but is neither remembered nor recorded as a pattern's loss, since it is another model's.
    ///
    /// # Errors
    /// Whatever `with` returns.
    pub fn over<T>(&mut self, other: &Supernet, with: impl FnOnce(&mut Evaluator<'_>) -> Result<T>) -> Result<T> {
        let mut evaluator = Evaluator {
            supernet: other,
            packs: std::mem::take(&mut self.packs),
            segments: std::mem::take(&mut self.segments),
            objective: self.objective,
            savings: self.savings,
            memo: HashMap::new(),
            anchors: Vec::new(),
            cache: PrefixCache::new(self.cache.limit()),
            work: Work::default(),
            record: Box::new(|_, _| Ok(())),
        };
        let result = with(&mut evaluator);
        let work = evaluator.work;
        (self.packs, self.segments) = (evaluator.packs, evaluator.segments);
        (self.record)(&[], work)?;
        self.work.add(work);
        result
    }
}
