//! What partial widths mean over one copy of the weights: which units of a sub-block come first, and what makes up for the mean of those that go.

use crate::decoder::Decoder;
use crate::ordered_source::OrderedSource;
use crate::pattern::Pattern;
use crate::source::{Source, TensorNames, bias_of};
use crate::sub_block::expand;
use crate::{Config, Error, Result};
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Orders of units and biases of partial widths, by sub-block (0: attention of layer 0, 1: its MLP, …). Several patterns share the weights of one model
/// only where they agree on both.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Widths {
    /// Units, the most important first.
    orders: BTreeMap<usize, Vec<u32>>,
    /// By sub-block and width the bias of its output layer, [hidden]; it stands in the place of the layer's own.
    biases: BTreeMap<(usize, usize), Vec<f32>>,
}

impl Widths {
    /// Adds a sub-block: the order of its units, and the bias [hidden] of each partial width that has one.
    pub fn insert(&mut self, sub_block: usize, order: impl IntoIterator<Item = usize>, biases: impl IntoIterator<Item = (usize, Vec<f32>)>) {
        self.orders.insert(sub_block, order.into_iter().map(|unit| unit as u32).collect());
        self.biases.extend(biases.into_iter().map(|(width, bias)| ((sub_block, width), bias)));
    }

    /// Whether nothing is known of any sub-block.
    pub fn is_empty(&self) -> bool {
        self.orders.is_empty()
    }

    /// A safetensors file of it: `order.S`, u32 [units], and `bias.S.W`, f32 [hidden], of sub-block S at width W.
    ///
    /// # Errors
    /// [`Error::Candle`] when memory runs out.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(safetensors::serialize(self.tensors()?, None).map_err(candle_core::Error::from)?)
    }

    fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let orders = self.orders.iter().map(|(s, order)| Ok((format!("order.{s}"), Tensor::from_slice(order, order.len(), &Device::Cpu)?)));
        let biases = self.biases.iter().map(|((s, width), bias)| Ok((format!("bias.{s}.{width}"), Tensor::from_slice(bias, bias.len(), &Device::Cpu)?)));
        orders.chain(biases).collect()
    }

    /// Reads what [`Widths::to_bytes`] made.
    ///
    /// # Errors
    /// [`Error::Pattern`] with the file's name, when it can't be read or holds anything else than orders and biases of this model.
    pub fn read(file: &Path, parent: &Config) -> Result<Self> {
        let named = |why: String| Error::Pattern(format!("{}: {why}", file.display()));
        let tensors = candle_core::safetensors::load(file, &Device::Cpu).map_err(|e| named(e.to_string()))?;
        let mut widths = Self::default();
        for (name, tensor) in &tensors {
            widths.add(name, tensor, parent).map_err(|why| named(format!("tensor `{name}`: {why}")))?;
        }
        Ok(widths)
    }

    fn add(&mut self, name: &str, tensor: &Tensor, parent: &Config) -> std::result::Result<(), String> {
        let mut parts = name.split('.');
        let numbers: Option<(&str, usize, Option<usize>)> = (|| {
            let (kind, s) = (parts.next()?, parts.next()?.parse().ok()?);
            let width = parts.next().map(str::parse).transpose().ok()?;
            parts.next().is_none().then_some((kind, s, width))
        })();
        let units = |s: usize| Pattern::dense(parent).layers().get(s / 2).map_or(0, |gene| if s.is_multiple_of(2) { gene.kv_groups } else { gene.ffn });
        match numbers {
            Some(("order", s, None)) => {
                let order = tensor.to_vec1::<u32>().map_err(|e| e.to_string())?;
                let mut sorted = order.clone();
                sorted.sort_unstable();
                if !sorted.iter().copied().eq(0..units(s) as u32) || order.is_empty() {
                    return Err(format!("expected the numbers 0..{} in some order, found {}: it is of another model", units(s), order.len()));
                }
                self.orders.insert(s, order);
            }
            Some(("bias", s, Some(width))) if width > 0 && width < units(s) => {
                let bias = tensor.to_vec1::<f32>().map_err(|e| e.to_string())?;
                if bias.len() != parent.hidden_size || bias.iter().any(|b| !b.is_finite()) {
                    return Err(format!("expected {} finite numbers, found {} numbers", parent.hidden_size, bias.len()));
                }
                self.biases.insert((s, width), bias);
            }
            _ => return Err("expected `order.S` or `bias.S.W` of a sub-block and a width that the model has".into()),
        }
        Ok(())
    }

    /// Adds what another file says.
    ///
    /// # Errors
    /// [`Error::Pattern`] when the two disagree about a sub-block.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        let orders = other.orders.iter().find(|(s, order)| self.orders.get(s).is_some_and(|known| known != *order)).map(|(s, _)| *s);
        let biases = other.biases.iter().find(|(at, bias)| self.biases.get(at).is_some_and(|known| known != *bias)).map(|((s, _), _)| *s);
        if let Some(s) = orders.or(biases) {
            let what = if s.is_multiple_of(2) { "attention" } else { "MLP" };
            return Err(Error::Pattern(format!(
                "the {what} of layer {} is in another order, or has another bias, than a form before asks for, and both can't be had of one copy of the weights: \
                 search all forms over one level database (evop prune --preset elastic --levels DIR, with the same calibration)",
                s / 2
            )));
        }
        self.orders.extend(other.orders);
        self.biases.extend(other.biases);
        Ok(())
    }

    /// The first sub-block of which a pattern keeps a part in an order that isn't known.
    pub fn missing(&self, pattern: &Pattern, parent: &Config) -> Option<usize> {
        partial(pattern, parent).find(|s| !self.orders.contains_key(s))
    }

    /// What of it a pattern makes use of.
    #[must_use]
    pub fn used_by(mut self, pattern: &Pattern, parent: &Config) -> Self {
        let partial: Vec<usize> = partial(pattern, parent).collect();
        self.orders.retain(|s, _| partial.contains(s));
        self.biases.retain(|(s, _), _| partial.contains(s));
        self
    }

    /// A pattern's decoder over `parent`, whose units are in this order: views, and the biases of its partial widths.
    ///
    /// # Errors
    /// As [`Decoder::masked`].
    pub fn masked(&self, parent: &Decoder, pattern: &Pattern) -> Result<Decoder> {
        let masked = parent.masked(pattern)?;
        let biased = |s: usize| -> Result<_> {
            let Some(block) = masked.sub_block(s) else { return Ok(None) };
            let Some(bias) = self.biases.get(&(s, block.width())) else { return Ok(Some(block.clone())) };
            let bias = Tensor::from_slice(bias, bias.len(), parent.device())?.to_dtype(parent.dtype())?;
            Ok(Some(block.with_bias(bias)))
        };
        let blocks = (0..masked.last_boundary()).map(biased).collect::<Result<_>>()?;
        parent.with_sub_blocks(blocks)
    }

    /// `source` with every sub-block's units in this order: the same model, up to the rounding of sums in another order.
    pub fn ordered<'a>(&self, source: &'a dyn Source, config: &Config) -> OrderedSource<'a> {
        let names = TensorNames::of(config.architecture);
        let mut ordered = OrderedSource::new(source);
        for (s, order) in &self.orders {
            let (l, order) = (s / 2, order.iter().map(|unit| *unit as usize).collect::<Vec<_>>());
            let (head, group) = (config.head_dim, config.layers[l].shape.group_size * config.head_dim);
            let (rows, columns) = if s.is_multiple_of(2) {
                (vec![(names.q(l), group), (names.k(l), head), (names.v(l), head)], (names.o(l), group))
            } else {
                (vec![(names.gate(l), 1), (names.up(l), 1)], (names.down(l), 1))
            };
            for (name, per_unit) in rows {
                ordered.rows(bias_of(&name), expand(&order, per_unit));
                ordered.rows(name, expand(&order, per_unit));
            }
            ordered.columns(columns.0, expand(&order, columns.1));
        }
        ordered
    }
}

/// The sub-blocks of which a pattern keeps a part.
fn partial(pattern: &Pattern, parent: &Config) -> impl Iterator<Item = usize> {
    let dense = Pattern::dense(parent);
    (0..2 * parent.num_layers()).filter(move |s| pattern.keeps(*s) && pattern.width(*s) < dense.width(*s))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checkpoint, DType, Gene, NoCache, Span, WeightType};

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny");

    fn checkpoint() -> Checkpoint {
        Checkpoint::open(Path::new(TINY)).unwrap()
    }

    /// Units of two sub-blocks backwards, with a bias for one of their partial widths.
    fn backwards(config: &Config) -> Widths {
        let mut widths = Widths::default();
        widths.insert(2, (0..2).rev(), []);
        widths.insert(3, (0..384).rev(), [(128, vec![0.25; config.hidden_size])]);
        widths
    }

    fn logits(decoder: &Decoder) -> Vec<f32> {
        let tokens: Vec<u32> = (0..20).map(|i| i * 97 % 4_000).collect();
        let batch = decoder.batch(&[Span::prompt(20)]).unwrap();
        let hidden = decoder.forward(&tokens, &batch, &mut NoCache).unwrap();
        decoder.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn difference(a: &Decoder, b: &Decoder) -> f32 {
        logits(a).iter().zip(logits(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn an_order_changes_no_function_and_its_prefixes_are_the_units_that_it_names_first() {
        let checkpoint = checkpoint();
        let config = checkpoint.config();
        let widths = backwards(config);
        let source = widths.ordered(checkpoint.source().as_ref(), config);
        let dense = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
        let ordered = Decoder::load(config, &source, &Device::Cpu, DType::F32).unwrap();
        assert!(difference(&dense, &ordered) < 1e-3 && logits(&dense) != logits(&ordered));
        for held in [WeightType::Q8_0, WeightType::Stored] {
            let (plain, ordered) = (checkpoint.decoder(&Device::Cpu, held).unwrap(), Decoder::load(config, &source, &Device::Cpu, held).unwrap());
            assert!(difference(&plain, &ordered) < 0.5, "{held:?}");
        }

        let mut genes = Pattern::dense(config).layers().to_vec();
        genes[1] = Gene { kv_groups: 1, ffn: 128 };
        let pattern = Pattern::new(genes, config).unwrap();
        let form = widths.masked(&ordered, &pattern).unwrap();
        let block = |s: usize, order: Vec<usize>| dense.sub_block(s).unwrap().reordered(&order).unwrap();
        let mut blocks: Vec<_> = (0..dense.last_boundary()).map(|s| dense.sub_block(s).cloned()).collect();
        blocks[2] = Some(block(2, vec![1]));
        blocks[3] = Some(block(3, (256..384).rev().collect()).with_bias(Tensor::full(0.25f32, config.hidden_size, &Device::Cpu).unwrap()));
        assert!(difference(&form, &dense.with_sub_blocks(blocks).unwrap()) < 1e-4);
        assert_eq!(widths.missing(&pattern, config), None);
        assert_eq!(Widths::default().missing(&pattern, config), Some(2));
    }

    #[test]
    fn a_file_comes_back_and_one_that_is_of_another_model_says_so() {
        let checkpoint = checkpoint();
        let config = checkpoint.config();
        let widths = backwards(config);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("widths.safetensors");
        let found = |tensors: &HashMap<String, Tensor>| {
            candle_core::safetensors::save(tensors, &file).unwrap();
            Widths::read(&file, config).unwrap_err().to_string()
        };
        std::fs::write(&file, widths.to_bytes().unwrap()).unwrap();
        assert_eq!(Widths::read(&file, config).unwrap(), widths);
        let with = |name: &str, tensor: Tensor| {
            let mut tensors = widths.tensors().unwrap();
            tensors.insert(name.into(), tensor);
            found(&tensors)
        };
        let numbers = |count: usize| Tensor::arange(0u32, count as u32, &Device::Cpu).unwrap();
        let bias = |count: usize, value: f32| Tensor::full(value, count, &Device::Cpu).unwrap();
        assert!(with("order.5", numbers(383)).contains("expected the numbers 0..384"));
        assert!(with("order.24", numbers(384)).contains("expected the numbers 0..0"));
        assert!(with("bias.5.64", bias(3, 0.0)).contains("finite numbers, found 3"));
        assert!(with("bias.5.64", bias(config.hidden_size, f32::NAN)).contains("finite"));
        assert!(with("bias.5.384", bias(config.hidden_size, 0.0)).contains("`bias.5.384`"));
        assert!(with("other", numbers(3)).contains("expected `order.S`"));
        assert!(Widths::read(directory.path(), config).unwrap_err().to_string().contains(&directory.path().display().to_string()));

        let mut more = Widths::default();
        more.insert(5, 0..384, []);
        let mut both = widths.clone();
        both.merge(more).unwrap();
        both.merge(widths.clone()).unwrap();
        let mut other = Widths::default();
        other.insert(3, 0..384, []);
        assert!(both.merge(other).unwrap_err().to_string().contains("the MLP of layer 1"));
    }
}
