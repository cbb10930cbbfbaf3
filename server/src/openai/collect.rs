//! A whole answer: everything that a generation makes, gathered by choice.

use crate::openai::errors::ApiError;
use crate::openai::generation::{Event, Generation, Token};
use crate::openai::sampling::AnswerOptions;
use crate::openai::types::{End, Usage};
use evop_serving::TokenLogprobs;

/// One choice, complete.
#[derive(Debug, Clone, Default)]
pub struct Collected {
    /// Text, after the prompt's if that was to be echoed.
    pub text: String,
    /// Tokens of an echoed prompt.
    pub echoed: Vec<Token>,
    /// Tokens that were made.
    pub tokens: Vec<Token>,
    /// How it ended.
    pub end: End,
    completion_tokens: usize,
}

impl Collected {
    /// Mean log probability a token, by which `best_of` chooses.
    fn quality(&self) -> f32 {
        let logprobs = self.tokens.iter().filter_map(|t| t.logprobs.as_ref()).map(|l| l.token.logprob);
        logprobs.sum::<f32>() / self.tokens.len().max(1) as f32
    }

    /// Ids of the tokens that were made.
    pub fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }
}

/// All choices of one prompt.
#[derive(Debug, Clone, Default)]
pub struct CollectedPrompt {
    /// The best n.
    pub choices: Vec<Collected>,
    /// If they were asked for.
    pub logprobs: Vec<Option<TokenLogprobs>>,
}

/// Reads a generation to its end.
///
/// # Errors
/// What ended it early.
pub async fn collect(generation: &mut Generation, prompts: usize, answer: &AnswerOptions) -> Result<(Vec<CollectedPrompt>, Usage), ApiError> {
    let mut choices = vec![Collected::default(); prompts * answer.best_of];
    let mut logprobs = vec![Vec::new(); prompts];
    while let Some(event) = generation.next().await {
        match event {
            Event::PromptLogprobs { prompt, logprobs: of_prompt } => logprobs[prompt] = of_prompt,
            Event::Echo { choice, text, tokens } => {
                choices[choice].text = text;
                choices[choice].echoed = tokens;
            }
            Event::Text { choice, text, tokens } => {
                choices[choice].text.push_str(&text);
                choices[choice].tokens.extend(tokens);
            }
            Event::Finished { choice, finish, completion_tokens } => {
                choices[choice].end = End::from(finish);
                choices[choice].completion_tokens = completion_tokens;
            }
            Event::Failed(error) => return Err(error),
        }
    }
    let usage = Usage::new(generation.prompt_tokens(), choices.iter().map(|c| c.completion_tokens).sum(), generation.cached_tokens());
    let mut choices = choices.into_iter();
    let of_prompt = |logprobs| CollectedPrompt { choices: best(choices.by_ref().take(answer.best_of).collect(), answer.n), logprobs };
    Ok((logprobs.into_iter().map(of_prompt).collect(), usage))
}

/// The best `n`, best first; all of them in their own order if that is how many there are.
fn best(mut choices: Vec<Collected>, n: usize) -> Vec<Collected> {
    if choices.len() > n {
        choices.sort_by(|a, b| b.quality().total_cmp(&a.quality()));
        choices.truncate(n);
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::*;
    use evop_serving::TokenLogprob;

    #[test]
    fn the_best_have_the_most_probable_tokens() {
        let choice = |text: &str, logprob: f32| {
            let token = TokenLogprob { id: 1, logprob };
            let tokens = vec![Token { id: 1, logprobs: Some(TokenLogprobs { token, rank: 1, top: vec![] }) }];
            Collected { text: text.into(), tokens, ..Collected::default() }
        };
        let choices = vec![choice("worst", -3.0), choice("best", -1.0), choice("middle", -2.0)];
        let texts: Vec<_> = best(choices.clone(), 2).into_iter().map(|c| c.text).collect();
        assert_eq!(texts, ["best", "middle"]);
        assert_eq!(best(choices, 3)[0].text, "worst");
    }
}
