"""How large a model, and how many steps: from the data, the machine and the minutes wanted.

The rules:
- Minutes: STEPS_SHARE of them are for optimizer steps, the rest for everything else. An LM and its
  ChatLM divide them by LM_SHARE. Time that the ChatLM cannot use, since its steps end with
  MAX_EPOCHS, goes to more steps of the LM. The time of a step is measured on the default model
  and scaled by floating-point operations.
- Context: the default's; twice that if more than one dialogue in ten would be cut, four times if
  more than three in ten would. A step has as many tokens as the default's.
- Vocabulary: an entry for each BYTES_PER_ENTRY bytes of text, rounded down to a power of two, at
  most as many as the default.
- Steps: as many as there is time for, but MAX_EPOCHS passes over the data at most.
- Model: the largest of SIZES of which each parameter is trained on as many tokens as in the default
  run (on one, if that counts epochs). A ChatLM has the size of its LM.
- Held out: HELD_OUT_BYTES for valid and as much for test, HELD_OUT_DOCUMENTS at least, a tenth of
  the data at most.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as for training: see train.py

import torch

from gptchat.config import Config, DataConfig, ModelConfig, TokenizerConfig
from gptchat.console import UserError
from gptchat.data.check import Report, bytes_per_token, check
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import default_device, tune_memory
from gptchat.training.metrics import autocast, resolve_precision
from gptchat.training.monitor import step_flops
from gptchat.training.optim import clip_gradients, make_optimizers

SIZES = ((2, 128), (3, 192), (4, 256), (6, 384), (8, 512), (12, 768), (16, 1024))  # layers, width
HEAD_WIDTH = 64
STEPS_SHARE = 0.8
LM_SHARE = 0.55
MEASURED_STEPS = 3
MAX_EPOCHS = 10
BYTES_PER_ENTRY = 500
MIN_ENTRIES = 1024
HELD_OUT_BYTES = 500_000
HELD_OUT_DOCUMENTS = 20


@dataclass(frozen=True)
class Plan:
    """The numbers of one config."""

    model: ModelConfig
    vocab_size: int
    batch_size: int
    num_steps: int
    epochs: float  # passes over the data in these steps
    seconds: float  # that the steps take
    held_out: float


@dataclass(frozen=True)
class Sizer:
    """Plans configs for one machine; `recipe` is the default config of an LM."""

    recipe: Config
    flops: float  # floating-point operations a second of its training steps
    vocab_size: int
    n_ctx: int

    def plan(self, report: Report, recipe: Config, seconds: float, lm: Plan | None = None) -> Plan:
        """The numbers for this data in this time; `recipe` has the [train] of its task.

        A ChatLM has the model of the plan `lm`, if there is one.
        """
        held_out = choose_held_out(report)
        n_tokens = count_tokens(report, self.vocab_size) * (1 - 2 * held_out)
        most = MAX_EPOCHS * n_tokens
        model = lm.model if lm else self._largest(seconds, most)
        seen = min(self._tokens_in(seconds, model), most)
        step_tokens = tokens_per_step(recipe)
        num_steps = max(20, int(seen / step_tokens))
        return Plan(
            model=model,
            vocab_size=self.vocab_size,
            batch_size=max(1, recipe.train.batch_size * self.recipe.model.n_ctx // self.n_ctx),
            num_steps=num_steps,
            epochs=num_steps * step_tokens / n_tokens,
            seconds=seconds * num_steps * step_tokens / self._tokens_in(seconds, model),
            held_out=held_out,
        )

    def _tokens_in(self, seconds: float, model: ModelConfig) -> float:
        """How many tokens a model is trained on in the time."""
        config = GPT2Config.of(model, self.vocab_size)
        return seconds * self.flops / step_flops(config, 1, 1, self.n_ctx)

    def _largest(self, seconds: float, most: float) -> ModelConfig:
        """The largest model that is trained on enough tokens in the time, `most` at most."""
        default = GPT2Config.of(self.recipe.model, self.recipe.tokenizer.vocab_size)
        n_default = self.recipe.train.num_steps * tokens_per_step(self.recipe)
        enough = n_default / n_parameters(default) if n_default else 1.0  # for a parameter
        fitting = [self._model(*SIZES[0])]
        for size in SIZES[1:]:
            model = self._model(*size)
            wanted = enough * n_parameters(GPT2Config.of(model, self.vocab_size))
            if min(self._tokens_in(seconds, model), most) >= wanted:
                fitting.append(model)
        return fitting[-1]

    def _model(self, n_layer: int, n_embd: int) -> ModelConfig:
        n_head = max(1, n_embd // HEAD_WIDTH)
        size = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_ctx": self.n_ctx}
        return replace(self.recipe.model, **size)


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


def measure(recipe: Config) -> float:
    """FLOP/s of a training step of the default model, measured in a few steps on random ids."""
    device = default_device()
    tune_memory()
    config = GPT2Config.of(recipe.model, recipe.tokenizer.vocab_size)
    model = GPT2(config).to(device).train()
    optimizer = make_optimizers(model, recipe.train)
    precision = resolve_precision(recipe.train.precision, device)
    shape = (recipe.train.batch_size, recipe.model.n_ctx + 1)
    ids = torch.randint(config.vocab_size, shape, device=device)
    seconds = math.inf  # the first step allocates, and others may be disturbed: the fastest counts
    for _ in range(1 + MEASURED_STEPS):
        start = time.perf_counter()
        with autocast(device, precision):
            loss = model(input_ids=ids[:, :-1], targets=ids[:, 1:].flatten())
        (loss / ids.numel()).backward()
        clip_gradients(model, recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.ln_f.weight[0].item()  # waits for a GPU
        seconds = min(seconds, time.perf_counter() - start)
    n_tokens = recipe.train.batch_size * recipe.model.n_ctx
    return step_flops(config, n_tokens, n_tokens, recipe.model.n_ctx) / seconds


def n_parameters(config: GPT2Config) -> int:
    """Those of the matrices: the rest is less than a hundredth."""
    return config.n_embd * (config.vocab_size + 12 * config.n_layer * config.n_embd)


def tokens_per_step(recipe: Config) -> int:
    train = recipe.train
    return train.batch_size * train.gradient_accumulation_steps * recipe.model.n_ctx


def count_tokens(report: Report, vocab_size: int) -> float:
    return report.text_bytes / bytes_per_token(vocab_size)


def choose_vocabulary(n_bytes: float, recipe: Config) -> int:
    entries = 2 ** int(math.log2(max(1, n_bytes / BYTES_PER_ENTRY)))
    return min(max(entries, MIN_ENTRIES), recipe.tokenizer.vocab_size)


def cut_share(report: Report) -> float:
    """The share of dialogues of which something would be cut in the default context."""
    return report.cut_rows / report.documents["train"]


def choose_context(report: Report, n_ctx: int) -> int:
    share = cut_share(report)
    return n_ctx * (4 if share > 0.3 else 2 if share > 0.1 else 1)


def choose_held_out(report: Report) -> float:
    share = max(HELD_OUT_BYTES / report.text_bytes, HELD_OUT_DOCUMENTS / report.documents["train"])
    return float(f"{min(0.1, share):.2g}")


def plan_all(
    reports: dict[str, Report], recipes: dict[str, Config], minutes: float, flops: float
) -> dict[str, Plan]:
    """The plan of each task: the LM's first, whose model the ChatLM has."""
    recipe = recipes["lm"]
    n_ctx = recipe.model.n_ctx
    if "chatlm" in reports:
        n_ctx = choose_context(reports["chatlm"], n_ctx)
    vocab_size = choose_vocabulary(sum(report.text_bytes for report in reports.values()), recipe)
    sizer = Sizer(recipe, flops, vocab_size, n_ctx)
    seconds = 60 * minutes * STEPS_SHARE
    if len(reports) == 1:
        return {task: sizer.plan(reports[task], recipes[task], seconds) for task in reports}
    lm = sizer.plan(reports["lm"], recipe, LM_SHARE * seconds)
    chatlm = sizer.plan(reports["chatlm"], recipes["chatlm"], (1 - LM_SHARE) * seconds, lm)
    lm = sizer.plan(reports["lm"], recipe, seconds - chatlm.seconds, lm)
    return {"lm": lm, "chatlm": chatlm}
