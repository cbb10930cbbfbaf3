//! From a checkpoint to a running engine.

use crate::admin::BASE;
use crate::config::ServeConfig;
use crate::forms::{self, Asked, Forms};
use crate::memory;
use crate::served::Served;
use anyhow::{Context, Result, bail};
use evop_model::device::weight_type;
use evop_model::{Checkpoint, DType, Decoder, Device, WeightType, Widths, held_in_words};
use evop_serving::{ChatRenderer, Engine, EngineConfig, TokenText};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What a model would need, against what there is.
#[derive(Debug, Clone, Copy)]
pub struct MemoryNeed {
    /// Weights and key/value cache.
    pub needed_bytes: usize,
    /// Free at the moment, if the platform says.
    pub available_bytes: Option<usize>,
}

impl MemoryNeed {
    /// There is room, as far as one can tell.
    pub fn fits(&self) -> bool {
        self.available_bytes.is_none_or(|available| self.needed_bytes <= available)
    }
}

/// Who a loaded model is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// `base`, or a job's id.
    pub id: String,
    /// Path, hub id or bundled name.
    pub root: String,
    /// What it was pruned from.
    pub parent: Option<String>,
}

/// Memory that loading this checkpoint beside a running one takes. On a GPU only the host's part is known, and that is small.
///
/// # Errors
/// The device can't be had.
pub fn memory_need(checkpoint: &Checkpoint, config: &ServeConfig) -> Result<MemoryNeed> {
    let device = config.device.open()?;
    let weights = weight_type(&device, config.dtype.weights_to_serve(&device, checkpoint))?;
    if !device.is_cpu() {
        return Ok(MemoryNeed { needed_bytes: 0, available_bytes: None });
    }
    let model = checkpoint.config();
    let max_model_len = config.max_model_len.unwrap_or(model.max_position_embeddings);
    let cache = config.kv_memory.map_or(max_model_len * model.kv_bytes_per_token(config.kv_dtype.of(DType::F32).size_in_bytes()), |size| size.0);
    let held = weights.of_all(model, checkpoint.source().as_ref())?;
    let matrices: usize = held.values().map(|(_, bytes)| bytes).sum();
    Ok(MemoryNeed { needed_bytes: matrices + cache, available_bytes: memory::available_bytes() })
}

/// Loads the weights and starts the engine. Blocks for as long as that takes.
///
/// # Errors
/// What is wrong with the checkpoint, the device or the limits.
pub fn load(checkpoint: &Checkpoint, identity: Identity, config: &ServeConfig) -> Result<Served> {
    let start = Instant::now();
    let device = config.device.open()?;
    let weights = weight_type(&device, config.dtype.weights_to_serve(&device, checkpoint))?;
    // the forms are patterns of the start model: no other has their layers, widths and clusters
    let asked = if identity.id == BASE {
        Asked::read(config, checkpoint.config())?
    } else {
        let options = forms::options(config);
        if !options.is_empty() {
            tracing::warn!(model = identity.id, options = options.join(", "), "forms are of the start model: this one is served without any");
        }
        Asked::default()
    };
    let decoder = load_decoder(checkpoint, &device, weights, &asked.widths)?;
    let ordered = !asked.widths.is_empty();
    let model = decoder.config().clone();
    let mut engine_config = engine_config(&decoder, config)?;
    let Forms { model: elastic, forms, auto, speculation } = asked.over(decoder)?;
    engine_config.speculation = speculation;
    let mut eos_token_ids = model.eos_token_ids.clone();
    eos_token_ids.extend(&checkpoint.generation().eos_token_ids);
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let kv_element_bytes = engine_config.kv_dtype.size_in_bytes();
    let engine = Engine::start(elastic, eos_token_ids.clone(), engine_config)?;
    let chat = match checkpoint.chat_template() {
        Some(template) => ChatRenderer::new(template).map_err(|e| e.to_string()),
        None => Err("this model has no chat template: use /v1/completions".into()),
    };
    if let Err(message) = &chat {
        tracing::warn!(message, "chat completions are not available");
    }
    tracing::info!(
        model = identity.id, root = identity.root, parameters = model.parameters(), device = ?device.location(), weights = held_in_words(&weights.of_all(&model, checkpoint.source().as_ref())?),
        max_model_len = engine_config.max_model_len, kv_bytes = engine_config.kv_budget_bytes, kv_dtype = engine_config.kv_dtype.as_str(), seconds = start.elapsed().as_secs_f32(), "model loaded"
    );
    Ok(Served {
        id: identity.id,
        root: identity.root,
        parent: identity.parent,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        generation: checkpoint.generation().clone(),
        token_text: TokenText::of(checkpoint.tokenizer()),
        special_tokens: checkpoint.tokenizer().get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect(),
        tokenizer: Arc::new(checkpoint.tokenizer().clone()),
        thinks: thinks(checkpoint, &chat),
        eos_token_ids,
        grammars: OnceLock::new(),
        config: model,
        forms,
        auto: auto.map(Arc::new),
        chat,
        engine,
        ordered,
        weights: weights.as_str(),
        kv_element_bytes,
    })
}

/// Its template writes `<think>`, or its vocabulary has both ends of it.
fn thinks(checkpoint: &Checkpoint, chat: &Result<ChatRenderer, String>) -> bool {
    let known = |token| checkpoint.tokenizer().token_to_id(token).is_some();
    chat.as_ref().is_ok_and(|template| template.mentions("<think>")) || (known("<think>") && known("</think>"))
}

fn load_decoder(checkpoint: &Checkpoint, device: &Device, weights: WeightType, widths: &Widths) -> Result<Decoder> {
    if let Some(warning) = weights.warning(checkpoint.config(), checkpoint.source().as_ref())? {
        tracing::warn!("{warning}");
    }
    let ordered = widths.ordered(checkpoint.source().as_ref(), checkpoint.config());
    Decoder::load(checkpoint.config(), &ordered, device, weights).context("the weights can't be loaded")
}

/// The engine's own defaults, with what the server was told.
fn engine_config(decoder: &Decoder, config: &ServeConfig) -> Result<EngineConfig> {
    let default = EngineConfig::for_decoder(decoder);
    let longest = decoder.config().max_position_embeddings;
    let max_model_len = config.max_model_len.unwrap_or(longest);
    if max_model_len > longest {
        bail!("--max-model-len {max_model_len} is more than the {longest} tokens that the model was made for");
    }
    let kv_dtype = config.kv_dtype.of(decoder.dtype());
    let sequence = max_model_len * decoder.config().kv_bytes_per_token(kv_dtype.size_in_bytes());
    let kv_budget_bytes = match config.kv_memory {
        Some(size) => size.0,
        None => default_kv_bytes(sequence, config.max_concurrent, if decoder.device().is_cpu() { memory::available_bytes() } else { None }),
    };
    if kv_budget_bytes < sequence {
        tracing::warn!(kv_budget_bytes, sequence, "the memory for keys and values is less than one full context needs: long requests will be refused");
    }
    Ok(EngineConfig {
        max_concurrent: config.max_concurrent,
        max_queue: config.max_queue,
        max_batch_tokens: config.max_batch_tokens.unwrap_or(default.max_batch_tokens.max(config.max_concurrent)),
        decode_slowdown: config.decode_slowdown(),
        max_model_len,
        kv_budget_bytes,
        kv_dtype,
        speculation: None,
        cuda_graphs: !config.no_cuda_graphs,
    })
}

/// Room for every concurrent sequence at its longest, at most a quarter of what is free (4 GiB where that isn't known), at least one sequence.
fn default_kv_bytes(sequence: usize, concurrent: usize, available: Option<usize>) -> usize {
    let most = available.map_or(4 << 30, |bytes| bytes / 4);
    sequence.saturating_mul(concurrent).min(most).max(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_get_what_they_need_but_not_everything() {
        assert_eq!(default_kv_bytes(10, 4, Some(1000)), 40);
        assert_eq!(default_kv_bytes(10, 400, Some(1000)), 250);
        assert_eq!(default_kv_bytes(10, 400, Some(20)), 10);
    }
}
