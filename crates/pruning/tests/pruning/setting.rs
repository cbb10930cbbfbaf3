//! What the tests share: the bundled model, a little calibration text, small options.

use evop_model::{Checkpoint, DType, Decoder, Device, Pattern};
use evop_pruning::budget::Budget;
use evop_pruning::calibration::{CalibrationOptions, Corpus};
use evop_pruning::checkpoint::{self, Format};
use evop_pruning::evaluate::{Evaluator, Sample, Savings, Work};
use evop_pruning::levels::LevelOptions;
use evop_pruning::objective::{Aggregate, FitnessKind, Objective};
use evop_pruning::run::{self, Inputs, Outcome, PruneOptions, Run, Step};
use evop_pruning::search::{EvopOptions, JointOptions, ParetoOptions, SearchOptions, Strategy};
use evop_pruning::space::{Grid, SearchSpace, Space, SpaceOptions};
use evop_pruning::supernet::Supernet;
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn tiny() -> (Checkpoint, Decoder) {
    let checkpoint = Checkpoint::open(&root().join("models/tiny")).unwrap();
    let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
    (checkpoint, decoder)
}

/// The first `characters` of a bundled text.
pub fn book(name: &str, characters: usize) -> String {
    let file = std::fs::File::open(root().join("models/tiny").join(name)).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    text.chars().take(characters).collect()
}

pub fn corpus(text: &str) -> Vec<Corpus> {
    vec![Corpus { label: "text".into(), documents: vec![text.to_string()] }]
}

pub const NLL: Objective = Objective { kind: FitnessKind::Nll, aggregate: Aggregate::Mean, key_tokens: 0.0 };
pub const KL: Objective = Objective { kind: FitnessKind::Kl, aggregate: Aggregate::Mean, key_tokens: 0.0 };

pub fn space_options(space: Space, sparsity: f64) -> SpaceOptions {
    SpaceOptions {
        space,
        uniform: false,
        grid: Grid::default(),
        budgets: vec![Budget { resource: evop_pruning::budget::Resource::Params, keep: 1.0 - sparsity }],
    }
}

pub fn space(checkpoint: &Checkpoint, space: Space, sparsity: f64) -> SearchSpace {
    SearchSpace::new(checkpoint.config(), &space_options(space, sparsity), None).unwrap()
}

pub fn search_options(strategy: Strategy) -> SearchOptions {
    SearchOptions {
        strategy,
        joint: JointOptions { generations: 4, offspring: 8, ..Default::default() },
        evop: EvopOptions { population: 20, generations: 15, ..Default::default() },
        pareto: ParetoOptions { population: 12, generations: 3, ..Default::default() },
        pattern: None,
        evopress_generations: Some(3),
        evaluations: 100,
        seed: 31,
    }
}

pub fn options(strategy: Strategy, space: Space) -> PruneOptions {
    PruneOptions {
        space: space_options(space, 0.25),
        search: search_options(strategy),
        objective: Objective { kind: strategy.recipe().fitness, aggregate: Aggregate::Mean, key_tokens: 0.0 },
        levels: LevelOptions { skips: strategy.recipe().skips, ..Default::default() },
        calibration: CalibrationOptions { sequences: 4, sequence_length: 48, clusters: 4, statistics_tokens: 4096, held_out_tokens: 480, ..Default::default() },
        embedder: None,
        level_directory: None,
        savings: Savings::default(),
        per_cluster: false,
        certify_up_to: 0,
        eval_window: 128,
        format: Format::Hf,
    }
}

/// Three sequences of 64 tokens from two clusters.
pub fn samples() -> Vec<Sample> {
    let (checkpoint, _) = tiny();
    let tokens = checkpoint.encode(&book("calibration.txt.gz", 6_000), false).unwrap();
    tokens.chunks_exact(65).take(3).enumerate().map(|(i, tokens)| Sample { tokens: tokens.to_vec(), cluster: i % 2 }).collect()
}

pub fn evaluator<'a>(supernet: &'a Supernet, objective: Objective, savings: Savings) -> Evaluator<'a> {
    Evaluator::new(supernet, &samples(), objective, savings, HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap()
}

/// Patterns with drops and partial widths all over the model.
pub fn patterns(checkpoint: &Checkpoint, kind: Space) -> Vec<Pattern> {
    let space = space(checkpoint, kind, 0.25);
    let genome = |i: usize| (0..space.units()).map(|u| ((((u + 1) * 2_654_435_761 * (i + 3)) >> 13) % space.options(u)) as u8).collect::<Vec<_>>();
    (1..13).map(|i| space.pattern(&genome(i))).collect()
}

/// A run in a directory, begun or gone on with.
pub fn prune(directory: &Path, options: &PruneOptions, on_step: &mut dyn FnMut(Step) -> evop_pruning::Result<()>) -> evop_pruning::Result<Outcome> {
    let (checkpoint, decoder) = tiny();
    let sha = checkpoint::fingerprint(checkpoint.source().as_ref())?;
    if !directory.join("run.json").exists() {
        let run = Run {
            model: None,
            revision: None,
            model_sha256: sha.clone(),
            dtype: "f32".into(),
            calibration: vec![],
            calibration_set: None,
            eval_text: None,
            options: options.clone(),
            command: vec![],
            version: "test".into(),
        };
        run::begin(directory, &run, checkpoint.config())?;
    }
    let corpora = corpus(&book("calibration.txt.gz", 200_000));
    let held_out = book("held-out.txt.gz", 20_000);
    let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &sha, decoder: &decoder, corpora: &corpora, held_out: Some(&held_out) };
    run::prune(directory, &inputs, on_step)
}
