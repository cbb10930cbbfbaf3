//! What a request says about the form of the output: `response_format` (OpenAI's) and `structured_outputs` (vLLM's).

use crate::openai::errors::ApiError;
use crate::openai::fields::Fields;
use crate::served::Served;
use evop_serving::{Grammar, GrammarSource, Thinking, Whitespace};
use serde_json::{Value, json};
use std::sync::Arc;

/// The fields of `structured_outputs` of which there must be one.
const KINDS: [&str; 5] = ["json", "regex", "choice", "grammar", "json_object"];

/// A grammar that is still to be compiled, and the field that it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Constraint {
    /// What the output must be like.
    pub source: GrammarSource,
    /// For errors.
    pub param: &'static str,
}

impl Constraint {
    /// Reads both fields.
    ///
    /// # Errors
    /// 400 that names the field; both at once are refused.
    pub fn parse(fields: &Fields<'_>) -> Result<Option<Self>, ApiError> {
        match (response_format(fields)?, structured_outputs(fields)?) {
            (Some(_), Some(_)) => Err(ApiError::invalid("structured_outputs", "structured_outputs: excludes a response_format other than text")),
            (format, outputs) => Ok(format.or(outputs)),
        }
    }

    /// Compiles it, without keeping other requests waiting.
    ///
    /// # Errors
    /// 400 with what is wrong with the schema or the grammar.
    pub async fn compile(&self, served: &Arc<Served>, thinking: Thinking) -> Result<Grammar, ApiError> {
        let (model, source) = (Arc::clone(served), self.source.clone());
        let task = tokio::task::spawn_blocking(move || model.compile(&source, thinking));
        let compiled = task.await.unwrap_or_else(|e| Err(format!("the compiler failed: {e}")));
        compiled.map_err(|message| ApiError::invalid(self.param, format!("{}: can't be compiled: {message}", self.param)))
    }
}

fn response_format(fields: &Fields<'_>) -> Result<Option<Constraint>, ApiError> {
    const PARAM: &str = "response_format";
    let Some(format) = fields.object(PARAM)? else { return Ok(None) };
    let schema = match format.string("type")? {
        None | Some("text") => return Ok(None),
        // llama-server takes a schema here too
        Some("json_object") => schema(&format, "schema")?.unwrap_or_else(|| json!({"type": "object"})),
        Some("json_schema") => {
            let outer =
                format.object("json_schema")?.ok_or_else(|| ApiError::invalid("response_format.json_schema", "response_format.json_schema is required"))?;
            // what is given is enforced, strict or not
            outer.string("name")?;
            outer.string("description")?;
            outer.bool("strict")?;
            outer.required("schema")?;
            schema(&outer, "schema")?.unwrap_or_default()
        }
        Some(other) => {
            return Err(ApiError::invalid(
                "response_format.type",
                format!("response_format.type: expected \"text\", \"json_object\" or \"json_schema\", found {other:?}"),
            ));
        }
    };
    Ok(Some(Constraint { source: GrammarSource::Json { schema, whitespace: Whitespace::Bounded }, param: PARAM }))
}

fn structured_outputs(fields: &Fields<'_>) -> Result<Option<Constraint>, ApiError> {
    const PARAM: &str = "structured_outputs";
    let Some(outputs) = fields.object(PARAM)? else { return Ok(None) };
    if outputs.get("structural_tag").is_some() {
        return Err(ApiError::unsupported("structured_outputs.structural_tag", "structured_outputs.structural_tag: not supported; use grammar"));
    }
    let json_object = outputs.bool("json_object")?.unwrap_or(false);
    let given: Vec<&str> = KINDS.into_iter().filter(|kind| outputs.get(kind).is_some() && (*kind != "json_object" || json_object)).collect();
    if given.len() > 1 {
        return Err(ApiError::invalid(PARAM, format!("structured_outputs: expected one of {}, found {}", KINDS.join(", "), given.join(" and "))));
    }
    let whitespace = match outputs.string("whitespace_pattern")? {
        _ if outputs.bool("disable_any_whitespace")?.unwrap_or(false) => Whitespace::None,
        Some(pattern) => Whitespace::Pattern(pattern.into()),
        None => Whitespace::Bounded,
    };
    let closed = outputs.bool("disable_additional_properties")?.unwrap_or(false);
    let source = match given.first() {
        None => return Ok(None),
        Some(&"json") => {
            let mut schema = schema(&outputs, "json")?.unwrap_or_default();
            if closed {
                close(&mut schema);
            }
            GrammarSource::Json { schema, whitespace }
        }
        Some(&"json_object") => GrammarSource::Json { schema: json!({"type": "object"}), whitespace },
        Some(&"regex") => GrammarSource::Regex(outputs.string("regex")?.unwrap_or_default().into()),
        Some(&"choice") => GrammarSource::Choice(choices(&outputs)?),
        Some(_) => GrammarSource::Lark(outputs.string("grammar")?.unwrap_or_default().into()),
    };
    Ok(Some(Constraint { source, param: PARAM }))
}

/// A JSON schema, as an object or as its text.
fn schema(fields: &Fields<'_>, name: &'static str) -> Result<Option<Value>, ApiError> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    let schema = match value {
        Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
        value => value.clone(),
    };
    if schema.is_object() { Ok(Some(schema)) } else { Err(fields.wrong(name, "a JSON schema (an object)", value)) }
}

fn choices(outputs: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let Some(value) = outputs.get("choice") else { return Ok(Vec::new()) };
    let texts = value.as_array().filter(|list| !list.is_empty()).and_then(|list| list.iter().map(|v| v.as_str().map(str::to_string)).collect());
    texts.ok_or_else(|| outputs.wrong("choice", "a list of at least one string", value))
}

/// Objects that say nothing of further properties have none.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            object.values_mut().for_each(close);
            if object.contains_key("properties") || object.get("type").is_some_and(|kind| kind == "object") {
                object.entry("additionalProperties").or_insert(Value::Bool(false));
            }
        }
        Value::Array(list) => list.iter_mut().for_each(close),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &Value) -> Result<Option<Constraint>, ApiError> {
        Constraint::parse(&Fields::new(body.as_object().unwrap()))
    }

    fn source(body: &Value) -> GrammarSource {
        parse(body).unwrap().unwrap().source
    }

    fn param(body: &Value) -> String {
        parse(body).unwrap_err().to_json()["error"]["param"].as_str().unwrap().to_string()
    }

    fn bounded(schema: Value) -> GrammarSource {
        GrammarSource::Json { schema, whitespace: Whitespace::Bounded }
    }

    #[test]
    fn a_response_format_is_text_or_json() {
        assert_eq!(parse(&json!({})).unwrap(), None);
        assert_eq!(parse(&json!({"response_format": {"type": "text"}})).unwrap(), None);
        assert_eq!(source(&json!({"response_format": {"type": "json_object"}})), bounded(json!({"type": "object"})));
        let schema = json!({"type": "string"});
        assert_eq!(
            source(&json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": true}}})),
            bounded(schema)
        );
        assert_eq!(param(&json!({"response_format": {"type": "xml"}})), "response_format.type");
        assert_eq!(param(&json!({"response_format": {"type": "json_schema"}})), "response_format.json_schema");
        assert_eq!(param(&json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s"}}})), "response_format.json_schema.schema");
        assert_eq!(param(&json!({"response_format": {"type": "json_schema", "json_schema": {"name": 7, "schema": {}}}})), "response_format.json_schema.name");
    }

    #[test]
    fn structured_outputs_are_of_one_kind() {
        let outputs = |value: Value| json!({"structured_outputs": value});
        assert_eq!(source(&outputs(json!({"regex": "a+"}))), GrammarSource::Regex("a+".into()));
        assert_eq!(source(&outputs(json!({"choice": ["a", "b"]}))), GrammarSource::Choice(vec!["a".into(), "b".into()]));
        assert_eq!(source(&outputs(json!({"grammar": "start: \"a\""}))), GrammarSource::Lark("start: \"a\"".into()));
        assert_eq!(source(&outputs(json!({"json_object": true}))), bounded(json!({"type": "object"})));
        assert_eq!(source(&outputs(json!({"json": "{\"type\": \"null\"}", "regex": null, "json_object": false}))), bounded(json!({"type": "null"})));
        assert_eq!(parse(&outputs(json!({}))).unwrap(), None);
        assert_eq!(param(&outputs(json!({"regex": "a", "choice": ["b"]}))), "structured_outputs");
        assert_eq!(param(&outputs(json!({"choice": []}))), "structured_outputs.choice");
        assert_eq!(param(&outputs(json!({"json": "{"}))), "structured_outputs.json");
        assert_eq!(param(&outputs(json!({"structural_tag": "x"}))), "structured_outputs.structural_tag");
        assert_eq!(param(&json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}})), "structured_outputs");
    }

    #[test]
    fn whitespace_and_further_properties_can_be_turned_off() {
        let body = json!({"structured_outputs": {"json": {"properties": {"a": {"type": "object"}}}, "disable_any_whitespace": true, "disable_additional_properties": true}});
        let closed = json!({"properties": {"a": {"type": "object", "additionalProperties": false}}, "additionalProperties": false});
        assert_eq!(source(&body), GrammarSource::Json { schema: closed, whitespace: Whitespace::None });
        let body = json!({"structured_outputs": {"json_object": true, "whitespace_pattern": " "}});
        assert_eq!(source(&body), GrammarSource::Json { schema: json!({"type": "object"}), whitespace: Whitespace::Pattern(" ".into()) });
    }
}
