"""`gptchat bench draw`: which share of a decoding step the draw of the next tokens takes.

An engine decodes as many rows as --rows, with GPT-2 124M's shapes and random weights, whose flat
distributions are the worst case for top-p. For each of SETTINGS, whole steps are measured, and in
the same steps the part from logits to drawn ids.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gptchat.bench.decode import benchmark_model, full_steps
from gptchat.bench.report import Report, check_context, positive
from gptchat.inference.engine import Engine, Output, Request
from gptchat.inference.linear import DTYPES
from gptchat.inference.sampling import Sampling
from gptchat.runtime import tune_memory

PROMPT = 32  # tokens
SETTINGS = {  # what a line of the report is about -> settings
    "greedy": Sampling(temperature=0),
    "all ids": Sampling(),
    "top-k": Sampling(top_k=40, top_p=0.95),
    "top-p": Sampling(top_p=0.95),
    "min-p": Sampling(min_p=0.05),
    "penalties, top-p": Sampling(repetition_penalty=1.1, frequency_penalty=0.5, top_p=0.95),
    "logit bias": Sampling(logit_bias=dict.fromkeys(range(300), -1.0)),
}


class TimedEngine(Engine):
    """An engine that notes the seconds of each draw for all of its slots."""

    draw_seconds: list[float]

    def _draw(self, first_slot: int, logits: Tensor) -> list[Output]:
        start = time.perf_counter()
        outputs = super()._draw(first_slot, logits)
        if len(logits) == self.slots:
            self.draw_seconds.append(time.perf_counter() - start)
        return outputs

    def measure(self, requests: list[Request]) -> list[float]:
        """The seconds of each step of as many requests as slots."""
        self.draw_seconds = []
        seconds = full_steps(self, requests)
        self.draw_seconds = self.draw_seconds[-len(seconds) :]  # without that of the prefill
        return seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="DIR", help="model directory (default: GPT-2 124M with random weights)")
    add("--dtypes", nargs="+", default=["bfloat16", "int8"], choices=DTYPES, help="of the weights")
    add("--rows", type=positive, default=32, help="sequences in a step (%(default)s)")
    add("--new", type=positive, default=12, help="new tokens per row (%(default)s)")


def run(args: argparse.Namespace, report: Report) -> None:
    model, _, _ = benchmark_model(args.model)
    length = PROMPT + args.new
    check_context(length, f"a prompt of {PROMPT} and --new", model.config.n_positions)
    prompts = torch.randint(model.config.vocab_size, (args.rows, PROMPT)).tolist()
    tune_memory()
    for dtype in args.dtypes:
        engine = TimedEngine(model, args.rows, length, dtype)
        for name, sampling in SETTINGS.items():
            requests = []
            for seed, prompt in enumerate(prompts):
                row_sampling = replace(sampling, max_new_tokens=args.new, seed=seed)
                requests.append(Request(prompt, sampling=row_sampling))
            contestants: dict[str, Callable[[], list[float]]] = {
                f"{dtype}, step": partial(engine.measure, requests),
                f"{dtype}, draw in it": partial(getattr, engine, "draw_seconds"),
            }
            medians = report.race(name, "ms", contestants, args.rounds)
            step, draw = medians.values()
            report.note(f"{dtype}, draw in it", of_the_step=f"{draw / step:.1%}")
