//! What the tests share: the bundled model, a little calibration text, small options.

use evop_model::{Checkpoint, DType, Decoder, Device};
use evop_pruning::calibration::CalibrationOptions;
use evop_pruning::checkpoint;
use evop_pruning::run::{self, Inputs, Outcome, PruneOptions, Run, Step};
use evop_pruning::search::{EvopOptions, SearchOptions, Space, Strategy};
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

pub fn options(strategy: Strategy, space: Space) -> PruneOptions {
    PruneOptions {
        space,
        sparsity: 0.25,
        search: SearchOptions { strategy, evop: EvopOptions { population: 20, generations: 15, ..Default::default() }, seed: 31 },
        calibration: CalibrationOptions { sequences: 3, sequence_length: 48, ..Default::default() },
        embedder: None,
        certify_up_to: 0,
        eval_window: 128,
    }
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
            calibration: None,
            eval_text: None,
            options: options.clone(),
            version: "test".into(),
        };
        run::begin(directory, &run, checkpoint.config())?;
    }
    let corpus = book("calibration.txt.gz", 200_000);
    let held_out = book("held-out.txt.gz", 20_000);
    let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &sha, decoder: &decoder, corpus: &corpus, held_out: Some(&held_out) };
    run::prune(directory, &inputs, on_step)
}
