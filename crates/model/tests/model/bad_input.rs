//! Damaged, incomplete and foreign files: each gives an error that names the file and what was expected; none ends the process.

use crate::fixtures::{Family, Model, Size};
use evop_model::{Checkpoint, DType, Device, Tensor};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}}"#;

fn model() -> Model {
    Model::random(Family::Llama, Size::SMALL, 31)
}

/// A whole checkpoint of `model`, to be damaged.
fn checkpoint(model: &Model) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    model.write(directory.path());
    fs::write(directory.path().join("tokenizer.json"), TOKENIZER).unwrap();
    directory
}

/// All that a server does before it computes.
fn load(path: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(path).map_err(|e| e.to_string())?;
    checkpoint.decoder(&Device::Cpu, DType::F32).map(drop).map_err(|e| e.to_string())
}

fn fails(path: &Path, expected: &[&str]) {
    let Err(error) = load(path) else { panic!("{} loaded, expected {expected:?}", path.display()) };
    for part in expected {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

fn gguf() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/gguf_llama_smollm/model.gguf")).unwrap()
}

fn write_gguf(directory: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = directory.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn whole_files_load() {
    load(checkpoint(&model()).path()).unwrap();
    load(&write_gguf(&tempfile::tempdir().unwrap(), &gguf())).unwrap();
}

#[test]
fn what_is_no_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    fails(&directory.path().join("nowhere"), &["nowhere", "No such file"]);
    fails(directory.path(), &["config.json", "No such file"]);
    let file = directory.path().join("weights.bin");
    fs::write(&file, "hello").unwrap();
    fails(&file, &["weights.bin", "expected a directory with config.json, or a .gguf file"]);
    fails(&write_gguf(&directory, b"hello, this is no GGUF at all"), &["model.gguf", "not a whole GGUF file"]);

    let directory = checkpoint(&model());
    fs::rename(directory.path().join("model.safetensors"), directory.path().join("pytorch_model.bin")).unwrap();
    fails(directory.path(), &[directory.path().to_str().unwrap(), "expected model.safetensors or model.safetensors.index.json"]);

    // `evop prune` writes evop.json last
    let directory = checkpoint(&model());
    fs::write(directory.path().join("run.json"), "{}").unwrap();
    fails(directory.path(), &["a pruning run that has not finished", "evop prune --resume"]);
    fs::write(directory.path().join("evop.json"), "{}").unwrap();
    load(directory.path()).unwrap();
}

#[test]
fn configs_that_cannot_be_used() {
    let directory = checkpoint(&model());
    let path = directory.path().join("config.json");
    for (text, expected) in [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("\u{0}\u{1}", "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("{}", "`model_type`: expected one of llama, mistral, qwen2, qwen3, opt, nemotron-nas; found \"\""),
    ] {
        fs::write(&path, text).unwrap();
        fails(directory.path(), &["config.json", expected]);
    }
    fs::write(&path, "[".repeat(100_000)).unwrap();
    fails(directory.path(), &["config.json", "recursion limit"]);
    fs::write(&path, b"{\"model_type\": \"\xff\"}").unwrap();
    fails(directory.path(), &["config.json", "UTF-8"]);

    let whole = model();
    for (field, value, expected) in [
        ("model_type", json!("gpt2"), "found \"gpt2\": this architecture is not supported"),
        ("model_type", json!("evop_gpt2"), "found \"evop_gpt2\": this architecture is not supported"),
        ("model_type", json!(7), "`model_type`: expected a string, found 7"),
        ("hidden_size", Value::Null, "`hidden_size`: expected a whole number above 0, found nothing"),
        ("hidden_size", json!("48"), "`hidden_size`: expected a whole number, found \"48\""),
        ("hidden_size", json!(48.5), "`hidden_size`: expected a whole number, found 48.5"),
        ("hidden_size", json!(0), "`hidden_size`: expected a whole number above 0, found 0"),
        ("hidden_size", json!(-48), "`hidden_size`"),
        ("hidden_size", json!(50), "`hidden_size` 50 is not a multiple of `num_attention_heads` 4"),
        ("hidden_size", json!(u64::MAX), "`hidden_size`: expected a whole number above 0"),
        ("num_hidden_layers", Value::Null, "`num_hidden_layers`: expected a whole number above 0, found nothing"),
        ("num_hidden_layers", json!(200_000_000), "`num_hidden_layers`: expected at most 65536, found 200000000"),
        ("num_hidden_layers", json!(3), "the config says 3 layers, the tensors have `model.layers.3."),
        ("num_attention_heads", json!(null), "`num_attention_heads`"),
        ("num_attention_heads", json!([4]), "`num_attention_heads`: expected a whole number, found [4]"),
        ("num_key_value_heads", json!(3), "4 query heads can't be shared by 3 key/value heads"),
        ("num_key_value_heads", json!("two"), "`num_key_value_heads`: expected a whole number, found \"two\""),
        ("intermediate_size", Value::Null, "`intermediate_size`: expected a whole number above 0, found nothing"),
        ("vocab_size", json!({}), "`vocab_size`: expected a whole number, found {}"),
        ("max_position_embeddings", Value::Null, "`max_position_embeddings`"),
        ("head_dim", json!(13), "`head_dim`: expected an even number"),
        ("head_dim", json!(1u64 << 60), "`head_dim`: expected a smaller number"),
        ("rms_norm_eps", json!("1e-5"), "`rms_norm_eps`: expected a number, found \"1e-5\""),
        ("hidden_act", json!("tanh"), "`hidden_act`: expected silu, gelu, gelu_new or relu, found \"tanh\""),
        ("tie_word_embeddings", json!("yes"), "`tie_word_embeddings`: expected true or false, found \"yes\""),
        ("eos_token_id", json!("</s>"), "`eos_token_id`: expected a token id, found \"</s>\""),
        ("eos_token_id", json!([2, -1]), "`eos_token_id`: expected token ids, found [2,-1]"),
        ("partial_rotary_factor", json!(0.5), "`partial_rotary_factor` other than 1 is not supported"),
        ("rope_scaling", json!([1]), "`rope_scaling`: expected an object, found [1]"),
        ("rope_scaling", json!({"rope_type": "spiral"}), "rope type: expected default, linear, dynamic, llama3 or yarn, found \"spiral\""),
        ("rope_scaling", json!({"rope_type": "linear"}), "`factor`: expected a number of at least 1, found nothing"),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.0}), "`factor`: expected a number of at least 1, found 0.0"),
    ] {
        fs::write(&path, Value::Object(whole.with(json!({ field: value })).json).to_string()).unwrap();
        fails(directory.path(), &["config.json", expected]);
    }
}

#[test]
fn companions_that_cannot_be_used() {
    let directory = checkpoint(&model());
    let tokenizer = directory.path().join("tokenizer.json");
    for (text, expected) in
        [("", "not a tokenizer file"), ("{}", "not a tokenizer file"), ("{\"model\": 5}", "not a tokenizer file"), (&TOKENIZER[..200], "not a tokenizer file")]
    {
        fs::write(&tokenizer, text).unwrap();
        fails(directory.path(), &["tokenizer.json", expected]);
    }
    fs::remove_file(&tokenizer).unwrap();
    fails(directory.path(), &["tokenizer.json", "missing: expected a fast tokenizer"]);
    fs::write(&tokenizer, TOKENIZER).unwrap();
    for name in ["tokenizer_config.json", "generation_config.json"] {
        let path = directory.path().join(name);
        fs::write(&path, "{").unwrap();
        fails(directory.path(), &[name, "not valid JSON"]);
        fs::write(&path, "[]").unwrap();
        load(directory.path()).unwrap();
        fs::remove_file(&path).unwrap();
    }
    fs::write(directory.path().join("generation_config.json"), r#"{"eos_token_id": "</s>"}"#).unwrap();
    fails(directory.path(), &["generation_config.json", "`eos_token_id`: expected a token id, found \"</s>\""]);
    fs::write(directory.path().join("generation_config.json"), r#"{"do_sample": "yes"}"#).unwrap();
    fails(directory.path(), &["generation_config.json", "`do_sample`: expected true or false"]);
}

#[test]
fn a_safetensors_file_that_was_cut_short() {
    let directory = checkpoint(&model());
    let path = directory.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for cut in [0, 1, 7, 8, 9, 100, header / 2, header - 1, header, header + 1, (header + whole.len()) / 2, whole.len() - 1] {
        fs::write(&path, &whole[..cut]).unwrap();
        fails(directory.path(), &["model.safetensors", "not a whole safetensors file", &format!("({cut} bytes)"), "download or copy it again"]);
    }
    fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
    fails(directory.path(), &["model.safetensors", "not a whole safetensors file"]);
}

#[test]
fn a_safetensors_header_with_absurd_sizes() {
    let directory = checkpoint(&model());
    let path = directory.path().join("model.safetensors");
    let entry = |shape: Value, end: u64| json!({"model.embed_tokens.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).to_string();
    let headers = [
        (u64::MAX, String::new()),
        (1 << 40, "{}".into()),
        (2, "{}".into()),
        (4, "null".into()),
        (0, entry(json!([1u64 << 40, 1u64 << 40]), 8)),
        (0, entry(json!([u64::MAX]), 16)),
        (0, entry(json!([1u64 << 33, 1u64 << 33]), 1 << 60)),
        (0, entry(json!([4]), u64::MAX)),
        (0, entry(json!([-4]), 16)),
        (0, entry(json!("4"), 16)),
        (0, r#"{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}"#.into()),
        (0, r#"{"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}"#.into()),
    ];
    for (stated, header) in headers {
        let stated = if stated == 0 { header.len() as u64 } else { stated };
        fs::write(&path, [&stated.to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat()).unwrap();
        fails(directory.path(), &["model.safetensors", "not a whole safetensors file"]);
    }
}

#[test]
fn an_index_that_cannot_be_followed() {
    let directory = checkpoint(&model());
    fs::rename(directory.path().join("model.safetensors"), directory.path().join("part-1.safetensors")).unwrap();
    let index = |json: Value| fs::write(directory.path().join("model.safetensors.index.json"), json.to_string()).unwrap();
    let names: Vec<String> = model().tensors.keys().cloned().collect();
    let mut map: serde_json::Map<String, Value> = names.iter().map(|n| (n.clone(), json!("part-1.safetensors"))).collect();
    index(json!({"weight_map": map}));
    load(directory.path()).unwrap();

    map.insert("model.extra".into(), json!("part-1.safetensors"));
    index(json!({"weight_map": map}));
    fails(directory.path(), &["model.safetensors.index.json", "`model.extra`, which none of the shards holds"]);
    map.insert("model.extra".into(), json!("part-2.safetensors"));
    index(json!({"weight_map": map}));
    fails(directory.path(), &["part-2.safetensors", "No such file"]);
    map.insert("model.extra".into(), json!("../part-1.safetensors"));
    index(json!({"weight_map": map}));
    fails(directory.path(), &["model.safetensors.index.json", "expected a file of this directory"]);
    map.insert("model.extra".into(), json!("/etc/passwd"));
    index(json!({"weight_map": map}));
    fails(directory.path(), &["model.safetensors.index.json", "expected a file of this directory"]);
    for (json, expected) in [
        (json!({}), "expected an object `weight_map`"),
        (json!({"weight_map": []}), "expected an object `weight_map`"),
        (json!({"weight_map": {}}), "names no file"),
    ] {
        index(json);
        fails(directory.path(), &["model.safetensors.index.json", expected]);
    }
    fs::write(directory.path().join("model.safetensors.index.json"), "{").unwrap();
    fails(directory.path(), &["model.safetensors.index.json", "not valid JSON"]);
}

#[test]
fn tensors_that_cannot_be_used() {
    let damaged = |name: &str, tensor: Option<Tensor>, expected: &[&str]| {
        let mut model = model();
        assert!(model.tensors.remove(name).is_some());
        if let Some(tensor) = tensor {
            model.tensors.insert(name.into(), tensor);
        }
        let directory = checkpoint(&model);
        fails(directory.path(), &[&["model.safetensors", name], expected].concat());
    };
    let filled = |shape: &[usize], value: f32| {
        let mut values = vec![0.5f32; shape.iter().product()];
        values[7] = value;
        Some(Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    for name in ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.2.input_layernorm.weight"] {
        damaged(name, None, &["expected shape", "nothing: it is missing from the file"]);
    }
    damaged("model.embed_tokens.weight", filled(&[50, 48], 0.0), &["expected shape [53, 48]", "found shape [50, 48]"]);
    damaged("lm_head.weight", filled(&[48, 53], 0.0), &["expected shape [53, 48]", "found shape [48, 53]"]);
    damaged("model.norm.weight", filled(&[48, 1], 0.0), &["expected shape [48]", "found shape [48, 1]"]);
    damaged("model.norm.weight", filled(&[48], f32::NAN), &["expected finite numbers", "NaN at element 7"]);
    damaged("model.layers.1.mlp.up_proj.weight", filled(&[64, 48], f32::INFINITY), &["expected finite numbers", "inf at element 7"]);
    damaged("model.layers.1.self_attn.q_proj.weight", filled(&[48, 48], f32::NEG_INFINITY), &["expected finite numbers", "-inf at element 7"]);
    damaged("lm_head.weight", filled(&[53, 48], 0.0).map(|t| t.to_dtype(DType::I64).unwrap()), &["expected type F32, F16 or BF16", "found type I64"]);
    damaged(
        "model.layers.0.mlp.down_proj.weight",
        filled(&[48, 64], 0.0).map(|t| t.to_dtype(DType::U8).unwrap()),
        &["expected type F32, F16 or BF16", "found type U8"],
    );
    damaged("lm_head.weight", filled(&[53, 48], 0.0).map(|t| t.to_dtype(DType::F64).unwrap()), &["expected type F32, F16 or BF16", "found type F64"]);
}

#[test]
fn a_gguf_that_was_cut_short() {
    let whole = gguf();
    let directory = tempfile::tempdir().unwrap();
    // every byte of the magic and the counts, then one in 97 through metadata, tensor table and data
    for cut in (0..32).chain((32..whole.len()).step_by(97)).chain([whole.len() - 1]) {
        let path = write_gguf(&directory, &whole[..cut]);
        fails(&path, &["model.gguf", &format!("not a whole GGUF file ({cut} bytes)")]);
    }
}

/// Where `key`'s value starts (its type before it).
fn after(bytes: &[u8], key: &str) -> usize {
    let key = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes()].concat();
    bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len()
}

#[test]
fn a_gguf_header_with_absurd_sizes() {
    let whole = gguf();
    let directory = tempfile::tempdir().unwrap();
    let with = |at: usize, value: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        write_gguf(&directory, &bytes)
    };
    let tokens = after(&whole, "tokenizer.ggml.tokens");
    let name = after(&whole, "general.architecture");
    let table = after(&whole, "token_embd.weight");
    for (at, what) in [
        (8, "tensors"),
        (16, "entries"),
        (tokens + 8, "elements of a list"),
        (name + 4, "bytes of a string"),
        (table + 4, "rows of a tensor"),
        (table + 24, "offset of a tensor"),
    ] {
        for value in [u64::MAX, 1 << 62, 1 << 40] {
            let error = load(&with(at, &value.to_le_bytes())).expect_err(what);
            assert!(error.contains("model.gguf"), "{what}: {error}");
        }
    }
    // rows x columns wraps around to nothing
    let mut bytes = whole.clone();
    for at in [table + 4, table + 12] {
        bytes[at..at + 8].copy_from_slice(&(1u64 << 32).to_le_bytes());
    }
    fails(&write_gguf(&directory, &bytes), &["model.gguf", "token_embd.weight", "ends beyond the file"]);
    // a value that candle divides by: a U32 entry of the same size as one that is there, under that name
    let (key, alignment) = ("llama.context_length", "general.alignment\0\0\0");
    assert_eq!(key.len(), alignment.len());
    let at = after(&whole, key);
    let mut bytes = whole.clone();
    bytes[at - key.len()..at].copy_from_slice(alignment.as_bytes());
    bytes[at + 4..at + 8].copy_from_slice(&[0; 4]);
    fails(&write_gguf(&directory, &bytes), &["model.gguf", "its header can't be parsed"]);
}

#[test]
fn a_gguf_whose_rows_are_no_whole_blocks() {
    let whole = gguf();
    let directory = tempfile::tempdir().unwrap();
    // the type stands behind the tensor's name, the number of its dimensions (4 bytes) and these (8 bytes each)
    for (tensor, dimensions, id, kind, shape) in [
        // all in all whole blocks: 324 x 64 numbers are 81 of 256
        ("token_embd.weight", 2, 12u32, "Q4_K", "[324, 64]"),
        ("blk.0.attn_q.weight", 2, 14, "Q6_K", "[64, 64]"),
        // less than one
        ("output_norm.weight", 1, 10, "Q2_K", "[64]"),
    ] {
        let mut bytes = whole.clone();
        let at = after(&bytes, tensor) + 4 + 8 * dimensions;
        bytes[at..at + 4].copy_from_slice(&id.to_le_bytes());
        let expected = format!("expected rows of a multiple of 256 numbers, which is a block of its type {kind}, found shape {shape}");
        fails(&write_gguf(&directory, &bytes), &["model.gguf", tensor, &expected]);
    }
}

#[test]
fn gguf_metadata_that_cannot_be_used() {
    let whole = gguf();
    let directory = tempfile::tempdir().unwrap();
    let fails_with = |change: &dyn Fn(&mut Vec<u8>), expected: &[&str]| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        fails(&write_gguf(&directory, &bytes), &[&["model.gguf"], expected].concat());
    };
    // a key by another name is a missing key
    let renamed = |bytes: &mut Vec<u8>, key: &str| {
        let at = after(bytes, key);
        bytes[at - 1] = b'~';
    };
    for (key, expected) in [
        ("general.architecture", "`general.architecture`: expected a string"),
        ("llama.embedding_length", "`llama.embedding_length`: expected a whole number"),
        ("llama.block_count", "`llama.block_count`: expected a whole number"),
        ("llama.attention.head_count", "`llama.attention.head_count`: expected a whole number"),
        ("llama.feed_forward_length", "`llama.feed_forward_length`: expected a whole number"),
        ("llama.attention.layer_norm_rms_epsilon", "`llama.attention.layer_norm_rms_epsilon`: expected a number"),
        ("tokenizer.ggml.tokens", "`tokenizer.ggml.tokens`: expected a list of strings"),
        ("tokenizer.ggml.merges", "`tokenizer.ggml.merges`: expected a list of strings"),
        ("tokenizer.ggml.model", "`tokenizer.ggml.model`: expected gpt2 or llama"),
        ("tokenizer.ggml.pre", "`tokenizer.ggml.pre`: expected gpt-2"),
    ] {
        fails_with(&|bytes| renamed(bytes, key), &[expected]);
    }
    fails_with(
        &|bytes| {
            let at = after(bytes, "general.architecture") + 12;
            bytes[at..at + 5].copy_from_slice(b"gpt-j");
        },
        &["expected llama, qwen2, qwen3 or deci", "gpt-j"],
    );
    fails_with(
        &|bytes| {
            let at = after(bytes, "llama.block_count") + 4;
            bytes[at] -= 1;
        },
        &["the config says 1 layers, the tensors have `model.layers.1."],
    );
    fails_with(
        &|bytes| {
            let at = after(bytes, "llama.attention.head_count") + 4;
            bytes[at..at + 4].copy_from_slice(&[0; 4]);
        },
        &["num_attention_heads"],
    );
    for tensor in ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.1.ffn_norm.weight"] {
        fails_with(&|bytes| renamed(bytes, tensor), &["expected", "found"]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Bytes changed at random: an error or (where they were numbers) a model, never a panic.
    #[test]
    fn a_damaged_gguf_header_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = gguf();
        // metadata and tensor table; the weights behind them are numbers like any others
        let header = after(&bytes, "output_norm.weight") + 200;
        for (at, value) in changes {
            let at = at.index(header);
            bytes[at] = value;
        }
        let path = write_gguf(&tempfile::tempdir().unwrap(), &bytes);
        if let Err(error) = load(&path) {
            prop_assert!(!error.is_empty());
        }
    }

    #[test]
    fn a_damaged_safetensors_header_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let directory = checkpoint(&model());
        let path = directory.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value) in changes {
            let at = at.index(header);
            bytes[at] = value;
        }
        fs::write(&path, bytes).unwrap();
        if let Err(error) = load(directory.path()) {
            prop_assert!(error.contains("model.safetensors") || error.contains("config.json"), "{}", error);
        }
    }
}
