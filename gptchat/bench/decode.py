"""Decoding beside transformers' generate."""

import argparse
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptchat.bench.report import Report, timed
from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.engine import Engine, Request, generate
from gptchat.inference.sampling import Sampling
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import tune_memory

SIZE = {"float32": 4, "bfloat16": 2, "int8": 1}


def start_model(directory: str | None) -> tuple[GPT2, Tokenizer | None, str]:
    torch.manual_seed(0)
    return (
        pretrained.load_model(directory) if directory else (GPT2(GPT2Config()).eval(), None, "lm")
    )


class Transformers:
    """transformers' GPT2LMHeadModel with the weights of ours."""

    def __init__(self, model: GPT2):
        try:
            import transformers
        except ImportError:
            raise UserError(
                "found no transformers, with which to compare; wanted: pip install transformers"
            ) from None
        keys = asdict(model.config) | {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**keys)).eval()
        state = pretrained.hugging_face_state(model)
        self.model.load_state_dict({"lm_head.weight": model.wte.weight} | state, strict=False)

    def generate(self, prompts: Tensor, n: int, **how: Any) -> list[float]:
        """Seconds to each of n tokens; their ids (B, n) are then in `ids`."""
        stamps = [time.perf_counter()]

        def clock(ids: Tensor, scores: Tensor) -> Tensor:
            stamps.append(time.perf_counter())
            return scores

        ids = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n,
            logits_processor=[clock],
            **how or {"do_sample": False},
        )
        self.ids: list[list[int]] = ids[:, prompts.shape[1] :].tolist()
        return [b - a for a, b in zip(stamps, stamps[1:], strict=False)]


def greedy(prompts: list[list[int]], n: int) -> list[Request]:
    return [
        Request(prompt, sampling=Sampling(temperature=0, max_new_tokens=n)) for prompt in prompts
    ]


def full_steps(engine: Engine, requests: list[Request]) -> list[float]:
    """Seconds of each decoding step in which all requests are live."""
    seconds = []
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        full = len(engine.running) == len(requests)
        took = timed(engine.step)
        seconds += took if full else []
    return seconds


def bench_decode(args: argparse.Namespace, report: Report) -> None:
    """Greedy, of random prompts; then how much the smaller dtypes change what the model says."""
    model, text, _ = start_model(args.model)
    config, peer = model.config, Transformers(model)
    first = min(args.first, config.n_positions - 1)
    length = min(config.n_positions, max(args.prompt + args.new, first + 1))
    engines = {dtype: Engine(model, max(args.batches), length, dtype) for dtype in args.dtypes}
    tune_memory()
    weights = torch.ones(
        sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    )
    for batch in args.batches:
        prompts = torch.randint(config.vocab_size, (batch, args.prompt))
        asked = greedy(prompts.tolist(), args.new)
        medians = report.race(
            f"decode, batch {batch}",
            "tokens/s",
            {
                "transformers": partial(peer.generate, prompts, args.new),
                **{dtype: partial(full_steps, engine, asked) for dtype, engine in engines.items()},
                "reading float32": lambda: [timed(weights.sum)[0] for _ in range(args.new)],
            },
            args.rounds,
            batch,
        )
        cached = 8 * config.n_layer * config.n_embd * batch * (args.prompt + args.new / 2)  # bytes
        for dtype in engines:  # the limit is the time to read as many bytes as the step must
            limit = (
                medians["reading float32"]
                * (weights.numel() * SIZE[dtype] + cached)
                / weights.nbytes
            )
            report.note(dtype, of_memory_limit=f"{limit / medians[dtype]:.0%}")
        if "float32" in engines:
            same = sum(
                a[0].ids == ids
                for a, ids in zip(generate(engines["float32"], asked), peer.ids, strict=True)
            )
            report.note("float32", equal_greedy_rows=f"{same} of {batch}")
    prompts = torch.randint(config.vocab_size, (1, first))
    report.race(
        f"first token of {first}",
        "ms",
        {
            "transformers": partial(peer.generate, prompts, 1),
            **{
                dtype: partial(timed, partial(generate, engine, greedy(prompts.tolist(), 1)))
                for dtype, engine in engines.items()
            },
        },
        args.rounds,
    )
    ids = torch.randint(config.vocab_size, (16, min(256, config.n_positions)))
    if text and args.text:
        known = text.encode(Path(args.text).read_text(encoding="utf-8")[: 16 * ids.numel()])[
            : ids.numel()
        ]
        ids = torch.tensor(known[: len(known) // ids.shape[1] * ids.shape[1]]).view(
            -1, ids.shape[1]
        )
    for dtype, engine in engines.items():
        agreement, perplexity = quality(model, engine.model, ids)
        report.note(dtype, top1_agreement=f"{agreement:.2%}", perplexity=f"{perplexity:.2f}")


@torch.inference_mode()
def quality(model: GPT2, packed: GPT2, ids: Tensor) -> tuple[float, float]:
    """Teacher-forced on the rows `ids`: how often the packed model's best token is the model's, and its perplexity."""
    same, loss = 0.0, 0.0
    for row in ids.split(1):
        wanted, logits = (m.logits(m(row))[0, :-1].float() for m in (model, packed))
        same += (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item() / len(ids)
        loss += F.cross_entropy(logits, row[0, 1:]).item() / len(ids)
    return same, math.exp(loss)
