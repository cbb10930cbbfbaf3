//! What a model computes with its weights held in every type: the same as an f32 model of the numbers that those weights stand for, up to the rounding of activations.

use crate::fixtures::{Family, Model, Size};
use evop_model::{
    BlockType, Checkpoint, Config, DType, Decoder, DecoderSource, Device, FixedCache, Gene, Held, NoCache, Pattern, RandomSource, Source, Span, TensorNames,
    WeightType, open_weights,
};
use serde_json::json;
use std::path::Path;

const K_QUANTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/gguf_llama_k_quants/model.gguf");

fn tokens(count: usize, config: &Config) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + 13) % config.vocab_size) as u32).collect()
}

fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
    let hidden = decoder.forward(tokens, &batch, &mut NoCache).unwrap();
    decoder.logits(&hidden).unwrap().to_vec2::<f32>().unwrap().concat()
}

/// Root mean square of the difference, in that of the expected.
fn relative(expected: &[f32], found: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
    (square(&mut expected.iter().zip(found).map(|(a, b)| a - b)) / square(&mut expected.iter().copied())).sqrt() as f32
}

/// An f32 model of the numbers that a decoder's weights stand for.
fn plain(decoder: &Decoder) -> Decoder {
    let config = decoder.config();
    let source = DecoderSource::new(decoder, &RandomSource::new(config)).unwrap();
    Decoder::load(config, &source, &Device::Cpu, DType::F32).unwrap()
}

/// Rows of 256, 512 and (the first MLP) of 320 weights.
fn config(tied: bool) -> Config {
    let json = json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 301, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
    });
    let whole = Config::from_json(&json.to_string(), Path::new("config.json")).unwrap();
    let genes = [320, 512, 512].map(|ffn| Gene { kv_groups: 4, ffn }).to_vec();
    whole.with_pattern(&Pattern::new(genes, &whole).unwrap())
}

#[test]
fn logits_are_those_of_an_f32_model_of_the_same_numbers_in_every_type() {
    // what is rounded: nothing but the order of sums; activations to 8 bits of mantissa; to 8 bits
    let cases =
        [(WeightType::Plain(DType::F32), 1e-6), (DType::F16.into(), 1e-5), (DType::BF16.into(), 1e-2), (WeightType::Q8_0, 2e-2), (WeightType::Q4K, 2e-2)];
    for tied in [true, false] {
        let config = config(tied);
        let source = RandomSource::new(&config);
        let exact = Decoder::load(&config, &source, &Device::Cpu, DType::F32).unwrap();
        for (weights, within) in cases {
            let decoder = Decoder::load(&config, &source, &Device::Cpu, weights).unwrap();
            let same_numbers = plain(&decoder);
            for count in [1, 7, 70] {
                let tokens = tokens(count, &config);
                let found = logits(&decoder, &tokens);
                let difference = relative(&logits(&same_numbers, &tokens), &found);
                assert!(difference <= within, "{}, {count} tokens: {difference}", weights.as_str());
                // and not far from what the weights were before they were rounded
                assert!(relative(&logits(&exact, &tokens), &found) < 0.15, "{}", weights.as_str());
                // a row is the same alone and among others
                if count == 70 {
                    let alone = logits(&decoder, &tokens[..1]);
                    assert_eq!(alone, found[..config.vocab_size], "{}", weights.as_str());
                }
            }
        }
    }
}

#[test]
fn q4_k_holds_what_it_can_and_says_what_it_cannot() {
    for tied in [true, false] {
        let config = config(tied);
        let source = RandomSource::new(&config);
        let names = TensorNames::of(config.architecture);
        let of = |name: &str| WeightType::Q4K.of(&source, name, source.shape(name).unwrap()[1], name == names.head() || (tied && name == names.embedding()));
        assert_eq!(of(&names.q(0)).unwrap(), Held::Blocks(BlockType::Q4K));
        assert_eq!(of(&names.down(0)).unwrap(), Held::Blocks(BlockType::Q5_0), "320 columns");
        assert_eq!(of(&names.down(1)).unwrap(), Held::Blocks(BlockType::Q4K));
        assert_eq!(of(names.embedding()).unwrap(), Held::Blocks(if tied { BlockType::Q6K } else { BlockType::Q4K }));
        let warning = WeightType::Q4K.warning(&config, &source).unwrap().unwrap();
        assert!(warning.starts_with("1 matrices whose rows are no multiple of 256 weights are not in q4_k") && warning.contains("q5_0 0.1 MB"), "{warning}");
        assert_eq!(WeightType::Q8_0.warning(&config, &source).unwrap(), None);
        // the plan is what is loaded
        let decoder = Decoder::load(&config, &source, &Device::Cpu, WeightType::Q4K).unwrap();
        let held = WeightType::Q4K.of_all(&config, &source).unwrap();
        let all: usize = held.values().map(|(_, bytes)| bytes).sum();
        let embedding = if tied { 0 } else { Held::Blocks(BlockType::Q4K).bytes(301, 256) };
        assert_eq!(decoder.multiplied_bytes() + embedding, all);
        // 4.6 bits a weight, a head of 6.6 bits
        let weights: usize = config.block_parameters() + 301 * 256 * if tied { 1 } else { 2 };
        assert!(all * 8 < weights * 6, "{all} bytes of {weights} weights");
    }
}

#[test]
fn q4_k_is_refused_for_rows_that_no_block_divides() {
    let directory = tempfile::tempdir().unwrap();
    Model::random(Family::Llama, Size::SMALL, 1).write(directory.path());
    let (config, source) = open_weights(directory.path()).unwrap();
    let error = Decoder::load(&config, source.as_ref(), &Device::Cpu, WeightType::Q4K).unwrap_err().to_string();
    for part in ["model.safetensors", "expected rows of a multiple of 32 weights, which q4_k needs", "found rows of 48", "--dtype q8_0, f16 or bf16"] {
        assert!(error.contains(part), "{part:?} isn't in {error}");
    }
    assert!(Decoder::load(&config, source.as_ref(), &Device::Cpu, WeightType::Q8_0).is_ok());
    assert!(Decoder::load(&config, source.as_ref(), &Device::Cpu, DType::F16).is_ok());
}

#[test]
fn a_gguf_of_k_quants_is_held_as_it_is_stored() {
    let checkpoint = Checkpoint::open(Path::new(K_QUANTS)).unwrap();
    let (config, source) = (checkpoint.config(), checkpoint.source());
    assert!(source.keeps_types());
    let held = WeightType::Stored.of_all(config, source.as_ref()).unwrap();
    assert_eq!(held.iter().map(|(of, (tensors, _))| (*of, *tensors)).collect::<Vec<_>>(), [("q2_k", 1), ("q3_k", 1), ("q4_k", 3), ("q5_k", 1), ("q6_k", 3)]);
    // little more than in the file: the parts' scales are bytes, and rows come in sixteens
    let stored: u64 = source.names().iter().filter(|name| !name.contains("norm")).map(|name| source.stored(name).unwrap().bytes).sum();
    let bytes: usize = held.values().map(|(_, bytes)| bytes).sum();
    assert!(bytes as f64 <= 1.1 * stored as f64, "{bytes} for {stored}");
    let [blocks, exact] = [WeightType::Stored, DType::F32.into()].map(|weights| checkpoint.decoder(&Device::Cpu, weights).unwrap());
    for count in [1, 7, 70] {
        let tokens = tokens(count, config);
        let difference = relative(&logits(&exact, &tokens), &logits(&blocks, &tokens));
        assert!(difference > 0.0 && difference < 4e-2, "{count} tokens: {difference}");
        // the same numbers: what differs are activations in 8 bits
        assert!(relative(&logits(&plain(&blocks), &tokens), &logits(&exact, &tokens)) < 1e-5);
    }
    // half of the channels, and without a sub-block: views
    let shapes = config.layers.iter().map(|l| Gene { kv_groups: 1, ffn: l.shape.ffn / 2 }).collect();
    let pattern = Pattern::new(shapes, config).unwrap();
    let tokens = tokens(20, config);
    let views = [&blocks, &exact].map(|decoder| logits(&decoder.masked(&pattern).unwrap(), &tokens));
    assert!(relative(&views[1], &views[0]) < 4e-2);
}

#[test]
fn damaged_scales_of_blocks_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(K_QUANTS).unwrap();
    // the last tensor in the file: all of its end as not-a-number
    let end = bytes.len();
    bytes[end - 2_000..].fill(0xff);
    let file = directory.path().join("damaged.gguf");
    std::fs::write(&file, bytes).unwrap();
    let error = Checkpoint::open(&file).unwrap().decoder(&Device::Cpu, WeightType::Stored).unwrap_err().to_string();
    assert!(error.contains("damaged.gguf") && error.contains("NaN") && error.contains("damaged"), "{error}");
}

#[test]
fn keys_and_values_in_f16_change_logits_little() {
    let config = config(true);
    let decoder = Decoder::load(&config, &RandomSource::new(&config), &Device::Cpu, DType::F32).unwrap();
    let tokens = tokens(75, &config);
    let by = |dtype: DType| {
        let mut cache = FixedCache::new(&config, dtype, &Device::Cpu, &[tokens.len()]).unwrap();
        let mut found = Vec::new();
        for (past, len) in [(0, 70), (70, 4), (74, 1)] {
            let batch = decoder.batch(&[Span { past, len }]).unwrap();
            let hidden = decoder.forward(&tokens[past..past + len], &batch, &mut cache.of([0])).unwrap();
            found.extend(decoder.logits(&hidden).unwrap().to_vec2::<f32>().unwrap().concat());
        }
        found
    };
    let (exact, half) = (by(DType::F32), by(DType::F16));
    let difference = relative(&exact, &half);
    assert!(difference > 0.0 && difference < 1e-3, "{difference}");
}
