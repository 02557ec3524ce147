"""A running server beside its engine alone and transformers behind a lock."""

import argparse
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import torch

from gptchat.bench.decode import Transformers, start_model
from gptchat.bench.report import Report
from gptchat.console import UserError
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained


def ask(url: str, prompt: list[int], n: int, stream: bool) -> tuple[list[float], int]:
    """One request to the completions API: seconds to the first chunk and between the further ones, and tokens."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": n, "seed": 1}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    headers, stamps, tokens = {"content-type": "application/json"}, [time.perf_counter()], 0
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600
    ) as answer:
        for line in filter(lambda line: line.startswith((b"data: {", b"{")), answer):
            stamps.append(time.perf_counter())
            usage = json.loads(line.removeprefix(b"data: ")).get("usage") or {}
            tokens = usage.get("completion_tokens", tokens)
    return [b - a for a, b in zip(stamps, stamps[1:], strict=False)], tokens


def bench_serving(args: argparse.Namespace, report: Report) -> None:
    """Clients at once, each with one request a round, random prompt and draws; seconds per token, all clients
    together."""
    model, text, task = start_model(args.model)
    if not text:
        raise UserError(
            "serve: found no --model; wanted the directory of the model that runs at --url"
        )
    peer, lock, engine = (
        Transformers(model),
        Lock(),
        Engine(model, max(args.clients), dtype=args.dtypes[0]),
    )
    prompt = torch.randint(len(text.token_bytes), (args.prompt,)).tolist()
    types = [1] * len(prompt) if task == "chatlm" else None
    request = Request(
        prompt,
        types,
        Sampling(seed=1, max_new_tokens=args.new),
        1,
        (pretrained.stop_id(text, task),),
    )
    firsts: list[float] = []
    gaps: list[float] = []
    threads = ThreadPoolExecutor(max(args.clients))

    def locked(_: int) -> int:
        with lock:
            return len(peer.generate(torch.tensor([prompt]), args.new, do_sample=True))

    def served(stream: bool, _: int) -> int:
        (first, *others), tokens = ask(args.url, prompt, args.new, stream)
        firsts.extend([first] * stream)
        gaps.extend(others)
        return tokens

    def alone(numbers: range) -> list[int]:
        return [len(answer[0].ids) for answer in generate(engine, [request] * len(numbers))]

    def per_token(run: Callable[[range], Iterable[int]], n: int) -> list[float]:
        start, tokens = time.perf_counter(), sum(run(range(n)))
        return [(time.perf_counter() - start) / max(1, tokens)]

    for n in args.clients:
        firsts.clear()
        gaps.clear()
        report.race(
            f"{n} clients",
            "tokens/s",
            {
                "transformers, one lock": partial(per_token, partial(threads.map, locked), n),
                "engine alone": partial(per_token, alone, n),
                "server": partial(per_token, partial(threads.map, partial(served, True)), n),
                "server, not streamed": partial(
                    per_token, partial(threads.map, partial(served, False)), n
                ),
            },
            args.rounds,
        )
        middle, *_, highest = (value * 1e3 for value in statistics.quantiles(gaps, n=100)[49::49])
        report.note(
            "server",
            first_token_ms=f"{statistics.median(firsts) * 1e3:.0f}",
            token_ms=f"{middle:.1f}",
            token_p99_ms=f"{highest:.1f}",
        )
