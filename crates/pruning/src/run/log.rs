//! `search.jsonl`: every evaluation and the work done, from which a stopped run goes on.

use crate::evaluate::Work;
use crate::{Error, Result, numbers};
use evop_model::{Config, Gene, Pattern};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A line of `search.jsonl`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LogLine {
    Evaluation {
        genes: Vec<Gene>,
        #[serde(deserialize_with = "numbers::numbers")]
        segments: Vec<f64>,
        /// Of one cluster's sequences.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cluster: Option<usize>,
    },
    Work {
        phase: Phase,
        work: Work,
        seconds: f64,
    },
}

/// Which part of a run did some work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    Search,
    Certificate,
    Clusters,
}

/// The append-only log of evaluations.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    evaluations: Vec<(Option<usize>, Vec<Gene>, Vec<f64>)>,
    /// By phase.
    pub work: [Work; 3],
    pub seconds: f64,
}

impl Log {
    /// Opens the log, dropping a last line that a kill cut short.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let mut log = Self { path: path.to_path_buf(), file, evaluations: Vec::new(), work: [Work::default(); 3], seconds: 0.0 };
        let mut reader = BufReader::new(File::open(path).map_err(io)?);
        let (mut whole, mut line, mut number) = (0u64, Vec::new(), 0);
        // the evaluations of a batch count once the batch's work line is there
        let mut batch = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io)? as u64;
            if read == 0 || line.last() != Some(&b'\n') {
                break;
            }
            number += 1;
            let parsed = serde_json::from_slice(&line);
            match parsed.map_err(|e| Error::RunDirectory { path: path.to_path_buf(), message: format!("line {number} is not what a run writes there: {e}") })? {
                LogLine::Evaluation { genes, segments, cluster } => batch.push((cluster, genes, segments)),
                LogLine::Work { phase, work, seconds } => {
                    log.evaluations.append(&mut batch);
                    log.work[phase as usize].add(work);
                    log.seconds += seconds;
                    whole = reader.stream_position().map_err(io)?;
                }
            }
        }
        log.file.set_len(whole).map_err(io)?;
        log.file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(log)
    }

    /// What was evaluated on the sequences of all clusters, or of one.
    pub fn known(&self, config: &Config, cluster: Option<usize>) -> Result<HashMap<Pattern, Vec<f64>>> {
        // a pattern that was evaluated on more tokens later has its longer list last
        let of_cluster = self.evaluations.iter().filter(|(of, _, _)| *of == cluster);
        of_cluster.map(|(_, genes, segments)| Ok((Pattern::new(genes.clone(), config)?, segments.clone()))).collect()
    }

    pub fn append(&mut self, results: &[(Pattern, Vec<f64>)], cluster: Option<usize>, phase: Phase, work: Work, seconds: f64) -> Result<()> {
        if results.is_empty() && work.block_forwards == 0 {
            return Ok(()); // a round made of known patterns only
        }
        let mut lines = Vec::new();
        let as_io = |e: serde_json::Error| std::io::Error::from(e);
        let mut append = || -> std::io::Result<()> {
            for (pattern, segments) in results {
                let line = LogLine::Evaluation { genes: pattern.layers().to_vec(), segments: segments.clone(), cluster };
                serde_json::to_writer(&mut lines, &line).map_err(as_io)?;
                lines.push(b'\n');
            }
            serde_json::to_writer(&mut lines, &LogLine::Work { phase, work, seconds }).map_err(as_io)?;
            lines.push(b'\n');
            self.file.write_all(&lines)?;
            self.file.sync_data()
        };
        append().map_err(|e| Error::io(&self.path, e))?;
        self.work[phase as usize].add(work);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_is_no_number_is_read_back_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("search.jsonl");
        let decoder = crate::testing::tiny();
        let dense = Pattern::dense(decoder.config());
        let work = Work { evaluated: 1, block_forwards: 24, ..Work::default() };
        let segments = vec![0.1 + 0.2, f64::NAN, f64::INFINITY];
        Log::open(&path).unwrap().append(&[(dense.clone(), segments)], None, Phase::Search, work, 1.5).unwrap();
        let known = Log::open(&path).unwrap().known(decoder.config(), None).unwrap();
        assert_eq!(known[&dense][0], 0.1 + 0.2);
        assert!(known[&dense].len() == 3 && known[&dense][1..].iter().all(|loss| loss.is_nan()), "{known:?}");
    }
}
