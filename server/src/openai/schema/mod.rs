//! What requests look like, for the OpenAPI document. Bodies are read field by field elsewhere, so that errors can name the field and say what was
//! expected; a test sees to it that what is read and what is described here are the same fields.

#![allow(dead_code, reason = "these types are described, never made")]

mod chat;
mod common;
mod messages;
mod responses;
mod text;

pub use chat::ChatCompletionRequest;
pub use messages::{CountTokensRequest, MessagesRequest};
pub use responses::ResponsesRequest;
pub use text::{CompletionRequest, DetokenizeRequest, TokenizeRequest};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::fields::Fields;
    use crate::openai::{chat_request, completion_request, messages as messages_api, responses as responses_api, tokenize};
    use evop_model::GenerationConfig;
    use serde_json::{Map, Value, json};
    use std::collections::BTreeSet;
    use utoipa::ToSchema;

    /// Names of a schema's fields, those of its flattened parts included.
    fn described<T: ToSchema>() -> BTreeSet<String> {
        let mut schemas = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut schemas);
        let schemas: Map<String, Value> = schemas.into_iter().map(|(name, schema)| (name, serde_json::to_value(schema).unwrap())).collect();
        let mut names = BTreeSet::new();
        collect(&schemas[T::name().as_ref()], &schemas, &mut names);
        names
    }

    fn collect(schema: &Value, schemas: &Map<String, Value>, names: &mut BTreeSet<String>) {
        if let Some(target) = schema["$ref"].as_str() {
            collect(&schemas[target.rsplit('/').next().unwrap()], schemas, names);
        }
        names.extend(schema["properties"].as_object().into_iter().flatten().map(|(name, _)| name.clone()));
        schema["allOf"].as_array().into_iter().flatten().for_each(|part| collect(part, schemas, names));
    }

    /// Names that a reader asks for, without those that it only refuses.
    fn read(body: &Value, reader: impl FnOnce(&Fields<'_>), refused: &[&str]) -> BTreeSet<String> {
        let fields = Fields::new(body.as_object().unwrap());
        reader(&fields);
        fields.asked().into_iter().filter(|name| !refused.contains(name)).map(str::to_string).collect()
    }

    #[test]
    fn the_fields_that_are_described_are_those_that_are_read() {
        let model = GenerationConfig::default();
        let unsupported: Vec<&str> = crate::openai::sampling::UNSUPPORTED.iter().map(|(name, _)| *name).collect();
        let refused = |more: &[&'static str]| [unsupported.as_slice(), more].concat();
        let messages = json!([{"role": "user", "content": "a"}]);
        let with_model = |mut names: BTreeSet<String>| {
            names.insert("model".into());
            names
        };
        let read_completion = |fields: &Fields<'_>| drop(completion_request::CompletionRequest::parse(fields, &model, 99).unwrap());
        assert_eq!(described::<CompletionRequest>(), with_model(read(&json!({"prompt": "a"}), read_completion, &refused(&[]))));
        let read_chat = |fields: &Fields<'_>| drop(chat_request::ChatRequest::parse(fields, &model, 99).unwrap());
        assert_eq!(described::<ChatCompletionRequest>(), with_model(read(&json!({"messages": messages}), read_chat, &refused(&["echo", "chat_template"]))));
        let read_response = |fields: &Fields<'_>| drop(responses_api::convert(fields).unwrap());
        let stateful = ["previous_response_id", "conversation", "background", "prompt"];
        assert_eq!(described::<ResponsesRequest>(), read(&json!({"input": "a"}), read_response, &stateful));
        let read_message = |fields: &Fields<'_>| drop(messages_api::convert(fields).unwrap());
        assert_eq!(described::<MessagesRequest>(), read(&json!({"messages": messages, "max_tokens": 1}), read_message, &[]));
        let read_count = |fields: &Fields<'_>| drop(messages_api::convert_prompt(fields).unwrap());
        assert!(read(&json!({"messages": messages}), read_count, &[]).is_superset(&described::<CountTokensRequest>()));
        let mut tokenized = BTreeSet::new();
        for body in [json!({"prompt": "a"}), json!({"messages": messages}), json!({"content": "a"})] {
            tokenized.extend(read(&body, |fields| drop(tokenize::Input::parse(fields).unwrap()), &["chat_template"]));
        }
        assert_eq!(described::<TokenizeRequest>(), with_model(tokenized));
    }
}
