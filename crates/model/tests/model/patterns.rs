//! A pattern means one thing: masked, sliced, cut into ranges, cached and batched give the same bits.
//!
//! Bit for bit, not nearly: the kernels sum in an order that the length of the sum alone decides, and a narrower width is a prefix of a wider one.

use crate::fixtures::{Family, Model, Size, VOCAB, logits, per_layer_config, rows, tokens};
use evop_model::{DType, Decoder, Device, FixedCache, Gene, NoCache, Pattern, ShapeOrigin, Span, Tensor};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A random model and a pattern for it.
#[derive(Debug, Clone)]
struct Case {
    model: Model,
    pattern: Pattern,
    seed: u64,
}

impl Case {
    fn masked(&self) -> Decoder {
        self.model.load().masked(&self.pattern).unwrap()
    }
}

prop_compose! {
    fn case()(
        family in prop::sample::select(&Family::ALL[..]),
        hidden in prop::sample::select(&[32usize, 40, 48, 64][..]),
        kv_groups in prop::sample::select(&[1usize, 2, 4][..]),
        ffn in 3usize..=96,
        genes in prop::collection::vec((0usize..=4, 0usize..=96), 1..=4),
        // whole sub-blocks kept or dropped are the common case, and drawing a width rarely gives them
        whole in prop::collection::vec(0usize..4, 4),
        seed in any::<u64>(),
    ) -> Case {
        let model = Model::random(family, Size { hidden, heads: 4, kv_groups, ffn, layers: genes.len() }, seed);
        let config = model.config();
        let gene = |((groups, channels), whole): (&(usize, usize), &usize)| {
            let shape = config.layers[0].shape;
            let kept = |drawn: usize, all: usize| match whole { 0 => 0, 1 => all, _ => drawn % (all + 1) };
            Gene { kv_groups: kept(*groups, shape.kv_groups), ffn: kept(*channels, shape.ffn) }
        };
        let pattern = Pattern::new(genes.iter().zip(&whole).map(gene).collect(), &config).unwrap();
        Case { model, pattern, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_masked_decoder_equals_the_sliced_checkpoint(case in case()) {
        let ids = tokens(19, case.seed);
        let masked = case.masked();
        let sliced = case.model.sliced(&case.pattern);

        let declared = sliced.with(per_layer_config(&case.model.config(), &case.pattern)).load();
        prop_assert_eq!(&declared.config().layers.iter().map(|l| l.shape).collect::<Vec<_>>(), &masked.config().layers.iter().map(|l| l.shape).collect::<Vec<_>>());
        prop_assert_eq!(declared.config().parameters(), masked.config().parameters());
        prop_assert_eq!(logits(&declared, &ids), logits(&masked, &ids));

        // the whole model's config: the tensors speak
        let undeclared = sliced.load();
        let dense = Pattern::dense(&case.model.config());
        for (layer, (kept, all)) in undeclared.config().layers.iter().zip(case.pattern.layers().iter().zip(dense.layers())) {
            prop_assert_eq!(layer.origin, if kept == all { ShapeOrigin::Global } else { ShapeOrigin::Tensors });
        }
        prop_assert_eq!(logits(&undeclared, &ids), logits(&masked, &ids));
    }

    #[test]
    fn ranges_compose_to_one_pass(case in case(), cuts in prop::collection::vec(0usize..=8, 0..=5)) {
        let (decoder, ids) = (case.masked(), tokens(17, case.seed));
        let last = decoder.last_boundary();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(last)).chain([0, last]).collect();
        cuts.sort_unstable();
        let batch = decoder.batch(&[Span::prompt(ids.len())]).unwrap();
        let mut hidden = decoder.embed(&ids, &batch).unwrap();
        for cut in cuts.windows(2) {
            hidden = decoder.forward_range(hidden, cut[0]..cut[1], &batch, &mut NoCache).unwrap();
        }
        prop_assert_eq!(rows(&hidden), rows(&decoder.forward(&ids, &batch, &mut NoCache).unwrap()));
    }

    #[test]
    fn cached_chunks_of_several_sequences_equal_each_sequence_alone(case in case(), lengths in prop::collection::vec(1usize..=40, 1..=4)) {
        let decoder = case.masked();
        let sequences: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(i, n)| tokens(*n, case.seed ^ i as u64)).collect();
        let chunked = in_chunks(&decoder, &sequences, &mut StdRng::seed_from_u64(case.seed));
        for (sequence, chunked) in sequences.iter().zip(chunked) {
            prop_assert_eq!(chunked, logits(&decoder, sequence));
        }
    }

    #[test]
    fn prompts_packed_in_one_pass_equal_each_alone(case in case(), lengths in prop::collection::vec(1usize..=33, 2..=4)) {
        let decoder = case.masked();
        let packed = tokens(lengths.iter().sum(), case.seed);
        let spans: Vec<Span> = lengths.iter().map(|n| Span::prompt(*n)).collect();
        let hidden = decoder.forward(&packed, &decoder.batch(&spans).unwrap(), &mut NoCache).unwrap();
        let mut together = rows(&decoder.logits(&hidden).unwrap()).into_iter();
        let mut start = 0;
        for n in lengths {
            let alone = logits(&decoder, &packed[start..start + n]);
            prop_assert_eq!(together.by_ref().take(n).collect::<Vec<_>>(), alone);
            start += n;
        }
    }

    #[test]
    fn a_model_without_any_sub_block_is_embedding_and_head(case in case()) {
        let decoder = case.model.load();
        let nothing = Pattern::new(vec![Gene { kv_groups: 0, ffn: 0 }; decoder.config().num_layers()], decoder.config()).unwrap();
        let ids = tokens(11, case.seed);
        let batch = decoder.batch(&[Span::prompt(ids.len())]).unwrap();
        let embedded = decoder.logits(&decoder.embed(&ids, &batch).unwrap()).unwrap();
        prop_assert_eq!(logits(&decoder.masked(&nothing).unwrap(), &ids), rows(&embedded));
        prop_assert_eq!(logits(&case.model.sliced(&nothing).load(), &ids), rows(&embedded));
    }

    #[test]
    fn masks_nest(case in case()) {
        // a mask of a mask is the mask: narrowing twice reads the same prefix
        let whole = case.model.load();
        let once = whole.masked(&case.pattern).unwrap();
        let without_first = case.pattern.without(0);
        let ids = tokens(9, case.seed);
        prop_assert_eq!(logits(&once.masked(&without_first).unwrap(), &ids), logits(&whole.masked(&without_first).unwrap(), &ids));
        prop_assert!(case.pattern.keeps(0) == (case.pattern.layers()[0].kv_groups > 0) && !without_first.keeps(0));
    }
}

/// All sequences through one batch cache, each a random number of tokens a step (large at first, then single ones); logits a sequence.
fn in_chunks(decoder: &Decoder, sequences: &[Vec<u32>], rng: &mut StdRng) -> Vec<Vec<Vec<f32>>> {
    let capacities: Vec<usize> = sequences.iter().map(Vec::len).collect();
    let mut cache = FixedCache::new(decoder.config(), DType::F32, &Device::Cpu, &capacities).unwrap();
    let mut done = vec![0; sequences.len()];
    let mut collected = vec![Vec::new(); sequences.len()];
    let mut step = 0;
    while done.iter().zip(sequences).any(|(n, s)| *n < s.len()) {
        let most = if step < 2 { 20 } else { 1 };
        let (mut spans, mut ids, mut taking) = (Vec::new(), Vec::new(), Vec::new());
        for (i, sequence) in sequences.iter().enumerate() {
            let len = rng.random_range(0..=most).min(sequence.len() - done[i]);
            if len > 0 {
                spans.push(Span { past: done[i], len });
                ids.extend_from_slice(&sequence[done[i]..done[i] + len]);
                taking.push(i);
            }
        }
        step += 1;
        if spans.is_empty() {
            continue;
        }
        let batch = decoder.batch(&spans).unwrap();
        let hidden = decoder.forward(&ids, &batch, &mut cache.of(taking.iter().copied())).unwrap();
        let mut logits = rows(&decoder.logits(&hidden).unwrap()).into_iter();
        for (i, span) in taking.iter().zip(&spans) {
            collected[*i].extend(logits.by_ref().take(span.len));
            done[*i] += span.len;
        }
    }
    collected
}

#[test]
fn a_cache_holds_only_the_attention_that_is_there() {
    let model = Model::random(Family::Llama, Size::SMALL, 3);
    let pattern = crate::fixtures::pattern(&model.config(), [(0, 64), (1, 0), (2, 64), (0, 0)]);
    let decoder = model.load().masked(&pattern).unwrap();
    let cache = FixedCache::new(decoder.config(), DType::F32, &Device::Cpu, &[100, 7]).unwrap();
    assert_eq!(decoder.config().kv_bytes_per_token(4), 2 * 3 * 12 * 4);
    // 100 tokens in four blocks of 32, 7 in one
    assert_eq!(cache.pool().bytes(), 5 * 32 * decoder.config().kv_bytes_per_token(4));
}

#[test]
fn what_does_not_fit_the_model_is_an_error() {
    let model = Model::random(Family::Llama, Size::SMALL, 5);
    let decoder = model.load();
    let full = Gene { kv_groups: 2, ffn: 64 };
    for (genes, expected) in [
        (vec![full; 3], "expected 4 layers, found 3"),
        (vec![full, full, Gene { kv_groups: 3, ffn: 1 }, full], "layer 2: expected at most 2 key/value groups"),
        (vec![full, Gene { kv_groups: 1, ffn: 65 }, full, full], "layer 1: expected at most 2 key/value groups and 64 channels, found 1 and 65"),
    ] {
        let error = Pattern::new(genes, decoder.config()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // made for another model: checked again where it is applied
    let wider = Model::random(Family::Llama, Size { ffn: 80, ..Size::SMALL }, 5);
    assert!(decoder.masked(&Pattern::dense(&wider.config())).is_err());

    let batch = decoder.batch(&[Span::prompt(2)]).unwrap();
    let error = decoder.forward(&[1, VOCAB as u32], &batch, &mut NoCache).unwrap_err().to_string();
    assert!(error.contains("token id 53 is beyond the vocabulary of 53"), "{error}");
    assert!(decoder.forward(&[1], &batch, &mut NoCache).is_err());
    let opt = Model::random(Family::Opt, Size::SMALL, 5).load();
    let error = opt.batch(&[Span { past: 250, len: 7 }]).unwrap_err().to_string();
    assert!(error.contains("position 256 is beyond the model's 256 learned positions"), "{error}");
    assert!(opt.batch(&[Span { past: 250, len: 6 }]).is_ok());

    // a cache that was made for the model without that attention
    let pruned = crate::fixtures::pattern(decoder.config(), [(2, 64), (0, 64), (2, 64), (2, 64)]);
    let mut cache = FixedCache::new(&decoder.config().with_pattern(&pruned), DType::F32, &Device::Cpu, &[8]).unwrap();
    let error = decoder.forward(&[1, 2], &batch, &mut cache.of([0])).unwrap_err().to_string();
    assert!(error.contains("no attention in layer 1"), "{error}");
}

#[test]
fn bf16_and_f16_weights_widen_exactly() {
    let model = Model::random(Family::Qwen2, Size::SMALL, 11);
    let ids = tokens(9, 1);
    for dtype in [DType::BF16, DType::F16] {
        let cast = |to: DType, from: &Model| {
            let mut model = from.clone();
            model.tensors.values_mut().for_each(|t: &mut Tensor| *t = t.to_dtype(to).unwrap());
            model
        };
        let narrow = cast(dtype, &model);
        assert_eq!(logits(&narrow.load(), &ids), logits(&cast(DType::F32, &narrow).load(), &ids));
    }
}
