//! Every format, family and kind of pattern: what is written reads back as the parent under the pattern, or is refused with what to do.

use crate::setting::{root, tiny};
use crate::small_models::{FFN, GROUPS, decoder, difference, families, logits, model, pattern};
use evop_model::{Checkpoint, Config, DType, Decoder, Device, Error, Pattern, RawTensor, ShapeOrigin, Source};
use evop_pruning::checkpoint::{Contents, FileType, Format, Target};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const WHOLE: (usize, usize) = (GROUPS, FFN);

/// Kinds of patterns of a model of 5 layers.
fn patterns(config: &Config) -> Vec<(&'static str, Pattern)> {
    vec![
        ("dense", Pattern::dense(config)),
        ("layers", pattern(config, [WHOLE, (0, 0), WHOLE, WHOLE, (0, 0)])),
        ("one width", pattern(config, [(GROUPS, 256), (0, 0), (GROUPS, 256), (GROUPS, 256), (GROUPS, 256)])),
        ("one width, fewer heads", pattern(config, [(1, 256); 5])),
        ("three of four groups", pattern(config, [(3, FFN); 5])),
        ("drops", pattern(config, [WHOLE, (0, FFN), (GROUPS, 0), (0, 0), WHOLE])),
        ("hard drops", pattern(config, [(0, FFN), (GROUPS, 0), (0, 0), (0, FFN), (GROUPS, 0)])),
        ("widths", pattern(config, [(GROUPS, 256), (0, FFN), (GROUPS, 64), WHOLE, (GROUPS, 256)])),
        ("no MLP", pattern(config, [(GROUPS, 0); 5])),
        ("no attention", pattern(config, [(0, FFN); 5])),
        ("widths and groups", pattern(config, [(2, 32), (0, FFN), (GROUPS, 0), (0, 0), (1, 96)])),
    ]
}

/// What is read back, if it was written at all.
fn written(parent: &Checkpoint, pattern: &Pattern, format: Format) -> Result<(Checkpoint, Vec<String>, tempfile::TempDir), String> {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let written = Contents::of(parent).write_pattern(pattern, format, &out).map_err(|e| {
        assert!(!out.exists(), "what is refused leaves nothing behind");
        e.to_string()
    })?;
    assert!(written.files.iter().all(|f| f.exists()));
    assert_eq!(std::fs::metadata(&written.files[0]).unwrap().len(), written.weight_bytes);
    Ok((Checkpoint::open(&out).unwrap_or_else(|e| panic!("{format}: {e}")), written.notes, directory))
}

#[test]
fn every_format_gives_the_logits_of_the_masked_parent() {
    let mut refused = BTreeMap::new();
    for (family, own) in families() {
        let directory = tempfile::tempdir().unwrap();
        let parent = model(&own, directory.path());
        let dense = decoder(&parent);
        for (kind, pattern) in patterns(parent.config()) {
            let expected = logits(&dense.masked(&pattern).unwrap());
            let pruned = parent.config().with_pattern(&pattern);
            let shapes: Vec<_> = pruned.layers.iter().map(|l| l.shape).filter(|s| s.kv_groups + s.ffn > 0).collect();
            for format in [Format::Hf, Format::NemotronNas, Format::Gguf] {
                match written(&parent, &pattern, format) {
                    Ok((checkpoint, _, _kept)) => {
                        assert_eq!(checkpoint.config().layers.iter().map(|l| l.shape).collect::<Vec<_>>(), shapes, "{family}, {kind}, {format}");
                        // not assert_eq, which would print them
                        assert!(logits(&decoder(&checkpoint)) == expected, "{family}, {kind}, {format}");
                    }
                    Err(error) => {
                        assert!(error.contains("expected --format hf"), "{family}, {kind}, {format}: {error}");
                        *refused.entry(format!("{family}, {format}")).or_insert(0) += 1;
                    }
                }
            }
        }
    }
    // Nemotron-NAS: not fewer query heads in some layers; neither it nor llama.cpp: no attention at all; norms of queries and keys: Nemotron-NAS
    // never, llama.cpp where layers are equal
    let of_families = ["llama", "llama-biases", "llama-3", "mistral", "qwen2"]
        .into_iter()
        .flat_map(|family| [(format!("{family}, nemotron-nas"), 2), (format!("{family}, gguf"), 1)]);
    let expected = of_families.chain([("qwen3, nemotron-nas".to_string(), 11), ("qwen3, gguf".to_string(), 6)]).collect();
    assert_eq!(refused, expected);
}

/// What a directory's config.json says.
fn config_json(checkpoint: &Checkpoint) -> Value {
    serde_json::from_str(&std::fs::read_to_string(checkpoint.path().join("config.json")).unwrap()).unwrap()
}

#[test]
fn equal_layers_make_a_plain_config_and_layers_that_differ_one_of_our_own() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "qwen2"}), directory.path());
    for (kind, pattern) in patterns(parent.config()) {
        let (checkpoint, notes, _kept) = written(&parent, &pattern, Format::Hf).unwrap();
        let json = config_json(&checkpoint);
        let plain = ["dense", "layers", "one width", "one width, fewer heads", "three of four groups"].contains(&kind);
        let expected = if plain { ("qwen2", "Qwen2ForCausalLM", false) } else { ("evop_qwen2", "EvopQwen2ForCausalLM", true) };
        let found = (json["model_type"].as_str().unwrap(), json["architectures"][0].as_str().unwrap(), json.get("auto_map").is_some());
        assert_eq!(found, expected, "{kind}");
        assert_eq!(
            (json.get("per_layer_config").is_some(), checkpoint.path().join("modeling_evop.py").exists(), notes.len()),
            (!plain, !plain, usize::from(!plain))
        );
    }
    let (checkpoint, _, _kept) = written(&parent, &pattern(parent.config(), [(2, 32), (0, FFN), (4, 0), (0, 0), (1, 96)]), Format::Hf).unwrap();
    let overrides = json!({
        "0": {"num_key_value_heads": 2, "intermediate_size": 32}, "1": {"skip": ["attention"]}, "2": {"skip": ["mlp"]},
        "3": {"num_key_value_heads": 1, "intermediate_size": 96},
    });
    let json = config_json(&checkpoint);
    assert_eq!(json["per_layer_config"], overrides);
    assert_eq!((&json["intermediate_size"], &json["num_key_value_heads"], &json["evop_group_size"]), (&json!(512), &json!(4), &json!(2)));
}

#[test]
fn a_llama_whose_heads_dont_divide_its_hidden_size_is_no_plain_llama_for_transformers() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "llama"}), directory.path());
    let three_groups = pattern(parent.config(), [(3, FFN); 5]);
    let (checkpoint, notes, _kept) = written(&parent, &three_groups, Format::Hf).unwrap();
    assert_eq!(config_json(&checkpoint)["model_type"], "evop_llama");
    assert!(notes[0].contains("6 query heads don't divide a hidden size of 128"), "{notes:?}");
}

#[test]
fn nemotron_nas_has_values_that_vllm_and_llama_cpp_read_alike_or_a_note() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "mistral", "sliding_window": 24}), directory.path());
    let (checkpoint, notes, _kept) =
        written(&parent, &pattern(parent.config(), [(0, 0), (GROUPS, 256), (0, FFN), (GROUPS, 0), (GROUPS, 96)]), Format::NemotronNas).unwrap();
    let json = config_json(&checkpoint);
    let attention = json!({"n_heads_in_group": 2, "no_op": false, "replace_with_linear": false});
    let none = json!({"n_heads_in_group": null, "no_op": true, "replace_with_linear": false});
    assert_eq!(
        json["block_configs"],
        json!([
            {"attention": attention, "ffn": {"ffn_mult": 3.0, "intermediate_size": 256, "no_op": false, "replace_with_linear": false}},
            {"attention": none, "ffn": {"ffn_mult": 6.0, "intermediate_size": 512, "no_op": false, "replace_with_linear": false}},
            {"attention": attention, "ffn": {"ffn_mult": null, "intermediate_size": null, "no_op": true, "replace_with_linear": false}},
            {"attention": attention, "ffn": {"intermediate_size": 96, "no_op": false, "replace_with_linear": false}},
        ])
    );
    assert_eq!(
        (&json["model_type"], &json["architectures"], &json["max_position_embeddings"]),
        (&json!("nemotron-nas"), &json!(["DeciLMForCausalLM"]), &json!(24))
    );
    for part in
        ["limited to the shortest one, 24 tokens", "layer 3 (layer 4 of the original) has 96 MLP channels", "would forget the attention", "--trust-remote-code"]
    {
        assert!(notes.iter().any(|n| n.contains(part)), "{part:?} isn't in {notes:?}");
    }
    assert_eq!(checkpoint.config().layers[0].origin, ShapeOrigin::BlockConfigs);
    let (_, notes, _kept) = written(&parent, &pattern(parent.config(), [(0, 256), WHOLE, WHOLE, WHOLE, WHOLE]), Format::NemotronNas).unwrap();
    assert!(notes.iter().any(|n| n.starts_with("vLLM: layer 0 has no attention")), "{notes:?}");
}

#[test]
fn gguf_types_keep_what_they_can() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "llama", "hidden_size": 256, "head_dim": 32, "tie_word_embeddings": true}), directory.path());
    let kept = pattern(parent.config(), [WHOLE, (GROUPS, 256), (0, FFN), (GROUPS, 0), WHOLE]);
    let expected = logits(&decoder(&parent).masked(&kept).unwrap());
    let mut sizes = Vec::new();
    for (weights, worst) in [
        (None, 0.0),
        (Some(FileType::F32), 0.0),
        (Some(FileType::F16), 2e-3),
        (Some(FileType::Bf16), 1e-2),
        (Some(FileType::Q8_0), 3e-2),
        (Some(FileType::Q4K), 0.25),
    ] {
        let out = directory.path().join(format!("{}.gguf", weights.map_or("as-is".into(), |w| w.to_string())));
        let written = Contents::of(&parent).write_pattern(&kept, Target { format: Format::Gguf, weights }, &out).unwrap();
        assert_eq!(written.architecture, "deci");
        let checkpoint = Checkpoint::open(&out).unwrap();
        let difference = difference(&expected, &logits(&decoder(&checkpoint)));
        assert!(difference <= worst, "{weights:?}: {difference}");
        if weights == Some(FileType::Q8_0) {
            // the file's blocks as they are, multiplied with activations in 8 bits
            let [plain, blocks] = [DType::F32.into(), evop_model::WeightType::Q8_0].map(|held| checkpoint.decoder(&Device::Cpu, held).unwrap());
            let values = |decoder: &Decoder, s: usize| decoder.sub_block(s).unwrap().output().weight().unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(values(&plain, 0), values(&blocks, 0));
            assert_eq!(values(&plain, 9), values(&blocks, 9));
            let rounded = self::difference(&expected, &logits(&blocks));
            assert!(rounded < 2.0 * worst, "{rounded}");
        }
        assert_eq!(checkpoint.config().layers[3].shape.ffn, 0, "the MLP of zeros in layer 3 isn't read");
        sizes.push(written.weight_bytes);
        // 32 columns of that down_proj are no 256
        assert_eq!(
            written.notes.iter().any(|n| n.contains("no whole number of q4_k blocks: `blk.3.ffn_down.weight` with 32 columns is Q8_0")),
            weights == Some(FileType::Q4K)
        );
        // the same file again
        let again = directory.path().join("again.gguf");
        Contents::of(&parent).write_pattern(&kept, Target { format: Format::Gguf, weights }, &again).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&again).unwrap());
    }
    assert!(sizes[0] == sizes[1] && sizes.windows(2).skip(1).all(|w| w[1] <= w[0]) && sizes[5] < sizes[1] / 5, "{sizes:?}");
}

#[test]
fn directories_take_16_and_32_bit_types_only() {
    let directory = tempfile::tempdir().unwrap();
    let (parent, dense) = tiny();
    for (weights, exact, torch) in [(FileType::F32, true, "float32"), (FileType::Bf16, true, "bfloat16"), (FileType::F16, false, "float16")] {
        let out = directory.path().join(weights.to_string());
        Contents::of(&parent).write(Target { format: Format::Hf, weights: Some(weights) }, &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let difference = difference(&logits(&dense), &logits(&decoder(&checkpoint)));
        assert!(if exact { difference == 0.0 } else { difference < 1e-3 }, "{weights}: {difference}");
        assert_eq!(config_json(&checkpoint)["torch_dtype"], torch);
    }
    let error = Contents::of(&parent).write(Target { format: Format::NemotronNas, weights: Some(FileType::Q8_0) }, &directory.path().join("q8")).unwrap_err();
    assert!(error.to_string().contains("q8_0 is a type of GGUF files: expected f32, f16 or bf16"), "{error}");
    let error = Contents::of(&parent).write(Format::Hf, &directory.path().join("model.gguf")).unwrap_err();
    assert!(error.to_string().contains("is a name of a GGUF file, the format is hf"), "{error}");
}

#[test]
fn gguf_goldens_become_directories_and_files_again() {
    let mut cases = 0;
    for entry in std::fs::read_dir(root().join("crates/model/tests/goldens")).unwrap() {
        let file = entry.unwrap().path().join("model.gguf");
        if !file.exists() {
            continue;
        }
        let original = Checkpoint::open(&file).unwrap();
        let (name, expected) = (file.display(), short_logits(&original));
        for format in [Format::Hf, Format::Gguf] {
            let directory = tempfile::tempdir().unwrap();
            let written = Contents::of(&original).write(format, directory.path()).unwrap_or_else(|e| panic!("{name}, {format}: {e}"));
            let again = Checkpoint::open(directory.path()).unwrap();
            assert!(short_logits(&again) == expected, "{name}, {format}: {written:?}");
            for text in ["Hello  world, don't say 12345!\n\n", "naïve 日本語 🙂", "<|im_start|>user\nhi<|im_end|>", "<s>[INST] x [/INST]</s>"] {
                for special in [false, true] {
                    assert_eq!(again.encode(text, special).unwrap(), original.encode(text, special).unwrap(), "{name}, {format}: {text:?}");
                }
            }
            assert_eq!(again.generation().eos_token_ids, original.generation().eos_token_ids, "{name}, {format}");
            assert_eq!(
                again.chat_template().map(|t| (&t.source, &t.bos_token)),
                original.chat_template().map(|t| (&t.source, &t.bos_token)),
                "{name}, {format}"
            );
        }
        cases += 1;
    }
    assert!(cases >= 4, "only {cases} GGUF cases were found");
}

/// Logits of a model of any vocabulary.
fn short_logits(checkpoint: &Checkpoint) -> Vec<Vec<f32>> {
    let decoder = decoder(checkpoint);
    let tokens: Vec<u32> = (0..24).map(|i| (i * 29 + 5) % checkpoint.config().vocab_size as u32).collect();
    let batch = decoder.batch(&[evop_model::Span::prompt(tokens.len())]).unwrap();
    decoder.logits(&decoder.forward(&tokens, &batch, &mut evop_model::NoCache).unwrap()).unwrap().to_vec2().unwrap()
}

/// A source with biases (and a tensor that nothing knows) besides another's tensors.
#[derive(Debug)]
struct WithBiases<'a> {
    source: &'a dyn Source,
    biases: BTreeMap<String, usize>,
}

impl Source for WithBiases<'_> {
    fn names(&self) -> Vec<String> {
        self.source.names().into_iter().chain(self.biases.keys().cloned()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.biases.get(name).map(|n| vec![*n]).or_else(|| self.source.shape(name))
    }

    fn raw(&self, name: &str) -> evop_model::Result<RawTensor<'_>> {
        match self.biases.get(name) {
            Some(n) => {
                let values: Vec<u8> = (0..*n).flat_map(|i| ((i as f32 * 0.7).sin() * 0.2).to_le_bytes()).collect();
                Ok(RawTensor { dtype: DType::F32, shape: vec![*n], bytes: values.into() })
            }
            None => self.source.raw(name),
        }
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        self.source.mismatch(name, expected, found)
    }
}

#[test]
fn biases_that_a_repair_added_are_written_where_a_format_has_a_place_for_them() {
    for (family, own) in families() {
        let directory = tempfile::tempdir().unwrap();
        let parent = model(&own, directory.path());
        let names: Vec<String> =
            ["model.layers.1.self_attn.o_proj.bias", "model.layers.1.mlp.down_proj.bias", "model.layers.3.mlp.down_proj.bias"].map(str::to_string).into();
        let biases = names.into_iter().filter(|n| parent.source().shape(n).is_none()).chain(["model.layers.0.extra.weight".into()]).map(|n| (n, 128)).collect();
        let source = WithBiases { source: parent.source().as_ref(), biases };
        let expected = logits(&evop_model::Decoder::load(parent.config(), &source, &evop_model::Device::Cpu, DType::F32).unwrap());
        for format in [Format::Hf, Format::NemotronNas, Format::Gguf] {
            let out = directory.path().join(format!("out-{format}"));
            let written = match Contents::of(&parent).around(parent.config(), &source).write(format, &out) {
                Ok(written) => written,
                Err(error) => {
                    assert!(family == "qwen3" && error.to_string().contains("expected --format hf"), "{family}, {format}: {error}");
                    continue;
                }
            };
            assert!(written.notes.iter().any(|n| n.contains("`model.layers.0.extra.weight` left out")), "{:?}", written.notes);
            let checkpoint = Checkpoint::open(&out).unwrap();
            assert!(logits(&decoder(&checkpoint)) == expected, "{family}, {format}");
            if format == Format::Hf {
                let json = config_json(&checkpoint);
                let expected = match family {
                    "mistral" | "qwen2" => json!(["self_attn.o_proj", "mlp.down_proj"]),
                    "qwen3" => json!(["mlp.down_proj"]),
                    _ => Value::Null,
                };
                assert_eq!(json.get("evop_biases").cloned().unwrap_or_default(), expected, "{family}");
                if family == "llama" {
                    // transformers' flag is for all of them
                    assert_eq!((&json["attention_bias"], &json["mlp_bias"], &json["model_type"]), (&json!(true), &json!(true), &json!("llama")));
                    let shape = checkpoint.source().shape("model.layers.4.self_attn.q_proj.bias");
                    assert_eq!(shape, Some(vec![128]));
                }
            }
        }
    }
}

#[test]
fn what_was_heterogeneous_stays_so_through_every_format() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "llama"}), directory.path());
    let kept = pattern(parent.config(), [WHOLE, (0, 256), (GROUPS, 256), (GROUPS, 0), (0, FFN)]);
    let expected = logits(&decoder(&parent).masked(&kept).unwrap());
    let mut at = directory.path().join("0");
    Contents::of(&parent).write_pattern(&kept, Format::Gguf, &at).unwrap();
    for (step, format) in [Format::Hf, Format::NemotronNas, Format::Gguf, Format::NemotronNas, Format::Hf, Format::Gguf].into_iter().enumerate() {
        let out = directory.path().join((step + 1).to_string());
        Contents::of(&Checkpoint::open(&at).unwrap()).write(format, &out).unwrap_or_else(|e| panic!("{format}: {e}"));
        at = out;
        assert!(logits(&decoder(&Checkpoint::open(&at).unwrap())) == expected, "{format}");
    }
    // groups of other sizes over the same query heads, as Nemotron-NAS has them
    let json = json!({"model_type": "llama", "num_key_value_heads": [8, 4, 2, 4, 1], "intermediate_size": [512, 256, 512, 64, 96]});
    let grouped = tempfile::tempdir().unwrap();
    let parent = model(&json, grouped.path());
    let expected = logits(&decoder(&parent));
    for format in [Format::Hf, Format::NemotronNas, Format::Gguf] {
        let (checkpoint, _, _kept) = written(&parent, &Pattern::dense(parent.config()), format).unwrap();
        assert!(logits(&decoder(&checkpoint)) == expected, "{format}");
        if format == Format::Hf {
            assert_eq!(config_json(&checkpoint)["per_layer_config"]["1"], json!({"num_key_value_heads": 4, "evop_group_size": 2, "intermediate_size": 256}));
        }
    }
}

#[test]
fn provenance_goes_along() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "llama"}), directory.path());
    let provenance = json!({"parent": {"model": "some/model"}, "pattern": [], "loss": {"pruned": 1.25}});
    let contents = Contents { provenance: Some(&provenance), ..Contents::of(&parent) };
    for (format, out) in [(Format::Hf, "hf"), (Format::NemotronNas, "nas"), (Format::Gguf, "gguf"), (Format::Gguf, "file.gguf")] {
        let out = directory.path().join(out);
        contents.write(format, &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.provenance(), Some(&provenance), "{format}");
        // and on, from there
        let next = out.with_extension("next");
        Contents::of(&checkpoint).write(Format::Hf, &next).unwrap();
        assert_eq!(Checkpoint::open(&next).unwrap().provenance(), Some(&provenance), "{format}");
    }
}

/// A text that says which format can do it.
fn refused(own: &Value, genes: [(usize, usize); 5], format: Format, parts: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(own, directory.path());
    let error = written(&parent, &pattern(parent.config(), genes), format).err().unwrap();
    for part in parts {
        assert!(error.contains(part), "{part:?} isn't in {error:?}");
    }
}

#[test]
fn what_a_format_cant_express_is_refused_with_the_formats_that_can() {
    let opt = json!({"model_type": "opt", "tie_word_embeddings": false});
    let drops = |groups: usize| [(groups, FFN), (0, FFN), (groups, 0), (groups, FFN), (groups, FFN)];
    refused(&opt, drops(8), Format::Hf, &["OPT", "the layers differ", "whole layers removed"]);
    refused(&opt, [(4, FFN); 5], Format::Hf, &["OPT", "fewer heads"]);
    refused(&opt, [(8, FFN); 5], Format::Gguf, &["llama.cpp has no architecture for OPT", "--format hf"]);
    refused(&opt, [(8, FFN); 5], Format::NemotronNas, &["OPT", "--format hf"]);
    refused(&json!({"model_type": "qwen3", "head_dim": 32}), drops(4), Format::Gguf, &["Qwen3", "--format hf"]);
    let llama = json!({"model_type": "llama"});
    refused(&llama, [WHOLE, (2, FFN), WHOLE, WHOLE, WHOLE], Format::NemotronNas, &["layer 1 has 4 of 8", "--format hf or gguf"]);
    refused(&llama, [(0, 0); 5], Format::Hf, &["at least one attention or MLP"]);
    refused(&llama, [(0, FFN); 5], Format::Gguf, &["without any attention", "--format hf"]);
    refused(&json!({"model_type": "llama", "hidden_act": "gelu"}), [WHOLE; 5], Format::Gguf, &["not silu"]);
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0});
    refused(&json!({"model_type": "llama", "rope_scaling": yarn}), [WHOLE; 5], Format::Gguf, &["YaRN with a beta_fast other than 32", "--format hf"]);
    let windows = json!({"model_type": "mistral", "sliding_window": 16, "per_layer_config": {"1": {"sliding_window": 8}}});
    refused(&windows, [WHOLE; 5], Format::Hf, &["layer 1 has an attention window of Some(8)"]);
    let parsed = "parquet".parse::<Format>().unwrap_err().to_string();
    assert!(parsed.contains("--format: expected one of hf, nemotron-nas, gguf; found \"parquet\""), "{parsed}");
}

#[test]
fn a_whole_layer_pattern_of_an_opt_model_is_a_plain_opt() {
    let directory = tempfile::tempdir().unwrap();
    let parent = model(&json!({"model_type": "opt"}), directory.path());
    let kept = pattern(parent.config(), [(8, 256), (0, 0), (8, 256), (0, 0), (8, 256)]);
    let (checkpoint, _, _kept) = written(&parent, &kept, Format::Hf).unwrap();
    assert!(logits(&decoder(&checkpoint)) == logits(&decoder(&parent).masked(&kept).unwrap()));
    assert_eq!((&config_json(&checkpoint)["model_type"], &config_json(&checkpoint)["ffn_dim"]), (&json!("opt"), &json!(256)));
}

#[test]
fn a_directory_with_several_gguf_files_is_asked_about() {
    let directory = tempfile::tempdir().unwrap();
    let golden = root().join("crates/model/tests/goldens/gguf_qwen2/model.gguf");
    std::fs::copy(&golden, directory.path().join("a.gguf")).unwrap();
    assert_eq!(Checkpoint::open(directory.path()).unwrap().path(), directory.path().join("a.gguf"));
    std::fs::copy(&golden, directory.path().join("b.gguf")).unwrap();
    let error = Checkpoint::open(Path::new(directory.path())).unwrap_err().to_string();
    assert!(error.contains("holds 2 .gguf files: name one of them"), "{error}");
}
