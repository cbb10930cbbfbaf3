#!/usr/bin/env python3
"""The Responses and the Messages endpoints of a running server, judged by the official `openai` and `anthropic` clients.

usage: other_apis.py [--base-url http://127.0.0.1:8000/v1] [--api-key KEY] [--model NAME] [--only WORD]

Every answer and every event of a stream is validated strictly against the client's own types, which the clients themselves don't do.
"""
import json
import sys

import anthropic
import openai
import pydantic
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent

from conformance import MESSAGES, check, main, raises, same

EVENTS, RAW_EVENTS = pydantic.TypeAdapter(ResponseStreamEvent), pydantic.TypeAdapter(RawMessageStreamEvent)
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Bern", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
RESPONSES_TOOL = {"type": "function", "name": "weather", "description": "The weather", "parameters": SCHEMA, "strict": True}
MESSAGES_TOOL = {"name": "weather", "description": "The weather", "input_schema": SCHEMA}


def respond(s, **options):
    return s.client.responses.create(model=s.model, **({"input": "Tell me about the sea.", "temperature": 0, "max_output_tokens": 24} | options))


def claude(s, key=None):
    return anthropic.Anthropic(base_url=s.base_url.removesuffix("/v1"), api_key=key or s.key or "none", max_retries=0, timeout=300)


def message(s, **options):
    return claude(s).messages.create(model=s.model, **({"messages": MESSAGES, "max_tokens": 24, "extra_body": {"temperature": 0}} | options))


def strict(model, value):
    """The same object, after seeing that it has every field that the client's type asks for."""
    model.model_validate(value.to_dict(mode="json"))
    return value


# --- responses

@check("a response is what chat answers")
def _(s):
    answer = strict(Response, respond(s, instructions="Be brief."))
    chat = s.chat([{"role": "system", "content": "Be brief."}, *MESSAGES], max_tokens=24)
    same(answer.output_text, chat.choices[0].message.content, "output_text")
    same((answer.usage.input_tokens, answer.usage.output_tokens), (chat.usage.prompt_tokens, chat.usage.completion_tokens), "usage")
    same(answer.status, {"length": "incomplete", "stop": "completed"}[chat.choices[0].finish_reason], "status")
    same(answer.to_dict()["store"], False, "store")


@check("a response's stream has the events in their order and adds up to the response")
def _(s):
    options = dict(extra_body={"ignore_eos": True})
    whole, events = respond(s, **options), list(respond(s, stream=True, **options))
    for event in events:
        EVENTS.validate_python(event.to_dict(mode="json"))
    same([e.sequence_number for e in events], list(range(len(events))), "sequence numbers")
    kinds = [e.type.removeprefix("response.") for e in events]
    deltas = kinds.count("output_text.delta")
    same(kinds, ["created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas, "output_text.done", "content_part.done",
                 "output_item.done", "incomplete"], "events")
    same("".join(e.delta for e in events if e.type == "response.output_text.delta"), whole.output_text, "text")
    same(events[-1].response.output_text, whole.output_text, "the last event's response")
    same(events[-1].response.incomplete_details.reason, "max_output_tokens", "reason")
    same(events[-1].response.usage.output_tokens, 24, "output_tokens")


@check("the client's own stream helper follows a forced call")
def _(s):
    with s.client.responses.stream(model=s.model, input="Weather?", tools=[RESPONSES_TOOL], tool_choice="required", parallel_tool_calls=False,
                                   max_output_tokens=200, temperature=0) as stream:
        deltas = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        answer = stream.get_final_response()
    call, = answer.output
    same((call.type, call.name, call.arguments), ("function_call", "weather", deltas), "call")
    assert json.loads(deltas)["city"] in ("Bern", "Oslo"), deltas


@check("a call's result goes back as items")
def _(s):
    first = respond(s, input="Weather?", tools=[RESPONSES_TOOL], tool_choice={"type": "function", "name": "weather"}, max_output_tokens=200)
    call, = strict(Response, first).output
    items = [{"role": "user", "content": "Weather?"}, call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}]
    same(strict(Response, respond(s, input=items, tools=[RESPONSES_TOOL], tool_choice="none")).output[0].type, "message", "type")


class City(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    city: str


@check("responses.parse gives an object of the class")
def _(s):
    answer = s.client.responses.parse(model=s.model, input="A city.", text_format=City, max_output_tokens=s.context() // 2, temperature=0,
                                      extra_body={"repetition_penalty": 1.3})
    assert answer.status == "incomplete" or isinstance(answer.output_parsed, City), answer


@check("what needs a memory is BadRequestError that names the field")
def _(s):
    for field, value in (("previous_response_id", "resp_1"), ("conversation", "conv_1"), ("background", True)):
        raises(openai.BadRequestError, lambda: respond(s, **{field: value}), param=field)
    raises(openai.BadRequestError, lambda: respond(s, max_output_tokens=s.context() + 1), param="input", code="context_length_exceeded")


# --- messages

@check("a message is what chat answers")
def _(s):
    answer = strict(Message, message(s, system="Be brief."))
    chat = s.chat([{"role": "system", "content": "Be brief."}, *MESSAGES], max_tokens=24)
    same("".join(b.text for b in answer.content), chat.choices[0].message.content, "text")
    same(answer.usage.input_tokens + answer.usage.cache_read_input_tokens, chat.usage.prompt_tokens, "input tokens")
    same(answer.usage.output_tokens, chat.usage.completion_tokens, "output tokens")
    same(answer.stop_reason, {"length": "max_tokens", "stop": "end_turn"}[chat.choices[0].finish_reason], "stop_reason")


@check("a message's stream has the events in their order and adds up to the message")
def _(s):
    options = dict(extra_body={"temperature": 0, "ignore_eos": True})
    whole = message(s, **options)
    events = list(message(s, stream=True, **options))
    for event in events:
        RAW_EVENTS.validate_python(event.to_dict(mode="json"))
    kinds = [e.type for e in events]
    same(kinds, ["message_start", "content_block_start", *["content_block_delta"] * (len(kinds) - 5), "content_block_stop", "message_delta", "message_stop"], "events")
    same("".join(e.delta.text for e in events if e.type == "content_block_delta"), whole.content[0].text, "text")
    same((events[-2].delta.stop_reason, events[-2].usage.output_tokens), ("max_tokens", 24), "end")
    with claude(s).messages.stream(model=s.model, messages=MESSAGES, max_tokens=24, extra_body=options["extra_body"]) as stream:
        same(stream.get_final_message().content[0].text, whole.content[0].text, "the helper's text")


@check("a tool is used, streamed and not, and its result goes back as blocks")
def _(s):
    options = dict(tools=[MESSAGES_TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=200)
    answer = strict(Message, message(s, **options))
    use, = answer.content
    same((answer.stop_reason, use.type, use.name), ("tool_use", "tool_use", "weather"), "use")
    assert use.input["city"] in ("Bern", "Oslo"), use
    with claude(s).messages.stream(model=s.model, messages=MESSAGES, extra_body={"temperature": 0}, **options) as stream:
        same(stream.get_final_message().content[0].input, use.input, "the streamed input")
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Rain."}]}
    conversation = [*MESSAGES, {"role": "assistant", "content": [use.to_dict()]}, result]
    same(strict(Message, message(s, messages=conversation, tools=[MESSAGES_TOOL], tool_choice={"type": "none"})).content[0].type, "text", "type")


@check("a stop sequence ends a message and is named")
def _(s):
    text = message(s).content[0].text
    stop = text[len(text) // 2:][:3]
    answer = message(s, stop_sequences=[stop])
    same((answer.content[0].text, answer.stop_reason, answer.stop_sequence), (text[:text.index(stop)], "stop_sequence", stop), "end")


@check("tokens are counted as they are used")
def _(s):
    count = claude(s).messages.count_tokens(model=s.model, messages=MESSAGES, system="Be brief.").input_tokens
    usage = message(s, system="Be brief.").usage
    same(usage.input_tokens + usage.cache_read_input_tokens, count, "input tokens")


def refused(kind, call, name):
    try:
        call()
    except kind as e:
        same((e.body["type"], e.body["error"]["type"]), ("error", name), "error")
        return e.body["error"]["message"]
    raise AssertionError(f"expected {kind.__name__}, got an answer")


@check("errors of messages are Anthropic's")
def _(s):
    assert "role" in refused(anthropic.BadRequestError, lambda: message(s, messages=[{"role": "tool", "content": "a"}]), "invalid_request_error")
    refused(anthropic.NotFoundError, lambda: claude(s).messages.create(model="no-such-model", messages=MESSAGES, max_tokens=1), "not_found_error")
    refused(anthropic.BadRequestError, lambda: message(s, max_tokens=s.context() + 1), "invalid_request_error")
    if s.key is not None:
        wrong = claude(s, "wrong-" + s.key)
        refused(anthropic.AuthenticationError, lambda: wrong.messages.create(model=s.model, messages=MESSAGES, max_tokens=1), "authentication_error")


if __name__ == "__main__":
    sys.exit(main(__doc__))
