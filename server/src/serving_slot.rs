//! The place where the served model stands: taken by each request at its admission, exchanged whole by a swap.

use crate::served::Served;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// Holds the current model, and remembers those that still have requests to finish.
#[derive(Debug, Default)]
pub struct ServingSlot {
    current: RwLock<Option<Arc<Served>>>,
    retired: Mutex<Vec<Weak<Served>>>,
}

impl ServingSlot {
    /// The model that new requests get; `None` until the first is loaded.
    pub fn current(&self) -> Option<Arc<Served>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another model in: requests admitted from now on get it. Those that hold the old one finish on it, and the last of them
    /// frees it.
    pub fn swap(&self, next: Served) {
        let next = Arc::new(next);
        let old = self.current.write().unwrap_or_else(PoisonError::into_inner).replace(next);
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.retain(|model| model.strong_count() > 0);
        retired.extend(old.as_ref().map(Arc::downgrade));
    }

    /// Models that were swapped out and still have requests to finish.
    pub fn draining(&self) -> Vec<Arc<Served>> {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.retain(|model| model.strong_count() > 0);
        retired.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether the current model's engine runs; `None` before there is one.
    pub fn alive(&self) -> Option<bool> {
        self.current().map(|served| served.engine.is_alive())
    }
}
