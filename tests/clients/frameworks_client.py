#!/usr/bin/env python3
"""A running server as `litellm` and `langchain-openai` use it.

usage: frameworks_client.py [--base-url http://127.0.0.1:8000/v1] [--api-key KEY] [--model NAME] [--only WORD]

One line per check, then `N passed, M failed`; exit status 1 when any failed. The model may be any with a chat template, however small.
"""
import asyncio
import os
import sys

# (it would ask the network for prices otherwise)
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from conformance import MESSAGES, PROMPT, check, main, same

ROOM = 400


class Place(BaseModel):
    """A place on the map."""
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=20)
    inhabitants: int = Field(ge=1, le=99_999_999)


@tool
def forecast(city: str, days: int) -> str:
    """The weather of a city in the next days."""
    return f"sun in {city} for {days} days"


FORECAST = {"type": "function", "function": {"name": "forecast", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False}}}


def through_litellm(s, **options):
    common = {"model": f"openai/{s.model}", "api_base": s.base_url, "api_key": s.key or "none", "temperature": 0, "max_tokens": 24, "num_retries": 0}
    return common | options


def langchain(s, kind=ChatOpenAI, **options):
    return kind(**({"model": s.model, "base_url": s.base_url, "api_key": s.key or "none", "temperature": 0, "max_tokens": 24, "max_retries": 0} | options))


@check("litellm: a chat, whole, streamed and asynchronous, is what openai gets")
def _(s):
    expected = s.chat().choices[0].message.content
    answer = litellm.completion(messages=MESSAGES, **through_litellm(s))
    same(answer.choices[0].message.content, expected, "content")
    assert answer.usage.completion_tokens == 24 and answer.usage.prompt_tokens > 0, answer.usage
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **through_litellm(s)))
    same("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), expected, "streamed content")
    same(litellm.stream_chunk_builder(chunks, messages=MESSAGES).usage.completion_tokens, 24, "streamed usage")
    same(asyncio.run(litellm.acompletion(messages=MESSAGES, **through_litellm(s))).choices[0].message.content, expected, "asynchronous content")


@check("litellm: a text completion with logprobs is what openai gets")
def _(s):
    expected = s.complete(logprobs=2).choices[0]
    answer = litellm.text_completion(prompt=PROMPT, logprobs=2, **through_litellm(s, model=f"text-completion-openai/{s.model}"))
    same((answer.choices[0].text, answer.choices[0].finish_reason), (expected.text, expected.finish_reason), "choice")
    same(list(answer.choices[0].logprobs.tokens), expected.logprobs.tokens, "tokens")


@check("litellm: a schema is enforced and a forced tool is called")
def _(s):
    answer = litellm.completion(messages=MESSAGES, response_format=Place, **through_litellm(s, max_tokens=ROOM))
    Place.model_validate_json(answer.choices[0].message.content)
    choice = {"type": "function", "function": {"name": "forecast"}}
    answer = litellm.completion(messages=MESSAGES, tools=[FORECAST], tool_choice=choice, **through_litellm(s, max_tokens=ROOM))
    same([call.function.name for call in answer.choices[0].message.tool_calls], ["forecast"], "calls")


@check("litellm: errors are its own classes")
def _(s):
    for error, options in [(litellm.NotFoundError, {"model": "openai/nobody"}), (litellm.BadRequestError, {"temperature": -3}),
                           (litellm.ContextWindowExceededError, {"max_tokens": 10_000_000})]:
        try:
            litellm.completion(messages=MESSAGES, **through_litellm(s, **options))
        except error:
            continue
        raise AssertionError(f"expected {error.__name__}, got an answer")
    if s.key:
        try:
            litellm.completion(messages=MESSAGES, **through_litellm(s, api_key="wrong"))
        except litellm.AuthenticationError:
            return
        raise AssertionError("a wrong key got an answer")


@check("langchain: invoke, stream, batch and their asynchronous forms agree")
def _(s):
    expected = s.chat().choices[0].message.content
    model, ask = langchain(s), [HumanMessage(MESSAGES[0]["content"])]
    answer = model.invoke(ask)
    same(answer.content, expected, "content")
    same(answer.usage_metadata["output_tokens"], 24, "usage")
    same(answer.response_metadata["finish_reason"], "length", "finish_reason")
    same("".join(chunk.content for chunk in model.stream(ask)), expected, "streamed content")
    same([a.content for a in model.batch([ask, ask])], [expected, expected], "batch")

    async def asynchronously():
        streamed = "".join([chunk.content async for chunk in model.astream(ask)])
        return (await model.ainvoke(ask)).content, streamed

    same(asyncio.run(asynchronously()), (expected, expected), "asynchronous contents")


@check("langchain: usage comes with a stream that asks for it")
def _(s):
    total = None
    for chunk in langchain(s, stream_usage=True).stream(MESSAGES[0]["content"]):
        total = chunk if total is None else total + chunk
    same(total.usage_metadata["output_tokens"], 24, "usage")


@check("langchain: with_structured_output gives the model's object, by schema and by tool")
def _(s):
    for method in ["json_schema", "function_calling"]:
        place = langchain(s, max_tokens=ROOM).with_structured_output(Place, method=method).invoke("Name a place.")
        assert isinstance(place, Place), f"{method}: {place!r}"


@check("langchain: a bound tool is called, and its result is answered")
def _(s):
    model = langchain(s, max_tokens=ROOM)
    ask = [SystemMessage("You help."), HumanMessage("How is the weather in Paris?")]
    call = model.bind_tools([FORECAST], tool_choice="forecast").invoke(ask)
    same([c["name"] for c in call.tool_calls], ["forecast"], "calls")
    result = ToolMessage(forecast.invoke(call.tool_calls[0]["args"]), tool_call_id=call.tool_calls[0]["id"])
    answer = langchain(s).bind_tools([FORECAST]).invoke([*ask, AIMessage(content="", tool_calls=call.tool_calls), result])
    assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls"), answer


@check("langchain: logprobs, stop and seed are passed on")
def _(s):
    answer = langchain(s, logprobs=True, top_logprobs=2, seed=3, temperature=1.0).invoke(MESSAGES[0]["content"])
    content = answer.response_metadata["logprobs"]["content"]
    same((len(content), len(content[0]["top_logprobs"])), (24, 2), "logprobs")
    again = langchain(s, logprobs=True, top_logprobs=2, seed=3, temperature=1.0).invoke(MESSAGES[0]["content"])
    same(again.content, answer.content, "content of one seed")
    expected = s.chat().choices[0].message.content
    word = expected.split()[2]
    same(langchain(s).invoke(MESSAGES[0]["content"], stop=[word]).content, expected.split(word)[0], "content before the stop string")


@check("langchain: the completions class answers too")
def _(s):
    same(langchain(s, OpenAI).invoke(PROMPT), s.text(), "text")
    same("".join(langchain(s, OpenAI).stream(PROMPT)), s.text(), "streamed text")


if __name__ == "__main__":
    sys.exit(main(__doc__))
