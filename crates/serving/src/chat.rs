//! Messages to prompt text, by the checkpoint's chat template.

use crate::jinja::{self, Raised};
use evop_model::ChatTemplate;
use minijinja::Environment;
use minijinja::value::Value as JinjaValue;
use serde_json::{Map, Value};

const NAME: &str = "chat_template";
/// Stands at the end of the message to be continued while the template renders; cut off with everything that follows.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Why a conversation can't be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The checkpoint's template is not valid Jinja.
    #[error("the chat template can't be parsed: {0}")]
    Template(String),
    /// The template refused the conversation by `raise_exception`.
    #[error("the chat template refused the conversation: {0}")]
    Refused(String),
    /// The template failed on the conversation.
    #[error("the chat template failed: {0}")]
    Render(String),
    /// The messages have no form that a template could take.
    #[error("{0}")]
    Messages(String),
}

/// One conversation to render.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// OpenAI's `messages`.
    pub messages: &'a Value,
    /// OpenAI's `tools`.
    pub tools: Option<&'a Value>,
    /// Documents for retrieval templates.
    pub documents: Option<&'a Value>,
    /// End with the opening of an assistant's message.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables (`chat_template_kwargs`).
    pub kwargs: Option<&'a Map<String, Value>>,
}

impl<'a> ChatInput<'a> {
    /// These messages, and the assistant's turn.
    pub fn new(messages: &'a Value) -> Self {
        Self { messages, tools: None, documents: None, add_generation_prompt: true, continue_final_message: false, kwargs: None }
    }
}

/// A chat template, parsed once.
#[derive(Debug)]
pub struct ChatRenderer {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatRenderer {
    /// Parses the template.
    ///
    /// # Errors
    /// [`ChatError::Template`] with the line.
    pub fn new(template: &ChatTemplate) -> Result<Self, ChatError> {
        let environment = jinja::environment(NAME, &template.source).map_err(|e| ChatError::Template(described(&e)))?;
        Ok(Self { environment, source: template.source.clone(), bos_token: template.bos_token.clone(), eos_token: template.eos_token.clone() })
    }

    /// Whether a word stands anywhere in the template: a hint of what it can do.
    pub fn mentions(&self, word: &str) -> bool {
        self.source.contains(word)
    }

    /// Renders a conversation to the prompt's text; special tokens stand in it as text.
    ///
    /// Text-only content parts become one string, and tool call arguments become objects, which is what templates expect.
    ///
    /// # Errors
    /// All but [`ChatError::Template`]: each is the request's (or the template's) fault, and says how.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String, ChatError> {
        let mut messages = normalised(input.messages)?;
        if input.continue_final_message {
            if input.add_generation_prompt {
                return Err(ChatError::Messages("continue_final_message and add_generation_prompt exclude each other".into()));
            }
            tag_final_message(&mut messages)?;
        }
        let optional = |value: Option<&Value>| value.map_or(JinjaValue::from(()), jinja::from_json);
        let mut variables: Vec<(&str, JinjaValue)> = vec![("bos_token", self.bos_token.as_str().into()), ("eos_token", self.eos_token.as_str().into())];
        variables.extend(input.kwargs.into_iter().flatten().map(|(name, value)| (name.as_str(), jinja::from_json(value))));
        variables.extend([
            ("messages", messages.iter().map(jinja::from_json).collect()),
            ("tools", optional(input.tools)),
            ("documents", optional(input.documents)),
            ("add_generation_prompt", input.add_generation_prompt.into()),
        ]);
        let template = self.environment.get_template(NAME).map_err(|e| render_error(&e))?;
        let text = template.render(JinjaValue::from_pairs(variables)).map_err(|e| render_error(&e))?;
        if input.continue_final_message { cut_at_tag(&text) } else { Ok(text) }
    }
}

fn render_error(error: &minijinja::Error) -> ChatError {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return ChatError::Refused(message.clone());
        }
        source = cause.source();
    }
    ChatError::Render(described(error))
}

fn described(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    error.line().map_or(what.clone(), |line| format!("line {line}: {what}"))
}

/// Messages in the form that templates are written for.
fn normalised(messages: &Value) -> Result<Vec<Value>, ChatError> {
    let Value::Array(messages) = messages else {
        return Err(ChatError::Messages("messages: expected a list".into()));
    };
    let mut messages = messages.clone();
    for (i, message) in messages.iter_mut().enumerate() {
        let Value::Object(message) = message else {
            return Err(ChatError::Messages(format!("messages[{i}]: expected an object")));
        };
        // as transformers does: templates handle a missing key, but write None for a null one
        message.retain(|_, value| !value.is_null());
        // clients send none beside calls, and many templates put a message together with `+`
        if message.contains_key("tool_calls") && !message.contains_key("content") {
            message.insert("content".into(), "".into());
        }
        if let Some(content) = message.get_mut("content")
            && let Value::Array(parts) = content
        {
            *content = Value::String(joined(parts).map_err(|part| ChatError::Messages(format!("messages[{i}].content[{part}]: expected a text part")))?);
        }
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(arguments) = call.pointer_mut("/function/arguments")
                && let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str)
            {
                *arguments = object;
            }
        }
        alias_reasoning(message);
    }
    Ok(messages)
}

/// An assistant's earlier reasoning, under the names that templates read.
fn alias_reasoning(message: &mut Map<String, Value>) {
    if let Some(reasoning) = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| message.get(*name)).cloned() {
        if !message.contains_key("thinking") {
            message.shift_insert(0, "thinking".into(), reasoning.clone());
        }
        message.insert("reasoning_content".into(), reasoning);
    }
}

/// The texts of content parts, or the place of the first part that has none.
fn joined(parts: &[Value]) -> Result<String, usize> {
    let text = |(i, part): (usize, &Value)| match part {
        Value::String(text) => Ok(text.clone()),
        part => part.get("text").and_then(Value::as_str).map(str::to_string).ok_or(i),
    };
    Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

fn tag_final_message(messages: &mut [Value]) -> Result<(), ChatError> {
    match messages.last_mut().and_then(|m| m.get_mut("content")) {
        Some(Value::String(content)) => content.push_str(CONTINUE_TAG),
        _ => return Err(ChatError::Messages("continue_final_message: the last message has no text to continue".into())),
    }
    Ok(())
}

fn cut_at_tag(text: &str) -> Result<String, ChatError> {
    let Some(at) = text.rfind(CONTINUE_TAG.trim_end()) else {
        return Err(ChatError::Render("continue_final_message: the template doesn't render the last message's text as it is".into()));
    };
    let (kept, rest) = text.split_at(at);
    // a template that trims messages trimmed the tag's space, and would have trimmed the message's own
    let kept = if rest.starts_with(CONTINUE_TAG) { kept } else { kept.trim_end() };
    Ok(kept.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn renderer(source: &str) -> ChatRenderer {
        let template = ChatTemplate { source: source.into(), bos_token: "<|begin_of_text|>".into(), eos_token: "<|end|>".into() };
        ChatRenderer::new(&template).unwrap()
    }

    fn tiny() -> ChatRenderer {
        let config: Value = serde_json::from_str(include_str!("../../../models/tiny/tokenizer_config.json")).unwrap();
        renderer(config["chat_template"].as_str().unwrap())
    }

    #[test]
    fn templates_render_as_transformers_renders_them() {
        let golden: Value = serde_json::from_str(include_str!("../tests/goldens/chat.json")).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let input = ChatInput {
                messages: &case["messages"],
                tools: Some(&case["tools"]).filter(|t| !t.is_null()),
                documents: None,
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
                continue_final_message: case["continue_final_message"].as_bool().unwrap(),
                kwargs: case["kwargs"].as_object(),
            };
            let text = renderer(case["template"].as_str().unwrap()).render(&input).unwrap();
            assert_eq!(text, case["text"].as_str().unwrap(), "{}", case["name"]);
        }
    }

    #[test]
    fn the_bundled_template_and_smollm2s_render_as_transformers_renders_them() {
        let smollm2 = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let tiny_golden = include_str!("../../../tests/goldens/tiny.json");
        let smollm2_golden = include_str!("../../../tests/goldens/smollm2.json");
        for (renderer, golden) in [(tiny(), tiny_golden), (renderer(smollm2), smollm2_golden)] {
            let golden: Value = serde_json::from_str(golden).unwrap();
            let chats = golden["chats"].as_array().unwrap();
            assert!(!chats.is_empty());
            for chat in chats {
                assert_eq!(renderer.render(&ChatInput::new(&chat["messages"])).unwrap(), chat["text"].as_str().unwrap());
            }
        }
    }

    #[test]
    fn text_parts_become_one_string() {
        let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        let text = json!([{"role": "user", "content": "a\nb"}]);
        assert_eq!(tiny().render(&ChatInput::new(&parts)), tiny().render(&ChatInput::new(&text)));
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]);
        let error = tiny().render(&ChatInput::new(&image)).unwrap_err();
        assert_eq!(error, ChatError::Messages("messages[0].content[0]: expected a text part".into()));
    }

    #[test]
    fn tool_call_arguments_given_as_openais_string_are_an_object_to_the_template_and_no_content_is_an_empty_one() {
        let renderer = renderer("{{ messages[0].tool_calls[0].function.arguments.city + messages[0].content }}");
        let messages = json!([{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{\"city\": \"Bern\"}"}}]}]);
        assert_eq!(renderer.render(&ChatInput::new(&messages)).unwrap(), "Bern");
    }

    #[test]
    fn a_template_can_refuse_and_its_words_come_through() {
        let renderer = renderer("{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}");
        let error = renderer.render(&ChatInput::new(&json!([{"role": "system", "content": ""}]))).unwrap_err();
        assert_eq!(error, ChatError::Refused("Roles must alternate".into()));
    }

    #[test]
    fn errors_say_where_and_nothing_panics() {
        let template = ChatTemplate { source: "a\n{% if %}".into(), bos_token: String::new(), eos_token: String::new() };
        assert!(ChatRenderer::new(&template).unwrap_err().to_string().contains("line 2"));
        let failing = renderer("\n{{ messages[0].content.nonsense() }}").render(&ChatInput::new(&json!([{"role": "user", "content": "x"}])));
        assert!(matches!(failing, Err(ChatError::Render(text)) if text.starts_with("line 2")));
        for messages in [json!("x"), json!([1]), json!({})] {
            assert!(matches!(tiny().render(&ChatInput::new(&messages)), Err(ChatError::Messages(_))));
        }
        let no_content = json!([{"role": "user"}]);
        assert!(matches!(tiny().render(&ChatInput::new(&no_content)), Err(ChatError::Render(_))));
        let continued = ChatInput { add_generation_prompt: false, continue_final_message: true, ..ChatInput::new(&no_content) };
        assert!(matches!(tiny().render(&continued), Err(ChatError::Messages(_))));
        let both = ChatInput { continue_final_message: true, ..ChatInput::new(&no_content) };
        assert!(matches!(tiny().render(&both), Err(ChatError::Messages(_))));
    }
}
