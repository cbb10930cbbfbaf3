//! Residual streams at sub-block boundaries, kept for the patterns that go through them next.

use evop_model::Tensor;
use std::collections::HashMap;

/// A cache bounded in bytes; what was used longest ago goes first.
pub(crate) struct PrefixCache {
    limit: usize,
    bytes: usize,
    clock: u64,
    states: HashMap<(usize, Vec<usize>), (Tensor, u64)>,
}

fn size(state: &Tensor) -> usize {
    state.elem_count() * state.dtype().size_in_bytes()
}

impl PrefixCache {
    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, clock: 0, states: HashMap::new() }
    }

    /// The state of a pack after the sub-blocks that `prefix` stands for.
    pub fn get(&mut self, pack: usize, prefix: &[usize]) -> Option<Tensor> {
        self.clock += 1;
        let clock = self.clock;
        self.states.get_mut(&(pack, prefix.to_vec())).map(|(state, used)| {
            *used = clock;
            state.clone()
        })
    }

    pub fn insert(&mut self, pack: usize, prefix: Vec<usize>, state: &Tensor) {
        if size(state) > self.limit {
            return;
        }
        self.clock += 1;
        if let Some((old, _)) = self.states.insert((pack, prefix), (state.clone(), self.clock)) {
            self.bytes -= size(&old);
        }
        self.bytes += size(state);
        while self.bytes > self.limit {
            let Some(oldest) = self.states.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone()) else { return };
            if let Some((gone, _)) = self.states.remove(&oldest) {
                self.bytes -= size(&gone);
            }
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn limit(&self) -> usize {
        self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evop_model::{DType, Device};

    #[test]
    fn what_was_used_longest_ago_goes_when_the_bound_is_reached() {
        let state = Tensor::zeros((2, 5), DType::F32, &Device::Cpu).unwrap(); // 40 bytes
        let mut cache = PrefixCache::new(100);
        cache.insert(0, vec![1], &state);
        cache.insert(0, vec![2], &state);
        assert!(cache.get(0, &[1]).is_some());
        cache.insert(1, vec![1], &state);
        assert!(cache.get(0, &[1]).is_some() && cache.get(0, &[2]).is_none() && cache.get(1, &[1]).is_some());
        assert_eq!(cache.bytes(), 80);
        let mut none = PrefixCache::new(0);
        none.insert(0, vec![1], &state);
        assert_eq!(none.bytes(), 0);
    }
}
