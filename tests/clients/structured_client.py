#!/usr/bin/env python3
"""Structured output and tools of a running server, judged by the official `openai` client and pydantic.

usage: structured_client.py [--base-url http://127.0.0.1:8000/v1] [--api-key KEY] [--model NAME] [--only WORD]

One line per check, then `N passed, M failed`; exit status 1 when any failed. The model may be any with a chat template, however small: what is
checked is the form of its answers, which the server enforces, and not their sense.
"""
import asyncio
import json
import re
import sys
from enum import Enum

import openai
from pydantic import BaseModel, ConfigDict, Field

from conformance import MESSAGES, check, main, raises, same


class Kind(str, Enum):
    scientist = "scientist"
    artist = "artist"


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=30)
    country: str = Field(max_length=30)


class Profile(BaseModel):
    # (a schema that allows further properties never has to end)
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=40)
    born: int = Field(ge=1000, le=2030)
    kind: Kind
    places: list[Place] = Field(min_length=1, max_length=2)


class GetWeather(BaseModel):
    """The weather forecast of a city."""
    city: str = Field(max_length=30)
    unit: Kind | None
    days: int = Field(ge=1, le=9)


class Now(BaseModel):
    """The time."""


ASK = [{"role": "user", "content": "Give me a profile of Marie Curie."}]
WEATHER = [{"role": "user", "content": "How is the weather in Paris?"}]
TOOLS = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(Now)]
ROOM = 400  # tokens: enough for any of these, since every string and list in them is bounded


def chat(s, messages, **options):
    return s.chat(messages, **({"max_tokens": ROOM} | options))


def constrained(s, outputs, **options):
    return chat(s, ASK, extra_body={"structured_outputs": outputs}, **options).choices[0]


# --- response_format

@check("parse() gives an instance of the pydantic model, greedy and sampled, for every choice")
def _(s):
    for options in ({"temperature": 0}, {"temperature": 1.2, "seed": 5, "n": 3}, {"temperature": 1, "top_p": 0.9, "seed": 6}):
        answer = s.client.chat.completions.parse(model=s.model, messages=ASK, response_format=Profile, max_tokens=ROOM, **options)
        same(len(answer.choices), options.get("n", 1), "number of choices")
        for choice in answer.choices:
            assert isinstance(choice.message.parsed, Profile), choice.message
            same(choice.finish_reason, "stop", "finish_reason")


@check("the stream helper parses the same")
def _(s):
    options = {"model": s.model, "messages": ASK, "response_format": Profile, "max_tokens": ROOM, "temperature": 0}
    with s.client.chat.completions.stream(**options) as stream:
        snapshots = [event for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert len(snapshots) > 5, "it came in one piece"
    same(streamed, s.client.chat.completions.parse(**options).choices[0].message.parsed, "parsed")


@check("the asynchronous client parses, many at once beside unconstrained requests")
def _(s):
    alone = s.chat(max_tokens=40).choices[0].message.content

    async def free(client):
        answer = await client.chat.completions.create(model=s.model, messages=MESSAGES, temperature=0, max_tokens=40)
        return answer.choices[0].message.content

    async def parsed(client, seed):
        answer = await client.chat.completions.parse(model=s.model, messages=ASK, response_format=Profile, max_tokens=ROOM, temperature=1, seed=seed)
        return answer.choices[0].message.parsed

    async def all_at_once():
        async with s.connect(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(parsed(client, seed) for seed in range(4)), *(free(client) for _ in range(2)))

    *profiles, one, two = asyncio.run(all_at_once())
    assert all(isinstance(p, Profile) for p in profiles), profiles
    same((one, two), (alone, alone), "unconstrained answers")


@check("json_object is an object")
def _(s):
    choice = chat(s, ASK, response_format={"type": "json_object"}, max_tokens=ROOM).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.startswith("{")


# --- structured_outputs

@check("structured_outputs: json, regex, choice, grammar, json_object")
def _(s):
    Profile.model_validate_json(constrained(s, {"json": Profile.model_json_schema()}).message.content)
    assert re.fullmatch(r"[A-Z][a-z]{2,9}, \d{4}", constrained(s, {"regex": r"[A-Z][a-z]{2,9}, \d{4}"}).message.content)
    assert constrained(s, {"choice": ["physics", "chemistry"]}).message.content in ("physics", "chemistry")
    lark = 'start: "SELECT " COLUMN " FROM " TABLE\nCOLUMN: "name" | "age"\nTABLE: /[a-z]{3,8}/'
    assert re.fullmatch(r"SELECT (name|age) FROM [a-z]{3,8}", constrained(s, {"grammar": lark}).message.content)
    assert constrained(s, {"json_object": True}).message.content.startswith("{")


@check("structured_outputs on completions, with several prompts, logprobs and a stream")
def _(s):
    options = {"max_tokens": 20, "logprobs": 1, "extra_body": {"structured_outputs": {"regex": "(yes|no)( (yes|no)){3}"}}}
    answer = s.complete(["Is it?", "Are they?"], **options)
    assert all(re.fullmatch("(yes|no)( (yes|no)){3}", c.text) for c in answer.choices), answer.choices
    assert all(len(c.logprobs.tokens) >= 4 for c in answer.choices)
    pieces = [c.choices[0].text for c in s.complete("Is it?", stream=True, **options)]
    same("".join(pieces), answer.choices[0].text, "the stream's text")


@check("what can't be compiled is BadRequestError that names the field")
def _(s):
    for outputs in ({"regex": "("}, {"grammar": "start: nowhere"}, {"json": {"type": "nonsense"}}, {"regex": "a", "choice": ["b"]}):
        raises(openai.BadRequestError, lambda: constrained(s, outputs), param="structured_outputs")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}
    raises(openai.BadRequestError, lambda: chat(s, ASK, response_format=schema), param="response_format")


# --- tools

def arguments(message):
    return [call.function.parsed_arguments for call in message.tool_calls]


@check("parse() gives a required call's arguments as the pydantic model")
def _(s):
    for seed in range(3):
        answer = s.client.chat.completions.parse(model=s.model, messages=WEATHER, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
                                                 max_tokens=ROOM, temperature=1, seed=seed)
        same(answer.choices[0].finish_reason, "tool_calls", "finish_reason")
        same(answer.choices[0].message.content, None, "content")
        assert all(isinstance(a, (GetWeather, Now)) for a in arguments(answer.choices[0].message))


@check("a named function is called, and only that one")
def _(s):
    for tool, kind in zip(TOOLS, (GetWeather, Now)):
        named = {"type": "function", "function": {"name": tool["function"]["name"]}}
        answer = s.client.chat.completions.parse(model=s.model, messages=WEATHER, tools=TOOLS, tool_choice=named, max_tokens=ROOM, temperature=0)
        assert [type(a) for a in arguments(answer.choices[0].message)] == [kind]


@check("a streamed call: id, type and name first, then pieces of arguments")
def _(s):
    named = {"type": "function", "function": {"name": "GetWeather"}}
    chunks = list(chat(s, WEATHER, tools=TOOLS, tool_choice=named, stream=True))
    calls = [call for c in chunks for choice in c.choices for call in choice.delta.tool_calls or []]
    first, *rest = calls
    same((first.index, first.type, first.function.name), (0, "function", "GetWeather"), "the first delta")
    assert first.id and not any(c.id or c.function.name for c in rest), "id and name come once"
    assert len(rest) > 3, "the arguments came in one piece"
    GetWeather.model_validate_json("".join(c.function.arguments or "" for c in calls))
    same([c.choices[0].finish_reason for c in chunks][-1], "tool_calls", "finish_reason")
    assert not any(c.choices[0].delta.content for c in chunks), "content beside the call"


@check("the stream helper assembles the call, sync and async")
def _(s):
    options = {"model": s.model, "messages": WEATHER, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": ROOM, "temperature": 0}
    with s.client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        one = arguments(stream.get_final_completion().choices[0].message)
    assert "tool_calls.function.arguments.done" in kinds, kinds

    async def asynchronously():
        async with s.connect(openai.AsyncOpenAI) as client, client.chat.completions.stream(**options) as stream:
            return arguments((await stream.get_final_completion()).choices[0].message)

    same(asyncio.run(asynchronously()), one, "arguments")
    same(arguments(s.client.chat.completions.parse(**options).choices[0].message), one, "arguments without a stream")


@check("with auto, calls are found in the text, and plain text stays text")
def _(s):
    text = 'I look.\n<tool_call>\n{"name": "Now", "arguments": {}}\n</tool_call>'
    options = {"tools": TOOLS, "extra_body": {"structured_outputs": {"choice": [text]}}}
    choice = chat(s, WEATHER, **options).choices[0]
    same((choice.message.content, [c.function.name for c in choice.message.tool_calls], choice.finish_reason), ("I look.", ["Now"], "tool_calls"), "choice")
    choice = chat(s, WEATHER, tool_choice="none", **options).choices[0]
    same((choice.message.content, choice.message.tool_calls, choice.finish_reason), (text, None, "stop"), "choice with none")
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(s, WEATHER, stream=True, **options))
    same(streamed, "I look.", "streamed content")


@check("a conversation goes on after a call and its result")
def _(s):
    call = chat(s, WEATHER, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "Now"}}).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "noon"}
    assert chat(s, [*WEATHER, call.model_dump(), result], tools=TOOLS, max_tokens=5).choices[0].finish_reason in ("length", "stop")


@check("a bad tool or tool_choice is BadRequestError that names the field")
def _(s):
    raises(openai.BadRequestError, lambda: chat(s, WEATHER, tool_choice="required"), param="tool_choice")
    raises(openai.BadRequestError, lambda: chat(s, WEATHER, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "other"}}), param="tool_choice")
    raises(openai.BadRequestError, lambda: chat(s, WEATHER, tools=[{"type": "function", "function": {}}]), param="tools[0].function.name")


if __name__ == "__main__":
    sys.exit(main(__doc__))
