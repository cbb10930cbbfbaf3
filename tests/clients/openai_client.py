#!/usr/bin/env python3
"""Black-box conformance of a running server, judged by the official `openai` client.

usage: openai_client.py [--base-url http://127.0.0.1:8000/v1] [--api-key KEY] [--model NAME] [--only WORD]

One line per check, then `N passed, M failed`; exit status 1 when any failed. Without --api-key the server is taken to ask for none and the checks
of keys are skipped. The model may be any with a chat template: nothing is assumed of its answers but that greedy decoding repeats itself.
"""
import asyncio
import json
import sys
import time
import urllib.error
import urllib.request

import openai

from conformance import MESSAGES, PROMPT, Skip, check, main, raises, same

PROMPTS = [PROMPT, "The old man said", "It was a dark and stormy night", "She opened the door and",
           "In the middle of the sea", "\"No,\" answered the boy", "Every morning", "The king had three"]
SOME_IDS, OTHER_IDS = [70, 71, 72, 73, 74], [80, 90, 100]  # every vocabulary has these


def usage_adds_up(usage):
    assert usage is not None, "no usage"
    assert usage.prompt_tokens > 0, "no prompt tokens counted"
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")


def collect(stream, parts_of):
    """{choice index: text}, {choice index: finish_reason} and the chunks; a choice says nothing after its finish_reason."""
    texts, finished, chunks = {}, {}, []
    for chunk in stream:
        chunks.append(chunk)
        for choice in chunk.choices:
            part = parts_of(choice) or ""
            assert choice.index not in finished, "a chunk follows the one with finish_reason"
            texts[choice.index] = texts.get(choice.index, "") + part
            if choice.finish_reason is not None:
                finished[choice.index] = choice.finish_reason
    assert chunks, "an empty stream"
    same(len({c.id for c in chunks}), 1, "number of ids in one stream")
    same(texts.keys(), finished.keys(), "choices that finished")
    return texts, finished, chunks


def collect_completion(stream):
    return collect(stream, lambda choice: choice.text)


def collect_chat(stream):
    return collect(stream, lambda choice: choice.delta.content)


# --- models

@check("models.list names the model")
def _(s):
    models = s.client.models.list().data
    assert s.model in [m.id for m in models], f"{s.model!r} is not among {[m.id for m in models]}"
    same({m.object for m in models}, {"model"}, "object")


@check("models.retrieve")
def _(s):
    same(s.client.models.retrieve(s.model).id, s.model, "id")
    assert s.context() > 0


@check("models.retrieve of an unknown model is NotFoundError")
def _(s):
    raises(openai.NotFoundError, lambda: s.client.models.retrieve("no-such-model"))


# --- completions

@check("completion of a string")
def _(s):
    answer = s.complete()
    same(answer.object, "text_completion", "object")
    same(len(answer.choices), 1, "number of choices")
    assert answer.choices[0].text, "no text"
    assert answer.choices[0].finish_reason in ("stop", "length"), answer.choices[0].finish_reason
    assert abs(answer.created - time.time()) < 86_400, "created is not the time in seconds"
    usage_adds_up(answer.usage)


@check("greedy completions repeat themselves")
def _(s):
    same(s.text(), s.text(), "second answer")


@check("completion of a list of strings: one choice each, in order")
def _(s):
    answer = s.complete(PROMPTS[:3])
    same([c.index for c in answer.choices], [0, 1, 2], "indexes")
    same([c.text for c in answer.choices], [s.text(p) for p in PROMPTS[:3]], "texts")
    usage_adds_up(answer.usage)
    same(answer.usage.prompt_tokens, sum(s.complete(p).usage.prompt_tokens for p in PROMPTS[:3]), "prompt_tokens")


@check("completion of token ids")
def _(s):
    answer = s.complete(SOME_IDS)
    same(len(answer.choices), 1, "number of choices")
    same(answer.usage.prompt_tokens, len(SOME_IDS), "prompt_tokens")


@check("completion of a list of token-id lists")
def _(s):
    answer = s.complete([SOME_IDS, OTHER_IDS])
    same([c.text for c in answer.choices], [s.text(SOME_IDS), s.text(OTHER_IDS)], "texts")
    same(answer.usage.prompt_tokens, len(SOME_IDS) + len(OTHER_IDS), "prompt_tokens")


@check("return_token_ids gives ids that can be sent as the prompt")
def _(s):
    choice = s.complete(extra_body={"return_token_ids": True}).choices[0]
    same(s.text(choice.prompt_token_ids), choice.text, "text of the same prompt as ids")
    assert choice.token_ids, "no token_ids"


@check("echo puts the prompt before the text")
def _(s):
    same(s.text(echo=True), PROMPT + s.text(), "text")


@check("streamed completion: the pieces are the whole, the last has finish_reason")
def _(s):
    whole = s.complete().choices[0]
    texts, finished, chunks = collect_completion(s.complete(stream=True))
    same(texts[0], whole.text, "concatenation")
    same(finished[0], whole.finish_reason, "finish_reason")
    assert chunks[-1].choices[0].finish_reason is not None, "the last chunk has no finish_reason"
    assert all(c.usage is None for c in chunks), "usage although nobody asked"
    same({c.object for c in chunks}, {"text_completion"}, "object")


@check("streamed completions of several prompts")
def _(s):
    texts, _, _ = collect_completion(s.complete(PROMPTS[:3], stream=True))
    same([texts[i] for i in range(3)], [s.text(p) for p in PROMPTS[:3]], "texts")


@check("include_usage adds one last chunk without choices")
def _(s):
    *_, chunks = collect_completion(s.complete(stream=True, stream_options={"include_usage": True}))
    same([i for i, c in enumerate(chunks) if c.usage is not None], [len(chunks) - 1], "chunks with usage")
    same(chunks[-1].choices, [], "choices of the usage chunk")
    expected = s.complete().usage
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        same(getattr(chunks[-1].usage, key), getattr(expected, key), key)


# --- chat

@check("chat completion")
def _(s):
    answer = s.chat()
    same(answer.object, "chat.completion", "object")
    same(answer.choices[0].message.role, "assistant", "role")
    assert isinstance(answer.choices[0].message.content, str), "content is no string"
    assert answer.choices[0].finish_reason in ("stop", "length"), answer.choices[0].finish_reason
    assert answer.choices[0].logprobs is None, "logprobs although nobody asked"
    usage_adds_up(answer.usage)


@check("streamed chat: role in the first delta, finish_reason in the last chunk, the pieces are the whole")
def _(s):
    whole = s.chat().choices[0]
    texts, finished, chunks = collect_chat(s.chat(stream=True))
    same(chunks[0].choices[0].delta.role, "assistant", "role of the first delta")
    assert not any(c.choices[0].delta.role for c in chunks[1:]), "the role comes twice"
    same(texts[0], whole.message.content, "concatenation")
    same(finished[0], whole.finish_reason, "finish_reason")
    assert chunks[-1].choices[0].finish_reason is not None, "the last chunk has no finish_reason"
    same({c.object for c in chunks}, {"chat.completion.chunk"}, "object")


@check("streamed chat with include_usage")
def _(s):
    *_, chunks = collect_chat(s.chat(stream=True, stream_options={"include_usage": True}))
    same(chunks[-1].choices, [], "choices of the usage chunk")
    same(chunks[-1].usage.total_tokens, s.chat().usage.total_tokens, "total_tokens")


@check("chat content may be a list of text parts")
def _(s):
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    same(s.chat(parts).choices[0].message.content, s.chat().choices[0].message.content, "content")


@check("the client's stream helper assembles the same message")
def _(s):
    try:
        with s.client.chat.completions.stream(model=s.model, messages=MESSAGES, temperature=0, max_tokens=24) as stream:
            message = stream.get_final_completion()
    except openai.LengthFinishReasonError as e:  # how the helper says that max_tokens were used up
        message = e.completion
    same(message.choices[0].message.content, s.chat().choices[0].message.content, "content")


# --- when it ends

@check("max_tokens ends with finish_reason length")
def _(s):
    for n in (1, 4):
        answer = s.complete(max_tokens=n, extra_body={"ignore_eos": True})
        same(answer.choices[0].finish_reason, "length", "finish_reason")
        same(answer.usage.completion_tokens, n, "completion_tokens")
    assert s.text(max_tokens=24).startswith(s.text(max_tokens=4).rstrip("\ufffd")), "4 tokens are not the start of 24"


@check("max_tokens and max_completion_tokens in chat")
def _(s):
    for option in ("max_tokens", "max_completion_tokens"):
        answer = s.client.chat.completions.create(model=s.model, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}, **{option: 4})
        same(answer.choices[0].finish_reason, "length", "finish_reason")
        same(answer.usage.completion_tokens, 4, "completion_tokens")


@check("a completion has 16 tokens when max_tokens is left out")
def _(s):
    answer = s.client.completions.create(model=s.model, prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    same(answer.usage.completion_tokens, 16, "completion_tokens")


def a_stop_string(whole):
    """Three characters from the middle of a text, and what comes before them."""
    assert len(whole) >= 9, f"too little text to stop in: {whole!r}"
    middle = len(whole) // 2
    stop = whole[middle:middle + 3]
    return stop, whole[:whole.find(stop)]


@check("a stop string ends the text and is not in it")
def _(s):
    stop, before = a_stop_string(s.text(max_tokens=48))
    for given in (stop, [stop], ["\u0001never", stop, "\u0002ever", "\u0003so"]):
        choice = s.complete(max_tokens=48, stop=given).choices[0]
        same(choice.text, before, f"text with stop {given!r}")
        same(choice.finish_reason, "stop", "finish_reason")


@check("a stop string never leaks into a stream, not even in part")
def _(s):
    stop, before = a_stop_string(s.text(max_tokens=48))
    so_far = ""
    for chunk in s.complete(max_tokens=48, stop=stop, stream=True):
        for choice in chunk.choices:
            so_far += choice.text
            assert before.startswith(so_far), f"{so_far!r} went beyond {before!r}"
    same(so_far, before, "text")


@check("a stop string that begins but does not end is text after all")
def _(s):
    whole = s.text(max_tokens=48)
    almost = whole[len(whole) // 2:][:3] + "\u0001"
    texts, _, _ = collect_completion(s.complete(max_tokens=48, stop=almost, stream=True))
    same(texts[0], whole, "text")


@check("stop strings in chat, streamed and not")
def _(s):
    stop, before = a_stop_string(s.chat(max_tokens=48, extra_body={"ignore_eos": True}).choices[0].message.content)
    same(s.chat(max_tokens=48, stop=stop, extra_body={"ignore_eos": True}).choices[0].message.content, before, "content")
    texts, finished, _ = collect_chat(s.chat(max_tokens=48, stop=stop, stream=True, extra_body={"ignore_eos": True}))
    same((texts[0], finished[0]), (before, "stop"), "stream")


# --- sampling

WILD = {"temperature": 1.5, "max_tokens": 24, "n": 2}


@check("n=2 with a seed: two different choices, the same ones again")
def _(s):
    first, again, other = (s.complete(**WILD, seed=seed) for seed in (7, 7, 8))
    same([c.index for c in first.choices], [0, 1], "indexes")
    texts = [c.text for c in first.choices]
    assert texts[0] != texts[1], "both choices are the same"
    same([c.text for c in again.choices], texts, "texts with the same seed")
    assert [c.text for c in other.choices] != texts, "another seed changes nothing"
    usage_adds_up(first.usage)
    assert first.usage.completion_tokens > WILD["max_tokens"] // 2, "usage counts one choice only"
    same(first.usage.prompt_tokens, s.complete().usage.prompt_tokens, "prompt_tokens, counted once")


@check("n=2 with a seed, streamed: chunks of both choices, the same texts")
def _(s):
    whole = s.complete(**WILD, seed=7)
    texts, _, _ = collect_completion(s.complete(**WILD, seed=7, stream=True))
    same(texts, {c.index: c.text for c in whole.choices}, "texts")


@check("n=2 in chat")
def _(s):
    whole = s.chat(**WILD, seed=7)
    texts, _, _ = collect_chat(s.chat(**WILD, seed=7, stream=True))
    same(texts, {c.index: c.message.content for c in whole.choices}, "texts")
    same(len(texts), 2, "number of choices")


@check("logit_bias forces and forbids tokens")
def _(s):
    choice = s.complete(max_tokens=3, logit_bias={str(SOME_IDS[0]): 100}, extra_body={"return_token_ids": True}).choices[0]
    same(choice.token_ids, SOME_IDS[:1] * 3, "token_ids")
    best = s.complete(max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    assert s.complete(max_tokens=1, logit_bias={str(best): -100}, extra_body={"return_token_ids": True}).choices[0].token_ids[0] != best


# --- logprobs

@check("logprobs of a completion")
def _(s):
    answer = s.complete(max_tokens=6, logprobs=3, extra_body={"ignore_eos": True})
    logprobs, text = answer.choices[0].logprobs, answer.choices[0].text
    for part in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        same(len(getattr(logprobs, part)), 6, f"length of {part}")
    assert "\ufffd" in text or "".join(logprobs.tokens) == text, f"{logprobs.tokens} is not {text!r}"
    for token, own, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        # tokens that are parts of a character look alike and share a key, so there may be fewer
        assert own <= 0 and 1 <= len(top) <= 4, (token, own, top)
        assert abs(own - max(top.values())) < 1e-4, f"{token!r} was greedy and is not the likeliest of {top}"
    steps = [b - a for a, b in zip(logprobs.text_offset, logprobs.text_offset[1:])]
    assert "\ufffd" in text or steps == [len(t) for t in logprobs.tokens[:-1]], f"offsets {logprobs.text_offset}"


@check("logprobs=0 gives the chosen tokens' own")
def _(s):
    logprobs = s.complete(max_tokens=4, logprobs=0, extra_body={"ignore_eos": True}).choices[0].logprobs
    same(len(logprobs.token_logprobs), 4, "length of token_logprobs")


@check("echo with logprobs scores the prompt, as lm-evaluation-harness asks for it")
def _(s):
    for new_tokens in (0, 1):
        answer = s.complete(SOME_IDS, echo=True, logprobs=1, max_tokens=new_tokens, extra_body={"ignore_eos": True})
        logprobs = answer.choices[0].logprobs
        same(len(logprobs.token_logprobs), len(SOME_IDS) + new_tokens, "length of token_logprobs")
        same(logprobs.token_logprobs[0], None, "logprob of the first token")
        assert all(p <= 0 for p in logprobs.token_logprobs[1:]), logprobs.token_logprobs
        same(answer.usage.completion_tokens, new_tokens, "completion_tokens")


@check("logprobs of a chat completion")
def _(s):
    choice = s.chat(max_tokens=6, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}).choices[0]
    same(len(choice.logprobs.content), 6, "number of entries")
    for entry in choice.logprobs.content:
        same(len(entry.top_logprobs), 2, "number of top_logprobs")
        assert entry.logprob <= 0 and entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob, entry
        assert abs(entry.logprob - entry.top_logprobs[0].logprob) < 1e-4, f"{entry.token!r} was greedy and is not the likeliest"
    # special tokens have no place in the text, and an unfinished character waits for its other bytes
    raw = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    content = choice.message.content.rstrip("\ufffd").encode()
    assert raw.startswith(content) or "<|" in raw.decode(errors="replace"), f"bytes {raw!r} are not {content!r}"


@check("logprobs in a chat stream")
def _(s):
    entries = []
    for chunk in s.chat(max_tokens=6, logprobs=True, top_logprobs=1, stream=True, extra_body={"ignore_eos": True}):
        for choice in chunk.choices:
            entries += choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
    whole = s.chat(max_tokens=6, logprobs=True, top_logprobs=1, extra_body={"ignore_eos": True}).choices[0].logprobs.content
    same([e.token for e in entries], [e.token for e in whole], "tokens")


# --- errors

@check("a wrong key is AuthenticationError")
def _(s):
    if s.key is None:
        raise Skip("no --api-key")
    wrong = s.connect(key="wrong-" + s.key)
    raises(openai.AuthenticationError, lambda: wrong.completions.create(model=s.model, prompt=PROMPT))
    raises(openai.AuthenticationError, lambda: wrong.models.list())


@check("an unknown model is NotFoundError")
def _(s):
    raises(openai.NotFoundError, lambda: s.client.completions.create(model="no-such-model", prompt=PROMPT))
    raises(openai.NotFoundError, lambda: s.client.chat.completions.create(model="no-such-model", messages=MESSAGES))
    raises(openai.NotFoundError, lambda: s.client.completions.create(model="no-such-model", prompt=PROMPT, stream=True))


BAD_FIELDS = {
    "temperature": ["hot", -1, [1]], "top_p": [1.5, -0.1, "all"], "max_tokens": [-1, "many", 1.5], "n": [0, -2, "two"], "stop": [5, ["a"] * 5],
    "seed": ["lucky"], "stream": ["perhaps"], "frequency_penalty": [9, "much"], "presence_penalty": [-9],
}


@check("bad values are BadRequestError that names the field")
def _(s):
    for field, values in BAD_FIELDS.items():
        for value in values:
            for path, body in (("/completions", {"prompt": PROMPT}), ("/chat/completions", {"messages": MESSAGES})):
                try:
                    raises(openai.BadRequestError, lambda: s.post(path, {"model": s.model, "max_tokens": 1, **body, field: value}), param=field)
                except AssertionError as e:
                    raise AssertionError(f"{path} with {field}={value!r}: {e}") from None


@check("missing and empty fields are BadRequestError that names the field")
def _(s):
    raises(openai.BadRequestError, lambda: s.post("/chat/completions", {"model": s.model}), param="messages")
    raises(openai.BadRequestError, lambda: s.chat([]), param="messages")
    raises(openai.BadRequestError, lambda: s.post("/completions", {"model": s.model}), param="prompt")


@check("suffix is a clear BadRequestError")
def _(s):
    raises(openai.BadRequestError, lambda: s.complete(suffix="the end"), param="suffix")


@check("token ids outside the vocabulary are BadRequestError")
def _(s):
    raises(openai.BadRequestError, lambda: s.complete([1_000_000_000]), param="prompt")
    raises(openai.BadRequestError, lambda: s.complete([-1]), param="prompt")


@check("a body that is not JSON is a 400 with an error object")
def _(s):
    request = urllib.request.Request(f"{s.base_url}/completions", b"{not json", {"Content-Type": "application/json", "Authorization": f"Bearer {s.key or 'none'}"})
    try:
        urllib.request.urlopen(request)
    except urllib.error.HTTPError as e:
        same(e.code, 400, "status")
        assert json.load(e)["error"]["message"], "no message"
    else:
        raise AssertionError("it was accepted")


@check("a prompt longer than the context is BadRequestError context_length_exceeded")
def _(s):
    too_long = s.context() + 1
    raises(openai.BadRequestError, lambda: s.complete([SOME_IDS[0]] * too_long, max_tokens=1), code="context_length_exceeded")
    raises(openai.BadRequestError, lambda: s.complete([SOME_IDS[0]] * too_long, max_tokens=1, stream=True), code="context_length_exceeded")
    # no token is longer than that many characters of changing digits and words
    text = " ".join(f"{i} sea" for i in range(too_long))
    raises(openai.BadRequestError, lambda: s.chat([{"role": "user", "content": text}], max_tokens=1), code="context_length_exceeded")


@check("unknown fields are ignored")
def _(s):
    same(s.text(extra_body={"frobnicate": {"deeply": [1, 2]}, "user": "someone"}), s.text(), "text")
    same(s.chat(extra_body={"frobnicate": None}).choices[0].message.content, s.chat().choices[0].message.content, "content")


@check("explicit nulls are as good as leaving out")
def _(s):
    nulls = dict.fromkeys(["stop", "n", "top_p", "seed", "stream", "stream_options", "logprobs", "echo", "suffix", "logit_bias", "presence_penalty",
                           "frequency_penalty", "user", "best_of"])
    body = {"model": s.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24} | nulls
    same(s.post("/completions", body)["choices"][0]["text"], s.text(), "text")


# --- many at once

@check("8 concurrent streams give what each gives alone")
def _(s):
    alone = [s.text(p, max_tokens=32) for p in PROMPTS]

    async def one(client, prompt):
        stream = await client.completions.create(model=s.model, prompt=prompt, temperature=0, max_tokens=32, stream=True)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def all_at_once():
        async with s.connect(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, p) for p in PROMPTS))

    same(asyncio.run(all_at_once()), alone, "texts")


def running_requests(s):
    """What /metrics says is running, or None where there are no such metrics."""
    url = s.base_url.removesuffix("/v1") + "/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            lines = page.read().decode().splitlines()
    except OSError:
        return None
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running")]
    return sum(values) if values else None


@check("a stream can be cancelled half-way, again and again, and leaves nothing running")
def _(s):
    expected, length = s.text(), min(512, s.context() // 2)
    for _ in range(10):
        stream = s.complete(max_tokens=length, stream=True, extra_body={"ignore_eos": True})
        for seen, _ in enumerate(stream, 1):
            if seen == 3:
                break
        stream.close()
    same(s.text(), expected, "text afterwards")
    deadline = time.monotonic() + 10
    while running_requests(s) not in (None, 0.0):
        assert time.monotonic() < deadline, f"{running_requests(s)} requests still run after 10 s"
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(__doc__))
