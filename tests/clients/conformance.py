"""What the black-box client scripts share: the checks' register, the client of one server, and the run with its report."""
import argparse
import sys
import time
import traceback

import openai

CHECKS = []
PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


def check(name):
    def register(f):
        CHECKS.append((name, f))
        return f
    return register


class Skip(Exception):
    pass


def same(got, expected, what):
    assert got == expected, f"{what}: got {got!r}, expected {expected!r}"


def raises(kind, call, **expected):
    """The error that `call` raises must be of this class and carry OpenAI's error object with these values."""
    try:
        answer = call()
    except kind as e:
        assert isinstance(e.body, dict), f"the error has no object: {e.body!r}"
        missing = {"message", "type", "param", "code"} - e.body.keys()
        assert not missing, f"the error object lacks {sorted(missing)}"
        assert e.body["message"], "the error message is empty"
        for key, value in expected.items():
            same(e.body[key], value, key)
        return e
    except openai.APIError as e:
        raise AssertionError(f"expected {kind.__name__}, got {type(e).__name__}: {e}") from None
    raise AssertionError(f"expected {kind.__name__}, got an answer: {str(answer)[:200]}")


class Server:
    """The client, and requests in their shortest form: greedy unless told otherwise."""

    def __init__(self, args):
        self.base_url, self.key, self.model = args.base_url.rstrip("/"), args.api_key, args.model
        self.client = self.connect()
        if self.model is None:
            self.model = self.client.models.list().data[0].id

    def connect(self, kind=openai.OpenAI, key=None):
        return kind(base_url=self.base_url, api_key=key or self.key or "none", max_retries=0, timeout=300)

    def complete(self, prompt=PROMPT, **options):
        return self.client.completions.create(model=self.model, prompt=prompt, **({"temperature": 0, "max_tokens": 24} | options))

    def chat(self, messages=MESSAGES, **options):
        return self.client.chat.completions.create(model=self.model, messages=messages, **({"temperature": 0, "max_tokens": 24} | options))

    def text(self, *args, **options):
        return self.complete(*args, **options).choices[0].text

    def context(self):
        length = getattr(self.client.models.retrieve(self.model), "max_model_len", None)
        assert isinstance(length, int), "GET /v1/models/{id} has no max_model_len"
        return length

    def post(self, path, body):
        return self.client.post(path, body=body, cast_to=object)


def main(doc):
    args = argparse.ArgumentParser(description=doc.splitlines()[0])
    args.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args.add_argument("--api-key")
    args.add_argument("--model", help="the first one listed, unless given")
    args.add_argument("--only", default="", help="run the checks whose name contains this")
    args.add_argument("--verbose", action="store_true", help="tracebacks of failures")
    args = args.parse_args()
    server, passed, failed = Server(args), 0, 0
    for name, run in CHECKS:
        if args.only not in name:
            continue
        started = time.monotonic()
        try:
            run(server)
        except Skip as reason:
            print(f"skip  {name} ({reason})", flush=True)
            continue
        except Exception as e:  # whatever goes wrong is this check's failure, the others still run
            failed += 1
            print(f"FAIL  {name}: {type(e).__name__ + ': ' if not isinstance(e, AssertionError) else ''}{str(e)[:500]}", flush=True)
            if args.verbose:
                traceback.print_exc()
            continue
        passed += 1
        print(f"ok    {name} ({time.monotonic() - started:.2f} s)", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0
