"""`gptchat bench serve`: a running server, beside its engine alone and transformers behind a lock.

In a round all clients send one request at the same time, with the same random prompt. Answers are
sampled, streamed and equally long: the token that would end one is forbidden. The result is seconds
per new token, all clients together. The environment variable OPENAI_API_KEY holds a server's key.
"""

import argparse
import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from threading import Lock
from typing import Any
from urllib.error import HTTPError

import torch

from gptchat.bench import Report, check_context, positive
from gptchat.bench.decode import Transformers, benchmark_model, differences
from gptchat.console import UserError
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.linear import DTYPES
from gptchat.inference.sampling import LARGEST_BIAS, Sampling
from gptchat.model import pretrained
from gptchat.runtime import tune_memory

# The server itself is measured, whatever http_proxy says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
DEFAULT_URL = "http://127.0.0.1:8080/predictions/chatlm/1.0/v1/completions"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    clients = [1, 8, 32, 64]
    choices = ("auto", *DTYPES)  # the server's own setting is auto, too
    add("--model", metavar="DIR", required=True, help="directory of the model that is served")
    add("--url", default=DEFAULT_URL, help="the server's completions (%(default)s)")
    clients_help = f"at once ({' '.join(map(str, clients))})"
    add("--clients", nargs="+", type=positive, default=clients, help=clients_help)
    add("--dtype", default="auto", choices=choices, help="of the engine alone (%(default)s)")
    add("--prompt", type=positive, default=32, help="tokens of the prompt (%(default)s)")
    add("--new", type=positive, default=64, help="new tokens of an answer (%(default)s)")


def ask(url: str, request: Request) -> tuple[list[float], int]:
    """Stream one answer: the seconds to the first chunk and between the others, and its tokens.

    Raises UserError if there is no answer.
    """
    body: dict[str, Any] = {
        "prompt": request.input_ids,
        "max_tokens": request.sampling.max_new_tokens,
        "seed": request.sampling.seed,
        "logit_bias": dict(request.sampling.logit_bias),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        headers["authorization"] = f"Bearer {key}"
    stamps = [time.perf_counter()]
    message = urllib.request.Request(url, json.dumps(body).encode(), headers)
    chunks = []
    try:
        with DIRECT.open(message, timeout=600) as response:
            # Reading events or lines meanwhile would take the server's time.
            while chunk := response.read1():
                stamps.append(time.perf_counter())
                chunks.append(chunk)
        counts = re.findall(rb'"completion_tokens": ?(\d+)', b"".join(chunks))
        tokens = int(counts[-1])
    except HTTPError as error:
        reason = " ".join(error.read(300).decode("utf-8", "replace").split())
        raise UserError(f"{url}: status {error.code}: {reason}") from None
    except (OSError, HTTPException, IndexError) as error:
        raise UserError(
            f"{url}: cannot be asked: {error}; wanted the completions of a running server, "
            "see `make serve`"
        ) from None
    return differences(stamps), tokens


class ServingBenchmark:
    """The contestants. Each answers `n` clients at once and yields the new tokens of each."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        model, tokenizer, task = benchmark_model(args.model)
        assert tokenizer is not None  # --model is required
        check_context(args.prompt + args.new, "--prompt and --new", model.config.n_positions)
        self.peer = Transformers(model)
        self.lock = Lock()
        self.engine = Engine(model, max(args.clients), dtype=args.dtype)
        prompt = torch.randint(len(tokenizer.token_bytes), (args.prompt,)).tolist()
        stop_ids = pretrained.stop_ids(model.config, tokenizer, task)
        never_ends = dict.fromkeys(stop_ids, -LARGEST_BIAS)
        self.request = Request(
            prompt,
            token_type_ids=[1] * len(prompt) if task == "chatlm" else None,
            sampling=Sampling(seed=1, max_new_tokens=args.new, logit_bias=never_ends),
            stop_ids=stop_ids,
        )
        self.first_chunk_seconds: list[float] = []
        self.between_chunks_seconds: list[float] = []
        self.threads = ThreadPoolExecutor(max(args.clients))

    def transformers(self, n: int) -> Iterable[int]:
        prompts = torch.tensor([self.request.input_ids])  # (1, T)

        def answer(_: int) -> int:
            with self.lock:
                return len(self.peer.generate(prompts, self.args.new, Sampling()))

        # These threads must end, and with them the OpenMP threads of each, which would take cores
        # from the engine's.
        with ThreadPoolExecutor(n) as threads:
            return list(threads.map(answer, range(n)))

    def engine_alone(self, n: int) -> Iterable[int]:
        for candidates in generate(self.engine, [self.request] * n):
            yield len(candidates[0].ids)

    def server(self, n: int) -> Iterable[int]:
        def answer(_: int) -> int:
            seconds, tokens = ask(self.args.url, self.request)
            self.first_chunk_seconds.append(seconds[0])
            self.between_chunks_seconds.extend(seconds[1:])
            return tokens

        return self.threads.map(answer, range(n))

    def race(self, n: int, report: Report) -> None:
        self.first_chunk_seconds.clear()
        self.between_chunks_seconds.clear()
        contestants = {
            "transformers, one lock": partial(seconds_per_token, self.transformers, n),
            "engine alone": partial(seconds_per_token, self.engine_alone, n),
            "server": partial(seconds_per_token, self.server, n),
        }
        report.race(f"{n} clients", "tokens/s", contestants, self.args.rounds)
        percentiles = statistics.quantiles(self.between_chunks_seconds, n=100)
        report.note(
            "server",
            first_token_ms=f"{statistics.median(self.first_chunk_seconds) * 1e3:.0f}",
            token_ms=f"{percentiles[49] * 1e3:.1f}",
            token_p99_ms=f"{percentiles[98] * 1e3:.1f}",
        )


def seconds_per_token(answer: Callable[[int], Iterable[int]], n: int) -> list[float]:
    start = time.perf_counter()
    tokens = sum(answer(n))
    return [(time.perf_counter() - start) / max(1, tokens)]


def run(args: argparse.Namespace, report: Report) -> None:
    benchmark = ServingBenchmark(args)
    tune_memory()
    for n in args.clients:
        benchmark.race(n, report)
