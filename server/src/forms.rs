//! Thinner forms of the model that is served, over its weights: what `--pattern`, `--auto` and `--speculate` ask for.

use crate::auto::{AUTO, Auto, Voters};
use crate::config::{FormFile, ServeConfig};
use crate::served::Form;
use anyhow::{Context, Result, bail};
use evop_model::{Config, Decoder, Elastic, Pattern, Widths};
use evop_pruning::run::{CLUSTERS, FRONT, WIDTHS};
use evop_serving::Speculation;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// The model with its forms, their names, and who drafts.
#[derive(Debug)]
pub struct Forms {
    /// Member 0 is the whole model.
    pub model: Elastic,
    /// The other members, in order.
    pub forms: Vec<Form>,
    /// The vote of `--auto`; its forms are the last ones.
    pub auto: Option<Auto>,
    /// From `--speculate`.
    pub speculation: Option<Speculation>,
}

/// What the server was told of forms, before there are weights.
#[derive(Debug, Default)]
pub struct Asked {
    names: Vec<String>,
    patterns: Vec<Pattern>,
    /// The order that the weights are to be loaded in, and what partial widths need besides.
    pub widths: Widths,
    voters: Option<Voters>,
    speculation: Option<Speculation>,
}

/// The options about forms that were given.
pub fn options(config: &ServeConfig) -> Vec<&'static str> {
    let options = [
        ("--pattern", !config.patterns.is_empty()),
        ("--auto", config.auto.is_some()),
        ("--speculate", config.speculate.is_some()),
        ("--elastic", config.elastic.is_some()),
    ];
    options.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
}

impl Asked {
    /// Reads the files of the forms.
    ///
    /// # Errors
    /// A file or directory that can't be read or doesn't fit, two forms of one name or in two orders of importance, a drafter that isn't a form.
    pub fn read(config: &ServeConfig, parent: &Config) -> Result<Self> {
        let mut names = HashSet::new();
        if let Some(twice) = config.patterns.iter().find(|form| !names.insert(form.name.as_str())) {
            bail!("--pattern {}: two forms have this name", twice.name);
        }
        if config.elastic.is_some() && config.patterns.is_empty() {
            bail!("--elastic: there is no thinner form to change to; give at least one with --pattern FORM=FILE");
        }
        let mut asked = Self::default();
        for form in &config.patterns {
            asked.add(form, parent).with_context(|| format!("--pattern {}", form.name))?;
        }
        asked.speculation = match &config.speculate {
            None => None,
            Some(name) => match asked.names.iter().position(|form| form == name) {
                Some(form) => Some(Speculation { member: form + 1, most: config.speculate_tokens, always: config.speculate_always }),
                None => bail!("--speculate {name}: there is no such form; name one that --pattern {name}=FILE gives"),
            },
        };
        if let Some(directory) = &config.auto {
            let most = config.max_queue + config.max_concurrent;
            asked.add_clusters(directory, parent, most).with_context(|| format!("--auto {}", directory.display()))?;
        }
        Ok(asked)
    }

    fn add(&mut self, form: &FormFile, parent: &Config) -> Result<()> {
        self.put(form.name.clone(), Pattern::read(&form.file, parent)?, &form.file, parent)
    }

    /// The forms of a run's clusters; `most` prompts may wait for their votes.
    fn add_clusters(&mut self, run: &Path, parent: &Config, most: usize) -> Result<()> {
        let (voters, clusters) = Voters::read(run, parent, self.names.len() + 1, most)?;
        if let Some(name) = clusters.iter().map(|(name, _)| name.as_str()).chain([AUTO]).find(|name| self.names.iter().any(|taken| taken == name)) {
            bail!("it has a form of this name too: choose another for --pattern {name}");
        }
        for (name, pattern) in clusters {
            let what = format!("{CLUSTERS}, {name}");
            self.put(name, pattern, &run.join(CLUSTERS), parent).context(what)?;
        }
        self.voters = Some(voters);
        Ok(())
    }

    /// One more form, whose pattern is from this file of its run.
    fn put(&mut self, name: String, pattern: Pattern, file: &Path, parent: &Config) -> Result<()> {
        let widths = match widths_of(file) {
            Some(file) => Widths::read(&file, parent)?,
            None => Widths::default(),
        };
        if let Some(s) = widths.missing(&pattern, parent) {
            bail!(
                "layer {} keeps a part of its {}, and no {WIDTHS} beside {} says in which order: its run repaired what is left, which makes other weights of it. \
                 Serve that run's checkpoint by itself, or make forms with evop prune --preset elastic",
                s / 2,
                if s.is_multiple_of(2) { "attention" } else { "MLP" },
                file.display()
            );
        }
        // (what a form doesn't need must not stand in the way of others)
        self.widths.merge(widths.used_by(&pattern, parent))?;
        self.names.push(name);
        self.patterns.push(pattern);
        Ok(())
    }

    /// The forms over a model that was loaded in the order of `widths`.
    ///
    /// # Errors
    /// A pattern that doesn't fit.
    pub fn over(self, decoder: Decoder) -> Result<Forms> {
        let named = |(name, pattern): (String, &Pattern)| Form { name, config: decoder.config().with_pattern(pattern) };
        let forms = self.names.into_iter().zip(&self.patterns).map(named).collect();
        let auto = self.voters.map(|voters| Auto::new(voters, decoder.clone()));
        Ok(Forms { model: Elastic::new(decoder, &self.patterns, &self.widths)?, forms, auto, speculation: self.speculation })
    }
}

/// The file that a run wrote about its widths, for a pattern of the run or of its front.
fn widths_of(pattern: &Path) -> Option<PathBuf> {
    let directory = pattern.parent()?;
    let run = if directory.file_name().is_some_and(|name| name == FRONT) { directory.parent()? } else { directory };
    Some(run.join(WIDTHS)).filter(|file| file.exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn patterns_are_read_and_what_they_need_of_widths_must_be_there() {
        let parent = Config::from_json(include_str!("../../models/tiny/config.json"), Path::new("config.json")).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        std::fs::create_dir_all(run.join(FRONT)).unwrap();
        let found = |place: &Path, genes: serde_json::Value| {
            std::fs::write(place, genes.to_string()).unwrap();
            let mut asked = Asked::default();
            asked.add(&FormFile { name: "a".into(), file: place.into() }, &parent).map(|()| asked).map_err(|e| format!("{e:#}"))
        };
        let layers =
            |first: serde_json::Value| -> serde_json::Value { std::iter::once(first).chain((1..12).map(|_| json!({"kv_groups": 2, "ffn": 384}))).collect() };
        let file = run.join("pattern.json");
        let whole = found(&file, layers(json!({"kv_groups": 0, "ffn": 384}))).unwrap();
        assert!(!whole.patterns[0].keeps(0) && whole.widths.is_empty());
        assert!(found(&file, layers(json!({"kv_groups": 3, "ffn": 384}))).unwrap_err().contains("layer 0"));
        assert!(found(&file, json!([])).unwrap_err().contains("expected 12 layers"));
        assert!(found(&file, json!({"a": 1})).unwrap_err().contains("expected a list"));

        let part = layers(json!({"kv_groups": 2, "ffn": 192}));
        let refused = found(&file, part.clone()).unwrap_err();
        assert!(refused.contains("layer 0 keeps a part of its MLP, and no widths.safetensors beside"), "{refused}");
        let mut widths = Widths::default();
        widths.insert(1, (0..384).rev(), [(192, vec![0.0; parent.hidden_size])]);
        widths.insert(3, 0..384, []);
        std::fs::write(run.join(WIDTHS), widths.to_bytes().unwrap()).unwrap();
        for place in [file, run.join(FRONT).join("0.6.json")] {
            let asked = found(&place, part.clone()).unwrap();
            assert!(asked.widths == widths.clone().used_by(&asked.patterns[0], &parent) && asked.widths != widths);
        }
        assert!(found(&directory.path().join("elsewhere.json"), part).is_err());
    }
}
