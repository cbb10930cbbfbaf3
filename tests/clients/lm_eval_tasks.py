#!/usr/bin/env python3
"""Is `evop eval --tasks` lm-evaluation-harness, item by item?

usage: lm_eval_tasks.py EVOP MODEL_DIR [TASK.jsonl[.gz] ...] [--limit N] [--golden FILE] [--api]

Runs each task through `lm_eval` (model type hf, float32, on the CPU) and through `evop eval`, and compares every log-probability, greedy flag and
prediction, and the scores with their standard errors. Without tasks: a hundred questions of the bundled set, texts of theirs in the other two
schemas, and cases that are easily got wrong. Needs no network. Prints a line a task; the exit status is 1 where something differs.
--api lets the harness ask `evop serve` instead (model type local-completions): the tasks must have a context in every item.
--golden writes the harness's results, for tests without it: tests/goldens/lm_eval.json is that of models/tiny with --limit 12.
"""
import argparse
import contextlib
import gzip
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

BOOKS = pathlib.Path(__file__).resolve().parents[2] / "models/tiny/continuations.jsonl.gz"
LOGPROB_TOLERANCE = 1e-3
TIE = 1e-4


def read(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


# ---- tasks made here ---------------------------------------------------------------------------------------------------

def made_tasks(work):
    books = read(BOOKS)[:100]
    split = [item["query"].rsplit(" ", 3) for item in books[:50]]
    contexts = [{"contexts": [a[0], b[0]] if i % 2 else [b[0], a[0]], "continuation": " " + " ".join(a[1:]), "gold": 1 - i % 2}
                for i, (a, b) in enumerate(zip(split, split[1:] + split[:1]))]
    targets = [{"context": item["query"].rsplit(" ", 1)[0], "target": " " + item["query"].rsplit(" ", 1)[1]} for item in books[50:]]
    long = " ".join(item["query"] for item in books[:20])  # more tokens than the model's context
    spaced = [
        {"query": "", "choices": [" Once upon a time", " time a upon Once"], "gold": 0},
        {"query": "Then the old man said ", "choices": [" nothing", " that he had nothing to say"], "gold": 1},
        {"query": "A line that ends\n\n  \t", "choices": [" here", " there"], "gold": 0},
        {"query": "A narrow space\u00a0", "choices": [" here", " there", " and there"], "gold": 0},
        {"query": long, "choices": [" and", " so it was that the whole of it was told again from the beginning"], "gold": 0},
        {"query": "Die Königin sagte: „Wie schön“, und", "choices": [" er antwortete – “ja”.", " 彼は笑った。", " naïveté 🙂"], "gold": 0},
        {"query": "Twice the same", "choices": [" thing", " thing", " other"], "gold": 1},
        {"query": "<|endoftext|>It begins with the token that begins", "choices": [" everything.", " nothing."], "gold": 0},
    ]
    joined = [  # no space between: the tokens of the whole needn't begin with those of the query
        {"query": "He was unbelie", "choices": ["vable", "ving", "ver"], "gold": 0},
        {"query": "The end", "choices": ["ing", ".", "\n\nTHE END"], "gold": 1},
        {"query": "", "choices": ["<|endoftext|>Once upon a time", "Once upon a time"], "gold": 1},
        {"query": "Count: 1, 2, ", "choices": ["3", "33", "seventeen"], "gold": 0},
    ]
    named = {"continuations": books, "contexts": contexts, "targets": targets, "cases": spaced, "joined": joined}
    return [write(work / f"{name}.jsonl", items) for name, items in named.items()]


# ---- the harness -------------------------------------------------------------------------------------------------------

def harness_task(name, items, work):
    """Writes the items and a YAML by which the harness renders the same requests as evop, its delimiter taken off the texts."""
    first = items[0]
    texts = [t for item in items for t in (item.get("choices") or [item.get("continuation") or item.get("target")])]
    spaced = [t.startswith(" ") for t in texts]
    if any(spaced) != all(spaced):
        sys.exit(f"{name}: either all texts to score begin with a space or none: the harness has one delimiter a task")
    cut = 1 if all(spaced) else 0
    if "choices" in first:
        rows = [item | {"choices": [c[cut:] for c in item["choices"]]} for item in items]
        columns = {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold"}
        metrics = ["acc", "acc_norm"]
    elif "contexts" in first:
        rows = [item | {"continuation": item["continuation"][cut:]} for item in items]
        columns = {"output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"}
        metrics = ["acc"]
    else:
        rows = items  # a loglikelihood task has no delimiter
        columns = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"}
        metrics = ["acc", "perplexity"]
    data = write(work / f"{name}.harness.jsonl", rows)
    config = {"task": f"evop_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
              "target_delimiter": " " * cut, "num_fewshot": 0, **columns, "metric_list": [{"metric": m} for m in metrics]}
    (work / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return config["task"], metrics


@contextlib.contextmanager
def served(evop, model, work):
    """Arguments of the harness's local-completions for a server of the model, in float32 on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [evop, "serve", "--model", str(model), "--served-model-name", "served", "--dtype", "f32", "--device", "cpu", "--admin-addr", "off",
               "--port", url.rsplit(":", 1)[1], "--data-dir", str(work / "data")]
    with open(work / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while subprocess.run([evop, "health", "--url", f"{url}/ready"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            if server.poll() is not None:
                sys.exit((work / "server.log").read_text())
            time.sleep(0.1)
        with urllib.request.urlopen(f"{url}/v1/models/served") as answer:
            max_length = json.load(answer)["max_model_len"]
        yield {"model": "served", "base_url": f"{url}/v1/completions", "tokenizer": str(model), "tokenizer_backend": "huggingface", "num_concurrent": 8,
               "max_length": max_length}
    finally:
        server.terminate()
        server.wait()


def run_harness(kind, arguments, tasks, work, limit):
    # before the import: these are read when it happens
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), "DISABLE_MULTIPROC": "1",
                   "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import lm_eval
    from lm_eval.tasks import TaskManager
    with open(work / "log", "w") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        return lm_eval.__version__, lm_eval.simple_evaluate(
            model=kind, model_args=arguments, tasks=tasks, limit=limit, batch_size=8, bootstrap_iters=2, log_samples=True,
            task_manager=TaskManager(include_path=str(work), include_defaults=False))


# ---- comparison --------------------------------------------------------------------------------------------------------

def argmax_agrees(ours, theirs, scores):
    return ours == theirs or abs(scores[ours] - scores[theirs]) <= TIE


def first_of_largest(scores):
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def compare_item(ours, sample, metrics, problems):
    theirs = [r for r in sample["filtered_resps"]]
    logprobs = [float(r[0]) for r in theirs]
    where = f"item {ours['index']}"
    worst = max(abs(a - b) for a, b in zip(ours["logprobs"], logprobs, strict=True))
    if worst > LOGPROB_TOLERANCE:
        problems.append(f"{where}: log-probabilities {ours['logprobs']}, harness {logprobs}")
    if ours["is_greedy"] != [bool(r[1]) for r in theirs]:
        problems.append(f"{where}: greedy {ours['is_greedy']}, harness {[r[1] for r in theirs]}")
    tied = False
    for name, key, scores in (("acc", "prediction", logprobs), ("acc_norm", "prediction_norm", None)):
        if name not in metrics or "perplexity" in metrics:
            continue
        scores = scores or [l / n for l, n in zip(logprobs, ours["lengths"])]
        best = first_of_largest(scores)
        if not argmax_agrees(ours[key], best, scores):
            problems.append(f"{where}: {key} {ours[key]}, harness {best} of {scores}")
        tied |= ours[key] != best
    for name in ("acc", "acc_norm"):
        if name in metrics and float(ours[name]) != float(sample[name]) and not tied:
            problems.append(f"{where}: {name} {ours[name]}, harness {sample[name]}")
    return worst, tied


def compare_task(name, ours, items, theirs, samples, metrics):
    problems, worst, ties = [], 0.0, 0
    for item, sample in zip(items, sorted(samples, key=lambda s: s["doc_id"]), strict=True):
        difference, tied = compare_item(item, sample, metrics, problems)
        worst, ties = max(worst, difference), ties + tied
    for metric in metrics:
        mine = ours[metric] if metric == "perplexity" else ours[metric]["value"]
        expected = theirs[f"{metric},none"]
        if not (math.isclose(mine, expected, rel_tol=1e-4) or abs(mine - expected) <= (ties + 0.5) / len(items) * (ties > 0)):
            problems.append(f"{metric} {mine}, harness {expected}")
        if metric != "perplexity" and not ties and not math.isclose(ours[metric]["stderr"], theirs[f"{metric}_stderr,none"], rel_tol=1e-6):
            problems.append(f"{metric}: standard error {ours[metric]['stderr']}, harness {theirs[f'{metric}_stderr,none']}")
    shown = ", ".join(f"{m} {theirs[f'{m},none']:.4f}" for m in metrics)
    print(f"{'not ok' if problems else 'ok'} - {name}: {len(items)} items, {shown}; largest difference of a log-probability {worst:.1e}, ties {ties}", flush=True)
    for problem in problems[:10]:
        print("    " + problem)
    return not problems


def golden(files, limit, tasks, harness):
    """What the harness made of the tasks' lines."""
    def item(sample):
        scores = {key: sample[key] for key in ("acc", "acc_norm") if key in sample}
        return {"logprobs": [float(r[0]) for r in sample["filtered_resps"]], "is_greedy": [bool(r[1]) for r in sample["filtered_resps"]], **scores}

    def task(file, name, metrics):
        samples = sorted(harness["samples"][name], key=lambda s: s["doc_id"])
        results = {m: harness["results"][name][f"{m},none"] for m in metrics}
        errors = {f"{m}_stderr": harness["results"][name][f"{m}_stderr,none"] for m in metrics if m != "perplexity"}
        return {"lines": read(file)[:limit], "items": [item(s) for s in samples], **results, **errors}
    return {file.name: task(file, name, metrics) for file, (name, metrics) in zip(files, tasks, strict=True)}


def main(evop, model, files, limit, golden_file, api):
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        files = files or made_tasks(work)
        stems = [f.name.removesuffix(".gz").removesuffix(".jsonl") for f in files]
        configured = [harness_task(stem, read(f)[:limit], work) for stem, f in zip(stems, files)]
        items = work / "items"
        command = [evop, "eval", "--model", str(model), "--device", "cpu", "--json", "--items", str(items), "--tasks", ",".join(map(str, files))]
        summary = json.loads(subprocess.run(command + (["--limit", str(limit)] if limit else []), check=True, stdout=subprocess.PIPE).stdout)
        lines = read(items)
        # without its cache: that takes the wrong rows where two tasks split one text at different places
        # (a checkpoint whose layers differ brings its modelling file)
        itself = contextlib.nullcontext({"pretrained": str(model), "dtype": "float32", "device": "cpu", "logits_cache": False, "trust_remote_code": True})
        kind = "local-completions" if api else "hf"
        with served(evop, model, work) if api else itself as arguments:
            version, harness = run_harness(kind, arguments, [task for task, _ in configured], work, limit)
        print(f"lm-evaluation-harness {version}, {kind}, {model}")
        if golden_file:
            made = {"lm_eval": version, "tasks": golden(files, limit, configured, harness)}
            golden_file.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        passed = [compare_task(stem, ours, [i for i in lines if i["task"] == stem], harness["results"][task], harness["samples"][task], metrics)
                  for stem, ours, (task, metrics) in zip(stems, summary["tasks"], configured, strict=True)]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evop")
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tasks", nargs="*", type=pathlib.Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--golden", type=pathlib.Path)
    parser.add_argument("--api", action="store_true")
    args = parser.parse_args()
    main(args.evop, args.model, args.tasks, args.limit, args.golden, args.api)
