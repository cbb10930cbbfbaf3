//! Shapes of known models, to be filled with random weights.

use anyhow::Result;
use clap::ValueEnum;
use evop_model::{Checkpoint, Config};
use serde_json::json;

/// What `--random` and `--model random:SHAPE` may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// SmolLM2-135M.
    #[value(name = "smollm-135m")]
    Smollm135m,
    /// Llama 3.2 1B.
    #[value(name = "llama-3.2-1b")]
    Llama1b,
    /// Llama 2 7B.
    #[value(name = "llama-7b")]
    Llama7b,
}

impl Shape {
    /// A model of random weights, whose tokens are words `t0`, `t1`, ….
    ///
    /// # Errors
    /// As [`Checkpoint::random`].
    pub fn checkpoint(self) -> Result<Checkpoint> {
        Ok(Checkpoint::random(&self.to_string(), self.config()?)?)
    }

    fn config(self) -> Result<Config> {
        // hidden size, MLP channels, layers, query heads, key/value heads, vocabulary, context, tied head
        let (hidden, ffn, layers, heads, groups, vocab, context, tied) = match self {
            Self::Smollm135m => (576, 1_536, 30, 9, 3, 49_152, 8_192, true),
            Self::Llama1b => (2_048, 8_192, 16, 32, 8, 128_256, 131_072, true),
            Self::Llama7b => (4_096, 11_008, 32, 32, 32, 32_000, 4_096, false),
        };
        let config = json!({
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": groups, "vocab_size": vocab, "max_position_embeddings": context, "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-5,
        });
        Ok(Config::from_json(&config.to_string(), "--random".as_ref())?)
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("", |value| value.get_name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_parameters_of_their_models() {
        let millions = |shape: Shape| shape.config().unwrap().parameters() / 100_000;
        assert_eq!([Shape::Smollm135m, Shape::Llama1b, Shape::Llama7b].map(millions), [1_345, 12_358, 67_384]);
        assert!(Shape::value_variants().iter().all(|s| s.config().is_ok()));
    }
}
