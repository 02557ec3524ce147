"""How large a model, and how many steps: from the data, the machine and the minutes wanted.

- Minutes: STEPS_SHARE of them are for optimizer steps. An LM and its ChatLM divide these by
  LM_SHARE; what the ChatLM cannot use goes to the LM. The time of a step is measured on the default
  model and scaled by floating-point operations.
- Context: the default's; twice that if more than one dialogue in ten would be cut, four times if
  more than three in ten would. A step has as many tokens as the default's.
- Vocabulary: an entry for each BYTES_PER_ENTRY bytes of text, rounded down to a power of two, at
  most as many as the default.
- Model: the largest of SIZES that sees as many tokens for each parameter as in the default run (one
  token, if that counts epochs). A ChatLM has the size of its LM.
- Steps: as many as there is time for, at most MAX_EPOCHS passes over the data.
- Held out: HELD_OUT_BYTES for valid and as much for test, at least HELD_OUT_DOCUMENTS, at most a
  tenth of the data.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as for training: see train.py

import torch

from gptchat.config import Config, DataConfig, ModelConfig, TokenizerConfig, TrainConfig
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
MIN_STEPS = 20
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

    def plan(
        self, report: Report, train: TrainConfig, seconds: float, lm: Plan | None = None
    ) -> Plan:
        """The numbers for this data and time, with the task's default `train`.

        A ChatLM has the model of the plan `lm`, if there is one.
        """
        share = max(
            HELD_OUT_BYTES / report.text_bytes, HELD_OUT_DOCUMENTS / report.documents["train"]
        )
        held_out = float(f"{min(0.1, share):.2g}")
        n_tokens = count_tokens(report, self.vocab_size) * (1 - 2 * held_out)
        most = MAX_EPOCHS * n_tokens
        model = lm.model if lm else self._largest_model(seconds, most)
        rate = self._tokens_per_second(model)
        tokens_per_step = self._tokens_per_step(train)
        num_steps = max(MIN_STEPS, int(min(seconds * rate, most) / tokens_per_step))
        return Plan(
            model=model,
            vocab_size=self.vocab_size,
            batch_size=max(1, train.batch_size * self.recipe.model.n_ctx // self.n_ctx),
            num_steps=num_steps,
            epochs=num_steps * tokens_per_step / n_tokens,
            seconds=num_steps * tokens_per_step / rate,
            held_out=held_out,
        )

    def _largest_model(self, seconds: float, most: float) -> ModelConfig:
        """The largest model that sees enough tokens in the time; it sees `most` at most."""
        train, default = self.recipe.train, self.recipe.model
        tokens_per_parameter = 1.0
        if train.num_steps:
            n_default = n_parameters(default, self.recipe.tokenizer.vocab_size)
            tokens_per_parameter = train.num_steps * self._tokens_per_step(train) / n_default
        models = [
            replace(
                default,
                n_layer=n_layer,
                n_head=n_embd // HEAD_WIDTH,
                n_embd=n_embd,
                n_ctx=self.n_ctx,
            )
            for n_layer, n_embd in SIZES
        ]
        largest = models[0]
        for model in models[1:]:
            seen = min(seconds * self._tokens_per_second(model), most)
            if seen >= tokens_per_parameter * n_parameters(model, self.vocab_size):
                largest = model
        return largest

    def _tokens_per_second(self, model: ModelConfig) -> float:
        return self.flops / step_flops(GPT2Config.of(model, self.vocab_size), 1, 1, self.n_ctx)

    def _tokens_per_step(self, train: TrainConfig) -> int:
        return train.batch_size * train.gradient_accumulation_steps * self.recipe.model.n_ctx


def n_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Those of the matrices: the rest is less than a hundredth."""
    return model.n_embd * (vocab_size + 12 * model.n_layer * model.n_embd)


def count_tokens(report: Report, vocab_size: int) -> float:
    return report.text_bytes / bytes_per_token(vocab_size)


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
            model=ModelConfig(n_ctx=n_ctx),
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
    """FLOP/s of a training step of the default model: the fastest of a few on random ids."""
    device = default_device()
    tune_memory()
    config = GPT2Config.of(recipe.model, recipe.tokenizer.vocab_size)
    model = GPT2(config).to(device).train()
    optimizer = make_optimizers(model, recipe.train)
    precision = resolve_precision(recipe.train.precision, device)
    shape = (recipe.train.batch_size, recipe.model.n_ctx + 1)
    ids = torch.randint(config.vocab_size, shape, device=device)
    seconds = math.inf
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


def plan_all(
    reports: Mapping[str, Report],
    recipe: Config,
    train: Mapping[str, TrainConfig],
    minutes: float,
    flops: float,
) -> dict[str, Plan]:
    """The plan of each task in `reports`; `train` has their default sections [train]."""
    n_ctx = recipe.model.n_ctx
    if "chatlm" in reports:
        dialogues = reports["chatlm"]
        share = dialogues.cut_rows / dialogues.documents["train"]
        if share > 0.3:
            n_ctx *= 4
        elif share > 0.1:
            n_ctx *= 2
    entries = sum(report.text_bytes for report in reports.values()) / BYTES_PER_ENTRY
    rounded = 2 ** int(math.log2(max(MIN_ENTRIES, entries)))
    vocab_size = min(rounded, recipe.tokenizer.vocab_size)
    sizer = Sizer(recipe, flops, vocab_size, n_ctx)
    seconds = 60 * minutes * STEPS_SHARE
    if len(reports) == 1:
        return {task: sizer.plan(reports[task], train[task], seconds) for task in reports}
    lm = sizer.plan(reports["lm"], train["lm"], LM_SHARE * seconds)
    chatlm = sizer.plan(reports["chatlm"], train["chatlm"], (1 - LM_SHARE) * seconds, lm)
    lm = sizer.plan(reports["lm"], train["lm"], seconds - chatlm.seconds, lm)
    return {"lm": lm, "chatlm": chatlm}
