//! The OpenAPI document as a page that people read.

use minijinja::value::Value as JinjaValue;
use minijinja::{AutoEscape, Environment, context};
use serde_json::{Map, Value};

/// A field of a body or of a type.
#[derive(Debug, Clone)]
struct Field {
    name: String,
    kind: Vec<Segment>,
    required: bool,
    description: String,
}

/// A piece of a type's description.
#[derive(Debug, Clone, PartialEq)]
struct Segment {
    text: String,
    /// It is the name of a type that the page describes.
    link: bool,
}

/// A type.
#[derive(Debug, Clone)]
struct Type {
    name: String,
    description: String,
    fields: Vec<Field>,
    /// What it may be, if it isn't one object.
    alternatives: Vec<Field>,
}

/// A path and a method.
#[derive(Debug, Clone)]
struct Endpoint {
    /// Its tag.
    group: String,
    method: String,
    path: String,
    summary: String,
    curl: String,
    fields: Vec<Field>,
    answers: Vec<Answer>,
}

/// What an endpoint may answer.
#[derive(Debug, Clone)]
struct Answer {
    status: String,
    description: String,
    /// Content types and what they hold.
    bodies: Vec<(String, Vec<Segment>)>,
}

impl From<Segment> for JinjaValue {
    fn from(Segment { text, link }: Segment) -> Self {
        context! { text, link }
    }
}

impl From<Field> for JinjaValue {
    fn from(Field { name, kind, required, description }: Field) -> Self {
        context! { name, kind, required, description }
    }
}

impl From<Type> for JinjaValue {
    fn from(Type { name, description, fields, alternatives }: Type) -> Self {
        context! { name, description, fields, alternatives }
    }
}

impl From<Endpoint> for JinjaValue {
    fn from(Endpoint { method, path, summary, curl, fields, answers, .. }: Endpoint) -> Self {
        context! { method, path, summary, curl, fields, answers }
    }
}

impl From<Answer> for JinjaValue {
    fn from(Answer { status, description, bodies }: Answer) -> Self {
        let bodies: Vec<JinjaValue> = bodies.into_iter().map(|(mime, kind)| context! { mime, kind }).collect();
        context! { status, description, bodies }
    }
}

/// Writes the page, with examples that ask `host`.
///
/// # Errors
/// What the template says; it is part of the binary.
pub fn render(document: &Value, host: &str) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("page", include_str!("page.html"))?;
    let endpoints: Vec<Endpoint> = endpoints(document, host);
    let group = |tag: &Value| {
        let name = text(tag, "name");
        let endpoints: Vec<Endpoint> = endpoints.iter().filter(|endpoint| endpoint.group == name).cloned().collect();
        context! { name, description => text(tag, "description"), endpoints }
    };
    let groups: Vec<JinjaValue> = list(&document["tags"]).map(group).collect();
    let types: Vec<Type> = entries(&document["components"]["schemas"]).map(|(name, schema)| type_of(document, name, schema)).collect();
    environment.get_template("page")?.render(context! {
        title => text(&document["info"], "title"),
        version => text(&document["info"], "version"),
        description => text(&document["info"], "description"),
        groups,
        types,
    })
}

fn endpoints(document: &Value, host: &str) -> Vec<Endpoint> {
    let operations = entries(&document["paths"]).flat_map(|(path, item)| entries(item).map(move |(method, operation)| (path, method, operation)));
    let endpoint = |(path, method, operation): (&String, &String, &Value)| {
        let body = resolved(document, &operation["requestBody"]["content"]["application/json"]["schema"]);
        let curl = match body.get("example") {
            // (an apostrophe would end the shell's string)
            Some(example) => format!("curl -s http://{host}{path} -d '{}'", example.to_string().replace('\'', "'\\''")),
            None => format!("curl -s http://{host}{path}"),
        };
        let summary = [text(operation, "summary"), text(operation, "description")].join(" ");
        let answers = entries(&operation["responses"]).map(|(status, answer)| Answer {
            status: status.clone(),
            description: text(answer, "description"),
            bodies: entries(&answer["content"]).map(|(mime, content)| (mime.clone(), kind(&content["schema"]))).collect(),
        });
        let group = operation["tags"][0].as_str().unwrap_or_default().to_string();
        let fields = fields(document, body);
        Endpoint { group, method: method.to_uppercase(), path: path.clone(), summary, curl, fields, answers: answers.collect() }
    };
    operations.map(endpoint).collect()
}

fn type_of(document: &Value, name: &str, schema: &Value) -> Type {
    let alternative = |schema: &Value| Field { name: String::new(), kind: kind(schema), required: true, description: text(schema, "description") };
    let alternatives = list(&schema["oneOf"]).filter(|schema| schema["type"] != "null").map(alternative);
    let mut alternatives: Vec<Field> = alternatives.collect();
    let fields = fields(document, schema);
    if alternatives.is_empty() && fields.is_empty() {
        alternatives.push(Field { description: String::new(), ..alternative(schema) });
    }
    Type { name: name.into(), description: text(schema, "description"), fields, alternatives }
}

/// Of an object, those of its parts included.
fn fields(document: &Value, schema: &Value) -> Vec<Field> {
    let schema = resolved(document, schema);
    let required: Vec<&str> = list(&schema["required"]).filter_map(Value::as_str).collect();
    let field = |(name, schema): (&String, &Value)| Field {
        name: name.clone(),
        kind: kind(schema),
        required: required.contains(&name.as_str()),
        description: text(schema, "description"),
    };
    let own = entries(&schema["properties"]).map(field);
    let mut all: Vec<Field> = own.chain(list(&schema["allOf"]).flat_map(|part| fields(document, part))).collect();
    // (what must be there first)
    all.sort_by_key(|field| !field.required);
    all
}

fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    schema["$ref"].as_str().and_then(|target| document.pointer(target.trim_start_matches('#'))).unwrap_or(schema)
}

/// What a schema allows, in words.
fn kind(schema: &Value) -> Vec<Segment> {
    let words = |text: String| vec![Segment { text, link: false }];
    if let Some(target) = schema["$ref"].as_str() {
        let name = target.rsplit('/').next().unwrap_or_default();
        return vec![Segment { text: name.into(), link: true }];
    }
    if schema["contentSchema"].is_object() {
        return joined([words("JSON".into()), kind(&schema["contentSchema"])].into_iter(), " of ");
    }
    if let Some(values) = schema["enum"].as_array() {
        return words(values.iter().map(Value::to_string).collect::<Vec<_>>().join(" or "));
    }
    for (keyword, between) in [("oneOf", " or "), ("anyOf", " or "), ("allOf", " with ")] {
        if schema[keyword].is_array() {
            return joined(list(&schema[keyword]).map(kind), between);
        }
    }
    let types: Vec<&str> = schema["type"].as_str().into_iter().chain(list(&schema["type"]).filter_map(Value::as_str)).collect();
    let one = |name: &&str| match *name {
        "array" => [words("list of ".into()), kind(&schema["items"])].into_iter().flatten().collect(),
        "object" if schema["properties"].is_object() => {
            let properties = entries(&schema["properties"]).map(|(name, schema)| [words(format!("{name}: ")), kind(schema)].into_iter().flatten().collect());
            [words("{".into()), joined(properties, ", "), words("}".into())].into_iter().flatten().collect()
        }
        "object" if schema["additionalProperties"].is_object() => {
            [words("object of ".into()), kind(&schema["additionalProperties"])].into_iter().flatten().collect()
        }
        name => words(name.into()),
    };
    if types.is_empty() { words("anything".into()) } else { joined(types.iter().map(one), " or ") }
}

fn joined(parts: impl Iterator<Item = Vec<Segment>>, between: &str) -> Vec<Segment> {
    let mut all = Vec::new();
    for part in parts {
        if !all.is_empty() {
            all.push(Segment { text: between.into(), link: false });
        }
        all.extend(part);
    }
    all
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(schema: &Value) -> String {
        kind(schema).into_iter().map(|segment| if segment.link { format!("<{}>", segment.text) } else { segment.text }).collect()
    }

    #[test]
    fn a_schema_is_said_in_words() {
        let tool = json!({"$ref": "#/components/schemas/Tool"});
        assert_eq!(words(&json!({"type": ["array", "null"], "items": tool})), "list of <Tool> or null");
        assert_eq!(words(&json!({"oneOf": [{"type": "null"}, {"enum": ["a", "b"]}]})), "null or \"a\" or \"b\"");
        assert_eq!(words(&json!({"type": "object", "properties": {"type": {"enum": ["text"]}, "of": tool}})), "{type: \"text\", of: <Tool>}");
        assert_eq!(words(&json!({"type": "object", "additionalProperties": {"type": "number"}})), "object of number");
        assert_eq!(words(&json!({"type": "string", "contentSchema": tool})), "JSON of <Tool>");
        assert_eq!(words(&json!({})), "anything");
    }

    #[test]
    fn a_page_has_endpoints_with_their_fields_and_examples_and_nothing_unescaped() {
        let document = json!({
            "info": {"title": "T"}, "tags": [{"name": "A"}],
            "paths": {"/a": {"post": {"tags": ["A"], "summary": "Does <it>.", "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Body"}}}},
                "responses": {"200": {"description": "Done.", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Part"}}}}}}}},
            "components": {"schemas": {
                "Body": {"allOf": [{"$ref": "#/components/schemas/Part"}, {"type": "object", "properties": {"two": {"type": "string"}}}], "example": {"two": "it's"}},
                "Part": {"type": "object", "required": ["one"], "properties": {"one": {"type": "integer", "description": "The first."}}}}}
        });
        let page = render(&document, "host:1").unwrap();
        for text in ["Does &lt;it&gt;.", "host:1", "The first.", "<a href=\"#Part\">Part</a>", ">two<"] {
            assert!(page.contains(text), "{text} is not in {page}");
        }
    }
}
