"""How large a model, and how many steps: from the data, the machine and the minutes wanted.

The rules, in this order:
- Minutes: STEPS_SHARE of them are for optimizer steps, the rest for everything else. An LM and its
  ChatLM divide them by LM_SHARE. What the ChatLM cannot use, since its steps end with MAX_EPOCHS,
  goes to the LM, which may become larger; then both are planned again, ROUNDS times. The time of a
  step is measured on the default model (a few steps) and scaled by floating-point operations.
- Context: the default's; twice that if more than one dialogue in ten would be cut, four times if
  more than three in ten would. Long conversations that are read in several examples are not cut. A
  step has as many tokens as the default's.
- Vocabulary: an entry for each BYTES_PER_ENTRY bytes of text, rounded down to a power of two, at
  most as many as the default.
- Steps: as many as there is time for, but MAX_EPOCHS passes over the data at most.
- Model: the largest of SIZES of which each parameter is trained on as many tokens as in the default
  run (on one, where that counts epochs). A ChatLM has the size of its LM.
- Held out: HELD_OUT_BYTES for valid and as much for test, HELD_OUT_DOCUMENTS at least, a tenth of
  the data at most.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as for training: see train.py

import torch

from gptchat.config import Config, DataConfig, TokenizerConfig
from gptchat.console import UserError
from gptchat.data.check import BYTES_PER_TOKEN, Report, check
from gptchat.model.devices import default_device
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import tune_memory
from gptchat.training.metrics import autocast, resolve_precision
from gptchat.training.monitor import step_flops
from gptchat.training.optim import clip_gradients, make_optimizers

SIZES = ((2, 128), (3, 192), (4, 256), (6, 384), (8, 512), (12, 768), (16, 1024))  # layers, width
HEAD_WIDTH = 64
STEPS_SHARE = 0.8
LM_SHARE = 0.55
ROUNDS = 2  # of planning again; a larger LM makes the ChatLM slower, which needs more of its share
MEASURED_STEPS = 3
MEASURED_SECONDS = 4  # on a slow machine it takes fewer steps
MAX_EPOCHS = 10
FRESH_EPOCHS = 4  # up to these, repeated text teaches nearly as much as new (Muennighoff 2023)
BYTES_PER_ENTRY = 500
MIN_ENTRIES = 1024
HELD_OUT_BYTES = 500_000
HELD_OUT_DOCUMENTS = 20


class Speed(NamedTuple):
    """How fast a training step of the default model was just now."""

    device: str
    flops: float  # floating-point operations a second


@dataclass(frozen=True)
class Plan:
    """The numbers of one config."""

    size: tuple[int, int]  # layers, width
    vocab_size: int
    n_ctx: int
    batch_size: int
    num_steps: int
    epochs: float  # passes over the data in these steps
    seconds: float  # that the steps take
    held_out: float


def survey(
    task: str, patterns: Sequence[str], n_ctx: int, targets: str = "response"
) -> tuple[Report, str]:
    """(what the files hold, how they are cut into documents); `n_ctx` is the default context.

    `targets`, of [data], decides which dialogues would be cut. Text without blank lines is cut into
    lines. Raises UserError for missing files, or too little.
    """
    for document in ("block", "line"):
        config = Config(
            task=task,
            data=DataConfig(train=tuple(patterns), document=document, targets=targets),
            tokenizer=TokenizerConfig(dir=""),
            model=replace(Config().model, n_ctx=n_ctx),
        )
        report = check(config)
        if report.refusals:
            raise UserError(report.refusals[0])
        if report.documents["train"] >= 2 * HELD_OUT_DOCUMENTS:
            return report, document
    raise UserError(
        f"{', '.join(patterns)}: found {report.documents['train']} {report.unit}; wanted "
        f"{2 * HELD_OUT_DOCUMENTS} or more, since some are held out"
    )


def measure(recipe: Config) -> Speed:
    """Train the model of a default config for a few steps on random ids."""
    device = default_device()
    tune_memory()
    model = GPT2(model_config((recipe.model.n_layer, recipe.model.n_embd), recipe)).to(device)
    optimizers = make_optimizers(model.train(), recipe.train)
    precision = resolve_precision(recipe.train.precision, device)
    shape = (recipe.train.batch_size, recipe.model.n_ctx + 1)
    ids = torch.randint(recipe.tokenizer.vocab_size, shape, device=device)

    def step() -> float:
        start = time.perf_counter()
        with autocast(device, precision):
            loss = model(input_ids=ids[:, :-1], targets=ids[:, 1:].flatten())
        (loss / ids.numel()).backward()
        clip_gradients(model, recipe.train.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model.ln_f.weight[0].item()  # waits for a GPU
        return time.perf_counter() - start

    times = [step()]
    while len(times) <= MEASURED_STEPS and sum(times) < MEASURED_SECONDS:
        times.append(step())
    seconds = min(times)  # the first allocates, others may be disturbed
    n_tokens = shape[0] * (shape[1] - 1)
    return Speed(device, step_flops(model.config, n_tokens, n_tokens, shape[1] - 1) / seconds)


def model_config(size: tuple[int, int], recipe: Config, vocab_size: int = 0) -> GPT2Config:
    n_layer, n_embd = size
    n_head = max(1, n_embd // HEAD_WIDTH)
    model = replace(recipe.model, n_layer=n_layer, n_embd=n_embd, n_head=n_head)
    return GPT2Config.of(model, vocab_size or recipe.tokenizer.vocab_size)


def n_parameters(config: GPT2Config) -> int:
    """Matrices only: the rest is less than a hundredth."""
    return config.n_embd * (config.vocab_size + 12 * config.n_layer * config.n_embd)


def tokens_per_step(recipe: Config) -> int:
    train = recipe.train
    return train.batch_size * train.gradient_accumulation_steps * recipe.model.n_ctx


def text_bytes(report: Report) -> float:
    """UTF-8 bytes of documents or turns; the report, made without a tokenizer, counts tokens so."""
    return report.n_tokens * BYTES_PER_TOKEN


def count_tokens(report: Report, vocab_size: int) -> float:
    """Tokens of the data: English has 2.1 bytes a token with 512 entries, 4.1 with 8,192."""
    bytes_per_token = min(4.4, 2.1 + 0.5 * math.log2(vocab_size / 512))
    return text_bytes(report) / bytes_per_token


def choose_vocabulary(n_bytes: float, recipe: Config) -> int:
    entries = 2 ** int(math.log2(max(1, n_bytes / BYTES_PER_ENTRY)))
    return min(max(entries, MIN_ENTRIES), recipe.tokenizer.vocab_size)


def cut_share(report: Report) -> float:
    """The share of dialogues of which something would be cut in the default context."""
    return report.cut_rows / report.documents["train"]


def choose_context(report: Report, recipe: Config) -> int:
    n_ctx = recipe.model.n_ctx
    if cut_share(report) > 0.3:
        return 4 * n_ctx
    return 2 * n_ctx if cut_share(report) > 0.1 else n_ctx


def choose_held_out(report: Report) -> float:
    share = max(HELD_OUT_BYTES / text_bytes(report), HELD_OUT_DOCUMENTS / report.documents["train"])
    return float(f"{min(0.1, share):.2g}")


def tokens_in_time(
    size: tuple[int, int], vocab_size: int, n_ctx: int, seconds: float, speed: Speed, recipe: Config
) -> float:
    """How many tokens a model of this size is trained on in the time."""
    config = model_config(size, recipe, vocab_size)
    return seconds * speed.flops / step_flops(config, 1, 1, n_ctx)


def choose_size(
    n_tokens: float, vocab_size: int, n_ctx: int, seconds: float, speed: Speed, recipe: Config
) -> tuple[int, int]:
    """The largest size that sees enough tokens of data of `n_tokens`."""
    default = model_config((recipe.model.n_layer, recipe.model.n_embd), recipe)
    n_default = recipe.train.num_steps * tokens_per_step(recipe)
    wanted = n_default / n_parameters(default)
    if n_default == 0:  # a default that counts epochs
        wanted = 1.0
    chosen = SIZES[0]
    for size in SIZES[1:]:
        seen = tokens_in_time(size, vocab_size, n_ctx, seconds, speed, recipe)
        seen = min(seen, MAX_EPOCHS * n_tokens)
        if seen >= wanted * n_parameters(model_config(size, recipe, vocab_size)):
            chosen = size
    return chosen


def make_plan(
    report: Report,
    seconds: float,
    speed: Speed,
    recipe: Config,
    vocab_size: int,
    n_ctx: int,
    size: tuple[int, int] | None = None,
) -> Plan:
    """The numbers for this data in this time; `size` is that of the LM to start from."""
    held_out = choose_held_out(report)
    n_tokens = count_tokens(report, vocab_size) * (1 - 2 * held_out)
    if size is None:
        size = choose_size(n_tokens, vocab_size, n_ctx, seconds, speed, recipe)
    seen = tokens_in_time(size, vocab_size, n_ctx, seconds, speed, recipe)
    step_tokens = tokens_per_step(recipe)
    num_steps = max(20, int(min(seen, MAX_EPOCHS * n_tokens) / step_tokens))
    return Plan(
        size=size,
        vocab_size=vocab_size,
        n_ctx=n_ctx,
        batch_size=max(1, recipe.train.batch_size * recipe.model.n_ctx // n_ctx),
        num_steps=num_steps,
        epochs=num_steps * step_tokens / n_tokens,
        seconds=seconds * num_steps * step_tokens / seen,
        held_out=held_out,
    )


def divide(seconds: float, plan: Callable[..., Plan]) -> dict[str, Plan]:
    """The plans of an LM and its ChatLM, which take `seconds` of optimizer steps together, at most.

    `plan(task, seconds, size)` plans one of them; without `size` it is chosen.
    """
    lm_share = LM_SHARE * seconds
    lm_seconds = lm_share
    for _ in range(1 + ROUNDS):
        size = plan("lm", lm_seconds).size
        chatlm = plan("chatlm", seconds - lm_share, size)
        lm_seconds = max(lm_share, seconds - chatlm.seconds)
    return {"lm": plan("lm", lm_seconds, size), "chatlm": chatlm}
