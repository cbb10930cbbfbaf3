//! One choice of a chat as the client sees it: reasoning, content and tool calls, told apart while the text arrives.

use crate::openai::reasoning::{ReasoningSplitter, Split};
use crate::openai::tool_parser::{Part, ToolParser};
use crate::openai::tools::Tools;
use crate::openai::types::{CalledFunction, Delta, DeltaFunction, DeltaToolCall, End, Message, ToolCall};
use evop_serving::Thinking;

/// The role of everything that a model says.
pub const ASSISTANT: &str = "assistant";

/// How a choice's text is to be read.
#[derive(Debug, Clone)]
pub struct ChatOutputOptions {
    /// Whether it begins with reasoning.
    pub thinking: Thinking,
    /// What may be called in it: names, and whether more than one.
    pub tools: Option<(Vec<String>, bool)>,
    /// The client wants to see the reasoning.
    pub include_reasoning: bool,
}

impl ChatOutputOptions {
    /// For a request with these tools.
    pub fn new(thinking: Thinking, tools: Option<&Tools>, include_reasoning: bool) -> Self {
        Self { thinking, tools: tools.map(|tools| (tools.names(), tools.parallel)), include_reasoning }
    }
}

/// Reads one choice.
#[derive(Debug)]
pub struct ChatOutput {
    splitter: ReasoningSplitter,
    tools: Option<ToolParser>,
    include_reasoning: bool,
}

impl ChatOutput {
    /// Before its first token.
    pub fn new(options: &ChatOutputOptions) -> Self {
        let tools = options.tools.clone().map(|(names, parallel)| ToolParser::new(names, parallel));
        Self { splitter: ReasoningSplitter::new(options.thinking), tools, include_reasoning: options.include_reasoning }
    }

    /// What a piece of text adds to the message, in order.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        let split = self.splitter.push(text);
        self.deltas(split, false)
    }

    /// What comes next is still reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.splitter.is_inside()
    }

    /// What the end of the text adds.
    pub fn finish(&mut self) -> Vec<Delta> {
        let split = self.splitter.finish();
        self.deltas(split, true)
    }

    /// How it ended, given how its text ended.
    pub fn end(&self, mut end: End) -> End {
        if end.finish_reason == Some("stop") && self.tools.as_ref().is_some_and(|tools| tools.calls() > 0) {
            end.finish_reason = Some("tool_calls");
        }
        end
    }

    fn deltas(&mut self, split: Split, finish: bool) -> Vec<Delta> {
        let mut deltas = Vec::new();
        if !split.reasoning.is_empty() && self.include_reasoning {
            deltas.push(Delta { reasoning: Some(split.reasoning.clone()), reasoning_content: Some(split.reasoning), ..Delta::default() });
        }
        let parts = match &mut self.tools {
            None if split.answer.is_empty() => Vec::new(),
            None => vec![Part::Content(split.answer)],
            Some(tools) => {
                let mut parts = tools.push(&split.answer);
                if finish {
                    parts.extend(tools.finish());
                }
                parts
            }
        };
        deltas.extend(parts.into_iter().map(delta));
        deltas
    }
}

fn delta(part: Part) -> Delta {
    let call = match part {
        Part::Content(text) => return Delta { content: Some(text), ..Delta::default() },
        Part::Call { index, name } => {
            let id = format!("call_{}", &uuid::Uuid::new_v4().simple().to_string()[..24]);
            DeltaToolCall { index, id: Some(id), kind: Some("function"), function: DeltaFunction { name: Some(name), arguments: String::new() } }
        }
        Part::Arguments { index, text } => DeltaToolCall { index, id: None, kind: None, function: DeltaFunction { name: None, arguments: text } },
    };
    Delta { tool_calls: Some(vec![call]), ..Delta::default() }
}

/// The message of a whole text, and how it ended.
pub fn message(options: &ChatOutputOptions, text: &str, end: End) -> (Message, End) {
    let mut output = ChatOutput::new(options);
    let mut deltas = output.push(text);
    deltas.extend(output.finish());
    let (mut content, mut reasoning, mut tool_calls) = (String::new(), None, Vec::<ToolCall>::new());
    for delta in deltas {
        content.extend(delta.content);
        if let Some(text) = delta.reasoning {
            reasoning.get_or_insert_with(String::new).push_str(&text);
        }
        for DeltaToolCall { index, id, function, .. } in delta.tool_calls.into_iter().flatten() {
            match tool_calls.get_mut(index) {
                Some(call) => call.function.arguments.push_str(&function.arguments),
                None => tool_calls.push(ToolCall {
                    id: id.unwrap_or_default(),
                    kind: "function",
                    function: CalledFunction { name: function.name.unwrap_or_default(), arguments: function.arguments },
                }),
            }
        }
    }
    let nothing_said = content.is_empty() && (reasoning.is_some() || !tool_calls.is_empty());
    let message =
        Message { role: ASSISTANT, content: (!nothing_said).then_some(content), refusal: None, reasoning_content: reasoning.clone(), reasoning, tool_calls };
    (message, output.end(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stop() -> End {
        End { finish_reason: Some("stop"), stop_reason: None }
    }

    fn read(options: &ChatOutputOptions, text: &str) -> serde_json::Value {
        let (message, end) = message(options, text, stop());
        let mut value = serde_json::to_value(&message).unwrap();
        value["finish_reason"] = json!(end.finish_reason);
        for call in value.get_mut("tool_calls").and_then(|calls| calls.as_array_mut()).into_iter().flatten() {
            assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_") && id.len() == 29));
            call["id"] = json!("id");
        }
        value
    }

    #[test]
    fn plain_text_is_content_and_nothing_else() {
        let options = ChatOutputOptions { thinking: Thinking::Never, tools: None, include_reasoning: true };
        let plain = |text: &str| json!({"role": "assistant", "content": text, "refusal": null, "finish_reason": "stop"});
        assert_eq!(read(&options, "<tool_call>{}"), plain("<tool_call>{}"));
        assert_eq!(read(&options, ""), plain(""));
    }

    #[test]
    fn a_message_has_its_reasoning_its_calls_and_null_for_no_content() {
        let tools = Some((vec!["f".to_string()], true));
        let options = ChatOutputOptions { thinking: Thinking::Possible, tools, include_reasoning: true };
        let text = "<think>\nI call <tool_call>.\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
        let expected = json!({
            "role": "assistant", "content": null, "refusal": null, "reasoning": "I call <tool_call>.", "reasoning_content": "I call <tool_call>.",
            "tool_calls": [{"id": "id", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}], "finish_reason": "tool_calls"
        });
        assert_eq!(read(&options, text), expected);
        let silent = read(&ChatOutputOptions { include_reasoning: false, ..options }, "<think>x</think>y");
        assert_eq!(silent, json!({"role": "assistant", "content": "y", "refusal": null, "finish_reason": "stop"}));
    }

    #[test]
    fn a_choice_that_ran_out_of_tokens_says_so_although_it_called() {
        let options = ChatOutputOptions { thinking: Thinking::Never, tools: Some((vec!["f".into()], true)), include_reasoning: true };
        let cut = End { finish_reason: Some("length"), stop_reason: None };
        let (message, end) = message(&options, "{\"name\": \"f\", \"parameters\": {\"a", cut);
        assert_eq!((message.tool_calls[0].function.arguments.as_str(), end.finish_reason), ("{\"a", Some("length")));
    }
}
