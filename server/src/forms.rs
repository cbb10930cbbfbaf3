//! Thinner forms of the model that is served, over its weights: what `--pattern`, `--auto` and `--speculate` ask for.

use crate::auto::{AUTO, Auto};
use crate::config::{FormFile, ServeConfig};
use crate::served::Form;
use anyhow::{Context, Result, bail};
use evop_model::{Config, Decoder, Elastic, Pattern, Tokenizer};
use evop_serving::Speculation;
use std::collections::HashSet;
use std::path::Path;

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

impl Forms {
    /// The model alone: a job's model has patterns of its own parent only.
    pub fn none(decoder: Decoder) -> Self {
        Self { model: decoder.into(), forms: Vec::new(), auto: None, speculation: None }
    }

    /// What the server was started with.
    ///
    /// # Errors
    /// A file or directory that can't be read or doesn't fit, two forms of one name, a drafter that isn't a form.
    pub fn of(decoder: Decoder, tokenizer: &Tokenizer, config: &ServeConfig) -> Result<Self> {
        let mut names = HashSet::new();
        if let Some(twice) = config.patterns.iter().find(|form| !names.insert(form.name.as_str())) {
            bail!("--pattern {}: two forms have this name", twice.name);
        }
        if config.elastic.is_some() && config.patterns.is_empty() {
            bail!("--elastic: there is no thinner form to change to; give at least one with --pattern FORM=FILE");
        }
        let read = |form: &FormFile| read(&form.file, decoder.config()).with_context(|| format!("--pattern {}", form.name));
        let mut patterns = config.patterns.iter().map(read).collect::<Result<Vec<_>>>()?;
        let named = |(form, pattern): (&FormFile, &Pattern)| Form { name: form.name.clone(), config: decoder.config().with_pattern(pattern) };
        let mut forms: Vec<Form> = config.patterns.iter().zip(&patterns).map(named).collect();
        let speculation = match &config.speculate {
            None => None,
            Some(name) => match forms.iter().position(|form| form.name == *name) {
                Some(form) => Some(Speculation { member: form + 1, most: config.speculate_tokens }),
                None => bail!("--speculate {name}: there is no such form; name one that --pattern {name}=FILE gives"),
            },
        };
        let mut auto = None;
        if let Some(directory) = &config.auto {
            let most = config.max_queue + config.max_concurrent;
            let read = Auto::read(directory, &decoder, tokenizer, forms.len() + 1, most);
            let (vote, clusters) = read.with_context(|| format!("--auto {}", directory.display()))?;
            let taken = |name: &str| names.contains(name);
            if let Some(name) = clusters.iter().map(|(name, _)| name.as_str()).chain([AUTO]).find(|name| taken(name)) {
                bail!("--pattern {name}: --auto has a form of this name; choose another");
            }
            forms.extend(clusters.iter().map(|(name, pattern)| Form { name: name.clone(), config: decoder.config().with_pattern(pattern) }));
            patterns.extend(clusters.into_iter().map(|(_, pattern)| pattern));
            auto = Some(vote);
        }
        Ok(Self { model: Elastic::new(decoder, &patterns)?, forms, auto, speculation })
    }
}

/// A pattern of whole sub-blocks, from its file.
fn read(file: &Path, parent: &Config) -> Result<Pattern> {
    whole_sub_blocks(Pattern::read(file, parent)?, parent)
}

/// The pattern, if it is one of whole sub-blocks.
///
/// # Errors
/// The layer that keeps a part of one.
pub fn whole_sub_blocks(pattern: Pattern, parent: &Config) -> Result<Pattern> {
    for (l, (gene, layer)) in pattern.layers().iter().zip(&parent.layers).enumerate() {
        let whole = |kept: usize, all: usize| kept == 0 || kept == all;
        if !whole(gene.kv_groups, layer.shape.kv_groups) || !whole(gene.ffn, layer.shape.ffn) {
            bail!(
                "layer {l} keeps a part of a sub-block ({} key/value groups, {} channels), and the weights that are served are in no order of importance: \
                 use a pattern of whole sub-blocks (evop prune --space block --compensation none --skip-compensation none)",
                gene.kv_groups,
                gene.ffn
            );
        }
    }
    Ok(pattern)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pattern_of_whole_sub_blocks_is_read_and_others_say_why_not() {
        let parent = Config::from_json(include_str!("../../models/tiny/config.json"), Path::new("config.json")).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let found = |genes: serde_json::Value| {
            std::fs::write(file.path(), genes.to_string()).unwrap();
            read(file.path(), &parent).map_err(|e| format!("{e:#}"))
        };
        let layers =
            |first: serde_json::Value| -> serde_json::Value { std::iter::once(first).chain((1..12).map(|_| json!({"kv_groups": 2, "ffn": 384}))).collect() };
        assert!(!found(layers(json!({"kv_groups": 0, "ffn": 384}))).unwrap().keeps(0));
        assert!(found(layers(json!({"kv_groups": 2, "ffn": 192}))).unwrap_err().contains("layer 0 keeps a part"));
        assert!(found(layers(json!({"kv_groups": 3, "ffn": 384}))).unwrap_err().contains("layer 0"));
        assert!(found(json!([])).unwrap_err().contains("expected 12 layers"));
        assert!(found(json!({"a": 1})).unwrap_err().contains("expected a list"));
    }
}
