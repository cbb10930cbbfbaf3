//! GGUF files of the llama, qwen2 and qwen3 architectures, read as if they were Hugging Face checkpoints.

use crate::checkpoint::{Checkpoint, Parts, checked};
use crate::config::{Architecture, Config};
use crate::gguf_tokenizer;
use crate::rope::RopeScaling;
use crate::safetensors_source::Bytes;
use crate::source::{RawTensor, Source};
use crate::{Error, Positions, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Tensor};
use serde_json::{Map, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Opens a GGUF file: configuration, tokenizer and chat template from its metadata.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    let bytes = Bytes::map(path)?;
    let damaged = |message: String| Error::corrupt(path, format!("not a whole GGUF file ({} bytes): {message}", bytes.len()));
    // candle divides by the file's `general.alignment` unseen: a zero there would end the process
    let content = std::panic::catch_unwind(|| Content::read(&mut Cursor::new(&bytes[..])))
        .map_err(|_| damaged("its header can't be parsed".into()))?
        .map_err(|e| damaged(e.to_string()))?;
    for (name, info) in &content.tensor_infos {
        let elements = info.shape.dims().iter().try_fold(1usize, |product, n| product.checked_mul(*n));
        let size = elements.and_then(|n| (n / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()));
        let start = content.tensor_data_offset.checked_add(info.offset);
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size as u64));
        if end.is_none_or(|end| end > bytes.len() as u64) {
            return Err(damaged(format!("tensor `{name}` ends beyond the file; it may be cut short: download or copy it again")));
        }
    }
    let content = Arc::new(content);
    let metadata = Metadata { content: &content, path };
    let mut config = config(&metadata)?;
    let tokenizer = gguf_tokenizer::build(&metadata)?;
    let source = GgufSource::new(path, bytes, content.clone(), &config);
    if let (Some(name), Positions::Rope(rope)) = (content.tensor_infos.contains_key("rope_freqs.weight").then_some("rope_freqs.weight"), &mut config.positions)
    {
        let divisors = source.dequantized(name)?.to_vec1::<f32>()?;
        if divisors.len() != config.head_dim / 2 {
            return Err(Error::Tensor {
                path: path.into(),
                tensor: name.into(),
                expected: format!("{} numbers", config.head_dim / 2),
                found: format!("{}", divisors.len()),
            });
        }
        rope.scaling = Some(RopeScaling::Divisors(divisors));
    }
    let (config, source) = checked(config, Arc::new(source))?;
    let parts = Parts {
        path: path.to_path_buf(),
        config,
        source,
        tokenizer_files: gguf_tokenizer::files(&tokenizer, &metadata)?,
        tokenizer_config: Some(gguf_tokenizer::tokenizer_config(&metadata)?.to_string()),
        tokenizer,
        template_file: None,
        generation_config: Some(gguf_tokenizer::generation_config(&metadata)?.to_string()),
    };
    parts.assemble()
}

/// Typed access to a GGUF's key-value pairs, with errors that name the key.
pub(crate) struct Metadata<'a> {
    pub content: &'a Content,
    pub path: &'a Path,
}

impl Metadata<'_> {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub fn missing(&self, key: &str, expected: &str) -> Error {
        Error::config(self.path, format!("`{key}`: expected {expected}, found {:?}", self.get(key).map(short)))
    }

    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let n = match value {
            Value::U8(v) => u64::from(*v),
            Value::U16(v) => u64::from(*v),
            Value::U32(v) => u64::from(*v),
            Value::U64(v) => *v,
            Value::I32(v) if *v >= 0 => *v as u64,
            Value::I64(v) if *v >= 0 => *v as u64,
            _ => return Err(self.missing(key, "a whole number")),
        };
        Ok(Some(n))
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(v)) => Ok(Some(f64::from(*v))),
            Some(Value::F64(v)) => Ok(Some(*v)),
            Some(_) => Err(self.missing(key, "a number")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.missing(key, "a string")),
        }
    }

    pub fn list(&self, key: &str) -> Result<Option<&[Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.missing(key, "a list")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.missing(key, "true or false")),
        }
    }
}

fn short(value: &Value) -> String {
    let text = format!("{value:?}");
    text.chars().take(80).collect()
}

/// Puts the metadata into the form of a `config.json`.
fn config(metadata: &Metadata<'_>) -> Result<Config> {
    let name = metadata.text("general.architecture")?.ok_or_else(|| metadata.missing("general.architecture", "a string"))?;
    if !["llama", "qwen2", "qwen3"].contains(&name) {
        return Err(Error::config(
            metadata.path,
            format!("`general.architecture`: expected llama, qwen2 or qwen3; found {name:?}: this architecture is not supported"),
        ));
    }
    let key = |suffix: &str| format!("{name}.{suffix}");
    let required = |suffix: &str| metadata.unsigned(&key(suffix))?.ok_or_else(|| metadata.missing(&key(suffix), "a whole number"));
    let mut json = Map::new();
    let mut set = |field: &str, value: serde_json::Value| json.insert(field.to_string(), value);
    set("model_type", json!(name));
    set("hidden_size", json!(required("embedding_length")?));
    set("intermediate_size", json!(required("feed_forward_length")?));
    set("num_hidden_layers", json!(required("block_count")?));
    let heads = required("attention.head_count")?;
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(metadata.unsigned(&key("attention.head_count_kv"))?.unwrap_or(heads)));
    if let Some(head_dim) = metadata.unsigned(&key("attention.key_length"))? {
        set("head_dim", json!(head_dim));
    }
    set("max_position_embeddings", json!(required("context_length")?));
    let eps =
        metadata.float(&key("attention.layer_norm_rms_epsilon"))?.ok_or_else(|| metadata.missing(&key("attention.layer_norm_rms_epsilon"), "a number"))?;
    // stored as f32: the shortest decimal of that f32 is what the config said
    set("rms_norm_eps", json!(shortest(eps)));
    set("rope_theta", json!(metadata.float(&key("rope.freq_base"))?.map_or(10_000.0, shortest)));
    if let Some(kind) = metadata.text(&key("rope.scaling.type"))?.filter(|k| *k != "none") {
        let mut scaling = Map::new();
        scaling.insert("rope_type".into(), json!(kind));
        if let Some(factor) = metadata.float(&key("rope.scaling.factor"))? {
            scaling.insert("factor".into(), json!(shortest(factor)));
        }
        if let Some(original) = metadata.unsigned(&key("rope.scaling.original_context_length"))? {
            scaling.insert("original_max_position_embeddings".into(), json!(original));
        }
        set("rope_scaling", json!(scaling));
    }
    let vocab = metadata.list("tokenizer.ggml.tokens")?.map_or(0, <[Value]>::len);
    set("vocab_size", json!(metadata.content.tensor_infos.get("token_embd.weight").and_then(|t| t.shape.dims().first().copied()).unwrap_or(vocab)));
    set("tie_word_embeddings", json!(!metadata.content.tensor_infos.contains_key("output.weight")));
    set("hidden_act", json!("silu"));
    for (field, key) in [("bos_token_id", "tokenizer.ggml.bos_token_id"), ("eos_token_id", "tokenizer.ggml.eos_token_id")] {
        if let Some(id) = metadata.unsigned(key)? {
            set(field, json!(id));
        }
    }
    set(
        "architectures",
        json!([match name {
            "llama" => "LlamaForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            _ => "Qwen3ForCausalLM",
        }]),
    );
    set("torch_dtype", json!("float32"));
    Config::from_map(json, metadata.path)
}

fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

/// A GGUF's tensors under Hugging Face names, dequantised to f32, q and k rows put back into Hugging Face's order.
struct GgufSource {
    path: PathBuf,
    bytes: Bytes,
    content: Arc<Content>,
    /// Hugging Face name -> (GGUF name, heads to un-permute).
    names: BTreeMap<String, (String, Option<usize>)>,
}

impl std::fmt::Debug for GgufSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GgufSource({})", self.path.display())
    }
}

const LAYER_TENSORS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

impl GgufSource {
    fn new(path: &Path, bytes: Bytes, content: Arc<Content>, config: &Config) -> Self {
        let mut names = BTreeMap::new();
        for gguf in content.tensor_infos.keys() {
            if let Some((name, layer, part)) = hugging_face_name(gguf) {
                // llama.cpp interleaves the halves of every rotary head of the llama architecture only
                let heads = match (config.architecture, part) {
                    (Architecture::Llama, "attn_q") => Some(config.layers.get(layer).map_or(0, |l| l.shape.kv_groups * l.shape.group_size)),
                    (Architecture::Llama, "attn_k") => Some(config.layers.get(layer).map_or(0, |l| l.shape.kv_groups)),
                    _ => None,
                };
                names.insert(name, (gguf.clone(), heads.filter(|h| *h > 0)));
            }
        }
        Self { path: path.to_path_buf(), bytes, content, names }
    }

    fn dequantized(&self, gguf: &str) -> Result<Tensor> {
        let tensor = self.content.tensor(&mut Cursor::new(&self.bytes[..]), gguf, &Device::Cpu);
        let tensor = tensor.map_err(|e| Error::corrupt(&self.path, format!("tensor `{gguf}`: {e}")))?;
        Ok(tensor.dequantize(&Device::Cpu)?)
    }
}

fn hugging_face_name(gguf: &str) -> Option<(String, usize, &str)> {
    let plain = match gguf {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => "",
    };
    if !plain.is_empty() {
        return Some((plain.to_string(), 0, ""));
    }
    let mut parts = gguf.strip_prefix("blk.")?.split('.');
    let (layer, part, kind) = (parts.next()?.parse().ok()?, parts.next()?, parts.next()?);
    let (_, name) = LAYER_TENSORS.iter().find(|(g, _)| *g == part)?;
    Some((format!("model.layers.{layer}.{name}.{kind}"), layer, part))
}

impl Source for GgufSource {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let (gguf, _) = self.names.get(name)?;
        self.content.tensor_infos.get(gguf).map(|t| t.shape.dims().to_vec())
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let Some((gguf, heads)) = self.names.get(name) else {
            return Err(self.mismatch(name, "a tensor of that name", "nothing: it is missing from the file"));
        };
        let mut tensor = self.dequantized(gguf)?;
        if let Some(heads) = heads {
            let dims = tensor.dims().to_vec();
            let rows = dims[0] / heads / 2;
            let rest: usize = dims[1..].iter().product();
            tensor = tensor.reshape((*heads, rows, 2, rest))?.transpose(1, 2)?.contiguous()?.reshape(dims)?;
        }
        let shape = tensor.dims().to_vec();
        let bytes = tensor.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(RawTensor { dtype: DType::F32, shape, bytes: Cow::Owned(bytes) })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        let tensor = self.names.get(name).map_or_else(|| name.to_string(), |(gguf, _)| gguf.clone());
        Error::Tensor { path: self.path.clone(), tensor, expected: expected.into(), found: found.into() }
    }
}
