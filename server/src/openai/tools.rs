//! `tools` and `tool_choice`, and the grammar that makes a model call one of them.

use crate::openai::errors::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use evop_serving::{ChatRenderer, GrammarSource, Whitespace};
use serde_json::{Value, json};

/// Calls in one answer that is forced to call.
const MOST_FORCED_CALLS: usize = 16;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments.
    parameters: Value,
}

/// Who decides about calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// Nobody: there are none.
    None,
    /// The model.
    Auto,
    /// At least one is made.
    Required,
    /// This function is called.
    Named(String),
}

/// How calls are written in a model's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// Hermes' and Qwen's: `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`.
    Tagged,
    /// Llama 3's: `{"name": …, "parameters": {…}}` and nothing else.
    Bare,
}

impl CallFormat {
    /// What the template teaches; tagged if it says nothing of it.
    pub fn of(template: &ChatRenderer) -> Self {
        if template.mentions("tools") && template.mentions("\"parameters\"") && !template.mentions("<tool_call>") { Self::Bare } else { Self::Tagged }
    }
}

/// The tools of a request.
#[derive(Debug, Clone)]
pub struct Tools {
    /// As the request has them, for the template.
    raw: Value,
    functions: Vec<Function>,
    choice: ToolChoice,
    /// More than one call in an answer is wanted.
    pub parallel: bool,
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`; `None` if nothing is to be called.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn parse(fields: &Fields<'_>) -> Result<Option<Self>, ApiError> {
        let raw = fields.get("tools").cloned().unwrap_or(Value::Array(Vec::new()));
        let list = raw.as_array().ok_or_else(|| wrong_type("tools", "a list of tools", &raw))?;
        let functions = list.iter().enumerate().map(|(i, tool)| function(i, tool)).collect::<Result<Vec<_>, _>>()?;
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let choice = choice(fields, &functions)?;
        Ok((choice != ToolChoice::None).then_some(Self { raw, functions, choice, parallel }))
    }

    /// As the template takes them.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// The functions' names.
    pub fn names(&self) -> Vec<String> {
        self.functions.iter().map(|f| f.name.clone()).collect()
    }

    /// The model has no choice but to call.
    pub fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// A grammar of calls; with `answer`, a JSON schema, that may stand there instead.
    pub fn grammar(&self, format: CallFormat, answer: Option<&Value>) -> GrammarSource {
        let callable: Vec<&Function> = match &self.choice {
            ToolChoice::Named(name) => self.functions.iter().filter(|f| f.name == *name).collect(),
            _ => self.functions.iter().collect(),
        };
        let (arguments, before, after) = match format {
            CallFormat::Tagged => ("arguments", "<tool_call>\n", "\n</tool_call>"),
            CallFormat::Bare => ("parameters", "", ""),
        };
        let literal = |text: String| Value::from(text).to_string();
        let mut lark = String::from("start: calls");
        if answer.is_some() {
            lark += " | answer";
        }
        lark += "\ncalls: call";
        // a named function is called once, as OpenAI does; Llama 3 makes one call at a time
        let several = self.parallel && !matches!(self.choice, ToolChoice::Named(_)) && format == CallFormat::Tagged;
        if several {
            lark += &format!(" (\"\\n\" call){{0,{}}}", MOST_FORCED_CALLS - 1);
        }
        let rules: Vec<String> = (0..callable.len()).map(|i| format!("call{i}")).collect();
        lark += &format!("\ncall: {}\n", rules.join(" | "));
        for (i, function) in callable.into_iter().enumerate() {
            let begin = literal(format!("{before}{{\"name\": {}, \"{arguments}\": ", Value::from(function.name.as_str())));
            let end = literal(format!("}}{after}"));
            lark +=
                &format!("call{i}: {begin} arguments{i} {end}\narguments{i}: {}\n", GrammarSource::json_in_lark(&function.parameters, &Whitespace::OneLine));
        }
        if let Some(schema) = answer {
            lark += &format!("answer: {}\n", GrammarSource::json_in_lark(schema, &Whitespace::Bounded));
        }
        GrammarSource::Lark(lark)
    }
}

fn function(place: usize, tool: &Value) -> Result<Function, ApiError> {
    let path = format!("tools[{place}]");
    let object = tool.as_object().ok_or_else(|| wrong_type(&path, "an object with type and function", tool))?;
    if let Some(kind) = object.get("type").filter(|kind| **kind != "function") {
        return Err(ApiError::unsupported(format!("{path}.type"), format!("{path}.type: only \"function\" is supported, found {kind}")));
    }
    let function = object.get("function").unwrap_or(&Value::Null);
    let name = function.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let Some(name) = name else { return Err(wrong_type(&format!("{path}.function.name"), "a name", function.get("name").unwrap_or(&Value::Null))) };
    let parameters = match function.get("parameters").filter(|v| !v.is_null()) {
        None => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        Some(Value::Object(schema)) => {
            let mut schema = schema.clone();
            // arguments are an object, also where a schema doesn't say so
            if !["type", "$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| schema.contains_key(*key)) {
                schema.insert("type".into(), "object".into());
            }
            Value::Object(schema)
        }
        Some(other) => return Err(wrong_type(&format!("{path}.function.parameters"), "a JSON schema (an object)", other)),
    };
    Ok(Function { name: name.into(), parameters })
}

fn choice(fields: &Fields<'_>, functions: &[Function]) -> Result<ToolChoice, ApiError> {
    const EXPECTED: &str = "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let Some(value) = fields.get("tool_choice") else { return Ok(if functions.is_empty() { ToolChoice::None } else { ToolChoice::Auto }) };
    let named = value.pointer("/function/name").or_else(|| value.get("name")).and_then(Value::as_str);
    let choice = match (value.as_str(), named) {
        (Some("none"), _) => return Ok(ToolChoice::None),
        (Some("auto"), _) => return Ok(if functions.is_empty() { ToolChoice::None } else { ToolChoice::Auto }),
        (Some("required"), _) => ToolChoice::Required,
        (None, Some(name)) => ToolChoice::Named(name.into()),
        _ => return Err(fields.wrong("tool_choice", EXPECTED, value)),
    };
    match &choice {
        ToolChoice::Named(name) if functions.iter().all(|f| f.name != *name) => {
            Err(ApiError::invalid("tool_choice", format!("tool_choice: no function {name:?} is among the tools")))
        }
        _ if functions.is_empty() => Err(ApiError::invalid("tool_choice", "tool_choice: a call is asked for, but there are no tools to call")),
        _ => Ok(choice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &Value) -> Result<Option<Tools>, ApiError> {
        Tools::parse(&Fields::new(body.as_object().unwrap()))
    }

    fn param(body: &Value) -> String {
        parse(body).unwrap_err().to_json()["error"]["param"].as_str().unwrap().to_string()
    }

    fn with_choice(choice: &Value) -> Value {
        json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": choice})
    }

    #[test]
    fn tools_are_the_models_to_choose_unless_said_otherwise() {
        assert!(parse(&json!({})).unwrap().is_none());
        assert!(parse(&json!({"tools": []})).unwrap().is_none());
        assert_eq!(parse(&with_choice(&Value::Null)).unwrap().unwrap().choice, ToolChoice::Auto);
        assert!(parse(&with_choice(&json!("none"))).unwrap().is_none());
        assert!(parse(&with_choice(&json!("required"))).unwrap().unwrap().is_forced());
        let named = json!({"type": "function", "function": {"name": "f"}});
        assert_eq!(parse(&with_choice(&named)).unwrap().unwrap().choice, ToolChoice::Named("f".into()));
    }

    #[test]
    fn a_bad_tool_is_named_by_its_place() {
        assert_eq!(param(&json!({"tools": {"f": 1}})), "tools");
        assert_eq!(param(&json!({"tools": [1]})), "tools[0]");
        assert_eq!(param(&json!({"tools": [{"type": "custom"}]})), "tools[0].type");
        assert_eq!(param(&json!({"tools": [{"type": "function", "function": {}}]})), "tools[0].function.name");
        assert_eq!(param(&json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]})), "tools[0].function.parameters");
        for choice in [json!("maybe"), json!(1), json!({"type": "function"}), json!({"type": "function", "function": {"name": "g"}})] {
            assert_eq!(param(&with_choice(&choice)), "tool_choice");
        }
        assert_eq!(param(&json!({"tool_choice": "required"})), "tool_choice");
    }

    #[test]
    fn the_template_says_how_calls_are_written() {
        let format = |source: &str| {
            let template = evop_model::ChatTemplate { source: source.into(), bos_token: String::new(), eos_token: String::new() };
            CallFormat::of(&ChatRenderer::new(&template).unwrap())
        };
        assert_eq!(format("{% for t in tools %}{{ '\"parameters\": ' }}{% endfor %}"), CallFormat::Bare);
        assert_eq!(format("{% for t in tools %}<tool_call>{{ '\"parameters\": ' }}{% endfor %}"), CallFormat::Tagged);
        assert_eq!(format("{{ messages }}"), CallFormat::Tagged);
    }
}
