//! Every dialect in which checkpoints say that their layers differ: the shapes come out right, and so do the logits.

use crate::fixtures::{Family, Model, Size, logits, pattern, per_layer_config, tokens};
use evop_model::{Config, LayerShape, Pattern, ShapeOrigin, TensorNames};
use serde_json::{Value, json};
use std::path::Path;

/// Loads the model that `pattern` leaves of `parent` under the dialect `fields`, and holds it against the masked parent.
fn same_as_masked(parent: &Model, pattern: &Pattern, fields: Value, origin: ShapeOrigin) {
    let loaded = parent.sliced(pattern).with(fields).load();
    let masked = parent.load().masked(pattern).unwrap();
    let shapes = |config: &Config| config.layers.iter().map(|l| l.shape).collect::<Vec<_>>();
    assert_eq!(shapes(loaded.config()), shapes(masked.config()));
    for (layer, declared) in loaded.config().layers.iter().enumerate() {
        assert!(declared.origin == origin || declared.origin == ShapeOrigin::Global, "layer {layer}: {:?}", declared.origin);
    }
    assert!(loaded.config().layers.iter().any(|l| l.origin == origin));
    assert_eq!(logits(&loaded, &tokens(23, 9)), logits(&masked, &tokens(23, 9)));
}

fn parse(fields: &Value) -> evop_model::Result<Config> {
    let model = Model::random(Family::Llama, Size::SMALL, 1).with(fields.clone());
    Config::from_json(&Value::Object(model.json).to_string(), Path::new("some/config.json"))
}

fn shape(kv_groups: usize, group_size: usize, ffn: usize) -> LayerShape {
    LayerShape { kv_groups, group_size, ffn }
}

#[test]
fn per_layer_config_with_skips_and_padded_keys() {
    let parent = Model::random(Family::Llama, Size { layers: 11, ..Size::SMALL }, 21);
    let whole = (2, 64);
    let kept = pattern(&parent.config(), [whole, whole, (0, 64), (2, 0), whole, (0, 0), whole, whole, whole, (2, 40), (2, 24)]);
    let overrides = json!({
        "02": {"skip": ["attention"]}, "03": {"skip": ["mlp"]}, "05": {"skip": ["attention", "mlp"]}, "09": {"intermediate_size": 40}, "10": {"intermediate_size": 24},
    });
    assert_eq!(per_layer_config(&parent.config(), &kept)["per_layer_config"], overrides);
    same_as_masked(&parent, &kept, json!({"per_layer_config": overrides, "allow_global_per_layer_attribute_access": true}), ShapeOrigin::PerLayerConfig);
    // transformers pads to the widest key that it has, and may not pad at all
    let unpadded = json!({
        "2": {"skip": ["attention"]}, "3": {"skip": ["mlp"]}, "5": {"skip": ["mlp", "attention"]}, "009": {"intermediate_size": 40}, "10": {"intermediate_size": 24},
    });
    same_as_masked(&parent, &kept, json!({"per_layer_config": unpadded}), ShapeOrigin::PerLayerConfig);
}

#[test]
fn per_layer_config_with_fewer_heads() {
    let parent = Model::random(Family::Qwen3, Size { kv_groups: 4, ..Size::SMALL }, 22);
    let kept = pattern(&parent.config(), [(4, 64), (1, 64), (2, 16), (3, 64)]);
    // where a family may say how many query heads are left
    let overrides = json!({
        "1": {"num_key_value_heads": 1, "num_attention_heads": 1}, "2": {"num_key_value_heads": 2, "num_attention_heads": 2, "intermediate_size": 16},
        "3": {"num_key_value_heads": 3, "num_attention_heads": 3},
    });
    same_as_masked(&parent, &kept, json!({"per_layer_config": overrides}), ShapeOrigin::PerLayerConfig);
    // where it may not (Llama), the group's size says so
    let parent = Model::random(Family::Llama, Size { hidden: 64, heads: 8, kv_groups: 4, ..Size::SMALL }, 22);
    let overrides = json!({"1": {"num_key_value_heads": 1}, "2": {"num_key_value_heads": 2, "intermediate_size": 16}, "3": {"num_key_value_heads": 3}});
    let fields = json!({"model_type": "evop_llama", "per_layer_config": overrides, "evop_group_size": 2});
    same_as_masked(&parent, &kept, fields, ShapeOrigin::PerLayerConfig);
    // without it, num_key_value_heads alone means fewer of them for as many query heads
    let config = parse(&json!({"per_layer_config": {"1": {"num_key_value_heads": 1}}})).unwrap();
    assert_eq!((config.layers[0].shape, config.layers[1].shape), (shape(2, 2, 64), shape(1, 4, 64)));
}

#[test]
fn per_layer_windows() {
    let config =
        parse(&json!({"model_type": "mistral", "sliding_window": 16, "per_layer_config": {"1": {"sliding_window": null}, "2": {"sliding_window": 8}}}))
            .unwrap();
    assert_eq!(config.layers.iter().map(|l| l.sliding_window).collect::<Vec<_>>(), [Some(16), None, Some(8), Some(16)]);
}

#[test]
fn nemotron_nas_block_configs() {
    // 2/3 . ffn_mult . hidden, up to a multiple of 256: 5.25 -> 168 -> 256, 8.01 -> 256.3 -> 256, 8.05 -> 257.6 -> 512, 16 -> 512
    let parent = Model::random(Family::Llama, Size { ffn: 512, layers: 6, ..Size::SMALL }, 23);
    let kept = pattern(&parent.config(), [(2, 256), (0, 256), (2, 512), (2, 0), (0, 0), (2, 40)]);
    let attention = json!({"n_heads_in_group": 2, "no_op": false, "replace_with_linear": false});
    let none = json!({"n_heads_in_group": null, "no_op": true, "replace_with_linear": false});
    let ffn = |mult: f64| json!({"ffn_mult": mult, "no_op": false, "replace_with_linear": false});
    let no_ffn = json!({"ffn_mult": null, "intermediate_size": null, "no_op": true, "replace_with_linear": false});
    let blocks = json!([
        {"attention": attention, "ffn": ffn(5.25)},
        {"attention": none, "ffn": ffn(8.01)},
        {"attention": attention, "ffn": ffn(8.05)},
        {"attention": attention, "ffn": no_ffn},
        {"attention": none, "ffn": no_ffn},
        {"attention": attention, "ffn": {"intermediate_size": 40, "ffn_mult": 1.25, "no_op": false}},
    ]);
    let fields = json!({
        "model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "intermediate_size": null, "num_key_value_heads": null, "block_configs": blocks,
    });
    same_as_masked(&parent, &kept, fields, ShapeOrigin::BlockConfigs);
}

#[test]
fn nemotron_nas_groups_share_the_same_query_heads() {
    // four query heads in every layer, over 4, 2 and 1 key/value heads
    let mut model = Model::random(Family::Llama, Size { kv_groups: 4, layers: 3, ..Size::SMALL }, 24);
    let names = TensorNames::of(model.config().architecture);
    for (layer, groups) in [(1, 2), (2, 1)] {
        model.rows(&names.k(layer), groups * 12);
        model.rows(&names.v(layer), groups * 12);
    }
    let block = |in_group: usize| json!({"attention": {"n_heads_in_group": in_group}, "ffn": {"intermediate_size": 64}});
    let nemotron = model.with(json!({"model_type": "nemotron-nas", "block_configs": [block(1), block(2), block(4)]})).load();
    let shapes: Vec<_> = nemotron.config().layers.iter().map(|l| l.shape).collect();
    assert_eq!(shapes, [shape(4, 1, 64), shape(2, 2, 64), shape(1, 4, 64)]);
    // the same model in transformers' words
    let overrides = json!({"1": {"num_key_value_heads": 2}, "2": {"num_key_value_heads": 1}});
    let per_layer = model.with(json!({"per_layer_config": overrides})).load();
    assert_eq!(logits(&nemotron, &tokens(15, 2)), logits(&per_layer, &tokens(15, 2)));
}

#[test]
fn puzzletron_block_configs() {
    let parent = Model::random(Family::Llama, Size::SMALL, 25);
    let kept = pattern(&parent.config(), [(2, 64), (0, 24), (1, 0), (0, 0)]);
    // the first format of NVIDIA's Model-Optimizer; it writes every field
    let attention = |n: Value| json!({"no_op": n.is_null(), "replace_with_linear": false, "sparsify": null, "weights_precision": "bf16", "num_key_value_heads": n, "llama4": null, "mamba": null});
    let ffn = |n: Value| json!({"no_op": n.is_null(), "replace_with_linear": false, "sparsify": null, "weights_precision": "bf16", "moe": null, "intermediate_size": n});
    let block = |groups: Value, channels: Value| json!({"attention": attention(groups), "ffn": ffn(channels), "parallel_blocks": null});
    let without_heads = pattern(&parent.config(), [(2, 64), (0, 24), (2, 0), (0, 0)]);
    let blocks = json!([block(json!(2), json!(64)), block(Value::Null, json!(24)), block(json!(2), Value::Null), block(Value::Null, Value::Null)]);
    same_as_masked(
        &parent,
        &without_heads,
        json!({"architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM", "block_configs": blocks}),
        ShapeOrigin::BlockConfigs,
    );
    // the second: a list of kinds, absent values inherited, absent kinds absent; it keeps `per_layer_config` beside it
    let blocks = json!([
        {"subblock_configs": [{"kind": "attention", "name": "attention", "no_op": false}, {"kind": "ffn", "name": "ffn", "no_op": false}]},
        {"subblock_configs": [{"kind": "attention", "name": "attention", "no_op": true}, {"kind": "ffn", "name": "ffn", "no_op": false, "intermediate_size": 24}]},
        {"subblock_configs": [
            {"kind": "attention", "name": "attention", "no_op": false, "num_kv_heads": 1, "num_query_heads": 2, "qk_head_dim": 12, "v_head_dim": 12, "k_eq_v": false},
        ]},
        {"subblock_configs": []},
    ]);
    same_as_masked(&parent, &kept, json!({"block_configs": blocks, "per_layer_config": {"1": {"skip": ["attention"]}}}), ShapeOrigin::BlockConfigs);

    let window =
        |size: Value| json!({"block_configs": vec![json!({"subblock_configs": [{"kind": "attention", "sliding_window_size": size}, {"kind": "ffn"}]}); 4]});
    let mistral = |size: Value| parse(&window(size)).unwrap().layers[3].sliding_window;
    assert_eq!((mistral(json!("full")), mistral(json!(9)), mistral(Value::Null)), (None, Some(9), None));
}

#[test]
fn lists_with_a_value_a_layer() {
    let parent = Model::random(Family::Qwen2, Size::SMALL, 26);
    let kept = pattern(&parent.config(), [(2, 64), (1, 24), (2, 1), (0, 40)]);
    same_as_masked(&parent, &kept, json!({"layer_inter_size": [64, 24, 1, 40], "layer_head_num": [4, 2, 4, 0]}), ShapeOrigin::PerLayerLists);
    let widths = pattern(&parent.config(), [(2, 64), (2, 24), (2, 1), (2, 0)]);
    same_as_masked(&parent, &widths, json!({"intermediate_size": [64, 24, 1, 0]}), ShapeOrigin::PerLayerLists);
    let config = parse(&json!({"num_key_value_heads": [4, 2, 1, 0]})).unwrap();
    assert_eq!(config.layers.iter().map(|l| l.shape).collect::<Vec<_>>(), [shape(4, 1, 64), shape(2, 2, 64), shape(1, 4, 64), shape(0, 0, 64)]);
}

#[test]
fn a_plain_config_and_smaller_tensors() {
    for family in [Family::Llama, Family::Qwen2, Family::Opt] {
        let parent = Model::random(family, Size { kv_groups: 4, ..Size::SMALL }, 27);
        let kept = pattern(&parent.config(), [(4, 64), (3, 64), (0, 37), (1, 0)]);
        same_as_masked(&parent, &kept, json!({}), ShapeOrigin::Tensors);
    }
}

/// Both sides, and which layer.
fn contradiction(model: &Model, parts: &[&str]) {
    let error = model.try_load().unwrap_err().to_string();
    for part in ["config.json", "the config says", "the tensors have"].iter().chain(parts) {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn a_config_that_contradicts_the_tensors_is_an_error_that_shows_both() {
    let parent = Model::random(Family::Llama, Size::SMALL, 28);
    let narrow = parent.sliced(&pattern(&parent.config(), [(2, 64), (2, 24), (2, 64), (2, 64)]));
    contradiction(&narrow.with(json!({"per_layer_config": {"1": {"intermediate_size": 40}}})), &["layer 1", "40 MLP channels", "24 MLP channels"]);
    contradiction(&narrow.with(json!({"intermediate_size": [64, 25, 64, 64]})), &["layer 1", "25 MLP channels", "24 MLP channels"]);
    contradiction(
        &parent.with(json!({"per_layer_config": {"2": {"skip": ["attention"]}}})),
        &["layer 2", "0 key/value heads", "2 key/value heads of 2 query heads each"],
    );
    contradiction(
        &parent.with(json!({"per_layer_config": {"3": {"num_key_value_heads": 1}}})),
        &["layer 3", "1 key/value heads of 4", "2 key/value heads of 2"],
    );
    let block = json!({"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}});
    contradiction(&parent.with(json!({"model_type": "nemotron-nas", "block_configs": vec![block; 4]})), &["layer 0", "256 MLP channels", "64 MLP channels"]);
    // a plain config is silent about what is missing, but not about what is wider than it says
    contradiction(&parent.with(json!({"intermediate_size": 48})), &["layer 0", "48 MLP channels", "64 MLP channels"]);
    contradiction(&parent.with(json!({"num_key_value_heads": 1})), &["layer 0", "1 key/value heads of 4", "2 key/value heads of 2"]);
}

#[test]
fn tensors_that_contradict_each_other_are_an_error() {
    let parent = Model::random(Family::Llama, Size::SMALL, 29);
    let names = TensorNames::of(parent.config().architecture);
    let fails = |change: &dyn Fn(&mut Model), parts: &[&str]| {
        let mut model = parent.clone();
        change(&mut model);
        let error = model.try_load().unwrap_err().to_string();
        for part in ["model.safetensors"].iter().chain(parts) {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    };
    fails(&|m| m.rows(&names.up(1), 32), &["layers.1.mlp.up_proj", "expected shape [64, 48]", "found shape [32, 48]"]);
    fails(&|m| m.columns(&names.down(1), 32), &["layers.1.mlp.down_proj", "expected shape [48, 64]", "found shape [48, 32]"]);
    fails(&|m| m.rows(&names.v(2), 12), &["layers.2.self_attn.v_proj", "expected shape [24, 48]", "found shape [12, 48]"]);
    fails(&|m| m.rows(&names.k(2), 13), &["layers.2.self_attn.k_proj", "head_dim 12", "13 rows"]);
    fails(&|m| drop(m.tensors.remove(&names.o(0))), &["layers.0.self_attn.o_proj", "expected shape [48, 48]", "missing"]);
    fails(&|m| drop(m.tensors.remove(&names.gate(0))), &["layers.0.mlp.gate_proj", "missing"]);
    fails(&|m| drop(m.tensors.remove(&names.mlp_norm(0))), &["layers.0.post_attention_layernorm", "expected shape [48]", "missing"]);
}

#[test]
fn what_a_dialect_cannot_mean_is_an_error() {
    let block = |attention: Value, ffn: Value| json!({"block_configs": vec![json!({"attention": attention, "ffn": ffn}); 4]});
    let parts = |parts: Value| json!({"block_configs": vec![json!({"subblock_configs": parts}); 4]});
    for (fields, expected) in [
        (json!({"per_layer_config": [1]}), "`per_layer_config`: expected an object"),
        (json!({"per_layer_config": {"4": {}}}), "`per_layer_config.4`: expected a layer index below 4"),
        (json!({"per_layer_config": {"one": {}}}), "`per_layer_config.one`: expected a layer index below 4"),
        (json!({"per_layer_config": {"1": {}, "01": {}}}), "layer 1 is there twice"),
        (json!({"per_layer_config": {"1": 7}}), "`per_layer_config.1`: expected an object, found 7"),
        (json!({"per_layer_config": {"1": {"hidden_act": "gelu"}}}), "`hidden_act`, which can't differ between layers"),
        (json!({"per_layer_config": {"1": {"skip": "mlp"}}}), "`skip`: expected a list of \"attention\" and \"mlp\", found \"mlp\""),
        (json!({"per_layer_config": {"1": {"skip": ["norm"]}}}), "expected \"attention\" or \"mlp\", found \"norm\""),
        (json!({"per_layer_config": {"1": {"num_key_value_heads": 3}}}), "4 query heads can't be shared by 3 key/value heads"),
        (json!({"per_layer_config": {"1": {"intermediate_size": -1}}}), "`intermediate_size`: expected a whole number, found -1"),
        (json!({"intermediate_size": [64, 64]}), "`intermediate_size`: expected a list of 4 numbers"),
        (json!({"layer_inter_size": [64, 64, 64, "64"]}), "`layer_inter_size`: expected a list of whole numbers"),
        (json!({"layer_head_num": [4, 3, 4, 4]}), "`layer_head_num` of layer 1: 3 is not a multiple of the group size 2"),
        (json!({"model_type": "nemotron-nas"}), "`block_configs`: expected a list with one object a layer, found nothing"),
        (json!({"block_configs": [{}]}), "`block_configs`: expected 4 entries, found 1"),
        (json!({"block_configs": [1, 2, 3, 4]}), "`block_configs[0]`: expected an object, found 1"),
        (json!({"block_configs": [{}, {}, {}, {}]}), "`block_configs[0]`: expected an object `attention`"),
        (block(json!({"n_heads_in_group": 3}), json!({"no_op": true})), "expected a divisor of the 4 query heads, found 3"),
        (block(json!({"n_heads_in_group": 0}), json!({"no_op": true})), "expected a divisor of the 4 query heads, found 0"),
        (block(json!({"no_op": true, "replace_with_linear": true}), json!({"no_op": true})), "`replace_with_linear` is not supported"),
        (block(json!({"num_key_value_heads": 2, "mamba": {"state_dim": 16}}), json!({"no_op": true})), "`mamba` is not supported"),
        (block(json!({"no_op": true}), json!({})), "expected `intermediate_size`, `ffn_mult` or `no_op` in `ffn`"),
        (block(json!({"no_op": true}), json!({"ffn_mult": -1.0})), "`ffn_mult`: expected a number above 0, found -1"),
        (block(json!({"no_op": "yes"}), json!({"no_op": true})), "`no_op`: expected true or false, found \"yes\""),
        (parts(json!([{"kind": "moe", "num_experts": 8}])), "expected `kind` attention or ffn, found"),
        (parts(json!([{"kind": "ffn"}, {"kind": "ffn"}])), "expected one `ffn`, found several"),
        (parts(json!({"attention": {}})), "`subblock_configs`: expected a list"),
        (parts(json!([{"kind": "attention", "qk_head_dim": 6}])), "`qk_head_dim` other than the model's head_dim 12 is not supported"),
        (parts(json!([{"kind": "attention", "k_eq_v": true}])), "`k_eq_v` is not supported"),
    ] {
        let error = parse(&fields).map(|c| c.layers).unwrap_err().to_string();
        assert!(error.contains("some/config.json") && error.contains(expected), "{fields}: {error}");
    }
}
